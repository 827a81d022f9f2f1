//! A rendezvous inside a communicator of NCCL, on doubles of NCCL and of the CUDA driver.
//!
//! The doubles move bytes of host memory in one process (`ffi/nccl-rs/tests/double.cpp`, `cuda/driver.cpp`): every rank
//! hears its own words. They say nothing of NCCL itself.
#![expect(unsafe_code, reason = "calls into the doubles")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use core::time::Duration;
use std::ffi::c_int;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use ibex::bootstrap::ibex_nccl::{Comm, Nccl, NcclError, ResultCode};
use ibex::bootstrap::{BLOB_LEN_MAX, Bootstrap, BootstrapError, NcclBootstrap};
use ibex::gpu::{CudaGpu, CudaMemory, GpuError};
use ibex::harness::{BaselineError, NcclAllToAll};
use ibex::ids::Rank;
use libloading::Library;

#[path = "cuda/double.rs"]
mod double;

use double::Double;

/// Far longer than a double takes.
const SOON: Duration = Duration::from_secs(60);

/// The double of NCCL, under a name of its own so that each test has its own state.
struct NcclDouble {
    library: Library,
    path: PathBuf,
}

impl NcclDouble {
    fn new(name: &str) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let path =
            Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{}-nccl-{name}.so", std::process::id()));
        let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()));
        command.args(["-std=c++20", "-O1", "-shared", "-fPIC", "-o"]).arg(&path);
        let output = command.arg(root.join("ffi/nccl-rs/tests/double.cpp")).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        // SAFETY: built from our own source; it has no constructors of note.
        Self { library: unsafe { Library::new(&path) }.unwrap(), path }
    }

    fn load(&self) -> Arc<Nccl> {
        Nccl::load_from(self.path.as_os_str()).unwrap()
    }

    fn async_error(&self, code: c_int) {
        // SAFETY: the signature of double.cpp.
        unsafe {
            let tell: libloading::Symbol<'_, unsafe extern "C" fn(c_int)> =
                self.library.get(b"ibex_double_async_error").unwrap();
            tell(code);
        }
    }

    fn live(&self) -> c_int {
        // SAFETY: the signature of double.cpp.
        unsafe { self.library.get::<unsafe extern "C" fn() -> c_int>(b"ibex_double_live").unwrap()() }
    }
}

impl Drop for NcclDouble {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn meet(nccl: &NcclDouble, cuda: &Double) -> NcclBootstrap {
    let gpu = Arc::new(CudaGpu::open(&cuda.options(CudaMemory::Device, 1)).unwrap());
    let library = nccl.load();
    let comm = Comm::join(&library, 2, 1, library.unique_id().unwrap()).unwrap();
    NcclBootstrap::new(comm, &gpu).unwrap()
}

#[test]
fn blobs_of_any_length_are_gathered_and_nothing_stays() {
    let (nccl, cuda) = (NcclDouble::new("gather"), Double::new("nccl-gather"));
    let bootstrap = meet(&nccl, &cuda);
    assert_eq!((bootstrap.rank(), bootstrap.num_ranks()), (Rank(1), 2));
    for len in [0, 1, 1000, BLOB_LEN_MAX] {
        let blob: Vec<u8> = (0..len).map(|at| (at % 251) as u8).collect();
        assert!(bootstrap.all_gather("key", &blob, SOON).unwrap() == [blob.clone(), blob]);
    }
    bootstrap.barrier("over", SOON).unwrap();
    let refused = bootstrap.all_gather("key", &vec![0; BLOB_LEN_MAX + 1], SOON).unwrap_err();
    assert!(matches!(refused, BootstrapError::TooLarge { max: BLOB_LEN_MAX, .. }), "{refused}");
    drop(bootstrap);
    assert_eq!((nccl.live(), cuda.live()), (0, 0));
}

#[test]
fn who_waits_in_vain_is_told_so_or_what_nccl_has_noticed() {
    let (nccl, cuda) = (NcclDouble::new("late"), Double::new("nccl-late"));
    let bootstrap = meet(&nccl, &cuda);
    cuda.set_busy(true);
    let late = bootstrap.barrier("meet", Duration::from_millis(5)).unwrap_err();
    assert!(matches!(&late, BootstrapError::Late { key, .. } if key == "meet"), "{late}");
    nccl.async_error(6);
    let failed = bootstrap.barrier("meet", Duration::from_millis(5)).unwrap_err();
    let is_remote = matches!(&failed, BootstrapError::Nccl(NcclError::Call { code: ResultCode::Remote, .. }));
    assert!(is_remote, "{failed}");
    cuda.set_busy(false);
    nccl.async_error(0);
    bootstrap.barrier("meet", SOON).unwrap();
    drop(bootstrap);
    assert_eq!((nccl.live(), cuda.live()), (0, 0));
}

#[test]
fn every_call_of_the_driver_that_fails_is_a_typed_error() {
    let (nccl, cuda) = (NcclDouble::new("failing"), Double::new("nccl-failing"));
    let bootstrap = meet(&nccl, &cuda);
    let mut failures = 0;
    for nth in 1.. {
        cuda.fail(nth, 2);
        let result = bootstrap.all_gather("key", b"abc", SOON);
        if !cuda.has_failed() {
            break;
        }
        if let Err(error) = result {
            assert!(error.to_string().contains("CUDA error 2 (out of memory)"), "call {nth}: {error}");
            failures += 1;
        }
    }
    assert!(failures > 10, "{failures}");
    cuda.fail(0, 0);
    drop(bootstrap);
    assert_eq!((nccl.live(), cuda.live()), (0, 0));
}

#[test]
fn an_all_to_all_is_timed_between_events_and_every_refusal_is_typed() {
    let (nccl, cuda) = (NcclDouble::new("baseline"), Double::new("nccl-baseline"));
    let gpu = Arc::new(CudaGpu::open(&cuda.options(CudaMemory::Device, 1)).unwrap());
    let library = nccl.load();
    let mut baseline = NcclAllToAll::new(&library, &gpu).unwrap();
    assert_eq!(baseline.version().to_string(), "2.27.5");
    // The double's events are 1.5 ms apart, whatever lies between.
    assert_eq!(baseline.measure_ns(&[100, 0, 7, 100]).unwrap(), 1_500_000);
    assert_eq!(baseline.measure_ns(&[0, 0]).unwrap(), 0);
    nccl.async_error(6);
    let error = baseline.measure_ns(&[5]).unwrap_err();
    let is_remote = matches!(error, BaselineError::Nccl(NcclError::Call { code: ResultCode::Remote, .. }));
    assert!(is_remote, "{error}");
    nccl.async_error(0);
    let mut refused = 0;
    for nth in 1.. {
        cuda.fail(nth, 2);
        match baseline.measure_ns(&[1 << 20]) {
            Ok(_) if !cuda.has_failed() => break,
            // What fails in looking for idle streams disturbs nobody.
            Ok(_) => {}
            Err(BaselineError::Gpu(GpuError::Cuda(_))) => refused += 1,
            Err(error) => panic!("call {nth}: {error}"),
        }
    }
    cuda.fail(0, 0);
    assert!(refused >= 5, "{refused} calls were seen to fail");
    drop((baseline, gpu));
    assert_eq!((nccl.live(), cuda.live()), (0, 0));
}
