//! Serving from a thread that is not asynchronous: what `ibex store serve` calls.

use core::time::Duration;
use std::sync::Arc;

use tokio::runtime::Builder;

use super::server::{Server, ServerConfig, ServerError};
use crate::clock::Clock;
use crate::error::StoreError;
use crate::local::{Heartbeat, LocalStore};
use crate::open::{open, open_local};
use crate::store::Store;
use crate::url::StoreUrl;

/// How long the runtime may take to end after the server has.
const END_BUDGET: Duration = Duration::from_secs(5);

/// Why a store is not served.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The store behind the server cannot be opened.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The server cannot serve.
    #[error(transparent)]
    Server(#[from] ServerError),
    /// The system gives no threads.
    #[error("cannot start threads: {0}")]
    Threads(std::io::Error),
}

/// Opens a store and serves it until `stop` returns; `stop` runs on a thread of its own and waits there.
/// `ready` is told when the sockets are open.
///
/// # Errors
/// [`HostError`] if the store or a socket cannot be opened, or serving ends before it was told to.
pub fn host(
    url: &StoreUrl,
    config: ServerConfig,
    clock: Clock,
    ready: impl FnOnce(&Server),
    stop: impl FnOnce() + Send + 'static,
) -> Result<(), HostError> {
    let runtime = Builder::new_multi_thread().thread_name("ibex-store").enable_all().build();
    let runtime = runtime.map_err(HostError::Threads)?;
    let result = runtime.block_on(async {
        let (store, heartbeat) = open_served(url, &clock)?;
        let server = Server::bind(config, store, clock).await?;
        ready(&server);
        let stop = tokio::task::spawn_blocking(stop);
        // A panic of `stop` is a reason to stop, too.
        let result = server.serve(async { drop(stop.await) }).await;
        drop(heartbeat);
        Ok(result?)
    });
    // If serving ended by itself, `stop` still waits: it is left behind with its thread.
    runtime.shutdown_timeout(if result.is_ok() { END_BUDGET } else { Duration::ZERO });
    result
}

/// A store of this process gives signs of life while it is served: clients are elsewhere, and if this
/// process is stopped, their leases must not pay for it.
fn open_served(url: &StoreUrl, clock: &Clock) -> Result<(Arc<dyn Store>, Option<Heartbeat>), StoreError> {
    match open_local(url, clock)? {
        Some(store) => {
            let heartbeat = LocalStore::heartbeat(&store);
            Ok((Arc::new(store), Some(heartbeat)))
        }
        None => Ok((open(url, clock.clone())?, None)),
    }
}
