//! What changes of a record retire: each row of the change table, and random changes against a plain model.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::collections::BTreeMap;
use std::sync::Arc;

use ibex_metadata::change::Verdict;
use ibex_metadata::derived::{DeriveError, Kind, Part, Registry};
use ibex_metadata::ids::{BufferId, Fence, InstanceId, Stamp, Version};
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{
    Buffer, BufferState, Device, EpIbgda, Identity, PeerRecord, PortAddress, Tcp, Way,
};
use ibex_metadata::segments::SegmentHandle;
use ibex_metadata::store::Snapshot;
use proptest::prelude::*;

/// Our own place in the peer's list of queue pairs.
const SLOT: u32 = 1;
const PATH: Part = Part::Path { slot: SLOT };

fn name() -> RecordName {
    RecordName::parse("c/g/peer").unwrap()
}

fn buffer(id: u64, key: u32) -> Buffer {
    let state = BufferState::Ready;
    Buffer { buffer_id: BufferId(id), addr: id << 20, len: 4096, keys: vec![key], state, ..Buffer::default() }
}

fn record(qpns: &[u32], buffers: Vec<Buffer>) -> PeerRecord {
    let gid = PortAddress::Gid([7; 16]);
    let way = EpIbgda { qpns: qpns.to_vec(), port: Some(gid), ..EpIbgda::default() };
    PeerRecord {
        devices: vec![Device::default()],
        transports: vec![Way::EpIbgda(way).into()],
        buffers,
        ..PeerRecord::empty(&name(), Identity::Legacy)
    }
}

fn snapshot(instance: u128, fence: u64, version: u64, record: &PeerRecord) -> Arc<Snapshot> {
    let identity = Identity::Instance(InstanceId::new(instance).unwrap());
    let stamp = Stamp::new(Fence(fence), Version(version));
    let record = PeerRecord { identity, ..record.clone() };
    Arc::new(Snapshot { name: name(), stamp, identity, record, encoded: Vec::new() })
}

/// A registry with one value of each kind, named after its kind.
fn stocked(first: &Arc<Snapshot>) -> (Registry<Kind>, BTreeMap<Kind, SegmentHandle>) {
    let mut registry = Registry::new(16);
    assert_eq!(registry.observe(first).verdict, None);
    let parts = [
        (Kind::QueuePair, PATH),
        (Kind::Rail, PATH),
        (Kind::GpuSlot, PATH),
        (Kind::Rkey, Part::Buffer(BufferId(1))),
        (Kind::Handle, Part::Owner),
    ];
    let derive = |(kind, part)| (kind, registry.derive(first, part, kind, kind).unwrap());
    let handles = parts.map(derive).into();
    (registry, handles)
}

#[test]
fn every_row_of_the_change_table_retires_what_it_must_and_nothing_else() {
    use Kind::{GpuSlot, Handle, QueuePair, Rail, Rkey};
    let before = record(&[4, 5, 6], vec![buffer(1, 11), buffer(2, 12)]);
    let edit = |change: fn(&mut PeerRecord)| {
        let mut after = before.clone();
        change(&mut after);
        after
    };
    let updated = |paths, buffers| Verdict::Updated { paths, buffers };
    let rows: Vec<(&str, Arc<Snapshot>, Verdict, &[Kind])> = vec![
        (
            "another instance, all else equal",
            snapshot(2, 9, 0, &before),
            Verdict::Replaced,
            &[QueuePair, Rkey, Rail, Handle, GpuSlot],
        ),
        (
            "the same instance under another fence",
            snapshot(1, 9, 3, &before),
            Verdict::Replaced,
            &[QueuePair, Rkey, Rail, Handle, GpuSlot],
        ),
        (
            "our queue pair",
            snapshot(1, 8, 4, &edit(|r| set_qpn(r, 1, 99))),
            updated(true, false),
            &[QueuePair, Rail, GpuSlot],
        ),
        (
            "a neighbour's queue pair",
            snapshot(1, 8, 4, &edit(|r| set_qpn(r, 2, 99))),
            updated(true, false),
            &[],
        ),
        (
            "a device",
            snapshot(1, 8, 4, &edit(|r| r.devices[0].lid = 3)),
            updated(true, false),
            &[QueuePair, Rail, GpuSlot],
        ),
        (
            "a new key of our buffer",
            snapshot(1, 8, 4, &edit(|r| r.buffers[0].keys = vec![99])),
            updated(false, true),
            &[Rkey],
        ),
        (
            "our buffer drains",
            snapshot(1, 8, 4, &edit(|r| r.buffers[0].state = BufferState::Draining)),
            updated(false, true),
            &[Rkey],
        ),
        (
            "our buffer is gone",
            snapshot(1, 8, 4, &edit(|r| drop(r.buffers.remove(0)))),
            updated(false, true),
            &[Rkey],
        ),
        (
            "another buffer",
            snapshot(1, 8, 4, &edit(|r| r.buffers[1].keys = vec![99])),
            updated(false, true),
            &[],
        ),
        ("a rank", snapshot(1, 8, 4, &edit(|r| r.rank = Some(3))), updated(false, false), &[]),
        ("nothing", snapshot(1, 8, 3, &before), Verdict::Same, &[]),
        ("an older snapshot", snapshot(1, 8, 2, &edit(|r| set_qpn(r, 1, 99))), Verdict::Stale, &[]),
        ("an older owner", snapshot(2, 7, 9, &before), Verdict::Stale, &[]),
        (
            "other content under the same stamp",
            snapshot(1, 8, 3, &edit(|r| r.rank = Some(3))),
            Verdict::ConcurrentPublisher,
            &[],
        ),
    ];
    for (what, seen, verdict, gone) in rows {
        let (mut registry, handles) = stocked(&snapshot(1, 8, 3, &before));
        let observed = registry.observe(&seen);
        assert_eq!(observed.verdict, Some(verdict), "{what}");
        let mut kinds: Vec<Kind> = observed.retired.iter().map(|retiree| retiree.value).collect();
        kinds.sort_unstable();
        let mut gone = gone.to_vec();
        gone.sort_unstable();
        assert_eq!(kinds, gone, "{what}");
        for (kind, handle) in handles {
            assert_eq!(registry.get(handle).is_err(), gone.contains(&kind), "{what}: {kind:?}");
            assert_eq!(registry.counters().retired.of(kind), u64::from(gone.contains(&kind)), "{what}");
        }
        let again = registry.observe(&seen);
        assert!(again.retired.is_empty(), "{what}: a second look retires nothing");
    }
}

fn set_qpn(record: &mut PeerRecord, slot: usize, qpn: u32) {
    if let Way::EpIbgda(way) = &mut record.transports[0].way {
        way.qpns[slot] = qpn;
    }
}

#[test]
fn nothing_is_made_from_a_snapshot_that_is_not_the_newest() {
    let before = record(&[4, 5], vec![buffer(1, 11)]);
    let (first, second) = (snapshot(1, 8, 3, &before), snapshot(1, 8, 4, &record(&[4, 5], vec![])));
    let mut registry = Registry::new(2);
    assert_eq!(registry.derive(&first, PATH, Kind::Rail, ()), Err((DeriveError::Unknown, ())));
    let _ = registry.observe(&first);
    let _ = registry.observe(&second);
    let outdated = DeriveError::Outdated { seen: first.stamp, known: second.stamp };
    assert_eq!(registry.derive(&first, PATH, Kind::Rail, ()), Err((outdated, ())));
    let gone = Part::Buffer(BufferId(1));
    let not_offered = DeriveError::NotOffered { stamp: second.stamp, part: gone };
    assert_eq!(registry.derive(&second, gone, Kind::Rkey, ()), Err((not_offered, ())));
    registry.derive(&second, PATH, Kind::Rail, ()).unwrap();
    registry.derive(&second, PATH, Kind::QueuePair, ()).unwrap();
    let full = DeriveError::Full { limit: 2 };
    assert_eq!(registry.derive(&second, PATH, Kind::GpuSlot, ()), Err((full, ())));
}

#[test]
fn a_second_content_under_one_stamp_changes_nothing_and_makes_nothing() {
    let first = snapshot(1, 1, 1, &record(&[7], vec![]));
    let mut registry: Registry<()> = Registry::new(8);
    let _ = registry.observe(&first);
    let other = snapshot(1, 1, 1, &record(&[8], vec![]));
    assert_eq!(registry.observe(&other).verdict, Some(Verdict::ConcurrentPublisher));
    assert!(Arc::ptr_eq(registry.known(&name()).unwrap(), &first), "the first is kept");
    // The stamp alone does not make it the newest: it is another process's.
    let stranger = snapshot(2, 1, 1, &record(&[7], vec![]));
    let refused = registry.derive(&stranger, Part::Owner, Kind::Handle, ()).unwrap_err();
    assert!(matches!(refused.0, DeriveError::Outdated { .. }), "{refused:?}");
}

#[test]
fn a_name_given_back_takes_everything_with_it_and_stays_dated() {
    let before = record(&[4, 5], vec![buffer(1, 11)]);
    let (mut registry, handles) = stocked(&snapshot(1, 8, 3, &before));
    assert_eq!(registry.end(&name()).len(), handles.len());
    assert!(registry.is_empty());
    assert_eq!(registry.observe(&snapshot(1, 8, 2, &before)).verdict, Some(Verdict::Stale));
}

#[test]
fn transports_of_other_kinds_are_part_of_the_path() {
    let mut before = record(&[4, 5], vec![]);
    before.transports.push(Way::Tcp(Tcp { host: "h".into(), port: 1, ..Tcp::default() }).into());
    let (mut registry, _) = {
        let mut registry = Registry::new(4);
        let first = snapshot(1, 8, 3, &before);
        let _ = registry.observe(&first);
        let handle = registry.derive(&first, PATH, Kind::Rail, ()).unwrap();
        (registry, handle)
    };
    before.transports.pop();
    assert_eq!(registry.observe(&snapshot(1, 8, 4, &before)).retired.len(), 1);
}

/// What happens next to the peer, or to what is known of it.
#[derive(Debug, Clone)]
enum Step {
    Restart,
    SetQpn(usize, u32),
    SetKey(usize, u32),
    Drain(usize),
    SetRank(u32),
    /// An answer from so many versions ago arrives.
    Late(usize),
    /// Something is made of the newest snapshot.
    Derive(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        1 => Just(Step::Restart),
        2 => (0..3_usize, 0..4_u32).prop_map(|(slot, qpn)| Step::SetQpn(slot, qpn)),
        2 => (0..2_usize, 0..4_u32).prop_map(|(at, key)| Step::SetKey(at, key)),
        1 => (0..2_usize).prop_map(Step::Drain),
        1 => (0..3_u32).prop_map(Step::SetRank),
        2 => (0..4_usize).prop_map(Step::Late),
        4 => (0..4_usize).prop_map(Step::Derive),
    ];
    prop::collection::vec(step, 1..60)
}

/// What a value was made of, told in full: the model compares contents where the registry compares stamps.
#[derive(Debug, Clone, PartialEq)]
struct Source {
    life: (u128, u64),
    part: Part,
    content: Option<(Vec<u32>, Option<Buffer>)>,
}

fn source(life: (u128, u64), part: Part, record: &PeerRecord) -> Source {
    let Way::EpIbgda(way) = &record.transports[0].way else { unreachable!() };
    let own = way.qpns.get(SLOT as usize).copied().into_iter().collect();
    let ready = |buffer: &&Buffer| buffer.state == BufferState::Ready;
    let content = match part {
        Part::Owner => Some((Vec::new(), None)),
        Part::Path { .. } => Some((own, None)),
        Part::Buffer(id) => {
            let found = record.buffers.iter().filter(ready).find(|buffer| buffer.buffer_id == id);
            found.map(|buffer| (Vec::new(), Some(buffer.clone())))
        }
    };
    Source { life, part, content }
}

const PARTS: [(Part, Kind); 4] = [
    (PATH, Kind::QueuePair),
    (Part::Buffer(BufferId(0)), Kind::Rkey),
    (Part::Buffer(BufferId(1)), Kind::Rkey),
    (Part::Owner, Kind::Handle),
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// After every step exactly those values are found whose source is what the newest snapshot says, and each
    /// of the others was handed out exactly once.
    #[test]
    fn random_changes_retire_each_value_once_and_no_sooner(steps in steps()) {
        let mut now = record(&[1, 2, 3], vec![buffer(0, 1), buffer(1, 2)]);
        let (mut life, mut version) = ((1, 1), 0);
        let mut history = vec![snapshot(life.0, life.1, version, &now)];
        let mut registry = Registry::new(1 << 10);
        let _ = registry.observe(&history[0]);
        let mut alive: BTreeMap<usize, (SegmentHandle, Source)> = BTreeMap::new();
        let mut made = 0;
        for step in steps {
            match step {
                Step::Restart => {
                    (life, version) = ((life.0 + 1, life.1 + 1), 0);
                    now = record(&[1, 2, 3], vec![buffer(0, 1), buffer(1, 2)]);
                }
                Step::SetQpn(slot, qpn) => set_qpn(&mut now, slot, qpn),
                Step::SetKey(at, key) => now.buffers[at].keys = vec![key],
                Step::Drain(at) => now.buffers[at].state = BufferState::Draining,
                Step::SetRank(rank) => now.rank = Some(rank),
                Step::Late(back) => {
                    let late = &history[history.len().saturating_sub(1 + back)];
                    let observed = registry.observe(late);
                    prop_assert!(observed.retired.is_empty(), "old news retires nothing");
                    continue;
                }
                Step::Derive(which) => {
                    let (part, kind) = PARTS[which];
                    let newest = history.last().unwrap();
                    let from = source(life, part, &newest.record);
                    match registry.derive(newest, part, kind, made) {
                        Ok(handle) => {
                            alive.insert(made, (handle, from));
                            made += 1;
                        }
                        Err((refusal, _)) => {
                            prop_assert_eq!(from.content, None, "{}", refusal);
                        }
                    }
                    continue;
                }
            }
            version += 1;
            history.push(snapshot(life.0, life.1, version, &now));
            let observed = registry.observe(history.last().unwrap());
            let mut gone: Vec<usize> = observed.retired.iter().map(|retiree| retiree.value).collect();
            gone.sort_unstable();
            let outdated = |(value, (_, from)): (&usize, &(SegmentHandle, Source))| {
                (source(life, from.part, &now) != *from).then_some(*value)
            };
            let expected: Vec<usize> = alive.iter().filter_map(outdated).collect();
            prop_assert_eq!(&gone, &expected);
            for value in gone {
                let (handle, _) = alive.remove(&value).unwrap();
                prop_assert!(registry.get(handle).is_err());
            }
        }
        prop_assert_eq!(registry.len(), alive.len());
        prop_assert_eq!(registry.counters().retired.total() as usize, made - alive.len());
        for (value, (handle, _)) in alive {
            prop_assert_eq!(registry.get(handle).unwrap().1, &value);
        }
    }
}
