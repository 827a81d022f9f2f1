//! Taking memory back when things go wrong: the store is away, the device refuses, the task is cut short.
//! (On real keys: `tests/transfer/taking_back.rs` of the workspace.)

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use ibex_metadata::clock::Clock;
use ibex_metadata::drain::{Deregistration, Pinned, Quarantine, Stage, deregister};
use ibex_metadata::ids::{BufferId, InstanceId};
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::RecordName;
use ibex_metadata::publisher::Publisher;
use ibex_metadata::record::{Buffer, BufferState};
use ibex_metadata::store::{Ack, Claim, Store};
use spy::{Mood, Spy};

mod spy;

const TTL: Duration = Duration::from_secs(3600);
/// Nothing here takes seconds; a busy machine may.
const PATIENCE: Duration = Duration::from_secs(60);
/// Long enough that whoever does not wait would be done.
const A_WHILE: Duration = Duration::from_millis(100);

/// What a device does with one piece of memory.
#[derive(Debug, Default)]
struct Device {
    refuses: AtomicBool,
    in_flight: AtomicU64,
    freed: AtomicU64,
}

#[derive(Debug)]
struct Memory(Arc<Device>);

impl Pinned for Memory {
    fn id(&self) -> BufferId {
        BufferId(1)
    }
    fn in_flight(&self) -> u64 {
        self.0.in_flight.load(Ordering::SeqCst)
    }
    fn revoke(&self) -> bool {
        !self.0.refuses.load(Ordering::SeqCst)
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.0.freed.fetch_add(1, Ordering::SeqCst);
    }
}

struct Rig {
    spy: Arc<Spy>,
    publisher: Arc<Publisher>,
    device: Arc<Device>,
    quarantine: Arc<Quarantine>,
}

fn claim(instance: u128) -> Claim {
    let (name, instance) = (RecordName::new("c", "g", "a").unwrap(), InstanceId::new(instance).unwrap());
    Claim { name, instance, ttl: TTL, takeover: true }
}

impl Rig {
    /// An owner that offers one buffer, which one reader has.
    async fn new() -> Self {
        let spy = Arc::new(Spy::new(LocalStore::memory(Clock::system())));
        let store: Arc<dyn Store> = spy.clone();
        let hold = store.claim(&claim(1)).await.unwrap();
        let publisher = Arc::new(Publisher::new(&store, hold));
        let buffer = Buffer { buffer_id: BufferId(1), addr: 1, len: 1, ..Buffer::default() };
        let stamp = publisher
            .update(|record| record.buffers = vec![Buffer { state: BufferState::Ready, ..buffer }])
            .await
            .unwrap();
        let rig = Self { spy, publisher, device: Arc::default(), quarantine: Arc::default() };
        rig.ack(stamp).await;
        rig
    }

    async fn ack(&self, stamp: ibex_metadata::ids::Stamp) {
        let reader = InstanceId::new(9).unwrap();
        let name = self.publisher.hold().name.clone();
        self.spy.inner.ack(&Ack { name, reader, stamp, ttl: TTL }).await.unwrap();
    }

    async fn take_back(&self, budget: Duration) -> Deregistration {
        let memory: Vec<Box<dyn Pinned>> = vec![Box::new(Memory(self.device.clone()))];
        deregister(&self.publisher, memory, &self.quarantine, &Clock::system(), budget).await.unwrap()
    }

    fn set(&self, mood: Mood) {
        *self.spy.mood.lock() = mood;
    }

    fn freed(&self) -> u64 {
        self.device.freed.load(Ordering::SeqCst)
    }

    async fn buffers(&self) -> usize {
        self.spy.inner.get(&self.publisher.hold().name).await.unwrap().unchecked().record.buffers.len()
    }
}

async fn done(taking: &Deregistration) -> Stage {
    tokio::time::timeout(PATIENCE, taking.done()).await.unwrap()
}

async fn until(what: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "{what} did not happen");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}

#[test]
fn a_store_that_is_away_says_nothing_of_readers_and_is_told_of_the_removal_later() {
    run(async {
        let rig = Rig::new().await;
        let taking = rig.take_back(PATIENCE).await;
        rig.set(Mood::Away);
        tokio::time::sleep(A_WHILE).await;
        assert!(matches!(taking.stage(), Stage::Draining { .. }) && rig.freed() == 0, "{:?}", taking.stage());
        // The reader lets go; while nobody can ask the store, nobody knows.
        rig.ack(taking.stamp()).await;
        tokio::time::sleep(A_WHILE).await;
        assert_eq!(rig.freed(), 0);
        rig.set(Mood::Good);
        assert_eq!(done(&taking).await, Stage::Removed { unpublished: None });
        assert_eq!((rig.freed(), rig.buffers().await), (1, 0));
    });
}

#[test]
fn a_removal_that_meets_an_outage_is_said_afterwards() {
    run(async {
        let rig = Rig::new().await;
        rig.device.refuses.store(true, Ordering::SeqCst);
        let taking = rig.take_back(PATIENCE).await;
        rig.ack(taking.stamp()).await;
        until("the drained state", || matches!(taking.stage(), Stage::Draining { readers: Some(0), .. }))
            .await;
        rig.set(Mood::Away);
        rig.device.refuses.store(false, Ordering::SeqCst);
        until("the revocation", || taking.stage() == Stage::Revoked).await;
        tokio::time::sleep(A_WHILE).await;
        assert_eq!((taking.stage(), rig.freed(), rig.buffers().await), (Stage::Revoked, 1, 1));
        rig.set(Mood::Good);
        assert_eq!(done(&taking).await, Stage::Removed { unpublished: None });
        assert_eq!(rig.buffers().await, 0);
    });
}

#[test]
fn memory_that_the_device_does_not_let_go_of_is_never_given_back() {
    run(async {
        let rig = Rig::new().await;
        rig.device.refuses.store(true, Ordering::SeqCst);
        let taking = rig.take_back(A_WHILE).await;
        rig.ack(taking.stamp()).await;
        let refused = Stage::Quarantined { in_flight: 0, readers: Some(0), refused: true };
        assert_eq!(done(&taking).await, refused);
        assert_eq!(
            (rig.quarantine.ids(), rig.quarantine.sweep()),
            (vec![BufferId(1)], 0),
            "it still refuses"
        );
        assert_eq!(rig.freed(), 0);
        rig.device.refuses.store(false, Ordering::SeqCst);
        rig.device.in_flight.store(1, Ordering::SeqCst);
        assert_eq!((rig.quarantine.sweep(), rig.freed()), (0, 0), "a request is in flight");
        rig.device.in_flight.store(0, Ordering::SeqCst);
        assert_eq!((rig.quarantine.sweep(), rig.freed(), rig.quarantine.len()), (1, 1, 0));
    });
}

#[test]
fn a_task_that_is_cut_short_pins_what_it_had() {
    let (quarantine, device) = (Arc::<Quarantine>::default(), Arc::<Device>::default());
    run(async {
        let rig = Rig { quarantine: quarantine.clone(), device: device.clone(), ..Rig::new().await };
        drop(rig.take_back(PATIENCE).await);
    });
    // The runtime is gone, and the task with it.
    assert_eq!((quarantine.len(), device.freed.load(Ordering::SeqCst)), (1, 0));
}
