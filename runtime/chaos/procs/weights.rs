//! The weights of the experts that a rank serves: made by those who begin a group, read from a survivor by whoever
//! comes later.
//!
//! A [`Weights`] owns registered memory with the weights of all experts, and a [`Requester`] with queue pairs of its
//! own to the ranks behind it and before it. Its record, under a name of its own, says how they are reached, and, once
//! the memory is right, where it is and the key to it. A rank reads from one of the [`DONORS`] ranks behind it: while a
//! group has one rank that is ready, some rank has a donor, and so in the end everybody has.
//!
//! ```text
//!  record  group-weights/rank-5   queue pairs by slot; the buffer, if it is right    leased, like the rank's own name
//!  fetch   resolve a donor -> open its buffer -> a READ per expert -> digest         each with a deadline
//! ```
//!
//! What must come out is known from the seed, and from nobody who is read from.
//!
//! INVARIANT: memory is offered only if its digest is right, and nobody is ready before its own is.
//! INVARIANT: nothing but [`Weights::fetch`] waits; the record is written by a task of the store's.

use core::time::Duration;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};

use ibex_hca::{Access, Hca};
use ibex_metadata::backoff::Backoff;
use ibex_metadata::blocking::Blocking;
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::InstanceId;
use ibex_metadata::keeper::Keeper;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::publisher::Publisher;
use ibex_metadata::record::{Buffer, BufferKind, RecordState};
use ibex_metadata::refresh::{Observer, Refresher};
use ibex_metadata::scope;
use ibex_metadata::store::Claim;
use parking_lot::Mutex;
use sha2::{Digest, Sha256};
use tokio::sync::Notify;

use crate::chaos::draws::Draws;
use crate::error::Error;
use crate::ids::Rank;
use crate::membership::Instance;
use crate::time::{Deadline, sleep};
use crate::transfer::{Region, Request, Requester, RequesterOptions, TransferError, Verb};

/// Bytes of one expert.
pub(super) const EXPERT_LEN: u32 = 4096;
/// Ranks behind a rank that it may read from.
const DONORS: u32 = 2;
/// How long the requests of one attempt may take.
const FETCH_BUDGET: Duration = Duration::from_secs(2);
/// Pauses of the task that writes the record while the store does not answer.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How long the store's tasks may take to let go of the requester when it is taken down.
const LET_GO: Duration = Duration::from_secs(5);
/// Pause between two looks at that.
const NAP: Duration = Duration::from_millis(1);

/// Why a rank has no weights yet.
#[derive(Debug, thiserror::Error)]
pub(super) enum WeightsError {
    /// No donor has them, or none could be asked.
    #[error("none of {donors} donors is connected and has the weights: {last}")]
    NoDonor { donors: usize, last: TransferError },
    /// A donor has something else.
    #[error("the weights read from rank {from} have digest {found:032x}, the right ones {expected:032x}")]
    Digest { from: Rank, found: u128, expected: u128 },
}

/// Whose weights, of what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Whose<'a> {
    pub(super) group: &'a str,
    pub(super) rank: Rank,
    pub(super) num_ranks: u32,
    pub(super) instance: Instance,
    pub(super) lease_ttl: Duration,
    /// How long an outage of the store may last before the name is given up.
    pub(super) grace: Duration,
    pub(super) seed: u64,
    pub(super) num_experts: u32,
}

/// What the record is to say, and the task that says it.
#[derive(Default)]
struct Advert {
    /// Grows with every change.
    wanted: Mutex<(u64, Option<Buffer>)>,
    is_over: AtomicBool,
    changed: Notify,
}

/// See the module documentation.
pub(super) struct Weights {
    // In this order: nobody looks at records any more, then the requester goes, then what it stands on.
    refresher: Option<Refresher>,
    advert: Arc<Advert>,
    requester: Option<Arc<Requester>>,
    region: Region,
    _lease: Keeper,
    store: Blocking,
    donors: Vec<(Rank, RecordName)>,
    /// Donors, and the ranks that this one is a donor of.
    tracked: Vec<RecordName>,
    seed: u64,
    num_experts: u32,
    adverts: u64,
}

/// The bytes of one expert.
fn expert(seed: u64, expert: u32) -> Vec<u8> {
    let mut draws = Draws::new(seed, 1_000 + u64::from(expert));
    (0..EXPERT_LEN / 8).flat_map(|_| draws.bits().to_le_bytes()).collect()
}

fn digest_of(bytes: &[u8]) -> u128 {
    let digest: [u8; 32] = Sha256::digest(bytes).into();
    let (half, _) = digest.split_at(16);
    half.iter().fold(0, |all, byte| all << 8 | u128::from(*byte))
}

fn name(group: &str, rank: Rank) -> Result<RecordName, StoreError> {
    Ok(RecordName::new("chaos", &format!("{group}-weights"), &format!("rank-{}", rank.0))?)
}

impl Weights {
    /// Claims the name and begins to follow donors. The memory holds nothing yet. Takes the name from whoever has it:
    /// the rank's own name was claimed before.
    ///
    /// # Errors
    /// What the store or the device refused. Nothing stays behind.
    pub(super) fn new(whose: &Whose<'_>, store: &Blocking, hca: &Arc<dyn Hca>) -> Result<Self, Error> {
        let instance = InstanceId::new(whose.instance.0).ok_or(StoreError::NotFound)?;
        let own = name(whose.group, whose.rank)?;
        let options = RequesterOptions::new(instance, whose.rank.0.into(), whose.num_ranks);
        let requester = Arc::new(Requester::new(hca, options, store.clock().clone())?);
        let region = requester.register(u64::from(whose.num_experts * EXPERT_LEN), Access::ALL)?;
        let claim = Claim { name: own, instance, ttl: whose.lease_ttl, takeover: true };
        let lease = store.keep(&claim, whose.grace)?;
        let publisher = Publisher::new(store.store(), lease.hold().clone());
        let advert = Arc::new(Advert::default());
        store.spawn(publish(Arc::clone(&advert), publisher, Arc::downgrade(&requester)));
        let prefix = Prefix::parse(&format!("chaos/{}-weights", whose.group)).map_err(StoreError::from)?;
        let refresher = store.refresh(prefix, Arc::clone(&requester) as _, None);
        let (mut donors, mut tracked) = (Vec::new(), Vec::new());
        for distance in 1..=DONORS.min(whose.num_ranks - 1) {
            // CAST: at most 512 ranks.
            let of = |by: u32| Rank(((u32::from(whose.rank.0) + by) % whose.num_ranks) as u16);
            let (donor, heir) = (of(distance), of(whose.num_ranks - distance));
            let (donor_name, heir_name) = (name(whose.group, donor)?, name(whose.group, heir)?);
            tracked.extend([donor_name.clone(), heir_name]);
            donors.push((donor, donor_name));
        }
        tracked.sort_unstable();
        tracked.dedup();
        tracked.iter().for_each(|name| refresher.track(name));
        let mut weights = Self {
            refresher: Some(refresher),
            advert,
            requester: Some(requester),
            region,
            _lease: lease,
            store: store.clone(),
            donors,
            tracked,
            seed: whose.seed,
            num_experts: whose.num_experts,
            adverts: 0,
        };
        weights.turn();
        Ok(weights)
    }

    fn requester(&self) -> &Requester {
        // PANIC: there is one until it is dropped.
        self.requester.as_deref().expect("a requester until the end")
    }

    /// Goes on with whatever is under way; to be called often.
    pub(super) fn turn(&mut self) {
        self.requester().progress();
        self.requester().sweep();
        let failed = self.requester().take_failed();
        for name in &self.tracked {
            let Some(refresher) = self.refresher.as_ref() else { break };
            if failed.contains(name) {
                refresher.force(name);
            }
            // Its port may have become known since its record was seen.
            if !self.requester().is_linked(name)
                && let Some(leased) = refresher.latest(name)
            {
                self.requester().seen(leased.unchecked());
            }
        }
        let adverts = self.requester().adverts();
        if adverts != self.adverts {
            self.adverts = adverts;
            self.change(|_| {});
        }
    }

    fn change(&self, change: impl FnOnce(&mut Option<Buffer>)) {
        let mut wanted = self.advert.wanted.lock();
        wanted.0 += 1;
        change(&mut wanted.1);
        drop(wanted);
        self.advert.changed.notify_one();
    }

    /// What the digest must be.
    fn right_digest(&self) -> u128 {
        let all: Vec<u8> = (0..self.num_experts).flat_map(|nth| expert(self.seed, nth)).collect();
        digest_of(&all)
    }

    /// What the digest of the memory is.
    fn digest(&self) -> u128 {
        let mut bytes = vec![0; self.num_experts as usize * EXPERT_LEN as usize];
        self.region.view().read(0, &mut bytes);
        digest_of(&bytes)
    }

    /// Makes the weights: for those who begin a group. Their digest.
    pub(super) fn make(&self) -> u128 {
        for nth in 0..self.num_experts {
            self.region.view().write(u64::from(nth * EXPERT_LEN), &expert(self.seed, nth));
        }
        self.offer();
        self.digest()
    }

    /// Reads them from a donor that is connected; how many bytes, and their digest. Waits for at most
    /// [`FETCH_BUDGET`] per donor, and for the store.
    ///
    /// # Errors
    /// [`WeightsError`]: nothing is offered then, and another attempt may do better.
    pub(super) fn fetch(&self) -> Result<(u64, u128), WeightsError> {
        let mut last = TransferError::from(StoreError::NotFound);
        for (donor, name) in &self.donors {
            // Asked, and answered later: nothing is waited for that may never come.
            if !self.requester().greet(name) {
                continue;
            }
            match self.read_from(name) {
                Ok(()) => {
                    let (found, expected) = (self.digest(), self.right_digest());
                    if found != expected {
                        return Err(WeightsError::Digest { from: *donor, found, expected });
                    }
                    self.offer();
                    return Ok((self.region.len(), found));
                }
                Err(error) => last = error,
            }
        }
        Err(WeightsError::NoDonor { donors: self.donors.len(), last })
    }

    /// Whoever comes next may read them here.
    fn offer(&self) {
        let described = self.region.describe(BufferKind::Weights);
        self.change(|buffer| *buffer = Some(described));
    }

    fn read_from(&self, donor: &RecordName) -> Result<(), TransferError> {
        let request = scope::Request::new(self.store.clock().clone());
        let scope = request.scope(&**self.store.store());
        let guard = self.store.resolve(&scope, donor)?;
        let segment = self.requester().open(&guard, self.region.id())?;
        let reads: Vec<Request<'_>> = (0..self.num_experts)
            .map(|nth| u64::from(nth * EXPERT_LEN))
            .map(|at| Request {
                verb: Verb::Read,
                local: &self.region,
                local_offset: at,
                segment: &segment,
                remote_offset: at,
                len: EXPERT_LEN,
            })
            .collect();
        let batch = self.requester().submit(&guard, &reads, FETCH_BUDGET)?;
        batch.wait().into_iter().try_for_each(|report| report.outcome.map(|_| ()))
    }

    /// Changes a byte, without anybody being told: for tests of who notices.
    #[cfg(test)]
    fn spoil(&self) {
        let mut byte = [0];
        self.region.view().read(77, &mut byte);
        self.region.view().write(77, &[byte[0] ^ 1]);
    }
}

impl Drop for Weights {
    fn drop(&mut self) {
        self.advert.is_over.store(true, Ordering::Release);
        self.advert.changed.notify_one();
        drop(self.refresher.take());
        let Some(mut requester) = self.requester.take() else { return };
        // Tasks that were told to end may be in the middle of a call; who counts what is left counts after them.
        let patience = Deadline::after(LET_GO);
        while let Err(shared) = Arc::try_unwrap(requester) {
            if patience.has_passed() {
                return;
            }
            requester = shared;
            sleep(NAP);
        }
    }
}

/// Writes the record whenever something is new, until that is over.
async fn publish(advert: Arc<Advert>, publisher: Publisher, requester: Weak<Requester>) {
    let mut told = 0;
    let mut backoff = Backoff::new(PAUSES.0, PAUSES.1, 1);
    loop {
        let (wanted, buffer) = advert.wanted.lock().clone();
        if wanted == told {
            advert.changed.notified().await;
            if advert.is_over.load(Ordering::Acquire) {
                return;
            }
            continue;
        }
        let published = publisher.update(|record| {
            record.state = RecordState::Ready;
            record.buffers = buffer.into_iter().collect();
            if let Some(requester) = requester.upgrade() {
                requester.advertise(record);
            }
        });
        match published.await {
            Ok(_) => {
                told = wanted;
                backoff.reset();
            }
            Err(error) if error.is_transient() && !advert.is_over.load(Ordering::Acquire) => {
                tokio::time::sleep(backoff.pause()).await;
            }
            // The name is another's: this rank is fenced, and learns it elsewhere. Or nobody waits for it any more.
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use ibex_hca::Nanos;
    use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
    use ibex_metadata::clock::Clock;
    use ibex_metadata::url::StoreUrl;

    use super::*;
    use crate::time::now_ns;

    /// Devices of three ranks, stepped by a thread until dropped.
    struct Devices {
        devices: Vec<Arc<EmulatedHca>>,
        is_over: Arc<AtomicBool>,
        thread: Option<thread::JoinHandle<()>>,
    }

    impl Devices {
        fn new() -> Self {
            let fabric = Fabric::inproc(FabricConfig::default());
            let make = |_| EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default()).unwrap();
            let devices: Vec<_> = (0..4).map(make).collect();
            let is_over = Arc::new(AtomicBool::new(false));
            let (stepped, over) = (devices.clone(), Arc::clone(&is_over));
            let step = move || {
                while !over.load(Ordering::Relaxed) {
                    stepped.iter().for_each(|device| {
                        let _ = device.step(Nanos(now_ns()));
                    });
                    sleep(Duration::from_micros(50));
                }
            };
            Self { devices, is_over, thread: Some(thread::spawn(step)) }
        }

        /// The weights of `rank`, on the device with this number.
        fn weights(&self, store: &Blocking, rank: u16, device: usize, instance: u128) -> Weights {
            let whose = Whose {
                group: "g",
                rank: Rank(rank),
                num_ranks: 3,
                instance: Instance(instance),
                lease_ttl: Duration::from_secs(600),
                grace: Duration::from_secs(600),
                seed: 5,
                num_experts: 6,
            };
            let hca = Arc::clone(&self.devices[device]) as Arc<dyn Hca>;
            Weights::new(&whose, store, &hca).unwrap()
        }
    }

    impl Drop for Devices {
        fn drop(&mut self) {
            self.is_over.store(true, Ordering::Relaxed);
            self.thread.take().unwrap().join().unwrap();
        }
    }

    /// Tries to fetch until it comes to more than that nobody is there.
    fn fetched(all: &mut [Weights], index: usize) -> Result<(u64, u128), WeightsError> {
        let patience = Deadline::after(Duration::from_secs(120));
        loop {
            all.iter_mut().for_each(Weights::turn);
            match all[index].fetch() {
                Err(WeightsError::NoDonor { .. }) if !patience.has_passed() => sleep(NAP),
                other => return other,
            }
        }
    }

    #[test]
    fn a_replacement_reads_what_survivors_have_and_notices_what_is_not_right() {
        let devices = Devices::new();
        let store = StoreUrl::parse("memory:").unwrap();
        let store = Blocking::open(&store, Clock::system(), Duration::from_secs(60)).unwrap();
        let mut all: Vec<Weights> =
            (0..3).map(|rank| devices.weights(&store, rank, rank.into(), 10 + u128::from(rank))).collect();
        let right = all[0].make();
        all[1].make();
        // One that only begins has nothing to offer, and reads what the others made.
        let (bytes, digest) = fetched(&mut all, 2).unwrap();
        assert_eq!((bytes, digest), (6 * u64::from(EXPERT_LEN), right));

        // Another process takes its place, while what it would read is not what the seed says.
        all[0].spoil();
        all[1].spoil();
        all[2] = devices.weights(&store, 2, 3, 99);
        let refused = fetched(&mut all, 2).unwrap_err();
        assert!(matches!(refused, WeightsError::Digest { expected, .. } if expected == right), "{refused}");
        assert!(all[2].advert.wanted.lock().1.is_none(), "wrong weights are offered to nobody");
        all[0].spoil();
        all[1].spoil();
        assert_eq!(fetched(&mut all, 2).unwrap(), (bytes, right));
    }
}
