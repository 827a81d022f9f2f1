//! Who serves the device of a [`Member`](super::Member): the worker while kernels run, a thread of its own otherwise.
//!
//! An [`Attendant`] owns that thread and ends it when dropped. Device time is the kernels' clock on both.
//!
//! A rank that computes nothing must still answer its peers and show that it lives, but eight ranks on two cores must
//! not take them from the ranks that work. So the thread sleeps in the fabric until something arrives or is due, and
//! while the worker steps the device it only looks after the signs of life.
//!
//! INVARIANT: a sign of life never waits for a kernel: the thread sends it when the worker has not.

use core::time::Duration;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};

use ibex_hca::Nanos;
use ibex_hca::emulated::{EmulatedHca, Fabric};
use parking_lot::RwLock;

use super::Session;
use crate::error::{Error, OsError};
use crate::gpu::pool::{Pool, Progress, Progressed};
use crate::time::{now_ns as clock_ns, sleep};

/// A worker that stepped the device within this time is still at it.
const WORKER_AT_IT_NS: u64 = 2_000_000;
/// How long the thread leaves the device to a worker that is at it.
const NAP: Duration = Duration::from_millis(1);
/// Longest sleep: what the thread takes to see that it should end.
const SLEEP_MAX_NS: u64 = 5_000_000;

/// How long this process was itself late, whatever its peers did: nothing else tells a machine that gives it no time
/// from a bug that keeps it from speaking.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lateness {
    /// The longest time between two of its signs of life.
    pub silent_ns: u64,
    /// The longest time between two steps of its device while it was looked after; what peers send waits that long.
    pub unattended_ns: u64,
}

/// The longest time between two ends of the same thing.
#[derive(Debug, Default)]
struct Longest {
    /// 0 before the first.
    last_ns: AtomicU64,
    longest_ns: AtomicU64,
}

impl Longest {
    fn note(&self, now_ns: u64) {
        let last_ns = self.last_ns.swap(now_ns.max(1), Ordering::Relaxed);
        if last_ns != 0 {
            self.longest_ns.fetch_max(now_ns.saturating_sub(last_ns), Ordering::Relaxed);
        }
    }

    /// What lasts by now counts, too.
    fn take(&self, now_ns: u64) -> u64 {
        let last_ns = self.last_ns.load(Ordering::Relaxed);
        let present_ns = if last_ns == 0 { 0 } else { now_ns.saturating_sub(last_ns) };
        self.longest_ns.swap(0, Ordering::Relaxed).max(present_ns)
    }
}

/// What worker and thread share.
struct Service {
    device: Arc<EmulatedHca>,
    fabric: Arc<Fabric>,
    /// Set once the session exists; weak, because the session holds the pool that calls this.
    session: RwLock<Weak<Session>>,
    silent: AtomicBool,
    stop: AtomicBool,
    beat_every_ns: u64,
    next_beat_ns: AtomicU64,
    /// When a worker last stepped the device.
    worker_ns: AtomicU64,
    beats: Longest,
    steps: Longest,
}

impl Service {
    /// Whoever finds the beat due sends it.
    fn beat_if_due(&self, now_ns: u64) -> bool {
        let due = self.next_beat_ns.load(Ordering::Relaxed);
        if now_ns < due || self.silent.load(Ordering::Relaxed) {
            return false;
        }
        let next = now_ns + self.beat_every_ns;
        if self.next_beat_ns.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return false;
        }
        // Held while the session is: see `forget_session`.
        let session = self.session.read();
        // A host that cannot speak is silent; its peers' clocks say so.
        let is_sent = session.upgrade().is_some_and(|session| session.send_sign_of_life().is_ok());
        if is_sent {
            // By the clock and not by `now_ns`: who was stopped in between spoke as late as that.
            self.beats.note(clock_ns());
        }
        is_sent
    }

    fn step(&self, now_ns: u64) -> Progressed {
        let beaten = self.beat_if_due(now_ns);
        let step = self.device.step(Nanos(now_ns));
        self.steps.note(clock_ns());
        if beaten || step.did_work {
            return Progressed::Worked;
        }
        let next_beat_ns = self.next_beat_ns.load(Ordering::Relaxed);
        let next_deadline_ns = step.next_deadline.map_or(next_beat_ns, |at| at.0.min(next_beat_ns));
        Progressed::Idle { next_deadline_ns: Some(next_deadline_ns) }
    }

    fn attend(&self, pool: &Pool) {
        while !self.stop.load(Ordering::Acquire) {
            let now_ns = pool.now_ns();
            if now_ns.saturating_sub(self.worker_ns.load(Ordering::Relaxed)) < WORKER_AT_IT_NS {
                self.beat_if_due(now_ns);
                sleep(NAP);
                continue;
            }
            if let Progressed::Idle { next_deadline_ns } = self.step(now_ns) {
                let until_due = next_deadline_ns.map_or(SLEEP_MAX_NS, |due| due.saturating_sub(now_ns));
                self.fabric.wait_for_arrivals(until_due.min(SLEEP_MAX_NS));
            }
        }
    }
}

impl Progress for Service {
    fn progress(&self, _worker: u32, now_ns: u64, _random: u64) -> Progressed {
        self.worker_ns.store(now_ns, Ordering::Relaxed);
        self.step(now_ns)
    }
}

/// Serves a device and sends signs of life, until dropped. See the module documentation.
pub(super) struct Attendant {
    service: Arc<Service>,
    thread: Option<JoinHandle<()>>,
}

impl Attendant {
    /// An attendant whose thread does not run yet.
    pub(super) fn new(device: &Arc<EmulatedHca>, fabric: &Arc<Fabric>, detect_ms: u32) -> Self {
        let service = Service {
            device: Arc::clone(device),
            fabric: Arc::clone(fabric),
            session: RwLock::default(),
            silent: AtomicBool::new(false),
            stop: AtomicBool::new(false),
            beat_every_ns: u64::from(detect_ms) * 1_000_000 / 4,
            next_beat_ns: AtomicU64::new(0),
            worker_ns: AtomicU64::new(0),
            beats: Longest::default(),
            steps: Longest::default(),
        };
        Self { service: Arc::new(service), thread: None }
    }

    /// What workers step.
    pub(super) fn progress(&self) -> Arc<dyn Progress> {
        Arc::clone(&self.service) as _
    }

    /// Starts the thread, and the signs of life of `session`.
    pub(super) fn start(mut self, session: &Arc<Session>, pool: &Arc<Pool>) -> Result<Self, Error> {
        *self.service.session.write() = Arc::downgrade(session);
        let (service, pool) = (Arc::clone(&self.service), Arc::clone(pool));
        let builder = thread::Builder::new().name("ibex-attendant".into());
        let thread = builder.spawn(move || service.attend(&pool));
        self.thread = Some(thread.map_err(|error| OsError::from_io("pthread_create", &error))?);
        Ok(self)
    }

    /// Ends the signs of life; nobody here holds the session after this, not even for a moment.
    pub(super) fn forget_session(&self) {
        *self.service.session.write() = Weak::new();
    }

    /// How late this process was since this was last asked.
    pub(super) fn take_lateness(&self) -> Lateness {
        let now_ns = clock_ns();
        let service = &self.service;
        Lateness { silent_ns: service.beats.take(now_ns), unattended_ns: service.steps.take(now_ns) }
    }

    /// Stops or resumes the signs of life.
    pub(super) fn set_silent(&self, silent: bool) {
        self.service.silent.store(silent, Ordering::Relaxed);
    }
}

impl Drop for Attendant {
    fn drop(&mut self) {
        self.service.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            // PANIC: the device met a broken invariant of ours; its message was printed there.
            panic!("the attendant panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_pause_is_told_once_and_one_that_lasts_at_any_time() {
        let beats = Longest::default();
        assert_eq!(beats.take(500), 0, "nothing has begun");
        for at in [100, 130, 190, 200] {
            beats.note(at);
        }
        assert_eq!(beats.take(210), 60);
        assert_eq!((beats.take(220), beats.take(300)), (20, 100));
    }
}
