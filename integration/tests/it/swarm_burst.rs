//! Many nodes want one image at once: one copy of it leaves the registry.

use std::time::Duration;

use skimmer_integration::fleet::{Fleet, Machine, Setup, Spec};
use skimmer_integration::image::{Image, Plan};
use skimmer_integration::layer::Format;
use skimmer_integration::registry::Registry;
use skimmer_integration::scenario::{Scenario, scenario};
use skimmer_integration::switch;

use crate::fixtures::{blobs, data};

/// What each pull may take, on a busy machine.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Of every link: slow enough for something to happen in the middle of a pull.
pub const BITS_PER_SECOND: u64 = 24_000_000;

pub const MIB: u64 = 1 << 20;

/// What a node may have leased of the origin at a time, in one request: a machine that stands still for seconds may
/// cost one.
pub const LEASE: u64 = 4 * MIB;

/// An image of one layer for each of `sizes`, in bytes, that doesn't compress.
pub fn image_of(scenario: &Scenario, name: &str, sizes: &[usize]) -> anyhow::Result<Image> {
    let layer = |(number, size): (usize, &usize)| {
        data(scenario, &format!("{name}-{number}"), *size, Format::Gzip)
    };
    let layers: anyhow::Result<Vec<_>> = sizes.iter().enumerate().map(layer).collect();
    Plan::new(name, layers?).build(&blobs(scenario))
}

pub fn shaped() -> Setup {
    Setup { bits_per_second: Some(BITS_PER_SECOND), ..Setup::default() }
}

/// Makes sure that no byte of the image's layers left the registry twice, but for `again` bytes.
pub fn check_egress(registry: &Registry, image: &Image, again: u64) -> anyhow::Result<()> {
    let (sent, whole) = (registry.sent_of(image).bytes, image.compressed_bytes());
    // Each node may ask for one byte to see whether the repository is public.
    anyhow::ensure!(
        sent >= whole && sent <= whole + again + 64,
        "the registry sent {sent} bytes of {whole}, where {again} more were allowed"
    );
    Ok(())
}

#[test]
fn a_burst_takes_one_copy_from_the_registry() {
    scenario("swarm-burst", |scenario| {
        let setup = Setup { bits_per_second: Some(2 * BITS_PER_SECOND), ..Setup::default() };
        let fleet = Fleet::of(scenario, setup, 4)?;
        let (slowest, middle) = switch::ring(&fleet.hosts(), 3 * MIB)?;
        println!("plain TCP: {:.1} and {:.1} Mbit/s", slowest / 1e6, middle / 1e6);
        let image = image_of(scenario, "burst/app", &[12 << 20, 5 << 20, 300 << 10])?;
        let reference = fleet.registry.add(&image)?;
        let took = fleet.build_everywhere(&reference, LIMIT)?;
        println!("took {:.2} s", took.as_secs_f64());
        check_egress(&fleet.registry, &image, LEASE)?;
        fleet.check_blobs(&image, &[0, 1, 2, 3])?;
        let received: anyhow::Result<Vec<u64>> =
            fleet.machines.iter().map(Machine::from_peers).collect();
        let received: u64 = received?.iter().sum();
        anyhow::ensure!(received >= 3 * image.compressed_bytes(), "{received} bytes from peers");
        Ok(())
    });
}

#[test]
fn a_node_joins_in_the_middle() {
    scenario("swarm-join", |scenario| {
        let mut fleet = Fleet::of(scenario, shaped(), 3)?;
        let image = image_of(scenario, "join/app", &[16 << 20])?;
        let reference = fleet.registry.add(&image)?;
        let builds: Vec<_> =
            fleet.machines.iter().map(|machine| machine.build(&reference)).collect();
        fleet.machines[0].wait_present(&image.layers[0].blob.digest, 2 * MIB)?;
        let late = fleet.add(&Spec::default())?;
        fleet.wait_attending()?;
        let late_build = fleet.machines[late].build(&reference)?;
        for build in builds {
            build?.wait(LIMIT)?;
        }
        late_build.wait(LIMIT)?;
        check_egress(&fleet.registry, &image, LEASE)?;
        fleet.check_blobs(&image, &[0, 1, 2, late])
    });
}
