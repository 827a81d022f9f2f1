//! [`CudaGpu`]: the seam to a GPU over the CUDA driver.
//!
//! Who owns what: a [`CudaGpu`] and every handle and allocation it made share one [`Device`], which owns the context,
//! the loaded kernels and all memory. So whatever the order in which they are dropped, nothing outlives its context.
//!
//! Invariants:
//! - Memory that was dropped is given back when no stream of this GPU has work, because giving it back would wait for
//!   all of it, and kernels wait for peers.
//! - What can be recorded is decided by the same model as on the host (`Captures`), before the driver is asked: both
//!   machines refuse the same uses with the same errors.
//! - Kernels are loaded with the GPU. Left to their first launch, loading would wait for kernels that run.

use core::time::Duration;
use std::collections::BTreeMap;
use std::ffi::{OsString, c_void};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock, Weak};

use ibex_hca::bus::{self, Bus, BusId};
use parking_lot::{Mutex, MutexGuard};

use super::super::host::capture::{CapturedMark, Captures, Plan};
use super::super::host::queue::{FrozenLaunch, StreamIdx};
use super::super::pool::{self, PoolLaunch, kernel_name};
use super::super::{
    ARGS_LEN_MAX, CaptureError, DeviceMemory, Event, Gpu, GpuError, GpuField, GpuId, Graph, Launch, NicWay,
    NicWays, Reachable, Stream, WARPS_PER_BLOCK_MAX, image,
};
use super::calls::{CallError, RawDevice, RawHandle};
use super::context::{self, Context, Module, OwnedEvent, OwnedGraph, OwnedStream};
use super::copies::DeviceCopies;
use super::gate::Gate;
use super::memory::{Home, Memory};
use super::peer::{self, Exported, Imported};
use super::registered::Registered;
use super::{Attribute, CudaError, DRIVER_VERSION_MIN, DeviceInfo, Driver, LIBRARY_NAME};
use crate::time::{Stopwatch, sleep};

/// Ids of kernels lie below this (kernels/include/ibex/kernel_list.h).
const KERNEL_IDS_MAX: u32 = 64;
/// Threads of a warp.
const WARP: u32 = 32;
/// How often a wait for a condition looks again.
const WAIT_POLL: Duration = Duration::from_micros(50);
/// The oldest part that the image has code for.
const CAPABILITY_MAJOR_MIN: u32 = 8;

/// What NICs write is seen in its order by kernels of the GPU that it is written to.
///
/// SPEC: cuda.h `CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER`.
const WRITES_ORDERED_FOR_OWNER: u32 = 100;

/// Where [`Gpu::alloc`] puts what kernels and NICs share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CudaMemory {
    /// On the device. NICs reach it by dma-buf or nvidia-peermem, emulated devices by copies.
    #[default]
    Device,
    /// In host memory that kernels reach: what an emulated device works on best.
    HostMapped,
}

/// How other processes of this host map memory on the device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CudaSharing {
    /// By CUDA's IPC handles: what the driver gave is shared as a whole, also where it is more than one allocation.
    #[default]
    Ipc,
    /// By descriptors of pages of their own (CUDA's virtual memory management), which are rounded up to the driver's
    /// granularity, mostly 2 MiB. The importer must be allowed to take descriptors of the exporter (`pidfd_getfd`): the
    /// same user, and no Yama in the way.
    Descriptor,
}

/// How to make a [`CudaGpu`].
#[derive(Debug, Clone)]
pub struct CudaOptions {
    /// The driver's library, by name or path.
    pub library: OsString,
    /// The device, by what it is and not by its place in an order that varies; `None` takes the first.
    pub uuid: Option<[u8; 16]>,
    /// How many ranks of this process share the device: each may use this part of its multiprocessors.
    pub ranks_per_device: NonZeroU32,
    /// Where memory goes.
    pub memory: CudaMemory,
    /// How memory on the device is shared.
    pub sharing: CudaSharing,
    /// The kernels: a fat binary, alive and unchanged for ever.
    pub image: &'static [u8],
}

impl Default for CudaOptions {
    fn default() -> Self {
        Self {
            library: LIBRARY_NAME.into(),
            uuid: None,
            ranks_per_device: NonZeroU32::MIN,
            memory: CudaMemory::default(),
            sharing: CudaSharing::default(),
            image: image::bytes(),
        }
    }
}

/// Runs kernels on a GPU.
///
/// Several of one process may share a device. Then a launch cannot be cooperative, which would ask for the whole device
/// at once; its blocks are resident together because no rank launches more than its share of what fits. That rests on
/// one rule: a kernel takes at most `1 / n` of a multiprocessor per block, where `n` is how many blocks of the largest
/// kernel fit, so any mixture of as many blocks as all shares together fits.
pub struct CudaGpu {
    device: Arc<Device>,
}

/// What handles and allocations share. Fields drop in order: kernels and memory before their context.
struct Device {
    id: GpuId,
    memory: Memory,
    streams: Mutex<Streams>,
    /// By kernel id.
    functions: BTreeMap<u32, Function>,
    _module: Module,
    context: Arc<Context>,
    info: DeviceInfo,
    /// Every device of the driver.
    all: Vec<([u8; 16], RawDevice)>,
    home: Home,
    shares: u32,
    /// Where emulated devices find memory of this GPU.
    bus: OnceLock<BusId>,
}

/// Emulated devices reach memory of the GPU by the same copies as the host.
impl Bus for Device {
    fn read(&self, addr: u64, bytes: &mut [u8]) -> bool {
        self.memory.read(addr, bytes).is_ok()
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> bool {
        self.memory.write(addr, bytes).is_ok()
    }
}

/// A loaded kernel.
struct Function(RawHandle);

// SAFETY: the driver takes its handles from any thread; none is dereferenced here.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// Streams that may have work, and what is being captured.
struct Streams {
    captures: Captures,
    live: BTreeMap<StreamIdx, Running>,
    /// Dropped by their owners; kept until their work is done.
    closing: Vec<OwnedStream>,
    next: u32,
}

/// A stream, its handle kept alive by the [`CudaStream`] that registered it.
struct Running(RawHandle);

// SAFETY: as for `Function`.
unsafe impl Send for Running {}

/// What a [`Stream`] keeps.
struct CudaStream {
    device: Arc<Device>,
    idx: StreamIdx,
    handle: Result<StreamHandle, CallError>,
}

enum StreamHandle {
    Owned(OwnedStream),
    /// A caller's.
    Adopted(RawHandle),
}

// SAFETY: as for `Function`.
unsafe impl Send for StreamHandle {}
// SAFETY: as for `Function`.
unsafe impl Sync for StreamHandle {}

impl CudaStream {
    fn raw(&self) -> Result<RawHandle, GpuError> {
        match &self.handle {
            Ok(StreamHandle::Owned(stream)) => Ok(stream.raw),
            Ok(StreamHandle::Adopted(raw)) => Ok(*raw),
            Err(refused) => Err((*refused).into()),
        }
    }
}

/// What an [`Event`] keeps: itself, and what its last recording stands for.
struct CudaEvent {
    handle: Result<OwnedEvent, CallError>,
    mark: Mutex<Mark>,
}

#[derive(Clone)]
enum Mark {
    Never,
    Queued,
    Captured(CapturedMark),
}

/// What a [`Graph`] keeps.
struct CudaGraph {
    exec: OwnedGraph,
    plan: Plan,
    /// Its kernels.
    _device: Arc<Device>,
}

/// What a [`DeviceMemory`] keeps.
struct CudaBlock {
    device: Arc<Device>,
    addr: u64,
}

impl CudaGpu {
    /// Loads the driver, keeps the device's primary context, and loads the kernels.
    ///
    /// # Errors
    /// [`CudaError`]: no driver, or one that is too old; no such device, or one that is unfit; no kernels in this
    /// build, or none that fit. Nothing stays behind.
    pub fn open(options: &CudaOptions) -> Result<Self, CudaError> {
        let (driver, all) = Found::all(options)?;
        let found = Found::of(&driver, all, options.uuid, options.sharing)?;
        let context = Context::primary(driver.calls()?, found.device)?;
        Self::on(context, found, options)
    }

    /// The same in a context that the caller has, such as another library's; `options.uuid` is not looked at.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    ///
    /// # Safety
    /// `context` is a live `CUcontext` of the library that `options` names, and stays so until this GPU and everything
    /// that it made are gone.
    pub unsafe fn in_context(context: *mut c_void, options: &CudaOptions) -> Result<Self, CudaError> {
        let (driver, all) = Found::all(options)?;
        // SAFETY: the caller's contract.
        let context = unsafe { Context::lent(driver.calls()?, context) }?;
        let uuid = all.iter().find(|(_, device)| *device == context.device).map(|(info, _)| info.uuid);
        let found = Found::of(&driver, all, uuid, options.sharing)?;
        Self::on(context, found, options)
    }

    fn on(context: Arc<Context>, found: Found, options: &CudaOptions) -> Result<Self, CudaError> {
        let module = Module::load(&context, options.image)?;
        let mut functions = BTreeMap::new();
        for (id, name) in (0..KERNEL_IDS_MAX).filter_map(|id| Some((id, kernel_name(id)?))) {
            functions.insert(id, Function(module.function(&format!("ibex_{name}"))?));
        }
        let streams =
            Streams { captures: Captures::new(), live: BTreeMap::new(), closing: Vec::new(), next: 0 };
        let device = Device {
            id: GpuId::fresh(),
            memory: Memory::new(&context, options.sharing)?,
            streams: Mutex::new(streams),
            functions,
            _module: module,
            context,
            info: found.info,
            all: found.all,
            home: match options.memory {
                CudaMemory::Device => Home::Device,
                CudaMemory::HostMapped => Home::Host,
            },
            shares: options.ranks_per_device.get(),
            bus: OnceLock::new(),
        };
        Ok(Self { device: Arc::new(device) })
    }

    /// What the driver says of the device.
    pub fn info(&self) -> &DeviceInfo {
        &self.device.info
    }

    /// Uses a stream that the caller has; it is not destroyed here.
    ///
    /// # Safety
    /// `stream` is a live `CUstream` of this GPU's context, and stays so until the result and its clones are gone.
    pub unsafe fn adopt_stream(&self, stream: *mut c_void) -> Stream {
        self.new_stream(Ok(StreamHandle::Adopted(stream)))
    }

    /// The `CUstream` behind a stream, for other libraries; it lives as long as `stream` does.
    ///
    /// # Errors
    /// `ForeignHandle`, or why there is none.
    pub fn raw_stream(&self, stream: &Stream) -> Result<*mut c_void, GpuError> {
        stream.of::<CudaStream>(self.device.id)?.raw()
    }

    /// Runs `body` with the GPU's context as the thread's current one: what libraries ask for that take the device of
    /// whoever calls them, such as NCCL.
    ///
    /// # Errors
    /// The context cannot be entered.
    pub fn run_in_context<T>(&self, body: impl FnOnce() -> T) -> Result<T, GpuError> {
        let _entered = self.device.context.enter()?;
        Ok(body())
    }

    /// A descriptor by which a NIC reaches `len` bytes at `addr`, both multiples of a page.
    ///
    /// # Errors
    /// `NotAllocated`, or the driver's refusal: the device or its kernel module does not know dma-buf.
    pub fn dma_buf(&self, addr: u64, len: usize) -> Result<OwnedFd, GpuError> {
        self.device.memory.with_live(addr, len, |_| Ok(peer::dma_buf(&self.device.context, addr, len)?))
    }

    /// Plain copies on this device, to measure kernels against.
    pub fn copies(&self) -> DeviceCopies {
        DeviceCopies::new(Self { device: Arc::clone(&self.device) })
    }

    /// A gate before streams of this device, whichever [`CudaGpu`] of this process made them.
    ///
    /// # Errors
    /// The driver lets no stream wait for a word.
    pub fn gate(&self) -> Result<Gate, GpuError> {
        Gate::new(Self { device: Arc::clone(&self.device) })
    }

    /// Lets a stream wait for a word of pinned memory of any context.
    pub(super) fn queue_wait(&self, stream: &Stream, addr: u64, value: u32) -> Result<(), GpuError> {
        /// SPEC: cuda.h `CU_STREAM_WAIT_VALUE_GEQ`.
        const AT_LEAST: u32 = 0;
        let (_, raw) = self.stream_of(stream)?;
        let _entered = self.device.context.enter()?;
        // SAFETY: a live stream; the gate keeps the word until it has opened for the last time.
        Ok(unsafe { self.device.context.calls.stream_wait_value(raw, addr, value, AT_LEAST) }?)
    }

    /// Allocates on the device, wherever [`Gpu::alloc`] does.
    pub(crate) fn alloc_on_device(&self, len: usize) -> Result<DeviceMemory, GpuError> {
        self.device.alloc(Home::Device, len, 1)
    }

    /// Queues a copy of `len` bytes within device memory.
    pub(super) fn queue_copy(
        &self,
        stream: &Stream,
        to: &DeviceMemory,
        from: &DeviceMemory,
        len: usize,
    ) -> Result<(), GpuError> {
        for memory in [to, from] {
            self.device.memory.with_live(memory.addr(), len, |_| Ok(()))?;
        }
        let (_, raw) = self.stream_of(stream)?;
        let _entered = self.device.context.enter()?;
        // SAFETY: live ranges and a live stream; what is dropped while the copy is queued is kept until it is over.
        Ok(unsafe { self.device.context.calls.memcpy_dtod(to.addr(), from.addr(), len, raw) }?)
    }

    fn new_stream(&self, handle: Result<StreamHandle, CallError>) -> Stream {
        let mut streams = self.device.streams.lock();
        let idx = StreamIdx(streams.next);
        streams.next += 1;
        let stream = CudaStream { device: Arc::clone(&self.device), idx, handle };
        if let Ok(raw) = stream.raw() {
            streams.live.insert(idx, Running(raw));
        }
        Stream::new(self.device.id, Arc::new(stream))
    }

    fn stream_of<'a>(&self, stream: &'a Stream) -> Result<(&'a CudaStream, RawHandle), GpuError> {
        let stream = stream.of::<CudaStream>(self.device.id)?;
        Ok((stream, stream.raw()?))
    }

    fn event_of<'a>(&self, event: &'a Event) -> Result<(MutexGuard<'a, Mark>, RawHandle), GpuError> {
        let event = event.of::<CudaEvent>(self.device.id)?;
        let handle = event.handle.as_ref().map_err(|refused| *refused)?;
        Ok((event.mark.lock(), handle.raw))
    }

    fn freeze(&self, launch: &Launch<'_>) -> Result<FrozenLaunch, GpuError> {
        let Launch { kernel, args, blocks, warps_per_block } = *launch;
        check(GpuField::ArgsLen, args.len() as u64, ARGS_LEN_MAX as u64)?;
        check(GpuField::WarpsPerBlock, warps_per_block.into(), WARPS_PER_BLOCK_MAX.into())?;
        check(GpuField::Blocks, blocks.into(), self.device.blocks_max(warps_per_block)?.into())?;
        // The host has the same kernels with the same argument structs.
        pool::check_launch(&PoolLaunch {
            kernel: kernel as u32,
            device: 0,
            blocks: 1,
            warps_per_block,
            args,
        })?;
        Ok(FrozenLaunch { kernel, args: args.into(), blocks, warps_per_block })
    }

    /// Hands one launch to the driver.
    fn start(&self, stream: RawHandle, launch: &FrozenLaunch) -> Result<(), GpuError> {
        let Device { context, functions, shares, .. } = &*self.device;
        let function = functions.get(&(launch.kernel as u32)).expect("the model knows no other kernels").0;
        let (blocks, threads) = (launch.blocks, launch.warps_per_block * WARP);
        let mut params = [launch.args.as_ptr().cast_mut().cast::<c_void>()];
        let none = std::ptr::null_mut();
        let _entered = context.enter()?;
        // SAFETY: `Gpu::launch` had the caller vouch for the argument bytes, whose number `freeze` has checked; the
        // driver copies them now.
        Ok(unsafe {
            let params = params.as_mut_ptr();
            if *shares == 1 {
                context
                    .calls
                    .launch_cooperative_kernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, params)
            } else {
                context.calls.launch_kernel(function, blocks, 1, 1, threads, 1, 1, 0, stream, params, none)
            }
        }?)
    }
}

/// A device that fits.
struct Found {
    device: RawDevice,
    info: DeviceInfo,
    all: Vec<([u8; 16], RawDevice)>,
}

impl Found {
    /// Loads the driver, and asks it for every device.
    fn all(options: &CudaOptions) -> Result<(Driver, Vec<(DeviceInfo, RawDevice)>), CudaError> {
        let driver = Driver::load_from(&options.library)?;
        let found = driver.version()?;
        if found < DRIVER_VERSION_MIN {
            return Err(CudaError::TooOldDriver { found });
        }
        let all = driver.all_devices()?;
        if options.image.is_empty() {
            return Err(CudaError::NoImage);
        }
        Ok((driver, all))
    }

    /// The device that is wanted, if it can do what kernels rely on.
    fn of(
        driver: &Driver,
        all: Vec<(DeviceInfo, RawDevice)>,
        wanted: Option<[u8; 16]>,
        sharing: CudaSharing,
    ) -> Result<Self, CudaError> {
        let is_wanted = |(info, _): &&(DeviceInfo, RawDevice)| wanted.is_none_or(|uuid| uuid == info.uuid);
        let Some((info, device)) = all.iter().find(is_wanted).cloned() else {
            return Err(CudaError::NoDevice { wanted, found: all.len() });
        };
        let all = all.into_iter().map(|(info, device)| (info.uuid, device)).collect();
        let found = Self { device, info, all };
        found.check(driver, sharing)?;
        Ok(found)
    }

    /// What kernels, and who shares memory, rely on.
    fn check(&self, driver: &Driver, sharing: CudaSharing) -> Result<(), CudaError> {
        let unfit = |what, value, min| {
            if value >= min {
                return Ok(());
            }
            Err(CudaError::Unfit { device: self.info.name.clone(), what, value, min })
        };
        unfit("compute capability", self.info.capability.0, CAPABILITY_MAJOR_MIN)?;
        let of_descriptors = [
            ("virtual memory management", Attribute::VirtualMemoryManagement),
            ("memory by descriptors", Attribute::PosixDescriptors),
            ("rdma into virtual memory", Attribute::RdmaOfVirtualMemory),
        ];
        let of_sharing = of_descriptors.into_iter().filter(|_| sharing == CudaSharing::Descriptor);
        let of_kernels = [
            ("cooperative launches", Attribute::CooperativeLaunch),
            ("unified addressing", Attribute::UnifiedAddressing),
            ("mapped host memory", Attribute::CanMapHostMemory),
        ];
        for (what, attribute) in of_kernels.into_iter().chain(of_sharing) {
            unfit(what, driver.attribute(self.device, attribute)?, 1)?;
        }
        Ok(())
    }
}

fn check(field: GpuField, value: u64, max: u64) -> Result<(), GpuError> {
    if (1..=max).contains(&value) { Ok(()) } else { Err(GpuError::OutOfRange { field, value, min: 1, max }) }
}

impl Gpu for CudaGpu {
    fn alloc(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        self.device.alloc(self.device.home, len, align)
    }

    fn alloc_pinned(&self, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        self.device.alloc(Home::Host, len, align)
    }

    unsafe fn reach(&self, addr: u64, len: usize, what: Reachable) -> Result<DeviceMemory, GpuError> {
        // SAFETY: the caller's contract.
        let registered =
            unsafe { Registered::new(&self.device.context, addr, len, what == Reachable::Registers) }?;
        Ok(DeviceMemory::new(registered.seen_by_kernels(addr), len, Box::new(registered)))
    }

    fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.device.memory.write(addr, bytes)
    }

    fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.device.memory.read(addr, bytes)
    }

    fn fill(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        self.device.memory.fill(addr, byte, len)
    }

    fn load_u32(&self, addr: u64) -> Result<u32, GpuError> {
        self.device.memory.load_u32(addr)
    }

    fn store_u32(&self, addr: u64, value: u32) -> Result<(), GpuError> {
        self.device.memory.store_u32(addr, value)
    }

    fn load_u64(&self, addr: u64) -> Result<u64, GpuError> {
        self.device.memory.load_u64(addr)
    }

    fn store_u64(&self, addr: u64, value: u64) -> Result<(), GpuError> {
        self.device.memory.store_u64(addr, value)
    }

    fn stream(&self) -> Stream {
        self.new_stream(OwnedStream::new(&self.device.context).map(StreamHandle::Owned))
    }

    fn event(&self) -> Event {
        let handle = OwnedEvent::new(&self.device.context);
        Event::new(self.device.id, Arc::new(CudaEvent { handle, mark: Mutex::new(Mark::Never) }))
    }

    fn record(&self, event: &Event, stream: &Stream) -> Result<(), GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        let (mut mark, event) = self.event_of(event)?;
        let streams = self.device.streams.lock();
        let _entered = self.device.context.enter()?;
        // SAFETY: live handles.
        unsafe { self.device.context.calls.event_record(event, raw) }?;
        *mark = streams.captures.mark(stream.idx).map_or(Mark::Queued, Mark::Captured);
        Ok(())
    }

    fn wait(&self, event: &Event, stream: &Stream) -> Result<(), GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        let (mark, event) = self.event_of(event)?;
        let mut streams = self.device.streams.lock();
        match &*mark {
            Mark::Never => return Ok(()),
            Mark::Captured(mark) => streams.captures.wait(stream.idx, mark)?,
            Mark::Queued if streams.captures.is_capturing(stream.idx) => {
                return Err(CaptureError::ForeignEvent.into());
            }
            Mark::Queued => {}
        }
        let _entered = self.device.context.enter()?;
        // SAFETY: live handles.
        Ok(unsafe { self.device.context.calls.stream_wait_event(raw, event, 0) }?)
    }

    fn query(&self, event: &Event) -> Result<bool, GpuError> {
        let (mark, event) = self.event_of(event)?;
        match &*mark {
            Mark::Never => Ok(true),
            Mark::Captured(_) => Err(CaptureError::EventCaptured.into()),
            // SAFETY: a live handle.
            Mark::Queued => Ok(unsafe { self.device.context.calls.event_query(event) }?),
        }
    }

    fn elapsed_ns(&self, start: &Event, end: &Event) -> Result<u64, GpuError> {
        for event in [start, end] {
            let is_marked = !matches!(*self.event_of(event)?.0, Mark::Never);
            if !is_marked || !self.query(event)? {
                return Err(GpuError::EventPending);
            }
        }
        // One after the other: both may be the same event.
        let start = self.event_of(start)?.1;
        let end = self.event_of(end)?.1;
        let mut ms = 0.0;
        // SAFETY: a writable number, and live handles.
        unsafe { self.device.context.calls.event_elapsed_time(&mut ms, start, end) }?;
        // CAST: saturates; negative where the events were recorded in the other order.
        Ok((f64::from(ms) * 1e6) as u64)
    }

    unsafe fn launch(&self, stream: &Stream, launch: &Launch<'_>) -> Result<(), GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        let frozen = self.freeze(launch)?;
        let mut streams = self.device.streams.lock();
        self.start(raw, &frozen)?;
        if streams.captures.is_capturing(stream.idx) {
            streams.captures.push(stream.idx, frozen);
        }
        Ok(())
    }

    fn begin_capture(&self, stream: &Stream) -> Result<(), GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        let mut streams = self.device.streams.lock();
        if streams.captures.is_capturing(stream.idx) {
            return Err(CaptureError::AlreadyCapturing.into());
        }
        // SAFETY: a live stream of this context.
        unsafe { context::begin_capture(&self.device.context, raw) }?;
        Ok(streams.captures.begin(stream.idx)?)
    }

    fn end_capture(&self, stream: &Stream) -> Result<Graph, GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        let mut streams = self.device.streams.lock();
        let plan = streams.captures.end(stream.idx);
        if let Err(refused @ (CaptureError::NotCapturing | CaptureError::NotTheOrigin)) = plan {
            return Err(refused.into());
        }
        // SAFETY: a live stream of this context; its capture ends here also where the model refuses it.
        let recorded = unsafe { context::end_capture(&self.device.context, raw) };
        drop(streams);
        let plan = plan?;
        let exec = recorded?.instantiate()?;
        Ok(Graph::new(self.device.id, Arc::new(CudaGraph { exec, plan, _device: Arc::clone(&self.device) })))
    }

    fn is_capturing(&self, stream: &Stream) -> Result<bool, GpuError> {
        let (stream, _) = self.stream_of(stream)?;
        Ok(self.device.streams.lock().captures.is_capturing(stream.idx))
    }

    fn replay(&self, graph: &Graph, stream: &Stream) -> Result<(), GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        let graph = graph.of::<CudaGraph>(self.device.id)?;
        if self.device.streams.lock().captures.is_capturing(stream.idx) {
            return Err(CaptureError::NotWhileCapturing.into());
        }
        let _entered = self.device.context.enter()?;
        // SAFETY: live handles.
        Ok(unsafe { self.device.context.calls.graph_launch(graph.exec.raw, raw) }?)
    }

    fn synchronize(&self, stream: &Stream) -> Result<(), GpuError> {
        let (stream, raw) = self.stream_of(stream)?;
        if self.device.streams.lock().captures.is_capturing(stream.idx) {
            return Err(CaptureError::NotWhileCapturing.into());
        }
        {
            let _entered = self.device.context.enter()?;
            // SAFETY: a live handle.
            unsafe { self.device.context.calls.stream_synchronize(raw) }?;
        }
        self.device.settle();
        Ok(())
    }

    fn wait_for(&self, timeout: Duration, reached: &mut dyn FnMut() -> bool) -> Result<bool, GpuError> {
        let watch = Stopwatch::start();
        loop {
            if reached() {
                return Ok(true);
            }
            if watch.elapsed() >= timeout {
                return Ok(false);
            }
            sleep(WAIT_POLL);
        }
    }

    fn export(&self, addr: u64, len: usize) -> Result<Vec<u8>, GpuError> {
        self.device.memory.with_live(addr, len, |block| {
            let (by, offset) = block.share(addr)?;
            let uuid = self.device.info.uuid;
            Ok(Exported { uuid, offset, len: len as u64, by }.to_bytes())
        })
    }

    fn import(&self, handle: &[u8]) -> Result<DeviceMemory, GpuError> {
        let exported = Exported::from_bytes(handle)?;
        let no_access = GpuError::NoPeerAccess { uuid: exported.uuid };
        let Some((_, peer)) = self.device.all.iter().find(|(uuid, _)| *uuid == exported.uuid) else {
            return Err(no_access);
        };
        if !peer::can_reach(&self.device.context, *peer)? {
            return Err(no_access);
        }
        let (imported, addr) = Imported::open(&self.device.context, &exported)?;
        // CAST: a 64-bit host.
        let len = exported.len as usize;
        Ok(DeviceMemory::new(addr, len, Box::new(imported)))
    }

    fn nic_ways(&self, addr: u64, is_on_bus: bool) -> Result<NicWays, GpuError> {
        let device = &self.device;
        device.memory.with_live(addr, 1, |block| {
            if block.home() == Home::Host {
                return Ok(NicWays::host());
            }
            if !is_on_bus {
                return Ok(NicWays { ways: vec![NicWay::Copies(device.bus()?)], refused: Vec::new() });
            }
            let found = device.info.write_ordering;
            if found.is_none_or(|scope| scope < WRITES_ORDERED_FOR_OWNER) {
                return Err(GpuError::UnorderedWrites { device: device.info.name.clone(), found });
            }
            Ok(block.nic_ways())
        })
    }

    fn max_coresident_blocks(&self, warps_per_block: u32) -> u32 {
        if !(1..=WARPS_PER_BLOCK_MAX).contains(&warps_per_block) {
            return 0;
        }
        // A driver that does not answer lets nothing be launched, and a launch says why.
        self.device.blocks_max(warps_per_block).unwrap_or(0)
    }

    fn captured_args(&self, graph: &Graph) -> Result<Vec<Vec<u8>>, GpuError> {
        let plan = &graph.of::<CudaGraph>(self.device.id)?.plan;
        Ok(plan.nodes.iter().map(|node| node.launch.args.to_vec()).collect())
    }

    fn allocated_bytes(&self) -> u64 {
        self.device.memory.live_bytes()
    }

    fn captures(&self) -> u64 {
        self.device.streams.lock().captures.begun()
    }
}

impl Device {
    fn alloc(self: &Arc<Self>, home: Home, len: usize, align: usize) -> Result<DeviceMemory, GpuError> {
        self.settle();
        let addr = self.memory.alloc(home, len, align)?;
        Ok(DeviceMemory::new(addr, len, Box::new(CudaBlock { device: Arc::clone(self), addr })))
    }

    /// The bus that this memory is on.
    fn bus(self: &Arc<Self>) -> Result<BusId, GpuError> {
        if let Some(bus) = self.bus.get() {
            return Ok(*bus);
        }
        let weak: Weak<dyn Bus> = Arc::downgrade(&(Arc::clone(self) as Arc<dyn Bus>));
        let max = bus::BUSES_MAX as u64;
        let full = GpuError::OutOfRange { field: GpuField::Buses, value: max + 1, min: 1, max };
        let attached = bus::attach(weak).map_err(|_| full)?;
        // Whoever was first has it; a second one is good for nothing, and harmless.
        Ok(*self.bus.get_or_init(|| attached))
    }

    /// Blocks of any kernel that fit this rank's share of the device together.
    fn blocks_max(&self, warps_per_block: u32) -> Result<u32, CallError> {
        let _entered = self.context.enter()?;
        let mut least = u32::MAX;
        for function in self.functions.values() {
            let mut blocks = 0;
            // CAST: at most 1024. SAFETY: a writable integer, and a loaded kernel.
            unsafe {
                self.context.calls.occupancy(&mut blocks, function.0, (warps_per_block * WARP) as i32, 0)
            }?;
            least = least.min(blocks.unsigned_abs());
        }
        Ok(least * (self.info.sms / self.shares))
    }

    /// Gives back what was dropped while work was queued, if none is now.
    fn settle(&self) {
        let mut streams = self.streams.lock();
        let has_leavings = self.memory.has_retired() || !streams.closing.is_empty();
        // A stream that is captured must not be asked.
        if !has_leavings || streams.captures.is_any_open() {
            return;
        }
        let Ok(_entered) = self.context.enter() else { return };
        let raws = streams.live.values().map(|running| running.0);
        let all: Vec<RawHandle> = raws.chain(streams.closing.iter().map(|stream| stream.raw)).collect();
        // A stream that answers with an error has faulted, and runs nothing any more. SAFETY: live handles: whoever
        // drops one takes it out of the table first.
        let is_idle =
            all.into_iter().all(|raw| unsafe { self.context.calls.stream_query(raw) }.unwrap_or(true));
        if is_idle {
            let leavings = (self.memory.take_retired(), std::mem::take(&mut streams.closing));
            drop(streams);
            drop(leavings);
        }
    }
}

impl Drop for CudaStream {
    fn drop(&mut self) {
        let raw = self.raw();
        let mut streams = self.device.streams.lock();
        if streams.captures.is_capturing(self.idx)
            && let Ok(raw) = raw
        {
            // SAFETY: live until below. What was recorded is of no use to anybody; one that only joined is refused by
            // the driver, and ends with its origin.
            drop(unsafe { context::end_capture(&self.device.context, raw) });
        }
        streams.captures.abandon(self.idx);
        streams.live.remove(&self.idx);
        // Any error serves: nobody reads it.
        let gone = Err(CallError { call: "cuStreamDestroy_v2", code: 0 });
        if let Ok(StreamHandle::Owned(stream)) = std::mem::replace(&mut self.handle, gone) {
            streams.closing.push(stream);
        }
        drop(streams);
        self.device.settle();
    }
}

impl Drop for CudaBlock {
    fn drop(&mut self) {
        self.device.memory.retire(self.addr);
        self.device.settle();
    }
}
