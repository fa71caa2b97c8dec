//! Questions about the host part of URLs. Pure.

use std::net::IpAddr;

use reqwest::Url;

/// Host and port as they are written in config.json and in image references.
pub fn authority(url: &Url) -> String {
    match (url.host_str().unwrap_or_default(), url.port()) {
        (name, Some(port)) => format!("{name}:{port}"),
        (name, None) => name.to_owned(),
    }
}

/// Whether credentials for the one may be sent to the other.
pub fn same_origin(a: &Url, b: &Url) -> bool {
    a.scheme() == b.scheme()
        && a.host_str() == b.host_str()
        && a.port_or_known_default() == b.port_or_known_default()
}

/// Whether `name`, the host part of a URL, is this machine.
pub fn is_local(name: &str) -> bool {
    let address = name.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    name == "localhost" || address.is_ok_and(|address| address.is_loopback())
}
