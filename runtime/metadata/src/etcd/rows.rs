//! What etcd holds for us, under which keys, and how it is asked for.
//!
//! | key | value | its own numbers |
//! |---|---|---|
//! | `ibex/n/NAME#owner` | instance, lease | the revision of its last change is the **fence** |
//! | `ibex/n/NAME#life` | empty, or "released" and the fence | goes with the owner's lease; changed at the fence |
//! | `ibex/n/NAME#record` | fence, instance, record | its version is the **version** |
//! | `ibex/n/NAME#cell` | the cell | its version is the cell's |
//! | `ibex/held/NAME` | empty | names that somebody owns, alive or not |
//! | `ibex/cells/NAME` | empty | names of cells |
//! | `ibex/r/NAME#READER` | fence, version | goes with the reader's lease |
//! | `ibex/up` | empty | goes with a lease so long that its age tells for how long leases were counted |
//!
//! `#` sorts before every character of a name, so that keys sort as names do.
//!
//! INVARIANT: at most one key of one name that a watch reports changes per revision.

use crate::error::{Corruption, Result, StoreError};
use crate::ids::{Fence, InstanceId, LeaseId, Stamp, Version};
use crate::name::{Prefix, RecordName};
use crate::record::Identity;
use crate::store::{Cell, Hold, Snapshot};

use super::generated as pb;

pub(super) const CORRUPT: StoreError = StoreError::Corrupt(Corruption::Row);

const NAMES: &str = "ibex/n/";
pub(super) const HELD: &str = "ibex/held/";
pub(super) const CELLS: &str = "ibex/cells/";
const READERS: &str = "ibex/r/";
pub(super) const UP: &str = "ibex/up";
/// What `life` says after the owner gave the name back; the fence follows.
const RELEASED: &[u8] = b"released ";

/// One of the keys under a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Owner,
    Life,
    Record,
    Cell,
}

impl Part {
    const ALL: [(Self, &'static str); 4] =
        [(Self::Owner, "owner"), (Self::Life, "life"), (Self::Record, "record"), (Self::Cell, "cell")];

    pub(super) fn key(self, name: &RecordName) -> Vec<u8> {
        let part = Self::ALL.iter().find(|(part, _)| *part == self).map_or("", |(_, text)| text);
        format!("{NAMES}{name}#{part}").into()
    }

    /// The name and the part that a key spells; `None` for a key that is not ours.
    pub(super) fn parse(key: &[u8]) -> Option<(RecordName, Self)> {
        let (name, part) = std::str::from_utf8(key).ok()?.strip_prefix(NAMES)?.split_once('#')?;
        let (part, _) = Self::ALL.iter().find(|(_, text)| *text == part)?;
        Some((RecordName::parse(name).ok()?, *part))
    }
}

/// All keys of one name, in a range.
pub(super) fn of_name(name: &RecordName) -> pb::RangeRequest {
    range(format!("{NAMES}{name}#"), format!("{NAMES}{name}$"))
}

/// The keys under a prefix in one of the families.
fn under(family: &str, prefix: &Prefix) -> (String, String) {
    let at = prefix.as_str();
    match at.bytes().filter(|&byte| byte == b'/').count() {
        0 if at.is_empty() => (family.to_owned(), format!("{}0", family.trim_end_matches('/'))),
        0 | 1 => (format!("{family}{at}/"), format!("{family}{at}0")),
        // A whole name: in `held` its key ends here, elsewhere `#` follows.
        _ => (format!("{family}{at}"), format!("{family}{at}$")),
    }
}

/// The range that a watch of a prefix follows.
pub(super) fn watched(prefix: &Prefix) -> (Vec<u8>, Vec<u8>) {
    let (from, to) = under(NAMES, prefix);
    (from.into(), to.into())
}

/// Names that somebody owns, in order, from after one of them.
pub(super) fn held(prefix: &Prefix, after: Option<&RecordName>, limit: i64) -> pb::RangeRequest {
    let (from, to) = under(HELD, prefix);
    // The smallest key above a key ends in one more zero byte.
    let after = after.map(|name| format!("{HELD}{name}\0")).filter(|after| *after > from);
    pb::RangeRequest { limit, keys_only: true, ..range(after.unwrap_or(from), to) }
}

/// How many keys a family has.
pub(super) fn count(family: &str) -> pb::RangeRequest {
    let (from, to) = under(family, &Prefix::all());
    pb::RangeRequest { count_only: true, ..range(from, to) }
}

/// The readers of a name.
pub(super) fn readers(name: &RecordName) -> pb::RangeRequest {
    range(format!("{READERS}{name}#"), format!("{READERS}{name}$"))
}

pub(super) fn one(key: impl Into<Vec<u8>>) -> pb::RangeRequest {
    pb::RangeRequest { key: key.into(), ..pb::RangeRequest::default() }
}

fn range(from: String, to: String) -> pb::RangeRequest {
    pb::RangeRequest { key: from.into(), range_end: to.into(), ..pb::RangeRequest::default() }
}

pub(super) fn index_key(family: &str, name: &RecordName) -> Vec<u8> {
    format!("{family}{name}").into()
}

pub(super) fn reader_key(name: &RecordName, reader: InstanceId) -> Vec<u8> {
    format!("{READERS}{name}#{reader}").into()
}

/// The reader that a key spells.
pub(super) fn reader_of(key: &[u8]) -> Result<InstanceId> {
    let hex = std::str::from_utf8(key).ok().and_then(|key| key.rsplit_once('#'));
    let bits = hex.and_then(|(_, hex)| u128::from_str_radix(hex, 16).ok());
    bits.and_then(InstanceId::new).ok_or(CORRUPT)
}

/// A number of etcd, which counts with a sign, as one of ours.
pub(super) fn unsigned(number: i64) -> Result<u64> {
    u64::try_from(number).map_err(|_| CORRUPT)
}

/// One of our numbers for etcd to compare with; what etcd cannot count to becomes what it never reaches.
pub(super) fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

pub(super) fn owner_value(instance: InstanceId, lease: LeaseId) -> Vec<u8> {
    [&instance.to_bytes()[..], &lease.0.to_be_bytes()].concat()
}

pub(super) fn record_value(hold: &Hold, encoded: &[u8]) -> Vec<u8> {
    [&hold.fence.0.to_be_bytes()[..], &hold.instance.to_bytes(), encoded].concat()
}

pub(super) fn released_value(fence: Fence) -> Vec<u8> {
    [RELEASED, fence.to_string().as_bytes()].concat()
}

/// The fence under which `life` says that a name was given back.
pub(super) fn released_fence(value: &[u8]) -> Option<Fence> {
    let number = value.strip_prefix(RELEASED)?;
    std::str::from_utf8(number).ok()?.parse().ok().map(Fence)
}

pub(super) fn stamp_value(stamp: Stamp) -> Vec<u8> {
    [stamp.fence.0.to_be_bytes(), stamp.version.0.to_be_bytes()].concat()
}

pub(super) fn stamp_of(value: &[u8]) -> Result<Stamp> {
    let (fence, version) = value.split_first_chunk().ok_or(CORRUPT)?;
    let version = version.try_into().map_err(|_| CORRUPT)?;
    Ok(Stamp::new(Fence(u64::from_be_bytes(*fence)), Version(u64::from_be_bytes(version))))
}

/// Who owns a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Owner {
    pub(super) fence: Fence,
    pub(super) instance: InstanceId,
    pub(super) lease: LeaseId,
}

impl Owner {
    pub(super) fn parse(kv: &pb::KeyValue) -> Result<Self> {
        let (instance, lease) = kv.value.split_first_chunk().ok_or(CORRUPT)?;
        let instance = InstanceId::from_bytes(*instance).ok_or(CORRUPT)?;
        let lease = LeaseId(u64::from_be_bytes(lease.try_into().map_err(|_| CORRUPT)?));
        Ok(Self { fence: Fence(unsigned(kv.mod_revision)?), instance, lease })
    }
}

/// The snapshot that a published record is.
pub(super) fn published(name: &RecordName, kv: &pb::KeyValue) -> Result<Snapshot> {
    let (fence, rest) = kv.value.split_first_chunk().ok_or(CORRUPT)?;
    let (instance, encoded) = rest.split_first_chunk().ok_or(CORRUPT)?;
    let instance = InstanceId::from_bytes(*instance).ok_or(CORRUPT)?;
    let stamp = Stamp::new(Fence(u64::from_be_bytes(*fence)), Version(unsigned(kv.version)?));
    let owner = Identity::Instance(instance);
    let mut snapshot = Snapshot::decode(name, stamp, owner, encoded.to_vec())?;
    snapshot.identity = snapshot.record.identity;
    Ok(snapshot)
}

/// Whether the owner of a name is there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    Alive,
    Expired,
    Released,
}

/// All that is kept under one name, as of one moment.
#[derive(Debug, Default)]
pub(super) struct Row {
    owner: Option<Owner>,
    life: Option<pb::KeyValue>,
    record: Option<pb::KeyValue>,
    cell: Option<pb::KeyValue>,
}

impl Row {
    pub(super) fn parse(range: pb::RangeResponse) -> Result<Self> {
        let mut row = Self::default();
        for kv in range.kvs {
            match Part::parse(&kv.key).ok_or(CORRUPT)?.1 {
                Part::Owner => row.owner = Some(Owner::parse(&kv)?),
                Part::Life => row.life = Some(kv),
                Part::Record => row.record = Some(kv),
                Part::Cell => row.cell = Some(kv),
            }
        }
        Ok(row)
    }

    /// Who owns the name, or did last.
    pub(super) fn owner(&self) -> Result<&Owner> {
        self.owner.as_ref().ok_or(StoreError::NotFound)
    }

    /// The revisions of owner and life, 0 for none: what a claim must find unchanged.
    pub(super) fn seen(&self) -> (i64, i64) {
        let owner = self.owner.as_ref().map_or(0, |owner| signed(owner.fence.0));
        (owner, self.life.as_ref().map_or(0, |life| life.mod_revision))
    }

    pub(super) fn life(&self) -> Life {
        match &self.life {
            None => Life::Expired,
            Some(life) if released_fence(&life.value).is_some() => Life::Released,
            Some(_) => Life::Alive,
        }
    }

    pub(super) fn stamp(&self) -> Result<Stamp> {
        let version = self.record.as_ref().map_or(Ok(0), |record| unsigned(record.version))?;
        Ok(Stamp::new(self.owner()?.fence, Version(version)))
    }

    /// Refuses a hold that is not the present one, or not alive; the fence decides first.
    pub(super) fn check_hold(&self, hold: &Hold) -> Result<()> {
        let owner = self.owner()?;
        let fence = owner.fence;
        if hold.fence != fence {
            return Err(StoreError::Fenced { current: fence });
        }
        let is_same = hold.lease == owner.lease && hold.instance == owner.instance;
        if is_same && self.life() == Life::Alive { Ok(()) } else { Err(StoreError::LeaseExpired { fence }) }
    }

    pub(super) fn snapshot(&self, name: &RecordName) -> Result<Snapshot> {
        match &self.record {
            Some(kv) => published(name, kv),
            None => {
                let owner = self.owner()?;
                Ok(Snapshot::claimed(name, owner.fence, owner.instance))
            }
        }
    }

    pub(super) fn cell(&self) -> Result<Cell> {
        let kv = self.cell.as_ref().ok_or(StoreError::NotFound)?;
        Ok(Cell { version: Version(unsigned(kv.version)?), value: kv.value.clone() })
    }
}

/// Comparisons and operations of a transaction, put together one by one.
#[derive(Debug, Default)]
pub(super) struct Txn(pb::TxnRequest);

impl Txn {
    /// Reads only.
    pub(super) fn read(ranges: impl IntoIterator<Item = pb::RangeRequest>) -> pb::TxnRequest {
        let ops = ranges.into_iter().map(|range| op(pb::request_op::Request::Range(range)));
        pb::TxnRequest { success: ops.collect(), ..pb::TxnRequest::default() }
    }

    /// If the key was changed last at this revision; 0: if there is none.
    pub(super) fn if_changed_at(mut self, key: Vec<u8>, revision: i64) -> Self {
        let union = pb::compare::TargetUnion::ModRevision(revision);
        self.0.compare.push(compare(key, pb::compare::Target::Mod, union));
        self
    }

    /// If the key has this version; 0: if there is none.
    pub(super) fn if_version(mut self, key: Vec<u8>, version: i64) -> Self {
        let union = pb::compare::TargetUnion::Version(version);
        self.0.compare.push(compare(key, pb::compare::Target::Version, union));
        self
    }

    /// If a hold is the present one, and alive.
    pub(super) fn if_held(mut self, hold: &Hold) -> Self {
        let owner = Part::Owner.key(&hold.name);
        let value = pb::compare::TargetUnion::Value(owner_value(hold.instance, hold.lease));
        self.0.compare.push(compare(owner.clone(), pb::compare::Target::Value, value));
        let fence = signed(hold.fence.0);
        self.if_changed_at(owner, fence).if_changed_at(Part::Life.key(&hold.name), fence)
    }

    pub(super) fn put(mut self, key: Vec<u8>, value: Vec<u8>, lease: i64) -> Self {
        self.0.success.push(op(pb::request_op::Request::Put(pb::PutRequest { key, value, lease })));
        self
    }

    pub(super) fn delete(mut self, key: Vec<u8>) -> Self {
        self.0.success.push(op(pb::request_op::Request::DeleteRange(pb::DeleteRangeRequest { key })));
        self
    }

    /// What to look at if the comparisons do not hold: the reason is found in it.
    pub(super) fn or_read(mut self, range: pb::RangeRequest) -> pb::TxnRequest {
        self.0.failure.push(op(pb::request_op::Request::Range(range)));
        self.0
    }
}

fn op(request: pb::request_op::Request) -> pb::RequestOp {
    pb::RequestOp { request: Some(request) }
}

fn compare(key: Vec<u8>, target: pb::compare::Target, union: pb::compare::TargetUnion) -> pb::Compare {
    let result = pb::compare::Result::Equal.into();
    pb::Compare { result, target: target.into(), key, target_union: Some(union) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> RecordName {
        RecordName::parse(text).unwrap()
    }

    #[test]
    fn keys_are_read_back_and_sort_as_names_do() {
        let names = ["a/b/c", "a/b/c-1", "a/b/c.1", "a/b/c0", "a/b/cc", "a/b-c/d"].map(name);
        for (part, _) in Part::ALL {
            for name in &names {
                assert_eq!(Part::parse(&part.key(name)), Some((name.clone(), part)));
            }
            let mut keys: Vec<_> = names.iter().map(|name| part.key(name)).collect();
            keys.sort();
            let mut sorted = names.to_vec();
            sorted.sort();
            let back: Vec<_> = keys.iter().map(|key| Part::parse(key).unwrap().0).collect();
            assert_eq!(back, sorted);
        }
        assert_eq!(Part::parse(b"ibex/n/a/b/c#colour"), None);
        assert_eq!(Part::parse(b"other/n/a/b/c#life"), None);
    }

    #[test]
    fn ranges_hold_what_a_prefix_covers_and_nothing_else() {
        let names = ["a/b/c", "a/b/c-1", "a/b/cc", "a/bc/d", "a-b/c/d", "ab/c/d", "b/a/a"].map(name);
        for prefix in ["", "a", "a/b", "a/b/c", "a/bc", "z"] {
            let prefix = Prefix::parse(prefix).unwrap();
            let (from, to) = watched(&prefix);
            let held = held(&prefix, None, 0);
            for name in &names {
                let key = Part::Life.key(name);
                assert_eq!(from <= key && key < to, prefix.covers(name), "{prefix:?} {name}");
                let key = index_key(HELD, name);
                assert_eq!(held.key <= key && key < held.range_end, prefix.covers(name), "{prefix:?} {name}");
            }
        }
        let after = held(&Prefix::parse("a/b").unwrap(), Some(&name("a/b/c")), 1);
        assert!(after.key > index_key(HELD, &name("a/b/c")));
        assert!(after.key < index_key(HELD, &name("a/b/c-1")));
    }

    #[test]
    fn values_are_read_back_and_damaged_ones_are_refused() {
        let instance = InstanceId::new(7).unwrap();
        let kv = |value| pb::KeyValue { value, mod_revision: 5, version: 3, ..pb::KeyValue::default() };
        let owner = Owner { fence: Fence(5), instance, lease: LeaseId(1 << 62) };
        assert_eq!(Owner::parse(&kv(owner_value(instance, owner.lease))), Ok(owner));
        let stamp = Stamp::new(Fence(u64::MAX), Version(1));
        assert_eq!(stamp_of(&stamp_value(stamp)), Ok(stamp));
        assert_eq!(released_fence(&released_value(Fence(9))), Some(Fence(9)));
        assert_eq!(released_fence(b""), None);
        for damaged in [vec![], vec![0; 24], vec![1; 23]] {
            assert_eq!(Owner::parse(&kv(damaged.clone())), Err(CORRUPT));
            assert_eq!(published(&name("a/b/c"), &kv(damaged)), Err(CORRUPT));
        }
        assert_eq!(stamp_of(&[0; 15]), Err(CORRUPT));
    }
}
