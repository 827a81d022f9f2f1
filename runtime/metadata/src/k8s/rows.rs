//! One name as Kubernetes holds it: a resource with the row, and the owner's lease.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::api::ServerTime;
use super::lease::{Grant, Role, metadata};
use super::schema::{
    Base64, CORRUPT, CellSpec, Dec, EntrySpec, IbexEntry, Life, Mirror, RecordSpec, RowSpec, instance,
};
use crate::error::{Result, StoreError};
use crate::ids::{Fence, InstanceId, LeaseId, Stamp, Version};
use crate::name::RecordName;
use crate::record::{Identity, PeerRecord};
use crate::store::{Cell, Hold, Snapshot};

/// What is kept under a name, and the lease that goes with it, as of one moment of the server.
#[derive(Debug, Default)]
pub(super) struct Seen {
    pub(super) entry: Option<IbexEntry>,
    pub(super) lease: Option<Grant>,
    pub(super) now: ServerTime,
}

impl Seen {
    fn row(&self) -> Result<&RowSpec> {
        let entry = self.entry.as_ref().ok_or(StoreError::NotFound)?;
        entry.spec.row.as_ref().ok_or(CORRUPT)
    }

    /// The newest fence that anybody drew, whether or not the claim was finished.
    pub(super) fn newest_fence(&self) -> Fence {
        let row = self.row().map_or(Fence(0), |row| Fence(row.fence.0));
        self.lease.as_ref().map_or(row, |lease| row.max(lease.stamp.fence))
    }

    /// The lease, if it is a claim's that wrote no row yet.
    pub(super) fn claim_under_way(&self) -> Option<&Grant> {
        let row = self.row().map_or(0, |row| row.fence.0);
        self.lease.as_ref().filter(|lease| lease.stamp.fence.0 > row && !lease.is_over(self.now))
    }

    /// The present owner's lease, unless it ran out or was given back.
    pub(super) fn alive(&self) -> Option<&Grant> {
        let row = self.row().ok().filter(|row| row.life == Life::Held)?;
        let lease = self.lease.as_ref().filter(|lease| lease.stamp.fence.0 == row.fence.0)?;
        (!lease.is_over(self.now)).then_some(lease)
    }

    /// Whether the row says "held" although nobody holds it any more, and nobody said so yet.
    pub(super) fn is_silently_over(&self) -> bool {
        let is_held = self.row().is_ok_and(|row| row.life == Life::Held);
        is_held && self.alive().is_none() && self.claim_under_way().is_none()
    }

    pub(super) fn stamp(&self) -> Result<Stamp> {
        self.row().map(|row| Stamp::new(Fence(row.fence.0), Version(row.version.0)))
    }

    pub(super) fn is_released(&self) -> bool {
        self.row().is_ok_and(|row| row.life == Life::Released)
    }

    /// Refuses a hold that is not the present one, or not alive; the fence decides first.
    pub(super) fn check_hold(&self, hold: &Hold) -> Result<&Grant> {
        let row = self.row()?;
        let fence = Fence(row.fence.0);
        if hold.fence != fence {
            return Err(StoreError::Fenced { current: fence });
        }
        let is_same = hold.lease == LeaseId(fence.0) && instance(row.instance.clone())? == hold.instance;
        self.alive().filter(|_| is_same).ok_or(StoreError::LeaseExpired { fence })
    }

    /// What is stored, whether or not the owner is alive; not found if it was given back.
    pub(super) fn snapshot(&self) -> Result<Snapshot> {
        let entry = self.entry.as_ref().ok_or(StoreError::NotFound)?;
        if self.is_released() { Err(StoreError::NotFound) } else { snapshot(&entry.spec) }
    }

    /// The metadata with which this entry, or a new one, is written.
    pub(super) fn metadata(&self, role: Role, name: &RecordName) -> ObjectMeta {
        let mut metadata = metadata(role, name, None);
        metadata.resource_version = self.entry.as_ref().and_then(|e| e.metadata.resource_version.clone());
        metadata
    }

    /// The same row with another life.
    pub(super) fn with_life(&self, life: Life) -> Result<EntrySpec> {
        let mut spec = self.entry.as_ref().ok_or(StoreError::NotFound)?.spec.clone();
        let row = spec.row.as_mut().ok_or(CORRUPT)?;
        row.life = life;
        if life == Life::Released {
            row.record = None;
        }
        Ok(spec)
    }
}

/// The row right after a claim.
pub(super) fn claimed(name: &RecordName, fence: Fence, owner: InstanceId) -> EntrySpec {
    let instance = Base64(owner.to_bytes().to_vec());
    let row = RowSpec { fence: Dec(fence.0), instance, ..RowSpec::default() };
    EntrySpec { name: name.to_string(), row: Some(row), cell: None }
}

/// The row with what the owner published.
pub(super) fn published(hold: &Hold, version: Version, record: &PeerRecord) -> EntrySpec {
    let mut spec = claimed(&hold.name, hold.fence, hold.instance);
    if let Some(row) = &mut spec.row {
        row.version = Dec(version.0);
        row.record = Some(RecordSpec::show(record));
    }
    spec
}

pub(super) fn cell_spec(name: &RecordName, version: Version, value: &[u8]) -> EntrySpec {
    let cell = CellSpec { version: Dec(version.0), value: Base64(value.to_vec()) };
    EntrySpec { name: name.to_string(), row: None, cell: Some(cell) }
}

pub(super) fn cell(spec: &EntrySpec) -> Result<Cell> {
    let cell = spec.cell.as_ref().ok_or(CORRUPT)?;
    Ok(Cell { version: Version(cell.version.0), value: cell.value.0.clone() })
}

/// The snapshot that a row is.
pub(super) fn snapshot(spec: &EntrySpec) -> Result<Snapshot> {
    let name = RecordName::parse(&spec.name).map_err(|_| CORRUPT)?;
    let row = spec.row.as_ref().ok_or(CORRUPT)?;
    let stamp = Stamp::new(Fence(row.fence.0), Version(row.version.0));
    let owner = instance(row.instance.clone())?;
    let Some(record) = &row.record else {
        return Ok(Snapshot::claimed(&name, stamp.fence, owner));
    };
    let record = record.clone().read()?;
    // The rules of a record are checked once more, and its bytes are those of its writer.
    let encoded = record.encode()?;
    let mut snapshot = Snapshot::decode(&name, stamp, Identity::Instance(owner), encoded)?;
    snapshot.identity = snapshot.record.identity;
    Ok(snapshot)
}
