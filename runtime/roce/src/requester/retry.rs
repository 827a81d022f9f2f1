//! Timers, going back, failing.

use super::{Event, Failure, Requester, Verdict};
use crate::types::Nanos;

impl Requester {
    /// Handles the timers that have run out; does nothing before their time.
    pub fn handle_timeout(&mut self, now: Nanos) {
        if self.failed {
            return;
        }
        if self.not_ready_until.is_some_and(|until| until <= now) {
            self.not_ready_until = None;
        }
        if self.ack_deadline.is_some_and(|deadline| deadline <= now) {
            self.counters.timeouts += 1;
            if self.early_wait().is_some() {
                self.early_retries += 1;
                self.rewind();
                self.gone_back_to = None;
                return;
            }
            // A negative acknowledgement after this is worth hearing again.
            if self.go_back() == Verdict::Retry {
                self.gone_back_to = None;
            }
        }
    }

    /// Flushes everything, as when the queue pair is moved to an error state.
    pub fn abort(&mut self) {
        self.failed = true;
        (self.ack_deadline, self.not_ready_until) = (None, None);
        let flushed = self.messages.drain(..).map(|message| Event::Flushed { id: message.id });
        self.events.extend(flushed);
        self.cursor.pos = 0;
    }

    /// When an answer to something sent now is due.
    pub(super) fn answer_due(&self, now: Nanos) -> Option<Nanos> {
        let wait = self.early_wait().or_else(|| self.config.ack_timeout.nanos());
        wait.map(|nanos| now.plus(nanos))
    }

    /// Time until the next early attempt; `None` when the ack timeout counts.
    fn early_wait(&self) -> Option<u64> {
        let patience = self.config.ack_timeout.nanos()?;
        // A time of nothing would never grow.
        let first = self.config.first_timeout?.0.max(1);
        let wait =
            first.checked_shl(self.early_retries).filter(|wait| wait >> self.early_retries == first)?;
        (wait <= patience / 2).then_some(wait)
    }

    /// Sends everything from the oldest unanswered packet again, or fails for having done so too often.
    pub(super) fn go_back(&mut self) -> Verdict {
        if self.retries >= self.config.retry_count {
            return self.fail(Failure::RetryExceeded);
        }
        self.retries += 1;
        self.rewind();
        self.gone_back_to = Some(self.unacked);
        Verdict::Retry
    }

    /// Puts the cursor on the oldest unanswered packet; the timer starts when that is sent.
    pub(super) fn rewind(&mut self) {
        for message in self.messages.iter_mut().take(self.cursor.pos) {
            message.asked = false;
        }
        self.reads_in_flight = 0;
        self.since_ack_req = 0;
        (self.cursor.pos, self.cursor.psn) = (0, self.unacked);
        self.ack_deadline = None;
    }

    /// Fails the oldest message and flushes all others.
    pub(super) fn fail(&mut self, reason: Failure) -> Verdict {
        if let Some(message) = self.messages.pop_front() {
            self.events.push_back(Event::Failed { id: message.id, reason });
        }
        self.abort();
        Verdict::Failed
    }

    /// Fails a message that local memory refused, once everything before it is through.
    pub(super) fn fail_if_faulty(&mut self) {
        if self.messages.front().is_some_and(|message| message.faulty) {
            self.fail(Failure::LocalProtection);
        }
    }

    /// Something was answered: patience starts anew.
    pub(super) fn progressed(&mut self, now: Nanos) {
        (self.retries, self.early_retries) = (0, 0);
        (self.rnr_retries, self.gone_back_to) = (0, None);
        self.not_ready_until = None;
        let waits = self.cursor.psn != self.unacked;
        self.ack_deadline = if waits { self.answer_due(now) } else { None };
        self.fail_if_faulty();
    }
}
