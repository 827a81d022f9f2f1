//! The client of `ibex://`.

use core::time::Duration;
use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use tonic::codec::Streaming;
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};

use super::generated as pb;
use super::generated::store_client::StoreClient;
use super::{Secret, convert};
use crate::channel::{self, RETRY};
use crate::clock::{Clock, within};
use crate::error::{Bounded, Corruption, Result, StoreError};
use crate::ids::{Revision, Version};
use crate::lease::Leased;
use crate::limits::{CELL_LEN_MAX, MESSAGE_LEN_MAX};
use crate::name::{Prefix, RecordName};
use crate::record::PeerRecord;
use crate::store::{
    Ack, Cell, Claim, Event, Filter, Health, Hold, Page, ReaderState, Snapshot, Store, Watch, WatchSource,
    check_batch, check_count, check_page, check_ttl,
};

/// Where the server is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// `host:port`.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

/// How to reach a server.
#[derive(Debug, Clone)]
pub struct Connect {
    /// Where it is.
    pub target: Target,
    /// For TLS, the certificate (PEM) that must have signed the server's; without, the connection is
    /// plain.
    pub ca_pem: Option<Vec<u8>>,
    /// The name in the server's certificate, if it is not the host.
    pub domain: Option<String>,
    /// What the server wants to hear.
    pub token: Option<Secret>,
    /// How long an operation may take.
    pub budget: Duration,
}

/// A store on another process. Connects when it is used, and again whenever it must.
#[derive(Debug, Clone)]
pub struct RemoteStore {
    client: StoreClient<InterceptedService<Channel, Sign>>,
    clock: Clock,
    budget: Duration,
}

/// Puts the token into every request.
#[derive(Debug, Clone)]
struct Sign(Option<Secret>);

impl Interceptor for Sign {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(secret) = &self.0 {
            secret.sign(request.metadata_mut());
        }
        Ok(request)
    }
}

impl RemoteStore {
    /// A client. Nothing is sent yet; must be called inside tokio.
    ///
    /// # Errors
    /// [`StoreError::Input`] for a target or a certificate that cannot be used.
    pub fn new(connect: &Connect, clock: Clock) -> Result<Self> {
        let budget = connect.budget;
        let scheme = if connect.ca_pem.is_some() { "https" } else { "http" };
        let (uri, field) = match &connect.target {
            Target::Tcp(authority) => (format!("{scheme}://{authority}"), "host:port"),
            Target::Unix(path) => (format!("unix:{}", path.display()), "socket path"),
        };
        let tls = connect.ca_pem.as_deref();
        let tls = tls.map(|ca_pem| channel::Tls { ca_pem, domain: connect.domain.as_deref() });
        let channel = channel::lazy(&uri, field, tls, budget)?;
        let client = StoreClient::with_interceptor(channel, Sign(connect.token.clone()))
            .max_decoding_message_size(MESSAGE_LEN_MAX)
            .max_encoding_message_size(MESSAGE_LEN_MAX);
        Ok(Self { client, clock, budget })
    }

    /// Runs one call under the budget; each gets a client of its own, the connection is shared.
    async fn call<T, F: Future<Output = Result<Response<T>, Status>>>(
        &self,
        call: impl FnOnce(StoreClient<InterceptedService<Channel, Sign>>) -> F,
    ) -> Result<T> {
        let reply = call(self.client.clone());
        let reply = async { reply.await.map_err(|status| convert::from_status(&status, self.budget)) };
        within(self.budget, reply).await.map(Response::into_inner)
    }
}

#[async_trait]
impl Store for RemoteStore {
    async fn claim(&self, claim: &Claim) -> Result<Hold> {
        check_ttl(claim.ttl)?;
        let request: pb::ClaimRequest = claim.into();
        self.call(|mut client| async move { client.claim(request).await }).await?.try_into()
    }

    async fn publish(&self, hold: &Hold, expect: Version, record: &PeerRecord) -> Result<Version> {
        crate::table::rules::check_owner(record, hold)?;
        let record = record.encode()?;
        let request = pb::PublishRequest { hold: Some(hold.into()), expect: expect.0, record };
        let reply = self.call(|mut client| async move { client.publish(request).await }).await?;
        Ok(Version(reply.version))
    }

    async fn renew(&self, hold: &Hold) -> Result<()> {
        let request: pb::Hold = hold.into();
        self.call(|mut client| async move { client.renew(request).await }).await.map(|_| ())
    }

    async fn release(&self, hold: &Hold) -> Result<()> {
        let request: pb::Hold = hold.into();
        self.call(|mut client| async move { client.release(request).await }).await.map(|_| ())
    }

    async fn batch_get(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        check_batch(names.len())?;
        let request = pb::BatchGetRequest { names: names.iter().map(ToString::to_string).collect() };
        // Before the question leaves: whatever the trip takes is taken off the lease.
        let asked_at = self.clock.now();
        let reply = self.call(|mut client| async move { client.batch_get(request).await }).await?;
        let (asked, got) = (names.len() as u64, reply.outcomes.len() as u64);
        if asked != got {
            return Err(StoreError::Corrupt(Corruption::BatchLength { asked, got }));
        }
        let lease = |(snapshot, remaining): (Arc<Snapshot>, Duration)| {
            let stamp = snapshot.stamp;
            Leased::new(snapshot, stamp, asked_at, remaining)
        };
        let outcome = |(name, outcome): (&RecordName, pb::Outcome)| {
            let found = convert::from_outcome(outcome)?;
            if found.0.name == *name { Ok(lease(found)) } else { Err(StoreError::Corrupt(Corruption::Row)) }
        };
        Ok(names.iter().zip(reply.outcomes).map(outcome).collect())
    }

    async fn list(&self, filter: &Filter) -> Result<Page> {
        check_page(filter)?;
        let request = pb::ListRequest {
            prefix: filter.prefix.as_str().to_owned(),
            after: filter.after.as_ref().map(ToString::to_string).unwrap_or_default(),
            // Fits: the page was checked.
            limit: u32::try_from(filter.limit).unwrap_or(u32::MAX),
        };
        self.call(|mut client| async move { client.list(request).await }).await?.try_into()
    }

    async fn watch(&self, prefix: &Prefix, from: Revision) -> Result<Watch> {
        let request = pb::WatchRequest { prefix: prefix.as_str().to_owned(), from: from.0 };
        let events = self.call(|mut client| async move { client.watch(request).await }).await?;
        Ok(Watch::new(RemoteWatch { events, budget: self.budget }))
    }

    async fn ack(&self, ack: &Ack) -> Result<()> {
        check_ttl(ack.ttl)?;
        let request: pb::AckRequest = ack.into();
        self.call(|mut client| async move { client.ack(request).await }).await.map(|_| ())
    }

    async fn readers(&self, name: &RecordName) -> Result<Vec<ReaderState>> {
        let request = pb::ReadersRequest { name: name.to_string() };
        let reply = self.call(|mut client| async move { client.readers(request).await }).await?;
        reply.readers.into_iter().map(TryInto::try_into).collect()
    }

    async fn read_cell(&self, name: &RecordName) -> Result<Cell> {
        let request = pb::ReadCellRequest { name: name.to_string() };
        self.call(|mut client| async move { client.read_cell(request).await }).await.map(Into::into)
    }

    async fn swap_cell(&self, name: &RecordName, expect: Version, value: &[u8]) -> Result<Version> {
        check_count(Bounded::Cell, value.len(), CELL_LEN_MAX)?;
        let request = pb::SwapCellRequest { name: name.to_string(), expect: expect.0, value: value.to_vec() };
        let reply = self.call(|mut client| async move { client.swap_cell(request).await }).await?;
        Ok(Version(reply.version))
    }

    async fn health(&self) -> Result<Health> {
        let request = pb::HealthRequest {};
        self.call(|mut client| async move { client.health(request).await }).await.map(Into::into)
    }
}

/// A watch whose events come over a stream; a dead server is noticed by keepalive.
struct RemoteWatch {
    events: Streaming<pb::Event>,
    budget: Duration,
}

#[async_trait]
impl WatchSource for RemoteWatch {
    async fn next(&mut self) -> Result<Event> {
        match self.events.message().await {
            Ok(Some(event)) => event.try_into(),
            Ok(None) => Err(StoreError::Unavailable { retry_after: RETRY }),
            Err(status) => Err(convert::from_status(&status, self.budget)),
        }
    }
}
