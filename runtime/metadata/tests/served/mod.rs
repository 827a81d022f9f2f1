//! A server in this process, for tests that are its clients.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ibex_metadata::clock::Clock;
use ibex_metadata::grpc::{Connect, Server, ServerConfig, Target};
use ibex_metadata::local::LocalStore;
use ibex_metadata::store::Store;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

/// Generous: the machine may be busy with other things.
pub(crate) const BUDGET: Duration = Duration::from_secs(60);

pub(crate) fn runtime() -> Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub(crate) fn scratch(ending: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let name = format!("served-{}-{}{ending}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

pub(crate) fn connect(target: Target) -> Connect {
    Connect { target, ca_pem: None, domain: None, token: None, budget: BUDGET }
}

pub(crate) fn tcp(address: SocketAddr) -> Connect {
    connect(Target::Tcp(address.to_string()))
}

/// A server on a runtime of its own, so that it can be ended like a process: at once, with all its tasks.
pub(crate) struct Running {
    runtime: Runtime,
    pub(crate) address: Option<SocketAddr>,
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) stop: oneshot::Sender<()>,
    pub(crate) ended: oneshot::Receiver<bool>,
}

impl Running {
    pub(crate) fn start(config: ServerConfig, store: LocalStore, clock: Clock) -> Self {
        Self::serving(config, Arc::new(store), clock)
    }

    pub(crate) fn serving(config: ServerConfig, store: Arc<dyn Store>, clock: Clock) -> Self {
        // In a thread, because a test may already be inside a runtime.
        let start = move || {
            let runtime = runtime();
            let server = runtime.block_on(Server::bind(config, store, clock)).unwrap();
            let (address, metrics) = (server.address(), server.metrics_address());
            let (stop, stopped) = oneshot::channel::<()>();
            let (ending, ended) = oneshot::channel();
            runtime.spawn(async move {
                let result = server.serve(async { stopped.await.unwrap_or_default() }).await;
                ending.send(result.is_ok())
            });
            Self { runtime, address, metrics, stop, ended }
        };
        std::thread::spawn(start).join().unwrap()
    }

    pub(crate) fn kill(self) {
        let Self { runtime, stop, .. } = self;
        std::thread::spawn(move || runtime.shutdown_timeout(BUDGET)).join().unwrap();
        drop(stop);
    }
}

pub(crate) fn memory(config: ServerConfig) -> Running {
    Running::start(config, LocalStore::memory(Clock::system()), Clock::system())
}

pub(crate) fn loopback() -> Option<SocketAddr> {
    Some("127.0.0.1:0".parse().unwrap())
}

/// One HTTP/1.1 request over a plain socket.
pub(crate) async fn http_get(address: SocketAddr, path: &str) -> String {
    http(address, "GET", path, "", b"").await
}

/// The same with a method, further header lines and a body; all of the answer as text.
pub(crate) async fn http(
    address: SocketAddr,
    method: &str,
    path: &str,
    headers: &str,
    body: &[u8],
) -> String {
    let mut socket = tokio::net::TcpStream::connect(address).await.unwrap();
    let len = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len}\r\n{headers}\r\n"
    );
    socket.write_all(head.as_bytes()).await.unwrap();
    // A server that has refused the head may not read the body.
    let _ = socket.write_all(body).await;
    let mut reply = Vec::new();
    let _ = socket.read_to_end(&mut reply).await;
    String::from_utf8_lossy(&reply).into_owned()
}
