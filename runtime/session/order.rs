//! The order that a lane's halves must be launched in, and the events that keep it across streams.
//!
//! A send half of step s reuses the ring slot of step s-N, so it must come after its own receive half of s-N; the
//! send halves of a lane run one at a time; a receive half comes after its send. On one stream that is program order;
//! across streams an event makes it so.
//!
//! INVARIANT: a send is refused before anything is launched while the receive half of step s-N has not been launched.

use std::collections::BTreeSet;

use crate::error::{Error, Exhausted, Resource};
use crate::gpu::{Event, Gpu, Stream};

#[cfg(test)]
mod credit_model;

/// Which sends of one operation still owe their receive half. Pure.
#[derive(Clone, Debug)]
pub(crate) struct RingOrder {
    ring: u64,
    /// The sequence number of the first send.
    first_seq: u64,
    sent: u64,
    unreceived: BTreeSet<u64>,
}

impl RingOrder {
    pub(crate) fn new(ring: u32) -> Self {
        Self { ring: ring.into(), first_seq: 1, sent: 0, unreceived: BTreeSet::new() }
    }

    /// The ordinal that the next send would have, if the ring has room for it.
    pub(crate) fn next_send(&self) -> Result<u64, Exhausted> {
        let next = self.sent + 1;
        match self.unreceived.first() {
            Some(&oldest) if oldest + self.ring <= next => Err(Exhausted {
                resource: Resource::RingSlots,
                limit: self.ring,
                in_use: next - oldest,
                requested: 1,
            }),
            _ => Ok(next),
        }
    }

    pub(crate) fn launched_send(&mut self) -> u64 {
        self.sent += 1;
        self.unreceived.insert(self.sent);
        self.sent
    }

    /// Returns whether that receive was still owed.
    pub(crate) fn launched_receive(&mut self, ordinal: u64) -> bool {
        self.unreceived.remove(&ordinal)
    }

    pub(crate) fn owed(&self) -> u64 {
        self.unreceived.len() as u64
    }

    /// Counts steps that a replayed graph runs, all of them received within it.
    pub(crate) fn replayed(&mut self, steps: u64) {
        self.sent += steps;
    }

    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// The sequence number that the next send will draw.
    pub(crate) fn next_seq(&self) -> u64 {
        self.first_seq.wrapping_add(self.sent)
    }

    /// Lets the next send draw `seq`.
    pub(crate) fn start_at(&mut self, seq: u64) {
        // Wraps if a lane that has sent is set back; the sum is what counts.
        self.first_seq = seq.wrapping_sub(self.sent);
    }
}

/// A point on a stream that later work may have to follow.
#[derive(Clone)]
pub(crate) struct Mark {
    stream: Stream,
    event: Event,
}

impl Mark {
    /// Marks the work queued on `stream` so far.
    pub(crate) fn after(gpu: &dyn Gpu, stream: &Stream) -> Result<Self, Error> {
        let event = gpu.event();
        gpu.record(&event, stream)?;
        Ok(Self { stream: stream.clone(), event })
    }

    /// Makes later work of `stream` follow this mark; free on the mark's own stream.
    pub(crate) fn before(&self, gpu: &dyn Gpu, stream: &Stream) -> Result<(), Error> {
        if self.stream.same_as(stream) {
            return Ok(());
        }
        Ok(gpu.wait(&self.event, stream)?)
    }

    /// Do both stand on one stream?
    pub(crate) fn is_same_stream(&self, other: &Self) -> bool {
        self.stream.same_as(&other.stream)
    }

    /// Has the stream passed this mark?
    pub(crate) fn is_past(&self, gpu: &dyn Gpu) -> Result<bool, Error> {
        Ok(gpu.query(&self.event)?)
    }
}

/// The launch order of one lane.
#[derive(Clone)]
pub(crate) struct LaneOrder {
    rings: [RingOrder; 2],
    last_send: Option<Mark>,
    /// Receive halves by operation and ring slot.
    received: [Vec<Option<Mark>>; 2],
    /// Graphs by the stream they were last replayed on.
    replayed: Vec<Mark>,
}

impl LaneOrder {
    pub(crate) fn new(ring: u32) -> Self {
        let slots = || vec![None; ring as usize];
        Self {
            rings: [RingOrder::new(ring), RingOrder::new(ring)],
            last_send: None,
            received: [slots(), slots()],
            replayed: Vec::new(),
        }
    }

    pub(crate) fn ring(&self, op: usize) -> &RingOrder {
        &self.rings[op]
    }

    pub(crate) fn ring_mut(&mut self, op: usize) -> &mut RingOrder {
        &mut self.rings[op]
    }

    /// Notes a replay on `stream`.
    pub(crate) fn after_replay(&mut self, gpu: &dyn Gpu, stream: &Stream) -> Result<(), Error> {
        let mark = Mark::after(gpu, stream)?;
        self.replayed.retain(|earlier| !earlier.stream.same_as(stream));
        self.replayed.push(mark);
        Ok(())
    }

    /// Marks behind everything that has been launched so far.
    pub(crate) fn marks(&self) -> Vec<Mark> {
        let received = self.received.iter().flatten().flatten();
        self.last_send.iter().chain(received).chain(&self.replayed).cloned().collect()
    }

    fn slot(&self, op: usize, ordinal: u64) -> usize {
        // CAST: a remainder of a ring of at most 8.
        (ordinal % self.rings[op].ring) as usize
    }

    /// Makes the next send half of `op` on `stream` follow what it must follow, or refuses it.
    pub(crate) fn before_send(&self, gpu: &dyn Gpu, op: usize, stream: &Stream) -> Result<(), Error> {
        let ordinal = self.rings[op].next_send()?;
        if let Some(mark) = &self.last_send {
            mark.before(gpu, stream)?;
        }
        if let Some(mark) = &self.received[op][self.slot(op, ordinal)] {
            mark.before(gpu, stream)?;
        }
        Ok(())
    }

    /// Notes a launched send half; returns its ordinal and its mark.
    pub(crate) fn after_send(
        &mut self,
        gpu: &dyn Gpu,
        op: usize,
        stream: &Stream,
    ) -> Result<(u64, Mark), Error> {
        let mark = Mark::after(gpu, stream)?;
        self.last_send = Some(mark.clone());
        Ok((self.rings[op].launched_send(), mark))
    }

    /// Notes a launched receive half of the send with `ordinal`.
    pub(crate) fn after_receive(
        &mut self,
        gpu: &dyn Gpu,
        op: usize,
        ordinal: u64,
        stream: &Stream,
    ) -> Result<Mark, Error> {
        let mark = Mark::after(gpu, stream)?;
        let slot = self.slot(op, ordinal);
        self.received[op][slot] = Some(mark.clone());
        self.rings[op].launched_receive(ordinal);
        Ok(mark)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_sends_than_ring_slots_are_refused() {
        for ring in 1..=4 {
            let mut order = RingOrder::new(ring);
            for _ in 0..ring {
                order.next_send().unwrap();
                order.launched_send();
            }
            let refused = order.next_send().unwrap_err();
            assert_eq!((refused.limit, refused.resource), (u64::from(ring), Resource::RingSlots));
            assert!(order.launched_receive(1));
            order.next_send().unwrap();
        }
    }

    #[test]
    fn a_later_receive_does_not_free_an_earlier_slot() {
        let mut order = RingOrder::new(2);
        order.launched_send();
        order.launched_send();
        assert!(order.launched_receive(2));
        assert!(order.next_send().is_err(), "step 3 reuses the slot of step 1, which nobody has received");
        assert!(order.launched_receive(1));
        assert!(!order.launched_receive(1), "a step is received once");
        assert_eq!(order.next_send().unwrap(), 3);
    }
}
