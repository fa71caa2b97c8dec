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
use skimmer_identity::{Credentials, Key, Membership, PeerId, Trust, key, tls, trust};
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

/// A membership in force. Clones share it; renewal changes it in place, and so does enrolling anew in
/// the same cluster.
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

    /// Whether both are the same membership, which may have been renewed in between.
    pub fn shares(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.trust, &other.trust)
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
    // Also after its end.
    let mut latest: Option<Member> = None;
    loop {
        if to.is_closed() {
            return;
        }
        let known = to.borrow().clone();
        let is_renewed = known.is_some();
        let done = match known {
            None => enter(&settings, &key, latest.as_ref()).await,
            Some(member) => renew(&settings, member).await,
        };
        let pause = match done {
            Ok(member) => {
                wait = RETRY;
                let membership = member.credentials.membership();
                tracing::debug!(cluster = member.cluster, until = membership.not_after, "member");
                latest = Some(member.clone());
                to.send_replace(Some(member));
                until_half_life(&membership, is_renewed, unix_now())
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

/// The membership on disk if it is still good, else a new one. `before`: the one that has ended.
async fn enter(settings: &Settings, key: &Key, before: Option<&Member>) -> Result<Member, Error> {
    if let Some(member) = remembered(settings, key, before) {
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
    let member = member(settings, key, &membership, token.fingerprint, before)?;
    keep(&settings.directory, &membership, &token.fingerprint)?;
    tracing::info!(cluster = member.cluster, peer = %member.peer(), "enrolled");
    Ok(member)
}

fn remembered(settings: &Settings, key: &Key, before: Option<&Member>) -> Option<Member> {
    let read = |name: &str| fs::read(settings.directory.join(name)).ok();
    let membership = wire::Membership::decode(read("membership")?.as_slice()).ok()?;
    let authority = read("authority")?.try_into().ok()?;
    // What is over must not take the place of what was heard since, as of the block list.
    if !member(settings, key, &membership, authority, None).ok()?.is_valid(settings.grace) {
        return None;
    }
    member(settings, key, &membership, authority, before).ok()
}

fn member(
    settings: &Settings,
    key: &Key,
    membership: &wire::Membership,
    authority: [u8; 32],
    before: Option<&Member>,
) -> Result<Member, Error> {
    let (credentials, trust) = match before.filter(|before| before.cluster == membership.cluster) {
        // Whoever has it checks others by what is true now.
        Some(before) => (Arc::clone(&before.credentials), Arc::clone(&before.trust)),
        None => {
            let key = Key::from_pkcs8(key.pkcs8_der())?;
            let credentials = Credentials::new(key, &membership.certificate)?;
            (credentials, Arc::new(Trust::new(settings.grace)))
        }
    };
    let member = Member {
        credentials,
        trust,
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

/// How long after `now` a membership has run for half its time. A clock that is wrong makes it neither too late by all
/// others nor, of one that was renewed just now, a storm of renewals.
fn until_half_life(membership: &Membership, is_renewed: bool, now: i64) -> Duration {
    let Membership { not_before, not_after, .. } = *membership;
    let life = not_after.saturating_sub(not_before).max(0);
    let least = if is_renewed { life / 20 } else { 0 };
    let pause = (not_before + life / 2).saturating_sub(now).clamp(least, life / 2);
    Duration::from_secs(u64::try_from(pause).unwrap_or(0).max(1))
}

/// Seconds since the Unix epoch.
pub fn unix_now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use skimmer_identity::{Authority, Role};

    use super::*;

    fn given(
        authority: &Authority,
        cluster: &str,
        peer: PeerId,
        blocked: &[PeerId],
    ) -> wire::Membership {
        let (not_before, not_after) = (unix_now(), unix_now() + 3600);
        let (name, zone, role) = (cluster.to_owned(), String::new(), Role::Peer);
        let membership = Membership { peer, cluster: name, zone, role, not_before, not_after };
        wire::Membership {
            certificate: authority.issue(&membership).unwrap(),
            cluster_ca: authority.certificate_der().to_vec(),
            cluster: cluster.to_owned(),
            schedulers: Vec::new(),
            blocked: blocked.iter().map(|peer| peer.to_bytes().to_vec()).collect(),
        }
    }

    #[test]
    fn enrolling_anew_in_the_same_cluster_changes_the_membership_in_place() {
        let [old, new] = [(); 2].map(|()| Authority::create("c", unix_now()).unwrap());
        let [key, other, revoked] = [(); 3].map(|()| Key::generate().unwrap());
        let settings = Settings {
            address: String::new(),
            token_file: PathBuf::new(),
            directory: PathBuf::new(),
            zone: String::new(),
            name: String::new(),
            grace: Duration::ZERO,
        };
        let enrol = |authority: &Authority, cluster: &str, blocked: &[PeerId], before| {
            let given = given(authority, cluster, key.peer(), blocked);
            member(&settings, &key, &given, [0; 32], before).unwrap()
        };
        let first = enrol(&old, "c", &[], None);
        let certificate = given(&new, "c", other.peer(), &[]).certificate;
        assert!(first.trust.check(&certificate, unix_now()).is_err());

        let again = enrol(&new, "c", &[revoked.peer()], Some(&first));
        assert!(again.shares(&first) && Arc::ptr_eq(&again.credentials, &first.credentials));
        assert!(first.trust.check(&certificate, unix_now()).is_ok());
        assert!(first.trust.check(&first.credentials.certificate(), unix_now()).is_ok());
        assert!(first.trust.is_blocked(&revoked.peer()));

        let elsewhere = enrol(&old, "d", &[], Some(&again));
        assert!(!elsewhere.shares(&again));
        assert_eq!(again.credentials.membership().cluster, "c");
    }

    #[test]
    fn a_membership_is_renewed_in_its_middle_also_by_a_wrong_clock() {
        let peer = Key::generate().unwrap().peer();
        let (cluster, zone, role) = ("c".to_owned(), String::new(), Role::Peer);
        let (not_before, not_after) = (10_000, 13_600);
        let membership = Membership { peer, cluster, zone, role, not_before, not_after };
        for (is_renewed, now, pause_s) in [
            (true, 10_000, 1800),
            (false, 11_000, 800),
            // After a restart.
            (false, 13_000, 1),
            // A clock that is ahead, and one that is behind.
            (true, 13_000, 180),
            (true, 99_000, 180),
            (true, 1_000, 1800),
            (false, 1_000, 1800),
        ] {
            let pause = until_half_life(&membership, is_renewed, now);
            assert_eq!(pause.as_secs(), pause_s, "{is_renewed} at {now}");
        }
    }
}
