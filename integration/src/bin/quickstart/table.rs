//! What came out, for people.

use skimmer_integration::start::Start;
use skimmer_integration::world::World;

use crate::nodes::{self, Together};

/// One way of starting the container.
pub struct Row {
    pub way: &'static str,
    pub start: Start,
}

pub fn print(world: &World<'_>, rows: &[Row]) {
    println!();
    println!(
        "{} layers, {} compressed; the registry is {}.",
        world.image.layers.len(),
        megabytes(world.image.compressed_bytes()),
        match world.bits_per_second() {
            Some(rate) => format!("behind a link of {} Mbit/s", rate / 1_000_000),
            None => "on this machine".to_owned(),
        }
    );
    println!();
    println!("{:36} {:>14} {:>12}", "", "first output", "fetched");
    for row in rows {
        println!(
            "{:36} {:>12.2} s {:>12}",
            row.way,
            row.start.first_line.as_secs_f64(),
            megabytes(row.start.bytes)
        );
    }
    println!();
}

/// What several nodes took at once.
pub fn print_together(rows: &[Together]) {
    println!();
    let title = format!("{} nodes at once", nodes::COUNT);
    println!("{title:36} {:>14} {:>14} {:>14}", "last output", "from registry", "between nodes");
    for row in rows {
        println!(
            "{:36} {:>12.2} s {:>14} {:>14}",
            nodes::way_name(row.way),
            row.last.as_secs_f64(),
            megabytes(row.origin),
            megabytes(row.swarm)
        );
    }
    println!();
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
