//! The binding on a double of NCCL: what it calls, what it makes of every refusal, and that nothing is left.
//!
//! The double (`double.cpp`) moves bytes of host memory within one process; it says nothing of NCCL itself. What the
//! real library of a machine answers without a GPU stands in the crate's unit tests.
#![expect(unsafe_code, reason = "buffers are handed to a C library")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::ffi::c_int;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::ptr::null_mut;
use std::sync::{Arc, OnceLock};

use ibex_nccl::{Comm, Nccl, NcclError, ResultCode, UniqueId, Version};
use libloading::Library;

fn built() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let name = format!("{}-libnccl-double.so", std::process::id());
        let built = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
        let mut command = Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into()));
        command.args(["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o"]);
        command.arg(&built).arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/double.cpp"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        built
    })
}

/// A library of its own, with state of its own.
struct Double {
    library: Library,
    path: PathBuf,
}

impl Double {
    fn new(name: &str) -> Self {
        let path = built().with_file_name(format!("{}-nccl-{name}.so", std::process::id()));
        fs::copy(built(), &path).unwrap();
        // SAFETY: built from our own source; it has no constructors of note.
        let library = unsafe { Library::new(&path) }.unwrap();
        Self { library, path }
    }

    fn load(&self) -> Result<Arc<Nccl>, NcclError> {
        Nccl::load_from(self.path.as_os_str())
    }

    fn tell(&self, name: &str, value: c_int) {
        // SAFETY: every caller names a function of double.cpp that takes one number.
        unsafe { self.library.get::<unsafe extern "C" fn(c_int)>(name.as_bytes()).unwrap()(value) }
    }

    /// The `nth` call from now on answers `code`; 0: none.
    fn fail(&self, nth: c_int, code: c_int) {
        // SAFETY: the signature of double.cpp.
        unsafe {
            let fail: libloading::Symbol<'_, unsafe extern "C" fn(c_int, c_int)> =
                self.library.get(b"ibex_double_fail").unwrap();
            fail(nth, code);
        }
    }

    fn ask(&self, name: &str) -> c_int {
        // SAFETY: every caller names a function of double.cpp that gives one number.
        unsafe { self.library.get::<unsafe extern "C" fn() -> c_int>(name.as_bytes()).unwrap()() }
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Uses everything once.
fn use_everything(double: &Double) -> Result<(), NcclError> {
    let nccl = double.load()?;
    let id = nccl.unique_id()?;
    let mut comm = Comm::join(&nccl, 2, 1, UniqueId::from_bytes(id.to_bytes()))?;
    assert_eq!((comm.num_ranks()?, comm.rank()?), (2, 1));
    comm.health()?;
    let (sent, mut gathered) = ([1_u8, 2, 3, 4], [0_u8; 8]);
    // SAFETY: the buffers have the lengths that each call asks for, and live until it is over.
    unsafe {
        comm.all_gather(sent.as_ptr().cast(), gathered.as_mut_ptr().cast(), 4, null_mut())?;
        assert_eq!(gathered, [1, 2, 3, 4, 1, 2, 3, 4]);
        comm.broadcast(sent[1..].as_ptr().cast(), gathered.as_mut_ptr().cast(), 3, 0, null_mut())?;
        assert_eq!(gathered[..3], [2, 3, 4]);
        comm.all_to_all(sent.as_ptr().cast(), gathered.as_mut_ptr().cast(), 2, null_mut())?;
        assert_eq!(gathered[..4], sent);
        // Several messages to one peer arrive in their order.
        let from = sent.as_ptr().cast::<std::ffi::c_void>();
        let into = gathered.as_mut_ptr().cast::<std::ffi::c_void>();
        nccl.group(|| {
            for at in [0, 1, 2] {
                comm.send(from.byte_add(at), 1, 1, null_mut())?;
                comm.receive(into.byte_add(4 + at), 1, 1, null_mut())?;
            }
            Ok::<(), NcclError>(())
        })?;
        assert_eq!(gathered[4..7], sent[..3]);
    }
    double.fail(0, 0);
    Ok(())
}

#[test]
fn every_call_that_fails_is_a_typed_error_and_nothing_stays() {
    let double = Double::new("failing");
    let mut failures = 0;
    for nth in 1.. {
        double.fail(nth, 1);
        let result = use_everything(&double);
        assert_eq!((double.ask("ibex_double_live"), double.ask("ibex_double_depth")), (0, 0), "call {nth}");
        let Err(error) = result else { break };
        let said = error.to_string();
        assert!(matches!(error, NcclError::Call { code: ResultCode::UnhandledCuda, .. }), "{said}");
        assert!(said.starts_with("nccl") && said.contains("unhandled cuda error (double)"), "{said}");
        failures += 1;
    }
    assert!(failures >= 12, "{failures} calls were seen to fail");
}

#[test]
fn what_makes_no_sense_is_refused_before_it_is_called() {
    let double = Double::new("refused");
    let nccl = double.load().unwrap();
    let id = nccl.unique_id().unwrap();
    let refused = Comm::join(&nccl, 2, 2, id).unwrap_err();
    assert!(matches!(refused, NcclError::OutOfRange { field: "rank", value: 2, max: 1 }), "{refused}");
    let mut comm = Comm::join(&nccl, 2, 0, id).unwrap();
    // SAFETY: refused before anything is touched.
    let refused = unsafe { comm.send(null_mut(), 0, 2, null_mut()) }.unwrap_err();
    assert!(matches!(refused, NcclError::OutOfRange { field: "peer", value: 2, max: 1 }), "{refused}");
    double.tell("ibex_double_async_error", 6);
    let failed = comm.health().unwrap_err();
    assert!(matches!(failed, NcclError::Call { code: ResultCode::Remote, .. }), "{failed}");
}

#[test]
fn an_old_library_is_refused_and_a_lent_communicator_is_left_alone() {
    let double = Double::new("old");
    double.tell("ibex_double_version", 2_604);
    let error = double.load().unwrap_err();
    assert_eq!(error.to_string(), "NCCL 2.6.4 is too old, 2.7.0 or later is needed");
    double.tell("ibex_double_version", 22_705);
    let nccl = double.load().unwrap();
    assert_eq!(nccl.version(), Version { major: 2, minor: 27, patch: 5 });
    let own = Comm::join(&nccl, 1, 0, nccl.unique_id().unwrap()).unwrap();
    // SAFETY: `own` outlives it, and is not used meanwhile.
    let lent = unsafe { Comm::lent(&nccl, own.raw()) };
    assert_eq!(lent.num_ranks().unwrap(), 1);
    drop(lent);
    assert_eq!(double.ask("ibex_double_live"), 1);
    drop(own);
    assert_eq!(double.ask("ibex_double_live"), 0);
}
