//! Draining what systemd keeps: it hands descriptors to processes of their unit only, so the stopped unit is started
//! once more, to drain instead of to serve.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::Context as _;

use crate::config::{Config, MountKeeper};

/// Where systemd looks for what holds until the machine is shut down.
const UNITS: &str = "/run/systemd/system";

/// Whether systemd keeps descriptors for `unit`, and this isn't the process that it hands them to.
pub fn keeps(config: &Config, unit: &str) -> bool {
    let may = matches!(config.mount.keeper, MountKeeper::Auto | MountKeeper::Systemd);
    may && !skimmer_keeper::Systemd::offered() && kept(unit) > 0
}

/// Has `unit`, which is stopped, drain what systemd keeps for it.
pub fn drain(unit: &str, config: Option<&Path>) -> anyhow::Result<()> {
    let state = property(unit, "ActiveState")?;
    if !matches!(&state[..], "inactive" | "failed") {
        anyhow::bail!("{unit} is {state}: stop it first");
    }
    let program = std::env::current_exe().context("find this program")?;
    let config = config.map(|path| {
        let path = path.canonicalize().with_context(|| format!("find {}", path.display()));
        path.map(|path| format!(" --config {}", quoted(&path)))
    });
    let folder = Path::new(UNITS).join(format!("{unit}.d"));
    let file = folder.join("drain.conf");
    let text = format!(
        "[Service]\nType=oneshot\nRestart=no\nExecStart=\nExecStart={}{} drain --unmount\n",
        quoted(&program),
        config.transpose()?.unwrap_or_default(),
    );
    fs::create_dir_all(&folder)
        .and_then(|()| fs::write(&file, text))
        .with_context(|| format!("write {}", file.display()))?;
    let drained = systemctl(&["daemon-reload"]).and_then(|_| systemctl(&["start", "--", unit]));
    fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
    systemctl(&["daemon-reload"])?;
    drained.with_context(|| format!("have {unit} drain (its log says why not)"))?;
    match kept(unit) {
        0 => println!("{unit} has unmounted its layers"),
        left => println!("{unit} has unmounted its layers; {left} descriptors are still in use"),
    }
    Ok(())
}

/// How many descriptors systemd keeps for `unit`: none where there is no systemd.
fn kept(unit: &str) -> usize {
    property(unit, "NFileDescriptorStore").ok().and_then(|text| text.parse().ok()).unwrap_or(0)
}

fn property(unit: &str, name: &str) -> anyhow::Result<String> {
    systemctl(&["show", "--value", "--property", name, "--", unit])
}

fn systemctl(arguments: &[&str]) -> anyhow::Result<String> {
    let call = || format!("systemctl {}", arguments.join(" "));
    let output = Command::new("systemctl").args(arguments).output().with_context(call)?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        anyhow::bail!("{}: {said} ({})", call(), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// As one word of a command line in a unit (systemd.service(5)).
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let text = text.replace('\\', "\\\\").replace('"', "\\\"").replace('%', "%%");
    format!("\"{}\"", text.replace('$', "$$"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_one_word_of_a_command_line() {
        for (path, word) in [
            ("/usr/bin/skimmerd", "\"/usr/bin/skimmerd\""),
            ("/a b/100%/$x", "\"/a b/100%%/$$x\""),
            ("/\"\\", "\"/\\\"\\\\\""),
        ] {
            assert_eq!(quoted(Path::new(path)), word);
        }
    }
}
