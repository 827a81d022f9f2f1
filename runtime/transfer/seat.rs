//! The queue pair for one peer slot, and the requests that wait for it or are posted on it.

use std::collections::VecDeque;

use ibex_abi::types::{Iova, Pd, Rkey};
use ibex_abi::wqe::{CtrlFlags, DataSeg, Remote, Request as WqeRequest, SegmentBuf};
use ibex_hca::control_region::{ControlError, ControlRegion};
use ibex_hca::host_qp::{
    Completion, ConnectSpec, CqShape, Endpoint, HostQp, HostQpSpec, Init, Outcome, PostError, Rts,
};

use super::TransferError;
use ibex_metadata::name::RecordName;
use ibex_metadata::segments::SegmentHandle;

use super::work::{Verb, Work};

/// One slot's end of a connection.
#[derive(Debug)]
enum End {
    Empty,
    /// In INIT: peers may be told its number.
    Offered(HostQp<Init>),
    Linked(HostQp<Rts>),
}

/// Whether the peer is known to be connected, too: it has answered an empty WRITE.
///
/// The answer is a ready-acknowledgement that names both ends. Its packets carry both queue pairs' numbers, and
/// sequence numbers that each end computed from both numbers and both instances; so neither an earlier life of the
/// peer nor one that was told another number can give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Greeting {
    Due,
    Posted(u16),
    Answered,
}

/// Requests whose queue pair the device would not let go of: their memory stays pinned.
#[derive(Debug)]
pub(super) struct Doomed {
    /// `None`: the queue pair's own objects are lost too.
    qp: Option<HostQp<Rts>>,
    posted: VecDeque<Work>,
}

impl Doomed {
    /// Tries again; gives the requests once nothing can touch their memory.
    pub(super) fn try_end(mut self) -> Result<VecDeque<Work>, Self> {
        match self.qp.as_mut().map(HostQp::destroy) {
            Some(Ok(())) => Ok(self.posted),
            _ => Err(self),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.posted.len()
    }
}

/// Where a remote buffer is, and the key to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RemoteRange {
    pub(super) addr: u64,
    pub(super) len: u64,
    pub(super) rkey: u32,
}

/// The queue pair for one peer slot. See the module's documentation.
#[derive(Debug)]
pub(super) struct Seat {
    // First, so that it is gone before the memory of what was posted on it.
    end: End,
    greeting: Greeting,
    posted: VecDeque<Work>,
    pub(super) waiting: VecDeque<Work>,
    /// A completion said that the queue pair is in error.
    pub(super) has_failed: bool,
    /// Whose connection this is, and its entry in the registry; news may have retired that.
    pub(super) holder: Option<(RecordName, SegmentHandle)>,
}

impl Seat {
    pub(super) const fn new() -> Self {
        Self {
            end: End::Empty,
            greeting: Greeting::Due,
            posted: VecDeque::new(),
            waiting: VecDeque::new(),
            has_failed: false,
            holder: None,
        }
    }

    /// The number to tell the peer; 0: none.
    pub(super) fn qpn(&self) -> u32 {
        match &self.end {
            End::Empty => 0,
            End::Offered(qp) => qp.qpn().get(),
            End::Linked(qp) => qp.qpn().get(),
        }
    }

    pub(super) const fn is_linked(&self) -> bool {
        matches!(self.end, End::Linked(_))
    }

    /// Whether requests may be posted: the peer is connected, too.
    pub(super) fn is_ready(&self) -> bool {
        self.is_linked() && self.greeting == Greeting::Answered
    }

    /// Asks the peer whether it is connected, unless that was done. Only asked for when somebody has something to
    /// send: a peer that never looks at our record costs a queue pair per question.
    pub(super) fn greet(&mut self) -> bool {
        let (End::Linked(qp), Greeting::Due) = (&mut self.end, self.greeting) else { return false };
        // SPEC: IBTA C9-88: no key is checked, because no byte is touched.
        let remote = Remote { addr: Iova(0), rkey: Rkey(0) };
        let empty = WqeRequest::Write { remote, payload: Vec::new() };
        match qp.post(CtrlFlags::SIGNALED, empty) {
            Ok(idx) => self.greeting = Greeting::Posted(idx),
            Err(_) => self.has_failed = true,
        }
        true
    }

    /// Makes a queue pair if there is none; `true` if its number is news.
    pub(super) fn offer(
        &mut self,
        region: &ControlRegion,
        pd: Pd,
        log_sq_size: u8,
        spec: &ConnectSpec,
    ) -> Result<bool, ControlError> {
        if !matches!(self.end, End::Empty) {
            return Ok(false);
        }
        // One more than the send queue has: every request is signalled, and none may be lost.
        let send_cq = CqShape::Ring { log_size: log_sq_size + 1, overrun_ignore: false };
        let qp = HostQp::create(region, pd, HostQpSpec { log_sq_size, send_cq, ..HostQpSpec::default() })?;
        self.end = End::Offered(qp.to_init(spec.access)?);
        Ok(true)
    }

    /// Connects the offered queue pair. After a refusal there is none, and the next offer has a new number.
    pub(super) fn connect(&mut self, remote: &Endpoint, spec: &ConnectSpec) -> Result<(), TransferError> {
        self.end = match std::mem::replace(&mut self.end, End::Empty) {
            End::Offered(qp) => End::Linked(qp.to_rtr(remote, spec)?.to_rts(spec)?),
            other => other,
        };
        (self.greeting, self.has_failed) = (Greeting::Due, false);
        Ok(())
    }

    /// Posts the oldest waiting request; `false` if the queue is full.
    pub(super) fn post(&mut self, remote: RemoteRange) -> bool {
        let End::Linked(qp) = &mut self.end else { return false };
        let Some(mut work) = self.waiting.pop_front() else { return false };
        let local = DataSeg::new(work.len, work.share.lkey(), work.share.addr(work.local_offset));
        let remote = Remote { addr: Iova(remote.addr + work.remote_offset), rkey: Rkey(remote.rkey) };
        let request = match work.verb {
            Verb::Write => WqeRequest::Write { remote, payload: vec![SegmentBuf::Data(local)] },
            Verb::Read => WqeRequest::Read { remote, scatter: vec![local] },
        };
        match qp.post(CtrlFlags::SIGNALED, request) {
            Ok(idx) => {
                work.wqe_idx = idx;
                self.posted.push_back(work);
                true
            }
            Err(PostError::QueueFull { .. }) => {
                self.waiting.push_front(work);
                false
            }
            Err(error) => {
                work.end(Err(error.into()));
                true
            }
        }
    }

    /// Takes completions; `check` says whether a success is to be trusted. Says how many there were.
    pub(super) fn poll(&mut self, check: impl Fn(&Work) -> Result<(), TransferError>) -> usize {
        let mut taken = 0;
        loop {
            let End::Linked(qp) = &mut self.end else { return taken };
            let Some(completion) = qp.poll() else { return taken };
            taken += 1;
            let qpn = qp.qpn().get();
            if self.greeting == Greeting::Posted(completion.wqe_counter) {
                match completion.outcome {
                    Outcome::Error { .. } => self.has_failed = true,
                    _ => self.greeting = Greeting::Answered,
                }
                continue;
            }
            // Every request is signalled, so each completion is for the oldest; others are an earlier life's.
            if self.posted.front().is_none_or(|work| work.wqe_idx != completion.wqe_counter) {
                continue;
            }
            let Some(work) = self.posted.pop_front() else { continue };
            let outcome = self.outcome(qpn, &work, &completion, &check);
            work.end(outcome);
        }
    }

    fn outcome(
        &mut self,
        qpn: u32,
        work: &Work,
        completion: &Completion,
        check: impl Fn(&Work) -> Result<(), TransferError>,
    ) -> Result<u32, TransferError> {
        if let Outcome::Error { syndrome, vendor, .. } = completion.outcome {
            self.has_failed = true;
            return Err(TransferError::Completion { qpn, syndrome: syndrome.0, vendor: vendor.0 });
        }
        check(work).map(|()| work.len)
    }

    /// Takes the connection down but keeps the number: the peer is the same, its way is another. Requests that were
    /// posted end with `reason`.
    pub(super) fn reset(
        &mut self,
        spec: &ConnectSpec,
        reason: impl Fn(&Work) -> TransferError,
    ) -> Option<Doomed> {
        self.end_posted_as(&reason);
        let (end, doomed) = match std::mem::replace(&mut self.end, End::Empty) {
            End::Linked(qp) => match qp.reset() {
                Ok(qp) => (qp.to_init(spec.access).map_or(End::Empty, End::Offered), None),
                Err(_) => (End::Empty, self.doom(None)),
            },
            other => (other, None),
        };
        self.end = end;
        self.has_failed = false;
        self.end_posted();
        doomed
    }

    /// Takes the connection down for good: the peer is another process, or its number is spent.
    pub(super) fn destroy(&mut self, reason: impl Fn(&Work) -> TransferError) -> Option<Doomed> {
        self.end_posted_as(&reason);
        let doomed = match std::mem::replace(&mut self.end, End::Empty) {
            End::Linked(mut qp) => match qp.fail().and_then(|()| qp.destroy()) {
                Ok(()) => None,
                Err(_) => self.doom(Some(qp)),
            },
            other => {
                self.end = other;
                None
            }
        };
        self.has_failed = false;
        self.end_posted();
        doomed
    }

    fn doom(&mut self, qp: Option<HostQp<Rts>>) -> Option<Doomed> {
        Some(Doomed { qp, posted: std::mem::take(&mut self.posted) })
    }

    fn end_posted_as(&self, reason: &impl Fn(&Work) -> TransferError) {
        for work in &self.posted {
            work.op.decide(Err(reason(work)));
        }
    }

    /// Ends what was posted; each has its outcome.
    fn end_posted(&mut self) {
        for work in self.posted.drain(..) {
            let name = work.name.clone();
            work.end(Err(TransferError::PathRetired { name }));
        }
    }

    /// Ends waiting requests that have an outcome already, or get one from `check`.
    pub(super) fn prune(&mut self, check: impl Fn(&Work) -> Option<TransferError>) -> usize {
        let before = self.waiting.len();
        for work in std::mem::take(&mut self.waiting) {
            let is_decided = work.op.look(|status| status.outcome.is_some());
            match check(&work) {
                Some(reason) => work.end(Err(reason)),
                None if is_decided => work.end(Err(TransferError::Cancelled)),
                None => self.waiting.push_back(work),
            }
        }
        before - self.waiting.len()
    }
}
