//! Streams and events of one host GPU as a state machine: no thread, no lock, no clock, no kernel.
//!
//! [`Queues`] is told what is queued and which launches finished, and answers with launches to start now
//! ([`Queues::take_ready`]). It owns the queued work and the frozen argument bytes.
//!
//! ```text
//!  stream:   ops  [ Wait(m) | Launch | Record(n) | Graph ]      head: what runs or blocks now
//!                      |                    |
//!            blocked until m is done        +-- marks n done when all before it has finished
//! ```
//!
//! Invariants:
//! - A stream runs at most one operation at a time: its head.
//! - A marker's record stands in some queue before any wait for it does, so waiting has no cycles.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};

use super::super::{GpuError, KernelId};
use super::capture::{Captures, Plan};

/// Most operations that wait in one stream.
pub(super) const STREAM_QUEUE_MAX: usize = 1 << 16;

/// A launch whose arguments can no longer change.
#[derive(Debug, PartialEq, Eq)]
pub(in crate::gpu) struct FrozenLaunch {
    pub(in crate::gpu) kernel: KernelId,
    pub(in crate::gpu) args: Box<[u8]>,
    pub(in crate::gpu) blocks: u32,
    pub(in crate::gpu) warps_per_block: u32,
}

/// Names a stream inside its GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::gpu) struct StreamIdx(pub(in crate::gpu) u32);

/// Names a launch that runs: the head of a stream, or one node of the graph at its head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Token {
    stream: StreamIdx,
    node: u32,
}

/// A launch to start now.
pub(super) struct Ready {
    pub(super) token: Token,
    pub(super) launch: Arc<FrozenLaunch>,
}

/// One recording of an event: done once, at a time.
#[derive(Debug)]
pub(super) struct Marker {
    done_ns: OnceLock<u64>,
}

impl Marker {
    fn new() -> Arc<Self> {
        Arc::new(Self { done_ns: OnceLock::new() })
    }

    /// When the marked work had finished, if it has.
    pub(super) fn done_ns(&self) -> Option<u64> {
        self.done_ns.get().copied()
    }

    fn is_done(&self) -> bool {
        self.done_ns.get().is_some()
    }
}

enum Op {
    Launch(Arc<FrozenLaunch>),
    Graph(Arc<Plan>),
    Record(Arc<Marker>),
    Wait(Arc<Marker>),
}

enum Head {
    Idle,
    Launch,
    Graph(GraphRun),
    Blocked(Arc<Marker>),
}

/// Progress of one replay.
struct GraphRun {
    plan: Arc<Plan>,
    /// Per node: predecessors that have not finished.
    missing: Vec<u32>,
    unfinished: usize,
}

struct StreamState {
    ops: VecDeque<Op>,
    head: Head,
    /// First failure that nobody has been told of; while it stands, launches are skipped.
    error: Option<GpuError>,
    /// No handle exists any more; the place is reused once the queue is empty.
    orphaned: bool,
}

impl StreamState {
    fn new() -> Self {
        Self { ops: VecDeque::new(), head: Head::Idle, error: None, orphaned: false }
    }

    fn is_idle(&self) -> bool {
        matches!(self.head, Head::Idle) && self.ops.is_empty()
    }
}

/// All streams of one GPU.
pub(super) struct Queues {
    streams: Vec<StreamState>,
    free: Vec<StreamIdx>,
    ready: Vec<Ready>,
    running: usize,
    pub(super) captures: Captures,
}

impl Queues {
    pub(super) fn new() -> Self {
        Self {
            streams: Vec::new(),
            free: Vec::new(),
            ready: Vec::new(),
            running: 0,
            captures: Captures::new(),
        }
    }

    pub(super) fn open(&mut self) -> StreamIdx {
        if let Some(stream) = self.free.pop() {
            *self.state(stream) = StreamState::new();
            return stream;
        }
        // CAST: every open stream holds heap memory, 2^32 of them do not fit.
        let stream = StreamIdx(self.streams.len() as u32);
        self.streams.push(StreamState::new());
        stream
    }

    /// The last handle is gone: queued work still runs, then the place is reused.
    pub(super) fn close(&mut self, stream: StreamIdx) {
        self.captures.abandon(stream);
        self.state(stream).orphaned = true;
        self.recycle(stream);
    }

    pub(super) fn push_launch(
        &mut self,
        stream: StreamIdx,
        launch: FrozenLaunch,
        now_ns: u64,
    ) -> Result<(), GpuError> {
        if self.captures.is_capturing(stream) {
            self.captures.push(stream, launch);
            return Ok(());
        }
        self.push(stream, Op::Launch(Arc::new(launch)), now_ns)
    }

    pub(super) fn push_graph(
        &mut self,
        stream: StreamIdx,
        plan: &Arc<Plan>,
        now_ns: u64,
    ) -> Result<(), GpuError> {
        self.push(stream, Op::Graph(Arc::clone(plan)), now_ns)
    }

    /// Queues a mark and returns it.
    pub(super) fn push_record(&mut self, stream: StreamIdx, now_ns: u64) -> Result<Arc<Marker>, GpuError> {
        let marker = Marker::new();
        self.push(stream, Op::Record(Arc::clone(&marker)), now_ns)?;
        Ok(marker)
    }

    pub(super) fn push_wait(
        &mut self,
        stream: StreamIdx,
        marker: Arc<Marker>,
        now_ns: u64,
    ) -> Result<(), GpuError> {
        self.push(stream, Op::Wait(marker), now_ns)
    }

    fn push(&mut self, stream: StreamIdx, op: Op, now_ns: u64) -> Result<(), GpuError> {
        let state = self.state(stream);
        let queued = state.ops.len();
        if queued >= STREAM_QUEUE_MAX {
            return Err(GpuError::QueueFull { queued, limit: STREAM_QUEUE_MAX });
        }
        state.ops.push_back(op);
        self.advance(stream, now_ns);
        Ok(())
    }

    /// A launch has finished.
    pub(super) fn finished(&mut self, token: Token, now_ns: u64) {
        self.running -= 1;
        let state = self.state(token.stream);
        match &mut state.head {
            Head::Launch => state.head = Head::Idle,
            Head::Graph(_) => self.finish_node(token),
            Head::Idle | Head::Blocked(_) => {
                panic!("{token:?} finished, but its stream runs nothing")
            }
        }
        self.advance(token.stream, now_ns);
    }

    /// A launch did not start: what follows it in the stream is skipped until someone asks.
    pub(super) fn failed(&mut self, token: Token, error: GpuError, now_ns: u64) {
        let state = self.state(token.stream);
        state.error.get_or_insert(error);
        self.finished(token, now_ns);
    }

    /// Launches to start now, in order.
    pub(super) fn take_ready(&mut self) -> Vec<Ready> {
        core::mem::take(&mut self.ready)
    }

    pub(super) fn is_idle(&self, stream: StreamIdx) -> bool {
        self.streams[stream.0 as usize].is_idle()
    }

    pub(super) fn take_error(&mut self, stream: StreamIdx) -> Option<GpuError> {
        self.state(stream).error.take()
    }

    #[cfg(test)]
    pub(super) fn error(&self, stream: StreamIdx) -> Option<&GpuError> {
        self.streams[stream.0 as usize].error.as_ref()
    }

    /// Whether no launch runs and none is queued.
    pub(super) fn all_idle(&self) -> bool {
        self.running == 0 && self.streams.iter().all(StreamState::is_idle)
    }

    /// Launches that have been handed out and have not finished.
    pub(super) fn num_running(&self) -> usize {
        self.running
    }

    /// Forgets all work that has not been handed out yet; what waits for it counts as done.
    pub(super) fn cancel_queued(&mut self, now_ns: u64) {
        for idx in 0..self.streams.len() {
            let state = &mut self.streams[idx];
            state.error.get_or_insert(GpuError::Dropped);
        }
        for idx in 0..self.streams.len() {
            // CAST: as in `open`.
            self.advance(StreamIdx(idx as u32), now_ns);
        }
    }

    fn state(&mut self, stream: StreamIdx) -> &mut StreamState {
        &mut self.streams[stream.0 as usize]
    }

    /// Runs a stream's queue until it blocks, and then every stream that this unblocked.
    fn advance(&mut self, stream: StreamIdx, now_ns: u64) {
        let mut pending = vec![stream];
        while let Some(stream) = pending.pop() {
            while let Some(marked) = self.step(stream, now_ns) {
                if marked {
                    self.unblock(&mut pending);
                }
            }
            self.recycle(stream);
        }
    }

    /// Takes one operation off a stream. None: it cannot go on. Some(true): a marker was set.
    fn step(&mut self, stream: StreamIdx, now_ns: u64) -> Option<bool> {
        let state = self.state(stream);
        if !matches!(state.head, Head::Idle) {
            return None;
        }
        let op = state.ops.pop_front()?;
        let skip = state.error.is_some();
        match op {
            Op::Launch(launch) if !skip => {
                state.head = Head::Launch;
                self.start(Token { stream, node: 0 }, launch);
            }
            Op::Graph(plan) if !skip && !plan.nodes.is_empty() => self.start_graph(stream, plan),
            Op::Launch(_) | Op::Graph(_) => {}
            Op::Wait(marker) if !marker.is_done() => state.head = Head::Blocked(marker),
            Op::Wait(_) => {}
            Op::Record(marker) => {
                marker.done_ns.set(now_ns).expect("a marker is queued once");
                return Some(true);
            }
        }
        Some(false)
    }

    /// Collects streams whose marker is now done.
    fn unblock(&mut self, pending: &mut Vec<StreamIdx>) {
        for (idx, state) in self.streams.iter_mut().enumerate() {
            if matches!(&state.head, Head::Blocked(marker) if marker.is_done()) {
                state.head = Head::Idle;
                // CAST: as in `open`.
                pending.push(StreamIdx(idx as u32));
            }
        }
    }

    fn start(&mut self, token: Token, launch: Arc<FrozenLaunch>) {
        self.running += 1;
        self.ready.push(Ready { token, launch });
    }

    fn start_graph(&mut self, stream: StreamIdx, plan: Arc<Plan>) {
        let missing = plan.nodes.iter().map(|node| node.num_predecessors).collect();
        for (idx, node) in (0..).zip(&plan.nodes) {
            if node.num_predecessors == 0 {
                self.start(Token { stream, node: idx }, Arc::clone(&node.launch));
            }
        }
        let unfinished = plan.nodes.len();
        self.state(stream).head = Head::Graph(GraphRun { plan, missing, unfinished });
    }

    /// Starts, or after a failure skips, the nodes that waited for this one only.
    fn finish_node(&mut self, token: Token) {
        let mut finished = vec![token.node];
        while let Some(node) = finished.pop() {
            let state = &mut self.streams[token.stream.0 as usize];
            let skip = state.error.is_some();
            let Head::Graph(run) = &mut state.head else {
                panic!("{token:?} is not a node of a running graph");
            };
            run.unfinished -= 1;
            if run.unfinished == 0 {
                state.head = Head::Idle;
                return;
            }
            let plan = Arc::clone(&run.plan);
            let mut startable = Vec::new();
            for &next in &plan.nodes[node as usize].successors {
                let missing = &mut run.missing[next as usize];
                *missing -= 1;
                if *missing == 0 {
                    startable.push(next);
                }
            }
            for next in startable {
                if skip {
                    finished.push(next);
                } else {
                    let token = Token { stream: token.stream, node: next };
                    self.start(token, Arc::clone(&plan.nodes[next as usize].launch));
                }
            }
        }
    }

    fn recycle(&mut self, stream: StreamIdx) {
        let state = self.state(stream);
        if state.orphaned && state.is_idle() {
            state.orphaned = false;
            self.free.push(stream);
        }
    }
}
