//! The manager's gRPC service: what nodes ask about themselves.

use std::net::SocketAddr;
use std::sync::Arc;

use skimmer_manager::{Application, Asked, Error, Issued, Manager};
use skimmer_proto::control;
use skimmer_proto::control::manager_server;
use tonic::{Request, Response, Status};

use crate::caller::{self, Caller};
use crate::clock::{unix_now, unix_now_ms};
use crate::directory::Directory;

pub struct Service {
    pub manager: Arc<Manager>,
    pub directory: Arc<Directory>,
    /// See the configuration key `scheduler.advertise`.
    pub advertise: Vec<String>,
    pub scheduler_port: u16,
    /// Whether this process is a scheduler, too.
    pub schedules: bool,
}

impl Service {
    async fn answer(
        &self,
        issued: Issued,
        local: Option<SocketAddr>,
    ) -> Result<Response<control::Membership>, Status> {
        let mut schedulers = self.advertise.clone();
        if let (true, Some(local)) = (schedulers.is_empty(), local) {
            let own = self.schedules.then(|| SocketAddr::new(local.ip(), self.scheduler_port));
            schedulers.extend(own.map(|own| own.to_string()));
            let running = self.manager.schedulers(unix_now_ms()).await.map_err(status)?;
            for other in running.into_iter().map(|scheduler| scheduler.address) {
                if !schedulers.contains(&other) && may_reach(local, &other) {
                    schedulers.push(other);
                }
            }
            // One may run where this process doesn't see it, behind the same address.
            if schedulers.is_empty() {
                schedulers.push(SocketAddr::new(local.ip(), self.scheduler_port).to_string());
            }
        }
        Ok(Response::new(control::Membership {
            certificate: issued.certificate,
            cluster_ca: issued.authority,
            cluster: issued.membership.cluster,
            schedulers,
            blocked: issued.blocked.iter().map(|peer| peer.to_bytes().to_vec()).collect(),
        }))
    }
}

#[tonic::async_trait]
impl manager_server::Manager for Service {
    async fn enrol(
        &self,
        request: Request<control::EnrolRequest>,
    ) -> Result<Response<control::Membership>, Status> {
        let local = local(&request);
        let control::EnrolRequest { token, csr, zone, name } = request.into_inner();
        let application = Application { token: &token, csr: &csr, zone: &zone, name: &name };
        let issued = self.manager.enrol(application, unix_now()).await.map_err(status)?;
        self.answer(issued, local).await
    }

    async fn renew(
        &self,
        request: Request<control::RenewRequest>,
    ) -> Result<Response<control::Membership>, Status> {
        let member = caller::member(&request, self.directory.trust())?;
        let local = local(&request);
        let csr = request.into_inner().csr;
        let issued = self.manager.renew(&member, &csr, unix_now()).await.map_err(status)?;
        self.answer(issued, local).await
    }

    async fn grant(
        &self,
        request: Request<control::GrantRequest>,
    ) -> Result<Response<control::GrantResponse>, Status> {
        let member = caller::current_member(&request, self.directory.trust())?;
        let control::GrantRequest { registry, repository, authorization, manifest } =
            request.into_inner();
        let asked = Asked {
            host: &registry,
            repository: &repository,
            manifest: &manifest,
            authorization: &authorization,
        };
        let grant = self.manager.grant(&member, asked, unix_now()).await.map_err(status)?;
        Ok(Response::new(control::GrantResponse { grant }))
    }
}

/// Whether somebody who reached this process at `local` may reach `address`: a loopback address is of
/// use only on its own machine.
fn may_reach(local: SocketAddr, address: &str) -> bool {
    let loopback = address.parse::<SocketAddr>().is_ok_and(|address| address.ip().is_loopback());
    !loopback || local.ip().is_loopback()
}

fn local<T>(request: &Request<T>) -> Option<SocketAddr> {
    request.extensions().get::<Caller>().map(|caller| caller.local)
}

/// What a caller is told. What went wrong inside is logged, and not the caller's business.
pub fn status(error: Error) -> Status {
    let text = error.to_string();
    match error {
        Error::Token(_)
        | Error::Csr(_)
        | Error::OtherKey
        | Error::Zone(_)
        | Error::NodeName(_)
        | Error::ClusterName(_)
        | Error::Policy(_)
        | Error::Repository(_)
        | Error::Grant(_) => Status::invalid_argument(described(error)),
        Error::OtherControlPlane
        | Error::Refused(_)
        | Error::NotMember
        | Error::Expired(_)
        | Error::Denied(..) => Status::permission_denied(text),
        Error::ClusterExists(_) => Status::already_exists(text),
        Error::NoCluster(_) | Error::NoNode(_) => Status::not_found(text),
        Error::Ask { .. } => {
            let error = described(error);
            tracing::info!(error, "a registry can't be asked");
            Status::unavailable(error)
        }
        Error::Store(_) | Error::Authority(_) | Error::Random | Error::MakeToken(_) => {
            tracing::error!(error = described(error), "a request failed");
            Status::internal("the control plane failed; its log has the cause")
        }
    }
}

fn described(error: Error) -> String {
    format!("{:#}", anyhow::Error::from(error))
}
