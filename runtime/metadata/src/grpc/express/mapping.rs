//! Between ModelExpress's messages and records: one place, both ways.
//!
//! The native fields of a record say what every reader understands. What only ModelExpress knows of a
//! worker stands beside them, in a transport of the kind [`KIND`], as the worker's own message without its
//! bulk; the bulk is a second such message. Protobuf merges messages that follow each other, so the two
//! are the whole again.

use core::time::Duration;

use prost::Message;

use super::generated as pb;
use super::generated::SourceStatus;
use super::generated::worker_metadata::{BackendMetadata, SourcePayload};
use crate::error::{Bounded, Corruption, InputError, Result, StoreError};
use crate::limits::{BLOB_LEN_MAX, RECORD_LEN_MAX};
use crate::name::RecordName;
use crate::record::{
    Identity, Manifest, Nixl, NixlReach, PeerRecord, RecordState, SourceIdentity, TransferEngine, Way,
};
use crate::store::{Listed, check_count};
use crate::wire;

/// The kind of transport that holds what only ModelExpress knows.
const KIND: &str = "modelexpress";
/// The kind of manifest behind which a worker's bulk lies.
pub(super) const PARCEL: &str = "modelexpress-bulk";
/// Bytes of agent metadata that a record repeats for readers who know nothing of ModelExpress.
const INLINE_BLOB_LEN_MAX: usize = BLOB_LEN_MAX / 2;

const CORRUPT: StoreError = StoreError::Corrupt(Corruption::Row);

/// What the record keeps for ModelExpress alone.
#[derive(Clone, PartialEq, Message)]
struct Kept {
    /// Without bulk, status and time.
    #[prost(message, optional, tag = "1")]
    worker: Option<pb::WorkerMetadata>,
    #[prost(float, optional, tag = "2")]
    source_load: Option<f32>,
    #[prost(string, tag = "3")]
    pod_name: String,
    #[prost(string, tag = "4")]
    pod_uid: String,
    #[prost(string, tag = "5")]
    pod_namespace: String,
    /// When, by the clock of the server that took it in: among ranks of one worker the newest is listed.
    #[prost(int64, tag = "6")]
    published_ns: i64,
}

/// A publication, taken apart.
#[derive(Debug)]
pub(super) struct Published {
    source: SourceIdentity,
    kept: Kept,
    state: RecordState,
    rank: u32,
    native: Option<Way>,
}

impl Published {
    /// Takes a request apart: what the record will hold, and the bulk.
    pub(super) fn split(
        request: pb::PublishMetadataRequest,
        source: SourceIdentity,
        now_ns: i64,
    ) -> Result<(Self, Vec<u8>)> {
        let mut worker = super::required(request.worker, "worker")?;
        let (state, rank) = (state(worker.status)?, worker.worker_rank);
        let native = native(&worker);
        let mut bulk =
            pb::WorkerMetadata { tensors: std::mem::take(&mut worker.tensors), ..Default::default() };
        // The variant stays with the record, also where there is nothing in it.
        if let Some(BackendMetadata::NixlMetadata(blob)) = &mut worker.backend_metadata
            && !blob.is_empty()
        {
            bulk.backend_metadata = Some(BackendMetadata::NixlMetadata(std::mem::take(blob)));
        }
        if let Some(SourcePayload::TensorSource(tensors)) = &mut worker.source_payload
            && !tensors.tensors.is_empty()
        {
            bulk.source_payload = Some(SourcePayload::TensorSource(std::mem::take(tensors)));
        }
        (worker.status, worker.updated_at) = (0, 0);
        let kept = Kept {
            worker: Some(worker),
            source_load: None,
            pod_name: request.pod_name,
            pod_uid: request.pod_uid,
            pod_namespace: request.pod_namespace,
            published_ns: now_ns,
        };
        Ok((Self { source, kept, state, rank, native }, bulk.encode_to_vec()))
    }

    /// The record under `name`.
    pub(super) fn record(&self, name: &RecordName, manifest: Option<Manifest>) -> Result<PeerRecord> {
        let mut record = PeerRecord {
            state: self.state,
            rank: Some(self.rank),
            source: Some(self.source.clone()),
            transports: self.native.iter().cloned().map(Into::into).collect(),
            manifests: manifest.into_iter().collect(),
            ..PeerRecord::empty(name, Identity::Legacy)
        };
        keep(&mut record, &self.kept)?;
        Ok(record)
    }
}

/// The transport that readers of records understand.
fn native(worker: &pb::WorkerMetadata) -> Option<Way> {
    Some(match worker.backend_metadata.as_ref()? {
        BackendMetadata::NixlMetadata(blob) => {
            let reach = if blob.len() <= INLINE_BLOB_LEN_MAX {
                Some(NixlReach::Blob(blob.clone()))
            } else {
                Some(NixlReach::Endpoint(worker.metadata_endpoint.clone()))
            };
            Way::Nixl(Nixl { agent: worker.agent_name.clone(), reach, ..Nixl::default() })
        }
        BackendMetadata::TransferEngineSessionId(session) => {
            let host = session.rsplit_once(':').map_or(session.as_str(), |(host, _)| host);
            let (session, host) = (session.clone(), host.to_owned());
            Way::TransferEngine(TransferEngine { session, host, ..TransferEngine::default() })
        }
    })
}

fn keep(record: &mut PeerRecord, kept: &Kept) -> Result<()> {
    let raw = kept.encode_to_vec();
    check_count(Bounded::Record, raw.len(), RECORD_LEN_MAX)?;
    record.transports.retain(|transport| transport.way.kind() != KIND);
    record.transports.push(Way::Unknown { kind: KIND.to_owned(), raw }.into());
    Ok(())
}

/// What a record keeps for ModelExpress; `None` for one that ModelExpress did not publish.
fn kept(record: &PeerRecord) -> Result<Option<Kept>> {
    let raw = record.transports.iter().find_map(|transport| match &transport.way {
        Way::Unknown { kind, raw } if kind == KIND => Some(raw),
        _ => None,
    });
    raw.map(|raw| Kept::decode(raw.as_slice())).transpose().map_err(|_| CORRUPT)
}

/// The manifest of a worker's bulk, if it has any.
pub(super) fn manifest(record: &PeerRecord) -> Option<&Manifest> {
    record.manifests.iter().find(|manifest| manifest.kind == PARCEL)
}

/// The identity as records hold it. The wire is the same, field by field.
pub(super) fn source(identity: &pb::SourceIdentity) -> Result<SourceIdentity> {
    Ok(wire::decode(&identity.encode_to_vec())?)
}

/// The identity as ModelExpress reads it.
pub(super) fn identity(record: &PeerRecord) -> Result<Option<pb::SourceIdentity>> {
    let bytes = record.source.as_ref().map(wire::encode);
    bytes.map(|bytes| pb::SourceIdentity::decode(bytes.as_slice())).transpose().map_err(|_| CORRUPT)
}

/// The id under which ModelExpress knows what a record serves.
pub(super) fn source_id(record: &PeerRecord) -> Option<String> {
    record.source.as_ref().map(SourceIdentity::source_id)
}

/// The state that a status means.
pub(super) fn state(status: i32) -> Result<RecordState> {
    Ok(match SourceStatus::try_from(status) {
        Ok(SourceStatus::Unknown) => RecordState::Unknown(0),
        Ok(SourceStatus::Initializing) => RecordState::Joining,
        Ok(SourceStatus::Ready) => RecordState::Ready,
        Ok(SourceStatus::Stale) => RecordState::Draining,
        Err(_) => return Err(InputError::new("status", &status.to_string(), "between 0 and 3").into()),
    })
}

/// The status of a record; whatever its owner said last, without a lease it is stale.
fn status(entry: &Listed) -> SourceStatus {
    match entry.snapshot.record.state {
        _ if entry.remaining.is_none() => SourceStatus::Stale,
        RecordState::Joining => SourceStatus::Initializing,
        RecordState::Ready => SourceStatus::Ready,
        RecordState::Draining | RecordState::Left => SourceStatus::Stale,
        RecordState::Unknown(_) => SourceStatus::Unknown,
    }
}

/// When the worker last gave a sign of life, by the server's clock: what its lease has used up, taken off
/// the present time. 0 for one whose lease ran out.
fn updated_at(entry: &Listed, now_ms: i64, ttl: Duration) -> i64 {
    let Some(remaining) = entry.remaining else { return 0 };
    let silent_ms = i64::try_from(ttl.saturating_sub(remaining).as_millis()).unwrap_or(i64::MAX);
    now_ms.saturating_sub(silent_ms)
}

/// What the names of a worker's ranks begin with; the rank follows.
pub(super) fn worker_prefix(worker_id: &str) -> String {
    format!("{worker_id}.r")
}

/// Worker id and rank in the name of a record that ModelExpress published. Only the last dot counts, so that
/// an id which itself ends like a rank is no other's.
fn worker_of(name: &RecordName) -> Option<(&str, u32)> {
    let (worker_id, rank) = name.parts().2.rsplit_once('.')?;
    Some((worker_id, rank.strip_prefix('r')?.parse().ok()?))
}

/// Whether a record is one of this worker's ranks.
pub(super) fn is_of(entry: &Listed, worker_id: &str) -> bool {
    worker_of(&entry.snapshot.name).is_some_and(|(id, _)| id == worker_id)
}

/// A worker as a listing has it.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) instance: pb::SourceInstanceRef,
    /// When the rank that stands in the line was published.
    published_ns: i64,
    /// Whether any rank has the status that is asked for.
    has_status: bool,
}

impl Worker {
    /// From a record; `None` for one that is no source of ModelExpress's.
    pub(super) fn of(
        entry: &Listed,
        request: &pb::ListSourcesRequest,
        now_ms: i64,
        ttl: Duration,
    ) -> Option<Self> {
        let record = &entry.snapshot.record;
        let kept = kept(record).ok()?;
        let published_ns = kept.as_ref().map_or(0, |kept| kept.published_ns);
        let worker_id = match kept {
            Some(_) => worker_of(&entry.snapshot.name)?.0.to_owned(),
            // A record that has no worker id has a name.
            None => foreign_backend(record).map(|_| entry.snapshot.name.to_string())?,
        };
        let instance = instance(entry, kept.unwrap_or_default(), worker_id, now_ms, ttl)?;
        let has_status = request.status_filter.is_none_or(|wanted| wanted == status(entry) as i32);
        Some(Self { instance, published_ns, has_status })
    }

    /// Takes in another rank of the same worker.
    pub(super) fn add(&mut self, rank: Self) {
        self.has_status |= rank.has_status;
        if rank.published_ns >= self.published_ns {
            (self.instance, self.published_ns) = (rank.instance, rank.published_ns);
        }
    }

    /// Whether it is what a client asked for, apart from its source.
    pub(super) fn passes(&self, request: &pb::ListSourcesRequest) -> bool {
        let instance = &self.instance;
        self.has_status
            && request.model_name_filter.as_ref().is_none_or(|wanted| *wanted == instance.model_name)
            && request.worker_rank_filter.is_none_or(|wanted| wanted == instance.worker_rank)
            && request
                .min_training_step
                .is_none_or(|min| instance.training_step.is_some_and(|step| step >= min))
            && request.min_updated_at.is_none_or(|min| instance.updated_at >= min)
    }
}

/// The entry of a listing; `None` for a record without a source.
fn instance(
    entry: &Listed,
    kept: Kept,
    worker_id: String,
    now_ms: i64,
    ttl: Duration,
) -> Option<pb::SourceInstanceRef> {
    let record = &entry.snapshot.record;
    let source = record.source.as_ref()?;
    let extra = |key: &str| source.extra.iter().find(|(name, _)| name == key).map(|(_, value)| value);
    let Kept { worker, source_load, .. } = kept;
    let worker = worker.unwrap_or_default();
    Some(pb::SourceInstanceRef {
        mx_source_id: source.source_id(),
        worker_id,
        model_name: source.model.clone(),
        worker_rank: record.rank.unwrap_or_default(),
        accelerator: worker.accelerator,
        updated_at: updated_at(entry, now_ms, ttl),
        training_step: extra("training_step").or(extra("version")).and_then(|step| step.parse().ok()),
        layout_signature: extra("layout_signature").filter(|value| !value.is_empty()).cloned(),
        topology: worker.topology,
        source_load,
    })
}

/// The whole worker: what the record keeps of it, its bulk, and what the record says natively.
pub(super) fn worker(entry: &Listed, bulk: &[u8], now_ms: i64, ttl: Duration) -> Result<pb::WorkerMetadata> {
    let record = &entry.snapshot.record;
    let mut worker = match kept(record)? {
        Some(kept) => kept.worker.unwrap_or_default(),
        None => foreign(record),
    };
    worker.merge(bulk).map_err(|_| CORRUPT)?;
    worker.status = status(entry) as i32;
    worker.updated_at = updated_at(entry, now_ms, ttl);
    Ok(worker)
}

/// A worker that ModelExpress did not publish. It has no list of tensors: records name buffers, not
/// tensors.
fn foreign(record: &PeerRecord) -> pb::WorkerMetadata {
    let mut worker = pb::WorkerMetadata {
        worker_rank: record.rank.unwrap_or_default(),
        backend_metadata: foreign_backend(record),
        ..pb::WorkerMetadata::default()
    };
    for transport in &record.transports {
        if let Way::Nixl(nixl) = &transport.way {
            worker.agent_name.clone_from(&nixl.agent);
            if let Some(NixlReach::Endpoint(endpoint)) = &nixl.reach {
                worker.metadata_endpoint.clone_from(endpoint);
            }
        }
    }
    worker
}

/// The first transport of a record that ModelExpress has a variant for.
fn foreign_backend(record: &PeerRecord) -> Option<BackendMetadata> {
    record.transports.iter().find_map(|transport| match &transport.way {
        Way::Nixl(Nixl { reach: Some(NixlReach::Blob(blob)), .. }) => {
            Some(BackendMetadata::NixlMetadata(blob.clone()))
        }
        Way::Nixl(_) => Some(BackendMetadata::NixlMetadata(Vec::new())),
        Way::TransferEngine(engine) => Some(BackendMetadata::TransferEngineSessionId(engine.session.clone())),
        _ => None,
    })
}

/// The record after a change of status.
pub(super) fn updated(
    record: &PeerRecord,
    state: RecordState,
    source_load: Option<f32>,
) -> Result<PeerRecord> {
    let Some(mut kept) = kept(record)? else { return Err(StoreError::NotFound) };
    let mut record = PeerRecord { state, ..record.clone() };
    if kept.source_load != source_load {
        kept.source_load = source_load;
        keep(&mut record, &kept)?;
    }
    Ok(record)
}
