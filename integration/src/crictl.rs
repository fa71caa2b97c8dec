//! The real `crictl`, as operators use it.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::json;

use crate::command::{self, PATIENCE};
use crate::scenario::Scenario;
use crate::tools;

/// `crictl` for a runtime and an image service.
pub struct Crictl {
    program: PathBuf,
    runtime: String,
    images: String,
}

/// A pod with one container, both running.
pub struct Running {
    sandbox: String,
    pub container: String,
}

impl Crictl {
    /// For these two sockets; `None` where crictl can't be built and needn't be.
    pub fn new(runtime: &Path, images: &Path) -> anyhow::Result<Option<Self>> {
        let program = match tools::crictl() {
            Ok(program) => program,
            Err(error) if tools::required() => return Err(error),
            Err(error) => {
                eprintln!("skipped: {error:#}");
                return Ok(None);
            }
        };
        let endpoint = |socket: &Path| format!("unix://{}", socket.display());
        Ok(Some(Self { program, runtime: endpoint(runtime), images: endpoint(images) }))
    }

    /// A call of it.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new(&self.program);
        command.args(["--runtime-endpoint", &self.runtime, "--image-endpoint", &self.images]);
        command.args(["--timeout", "60s"]).args(arguments);
        command
    }

    /// What it prints when it succeeds.
    pub fn call<S: AsRef<OsStr>>(&self, arguments: &[S]) -> anyhow::Result<String> {
        let output = command::output_of(&mut self.command(arguments), PATIENCE)?;
        Ok(output.trim().to_owned())
    }

    /// Everything it prints when it fails, as it has to.
    pub fn failure(&self, arguments: &[&str]) -> anyhow::Result<String> {
        command::failure_of(&mut self.command(arguments), PATIENCE)
    }

    /// Starts a pod in the host's namespaces, and in it a container of a pulled image that waits.
    pub fn run(&self, scenario: &Scenario, reference: &str) -> anyhow::Result<Running> {
        let (pod, container) = (scenario.path("pod.json"), scenario.path("container.json"));
        let logs = scenario.path("pods");
        std::fs::create_dir_all(&logs)?;
        // NODE (2): the host's own namespace.
        let host = json!({ "network": 2, "pid": 2, "ipc": 2 });
        let description = json!({
            "metadata": { "name": "pod", "namespace": "tests", "uid": "pod-1", "attempt": 0 },
            "log_directory": logs,
            "linux": { "security_context": { "namespace_options": host } },
        });
        std::fs::write(&pod, description.to_string())?;
        let description = json!({
            "metadata": { "name": "app", "attempt": 0 }, "image": { "image": reference },
            "command": ["sleep", "100000"], "log_path": "app.log",
        });
        std::fs::write(&container, description.to_string())?;
        let sandbox = self.call(&["runp".as_ref(), pod.as_os_str()])?;
        let create: [&OsStr; 4] =
            ["create".as_ref(), sandbox.as_ref(), container.as_ref(), pod.as_ref()];
        let container = self.call(&create)?;
        self.call(&["start", &container])?;
        Ok(Running { sandbox, container })
    }

    /// What `program` prints in the container.
    pub fn exec(&self, running: &Running, program: &[&str]) -> anyhow::Result<String> {
        self.call(&[&["exec", &running.container], program].concat())
    }

    /// Stops and removes the pod with its container.
    pub fn remove(&self, running: &Running) -> anyhow::Result<()> {
        self.call(&["stopp", &running.sandbox])?;
        self.call(&["rmp", &running.sandbox])?;
        Ok(())
    }
}
