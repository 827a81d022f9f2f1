//! The calls of the driver that a [`CudaGpu`](super::CudaGpu) makes: one method each, with a typed refusal.
//!
//! A [`Calls`] owns the handle of the driver's library, so a function pointer never outlives its code. It holds no
//! state of its own: what a call creates, its caller releases.
//!
//! INVARIANT: numbers that the driver answers stay plain integers. A driver newer than this table may answer with
//! one that no list has.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::Arc;

use libloading::Library;

use super::vmm::{AccessDesc, AllocationProp};

/// A device by its ordinal, as `cuDeviceGet` gives it.
pub(super) type RawDevice = c_int;
/// `CUcontext`, `CUmodule`, `CUfunction`, `CUstream`, `CUevent`, `CUgraph`, `CUgraphExec`: pointers to nothing of ours.
pub(super) type RawHandle = *mut c_void;

/// `CUipcMemHandle`: 64 bytes that mean something to the driver only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(super) struct IpcHandle(pub(super) [u8; Self::LEN]);

impl IpcHandle {
    /// SPEC: cuda.h `CU_IPC_HANDLE_SIZE`.
    pub(super) const LEN: usize = 64;
}

/// A call of the driver that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{call} failed with CUDA error {code}{}", super::meaning(*.code))]
pub struct CallError {
    /// Name of the function.
    pub call: &'static str,
    /// The driver's error number.
    ///
    /// SPEC: cuda.h `CUresult`.
    pub code: i32,
}

/// What asked-for work answers while it runs (`CUDA_ERROR_NOT_READY`): no failure.
pub(super) const NOT_READY: c_int = 600;

/// Turns the driver's answer into a result.
pub(super) const fn check(call: &'static str, code: c_int) -> Result<(), CallError> {
    match code {
        0 => Ok(()),
        code => Err(CallError { call, code }),
    }
}

/// Declares the table: a field per function, found by name, and a checked method of the same name.
macro_rules! calls {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal ($($arg:ident: $type:ty),*);)*) => {
        #[derive(Debug, Clone, Copy)]
        struct Functions {
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
        }

        impl Functions {
            fn of(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: the signature is the one that cuda.h declares for this symbol, and the driver
                        // keeps it for ever: a changed one gets another suffix.
                        $name: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?,
                    )*
                })
            }
        }

        impl Calls {
            $(
                $(#[$doc])*
                ///
                /// # Safety
                /// What cuda.h asks of this call: live handles, and memory of the sizes that it reads or fills.
                #[allow(clippy::too_many_arguments, reason = "the driver's own parameter lists; most are short")]
                pub(super) unsafe fn $name(&self $(, $arg: $type)*) -> Result<(), CallError> {
                    // SAFETY: the caller's contract.
                    check($symbol, unsafe { (self.functions.$name)($($arg),*) })
                }
            )*
        }
    };
}

calls! {
    /// Keeps the device's primary context, which all libraries of a process share.
    primary_ctx_retain = "cuDevicePrimaryCtxRetain" (ctx: *mut RawHandle, device: RawDevice);
    /// Lets go of it.
    primary_ctx_release = "cuDevicePrimaryCtxRelease_v2" (device: RawDevice);
    /// Makes a context this thread's current one, above the one it had.
    ctx_push = "cuCtxPushCurrent_v2" (ctx: RawHandle);
    /// Gives the thread its earlier context back.
    ctx_pop = "cuCtxPopCurrent_v2" (ctx: *mut RawHandle);
    /// Which device the current context is on.
    ctx_get_device = "cuCtxGetDevice" (device: *mut RawDevice);
    /// Loads the part of a fat binary that fits the current device.
    module_load_data = "cuModuleLoadData" (module: *mut RawHandle, image: *const c_void);
    /// Unloads it.
    module_unload = "cuModuleUnload" (module: RawHandle);
    /// Finds a kernel by name.
    module_get_function = "cuModuleGetFunction"
        (function: *mut RawHandle, module: RawHandle, name: *const c_char);
    /// What the compiler knows of a kernel; asking also makes the driver load it.
    func_get_attribute = "cuFuncGetAttribute" (value: *mut c_int, attribute: c_int, function: RawHandle);
    /// Blocks of one kernel that fit one multiprocessor together.
    occupancy = "cuOccupancyMaxActiveBlocksPerMultiprocessor"
        (blocks: *mut c_int, function: RawHandle, threads: c_int, shared_bytes: usize);
    /// Device memory.
    mem_alloc = "cuMemAlloc_v2" (addr: *mut u64, len: usize);
    /// Gives device memory back; waits for everything that runs.
    mem_free = "cuMemFree_v2" (addr: u64);
    /// Host memory that never moves and that kernels reach.
    mem_host_alloc = "cuMemHostAlloc" (addr: *mut *mut c_void, len: usize, flags: c_uint);
    /// Gives it back.
    mem_free_host = "cuMemFreeHost" (addr: *mut c_void);
    /// Lets kernels reach memory that somebody else mapped into this process.
    mem_host_register = "cuMemHostRegister_v2" (addr: *mut c_void, len: usize, flags: c_uint);
    /// Takes that back.
    mem_host_unregister = "cuMemHostUnregister" (addr: *mut c_void);
    /// Where kernels see registered host memory.
    mem_host_get_device_pointer = "cuMemHostGetDevicePointer_v2"
        (device: *mut u64, host: *mut c_void, flags: c_uint);
    /// Where an allocation begins, and its length.
    mem_get_address_range = "cuMemGetAddressRange_v2" (base: *mut u64, len: *mut usize, addr: u64);
    /// Queues a copy to the device.
    memcpy_htod = "cuMemcpyHtoDAsync_v2" (to: u64, from: *const c_void, len: usize, stream: RawHandle);
    /// Queues a copy to the host.
    memcpy_dtoh = "cuMemcpyDtoHAsync_v2" (to: *mut c_void, from: u64, len: usize, stream: RawHandle);
    /// Queues a copy within device memory.
    memcpy_dtod = "cuMemcpyDtoDAsync_v2" (to: u64, from: u64, len: usize, stream: RawHandle);
    /// Queues a fill.
    memset_d8 = "cuMemsetD8Async" (addr: u64, byte: u8, len: usize, stream: RawHandle);
    /// A descriptor behind which a NIC reaches device memory.
    mem_get_handle_for_range = "cuMemGetHandleForAddressRange"
        (handle: *mut c_void, addr: u64, len: usize, kind: c_int, flags: c_ulonglong);
    /// What sizes of pages must be multiples of.
    mem_granularity = "cuMemGetAllocationGranularity"
        (granularity: *mut usize, prop: *const AllocationProp, option: c_int);
    /// Pages on a device, without an address.
    mem_create = "cuMemCreate" (handle: *mut u64, size: usize, prop: *const AllocationProp, flags: c_ulonglong);
    /// Gives them back, once nothing has them mapped.
    mem_release = "cuMemRelease" (handle: u64);
    /// Addresses, without pages.
    mem_address_reserve = "cuMemAddressReserve"
        (addr: *mut u64, size: usize, align: usize, wanted: u64, flags: c_ulonglong);
    /// Gives them back.
    mem_address_free = "cuMemAddressFree" (addr: u64, size: usize);
    /// Puts pages behind addresses.
    mem_map = "cuMemMap" (addr: u64, size: usize, offset: usize, handle: u64, flags: c_ulonglong);
    /// Takes them away.
    mem_unmap = "cuMemUnmap" (addr: u64, size: usize);
    /// Lets devices use them.
    mem_set_access = "cuMemSetAccess" (addr: u64, size: usize, access: *const AccessDesc, count: usize);
    /// A descriptor by which another process maps pages.
    mem_export = "cuMemExportToShareableHandle"
        (descriptor: *mut c_void, handle: u64, kind: c_int, flags: c_ulonglong);
    /// Pages that another process has exported.
    mem_import = "cuMemImportFromShareableHandle" (handle: *mut u64, descriptor: *mut c_void, kind: c_int);
    /// A handle by which another process maps an allocation.
    ipc_get_mem_handle = "cuIpcGetMemHandle" (handle: *mut IpcHandle, addr: u64);
    /// Maps another process's allocation.
    ipc_open_mem_handle = "cuIpcOpenMemHandle_v2" (addr: *mut u64, handle: IpcHandle, flags: c_uint);
    /// Unmaps it.
    ipc_close_mem_handle = "cuIpcCloseMemHandle" (addr: u64);
    /// Whether one device reaches another's memory.
    device_can_access_peer = "cuDeviceCanAccessPeer" (can: *mut c_int, device: RawDevice, peer: RawDevice);
    /// A stream.
    stream_create = "cuStreamCreate" (stream: *mut RawHandle, flags: c_uint);
    /// Ends a stream once its work is done, without waiting.
    stream_destroy = "cuStreamDestroy_v2" (stream: RawHandle);
    /// Waits for a stream's work.
    stream_synchronize = "cuStreamSynchronize" (stream: RawHandle);
    /// Lets a stream wait for an event.
    stream_wait_event = "cuStreamWaitEvent" (stream: RawHandle, event: RawHandle, flags: c_uint);
    /// Lets a stream wait until a word is a number, or up to 2^31 beyond.
    stream_wait_value = "cuStreamWaitValue32_v2" (stream: RawHandle, addr: u64, value: u32, flags: c_uint);
    /// Starts a capture.
    stream_begin_capture = "cuStreamBeginCapture_v2" (stream: RawHandle, mode: c_int);
    /// Ends it.
    stream_end_capture = "cuStreamEndCapture" (stream: RawHandle, graph: *mut RawHandle);
    /// An event.
    event_create = "cuEventCreate" (event: *mut RawHandle, flags: c_uint);
    /// Gives it back.
    event_destroy = "cuEventDestroy_v2" (event: RawHandle);
    /// Marks what a stream holds.
    event_record = "cuEventRecord" (event: RawHandle, stream: RawHandle);
    /// Milliseconds between two events.
    event_elapsed_time = "cuEventElapsedTime" (ms: *mut f32, start: RawHandle, end: RawHandle);
    /// Makes a captured graph one that can be launched.
    graph_instantiate = "cuGraphInstantiateWithFlags"
        (exec: *mut RawHandle, graph: RawHandle, flags: c_ulonglong);
    /// Launches it.
    graph_launch = "cuGraphLaunch" (exec: RawHandle, stream: RawHandle);
    /// Gives it back.
    graph_exec_destroy = "cuGraphExecDestroy" (exec: RawHandle);
    /// Gives the captured graph back.
    graph_destroy = "cuGraphDestroy" (graph: RawHandle);
    /// Launches a kernel.
    launch_kernel = "cuLaunchKernel"
        (function: RawHandle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
         block_z: c_uint, shared_bytes: c_uint, stream: RawHandle, params: *mut *mut c_void,
         extra: *mut *mut c_void);
    /// Launches a kernel whose blocks are all resident at once.
    launch_cooperative_kernel = "cuLaunchCooperativeKernel"
        (function: RawHandle, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint,
         block_z: c_uint, shared_bytes: c_uint, stream: RawHandle, params: *mut *mut c_void);
}

/// Calls whose answer may be "not yet", which is no failure.
macro_rules! questions {
    ($($(#[$doc:meta])* $name:ident = $symbol:literal;)*) => {
        #[derive(Debug, Clone, Copy)]
        struct Questions {
            $($name: unsafe extern "C" fn(RawHandle) -> c_int,)*
        }

        impl Questions {
            fn of(library: &Library) -> Result<Self, libloading::Error> {
                // SAFETY: as in `Functions::of`.
                Ok(Self { $($name: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?,)* })
            }
        }

        impl Calls {
            $(
                $(#[$doc])*
                ///
                /// # Safety
                /// A live handle of the right kind.
                pub(super) unsafe fn $name(&self, handle: RawHandle) -> Result<bool, CallError> {
                    // SAFETY: the caller's contract.
                    match unsafe { (self.questions.$name)(handle) } {
                        NOT_READY => Ok(false),
                        code => check($symbol, code).map(|()| true),
                    }
                }
            )*
        }
    };
}

questions! {
    /// Whether a stream's work is done.
    stream_query = "cuStreamQuery";
    /// Whether an event's work is done.
    event_query = "cuEventQuery";
}

/// The table, with the library that it points into.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    functions: Functions,
    questions: Questions,
    _library: Arc<Library>,
}

impl Calls {
    /// Looks every call up.
    pub(super) fn of(library: &Arc<Library>) -> Result<Self, libloading::Error> {
        Ok(Self {
            functions: Functions::of(library)?,
            questions: Questions::of(library)?,
            _library: Arc::clone(library),
        })
    }
}
