//! One image running twice at once, with both ways of holding its files.

use std::time::Duration;

use skimmer_integration::ctr::Pull;
use skimmer_integration::node::Node;
use skimmer_integration::start::Way;
use skimmer_integration::world::{World, drop_caches};

/// Longer than skimmerd takes to look at the page cache again.
const NOTICES: Duration = Duration::from_secs(15);

/// A node on which containers of the same image wait, one for each way.
pub struct Running {
    node: Node,
}

impl Running {
    /// Pulls the world's image whole, both ways, and starts the containers.
    pub fn start(world: &World<'_>) -> anyhow::Result<Self> {
        let node = world.cold_node(None)?;
        for way in [Way::Overlayfs, Way::Skimmer] {
            eprintln!("  pulling {} with {}", world.image.name, way.snapshotter());
            let snapshotter = way.snapshotter();
            node.containerd.pull(&Pull::new(&world.reference, snapshotter))?;
            node.containerd.start_image(
                &world.reference,
                snapshotter,
                snapshotter,
                &["sleep", "1000000"],
            )?;
        }
        Ok(Self { node })
    }

    /// Has memory forget what the pulls wrote, and gives skimmerd the time to notice: it then reads otherwise.
    pub fn grow_cold(&self) -> anyhow::Result<()> {
        drop_caches()?;
        std::thread::sleep(NOTICES);
        Ok(())
    }

    /// The numbers, separated by blanks, that a Python program prints in a container.
    pub fn python(&self, way: Way, program: &str) -> anyhow::Result<Vec<f64>> {
        let text = self.node.containerd.exec(way.snapshotter(), &["python3", "-c", program])?;
        numbers(&text)
    }
}

/// The numbers, separated by blanks, that a program has printed.
pub fn numbers(text: &str) -> anyhow::Result<Vec<f64>> {
    let numbers: Option<Vec<f64>> =
        text.split_ascii_whitespace().map(|word| word.parse().ok()).collect();
    numbers.ok_or_else(|| anyhow::anyhow!("a container printed {text:?} instead of numbers"))
}
