//! What every call passes, whatever protocol it came by: the token is checked, the outcome counted.

use std::sync::Arc;

use tonic::metadata::MetadataMap;

use super::Secret;
use super::metrics::{Metrics, Op};
use crate::clock::Clock;
use crate::error::{Result, StoreError};

/// The way into a server.
#[derive(Debug, Clone)]
pub(super) struct Gate {
    pub(super) token: Option<Secret>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) clock: Clock,
}

impl Gate {
    /// Carries out `work` if the headers carry the token, and counts what came of it.
    pub(super) async fn pass<T>(
        &self,
        op: Op,
        headers: &MetadataMap,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let started = self.clock.now();
        let result = match &self.token {
            Some(token) if !token.matches(headers) => {
                self.metrics.count_refused_token();
                Err(StoreError::Unauthenticated)
            }
            _ => work.await,
        };
        self.metrics.count(op, self.clock.now().since(started), &result);
        result
    }
}
