//! Looking names up for one request: asked once, good for as long as its lease, gone with the request.
//!
//! A [`Request`] gives out one [`ResolveScope`], which gives out [`Guard`]s. Both borrow: neither can
//! outlive the request.
//!
//! ```compile_fail
//! # use ibex_metadata::{clock::Clock, local::LocalStore, scope::Request};
//! let store = LocalStore::memory(Clock::system());
//! let scope = {
//!     let request = Request::new(Clock::system());
//!     request.scope(&store)
//! };
//! drop(scope);
//! ```
//!
//! INVARIANTS: a name that was not found is not asked for again in the same request; a result whose lease
//! ran out is asked for again before it is given out; an outage is never remembered as an answer.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::clock::Clock;
use crate::error::{Corruption, Result, StoreError};
use crate::ids::Stamp;
use crate::lease::Leased;
use crate::name::RecordName;
use crate::store::{Snapshot, Store};

/// One request of a user: what is looked up for it is dropped with it.
#[derive(Debug)]
pub struct Request {
    clock: Clock,
}

impl Request {
    /// Begins a request.
    #[must_use]
    pub fn new(clock: Clock) -> Self {
        Self { clock }
    }

    /// Where this request looks names up.
    #[must_use]
    pub fn scope<'r>(&'r self, store: &'r dyn Store) -> ResolveScope<'r> {
        ResolveScope { request: self, store, known: Mutex::default() }
    }
}

/// The names that one request has looked up.
#[derive(Debug)]
pub struct ResolveScope<'r> {
    request: &'r Request,
    store: &'r dyn Store,
    known: Mutex<HashMap<RecordName, Known>>,
}

#[derive(Debug, Clone)]
enum Known {
    Found(Leased<Arc<Snapshot>>),
    Missing,
}

impl ResolveScope<'_> {
    /// Resolves one name.
    ///
    /// # Errors
    /// As one outcome of [`ResolveScope::resolve_all`].
    pub async fn resolve(&self, name: &RecordName) -> Result<Guard<'_>> {
        let mut guards = self.resolve_all(std::slice::from_ref(name)).await?;
        guards.pop().unwrap_or(Err(StoreError::NotFound))
    }

    /// Resolves names: as many outcomes, in the same order. Only what is not known, or not good any more,
    /// is asked of the store, once each, in one batch.
    ///
    /// # Errors
    /// Only what concerns the whole batch; nothing is remembered then.
    pub async fn resolve_all(&self, names: &[RecordName]) -> Result<Vec<Result<Guard<'_>>>> {
        let mut outcomes = self.known_now(names);
        let mut asked: Vec<RecordName> = Vec::new();
        for (name, known) in names.iter().zip(&outcomes) {
            if known.is_none() && !asked.contains(name) {
                asked.push(name.clone());
            }
        }
        if !asked.is_empty() {
            let answers = self.ask(&asked).await?;
            let answers: HashMap<_, _> = asked.iter().zip(answers).collect();
            for (name, outcome) in names.iter().zip(&mut outcomes) {
                if outcome.is_none() {
                    *outcome = answers.get(name).cloned();
                }
            }
        }
        let guard = |outcome: Option<Result<Leased<Arc<Snapshot>>>>| {
            outcome.unwrap_or(Err(StoreError::NotFound)).map(|leased| Guard { leased, scope: self })
        };
        Ok(outcomes.into_iter().map(guard).collect())
    }

    fn known_now(&self, names: &[RecordName]) -> Vec<Option<Result<Leased<Arc<Snapshot>>>>> {
        let now = self.request.clock.now();
        let known = self.known.lock();
        let look = |name: &RecordName| match known.get(name)? {
            Known::Missing => Some(Err(StoreError::NotFound)),
            Known::Found(leased) => leased.check(now).is_ok().then(|| Ok(leased.clone())),
        };
        names.iter().map(look).collect()
    }

    async fn ask(&self, names: &[RecordName]) -> Result<Vec<Result<Leased<Arc<Snapshot>>>>> {
        let outcomes = self.store.batch_get(names).await?;
        let (asked, got) = (names.len() as u64, outcomes.len() as u64);
        if asked != got {
            return Err(StoreError::Corrupt(Corruption::BatchLength { asked, got }));
        }
        let mut known = self.known.lock();
        for (name, outcome) in names.iter().zip(&outcomes) {
            match outcome {
                Ok(leased) => known.insert(name.clone(), Known::Found(leased.clone())),
                Err(StoreError::NotFound) => known.insert(name.clone(), Known::Missing),
                // Not an answer about the name, or one that the next moment may change.
                Err(_) => known.remove(name),
            };
        }
        Ok(outcomes)
    }
}

/// The right to use one resolved record, within its request and its lease.
///
/// Whoever uses a record takes a `&Guard`: [`Guard::snapshot`] before the use begins, [`Guard::finish`]
/// after it is complete. A use that took longer than the lease fails, alone.
#[derive(Debug)]
pub struct Guard<'s> {
    leased: Leased<Arc<Snapshot>>,
    scope: &'s ResolveScope<'s>,
}

impl Guard<'_> {
    /// The record, if its lease still runs.
    ///
    /// # Errors
    /// [`StoreError::LeaseExpired`].
    pub fn snapshot(&self) -> Result<&Snapshot> {
        self.leased.check(self.scope.request.clock.now()).map(Arc::as_ref)
    }

    /// The record and its lease, for whoever checks the lease by itself, before each post and after each
    /// completion.
    #[must_use]
    pub const fn leased(&self) -> &Leased<Arc<Snapshot>> {
        &self.leased
    }

    /// Which snapshot this is; work that is derived from it carries the stamp.
    #[must_use]
    pub fn stamp(&self) -> Stamp {
        self.leased.stamp()
    }

    /// Whether half of the lease is over; a use in progress should then [`Guard::renew`].
    #[must_use]
    pub fn wants_renewal(&self) -> bool {
        self.leased.wants_renewal(self.scope.request.clock.now())
    }

    /// Asks the store again, for a longer lease on the same snapshot.
    ///
    /// # Errors
    /// [`StoreError::LeaseExpired`] under the new fence if the record is another one now: what was begun
    /// with the old one must not be finished. Otherwise as [`Store::get`]; the present lease stays.
    pub async fn renew(&mut self) -> Result<()> {
        let name = self.leased.unchecked().name.clone();
        let mut answers = self.scope.ask(&[name]).await?;
        let leased = answers.pop().unwrap_or(Err(StoreError::NotFound))?;
        if leased.stamp() != self.leased.stamp() {
            return Err(StoreError::LeaseExpired { fence: leased.stamp().fence });
        }
        self.leased = leased;
        Ok(())
    }

    /// Ends the use.
    ///
    /// # Errors
    /// [`StoreError::LeaseExpired`] if the lease ran out during the use: its result must not be trusted.
    pub fn finish(self) -> Result<()> {
        self.snapshot().map(|_| ())
    }
}
