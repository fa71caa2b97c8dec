//! The stages, wired: build, run, drain.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use futures::future;
use prometheus_client::registry::Registry as Metrics;
use skimmer_cache::{Cache, PieceSource, Sources};
use skimmer_cri::Proxy;
use skimmer_index::tar::Limits;
use skimmer_layers::{FuseConfig, Keeping, Layers, Scrub, error_chain};
use skimmer_proto::node::node_server::NodeServer;
use skimmer_registry::{Places, Registry, Told};
use skimmer_service::health::{self, Health};
use skimmer_service::socket;
use skimmer_snapshots::identify::{Containerd, Content};
use skimmer_snapshots::layers::Served;
use skimmer_snapshots::materialize::Materializer;
use skimmer_snapshots::metrics::Adoptions;
use skimmer_snapshots::records::Stored;
use skimmer_snapshots::{Snapshotter, service};
use skimmer_store::Store;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::completed;
use crate::config::{Config, Materialize, MountMode};
use crate::cri;
use crate::keeper;
use crate::node::{Documents, Node};
use crate::pulled;
use crate::swarm;

/// How long requests under way may take once the daemon has been told to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// A daemon that is ready to serve.
pub struct App {
    metrics_address: String,
    listener: UnixListener,
    cri_listener: Option<UnixListener>,
    images: Proxy,
    materialize: Materialize,
    snapshotter: Snapshotter,
    node: Node,
    health: Arc<Health>,
    store: Store,
    cache: Cache,
}

impl App {
    /// Opens everything below `config.root`. Needs no network, no containerd and no registry.
    pub async fn build(config: &Config) -> anyhow::Result<Self> {
        // First of all: two daemons must not share a root.
        let listener = socket::listen("snapshots.address", &config.snapshots.address)?;
        let cri_listener = cri::listen(&config.cri)?;
        let mut metrics = Metrics::with_prefix("skimmer");
        let root = &config.root;
        std::fs::create_dir_all(root)
            .with_context(|| format!("create directory {} (root)", root.display()))?;

        let (store, damaged) = Store::open_or_replace(root)?;
        if let Some(aside) = damaged {
            tracing::error!(kept = %aside.display(), "the metadata could not be read; rebuilding it from the snapshots");
        }
        let mut keeping = keeper::open(config)?;
        let kept_by = keeper::KeptBy::of(&config.mount, &keeping);
        let memory = keeper::credentials(config, &mut keeping)?;
        let told = Told::open(config.cri.remember_credentials, memory);
        let registry = registry(config, told.clone());
        let prepared = swarm::prepare(config, &registry, &mut metrics)?;
        let pieces = prepared.as_ref().map(|p| Arc::new(p.swarm.clone()) as Arc<dyn PieceSource>);
        let sources = Sources { pieces, ranges: Arc::new(registry.clone()) };
        let cache = cache(config, sources, &mut metrics)?;
        let layers = layers(config, cache.clone(), &store, keeping, &mut metrics)?;
        let swarm = prepared.map(|prepared| prepared.start(&cache, &layers));
        let containerd =
            Arc::new(Containerd::new(&config.containerd.address, &config.snapshots.address));
        let snapshotter = snapshotter(config, &store, &layers, &cache, &containerd, &mut metrics)?;
        let documents = Documents { cache: cache.clone(), swarm: swarm.clone() };
        let materializer = Materializer {
            containerd: Arc::clone(&containerd),
            cache: cache.clone(),
            metrics: Adoptions::register(&mut metrics),
        };
        let image_service = config.cri.address.clone();
        let node = Node {
            containerd,
            layers,
            snapshots: snapshotter.clone(),
            registry,
            documents,
            materializer,
            image_service,
            kept_by,
            swarm,
        };
        let images = cri::proxy(&config.cri, &node, told);
        let health = Arc::new(Health { registry: metrics, ready: AtomicBool::new(false) });
        let metrics_address = config.metrics.address.clone();
        let materialize = config.containerd.materialize;
        Ok(Self {
            metrics_address,
            listener,
            cri_listener,
            images,
            materialize,
            snapshotter,
            node,
            health,
            store,
            cache,
        })
    }

    /// Serves until `stopped`, then finishes what is under way. What is mounted stays for the next process if somebody
    /// keeps it.
    pub async fn run(self, stopped: impl Future<Output = ()>) -> anyhow::Result<()> {
        if !self.metrics_address.is_empty() {
            tokio::spawn(health::serve(&self.metrics_address, Arc::clone(&self.health)).await?);
        }
        let sweeper = self.snapshotter.clone();
        tokio::spawn(async move { sweeper.sweep_forever().await });

        if self.materialize == Materialize::OnComplete {
            tokio::spawn(completed::materialize(self.node.clone()));
        }
        tokio::spawn(pulled::keep_documents(self.node.clone()));

        let stop = CancellationToken::new();
        let server = Server::builder()
            .add_service(service(self.snapshotter.clone()))
            .add_service(NodeServer::new(self.node.clone()))
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(self.listener),
                stop.clone().cancelled_owned(),
            );
        let server = async { server.await.context("serve snapshots.address") };
        let images = cri::serve(self.cri_listener, self.images, stop.clone());
        let mut server = tokio::spawn(future::try_join(server, images));
        self.health.ready.store(true, Ordering::Release);
        tokio::select! {
            () = stopped => {}
            ended = &mut server => {
                ended.context("the server ended")??;
                anyhow::bail!("the server ended by itself");
            }
        }
        tracing::info!("stopping");
        self.health.ready.store(false, Ordering::Release);
        stop.cancel();
        if tokio::time::timeout(DRAIN, server).await.is_err() {
            tracing::warn!(after_s = DRAIN.as_secs(), "requests under way were cut off");
        }
        let layers = self.node.layers.clone();
        tokio::task::spawn_blocking(move || layers.leave()).await.context("leave the mounts")?;
        self.cache.drain().await.context("record what the cache has")?;
        self.store.flush().context("flush the metadata")?;
        tracing::info!("stopped");
        Ok(())
    }
}

fn registry(config: &Config, told: Told) -> Registry {
    Registry::new(skimmer_registry::Config {
        config_path: Some(config.registry.config_path.clone()),
        credentials: credentials(&config.registry, told),
        // Sooner than the cache's own, so that the registry's last word is known when that is over.
        deadline: config.fetch.deadline / 4 * 3,
        ..skimmer_registry::Config::default()
    })
}

fn credentials(config: &crate::config::Registry, told: Told) -> Places {
    let crate::config::Registry { credential_provider_config, .. } = config;
    let programs = config.credential_provider_bin_dir.clone();
    let is_set = !credential_provider_config.as_os_str().is_empty();
    Places {
        docker_config: Some(config.docker_config.clone()),
        plugins: is_set.then(|| (credential_provider_config.clone(), programs)),
        told,
    }
}

fn cache(config: &Config, sources: Sources, metrics: &mut Metrics) -> anyhow::Result<Cache> {
    let quota = config.cache.quota_bytes;
    let settings = skimmer_cache::Config {
        quota_bytes: (quota > 0).then_some(quota),
        deadline: config.fetch.deadline,
        connections_per_blob: config.fetch.connections,
        ..skimmer_cache::Config::new(config.root.join("cache"))
    };
    Ok(Cache::open(settings, sources, metrics)?)
}

fn layers(
    config: &Config,
    cache: Cache,
    store: &Store,
    keeping: Keeping,
    metrics: &mut Metrics,
) -> anyhow::Result<Layers> {
    let settings = skimmer_layers::Config {
        min_layer_bytes: config.index.min_layer_bytes,
        trust_toc: config.index.trust_toc,
        limits: Limits { metadata_bytes: config.index.max_metadata_bytes, ..Limits::default() },
        background_delay: config.background.enabled.then_some(config.background.delay),
        deadline: config.fetch.deadline,
        fuse: FuseConfig {
            threads: config.fuse.threads,
            read_ahead_kib: config.fuse.read_ahead_kib,
            lazy_read_ahead_kib: config.fuse.lazy_read_ahead_kib,
            max_background: config.fuse.max_background,
            max_waiting: config.fuse.max_faults,
            resend: config.fuse.resend,
        },
        selinux_context: Some(config.mount.selinux_context.clone())
            .filter(|context| !context.is_empty()),
        mode: match config.mount.mode {
            MountMode::Auto => skimmer_layers::MountMode::Auto,
            MountMode::Fuse => skimmer_layers::MountMode::Fuse,
            MountMode::Kernel => skimmer_layers::MountMode::Kernel,
        },
        ..skimmer_layers::Config::new(keeper::mounts(config))
    };
    let layers = Layers::open(settings, cache, store, keeping, metrics)
        .context("open the directory of mounts")?;
    match layers.lazily() {
        Ok(()) => tracing::info!("the kernel serves incomplete layers"),
        Err(reason) => {
            tracing::info!(reason = error_chain(reason), "FUSE serves incomplete layers");
        }
    }
    if !config.cache.scrub_interval.is_zero() {
        layers.scrub(Scrub {
            interval: config.cache.scrub_interval,
            bytes_per_second: config.cache.scrub_bytes_per_second,
        });
    }
    Ok(layers)
}

fn snapshotter(
    config: &Config,
    store: &Store,
    layers: &Layers,
    cache: &Cache,
    containerd: &Arc<Containerd>,
    metrics: &mut Metrics,
) -> anyhow::Result<Snapshotter> {
    let settings = skimmer_snapshots::Config {
        root: config.root.join("snapshots"),
        prepare_wait: config.snapshots.prepare_wait,
        deadline: config.fetch.deadline,
        registry_config: Some(config.registry.config_path.clone()),
    };
    let (snapshotter, _) = Snapshotter::open(
        settings,
        Arc::new(Stored::new(store)),
        Arc::new(Served::new(layers.clone(), cache.clone())),
        Arc::clone(containerd) as Arc<dyn Content>,
        metrics,
    )?;
    Ok(snapshotter)
}
