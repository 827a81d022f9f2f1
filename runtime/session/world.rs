//! All ranks of a group in one process, on the embedded emulator: what benches, tests and a first look use.
//!
//! A [`World`] owns one fabric, and per rank one emulated device, one GPU made of the CPU, and one session. Nothing
//! else differs from ranks in processes of their own: they meet only through queue pairs.
//!
//! Devices of another kind ([`DeviceWrapper::given`]) work by themselves; then there is no fabric of ours between them.
//!
//! Workers that run kernels also step the devices and send the signs of life whenever their fibers wait, so there is
//! no thread beside them; a simulation does all of it on the caller's thread. Where GPUs are given ([`Gpus::Given`]),
//! one thread does.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use ibex_hca::emulated::{
    Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig, PathState, Placement, PortId,
};
use ibex_hca::{Hca, LinkLayer, Nanos};
use parking_lot::{Mutex, RwLock};

use super::Session;
use super::stepper::Stepper;
use crate::config::{Config, Link, ValidConfig};
use crate::error::{ConfigError, Error, Limit, Violation};
use crate::gpu::pool::{Pool, PoolConfig, Progress, Progressed};
use crate::gpu::{Backing, Gpu, HostGpu};
use crate::ids::Rank;
use crate::membership::RankSet;

/// How a [`World`] runs.
#[derive(Clone, Debug)]
pub struct WorldOptions {
    /// Threads that run kernels and step devices; by default one per core.
    pub workers: Option<u32>,
    /// How devices learn of work.
    pub doorbells: Doorbells,
    /// Run everything on the caller's thread, in virtual time, under the schedule of this seed.
    pub simulation: Option<u64>,
    /// How the fabric places the writes of one queue pair.
    pub placement: Placement,
    /// The first sequence number of every lane and operation, from 1.
    pub first_seq: u64,
    /// The ranks that are members from the start; by default all. The others exist and wait for
    /// [`World::regroup`].
    pub members: Option<RankSet>,
    /// When the pages of GPU memory come.
    pub backing: Backing,
    /// What stands between a session and its device.
    pub devices: DeviceWrapper,
    /// What runs kernels.
    pub gpus: Gpus,
}

/// What runs the kernels of each rank.
#[derive(Clone, Default)]
pub enum Gpus {
    /// The processors of this machine, as fibers; they also step emulated devices.
    #[default]
    Host,
    /// These, one per rank, in order. They work by themselves, and a thread steps emulated devices.
    Given(Vec<Arc<dyn Gpu>>),
}

impl Gpus {
    /// The one GPU of a rank in a process of its own, if it is given.
    pub(super) fn only(&self) -> Result<Option<Arc<dyn Gpu>>, ConfigError> {
        let Self::Given(gpus) = self else { return Ok(None) };
        exactly("gpus", gpus.len() as u64, 1)?;
        Ok(gpus.first().cloned())
    }

    /// The GPU of one rank.
    fn of(&self, rank: Rank, pool: &Arc<Pool>, backing: Backing) -> Arc<dyn Gpu> {
        match self {
            Self::Host => Arc::new(HostGpu::new(Arc::clone(pool), rank.0.into()).with_backing(backing)),
            Self::Given(gpus) => Arc::clone(&gpus[rank.index()]),
        }
    }

    pub(super) const fn are_given(&self) -> bool {
        matches!(self, Self::Given(_))
    }

    /// Given ones must be as many as ranks, and cannot be simulated.
    fn validate(&self, options: &WorldOptions, num_ranks: u32) -> Result<(), ConfigError> {
        let Self::Given(gpus) = self else { return Ok(()) };
        let wanted = if options.simulation.is_some() { 0 } else { u64::from(num_ranks) };
        exactly("gpus", gpus.len() as u64, wanted)
    }
}

impl fmt::Debug for Gpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => f.write_str("Host"),
            Self::Given(gpus) => write!(f, "Given({})", gpus.len()),
        }
    }
}

/// There is one right number of something.
fn exactly(field: &'static str, value: u64, right: u64) -> Result<(), ConfigError> {
    if value == right {
        return Ok(());
    }
    Err(ConfigError { field, value: value.into(), limit: Limit::Range { min: right, max: right } })
}

/// Puts something between each session and its device: scripted faults, a recorder; or another device in its place.
#[derive(Clone, Default)]
pub struct DeviceWrapper(Wrapper);

#[derive(Clone, Default)]
enum Wrapper {
    #[default]
    Nothing,
    Around(Arc<WrapDevice>),
    Instead(Vec<Arc<dyn Hca>>),
}

type WrapDevice = dyn Fn(Rank, Arc<EmulatedHca>) -> Arc<dyn Hca> + Send + Sync;

impl DeviceWrapper {
    /// Sessions are given what `wrap` makes of their devices.
    pub fn new(wrap: impl Fn(Rank, Arc<EmulatedHca>) -> Arc<dyn Hca> + Send + Sync + 'static) -> Self {
        Self(Wrapper::Around(Arc::new(wrap)))
    }

    /// Sessions are given these devices, one per rank, in order; nothing is emulated here. They are connected with each
    /// other and work without being stepped.
    pub fn given(devices: Vec<Arc<dyn Hca>>) -> Self {
        Self(Wrapper::Instead(devices))
    }

    /// Whether devices are emulated here.
    fn is_emulated(&self) -> bool {
        !matches!(self.0, Wrapper::Instead(_))
    }

    fn device_of(&self, rank: Rank, emulated: &[Arc<EmulatedHca>]) -> Arc<dyn Hca> {
        match &self.0 {
            Wrapper::Nothing => Arc::clone(&emulated[rank.index()]) as _,
            Wrapper::Around(wrap) => wrap(rank, Arc::clone(&emulated[rank.index()])),
            Wrapper::Instead(devices) => Arc::clone(&devices[rank.index()]),
        }
    }

    /// What the one emulated device of a member becomes; nothing where another device is given in its place.
    pub(super) fn around(&self, rank: Rank, emulated: &Arc<EmulatedHca>) -> Option<Arc<dyn Hca>> {
        match &self.0 {
            Wrapper::Nothing => Some(Arc::clone(emulated) as _),
            Wrapper::Around(wrap) => Some(wrap(rank, Arc::clone(emulated))),
            Wrapper::Instead(_) => None,
        }
    }

    /// Given devices must be as many as ranks, and cannot be simulated.
    fn validate(&self, options: &WorldOptions, num_ranks: u32) -> Result<(), ConfigError> {
        let Wrapper::Instead(devices) = &self.0 else { return Ok(()) };
        let wanted = if options.simulation.is_some() { 0 } else { u64::from(num_ranks) };
        exactly("devices", devices.len() as u64, wanted)
    }
}

impl fmt::Debug for DeviceWrapper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match &self.0 {
            Wrapper::Nothing => "DeviceWrapper(none)",
            Wrapper::Around(_) => "DeviceWrapper(..)",
            Wrapper::Instead(_) => "DeviceWrapper(given)",
        })
    }
}

impl Default for WorldOptions {
    fn default() -> Self {
        Self {
            workers: None,
            doorbells: Doorbells::Strict,
            simulation: None,
            placement: Placement::InOrder,
            first_seq: 1,
            members: None,
            backing: Backing::default(),
            devices: DeviceWrapper::default(),
            gpus: Gpus::default(),
        }
    }
}

/// What [`World::replace_peer`] changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Replacement {
    /// Depth of the new send queues, log2 of WQEBBs; `None` keeps the configured one.
    pub sq_depth_log: Option<u8>,
}

/// Steps devices and sends signs of life for all ranks.
struct Agents {
    devices: Vec<Arc<EmulatedHca>>,
    /// Filled once the sessions exist; weak, because sessions hold the pool that calls this.
    sessions: RwLock<Vec<std::sync::Weak<Session>>>,
    silent: Vec<AtomicBool>,
    beat_every_ns: u64,
    next_beat_ns: AtomicU64,
    simulated: bool,
}

impl Agents {
    /// Whoever finds the beat due sends it for all.
    fn beat_if_due(&self, now_ns: u64) -> bool {
        let due = self.next_beat_ns.load(Ordering::Relaxed);
        if now_ns < due {
            return false;
        }
        let next = now_ns + self.beat_every_ns;
        if self.next_beat_ns.compare_exchange(due, next, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return false;
        }
        // Held while a session is: see the end of a world.
        for (session, silent) in self.sessions.read().iter().zip(&self.silent) {
            if let Some(session) = session.upgrade().filter(|_| !silent.load(Ordering::Relaxed)) {
                // A host that cannot speak is silent; its peers' clocks say so.
                let _ = session.send_sign_of_life();
            }
        }
        true
    }

    /// Simulation: lets one device, chosen by `random`, do one small piece of what it could do.
    fn one_piece(&self, now_ns: u64, beaten: bool, random: u64) -> Progressed {
        let mut choices = Choices(random);
        let mut next_deadline_ns = Some(self.next_beat_ns.load(Ordering::Relaxed));
        let count = self.devices.len();
        // CAST: at most 512 ranks.
        let first = choices.below(count as u32) as usize;
        for i in 0..count {
            let device = &self.devices[(first + i) % count];
            let step = device.step_seeded(Nanos(now_ns), &mut |n| choices.below(n));
            if step.did_work {
                return Progressed::Worked;
            }
            next_deadline_ns = sooner(next_deadline_ns, step.next_deadline);
        }
        if beaten { Progressed::Worked } else { Progressed::Idle { next_deadline_ns } }
    }
}

fn sooner(one: Option<u64>, other: Option<Nanos>) -> Option<u64> {
    match (one, other) {
        (Some(a), Some(b)) => Some(a.min(b.0)),
        (a, b) => a.or(b.map(|n| n.0)),
    }
}

impl Progress for Agents {
    fn progress(&self, worker: u32, now_ns: u64, random: u64) -> Progressed {
        let mut worked = self.beat_if_due(now_ns);
        if self.simulated {
            return self.one_piece(now_ns, worked, random);
        }
        let mut next_deadline_ns = Some(self.next_beat_ns.load(Ordering::Relaxed));
        let count = self.devices.len();
        for i in 0..count {
            // Workers start at different devices, so that they do not queue for the same one.
            let device = &self.devices[(i + worker as usize * count / 2) % count];
            let step = device.step(Nanos(now_ns));
            worked |= step.did_work;
            next_deadline_ns = sooner(next_deadline_ns, step.next_deadline);
        }
        if worked { Progressed::Worked } else { Progressed::Idle { next_deadline_ns } }
    }
}

/// Choices drawn from one random word: splitmix64.
struct Choices(u64);

impl Choices {
    fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // CAST: a remainder below n.
        ((z ^ (z >> 31)) % u64::from(n.max(1))) as u32
    }
}

/// All ranks of a group in one process. See the module documentation.
///
/// # Examples
///
/// A step, a peer's queue pairs replaced in place, and the same step again.
///
/// ```
/// use ibex::{Config, Error, Rank, Replacement, Tokens, World, WorldOptions};
///
/// fn main() -> Result<(), Error> {
///     let config = Config {
///         num_ranks: 2,
///         max_tokens: 4,
///         hidden: 256,
///         num_experts: 8,
///         max_topk: 2,
///         detect_ms: 20_000,
///         ..Config::default()
///     };
///     let world = World::new(&config, &WorldOptions::default())?;
///     let x = vec![0x3f80_u16; 4 * 256]; // 1.0 in bf16
///     let tokens = Tokens { x: &x, topk_idx: &[0, 7, 1, 6, 2, -1, 3, 4], topk_weights: &[0.5; 8] };
///     // All ranks launch before one is waited for.
///     let step = || -> Result<_, Error> {
///         let mut running = Vec::new();
///         for session in world.sessions() {
///             let (tensors, stream) = (session.tensors()?, session.stream());
///             let num_tokens = session.load(&tensors, 2, &tokens)?;
///             session.launch_step(&stream, &tensors, 2)?; // dispatch, expert, combine
///             running.push((session, tensors, stream, num_tokens));
///         }
///         let mut outputs = Vec::new();
///         for (session, tensors, stream, num_tokens) in &running {
///             outputs.push(session.finish(stream, tensors, *num_tokens)?);
///         }
///         Ok(outputs)
///     };
///     let before = step()?;
///     assert!(before.iter().all(|rank| rank.lost_topk == [0; 4]), "nothing is lost");
///     world.replace_peer(Rank(0), Replacement::default())?;
///     assert_eq!(step()?, before, "the same sums as before");
///     Ok(())
/// }
/// ```
pub struct World {
    // Sessions first: they destroy their queue pairs while devices and pool still run.
    sessions: Vec<Arc<Session>>,
    _stepper: Option<Stepper>,
    agents: Arc<Agents>,
    fabric: Arc<Fabric>,
    pool: Arc<Pool>,
    pub(super) members: Mutex<RankSet>,
}

impl Drop for World {
    fn drop(&mut self) {
        // A worker that sends signs of life holds sessions for a moment. It must not be the last to let go of one: the
        // session holds the pool, which would then wait for its own worker.
        self.agents.sessions.write().clear();
    }
}

impl World {
    /// Creates every rank and connects all of them.
    ///
    /// # Errors
    /// `Config` for a field outside its limit, before anything is created; else what a part refused.
    pub fn new(config: &Config, options: &WorldOptions) -> Result<Self, Error> {
        let config = config.validate()?;
        options.devices.validate(options, config.num_ranks)?;
        options.gpus.validate(options, config.num_ranks)?;
        let fabric = Fabric::inproc(FabricConfig {
            seed: options.simulation.unwrap_or(1),
            placement: options.placement,
            ..FabricConfig::default()
        });
        let devices = make_devices(&config, options, &fabric)?;
        let agents = Arc::new(Agents {
            silent: (0..config.num_ranks).map(|_| AtomicBool::new(false)).collect(),
            devices,
            sessions: RwLock::default(),
            beat_every_ns: u64::from(config.detect_ms) * 1_000_000 / 4,
            next_beat_ns: AtomicU64::new(0),
            simulated: options.simulation.is_some(),
        });
        let pool_config = match options.simulation {
            Some(seed) => PoolConfig::simulation(seed),
            None => PoolConfig::real_time(options.workers.unwrap_or_else(default_workers)),
        };
        let progress: Arc<dyn Progress> = Arc::clone(&agents) as _;
        let pool =
            Arc::new(Pool::new(pool_config.with_progress(progress)).map_err(crate::gpu::GpuError::from)?);
        // Before the first queue pair exists: connecting waits for devices too.
        let stepper =
            options.gpus.are_given().then(|| Stepper::start(Arc::clone(&agents) as _)).transpose()?;
        let mut sessions = Vec::new();
        for rank in 0..config.num_ranks {
            let gpu = options.gpus.of(Rank(rank as u16), &pool, options.backing);
            let hca = options.devices.device_of(Rank(rank as u16), &agents.devices);
            sessions.push(Arc::new(Session::new(&config, Rank(rank as u16), gpu, hca)?));
        }
        *agents.sessions.write() = sessions.iter().map(Arc::downgrade).collect();
        let members = options.members.unwrap_or(RankSet::first(config.num_ranks));
        let world = Self { sessions, _stepper: stepper, agents, fabric, pool, members: Mutex::new(members) };
        let base_seq = vec![[options.first_seq; 2]; config.lanes as usize];
        for rank in &world.sessions {
            rank.start_at(&base_seq)?;
        }
        for rank in members.iter() {
            for peer in members.iter().filter(|peer| *peer > rank) {
                world.connect_pair(rank, peer, Replacement::default(), &base_seq)?;
                world.activate_pair(rank, peer)?;
            }
        }
        world.form(&config, members, base_seq)?;
        Ok(world)
    }

    /// Connects two ranks whose slots for each other are empty; they stay masked.
    pub(super) fn connect_pair(
        &self,
        one: Rank,
        other: Rank,
        change: Replacement,
        base_seq: &[[u64; 2]],
    ) -> Result<(), Error> {
        let (a, b) = (self.session(one), self.session(other));
        let from_a = a.offer(other, change.sq_depth_log)?;
        let from_b = b.offer(one, change.sq_depth_log)?;
        b.connect(&from_a, base_seq)?;
        a.connect(&from_b, base_seq)
    }

    fn activate_pair(&self, one: Rank, other: Rank) -> Result<(), Error> {
        self.session(one).activate(other)?;
        self.session(other).activate(one)
    }

    /// The ranks, in order.
    pub fn sessions(&self) -> &[Arc<Session>] {
        &self.sessions
    }

    /// One rank.
    pub fn session(&self, rank: Rank) -> &Arc<Session> {
        &self.sessions[rank.index()]
    }

    /// The emulated devices, by rank; none where devices were given.
    pub fn devices(&self) -> &[Arc<EmulatedHca>] {
        &self.agents.devices
    }

    /// What lies between the devices.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// The pool that runs all kernels.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// Cuts or heals the way from `src` to `dst`.
    pub fn set_path(&self, src: Rank, dst: Rank, state: PathState) {
        self.fabric.set_path(PortId(src.0), PortId(dst.0), state);
    }

    /// Stops or resumes a rank's signs of life, as if its host were stopped.
    pub fn set_silent(&self, rank: Rank, silent: bool) {
        self.agents.silent[rank.index()].store(silent, Ordering::Relaxed);
    }

    /// Recreates the queue pairs between `rank` and every other rank, in place, between two steps, and lets `rank`
    /// go on where the others are if it has missed steps.
    ///
    /// Captured graphs stay valid: nothing but `rank`'s slots changes, at its peers and at `rank` itself.
    ///
    /// # Errors
    /// `Config` for a depth outside its limits, before anything is changed; `Protocol` if the other ranks are not at
    /// the same step; what a device refused. Then `rank` stays masked everywhere, the others serve on without it, and
    /// a retry goes on where this stopped.
    pub fn replace_peer(&self, rank: Rank, change: Replacement) -> Result<(), Error> {
        let session = self.replaceable(rank)?;
        session.check_depth(change.sq_depth_log)?;
        self.common_next_seq(rank)?;
        let peers = || (0..self.sessions.len() as u16).map(Rank).filter(|peer| *peer != rank);
        // All of them before the first command: whatever is refused, nobody waits for one half of a pair.
        for peer in peers() {
            self.session(peer).mask(rank)?;
            session.mask(peer)?;
        }
        for peer in peers() {
            self.session(peer).fence(rank)?;
            session.fence(peer)?;
        }
        // Halves that ran when this began have left by now, and have moved their counters.
        let base_seq = self.common_next_seq(rank)?;
        if session.next_seqs()? != base_seq {
            session.start_at(&base_seq)?;
        }
        for peer in peers() {
            self.connect_pair(rank, peer, change, &base_seq)?;
        }
        peers().try_for_each(|peer| self.activate_pair(rank, peer))
    }

    pub(super) fn replaceable(&self, rank: Rank) -> Result<&Arc<Session>, Error> {
        self.sessions.get(rank.index()).ok_or_else(|| {
            Error::Config(ConfigError {
                field: "rank",
                value: u32::from(rank.0).into(),
                limit: Limit::Range { min: 0, max: self.sessions.len() as u64 - 1 },
            })
        })
    }

    /// The next sequence numbers per lane, which between two steps are the same on every rank but the `replaced` one.
    fn common_next_seq(&self, replaced: Rank) -> Result<Vec<[u64; 2]>, Error> {
        let mut others = self.sessions.iter().filter(|s| s.rank() != replaced);
        // A rank alone has nobody to follow.
        let Some(first) = others.next() else { return self.session(replaced).next_seqs() };
        let expected = first.next_seqs()?;
        for session in others {
            for (found, expected) in session.next_seqs()?.iter().zip(&expected) {
                for (op, check) in ["next dispatch", "next combine"].into_iter().enumerate() {
                    if found[op] != expected[op] {
                        let (from, found, expected) = (session.rank(), found[op], expected[op]);
                        return Err(Error::Protocol(Violation { from, check, found, expected }));
                    }
                }
            }
        }
        Ok(expected)
    }
}

fn make_devices(
    config: &ValidConfig,
    options: &WorldOptions,
    fabric: &Arc<Fabric>,
) -> Result<Vec<Arc<EmulatedHca>>, Error> {
    let link = match config.link {
        Link::Ib => LinkLayer::Ib,
        Link::Roce => LinkLayer::Roce,
    };
    let device = EmulatedConfig { link, doorbells: options.doorbells, ..EmulatedConfig::default() };
    let count = if options.devices.is_emulated() { config.num_ranks } else { 0 };
    (0..count).map(|_| Ok(EmulatedHca::new(Arc::clone(fabric), device)?)).collect()
}

fn default_workers() -> u32 {
    // CAST: at most the number of cores, far below 2^32.
    std::thread::available_parallelism().map_or(1, |n| n.get() as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn workers_hold_no_session_of_a_world_that_has_ended() {
        let config = Config { num_ranks: 2, max_tokens: 4, hidden: 256, num_experts: 8, ..Config::default() };
        let world = World::new(&config, &WorldOptions::default()).unwrap();
        let (agents, kept) = (Arc::clone(&world.agents), Arc::clone(&world.sessions[0]));
        drop(world);
        assert!(agents.sessions.read().is_empty(), "a worker could be the last to let go");
        drop(kept);
    }
}
