//! The process with the shim preloaded: started by a test, recognised by itself.
#![expect(unsafe_code, reason = "calls functions of the preloaded library, found by name")]

use std::ffi::CStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;

use ibex_hca::LinkLayer;
use ibex_hca::mlx5::{self, LoadError};

/// Set in the process with the shim.
const INSIDE: &str = "IBEX_TEST_INSIDE_SHIM";

/// Runs `test` of this program again with `devices` devices, and there calls `body`.
pub(crate) fn under_the_shim(test: &str, devices: usize, link: LinkLayer, body: impl FnOnce()) {
    if std::env::var_os(INSIDE).is_some() {
        return body();
    }
    let Some(library) = library() else { return };
    let link = match link {
        LinkLayer::Ib => "ib",
        LinkLayer::Roce => "roce",
    };
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env("LD_PRELOAD", library)
        .env("IBEX_PRELOAD_DEVICES", devices.to_string())
        .env("IBEX_PRELOAD_LINK", link)
        .env("IBEX_PRELOAD_DOORBELLS", "strict")
        .env("IBEX_PRELOAD_DIR", env!("CARGO_TARGET_TMPDIR"))
        .env(INSIDE, "1")
        .output()
        .unwrap();
    let said =
        [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{test}: {}\n{said}", output.status);
    assert!(said.contains("1 passed"), "{test} ran there: {said}");
}

/// The shim's library, which is built beside this program; none, loudly, if something is missing.
fn library() -> Option<PathBuf> {
    let skip = |why: &str| {
        // Straight to stderr: the runner hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
        None
    };
    if let Err(error @ LoadError::NotFound { .. }) = mlx5::devices() {
        return skip(&error.to_string());
    }
    let program = std::env::current_exe().unwrap();
    let library = program.parent().unwrap().join("libibex_preload.so");
    if !library.exists() {
        return skip("libibex_preload.so was not built: cargo build --release -p ibex-preload");
    }
    Some(library)
}

/// Looks a function of the shim up.
fn function(name: &CStr) -> *mut libc::c_void {
    // SAFETY: a lookup by name among the loaded libraries.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}: this process runs under the shim");
    found
}

/// Has the call behind the next `skip` ones of the provider's fail with `errno`; 0 takes that back. Whether a failure
/// was waiting.
pub(crate) fn fail_call(skip: u32, errno: i32) -> bool {
    let found = function(c"ibex_preload_fail_call");
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let fail: extern "C" fn(u32, i32) -> bool = unsafe { std::mem::transmute(found) };
    fail(skip, errno)
}

/// Takes the link of a device away, or gives it back.
pub(crate) fn set_port_up(device: u32, is_up: bool) {
    let found = function(c"ibex_preload_set_port_up");
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let set: extern "C" fn(u32, bool) = unsafe { std::mem::transmute(found) };
    set(device, is_up);
}

/// Has a device tell that its addresses changed.
pub(crate) fn announce_new_address(device: u32) {
    let found = function(c"ibex_preload_announce_new_address");
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let announce: extern "C" fn(u32) = unsafe { std::mem::transmute(found) };
    announce(device);
}

/// Removes a device.
pub(crate) fn remove(device: u32) {
    let found = function(c"ibex_preload_remove");
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let remove: extern "C" fn(u32) = unsafe { std::mem::transmute(found) };
    remove(device);
}

/// How many objects a device has: domains, keys, umems, doorbell pages, event queues, completion queues, queue pairs.
pub(crate) fn objects(device: u32) -> [u64; 7] {
    let found = function(c"ibex_preload_objects");
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let count: unsafe extern "C" fn(u32, *mut [u64; 7]) -> bool = unsafe { std::mem::transmute(found) };
    let mut counts = [0; 7];
    // SAFETY: room for seven numbers.
    assert!(unsafe { count(device, &mut counts) }, "there is a device {device}");
    counts
}

/// Lets the devices work until nothing more happens, at most `nanos`.
pub(crate) fn settle(nanos: u64) {
    let found = function(c"ibex_preload_settle");
    // SAFETY: the signature that ffi/preload/src/report.rs declares.
    let settle: extern "C" fn(u64) = unsafe { std::mem::transmute(found) };
    settle(nanos);
}
