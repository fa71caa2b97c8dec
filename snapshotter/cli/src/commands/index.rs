//! `index build|show|export|import`.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;
use skimmer_proto::node::{
    BuildIndexRequest, ExportIndexRequest, IndexBytes, ShowIndexRequest, ShowIndexResponse,
};

use crate::cli::{Global, Index, Output};
use crate::commands::images::layers;
use crate::daemon::{connect, plain};
use crate::output::{bytes, json, percent};
use crate::progress::{Measure, follow};

/// Bytes of an index file in one message.
const MESSAGE_LEN: usize = 1 << 20;

pub async fn run(global: &Global, command: Index) -> anyhow::Result<()> {
    match command {
        Index::Build { reference, platform } => build(global, reference, platform).await,
        Index::Show { layer } => show(global, layer).await,
        Index::Export { layer, file } => export(global, layer, &file).await,
        Index::Import { file } => import(global, file).await,
    }
}

async fn build(global: &Global, reference: String, platform: Option<String>) -> anyhow::Result<()> {
    let request = BuildIndexRequest { reference, platform: platform.unwrap_or_default() };
    let stream = connect(&global.address).await?.build_index(request).await.map_err(plain)?;
    let image = follow(stream.into_inner(), global.output, Measure::Complete).await?;
    if global.output == Output::Text {
        layers(&image);
    }
    Ok(())
}

#[derive(Serialize)]
struct Shown {
    layer: String,
    diff_id: String,
    compression: String,
    index_digest: String,
    index_bytes: u64,
    piece_table_bytes: u64,
    blob_bytes: u64,
    data_bytes: u64,
    inodes: u64,
    chunks: u64,
    pieces: u64,
}

impl From<ShowIndexResponse> for Shown {
    fn from(r: ShowIndexResponse) -> Self {
        Self {
            layer: r.layer,
            diff_id: r.diff_id,
            compression: r.compression,
            index_digest: r.index_digest,
            index_bytes: r.index_bytes,
            piece_table_bytes: r.piece_table_bytes,
            blob_bytes: r.blob_bytes,
            data_bytes: r.data_bytes,
            inodes: r.inodes,
            chunks: r.chunks,
            pieces: r.pieces,
        }
    }
}

async fn show(global: &Global, layer: String) -> anyhow::Result<()> {
    let request = ShowIndexRequest { layer };
    let response = connect(&global.address).await?.show_index(request).await.map_err(plain)?;
    let shown = Shown::from(response.into_inner());
    if global.output == Output::Json {
        return json(&shown);
    }
    println!("layer        {}", shown.layer);
    println!("diff id      {}", shown.diff_id);
    println!("compression  {}", shown.compression);
    println!("blob         {} in {} pieces", bytes(shown.blob_bytes), shown.pieces);
    println!("data         {} in {} chunks", bytes(shown.data_bytes), shown.chunks);
    println!("inodes       {}", shown.inodes);
    let share = percent(shown.index_bytes, shown.blob_bytes);
    println!("index        {} ({share} of the blob)", bytes(shown.index_bytes));
    println!("             {}", shown.index_digest);
    println!("piece table  {}", bytes(shown.piece_table_bytes));
    Ok(())
}

async fn export(global: &Global, layer: String, file: &Path) -> anyhow::Result<()> {
    let request = ExportIndexRequest { layer };
    let mut stream =
        connect(&global.address).await?.export_index(request).await.map_err(plain)?.into_inner();
    // The first message is here before the file is made: a failed export leaves none behind.
    let mut next = stream.message().await.map_err(plain)?;
    let mut out: Box<dyn Write> = if file == Path::new("-") {
        Box::new(io::stdout())
    } else {
        Box::new(File::create(file).with_context(|| format!("create {}", file.display()))?)
    };
    while let Some(message) = next {
        out.write_all(&message.data).with_context(|| format!("write {}", file.display()))?;
        next = stream.message().await.map_err(plain)?;
    }
    out.flush().with_context(|| format!("write {}", file.display()))
}

async fn import(global: &Global, file: PathBuf) -> anyhow::Result<()> {
    let mut input: Box<dyn Read + Send> = if file == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(&file).with_context(|| format!("open {}", file.display()))?)
    };
    let mut content = Vec::new();
    input.read_to_end(&mut content).with_context(|| format!("read {}", file.display()))?;
    let messages: Vec<IndexBytes> =
        content.chunks(MESSAGE_LEN).map(|part| IndexBytes { data: part.to_vec() }).collect();
    let mut client = connect(&global.address).await?;
    let response = client.import_index(tokio_stream::iter(messages)).await.map_err(plain)?;
    let layer = response.into_inner().layer;
    match global.output {
        Output::Json => json(&serde_json::json!({ "layer": layer })),
        Output::Text => {
            println!("{layer}");
            Ok(())
        }
    }
}
