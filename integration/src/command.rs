//! Running a program to its end, with a time limit and an error that says what it printed.

use std::io::{BufRead as _, BufReader, Read as _};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// How long a program may take unless its caller says otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Runs `program` and returns its standard output.
///
/// # Errors
/// If it can't be started, takes longer than [`PATIENCE`] or fails; the error holds the command line and its output.
pub fn run<I, S>(program: impl AsRef<Path>, arguments: I) -> anyhow::Result<String>
where
    I: IntoIterator<Item = S>,
    S: AsRef<std::ffi::OsStr>,
{
    let mut command = Command::new(program.as_ref());
    command.args(arguments);
    output_of(&mut command, PATIENCE)
}

/// Runs `command` for at most `limit` and returns its standard output.
pub fn output_of(command: &mut Command, limit: Duration) -> anyhow::Result<String> {
    let output = finish(command, limit)?;
    if !output.status.success() {
        bail!("{}", describe(command, &output));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs `command`, which has to fail, and returns everything it printed.
pub fn failure_of(command: &mut Command, limit: Duration) -> anyhow::Result<String> {
    let output = finish(command, limit)?;
    if output.status.success() {
        bail!("succeeded, but should have failed: {}", describe(command, &output));
    }
    let (out, err) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(format!("{out}{err}"))
}

/// The beginning of what a command printed, and when.
#[derive(Clone, Debug)]
pub struct FirstLine {
    /// Without its end.
    pub text: String,
    /// From the call until the line was complete.
    pub after: Duration,
}

/// Runs `command` for at most `limit` to its end, and returns its first line of standard output.
pub fn first_line(command: &mut Command, limit: Duration) -> anyhow::Result<FirstLine> {
    let start = Instant::now();
    let mut child = limited(command, limit)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut stdout = BufReader::new(child.stdout.take().context("standard output is no pipe")?);
    let mut text = String::new();
    let read = stdout.read_line(&mut text);
    let after = start.elapsed();
    let mut rest = Vec::new();
    let read = read.and_then(|_| stdout.read_to_end(&mut rest));
    let mut output = child.wait_with_output().with_context(|| format!("wait for {command:?}"))?;
    read.with_context(|| format!("read the output of {command:?}"))?;
    if !output.status.success() {
        output.stdout = [text.into_bytes(), rest].concat();
        bail!("{}", describe(command, &output));
    }
    Ok(FirstLine { text: text.trim_end().to_owned(), after })
}

/// Runs `command` for at most `limit`.
pub fn finish(command: &mut Command, limit: Duration) -> anyhow::Result<Output> {
    limited(command, limit).output().with_context(|| format!("start {command:?}"))
}

/// `command`, which coreutils' `timeout` kills after `limit`.
fn limited(command: &Command, limit: Duration) -> Command {
    let mut limited = Command::new("timeout");
    limited.arg("--signal=KILL").arg(format!("{}", limit.as_secs_f64()));
    limited.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => limited.env(key, value),
            None => limited.env_remove(key),
        };
    }
    if let Some(folder) = command.get_current_dir() {
        limited.current_dir(folder);
    }
    limited.stdin(Stdio::null());
    limited
}

/// The command line, how it ended, and the end of what it printed: progress bars come first.
fn describe(command: &Command, output: &Output) -> String {
    let tail = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    };
    format!("{command:?}: {}\n{}\n{}", output.status, tail(&output.stdout), tail(&output.stderr))
}

/// Polls `state` until it gives a value.
///
/// # Errors
/// If it gives none within `limit`; `what` names the state that was waited for.
pub fn wait_for<T>(
    what: &str,
    limit: Duration,
    mut state: impl FnMut() -> Option<T>,
) -> anyhow::Result<T> {
    let start = Instant::now();
    loop {
        if let Some(value) = state() {
            return Ok(value);
        }
        if start.elapsed() > limit {
            bail!("waited {:.1} s in vain: {what}", start.elapsed().as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
