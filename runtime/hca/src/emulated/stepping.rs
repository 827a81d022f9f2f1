//! Stepping: one pass over doorbells and queue pairs.
//!
//! Any thread may step any device at any time. A queue pair that another thread is working on is left
//! to it; nobody waits, so two threads that step two devices which talk to each other both get on.

use std::sync::Arc;

use ibex_abi::types::QpState;

use super::EmulatedHca;
use super::counters::add;
use super::fabric::Medium;
use super::fabric::inproc::{KeyGuards, Link};
use super::fabric::shm::Shm;
use super::qp::{Qp, ahead};
use super::requester::Requester;
use super::requester::fetch::Local;
use super::requester::send::Turn;
use super::tap::{Tap, Tapped};
use crate::Nanos;

/// Flushed entries of one queue pair in one step.
const FLUSH_MAX: usize = 64;

/// What a step did, and when the next is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Step {
    /// Something changed; step again soon.
    pub did_work: bool,
    /// Without new work nothing will change before this instant.
    pub next_deadline: Option<Nanos>,
}

impl Step {
    #[inline]
    pub(super) fn merge(&mut self, turn: Turn) {
        self.did_work |= turn.did_work;
        self.next_deadline = match (self.next_deadline, turn.deadline) {
            (Some(one), Some(other)) => Some(one.min(other)),
            (one, other) => one.or(other),
        };
    }
}

impl EmulatedHca {
    /// Looks at every doorbell and lets every queue pair take a turn.
    pub fn step(&self, now: Nanos) -> Step {
        let mut step = Step::default();
        if self.fabric_port().is_dead() {
            return step;
        }
        if self.is_strict() {
            self.scan_doorbells();
        }
        let told = self.take_event_doorbells();
        if let Some(station) = &self.station {
            let mut step = station.step(self, now);
            step.did_work |= told;
            return step;
        }
        step.did_work |= told;
        step.merge(self.fabric().take_arrivals(self, now));
        for qp in &self.qp_table().list {
            step.merge(self.step_qp(qp, now));
        }
        step
    }

    /// Takes in the doorbells rung since the last scan.
    pub(super) fn scan_doorbells(&self) {
        let Some(_scanning) = self.scanning.try_lock() else {
            return;
        };
        let uars = Arc::clone(&self.uars.lock());
        for uar in uars.iter() {
            uar.poll(|doorbell| {
                add(&self.counters.doorbells, 1);
                // Looked up now: a table taken before the poll may be older than the queue pair that rang, if this
                // thread was put aside in between. Nobody withdraws one while the scanning lock is held.
                match self.find_qp(doorbell.qpn()) {
                    Some(qp) if qp.layout.uar.idx == uar.idx && takes_doorbells(&qp) => {
                        self.hear(&qp, doorbell.producer_idx());
                    }
                    _ => add(&self.counters.late_doorbells, 1),
                }
            });
        }
    }

    /// A doorbell of `qp`: what it covers must be covered by the record already.
    fn hear(&self, qp: &Qp, producer_idx: u16) {
        let behind = ahead(producer_idx, qp.record_idx());
        add(&self.counters.unrung_wqes, behind.into());
        qp.ring(producer_idx);
    }

    /// Counts, as violations, WQEBBs that a record covers and no doorbell ever did; how many.
    ///
    /// Call it when no post is under way, such as at the end of a half.
    pub fn check_unrung(&self) -> u64 {
        if !self.is_strict() {
            return 0;
        }
        // Whoever scans now may be about to hear the doorbell that covers a record: wait for it.
        let seen = self.scanning.lock();
        drop(seen);
        self.scan_doorbells();
        let _scanning = self.scanning.lock();
        let unrung = |qp: &Arc<Qp>| match takes_doorbells(qp) {
            true => u64::from(ahead(qp.record_idx(), qp.rung_idx())),
            false => 0,
        };
        let total = self.qp_table().list.iter().map(unrung).sum();
        add(&self.counters.unrung_wqes, total);
        total
    }

    fn step_qp(&self, qp: &Arc<Qp>, now: Nanos) -> Turn {
        match qp.state() {
            QpState::Rts | QpState::SqDraining => self.step_sends(qp, now),
            QpState::Err => self.step_flush(qp),
            _ => Turn::default(),
        }
    }

    fn step_sends(&self, qp: &Arc<Qp>, now: Nanos) -> Turn {
        if qp.is_idle(self.is_strict()) {
            return Turn::default();
        }
        let Some(mut requester) = qp.requester.try_lock() else {
            return Turn::default();
        };
        // A command may have changed the state until the lock was taken.
        if !qp.state().executes_sends() {
            return Turn { did_work: true, deadline: None };
        }
        if !requester.has_work(self, qp, now) {
            requester.note_idleness(qp);
            return Turn { did_work: false, deadline: requester.deadline() };
        }
        match self.fabric().medium() {
            Medium::Inproc => self.send_inproc(qp, &mut requester, now),
            // Packets are the station's.
            Medium::Switched(_) | Medium::Udp(_) => Turn::default(),
            Medium::Shm(shm) => self.send_shm(shm, qp, &mut requester, now),
        }
    }

    fn send_shm(&self, shm: &Shm, qp: &Qp, requester: &mut Requester, now: Nanos) -> Turn {
        let peer = requester.connection.as_ref().map(|connection| (connection.to, connection.remote_qpn));
        let link = peer.and_then(|(to, remote)| Some((shm.link(self.fabric_port(), &to)?, remote)));
        let Some((link, remote)) = link else {
            // A port of this process, or nobody.
            return self.send_inproc(qp, requester, now);
        };
        let keys = self.keys.read();
        let local = Local { device: self, qp, keys: &keys, now };
        let tap = Tap::of(self, qp, requester.connection.as_ref(), now);
        requester.turn(&local, &mut Tapped::new(link.open(qp.num(), remote), tap, true))
    }

    fn send_inproc(&self, qp: &Qp, requester: &mut Requester, now: Nanos) -> Turn {
        let far = requester.far_end(self);
        let far = far.as_ref().map(|far| (&*far.device, &*far.qp));
        let keys = KeyGuards::lock(self, far.map(|(device, _)| device));
        let link = Link::open(self, qp.num(), far, &keys, now);
        let local = Local { device: self, qp, keys: keys.near(), now };
        let tap = Tap::of(self, qp, requester.connection.as_ref(), now);
        requester.turn(&local, &mut Tapped::new(link, tap, false))
    }

    /// Flushes both queues of a queue pair in ERR.
    pub(super) fn step_flush(&self, qp: &Qp) -> Turn {
        let mut flushed = 0;
        if let Some(mut requester) = qp.requester.try_lock()
            && qp.state() == QpState::Err
        {
            flushed += requester.flush(self, qp, FLUSH_MAX);
        }
        if let Some(mut responder) = qp.responder.try_lock()
            && qp.state() == QpState::Err
        {
            flushed += responder.flush(self, qp, FLUSH_MAX);
        }
        Turn { did_work: flushed != 0, deadline: None }
    }
}

/// Whether a doorbell means anything to a queue pair in its present state.
fn takes_doorbells(qp: &Qp) -> bool {
    matches!(qp.state(), QpState::Rts | QpState::Sqd | QpState::SqDraining | QpState::Sqer | QpState::Err)
}
