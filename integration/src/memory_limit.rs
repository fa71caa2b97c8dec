//! A cgroup with a limit of memory, v1 or v2, whichever the machine has (cgroups(7)).

use std::fs;
use std::path::PathBuf;

use anyhow::Context as _;

/// A cgroup; removed when dropped, when its processes have ended.
pub struct MemoryLimit {
    folder: PathBuf,
    v1: bool,
}

impl MemoryLimit {
    /// `bytes` of memory, page cache included, and no swap.
    pub fn new(name: &str, bytes: u64) -> anyhow::Result<Self> {
        let root = PathBuf::from("/sys/fs/cgroup");
        let v1 = root.join("memory").is_dir();
        let folder = if v1 { root.join("memory") } else { root.clone() }.join(name);
        if !v1 {
            fs::write(root.join("cgroup.subtree_control"), "+memory")
                .context("have cgroups limit memory")?;
        }
        fs::create_dir_all(&folder).with_context(|| format!("create {}", folder.display()))?;
        let limit = Self { folder, v1 };
        let file = if v1 { "memory.limit_in_bytes" } else { "memory.max" };
        fs::write(limit.folder.join(file), bytes.to_string())
            .with_context(|| format!("set {file} of {}", limit.folder.display()))?;
        Ok(limit)
    }

    /// Write a process id there and it belongs to the cgroup.
    pub fn members(&self) -> PathBuf {
        self.folder.join("cgroup.procs")
    }

    /// How often the kernel has killed a process because of the limit.
    pub fn kills(&self) -> anyhow::Result<u64> {
        let file = if self.v1 { "memory.oom_control" } else { "memory.events" };
        let text = fs::read_to_string(self.folder.join(file))?;
        let line = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        Ok(line.with_context(|| format!("no oom_kill in {text}"))?.trim().parse()?)
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // Members that have just been killed take a moment to leave.
        for _ in 0..50 {
            if fs::remove_dir(&self.folder).is_ok() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}
