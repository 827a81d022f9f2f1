//! The service: each call becomes one operation of the store behind it.

use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::convert;
use super::gate::Gate;
use super::generated as pb;
use super::generated::store_server::Store as Service;
use super::metrics::Op;
use crate::channel::RETRY;
use crate::error::{Result, StoreError};
use crate::ids::{Revision, Version};
use crate::limits::WATCH_QUEUE_LEN;
use crate::name::Prefix;
use crate::store::{Ack, Claim, Filter, Hold, Store, Watch};

/// What answers calls.
#[derive(Debug, Clone)]
pub(super) struct StoreService {
    pub(super) store: Arc<dyn Store>,
    pub(super) gate: Gate,
    /// Turns true when the server stops: open watches end then, or stopping would wait for them.
    pub(super) stopping: watch::Receiver<bool>,
}

type Reply<T> = core::result::Result<Response<T>, Status>;

impl StoreService {
    /// Checks the token, carries out, counts, and turns the error into a status.
    async fn answer<Q, T>(
        &self,
        op: Op,
        request: Request<Q>,
        work: impl AsyncFnOnce(Q) -> Result<T>,
    ) -> Reply<T> {
        let (headers, _, message) = request.into_parts();
        let result = self.gate.pass(op, &headers, work(message)).await;
        result.map(Response::new).map_err(|error| convert::status(&error))
    }

    /// Sends events on until the watch, the client or the server ends.
    async fn forward(self, mut watch: Watch, events: mpsc::Sender<core::result::Result<pb::Event, Status>>) {
        self.gate.metrics.watch_opened();
        let mut stopping = self.stopping.clone();
        loop {
            let item = tokio::select! {
                event = watch.next() => event.map(Into::into),
                // A closed channel means that the server is gone already.
                _ = stopping.wait_for(|&stopping| stopping) => {
                    Err(StoreError::Unavailable { retry_after: RETRY })
                }
                () = events.closed() => break,
            };
            let is_last = item.is_err();
            let item = item.map_err(|error| convert::status(&error));
            if events.send(item).await.is_err() || is_last {
                break;
            }
        }
        self.gate.metrics.watch_closed();
    }
}

fn hold(hold: Option<pb::Hold>) -> Result<Hold> {
    let missing = || crate::error::InputError::new("hold", "absent", "what a claim answered");
    hold.ok_or_else(missing)?.try_into()
}

#[tonic::async_trait]
impl Service for StoreService {
    async fn claim(&self, request: Request<pb::ClaimRequest>) -> Reply<pb::Hold> {
        let work = async |claim: pb::ClaimRequest| {
            let claim: Claim = claim.try_into()?;
            Ok((&self.store.claim(&claim).await?).into())
        };
        self.answer(Op::Claim, request, work).await
    }

    async fn publish(&self, request: Request<pb::PublishRequest>) -> Reply<pb::PublishReply> {
        let work = async |publish: pb::PublishRequest| {
            let record = crate::record::PeerRecord::decode(&publish.record)?;
            let hold = hold(publish.hold)?;
            let version = self.store.publish(&hold, Version(publish.expect), &record).await?;
            Ok(pb::PublishReply { version: version.0 })
        };
        self.answer(Op::Publish, request, work).await
    }

    async fn renew(&self, request: Request<pb::Hold>) -> Reply<pb::Done> {
        let work = async |hold: pb::Hold| {
            self.store.renew(&hold.try_into()?).await?;
            Ok(pb::Done {})
        };
        self.answer(Op::Renew, request, work).await
    }

    async fn release(&self, request: Request<pb::Hold>) -> Reply<pb::Done> {
        let work = async |hold: pb::Hold| {
            self.store.release(&hold.try_into()?).await?;
            Ok(pb::Done {})
        };
        self.answer(Op::Release, request, work).await
    }

    async fn batch_get(&self, request: Request<pb::BatchGetRequest>) -> Reply<pb::BatchGetReply> {
        let work = async |batch: pb::BatchGetRequest| {
            self.gate.metrics.count_keys(batch.names.len());
            let names = batch.names.iter().map(|name| convert::name(name)).collect::<Result<Vec<_>>>()?;
            let outcomes = self.store.batch_get(&names).await?;
            let now = self.gate.clock.now();
            let outcomes = outcomes.into_iter().map(|outcome| {
                convert::outcome(outcome.map(|lease| (Arc::clone(lease.unchecked()), lease.remaining(now))))
            });
            Ok(pb::BatchGetReply { outcomes: outcomes.collect() })
        };
        self.answer(Op::BatchGet, request, work).await
    }

    async fn list(&self, request: Request<pb::ListRequest>) -> Reply<pb::ListReply> {
        let work = async |list: pb::ListRequest| {
            let after = if list.after.is_empty() { None } else { Some(convert::name(&list.after)?) };
            let limit = usize::try_from(list.limit).unwrap_or(usize::MAX);
            let filter = Filter { prefix: Prefix::parse(&list.prefix)?, after, limit };
            Ok(self.store.list(&filter).await?.into())
        };
        self.answer(Op::List, request, work).await
    }

    type WatchStream = ReceiverStream<core::result::Result<pb::Event, Status>>;

    async fn watch(&self, request: Request<pb::WatchRequest>) -> Reply<Self::WatchStream> {
        let work = async |watch: pb::WatchRequest| {
            let prefix = Prefix::parse(&watch.prefix)?;
            let watch = self.store.watch(&prefix, Revision(watch.from)).await?;
            let (sender, receiver) = mpsc::channel(WATCH_QUEUE_LEN);
            tokio::spawn(self.clone().forward(watch, sender));
            Ok(ReceiverStream::new(receiver))
        };
        self.answer(Op::Watch, request, work).await
    }

    async fn ack(&self, request: Request<pb::AckRequest>) -> Reply<pb::Done> {
        let work = async |ack: pb::AckRequest| {
            let ack: Ack = ack.try_into()?;
            self.store.ack(&ack).await?;
            Ok(pb::Done {})
        };
        self.answer(Op::Ack, request, work).await
    }

    async fn readers(&self, request: Request<pb::ReadersRequest>) -> Reply<pb::ReadersReply> {
        let work = async |request: pb::ReadersRequest| {
            let readers = self.store.readers(&convert::name(&request.name)?).await?;
            Ok(pb::ReadersReply { readers: readers.into_iter().map(Into::into).collect() })
        };
        self.answer(Op::Readers, request, work).await
    }

    async fn read_cell(&self, request: Request<pb::ReadCellRequest>) -> Reply<pb::Cell> {
        let work = async |request: pb::ReadCellRequest| {
            Ok(self.store.read_cell(&convert::name(&request.name)?).await?.into())
        };
        self.answer(Op::ReadCell, request, work).await
    }

    async fn swap_cell(&self, request: Request<pb::SwapCellRequest>) -> Reply<pb::PublishReply> {
        let work = async |swap: pb::SwapCellRequest| {
            let name = convert::name(&swap.name)?;
            let version = self.store.swap_cell(&name, Version(swap.expect), &swap.value).await?;
            Ok(pb::PublishReply { version: version.0 })
        };
        self.answer(Op::SwapCell, request, work).await
    }

    async fn health(&self, request: Request<pb::HealthRequest>) -> Reply<pb::HealthReply> {
        let work = async |_: pb::HealthRequest| Ok(self.store.health().await?.into());
        self.answer(Op::Health, request, work).await
    }
}
