//! The manager with a store in memory and a registry that answers as told.

use std::sync::Mutex;

use async_trait::async_trait;
use skimmer_control_store::Memory;
use skimmer_identity::{Key, Membership, Role, Trust};
use skimmer_proto::Scope;

use super::*;
use crate::Question;

const LIFETIME: i64 = 3600;
const GRACE: i64 = 86_400;

/// Lets `user` pull, notes what it was asked.
#[derive(Default)]
struct Fake(Mutex<Vec<String>>);

#[async_trait]
impl AskRegistry for Fake {
    async fn may_pull(&self, question: Question<'_>) -> Result<bool, registries::Error> {
        let Question { host, repository, manifest, authorization } = question;
        self.0.lock().unwrap().push(format!("{host} {repository} {}", manifest.unwrap_or("-")));
        match authorization {
            "Basic broken" => Err(registries::Error::Authorization),
            user => Ok(user == "Basic user"),
        }
    }
}

async fn manager() -> (Manager, Arc<Fake>) {
    let settings = Settings {
        certificate_lifetime: Duration::from_secs(3600),
        grace: Duration::from_secs(86_400),
        grant_lifetime: Duration::from_secs(900),
    };
    let registry = Arc::new(Fake::default());
    let store = Arc::new(Memory::new());
    (Manager::open(store, registry.clone(), settings, 0).await.unwrap(), registry)
}

async fn token(manager: &Manager, cluster: &str) -> String {
    let made =
        manager.create_token(cluster, store::Role::Peer, Duration::from_secs(60), Some(1), 0);
    made.await.unwrap().to_string()
}

async fn enrol(manager: &Manager, token: &str, key: &Key, now: i64) -> Result<Issued, Error> {
    let csr = key.csr().unwrap();
    manager.enrol(Application { token, csr: &csr, zone: "z", name: "host" }, now).await
}

fn trust(cluster: &Cluster) -> Trust {
    let trust = Trust::new(Duration::ZERO);
    trust.set_authority(&cluster.id, &cluster.authority.certificate).unwrap();
    trust
}

#[tokio::test]
async fn a_node_enrols_renews_and_is_revoked() {
    let (manager, _) = manager().await;
    let cluster = manager.create_cluster("prod", 0).await.unwrap();
    let (key, text) = (Key::generate().unwrap(), token(&manager, "prod").await);
    let issued = enrol(&manager, &text, &key, 10).await.unwrap();
    let member = trust(&cluster).check(&issued.certificate, 10).unwrap();
    assert_eq!(member, issued.membership);
    let expected = Membership {
        peer: key.peer(),
        cluster: cluster.id.clone(),
        zone: "z".into(),
        role: Role::Peer,
        not_before: 10,
        not_after: 10 + LIFETIME,
    };
    assert_eq!(member, expected);

    let csr = key.csr().unwrap();
    let renewed = manager.renew(&member, &csr, 2000).await.unwrap();
    assert_eq!(renewed.membership.not_after, 2000 + LIFETIME);
    let other = Key::generate().unwrap().csr().unwrap();
    assert!(matches!(manager.renew(&member, &other, 2000).await, Err(Error::OtherKey)));
    let end = member.not_after + GRACE;
    assert!(manager.renew(&member, &csr, end).await.is_ok());
    assert!(matches!(manager.renew(&member, &csr, end + 1).await, Err(Error::Expired(_))));
    let elsewhere = Membership { cluster: "other".into(), ..member.clone() };
    assert!(matches!(manager.renew(&elsewhere, &csr, 2000).await, Err(Error::NotMember)));

    assert_eq!(manager.blocked(2000).await.unwrap(), []);
    manager.revoke(&key.peer().to_string(), "stolen", 2000).await.unwrap();
    assert!(matches!(manager.renew(&member, &csr, 2000).await, Err(Error::NotMember)));
    assert_eq!(manager.blocked(2000).await.unwrap(), [(cluster.id.clone(), key.peer())]);
    let again = enrol(&manager, &text, &key, 20).await;
    assert!(matches!(again, Err(Error::Refused(Refusal::Revoked(_)))), "{again:?}");
    let revoked = manager.revoke(&key.peer().to_string(), "twice", 2000).await;
    assert!(matches!(revoked, Err(Error::NoNode(_))));

    let events = manager.events(Some(&cluster.id), 10).await.unwrap();
    let said: Vec<&str> = events.iter().map(|event| event.what.as_str()).collect();
    assert_eq!(said.len(), 4, "{said:?}");
    assert!(said[3].contains("revoked: stolen"), "{said:?}");
    assert!(!said.concat().contains(&text), "no token is written down");
}

#[tokio::test]
async fn a_newcomer_learns_who_is_out_of_its_own_cluster() {
    let (manager, _) = manager().await;
    let mut revoked = Vec::new();
    for name in ["a", "b"] {
        manager.create_cluster(name, 0).await.unwrap();
        let key = Key::generate().unwrap();
        enrol(&manager, &token(&manager, name).await, &key, 1).await.unwrap();
        manager.revoke(&key.peer().to_string(), "", 2).await.unwrap();
        revoked.push(key.peer());
    }
    let key = Key::generate().unwrap();
    let issued = enrol(&manager, &token(&manager, "a").await, &key, 3).await.unwrap();
    assert_eq!(issued.blocked, [revoked[0]]);
    assert_eq!(
        manager.blocked(1 + LIFETIME + GRACE).await.unwrap(),
        [],
        "none can appear any more"
    );
}

#[tokio::test]
async fn a_bad_application_is_refused_and_takes_no_use() {
    let (manager, _) = manager().await;
    let (elsewhere, _) = self::manager().await;
    for manager in [&manager, &elsewhere] {
        manager.create_cluster("prod", 0).await.unwrap();
    }
    let (good, foreign) = (token(&manager, "prod").await, token(&elsewhere, "prod").await);
    let unknown = JoinToken::generate(manager.root().fingerprint()).unwrap().to_string();
    let csr = Key::generate().unwrap().csr().unwrap();
    let application = Application { token: &good, csr: &csr, zone: "", name: "" };
    let long = "x".repeat(300);
    type Expected = fn(&Error) -> bool;
    let rows: [(Application<'_>, Expected); 7] = [
        (Application { token: "sk1.x", ..application }, |e| matches!(e, Error::Token(_))),
        (Application { token: &foreign, ..application }, |e| matches!(e, Error::OtherControlPlane)),
        (Application { token: &unknown, ..application }, |e| {
            matches!(e, Error::Refused(Refusal::UnknownToken))
        }),
        (Application { csr: b"csr", ..application }, |e| matches!(e, Error::Csr(_))),
        (Application { zone: "a\n", ..application }, |e| matches!(e, Error::Zone(_))),
        (Application { zone: &long, ..application }, |e| matches!(e, Error::Zone(_))),
        (Application { name: &long, ..application }, |e| matches!(e, Error::NodeName(_))),
    ];
    for (application, expected) in rows {
        let error = manager.enrol(application, 1).await.unwrap_err();
        assert!(expected(&error), "{application:?}: {error:?}");
    }
    assert!(manager.enrol(application, 60).await.is_err(), "expired");
    manager.enrol(application, 59).await.unwrap();
    let second = Key::generate().unwrap();
    let used = enrol(&manager, &good, &second, 59).await;
    assert!(matches!(used, Err(Error::Refused(Refusal::UsedToken))));
}

#[tokio::test]
async fn grants_follow_the_policy_or_the_registry() {
    let (manager, registry) = manager().await;
    let cluster = manager.create_cluster("prod", 0).await.unwrap();
    let patterns = ["r.example:5000/open/*".to_owned()];
    manager.set_policy("prod", &patterns, 0).await.unwrap();
    let key = Key::generate().unwrap();
    let issued = enrol(&manager, &token(&manager, "prod").await, &key, 1).await.unwrap();
    let ask = async |host: &str, repository: &str, manifest: &str, authorization: &str| {
        let asked = Asked { host, repository, manifest, authorization };
        manager.grant(&issued.membership, asked, 100).await
    };
    let host = "r.example:5000";
    for (repository, manifest, authorization, expected) in [
        ("open/a", "", "", "granted"),
        ("secret/a", "", "", "sent no credentials"),
        ("secret/a", "", "Basic other", "the registry says no"),
        ("secret/a", "latest", "Basic user", "granted"),
        ("secret/a", "", "Basic broken", "find out"),
        ("../a", "", "Basic user", "isn't a repository"),
        ("open/a?x=", "", "Basic user", "isn't a repository"),
        ("secret/a", "a/../b", "Basic user", "isn't a repository"),
        ("secret/a", "sha256:12", "Basic user", "isn't a repository"),
    ] {
        match ask(host, repository, manifest, authorization).await {
            Ok(grant) => {
                assert_eq!(expected, "granted", "{repository}");
                let grant = trust(&cluster).check_grant(&cluster.id, &grant, 100).unwrap();
                let scope = Scope::Repository(format!("{host}/{repository}"));
                assert_eq!((grant.peer, &grant.scope), (key.peer(), &scope));
                assert_eq!(grant.expires_unix, 1000);
            }
            Err(error) => assert!(error.to_string().contains(expected), "{repository}: {error}"),
        }
    }
    assert!(ask("", "a", "", "").await.is_err());
    assert!(ask("debian", "a", "", "Basic user").await.is_err(), "no host");
    let asked = registry.0.lock().unwrap().clone();
    let (tags, manifest) = ("r.example:5000 secret/a -", "r.example:5000 secret/a latest");
    assert_eq!(asked, [tags, manifest, tags], "the policy's own were not asked for");

    manager.revoke(&key.peer().to_string(), "", 100).await.unwrap();
    assert!(matches!(ask(host, "open/a", "", "").await, Err(Error::NotMember)));
}

#[tokio::test]
async fn clusters_have_proper_and_unique_names() {
    let (manager, _) = manager().await;
    manager.create_cluster("a-1", 0).await.unwrap();
    assert!(matches!(manager.create_cluster("a-1", 0).await, Err(Error::ClusterExists(_))));
    for wrong in ["", "-a", "A", "a b", "a/b", "ä", &"a".repeat(64)] {
        let error = manager.create_cluster(wrong, 0).await;
        assert!(matches!(error, Err(Error::ClusterName(_))), "{wrong}");
    }
    assert!(matches!(manager.cluster("b").await, Err(Error::NoCluster(_))));
    let wrong = manager.set_policy("a-1", &["debian".into()], 0).await;
    assert!(matches!(wrong, Err(Error::Policy(_))));
}
