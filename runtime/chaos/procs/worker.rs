//! One rank of a campaign between processes: it joins, computes, is broken, and says what it sees.
//!
//! A [`Worker`] owns its [`ElasticMember`] and its [`App`]; a thread reads orders. It never waits longer than a nap, so
//! an order is carried out while a step runs.

use core::time::Duration;
use std::collections::BTreeMap;
use std::io::{BufRead, Write};
use std::sync::mpsc::{self, Receiver, TryRecvError};
use std::sync::{Arc, OnceLock};
use std::thread;

use ibex_abi::cqe::Syndrome;
use ibex_abi::prm::Status;
use ibex_abi::types::PathMtu;
use ibex_hca::emulated::{EmulatedHca, PathState, PortId};
use ibex_hca::fault::{Effect, Fault, FaultHca};
use ibex_hca::{Hca, Nanos};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::url::StoreUrl;
use rustix::process::{Signal, getpid, kill_process};

use super::commands::Commands;
use super::line::{Between, Lost, Moment, Order, Role, Said, StepWord, Word};
use super::weights::{Weights, Whose};
use crate::chaos::app::{App, Finished, Sets, Stage};
use crate::chaos::draws::Draws;
use crate::chaos::inputs::Inputs;
use crate::chaos::tables::Tables;
use crate::config::ValidConfig;
use crate::error::{Error, OsError};
use crate::ids::Rank;
use crate::membership::{RankSet, Stop};
use crate::session::{
    DeviceWrapper, ElasticMember, ElasticOptions, GroupName, Happening, Lateness, MemberFabric, MemberOptions,
};
use crate::time::{Deadline, sleep, unix_ns};

/// How long ranks compute at most between two launches: cores are for recovery, too.
const THINK_NS_MAX: u64 = 15_000_000;
/// Longest nap while a step runs.
const NAP: Duration = Duration::from_micros(300);
/// How long to wait for the next step to be allowed before orders are looked at again.
const WAIT: Duration = Duration::from_millis(1);
/// How long one question to the store may take.
const STORE_BUDGET: Duration = Duration::from_secs(2);
/// How long a rank tries to claim its name.
const CLAIM_PATIENCE: Duration = Duration::from_secs(120);
/// Pause between two attempts.
const CLAIM_PAUSE: Duration = Duration::from_millis(20);
/// Rows are messages of several packets, so that a process can end within one.
const PATH_MTU: PathMtu = PathMtu::B512;
/// A rank that dies so many `detect_ms` after it had come is flapping. In a campaign every rank dies every few
/// seconds, and is wanted back; who dies again and again at once is still held down.
const FLAP_WINDOW_DETECTS: u32 = 3;
/// Pause between two attempts to read the weights of experts.
const FETCH_PAUSE: Duration = Duration::from_millis(5);
/// A worker says that it was late whenever that grows by this part of what its peers bear.
const LATE_PER_DETECT: u64 = 3;
/// How long nothing must be posted before doorbells are counted.
const QUIET: Duration = Duration::from_millis(20);

/// How a rank's process is to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WorkerEnd {
    /// It was told to, or the group goes on without it.
    Good,
    /// Something that no fault explains.
    Bad,
}

/// Where words go.
struct Mouth<W> {
    out: W,
    /// From the pool's clock to nanoseconds since 1970.
    offset_ns: u64,
}

impl<W: Write> Mouth<W> {
    /// Says something that happened at an instant of the pool's clock. A supervisor that is gone hears nothing; the
    /// kernel ends this process then.
    fn say_at(&mut self, at_ns: u64, said: Said) {
        let word = Word { at_ns: at_ns.saturating_add(self.offset_ns), said };
        // PANIC: numbers and texts always serialise.
        let line = serde_json::to_string(&word).expect("words are plain data") + "\n";
        let _ = self.out.write_all(line.as_bytes()).and_then(|()| self.out.flush());
    }
}

/// See the module documentation.
pub struct Worker<W> {
    // What it computes goes before what that stands on.
    weights: Weights,
    app: App,
    inputs: Inputs,
    tables: Tables,
    member: ElasticMember,
    hca: Option<Arc<FaultHca<EmulatedHca>>>,
    orders: Receiver<Order>,
    mouth: Mouth<W>,
    commands: Commands,
    baseline: Option<Held>,
    /// How late this process was at worst, as far as it has said so.
    told: Lateness,
    dies_in: Option<(Moment, Duration)>,
    /// By peer, the ports to which nothing passes.
    cuts: BTreeMap<u16, Vec<PortId>>,
    finish: Option<u64>,
    is_ready: bool,
    /// To get the weights of its experts.
    attempts: u32,
    is_done: bool,
    has_served: bool,
}

/// What a rank holds.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Held {
    control_bytes: u64,
    gpu_bytes: u64,
    descriptors: u64,
    objects: BTreeMap<&'static str, i64>,
}

impl Held {
    /// Bytes and objects beyond `before`.
    fn beyond(&self, before: &Self) -> u64 {
        let objects = self.objects.iter().map(|(kind, count)| {
            let had = before.objects.get(kind).copied().unwrap_or_default();
            (count - had).max(0).unsigned_abs()
        });
        self.control_bytes.saturating_sub(before.control_bytes)
            + self.gpu_bytes.saturating_sub(before.gpu_bytes)
            + self.descriptors.saturating_sub(before.descriptors)
            + objects.sum::<u64>()
    }
}

/// A rank that has claimed its name.
struct Joined {
    weights: Weights,
    app: App,
    tables: Tables,
    member: ElasticMember,
    hca: Option<Arc<FaultHca<EmulatedHca>>>,
}

impl<W: Write> Worker<W> {
    /// Runs one rank: its first order says who to be. Returns when it is told to end, or cannot go on.
    ///
    /// # Errors
    /// `Os` if there can be no thread for orders. Everything else is said to the supervisor.
    pub fn run(input: impl BufRead + Send + 'static, out: W) -> Result<WorkerEnd, Error> {
        let orders = read_orders(input)?;
        let mut mouth = Mouth { out, offset_ns: 0 };
        let Ok(Order::Be(role)) = orders.recv() else { return Ok(WorkerEnd::Bad) };
        let joined = role.shape.config().map_err(Error::from).and_then(|config| join(&role, &config));
        let Joined { weights, app, tables, member, hca } = match joined {
            Ok(joined) => joined,
            Err(error) => {
                mouth.say_at(unix_ns(), Said::Failed { why: error.to_string() });
                return Ok(WorkerEnd::Bad);
            }
        };
        mouth.offset_ns = unix_ns().saturating_sub(member.pool().now_ns());
        let mut inputs = Inputs::new(role.shape.seed, member.session().config());
        inputs.think_ns_max = THINK_NS_MAX;
        let mut worker = Self {
            weights,
            app,
            inputs,
            tables,
            member,
            hca,
            orders,
            mouth,
            commands: Commands::default(),
            baseline: None,
            told: Lateness::default(),
            dies_in: None,
            cuts: BTreeMap::new(),
            finish: None,
            is_ready: false,
            attempts: 0,
            is_done: false,
            has_served: false,
        };
        let instance = worker.member.instance().0;
        // CAST: both halves.
        worker.say(Said::Hello { instance: [instance as u64, (instance >> 64) as u64] });
        let end = worker.serve();
        Ok(worker.end(end))
    }

    fn now_ns(&self) -> u64 {
        self.member.pool().now_ns()
    }

    fn say(&mut self, said: Said) {
        let now_ns = self.now_ns();
        self.mouth.say_at(now_ns, said);
    }

    /// Step after step, until something ends it.
    fn serve(&mut self) -> Result<Ending, Error> {
        loop {
            if self.obey()? {
                return Ok(Ending::Told);
            }
            self.tell_events();
            self.tell_lateness();
            self.weights.turn();
            if !self.is_ready && self.member.wait_linked(Duration::ZERO).unwrap_or(false) {
                self.become_ready();
            }
            let is_idle = self.app.stage() == Stage::Idle;
            let patience = if is_idle { WAIT } else { Duration::ZERO };
            let is_open = match self.member.wait_open(patience) {
                Ok(is_open) => is_open,
                Err(Error::Membership(stop)) => return Ok(Ending::Stopped(stop)),
                Err(error) => return Err(error),
            };
            let next = self.member.session().next_step();
            let may_begin = is_open && self.finish.is_none_or(|until| next < until);
            if !self.turn(may_begin)? {
                sleep(NAP);
            }
            self.die_if_due();
            if is_idle && !self.is_done && self.finish.is_some_and(|until| next >= until) {
                self.is_done = true;
                self.tell_done(next);
            }
        }
    }

    /// Goes on with the present step, or begins the next; whether one is finished.
    fn turn(&mut self, may_begin: bool) -> Result<bool, Error> {
        let now_ns = self.now_ns();
        match self.app.turn(now_ns, &mut self.inputs, &self.tables, may_begin) {
            Ok(Some(finished)) => {
                self.tell_step(&finished);
                Ok(true)
            }
            Ok(None) => Ok(false),
            Err(Error::Gated(_)) => {
                self.app.wait_until(now_ns + 200_000);
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    /// Carries out what was ordered; whether to end.
    fn obey(&mut self) -> Result<bool, Error> {
        loop {
            match self.orders.try_recv() {
                Ok(Order::End) | Err(TryRecvError::Disconnected) => return Ok(true),
                Ok(order) => self.carry_out(order)?,
                Err(TryRecvError::Empty) => return Ok(false),
            }
        }
    }

    fn carry_out(&mut self, order: Order) -> Result<(), Error> {
        match order {
            Order::Cut { peer, is_cut } => self.cut(peer, is_cut),
            Order::Packets(plan) => self.member.fabric().set_fault_plan(plan)?,
            Order::FailQueue { peer, syndrome, draw } => {
                let qpns = self.member.session().queue_pairs(Rank(peer));
                if !qpns.is_empty() {
                    // CAST: an index into a short list.
                    let qpn = qpns[(draw % qpns.len() as u64) as usize];
                    let now = Nanos(self.now_ns());
                    self.member.device().set_qp_error(qpn, Syndrome(syndrome), now);
                }
            }
            Order::Refuse { skip } => {
                if let Some(hca) = &self.hca {
                    hca.inject(Fault { op: None, skip, effect: Effect::Refuse(Status::IntErr) });
                }
            }
            Order::DieIn { moment, after_us } => {
                self.dies_in = Some((moment, Duration::from_micros(after_us)));
            }
            Order::DieWithinMessage => self.member.fabric().end_within_message()?,
            Order::Baseline => {
                self.look_at_commands();
                self.baseline = Some(self.held());
            }
            Order::Finish { until } => self.finish = Some(until),
            Order::Be(_) | Order::End => {}
        }
        Ok(())
    }

    /// Cuts the path to whoever is `peer` now, or heals whatever was cut: another process may be that peer by then, and
    /// a later one may come back to the port of the one that was cut off.
    fn cut(&mut self, peer: u16, is_cut: bool) {
        let own = self.member.device().port_id();
        if is_cut && let Some(to) = self.member.port_of(Rank(peer)) {
            self.member.fabric().set_path(own, to, PathState::Cut);
            self.cuts.entry(peer).or_default().push(to);
        } else if !is_cut {
            for to in self.cuts.remove(&peer).unwrap_or_default() {
                self.member.fabric().set_path(own, to, PathState::Up);
            }
        }
    }

    /// Ends as kill -9 does, if this is the moment.
    fn die_if_due(&mut self) {
        let stage = self.app.stage();
        let at_moment = self.dies_in.filter(|(moment, _)| moment.is(stage)).map(|(_, after)| after);
        let within_message = self.member.fabric().has_ended().then_some(Duration::ZERO);
        if let Some(after) = at_moment.or(within_message) {
            self.say(Said::Dies);
            sleep(after);
            // Nothing comes behind it.
            let _ = kill_process(getpid(), Signal::KILL);
        }
    }

    /// Says that this rank is ready once it has the weights of its experts: made where no member could be asked, read
    /// from a survivor otherwise.
    fn become_ready(&mut self) {
        let is_first = self.member.view().members.is_empty();
        let got = if is_first { Ok((0, self.weights.make())) } else { self.weights.fetch() };
        match got {
            Ok((read_bytes, digest)) => {
                self.is_ready = true;
                self.member.ready(digest);
                self.say(Said::Ready { read_bytes });
            }
            Err(error) => {
                self.attempts += 1;
                self.say(Said::Refused { doing: error.to_string(), attempts: self.attempts });
                // Whoever has them may have to say so first.
                sleep(FETCH_PAUSE);
            }
        }
    }

    /// Passes on what the keeper has seen and done.
    fn tell_events(&mut self) {
        let events = self.member.take_events();
        if events.is_empty() {
            return;
        }
        self.look_at_commands();
        for event in events {
            let said = match event.what {
                Happening::Suspected { peer, evidence, fault } => {
                    let details =
                        fault.map_or_else(|| evidence.to_string(), |f| format!("{evidence}; {f:?}"));
                    Said::Suspects { peer: peer.0, why: evidence.into(), details }
                }
                Happening::GateClosed { .. } => {
                    Said::Gate { closed_ns: None, switched: false, has_served: self.has_served }
                }
                Happening::GateOpened { closed_ns } => {
                    let has_served = self.has_served;
                    Said::Gate { closed_ns: Some(closed_ns), switched: false, has_served }
                }
                Happening::Switched { closed_ns, .. } => {
                    let has_served = core::mem::replace(&mut self.has_served, true);
                    Said::Gate { closed_ns: Some(closed_ns), switched: true, has_served }
                }
                Happening::Refused { doing, attempts, .. } => Said::Refused { doing: doing.into(), attempts },
                _ => continue,
            };
            self.mouth.say_at(event.at_ns, said);
        }
    }

    /// Says how late this process has been at worst, whenever that is news and more than a part of what peers bear.
    fn tell_lateness(&mut self) {
        let worth_ns = u64::from(self.member.session().config().detect_ms) * 1_000_000 / LATE_PER_DETECT;
        let Lateness { silent_ns, unattended_ns } = self.member.take_lateness();
        let is_news = silent_ns > self.told.silent_ns.saturating_add(worth_ns)
            || unattended_ns > self.told.unattended_ns.saturating_add(worth_ns);
        if is_news {
            self.told.silent_ns = self.told.silent_ns.max(silent_ns);
            self.told.unattended_ns = self.told.unattended_ns.max(unattended_ns);
            let Lateness { silent_ns, unattended_ns } = self.told;
            self.say(Said::Late { silent_ns, unattended_ns });
        }
    }

    fn tell_step(&mut self, finished: &Finished) {
        self.look_at_commands();
        let mut lost: BTreeMap<Option<u16>, u64> = BTreeMap::new();
        for owner in &finished.lost {
            *lost.entry(owner.map(|rank| rank.0)).or_default() += 1;
        }
        let word = StepWord {
            step: finished.step,
            epoch: self.member.session().epoch().0,
            took_ns: self.now_ns().saturating_sub(finished.launched_ns),
            wrong: finished.wrong,
            unreported: finished.unreported,
            lost: lost.into_iter().map(|(owner, count)| Lost { owner, count }).collect(),
        };
        self.say(Said::Step(word));
    }

    fn look_at_commands(&mut self) {
        let (session, view) = (self.member.session(), self.member.view());
        let me = (session.rank(), self.member.instance());
        let touched = self.commands.look(self.member.device(), session, me, &view);
        if let Some(example) = touched.first() {
            let said = Said::Touched { count: touched.len() as u64, example: example.clone() };
            self.say(said);
        }
    }

    fn held(&self) -> Held {
        let session = self.member.session();
        Held {
            control_bytes: session.control_report().live_bytes,
            gpu_bytes: session.gpu().allocated_bytes(),
            descriptors: std::fs::read_dir("/proc/self/fd").map_or(0, |all| all.count() as u64),
            objects: self.commands.objects().clone(),
        }
    }

    fn tell_done(&mut self, step: u64) {
        self.look_at_commands();
        let held = self.held();
        let grown = self.baseline.as_ref().map_or(0, |before| held.beyond(before));
        let held = format!("{:?}, now {held:?}", self.baseline);
        self.say(Said::Done { step, grown, held, recaptures: self.app.recaptures() });
    }

    /// Takes everything down, and says what is left.
    fn end(mut self, ending: Result<Ending, Error>) -> WorkerEnd {
        self.tell_events();
        self.tell_lateness();
        let told = match ending {
            Ok(Ending::Told) => true,
            Ok(Ending::Stopped(stop)) => {
                let is_fenced = matches!(stop, Stop::Fenced { .. });
                self.say(Said::Stopped { is_fenced, why: stop.to_string() });
                if !is_fenced {
                    return WorkerEnd::Bad;
                }
                false
            }
            Err(error) => {
                self.say(Said::Failed { why: error.to_string() });
                return WorkerEnd::Bad;
            }
        };
        let mut unrung = 0;
        if told {
            self.member.set_silent(true);
            // A sign of life that was being sent when the rank fell silent is out by then.
            sleep(QUIET);
            unrung = self.member.device().check_unrung();
        }
        let Self { weights, app, member, hca, mut mouth, mut commands, .. } = self;
        let device = Arc::clone(member.device());
        let at_ns = member.pool().now_ns();
        drop(weights);
        drop(app);
        drop(member);
        drop(hca);
        mouth.say_at(at_ns, Said::Gone { left: commands.left(&device), unrung });
        WorkerEnd::Good
    }
}

/// Why a rank no longer computes.
enum Ending {
    Told,
    Stopped(Stop),
}

fn read_orders(input: impl BufRead + Send + 'static) -> Result<Receiver<Order>, Error> {
    let (sender, orders) = mpsc::channel();
    let read = move || {
        for line in input.lines().map_while(Result::ok) {
            // A line that is none ends the rank: whoever wrote it is no supervisor of ours.
            let Ok(order) = serde_json::from_str(&line) else { return };
            if sender.send(order).is_err() {
                return;
            }
        }
    };
    let thread = thread::Builder::new().name("ibex-orders".into()).spawn(read);
    thread.map_err(|error| OsError::from_io("pthread_create", &error))?;
    Ok(orders)
}

/// Claims the rank's name, as often as it takes: a predecessor's lease may still run, the store may be away.
fn join(role: &Role, config: &ValidConfig) -> Result<Joined, Error> {
    let patience = Deadline::after(CLAIM_PATIENCE);
    loop {
        match try_join(role, config) {
            Err(Error::Store(error)) if is_passing(&error) && !patience.has_passed() => sleep(CLAIM_PAUSE),
            other => return other,
        }
    }
}

fn is_passing(error: &StoreError) -> bool {
    matches!(error, StoreError::Held { .. } | StoreError::Unavailable { .. } | StoreError::Deadline { .. })
}

fn try_join(role: &Role, config: &ValidConfig) -> Result<Joined, Error> {
    let url = StoreUrl::parse(&role.shape.store)?;
    let store = Blocking::open(&url, Clock::system(), STORE_BUDGET)?;
    let hca: Arc<OnceLock<Arc<FaultHca<EmulatedHca>>>> = Arc::default();
    let kept = Arc::clone(&hca);
    let devices = DeviceWrapper::new(move |_, device| {
        let device = FaultHca::new(device);
        // There is one device, and so one call.
        Arc::clone(kept.get_or_init(|| device)) as Arc<dyn Hca>
    });
    let fabric = match role.shape.between {
        Between::Shm => MemberFabric::Shm,
        Between::Udp => MemberFabric::Udp,
    };
    let options = ElasticOptions {
        group: GroupName { cluster: "chaos".into(), group: role.shape.group.clone() },
        rank: Rank(role.rank),
        initial: RankSet::first(role.shape.ranks),
        takeover: role.takeover,
        flap_window: Some(Duration::from_millis(config.detect_ms.into()) * FLAP_WINDOW_DETECTS),
        node: MemberOptions { fabric, devices, mtu: PATH_MTU, ..MemberOptions::default() },
    };
    let member = ElasticMember::join(config, &store, &options)?;
    let (draws, style) = (Draws::new(role.draw, 4), Some(role.way.style()));
    let app = App::new(member.session(), draws, style, Sets::ONE)?;
    let tables = Tables::constant(config)?;
    let weights = claim_weights(role, config, &store, &member, hca.get())?;
    Ok(Joined { weights, app, tables, member, hca: hca.get().cloned() })
}

/// Claims the second name of a rank, that of its weights. The first one stays claimed meanwhile.
fn claim_weights(
    role: &Role,
    config: &ValidConfig,
    store: &Blocking,
    member: &ElasticMember,
    hca: Option<&Arc<FaultHca<EmulatedHca>>>,
) -> Result<Weights, Error> {
    let hca = hca.map_or_else(|| Arc::clone(member.device()) as Arc<dyn Hca>, |hca| Arc::clone(hca) as _);
    let whose = Whose {
        group: &role.shape.group,
        rank: Rank(role.rank),
        num_ranks: role.shape.ranks,
        instance: member.instance(),
        lease_ttl: Duration::from_millis(config.lease_ttl_ms().into()),
        grace: Duration::from_millis(config.store_grace_ms.into()),
        seed: role.shape.seed,
        num_experts: role.shape.experts,
    };
    let patience = Deadline::after(CLAIM_PATIENCE);
    loop {
        match Weights::new(&whose, store, &hca) {
            Err(Error::Store(error)) if is_passing(&error) && !patience.has_passed() => sleep(CLAIM_PAUSE),
            other => return other,
        }
    }
}
