//! Keeping what is known of peers fresh, off the data path.
//!
//! A [`Refresher`] owns two tasks. One follows the store's changes and passes every snapshot on at once, so
//! that what it retires goes before anybody uses the new record. The other asks for leases: of names that
//! were never asked for, that changed, whose lease is half over, or that somebody wants to know anew after a
//! failure. It asks for all of them in one batch, one batch at a time.
//!
//! INVARIANTS: nobody waits here: [`Refresher::latest`] and [`Refresher::force`] look and return; a name is in
//! at most one batch at a time; after a failure there is a pause, doubled and jittered, per name that the
//! store refused and for all if the store did not answer; what was refused is not asked for again before.

use core::time::Duration;
use std::collections::HashMap;
use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use crate::backoff::Backoff;
use crate::clock::{Clock, within};
use crate::error::{Corruption, Result, StoreError};
use crate::ids::{Fence, InstanceId, Stamp};
use crate::lease::{Leased, Moment};
use crate::limits::BATCH_LEN_MAX;
use crate::name::{Prefix, RecordName};
use crate::store::{Ack, Change, Snapshot, Store};

/// Pauses after failures: from the first to the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));
/// An answer of the store that took longer is not waited for.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// How long the task sleeps when it knows of nothing to do.
const IDLE: Duration = Duration::from_secs(3600);
/// Two batches that succeed are at least this far apart: a lease that is always half over must not make a
/// busy loop.
const SPACING: Duration = Duration::from_millis(5);

/// Who is told what was seen. Calls come from the refresher's tasks and must be short.
pub trait Observer: Debug + Send + Sync + 'static {
    /// Somebody published, or the store gave this answer. It may be old news.
    fn seen(&self, snapshot: &Arc<Snapshot>);
    /// What was seen may be used for so long.
    fn granted(&self, leased: &Leased<Arc<Snapshot>>);
    /// The owner's lease ran out, or the owner gave the name back.
    fn ended(&self, name: &RecordName, fence: Fence, released: bool);
}

/// As whom names are read: the store tells their owners.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reader {
    /// Who reads.
    pub instance: InstanceId,
    /// How long owners wait for a reader that has fallen silent.
    pub ttl: Duration,
}

/// What became of a wish to ask again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forced {
    /// It will be in the next batch.
    Queued,
    /// It is in a batch that is on its way.
    InFlight,
    /// The last answer was a failure; it is asked for again, not before this moment.
    NotBefore(Moment),
    /// The name is not tracked.
    Untracked,
}

/// What was asked of the store.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RefreshCounters {
    /// Batches asked for.
    pub batches: u64,
    /// Batches without an answer.
    pub failures: u64,
    /// Names that the store refused.
    pub refusals: u64,
    /// Attempts to follow the store's changes.
    pub follows: u64,
}

#[derive(Debug)]
struct Tracked {
    latest: Option<Leased<Arc<Snapshot>>>,
    wanted: bool,
    in_flight: bool,
    not_before: Moment,
    pauses: Backoff,
    /// What the owner was told that is in use here, and until when it remembers.
    acked: Option<(Stamp, Moment)>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn Store>,
    clock: Clock,
    prefix: Prefix,
    observer: Arc<dyn Observer>,
    reader: Option<Reader>,
    names: Mutex<HashMap<RecordName, Tracked>>,
    counters: Mutex<RefreshCounters>,
    wake: Notify,
}

/// Refreshes tracked names. See the module's documentation.
#[derive(Debug)]
pub struct Refresher {
    shared: Arc<Shared>,
    tasks: [JoinHandle<()>; 2],
}

impl Drop for Refresher {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Refresher {
    /// Starts to follow what lies under `prefix`. With a reader, owners learn what is in use. Must be called
    /// inside tokio.
    #[must_use]
    pub fn spawn(
        store: &Arc<dyn Store>,
        clock: &Clock,
        prefix: Prefix,
        observer: Arc<dyn Observer>,
        reader: Option<Reader>,
    ) -> Self {
        let shared = Arc::new(Shared {
            store: Arc::clone(store),
            clock: clock.clone(),
            prefix,
            observer,
            reader,
            names: Mutex::default(),
            counters: Mutex::default(),
            wake: Notify::new(),
        });
        let tasks = [tokio::spawn(follow(Arc::clone(&shared))), tokio::spawn(ask(Arc::clone(&shared)))];
        Self { shared, tasks }
    }

    /// Keeps a name fresh from now on.
    pub fn track(&self, name: &RecordName) {
        let now = self.shared.clock.now();
        let mut names = self.shared.names.lock();
        names.entry(name.clone()).or_insert_with(|| Tracked {
            latest: None,
            wanted: true,
            in_flight: false,
            not_before: now,
            pauses: Backoff::new(PAUSES.0, PAUSES.1, seed(name, now)),
            acked: None,
        });
        drop(names);
        self.shared.wake.notify_one();
    }

    /// Stops keeping a name fresh.
    pub fn untrack(&self, name: &RecordName) {
        self.shared.names.lock().remove(name);
    }

    /// The newest answer about a name, if its lease still runs. Never waits, never asks.
    #[must_use]
    pub fn latest(&self, name: &RecordName) -> Option<Leased<Arc<Snapshot>>> {
        let names = self.shared.names.lock();
        let latest = names.get(name)?.latest.clone()?;
        latest.check(self.shared.clock.now()).is_ok().then_some(latest)
    }

    /// Whether the owner of a name knows that this stamp, or a newer one, is in use here.
    #[must_use]
    pub fn is_registered(&self, name: &RecordName, stamp: Stamp) -> bool {
        let names = self.shared.names.lock();
        let acked = names.get(name).and_then(|tracked| tracked.acked);
        acked.is_some_and(|(known, until)| known >= stamp && self.shared.clock.now() < until)
    }

    /// Asks again soon, for whoever met a failure. Never waits.
    pub fn force(&self, name: &RecordName) -> Forced {
        let now = self.shared.clock.now();
        let mut names = self.shared.names.lock();
        let Some(tracked) = names.get_mut(name) else { return Forced::Untracked };
        tracked.wanted = true;
        let forced = match tracked {
            Tracked { in_flight: true, .. } => Forced::InFlight,
            Tracked { not_before, .. } if *not_before > now => Forced::NotBefore(*not_before),
            _ => Forced::Queued,
        };
        drop(names);
        self.shared.wake.notify_one();
        forced
    }

    /// What was asked so far.
    #[must_use]
    pub fn counters(&self) -> RefreshCounters {
        *self.shared.counters.lock()
    }
}

fn seed(name: &RecordName, now: Moment) -> u64 {
    let mix = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    name.as_str().bytes().fold(0xcbf2_9ce4_8422_2325 ^ now.0, mix)
}

impl Shared {
    fn count(&self, count: impl FnOnce(&mut RefreshCounters)) {
        count(&mut self.counters.lock());
    }

    fn want(&self, name: Option<&RecordName>) {
        let now = self.clock.now();
        let mut names = self.names.lock();
        for (_, tracked) in names.iter_mut().filter(|(other, _)| name.is_none_or(|name| name == *other)) {
            // There is news: what was refused before may be there now.
            (tracked.wanted, tracked.not_before) = (true, now);
        }
        drop(names);
        self.wake.notify_one();
    }

    fn is_tracked(&self, name: &RecordName) -> bool {
        self.names.lock().contains_key(name)
    }

    /// Passes a change on.
    fn take_in(&self, change: &Change) {
        let Some(name) = change.name() else { return self.want(None) };
        if !self.is_tracked(name) {
            return;
        }
        match change {
            Change::Put(snapshot) => self.observer.seen(snapshot),
            Change::Expired { name, fence } => self.end(name, *fence, false),
            Change::Released { name, fence } => self.end(name, *fence, true),
            Change::Cell { .. } | Change::Gap => return,
        }
        self.want(Some(name));
    }

    fn end(&self, name: &RecordName, fence: Fence, released: bool) {
        if let Some(tracked) = self.names.lock().get_mut(name) {
            tracked.latest = tracked.latest.take().filter(|latest| latest.stamp().fence != fence);
        }
        self.observer.ended(name, fence, released);
    }

    /// The names to ask for now, or when the next one is due.
    fn due(&self) -> core::result::Result<Vec<RecordName>, Moment> {
        let now = self.clock.now();
        let mut names = self.names.lock();
        let (mut due, mut next) = (Vec::new(), now.after(IDLE));
        for (name, tracked) in names.iter_mut() {
            let latest = tracked.latest.as_ref();
            let renewal = latest.map(|latest| now.after(latest.remaining(now) / 2));
            let is_half_over = latest.is_some_and(|latest| latest.wants_renewal(now));
            let has_room = due.len() < BATCH_LEN_MAX;
            if has_room && (tracked.wanted || is_half_over) && tracked.not_before <= now {
                (tracked.wanted, tracked.in_flight) = (false, true);
                due.push(name.clone());
            } else if tracked.wanted || is_half_over {
                next = next.min(tracked.not_before);
            } else if let Some(renewal) = renewal {
                next = next.min(renewal.max(now.after(SPACING)));
            }
        }
        if due.is_empty() { Err(next) } else { Ok(due) }
    }

    /// Takes in the answers to a batch.
    async fn settle(&self, asked: &[RecordName], answer: Result<Vec<Result<Leased<Arc<Snapshot>>>>>) {
        let outcomes = match answer {
            Ok(outcomes) if outcomes.len() == asked.len() => outcomes,
            Ok(outcomes) => {
                let (asked_len, got) = (asked.len() as u64, outcomes.len() as u64);
                let error = StoreError::Corrupt(Corruption::BatchLength { asked: asked_len, got });
                vec![Err(error); asked.len()]
            }
            Err(error) => {
                self.count(|counters| counters.failures += 1);
                vec![Err(error); asked.len()]
            }
        };
        for (name, outcome) in asked.iter().zip(outcomes) {
            match outcome {
                Ok(leased) => {
                    // First what goes, then the lease on what replaces it.
                    self.observer.seen(leased.unchecked());
                    self.observer.granted(&leased);
                    let ack = self.keep(name, &leased);
                    self.tell_owner(name, ack).await;
                }
                Err(error) => self.refuse(name, &error),
            }
        }
    }

    /// Keeps an answer; says whether the owner is to be told what is in use.
    fn keep(&self, name: &RecordName, leased: &Leased<Arc<Snapshot>>) -> Option<Stamp> {
        let now = self.clock.now();
        let mut names = self.names.lock();
        let tracked = names.get_mut(name)?;
        let is_newer = tracked.latest.as_ref().is_none_or(|latest| latest.stamp() <= leased.stamp());
        if is_newer {
            tracked.latest = Some(leased.clone());
        }
        (tracked.in_flight, tracked.not_before) = (false, now.after(SPACING));
        tracked.pauses.reset();
        let in_use = tracked.latest.as_ref()?.stamp();
        let (reader, told) = (self.reader?, tracked.acked);
        let is_told = told.is_some_and(|(stamp, until)| stamp >= in_use && until.since(now) > reader.ttl / 2);
        (!is_told).then_some(in_use)
    }

    async fn tell_owner(&self, name: &RecordName, stamp: Option<Stamp>) {
        let (Some(Reader { instance, ttl }), Some(stamp)) = (self.reader, stamp) else { return };
        let asked_at = self.clock.now();
        let ack = Ack { name: name.clone(), reader: instance, stamp, ttl };
        let told = within(ANSWER_MAX, self.store.ack(&ack)).await.is_ok();
        if let Some(tracked) = self.names.lock().get_mut(name) {
            match told {
                true => tracked.acked = Some((stamp, asked_at.after(ttl))),
                // The next batch brings it up again.
                false => tracked.wanted = true,
            }
        }
    }

    fn refuse(&self, name: &RecordName, error: &StoreError) {
        let now = self.clock.now();
        let is_refusal = !error.is_transient();
        if let Some(tracked) = self.names.lock().get_mut(name) {
            let mut pause = tracked.pauses.pause();
            if let StoreError::Unavailable { retry_after } = error {
                pause = pause.max((*retry_after).min(PAUSES.1));
            }
            (tracked.in_flight, tracked.not_before, tracked.wanted) = (false, now.after(pause), true);
            if is_refusal {
                tracked.latest = None;
            }
        }
        self.count(|counters| counters.refusals += u64::from(is_refusal));
    }
}

/// Asks for what is due, one batch at a time.
async fn ask(shared: Arc<Shared>) {
    loop {
        let wake = shared.wake.notified();
        match shared.due() {
            Ok(names) => {
                shared.count(|counters| counters.batches += 1);
                let answer = within(ANSWER_MAX, shared.store.batch_get(&names)).await;
                shared.settle(&names, answer).await;
            }
            Err(next) => tokio::select! {
                () = wake => {}
                () = shared.clock.sleep_until(next) => {}
            },
        }
    }
}

/// Follows the store's changes, and begins again whenever that ends.
async fn follow(shared: Arc<Shared>) {
    let mut pauses = Backoff::new(PAUSES.0, PAUSES.1, shared.clock.now().0);
    loop {
        shared.count(|counters| counters.follows += 1);
        if follow_once(&shared).await {
            pauses.reset();
        }
        let next = shared.clock.now().after(pauses.pause());
        shared.clock.sleep_until(next).await;
    }
}

/// Follows until the watch ends; `true` if it ever began.
async fn follow_once(shared: &Shared) -> bool {
    let Ok(health) = within(ANSWER_MAX, shared.store.health()).await else { return false };
    let watch = within(ANSWER_MAX, shared.store.watch(&shared.prefix, health.revision)).await;
    let Ok(mut watch) = watch else { return false };
    // What changed before the watch began was not seen.
    shared.want(None);
    while let Ok(event) = watch.next().await {
        shared.take_in(&event.change);
    }
    true
}
