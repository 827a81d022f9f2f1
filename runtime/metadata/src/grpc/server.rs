//! The server: sockets, TLS, health, reflection, metrics, and an orderly end.

use core::time::Duration;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::Router;
use axum::routing::get;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::service::Routes;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Identity, ServerTlsConfig};
use tonic_health::pb::health_server::{Health as HealthService, HealthServer};
use tonic_health::server::HealthReporter;

use super::express::{ExpressService, P2pServiceServer};
use super::gate::Gate;
use super::generated::store_server::StoreServer;
use super::metrics::Metrics;
use super::mooncake::{self, Mooncake};
use super::service::StoreService;
use super::{DESCRIPTORS, Secret};
use crate::channel::{KEEPALIVE_PERIOD, KEEPALIVE_TIMEOUT};
use crate::clock::{Clock, at_most};
use crate::limits::{MESSAGE_LEN_MAX, PARCEL_LEN_MAX};
use crate::store::Store;

/// How long calls in progress may take after the server was told to stop.
const GRACE: Duration = Duration::from_secs(5);
/// How often the answer to health checks is brought up to date.
const HEALTH_PERIOD: Duration = Duration::from_secs(1);

/// Certificate and key of a server, both PEM.
#[derive(Clone)]
pub struct TlsFiles {
    /// The certificate, with the chain up to what clients trust.
    pub cert_pem: Vec<u8>,
    /// Its key.
    pub key_pem: Vec<u8>,
}

impl std::fmt::Debug for TlsFiles {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TlsFiles(not shown)")
    }
}

/// Where and how to serve.
#[derive(Debug, Clone, Default)]
pub struct ServerConfig {
    /// TCP address; port 0 takes a free one.
    pub listen: Option<SocketAddr>,
    /// Unix socket, beside or instead of TCP. Created here and removed at the end.
    pub unix: Option<PathBuf>,
    /// Where Prometheus finds `/metrics`, over plain HTTP.
    pub metrics: Option<SocketAddr>,
    /// TLS for the TCP address.
    pub tls: Option<TlsFiles>,
    /// What clients must present.
    pub token: Option<Secret>,
}

/// Why a server cannot serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServerError {
    /// Neither a TCP address nor a Unix socket was given.
    #[error("there is no address to serve on")]
    NoAddress,
    /// A socket cannot be opened.
    #[error("cannot serve on {address}: {source}")]
    Bind {
        /// The address or path.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// Certificate and key cannot be used.
    #[error("the certificate or its key cannot be used: {0}")]
    Tls(tonic::transport::Error),
    /// Serving ended by itself.
    #[error("serving failed: {0}")]
    Transport(tonic::transport::Error),
}

/// A server with its sockets open, not serving yet.
#[derive(Debug)]
pub struct Server {
    config: ServerConfig,
    tcp: Option<TcpListener>,
    unix: Option<(UnixListener, SocketFile)>,
    metrics_listener: Option<TcpListener>,
    metrics: Arc<Metrics>,
    store: Arc<dyn Store>,
    clock: Clock,
}

/// The path of a Unix socket, removed when the server is gone.
#[derive(Debug)]
struct SocketFile(PathBuf);

impl Drop for SocketFile {
    fn drop(&mut self) {
        // Somebody may have removed it already.
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Server {
    /// Opens the sockets.
    ///
    /// # Errors
    /// [`ServerError`] for the first one that cannot be opened, or for a certificate that cannot be used.
    pub async fn bind(
        config: ServerConfig,
        store: Arc<dyn Store>,
        clock: Clock,
    ) -> Result<Self, ServerError> {
        if config.listen.is_none() && config.unix.is_none() {
            return Err(ServerError::NoAddress);
        }
        // Before any socket exists, so that a bad certificate leaves nothing behind.
        builder(config.tls.as_ref())?;
        let tcp = bind_tcp(config.listen).await?;
        let metrics_listener = bind_tcp(config.metrics).await?;
        let unix = match &config.unix {
            Some(path) => Some(bind_unix(path)?),
            None => None,
        };
        Ok(Self { config, tcp, unix, metrics_listener, metrics: Arc::default(), store, clock })
    }

    /// The TCP address, with the port that was taken.
    #[must_use]
    pub fn address(&self) -> Option<SocketAddr> {
        self.tcp.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// The address of the metrics, with the port that was taken.
    #[must_use]
    pub fn metrics_address(&self) -> Option<SocketAddr> {
        self.metrics_listener.as_ref().and_then(|listener| listener.local_addr().ok())
    }

    /// Serves until `stop` is done, then lets calls in progress end, for at most a few seconds. Watches are
    /// told that the store is unavailable.
    ///
    /// # Errors
    /// [`ServerError::Transport`] if serving ends before it was told to.
    pub async fn serve(mut self, stop: impl Future<Output = ()> + Send) -> Result<(), ServerError> {
        let (stopping, stopped) = watch::channel(false);
        let (reporter, health) = tonic_health::server::health_reporter();
        let routes = self.routes(&stopped, health);
        let mut servers = tokio::task::JoinSet::new();
        if let Some(listener) = self.tcp.take() {
            let mut server = builder(self.config.tls.as_ref())?;
            // The builder's own settings do not reach a listener that is handed over. Without the first, an
            // answer of several segments waits for the client's delayed acknowledgement: 40 ms.
            let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
            let incoming = incoming.with_keepalive(Some(KEEPALIVE_PERIOD));
            let stopped = until(stopped.clone());
            let routes = routes.clone();
            servers.spawn(async move {
                server.add_routes(routes).serve_with_incoming_shutdown(incoming, stopped).await
            });
        }
        let unix = self.unix.take();
        let socket_file = unix.map(|(listener, file)| {
            let incoming = UnixListenerStream::new(listener);
            let stopped = until(stopped.clone());
            servers.spawn(async move {
                let mut server = plain_builder();
                server.add_routes(routes).serve_with_incoming_shutdown(incoming, stopped).await
            });
            file
        });
        let side = self.side_tasks(&stopped, reporter);
        let result = tokio::select! {
            () = stop => Ok(()),
            Some(ended) = servers.join_next() => flatten(ended),
        };
        stopping.send_replace(true);
        let drained = async { while servers.join_next().await.is_some() {} };
        // Whoever holds a connection longer than this is cut off.
        at_most(GRACE, drained).await;
        drop((side, socket_file));
        result
    }

    fn routes(&self, stopped: &watch::Receiver<bool>, health: HealthServer<impl HealthService>) -> Routes {
        let gate = Gate {
            token: self.config.token.clone(),
            metrics: Arc::clone(&self.metrics),
            clock: self.clock.clone(),
        };
        let store = || Arc::clone(&self.store);
        let service = StoreService { store: store(), gate: gate.clone(), stopping: stopped.clone() };
        let service = StoreServer::new(service)
            .max_decoding_message_size(MESSAGE_LEN_MAX)
            .max_encoding_message_size(MESSAGE_LEN_MAX);
        let express = P2pServiceServer::new(ExpressService { store: store(), gate: gate.clone() })
            .max_decoding_message_size(PARCEL_LEN_MAX)
            .max_encoding_message_size(PARCEL_LEN_MAX);
        let mut routes = Routes::new(service).add_service(express).add_service(health);
        let http = mooncake::router(Mooncake { store: store(), gate });
        let grpc = std::mem::take(routes.axum_router_mut());
        *routes.axum_router_mut() = grpc.merge(http);
        let reflection = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        // Both versions of the protocol: many tools still ask by the older one.
        match (reflection().build_v1(), reflection().build_v1alpha()) {
            (Ok(v1), Ok(v1alpha)) => routes.add_service(v1).add_service(v1alpha),
            // The descriptors are compiled in and tested; without them only reflection is missing.
            _ => routes,
        }
    }

    /// Health checks, and metrics over HTTP; they end when the answer is dropped.
    fn side_tasks(
        &mut self,
        stopped: &watch::Receiver<bool>,
        reporter: HealthReporter,
    ) -> tokio::task::JoinSet<()> {
        let mut tasks = tokio::task::JoinSet::new();
        tasks.spawn(report_health(Arc::clone(&self.store), self.clock.clone(), reporter));
        if let Some(listener) = self.metrics_listener.take() {
            let (metrics, store) = (Arc::clone(&self.metrics), Arc::clone(&self.store));
            let page = get(async move || metrics.render(store.health().await.ok().as_ref()));
            let server = axum::serve(listener, Router::new().route("/metrics", page));
            let server = server.with_graceful_shutdown(until(stopped.clone()));
            tasks.spawn(async move {
                // An accept that fails is tried again by axum; there is no other way to end.
                let _ = server.await;
            });
        }
        tasks
    }
}

fn flatten(
    ended: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>,
) -> Result<(), ServerError> {
    match ended {
        Ok(Err(error)) => Err(ServerError::Transport(error)),
        // The task ends only by the signal, and nothing aborts it.
        Ok(Ok(())) | Err(_) => Ok(()),
    }
}

/// Tells health checks whether the store behind the server answers.
async fn report_health(store: Arc<dyn Store>, clock: Clock, reporter: HealthReporter) {
    loop {
        if store.health().await.is_ok() {
            reporter.set_serving::<StoreServer<StoreService>>().await;
        } else {
            reporter.set_not_serving::<StoreServer<StoreService>>().await;
        }
        clock.sleep_until(clock.now().after(HEALTH_PERIOD)).await;
    }
}

async fn until(mut stopped: watch::Receiver<bool>) {
    // A dropped sender means that the server is gone: stop, too.
    let _ = stopped.wait_for(|&stopped| stopped).await;
}

fn plain_builder() -> tonic::transport::Server {
    tonic::transport::Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE_PERIOD))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
        // Mooncake's clients speak HTTP/1.1, on the same port.
        .accept_http1(true)
}

fn builder(tls: Option<&TlsFiles>) -> Result<tonic::transport::Server, ServerError> {
    let Some(tls) = tls else { return Ok(plain_builder()) };
    let identity = Identity::from_pem(&tls.cert_pem, &tls.key_pem);
    plain_builder().tls_config(ServerTlsConfig::new().identity(identity)).map_err(ServerError::Tls)
}

async fn bind_tcp(address: Option<SocketAddr>) -> Result<Option<TcpListener>, ServerError> {
    let Some(address) = address else { return Ok(None) };
    let bound = TcpListener::bind(address).await;
    bound.map(Some).map_err(|source| ServerError::Bind { address: address.to_string(), source })
}

/// A socket file that a killed server left is taken over; one that answers is not.
fn bind_unix(path: &Path) -> Result<(UnixListener, SocketFile), ServerError> {
    let failed = |source| ServerError::Bind { address: path.display().to_string(), source };
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == std::io::ErrorKind::AddrInUse && is_dead(path) => {
            std::fs::remove_file(path).map_err(failed)?;
            UnixListener::bind(path)
        }
        bound => bound,
    };
    Ok((listener.map_err(failed)?, SocketFile(path.to_owned())))
}

fn is_dead(path: &Path) -> bool {
    let refused = std::io::ErrorKind::ConnectionRefused;
    std::os::unix::net::UnixStream::connect(path).is_err_and(|error| error.kind() == refused)
}
