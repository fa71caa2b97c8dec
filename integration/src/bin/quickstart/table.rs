//! What came out, for people.

use skimmer_integration::start::Start;
use skimmer_integration::world::World;

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

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}
