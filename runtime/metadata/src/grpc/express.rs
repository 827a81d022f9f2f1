//! ModelExpress's `P2pService`: its clients publish, list, fetch and update workers as if this were its
//! server.
//!
//! A rank of a worker is a record `modelexpress/SOURCE-ID/WORKER-ID.rRANK`; whoever reads records sees its
//! source, rank, state and transport. Its tensors, which may be megabytes, lie in cells behind the record's
//! manifest. Ranks that share a worker id are kept apart, as in the original: a status belongs to one of
//! them, a fetch answers the lowest, and a listing has one line per worker id, that of the rank which was
//! published last.
//!
//! The other way round, every record that names a source and a transport ModelExpress knows is
//! listed; its worker id is its name. A worker is alive as long as it publishes or updates its status: the
//! lease takes the place of the original's heartbeat timeout, and an expired one is `STALE`.
//!
//! What the original answers with an empty list or "not found" because its own store failed is an error
//! here: a client must not take an outage for absence.

#[rustfmt::skip]
#[expect(unreachable_pub, reason = "made from proto/model_express.proto")]
mod generated;
mod mapping;

use core::time::Duration;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::sync::Arc;

use tonic::{Request, Response, Status};

use self::generated as pb;
pub(super) use self::generated::p2p_service_server::P2pServiceServer;
use super::gate::Gate;
use super::metrics::Op;
use super::{convert, views};
use crate::clock::{unix_ms, unix_ns};
use crate::error::{Corruption, InputError, Result, StoreError};
use crate::name::RecordName;
use crate::store::{Listed, Store};

/// Where the records of ModelExpress's workers are.
const CLUSTER: &str = "modelexpress";
/// After how much silence a worker is stale; its client gives a sign of life every 30 s.
const TTL: Duration = Duration::from_secs(90);
/// How often a fetch starts over because the worker published in between.
const ATTEMPTS: usize = 4;

type Reply<T> = core::result::Result<Response<T>, Status>;

/// What answers ModelExpress's clients.
#[derive(Debug, Clone)]
pub(super) struct ExpressService {
    pub(super) store: Arc<dyn Store>,
    pub(super) gate: Gate,
}

/// Either what the protocol calls failure, to be put into a message, or an error of the call itself: the
/// client is to try again, or to present a token.
fn refusal(error: StoreError) -> Result<String, Status> {
    match error {
        StoreError::Unauthenticated => Err(convert::status(&error)),
        _ if error.is_transient() => Err(convert::status(&error)),
        _ => Ok(error.to_string()),
    }
}

fn required<T>(value: Option<T>, field: &'static str) -> Result<T> {
    value.ok_or_else(|| InputError::new(field, "absent", "given").into())
}

fn not_empty(value: &str, field: &'static str) -> Result<()> {
    if value.is_empty() { Err(InputError::new(field, value, "not empty").into()) } else { Ok(()) }
}

/// The record of a worker's rank.
fn name_of(source_id: &str, worker_id: &str, rank: u32) -> Result<RecordName, InputError> {
    if worker_id.is_empty() || worker_id.contains('/') {
        return Err(InputError::new("worker_id", worker_id, "that of a worker that this protocol published"));
    }
    let name = mapping::worker_prefix(worker_id) + &rank.to_string();
    RecordName::new(CLUSTER, source_id, &name).map_err(|error| match &*error.field {
        "group" => InputError { field: "mx_source_id".into(), ..error },
        _ => InputError { field: "worker_id".into(), ..error },
    })
}

impl ExpressService {
    /// The record that the two ids mean: of the ranks that share a worker id the lowest. `None` for a worker
    /// that nobody published, of this source.
    async fn find(&self, source_id: &str, worker_id: &str) -> Result<Option<Listed>> {
        if worker_id.contains('/') {
            // The name as a whole: a record that ModelExpress did not publish.
            let Ok(name) = RecordName::parse(worker_id) else { return Ok(None) };
            let found = views::look(&*self.store, &name).await?;
            let is_wanted =
                |entry: &Listed| mapping::source_id(&entry.snapshot.record).as_deref() == Some(source_id);
            return Ok(found.filter(is_wanted));
        }
        let start = RecordName::new(CLUSTER, source_id, &mapping::worker_prefix(worker_id));
        let Ok(start) = start else { return Ok(None) };
        let mut found: Option<Listed> = None;
        views::for_each_like(&*self.store, &start, |entry| {
            let is_lower = |known: &Listed| entry.snapshot.record.rank < known.snapshot.record.rank;
            if mapping::is_of(&entry, worker_id) && found.as_ref().is_none_or(is_lower) {
                found = Some(entry);
            }
        })
        .await?;
        Ok(found)
    }

    async fn publish(&self, request: pb::PublishMetadataRequest) -> Result<pb::PublishMetadataResponse> {
        let identity = required(request.identity.as_ref(), "identity")?;
        not_empty(&identity.model_name, "identity.model_name")?;
        not_empty(&request.worker_id, "worker_id")?;
        let source = mapping::source(identity)?;
        let source_id = source.source_id();
        let rank = required(request.worker.as_ref(), "worker")?.worker_rank;
        let name = name_of(&source_id, &request.worker_id, rank)?;
        let worker_id = request.worker_id.clone();
        let (published, bulk) = mapping::Published::split(request, source, unix_ns())?;
        let manifest = views::parcel::put(&*self.store, &name, mapping::PARCEL, &bulk).await?;
        let before = views::change(&*self.store, &name, TTL, |_| published.record(&name, manifest.clone()));
        if let Some(before) = before.await?
            && let Some(old) = mapping::manifest(&before.record)
            && Some(old) != manifest.as_ref()
        {
            views::parcel::clear(&*self.store, &name, old).await?;
        }
        let message = format!("published {name}");
        Ok(pb::PublishMetadataResponse { success: true, message, mx_source_id: source_id, worker_id })
    }

    async fn list(&self, request: pb::ListSourcesRequest) -> Result<pb::ListSourcesResponse> {
        let identity = request.identity.as_ref().filter(|identity| !identity.model_name.is_empty());
        let wanted = identity.map(mapping::source).transpose()?.map(|source| source.source_id());
        let (mut workers, now_ms) = (BTreeMap::<_, mapping::Worker>::new(), unix_ms());
        views::for_each(&*self.store, |entry| {
            if let Some(worker) = mapping::Worker::of(&entry, &request, now_ms, TTL)
                && wanted.as_ref().is_none_or(|wanted| *wanted == worker.instance.mx_source_id)
            {
                let key = (worker.instance.mx_source_id.clone(), worker.instance.worker_id.clone());
                match workers.entry(key) {
                    Entry::Vacant(place) => drop(place.insert(worker)),
                    Entry::Occupied(mut known) => known.get_mut().add(worker),
                }
            }
        })
        .await?;
        let passing = workers.into_values().filter(|worker| worker.passes(&request));
        let mut instances: Vec<_> = passing.map(|worker| worker.instance).collect();
        // Stable: equally new ones stay in the order of ids.
        instances.sort_by_key(|instance| core::cmp::Reverse(instance.updated_at));
        let limit = request.limit.filter(|&limit| limit > 0).map_or(usize::MAX, |limit| limit as usize);
        instances.truncate(limit);
        Ok(pb::ListSourcesResponse { instances })
    }

    async fn get(&self, request: &pb::GetMetadataRequest) -> Result<pb::GetMetadataResponse> {
        for _ in 0..ATTEMPTS {
            let Some(entry) = self.find(&request.mx_source_id, &request.worker_id).await? else {
                return Ok(pb::GetMetadataResponse {
                    mx_source_id: request.mx_source_id.clone(),
                    worker_id: request.worker_id.clone(),
                    ..pb::GetMetadataResponse::default()
                });
            };
            let bulk = match mapping::manifest(&entry.snapshot.record) {
                None => Some(Vec::new()),
                Some(manifest) => views::parcel::get(&*self.store, &entry.snapshot.name, manifest).await?,
            };
            let Some(bulk) = bulk else { continue };
            return Ok(pb::GetMetadataResponse {
                found: true,
                worker: Some(mapping::worker(&entry, &bulk, unix_ms(), TTL)?),
                mx_source_id: request.mx_source_id.clone(),
                worker_id: request.worker_id.clone(),
                identity: mapping::identity(&entry.snapshot.record)?,
            });
        }
        Err(StoreError::Corrupt(Corruption::Row))
    }

    async fn update(&self, request: &pb::UpdateStatusRequest) -> Result<()> {
        not_empty(&request.mx_source_id, "mx_source_id")?;
        not_empty(&request.worker_id, "worker_id")?;
        let state = mapping::state(request.status)?;
        let name = name_of(&request.mx_source_id, &request.worker_id, request.worker_rank)?;
        let update = |before: Option<&crate::store::Snapshot>| {
            let before = before.ok_or(StoreError::NotFound)?;
            mapping::updated(&before.record, state, request.source_load)
        };
        views::change(&*self.store, &name, TTL, update).await.map(|_| ())
    }
}

#[tonic::async_trait]
impl generated::p2p_service_server::P2pService for ExpressService {
    async fn publish_metadata(
        &self,
        request: Request<pb::PublishMetadataRequest>,
    ) -> Reply<pb::PublishMetadataResponse> {
        let (headers, _, message) = request.into_parts();
        let published = self.gate.pass(Op::ExpressPublish, &headers, self.publish(message)).await;
        Ok(Response::new(match published {
            Ok(reply) => reply,
            Err(error) => {
                let message = refusal(error)?;
                pb::PublishMetadataResponse { message, ..pb::PublishMetadataResponse::default() }
            }
        }))
    }

    async fn list_sources(&self, request: Request<pb::ListSourcesRequest>) -> Reply<pb::ListSourcesResponse> {
        let (headers, _, message) = request.into_parts();
        let listed = self.gate.pass(Op::ExpressList, &headers, self.list(message)).await;
        listed.map(Response::new).map_err(|error| convert::status(&error))
    }

    async fn get_metadata(&self, request: Request<pb::GetMetadataRequest>) -> Reply<pb::GetMetadataResponse> {
        let (headers, _, message) = request.into_parts();
        let found = self.gate.pass(Op::ExpressGet, &headers, self.get(&message)).await;
        found.map(Response::new).map_err(|error| convert::status(&error))
    }

    async fn update_status(
        &self,
        request: Request<pb::UpdateStatusRequest>,
    ) -> Reply<pb::UpdateStatusResponse> {
        let (headers, _, message) = request.into_parts();
        let updated = self.gate.pass(Op::ExpressUpdate, &headers, self.update(&message)).await;
        Ok(Response::new(match updated {
            Ok(()) => pb::UpdateStatusResponse { success: true, message: "updated".to_owned() },
            Err(error) => pb::UpdateStatusResponse { success: false, message: refusal(error)? },
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::generated::p2p_service_server::P2pService as _;
    use super::*;
    use crate::clock::Clock;
    use crate::ids::{InstanceId, Version};
    use crate::local::LocalStore;
    use crate::store::Claim;

    struct Rig {
        clock: Clock,
        store: Arc<LocalStore>,
    }

    impl Rig {
        fn new() -> Self {
            let clock = Clock::manual();
            Self { store: Arc::new(LocalStore::memory(clock.clone())), clock }
        }

        /// Another server in front of the same store.
        fn service(&self) -> ExpressService {
            let gate = Gate { token: None, metrics: Arc::default(), clock: self.clock.clone() };
            ExpressService { store: self.store.clone(), gate }
        }
    }

    fn publication() -> pb::PublishMetadataRequest {
        let identity = pb::SourceIdentity { model_name: "m".into(), ..Default::default() };
        let tensor = pb::TensorDescriptor { name: "t".into(), size: 1 << 40, ..Default::default() };
        let worker =
            pb::WorkerMetadata { worker_rank: 3, tensors: vec![tensor], status: 2, ..Default::default() };
        let (identity, worker) = (Some(identity), Some(worker));
        pb::PublishMetadataRequest { identity, worker, worker_id: "w".into(), ..Default::default() }
    }

    async fn publish(service: &ExpressService) -> String {
        let reply = service.publish_metadata(Request::new(publication())).await.unwrap().into_inner();
        assert!(reply.success, "{}", reply.message);
        reply.mx_source_id
    }

    async fn update(service: &ExpressService, source_id: &str, status: i32) -> pb::UpdateStatusResponse {
        let (mx_source_id, worker_id) = (source_id.to_owned(), "w".to_owned());
        let request =
            pb::UpdateStatusRequest { mx_source_id, worker_id, worker_rank: 3, status, ..Default::default() };
        service.update_status(Request::new(request)).await.unwrap().into_inner()
    }

    async fn fetch(service: &ExpressService, source_id: &str) -> pb::WorkerMetadata {
        let request =
            pb::GetMetadataRequest { mx_source_id: source_id.to_owned(), worker_id: "w".to_owned() };
        service.get_metadata(Request::new(request)).await.unwrap().into_inner().worker.unwrap()
    }

    async fn ready(service: &ExpressService) -> usize {
        let request = pb::ListSourcesRequest { status_filter: Some(2), ..Default::default() };
        service.list_sources(Request::new(request)).await.unwrap().into_inner().instances.len()
    }

    #[tokio::test]
    async fn silence_makes_a_worker_stale_and_a_sign_of_life_brings_it_back_whole() {
        let rig = Rig::new();
        let service = rig.service();
        let source_id = publish(&service).await;
        rig.clock.advance(TTL - Duration::from_secs(1));
        assert_eq!(ready(&service).await, 1);
        assert!(update(&service, &source_id, 2).await.success);
        rig.clock.advance(TTL - Duration::from_secs(1));
        assert_eq!(ready(&service).await, 1, "the sign of life counted");
        rig.clock.advance(Duration::from_secs(1));
        assert_eq!(ready(&service).await, 0);
        let stale = fetch(&service, &source_id).await;
        assert_eq!((stale.status, stale.updated_at, stale.tensors.len()), (3, 0, 1), "stale, not gone");
        assert!(update(&service, &source_id, 2).await.success);
        assert_eq!(ready(&service).await, 1);
        assert_eq!(fetch(&service, &source_id).await.tensors[0].size, 1 << 40);
    }

    #[tokio::test]
    async fn a_sign_of_life_rewrites_nothing() {
        let rig = Rig::new();
        let service = rig.service();
        let source_id = publish(&service).await;
        let before = rig.store.health().await.unwrap().revision;
        assert!(update(&service, &source_id, 2).await.success);
        assert_eq!(rig.store.health().await.unwrap().revision, before);
        assert!(update(&service, &source_id, 3).await.success);
        assert!(rig.store.health().await.unwrap().revision > before);
    }

    #[tokio::test]
    async fn ranks_that_share_a_worker_id_are_kept_apart() {
        let rig = Rig::new();
        let service = rig.service();
        let mut source_id = String::new();
        for rank in [7, 2, 11] {
            let mut request = publication();
            request.worker.as_mut().unwrap().worker_rank = rank;
            let reply = service.publish_metadata(Request::new(request)).await.unwrap().into_inner();
            assert!(reply.success, "{}", reply.message);
            source_id = reply.mx_source_id;
        }
        // Names that only look as if they were this worker's.
        for other in ["w.r2x", "w.r", "w.r2", "w-0"] {
            let request = pb::PublishMetadataRequest { worker_id: other.into(), ..publication() };
            assert!(service.publish_metadata(Request::new(request)).await.unwrap().into_inner().success);
        }
        assert_eq!(fetch(&service, &source_id).await.worker_rank, 2, "a fetch answers the lowest");
        let listed = service.list_sources(Request::new(pb::ListSourcesRequest::default())).await.unwrap();
        let refs = listed.into_inner().instances;
        let ours: Vec<_> = refs.iter().filter(|listed| listed.worker_id == "w").collect();
        assert_eq!((refs.len(), ours.len(), ours[0].worker_rank), (5, 1, 11), "one line, the newest rank");
        // One rank initialises: the worker is listed under either status, and nobody else changed.
        let update = async |rank, status| {
            let (mx_source_id, worker_id) = (source_id.clone(), "w".to_owned());
            let more = pb::UpdateStatusRequest::default();
            let request =
                pb::UpdateStatusRequest { mx_source_id, worker_id, worker_rank: rank, status, ..more };
            service.update_status(Request::new(request)).await.unwrap().into_inner().success
        };
        assert!(update(7, 1).await);
        assert!(!update(3, 1).await, "a rank that was never published");
        for (status, wanted) in [(1, true), (2, true), (3, false)] {
            let request = pb::ListSourcesRequest { status_filter: Some(status), ..Default::default() };
            let listed = service.list_sources(Request::new(request)).await.unwrap().into_inner().instances;
            assert_eq!(listed.iter().any(|listed| listed.worker_id == "w"), wanted, "status {status}");
        }
        assert_eq!(fetch(&service, &source_id).await.status, 2);
    }

    #[tokio::test]
    async fn servers_in_front_of_one_store_are_one_holder_and_a_stranger_is_not_robbed() {
        let rig = Rig::new();
        let source_id = publish(&rig.service()).await;
        assert!(update(&rig.service(), &source_id, 3).await.success, "another server goes on");
        publish(&rig.service()).await;
        assert_eq!(fetch(&rig.service(), &source_id).await.status, 2);
        // The name of a worker under which somebody else is.
        let name = name_of(&source_id, "taken", 3).unwrap();
        let instance = InstanceId::new(7).unwrap();
        let claim = Claim { name, instance, ttl: TTL, takeover: false };
        let hold = rig.store.claim(&claim).await.unwrap();
        let request = pb::PublishMetadataRequest { worker_id: "taken".into(), ..publication() };
        let reply = rig.service().publish_metadata(Request::new(request)).await.unwrap().into_inner();
        assert!(!reply.success && reply.message.contains("held"), "{}", reply.message);
        assert_eq!(rig.store.get(&hold.name).await.unwrap().stamp().version, Version(0));
    }
}
