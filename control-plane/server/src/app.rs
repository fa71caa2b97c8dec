//! The parts, wired: build, run, drain.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use prometheus_client::registry::Registry as Registered;
use skimmer_control_store::{Scheduler, Sqlite};
use skimmer_identity::Key;
use skimmer_manager::{Manager, Registries, Settings};
use skimmer_proto::control::admin_server::AdminServer;
use skimmer_proto::control::manager_server::ManagerServer;
use skimmer_proto::control::scheduler_server::SchedulerServer;
use skimmer_service::health::{self, Health};
use skimmer_service::socket;
use tokio::net::{TcpListener, UnixListener};
use tokio::task::JoinSet;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;

use crate::accept::{ServerTls, incoming};
use crate::clock::unix_now;
use crate::config::Config;
use crate::directory::Directory;
use crate::scheduler::{self, Hub, Replicas};
use crate::{Role, admin, manager};

/// How long requests under way may take once the program has been told to stop.
const DRAIN: Duration = Duration::from_secs(10);
/// A node that answers no ping within the two together is gone.
const PING_EVERY: Duration = Duration::from_secs(2);
const PING_PATIENCE: Duration = Duration::from_secs(3);
/// Streams that one connection may have open; a node needs one, and a few calls.
const STREAMS: u32 = 64;

/// A control plane that is ready to serve.
pub struct App {
    config: Config,
    store: Arc<Sqlite>,
    manager: Arc<Manager>,
    directory: Arc<Directory>,
    tls: Arc<ServerTls>,
    admin: UnixListener,
    /// Those that the role has.
    manager_listener: Option<TcpListener>,
    scheduler_listener: Option<TcpListener>,
    hub: Option<Arc<Hub>>,
    replicas: Option<Arc<Replicas>>,
    health: Arc<Health>,
    stop: CancellationToken,
}

impl App {
    pub async fn build(config: &Config, role: Role) -> anyhow::Result<Self> {
        // First of all: two processes of one role must not share an address.
        let admin = socket::listen("admin.address", &config.admin.address)?;
        let (manages, schedules) = (role != Role::Scheduler, role != Role::Manager);
        let manager_listener = listen(manages, "manager.address", &config.manager.address).await?;
        let scheduler_listener =
            listen(schedules, "scheduler.address", &config.scheduler.address).await?;

        let path = &config.store.path;
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("create directory {} (store.path)", folder.display()))?;
        }
        let store = Arc::new(Sqlite::open(path).await?);
        let grants = &config.grants;
        let registries = Registries::new(grants.plain_http.iter().cloned(), &grants.ca_files)?;
        let settings = Settings {
            certificate_lifetime: config.identity.certificate_lifetime,
            grace: config.identity.grace,
            grant_lifetime: config.grants.lifetime,
        };
        let kept = Arc::clone(&store);
        let manager = Manager::open(kept, Arc::new(registries), settings, unix_now()).await?;
        let manager = Arc::new(manager);
        let directory = Directory::open(Arc::clone(&manager), config.identity.grace).await?;
        let tls = ServerTls::new(Arc::clone(&manager), Arc::clone(directory.trust()));

        let mut metrics = Registered::with_prefix("skimmer_control");
        let stop = CancellationToken::new();
        let (mut hub, mut replicas) = (None, None);
        if let Some(listener) = &scheduler_listener {
            let own = Scheduler {
                id: replica_id()?,
                address: reachable(&config.scheduler.replica_address, listener)?,
            };
            let joined = Replicas::join(Arc::clone(&manager), own).await?;
            let (manager, directory) = (Arc::clone(&manager), Arc::clone(&directory));
            let metrics = scheduler::Metrics::register(&mut metrics);
            hub = Some(Hub::new(manager, directory, metrics, joined.ring(), stop.clone()));
            replicas = Some(Arc::new(joined));
        }
        let health = Arc::new(Health { registry: metrics, ready: AtomicBool::new(false) });
        let config = config.clone();
        Ok(Self {
            config,
            store,
            manager,
            directory,
            tls,
            admin,
            manager_listener,
            scheduler_listener,
            hub,
            replicas,
            health,
            stop,
        })
    }

    /// Serves until `stopped`, then finishes what is under way.
    pub async fn run(self, stopped: impl Future<Output = ()>) -> anyhow::Result<()> {
        let metrics = &self.config.metrics.address;
        if !metrics.is_empty() {
            tokio::spawn(health::serve(metrics, Arc::clone(&self.health)).await?);
        }
        let keep = Arc::clone(&self.directory).keep(self.config.store.refresh);
        let keep = tokio::spawn(keep);
        let replicas = self.replicas.clone();
        let beating = replicas.clone();
        let beat = tokio::spawn(async move {
            if let Some(replicas) = beating {
                replicas.keep().await;
            }
        });
        let (store, health, stop) = (self.store.clone(), self.health.clone(), self.stop.clone());
        let mut servers = self.servers()?;
        health.ready.store(true, Ordering::Release);
        tokio::select! {
            () = stopped => {}
            ended = servers.join_next() => {
                ended.context("there was no server")?.context("a server ended")??;
                anyhow::bail!("a server ended by itself");
            }
        }
        tracing::info!("stopping");
        health.ready.store(false, Ordering::Release);
        beat.abort();
        if let Some(replicas) = replicas {
            replicas.leave().await;
        }
        stop.cancel();
        if tokio::time::timeout(DRAIN, servers.join_all()).await.is_err() {
            tracing::warn!(after_s = DRAIN.as_secs(), "requests under way were cut off");
        }
        keep.abort();
        store.close().await;
        tracing::info!("stopped");
        Ok(())
    }

    fn servers(self) -> anyhow::Result<JoinSet<anyhow::Result<()>>> {
        let mut servers = JoinSet::new();
        let scheduler_port = port(&self.config.scheduler.address);
        if let Some(listener) = self.manager_listener {
            let service = manager::Service {
                manager: Arc::clone(&self.manager),
                directory: Arc::clone(&self.directory),
                advertise: self.config.scheduler.advertise.clone(),
                schedules: self.scheduler_listener.is_some(),
                scheduler_port: match &self.scheduler_listener {
                    // The port that it has, where port 0 was asked for.
                    Some(listener) => listener.local_addr().context("find our own port")?.port(),
                    None => scheduler_port.unwrap_or_default(),
                },
            };
            let connections = incoming(listener, Arc::clone(&self.tls));
            let served = builder()
                .add_service(ManagerServer::new(service))
                .serve_with_incoming_shutdown(connections, self.stop.clone().cancelled_owned());
            servers.spawn(async { served.await.context("serve manager.address") });
        }
        if let (Some(listener), Some(hub)) = (self.scheduler_listener, &self.hub) {
            let service =
                scheduler::Service { hub: Arc::clone(hub), queue: self.config.scheduler.queue };
            let connections = incoming(listener, self.tls);
            let served = builder()
                .add_service(SchedulerServer::new(service))
                .serve_with_incoming_shutdown(connections, self.stop.clone().cancelled_owned());
            servers.spawn(async { served.await.context("serve scheduler.address") });
        }
        let service =
            admin::Service { manager: self.manager, directory: self.directory, hub: self.hub };
        let served =
            Server::builder().add_service(AdminServer::new(service)).serve_with_incoming_shutdown(
                UnixListenerStream::new(self.admin),
                self.stop.cancelled_owned(),
            );
        servers.spawn(async { served.await.context("serve admin.address") });
        Ok(servers)
    }
}

fn builder() -> Server {
    Server::builder()
        .http2_keepalive_interval(Some(PING_EVERY))
        .http2_keepalive_timeout(Some(PING_PATIENCE))
        .max_concurrent_streams(STREAMS)
}

async fn listen(wanted: bool, key: &str, address: &str) -> anyhow::Result<Option<TcpListener>> {
    if !wanted {
        return Ok(None);
    }
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("listen on {address:?} ({key})"))?;
    if let Ok(local) = listener.local_addr() {
        tracing::info!(key, address = %local, "listening");
    }
    Ok(Some(listener))
}

/// Another with each start.
fn replica_id() -> anyhow::Result<String> {
    Ok(Key::generate().context("make this scheduler's id")?.peer().to_string())
}

/// Where other schedulers reach `listener`; `configured` if it isn't empty.
fn reachable(configured: &str, listener: &TcpListener) -> anyhow::Result<String> {
    if !configured.is_empty() {
        return Ok(configured.to_owned());
    }
    let mut local = listener.local_addr().context("find our own port")?;
    if local.ip().is_unspecified() {
        local.set_ip(Ipv4Addr::LOCALHOST.into());
    }
    Ok(local.to_string())
}

fn port(address: &str) -> Option<u16> {
    address.rsplit_once(':')?.1.parse().ok()
}
