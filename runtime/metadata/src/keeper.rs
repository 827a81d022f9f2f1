//! Keeping a name: its lease renewed in the background, its loss told.
//!
//! A [`Keeper`] owns one task and the right to stop it. It renews every third of the lease, less a part left
//! to chance, so that many owners do not renew at once. An attempt that fails for want of the store is
//! repeated, in bounded steps and for a bounded time; a refusal ends the keeping, because the name is gone.
//!
//! ```text
//!           renewed: confirmed_until moves                  Fenced, LeaseExpired, NotFound, ..
//!  claim --> kept ------------------------------------------------------------> lost (final)
//!              |  ^                                                               ^
//!     no answer|  |an answer                                                      |
//!              v  |                                                               |
//!            doubtful (attempts > 0) ---- no answer for `grace` after the lease --'
//! ```
//!
//! INVARIANTS: a lost name is never claimed again here, since a claim starts an empty record, which is the
//! owner's decision; dropping a keeper neither waits nor tells the store, which sees the lease run out.

use core::time::Duration;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::backoff::Backoff;
use crate::clock::{Clock, within};
use crate::error::{Result, StoreError};
use crate::lease::Moment;
use crate::store::{Claim, Hold, Store};

/// Longest first pause after an attempt that failed.
const FIRST_PAUSE_MAX: Duration = Duration::from_millis(100);
/// Longest pause between attempts while the store is away.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// An answer that took longer than this is not waited for, however long the lease.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What a keeper knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keeping {
    /// Until when the store granted the lease, counted from before it was asked. While the store is away
    /// this passes without the name being lost: the store does not count an outage against an owner.
    pub confirmed_until: Moment,
    /// Renewals that the store confirmed.
    pub renewals: u64,
    /// Attempts that failed since the last one that did not.
    pub attempts: u32,
    /// Why the name is no longer kept, if it is not; final.
    pub lost: Option<StoreError>,
}

/// Keeps one name. See the module's documentation.
#[derive(Debug)]
pub struct Keeper {
    store: Arc<dyn Store>,
    hold: Hold,
    state: watch::Receiver<Keeping>,
    task: JoinHandle<()>,
}

impl Drop for Keeper {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Keeper {
    /// Claims a name and keeps it. Must be called inside tokio, as [`Keeper::keep`].
    ///
    /// # Errors
    /// As [`Store::claim`].
    pub async fn claim(
        store: &Arc<dyn Store>,
        claim: &Claim,
        clock: &Clock,
        grace: Duration,
    ) -> Result<Self> {
        let asked_at = clock.now();
        let hold = store.claim(claim).await?;
        Ok(Self::keep(store, hold, asked_at, clock, grace))
    }

    /// Keeps a name that was claimed, or renewed, at `asked_at` of `clock`. After `grace` without an answer
    /// beyond the end of the lease, it gives up. Must be called inside tokio.
    #[must_use]
    pub fn keep(
        store: &Arc<dyn Store>,
        hold: Hold,
        asked_at: Moment,
        clock: &Clock,
        grace: Duration,
    ) -> Self {
        let confirmed_until = asked_at.after(hold.ttl);
        let (sender, state) =
            watch::channel(Keeping { confirmed_until, renewals: 0, attempts: 0, lost: None });
        let job = Job {
            store: Arc::clone(store),
            pauses: pauses(&hold, asked_at),
            hold: hold.clone(),
            clock: clock.clone(),
            grace,
            sender,
        };
        let task = tokio::spawn(job.run(asked_at));
        Self { store: Arc::clone(store), hold, state, task }
    }

    /// What is kept; to be presented with every write.
    #[must_use]
    pub const fn hold(&self) -> &Hold {
        &self.hold
    }

    /// How it stands. Never waits, never asks.
    #[must_use]
    pub fn state(&self) -> Keeping {
        self.state.borrow().clone()
    }

    /// Tells every change; for those who wait for several things at once.
    #[must_use]
    pub fn subscribe(&self) -> watch::Receiver<Keeping> {
        self.state.clone()
    }

    /// Waits until the name is lost, and says why.
    pub async fn lost(&self) -> StoreError {
        let mut state = self.state.clone();
        let lost = state.wait_for(|state| state.lost.is_some()).await;
        let why = lost.ok().and_then(|state| state.lost.clone());
        // Without a sender the task is gone, and with it the runtime it lived on.
        why.unwrap_or(StoreError::Unavailable { retry_after: Duration::ZERO })
    }

    /// Stops renewing and keeps nothing running; the lease runs out unless somebody else renews it.
    pub async fn stop(mut self) -> Hold {
        self.end().await;
        self.hold.clone()
    }

    /// Stops renewing, then gives the name back.
    ///
    /// # Errors
    /// As [`Store::release`].
    pub async fn release(mut self) -> Result<()> {
        self.end().await;
        self.store.release(&self.hold).await
    }

    async fn end(&mut self) {
        self.task.abort();
        // It was aborted, or had ended: either is what is wanted.
        let _ = (&mut self.task).await;
    }
}

fn pauses(hold: &Hold, at: Moment) -> Backoff {
    let first = (hold.ttl / 24).min(FIRST_PAUSE_MAX);
    let longest = (hold.ttl / 3).min(PAUSE_MAX);
    let bits = u128::from_be_bytes(hold.instance.to_bytes());
    // CAST: the low half of random bits.
    Backoff::new(first, longest, bits as u64 ^ hold.lease.0 ^ at.0)
}

/// What the task works with.
struct Job {
    store: Arc<dyn Store>,
    hold: Hold,
    clock: Clock,
    grace: Duration,
    pauses: Backoff,
    sender: watch::Sender<Keeping>,
}

impl Job {
    async fn run(mut self, asked_at: Moment) {
        let mut next = self.next_renewal(asked_at);
        loop {
            self.clock.sleep_until(next).await;
            let asked_at = self.clock.now();
            let budget = (self.hold.ttl / 3).min(ANSWER_MAX);
            next = match within(budget, self.store.renew(&self.hold)).await {
                Ok(()) => {
                    self.confirm(asked_at);
                    self.next_renewal(asked_at)
                }
                Err(error) if error.is_transient() && !self.is_over() => {
                    self.sender.send_modify(|state| state.attempts = state.attempts.saturating_add(1));
                    self.clock.now().after(self.pause_after(&error))
                }
                Err(error) => {
                    self.sender.send_modify(|state| state.lost = Some(error));
                    return;
                }
            };
        }
    }

    /// A third of the lease after `asked_at`, less up to a twelfth.
    fn next_renewal(&mut self, asked_at: Moment) -> Moment {
        let ttl = self.hold.ttl;
        asked_at.after(ttl / 3 - self.pauses.share(ttl / 12))
    }

    fn confirm(&mut self, asked_at: Moment) {
        self.pauses.reset();
        let confirmed_until = asked_at.after(self.hold.ttl);
        self.sender.send_modify(|state| {
            let renewals = state.renewals + 1;
            *state = Keeping { confirmed_until, renewals, attempts: 0, lost: None };
        });
    }

    fn is_over(&self) -> bool {
        self.clock.now() >= self.sender.borrow().confirmed_until.after(self.grace)
    }

    /// Not before the store said, unless it said something beyond all measure.
    fn pause_after(&mut self, error: &StoreError) -> Duration {
        let pause = self.pauses.pause();
        match error {
            StoreError::Unavailable { retry_after } => pause.max((*retry_after).min(PAUSE_MAX)),
            _ => pause,
        }
    }
}
