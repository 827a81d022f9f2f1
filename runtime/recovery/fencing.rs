//! Fencing a peer: no device executes for it, its keys are dead, and no half holds what it was reached by.
//!
//! Two calls, so that whoever drives many peers never blocks: [`Session::begin_fence`] takes the slots out of use and
//! notes which halves had entered; [`Session::poll_fence`] finishes once those have left. [`Session::fence`] does both
//! and waits in between.
//!
//! A half that has entered may itself wait for staged rows that only the fenced queues still name. So rows are let go
//! of as soon as the device has flushed those queues, before that half has left.
//!
//! INVARIANT: memory that a half may still read or post from is given back only after that half has left.

use core::time::Duration;
use std::collections::HashMap;

use ibex_abi::cqe::{COMPLETION_WORD_OFFSET, CompletionWord, CqeOpcode};
use ibex_abi::device_ctx::{LaneHostWords, QpDeviceCtx};

use super::Reach;
use crate::error::{Error, Exhausted, Resource, Stale, Violation};
use crate::ids::Rank;
use crate::layout::qp_slot;
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
        if self.first_missing(&entered)?.is_some() {
            self.let_go_of_rows(peer)?;
            return Ok(false);
        }
        if !self.part_from(peer)? {
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
            missing = match self.first_missing(&entered) {
                Ok(Some(half)) => self.let_go_of_rows(peer).map(|()| Some(half)),
                none_or_refused => none_or_refused,
            };
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

    /// Frees the staged rows that a fenced peer's queues name, once the device has completed all that was posted there:
    /// it reads no row any more. Kernels ask no completion of a queue that is not Active, so the host tells them.
    ///
    /// What a half posts after the fence has begun is never executed, so that it does not matter whether it is freed
    /// with the rest or not until the contexts are zeroed.
    fn let_go_of_rows(&self, peer: Rank) -> Result<(), Error> {
        let queues = self.queues.lock();
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            for channel in 0..self.plan.shape.num_channels {
                let slot = qp_slot(&self.plan.shape, runtime.lane(), peer, channel) as usize;
                let Some((_, cqe)) = queues.completion_of(slot) else { continue };
                let context = buffers.qp_ctx_addr(peer, channel);
                if self.gpu.load_u32(context + STAGED_VALID_OFF)? == 0 {
                    continue;
                }
                let posted = self.gpu.load_u32(context + PRODUCER_OFF)?;
                // ORDER(15): the device's reads of rows -> completion word -> what overwrites them. Acquire.
                let word =
                    CompletionWord::from_register(self.gpu.load_u32(cqe + COMPLETION_WORD_OFFSET as u64)?);
                let is_written = word.op_own().opcode() != Some(CqeOpcode::Invalid);
                // CAST: completions name the low 16 bits of an index; a WQE is one basic block.
                if is_written && word.wqe_counter.get().wrapping_add(1) == posted as u16 {
                    self.gpu.store_u32(context + STAGED_VALID_OFF, 0)?;
                }
            }
        }
        Ok(())
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

/// Offset of `QpDeviceCtx::staged_valid`.
const STAGED_VALID_OFF: u64 = core::mem::offset_of!(QpDeviceCtx, staged_valid) as u64;
/// Offset of `QpDeviceCtx::producer_idx`.
const PRODUCER_OFF: u64 = core::mem::offset_of!(QpDeviceCtx, producer_idx) as u64;
/// Offset of `LaneHostWords::entered`.
const ENTERED_OFF: u64 = core::mem::offset_of!(LaneHostWords, entered) as u64;
/// Offset of `LaneHostWords::left`.
const LEFT_OFF: u64 = core::mem::offset_of!(LaneHostWords, left) as u64;
