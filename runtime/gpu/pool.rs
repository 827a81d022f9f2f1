//! The host SIMT runtime of `kernels/host`, as a Rust value: kernels run as fibers on a few threads, or all
//! on one.
//!
//! Who owns what: a [`Pool`] owns its worker threads, fibers and stacks, and a copy of each launch's
//! arguments. The memory that arguments point to is the caller's and must outlive the launch; that is why
//! [`Pool::launch`] is unsafe.
//!
//! Invariants:
//! - All blocks of one device run on one worker, and all blocks of a launch are resident from its start.
//! - Every accepted launch's `done` is called once, or dropped uncalled when the pool goes before the
//!   kernel ends.
//! - [`Progress`] and `done` run on a worker's own stack, never on a fiber's.
#![expect(unsafe_code, reason = "the FFI island of the host SIMT runtime: kernels are C++")]

use core::ffi::{CStr, c_char, c_void};
use core::fmt;
use core::time::Duration;
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};

use parking_lot::Mutex;

mod ffi;

/// Most workers of one pool.
pub const WORKERS_MAX: u32 = 256;
/// Most bytes of a kernel's argument struct: what every supported GPU takes as launch parameters.
pub const ARGS_LEN_MAX: usize = 4096;
/// Most warps of one block.
pub const WARPS_PER_BLOCK_MAX: u32 = 32;
/// Most fibers alive on one worker, which bounds its pooled stacks.
pub const FIBERS_MAX: u32 = 16384;

/// What a call of [`Progress::progress`] found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progressed {
    /// It did something; kernels may be able to move.
    Worked,
    /// It has nothing to do before this time, if before anything.
    Idle {
        /// Time of its next deadline.
        next_deadline_ns: Option<u64>,
    },
}

/// What kernels wait for and their own worker can step: the emulated device.
pub trait Progress: Send + Sync {
    /// Does some work. Called by all workers, concurrently, whenever the fibers of one have nothing else to
    /// do, and at least every few hundred fiber switches.
    ///
    /// `random` is the simulation's source of choices, and 0 in real time.
    fn progress(&self, worker: u32, now_ns: u64, random: u64) -> Progressed;
}

/// Real time on threads, or simulation on the caller's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolMode {
    /// The pool spawns this many threads, 1 to [`WORKERS_MAX`].
    RealTime {
        /// Number of worker threads.
        workers: u32,
    },
    /// No threads: [`Pool::simulate`] runs everything under the schedule of one seed, in virtual time.
    Simulation {
        /// Same seed and same calls, same schedule.
        seed: u64,
    },
}

/// How to make a [`Pool`].
#[derive(Clone)]
pub struct PoolConfig {
    /// Threads or simulation.
    pub mode: PoolMode,
    /// What workers step when fibers wait.
    pub progress: Option<Arc<dyn Progress>>,
    /// How long nothing may move: real time, a report on stderr; simulation, [`PoolError::Stuck`] after as
    /// much virtual time. `None`: 30 s, or 1000 s of virtual time.
    pub stuck_after: Option<Duration>,
    /// Simulation: most scheduling decisions without time moving. `None`: 50 million.
    pub steps_max: Option<u64>,
}

impl PoolConfig {
    /// Worker threads in real time.
    pub fn real_time(workers: u32) -> Self {
        Self { mode: PoolMode::RealTime { workers }, progress: None, stuck_after: None, steps_max: None }
    }

    /// One seeded schedule in virtual time.
    pub fn simulation(seed: u64) -> Self {
        Self { mode: PoolMode::Simulation { seed }, progress: None, stuck_after: None, steps_max: None }
    }

    /// The same with something to step.
    pub fn with_progress(mut self, progress: Arc<dyn Progress>) -> Self {
        self.progress = Some(progress);
        self
    }
}

impl fmt::Debug for PoolConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolConfig")
            .field("mode", &self.mode)
            .field("progress", &self.progress.is_some())
            .field("stuck_after", &self.stuck_after)
            .field("steps_max", &self.steps_max)
            .finish()
    }
}

/// Why the pool refused, or a simulation ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// A number is outside its range; nothing was created or queued.
    #[error("{field} = {value} is outside {min}..={max}")]
    OutOfRange {
        /// Which number.
        field: &'static str,
        /// What was given.
        value: u64,
        /// Least valid value.
        min: u64,
        /// Greatest valid value.
        max: u64,
    },
    /// No kernel of this build has this id.
    #[error("kernel id {id} is unknown")]
    UnknownKernel {
        /// The id.
        id: u32,
    },
    /// The argument bytes are not the kernel's argument struct.
    #[error("kernel {id} takes {expected} argument bytes, not {given}")]
    ArgsLen {
        /// The kernel.
        id: u32,
        /// Bytes given.
        given: usize,
        /// Size of its argument struct.
        expected: usize,
    },
    /// Too many fibers would be alive on one worker.
    #[error("{fibers} more fibers exceed {FIBERS_MAX} on one worker")]
    TooManyFibers {
        /// Warps of the refused launch.
        fibers: u64,
    },
    /// The operating system refused memory for stacks.
    #[error("out of memory for fiber stacks")]
    NoMemory,
    /// The operating system refused a thread.
    #[error("cannot spawn a worker thread: os error {code}")]
    Spawn {
        /// `errno`, 0 if unknown.
        code: i32,
    },
    /// The pool is shutting down.
    #[error("the pool is shutting down")]
    ShutDown,
    /// Simulation: nothing can move any more; a report of every fiber is on stderr.
    #[error("simulation is stuck: nothing can move")]
    Stuck,
    /// Simulation: accesses change memory for ever, but time never moves; a report is on stderr.
    #[error("simulation is in a livelock: time never moves")]
    Livelock,
    /// `simulate` on a real-time pool.
    #[error("the pool runs in real time")]
    NotSimulation,
    /// `simulate` while another call of it runs.
    #[error("the simulation is already running")]
    AlreadyRunning,
}

/// One launch.
#[derive(Debug, Clone, Copy)]
pub struct PoolLaunch<'a> {
    /// Id of the kernel (kernels/include/ibex/kernel_list.h).
    pub kernel: u32,
    /// The device it runs as: all its blocks share worker `device mod workers`.
    pub device: u32,
    /// Blocks, at least 1.
    pub blocks: u32,
    /// Warps of each block, 1 to [`WARPS_PER_BLOCK_MAX`] and no more than the kernel allows.
    pub warps_per_block: u32,
    /// The bytes of the kernel's argument struct; copied.
    pub args: &'a [u8],
}

/// Counters since the pool was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct PoolStats {
    /// Launches accepted.
    pub launches: u64,
    /// Switches from one fiber to another.
    pub switches: u64,
    /// Polls that found nothing new and gave way.
    pub stalls: u64,
    /// Calls of [`Progress::progress`].
    pub progress_calls: u64,
    /// Stacks mapped, in use or pooled.
    pub stacks: u64,
    /// Simulation: a hash over every decision; equal hashes, equal schedules.
    pub schedule_hash: u64,
    /// Simulation: changes that kernels made to memory, and everything else that may wake a kernel.
    pub events: u64,
}

/// What runs when a launch has finished.
type Done = Box<dyn FnOnce() + Send>;

/// Runs kernels as fibers.
///
/// Dropping it stops the workers and joins their threads; kernels that have not finished are abandoned
/// where they stand and never touch memory again.
pub struct Pool {
    raw: RawPool,
    threads: Vec<JoinHandle<()>>,
    config: PoolConfig,
    /// Held while a simulation runs; it has one scheduler.
    simulating: Mutex<()>,
    /// The thread that holds `simulating`.
    simulated_by: Mutex<Option<ThreadId>>,
    /// What the C side's `progress_ctx` points to; freed after the pool.
    _progress: Option<Box<Arc<dyn Progress>>>,
}

#[derive(Clone, Copy)]
struct RawPool(*mut ffi::Pool);

// SAFETY: the C side locks its inboxes; the calls that need one thread at a time are guarded here
// (`simulating`, one thread per worker).
unsafe impl Send for RawPool {}
// SAFETY: as above.
unsafe impl Sync for RawPool {}

impl Pool {
    /// Makes a pool and, in real time, its threads.
    ///
    /// # Errors
    /// `OutOfRange` for a bad number of workers, `NoMemory`, `Spawn`.
    pub fn new(config: PoolConfig) -> Result<Self, PoolError> {
        let (workers, mode, seed) = match config.mode {
            PoolMode::RealTime { workers } => (workers, ffi::MODE_REAL_TIME, 0),
            PoolMode::Simulation { seed } => (1, ffi::MODE_SIMULATION, seed),
        };
        check_range("workers", workers.into(), 1, WORKERS_MAX.into())?;
        let progress = config.progress.clone().map(Box::new);
        let context = progress.as_deref().map_or(core::ptr::null(), core::ptr::from_ref);
        let raw_config = ffi::PoolConfig {
            num_workers: workers,
            mode,
            seed,
            progress: progress.is_some().then_some(call_progress),
            progress_ctx: context.cast_mut().cast(),
            stack_len: 0,
            stuck_after_ns: config.stuck_after.map_or(0, saturating_ns),
            steps_max: config.steps_max.unwrap_or(0),
        };
        let mut status = ffi::OK;
        // SAFETY: both pointers are valid for the call; `progress` outlives the pool (dropped after it).
        let raw = RawPool(unsafe { ffi::ibex_pool_create(&raw_config, &mut status) });
        if raw.0.is_null() {
            return Err(PoolError::NoMemory);
        }
        let mut pool = Self {
            raw,
            threads: Vec::new(),
            config,
            simulating: Mutex::new(()),
            simulated_by: Mutex::new(None),
            _progress: progress,
        };
        if mode == ffi::MODE_REAL_TIME {
            for worker in 0..workers {
                pool.threads.push(spawn_worker(raw, worker)?);
            }
        }
        Ok(pool)
    }

    /// Queues one launch and returns at once; `done` runs on a worker when its last block has left.
    ///
    /// `done` may launch. It may not drop the last reference to this pool.
    ///
    /// # Errors
    /// `UnknownKernel`, `ArgsLen`, `OutOfRange`, `TooManyFibers`, `NoMemory`: nothing was queued, `done` is
    /// dropped.
    ///
    /// # Safety
    /// `args` are the bytes of the argument struct that the kernel expects, and all memory that it reaches
    /// through them is valid, and shared with it in the way its documentation says, until `done` has been
    /// called or the pool has been dropped.
    pub unsafe fn launch(&self, launch: &PoolLaunch<'_>, done: Done) -> Result<(), PoolError> {
        check_launch(launch)?;
        let context = Box::into_raw(Box::new(done));
        let raw = ffi::Launch {
            kernel_id: launch.kernel,
            device: launch.device,
            num_blocks: launch.blocks,
            warps_per_block: launch.warps_per_block,
            args: launch.args.as_ptr().cast(),
            args_len: launch.args.len(),
            on_done: Some(call_done),
            done_ctx: context.cast(),
        };
        // SAFETY: the pool is alive, `raw` is valid for the call and its arguments are copied by it.
        let status = unsafe { ffi::ibex_pool_launch(self.raw.0, &raw) };
        if status == ffi::OK {
            return Ok(());
        }
        // SAFETY: a refused launch does not call `on_done`, so the box is still ours.
        drop(unsafe { Box::from_raw(context) });
        Err(match status {
            ffi::SHUT_DOWN => PoolError::ShutDown,
            ffi::NO_MEMORY => PoolError::NoMemory,
            _ => PoolError::TooManyFibers {
                fibers: u64::from(launch.blocks) * u64::from(launch.warps_per_block),
            },
        })
    }

    /// Simulation: runs kernels and device on this thread until `until` holds. It is asked between steps
    /// and may launch.
    ///
    /// # Errors
    /// `Stuck` and `Livelock` when it can never hold, `NotSimulation`, `AlreadyRunning`.
    pub fn simulate(&self, until: &mut dyn FnMut() -> bool) -> Result<(), PoolError> {
        let _running = self.simulating.try_lock().ok_or(PoolError::AlreadyRunning)?;
        let mut until = until;
        let context: *mut &mut dyn FnMut() -> bool = &mut until;
        *self.simulated_by.lock() = Some(std::thread::current().id());
        // SAFETY: the pool is alive, one simulation runs at a time, and `context` is valid for the call.
        let status = unsafe { ffi::ibex_pool_simulate(self.raw.0, call_until, context.cast()) };
        *self.simulated_by.lock() = None;
        match status {
            ffi::OK => Ok(()),
            ffi::STUCK => Err(PoolError::Stuck),
            ffi::LIVELOCK => Err(PoolError::Livelock),
            ffi::SHUT_DOWN => Err(PoolError::ShutDown),
            _ => Err(PoolError::NotSimulation),
        }
    }

    /// Simulation: ends a device as if its process had died, wherever its kernels stand. What they stored stays
    /// stored; nothing that was launched goes on, and each `done` is dropped uncalled before this returns.
    ///
    /// # Errors
    /// `NotSimulation`; `AlreadyRunning` if another thread runs the simulation.
    pub fn kill(&self, device: u32) -> Result<(), PoolError> {
        // SAFETY: the pool is alive, and `between_steps` calls this where no fiber and no scheduler runs.
        self.between_steps(|raw| unsafe { ffi::ibex_pool_kill(raw, device) })
    }

    /// Simulation: from now on none of a device's kernels moves, or they go on where they stood.
    ///
    /// # Errors
    /// As [`Pool::kill`].
    pub fn freeze(&self, device: u32, frozen: bool) -> Result<(), PoolError> {
        // SAFETY: as in `kill`.
        self.between_steps(|raw| unsafe { ffi::ibex_pool_freeze(raw, device, frozen) })
    }

    /// Changes what the scheduler owns: from within the simulation's own callbacks, which run between its steps, or
    /// while none runs.
    fn between_steps(&self, change: impl FnOnce(*mut ffi::Pool) -> u32) -> Result<(), PoolError> {
        let idle = self.simulating.try_lock();
        if idle.is_none() && *self.simulated_by.lock() != Some(std::thread::current().id()) {
            return Err(PoolError::AlreadyRunning);
        }
        match change(self.raw.0) {
            ffi::OK => Ok(()),
            _ => Err(PoolError::NotSimulation),
        }
    }

    /// The kernels' clock: monotonic, or virtual.
    pub fn now_ns(&self) -> u64 {
        // SAFETY: the pool is alive.
        unsafe { ffi::ibex_pool_now_ns(self.raw.0) }
    }

    /// How the pool was made.
    pub fn config(&self) -> &PoolConfig {
        &self.config
    }

    /// Counters; exact while nothing runs.
    pub fn stats(&self) -> PoolStats {
        let mut raw = ffi::PoolStats::default();
        // SAFETY: the pool is alive and `raw` is valid for the call.
        unsafe { ffi::ibex_pool_get_stats(self.raw.0, &mut raw) };
        PoolStats {
            launches: raw.launches,
            switches: raw.switches,
            stalls: raw.stalls,
            progress_calls: raw.progress_calls,
            stacks: raw.stacks,
            schedule_hash: raw.schedule_hash,
            events: raw.events,
        }
    }
}

impl fmt::Debug for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool").field("config", &self.config).field("stats", &self.stats()).finish()
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // SAFETY: the pool is alive.
        unsafe { ffi::ibex_pool_shutdown(self.raw.0) };
        for thread in self.threads.drain(..) {
            // A worker cannot panic: callbacks that do abort. So there is no result to look at.
            let _ = thread.join();
        }
        // SAFETY: shut down, every worker's thread has ended, and nobody else holds the pointer.
        unsafe { ffi::ibex_pool_destroy(self.raw.0) };
    }
}

/// Name of a kernel of this build; `None` where no kernel has this id.
pub fn kernel_name(id: u32) -> Option<&'static str> {
    // SAFETY: any id is valid.
    let name: *const c_char = unsafe { ffi::ibex_kernel_name(id) };
    if name.is_null() {
        return None;
    }
    // SAFETY: names are string literals of the C++ side.
    unsafe { CStr::from_ptr(name) }.to_str().ok()
}

/// Size of a kernel's argument struct; `None` where no kernel has this id.
pub fn kernel_args_len(id: u32) -> Option<usize> {
    kernel_name(id)?;
    // SAFETY: any id is valid.
    Some(unsafe { ffi::ibex_kernel_args_len(id) } as usize)
}

fn check_range(field: &'static str, value: u64, min: u64, max: u64) -> Result<(), PoolError> {
    if (min..=max).contains(&value) { Ok(()) } else { Err(PoolError::OutOfRange { field, value, min, max }) }
}

/// Refuses what [`Pool::launch`] would refuse whatever else runs.
pub(super) fn check_launch(launch: &PoolLaunch<'_>) -> Result<(), PoolError> {
    let id = launch.kernel;
    let expected = kernel_args_len(id).ok_or(PoolError::UnknownKernel { id })?;
    if launch.args.len() != expected {
        return Err(PoolError::ArgsLen { id, given: launch.args.len(), expected });
    }
    // SAFETY: any id is valid.
    let warps_max = unsafe { ffi::ibex_kernel_threads_max(id) } / 32;
    check_range("blocks", launch.blocks.into(), 1, FIBERS_MAX.into())?;
    let warps_max = warps_max.min(WARPS_PER_BLOCK_MAX);
    check_range("warps_per_block", launch.warps_per_block.into(), 1, warps_max.into())
}

fn spawn_worker(raw: RawPool, worker: u32) -> Result<JoinHandle<()>, PoolError> {
    let body = move || {
        let raw = raw;
        // SAFETY: the pool joins this thread before it goes, and no other thread runs this worker.
        unsafe { ffi::ibex_pool_worker(raw.0, worker) };
    };
    std::thread::Builder::new()
        .name(format!("ibex-worker-{worker}"))
        .spawn(body)
        .map_err(|e| PoolError::Spawn { code: e.raw_os_error().unwrap_or(0) })
}

/// A panic in a callback cannot unwind through fibers and C++; leaving an `extern "C"` function it aborts.
extern "C" fn call_progress(ctx: *mut c_void, worker: u32, now_ns: u64, random: u64) -> u64 {
    // SAFETY: `ctx` is the pool's boxed `Progress`, which lives as long as its workers.
    let progress = unsafe { &*ctx.cast::<Arc<dyn Progress>>() };
    match progress.progress(worker, now_ns, random) {
        Progressed::Worked => ffi::PROGRESS_WORKED,
        Progressed::Idle { next_deadline_ns } => next_deadline_ns.unwrap_or(ffi::PROGRESS_IDLE).max(1),
    }
}

extern "C" fn call_done(ctx: *mut c_void, finished: bool) {
    // SAFETY: `ctx` is the box of this launch, and `on_done` is called exactly once.
    let done = unsafe { Box::from_raw(ctx.cast::<Done>()) };
    if finished {
        done();
    }
}

extern "C" fn call_until(ctx: *mut c_void) -> bool {
    // SAFETY: `ctx` points to the closure that `simulate` borrows for the whole call.
    let until = unsafe { &mut *ctx.cast::<&mut dyn FnMut() -> bool>() };
    until()
}

fn saturating_ns(duration: Duration) -> u64 {
    // 0 means "default" to the C side.
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX).max(1)
}
