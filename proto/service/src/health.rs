//! `/metrics` for Prometheus, `/live` and `/ready` for whoever supervises the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;

pub struct Health {
    pub registry: Registry,
    /// Set while the program serves.
    pub ready: AtomicBool,
}

const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Listens on `address`; nothing is served until the result is awaited.
pub async fn serve(
    address: &str,
    health: Arc<Health>,
) -> anyhow::Result<impl Future<Output = std::io::Result<()>> + use<>> {
    let listener = TcpListener::bind(address).await.with_context(|| {
        format!("listen on metrics.address {address:?} (set it to \"\" to serve no metrics)")
    })?;
    if let Ok(local) = listener.local_addr() {
        tracing::info!(key = "metrics.address", address = %local, "listening");
    }
    let app = Router::new()
        .route("/metrics", get(metrics))
        .route("/live", get(async || "live\n"))
        .route("/ready", get(ready))
        .with_state(health);
    Ok(async move { axum::serve(listener, app).await })
}

async fn metrics(State(health): State<Arc<Health>>) -> impl IntoResponse {
    let mut text = String::new();
    match encode(&mut text, &health.registry) {
        Ok(()) => (StatusCode::OK, [(header::CONTENT_TYPE, CONTENT_TYPE)], text),
        Err(_) => {
            let message = "metrics could not be encoded\n".to_owned();
            (StatusCode::INTERNAL_SERVER_ERROR, [(header::CONTENT_TYPE, "text/plain")], message)
        }
    }
}

async fn ready(State(health): State<Arc<Health>>) -> (StatusCode, &'static str) {
    if health.ready.load(Ordering::Acquire) {
        (StatusCode::OK, "ready\n")
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "starting or stopping\n")
    }
}
