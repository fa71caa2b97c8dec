//! The command line: names, options and help. Completions and man pages are made from it.

pub mod control;

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Exit code when the daemon can't be reached. 1 is any other failure, 2 a wrong command line.
pub const EXIT_UNREACHABLE: u8 = 3;
/// Exit code of `get` when the file isn't what its digest says.
pub const EXIT_MISMATCH: u8 = 4;
/// Exit code of `get` when the origin refuses the file or hasn't got it.
pub const EXIT_REFUSED: u8 = 5;

#[derive(Parser, Debug)]
#[command(
    name = "skimmer",
    version,
    about = "Container images on this node: lazily pulled, shared, inspected",
    after_help = "Exit codes: 0 success, 1 failure, 2 wrong command line, 3 skimmerd or skimmer-control can't be reached.\n\n\
                  Examples:\n  \
                  skimmer pull docker.io/library/python:3.13\n  \
                  skimmer status docker.io/library/python:3.13\n  \
                  skimmer doctor\n  \
                  skimmer images --output json"
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Args, Debug)]
pub struct Global {
    /// Socket of skimmerd.
    #[arg(
        long,
        global = true,
        env = "SKIMMER_ADDRESS",
        default_value = "/run/skimmer/skimmerd.sock"
    )]
    pub address: PathBuf,
    /// How to print results.
    #[arg(long, global = true, value_enum, default_value_t = Output::Text)]
    pub output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// Tables and progress bars.
    Text,
    /// One JSON value; commands that stream print one object a line.
    Json,
}

#[derive(Subcommand, Debug)]
pub enum Command {
    /// List containerd's images with how much of each is on this node
    #[command(after_help = "Examples:\n  skimmer images\n  skimmer images --namespace k8s.io")]
    Images {
        /// containerd namespace; all of them if not given.
        #[arg(long, short)]
        namespace: Option<String>,
    },
    /// Show every layer of an image: mode, bytes on disk, bytes fetched and why, index
    #[command(
        after_help = "Examples:\n  skimmer status\n  skimmer status docker.io/library/python:3.13"
    )]
    Status {
        /// Image name or digest; every image if not given.
        image: Option<String>,
        /// containerd namespace; all of them if not given.
        #[arg(long, short)]
        namespace: Option<String>,
    },
    /// Show the other nodes that this one exchanges pieces with
    #[command(after_help = "Examples:\n  skimmer peers\n  skimmer peers --output json")]
    Peers,
    /// Pull an image into containerd lazily: it can run before its bytes are here
    #[command(after_help = "Examples:\n  skimmer pull docker.io/library/python:3.13\n  \
                            skimmer pull --namespace k8s.io --platform linux/arm64 registry.example.com/app:v1\n  \
                            skimmer pull --full docker.io/library/python:3.13")]
    Pull {
        /// Image reference, as for `ctr image pull`.
        reference: String,
        /// containerd namespace.
        #[arg(long, short, env = "CONTAINERD_NAMESPACE", default_value = "default")]
        namespace: String,
        /// os/arch[/variant]; this machine's if not given.
        #[arg(long)]
        platform: Option<String>,
        /// containerd's name for skimmer.
        #[arg(long, default_value = "skimmer")]
        snapshotter: String,
        /// Not lazily: put the blobs into containerd's content store, for overlayfs and any other snapshotter.
        #[arg(long)]
        full: bool,
    },
    /// Put the blobs of a lazily pulled image into containerd's content store
    ///
    /// Then `ctr image push`, `export` and `convert` work on it. What isn't on this node yet is fetched. The blobs are
    /// hard links to skimmer's own files where the file system allows it: there is one copy on disk.
    #[command(after_help = "Examples:\n  skimmer materialize docker.io/library/python:3.13\n  \
                            skimmer materialize --namespace k8s.io registry.example.com/app:v1")]
    Materialize {
        /// Image name or digest.
        image: String,
        /// containerd namespace; the one that has the image if not given.
        #[arg(long, short)]
        namespace: Option<String>,
    },
    /// Download a file at an HTTP(S) address, sharing it with the other nodes of the cluster
    ///
    /// It is shared under --digest, or under its address and strong ETag. What has neither, or has
    /// credentials in its address, comes straight from its origin. A download that was interrupted goes
    /// on where it stopped.
    #[command(
        after_help = "Exit codes: 0 success, 1 failure, 2 wrong command line, 3 skimmerd can't be reached, \
                            4 the file isn't what --digest says, 5 the origin refuses it or hasn't got it.\n\n\
                            Examples:\n  \
                            skimmer get https://example.com/model.bin -o model.bin\n  \
                            skimmer get --digest sha256:… https://example.com/model.bin -o model.bin\n  \
                            skimmer get --range 0-1023 https://example.com/model.bin -o head.bin"
    )]
    Get(Get),
    /// Fetch what is missing of an image, until every byte is on this node
    #[command(after_help = "Example:\n  skimmer fetch docker.io/library/python:3.13")]
    Fetch {
        /// Image name or digest.
        image: String,
        /// containerd namespace; all of them if not given.
        #[arg(long, short)]
        namespace: Option<String>,
    },
    /// Have an image's blobs ready for a pull that is about to begin: for containerd 2.x to call
    ///
    /// containerd calls the programs in the `bin_dir` of its plugin `io.containerd.image-verifier.v1.bindir` before it
    /// fetches anything; install/skimmer-verifier is one that calls this. skimmerd puts the blobs, from the swarm or from
    /// its cache, into containerd's content store, and containerd finds them there. It verifies nothing and always
    /// succeeds: what isn't ready in time, containerd fetches by itself. Not for images that are to be lazy.
    #[command(
        after_help = "Example:\n  skimmer verifier --timeout 9s -- -name docker.io/library/python:3.13 -digest sha256:…"
    )]
    Verifier {
        /// How long it takes at most. containerd's `per_verifier_timeout` (10s by default) has to be longer.
        #[arg(long, default_value = "9s", value_parser = humantime::parse_duration)]
        timeout: std::time::Duration,
        /// What containerd says: -name REFERENCE -digest DIGEST -stdin-media-type TYPE.
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Clusters of nodes that share images (on the control plane's machine)
    Cluster {
        #[command(flatten)]
        control: control::Control,
        #[command(subcommand)]
        command: control::Cluster,
    },
    /// Join tokens (on the control plane's machine)
    Token {
        #[command(flatten)]
        control: control::Control,
        #[command(subcommand)]
        command: control::Token,
    },
    /// The nodes of clusters (on the control plane's machine)
    Node {
        #[command(flatten)]
        control: control::Control,
        #[command(subcommand)]
        command: control::Node,
    },
    /// What is being distributed, and why so (on the control plane's machine)
    Task {
        #[command(flatten)]
        control: control::Control,
        #[command(subcommand)]
        command: control::Task,
    },
    /// What happened in clusters (on the control plane's machine)
    Event {
        #[command(flatten)]
        control: control::Control,
        #[command(subcommand)]
        command: control::Event,
    },
    /// Build, show and move layer indexes
    #[command(subcommand)]
    Index(Index),
    /// Show, check and give up what is cached on this node
    #[command(subcommand)]
    Cache(Cache),
    /// Check this node: kernel, FUSE, containerd and its configuration, skimmerd, registries
    #[command(
        after_help = "Examples:\n  skimmer doctor\n  skimmer doctor --registry registry.example.com\n  \
                            skimmer doctor --print-config >>/etc/containerd/config.toml"
    )]
    Doctor(Doctor),
    /// Print a shell completion script
    #[command(after_help = "Example:\n  skimmer completion bash >/etc/bash_completion.d/skimmer")]
    Completion { shell: clap_complete::Shell },
    /// Write the man pages into a directory
    #[command(after_help = "Example:\n  skimmer man /usr/local/share/man/man1")]
    Man { directory: PathBuf },
}

#[derive(Subcommand, Debug)]
pub enum Index {
    /// Read an image's layers from end to end, so that they have indexes; containerd isn't touched
    #[command(after_help = "Example:\n  skimmer index build registry.example.com/app:v1")]
    Build {
        reference: String,
        /// os/arch[/variant]; this machine's if not given.
        #[arg(long)]
        platform: Option<String>,
    },
    /// Show what a layer's index holds
    #[command(after_help = "Example:\n  skimmer index show sha256:…")]
    Show {
        /// Digest of the layer's blob.
        layer: String,
    },
    /// Write a layer's index and piece table to a file
    #[command(after_help = "Example:\n  skimmer index export sha256:… layer.skidx")]
    Export {
        /// Digest of the layer's blob.
        layer: String,
        /// `-`: standard output.
        file: PathBuf,
    },
    /// Store an exported index. You vouch for it: layers are mounted by it before they were read whole
    #[command(after_help = "Example:\n  skimmer index import layer.skidx")]
    Import {
        /// `-`: standard input.
        file: PathBuf,
    },
}

#[derive(Subcommand, Debug)]
pub enum Cache {
    /// Show what takes the space, the largest first
    #[command(
        after_help = "Examples:\n  skimmer cache show\n  skimmer cache show --limit 0 --output json"
    )]
    Show {
        /// Most entries listed; 0: all of them.
        #[arg(long, default_value_t = 20)]
        limit: usize,
    },
    /// Give up what no snapshot and no reader uses: blobs and layers; they are fetched again when needed
    #[command(
        after_help = "Examples:\n  skimmer cache prune\n  skimmer cache prune --all --output json"
    )]
    Prune {
        /// Also parts of mounted layers that nobody has read.
        #[arg(long)]
        all: bool,
    },
    /// Read everything that is cached and compare it with what it should be; what is wrong isn't used any more
    #[command(
        after_help = "Exit codes: 0 all of it is right, 1 something was wrong or could not be checked.\n\n\
                            Example:\n  skimmer cache verify"
    )]
    Verify,
}

#[derive(Args, Debug)]
pub struct Get {
    /// http or https.
    pub url: String,
    /// Where it is written when it is whole.
    #[arg(long, short, value_name = "FILE")]
    pub out: PathBuf,
    /// What the content has to be: `sha256:` and 64 digits.
    #[arg(long)]
    pub digest: Option<String>,
    /// First and last byte wanted, both included, or only the first; what comes isn't checked by --digest.
    #[arg(long, value_name = "FIRST-[LAST]", value_parser = range)]
    pub range: Option<(u64, u64)>,
    /// Straight from the origin, not shared.
    #[arg(long)]
    pub direct: bool,
}

/// As in HTTP; the second is behind the last byte, 0 for the end of the file.
fn range(text: &str) -> Result<(u64, u64), String> {
    let wrong = || "expected FIRST-LAST or FIRST-, as in 0-1023".to_owned();
    let (first, last) = text.split_once('-').ok_or_else(wrong)?;
    let first: u64 = first.parse().map_err(|_| wrong())?;
    if last.is_empty() {
        return Ok((first, 0));
    }
    let last: u64 = last.parse().map_err(|_| wrong())?;
    if last < first || last == u64::MAX { Err(wrong()) } else { Ok((first, last + 1)) }
}

#[derive(Args, Debug)]
pub struct Doctor {
    /// Print the lines that containerd's config.toml needs, and do nothing else.
    #[arg(long)]
    pub print_config: bool,
    /// containerd version to print for; asked of containerd if not given.
    #[arg(long, requires = "print_config", value_name = "X.Y.Z")]
    pub containerd_version: Option<String>,
    /// containerd's socket.
    #[arg(long, env = "CONTAINERD_ADDRESS", default_value = "/run/containerd/containerd.sock")]
    pub containerd: PathBuf,
    /// skimmerd's `root`, for the printed configuration.
    #[arg(long, default_value = "/var/lib/skimmer")]
    pub root: PathBuf,
    /// A registry to reach, by its host name.
    #[arg(long)]
    pub registry: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn ranges_are_as_in_http() {
        for (text, expected) in [
            ("0-0", Some((0, 1))),
            ("5-9", Some((5, 10))),
            ("7-", Some((7, 0))),
            ("-7", None),
            ("9-5", None),
            ("5", None),
            ("0-18446744073709551615", None),
        ] {
            assert_eq!(range(text).ok(), expected, "{text}");
        }
    }

    #[test]
    fn every_command_has_an_example() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands() {
                let help = sub.get_after_help().map(ToString::to_string).unwrap_or_default();
                let group = sub.get_subcommands().next().is_some();
                assert!(group || help.contains("Example"), "{}", sub.get_name());
                check(sub);
            }
        }
        check(&Cli::command());
    }
}
