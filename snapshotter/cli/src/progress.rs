//! Long work: a bar for each layer on a terminal, JSON lines for programs, silence in between.

use std::collections::BTreeMap;
use std::io::IsTerminal;

use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use skimmer_proto::node::{Mode, Progress};
use tonic::Streaming;

use crate::cli::Output;
use crate::daemon::plain;
use crate::output::{ImageView, bytes, mode_name, short};

/// Follows `stream` to its end and returns the last state of the image.
pub async fn follow(
    mut stream: Streaming<Progress>,
    output: Output,
    measure: Measure,
) -> anyhow::Result<ImageView> {
    let mut bars = Bars::new(output == Output::Text && std::io::stderr().is_terminal());
    let mut last = Progress::default();
    while let Some(progress) = stream.message().await.map_err(plain)? {
        bars.show(&progress, measure);
        if output == Output::Json {
            println!("{}", serde_json::to_string(&line(&progress))?);
        }
        last = progress;
    }
    bars.finish();
    Ok(view(last))
}

/// What counts as done in a bar.
#[derive(Clone, Copy)]
pub enum Measure {
    /// A layer is done when it can be mounted.
    Mountable,
    /// A layer is done when every byte is here.
    Complete,
    /// A layer is done when its blob is here.
    Blobs,
}

#[derive(serde::Serialize)]
struct Line {
    phase: String,
    image: ImageView,
}

fn line(progress: &Progress) -> Line {
    Line { phase: progress.phase.clone(), image: view(progress.clone()) }
}

fn view(progress: Progress) -> ImageView {
    ImageView::from(skimmer_proto::node::Image {
        name: progress.image,
        digest: progress.digest,
        layers: progress.layers,
        ..Default::default()
    })
}

struct Bars {
    all: Option<MultiProgress>,
    by_layer: BTreeMap<String, ProgressBar>,
}

impl Bars {
    fn new(visible: bool) -> Self {
        Self { all: visible.then(MultiProgress::new), by_layer: BTreeMap::new() }
    }

    fn show(&mut self, progress: &Progress, measure: Measure) {
        let Some(all) = &self.all else { return };
        for layer in &progress.layers {
            let bar = self.by_layer.entry(layer.digest.clone()).or_insert_with(|| {
                let bar = all.add(ProgressBar::new(layer.size));
                bar.set_style(style());
                bar.set_prefix(short(&layer.digest));
                bar
            });
            let mountable = matches!(layer.mode(), Mode::Lazy | Mode::Local);
            let (done, total) = match measure {
                Measure::Mountable if mountable => (layer.size, layer.size),
                Measure::Complete if layer.data_bytes > 0 => {
                    (layer.data_bytes_present, layer.data_bytes)
                }
                _ => (layer.blob_bytes_present, layer.size),
            };
            bar.set_length(total);
            bar.set_position(done);
            let fetched = layer.fetched.unwrap_or_default();
            let (origin, swarm) = (bytes(fetched.origin), bytes(fetched.swarm));
            let mode = mode_name(layer.mode());
            bar.set_message(format!("{mode}, {origin} origin, {swarm} swarm"));
        }
    }

    fn finish(&self) {
        for bar in self.by_layer.values() {
            bar.abandon();
        }
    }
}

fn style() -> ProgressStyle {
    let template = "{prefix} {bar:30} {bytes:>11} / {total_bytes:<11} {msg}";
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}
