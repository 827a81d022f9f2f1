//! What a rank computes: step after step, in one of several ways to launch it, each judged when it is done.
//!
//! An [`App`] owns its tensors, its stream and its graph. It never waits: [`App::turn`] does what can be done now.
//! Inputs are a function of (seed, step, rank), so that every rank's outputs can be checked whoever has died.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::chaos::draws::Draws;
use crate::chaos::oracle::judge_combine;
use crate::config::ValidConfig;
use crate::error::Error;
use crate::gpu::Event;
use crate::harness::RigRank;
use crate::ids::{ExpertIdx, Lane, Rank};
use crate::reference::check::Step;
use crate::reference::inputs::{InputKey, RankInput};
use crate::reference::routing::Routing;
use crate::session::{
    CombineSource, CombineTicket, DispatchCall, DispatchHandle, Halves, Session, SessionGraph, TopkDtype,
};

/// How long ranks think at most while nothing is being repaired.
pub(super) const THINK_NS_MAX: u64 = 3_000_000;
/// Steps whose inputs are kept.
const INPUTS_KEPT: u64 = 8;

/// Inputs of all ranks by step, drawn when somebody needs them first; and how long ranks think.
pub(super) struct Inputs {
    /// Longest time that a rank computes between two launches.
    pub(super) think_ns_max: u64,
    seed: u64,
    config: ValidConfig,
    by_step: BTreeMap<u64, Arc<Vec<RankInput>>>,
}

impl Inputs {
    pub(super) fn new(seed: u64, config: &ValidConfig) -> Self {
        Self { think_ns_max: THINK_NS_MAX, seed, config: config.clone(), by_step: BTreeMap::new() }
    }

    pub(super) fn of(&mut self, step: u64) -> Arc<Vec<RankInput>> {
        self.by_step = self.by_step.split_off(&step.saturating_sub(INPUTS_KEPT));
        let (config, seed) = (&self.config, self.seed);
        let draw = |rank: u16| {
            let key = InputKey { seed, iteration: step, rank: Rank(rank) };
            let spread = Draws::new(seed ^ step << 8, 100 + u64::from(rank)).below(4) as u32;
            // 0 tokens are as valid as all of them.
            let tokens = if spread == 3 { config.max_tokens / 3 } else { config.max_tokens };
            RankInput::generate(config, Routing::Uniform, key, tokens)
        };
        // CAST: at most 512 ranks.
        let all = || Arc::new((0..config.num_ranks as u16).map(draw).collect());
        Arc::clone(self.by_step.entry(step).or_insert_with(all))
    }
}

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

/// Where the present step stands.
enum Phase {
    Idle,
    /// Its dispatch runs.
    Dispatching {
        handle: DispatchHandle,
        done: Event,
    },
    /// Its dispatch has ended and its combine is not launched.
    Thinking {
        handle: DispatchHandle,
        until_ns: u64,
    },
    /// Its combine runs, as a whole, or as a half whose other half has yet to be launched.
    Combining {
        open: Option<Box<(DispatchHandle, CombineTicket)>>,
        done: Event,
    },
    /// Everything of it runs; none of `dispatched` in a graph.
    Running {
        dispatched: Option<Event>,
        done: Event,
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
    rig: RigRank,
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
    pub(super) fn new(session: &Arc<Session>, mut draws: Draws, style: Option<Style>) -> Result<Self, Error> {
        let rig =
            RigRank { tensors: session.tensors()?, stream: session.stream(), session: Arc::clone(session) };
        let drawn = draws.pick(&[Style::Whole, Style::Apart, Style::Halves, Style::Graph]);
        let style = style.unwrap_or(drawn);
        let source = draws.pick(&[CombineSource::ZeroCopy, CombineSource::Staged]);
        let mut app = Self {
            rig,
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

    fn capture(&self) -> Result<SessionGraph, Error> {
        let session = &self.rig.session;
        session.begin_capture(&self.rig.stream)?;
        let handle = self.dispatch(Halves::Both)?;
        self.combine(&handle, Halves::Both)?;
        session.end_capture()
    }

    fn num_topk(&self) -> u32 {
        self.rig.session.config().max_topk
    }

    fn dispatch(&self, halves: Halves) -> Result<DispatchHandle, Error> {
        let call = DispatchCall { halves, ..DispatchCall::new(self.num_topk()) };
        self.rig.session.dispatch(Lane(0), &self.rig.stream, &self.rig.tensors, &call)
    }

    fn combine(&self, handle: &DispatchHandle, halves: Halves) -> Result<CombineTicket, Error> {
        let (session, stream, tensors) = (&self.rig.session, &self.rig.stream, &self.rig.tensors);
        session.run_expert(stream, tensors)?;
        session.combine(handle, stream, tensors, self.source, halves)
    }

    fn mark(&self) -> Result<Event, Error> {
        let gpu = self.rig.session.gpu();
        let event = gpu.event();
        gpu.record(&event, &self.rig.stream)?;
        Ok(event)
    }

    pub(super) fn stage(&self) -> Stage {
        match &self.phase {
            Phase::Idle => Stage::Idle,
            Phase::Dispatching { .. } => Stage::Dispatching,
            Phase::Thinking { .. } => Stage::Between,
            Phase::Combining { .. } => Stage::Combining,
            Phase::Running { dispatched: None, .. } => Stage::Replaying,
            Phase::Running { dispatched: Some(event), .. } => {
                match self.rig.session.gpu().query(event).unwrap_or(true) {
                    true => Stage::Combining,
                    false => Stage::Dispatching,
                }
            }
        }
    }

    /// When the present step was launched; none between two steps.
    pub(super) fn running_since(&self) -> Option<u64> {
        (self.stage() != Stage::Idle).then_some(self.launched_ns)
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
        self.rig.session.gpu().captures() - u64::from(self.is_graph())
    }

    /// Goes on with the present step, or launches the next if it may begin.
    pub(super) fn turn(
        &mut self,
        now_ns: u64,
        inputs: &mut Inputs,
        may_begin: bool,
    ) -> Result<Option<Finished>, Error> {
        match core::mem::replace(&mut self.phase, Phase::Idle) {
            Phase::Idle => {
                if may_begin && now_ns >= self.not_before_ns {
                    self.begin(now_ns, inputs)?;
                }
            }
            Phase::Dispatching { handle, done } => {
                if self.rig.session.gpu().query(&done)? {
                    let until_ns = now_ns + self.draws.below(inputs.think_ns_max);
                    self.phase = Phase::Thinking { handle, until_ns };
                } else {
                    self.phase = Phase::Dispatching { handle, done };
                }
            }
            Phase::Thinking { handle, until_ns } if now_ns >= until_ns => self.go_on(handle)?,
            Phase::Combining { open, done } => {
                if !self.rig.session.gpu().query(&done)? {
                    self.phase = Phase::Combining { open, done };
                } else if let Some(open) = open {
                    let (handle, ticket) = &*open;
                    self.rig.session.combine_receive(handle, ticket, &self.rig.stream)?;
                    self.phase = Phase::Combining { open: None, done: self.mark()? };
                } else {
                    return self.finish(now_ns, inputs).map(Some);
                }
            }
            Phase::Running { dispatched, done } => {
                if self.rig.session.gpu().query(&done)? {
                    return self.finish(now_ns, inputs).map(Some);
                }
                self.phase = Phase::Running { dispatched, done };
            }
            waiting @ Phase::Thinking { .. } => self.phase = waiting,
        }
        Ok(None)
    }

    fn begin(&mut self, now_ns: u64, inputs: &mut Inputs) -> Result<(), Error> {
        let session = Arc::clone(&self.rig.session);
        self.step = session.next_step();
        let input = inputs.of(self.step);
        self.rig.load(&input[session.rank().index()], TopkDtype::I32)?;
        self.rig.wipe_outputs()?;
        self.launched_ns = now_ns;
        self.phase = match self.style {
            Style::Whole => {
                let handle = self.dispatch(Halves::Both)?;
                let dispatched = Some(self.mark()?);
                self.combine(&handle, Halves::Both)?;
                Phase::Running { dispatched, done: self.mark()? }
            }
            Style::Apart => {
                let handle = self.dispatch(Halves::Both)?;
                Phase::Dispatching { handle, done: self.mark()? }
            }
            Style::Halves => {
                let handle = self.dispatch(Halves::Send)?;
                session.dispatch_receive(&handle, &self.rig.stream, &self.rig.tensors)?;
                Phase::Dispatching { handle, done: self.mark()? }
            }
            Style::Graph => {
                let graph = self.graph.as_ref().expect("captured when the style was chosen");
                session.replay(graph, &self.rig.stream)?;
                Phase::Running { dispatched: None, done: self.mark()? }
            }
        };
        Ok(())
    }

    fn go_on(&mut self, handle: DispatchHandle) -> Result<(), Error> {
        let halves = if self.style == Style::Halves { Halves::Send } else { Halves::Both };
        let ticket = self.combine(&handle, halves)?;
        let open = (halves == Halves::Send).then(|| Box::new((handle, ticket)));
        self.phase = Phase::Combining { open, done: self.mark()? };
        Ok(())
    }

    /// Judges what the step has left.
    fn finish(&mut self, now_ns: u64, inputs: &mut Inputs) -> Result<Finished, Error> {
        self.not_before_ns = now_ns + self.draws.below(inputs.think_ns_max);
        let (rank, all) = (self.rig.rank(), inputs.of(self.step));
        let config = self.rig.session.config();
        let step = Step::new(config, &all);
        let rows = self.rig.check_dispatch(&step)?;
        let input = &all[rank.index()];
        let (out, lost_topk) = self.rig.combine_output(input.num_tokens)?;
        let owner_of = |token: u32, k: usize| {
            let expert = u16::try_from(input.picks(token)[k]).ok()?;
            config.owner_of(ExpertIdx(expert)).map(|(owner, _)| owner)
        };
        let judged = judge_combine(&step, rank, input, (&out, &lost_topk), owner_of);
        let mut lost = judged.lost;
        lost.extend(self.lost_sources(config.num_ranks)?.into_iter().map(Some));
        Ok(Finished {
            step: self.step,
            launched_ns: self.launched_ns,
            wrong: rows.wrong + judged.wrong_tokens,
            unreported: judged.unreported_losses,
            lost,
        })
    }

    /// Sources whose tokens did not arrive.
    fn lost_sources(&self, num_ranks: u32) -> Result<Vec<Rank>, Error> {
        let mut lost = Vec::new();
        // CAST: at most 512 ranks.
        for source in (0..num_ranks as u16).map(Rank) {
            let addr = self.rig.tensors.source_ok.addr() + 4 * source.index() as u64;
            if self.rig.session.gpu().load_u32(addr)? != 1 {
                lost.push(source);
            }
        }
        Ok(lost)
    }
}
