//! A GPU made of the CPU: the same kernel source on fibers, the same streams, events and graphs.
//!
//! ```text
//!  launch ----> queues (one lock) ----> executor ----> fibers of the pool
//!                  ^                                       |
//!                  +---------- completion (any thread) <---+
//! ```
//!
//! Who owns what: a [`HostGpu`] and every handle and allocation it made share one device. A completion
//! that is still to come keeps the device alive too, so a kernel never outlives its memory.
//!
//! Invariants:
//! - The lock is never held while the executor is called, and never while a handle is dropped.
//! - A wait blocks on a condition variable, or, in simulation, drives the simulation; it never spins.
//! - Dropping a GPU forgets what is queued and waits at most ten seconds for what runs; kernels that go
//!   on after that keep their memory.

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ibex_hca::shared_memory;
use parking_lot::{Condvar, Mutex, MutexGuard};

use super::pool::Pool;
use super::{
    ARGS_LEN_MAX, CaptureError, DeviceMemory, Event, Gpu, GpuError, GpuField, GpuId, Graph, Launch,
    Reachable, Stream, WARPS_PER_BLOCK_MAX,
};
use crate::time::sleep;
use capture::{CapturedMark, Plan};
use executor::{Drive, Executor, PoolExecutor};
pub use memory::Backing;
use memory::{Allocations, Mapping};
use queue::{FrozenLaunch, Marker, Queues, Ready, StreamIdx, Token};

pub(super) mod capture;
mod executor;
mod memory;
#[cfg(test)]
mod order_tests;
pub(super) mod queue;
pub(super) mod raw;
#[cfg(test)]
mod tests;

/// Warps that are resident at once on one host GPU. Chosen: 32 blocks of the largest size, at 64 MiB of
/// fiber stacks.
pub const CORESIDENT_WARPS_MAX: u32 = 1024;

/// Longest wait of a drop for kernels that run; every kernel has a hard cap of its own. Short in
/// unit tests, where a kernel ends only when the test says so.
const DROP_WAIT: Duration = Duration::from_millis(if cfg!(test) { 50 } else { 10_000 });

/// How often a wait for a condition looks again.
const WAIT_POLL: Duration = Duration::from_micros(50);

/// Runs kernels on the CPU.
pub struct HostGpu {
    device: Arc<Device>,
    backing: Backing,
}

/// What handles, allocations and completions share.
struct Device {
    id: GpuId,
    executor: Arc<dyn Executor>,
    queues: Mutex<Queues>,
    /// Signalled when a launch has finished.
    finished: Condvar,
    allocations: Allocations,
    /// Whether other processes may map what is allocated here.
    is_shared: bool,
    /// The last wait ended because a simulation could not move.
    stuck: AtomicBool,
    /// Its kernels were ended from outside; none of them will ever report its end.
    is_dead: AtomicBool,
}

/// What a [`Stream`] keeps.
struct HostStream {
    device: Arc<Device>,
    stream: StreamIdx,
}

/// What an [`Event`] keeps: its last recording.
struct HostEvent {
    mark: Mutex<Mark>,
}

/// What a [`Graph`] keeps.
struct HostGraph {
    plan: Arc<Plan>,
}

#[derive(Clone)]
enum Mark {
    Never,
    Queued(Arc<Marker>),
    Captured(CapturedMark),
}

/// What a [`DeviceMemory`] keeps.
struct HostBlock {
    device: Arc<Device>,
    mapping: Option<Mapping>,
}

impl HostGpu {
    /// A GPU whose kernels run on `pool`, as its device number `device`.
    ///
    /// GPUs that share a pool share its threads: kernels of all of them are resident together and
    /// may wait for each other.
    pub fn new(pool: Arc<Pool>, device: u32) -> Self {
        Self::on(Arc::new(PoolExecutor::new(pool, device)), false)
    }

    /// As [`HostGpu::new`], with memory that other processes of this host and user may map.
    pub fn shared(pool: Arc<Pool>, device: u32) -> Self {
        Self::on(Arc::new(PoolExecutor::new(pool, device)), true)
    }

    fn on(executor: Arc<dyn Executor>, is_shared: bool) -> Self {
        let device = Device {
            id: GpuId::fresh(),
            executor,
            queues: Mutex::new(Queues::new()),
            finished: Condvar::new(),
            allocations: Allocations::default(),
            is_shared,
            stuck: AtomicBool::new(false),
            is_dead: AtomicBool::new(false),
        };
        Self { device: Arc::new(device), backing: Backing::default() }
    }

    /// The same GPU with another way of backing what is allocated from now on.
    #[must_use]
    pub fn with_backing(mut self, backing: Backing) -> Self {
        self.backing = backing;
        self
    }

    /// Simulation: ends this GPU as if its process had died. Kernels stop where they stand and what is queued is
    /// forgotten; its memory stays as it is until every handle is dropped, which waits for nothing.
    ///
    /// # Errors
    /// `Pool` on a pool that runs in real time.
    pub fn kill(&self) -> Result<(), GpuError> {
        self.device.executor.kill()?;
        self.device.is_dead.store(true, Ordering::Relaxed);
        self.device.queues.lock().cancel_queued(self.device.executor.now_ns());
        Ok(())
    }

    /// Simulation: stops this GPU's kernels where they stand, as SIGSTOP does, or lets them go on.
    ///
    /// # Errors
    /// As [`HostGpu::kill`].
    pub fn set_frozen(&self, frozen: bool) -> Result<(), GpuError> {
        self.device.executor.freeze(frozen)
    }

    /// Tests: lets the allocation or access of the host behind the next `skip` ones fail, as a driver's calls may; with
    /// `None` none does. Whether a failure was waiting.
    pub fn fail_access(&self, skip: Option<u32>) -> bool {
        self.device.allocations.fail_access(skip)
    }

    fn stream_idx(&self, stream: &Stream) -> Result<StreamIdx, GpuError> {
        Ok(stream.of::<HostStream>(self.device.id)?.stream)
    }

    fn event_mark<'a>(&self, event: &'a Event) -> Result<MutexGuard<'a, Mark>, GpuError> {
        Ok(event.of::<HostEvent>(self.device.id)?.mark.lock())
    }

    /// When the event's work had finished; none while it has not.
    fn done_ns(&self, event: &Event) -> Result<Option<u64>, GpuError> {
        match &*self.event_mark(event)? {
            Mark::Never => Ok(None),
            Mark::Queued(marker) => Ok(marker.done_ns()),
            Mark::Captured(_) => Err(CaptureError::EventCaptured.into()),
        }
    }

    fn freeze(&self, launch: &Launch<'_>) -> Result<FrozenLaunch, GpuError> {
        let Launch { kernel, args, blocks, warps_per_block } = *launch;
        check(GpuField::ArgsLen, args.len() as u64, ARGS_LEN_MAX as u64)?;
        check(GpuField::WarpsPerBlock, warps_per_block.into(), WARPS_PER_BLOCK_MAX.into())?;
        check(GpuField::Blocks, blocks.into(), self.max_coresident_blocks(warps_per_block).into())?;
        let frozen = FrozenLaunch { kernel, args: args.into(), blocks, warps_per_block };
        self.device.executor.check(&frozen)?;
        Ok(frozen)
    }
}

fn check(field: GpuField, value: u64, max: u64) -> Result<(), GpuError> {
    if (1..=max).contains(&value) { Ok(()) } else { Err(GpuError::OutOfRange { field, value, min: 1, max }) }
}

impl Gpu for HostGpu {
    fn alloc(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        self.device.allocations.strike()?;
        let map = if self.device.is_shared { Mapping::shared } else { Mapping::new };
        let mapping = map(len, align, self.backing)?;
        let addr = mapping.addr();
        self.device.allocations.insert(&mapping, len);
        let block = HostBlock { device: Arc::clone(&self.device), mapping: Some(mapping) };
        Ok(DeviceMemory::new(addr, len, Box::new(block)))
    }

    fn alloc_pinned(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        // Host memory is all there is, and nothing moves it.
        self.alloc(len, align)
    }

    #[expect(unsafe_code, reason = "the trait's contract about the life of a mapping")]
    unsafe fn reach(&self, addr: u64, len: usize, _: Reachable) -> Result<DeviceMemory, GpuError> {
        // Kernels run in this process and see what it sees.
        Ok(DeviceMemory::new(addr, len, Box::new(())))
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.device.allocations.write(addr, bytes)
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.device.allocations.read(addr, bytes)
    }

    fn fill(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        self.device.allocations.fill(addr, byte, len)
    }

    fn load_u32(&self, addr: u64) -> Result<u32, GpuError> {
        self.device.allocations.load_u32(addr)
    }

    fn store_u32(&self, addr: u64, value: u32) -> Result<(), GpuError> {
        self.device.allocations.store_u32(addr, value)
    }

    fn load_u64(&self, addr: u64) -> Result<u64, GpuError> {
        self.device.allocations.load_u64(addr)
    }

    fn store_u64(&self, addr: u64, value: u64) -> Result<(), GpuError> {
        self.device.allocations.store_u64(addr, value)
    }

    fn stream(&self) -> Stream {
        let stream = self.device.queues.lock().open();
        Stream::new(self.device.id, Arc::new(HostStream { device: Arc::clone(&self.device), stream }))
    }

    fn event(&self) -> Event {
        Event::new(self.device.id, Arc::new(HostEvent { mark: Mutex::new(Mark::Never) }))
    }

    fn record(&self, event: &Event, stream: &Stream) -> Result<(), GpuError> {
        let idx = self.stream_idx(stream)?;
        let mut mark = self.event_mark(event)?;
        self.device.change(|queues, now_ns| {
            *mark = match queues.captures.mark(idx) {
                Some(captured) => Mark::Captured(captured),
                None => Mark::Queued(queues.push_record(idx, now_ns)?),
            };
            Ok(())
        })
    }

    fn wait(&self, event: &Event, stream: &Stream) -> Result<(), GpuError> {
        let idx = self.stream_idx(stream)?;
        let mark = self.event_mark(event)?.clone();
        self.device.change(|queues, now_ns| match mark {
            Mark::Never => Ok(()),
            Mark::Captured(mark) => Ok(queues.captures.wait(idx, &mark)?),
            Mark::Queued(_) if queues.captures.is_capturing(idx) => Err(CaptureError::ForeignEvent.into()),
            Mark::Queued(marker) => queues.push_wait(idx, marker, now_ns),
        })
    }

    fn query(&self, event: &Event) -> Result<bool, GpuError> {
        let never_recorded = matches!(&*self.event_mark(event)?, Mark::Never);
        Ok(never_recorded || self.done_ns(event)?.is_some())
    }

    fn elapsed_ns(&self, start: &Event, end: &Event) -> Result<u64, GpuError> {
        let start = self.done_ns(start)?.ok_or(GpuError::EventPending)?;
        let end = self.done_ns(end)?.ok_or(GpuError::EventPending)?;
        Ok(end.saturating_sub(start))
    }

    #[expect(unsafe_code, reason = "the trait's contract about addresses in the arguments")]
    unsafe fn launch(&self, stream: &Stream, launch: &Launch<'_>) -> Result<(), GpuError> {
        let idx = self.stream_idx(stream)?;
        let frozen = self.freeze(launch)?;
        self.device.change(|queues, now_ns| queues.push_launch(idx, frozen, now_ns))
    }

    fn begin_capture(&self, stream: &Stream) -> Result<(), GpuError> {
        let idx = self.stream_idx(stream)?;
        Ok(self.device.queues.lock().captures.begin(idx)?)
    }

    fn end_capture(&self, stream: &Stream) -> Result<Graph, GpuError> {
        let idx = self.stream_idx(stream)?;
        let plan = self.device.queues.lock().captures.end(idx)?;
        Ok(Graph::new(self.device.id, Arc::new(HostGraph { plan: Arc::new(plan) })))
    }

    fn is_capturing(&self, stream: &Stream) -> Result<bool, GpuError> {
        let idx = self.stream_idx(stream)?;
        Ok(self.device.queues.lock().captures.is_capturing(idx))
    }

    fn replay(&self, graph: &Graph, stream: &Stream) -> Result<(), GpuError> {
        let idx = self.stream_idx(stream)?;
        let plan = &graph.of::<HostGraph>(self.device.id)?.plan;
        self.device.change(|queues, now_ns| {
            if queues.captures.is_capturing(idx) {
                return Err(CaptureError::NotWhileCapturing.into());
            }
            queues.push_graph(idx, plan, now_ns)
        })
    }

    fn synchronize(&self, stream: &Stream) -> Result<(), GpuError> {
        let idx = self.stream_idx(stream)?;
        if self.device.queues.lock().captures.is_capturing(idx) {
            return Err(CaptureError::NotWhileCapturing.into());
        }
        self.device.wait_until(|queues| queues.is_idle(idx))?;
        self.device.queues.lock().take_error(idx).map_or(Ok(()), Err)
    }

    fn wait_for(&self, timeout: Duration, reached: &mut dyn FnMut() -> bool) -> Result<bool, GpuError> {
        let executor = &self.device.executor;
        let timeout_ns = u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX);
        let limit_ns = executor.now_ns().saturating_add(timeout_ns);
        let mut held = false;
        let mut is_over = || {
            held = reached();
            held || executor.now_ns() >= limit_ns
        };
        if executor.drive(&mut is_over)? == Drive::Elsewhere {
            while !is_over() {
                sleep(WAIT_POLL);
            }
        }
        Ok(held)
    }

    fn export(&self, addr: u64, len: usize) -> Result<Vec<u8>, GpuError> {
        shared_memory::export(addr, len as u64).map_err(memory::refused)
    }

    fn import(&self, handle: &[u8]) -> Result<DeviceMemory, GpuError> {
        let (mapping, len) = Mapping::of_peer(handle)?;
        let addr = mapping.addr();
        let block = HostBlock { device: Arc::clone(&self.device), mapping: Some(mapping) };
        Ok(DeviceMemory::new(addr, len, Box::new(block)))
    }

    fn max_coresident_blocks(&self, warps_per_block: u32) -> u32 {
        CORESIDENT_WARPS_MAX.checked_div(warps_per_block).unwrap_or(0)
    }

    fn captured_args(&self, graph: &Graph) -> Result<Vec<Vec<u8>>, GpuError> {
        let plan = &graph.of::<HostGraph>(self.device.id)?.plan;
        Ok(plan.nodes.iter().map(|node| node.launch.args.to_vec()).collect())
    }

    fn allocated_bytes(&self) -> u64 {
        self.device.allocations.live_bytes()
    }

    fn captures(&self) -> u64 {
        self.device.queues.lock().captures.begun()
    }
}

impl Device {
    /// Changes the queues and starts what became ready.
    fn change<T>(
        self: &Arc<Self>,
        change: impl FnOnce(&mut Queues, u64) -> Result<T, GpuError>,
    ) -> Result<T, GpuError> {
        let now_ns = self.executor.now_ns();
        let (result, ready) = {
            let mut queues = self.queues.lock();
            let result = change(&mut queues, now_ns);
            (result, queues.take_ready())
        };
        self.start(ready);
        result
    }

    fn start(self: &Arc<Self>, mut ready: Vec<Ready>) {
        while !ready.is_empty() {
            let mut more = Vec::new();
            for Ready { token, launch } in ready {
                let device = Arc::clone(self);
                let done = Box::new(move || device.complete(token));
                if let Err(error) = self.executor.start(&launch, done) {
                    more.extend(self.settle(|queues, now_ns| queues.failed(token, error, now_ns)));
                }
            }
            ready = more;
        }
    }

    fn complete(self: &Arc<Self>, token: Token) {
        let ready = self.settle(|queues, now_ns| queues.finished(token, now_ns));
        self.start(ready);
    }

    /// Takes note of the end of a launch; answers with what became ready.
    fn settle(&self, end: impl FnOnce(&mut Queues, u64)) -> Vec<Ready> {
        let now_ns = self.executor.now_ns();
        let (ready, unused) = {
            let mut queues = self.queues.lock();
            end(&mut queues, now_ns);
            (queues.take_ready(), self.take_unused(&queues))
        };
        drop(unused);
        self.finished.notify_all();
        ready
    }

    /// Memory that was dropped and that no queued work can name any more; unmap it without the lock.
    ///
    /// Holding the lock proves it: work that names the memory was queued before the memory was dropped, and
    /// nothing is queued now.
    fn take_unused(&self, queues: &Queues) -> Vec<Mapping> {
        if queues.all_idle() { self.allocations.take_retired() } else { Vec::new() }
    }

    fn wait_until(&self, reached: impl Fn(&Queues) -> bool) -> Result<(), GpuError> {
        let driven = self.executor.drive(&mut || reached(&self.queues.lock()));
        self.stuck.store(driven.is_err(), Ordering::Relaxed);
        if driven? == Drive::Elsewhere {
            let mut queues = self.queues.lock();
            self.finished.wait_while(&mut queues, |queues| !reached(queues));
        }
        Ok(())
    }

    /// Forgets queued work and gives running kernels time to end.
    fn shut_down(self: &Arc<Self>) {
        self.queues.lock().cancel_queued(self.executor.now_ns());
        // A simulation that is stuck has said so already; its kernels stay where they stand.
        if self.stuck.load(Ordering::Relaxed)
            || self.is_dead.load(Ordering::Relaxed)
            || std::thread::panicking()
            || self.queues.lock().num_running() == 0
        {
            return;
        }
        let driven = self.executor.drive(&mut || self.queues.lock().num_running() == 0);
        if driven == Ok(Drive::Elsewhere) {
            let mut queues = self.queues.lock();
            self.finished.wait_while_for(&mut queues, |queues| queues.num_running() > 0, DROP_WAIT);
        }
    }
}

impl Drop for HostGpu {
    fn drop(&mut self) {
        self.device.shut_down();
    }
}

impl Drop for HostStream {
    fn drop(&mut self) {
        self.device.queues.lock().close(self.stream);
    }
}

impl Drop for HostBlock {
    fn drop(&mut self) {
        if let Some(mapping) = self.mapping.take() {
            self.device.allocations.retire(mapping);
        }
        let unused = self.device.take_unused(&self.device.queues.lock());
        drop(unused);
    }
}
