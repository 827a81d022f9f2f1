//! The requester: cuts messages into packets, sends them again when they are lost, completes in order.
//!
//! *Who owns what.* It owns the list of posted messages, sequence numbers and timers. Payload is read
//! through [`Payload`] when a packet is written, also when it is written again, so its owner must keep it
//! until the message's event.
//!
//! ```text
//!  messages  ...completed | front ................................ | posted later ->
//!  psn                    ^ unacked          ^ cursor     ^ sent_end                ^ next_psn
//!                         |<-- in flight --->|<- again -->|<------- not yet sent --->|
//! ```
//!
//! Going back always means going back to `unacked`: everything after it is sent again (go-back-N); a
//! READ of which part has arrived is asked for the rest.
//!
//! INVARIANT: `unacked <= cursor <= sent_end <= next_psn` on the circle, all within 2^23 of each other.
//! INVARIANT: every posted message gets exactly one event, in the order of posting.

mod answers;
mod retry;
mod transmit;

use std::collections::VecDeque;

use crate::types::{AckTimeout, AtomicOp, Mtu, Nanos, PKey, Psn, QpNum, RemoteAddr, RemoteRange};
use crate::{Dropped, MESSAGE_LEN_MAX};

/// Sequence numbers that posted messages may take together: less than half the circle.
const PSN_SPAN_MAX: u32 = (1 << 23) - 1;

/// What a requester needs to know about its connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequesterConfig {
    /// Queue pair at the other end.
    pub dest_qpn: QpNum,
    /// Partition.
    pub pkey: PKey,
    /// Payload of a full packet.
    pub mtu: Mtu,
    /// Sequence number of the first packet.
    pub first_psn: Psn,
    /// Times that a packet without answer is sent again before its message fails.
    pub retry_count: u8,
    /// Times that a message is sent again to a responder that was not ready; 7 is without limit.
    pub rnr_retry: u8,
    /// Time that an answer may take.
    pub ack_timeout: AckTimeout,
    /// Time after which silence first makes it send again, earlier than the ack timeout; doubled each
    /// time, as long as that is at most half the ack timeout.
    ///
    /// These attempts come before those that `retry_count` limits, and take none of the patience that the
    /// two numbers promise: a lost packet costs little where the ack timeout must outlast a stall.
    pub first_timeout: Option<Nanos>,
    /// READs and atomics that may be in flight together; 0 counts as 1.
    pub max_reads: u8,
    /// Packets that may be in flight together; 0 counts as 1.
    pub window_packets: u32,
    /// Packets after which an acknowledgement is asked for at the latest; 0 counts as 1.
    pub ack_every: u32,
    /// Messages that may be posted and not completed.
    pub max_messages: usize,
}

impl RequesterConfig {
    /// `rnr_retry` that tries for ever.
    pub const RNR_RETRY_FOREVER: u8 = 7;

    /// The usual limits for a connection to `dest_qpn`.
    #[must_use]
    pub const fn new(dest_qpn: QpNum, mtu: Mtu, first_psn: Psn) -> Self {
        Self {
            dest_qpn,
            pkey: PKey::DEFAULT,
            mtu,
            first_psn,
            retry_count: 7,
            rnr_retry: Self::RNR_RETRY_FOREVER,
            ack_timeout: AckTimeout::new(14),
            first_timeout: None,
            max_reads: 16,
            window_packets: 256,
            ack_every: 32,
            max_messages: 128,
        }
    }
}

/// The name that the caller gives a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MessageId(pub u64);

/// What a message does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Payload to an address at the other end.
    Write {
        /// Where to, and how much.
        to: RemoteRange,
        /// Immediate data for a receive there.
        imm: Option<u32>,
        /// Ask for an event there; only with immediate data.
        solicited: bool,
    },
    /// Payload to the next receive at the other end.
    Send {
        /// Bytes of payload.
        len: u32,
        /// Immediate data.
        imm: Option<u32>,
        /// Ask for an event there.
        solicited: bool,
    },
    /// Payload from the other end.
    Read {
        /// Where from, and how much.
        from: RemoteRange,
    },
    /// An operation on one word at the other end.
    Atomic {
        /// The word.
        on: RemoteAddr,
        /// What to do with it.
        op: AtomicOp,
    },
}

impl Operation {
    /// Payload bytes, in whichever direction.
    #[must_use]
    pub const fn len(&self) -> u32 {
        match self {
            Self::Write { to, .. } => to.len,
            Self::Send { len, .. } => *len,
            Self::Read { from } => from.len,
            Self::Atomic { .. } => 8,
        }
    }

    /// Whether there is no payload.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether an acknowledgement alone does not complete it.
    #[must_use]
    pub const fn has_response(&self) -> bool {
        matches!(self, Self::Read { .. } | Self::Atomic { .. })
    }

    /// Sequence numbers that it takes: its packets, or for a READ those of the response.
    const fn packets(&self, mtu: Mtu) -> u32 {
        match self {
            Self::Atomic { .. } => 1,
            _ => mtu.packets(self.len()),
        }
    }
}

/// Local memory does not allow what a message needs of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("local memory refuses the access")]
pub struct LocalFault;

/// Where a requester gets payload from.
pub trait Payload {
    /// Copies payload bytes `[offset, offset + into.len())` of a message.
    ///
    /// # Errors
    /// [`LocalFault`] fails the message, once everything before it is through.
    fn read(&mut self, id: MessageId, offset: u32, into: &mut [u8]) -> Result<(), LocalFault>;
}

/// Where a requester puts what READs and atomics bring.
pub trait ResponseSink {
    /// Takes in bytes of a READ; every byte once, in order.
    ///
    /// # Errors
    /// [`LocalFault`] fails the message.
    fn place(&mut self, id: MessageId, offset: u32, bytes: &[u8]) -> Result<(), LocalFault>;

    /// Takes in what the word of an atomic was.
    ///
    /// # Errors
    /// [`LocalFault`] fails the message.
    fn original(&mut self, id: MessageId, word: u64) -> Result<(), LocalFault>;
}

/// Why a message is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PostError {
    /// Too much is outstanding; post again after an event.
    #[error("{messages} messages are outstanding, there is no room for one of {packets} packets more")]
    Full {
        /// Messages outstanding.
        messages: usize,
        /// Packets of the one not taken.
        packets: u32,
    },
    /// Longer than a message may be.
    #[error("the message has {len} bytes, the limit is {MESSAGE_LEN_MAX}")]
    TooLong {
        /// Its length.
        len: u32,
    },
    /// The connection has failed.
    #[error("the connection has failed")]
    Failed,
}

/// Why a message failed.
///
/// SPEC: IBTA vol. 1 §9.9.2 and §10.8.5 (completion codes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// No answer within all retries.
    RetryExceeded,
    /// The responder was not ready within all retries.
    RnrRetryExceeded,
    /// The responder says that the request is not a legal one.
    RemoteInvalidRequest,
    /// The responder says that the key does not allow the access.
    RemoteAccess,
    /// The responder could not carry it out.
    RemoteOperation,
    /// The answer was not one to this request.
    BadResponse,
    /// Local memory refused the access.
    LocalProtection,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It was carried out.
    Completed {
        /// The message.
        id: MessageId,
    },
    /// It failed, and the connection with it; all messages after it are flushed.
    Failed {
        /// The message.
        id: MessageId,
        /// Why.
        reason: Failure,
    },
    /// It came after the one that failed; whether the other end carried it out is unknown.
    Flushed {
        /// The message.
        id: MessageId,
    },
}

/// A packet was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transmit {
    /// Bytes written: BTH to padding, and four zero bytes where the invariant CRC goes.
    pub len: usize,
    /// The packet was sent before.
    pub again: bool,
}

/// What a packet meant to a requester.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It answered something.
    Progress,
    /// It showed that something was lost, which is sent again.
    Retry,
    /// The responder asks to wait.
    NotReady,
    /// A message failed.
    Failed,
    /// It says what is known already.
    Stale,
    /// It should not have come.
    Dropped(Dropped),
}

/// What a requester does at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Nothing is outstanding.
    Idle,
    /// Something is to be sent.
    Sending,
    /// All is sent and something is unanswered.
    Waiting,
    /// The responder asked to wait.
    NotReady,
    /// A message failed; the connection is of no more use.
    Failed,
}

/// What a requester has seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RequesterCounters {
    /// Packets sent.
    pub sent: u64,
    /// Of these, packets sent again.
    pub sent_again: u64,
    /// Times that no answer came in time.
    pub timeouts: u64,
    /// Negative acknowledgements for missing packets.
    pub sequence_naks: u64,
    /// Responses whose predecessors were lost.
    pub implied_naks: u64,
    /// Times that the responder was not ready.
    pub not_ready: u64,
}

/// A posted message that has not completed.
#[derive(Debug, Clone, Copy)]
struct Message {
    id: MessageId,
    op: Operation,
    psn: Psn,
    packets: u32,
    /// Counts among the READs and atomics in flight.
    asked: bool,
    /// Local memory refused; it fails when it is the oldest.
    faulty: bool,
}

impl Message {
    const fn end(&self) -> Psn {
        self.psn.plus(self.packets)
    }
}

/// The next packet to send.
#[derive(Debug, Clone, Copy)]
struct Cursor {
    /// Its message; the number of messages if there is none.
    pos: usize,
    psn: Psn,
}

/// The sending half of a connection.
///
/// Post messages, then call [`Self::poll_transmit`] until it gives nothing; hand it what arrives with
/// [`Self::handle_packet`]; call [`Self::handle_timeout`] at the time that [`Self::poll_timeout`] names.
/// After each of these take events with [`Self::poll_event`] and transmit again.
#[derive(Debug)]
pub struct Requester {
    config: RequesterConfig,
    messages: VecDeque<Message>,
    events: VecDeque<Event>,
    next_psn: Psn,
    /// Oldest sequence number without answer.
    unacked: Psn,
    cursor: Cursor,
    /// After the last sequence number ever sent, or asked for.
    sent_end: Psn,
    reads_in_flight: u32,
    since_ack_req: u32,
    /// Times gone back since anything was answered.
    retries: u8,
    /// Times sent again after a shorter time than the ack timeout since anything was answered.
    early_retries: u32,
    rnr_retries: u8,
    /// Gone back here because of an answer; more such answers say nothing new.
    gone_back_to: Option<Psn>,
    ack_deadline: Option<Nanos>,
    not_ready_until: Option<Nanos>,
    failed: bool,
    counters: RequesterCounters,
}

impl Requester {
    /// A requester on a new connection.
    #[must_use]
    pub fn new(config: RequesterConfig) -> Self {
        let psn = config.first_psn;
        Self {
            config,
            messages: VecDeque::new(),
            events: VecDeque::new(),
            next_psn: psn,
            unacked: psn,
            cursor: Cursor { pos: 0, psn },
            sent_end: psn,
            reads_in_flight: 0,
            since_ack_req: 0,
            retries: 0,
            early_retries: 0,
            rnr_retries: 0,
            gone_back_to: None,
            ack_deadline: None,
            not_ready_until: None,
            failed: false,
            counters: RequesterCounters::default(),
        }
    }

    /// Takes a message; it is sent after all messages posted before.
    ///
    /// # Errors
    /// [`PostError`]; nothing is taken then.
    pub fn post(&mut self, id: MessageId, op: Operation) -> Result<(), PostError> {
        if self.failed {
            return Err(PostError::Failed);
        }
        if op.len() > MESSAGE_LEN_MAX {
            return Err(PostError::TooLong { len: op.len() });
        }
        let (messages, packets) = (self.messages.len(), op.packets(self.config.mtu));
        let span = self.next_psn.packets_since(self.unacked);
        if messages >= self.config.max_messages || span + packets > PSN_SPAN_MAX {
            return Err(PostError::Full { messages, packets });
        }
        let psn = self.next_psn;
        self.messages.push_back(Message { id, op, psn, packets, asked: false, faulty: false });
        self.next_psn = psn.plus(packets);
        Ok(())
    }

    /// What became of the oldest message that nobody was told of yet.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// When [`Self::handle_timeout`] must be called, unless something else happens before.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Nanos> {
        self.not_ready_until.or(self.ack_deadline)
    }

    /// Messages that are posted and not completed.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.messages.len()
    }

    /// READs and atomics that are posted and not completed.
    #[must_use]
    pub fn outstanding_reads(&self) -> usize {
        self.messages.iter().filter(|message| message.op.has_response()).count()
    }

    /// Sequence number of the next new message.
    #[must_use]
    pub const fn next_psn(&self) -> Psn {
        self.next_psn
    }

    /// Oldest sequence number without answer.
    #[must_use]
    pub const fn unacked_psn(&self) -> Psn {
        self.unacked
    }

    /// What it does at the moment.
    #[must_use]
    pub fn phase(&self) -> Phase {
        if self.failed {
            Phase::Failed
        } else if self.messages.is_empty() {
            Phase::Idle
        } else if self.not_ready_until.is_some() {
            Phase::NotReady
        } else if self.cursor.pos < self.messages.len() {
            Phase::Sending
        } else {
            Phase::Waiting
        }
    }

    /// What it has seen so far.
    #[must_use]
    pub const fn counters(&self) -> RequesterCounters {
        self.counters
    }
}
