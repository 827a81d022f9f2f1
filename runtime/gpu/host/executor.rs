//! What a host GPU needs of the machine that runs kernels, and the fiber pool as that machine.
//!
//! Streams, events and graphs are tested on a scripted executor; the product runs on
//! [`PoolExecutor`]. It owns a share of the pool and nothing else.

use core::cell::Cell;
use core::mem::ManuallyDrop;
use std::sync::Arc;

use super::super::GpuError;
use super::super::pool::{self, Pool, PoolError, PoolLaunch, PoolMode};
use super::queue::FrozenLaunch;

/// Called once when a launch has finished, on any thread.
pub(super) type Completion = Box<dyn FnOnce() + Send>;

/// Runs kernels. All blocks of all launches that have been started make progress together.
pub(super) trait Executor: Send + Sync {
    /// Refuses a launch that can never start, before it is queued.
    fn check(&self, launch: &FrozenLaunch) -> Result<(), GpuError>;

    /// Starts one launch and returns at once. After an error it has not started, and `done` is not called.
    fn start(&self, launch: &FrozenLaunch, done: Completion) -> Result<(), GpuError>;

    /// Runs kernels on the calling thread until `until` holds, if kernels only run that way (simulation).
    fn drive(&self, until: &mut dyn FnMut() -> bool) -> Result<Drive, GpuError>;

    /// Ends everything that was started, in simulation; completions are dropped uncalled.
    fn kill(&self) -> Result<(), GpuError>;

    /// Stops everything that was started, in simulation, or lets it go on.
    fn freeze(&self, frozen: bool) -> Result<(), GpuError>;

    /// The clock of the kernels.
    fn now_ns(&self) -> u64;
}

/// Who makes kernels progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drive {
    /// Other threads do: wait for the completion.
    Elsewhere,
    /// The caller did, and the condition holds now.
    Reached,
}

/// One device of a fiber pool.
pub(super) struct PoolExecutor {
    pool: ManuallyDrop<Arc<Pool>>,
    device: u32,
}

impl PoolExecutor {
    pub(super) fn new(pool: Arc<Pool>, device: u32) -> Self {
        Self { pool: ManuallyDrop::new(pool), device }
    }

    fn describe<'a>(&self, launch: &'a FrozenLaunch) -> PoolLaunch<'a> {
        PoolLaunch {
            kernel: launch.kernel as u32,
            device: self.device,
            blocks: launch.blocks,
            warps_per_block: launch.warps_per_block,
            args: &launch.args,
        }
    }
}

impl Executor for PoolExecutor {
    fn check(&self, launch: &FrozenLaunch) -> Result<(), GpuError> {
        Ok(pool::check_launch(&self.describe(launch))?)
    }

    #[expect(unsafe_code, reason = "the one place where a host GPU hands a launch to the fibers")]
    fn start(&self, launch: &FrozenLaunch, done: Completion) -> Result<(), GpuError> {
        let done = Box::new(move || {
            IN_COMPLETION.set(true);
            done();
            IN_COMPLETION.set(false);
        });
        // SAFETY: `Gpu::launch` had the caller vouch for the argument bytes and the addresses in
        // them; memory of this GPU stays mapped until `done` has been called, and `done` keeps the
        // device that owns it.
        Ok(unsafe { self.pool.launch(&self.describe(launch), done) }?)
    }

    fn drive(&self, until: &mut dyn FnMut() -> bool) -> Result<Drive, GpuError> {
        match self.pool.config().mode {
            PoolMode::RealTime { .. } => Ok(Drive::Elsewhere),
            PoolMode::Simulation { .. } => {
                self.pool.simulate(until)?;
                Ok(Drive::Reached)
            }
        }
    }

    fn kill(&self) -> Result<(), GpuError> {
        Ok(self.pool.kill(self.device)?)
    }

    fn freeze(&self, frozen: bool) -> Result<(), GpuError> {
        Ok(self.pool.freeze(self.device, frozen)?)
    }

    fn now_ns(&self) -> u64 {
        self.pool.now_ns()
    }
}

thread_local! {
    /// Whether this thread is a worker of a pool inside the completion of a launch.
    static IN_COMPLETION: Cell<bool> = const { Cell::new(false) };
}

impl Drop for PoolExecutor {
    #[expect(unsafe_code, reason = "the pool must not be dropped in place on its own worker")]
    fn drop(&mut self) {
        // SAFETY: taken once, here, and the executor is not used afterwards.
        let pool = unsafe { ManuallyDrop::take(&mut self.pool) };
        if IN_COMPLETION.get() {
            release_elsewhere(pool);
        }
    }
}

/// Drops a share of the pool on a thread of its own: the last share joins the workers, and we are
/// one of them.
fn release_elsewhere(pool: Arc<Pool>) {
    // Without a thread the share is leaked, which a process that cannot spawn threads survives
    // longer than a hang.
    let pool = ManuallyDrop::new(pool);
    let release = move || drop(ManuallyDrop::into_inner(pool));
    let _ = std::thread::Builder::new().name("ibex-release".into()).spawn(release);
}

impl From<PoolError> for GpuError {
    fn from(error: PoolError) -> Self {
        Self::Pool(error)
    }
}
