//! `doctor`: what this node has and lacks. Exit code 1 if something needed is missing.

use std::fs;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use containerd_client::services::v1::PluginsRequest;
use containerd_client::services::v1::introspection_client::IntrospectionClient;
use containerd_client::services::v1::version_client::VersionClient;
use serde::Serialize;
use skimmer_proto::node::{CheckRequest, Verdict};

use crate::cli::{Doctor, Global, Output};
use crate::containerd_config::{Host, Version, host_platform, render};
use crate::daemon::{connect, unix_channel};
use crate::output::{json, table};

/// The kernel that can first map the ids of FUSE mounts.
const MAPS_IDS: (u32, u32) = (6, 12);

#[derive(Serialize)]
struct Finding {
    check: String,
    verdict: &'static str,
    detail: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

impl Finding {
    fn new(check: &str, verdict: Verdict, detail: impl Into<String>, remedy: &str) -> Self {
        let verdict = match verdict {
            Verdict::Ok => "ok",
            Verdict::Warning => "warning",
            Verdict::Failed | Verdict::Unspecified => "failed",
        };
        Self { check: check.to_owned(), verdict, detail: detail.into(), remedy: remedy.to_owned() }
    }
}

pub async fn run(global: &Global, options: Doctor) -> anyhow::Result<ExitCode> {
    if options.print_config {
        return print_config(global, &options).await;
    }
    let mut findings = kernel();
    findings.extend(containerd(&options.containerd).await);
    findings.extend(daemon(global, &options).await);
    if global.output == Output::Json {
        json(&findings)?;
    } else {
        let rows: Vec<Vec<String>> = findings
            .iter()
            .map(|f| vec![f.check.clone(), f.verdict.to_owned(), f.detail.clone()])
            .collect();
        table(&["CHECK", "VERDICT", "DETAIL"], &rows);
        for finding in findings.iter().filter(|f| !f.remedy.is_empty() && f.verdict != "ok") {
            println!("\n{}: {}", finding.check, finding.remedy);
        }
    }
    let failed = findings.iter().any(|f| f.verdict == "failed");
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

async fn print_config(global: &Global, options: &Doctor) -> anyhow::Result<ExitCode> {
    let text = match &options.containerd_version {
        Some(text) => text.clone(),
        None => containerd_version(&options.containerd).await.with_context(|| {
            format!(
                "ask containerd at {} (or give --containerd-version)",
                options.containerd.display()
            )
        })?,
    };
    let version: Version = text.parse()?;
    let platform = host_platform();
    let host = Host {
        socket: &global.address,
        root: &options.root,
        platform: &platform,
        maps_ids: kernel_version(&kernel_release()) >= MAPS_IDS,
    };
    let config = render(version, &host);
    match global.output {
        Output::Text => print!("{config}"),
        Output::Json => json(&serde_json::json!({ "containerd": text, "config": config }))?,
    }
    Ok(ExitCode::SUCCESS)
}

fn kernel() -> Vec<Finding> {
    let mut findings = Vec::new();
    let release = kernel_release();
    let version = kernel_version(&release);
    findings.push(if version >= (5, 10) {
        Finding::new("kernel", Verdict::Ok, &release, "")
    } else {
        Finding::new("kernel", Verdict::Failed, &release, "Linux 5.10 or newer is needed.")
    });
    findings.push(if version >= MAPS_IDS {
        let detail = "layers are mounted with the ids of containers in user namespaces (remap-ids)";
        Finding::new("user namespaces", Verdict::Ok, detail, "")
    } else {
        let detail = "this kernel can't map the ids of FUSE mounts: containerd copies the files";
        let remedy =
            "Linux 6.12 can. Until then leave `remap-ids` out of containerd's config.toml.";
        Finding::new("user namespaces", Verdict::Warning, detail, remedy)
    });
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let has = |name: &str| {
        filesystems.lines().any(|line| line.trim_start_matches("nodev").trim() == name)
    };
    for (name, verdict, remedy) in [
        ("fuse", Verdict::Failed, "Layers are mounted through FUSE: `modprobe fuse`."),
        ("overlay", Verdict::Failed, "Containers are overlay mounts: `modprobe overlay`."),
        (
            "erofs",
            Verdict::Warning,
            "Complete layers can't be served by the kernel: `modprobe erofs`.",
        ),
    ] {
        findings.push(if has(name) {
            Finding::new(name, Verdict::Ok, "the kernel has it", "")
        } else {
            Finding::new(name, verdict, "not in /proc/filesystems", remedy)
        });
    }
    findings.push(match fs::OpenOptions::new().read(true).write(true).open("/dev/fuse") {
        Ok(_) => Finding::new("/dev/fuse", Verdict::Ok, "opens", ""),
        Err(error) => Finding::new(
            "/dev/fuse",
            Verdict::Failed,
            error.to_string(),
            "Run as root, with the fuse module loaded.",
        ),
    });
    findings
}

fn kernel_release() -> String {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    release.trim().to_owned()
}

fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

async fn containerd_version(address: &Path) -> anyhow::Result<String> {
    let channel = unix_channel(address).await?;
    Ok(VersionClient::new(channel).version(()).await?.into_inner().version)
}

async fn containerd(address: &Path) -> Vec<Finding> {
    let version = match containerd_version(address).await {
        Ok(version) => version,
        Err(error) => {
            let detail = format!("{}: {error:#}", address.display());
            let remedy = "Start containerd, or name its socket with --containerd.";
            return vec![Finding::new("containerd", Verdict::Warning, detail, remedy)];
        }
    };
    let mut findings = vec![match version.parse::<Version>() {
        Ok(v) if (v.major, v.minor) >= (1, 6) => {
            Finding::new("containerd", Verdict::Ok, version, "")
        }
        _ => Finding::new("containerd", Verdict::Warning, version, "Tested with 1.6, 1.7 and 2.x."),
    }];
    findings.push(match plugin(address).await {
        Ok(Some(detail)) => Finding::new("containerd plugin", Verdict::Ok, detail, ""),
        Ok(None) => Finding::new(
            "containerd plugin",
            Verdict::Failed,
            "containerd has no snapshotter `skimmer`",
            "Merge `skimmer doctor --print-config` into containerd's config.toml and restart containerd.",
        ),
        Err(error) => Finding::new("containerd plugin", Verdict::Warning, format!("{error:#}"), ""),
    });
    findings
}

/// How containerd knows us: capabilities and exports of its plugin entry.
async fn plugin(address: &Path) -> anyhow::Result<Option<String>> {
    let channel = unix_channel(address).await?;
    let request = PluginsRequest { filters: vec!["id==skimmer".to_owned()] };
    let response = IntrospectionClient::new(channel).plugins(request).await?.into_inner();
    Ok(response.plugins.into_iter().find(|p| p.id == "skimmer").map(|p| {
        let exports: Vec<String> = p.exports.iter().map(|(k, v)| format!("{k}={v}")).collect();
        let capabilities = p.capabilities.join(",");
        format!("registered; capabilities [{capabilities}], exports [{}]", exports.join(", "))
    }))
}

async fn daemon(global: &Global, options: &Doctor) -> Vec<Finding> {
    let request = CheckRequest { registry: options.registry.clone().unwrap_or_default() };
    let answer =
        async { Ok::<_, anyhow::Error>(connect(&global.address).await?.check(request).await?) };
    match answer.await {
        Ok(response) => {
            let checks = response.into_inner().checks.into_iter();
            checks
                .map(|c| Finding::new(&c.name, c.verdict(), c.detail.clone(), &c.remedy))
                .collect()
        }
        Err(error) => {
            let remedy = "Start it: `systemctl start skimmerd`.";
            vec![Finding::new("skimmerd", Verdict::Failed, format!("{error:#}"), remedy)]
        }
    }
}
