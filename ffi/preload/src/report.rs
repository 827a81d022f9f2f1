//! What the devices did, for whoever judges a run: written to a file when the process ends, or asked for meanwhile.
//!
//! One line per fact: `DEVICE KEY VALUE` for counters, `DEVICE command OP OBJECT NUMBER STATUS` for commands, so that a
//! shell can read it.

use std::fmt::Write;

use ibex_hca::emulated::{CommandRecord, EmulatedHca};

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

fn find(idx: u32) -> Option<&'static EmulatedHca> {
    // CAST: u32 to usize on a 64-bit host.
    world::existing()?.devices.get(idx as usize).map(|device| &**device.hca())
}
