//! What people do with `ctr`, done with the ctr of the containerd's own version.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use crate::command::{self, FirstLine, PATIENCE};
use crate::containerd::Version;

/// No share of the processors is asked for: control groups may come without that controller.
const ANY_CPU: [&str; 2] = ["--cpu-shares", "0"];

/// Who the root of a container in a user namespace is on the host.
pub const MAPPED_ROOT: u32 = 200_000;

/// A pull: `ctr image pull`.
#[derive(Clone, Copy, Debug)]
pub struct Pull<'a> {
    pub reference: &'a str,
    pub snapshotter: &'a str,
    /// `--local`: fetched by ctr itself instead of by the transfer service of containerd 2.
    pub local: bool,
    /// `user:password`
    pub user: Option<&'a str>,
}

impl<'a> Pull<'a> {
    pub fn new(reference: &'a str, snapshotter: &'a str) -> Self {
        Self { reference, snapshotter, local: false, user: None }
    }
}

/// A client of the containerd in a folder, whether that runs or not.
#[derive(Clone, Debug)]
pub struct Ctr {
    version: Version,
    folder: PathBuf,
    hosts: PathBuf,
    enter: Vec<String>,
}

impl Ctr {
    /// Of the containerd of `version` in `folder`, which reads the registry hosts in `hosts`.
    pub fn new(version: Version, folder: PathBuf, hosts: PathBuf) -> Self {
        Self { version, folder, hosts, enter: Vec::new() }
    }

    /// The same, for a containerd in other namespaces; `enter` begins the command line of who enters them.
    pub fn inside(self, enter: Vec<String>) -> Self {
        Self { enter, ..self }
    }

    pub fn version(&self) -> Version {
        self.version
    }

    pub fn address(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    /// containerd's root folder, with the content store below.
    pub fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// containerd's folder, for scratch files beside it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The `certs.d` it reads.
    pub fn hosts(&self) -> &Path {
        &self.hosts
    }

    /// Where its runc keeps containers.
    pub fn runc_root(&self) -> PathBuf {
        self.folder.join("runc")
    }

    /// A call of its version's own ctr.
    pub fn ctr(&self) -> anyhow::Result<Command> {
        let program = self.version.folder()?.join("usr/bin/ctr");
        let mut words = self.enter.iter().map(OsStr::new).chain([program.as_os_str()]);
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words).arg("--address").arg(self.address());
        Ok(command)
    }

    /// Pulls an image; an error holds what ctr printed.
    pub fn pull(&self, pull: &Pull<'_>) -> anyhow::Result<String> {
        command::output_of(&mut self.pull_command(pull)?, PATIENCE)
    }

    /// Pulls an image, which has to fail; returns what ctr printed.
    pub fn pull_fails(&self, pull: &Pull<'_>) -> anyhow::Result<String> {
        command::failure_of(&mut self.pull_command(pull)?, PATIENCE)
    }

    fn pull_command(&self, pull: &Pull<'_>) -> anyhow::Result<Command> {
        let mut call = self.ctr()?;
        call.args(["image", "pull", "--hosts-dir"])
            .arg(self.hosts())
            .args(["--snapshotter", pull.snapshotter]);
        if pull.local && self.version().has_transfer_service() {
            call.arg("--local");
        }
        if let Some(user) = pull.user {
            call.args(["--user", user]);
        }
        call.arg(pull.reference);
        Ok(call)
    }

    /// Runs `program` in a container of a pulled image, to its end; returns its output.
    pub fn run_image(
        &self,
        reference: &str,
        snapshotter: &str,
        id: &str,
        program: &[&str],
    ) -> anyhow::Result<String> {
        let mut call = self.run_command(reference, snapshotter, id, program)?;
        command::output_of(&mut call, PATIENCE)
    }

    /// Runs `program` in a container of a pulled image, to its end; returns its first line and when it came.
    pub fn first_line(
        &self,
        reference: &str,
        snapshotter: &str,
        id: &str,
        program: &[&str],
    ) -> anyhow::Result<FirstLine> {
        let mut call = self.run_command(reference, snapshotter, id, program)?;
        command::first_line(&mut call, PATIENCE)
    }

    fn run_command(
        &self,
        reference: &str,
        snapshotter: &str,
        id: &str,
        program: &[&str],
    ) -> anyhow::Result<Command> {
        let mut call = self.ctr()?;
        call.arg("run").args(ANY_CPU);
        call.args(["--rm", "--snapshotter", snapshotter, "--runc-root"]).arg(self.runc_root());
        call.args([reference, id]).args(program);
        Ok(call)
    }

    /// Starts `program` in a container of a pulled image and leaves it running.
    pub fn start_image(
        &self,
        reference: &str,
        snapshotter: &str,
        id: &str,
        program: &[&str],
    ) -> anyhow::Result<()> {
        let mut call = self.ctr()?;
        call.arg("run").args(ANY_CPU);
        call.args(["--detach", "--null-io", "--snapshotter", snapshotter, "--runc-root"]);
        call.arg(self.runc_root()).args([reference, id]).args(program);
        command::output_of(&mut call, PATIENCE)?;
        Ok(())
    }

    /// Runs `program` in a container in a user namespace, to its end; returns its output.
    pub fn run_mapped(
        &self,
        reference: &str,
        id: &str,
        program: &[&str],
    ) -> anyhow::Result<String> {
        let mut call = self.mapped_command(&["--rm"])?;
        command::output_of(call.args([reference, id]).args(program), PATIENCE)
    }

    /// `ctr run` in a user namespace, on skimmer; image, name and program are to follow.
    pub fn mapped_command(&self, options: &[&str]) -> anyhow::Result<Command> {
        let mut call = self.ctr()?;
        call.arg("run").args(ANY_CPU).args(options);
        call.args(["--snapshotter", "skimmer", "--runc-root"]).arg(self.runc_root());
        let range = format!("0:{MAPPED_ROOT}:65536");
        call.args(["--uidmap", &range, "--gidmap", &range, "--remap-labels"]);
        Ok(call)
    }

    /// Runs `program` in a running container; returns its output.
    pub fn exec(&self, id: &str, program: &[&str]) -> anyhow::Result<String> {
        command::output_of(&mut self.exec_command(id, program)?, PATIENCE)
    }

    /// The command that does so.
    pub fn exec_command(&self, id: &str, program: &[&str]) -> anyhow::Result<Command> {
        let mut call = self.ctr()?;
        call.args(["task", "exec", "--exec-id", &format!("exec-{}", unique()), id]).args(program);
        Ok(call)
    }

    /// Kills and deletes a running container, its snapshot included.
    pub fn remove_container(&self, id: &str) -> anyhow::Result<()> {
        command::output_of(self.ctr()?.args(["task", "kill", "--signal", "KILL", id]), PATIENCE)?;
        command::wait_for("the container's task can be deleted", Duration::from_secs(20), || {
            let mut call = self.ctr().ok()?;
            command::output_of(call.args(["task", "delete", id]), PATIENCE).ok()
        })?;
        command::output_of(self.ctr()?.args(["container", "delete", id]), PATIENCE)?;
        Ok(())
    }

    /// Removes an image and waits for containerd's garbage collection.
    pub fn remove_image(&self, reference: &str) -> anyhow::Result<()> {
        command::output_of(self.ctr()?.args(["image", "remove", "--sync", reference]), PATIENCE)?;
        Ok(())
    }

    /// The names of the images in the namespace `default`.
    pub fn images(&self) -> anyhow::Result<Vec<String>> {
        let names = command::output_of(self.ctr()?.args(["image", "list", "--quiet"]), PATIENCE)?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Makes containerd collect garbage now: removing an image that doesn't exist wouldn't, so one is made for it.
    pub fn collect_garbage(&self, of: &str) -> anyhow::Result<()> {
        let name = format!("gc.invalid/{}:latest", unique());
        command::output_of(self.ctr()?.args(["image", "tag", of, &name]), PATIENCE)?;
        self.remove_image(&name)
    }
}

/// A number that this process hasn't used yet.
pub fn unique() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}
