//! Any store behind a cache, as a subject of its own: it must keep the same contract.

use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;

use super::Subject;
use crate::clock::Clock;
use crate::layered::Layered;
use crate::store::Store;

/// A store behind a cache: each client has one of its own.
#[derive(Debug)]
pub struct Cached<S>(pub S);

#[async_trait]
impl<S: Subject> Subject for Cached<S> {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        Arc::new(Layered::new(self.0.client(skew_ns).await, self.clock(skew_ns)))
    }

    fn clock(&self, skew_ns: i64) -> Clock {
        self.0.clock(skew_ns)
    }

    fn short_ttl(&self) -> Duration {
        self.0.short_ttl()
    }

    fn lag(&self) -> Duration {
        self.0.lag()
    }

    fn address(&self) -> Option<SocketAddr> {
        self.0.address()
    }

    fn serves_what_it_knows(&self) -> bool {
        true
    }

    async fn pass(&self, duration: Duration) {
        self.0.pass(duration).await;
    }

    async fn kill(&self) -> bool {
        self.0.kill().await
    }

    async fn start(&self) {
        self.0.start().await;
    }
}
