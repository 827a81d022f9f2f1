//! Completion queues: where the device tells that work is done.
//!
//! *Who owns what.* The ring and the doorbell record are the driver's memory, in umems that the queue
//! holds; the producer counter is the device's. A ring is written entry by entry in order; a collapsed
//! queue (`cc`) has one entry that every completion overwrites.
//!
//! INVARIANT: an entry's last word is stored last, with release (ORDER(4)): a reader that sees it by an
//! acquire load sees the entry. INVARIANT: a queue that overran takes no further completion.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use ibex_abi::cqe::{COMPLETION_WORD_OFFSET, CQE, Cqe64, ErrorCqe, OpOwn, owner_bit};
use ibex_abi::eqe::CqArm;
use ibex_abi::types::CqNum;
use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::eq::Eq;
use super::memory::Span;
use super::umem::UmemHold;

/// Where a queue's ring lies, and how it behaves.
#[derive(Debug)]
pub(super) struct CqLayout {
    pub(super) ring: Span,
    pub(super) record: Span,
    pub(super) log_size: u8,
    /// Bytes from one entry to the next: 64, or 128 with the entry in the second half.
    pub(super) stride: u64,
    pub(super) collapsed: bool,
    pub(super) overrun_ignore: bool,
}

/// The queue overran, now or earlier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overrun {
    /// This completion is the one that found it full.
    pub(super) first: bool,
}

#[derive(Debug, Default)]
struct Producer {
    counter: u32,
    overrun: bool,
    /// The counter behind the last solicited or failed completion; none before the first.
    solicited: Option<u32>,
    armed: Option<CqArm>,
    /// Sequence number of the last request that was answered.
    answered_sn: Option<u8>,
}

impl Producer {
    /// Whether a completion that `request` asks for stands in the queue.
    fn satisfies(&self, request: CqArm) -> bool {
        let behind_ci = |counter: u32| {
            let ahead = counter.wrapping_sub(request.ci) & 0xff_ffff;
            ahead != 0 && ahead < 1 << 23
        };
        match request.solicited_only {
            true => self.solicited.is_some_and(behind_ci),
            false => behind_ci(self.counter),
        }
    }

    /// Answers the request that stands, if it can be.
    fn answer(&mut self) -> bool {
        let Some(request) = self.armed.filter(|request| self.satisfies(*request)) else { return false };
        self.armed = None;
        self.answered_sn = Some(request.sn);
        true
    }
}

/// A completion queue.
#[derive(Debug)]
pub(super) struct Cq {
    pub(super) num: CqNum,
    layout: CqLayout,
    producer: Mutex<Producer>,
    /// Released when the queue is destroyed, however long the object itself is referred to.
    pub(super) holds: Mutex<Vec<UmemHold>>,
    /// Queue pairs that complete into it.
    pub(super) users: AtomicU32,
    /// Where its completions are told of; none for the event queue of a completion vector.
    pub(super) eq: Option<Arc<Eq>>,
    /// The arm word of the record when it was last looked at.
    arm_seen: AtomicU32,
}

/// Bytes of an entry of either kind.
pub(super) trait Entry: IntoBytes + zerocopy::Immutable {
    fn set_op_own(&mut self, owner: bool);
    /// Whether it answers a request for solicited completions only.
    fn is_solicited(&self) -> bool;
}

impl Entry for Cqe64 {
    fn set_op_own(&mut self, owner: bool) {
        self.word.op_own = OpOwn(self.word.op_own & !1 | u8::from(owner)).0;
    }

    fn is_solicited(&self) -> bool {
        self.word.op_own & 2 != 0
    }
}

impl Entry for ErrorCqe {
    fn set_op_own(&mut self, owner: bool) {
        self.word.op_own = OpOwn(self.word.op_own & !1 | u8::from(owner)).0;
    }

    fn is_solicited(&self) -> bool {
        true
    }
}

impl Cq {
    pub(super) fn new(num: CqNum, layout: CqLayout, holds: Vec<UmemHold>, eq: Option<Arc<Eq>>) -> Arc<Self> {
        let (producer, holds) = (Mutex::default(), Mutex::new(holds));
        let arm_seen = AtomicU32::new(u32::from_be(layout.record.load32(4, Ordering::Acquire)));
        Arc::new(Self { num, layout, producer, holds, users: AtomicU32::new(0), eq, arm_seen })
    }

    /// Writes the next entry; the owner bit is filled in here. Returns whether an event was asked for.
    pub(super) fn push(&self, mut entry: impl Entry) -> Result<bool, Overrun> {
        let layout = &self.layout;
        let mut producer = self.producer.lock();
        if producer.overrun {
            return Err(Overrun { first: false });
        }
        if !layout.overrun_ignore && self.is_full(producer.counter) {
            producer.overrun = true;
            return Err(Overrun { first: true });
        }
        entry.set_op_own(owner_bit(producer.counter, layout.log_size));
        let slot = match layout.collapsed {
            true => 0,
            false => u64::from(producer.counter & ((1 << layout.log_size) - 1)),
        };
        let at = slot * layout.stride + (layout.stride - CQE as u64);
        store_entry(layout.ring, at, entry.as_bytes());
        producer.counter = producer.counter.wrapping_add(1);
        if entry.is_solicited() {
            producer.solicited = Some(producer.counter);
        }
        Ok(producer.answer())
    }

    /// Takes in a request for one event. True: the completion it asks for is there already, and the event is due now.
    ///
    /// A request that was answered before has an old sequence number: the driver rang it twice, or the device saw its
    /// register and its record.
    pub(super) fn arm(&self, request: CqArm) -> bool {
        let mut producer = self.producer.lock();
        if producer.answered_sn == Some(request.sn) {
            return false;
        }
        producer.armed = Some(request);
        producer.answer()
    }

    /// The request in the queue's doorbell record, if it has changed. Only while the queue exists.
    pub(super) fn take_arm_record(&self) -> Option<CqArm> {
        let word = u32::from_be(self.layout.record.load32(4, Ordering::Acquire));
        let is_new = self.arm_seen.swap(word, Ordering::Relaxed) != word;
        is_new.then(|| CqArm::from_record_word(self.num, word))
    }

    /// Whether as many entries are unconsumed as the ring has, by the consumer's record.
    fn is_full(&self, counter: u32) -> bool {
        let consumer = u32::from_be(self.layout.record.load32(0, Ordering::Acquire));
        let unconsumed = counter.wrapping_sub(consumer) & 0xff_ffff;
        unconsumed >= 1 << self.layout.log_size
    }
}

/// ORDER(4): entry -> its last word. ORDER(15): reads of work requests and of what they name -> the same word.
/// Relaxed words, then one release store at 0x3c.
/// Pairs with the acquire load of that word in whoever polls.
fn store_entry(ring: Span, at: u64, entry: &[u8]) {
    let (words, tail) = entry.as_chunks::<8>();
    debug_assert!(tail.is_empty() && words.len() == 8);
    for (idx, word) in words.iter().enumerate().take(7) {
        ring.store64(at + 8 * idx as u64, u64::from_ne_bytes(*word), Ordering::Relaxed);
    }
    let [a, b, c, d, word @ ..] = words[7];
    ring.store32(at + 0x38, u32::from_ne_bytes([a, b, c, d]), Ordering::Relaxed);
    let at = at + COMPLETION_WORD_OFFSET as u64;
    ring.store32(at, u32::from_ne_bytes(word), Ordering::Release);
}
