//! Random operations on stores, beside a model that is too simple to be wrong.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{Fence, InstanceId, Version};
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{Identity, PeerRecord};
use ibex_metadata::store::{Claim, Filter, Hold, Store};
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::runtime::{Builder, Runtime};

/// Names, owners and holds are few, so that operations meet.
#[derive(Debug, Clone)]
enum Op {
    Claim { name: u8, owner: u8, ttl: u8, takeover: bool },
    Publish { hold: usize, ahead: i8, rank: u32 },
    Renew { hold: usize },
    Release { hold: usize },
    Swap { cell: u8, ahead: i8, value: u8 },
    Pass { ms: u16 },
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let ahead = || prop_oneof![6 => Just(0i8), 1 => -1i8..=1];
    prop_oneof![
        4 => (0u8..3, 1u8..4, 1u8..5, any::<bool>())
            .prop_map(|(name, owner, ttl, takeover)| Op::Claim { name, owner, ttl, takeover }),
        4 => (0usize..6, ahead(), any::<u32>()).prop_map(|(hold, ahead, rank)| Op::Publish { hold, ahead, rank }),
        3 => (0usize..6).prop_map(|hold| Op::Renew { hold }),
        1 => (0usize..6).prop_map(|hold| Op::Release { hold }),
        2 => (0u8..2, ahead(), any::<u8>()).prop_map(|(cell, ahead, value)| Op::Swap { cell, ahead, value }),
        3 => (0u16..300).prop_map(|ms| Op::Pass { ms }),
        1 => Just(Op::Reopen),
    ]
}

#[derive(Debug, Clone)]
struct Owner {
    hold: Hold,
    version: u64,
    rank: Option<u32>,
    deadline: u64,
    released: bool,
}

/// What the store should hold, by the plain reading of the rules.
#[derive(Debug, Default)]
struct Model {
    now: u64,
    owners: BTreeMap<RecordName, Owner>,
    cells: BTreeMap<RecordName, (u64, u8)>,
    fence: u64,
}

fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap()
}

impl Model {
    fn check(&self, hold: &Hold) -> Result<(), StoreError> {
        let owner = self.owners.get(&hold.name).ok_or(StoreError::NotFound)?;
        if owner.hold.fence != hold.fence {
            return Err(StoreError::Fenced { current: owner.hold.fence });
        }
        if owner.released || owner.deadline <= self.now {
            return Err(StoreError::LeaseExpired { fence: owner.hold.fence });
        }
        Ok(())
    }

    /// Whether the claim may succeed, and if so whether it is a repetition.
    fn claim(&self, claim: &Claim) -> Result<bool, StoreError> {
        match self.owners.get(&claim.name) {
            Some(owner) if !owner.released && owner.deadline > self.now => {
                if owner.hold.instance == claim.instance {
                    return Ok(true);
                }
                let remaining = Duration::from_millis(owner.deadline - self.now);
                if claim.takeover {
                    Ok(false)
                } else {
                    Err(StoreError::Held { fence: owner.hold.fence, remaining })
                }
            }
            _ => Ok(false),
        }
    }
}

/// A store, the model of it, and the holds that were ever given.
struct Bench {
    runtime: Runtime,
    clock: Clock,
    store: Option<LocalStore>,
    path: Option<std::path::PathBuf>,
    model: Model,
    holds: Vec<Hold>,
}

fn name(number: u8) -> RecordName {
    RecordName::new("c", "g", &format!("n{number}")).unwrap()
}

impl Bench {
    fn new(on_disk: bool) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let file = format!("model-{}-{}.redb", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = on_disk.then(|| Path::new(env!("CARGO_TARGET_TMPDIR")).join(file));
        let clock = Clock::manual();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        let mut bench = Self { runtime, clock, store: None, path, model: Model::default(), holds: vec![] };
        bench.open();
        bench
    }

    fn open(&mut self) {
        self.store = Some(match &self.path {
            Some(path) => LocalStore::redb(path, self.clock.clone()).unwrap(),
            None => LocalStore::memory(self.clock.clone()),
        });
    }

    fn store(&self) -> LocalStore {
        self.store.clone().unwrap()
    }

    fn hold(&self, index: usize) -> Option<Hold> {
        // The newest few, so that present and past holds both turn up.
        self.holds.iter().rev().nth(index).cloned()
    }

    fn step(&mut self, op: &Op) {
        match *op {
            Op::Claim { name: number, owner, ttl, takeover } => self.claim(number, owner, ttl, takeover),
            Op::Publish { hold, ahead, rank } => self.publish(hold, ahead, rank),
            Op::Renew { hold } => {
                let Some(hold) = self.hold(hold) else { return };
                let expected = self.model.check(&hold);
                assert_eq!(self.runtime.block_on(self.store().renew(&hold)), expected);
                if expected.is_ok() {
                    self.model.owners.get_mut(&hold.name).unwrap().deadline = self.model.now + ms(hold.ttl);
                }
            }
            Op::Release { hold } => {
                let Some(hold) = self.hold(hold) else { return };
                let expected = self.model.check(&hold);
                assert_eq!(self.runtime.block_on(self.store().release(&hold)), expected);
                if expected.is_ok() {
                    self.model.owners.get_mut(&hold.name).unwrap().released = true;
                }
            }
            Op::Swap { cell, ahead, value } => self.swap(cell, ahead, value),
            Op::Pass { ms } => {
                self.model.now += u64::from(ms);
                self.clock.advance(Duration::from_millis(ms.into()));
            }
            Op::Reopen => self.reopen(),
        }
    }

    fn claim(&mut self, number: u8, owner: u8, ttl: u8, takeover: bool) {
        let instance = InstanceId::new(owner.into()).unwrap();
        let ttl = Duration::from_millis(u64::from(ttl) * 60);
        let claim = Claim { name: name(number), instance, ttl, takeover };
        let claimed = self.runtime.block_on(self.store().claim(&claim));
        match self.model.claim(&claim) {
            Err(error) => assert_eq!(claimed, Err(error)),
            Ok(true) => {
                let owner = self.model.owners.get_mut(&claim.name).unwrap();
                assert_eq!(claimed, Ok(owner.hold.clone()));
                owner.deadline = self.model.now + ms(owner.hold.ttl);
            }
            Ok(false) => {
                let hold = claimed.unwrap();
                assert!(hold.fence.0 > self.model.fence, "fences grow");
                self.model.fence = hold.fence.0;
                let deadline = self.model.now + ms(ttl);
                let owner = Owner { hold: hold.clone(), version: 0, rank: None, deadline, released: false };
                self.model.owners.insert(claim.name, owner);
                self.holds.push(hold);
            }
        }
    }

    fn publish(&mut self, hold: usize, ahead: i8, rank: u32) {
        let Some(hold) = self.hold(hold) else { return };
        let current = self.model.owners[&hold.name].version;
        let expect = Version(current.saturating_add_signed(ahead.into()));
        let record = PeerRecord { rank: Some(rank), ..empty(&hold) };
        let published = self.runtime.block_on(self.store().publish(&hold, expect, &record));
        let expected = self.model.check(&hold).and_then(|()| {
            let conflict = StoreError::Conflict { current: Version(current) };
            if expect.0 == current { Ok(Version(current + 1)) } else { Err(conflict) }
        });
        assert_eq!(published, expected);
        if expected.is_ok() {
            let owner = self.model.owners.get_mut(&hold.name).unwrap();
            (owner.version, owner.rank) = (current + 1, Some(rank));
        }
    }

    fn swap(&mut self, cell: u8, ahead: i8, value: u8) {
        let name = name(cell);
        let current = self.model.cells.get(&name).map_or(0, |cell| cell.0);
        let expect = current.saturating_add_signed(ahead.into());
        let swapped = self.runtime.block_on(self.store().swap_cell(&name, Version(expect), &[value]));
        if expect == current {
            assert_eq!(swapped, Ok(Version(current + 1)));
            self.model.cells.insert(name, (current + 1, value));
        } else {
            assert_eq!(swapped, Err(StoreError::Conflict { current: Version(current) }));
        }
    }

    /// On disk: another opening of the file, after which every lease runs anew, expired ones too.
    fn reopen(&mut self) {
        if self.path.is_none() {
            return;
        }
        self.store = None;
        self.open();
        for owner in self.model.owners.values_mut() {
            owner.deadline = self.model.now + ms(owner.hold.ttl);
        }
    }

    /// Everything that can be read is what the model says.
    fn compare(&self) {
        let names: Vec<_> = (0..3).map(name).collect();
        let outcomes = self.runtime.block_on(self.store().batch_get(&names)).unwrap();
        for (name, outcome) in names.iter().zip(outcomes) {
            let owner = self.model.owners.get(name).filter(|owner| !owner.released);
            let Some(owner) = owner else {
                assert_eq!(outcome, Err(StoreError::NotFound));
                continue;
            };
            if owner.deadline <= self.model.now {
                assert_eq!(outcome, Err(StoreError::LeaseExpired { fence: owner.hold.fence }));
                continue;
            }
            let leased = outcome.unwrap();
            let snapshot = leased.unchecked();
            assert_eq!((snapshot.stamp.fence, snapshot.stamp.version.0), (owner.hold.fence, owner.version));
            assert_eq!(snapshot.record, PeerRecord { rank: owner.rank, ..empty(&owner.hold) });
            assert_eq!(ms(leased.remaining(self.clock.now())), owner.deadline - self.model.now);
        }
        let page =
            self.runtime.block_on(self.store().list(&Filter { limit: 9, ..Filter::default() })).unwrap();
        let listed: Vec<Fence> = page.entries.iter().map(|entry| entry.snapshot.stamp.fence).collect();
        let alive = self.model.owners.values().filter(|owner| !owner.released);
        assert_eq!(listed, alive.map(|owner| owner.hold.fence).collect::<Vec<_>>());
        for (name, (version, value)) in &self.model.cells {
            let cell = self.runtime.block_on(self.store().read_cell(name)).unwrap();
            assert_eq!((cell.version.0, cell.value), (*version, vec![*value]));
        }
    }
}

fn empty(hold: &Hold) -> PeerRecord {
    PeerRecord::empty(&hold.name, Identity::Instance(hold.instance))
}

fn run(on_disk: bool, ops: &[Op]) {
    let mut bench = Bench::new(on_disk);
    for op in ops {
        bench.step(op);
        bench.compare();
    }
    bench.store = None;
    if let Some(path) = &bench.path {
        std::fs::remove_file(path).unwrap();
    }
}

fn config(cases: u32) -> ProptestConfig {
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(cases) }
}

proptest! {
    #![proptest_config(config(400))]

    #[test]
    fn memory_does_what_the_model_does(ops in vec(op(), 0..60)) {
        run(false, &ops);
    }
}

proptest! {
    #![proptest_config(config(12))]

    #[test]
    fn a_file_does_what_the_model_does_across_reopenings(ops in vec(op(), 0..40)) {
        run(true, &ops);
    }
}
