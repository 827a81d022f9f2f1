//! What the devices did, for whoever judges a run: written to a file when the process ends, or asked for meanwhile.
//!
//! One line per fact: `DEVICE KEY VALUE` for counters, `DEVICE command OP OBJECT NUMBER STATUS` for commands, so that a
//! shell can read it.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::sync::OnceLock;

use ibex_hca::emulated::{CommandRecord, EmulatedHca};
use parking_lot::Mutex;

use crate::world;

/// Has the report written, and the sysfs tree removed, when the process ends in an orderly way.
pub(crate) fn at_exit() {
    extern "C" fn close() {
        let Some(world) = world::existing() else { return };
        world.remove_sysfs();
        if let Some(path) = &world.settings.report
            && let Err(error) = std::fs::write(path, report())
        {
            world::say(&format!("{}: {error}", path.display()));
        }
    }
    // SAFETY: a function without arguments that stays loaded, as this library is never unloaded.
    unsafe { libc::atexit(close) };
}

/// The file of mailboxes, if one is wanted and could be opened; it is opened once, and added to.
fn mailboxes() -> Option<&'static Mutex<File>> {
    static FILE: OnceLock<Option<Mutex<File>>> = OnceLock::new();
    let open = || {
        let path = world::existing()?.settings.mailboxes.as_ref()?;
        let opened = File::options().create(true).append(true).open(path);
        opened.map(Mutex::new).map_err(|error| world::say(&format!("{}: {error}", path.display()))).ok()
    };
    FILE.get_or_init(open).as_ref()
}

/// Adds a mailbox and its reply to the file of mailboxes: `DEVICE in HEX out HEX`.
pub(crate) fn keep_mailbox(device: &str, input: &[u8], output: &[u8]) {
    let Some(file) = mailboxes() else { return };
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let line = format!("{device} in {} out {}\n", hex(input), hex(output));
    if let Err(error) = file.lock().write_all(line.as_bytes()) {
        world::say(&format!("a mailbox was not recorded: {error}"));
    }
}

fn report() -> String {
    let mut text = String::new();
    let Some(world) = world::existing() else { return text };
    for device in &world.devices {
        let hca = device.hca();
        hca.check_unrung();
        let counters = hca.counters();
        for (key, value) in [
            ("wqes", counters.wqes),
            ("doorbells", counters.doorbells),
            ("cqes", counters.cqes),
            ("error_cqes", counters.error_cqes),
            ("eqes", counters.eqes),
            ("unrung_wqes", counters.unrung_wqes),
            ("late_doorbells", counters.late_doorbells),
            ("refused_requests", counters.refused_requests),
            ("dropped_events", counters.dropped_events),
            ("trace_dropped", hca.trace_dropped()),
        ] {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{} {key} {value}", device.name());
        }
        for record in hca.trace() {
            write_command(&mut text, &device.name(), &record);
        }
    }
    text
}

fn write_command(text: &mut String, device: &str, record: &CommandRecord) {
    let op = record.op.map_or_else(|| "unknown".into(), |op| op.to_string());
    let number = record.number.map_or_else(|| "-".into(), |number| format!("{number:#x}"));
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{device} command {op} {:?} {number} {}", record.object, record.status.name());
}

/// Writes the commands that device `idx` executed since the last call, one per line, and begins anew; gives the
/// number of bytes, of which at most `len` were written.
///
/// A program finds it by `dlsym`, and so finds out whether it runs under the shim.
///
/// # Safety
/// `to` is valid for `len` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibex_preload_take_trace(idx: u32, to: *mut u8, len: usize) -> usize {
    let mut text = String::new();
    if let Some(hca) = find(idx) {
        for record in hca.take_trace() {
            write_command(&mut text, &format!("mlx5_{idx}"), &record);
        }
    }
    let fitting = text.len().min(len);
    if fitting != 0 {
        // SAFETY: the caller's contract; the text is ours.
        unsafe { std::ptr::copy_nonoverlapping(text.as_ptr(), to, fitting) };
    }
    text.len()
}

/// WQEs of device `idx` that no doorbell covered, counted so far; `u64::MAX` if there is no such device.
#[unsafe(no_mangle)]
extern "C" fn ibex_preload_unrung_wqes(idx: u32) -> u64 {
    find(idx).map_or(u64::MAX, |hca| {
        hca.check_unrung();
        hca.counters().unrung_wqes
    })
}

/// Waits until the devices have nothing left to do and no timer of theirs runs out within `nanos`.
#[unsafe(no_mangle)]
extern "C" fn ibex_preload_settle(nanos: u64) {
    if let Some(world) = world::existing() {
        world.settle(nanos);
    }
}

fn find(idx: u32) -> Option<&'static EmulatedHca> {
    // CAST: u32 to usize on a 64-bit host.
    world::existing()?.devices.get(idx as usize).map(|device| &**device.hca())
}
