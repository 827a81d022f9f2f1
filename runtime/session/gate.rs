//! Steps, and the gate between two of them at which a group switches.
//!
//! A *step* lies between two points at which no dispatch handle is open: it begins with the first dispatch after such
//! a point, or is one replay of a graph. Members launch the same operations in the same order and close their handles
//! in the same order, so they count the same steps.
//!
//! ```text
//!  close_gate   -> GateAck { step }        at once: nothing of `step` or later is launched from here on
//!  gate_ack     -> the same, with counters once nothing of an open step is left to launch
//!  move_gate(from_step)                    those behind may run up to it, under the old table
//!  is_at_gate   -> commit (switch.rs) -> open_gate
//! ```
//!
//! What is refused is a launch that would begin a step; whatever belongs to an open step goes on. Nothing here waits
//! for the GPU: halves that are queued keep the table of their sequence number.
//!
//! INVARIANT: while the gate is closed at step s, no launch belongs to step s or a later one.

use std::sync::Arc;

use parking_lot::Mutex;

use super::{COMBINE, DISPATCH, Session};
use crate::error::{Error, Gated, Stale};

/// What a session answers to a gate that closes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GateAck {
    /// The first step of which nothing has been launched.
    pub step: u64,
    /// Per lane, the sequence numbers that dispatch and combine of that step will draw; `None` while a step before it
    /// is still being launched.
    pub next_seq: Option<Vec<[u64; 2]>>,
}

/// Steps of one session. Pure.
#[derive(Debug, Default)]
struct Counts {
    /// Steps begun so far: the number of the next one.
    begun: u64,
    /// Handles that are open.
    open: u64,
    /// The first step that may not begin.
    gate: Option<u64>,
    /// When the gate was closed, by the caller's clock.
    closed_ns: u64,
}

impl Counts {
    /// Counts one launch that opens a handle, or refuses it; returns whether it has begun a step.
    fn enter(&mut self) -> Result<bool, Gated> {
        let begins = self.open == 0;
        if begins {
            match self.gate {
                Some(gate) if self.begun >= gate => return Err(Gated { step: self.begun }),
                _ => self.begun += 1,
            }
        }
        self.open += 1;
        Ok(begins)
    }
}

/// Counts a session's steps, and holds its gate.
#[derive(Clone, Default)]
pub(crate) struct Steps(Arc<Mutex<Counts>>);

/// One open handle. The step goes on while it exists.
pub(crate) struct StepHold {
    steps: Steps,
    began: bool,
}

impl StepHold {
    /// Nothing was launched after all: a step that this has begun has not begun.
    pub(super) fn cancel(self) {
        let mut counts = self.steps.0.lock();
        if self.began && counts.open == 1 {
            counts.begun -= 1;
        }
    }
}

impl Drop for StepHold {
    fn drop(&mut self) {
        self.steps.0.lock().open -= 1;
    }
}

impl Steps {
    /// Begins a step or goes on with the open one.
    pub(super) fn enter(&self) -> Result<StepHold, Gated> {
        let began = self.0.lock().enter()?;
        Ok(StepHold { steps: self.clone(), began })
    }

    /// Lets a session that has launched nothing begin at `step`.
    pub(super) fn start_at(&self, step: u64) {
        self.0.lock().begun = step;
    }

    fn is_between_steps(&self) -> bool {
        self.0.lock().open == 0
    }
}

impl Session {
    /// The step that would be launched next.
    #[must_use]
    pub fn next_step(&self) -> u64 {
        self.steps.0.lock().begun
    }

    /// Closes the gate before the next step, at once. Repeated, it changes nothing and says the same.
    ///
    /// From here on dispatches and replays that would begin a step are refused with [`Error::Gated`]. `now_ns` is the
    /// caller's clock; [`Session::open_gate`] tells how long the gate was closed.
    pub fn close_gate(&self, now_ns: u64) -> GateAck {
        {
            let mut counts = self.steps.0.lock();
            if counts.gate.is_none() {
                counts.gate = Some(counts.begun);
                counts.closed_ns = now_ns;
            }
        }
        self.gate_ack()
    }

    /// What this session answers to a closed gate, as of now.
    #[must_use]
    pub fn gate_ack(&self) -> GateAck {
        let step = self.next_step();
        let next_seq = self.steps.is_between_steps().then(|| self.launched_seqs());
        GateAck { step, next_seq }
    }

    /// Lets steps before `from_step` begin, under the old table. Never moves the gate back.
    ///
    /// # Errors
    /// `Stale` if the gate is open.
    pub fn move_gate(&self, from_step: u64) -> Result<(), Error> {
        let mut counts = self.steps.0.lock();
        match counts.gate {
            Some(gate) => {
                counts.gate = Some(gate.max(from_step));
                Ok(())
            }
            None => Err(Error::Stale(Stale { what: "gate (open)", found: counts.begun, current: from_step })),
        }
    }

    /// Is the gate closed?
    #[must_use]
    pub fn is_gate_closed(&self) -> bool {
        self.steps.0.lock().gate.is_some()
    }

    /// May the next step begin? The gate is open, or further on.
    #[must_use]
    pub fn may_begin_step(&self) -> bool {
        let counts = self.steps.0.lock();
        counts.gate.is_none_or(|gate| counts.begun < gate)
    }

    /// Has every step before the gate been launched, and may its table be written?
    ///
    /// Halves of those steps may still be queued or running: they keep the present table. What is waited for is the
    /// table before that, which [`Session::commit`] overwrites.
    ///
    /// # Errors
    /// `Gpu` if the state of the streams cannot be read.
    pub fn is_at_gate(&self) -> Result<bool, Error> {
        {
            let counts = self.steps.0.lock();
            if counts.open != 0 || counts.gate != Some(counts.begun) {
                return Ok(false);
            }
        }
        self.is_old_table_free()
    }

    /// Opens the gate and returns how long it was closed, by the caller's clock; 0 if it was open.
    pub fn open_gate(&self, now_ns: u64) -> u64 {
        let mut counts = self.steps.0.lock();
        match counts.gate.take() {
            Some(_) => now_ns.saturating_sub(counts.closed_ns),
            None => 0,
        }
    }

    /// Refuses unless every step before `from_step` has been launched and none is open.
    pub(super) fn check_at_step(&self, from_step: u64) -> Result<(), Error> {
        let counts = self.steps.0.lock();
        if counts.open != 0 {
            return Err(Error::Stale(Stale {
                what: "gate (handles of a step are open)",
                found: counts.open,
                current: 0,
            }));
        }
        if counts.begun != from_step {
            return Err(Error::Stale(Stale {
                what: "gate (at another step)",
                found: counts.begun,
                current: from_step,
            }));
        }
        Ok(())
    }

    /// Per lane and operation, the sequence number that the next launch will draw, by what has been launched.
    pub(crate) fn launched_seqs(&self) -> Vec<[u64; 2]> {
        let next = |runtime: &super::LaneRuntime| {
            let order = runtime.order.lock();
            [DISPATCH, COMBINE].map(|op| order.ring(op).next_seq())
        };
        self.lanes.iter().map(next).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_lies_between_two_points_without_open_handles() {
        let steps = Steps::default();
        let first = steps.enter().unwrap();
        let second = steps.enter().unwrap();
        assert_eq!(steps.0.lock().begun, 1);
        drop(first);
        let third = steps.enter().unwrap();
        drop((second, third));
        assert_eq!(steps.0.lock().begun, 1, "handles overlapped: one step");
        drop(steps.enter().unwrap());
        assert_eq!(steps.0.lock().begun, 2);
    }

    #[test]
    fn a_closed_gate_refuses_what_begins_a_step_and_nothing_else() {
        let steps = Steps::default();
        let open = steps.enter().unwrap();
        steps.0.lock().gate = Some(1);
        let also = steps.enter().expect("it belongs to the open step");
        drop((open, also));
        assert_eq!(steps.enter().err(), Some(Gated { step: 1 }));
        steps.0.lock().gate = Some(2);
        drop(steps.enter().unwrap());
        assert_eq!(steps.enter().err(), Some(Gated { step: 2 }));
    }

    #[test]
    fn a_launch_that_failed_has_begun_nothing() {
        let steps = Steps::default();
        steps.enter().unwrap().cancel();
        assert_eq!(steps.0.lock().begun, 0);
        let open = steps.enter().unwrap();
        steps.enter().unwrap().cancel();
        drop(open);
        let counts = steps.0.lock();
        assert_eq!((counts.begun, counts.open), (1, 0));
    }
}
