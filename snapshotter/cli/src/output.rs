//! How answers look: tables for people, JSON for programs.

use serde::Serialize;
use skimmer_proto::node::{FetchedBytes, Image, Layer, Mode, Server};

/// An image as both forms of output show it.
#[derive(Serialize)]
pub struct ImageView {
    pub namespace: String,
    pub name: String,
    pub digest: String,
    pub size: u64,
    /// Decoded bytes of its layers that are on disk.
    pub bytes_present: u64,
    /// Bytes of its blobs that came from the registry since the daemon started.
    pub origin_bytes: u64,
    /// Likewise from other nodes.
    pub swarm_bytes: u64,
    pub layers: Vec<LayerView>,
}

#[derive(Serialize)]
pub struct LayerView {
    pub digest: String,
    pub diff_id: String,
    pub media_type: String,
    pub size: u64,
    pub mode: &'static str,
    /// Who serves it, if it is mounted: `fuse` or `kernel`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<&'static str>,
    pub data_bytes: u64,
    pub data_bytes_present: u64,
    pub blob_bytes_present: u64,
    pub fetched: FetchedView,
    pub index_bytes: u64,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub error: String,
    /// Snapshots of containers whose mounts of it nobody kept.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub lost: Vec<String>,
}

/// Bytes received, by why they were wanted, and the same bytes by where they came from.
#[derive(Serialize)]
pub struct FetchedView {
    pub fault: u64,
    pub pull_through: u64,
    pub background: u64,
    pub origin: u64,
    pub swarm: u64,
}

impl From<FetchedBytes> for FetchedView {
    fn from(fetched: FetchedBytes) -> Self {
        let FetchedBytes { fault, pull_through, background, origin, swarm } = fetched;
        Self { fault, pull_through, background, origin, swarm }
    }
}

impl From<Image> for ImageView {
    fn from(image: Image) -> Self {
        let layers: Vec<LayerView> = image.layers.into_iter().map(LayerView::from).collect();
        Self {
            namespace: image.namespace,
            name: image.name,
            digest: image.digest,
            size: layers.iter().map(|l| l.size).sum(),
            bytes_present: layers.iter().map(|l| l.data_bytes_present).sum(),
            origin_bytes: layers.iter().map(|l| l.fetched.origin).sum(),
            swarm_bytes: layers.iter().map(|l| l.fetched.swarm).sum(),
            layers,
        }
    }
}

impl From<Layer> for LayerView {
    fn from(layer: Layer) -> Self {
        let mode = mode_name(layer.mode());
        let server = match layer.server() {
            Server::Unspecified => None,
            Server::Fuse => Some("fuse"),
            Server::Kernel => Some("kernel"),
        };
        Self {
            digest: layer.digest,
            diff_id: layer.diff_id,
            media_type: layer.media_type,
            size: layer.size,
            mode,
            server,
            data_bytes: layer.data_bytes,
            data_bytes_present: layer.data_bytes_present,
            blob_bytes_present: layer.blob_bytes_present,
            fetched: layer.fetched.unwrap_or_default().into(),
            index_bytes: layer.index_bytes,
            error: layer.error,
            lost: layer.lost,
        }
    }
}

impl LayerView {
    /// Mode and server, for a table.
    pub fn standing(&self) -> String {
        self.server
            .map_or_else(|| self.mode.to_owned(), |server| format!("{}, {server}", self.mode))
    }
}

impl ImageView {
    /// The mode of the whole: that of the layer that is furthest behind.
    pub fn mode(&self) -> &'static str {
        const WORST_FIRST: [&str; 5] = ["failed", "pull-through", "absent", "lazy", "local"];
        WORST_FIRST
            .into_iter()
            .find(|mode| self.layers.iter().any(|l| l.mode == *mode))
            .unwrap_or("absent")
    }
}

pub const fn mode_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Absent | Mode::Unspecified => "absent",
        Mode::PullThrough => "pull-through",
        Mode::Lazy => "lazy",
        Mode::Local => "local",
        Mode::Failed => "failed",
    }
}

pub fn json(value: &impl Serialize) -> anyhow::Result<()> {
    println!("{}", serde_json::to_string_pretty(value)?);
    Ok(())
}

/// `12.3 MiB`.
pub fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}

/// `sha256:` and the first 12 digits: enough for a person.
pub fn short(digest: &str) -> String {
    digest.chars().take("sha256:".len() + 12).collect()
}

/// `42 %` of `total`; `-` of nothing.
pub fn percent(part: u64, total: u64) -> String {
    let percent = part.saturating_mul(100).checked_div(total);
    percent.map_or_else(|| "-".to_owned(), |percent| format!("{percent} %"))
}

/// Columns as wide as their widest cell; the last is left ragged.
pub fn table(header: &[&str], rows: &[Vec<String>]) {
    let mut widths: Vec<usize> = header.iter().map(|h| h.len()).collect();
    for row in rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let print = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (cell, width) in cells.zip(&widths) {
            line.push_str(cell);
            line.push_str(&" ".repeat(width.saturating_sub(cell.chars().count()) + 2));
        }
        println!("{}", line.trim_end());
    };
    print(&mut header.iter().copied());
    for row in rows {
        print(&mut row.iter().map(String::as_str));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_says_who_serves_it() {
        let standing = |mode: Mode, server: Server| {
            LayerView::from(Layer { mode: mode.into(), server: server.into(), ..Layer::default() })
                .standing()
        };
        assert_eq!(standing(Mode::Lazy, Server::Kernel), "lazy, kernel");
        assert_eq!(standing(Mode::Lazy, Server::Fuse), "lazy, fuse");
        assert_eq!(standing(Mode::Local, Server::Unspecified), "local");
    }

    #[test]
    fn an_image_is_as_far_as_its_last_layer() {
        let image = |modes: &[Mode]| {
            let layers = modes
                .iter()
                .map(|mode| Layer { mode: (*mode).into(), ..Layer::default() })
                .collect();
            ImageView::from(Image { layers, ..Image::default() }).mode()
        };
        assert_eq!(image(&[Mode::Local, Mode::Local]), "local");
        assert_eq!(image(&[Mode::Local, Mode::Lazy]), "lazy");
        assert_eq!(image(&[Mode::Lazy, Mode::Absent]), "absent");
        assert_eq!(image(&[Mode::Failed, Mode::PullThrough]), "failed");
        assert_eq!(image(&[]), "absent");
    }

    #[test]
    fn an_images_bytes_are_those_of_its_layers() {
        let layer = |origin, swarm| Layer {
            fetched: Some(FetchedBytes { origin, swarm, ..FetchedBytes::default() }),
            ..Layer::default()
        };
        let layers = vec![layer(1, 20), layer(300, 4000), Layer::default()];
        let image = ImageView::from(Image { layers, ..Image::default() });
        assert_eq!((image.origin_bytes, image.swarm_bytes), (301, 4020));
    }

    #[test]
    fn numbers_for_people() {
        assert_eq!(percent(1, 3), "33 %");
        assert_eq!(percent(0, 0), "-");
        assert_eq!(short(&format!("sha256:{}", "a".repeat(64))), "sha256:aaaaaaaaaaaa");
        assert_eq!(bytes(3 << 20), "3.00 MiB");
    }
}
