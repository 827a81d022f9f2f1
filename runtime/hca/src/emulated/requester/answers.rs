//! Answers that come later than the turn that sent their request.
//!
//! An answer names the first sequence number of its request. What is not awaited any more is left alone: a
//! message may have been sent twice, and both may be answered. Answers come from another process and are
//! not believed: whatever they say, only messages of this queue pair that were sent can be completed.

use super::fetch::{Fetch, Local};
use super::send::take_response;
use super::{Progress, Requester, Settled};
use crate::emulated::message::{Reply, RequestOp};
use crate::emulated::tap::Tap;
use ibex_abi::types::Psn;

/// Where the memory of a [`Reply::Data`] belongs in its message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::emulated) struct ReadPart {
    pub(in crate::emulated) offset: u64,
    /// Nothing comes after it.
    pub(in crate::emulated) is_last: bool,
}

impl Requester {
    /// Takes in an answer to the message that begins at `psn`.
    pub(in crate::emulated) fn take_late(
        &mut self,
        local: &Local<'_>,
        psn: Psn,
        reply: Reply,
        part: ReadPart,
    ) {
        if let Some(tap) = Tap::of(local.device, local.qp, self.connection.as_ref(), local.now) {
            tap.reply(psn, &reply, part.offset, part.is_last);
        }
        let awaited = |entry: &super::Outstanding| entry.work.psn == psn && !entry.is_done();
        let pos = self.outstanding.iter().position(awaited);
        match (reply, pos) {
            (Reply::Ack { next }, _) => self.acknowledge(next),
            (_, None) => {}
            (Reply::Data { .. } | Reply::Atomic { .. }, Some(pos)) => {
                self.take_late_response(local, pos, reply, part);
            }
            (_, Some(pos)) => self.settle_late(local, pos, reply),
        }
        self.retire_unless_failed(local);
        if self.outstanding.is_empty() {
            self.ack_deadline = None;
        }
        self.note_idleness(local.qp);
    }

    fn settle_late(&mut self, local: &Local<'_>, pos: usize, reply: Reply) {
        match self.settle(pos, reply, local.now) {
            Settled::GoOn | Settled::NotReady => {}
            Settled::Wait => self.await_answer(local.now),
            Settled::Failed(failure) => self.fail(local.device, local.qp, pos, failure, local.now),
        }
    }

    /// Takes in what a READ or an atomic brought back, if it is the next that is awaited.
    fn take_late_response(&mut self, local: &Local<'_>, pos: usize, reply: Reply, part: ReadPart) {
        if self.outstanding[pos].progress != Progress::Unanswered {
            return;
        }
        self.with_message(local, pos, |this, message| {
            let Fetch::Message { request, payload, result } = message else {
                return;
            };
            let (entry, next) = (&mut this.outstanding[pos], request.end());
            match (request.op, reply) {
                (RequestOp::Read { .. }, Reply::Data { memory, .. }) => {
                    let end = part.offset.saturating_add(memory.len());
                    // A part was lost, or this is one of an earlier answer: the timer asks again.
                    if part.offset != entry.moved || end > request.len || part.is_last != (end == request.len)
                    {
                        return;
                    }
                    entry.moved = end;
                    take_response(local, reply, *payload, part.offset, None);
                    if !part.is_last {
                        this.progressed(local.now);
                        return;
                    }
                    this.settle_late(local, pos, Reply::Data { next, memory });
                }
                (RequestOp::Atomic { .. }, Reply::Atomic { original, .. }) => {
                    take_response(local, reply, *payload, 0, *result);
                    this.settle_late(local, pos, Reply::Atomic { next, original });
                }
                _ => {}
            }
        });
    }
}
