//! The commands that ask the control plane, on its own machine.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

/// Where skimmer-control listens for its administrator.
#[derive(Args, Debug)]
pub struct Control {
    /// Socket of skimmer-control (its configuration key `admin.address`).
    #[arg(
        long,
        global = true,
        env = "SKIMMER_CONTROL_SOCKET",
        default_value = "/run/skimmer/control.sock"
    )]
    pub control_socket: PathBuf,
}

#[derive(Subcommand, Debug)]
pub enum Cluster {
    /// Create a cluster: nodes that share images, with a CA of their own
    #[command(after_help = "Example:\n  skimmer cluster create production")]
    Create {
        /// Of a-z, 0-9 and '-'.
        name: String,
    },
    /// List clusters
    #[command(
        after_help = "Examples:\n  skimmer cluster list\n  skimmer cluster list --output json"
    )]
    List,
    /// Set the repositories that a cluster's nodes may read without the registry being asked
    #[command(after_help = "Examples:\n  \
                            skimmer cluster policy production --repository 'registry.example.com/team/*'\n  \
                            skimmer cluster policy production --none")]
    Policy {
        cluster: String,
        /// host/repository, with `*` at either end for any text. Repeatable; replaces what was set before.
        #[arg(long = "repository", value_name = "PATTERN", required_unless_present = "none")]
        repositories: Vec<String>,
        /// No repository: the registry is always asked.
        #[arg(long, conflicts_with = "repositories")]
        none: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Role {
    /// An ordinary node.
    Peer,
    /// Told to fetch images first; trusted to say alone how a layer decodes.
    Seed,
}

#[derive(Subcommand, Debug)]
pub enum Token {
    /// Make a join token for a node's `control_plane.token_file`; it is shown once
    #[command(after_help = "Examples:\n  skimmer token create --cluster production >token\n  \
                            skimmer token create --cluster production --role seed --ttl 30m\n  \
                            skimmer token create --cluster production --unlimited --ttl 1h")]
    Create {
        #[arg(long)]
        cluster: String,
        /// Of the nodes that join with it.
        #[arg(long, value_enum, default_value_t = Role::Peer)]
        role: Role,
        /// How long it may be used: 30m, 24h, 7days.
        #[arg(long, default_value = "24h", value_parser = humantime::parse_duration)]
        ttl: Duration,
        /// How many nodes may join with it. Nodes of one token count as one when they vouch for a layer's index.
        #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        uses: u32,
        /// Any number of nodes may join with it.
        #[arg(long, conflicts_with = "uses")]
        unlimited: bool,
    },
}

#[derive(Subcommand, Debug)]
pub enum Node {
    /// List the nodes that joined
    #[command(
        after_help = "Examples:\n  skimmer node list\n  skimmer node list --cluster production"
    )]
    List {
        /// All clusters if not given.
        #[arg(long, default_value = "")]
        cluster: String,
    },
    /// Throw a node out for good: its neighbours drop it, its certificate isn't renewed
    #[command(after_help = "Example:\n  skimmer node revoke 12D3KooW… --reason 'stolen laptop'")]
    Revoke {
        /// Its peer id, as `skimmer node list` shows it.
        peer: String,
        /// For the record.
        #[arg(long, default_value = "")]
        reason: String,
    },
}

#[derive(Subcommand, Debug)]
pub enum Task {
    /// List what is being distributed: one line a blob and scope of rights
    #[command(
        after_help = "Examples:\n  skimmer task list\n  skimmer task list --cluster production"
    )]
    List {
        /// All clusters if not given.
        #[arg(long, default_value = "")]
        cluster: String,
    },
    /// Show who has what of a task, and the latest decisions with their reasons
    #[command(
        after_help = "Examples:\n  skimmer task show 2220093414\n  skimmer task show sha256:7f3c…"
    )]
    Show {
        /// Task id or blob digest, or its beginning.
        id: String,
    },
}

#[derive(Subcommand, Debug)]
pub enum Event {
    /// List what happened: clusters, tokens, nodes, lies that were found
    #[command(
        after_help = "Examples:\n  skimmer event list\n  skimmer event list --cluster production --output json"
    )]
    List {
        /// All clusters if not given.
        #[arg(long, default_value = "")]
        cluster: String,
    },
}
