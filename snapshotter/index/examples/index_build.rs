//! What building the index of a blob costs and weighs, beside plain decoding, as one JSON object.
//!
//! `index_build BLOB [ROUNDS]`: medians of CPU seconds of one thread (default 5 rounds, alternating):
//! - `plain_decode_cpu_s`: flate2 (zlib-rs) or zstd, nothing else;
//! - `build_cpu_s`: decoding with checkpoints, tar walk, tree, inodes, encoding; `ratio` is over plain;
//! - `pass_cpu_s`: the same with the blob's SHA-256, the DiffID and the pieces' BLAKE3 values.
//!
//! And `random_read_cpu_ms`: decoding the one chunk that a random read needs, mean of up to 200. Before it prints
//! anything it decodes every chunk on its own and compares the whole with the DiffID.

use std::io::{Cursor, Read};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::time::{ClockId, clock_gettime};
use sha2::{Digest as _, Sha256};
use skimmer_index::build::{BlobSums, Built, DataScan, Decoder, Scanned, Sums, assemble};
use skimmer_index::chunk::decode_chunk;
use skimmer_index::codec::Compression;
use skimmer_index::index::LayerIndex;
use skimmer_index::tar::{Limits, TarWalk};
use skimmer_index::tree::TreeBuilder;
use skimmer_proto::{Digest, Geometry};

const PUSH: usize = 1 << 20;
const MAX_DATA: u64 = 1 << 40;

fn main() -> Result<()> {
    let mut args = std::env::args().skip(1);
    let path = args.next().context("usage: index_build BLOB [ROUNDS]")?;
    let rounds: usize = args.next().map_or(Ok(5), |n| n.parse())?;
    let blob = std::fs::read(&path).with_context(|| format!("read {path}"))?;
    let (mut plain, mut build, mut pass) = (Vec::new(), Vec::new(), Vec::new());
    let (mut encoded, mut diff_id) = (Vec::new(), None);
    for _ in 0..rounds {
        plain.push(timed(|| plain_decode(&blob))?.1);
        let (built, spent) = timed(|| index_only(&blob))?;
        build.push(spent);
        let (full, spent) = timed(|| whole_pass(&blob))?;
        pass.push(spent);
        ensure!(built == full.encoded, "two builds of {path} differ");
        (encoded, diff_id) = (full.encoded, Some(full.table.diff_id));
    }
    let index = LayerIndex::decode(&encoded)?;
    ensure!(
        Some(chunk_by_chunk(&index, &blob)?) == diff_id,
        "the chunks of {path} are not its tar"
    );
    let (plain, build, pass) = (median(plain), median(build), median(pass));
    println!(
        "{}",
        serde_json::json!({
            "blob_bytes": blob.len(), "data_bytes": index.tar_len, "index_bytes": encoded.len(),
            "index_share": encoded.len() as f64 / blob.len() as f64,
            "inodes_bytes": index.inodes.len(), "windows_bytes": index.windows.len(),
            "chunks": index.chunks.len(),
            "plain_decode_cpu_s": plain, "build_cpu_s": build, "ratio": build / plain,
            "pass_cpu_s": pass, "pass_ratio": pass / plain,
            "random_read_cpu_ms": random_reads(&index, &blob)?,
        })
    );
    Ok(())
}

fn plain_decode(blob: &[u8]) -> Result<u64> {
    let mut decoder: Box<dyn Read> = match Compression::sniff(blob) {
        Compression::Stored => Box::new(blob),
        Compression::Gzip => Box::new(flate2::read::MultiGzDecoder::new(blob)),
        Compression::Zstd => Box::new(zstd::Decoder::with_buffer(Cursor::new(blob))?),
    };
    let (mut room, mut len) = (vec![0; 256 << 10], 0);
    loop {
        match decoder.read(&mut room)? {
            0 => return Ok(len),
            n => len += n as u64,
        }
    }
}

fn index_only(blob: &[u8]) -> Result<Vec<u8>> {
    let mut decoder = Decoder::new(MAX_DATA);
    let (mut walk, mut tree) =
        (TarWalk::new(Limits::default()), TreeBuilder::new(Limits::default()));
    let mut scanned = Ok(());
    let mut scan = |bytes: &[u8]| {
        if scanned.is_ok() {
            scanned = walk.push(bytes, &mut |entry| Ok(tree.insert(entry)?));
        }
    };
    for part in blob.chunks(PUSH) {
        decoder.push(part, &mut scan)?;
    }
    let decoded = decoder.finish(&mut scan)?;
    scanned?;
    let nothing = Digest::of(b"");
    let scanned = Scanned { diff_id: nothing, tree: tree.finish()?, tar_len: walk.finish()? };
    let geometry = Geometry::of(blob.len() as u64).context("blob too long")?;
    let values = vec![[0; 32]; geometry.pieces() as usize];
    Ok(assemble(Sums { geometry, blob: nothing, values }, decoded, scanned)?.encoded)
}

fn whole_pass(blob: &[u8]) -> Result<Built> {
    let mut sums = BlobSums::new(blob.len() as u64)?;
    let (mut decoder, mut scan) = (Decoder::new(MAX_DATA), DataScan::new(Limits::default()));
    let mut scanned = Ok(());
    let mut out = |bytes: &[u8]| {
        if scanned.is_ok() {
            scanned = scan.push(bytes);
        }
    };
    for part in blob.chunks(PUSH) {
        sums.push(part)?;
        decoder.push(part, &mut out)?;
    }
    let decoded = decoder.finish(&mut out)?;
    scanned?;
    Ok(assemble(sums.finish()?, decoded, scan.finish()?)?)
}

/// The digest of what the chunks decode to, each on its own.
fn chunk_by_chunk(index: &LayerIndex, blob: &[u8]) -> Result<Digest> {
    let (mut sha256, mut out) = (Sha256::new(), Vec::new());
    for chunk in 0..index.chunks.len() {
        decode_chunk(index, chunk, compressed(index, blob, chunk)?, &mut out)?;
        sha256.update(&out);
    }
    Ok(Digest::from_bytes(sha256.finalize().into()))
}

fn compressed<'a>(index: &LayerIndex, blob: &'a [u8], chunk: usize) -> Result<&'a [u8]> {
    let range = index.blob_range(chunk..chunk + 1);
    let range = usize::try_from(range.start)?..usize::try_from(range.end)?;
    blob.get(range).context("a chunk outside the blob")
}

fn random_reads(index: &LayerIndex, blob: &[u8]) -> Result<f64> {
    if index.tar_len == 0 {
        return Ok(0.0);
    }
    let (mut out, mut seed, mut reads, mut decoded) = (Vec::new(), 1u64, 0u32, 0);
    let ((), spent) = timed(|| {
        // A blob of one chunk decodes whole for each read.
        while reads < 200 && decoded < 1 << 30 {
            seed = seed.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            let at = (seed >> 16) % index.tar_len;
            for chunk in index.chunks_covering(at..at + 1).into_iter().flatten() {
                decode_chunk(index, chunk, compressed(index, blob, chunk)?, &mut out)?;
                decoded += out.len();
            }
            reads += 1;
        }
        Ok(())
    })?;
    Ok(spent * 1e3 / f64::from(reads))
}

/// What `work` returns, and the CPU seconds it took this thread.
fn timed<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, f64)> {
    let start = cpu_s()?;
    let done = work()?;
    Ok((done, cpu_s()? - start))
}

fn cpu_s() -> Result<f64> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?).as_secs_f64())
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(0.0)
}
