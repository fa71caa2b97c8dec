//! What goes on while faults happen: two containers read, images are pulled, read, completed, removed and evicted.
//!
//! Whatever asks containerd or skimmerd for something may fail while one of them is down, and is tried again. What
//! has been started must go on: a reader that finds other bytes, is told of an error or stands still is a failure.

mod late;
mod told;
mod whole;

pub use late::{Late, Unread};

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Context as _;
use serde_json::Value;
use skimmer_integration::command::{self, wait_for};
use skimmer_integration::ctr::{Ctr, Pull, unique};
use skimmer_integration::fleet::Machine;
use skimmer_integration::skimmer::Skimmer;
use skimmer_integration::skimmerd::MountMode;
use skimmer_integration::world::drop_caches;

use super::images::Known;
use super::reader::{Reader, Way, forget};

/// How long one command may take.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(30);

/// How long everything may take to get on once nothing is in its way any more.
const PROGRESS: Duration = Duration::from_secs(60);

/// How often the page cache of a reader's files is dropped.
const FORGETTING: Duration = Duration::from_millis(40);

/// In which they would read everything several times.
const STILL: Duration = Duration::from_millis(1500);

/// What reads the images that are read all along, and how.
const WAYS: [(&str, Way); 2] = [("cached", Way::Cached), ("direct", Way::Direct)];

/// Containers that come and go.
const PASSING: &str = "passing-";

/// The images of a load.
pub struct Images {
    /// Read all along.
    pub steady: [Known; 2],
    /// Pulled and read at once.
    pub pulled: Known,
    /// Pulled, and read when it has been completed in the background.
    pub filled: Known,
    /// Completed, and from then on read by nobody unless [told](Load::run_what_rests).
    pub resting: Known,
    /// Read for the first time while something is wrong.
    pub late: Known,
    /// Read by nobody, for operators.
    pub whole: Known,
}

/// Everything that goes on.
pub struct Load {
    hands: Hands,
    images: Images,
    steady: Vec<Reader>,
    jobs: Vec<JoinHandle<()>>,
    forgetter: Option<Forgetter>,
    shared: Arc<Shared>,
}

/// Drops the page cache of a reader's files, over and over.
struct Forgetter {
    ending: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

/// Who has the indexes of images that come and go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Indexes {
    /// Other nodes, as long as they can be reached.
    Swarm,
    /// The node, before it pulls: whatever happens around it, images are mounted lazily.
    Node,
}

/// What jobs work with.
#[derive(Clone)]
struct Hands {
    ctr: Ctr,
    skimmer: Skimmer,
    folder: PathBuf,
    indexes: Indexes,
}

#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    pulled: AtomicU64,
    filled: AtomicU64,
    /// Of those that were pulled and read, how many were mounted lazily.
    lazy: AtomicU64,
    failures: Mutex<Vec<String>>,
    /// Why the last round of each kind wasn't finished, for whoever waits in vain.
    excuse: Mutex<String>,
}

/// How far everything has got.
#[derive(Clone, Debug)]
pub struct Progress {
    steady: Vec<u64>,
    pulled: u64,
    filled: u64,
}

impl Progress {
    /// Whether everything has been done again, from beginning to end, since `before`.
    fn is_past(&self, before: &Self) -> bool {
        // What was under way counts for nothing.
        let again = |now: u64, before: u64| now >= before + 2;
        let mut steady = self.steady.iter().zip(&before.steady);
        steady.all(|(now, before)| again(*now, *before))
            && again(self.pulled, before.pulled)
            && again(self.filled, before.filled)
    }
}

impl Load {
    /// Pulls what is read all along, and starts everything.
    pub fn start(
        machine: &Machine,
        images: Images,
        indexes: Indexes,
        folder: &Path,
    ) -> anyhow::Result<Self> {
        let hands = Hands {
            indexes,
            ctr: (**machine.containerd()?).clone(),
            skimmer: (*machine.skimmerd).clone(),
            folder: folder.to_owned(),
        };
        let mut steady = Vec::new();
        for (known, (id, way)) in images.steady.iter().zip(WAYS) {
            hands.ctr.pull(&Pull::new(&known.reference, "skimmer"))?;
            let modes = machine.skimmerd.modes(&known.reference)?;
            anyhow::ensure!(modes.last().is_some_and(|mode| mode == "lazy"), "mounted {modes:?}");
            let reader = Reader::start(&hands.ctr, known, &own(id), way, folder)?;
            reader.go()?;
            steady.push(reader);
        }
        hands.ctr.pull(&Pull::new(&images.resting.reference, "skimmer"))?;
        // Images are completed once they are used.
        hands.check_in_container(&images.resting, "skimmer")?;
        wait_for("what rests is complete", PROGRESS, || {
            let modes = hands.modes(&images.resting);
            (!modes.is_empty() && modes.iter().all(|mode| mode == "local")).then_some(())
        })?;
        // What it was, the node remembers.
        for known in [&images.late, &images.whole] {
            hands.ctr.pull(&Pull::new(&known.reference, "skimmer"))?;
            hands.forget(known)?;
        }
        let shared = Arc::<Shared>::default();
        let mut load = Self { hands, images, steady, jobs: Vec::new(), forgetter: None, shared };
        load.begin_forgetting()?;
        load.resume();
        Ok(load)
    }

    /// Goes on with what [`pause`](Self::pause) stopped.
    pub fn resume(&mut self) {
        self.shared.stopping.store(false, Ordering::Relaxed);
        for kind in [Kind::Pulled, Kind::Filled] {
            let (hands, shared) = (self.hands.clone(), Arc::clone(&self.shared));
            let known = kind.image(&self.images).clone();
            self.jobs.push(thread::spawn(move || rounds(&hands, &shared, kind, &known)));
        }
    }

    /// Lets images come and go no more, and takes away what is left of them. The readers go on.
    pub fn pause(&mut self) -> anyhow::Result<()> {
        self.shared.stopping.store(true, Ordering::Relaxed);
        for job in self.jobs.drain(..) {
            job.join().map_err(|_| anyhow::anyhow!("a job panicked"))?;
        }
        wait_for("what comes and goes has gone", PROGRESS, || self.clear().ok())
            .with_context(|| format!("{:?}", self.clear().err()))
    }

    fn clear(&self) -> anyhow::Result<()> {
        let passing = self.hands.passing(PASSING)?;
        for id in &passing {
            self.hands.remove_container(id);
        }
        anyhow::ensure!(passing.is_empty(), "containers {passing:?}");
        for known in [&self.images.pulled, &self.images.filled, &self.images.late] {
            self.hands.remove_image(&known.reference)?;
        }
        self.hands.end_leases()?;
        let first = self.images.steady.first().context("no readers")?;
        self.hands.ctr.collect_garbage(&first.reference)?;
        self.hands.skimmer.ask(&["cache", "prune"])?;
        Ok(())
    }

    /// Stops everything, and removes the containers and images.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.pause()?;
        self.check()?;
        let lazy = self.shared.lazy.load(Ordering::Relaxed);
        if self.hands.indexes == Indexes::Node {
            let Progress { pulled, filled, .. } = self.progress();
            // In between, each may evict the other's indexes.
            anyhow::ensure!(2 * lazy > pulled + filled, "{lazy} of {pulled} + {filled} were lazy");
        }
        self.release()?;
        for (reader, known) in self.steady.iter().zip(&self.images.steady) {
            self.hands.ctr.remove_container(reader.id())?;
            self.hands.ctr.remove_image(&known.reference)?;
        }
        self.hands.ctr.remove_image(&self.images.resting.reference)
    }

    /// Runs a container of an image whose layers are here, whoever else is gone.
    pub fn run_what_is_here(&self) -> anyhow::Result<()> {
        self.hands.check_in_container(&self.images.steady[0], "skimmer")
    }

    /// Runs a container of the image that nobody has read since it was complete, and has it read from the disk.
    pub fn run_what_rests(&self) -> anyhow::Result<()> {
        drop_caches()?;
        self.hands.check_in_container(&self.images.resting, "skimmer")
    }

    /// Opens the files of readers.
    fn begin_forgetting(&mut self) -> anyhow::Result<()> {
        let files = self.steady.first().context("no readers")?.open(&self.hands.ctr)?;
        let ending = Arc::<AtomicBool>::default();
        let ended = Arc::clone(&ending);
        let thread = thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                forget(&files);
                thread::sleep(FORGETTING);
            }
        });
        self.forgetter = Some(Forgetter { ending, thread });
        Ok(())
    }

    /// Closes the files of readers.
    fn release(&mut self) -> anyhow::Result<()> {
        let Some(Forgetter { ending, thread }) = self.forgetter.take() else { return Ok(()) };
        ending.store(true, Ordering::Relaxed);
        thread.join().map_err(|_| anyhow::anyhow!("the forgetter panicked"))
    }

    pub fn images(&self) -> &Images {
        &self.images
    }

    /// The container of one that reads all along.
    pub fn reader(&self) -> anyhow::Result<&str> {
        Ok(self.steady.first().context("no readers")?.id())
    }

    /// Waits until a container is there of those that come and go.
    pub fn wait_passing(&self) -> anyhow::Result<()> {
        wait_for("a container comes", PROGRESS, || {
            (!self.hands.passing(PASSING).ok()?.is_empty()).then_some(())
        })
    }

    pub fn progress(&self) -> Progress {
        Progress {
            steady: self.steady.iter().map(Reader::rounds).collect(),
            pulled: self.shared.pulled.load(Ordering::Relaxed),
            filled: self.shared.filled.load(Ordering::Relaxed),
        }
    }

    /// Waits until everything has been done once more, now that nothing is in the way.
    pub fn wait_progress(&self) -> anyhow::Result<()> {
        let before = self.progress();
        let on = || self.check().is_err() || self.progress().is_past(&before);
        wait_for("everything goes on", PROGRESS, || on().then_some(())).with_context(|| {
            let excuse = self.shared.excuse.lock().unwrap_or_else(PoisonError::into_inner).clone();
            format!("{before:?}, then {:?}; last: {excuse}", self.progress())
        })?;
        self.check()
    }

    /// Fails if the readers get on while nobody serves their files: nothing would be tested then.
    pub fn stands_still(&self) -> anyhow::Result<()> {
        if MountMode::of_this_run() == MountMode::Kernel {
            // Complete layers are the kernel's.
            return Ok(());
        }
        let before = self.progress().steady;
        thread::sleep(STILL);
        let after = self.progress().steady;
        // One may be at the end of a round.
        let stand = before.iter().zip(&after).all(|(before, after)| *after <= before + 1);
        anyhow::ensure!(stand, "rounds went from {before:?} to {after:?} without a daemon");
        Ok(())
    }

    /// Fails if anybody has found other bytes, was told of an error or stood still.
    pub fn check(&self) -> anyhow::Result<()> {
        let failures = self.shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        anyhow::ensure!(failures.is_empty(), "{}", failures.join("\n"));
        self.steady.iter().try_for_each(Reader::check)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::Relaxed);
        let _ = self.release();
        for job in self.jobs.drain(..) {
            let _ = job.join();
        }
    }
}

/// When an image that comes and goes is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Pulled,
    Filled,
}

impl Kind {
    fn image(self, images: &Images) -> &Known {
        match self {
            Self::Pulled => &images.pulled,
            Self::Filled => &images.filled,
        }
    }

    fn count(self, shared: &Shared) -> &AtomicU64 {
        match self {
            Self::Pulled => &shared.pulled,
            Self::Filled => &shared.filled,
        }
    }
}

/// An id that no other process's containers have: their control groups, which runc empties, are called after them.
fn own(name: &str) -> String {
    format!("{name}-{}", std::process::id())
}

/// Pulls, reads, removes and evicts an image, over and over.
fn rounds(hands: &Hands, shared: &Shared, kind: Kind, known: &Known) {
    while !shared.stopping.load(Ordering::Relaxed) {
        let id = own(&format!("{PASSING}{}", unique()));
        match round(hands, shared, kind, known, &id) {
            Ok(()) => {
                kind.count(shared).fetch_add(1, Ordering::Relaxed);
            }
            Err(disturbed) => {
                let mut excuse = shared.excuse.lock().unwrap_or_else(PoisonError::into_inner);
                *excuse = format!("{kind:?}: {disturbed:#}");
                drop(excuse);
                hands.remove_container(&id);
                let _ = hands.remove_image(&known.reference);
            }
        }
    }
}

/// An error says what got in the way of it; what readers find is noted elsewhere.
fn round(
    hands: &Hands,
    shared: &Shared,
    kind: Kind,
    known: &Known,
    id: &str,
) -> anyhow::Result<()> {
    if hands.indexes == Indexes::Node {
        hands.skimmer.import_indexes(&known.indexes)?;
    }
    hands.ctr.pull(&Pull::new(&known.reference, "skimmer"))?;
    // Of its layers, the last has the files.
    if hands.modes(known).last().is_some_and(|mode| mode == "lazy") {
        shared.lazy.fetch_add(1, Ordering::Relaxed);
    }
    let reader = Reader::start(&hands.ctr, known, id, Way::Cached, &hands.folder)?;
    if kind == Kind::Filled {
        wait_for("the image is complete", PROGRESS, || {
            (shared.stopping.load(Ordering::Relaxed) || hands.is_complete(known)).then_some(())
        })?;
    }
    reader.go()?;
    // From here on it depends on nobody but who serves its files.
    if let Err(failure) = reader.wait_round(2 * PROGRESS) {
        let mut failures = shared.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(format!("{kind:?} {id}: {failure:#}"));
    }
    wait_for("the container is gone", PROGRESS, || {
        hands.remove_container(id);
        hands.passing(id).ok()?.is_empty().then_some(())
    })?;
    hands.forget(known)
}

impl Hands {
    /// Runs a container that checks every file of an image.
    fn check_in_container(&self, known: &Known, snapshotter: &str) -> anyhow::Result<()> {
        let sums = known.sums().trim_end().replace(' ', "  ");
        let script = format!("echo '{sums}' | busybox sha256sum -c -s");
        let id = own("checks");
        self.ctr.run_image(&known.reference, snapshotter, &id, &["sh", "-c", &script])?;
        Ok(())
    }

    /// The containers whose ids begin with `prefix`.
    fn passing(&self, prefix: &str) -> anyhow::Result<Vec<String>> {
        let mut call = self.ctr.ctr()?;
        let ids = command::output_of(call.args(["container", "list", "--quiet"]), COMMAND_LIMIT)?;
        Ok(ids.lines().filter(|id| id.starts_with(prefix)).map(str::to_owned).collect())
    }

    /// As far as it is there, and containerd too.
    fn remove_container(&self, id: &str) {
        for line in [
            &["task", "kill", "--signal", "KILL", id][..],
            &["task", "delete", "--force", id],
            &["container", "delete", id],
        ] {
            let Ok(mut call) = self.ctr.ctr() else { return };
            let _ = command::finish(call.args(line), COMMAND_LIMIT);
        }
    }

    /// A ctr that was killed, or whose containerd was, leaves a lease of a day on what it pulled.
    fn end_leases(&self) -> anyhow::Result<()> {
        let leases =
            command::output_of(self.ctr.ctr()?.args(["leases", "list", "--quiet"]), COMMAND_LIMIT)?;
        for lease in leases.lines() {
            command::output_of(self.ctr.ctr()?.args(["leases", "delete", lease]), COMMAND_LIMIT)?;
        }
        Ok(())
    }

    fn remove_image(&self, reference: &str) -> anyhow::Result<()> {
        let mut call = self.ctr.ctr()?;
        command::output_of(call.args(["image", "remove", "--sync", reference]), COMMAND_LIMIT)?;
        Ok(())
    }

    /// Removes an image that nobody uses any more, and what is cached of it.
    fn forget(&self, known: &Known) -> anyhow::Result<()> {
        self.remove_image(&known.reference)?;
        self.skimmer.ask(&["cache", "prune"])?;
        Ok(())
    }

    /// How the layers of an image are there; none, if nobody says.
    fn modes(&self, known: &Known) -> Vec<String> {
        self.skimmer.modes(&known.reference).unwrap_or_default()
    }

    /// Whether an image is mounted lazily and nothing of its files is here.
    fn is_unread(&self, known: &Known) -> anyhow::Result<bool> {
        let layers = self.skimmer.layers(&known.reference)?;
        let unread = |layer: &Value| layer["mode"] == "lazy" && layer["blob_bytes_present"] == 0;
        Ok(layers.last().is_some_and(unread))
    }

    /// Whether every byte of an image that a container uses is on the node.
    fn is_complete(&self, known: &Known) -> bool {
        // What skimmerd couldn't provide and doesn't serve, containerd has unpacked.
        let is_here = |layer: &Value| layer["mode"] == "local" || layer["server"].is_null();
        let layers = self.skimmer.layers(&known.reference).unwrap_or_default();
        !layers.is_empty() && layers.iter().all(is_here)
    }
}
