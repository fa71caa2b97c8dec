//! `get`: a file at an HTTP(S) address, through the swarm where it may be shared.
//!
//! Written into `FILE.part` and renamed when it is whole. `FILE.part.of` says which file the part is
//! of, so that a later call goes on where this one stopped.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use skimmer_proto::Digest;
use skimmer_proto::node::get_part::Part;
use skimmer_proto::node::{GetHead, GetRequest};
use tonic::Code;

use crate::cli::{EXIT_MISMATCH, EXIT_REFUSED, Get, Global, Output};
use crate::daemon::connect;
use crate::output::bytes;

/// Time between two lines of progress for programs.
const INTERVAL: Duration = Duration::from_millis(200);

/// What a program is told, again and again.
#[derive(Clone, Default, Serialize)]
struct Progress {
    phase: &'static str,
    file: String,
    /// In the file, of `total`; 0: not known.
    bytes: u64,
    total: u64,
    origin_bytes: u64,
    swarm_bytes: u64,
    shared: bool,
    /// Why it isn't shared.
    #[serde(skip_serializing_if = "String::is_empty")]
    why: String,
    /// The whole matched `--digest`.
    verified: bool,
}

pub async fn get(global: &Global, options: Get) -> anyhow::Result<ExitCode> {
    let digest = match options.digest.as_deref() {
        Some(text) => Some(text.parse::<Digest>().context("use --digest")?),
        None => None,
    };
    let mut target = Target::open(&options)?;
    let (start, end) = options.range.unwrap_or((target.len, 0));
    let request = GetRequest {
        url: options.url,
        digest: digest.map(|digest| digest.to_string()).unwrap_or_default(),
        start,
        end,
        validator: target.validator.clone(),
        direct: options.direct,
    };
    let mut client = connect(&global.address).await?;
    let mut stream = match client.get(request).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return failed(&status),
    };
    let mut shown = Shown::new(global.output, &target);
    loop {
        match stream.message().await {
            Ok(Some(message)) => match message.part {
                Some(Part::Head(head)) => {
                    target.begin(&head, options.range.is_some())?;
                    shown.begin(&head, target.len);
                }
                Some(Part::Bytes(part)) => {
                    target.write(&part.data)?;
                    shown.update(target.len, part.origin_bytes, part.swarm_bytes)?;
                }
                Some(Part::End(end)) => {
                    shown.progress.verified = end.verified;
                    shown.update(target.len, end.origin_bytes, end.swarm_bytes)?;
                }
                None => {}
            },
            Ok(None) => break,
            Err(status) => {
                if status.code() == Code::DataLoss {
                    target.forget()?;
                }
                return failed(&status);
            }
        }
    }
    if let Some(digest) = digest.filter(|_| options.range.is_none()) {
        let got = target.digest()?;
        if got != digest {
            target.forget()?;
            eprintln!("skimmer: the file is not {digest}: it has the digest {got}");
            return Ok(ExitCode::from(EXIT_MISMATCH));
        }
        shown.progress.verified = true;
    }
    target.finish()?;
    shown.finish()?;
    Ok(ExitCode::SUCCESS)
}

/// The daemon's own words, and what they mean to a script.
fn failed(status: &tonic::Status) -> anyhow::Result<ExitCode> {
    let code = match status.code() {
        Code::DataLoss => EXIT_MISMATCH,
        Code::PermissionDenied | Code::NotFound => EXIT_REFUSED,
        _ => anyhow::bail!("{}", status.message()),
    };
    eprintln!("skimmer: {}", status.message());
    Ok(ExitCode::from(code))
}

/// Where the bytes go.
struct Target {
    file: PathBuf,
    part: PathBuf,
    of: PathBuf,
    open: File,
    /// Bytes that are there.
    len: u64,
    /// Of the file that they belong to; empty: of none that is known.
    validator: String,
}

impl Target {
    /// With what an earlier call left.
    fn open(options: &Get) -> anyhow::Result<Self> {
        let file = options.out.clone();
        let beside = |suffix: &str| {
            let mut name = file.as_os_str().to_owned();
            name.push(suffix);
            PathBuf::from(name)
        };
        let (part, of) = (beside(".part"), beside(".part.of"));
        let mark = mark(&options.url);
        let known = fs::read_to_string(&of).unwrap_or_default();
        let validator = known.strip_prefix(&format!("{mark}\n")).unwrap_or_default().to_owned();
        let resumes = !validator.is_empty() && options.range.is_none() && part.exists();
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(!resumes);
        let opened = options.open(&part);
        let mut open = opened.with_context(|| format!("write {}", part.display()))?;
        let len = open.seek(SeekFrom::End(0))?;
        let validator = if len > 0 { validator } else { String::new() };
        let mut target = Self { file, part, of, open, len, validator };
        if !resumes {
            target.note(&mark, "")?;
        }
        Ok(target)
    }

    /// Remembers of which file the part is.
    fn note(&mut self, mark: &str, validator: &str) -> anyhow::Result<()> {
        validator.clone_into(&mut self.validator);
        fs::write(&self.of, format!("{mark}\n{validator}"))
            .with_context(|| format!("write {}", self.of.display()))
    }

    fn begin(&mut self, head: &GetHead, is_range: bool) -> anyhow::Result<()> {
        let keep = if is_range { 0 } else { head.start };
        anyhow::ensure!(keep <= self.len, "skimmerd left out bytes of the file");
        self.open.set_len(keep)?;
        self.open.seek(SeekFrom::Start(keep))?;
        self.len = keep;
        if !is_range && head.validator != self.validator {
            let known = fs::read_to_string(&self.of).unwrap_or_default();
            let mark = known.lines().next().unwrap_or_default().to_owned();
            self.note(&mark, &head.validator)?;
        }
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> anyhow::Result<()> {
        let written = self.open.write_all(data);
        written.with_context(|| format!("write {}", self.part.display()))?;
        self.len += data.len() as u64;
        Ok(())
    }

    fn digest(&mut self) -> anyhow::Result<Digest> {
        self.open.seek(SeekFrom::Start(0))?;
        let (mut hash, mut buffer) = (Sha256::new(), vec![0; 1 << 20]);
        loop {
            let read = self.open.read(&mut buffer);
            match read.with_context(|| format!("read {}", self.part.display()))? {
                0 => return Ok(Digest::from_bytes(hash.finalize().into())),
                n => hash.update(&buffer[..n]),
            }
        }
    }

    fn finish(self) -> anyhow::Result<()> {
        let synced = self.open.sync_all();
        synced.with_context(|| format!("write {}", self.part.display()))?;
        fs::rename(&self.part, &self.file).with_context(|| {
            format!("rename {} to {}", self.part.display(), self.file.display())
        })?;
        remove(&self.of)
    }

    fn forget(&self) -> anyhow::Result<()> {
        remove(&self.part)?;
        remove(&self.of)
    }
}

/// Names an address without giving it away.
fn mark(url: &str) -> String {
    Digest::of(url.as_bytes()).hex()
}

fn remove(path: &Path) -> anyhow::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// What people and programs see meanwhile.
struct Shown {
    output: Output,
    bar: Option<ProgressBar>,
    progress: Progress,
    told: Option<Instant>,
    began: Instant,
}

impl Shown {
    fn new(output: Output, target: &Target) -> Self {
        let visible = output == Output::Text && io::stderr().is_terminal();
        let bar = visible.then(|| ProgressBar::new(0).with_style(style()));
        let file = target.file.display().to_string();
        let progress = Progress { phase: "get", file, ..Progress::default() };
        Self { output, bar, progress, told: None, began: Instant::now() }
    }

    fn begin(&mut self, head: &GetHead, len: u64) {
        self.progress.shared = head.shared;
        self.progress.why.clone_from(&head.why);
        self.progress.total = len + head.end.saturating_sub(head.start);
        if let Some(bar) = &self.bar {
            bar.set_length(self.progress.total);
        }
    }

    fn update(&mut self, len: u64, origin: u64, swarm: u64) -> anyhow::Result<()> {
        let progress = &mut self.progress;
        (progress.bytes, progress.origin_bytes, progress.swarm_bytes) = (len, origin, swarm);
        if let Some(bar) = &self.bar {
            bar.set_position(len);
            bar.set_message(format!("{} origin, {} swarm", bytes(origin), bytes(swarm)));
        }
        let is_due = self.told.is_none_or(|told| told.elapsed() >= INTERVAL);
        if self.output == Output::Json && is_due {
            self.told = Some(Instant::now());
            println!("{}", serde_json::to_string(&self.progress)?);
        }
        Ok(())
    }

    fn finish(mut self) -> anyhow::Result<()> {
        self.progress.phase = "done";
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.output == Output::Json {
            println!("{}", serde_json::to_string(&self.progress)?);
            return Ok(());
        }
        let Progress { file, bytes: len, origin_bytes, swarm_bytes, shared, why, verified, .. } =
            self.progress;
        let took = self.began.elapsed().as_secs_f64();
        let (len, origin, swarm) = (bytes(len), bytes(origin_bytes), bytes(swarm_bytes));
        println!(
            "{file}: {len} in {took:.1} s, {origin} from the origin, {swarm} from other nodes"
        );
        match (shared, verified) {
            (_, true) => println!("it matches its digest"),
            (true, false) => {
                println!("each piece is as the node that took it from the origin signed it")
            }
            (false, false) => println!("not shared with other nodes: {why}"),
        }
        Ok(())
    }
}

fn style() -> ProgressStyle {
    let template = "{bar:30} {bytes:>11} / {total_bytes:<11} {msg}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
