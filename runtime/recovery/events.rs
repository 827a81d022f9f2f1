//! What a session's device reports on its own account, whom it concerns, and what follows from it.
//!
//! [`DeviceLog`] owns what was heard: counters, the newest events until somebody takes them, and per peer the first
//! event against it. Events are taken from the device with every sign of life, and whenever somebody asks.
//!
//! | event | what follows |
//! |---|---|
//! | a queue of a peer failed | that peer is suspected: no queue pair recovers by itself |
//! | the device is gone | every peer reached through it is suspected, and what was posted counts as flushed |
//! | a port went down or up, addresses changed | counted and told; queue pairs have timers for a link that comes back |
//!
//! A device that is gone writes no completion any more, and kernels that wait for one (for all they know their rows may
//! still be read) would wait until their hard cap. So the host writes the flush in its stead, as Linux does for kernel
//! clients of mlx5 after a fatal error: nothing reads those rows again.
//!
//! INVARIANT: the number of a queue means something only while the queue lives. An event is looked up when it is
//! taken, and everything is taken before a queue is destroyed; of a queue that is gone it concerns nobody.

use std::collections::VecDeque;

use ibex_abi::cqe::{CQE, CqeOpcode, ErrorCqe, OpOwn, Syndrome, VendorSyndrome};
use ibex_abi::device_ctx::QpDeviceCtx;
use ibex_hca::AsyncEvent;
use zerocopy::IntoBytes;

use super::Route;
use crate::error::Error;
use crate::ids::Rank;
use crate::layout::qp_slot;
use crate::session::Session;

/// Offset of `QpDeviceCtx::producer_idx`.
const PRODUCER_OFF: u64 = core::mem::offset_of!(QpDeviceCtx, producer_idx) as u64;
/// Most events that wait to be taken; the oldest give way.
pub const DEVICE_EVENTS_MAX: usize = 256;

/// An event of the device, and the peer whose queues it is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceEvent {
    /// What happened.
    pub event: AsyncEvent,
    /// Whose queue it happened to; `None` for the port, the device, and queues that are gone or another session's.
    pub peer: Option<Rank>,
}

/// How often a session's device has reported what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DeviceEventCounts {
    /// Failures of queues of this session.
    pub queue_failures: u64,
    /// Failures of queues that are gone, or belong to another session on the same device.
    pub foreign_failures: u64,
    /// A port went down.
    pub ports_down: u64,
    /// A port came up.
    pub ports_up: u64,
    /// Addresses of a port changed.
    pub addresses_changed: u64,
    /// The device is gone, or failed for good.
    pub removals: u64,
    /// Events that gave way to newer ones before anybody took them; they are counted above all the same.
    pub untaken: u64,
}

/// What a session has heard from its device.
#[derive(Debug, Default)]
pub(crate) struct DeviceLog {
    counts: DeviceEventCounts,
    newest: VecDeque<DeviceEvent>,
    /// By rank: the first event against the peer since it was connected.
    evidence: Vec<Option<AsyncEvent>>,
}

impl DeviceLog {
    pub(crate) fn new(num_ranks: u32) -> Self {
        // CAST: at most 512 ranks.
        Self { evidence: vec![None; num_ranks as usize], ..Self::default() }
    }

    fn note(&mut self, told: DeviceEvent) {
        let counts = &mut self.counts;
        let counter = match (told.event, told.peer) {
            (AsyncEvent::PortDown { .. }, _) => &mut counts.ports_down,
            (AsyncEvent::PortUp { .. }, _) => &mut counts.ports_up,
            (AsyncEvent::AddressChanged { .. }, _) => &mut counts.addresses_changed,
            (AsyncEvent::DeviceRemoved, _) => &mut counts.removals,
            (_, Some(_)) => &mut counts.queue_failures,
            (_, None) => &mut counts.foreign_failures,
        };
        *counter += 1;
        if self.newest.len() == DEVICE_EVENTS_MAX {
            self.newest.pop_front();
            counts.untaken += 1;
        }
        self.newest.push_back(told);
    }

    fn accuse(&mut self, peer: Rank, event: AsyncEvent) {
        self.evidence[peer.index()].get_or_insert(event);
    }

    pub(crate) fn acquit(&mut self, peer: Rank) {
        self.evidence[peer.index()] = None;
    }
}

impl Session {
    /// Takes in what the device has reported meanwhile: it is counted and kept, and peers whose queues failed are
    /// suspected, as if a kernel had met the failure. Never waits.
    ///
    /// # Errors
    /// `Gpu` if a suspicion cannot be written; the event is kept all the same.
    pub fn hear_device(&self) -> Result<(), Error> {
        // Bounded, so that a device that never stops reporting keeps nobody here.
        for _ in 0..DEVICE_EVENTS_MAX {
            let Some(event) = self.hca.poll_async_event() else { break };
            if matches!(event, AsyncEvent::Completion { .. }) {
                continue;
            }
            // Held throughout: nobody connects the peer anew between the look and the suspicion.
            let active = self.active.lock();
            let peer = self.queues.lock().peer_of(&event);
            self.device_log.lock().note(DeviceEvent { event, peer });
            let accused = match event {
                AsyncEvent::DeviceRemoved => {
                    self.ranks().filter(|peer| self.is_behind_device(*peer)).collect()
                }
                _ => peer.into_iter().collect::<Vec<_>>(),
            };
            for peer in accused.into_iter().filter(|peer| active.contains(*peer)) {
                self.device_log.lock().accuse(peer, event);
                self.write_suspicion(peer)?;
            }
        }
        // Again each time: a half that was on its way may have posted since.
        if self.device_log.lock().counts.removals != 0 { self.flush_for_device() } else { Ok(()) }
    }

    /// Completes, with an error, whatever kernels have posted to a device that is gone.
    fn flush_for_device(&self) -> Result<(), Error> {
        let queues = self.queues.lock();
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            for (peer, channel) in
                self.ranks().flat_map(|peer| (0..self.plan.shape.num_channels).map(move |c| (peer, c)))
            {
                let slot = qp_slot(&self.plan.shape, runtime.lane(), peer, channel) as usize;
                let Some((qpn, cqe)) = queues.completion_of(slot) else { continue };
                let posted = self.gpu.load_u32(buffers.qp_ctx_addr(peer, channel) + PRODUCER_OFF)?;
                // CAST: completions name the low 16 bits of an index: that of the last WQEBB posted.
                let last = posted.wrapping_sub(1) as u16;
                let (op_own, vendor) = (OpOwn::new(CqeOpcode::ReqErr, false), VendorSyndrome(0));
                let flushed = ErrorCqe::new(Syndrome::WR_FLUSH, vendor, 0, qpn, last, op_own);
                let mut bytes = [0; CQE];
                bytes.copy_from_slice(flushed.as_bytes());
                // ORDER(4): CQE body -> completion word, which is the last of them. Release at sys.
                for (word, at) in bytes.as_chunks::<4>().0.iter().zip((cqe..).step_by(4)) {
                    self.gpu.store_u32(at, u32::from_ne_bytes(*word))?;
                }
            }
        }
        Ok(())
    }

    /// The events that nobody has taken yet, oldest first.
    ///
    /// # Errors
    /// As [`Session::hear_device`].
    pub fn take_device_events(&self) -> Result<Vec<DeviceEvent>, Error> {
        self.hear_device()?;
        Ok(self.device_log.lock().newest.drain(..).collect())
    }

    /// What the device has reported so far, counted.
    #[must_use]
    pub fn device_event_counts(&self) -> DeviceEventCounts {
        self.device_log.lock().counts
    }

    /// The first event of the device against a peer since the peer was connected.
    #[must_use]
    pub fn device_evidence(&self, peer: Rank) -> Option<AsyncEvent> {
        self.device_log.lock().evidence[peer.index()]
    }

    /// Whether rows to a peer travel through the device.
    fn is_behind_device(&self, peer: Rank) -> bool {
        self.reaches.lock()[peer.index()].report().route == Route::Ibgda
    }

    fn write_suspicion(&self, peer: Rank) -> Result<(), Error> {
        for runtime in &self.lanes {
            self.gpu.store_u32(runtime.buffers.read().suspect_addr(peer), 1)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use ibex_abi::types::QpNum;

    use super::*;

    #[test]
    fn events_are_counted_by_what_they_concern_and_the_first_evidence_stays() {
        let mut log = DeviceLog::new(2);
        let failed = AsyncEvent::QpFatal { qpn: QpNum::new(7) };
        let (down, up) = (AsyncEvent::PortDown { port_num: 1 }, AsyncEvent::PortUp { port_num: 1 });
        let changed = AsyncEvent::AddressChanged { port_num: 1 };
        for event in [failed, down, up, changed, AsyncEvent::DeviceRemoved] {
            log.note(DeviceEvent { event, peer: None });
        }
        log.note(DeviceEvent { event: failed, peer: Some(Rank(1)) });
        let one_each = DeviceEventCounts {
            queue_failures: 1,
            foreign_failures: 1,
            ports_down: 1,
            ports_up: 1,
            addresses_changed: 1,
            removals: 1,
            untaken: 0,
        };
        assert_eq!(log.counts, one_each);
        log.accuse(Rank(1), failed);
        log.accuse(Rank(1), AsyncEvent::DeviceRemoved);
        assert_eq!(log.evidence, [None, Some(failed)]);
        log.acquit(Rank(1));
        assert_eq!(log.evidence, [None, None]);
    }

    #[test]
    fn events_that_nobody_takes_give_way_to_newer_ones() {
        let mut log = DeviceLog::new(1);
        for port_num in 0..=255 {
            log.note(DeviceEvent { event: AsyncEvent::PortDown { port_num }, peer: None });
        }
        log.note(DeviceEvent { event: AsyncEvent::DeviceRemoved, peer: None });
        assert_eq!(
            (log.newest.len(), log.counts.ports_down, log.counts.untaken),
            (DEVICE_EVENTS_MAX, 256, 1)
        );
        assert_eq!(log.newest[0].event, AsyncEvent::PortDown { port_num: 1 });
    }
}
