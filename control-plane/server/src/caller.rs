//! Who is on a connection, by the certificate that it was made with; every call is authorised by it.

use std::net::SocketAddr;

use skimmer_identity::{Membership, Trust};
use tonic::{Request, Status};

use crate::clock::unix_now;

/// What is known of a connection's other end.
#[derive(Clone, Debug)]
pub struct Caller {
    /// `None`: it showed no certificate.
    pub member: Option<Membership>,
    /// Where it reached us.
    pub local: SocketAddr,
}

/// The member that calls, whose certificate may have ended within the grace period.
pub fn member<T>(request: &Request<T>, trust: &Trust) -> Result<Membership, Status> {
    let caller = request.extensions().get::<Caller>();
    let member = caller.and_then(|caller| caller.member.clone());
    let member = member.ok_or_else(|| {
        Status::unauthenticated(
            "this needs a membership certificate: enrol with a join token first",
        )
    })?;
    // The connection may be older than the revocation.
    if trust.is_blocked(&member.peer) {
        return Err(Status::permission_denied("the node was revoked"));
    }
    Ok(member)
}

/// The member that calls, whose certificate runs.
pub fn current_member<T>(request: &Request<T>, trust: &Trust) -> Result<Membership, Status> {
    let member = member(request, trust)?;
    // A connection may also outlive its certificate; then it is made again with the renewed one.
    if unix_now() > member.not_after {
        return Err(Status::unauthenticated(
            "the membership certificate of this connection has ended: renew it, and connect again",
        ));
    }
    Ok(member)
}
