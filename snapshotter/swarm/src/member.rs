//! This node's membership of its cluster: obtained with a join token, kept fresh, and remembered, so
//! that a restart needs no control plane.
//!
//! Owns: the files in `<root>/identity/`, the credentials, what other nodes are checked against.
//! Does not own: the scheduler stream, the swarm's connections.
//!
//! `<root>/identity/`: `key` (PKCS#8, 0600), `membership` (an encoded `control.Membership`, as the
//! control plane gave it), `authority` (SHA-256 of the control plane's root certificate, 32 bytes).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message as _;
use skimmer_identity::token::{self, JoinToken};
use skimmer_identity::{Credentials, Key, PeerId, Trust, key, tls, trust};
use skimmer_proto::control::manager_client::ManagerClient;
use skimmer_proto::control::{self as wire, EnrolRequest, RenewRequest};
use skimmer_service::channel;
use tokio::sync::watch;
use tonic::Code;
use tonic::transport::Channel;

/// Waits between attempts to reach the control plane.
const RETRY: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

#[derive(Clone, Debug)]
pub struct Settings {
    /// The manager's `host:port`.
    pub address: String,
    /// Holds a join token; read when one is needed.
    pub token_file: PathBuf,
    /// `<root>/identity`.
    pub directory: PathBuf,
    pub zone: String,
    /// For people.
    pub name: String,
    /// How long after their end certificates are accepted.
    pub grace: Duration,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("use {} for the node's identity", path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("open the node's key")]
    Key(#[from] key::Error),
    #[error("read the join token in {} (control_plane.token_file)", path.display())]
    ReadToken { path: PathBuf, source: io::Error },
    #[error("use the join token in {} (control_plane.token_file)", path.display())]
    Token { path: PathBuf, source: token::Error },
    #[error("reach the control plane")]
    Reach(#[from] channel::Error),
    #[error("enrol with the control plane at {address}")]
    Enrol { address: String, source: Box<tonic::Status> },
    #[error("renew the membership at {address}")]
    Renew { address: String, source: Box<tonic::Status> },
    #[error("use the certificate that the control plane gave")]
    Certificate(#[from] tls::Error),
    #[error("use the membership that the control plane gave")]
    Trust(#[from] trust::Error),
    #[error("keep the membership in {}", path.display())]
    Keep { path: PathBuf, source: io::Error },
}

/// A membership in force. Clones share it; renewal changes it in place.
#[derive(Clone, Debug)]
pub struct Member {
    pub credentials: Arc<Credentials>,
    pub trust: Arc<Trust>,
    pub cluster: String,
    /// Of the control plane's authority.
    pub authority: [u8; 32],
    pub schedulers: Vec<String>,
}

impl Member {
    pub fn peer(&self) -> PeerId {
        self.credentials.key().peer()
    }

    /// Whether other nodes accept this one, by this node's clock.
    pub fn is_valid(&self, grace: Duration) -> bool {
        let grace = i64::try_from(grace.as_secs()).unwrap_or(i64::MAX);
        self.credentials.membership().not_after.saturating_add(grace) >= unix_now()
    }

    /// A connection to the manager that shows this membership.
    pub async fn manager(&self, address: &str) -> Result<ManagerClient<Channel>, Error> {
        let credentials = Some(Arc::clone(&self.credentials));
        let tls = tls::control_client(self.authority, credentials)?;
        Ok(ManagerClient::new(channel::connect(address, tls).await?))
    }

    /// What the control plane says of the cluster, taken over.
    fn take_over(&self, membership: &wire::Membership) -> Result<(), Error> {
        self.trust.set_authority(&membership.cluster, &membership.cluster_ca)?;
        let blocked = membership.blocked.iter().filter_map(|peer| PeerId::from_bytes(peer).ok());
        self.trust.set_blocked(blocked);
        self.credentials.set_certificate(&membership.certificate)?;
        Ok(())
    }
}

/// Joins and stays a member, for as long as somebody listens to `to`.
pub async fn stay(settings: Settings, key: Key, to: watch::Sender<Option<Member>>) {
    let mut wait = RETRY;
    loop {
        if to.is_closed() {
            return;
        }
        let known = to.borrow().clone();
        let done = match known {
            None => enter(&settings, &key).await,
            Some(member) => renew(&settings, member).await,
        };
        let pause = match done {
            Ok(member) => {
                wait = RETRY;
                let membership = member.credentials.membership();
                tracing::debug!(cluster = member.cluster, until = membership.not_after, "member");
                to.send_replace(Some(member));
                until_half_life(membership.not_before, membership.not_after)
            }
            Err(error) => {
                let member = to.borrow().clone();
                let over = member.is_some_and(|member| !member.is_valid(settings.grace));
                if over {
                    // From here on a token is needed again.
                    to.send_replace(None);
                }
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    again_in_s = wait.as_secs(),
                    "no fresh membership; the node goes on without"
                );
                let pause = wait;
                wait = (wait * 2).min(RETRY_MAX);
                pause
            }
        };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = to.closed() => return,
        }
    }
}

/// The node's key, made the first time.
pub fn open_key(directory: &Path) -> Result<Key, Error> {
    let failed = |source| Error::Directory { path: directory.to_owned(), source };
    fs::create_dir_all(directory).map_err(failed)?;
    Ok(Key::open_or_create(&directory.join("key"))?)
}

/// The membership on disk if it is still good, else a new one.
async fn enter(settings: &Settings, key: &Key) -> Result<Member, Error> {
    if let Some(member) = remembered(settings, key) {
        return Ok(member);
    }
    let path = settings.token_file.clone();
    let read = tokio::fs::read_to_string(&path).await;
    let text = read.map_err(|source| Error::ReadToken { path: path.clone(), source })?;
    let token: JoinToken = text.trim().parse().map_err(|source| Error::Token { path, source })?;
    let tls = tls::control_client(token.fingerprint, None)?;
    let channel = channel::connect(&settings.address, tls).await?;
    let request = EnrolRequest {
        token: text.trim().to_owned(),
        csr: key.csr()?,
        zone: settings.zone.clone(),
        name: settings.name.clone(),
    };
    let failed =
        |source| Error::Enrol { address: settings.address.clone(), source: Box::new(source) };
    let answer = ManagerClient::new(channel).enrol(request).await.map_err(failed)?;
    let membership = answer.into_inner();
    let member = member(settings, key, &membership, token.fingerprint)?;
    keep(&settings.directory, &membership, &token.fingerprint)?;
    tracing::info!(cluster = member.cluster, peer = %member.peer(), "enrolled");
    Ok(member)
}

fn remembered(settings: &Settings, key: &Key) -> Option<Member> {
    let read = |name: &str| fs::read(settings.directory.join(name)).ok();
    let membership = wire::Membership::decode(read("membership")?.as_slice()).ok()?;
    let authority = read("authority")?.try_into().ok()?;
    let member = member(settings, key, &membership, authority).ok()?;
    member.is_valid(settings.grace).then_some(member)
}

fn member(
    settings: &Settings,
    key: &Key,
    membership: &wire::Membership,
    authority: [u8; 32],
) -> Result<Member, Error> {
    let key = Key::from_pkcs8(key.pkcs8_der())?;
    let member = Member {
        credentials: Credentials::new(key, &membership.certificate)?,
        trust: Arc::new(Trust::new(settings.grace)),
        cluster: membership.cluster.clone(),
        authority,
        schedulers: membership.schedulers.clone(),
    };
    member.take_over(membership)?;
    Ok(member)
}

async fn renew(settings: &Settings, mut member: Member) -> Result<Member, Error> {
    let mut manager = member.manager(&settings.address).await?;
    let csr = member.credentials.key().csr()?;
    let answer = match manager.renew(RenewRequest { csr }).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => {
            if matches!(status.code(), Code::Unauthenticated | Code::PermissionDenied) {
                forget(&settings.directory);
            }
            let (address, source) = (settings.address.clone(), Box::new(status));
            return Err(Error::Renew { address, source });
        }
    };
    member.take_over(&answer)?;
    member.schedulers.clone_from(&answer.schedulers);
    keep(&settings.directory, &answer, &member.authority)?;
    Ok(member)
}

fn keep(
    directory: &Path,
    membership: &wire::Membership,
    authority: &[u8; 32],
) -> Result<(), Error> {
    for (name, bytes) in
        [("authority", authority.to_vec()), ("membership", membership.encode_to_vec())]
    {
        let (path, temporary) = (directory.join(name), directory.join(format!("{name}.tmp")));
        let written = fs::write(&temporary, bytes).and_then(|()| fs::rename(&temporary, &path));
        written.map_err(|source| Error::Keep { path, source })?;
    }
    Ok(())
}

/// The control plane doesn't want this membership any more.
fn forget(directory: &Path) {
    if let Err(error) = fs::remove_file(directory.join("membership"))
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, "the refused membership could not be removed");
    }
}

fn until_half_life(not_before: i64, not_after: i64) -> Duration {
    let half = not_before + (not_after - not_before) / 2;
    let seconds = u64::try_from(half - unix_now()).unwrap_or(0).max(1);
    Duration::from_secs(seconds)
}

/// Seconds since the Unix epoch.
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}
