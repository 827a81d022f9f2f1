//! Taking registered memory back in two phases: first nobody uses it any more, then nobody can.
//!
//! ```text
//!  publish Draining --> quiesced --> access revoked --> memory given back --> removal published
//!       |                  |               |
//!       | refused:         | deadline      | the device refuses, until the deadline
//!       v                  v               v
//!  buffer stays Ready    Quarantine: pinned, counted, reported; never reused by itself
//! ```
//!
//! *Quiesced* means: none of the owner's own requests names the memory, and every reader that registered
//! (`Store::ack`) under an older stamp has acknowledged the draining one or has fallen silent for longer than
//! its registration. An owner that lost its name cannot ask for readers any more: it goes on to revoke.
//!
//! *Who owns what.* The buffers go to a task, which owns them until access is revoked; [`Deregistration`] only
//! looks on, so dropping it frees nothing early. If the task itself is dropped, with the runtime it runs on,
//! its buffers go to the [`Quarantine`].
//!
//! INVARIANT: a buffer is dropped only after [`Pinned::revoke`] said yes.

use core::time::Duration;
use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::backoff::Backoff;
use crate::clock::{Clock, within};
use crate::error::{Result, StoreError};
use crate::ids::{BufferId, Stamp};
use crate::lease::Moment;
use crate::publisher::Publisher;
use crate::record::{BufferState, PeerRecord};

/// Pauses between looks at readers and requests in flight: from the first to the longest.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));
/// An answer of the store that took longer is asked for again.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// Registered memory, as its owner holds it. Dropping it frees the memory.
pub trait Pinned: Debug + Send + Sync + 'static {
    /// Identity in the owner's record.
    fn id(&self) -> BufferId;
    /// The owner's own requests that name it and whose completion has not been seen.
    fn in_flight(&self) -> u64;
    /// Takes all access away. `true`: no device touches the memory from now on, whoever asks. `false`: the
    /// device refused, and is asked again. Saying `true` twice is no mistake.
    fn revoke(&self) -> bool;
}

/// How far a deregistration is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Stage {
    /// Published as draining; somebody may still use it.
    Draining {
        /// The owner's own requests in flight.
        in_flight: u64,
        /// Readers that may use an older stamp, as last heard; `None`: the store has not said yet.
        readers: Option<u64>,
    },
    /// Nobody can reach the memory; it is given back.
    Revoked,
    /// The record does not list it any more, unless the reason stands here why that could not be said.
    Removed {
        /// Why the removal is not published.
        unpublished: Option<StoreError>,
    },
    /// The deadline passed. The memory is in the quarantine.
    Quarantined {
        /// What was missing: own requests.
        in_flight: u64,
        /// What was missing: readers.
        readers: Option<u64>,
        /// What was missing: the device would not revoke.
        refused: bool,
    },
}

impl Stage {
    /// Whether nothing will change any more.
    #[must_use]
    pub const fn has_ended(&self) -> bool {
        matches!(self, Self::Removed { .. } | Self::Quarantined { .. })
    }
}

/// Memory that could not be taken back in time: pinned for as long as nobody takes it out.
#[derive(Debug, Default)]
pub struct Quarantine {
    held: Mutex<Vec<Box<dyn Pinned>>>,
}

impl Quarantine {
    /// What is in it.
    #[must_use]
    pub fn ids(&self) -> Vec<BufferId> {
        self.held.lock().iter().map(|buffer| buffer.id()).collect()
    }

    /// How much is in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.lock().len()
    }

    /// Whether it is empty.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Gives back what nobody can reach any more: buffers without requests in flight whose access the device
    /// revokes now. What readers still hoped for is refused by the device from then on. Says how many.
    pub fn sweep(&self) -> usize {
        let mut held = self.held.lock();
        let before = held.len();
        held.retain(|buffer| buffer.in_flight() > 0 || !buffer.revoke());
        before - held.len()
    }
}

/// Watches over one deregistration. See the module's documentation.
#[derive(Debug)]
pub struct Deregistration {
    stage: watch::Receiver<Stage>,
    stamp: Stamp,
}

impl Deregistration {
    /// How far it is. Never waits.
    #[must_use]
    pub fn stage(&self) -> Stage {
        self.stage.borrow().clone()
    }

    /// The stamp under which the buffers were published as draining: who acknowledged it uses them no more.
    #[must_use]
    pub const fn stamp(&self) -> Stamp {
        self.stamp
    }

    /// Waits for the end.
    pub async fn done(&self) -> Stage {
        let mut stage = self.stage.clone();
        // Without a sender the task is gone; its last word is true as far as it goes.
        let last = stage.wait_for(Stage::has_ended).await.map(|stage| stage.clone());
        last.unwrap_or_else(|_| self.stage())
    }
}

/// Begins to take buffers back: one publish, one wait and one removal for all of them. Must be called inside
/// tokio, on which the rest runs.
///
/// # Errors
/// As [`Publisher::update`]; the buffers come back, and stay registered and usable.
pub async fn deregister(
    publisher: &Arc<Publisher>,
    buffers: Vec<Box<dyn Pinned>>,
    quarantine: &Arc<Quarantine>,
    clock: &Clock,
    budget: Duration,
) -> Result<Deregistration, (StoreError, Vec<Box<dyn Pinned>>)> {
    let deadline = clock.now().after(budget);
    let ids: Vec<BufferId> = buffers.iter().map(|buffer| buffer.id()).collect();
    let stamp = match publisher.update(|record| drain(record, &ids)).await {
        Ok(stamp) => stamp,
        Err(error) => return Err((error, buffers)),
    };
    let in_flight = buffers.iter().map(|buffer| buffer.in_flight()).sum();
    let (sender, stage) = watch::channel(Stage::Draining { in_flight, readers: None });
    let seed = stamp.version.0 ^ stamp.fence.0 << 32;
    let job = Job {
        publisher: Arc::clone(publisher),
        batch: Batch { buffers, quarantine: Arc::clone(quarantine) },
        ids,
        stamp,
        clock: clock.clone(),
        deadline,
        pauses: Backoff::new(PAUSES.0, PAUSES.1, seed),
        sender,
    };
    tokio::spawn(job.run());
    Ok(Deregistration { stage, stamp })
}

fn drain(record: &mut PeerRecord, ids: &[BufferId]) {
    for buffer in record.buffers.iter_mut().filter(|buffer| ids.contains(&buffer.buffer_id)) {
        buffer.state = BufferState::Draining;
    }
}

/// The buffers of a task; if it ends early they go where nobody reuses them.
#[derive(Debug)]
struct Batch {
    buffers: Vec<Box<dyn Pinned>>,
    quarantine: Arc<Quarantine>,
}

impl Batch {
    fn in_flight(&self) -> u64 {
        self.buffers.iter().map(|buffer| buffer.in_flight()).sum()
    }
}

impl Batch {
    /// Puts what is left where nobody reuses it.
    fn give_up(&mut self) {
        self.quarantine.held.lock().append(&mut self.buffers);
    }
}

impl Drop for Batch {
    fn drop(&mut self) {
        self.give_up();
    }
}

struct Job {
    publisher: Arc<Publisher>,
    batch: Batch,
    ids: Vec<BufferId>,
    stamp: Stamp,
    clock: Clock,
    deadline: Moment,
    pauses: Backoff,
    sender: watch::Sender<Stage>,
}

impl Job {
    async fn run(mut self) {
        let mut readers = None;
        while readers != Some(0) || self.batch.in_flight() > 0 {
            readers = self.readers().await.or(readers);
            let in_flight = self.batch.in_flight();
            self.sender.send_replace(Stage::Draining { in_flight, readers });
            if (readers != Some(0) || in_flight > 0) && !self.pause().await {
                // First done, then said.
                self.batch.give_up();
                self.sender.send_replace(Stage::Quarantined { in_flight, readers, refused: false });
                return;
            }
        }
        if self.revoke().await {
            self.sender.send_replace(Stage::Revoked);
            let unpublished = self.remove().await.err();
            self.sender.send_replace(Stage::Removed { unpublished });
        }
    }

    /// Readers under an older stamp; `None` if the store cannot say.
    async fn readers(&self) -> Option<u64> {
        let (store, name) = (self.publisher.store(), &self.publisher.hold().name);
        match within(ANSWER_MAX, store.readers(name)).await {
            Ok(readers) => Some(readers.iter().filter(|reader| reader.stamp < self.stamp).count() as u64),
            Err(error) if error.is_transient() => None,
            // The name is gone, and with it the list: what is left to do is to revoke.
            Err(_) => Some(0),
        }
    }

    /// `false` once the deadline has passed.
    async fn pause(&mut self) -> bool {
        let now = self.clock.now();
        if now >= self.deadline {
            return false;
        }
        self.clock.sleep_until(now.after(self.pauses.pause()).min(self.deadline)).await;
        true
    }

    /// Revokes buffer by buffer and gives each back as soon as that is done.
    async fn revoke(&mut self) -> bool {
        loop {
            self.batch.buffers.retain(|buffer| !buffer.revoke());
            if self.batch.buffers.is_empty() {
                return true;
            }
            if !self.pause().await {
                let in_flight = self.batch.in_flight();
                let readers = Some(0);
                // First done, then said.
                self.batch.give_up();
                self.sender.send_replace(Stage::Quarantined { in_flight, readers, refused: true });
                return false;
            }
        }
    }

    async fn remove(&mut self) -> Result<()> {
        loop {
            let remove = |record: &mut PeerRecord| {
                record.buffers.retain(|buffer| !self.ids.contains(&buffer.buffer_id));
            };
            match within(ANSWER_MAX, self.publisher.update(remove)).await {
                Ok(_) => return Ok(()),
                Err(error) if error.is_transient() => {
                    if !self.pause().await {
                        return Err(error);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}
