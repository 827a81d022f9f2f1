//! What a rank computes: step after step, in one of several ways to launch it, each judged when it is done.
//!
//! An [`App`] owns its tensors, its streams and its graph. It never waits: [`App::turn`] does what can be done now.
//!
//! A step has one or more *sets*: a dispatch and its combine, with tensors of their own. Sets stand on lanes in turn,
//! and on one lane they follow each other without a wait. All dispatches of a step come before its first combine, so
//! that its handles are open together and members count the same steps.

use std::sync::Arc;

use super::inputs::Inputs;
use super::tables::Tables;
use crate::chaos::draws::Draws;
use crate::chaos::oracle::judge_combine;
use crate::error::Error;
use crate::gpu::{Event, Stream};
use crate::harness::RigRank;
use crate::ids::{ExpertIdx, Lane, Rank};
use crate::membership::RankSet;
use crate::reference::check::Step;
use crate::session::{
    CombineSource, CombineTicket, DispatchCall, DispatchHandle, Halves, Session, SessionGraph, TopkDtype,
};

/// How a rank launches its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Dispatch, expert and combine at once.
    Whole,
    /// The combine when the dispatch has ended, after some thought.
    Apart,
    /// Send and receive halves apart.
    Halves,
    /// A graph that was captured before the first step.
    Graph,
}

/// What every rank of a group launches alike in one step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Sets {
    /// Lanes, which sets take in turn.
    pub(super) lanes: u32,
    /// Dispatches per lane and step.
    pub(super) per_lane: u32,
}

impl Sets {
    /// One dispatch on one lane.
    pub(super) const ONE: Self = Self { lanes: 1, per_lane: 1 };

    fn count(self) -> usize {
        (self.lanes * self.per_lane) as usize
    }

    fn lane_of(self, set: usize) -> usize {
        set % self.lanes as usize
    }

    fn is_last_on_its_lane(self, set: usize) -> bool {
        set + self.lanes as usize >= self.count()
    }
}

/// Everything that was queued before them is over when all have happened.
struct Marks(Vec<Event>);

/// A combine whose receive half has yet to be launched, and its set.
type Open = (usize, DispatchHandle, CombineTicket);

/// Where the present step stands.
enum Phase {
    Idle,
    /// Its dispatches run.
    Dispatching {
        handles: Vec<DispatchHandle>,
        done: Marks,
    },
    /// Its dispatches have ended and its combines are not launched.
    Thinking {
        handles: Vec<DispatchHandle>,
        until_ns: u64,
    },
    /// Its combines run, as a whole, or as halves whose other halves have yet to be launched.
    Combining {
        open: Vec<Open>,
        done: Marks,
    },
    /// Everything of it runs; none of `dispatched` in a graph.
    Running {
        dispatched: Option<Marks>,
        done: Marks,
    },
}

/// What an observer may want to know of the present step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    Idle,
    Dispatching,
    Between,
    Combining,
    Replaying,
}

/// A step that a rank has finished, judged.
#[derive(Clone, Debug, Default)]
pub(super) struct Finished {
    pub(super) step: u64,
    pub(super) launched_ns: u64,
    pub(super) wrong: u64,
    pub(super) unreported: u64,
    /// Owners or sources of what was lost, one entry per pick or row.
    pub(super) lost: Vec<Option<Rank>>,
}

/// See the module documentation.
pub(super) struct App {
    /// One per set; sets of one lane share a stream.
    rigs: Vec<RigRank>,
    sets: Sets,
    style: Style,
    source: CombineSource,
    graph: Option<SessionGraph>,
    phase: Phase,
    step: u64,
    launched_ns: u64,
    not_before_ns: u64,
    draws: Draws,
}

impl App {
    pub(super) fn new(
        session: &Arc<Session>,
        mut draws: Draws,
        style: Option<Style>,
        sets: Sets,
    ) -> Result<Self, Error> {
        let drawn = draws.pick(&[Style::Whole, Style::Apart, Style::Halves, Style::Graph]);
        let style = style.unwrap_or(drawn);
        let source = draws.pick(&[CombineSource::ZeroCopy, CombineSource::Staged]);
        // What a graph captures stands on one stream.
        let streams: Vec<Stream> = match style {
            Style::Graph => vec![session.stream(); sets.lanes as usize],
            _ => (0..sets.lanes).map(|_| session.stream()).collect(),
        };
        let rig = |set: usize| -> Result<RigRank, Error> {
            let stream = streams[sets.lane_of(set)].clone();
            Ok(RigRank { tensors: session.tensors()?, stream, session: Arc::clone(session) })
        };
        let mut app = Self {
            rigs: (0..sets.count()).map(rig).collect::<Result<_, _>>()?,
            sets,
            style,
            source,
            graph: None,
            phase: Phase::Idle,
            step: 0,
            launched_ns: 0,
            not_before_ns: 0,
            draws,
        };
        if style == Style::Graph {
            app.graph = Some(app.capture()?);
        }
        Ok(app)
    }

    fn session(&self) -> &Arc<Session> {
        &self.rigs[0].session
    }

    fn capture(&self) -> Result<SessionGraph, Error> {
        let session = self.session();
        session.begin_capture(&self.rigs[0].stream)?;
        let handles = self.dispatch_all(false)?;
        for (set, handle) in handles.iter().enumerate() {
            self.combine(set, handle, Halves::Both)?;
        }
        session.end_capture()
    }

    fn dispatch(&self, set: usize, halves: Halves) -> Result<DispatchHandle, Error> {
        let (rig, session) = (&self.rigs[set], self.session());
        let call = DispatchCall { halves, ..DispatchCall::new(session.config().max_topk) };
        // CAST: at most 8 lanes.
        let lane = Lane(self.sets.lane_of(set) as _);
        session.dispatch(lane, &rig.stream, &rig.tensors, &call)
    }

    /// Launches the dispatches of all sets, each as a whole or in halves.
    fn dispatch_all(&self, in_halves: bool) -> Result<Vec<DispatchHandle>, Error> {
        let dispatch = |set: usize| {
            if !in_halves {
                return self.dispatch(set, Halves::Both);
            }
            let (handle, rig) = (self.dispatch(set, Halves::Send)?, &self.rigs[set]);
            rig.session.dispatch_receive(&handle, &rig.stream, &rig.tensors)?;
            Ok(handle)
        };
        (0..self.sets.count()).map(dispatch).collect()
    }

    fn combine(&self, set: usize, handle: &DispatchHandle, halves: Halves) -> Result<CombineTicket, Error> {
        let RigRank { session, stream, tensors } = &self.rigs[set];
        session.run_expert(stream, tensors)?;
        session.combine(handle, stream, tensors, self.source, halves)
    }

    fn marks(&self) -> Result<Marks, Error> {
        let gpu = self.session().gpu();
        let mark = |rig: &RigRank| {
            let event = gpu.event();
            gpu.record(&event, &rig.stream).map(|()| event)
        };
        Ok(Marks(self.rigs.iter().take(self.sets.lanes as usize).map(mark).collect::<Result<_, _>>()?))
    }

    fn are_over(&self, marks: &Marks) -> Result<bool, Error> {
        for event in &marks.0 {
            if !self.session().gpu().query(event)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(super) fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Idle => Stage::Idle,
            Phase::Dispatching { .. } => Stage::Dispatching,
            Phase::Thinking { .. } => Stage::Between,
            Phase::Combining { .. } => Stage::Combining,
            Phase::Running { dispatched: None, .. } => Stage::Replaying,
            Phase::Running { dispatched: Some(marks), .. } => match self.are_over(marks).unwrap_or(true) {
                true => Stage::Combining,
                false => Stage::Dispatching,
            },
        }
    }

    /// When the present step was launched; none between two steps.
    pub(super) fn running_since(&self) -> Option<u64> {
        (!matches!(self.phase, Phase::Idle)).then_some(self.launched_ns)
    }

    pub(super) fn is_graph(&self) -> bool {
        self.graph.is_some()
    }

    /// When there is something to do without anything else happening.
    pub(super) fn next_due(&self) -> Option<u64> {
        match &self.phase {
            Phase::Idle => Some(self.not_before_ns),
            Phase::Thinking { until_ns, .. } => Some(*until_ns),
            _ => None,
        }
    }

    /// Begins nothing before this instant.
    pub(super) fn wait_until(&mut self, ns: u64) {
        self.not_before_ns = ns;
    }

    /// Captures beyond the one that a graph needs.
    pub(super) fn recaptures(&self) -> u64 {
        self.session().gpu().captures() - u64::from(self.is_graph())
    }

    /// Goes on with the present step, or launches the next if it may begin.
    pub(super) fn turn(
        &mut self,
        now_ns: u64,
        inputs: &mut Inputs,
        tables: &Tables,
        may_begin: bool,
    ) -> Result<Option<Finished>, Error> {
        match core::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => {
                if may_begin && now_ns >= self.not_before_ns {
                    self.begin(now_ns, inputs)?;
                }
            }
            Phase::Dispatching { handles, done } => {
                if self.are_over(&done)? {
                    let until_ns = now_ns + self.draws.below(inputs.think_ns_max);
                    self.phase = Phase::Thinking { handles, until_ns };
                } else {
                    self.phase = Phase::Dispatching { handles, done };
                }
            }
            Phase::Thinking { handles, until_ns } if now_ns >= until_ns => self.go_on(handles)?,
            Phase::Combining { open, done } => {
                if !self.are_over(&done)? {
                    self.phase = Phase::Combining { open, done };
                } else if open.is_empty() {
                    return self.finish(now_ns, inputs, tables).map(Some);
                } else {
                    for (set, handle, ticket) in &open {
                        self.session().combine_receive(handle, ticket, &self.rigs[*set].stream)?;
                    }
                    self.phase = Phase::Combining { open: Vec::new(), done: self.marks()? };
                }
            }
            Phase::Running { dispatched, done } => {
                if self.are_over(&done)? {
                    return self.finish(now_ns, inputs, tables).map(Some);
                }
                self.phase = Phase::Running { dispatched, done };
            }
            waiting @ Phase::Thinking { .. } => self.phase = waiting,
        }
        Ok(None)
    }

    fn begin(&mut self, now_ns: u64, inputs: &mut Inputs) -> Result<(), Error> {
        self.step = self.session().next_step();
        let rank = self.session().rank();
        for (set, rig) in self.rigs.iter().enumerate() {
            // Nothing of an earlier step runs here any more: places may have got other experts since.
            rig.session.place_experts(&rig.tensors)?;
            rig.load(&inputs.of(self.step, set).by_rank[rank.index()], TopkDtype::I32)?;
            rig.wipe_outputs()?;
        }
        self.launched_ns = now_ns;
        self.phase = match self.style {
            Style::Whole => {
                let handles = self.dispatch_all(false)?;
                let dispatched = Some(self.marks()?);
                for (set, handle) in handles.iter().enumerate() {
                    self.combine(set, handle, Halves::Both)?;
                }
                Phase::Running { dispatched, done: self.marks()? }
            }
            Style::Apart | Style::Halves => {
                let handles = self.dispatch_all(self.style == Style::Halves)?;
                Phase::Dispatching { handles, done: self.marks()? }
            }
            Style::Graph => {
                let graph = self.graph.as_ref().expect("captured when the style was chosen");
                self.session().replay(graph, &self.rigs[0].stream)?;
                Phase::Running { dispatched: None, done: self.marks()? }
            }
        };
        Ok(())
    }

    /// Launches the combines: in halves where nothing of the same lane follows.
    fn go_on(&mut self, handles: Vec<DispatchHandle>) -> Result<(), Error> {
        let mut open = Vec::new();
        for (set, handle) in handles.into_iter().enumerate() {
            let in_halves = self.style == Style::Halves && self.sets.is_last_on_its_lane(set);
            let halves = if in_halves { Halves::Send } else { Halves::Both };
            let ticket = self.combine(set, &handle, halves)?;
            if in_halves {
                open.push((set, handle, ticket));
            }
        }
        self.phase = Phase::Combining { open, done: self.marks()? };
        Ok(())
    }

    /// Judges what the step has left.
    fn finish(&mut self, now_ns: u64, inputs: &mut Inputs, tables: &Tables) -> Result<Finished, Error> {
        self.not_before_ns = now_ns + self.draws.below(inputs.think_ns_max);
        let mut finished = Finished { step: self.step, launched_ns: self.launched_ns, ..Finished::default() };
        for set in 0..self.rigs.len() {
            self.judge(set, inputs, tables, &mut finished)?;
        }
        Ok(finished)
    }

    fn judge(
        &self,
        set: usize,
        inputs: &mut Inputs,
        tables: &Tables,
        finished: &mut Finished,
    ) -> Result<(), Error> {
        let (rig, rank) = (&self.rigs[set], self.session().rank());
        let (all, config) = (inputs.of(self.step, set), self.session().config());
        let Some((placement, alive)) = tables.placed(rank, self.step, config.num_ranks) else {
            // A rank that launches has switched; nothing says what it should have computed.
            finished.wrong += 1;
            return Ok(());
        };
        let own = alive[rank.index()];
        let step = Step::with_rows(config, &all.by_rank, &all.cast).placed_by_source(placement, alive);
        let rows = rig.check_dispatch(&step)?;
        let input = &all.by_rank[rank.index()];
        let (out, lost_topk) = rig.combine_output(input.num_tokens)?;
        let owner_of = |token: u32, k: usize| {
            let expert = ExpertIdx(u16::try_from(input.picks(token)[k]).ok()?);
            let owner = placement.owner_for(rank, expert, &own);
            owner.or_else(|| Tables::any_owner(placement, expert)).map(|(owner, _)| owner)
        };
        let judged = judge_combine(&step, rank, input, (&out, &lost_topk), owner_of);
        finished.lost.extend(judged.lost);
        finished.lost.extend(self.lost_sources(rig, &own)?.into_iter().map(Some));
        finished.wrong += rows.wrong + judged.wrong_tokens;
        finished.unreported += judged.unreported_losses;
        Ok(())
    }

    /// Members whose tokens did not arrive.
    fn lost_sources(&self, rig: &RigRank, members: &RankSet) -> Result<Vec<Rank>, Error> {
        let mut lost = Vec::new();
        for source in members.iter() {
            let addr = rig.tensors.source_ok.addr() + 4 * source.index() as u64;
            if rig.session.gpu().load_u32(addr)? != 1 {
                lost.push(source);
            }
        }
        Ok(lost)
    }
}
