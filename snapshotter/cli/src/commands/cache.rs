//! `cache show|prune|verify`.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use skimmer_proto::node::{
    CacheEntry, CacheRot, PruneCacheRequest, ShowCacheRequest, VerifyCacheProgress,
    VerifyCacheRequest,
};

use crate::cli::{Cache, Global, Output};
use crate::daemon::{connect, plain};
use crate::output::{bytes, json, percent, short, table};

pub async fn run(global: &Global, command: Cache) -> anyhow::Result<ExitCode> {
    match command {
        Cache::Show { limit } => show(global, limit).await?,
        Cache::Prune { all } => prune(global, all).await?,
        Cache::Verify => return verify(global).await,
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Serialize)]
struct EntryView {
    digest: String,
    what: String,
    bytes: u64,
    in_use: bool,
    last_use_s: i64,
}

impl From<CacheEntry> for EntryView {
    fn from(entry: CacheEntry) -> Self {
        let CacheEntry { digest, what, bytes, in_use, last_use_s } = entry;
        Self { digest, what, bytes, in_use, last_use_s }
    }
}

#[derive(Serialize)]
struct Shown {
    used_bytes: u64,
    quota_bytes: u64,
    documents_bytes: u64,
    /// Of these, not in use: what `prune` would free.
    idle_bytes: u64,
    entries: Vec<EntryView>,
}

async fn show(global: &Global, limit: usize) -> anyhow::Result<()> {
    let mut daemon = connect(&global.address).await?;
    let answer = daemon.show_cache(ShowCacheRequest {}).await.map_err(plain)?.into_inner();
    let (used_bytes, quota_bytes) = (answer.used_bytes, answer.quota_bytes);
    let mut entries: Vec<EntryView> = answer.entries.into_iter().map(EntryView::from).collect();
    let idle = |entry: &&EntryView| !entry.in_use && entry.what != CHUNKS;
    let idle_bytes = entries.iter().filter(idle).map(|entry| entry.bytes).sum();
    let kinds = by_kind(&entries);
    if limit > 0 {
        entries.truncate(limit);
    }
    let documents_bytes = answer.documents_bytes;
    let shown = Shown { used_bytes, quota_bytes, documents_bytes, idle_bytes, entries };
    if global.output == Output::Json {
        return json(&shown);
    }
    let share = percent(used_bytes, quota_bytes);
    println!(
        "{} of {} used ({share}), {} idle",
        bytes(used_bytes),
        bytes(quota_bytes),
        bytes(idle_bytes)
    );
    println!("{} of manifests and configurations beside that\n", bytes(documents_bytes));
    sums(&kinds);
    println!();
    let row = |entry: &EntryView| {
        let in_use = if entry.in_use { "in use" } else { "idle" };
        vec![
            short(&entry.digest),
            entry.what.clone(),
            bytes(entry.bytes),
            in_use.to_owned(),
            age(entry.last_use_s),
        ]
    };
    let rows: Vec<_> = shown.entries.iter().map(row).collect();
    table(&["DIGEST", "WHAT", "SIZE", "", "LAST USED"], &rows);
    Ok(())
}

/// Those of layers in use, which nobody has read.
const CHUNKS: &str = "chunks";

/// Entries and bytes of each kind.
fn by_kind(entries: &[EntryView]) -> BTreeMap<String, (usize, u64)> {
    let mut kinds = BTreeMap::<String, (usize, u64)>::new();
    for entry in entries {
        let sum = kinds.entry(entry.what.clone()).or_default();
        *sum = (sum.0 + 1, sum.1 + entry.bytes);
    }
    kinds
}

fn sums(kinds: &BTreeMap<String, (usize, u64)>) {
    let row = |(what, (count, sum)): (&String, &(usize, u64))| {
        vec![what.clone(), count.to_string(), bytes(*sum)]
    };
    table(&["WHAT", "ENTRIES", "SIZE"], &kinds.iter().map(row).collect::<Vec<_>>());
}

/// `3 h ago`.
fn age(since_s: i64) -> String {
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(0, |now| now.as_secs());
    let age = now.saturating_sub(u64::try_from(since_s).unwrap_or(0));
    match age {
        0..60 => format!("{age} s ago"),
        60..3600 => format!("{} min ago", age / 60),
        3600..86_400 => format!("{} h ago", age / 3600),
        _ => format!("{} days ago", age / 86_400),
    }
}

#[derive(Serialize)]
struct Pruned {
    freed_bytes: u64,
    used_bytes: u64,
    freed: Vec<EntryView>,
}

async fn prune(global: &Global, all: bool) -> anyhow::Result<()> {
    let mut daemon = connect(&global.address).await?;
    let answer = daemon.prune_cache(PruneCacheRequest { all }).await.map_err(plain)?.into_inner();
    let freed: Vec<EntryView> = answer.freed.into_iter().map(EntryView::from).collect();
    let freed_bytes = freed.iter().map(|entry| entry.bytes).sum();
    let pruned = Pruned { freed_bytes, used_bytes: answer.used_bytes, freed };
    if global.output == Output::Json {
        return json(&pruned);
    }
    if !pruned.freed.is_empty() {
        sums(&by_kind(&pruned.freed));
        println!();
    }
    println!("{} freed, {} still used", bytes(freed_bytes), bytes(pruned.used_bytes));
    Ok(())
}

#[derive(Serialize)]
struct Verified {
    checked_bytes: u64,
    total_bytes: u64,
    failures: u64,
    done: bool,
    found: Vec<Rot>,
}

#[derive(Serialize)]
struct Rot {
    digest: String,
    pieces: u64,
    chunks: u64,
    rewritten: u64,
    objects: u64,
}

impl From<CacheRot> for Rot {
    fn from(rot: CacheRot) -> Self {
        let CacheRot { digest, pieces, chunks, rewritten, objects } = rot;
        Self { digest, pieces, chunks, rewritten, objects }
    }
}

impl From<VerifyCacheProgress> for Verified {
    fn from(progress: VerifyCacheProgress) -> Self {
        let VerifyCacheProgress { checked_bytes, total_bytes, failures, done, found, .. } =
            progress;
        let found = found.into_iter().map(Rot::from).collect();
        Self { checked_bytes, total_bytes, failures, done, found }
    }
}

async fn verify(global: &Global) -> anyhow::Result<ExitCode> {
    let mut daemon = connect(&global.address).await?;
    let stream = daemon.verify_cache(VerifyCacheRequest {}).await.map_err(plain)?;
    let mut stream = stream.into_inner();
    let visible = global.output == Output::Text && std::io::stderr().is_terminal();
    let bar = if visible { ProgressBar::new(0) } else { ProgressBar::hidden() };
    let template = "{bar:30} {bytes:>11} / {total_bytes:<11} {bytes_per_sec:<14} {msg}";
    let style = ProgressStyle::with_template(template);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let mut last = VerifyCacheProgress::default();
    while let Some(progress) = stream.message().await.map_err(plain)? {
        bar.set_length(progress.total_bytes.max(progress.checked_bytes));
        bar.set_position(progress.checked_bytes);
        bar.set_message(short(&progress.digest));
        if global.output == Output::Json {
            println!("{}", serde_json::to_string(&Verified::from(progress.clone()))?);
        }
        last = progress;
    }
    bar.finish_and_clear();
    anyhow::ensure!(last.done || last.total_bytes == 0, "skimmerd stopped before all was checked");
    let verified = Verified::from(last);
    if global.output == Output::Text {
        report(&verified);
    }
    let right = verified.found.is_empty() && verified.failures == 0;
    Ok(if right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(verified: &Verified) {
    println!("{} checked", bytes(verified.checked_bytes));
    if verified.failures > 0 {
        println!("{} digests could not be checked: see the log of skimmerd", verified.failures);
    }
    if verified.found.is_empty() {
        return;
    }
    println!(
        "These had changed on disk; they aren't used any more, and come again when they are needed:"
    );
    let row = |rot: &Rot| {
        let counts = [rot.pieces, rot.chunks, rot.rewritten, rot.objects];
        std::iter::once(short(&rot.digest)).chain(counts.map(|n| n.to_string())).collect()
    };
    let rows: Vec<Vec<String>> = verified.found.iter().map(row).collect();
    table(&["DIGEST", "PIECES", "CHUNKS", "REWRITTEN", "OBJECTS"], &rows);
}
