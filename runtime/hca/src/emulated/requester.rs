//! The requester half: fetches WQEs, sends messages, awaits answers, completes.
//!
//! *Who owns what.* The half owns its position in the send queue and the list of outstanding messages.
//! It keeps no copy of a WQE or of payload: a message that must be sent again is read again from the
//! send queue and from the memory its WQE names. Software may therefore overwrite neither before a
//! completion covers them.
//!
//! ```text
//!  send queue   ...| done | outstanding: sent, unanswered | next ->   covered by doorbell | not yet |
//!                         ^ retired from here, in order     ^ fetched from here
//! ```
//!
//! INVARIANT: WQEs complete in queue order, each at most once. INVARIANT: after the first error nothing
//! executes; everything later is flushed.

use std::collections::VecDeque;
use std::sync::{Arc, Weak};

use complete::Failure;
use ibex_abi::cqe::Syndrome;
use ibex_abi::types::{PathMtu, Psn, QpNum};
use ibex_abi::wqe::{CqUpdate, CtrlSeg};

use super::frames::PacketRequester;
use super::message::Reply;
use super::qp::Qp;
use super::{EmulatedHca, Nanos};
use crate::PathAddress;

pub(super) mod answers;
pub(super) mod complete;
pub(super) mod fetch;
pub(super) mod pieces;
pub(super) mod plain;
pub(super) mod send;

/// Most messages of one queue pair that are sent and unanswered.
pub(super) const OUTSTANDING_MAX: usize = 128;

/// Where the remote end is, from INIT2RTR.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) to: PathAddress,
    pub(super) remote_qpn: QpNum,
    pub(super) mtu: Mtu,
    /// Log2 of the longest message.
    pub(super) log_msg_max: u8,
}

/// The path's packet size.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mtu(pub(super) PathMtu);

impl Mtu {
    /// Packets of a message; an empty one is one packet.
    #[inline]
    pub(super) const fn packets(self, len: u32) -> u32 {
        let shift = 7 + self.0.code();
        let full = len >> shift;
        let rest = len & ((1 << shift) - 1) != 0;
        // CAST: a bool.
        if len == 0 { 1 } else { full + rest as u32 }
    }
}

/// How long and how often to try, from RTR2RTS.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Patience {
    /// Timer code: 4.096 us * 2^code; 0 waits for ever.
    pub(super) ack_timeout: u8,
    pub(super) retry_count: u8,
    /// 7 tries for ever.
    pub(super) rnr_retry: u8,
    pub(super) log_max_reads: u8,
}

impl Patience {
    /// Time until a message without answer is sent again.
    pub(super) const fn ack_nanos(self) -> Option<u64> {
        match self.ack_timeout {
            0 => None,
            code => Some(4096 << code),
        }
    }
}

/// Time that a receiver-not-ready answer asks for, in nanoseconds.
///
/// SPEC: IBTA vol. 1 table 45: in steps of about the square root of two, 0 being the longest.
pub(super) const fn not_ready_nanos(code: u8) -> u64 {
    const HUNDREDTHS_OF_MS: [u64; 32] = [
        65536, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048,
        3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
    ];
    HUNDREDTHS_OF_MS[(code & 31) as usize] * 10_000
}

/// How far an outstanding message has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Progress {
    /// To be sent, or sent again.
    Unsent,
    /// Payload is being placed, chunk by chunk (seeded stepping only).
    Placing,
    /// A READ was accepted and its response is arriving (seeded stepping only).
    Arriving,
    /// Sent; no answer yet.
    Unanswered,
    /// Executed and answered.
    Done,
}

/// A fetched WQE: what sending it again and completing it need.
#[derive(Debug, Clone, Copy)]
pub(super) struct Work {
    pub(super) idx: u16,
    pub(super) blocks: u16,
    pub(super) opcode: u8,
    pub(super) update: CqUpdate,
    /// A READ or an atomic: an acknowledgement alone does not complete it.
    pub(super) has_response: bool,
    pub(super) psn: Psn,
    pub(super) packets: u32,
    /// Bytes that the completion reports.
    pub(super) len: u32,
}

impl Work {
    #[inline]
    pub(super) fn new(ctrl: &CtrlSeg, psn: Psn) -> Self {
        Self {
            idx: ctrl.wqe_idx(),
            blocks: ctrl.num_wqebbs(),
            opcode: ctrl.opcode_byte(),
            update: ctrl.flags().completion(),
            has_response: false,
            psn,
            packets: 0,
            len: 0,
        }
    }

    /// Sequence number after its last packet.
    #[inline]
    pub(super) const fn end(&self) -> Psn {
        self.psn.plus(self.packets)
    }
}

/// A WQE that was fetched and has not completed.
#[derive(Debug, Clone)]
pub(super) struct Outstanding {
    pub(super) work: Work,
    /// Sent at least once.
    pub(super) resent: bool,
    pub(super) progress: Progress,
    /// Chunks still to be placed or to arrive (seeded stepping only).
    pub(super) missing: Vec<u32>,
    /// Payload bytes that the wire took of an unsent message, or that arrived of an unanswered READ.
    pub(super) moved: u64,
}

impl Outstanding {
    pub(super) const fn new(work: Work, progress: Progress) -> Self {
        Self { work, resent: false, progress, missing: Vec::new(), moved: 0 }
    }

    pub(super) fn is_done(&self) -> bool {
        self.progress == Progress::Done
    }
}

/// The remote queue pair, found once and kept while it exists.
#[derive(Debug, Clone)]
pub(super) struct Far {
    pub(super) device: Weak<EmulatedHca>,
    pub(super) qp: Weak<Qp>,
}

/// State of the half; all zero in RST.
#[derive(Debug)]
pub(super) struct Requester {
    pub(super) connection: Option<Connection>,
    pub(super) patience: Patience,
    /// The next basic block to fetch.
    pub(super) next: u16,
    /// Sequence number of the next new message.
    pub(super) psn: Psn,
    pub(super) outstanding: VecDeque<Outstanding>,
    /// WQEs that completed and left the list of outstanding ones.
    pub(super) retired: u64,
    /// Timeouts since anything was answered.
    pub(super) timeouts: u8,
    /// Receiver-not-ready answers to the oldest message.
    pub(super) not_readies: u8,
    pub(super) ack_deadline: Option<Nanos>,
    pub(super) not_ready_until: Option<Nanos>,
    pub(super) far: Option<Far>,
    /// The state machine on packets, where the fabric carries them.
    pub(super) packets: Option<Box<PacketRequester>>,
}

impl Default for Requester {
    fn default() -> Self {
        Self {
            connection: None,
            patience: Patience::default(),
            next: 0,
            psn: Psn::new(0),
            outstanding: VecDeque::new(),
            retired: 0,
            timeouts: 0,
            not_readies: 0,
            ack_deadline: None,
            not_ready_until: None,
            far: None,
            packets: None,
        }
    }
}

/// Both ends' objects that a wire works on, kept alive for one turn.
pub(super) struct FarEnd {
    pub(super) device: Arc<EmulatedHca>,
    pub(super) qp: Arc<Qp>,
}

impl Requester {
    /// The remote end, if it exists; looked up again when it was replaced.
    pub(super) fn far_end(&mut self, device: &EmulatedHca) -> Option<FarEnd> {
        if let Some(far) = &self.far
            && let (Some(device), Some(qp)) = (far.device.upgrade(), far.qp.upgrade())
        {
            return Some(FarEnd { device, qp });
        }
        let connection = self.connection.as_ref()?;
        let far_device = device.fabric().locate(&connection.to)?;
        let qp = far_device.find_qp(connection.remote_qpn)?;
        self.far = Some(Far { device: Arc::downgrade(&far_device), qp: Arc::downgrade(&qp) });
        Some(FarEnd { device: far_device, qp })
    }

    /// The last sequence number that was answered.
    pub(super) fn last_acked(&self) -> Psn {
        let next = self.outstanding.iter().find(|entry| !entry.is_done()).map_or(self.psn, |e| e.work.psn);
        next.plus(0xff_ffff)
    }

    /// Index of the first message that must be sent (again).
    pub(super) fn first_unsent(&self) -> Option<usize> {
        self.outstanding.iter().position(|entry| entry.progress == Progress::Unsent)
    }

    /// Marks everything unanswered from `start` on for sending again.
    pub(super) fn go_back(&mut self, start: usize) {
        for entry in self.outstanding.iter_mut().skip(start) {
            if matches!(entry.progress, Progress::Unanswered | Progress::Arriving) {
                entry.progress = Progress::Unsent;
            }
            entry.moved = 0;
        }
    }

    /// Marks the message at `pos`, and what is unanswered after it, for sending again.
    fn send_from_start(&mut self, pos: usize) {
        self.go_back(pos);
        self.outstanding[pos].progress = Progress::Unsent;
    }

    /// Marks all messages before `next` as answered; a READ or atomic among them without its response
    /// is asked for again (an implied negative acknowledgement).
    pub(super) fn acknowledge(&mut self, next: Psn) {
        let mut missing = None;
        for (pos, entry) in self.outstanding.iter_mut().enumerate() {
            if entry.is_done() {
                continue;
            }
            if entry.work.end().is_after(next) || entry.progress == Progress::Unsent && !entry.resent {
                break;
            }
            match (entry.work.has_response, &entry.progress) {
                (false, _) => entry.progress = Progress::Done,
                (true, Progress::Unanswered) => {
                    missing.get_or_insert(pos);
                }
                (true, _) => {}
            }
        }
        if let Some(pos) = missing {
            self.go_back(pos);
        }
    }

    /// What a reply means for the message at `pos`; `Some` ends the turn.
    pub(super) fn settle(&mut self, pos: usize, reply: Reply, now: Nanos) -> Settled {
        match reply {
            Reply::Ack { next } => {
                self.acknowledge(next);
                Settled::GoOn
            }
            Reply::Atomic { next, .. } | Reply::Data { next, .. } => {
                self.outstanding[pos].progress = Progress::Done;
                self.acknowledge(next);
                Settled::GoOn
            }
            Reply::NotReady { timer } => {
                self.acknowledge(self.outstanding[pos].work.psn);
                self.send_from_start(pos);
                if self.patience.rnr_retry != 7 {
                    if self.not_readies >= self.patience.rnr_retry {
                        return Settled::Failed(Failure::new(Syndrome::RNR_RETRY_EXC));
                    }
                    self.not_readies += 1;
                }
                // The remote end lives: only its own timer counts until then.
                (self.timeouts, self.ack_deadline) = (0, None);
                self.not_ready_until = Some(now.plus(not_ready_nanos(timer)));
                Settled::NotReady
            }
            Reply::OutOfSequence { expected } => {
                let behind = |entry: &Outstanding| !entry.is_done() && entry.work.end().is_after(expected);
                match self.outstanding.iter().position(behind) {
                    Some(first) if first < pos || self.outstanding[first].work.psn == expected => {
                        self.go_back(first);
                        self.send_from_start(pos);
                        Settled::GoOn
                    }
                    _ => Settled::Wait,
                }
            }
            Reply::Refused(nak) => {
                let unanswered =
                    self.outstanding.iter().take(pos).position(|e| e.work.has_response && !e.is_done());
                if let Some(first) = unanswered {
                    self.go_back(first);
                    return Settled::GoOn;
                }
                self.acknowledge(self.outstanding[pos].work.psn);
                Settled::Failed(Failure::of_nak(nak))
            }
        }
    }
}

/// How the requester goes on after a reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Settled {
    GoOn,
    /// Nothing more can be sent before an answer or a timeout.
    Wait,
    /// Nothing more can be sent before the remote end's timer.
    NotReady,
    /// The message failed.
    Failed(Failure),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_as_many_packets_as_its_length_needs() {
        let packets = |len| Mtu(PathMtu::B4096).packets(len);
        assert_eq!([0, 1, 4096, 4097, 8192].map(packets), [1, 1, 1, 2, 2]);
        assert_eq!(Mtu(PathMtu::B256).packets(1 << 30), 1 << 22);
    }

    #[test]
    fn timers_follow_their_codes() {
        let patience = |ack_timeout| Patience { ack_timeout, ..Patience::default() };
        assert_eq!(patience(0).ack_nanos(), None);
        assert_eq!(patience(14).ack_nanos(), Some(67_108_864));
        assert_eq!(not_ready_nanos(0), 655_360_000);
        assert_eq!(not_ready_nanos(1), 10_000);
        assert_eq!(not_ready_nanos(12), 640_000);
        assert_eq!(not_ready_nanos(31), 491_520_000);
    }
}
