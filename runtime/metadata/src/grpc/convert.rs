//! Between the messages of `proto/store.proto` and the values of [`crate::store`]: one place, both ways.

use core::time::Duration;
use std::sync::Arc;

use prost::Message as _;
use tonic::{Code, Status};

use super::generated as pb;
use crate::channel::RETRY;
use crate::error::{
    Bounded, Corruption, DecodeError, Feature, InputError, Part, Problem, Result, StoreError,
};
use crate::ids::{Fence, InstanceId, LeaseId, Revision, Stamp, Version};
use crate::limits::MESSAGE_LEN_MAX;
use crate::name::RecordName;
use crate::record::Identity;
use crate::store::{Ack, Cell, Change, Claim, Event, Health, Hold, Listed, Page, ReaderState, Snapshot};

/// Bytes of ours that are not what they should be.
const CORRUPT: StoreError = StoreError::Corrupt(Corruption::Row);

pub(super) fn name(text: &str) -> Result<RecordName> {
    Ok(RecordName::parse(text)?)
}

pub(super) fn instance(bytes: &[u8]) -> Result<InstanceId> {
    let id = bytes.try_into().ok().and_then(InstanceId::from_bytes);
    let refusal = || InputError::new("instance_id", &format!("{} bytes", bytes.len()), "16 bytes, not all 0");
    id.ok_or_else(|| refusal().into())
}

/// Nanoseconds, saturated; a lease never becomes longer by it.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Milliseconds, rounded up: 0 stays the only length that is 0.
fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}

impl From<&Claim> for pb::ClaimRequest {
    fn from(claim: &Claim) -> Self {
        Self {
            name: claim.name.to_string(),
            instance_id: claim.instance.to_bytes().to_vec(),
            ttl_ms: millis(claim.ttl),
            takeover: claim.takeover,
        }
    }
}

impl TryFrom<pb::ClaimRequest> for Claim {
    type Error = StoreError;

    fn try_from(claim: pb::ClaimRequest) -> Result<Self> {
        Ok(Self {
            name: name(&claim.name)?,
            instance: instance(&claim.instance_id)?,
            ttl: Duration::from_millis(claim.ttl_ms),
            takeover: claim.takeover,
        })
    }
}

impl From<&Hold> for pb::Hold {
    fn from(hold: &Hold) -> Self {
        Self {
            name: hold.name.to_string(),
            instance_id: hold.instance.to_bytes().to_vec(),
            fence: hold.fence.0,
            lease: hold.lease.0,
            ttl_ms: millis(hold.ttl),
        }
    }
}

impl TryFrom<pb::Hold> for Hold {
    type Error = StoreError;

    fn try_from(hold: pb::Hold) -> Result<Self> {
        Ok(Self {
            name: name(&hold.name)?,
            instance: instance(&hold.instance_id)?,
            fence: Fence(hold.fence),
            lease: LeaseId(hold.lease),
            ttl: Duration::from_millis(hold.ttl_ms),
        })
    }
}

impl From<&Ack> for pb::AckRequest {
    fn from(ack: &Ack) -> Self {
        Self {
            name: ack.name.to_string(),
            reader: ack.reader.to_bytes().to_vec(),
            fence: ack.stamp.fence.0,
            version: ack.stamp.version.0,
            ttl_ms: millis(ack.ttl),
        }
    }
}

impl TryFrom<pb::AckRequest> for Ack {
    type Error = StoreError;

    fn try_from(ack: pb::AckRequest) -> Result<Self> {
        Ok(Self {
            name: name(&ack.name)?,
            reader: instance(&ack.reader)?,
            stamp: Stamp::new(Fence(ack.fence), Version(ack.version)),
            ttl: Duration::from_millis(ack.ttl_ms),
        })
    }
}

impl From<&Snapshot> for pb::Snapshot {
    fn from(snapshot: &Snapshot) -> Self {
        let instance_id = match snapshot.identity {
            Identity::Instance(id) => id.to_bytes().to_vec(),
            Identity::Legacy => Vec::new(),
        };
        Self {
            name: snapshot.name.to_string(),
            fence: snapshot.stamp.fence.0,
            version: snapshot.stamp.version.0,
            instance_id,
            record: snapshot.encoded.clone(),
        }
    }
}

impl TryFrom<pb::Snapshot> for Snapshot {
    type Error = StoreError;

    fn try_from(snapshot: pb::Snapshot) -> Result<Self> {
        let identity = match snapshot.instance_id.as_slice() {
            [] => Identity::Legacy,
            bytes => Identity::Instance(instance(bytes)?),
        };
        let stamp = Stamp::new(Fence(snapshot.fence), Version(snapshot.version));
        Self::decode(&name(&snapshot.name)?, stamp, identity, snapshot.record)
    }
}

/// A snapshot that a reply must carry.
pub(super) fn snapshot(snapshot: Option<pb::Snapshot>) -> Result<Arc<Snapshot>> {
    snapshot.ok_or(CORRUPT)?.try_into().map(Arc::new)
}

pub(super) fn outcome(outcome: Result<(Arc<Snapshot>, Duration)>) -> pb::Outcome {
    use pb::outcome::Outcome;
    let outcome = match outcome {
        Ok((snapshot, remaining)) => Outcome::Leased(pb::Leased {
            snapshot: Some(snapshot.as_ref().into()),
            remaining_ns: nanos(remaining),
        }),
        Err(error) => Outcome::Error((&error).into()),
    };
    pb::Outcome { outcome: Some(outcome) }
}

pub(super) fn from_outcome(outcome: pb::Outcome) -> Result<(Arc<Snapshot>, Duration)> {
    use pb::outcome::Outcome;
    match outcome.outcome.ok_or(CORRUPT)? {
        Outcome::Leased(leased) => {
            Ok((snapshot(leased.snapshot)?, Duration::from_nanos(leased.remaining_ns)))
        }
        Outcome::Error(error) => Err(error.into()),
    }
}

impl From<Page> for pb::ListReply {
    fn from(page: Page) -> Self {
        let entry = |listed: Listed| pb::Listed {
            snapshot: Some(listed.snapshot.as_ref().into()),
            remaining_ns: listed.remaining.map(nanos),
        };
        Self {
            entries: page.entries.into_iter().map(entry).collect(),
            next: page.next.map(|name| name.to_string()).unwrap_or_default(),
            revision: page.revision.0,
        }
    }
}

impl TryFrom<pb::ListReply> for Page {
    type Error = StoreError;

    fn try_from(page: pb::ListReply) -> Result<Self> {
        let entry = |listed: pb::Listed| {
            let remaining = listed.remaining_ns.map(Duration::from_nanos);
            Ok(Listed { snapshot: snapshot(listed.snapshot)?, remaining })
        };
        let next = if page.next.is_empty() { None } else { Some(name(&page.next)?) };
        let entries = page.entries.into_iter().map(entry).collect::<Result<_>>()?;
        Ok(Self { entries, next, revision: Revision(page.revision) })
    }
}

impl From<Event> for pb::Event {
    fn from(event: Event) -> Self {
        use pb::event::Change as Wire;
        let fenced =
            |name: RecordName, fence: Fence| pb::NameFence { name: name.to_string(), fence: fence.0 };
        let change = match event.change {
            Change::Put(snapshot) => Wire::Put(snapshot.as_ref().into()),
            Change::Expired { name, fence } => Wire::Expired(fenced(name, fence)),
            Change::Released { name, fence } => Wire::Released(fenced(name, fence)),
            Change::Cell { name, version } => {
                Wire::Cell(pb::NameVersion { name: name.to_string(), version: version.0 })
            }
            Change::Gap => Wire::Gap(pb::Done {}),
        };
        Self { revision: event.revision.0, change: Some(change) }
    }
}

impl TryFrom<pb::Event> for Event {
    type Error = StoreError;

    fn try_from(event: pb::Event) -> Result<Self> {
        use pb::event::Change as Wire;
        let change = match event.change.ok_or(CORRUPT)? {
            Wire::Put(put) => Change::Put(snapshot(Some(put))?),
            Wire::Expired(it) => Change::Expired { name: name(&it.name)?, fence: Fence(it.fence) },
            Wire::Released(it) => Change::Released { name: name(&it.name)?, fence: Fence(it.fence) },
            Wire::Cell(it) => Change::Cell { name: name(&it.name)?, version: Version(it.version) },
            Wire::Gap(_) => Change::Gap,
        };
        Ok(Self { revision: Revision(event.revision), change })
    }
}

impl From<ReaderState> for pb::Reader {
    fn from(reader: ReaderState) -> Self {
        Self {
            reader: reader.reader.to_bytes().to_vec(),
            fence: reader.stamp.fence.0,
            version: reader.stamp.version.0,
            remaining_ns: nanos(reader.remaining),
        }
    }
}

impl TryFrom<pb::Reader> for ReaderState {
    type Error = StoreError;

    fn try_from(reader: pb::Reader) -> Result<Self> {
        Ok(Self {
            reader: instance(&reader.reader)?,
            stamp: Stamp::new(Fence(reader.fence), Version(reader.version)),
            remaining: Duration::from_nanos(reader.remaining_ns),
        })
    }
}

impl From<Cell> for pb::Cell {
    fn from(cell: Cell) -> Self {
        Self { version: cell.version.0, value: cell.value }
    }
}

impl From<pb::Cell> for Cell {
    fn from(cell: pb::Cell) -> Self {
        Self { version: Version(cell.version), value: cell.value }
    }
}

impl From<Health> for pb::HealthReply {
    fn from(health: Health) -> Self {
        Self { up_for_ns: nanos(health.up_for), revision: health.revision.0, num_names: health.num_names }
    }
}

impl From<pb::HealthReply> for Health {
    fn from(health: pb::HealthReply) -> Self {
        Self {
            up_for: Duration::from_nanos(health.up_for_ns),
            revision: Revision(health.revision),
            num_names: health.num_names,
        }
    }
}

impl From<&StoreError> for pb::Error {
    fn from(error: &StoreError) -> Self {
        use pb::error::Error as Wire;
        let done = pb::Done {};
        let error = match error {
            StoreError::NotFound => Wire::NotFound(done),
            StoreError::Held { fence, remaining } => {
                Wire::Held(pb::HeldError { fence: fence.0, remaining_ns: nanos(*remaining) })
            }
            StoreError::Fenced { current } => Wire::Fenced(current.0),
            StoreError::Conflict { current } => Wire::Conflict(current.0),
            StoreError::LeaseExpired { fence } => Wire::LeaseExpired(fence.0),
            StoreError::Unavailable { retry_after } => Wire::UnavailableNs(nanos(*retry_after)),
            StoreError::Corrupt(Corruption::Record(error)) => Wire::CorruptRecord((*error).into()),
            StoreError::Corrupt(Corruption::BatchLength { asked, got }) => {
                Wire::BatchLength(pb::BatchLengthError { asked: *asked, got: *got })
            }
            StoreError::Corrupt(Corruption::Row) => Wire::CorruptRow(done),
            StoreError::TooLarge { what, len, limit } => {
                Wire::TooLarge(pb::TooLargeError { what: what.code(), len: *len, limit: *limit })
            }
            StoreError::Unsupported(feature) => Wire::Unsupported(feature.code()),
            StoreError::Deadline { budget } => Wire::DeadlineNs(nanos(*budget)),
            StoreError::Unauthenticated => Wire::Unauthenticated(done),
            StoreError::Input(input) => Wire::Input(pb::InputError {
                field: input.field.to_string(),
                value: input.value.to_string(),
                limit: input.limit.to_string(),
            }),
        };
        Self { error: Some(error) }
    }
}

impl From<pb::Error> for StoreError {
    fn from(error: pb::Error) -> Self {
        use pb::error::Error as Wire;
        let Some(error) = error.error else { return CORRUPT };
        match error {
            Wire::NotFound(_) => Self::NotFound,
            Wire::Held(held) => {
                Self::Held { fence: Fence(held.fence), remaining: Duration::from_nanos(held.remaining_ns) }
            }
            Wire::Fenced(current) => Self::Fenced { current: Fence(current) },
            Wire::Conflict(current) => Self::Conflict { current: Version(current) },
            Wire::LeaseExpired(fence) => Self::LeaseExpired { fence: Fence(fence) },
            Wire::UnavailableNs(ns) => Self::Unavailable { retry_after: Duration::from_nanos(ns) },
            Wire::CorruptRecord(error) => {
                DecodeError::try_from(error).map_or(CORRUPT, |error| Self::Corrupt(Corruption::Record(error)))
            }
            Wire::BatchLength(error) => {
                Self::Corrupt(Corruption::BatchLength { asked: error.asked, got: error.got })
            }
            Wire::CorruptRow(_) => CORRUPT,
            Wire::TooLarge(error) => match Bounded::from_code(error.what) {
                Some(what) => Self::TooLarge { what, len: error.len, limit: error.limit },
                None => CORRUPT,
            },
            Wire::Unsupported(code) => Feature::from_code(code).map_or(CORRUPT, Self::Unsupported),
            Wire::DeadlineNs(ns) => Self::Deadline { budget: Duration::from_nanos(ns) },
            Wire::Unauthenticated(_) => Self::Unauthenticated,
            Wire::Input(input) => Self::Input(InputError {
                field: input.field.into(),
                value: input.value.into(),
                limit: input.limit.into(),
            }),
        }
    }
}

impl From<DecodeError> for pb::RecordError {
    fn from(error: DecodeError) -> Self {
        let (problem, first, second) = match error.problem {
            Problem::Truncated => (1, 0, 0),
            Problem::Varint => (2, 0, 0),
            Problem::WireType { found } => (3, found.into(), 0),
            Problem::FieldNumber => (4, 0, 0),
            Problem::Utf8 => (5, 0, 0),
            Problem::Length { found, expected } => (6, found, expected),
            Problem::Range { value, max } => (7, value, max),
            Problem::TooMany { count, max } => (8, count, max),
            Problem::Missing => (9, 0, 0),
            Problem::Duplicate => (10, 0, 0),
            Problem::Empty => (11, 0, 0),
            Problem::Overflow => (12, 0, 0),
            Problem::Overlap => (13, 0, 0),
            Problem::Keys { keys, devices } => (14, keys, devices),
            Problem::Schema { needed, known } => (15, needed, known),
            Problem::Mismatch => (16, 0, 0),
        };
        Self { part: error.part.code(), field: error.field, problem, first, second }
    }
}

impl TryFrom<pb::RecordError> for DecodeError {
    type Error = StoreError;

    fn try_from(error: pb::RecordError) -> Result<Self> {
        let (first, second) = (error.first, error.second);
        let problem = match error.problem {
            1 => Problem::Truncated,
            2 => Problem::Varint,
            3 => Problem::WireType { found: u32::try_from(first).map_err(|_| CORRUPT)? },
            4 => Problem::FieldNumber,
            5 => Problem::Utf8,
            6 => Problem::Length { found: first, expected: second },
            7 => Problem::Range { value: first, max: second },
            8 => Problem::TooMany { count: first, max: second },
            9 => Problem::Missing,
            10 => Problem::Duplicate,
            11 => Problem::Empty,
            12 => Problem::Overflow,
            13 => Problem::Overlap,
            14 => Problem::Keys { keys: first, devices: second },
            15 => Problem::Schema { needed: first, known: second },
            16 => Problem::Mismatch,
            _ => return Err(CORRUPT),
        };
        let part = Part::from_code(error.part).ok_or(CORRUPT)?;
        Ok(Self { part, field: error.field, problem })
    }
}

/// An error as a gRPC status: a code for anybody, the details for our own client.
pub(super) fn status(error: &StoreError) -> Status {
    let code = match error {
        StoreError::NotFound => Code::NotFound,
        StoreError::Held { .. } | StoreError::Conflict { .. } => Code::Aborted,
        StoreError::Fenced { .. } | StoreError::LeaseExpired { .. } => Code::FailedPrecondition,
        StoreError::Unavailable { .. } => Code::Unavailable,
        StoreError::Corrupt(_) => Code::DataLoss,
        StoreError::TooLarge { .. } => Code::ResourceExhausted,
        StoreError::Unsupported(_) => Code::Unimplemented,
        StoreError::Deadline { .. } => Code::DeadlineExceeded,
        StoreError::Unauthenticated => Code::Unauthenticated,
        StoreError::Input(_) => Code::InvalidArgument,
    };
    let details = pb::Error::from(error).encode_to_vec();
    Status::with_details(code, error.to_string(), details.into())
}

/// The error of a status: from its details if our server made it, from its code if the transport, or
/// something in between, did.
pub(super) fn from_status(status: &Status, budget: Duration) -> StoreError {
    if !status.details().is_empty()
        && let Ok(error) = pb::Error::decode(status.details())
    {
        return error.into();
    }
    match status.code() {
        Code::NotFound => StoreError::NotFound,
        Code::DeadlineExceeded => StoreError::Deadline { budget },
        Code::Unauthenticated | Code::PermissionDenied => StoreError::Unauthenticated,
        Code::Unimplemented => StoreError::Unsupported(Feature::Operation),
        Code::OutOfRange | Code::ResourceExhausted => {
            let limit = MESSAGE_LEN_MAX as u64;
            StoreError::TooLarge { what: Bounded::Message, len: limit + 1, limit }
        }
        Code::DataLoss | Code::InvalidArgument => CORRUPT,
        _ => StoreError::Unavailable { retry_after: RETRY },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every error that there is, with numbers that would show a swap.
    fn every_error() -> Vec<StoreError> {
        let ns = Duration::from_nanos;
        let problems = [
            Problem::Truncated,
            Problem::Varint,
            Problem::WireType { found: 3 },
            Problem::FieldNumber,
            Problem::Utf8,
            Problem::Length { found: 1, expected: 2 },
            Problem::Range { value: u64::MAX, max: 2 },
            Problem::TooMany { count: 1, max: 2 },
            Problem::Missing,
            Problem::Duplicate,
            Problem::Empty,
            Problem::Overflow,
            Problem::Overlap,
            Problem::Keys { keys: 1, devices: 2 },
            Problem::Schema { needed: 3, known: 2 },
            Problem::Mismatch,
        ];
        let record = |(problem, &part)| {
            StoreError::Corrupt(Corruption::Record(DecodeError { part, field: 7, problem }))
        };
        let mut errors: Vec<_> = problems.into_iter().zip(Part::ALL.iter().cycle()).map(record).collect();
        errors.extend(Bounded::ALL.iter().map(|&what| StoreError::TooLarge {
            what,
            len: u64::MAX,
            limit: 1,
        }));
        errors.extend(Feature::ALL.iter().map(|&feature| StoreError::Unsupported(feature)));
        errors.extend([
            StoreError::NotFound,
            StoreError::Held { fence: Fence(u64::MAX), remaining: ns(5) },
            StoreError::Fenced { current: Fence(u64::MAX) },
            StoreError::Conflict { current: Version(u64::MAX) },
            StoreError::LeaseExpired { fence: Fence(0) },
            StoreError::Unavailable { retry_after: ns(9) },
            StoreError::Corrupt(Corruption::BatchLength { asked: 2, got: 1 }),
            CORRUPT,
            StoreError::Deadline { budget: ns(11) },
            StoreError::Unauthenticated,
            InputError::new("ttl", "0 ms", "longer").into(),
        ]);
        errors
    }

    #[test]
    fn every_error_crosses_the_wire_unchanged() {
        for error in every_error() {
            assert_eq!(from_status(&status(&error), Duration::ZERO), error);
        }
    }

    #[test]
    fn errors_of_the_transport_are_outages_never_absence() {
        let budget = Duration::from_secs(1);
        let error = |code| from_status(&Status::new(code, "x"), budget);
        for code in [Code::Unknown, Code::Internal, Code::Cancelled, Code::Unavailable, Code::Ok] {
            assert!(matches!(error(code), StoreError::Unavailable { .. }), "{code}");
        }
        assert_eq!(error(Code::DeadlineExceeded), StoreError::Deadline { budget });
        assert!(matches!(error(Code::OutOfRange), StoreError::TooLarge { what: Bounded::Message, .. }));
        let garbage = Status::with_details(Code::Aborted, "x", vec![0xff; 9].into());
        assert!(matches!(from_status(&garbage, budget), StoreError::Unavailable { .. }));
    }
}
