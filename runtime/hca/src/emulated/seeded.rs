//! Stepping for simulation: one small piece at a time, chosen by whoever holds the seed.
//!
//! One thread drives all devices. What the device may do next is listed, one entry is chosen and executed;
//! nothing else moves. Everything that hardware may interleave can be reached by some choices, and the same
//! choices replay the same run.

use std::sync::Arc;

use ibex_abi::types::QpState;

use super::EmulatedHca;
use super::fabric::Medium;
use super::fabric::inproc::{KeyGuards, Link};
use super::qp::Qp;
use super::requester::fetch::Local;
use super::requester::pieces::SendPiece;
use super::requester::send::Turn;
use super::stepping::Step;
use super::tap::{Tap, Tapped};
use crate::Nanos;

/// One thing that a device could do next.
#[derive(Debug, Clone, Copy)]
enum Candidate {
    /// Take in the doorbells that were rung.
    Doorbells,
    /// Let the requester half of a queue pair do something.
    Send { qp: usize, piece: SendPiece },
    /// Flush one entry of a queue pair in ERR.
    Flush { qp: usize },
}

impl EmulatedHca {
    /// Executes one piece of work, chosen among all that hardware could do next.
    ///
    /// `choose(n)` gives a number below `n`. Must not run at the same time as [`step`](Self::step). Pieces
    /// are for devices of one process; on other fabrics this is [`step`](Self::step).
    pub fn step_seeded(&self, now: Nanos, choose: &mut dyn FnMut(u32) -> u32) -> Step {
        if !matches!(self.fabric().medium(), Medium::Inproc) {
            // What may happen in which order is a switch's to choose, frame by frame, or another process's.
            return self.step(now);
        }
        let mut step = Step::default();
        if self.fabric_port().is_dead() {
            return step;
        }
        step.did_work = self.take_event_doorbells();
        let table = self.qp_table();
        let mut candidates = self.candidates(&table.list, now, &mut step);
        while !candidates.is_empty() && !step.did_work {
            let count = u32::try_from(candidates.len()).unwrap_or(u32::MAX);
            // A chooser that is out of range is brought back into it.
            let chosen = candidates.swap_remove((choose(count) % count) as usize);
            step.did_work = match chosen {
                Candidate::Doorbells => {
                    self.scan_doorbells();
                    true
                }
                Candidate::Send { qp, piece } => self.execute_piece(&table.list[qp], piece, now),
                Candidate::Flush { qp } => self.flush_piece(&table.list[qp]),
            };
        }
        step
    }

    /// Whether some message of this device has been placed at its responder in part, and not ended.
    ///
    /// For simulations that let a sender die there; other stepping places messages whole.
    #[must_use]
    pub fn is_mid_message(&self) -> bool {
        self.qp_table().list.iter().any(|qp| qp.requester.lock().is_mid_message())
    }

    /// Everything that could happen next; deadlines go to `step`.
    fn candidates(&self, qps: &[Arc<Qp>], now: Nanos, step: &mut Step) -> Vec<Candidate> {
        let mut candidates = Vec::new();
        if self.is_strict() && self.uars.lock().iter().any(|uar| uar.has_news()) {
            candidates.push(Candidate::Doorbells);
        }
        for (idx, qp) in qps.iter().enumerate() {
            match qp.state() {
                QpState::Rts | QpState::SqDraining if qp.is_idle(self.is_strict()) => {}
                QpState::Rts | QpState::SqDraining => {
                    let requester = qp.requester.lock();
                    if !qp.state().executes_sends() {
                        continue;
                    }
                    requester.note_idleness(qp);
                    requester.pieces(self, qp, now, |piece| {
                        candidates.push(Candidate::Send { qp: idx, piece });
                    });
                    step.merge(Turn { did_work: false, deadline: requester.deadline() });
                }
                QpState::Err => {
                    let (requester, responder) = (qp.requester.lock(), qp.responder.lock());
                    let waits = || requester.has_flushable(self, qp) || responder.has_receives(qp);
                    if qp.state() == QpState::Err && waits() {
                        candidates.push(Candidate::Flush { qp: idx });
                    }
                }
                _ => {}
            }
        }
        candidates
    }

    fn execute_piece(&self, qp: &Arc<Qp>, piece: SendPiece, now: Nanos) -> bool {
        let mut requester = qp.requester.lock();
        if !qp.state().executes_sends() {
            return false;
        }
        qp.note_busy();
        let far = requester.far_end(self);
        let far = far.as_ref().map(|far| (&*far.device, &*far.qp));
        let keys = KeyGuards::lock(self, far.map(|(device, _)| device));
        let link = Link::open(self, qp.num(), far, &keys, now);
        let local = Local { device: self, qp, keys: keys.near(), now };
        let tap = Tap::of(self, qp, requester.connection.as_ref(), now);
        requester.execute(&local, &mut Tapped::new(link, tap, false), piece)
    }

    fn flush_piece(&self, qp: &Qp) -> bool {
        let sent = qp.requester.lock().flush(self, qp, 1);
        sent + qp.responder.lock().flush(self, qp, 1 - sent.min(1)) != 0
    }
}
