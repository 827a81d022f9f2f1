//! Completing: CQEs in queue order, the first error, and the flush after it.

use ibex_abi::cqe::{Cqe64, CqeOpcode, ErrorCqe, OpOwn, Syndrome, VendorSyndrome};
use ibex_abi::types::QpState;
use ibex_abi::wqe::{CqUpdate, CtrlSeg, Opcode, WQEBB};
use zerocopy::FromBytes;
use zerocopy::byteorder::big_endian::U32;

use super::fetch::Local;
use super::{Outstanding, Requester, Work};
use crate::AsyncEvent;
use crate::emulated::counters::FirstError;
use crate::emulated::message::Nak;
use crate::emulated::qp::Qp;
use crate::emulated::{EmulatedHca, Nanos};

/// Why a WQE failed, as its CQE says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::emulated) struct Failure {
    pub(in crate::emulated) syndrome: Syndrome,
    pub(in crate::emulated) vendor: VendorSyndrome,
}

impl Failure {
    pub(in crate::emulated) const fn new(syndrome: Syndrome) -> Self {
        let vendor = match syndrome.usual_vendor() {
            Some(vendor) => vendor,
            None => VendorSyndrome::NONE,
        };
        Self { syndrome, vendor }
    }

    pub(super) const BAD_INDEX: Self =
        Self { syndrome: Syndrome::LOCAL_QP_OP, vendor: VendorSyndrome::WQE_INDEX };

    /// SPEC: IBTA vol. 1 §9.9.3: what a negative acknowledgement means to the requester.
    pub(super) const fn of_nak(nak: Nak) -> Self {
        Self::new(match nak {
            Nak::InvalidRequest => Syndrome::REMOTE_INVAL_REQ,
            Nak::RemoteAccess => Syndrome::REMOTE_ACCESS,
            Nak::RemoteOperation => Syndrome::REMOTE_OP,
        })
    }
}

impl Requester {
    /// Completes the messages at the head that are done; how many.
    pub(in crate::emulated) fn retire(&mut self, device: &EmulatedHca, qp: &Qp, now: Nanos) -> usize {
        let mut retired = 0;
        while self.outstanding.front().is_some_and(Outstanding::is_done) {
            retired += usize::from(self.retire_one(device, qp, now));
        }
        retired
    }

    /// As [`retire`](Self::retire), unless the queue pair failed: what is done but came after the first
    /// error is flushed like everything else.
    pub(in crate::emulated) fn retire_unless_failed(&mut self, local: &Local<'_>) -> usize {
        match local.qp.state() {
            QpState::Err => 0,
            _ => self.retire(local.device, local.qp, local.now),
        }
    }

    /// Completes the message at the head if it is done.
    pub(in crate::emulated) fn retire_one(&mut self, device: &EmulatedHca, qp: &Qp, now: Nanos) -> bool {
        match self.outstanding.pop_front() {
            Some(entry) if entry.is_done() => {
                self.progressed(now);
                self.retired += 1;
                complete(device, qp, &entry.work, now);
                true
            }
            Some(entry) => {
                self.outstanding.push_front(entry);
                false
            }
            None => false,
        }
    }

    /// An answer arrived: patience starts anew.
    pub(in crate::emulated) fn progressed(&mut self, now: Nanos) {
        (self.timeouts, self.not_readies) = (0, 0);
        let waiting = !self.outstanding.is_empty();
        let limit = self.patience.ack_nanos().filter(|_| waiting);
        self.ack_deadline = limit.map(|nanos| now.plus(nanos));
    }

    /// Fails the message at `pos`: everything before it completes, the queue pair goes to ERR.
    pub(in crate::emulated) fn fail(
        &mut self,
        device: &EmulatedHca,
        qp: &Qp,
        pos: usize,
        failure: Failure,
        now: Nanos,
    ) {
        // The one that failed is not done, so those that retire stand before it.
        let pos = pos - self.retire(device, qp, now).min(pos);
        // Whatever is still unanswered before the one that failed is flushed, in order, after it.
        if let Some(entry) = self.outstanding.remove(pos) {
            self.fail_work(device, qp, &entry.work, failure);
        }
    }

    /// Fails a WQE that is not in the list of outstanding ones.
    pub(in crate::emulated) fn fail_work(
        &mut self,
        device: &EmulatedHca,
        qp: &Qp,
        work: &Work,
        failure: Failure,
    ) {
        qp.set_state(QpState::Err);
        (self.ack_deadline, self.not_ready_until) = (None, None);
        write_error(device, qp, work.idx, work.opcode, failure);
    }

    /// Whether WQEs of a queue pair in ERR wait to be flushed.
    pub(in crate::emulated) fn has_flushable(&self, device: &EmulatedHca, qp: &Qp) -> bool {
        !self.outstanding.is_empty() || qp.covered(self.next, device.is_strict()) != 0
    }

    /// Flushes up to `limit` WQEs of a queue pair in ERR; how many it flushed.
    pub(in crate::emulated) fn flush(&mut self, device: &EmulatedHca, qp: &Qp, limit: usize) -> usize {
        let mut flushed = 0;
        while flushed < limit {
            let Some(entry) = self.outstanding.pop_front() else {
                break;
            };
            let Work { idx, opcode, update, .. } = entry.work;
            flush_one(device, qp, idx, opcode, update);
            flushed += 1;
        }
        let mut block = [0; WQEBB];
        while flushed < limit && qp.covered(self.next, device.is_strict()) != 0 {
            qp.read_block(self.next, &mut block);
            // What stands in the queue need not be a WQE any more; it still advances by one block.
            let (blocks, opcode, update) = match CtrlSeg::ref_from_prefix(&block) {
                Ok((ctrl, _)) if ctrl.wqe_idx() == self.next => {
                    (ctrl.num_wqebbs().max(1), ctrl.opcode_byte(), ctrl.flags().completion())
                }
                _ => (1, Opcode::Nop.byte(), CqUpdate::Always),
            };
            flush_one(device, qp, self.next, opcode, update);
            self.next = self.next.wrapping_add(blocks);
            flushed += 1;
        }
        flushed
    }
}

/// Writes the completion of a WQE that succeeded, if it asked for one.
pub(super) fn complete(device: &EmulatedHca, qp: &Qp, work: &Work, now: Nanos) {
    if !matches!(work.update, CqUpdate::Always | CqUpdate::AlwaysWithEqe) {
        return;
    }
    let op_own = OpOwn::new(CqeOpcode::Req, false);
    let mut cqe = Cqe64::new(work.opcode, qp.num(), work.len, work.idx, op_own);
    cqe.srqn_uidx = U32::new(qp.layout.user_index);
    cqe.timestamp = now.0.into();
    let cq = &qp.layout.send_cq;
    let with_event = work.update == CqUpdate::AlwaysWithEqe;
    if device.complete(qp, cq, cqe) && with_event && !device.post_completion(cq) {
        device.post_event(AsyncEvent::Completion { cqn: cq.num });
    }
}

fn flush_one(device: &EmulatedHca, qp: &Qp, idx: u16, opcode: u8, update: CqUpdate) {
    if update == CqUpdate::OnFirstError {
        // A flushed WQE is not the first to fail.
        return;
    }
    write_error(device, qp, idx, opcode, Failure::new(Syndrome::WR_FLUSH));
}

fn write_error(device: &EmulatedHca, qp: &Qp, idx: u16, opcode: u8, failure: Failure) {
    let Failure { syndrome, vendor } = failure;
    let op_own = OpOwn::new(CqeOpcode::ReqErr, false);
    let mut cqe = ErrorCqe::new(syndrome, vendor, opcode, qp.num(), idx, op_own);
    cqe.srqn_uidx = U32::new(qp.layout.user_index);
    let (syndrome, vendor) = (syndrome.0, vendor.0);
    device.note_error(qp, FirstError { qpn: qp.num(), wqe_counter: idx, syndrome, vendor });
    device.complete(qp, &qp.layout.send_cq, cqe);
}
