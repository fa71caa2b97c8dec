//! This node in the swarm, as configured.
//!
//! Owns: how the registry answers for rights, how indexes go from the layers to the swarm and back.
//! Does not own: anything of the swarm itself.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use prometheus_client::registry::Registry as Metrics;
use skimmer_cache::{Blame, BlobRef, Cache, Class, Origin, Source};
use skimmer_layers::{Indexes, Layers};
use skimmer_proto::{Digest, PieceTable};
use skimmer_registry::{Files, Registry};
use skimmer_swarm::member::{self, Member};
use skimmer_swarm::swarm::{Made, MakeTransport};
use skimmer_swarm::transport::wire;
use skimmer_swarm::{Rights, Swarm, plan};
use tokio::sync::watch;

use crate::config::Config;

/// The origin gets so long to serve one byte to anybody.
const ANONYMOUS: Duration = Duration::from_secs(5);

/// A swarm that is not started yet.
pub struct Prepared {
    pub swarm: Swarm,
    settings: member::Settings,
    key: skimmer_identity::Key,
}

/// `None` where the node stands alone.
pub fn prepare(
    config: &Config,
    registry: &Registry,
    metrics: &mut Metrics,
) -> anyhow::Result<Option<Prepared>> {
    if config.control_plane.address.is_empty() {
        return Ok(None);
    }
    let directory: PathBuf = config.root.join("identity");
    let key = member::open_key(&directory)?;
    let upload = config.swarm.upload_bytes_per_second;
    let settings = skimmer_swarm::swarm::Settings {
        manager: config.control_plane.address.clone(),
        upload,
        download: 0,
        grace: config.identity.grace,
        limits: plan::Limits::default(),
        book: Some(directory.join("peers")),
    };
    let anonymous = Registry::new(skimmer_registry::Config {
        config_path: Some(config.registry.config_path.clone()),
        credentials: skimmer_registry::Places::default(),
        deadline: ANONYMOUS,
        rounds: 2,
        ..skimmer_registry::Config::default()
    });
    let swarm = Swarm::new(
        settings,
        key.peer(),
        Arc::new(registry.clone()),
        Arc::new(AsRegistrySays { registry: registry.clone(), anonymous }),
        transport(&config.swarm.listen, upload),
        metrics,
    );
    let name = match config.node.name.as_str() {
        "" => std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default(),
        name => name.to_owned(),
    };
    let settings = member::Settings {
        address: config.control_plane.address.clone(),
        token_file: config.control_plane.token_file.clone(),
        directory,
        zone: config.node.zone.clone(),
        name: name.trim().to_owned(),
        grace: config.identity.grace,
    };
    Ok(Some(Prepared { swarm, settings, key }))
}

impl Prepared {
    /// Joins the cluster, now or when the control plane can be reached, and shares what is there.
    pub fn start(self, cache: &Cache, layers: &Layers) -> Swarm {
        let Self { swarm, settings, key } = self;
        let (members, receiver) = watch::channel(None::<Member>);
        tokio::spawn(member::stay(settings, key, members));
        swarm.start(cache, receiver);
        layers.share_indexes(Arc::new(Shared { swarm: swarm.clone() }));
        let (runtime, purged) = (tokio::runtime::Handle::current(), layers.clone());
        swarm.on_purge(Box::new(move |blob: Digest, table: Digest| {
            let layers = purged.clone();
            runtime.spawn(async move { layers.disown(blob, table).await });
        }));
        let layers = layers.clone();
        swarm.prove_by(Box::new(move |blob: Digest| layers.proved_table(blob)));
        swarm
    }
}

fn transport(listen: &str, upload: u64) -> MakeTransport {
    let config = wire::Config {
        listen: vec![listen.to_owned()],
        upload_bytes_per_second: (upload > 0).then_some(upload),
        limits: wire::Limits::default(),
    };
    Box::new(move |member, serve| {
        let config = config.clone();
        Box::pin(async move {
            let trust = Arc::clone(&member.trust);
            let wire = wire::Wire::start(&config, &member.credentials, trust, serve).await?;
            let wire = Arc::new(wire);
            let transport = Arc::clone(&wire) as _;
            Ok(Made { transport, addresses: Box::new(move || wire.addresses()) })
        })
    })
}

/// What the registry serves without credentials is public.
struct AsRegistrySays {
    /// With this node's own credentials.
    registry: Registry,
    anonymous: Registry,
}

#[async_trait]
impl Rights for AsRegistrySays {
    async fn is_public(&self, blob: &BlobRef) -> Option<bool> {
        // Files are had without credentials, or not shared.
        if blob.len == 0 || blob.origins.iter().any(Files::is_file) {
            return Some(true);
        }
        let answer = match self.anonymous.fetch(blob, 0..1, Class::Fault).await {
            Ok(mut bytes) => bytes.next().await.unwrap_or(Ok(bytes::Bytes::new())).map(|_| ()),
            Err(error) => Err(error),
        };
        match answer {
            Ok(()) => Some(true),
            Err(error) if error.blame == Blame::Refused => Some(false),
            Err(_) => None,
        }
    }

    async fn authorization(&self, origin: &Origin, manifest: Option<Digest>) -> Option<String> {
        self.registry.authorization(origin, manifest.as_ref()).await
    }

    fn is_claimed(&self, blob: &BlobRef) -> bool {
        blob.origins.iter().any(Files::is_file)
    }
}

/// Indexes by way of the swarm.
struct Shared {
    swarm: Swarm,
}

#[async_trait]
impl Indexes for Shared {
    async fn find(&self, blob: &BlobRef) -> Option<(PieceTable, Vec<u8>)> {
        let found = self.swarm.find_index(blob).await?;
        Some((found.table, found.index))
    }

    async fn publish(&self, blob: &BlobRef, table: &PieceTable) {
        self.swarm.publish_index(blob, table).await;
    }

    fn mismatch(&self, blob: &BlobRef) {
        self.swarm.accuse(blob.digest, blob);
    }
}
