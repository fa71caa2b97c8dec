//! Grants: who may read which repository from other nodes.

use skimmer_identity::{Grant, Membership};
use skimmer_proto::{Reference, Scope};

use super::{Error, Manager, load, seconds};
use crate::policy::Policy;
use crate::registries::Question;

/// What a node asks to read.
#[derive(Clone, Copy)]
pub struct Asked<'a> {
    pub host: &'a str,
    pub repository: &'a str,
    /// A tag or digest that the node has read there; empty: none.
    pub manifest: &'a str,
    /// The node's own, for the registry alone; empty: by policy only.
    pub authorization: &'a str,
}

impl Manager {
    /// An encoded grant, signed by the member's cluster.
    pub async fn grant(
        &self,
        member: &Membership,
        asked: Asked<'_>,
        now: i64,
    ) -> Result<Vec<u8>, Error> {
        let name = scope_name(&asked)?;
        let node = self.store.node(&member.peer.to_string()).await?;
        if !node.is_some_and(|node| node.revoked.is_none() && node.cluster == member.cluster) {
            return Err(Error::NotMember);
        }
        let cluster = self.cluster(&member.cluster).await?;
        let policy = Policy::parse(&cluster.repositories)?;
        if policy.allows(&name).is_none() {
            self.ask(&name, &asked).await?;
        }
        let grant = Grant {
            peer: member.peer,
            scope: Scope::Repository(name),
            expires_unix: now.saturating_add(seconds(self.settings.grant_lifetime)),
        };
        grant.sign(&load(&cluster.authority)?).map_err(Error::Grant)
    }

    async fn ask(&self, name: &str, asked: &Asked<'_>) -> Result<(), Error> {
        let denied = |why| Error::Denied(name.to_owned(), why);
        if asked.authorization.is_empty() {
            return Err(denied("it sent no credentials to ask the registry with"));
        }
        let question = Question {
            host: asked.host,
            repository: asked.repository,
            manifest: Some(asked.manifest).filter(|manifest| !manifest.is_empty()),
            authorization: asked.authorization,
        };
        match self.registries.may_pull(question).await {
            Ok(true) => Ok(()),
            Ok(false) => Err(denied("the registry says no")),
            Err(source) => Err(Error::Ask { name: name.to_owned(), source }),
        }
    }
}

/// `host/repository`, if both are what they have to be; so nothing odd gets into a URL or a grant.
fn scope_name(asked: &Asked<'_>) -> Result<String, Error> {
    let name = format!("{}/{}", asked.host, asked.repository);
    let wrong = || Error::Repository(name.chars().take(200).collect());
    let by = match asked.manifest {
        "" => String::new(),
        digest if digest.contains(':') => format!("@{digest}"),
        tag => format!(":{tag}"),
    };
    let reference: Reference = format!("{name}{by}").parse().map_err(|_| wrong())?;
    let same = reference.host == asked.host && reference.repository == asked.repository;
    if same { Ok(name) } else { Err(wrong()) }
}
