//! What a test does to the program's devices while it runs: a call that fails, a link that goes, a device that is
//! removed. A program finds these functions by `dlsym`.
//!
//! Owns the one failure that waits. Calls count process-wide: what `open`, `ioctl` and `mmap` of a verbs device are
//! asked, in the order in which they are asked.

use parking_lot::Mutex;

use crate::errno::Errno;
use crate::interpose;
use crate::world::{self, Device};

/// The next failure: calls that pass first, and the error number.
static WAITING: Mutex<Option<(u32, Errno)>> = Mutex::new(None);

/// The failure that strikes this call, if one does; it is then spent.
pub(crate) fn strike() -> Result<(), Errno> {
    let mut waiting = WAITING.lock();
    match &mut *waiting {
        None => Ok(()),
        Some((0, errno)) => {
            let errno = *errno;
            *waiting = None;
            Err(errno)
        }
        Some((skip, _)) => {
            *skip -= 1;
            Ok(())
        }
    }
}

/// Lets the call behind the next `skip` calls fail with `errno`; 0 takes a failure that has not struck back. Returns
/// whether one was waiting.
#[unsafe(no_mangle)]
extern "C" fn ibex_preload_fail_call(skip: u32, errno: i32) -> bool {
    let next = (errno != 0).then_some((skip, Errno(errno)));
    std::mem::replace(&mut *WAITING.lock(), next).is_some()
}

fn device(idx: u32) -> Option<&'static Device> {
    // CAST: u32 to usize on a 64-bit host.
    world::get()?.devices.get(idx as usize)
}

/// Takes the link of device `idx` away, or gives it back.
#[unsafe(no_mangle)]
extern "C" fn ibex_preload_set_port_up(idx: u32, is_up: bool) {
    if let Some(device) = device(idx) {
        device.hca().set_port_up(is_up);
    }
}

/// Has device `idx` tell that the addresses of its port changed.
#[unsafe(no_mangle)]
extern "C" fn ibex_preload_announce_new_address(idx: u32) {
    if let Some(device) = device(idx) {
        device.hca().announce_new_address();
    }
}

/// Removes device `idx`, as when its card is pulled: programs are told, their objects end, and whatever they ask from
/// then on fails with EIO. SPEC: Linux drivers/infiniband/core/uverbs_main.c, disassociation of a device.
#[unsafe(no_mangle)]
extern "C" fn ibex_preload_remove(idx: u32) {
    let Some(device) = device(idx) else { return };
    device.hca().remove();
    device.tell_removed();
    interpose::contexts().iter().filter(|context| context.is_of(device)).for_each(|context| context.close());
}

/// Writes how many objects device `idx` has: domains, keys, umems, doorbell pages, event queues, completion queues,
/// queue pairs. The shim's own are among them. False if there is no such device.
///
/// # Safety
/// `to` is valid for seven numbers.
#[unsafe(no_mangle)]
unsafe extern "C" fn ibex_preload_objects(idx: u32, to: *mut [u64; 7]) -> bool {
    let Some(device) = device(idx) else { return false };
    let counts = device.hca().object_counts();
    let all = [counts.pds, counts.keys, counts.umems, counts.pages, counts.eqs, counts.cqs, counts.qps];
    // SAFETY: the caller's contract.
    unsafe { to.write(all.map(|count| count as u64)) };
    true
}
