//! `quickstart`: one image, pulled and run in three ways, in a containerd of its own; and on three nodes at once.
//!
//! `install/quickstart` installs what it needs, builds and runs it.

mod keep;
mod nodes;
mod table;

use clap::Parser;
use skimmer_integration::start::{self, Way};
use skimmer_integration::world::World;
use skimmer_integration::{debian, interrupt, scenario, tools};

use table::Row;

#[derive(Parser)]
#[command(name = "quickstart")]
struct Options {
    /// Speed of the link to the registry in Mbit/s; 0: as fast as this machine.
    #[arg(long, default_value_t = 200)]
    link: u64,
    /// Leave a containerd, a registry and skimmerd running, to try things.
    #[arg(long)]
    keep: bool,
    /// Stop what `--keep` left running.
    #[arg(long, conflicts_with = "keep")]
    stop: bool,
    /// Be what `--keep` leaves running.
    #[arg(long, hide = true)]
    hold: bool,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    if options.stop {
        return keep::stop();
    }
    if let Some(missing) = tools::missing() {
        anyhow::bail!("{missing}");
    }
    interrupt::sweep_and_exit()?;
    if options.hold {
        return scenario::run("quickstart", keep::hold);
    }
    keep::refuse_second()?;
    println!("Making an image of Debian with Python and numpy (minutes the first time) …");
    scenario::run("quickstart", |scenario| {
        let world =
            World::new(scenario, debian::numpy(&scenario.path("blobs"))?, link(options.link))?;
        let rows = compare(&world)?;
        table::print(&world, &rows);
        Ok(())
    })?;
    println!("Now nodes that want it all together: a registry's link serves one after the other …");
    table::print_together(&nodes::compare(link(options.link))?);
    if options.keep { keep::start() } else { keep::forget() }
}

/// Pulls and runs the image in each way, each time on a node that has nothing of it.
fn compare(world: &World<'_>) -> anyhow::Result<Vec<Row>> {
    let indexes = keep::indexes();
    println!("Pulling and running it with overlayfs …");
    let node = world.cold_node(None)?;
    let overlayfs = start::measure(world, &node, Way::Overlayfs)?;
    drop(node);
    println!("… with skimmer, which has no index of it yet …");
    let node = world.cold_node(None)?;
    let pulled_through = start::measure(world, &node, Way::Skimmer)?;
    node.skimmerd.export_indexes(&world.image, &indexes)?;
    drop(node);
    println!("… and with skimmer on an empty node that has been given the index …");
    let node = world.cold_node(Some(&indexes))?;
    let lazy = start::measure(world, &node, Way::Skimmer)?;
    Ok(vec![
        Row { way: "overlayfs", start: overlayfs },
        Row { way: "skimmer, no index: pulled through", start: pulled_through },
        Row { way: "skimmer, with index: lazy", start: lazy },
    ])
}

fn link(mbit: u64) -> Option<u64> {
    (mbit > 0).then_some(mbit * 1_000_000)
}
