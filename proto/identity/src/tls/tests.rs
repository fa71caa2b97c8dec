//! Handshakes in memory, row by row.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustls::{CipherSuite, ClientConnection, ServerConnection};

use super::*;
use crate::Role;

/// The real time: rustls asks its own clock.
fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    i64::try_from(since.as_secs()).unwrap()
}

struct Cluster {
    authority: Authority,
    trust: Arc<Trust>,
    id: &'static str,
}

impl Cluster {
    fn new(id: &'static str) -> Self {
        let authority = Authority::create(id, now()).unwrap();
        let trust = Arc::new(Trust::new(Duration::from_secs(100)));
        trust.set_authority(id, authority.certificate_der()).unwrap();
        Self { authority, trust, id }
    }

    /// A member whose certificate ends `ends_s` seconds from now.
    fn member(&self, ends_s: i64) -> Arc<Credentials> {
        let key = Key::generate().unwrap();
        let certificate = self.certificate(&key, ends_s);
        Credentials::new(key, &certificate).unwrap()
    }

    fn certificate(&self, key: &Key, ends_s: i64) -> Vec<u8> {
        let membership = Membership {
            peer: key.peer(),
            cluster: self.id.to_owned(),
            zone: String::new(),
            role: Role::Peer,
            not_before: now() - 1000,
            not_after: now() + ends_s,
        };
        self.authority.issue(&membership).unwrap()
    }
}

struct Met {
    client: ClientConnection,
    server: ServerConnection,
}

/// Hands the bytes of both ends across until both are done or one gives up.
fn meet(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Result<Met, rustls::Error> {
    let mut client = ClientConnection::new(client, any_name())?;
    let mut server = ServerConnection::new(server)?;
    while client.is_handshaking() || server.is_handshaking() {
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        server.read_tls(&mut bytes.as_slice()).unwrap();
        server.process_new_packets()?;
        bytes.clear();
        server.write_tls(&mut bytes).unwrap();
        client.read_tls(&mut bytes.as_slice()).unwrap();
        client.process_new_packets()?;
    }
    Ok(Met { client, server })
}

#[test]
fn members_of_a_cluster_meet() {
    let (mine, other) = (Cluster::new("c1"), Cluster::new("c2"));
    let me = mine.member(100);
    // Even a node that trusts both clusters keeps to its own.
    mine.trust.set_authority("c2", other.authority.certificate_der()).unwrap();
    let blocked = mine.member(100);
    mine.trust.block(blocked.key().peer());
    for (what, theirs, trust, meets) in [
        ("member", mine.member(100), &mine.trust, true),
        ("in grace", mine.member(-50), &mine.trust, true),
        ("past grace", mine.member(-200), &mine.trust, false),
        ("blocked", blocked, &mine.trust, false),
        ("other cluster", other.member(100), &mine.trust, false),
        ("other cluster, sees us as its own", other.member(100), &other.trust, false),
    ] {
        let server = swarm_server(Arc::clone(&me), Arc::clone(&mine.trust)).unwrap();
        let client = swarm_client(Arc::clone(&theirs), Arc::clone(trust)).unwrap();
        assert_eq!(meet(client, server).is_ok(), meets, "{what} as a client");
        let server = swarm_server(theirs, Arc::clone(trust)).unwrap();
        let client = swarm_client(Arc::clone(&me), Arc::clone(&mine.trust)).unwrap();
        assert_eq!(meet(client, server).is_ok(), meets, "{what} as a server");
    }
}

#[test]
fn aes_128_comes_first_and_the_certificate_tells_who_it_is() {
    let cluster = Cluster::new("c1");
    let (a, b) = (cluster.member(100), cluster.member(100));
    let server = swarm_server(Arc::clone(&a), Arc::clone(&cluster.trust)).unwrap();
    let client = swarm_client(Arc::clone(&b), Arc::clone(&cluster.trust)).unwrap();
    let met = meet(client, server).unwrap();
    let suite = met.client.negotiated_cipher_suite().unwrap().suite();
    assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    for (certificates, credentials) in
        [(met.client.peer_certificates(), &a), (met.server.peer_certificates(), &b)]
    {
        let [certificate] = certificates.unwrap() else { panic!("one certificate") };
        let membership = cluster.trust.check(certificate, now()).unwrap();
        assert_eq!(membership, credentials.membership());
    }
}

#[test]
fn a_renewed_certificate_is_shown_at_once() {
    let cluster = Cluster::new("c1");
    let (a, b) = (cluster.member(100), cluster.member(-200));
    let server = swarm_server(a, Arc::clone(&cluster.trust)).unwrap();
    let client = swarm_client(Arc::clone(&b), Arc::clone(&cluster.trust)).unwrap();
    assert!(meet(Arc::clone(&client), Arc::clone(&server)).is_err());
    b.set_certificate(&cluster.certificate(b.key(), 100)).unwrap();
    meet(client, server).unwrap();
    let theirs = cluster.certificate(&Key::generate().unwrap(), 100);
    assert!(matches!(b.set_certificate(&theirs), Err(Error::Mismatch)));
}

#[test]
fn a_node_knows_its_control_plane_by_the_fingerprint() {
    let (cluster, other) = (Cluster::new("c1"), Cluster::new("c2"));
    let [root, stranger] = ["one", "two"].map(|name| Authority::create(name, now()).unwrap());
    let hour = Duration::from_secs(3600);
    let names = ["control.example".to_owned(), "10.0.0.1".to_owned()];
    let trust = || Arc::clone(&cluster.trust);
    let server_of = |authority: &Authority, now, lifetime| {
        control_server_of(authority, &names, now, lifetime, trust()).unwrap()
    };
    let server = || server_of(&root, now(), hour);
    let mut forged = stranger.issue_server(&names, now(), hour).unwrap();
    let forged_chain =
        control_server(forged.0.clone(), forged.1.clone(), root.certificate_der(), trust());
    // A member's certificate is good for many things, but not for playing the control plane.
    let key = Key::generate().unwrap();
    forged.0 = cluster.certificate(&key, 100);
    let member =
        control_server(forged.0, key.pkcs8_der().to_vec(), root.certificate_der(), trust());
    for (what, server, credentials, meets) in [
        ("enrolling", server(), None, true),
        ("member", server(), Some(cluster.member(100)), true),
        ("in grace", server(), Some(cluster.member(-50)), true),
        ("past grace", server(), Some(cluster.member(-200)), false),
        ("unknown cluster", server(), Some(other.member(100)), false),
        ("other root", server_of(&stranger, now(), hour), None, false),
        ("other root's leaf", forged_chain.unwrap(), None, false),
        ("member as a server", member.unwrap(), None, false),
        ("ended", server_of(&root, now() - 7200, hour), None, false),
    ] {
        let shown = credentials.is_some();
        let client = control_client(root.fingerprint(), credentials).unwrap();
        match meet(client, server) {
            Ok(met) => {
                assert!(meets, "{what}");
                assert_eq!(met.server.peer_certificates().is_some(), shown, "{what}");
            }
            Err(error) => assert!(!meets, "{what}: {error}"),
        }
    }
}

#[test]
fn the_swarm_and_grpc_are_kept_apart() {
    let cluster = Cluster::new("c1");
    let root = Authority::create("root", now()).unwrap();
    let swarm = swarm_server(cluster.member(100), Arc::clone(&cluster.trust)).unwrap();
    let grpc = control_client(root.fingerprint(), Some(cluster.member(100))).unwrap();
    assert!(meet(grpc, swarm).is_err());
}
