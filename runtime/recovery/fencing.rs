//! Fencing a peer: no device executes for it, its keys are dead, and no half holds what it was reached by.
//!
//! Two calls, so that whoever drives many peers never blocks: [`Session::begin_fence`] takes the slots out of use and
//! notes which halves had entered; [`Session::poll_fence`] finishes once those have left. [`Session::fence`] does both
//! and waits in between.
//!
//! INVARIANT: memory that a half may still read or post from is given back only after that half has left.

use core::time::Duration;
use std::collections::HashMap;

use ibex_abi::device_ctx::LaneHostWords;

use super::Reach;
use crate::error::{Error, Exhausted, Resource, Stale, Violation};
use crate::ids::Rank;
use crate::session::{Guard, LaneRuntime, Mark, Session};

/// Fences that have begun: per peer and lane, what had entered at the mark.
#[derive(Default)]
pub(crate) struct Fences(HashMap<Rank, Vec<Entered>>);

/// What may hold old fields of a lane's contexts.
#[derive(Clone)]
struct Entered {
    /// How many halves had entered.
    count: u64,
    /// Behind all of them, where they may overlap: launches on several streams. Halves of one stream leave in the
    /// order in which they entered, so that a count is enough.
    marks: Vec<Mark>,
}

impl Session {
    /// Masks `peer`'s slots and stops the device from executing what they hold. Repeated, it begins anew.
    ///
    /// # Errors
    /// What the HCA refused; the slots stay masked, and a retry is allowed.
    pub fn begin_fence(&self, peer: Rank) -> Result<(), Error> {
        self.mask(peer)?;
        let entered = self.entered_halves()?;
        {
            let mut queues = self.queues.lock();
            queues.sweep();
            queues.fail_slots(peer)?;
        }
        self.fences.lock().0.insert(peer, entered);
        Ok(())
    }

    /// Makes the slots of a peer empty, once every half that might still use them has left: no device executes from
    /// them, the dead incarnation's keys are gone, and every word that the peer has written or is owed is zero. Returns
    /// whether that is so; never waits.
    ///
    /// A peer in another process that may have our memory mapped leaves its region behind as long as that process has
    /// not ended, and its successor gets a spare one; where none is left, that end is awaited.
    ///
    /// # Errors
    /// `Stale` if no fence was begun; what the HCA refused: then a retry goes on where this stopped.
    pub fn poll_fence(&self, peer: Rank) -> Result<bool, Error> {
        // Without the lock: signs of life go on, and they may be sent by the thread that runs the half we wait for.
        let Some(entered) = self.fences.lock().0.get(&peer).cloned() else {
            return Err(Error::Stale(Stale { what: "fence (not begun)", found: 0, current: 1 }));
        };
        if self.first_missing(&entered)?.is_some() || !self.part_from(peer)? {
            return Ok(false);
        }
        // What the device has said of the queues is heard while their numbers are still theirs.
        self.hear_device()?;
        self.queues.lock().empty_slots(peer)?;
        for runtime in &self.lanes {
            // The dead incarnation's keys go with its queue pairs; nobody else's are touched.
            runtime.buffers.write().renew_peer_keys(peer)?;
            self.zero_words(&runtime.buffers.read(), peer)?;
        }
        // No context names the peer's memory any more.
        self.reaches.lock()[peer.index()] = Reach::default();
        self.note_reach(peer)?;
        self.fences.lock().0.remove(&peer);
        Ok(true)
    }

    /// [`Session::begin_fence`] and [`Session::poll_fence`], with the wait in between.
    ///
    /// # Errors
    /// What the HCA refused, `Protocol` if a half outlives every limit, or `Exhausted` if the peer's process lives and
    /// no spare region is left; the slots stay masked, and a retry goes on where this stopped.
    pub fn fence(&self, peer: Rank) -> Result<(), Error> {
        self.begin_fence(peer)?;
        let entered = self.fences.lock().0.get(&peer).cloned().unwrap_or_default();
        // Bounded: a half ends by its own deadlines.
        let cap = Duration::from_millis(u64::from(self.config.stall_ms()) * u64::from(self.config.num_ranks));
        let mut missing = self.first_missing(&entered);
        let all_left = self.gpu.wait_for(2 * cap, &mut || {
            missing = self.first_missing(&entered);
            !matches!(missing, Ok(Some(_)))
        })?;
        match missing? {
            Some((found, expected)) if !all_left => Err(Error::Protocol(Violation {
                from: self.rank,
                check: "halves that left within twice the hard cap",
                found,
                expected,
            })),
            _ if self.poll_fence(peer)? => Ok(()),
            _ => Err(Error::Exhausted(Exhausted {
                resource: Resource::SpareRegions,
                limit: self.config.spare_regions.into(),
                in_use: self.config.spare_regions.into(),
                requested: 1,
            })),
        }
    }

    /// Halves that have entered so far, per lane.
    fn entered_halves(&self) -> Result<Vec<Entered>, Error> {
        let of = |runtime: &LaneRuntime| {
            let count = self.gpu.load_u64(runtime.buffers.read().host_words_addr() + ENTERED_OFF)?;
            let mut marks = runtime.launched();
            if marks.iter().all(|mark| mark.is_same_stream(&marks[0])) {
                marks.clear();
            }
            Ok(Entered { count, marks })
        };
        self.lanes.iter().map(of).collect()
    }

    /// The first lane whose halves that had entered have not all left, send and receive alike: how many have, and how
    /// many had entered.
    fn first_missing(&self, entered: &[Entered]) -> Result<Option<(u64, u64)>, Error> {
        for (runtime, entered) in self.lanes.iter().zip(entered) {
            if !runtime.is_guarded(Guard::Grace) {
                continue;
            }
            // ORDER(10): everything a half did -> left. Acquire.
            let words = runtime.buffers.read().host_words_addr();
            let left = self.gpu.load_u64(words + LEFT_OFF)?;
            if left < entered.count {
                return Ok(Some((left, entered.count)));
            }
            // None was in at the moment in which as many had left as have entered by now.
            let is_idle = left == self.gpu.load_u64(words + ENTERED_OFF)?;
            for mark in entered.marks.iter().filter(|_| !is_idle) {
                if !mark.is_past(&*self.gpu)? {
                    return Ok(Some((left, left + 1)));
                }
            }
        }
        Ok(None)
    }
}

/// Offset of `LaneHostWords::entered`.
const ENTERED_OFF: u64 = core::mem::offset_of!(LaneHostWords, entered) as u64;
/// Offset of `LaneHostWords::left`.
const LEFT_OFF: u64 = core::mem::offset_of!(LaneHostWords, left) as u64;
