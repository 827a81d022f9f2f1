//! Builds and drives the double of the CUDA driver (`driver.cpp`).
//!
//! Each [`Double`] is a library of its own with state of its own, so tests run side by side. With
//! [`Double::run_kernels`] what is launched on it runs on the CPU, by a [`HostGpu`].

#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::fs;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};

use ibex::gpu::pool::{kernel_args_len, kernel_name};
use ibex::gpu::{CudaMemory, CudaOptions, Event, Gpu, Graph, HostGpu, KernelId, Launch, Stream, image};
use libloading::Library;

/// What kernels are loaded from; the double looks at no byte of it.
pub(crate) const IMAGE: &[u8] = b"the double reads no images";

/// Compiles the double; one that lacks a call that newer drivers have, if `lacks_a_call`.
fn build(lacks_a_call: bool) -> PathBuf {
    let name = if lacks_a_call { "libcuda-old.so" } else { "libcuda-double.so" };
    let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-{name}", std::process::id()));
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cuda/driver.cpp");
    let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()));
    command.args(["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]);
    command.arg(&built).arg(source);
    if lacks_a_call {
        command.arg("-DIBEX_DOUBLE_IS_OLD");
    }
    // NVIDIA's header lies beside its compiler: then it judges the signatures.
    if let Some(nvcc) = image::note().strip_prefix("built by ") {
        command.arg("-isystem").arg(Path::new(nvcc).with_file_name("../include"));
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    built
}

fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| build(false))
}

/// `Hooks` of driver.cpp.
#[repr(C)]
struct Hooks {
    ctx: *mut c_void,
    launch: extern "C" fn(*mut c_void, u64, *const c_char, *const c_void, u32, u32) -> c_int,
    record: extern "C" fn(*mut c_void, u64, u64) -> c_int,
    wait: extern "C" fn(*mut c_void, u64, u64) -> c_int,
    begin_capture: extern "C" fn(*mut c_void, u64) -> c_int,
    end_capture: extern "C" fn(*mut c_void, u64, u64) -> c_int,
    replay: extern "C" fn(*mut c_void, u64, u64) -> c_int,
    synchronize: extern "C" fn(*mut c_void, u64) -> c_int,
    is_idle: extern "C" fn(*mut c_void, u64) -> c_int,
    is_done: extern "C" fn(*mut c_void, u64) -> c_int,
}

/// Runs what the double is told on the CPU.
struct Runner {
    gpu: HostGpu,
    streams: Mutex<HashMap<u64, Stream>>,
    events: Mutex<HashMap<u64, Event>>,
    graphs: Mutex<HashMap<u64, Graph>>,
}

impl Runner {
    fn stream(&self, id: u64) -> Stream {
        self.streams.lock().unwrap().entry(id).or_insert_with(|| self.gpu.stream()).clone()
    }

    fn event(&self, id: u64) -> Event {
        self.events.lock().unwrap().entry(id).or_insert_with(|| self.gpu.event()).clone()
    }
}

/// A library of its own, and where it lies.
pub(crate) struct Double {
    library: Library,
    path: PathBuf,
    _runner: Option<Box<Runner>>,
}

impl Double {
    /// A machine with two devices and a recent driver.
    pub(crate) fn new(name: &str) -> Self {
        Self::of(built(), name)
    }

    /// Its driver lacks a function.
    pub(crate) fn old(name: &str) -> Self {
        Self::of(&build(true), name)
    }

    fn of(built: &Path, name: &str) -> Self {
        // Never the same file twice: a library that was unloaded may still be there, with its state.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = built.with_file_name(format!("{}-{number}-{name}.so", std::process::id()));
        fs::copy(built, &path).unwrap();
        // SAFETY: the library was built from our own source and has no constructors of note.
        let library = unsafe { Library::new(&path) }.unwrap();
        Self { library, path, _runner: None }
    }

    /// Opens a GPU of this machine with memory at `memory`, shared by `ranks`.
    pub(crate) fn options(&self, memory: CudaMemory, ranks: u32) -> CudaOptions {
        CudaOptions {
            library: self.path.clone().into_os_string(),
            ranks_per_device: NonZeroU32::new(ranks).unwrap(),
            memory,
            image: IMAGE,
            ..CudaOptions::default()
        }
    }

    /// From now on launches run on `gpu`.
    pub(crate) fn run_kernels(mut self, gpu: HostGpu) -> Self {
        let mut runner = Box::new(Runner {
            gpu,
            streams: Mutex::default(),
            events: Mutex::default(),
            graphs: Mutex::default(),
        });
        let hooks = Hooks {
            ctx: (&raw mut *runner).cast(),
            launch,
            record,
            wait,
            begin_capture,
            end_capture,
            replay,
            synchronize,
            is_idle,
            is_done,
        };
        // SAFETY: the signature of driver.cpp; the hooks are copied, and the runner lives as long as the library.
        unsafe { self.call::<unsafe extern "C" fn(*const Hooks)>("ibex_double_hook")(&hooks) };
        self._runner = Some(runner);
        self
    }

    fn call<T: Copy>(&self, name: &str) -> T {
        // SAFETY: every caller names a function of driver.cpp with its signature.
        *unsafe { self.library.get::<T>(name.as_bytes()) }.unwrap()
    }

    fn ask(&self, name: &str) -> u64 {
        // SAFETY: every caller names a function that takes nothing and gives a number.
        unsafe { self.call::<unsafe extern "C" fn() -> u64>(name)() }
    }

    /// Another machine: version of the driver, devices, their capability, an attribute that they lack.
    pub(crate) fn machine(&self, version: c_int, devices: c_int, capability: c_int, off: c_int) {
        type Set = unsafe extern "C" fn(c_int, c_int, c_int, c_int);
        // SAFETY: the signature of driver.cpp.
        unsafe { self.call::<Set>("ibex_double_machine")(version, devices, capability, off) }
    }

    /// The `nth` call from now on fails, from 1; 0: none.
    pub(crate) fn fail(&self, nth: u64, code: c_int) {
        // SAFETY: the signature of driver.cpp.
        unsafe { self.call::<unsafe extern "C" fn(u64, c_int)>("ibex_double_fail")(nth, code) }
    }

    /// Whether the call that was to fail has been made.
    pub(crate) fn has_failed(&self) -> bool {
        // SAFETY: the signature of driver.cpp.
        unsafe { self.call::<unsafe extern "C" fn() -> c_int>("ibex_double_has_failed")() != 0 }
    }

    /// Streams and events have, or have no, work that is not done.
    pub(crate) fn set_busy(&self, busy: bool) {
        // SAFETY: the signature of driver.cpp.
        unsafe { self.call::<unsafe extern "C" fn(c_int)>("ibex_double_busy")(busy.into()) }
    }

    /// Registers of devices are, or are not, mapped into GPUs.
    pub(crate) fn refuse_registers(&self, refuse: bool) {
        // SAFETY: the signature of driver.cpp.
        unsafe { self.call::<unsafe extern "C" fn(c_int)>("ibex_double_refuse_io")(refuse.into()) }
    }

    /// Objects that were created and not released.
    pub(crate) fn live(&self) -> u64 {
        self.ask("ibex_double_live")
    }

    /// Streams that wait for a word.
    pub(crate) fn held(&self) -> u64 {
        self.ask("ibex_double_held")
    }

    /// Kernels launched, outside graphs and within; and how many of them cooperatively.
    pub(crate) fn launches(&self) -> (u64, u64) {
        (self.ask("ibex_double_launches"), self.ask("ibex_double_cooperative"))
    }

    /// Names of all calls made so far.
    pub(crate) fn calls(&self) -> Vec<String> {
        let call: unsafe extern "C" fn(u64) -> *const c_char = self.call("ibex_double_call");
        // SAFETY: the index is below their number, and the text stays until the next call.
        let name = |at| unsafe { CStr::from_ptr(call(at)) }.to_string_lossy().into_owned();
        (0..self.ask("ibex_double_calls")).map(name).collect()
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn runner<'a>(ctx: *mut c_void) -> &'a Runner {
    // SAFETY: the runner that `run_kernels` boxed; it outlives the library.
    unsafe { &*ctx.cast::<Runner>() }
}

/// What a failed call of the runner is to the double: a kernel that failed to launch.
fn code(result: Result<(), ibex::gpu::GpuError>) -> c_int {
    match result {
        Ok(()) => 0,
        Err(error) => {
            eprintln!("the double's runner: {error}");
            719
        }
    }
}

extern "C" fn launch(
    ctx: *mut c_void,
    stream: u64,
    name: *const c_char,
    args: *const c_void,
    blocks: u32,
    threads: u32,
) -> c_int {
    // SAFETY: the name that `cuModuleGetFunction` was asked for.
    let name = unsafe { CStr::from_ptr(name) }.to_str().unwrap();
    let id =
        (0..64).find(|id| kernel_name(*id).is_some_and(|known| name == format!("ibex_{known}"))).unwrap();
    let kernels = [
        KernelId::DispatchBf16,
        KernelId::CombineExact,
        KernelId::Post,
        KernelId::Expert,
        KernelId::Selftest,
        KernelId::SelftestPair,
        KernelId::SelftestEmpty,
        KernelId::DispatchFp8,
        KernelId::CombineReduced,
        KernelId::GroupDispatchBf16,
        KernelId::GroupDispatchFp8,
        KernelId::GroupCombineExact,
        KernelId::GroupCombineReduced,
        KernelId::GroupExpert,
    ];
    let kernel = *kernels.iter().find(|kernel| **kernel as u32 == id).unwrap();
    // SAFETY: `CudaGpu` has checked that the argument struct has this length.
    let args = unsafe { std::slice::from_raw_parts(args.cast::<u8>(), kernel_args_len(id).unwrap()) };
    let runner = runner(ctx);
    let launch = Launch { kernel, args, blocks, warps_per_block: threads / 32 };
    // SAFETY: whoever launched on the double's GPU vouched for the addresses.
    code(unsafe { runner.gpu.launch(&runner.stream(stream), &launch) })
}

extern "C" fn record(ctx: *mut c_void, event: u64, stream: u64) -> c_int {
    let runner = runner(ctx);
    code(runner.gpu.record(&runner.event(event), &runner.stream(stream)))
}

extern "C" fn wait(ctx: *mut c_void, event: u64, stream: u64) -> c_int {
    let runner = runner(ctx);
    code(runner.gpu.wait(&runner.event(event), &runner.stream(stream)))
}

extern "C" fn begin_capture(ctx: *mut c_void, stream: u64) -> c_int {
    let runner = runner(ctx);
    code(runner.gpu.begin_capture(&runner.stream(stream)))
}

extern "C" fn end_capture(ctx: *mut c_void, stream: u64, graph: u64) -> c_int {
    let runner = runner(ctx);
    code(runner.gpu.end_capture(&runner.stream(stream)).map(|captured| {
        runner.graphs.lock().unwrap().insert(graph, captured);
    }))
}

extern "C" fn replay(ctx: *mut c_void, graph: u64, stream: u64) -> c_int {
    let runner = runner(ctx);
    let graph = runner.graphs.lock().unwrap()[&graph].clone();
    code(runner.gpu.replay(&graph, &runner.stream(stream)))
}

extern "C" fn synchronize(ctx: *mut c_void, stream: u64) -> c_int {
    let runner = runner(ctx);
    code(runner.gpu.synchronize(&runner.stream(stream)))
}

extern "C" fn is_idle(ctx: *mut c_void, stream: u64) -> c_int {
    let runner = runner(ctx);
    let (stream, event) = (runner.stream(stream), runner.gpu.event());
    runner.gpu.record(&event, &stream).unwrap();
    runner.gpu.query(&event).unwrap().into()
}

extern "C" fn is_done(ctx: *mut c_void, event: u64) -> c_int {
    let runner = runner(ctx);
    runner.gpu.query(&runner.event(event)).unwrap().into()
}
