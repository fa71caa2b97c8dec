//! Where the programs of the tests are.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::Context as _;

use crate::command;

const NEEDED: [&str; 10] = [
    "docker-registry",
    "ip",
    "mount",
    "nsenter",
    "openssl",
    "runc",
    "setpriv",
    "tc",
    "timeout",
    "umoci",
];

/// What is kept between runs, outside the checkout: `$SKIMMER_CACHE`, else `~/.cache/skimmer`.
pub fn cache() -> PathBuf {
    match std::env::var_os("SKIMMER_CACHE") {
        Some(folder) => folder.into(),
        None => Path::new(&std::env::var_os("HOME").unwrap_or_else(|| "/root".into()))
            .join(".cache/skimmer"),
    }
}

/// Whether a missing program is a failure instead of a reason to skip (`SKIMMER_REQUIRE_TOOLS`).
pub fn required() -> bool {
    std::env::var_os("SKIMMER_REQUIRE_TOOLS").is_some()
}

/// Why scenarios can't run here, if they can't.
pub fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("root is needed".into());
    }
    let absent: Vec<&str> = NEEDED.into_iter().filter(|name| find(name).is_none()).collect();
    (!absent.is_empty())
        .then(|| format!("{} not installed: integration/run installs them", absent.join(", ")))
}

/// The program `name` on `PATH`.
pub fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// The output lines of `integration/tools/<name>`, which installs what it names and is cheap once it did.
pub fn script(name: &str) -> anyhow::Result<Vec<String>> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools").join(name);
    let mut call = std::process::Command::new(&script);
    let output = command::output_of(&mut call, std::time::Duration::from_secs(1200))
        .with_context(|| format!("run {}", script.display()))?;
    Ok(output.lines().map(str::to_owned).collect())
}

/// The folders of the containerds, oldest version first.
pub fn containerds() -> anyhow::Result<&'static [PathBuf]> {
    static FOLDERS: OnceLock<Result<Vec<PathBuf>, String>> = OnceLock::new();
    let folders = FOLDERS.get_or_init(|| match script("containerds") {
        Ok(lines) => Ok(lines.into_iter().map(PathBuf::from).collect()),
        Err(error) => Err(format!("{error:#}")),
    });
    folders.as_deref().map_err(|error| anyhow::anyhow!("{error}"))
}

/// crictl, which is built the first time.
pub fn crictl() -> anyhow::Result<PathBuf> {
    script("crictl")?.first().map(PathBuf::from).context("tools/crictl says nothing")
}

/// A program of this workspace, built in the same profile as the running one.
pub fn built(name: &str) -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe().context("find the running program")?;
    // <target>/<profile>/<program>, or <target>/<profile>/deps/<test>
    let mut profile = own.parent().context("the running program has no folder")?;
    if profile.ends_with("deps") {
        profile = profile.parent().context("the running test has no profile folder")?;
    }
    let program = profile.join(name);
    anyhow::ensure!(
        program.is_file(),
        "{} is not built: run cargo build --release",
        program.display()
    );
    Ok(program)
}
