//! Recording streams into a graph instead of running them.
//!
//! A capture owns the launches recorded so far and, for each stream that takes part, its *tips*:
//! the nodes that the stream's next launch must come after. An event recorded in a captured stream
//! remembers the tips of that moment; a stream that waits for it takes them on, and joins the
//! capture if it was not part of it.
//!
//! ```text
//!  origin   A ---- record(e) ---- B -------- wait(f) ---- D       nodes A B C D
//!                       \                    /                    edges A->B  A->C  B->D  C->D
//!  joined                wait(e) -- C -- record(f)
//! ```
//!
//! INVARIANT: a node's predecessors have smaller numbers than the node, so a graph has no cycles.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::super::CaptureError;
use super::queue::{FrozenLaunch, StreamIdx};

/// A finished recording.
#[derive(Debug)]
pub(in crate::gpu) struct Plan {
    pub(in crate::gpu) nodes: Vec<PlanNode>,
}

/// One launch of a graph.
#[derive(Debug)]
pub(in crate::gpu) struct PlanNode {
    pub(in crate::gpu) launch: Arc<FrozenLaunch>,
    pub(in crate::gpu) successors: Vec<u32>,
    pub(in crate::gpu) num_predecessors: u32,
}

/// Names one capture of a GPU; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::gpu) struct CaptureId(u64);

/// What an event recorded in a captured stream stands for.
#[derive(Debug, Clone)]
pub(in crate::gpu) struct CapturedMark {
    capture: CaptureId,
    tips: BTreeSet<u32>,
}

struct Node {
    launch: Arc<FrozenLaunch>,
    predecessors: BTreeSet<u32>,
}

struct Capture {
    origin: StreamIdx,
    nodes: Vec<Node>,
    tips: BTreeMap<StreamIdx, BTreeSet<u32>>,
}

/// Captures in progress on one GPU.
pub(in crate::gpu) struct Captures {
    open: BTreeMap<CaptureId, Capture>,
    begun: u64,
}

impl Captures {
    pub(in crate::gpu) fn new() -> Self {
        Self { open: BTreeMap::new(), begun: 0 }
    }

    /// Captures begun so far.
    pub(in crate::gpu) fn begun(&self) -> u64 {
        self.begun
    }

    pub(in crate::gpu) fn is_capturing(&self, stream: StreamIdx) -> bool {
        self.find(stream).is_some()
    }

    /// Whether anything is being captured.
    pub(in crate::gpu) fn is_any_open(&self) -> bool {
        !self.open.is_empty()
    }

    fn find(&self, stream: StreamIdx) -> Option<CaptureId> {
        self.open.iter().find(|(_, capture)| capture.tips.contains_key(&stream)).map(|(&id, _)| id)
    }

    fn of(&mut self, stream: StreamIdx) -> Option<(CaptureId, &mut Capture)> {
        self.open.iter_mut().find(|(_, capture)| capture.tips.contains_key(&stream)).map(|(&id, c)| (id, c))
    }

    pub(in crate::gpu) fn begin(&mut self, stream: StreamIdx) -> Result<(), CaptureError> {
        if self.is_capturing(stream) {
            return Err(CaptureError::AlreadyCapturing);
        }
        let tips = BTreeMap::from([(stream, BTreeSet::new())]);
        self.open.insert(CaptureId(self.begun), Capture { origin: stream, nodes: Vec::new(), tips });
        self.begun += 1;
        Ok(())
    }

    /// Records a launch behind the stream's tips.
    pub(in crate::gpu) fn push(&mut self, stream: StreamIdx, launch: FrozenLaunch) {
        let (_, capture) = self.of(stream).expect("the caller checked that the stream is captured");
        // CAST: the nodes of a graph are held in memory, 2^32 of them do not fit.
        let node = capture.nodes.len() as u32;
        let tips = capture.tips.insert(stream, BTreeSet::from([node]));
        let predecessors = tips.expect("`of` found the stream by its tips");
        capture.nodes.push(Node { launch: Arc::new(launch), predecessors });
    }

    /// What an event recorded now in `stream` marks; none if the stream is not captured.
    pub(in crate::gpu) fn mark(&self, stream: StreamIdx) -> Option<CapturedMark> {
        let id = self.find(stream)?;
        Some(CapturedMark { capture: id, tips: self.open[&id].tips[&stream].clone() })
    }

    /// Lets `stream` wait for captured work; it joins that capture.
    pub(in crate::gpu) fn wait(
        &mut self,
        stream: StreamIdx,
        mark: &CapturedMark,
    ) -> Result<(), CaptureError> {
        if self.find(stream).is_some_and(|id| id != mark.capture) {
            return Err(CaptureError::ForeignEvent);
        }
        // The capture may have ended since: then its work only runs in replays.
        let capture = self.open.get_mut(&mark.capture).ok_or(CaptureError::ForeignEvent)?;
        capture.tips.entry(stream).or_default().extend(&mark.tips);
        Ok(())
    }

    pub(in crate::gpu) fn end(&mut self, stream: StreamIdx) -> Result<Plan, CaptureError> {
        let id = self.find(stream).ok_or(CaptureError::NotCapturing)?;
        if self.open[&id].origin != stream {
            return Err(CaptureError::NotTheOrigin);
        }
        let capture = self.open.remove(&id).expect("found above");
        let unjoined = capture.nodes.len() - capture.joined(stream);
        if unjoined > 0 {
            return Err(CaptureError::Unjoined { unjoined });
        }
        Ok(capture.into_plan())
    }

    /// The stream is gone. A capture without its origin can never end.
    pub(in crate::gpu) fn abandon(&mut self, stream: StreamIdx) {
        self.open.retain(|_, capture| capture.origin != stream);
        if let Some((_, capture)) = self.of(stream) {
            capture.tips.remove(&stream);
        }
    }
}

impl Capture {
    /// How many nodes come before the stream's tips, tips included.
    fn joined(&self, stream: StreamIdx) -> usize {
        let mut seen: BTreeSet<u32> = BTreeSet::new();
        let mut pending: Vec<u32> = self.tips[&stream].iter().copied().collect();
        while let Some(node) = pending.pop() {
            if seen.insert(node) {
                pending.extend(&self.nodes[node as usize].predecessors);
            }
        }
        seen.len()
    }

    fn into_plan(self) -> Plan {
        let mut successors = vec![Vec::new(); self.nodes.len()];
        for (idx, node) in (0..).zip(&self.nodes) {
            for &before in &node.predecessors {
                successors[before as usize].push(idx);
            }
        }
        let nodes = self.nodes.into_iter().zip(successors).map(|(node, successors)| PlanNode {
            launch: node.launch,
            successors,
            // CAST: fewer than the number of nodes, which fits (see `push`).
            num_predecessors: node.predecessors.len() as u32,
        });
        Plan { nodes: nodes.collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::KernelId;
    use super::*;

    const MAIN: StreamIdx = StreamIdx(0);
    const SIDE: StreamIdx = StreamIdx(1);

    fn launch(tag: u8) -> FrozenLaunch {
        FrozenLaunch { kernel: KernelId::Selftest, args: Box::new([tag]), blocks: 1, warps_per_block: 1 }
    }

    /// (tag, tags of successors) of every node.
    fn edges(plan: &Plan) -> Vec<(u8, Vec<u8>)> {
        let tag = |idx: u32| plan.nodes[idx as usize].launch.args[0];
        plan.nodes
            .iter()
            .map(|node| (node.launch.args[0], node.successors.iter().map(|&n| tag(n)).collect()))
            .collect()
    }

    #[test]
    fn one_stream_becomes_a_chain() {
        let mut captures = Captures::new();
        captures.begin(MAIN).unwrap();
        for tag in 0..3 {
            captures.push(MAIN, launch(tag));
        }
        let plan = captures.end(MAIN).unwrap();
        assert_eq!(edges(&plan), [(0, vec![1]), (1, vec![2]), (2, vec![])]);
        assert!(!captures.is_capturing(MAIN));
        assert_eq!(captures.begun(), 1);
    }

    #[test]
    fn fork_and_join_become_edges() {
        let mut captures = Captures::new();
        captures.begin(MAIN).unwrap();
        captures.push(MAIN, launch(b'A'));
        let fork = captures.mark(MAIN).unwrap();
        captures.push(MAIN, launch(b'B'));
        captures.wait(SIDE, &fork).unwrap();
        captures.push(SIDE, launch(b'C'));
        let join = captures.mark(SIDE).unwrap();
        captures.wait(MAIN, &join).unwrap();
        captures.push(MAIN, launch(b'D'));
        let plan = captures.end(MAIN).unwrap();
        let expected = [(b'A', vec![b'B', b'C']), (b'B', vec![b'D']), (b'C', vec![b'D']), (b'D', vec![])];
        assert_eq!(edges(&plan), expected);
        assert_eq!(plan.nodes[3].num_predecessors, 2);
        assert!(!captures.is_capturing(SIDE));
    }

    #[test]
    fn work_that_is_not_joined_back_is_refused_and_the_capture_ends() {
        let mut captures = Captures::new();
        captures.begin(MAIN).unwrap();
        let fork = captures.mark(MAIN).unwrap();
        captures.wait(SIDE, &fork).unwrap();
        captures.push(SIDE, launch(1));
        captures.push(SIDE, launch(2));
        assert_eq!(captures.end(MAIN).unwrap_err(), CaptureError::Unjoined { unjoined: 2 });
        assert!(!captures.is_capturing(MAIN) && !captures.is_capturing(SIDE));
    }

    #[test]
    fn only_the_origin_ends_a_capture() {
        let mut captures = Captures::new();
        assert_eq!(captures.end(MAIN).unwrap_err(), CaptureError::NotCapturing);
        captures.begin(MAIN).unwrap();
        assert_eq!(captures.begin(MAIN).unwrap_err(), CaptureError::AlreadyCapturing);
        let fork = captures.mark(MAIN).unwrap();
        captures.wait(SIDE, &fork).unwrap();
        assert_eq!(captures.end(SIDE).unwrap_err(), CaptureError::NotTheOrigin);
        assert!(captures.end(MAIN).unwrap().nodes.is_empty());
    }

    #[test]
    fn captures_do_not_mix() {
        let mut captures = Captures::new();
        captures.begin(MAIN).unwrap();
        let mark = captures.mark(MAIN).unwrap();
        captures.begin(SIDE).unwrap();
        assert_eq!(captures.wait(SIDE, &mark), Err(CaptureError::ForeignEvent));
        captures.end(MAIN).unwrap();
        assert_eq!(captures.wait(MAIN, &mark), Err(CaptureError::ForeignEvent));
        assert_eq!(captures.mark(MAIN).map(|mark| mark.tips), None);
    }

    #[test]
    fn a_capture_whose_origin_is_gone_is_discarded() {
        let mut captures = Captures::new();
        captures.begin(MAIN).unwrap();
        let fork = captures.mark(MAIN).unwrap();
        captures.wait(SIDE, &fork).unwrap();
        captures.abandon(MAIN);
        assert!(!captures.is_capturing(SIDE));
    }

    #[test]
    fn work_of_a_joined_stream_that_is_gone_still_has_to_be_joined() {
        let mut captures = Captures::new();
        captures.begin(MAIN).unwrap();
        let fork = captures.mark(MAIN).unwrap();
        captures.wait(SIDE, &fork).unwrap();
        captures.push(SIDE, launch(1));
        captures.abandon(SIDE);
        assert_eq!(captures.end(MAIN).unwrap_err(), CaptureError::Unjoined { unjoined: 1 });
    }
}
