//! Host memory of somebody else that kernels reach: doorbell pages of devices, above all.
//!
//! The driver refuses a page that is registered already, and several registers may lie on one page of a device, used by
//! several ranks of this process. So a page is registered once for all of them, whatever context they are in.
//! [`Registered`] owns a share of that registration; the last one takes it back.
//!
//! INVARIANT: pages are registered and unregistered under the lock of `REGISTERED`, so nobody finds one that is going.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::calls::CallError;
use super::context::Context;
use super::memory::pointer;

/// What is registered as a whole.
const PAGE: u64 = 4096;
/// SPEC: cuda.h `CU_MEMHOSTREGISTER_PORTABLE | CU_MEMHOSTREGISTER_DEVICEMAP`.
const FLAGS: u32 = 0x1 | 0x2;
/// The range is a device's registers, not memory.
///
/// SPEC: cuda.h `CU_MEMHOSTREGISTER_IOMEMORY`.
const IO: u32 = 0x4;

/// By first address: what is registered now.
static REGISTERED: Mutex<BTreeMap<u64, Weak<Pages>>> = Mutex::new(BTreeMap::new());

/// Pages that the driver knows.
#[derive(Debug)]
struct Pages {
    context: Arc<Context>,
    base: u64,
    len: usize,
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: registered once. A refusal leaves the pages pinned, which harms nobody.
        self.context.release(|calls| unsafe { calls.mem_host_unregister(pointer(self.base)) });
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Registered {
    /// Gone only while this is being dropped.
    pages: Option<Arc<Pages>>,
    base: u64,
    /// Where kernels see the first byte of the pages.
    device_base: u64,
}

impl Registered {
    /// Registers the pages around a range, unless they are.
    ///
    /// # Safety
    /// The pages stay mapped until the result is dropped, and are registers of a device if `is_io` says so.
    pub(super) unsafe fn new(
        context: &Arc<Context>,
        addr: u64,
        len: usize,
        is_io: bool,
    ) -> Result<Self, CallError> {
        let base = addr / PAGE * PAGE;
        // CAST: a range of this process.
        let len = ((addr + len as u64).next_multiple_of(PAGE) - base) as usize;
        let mut table = REGISTERED.lock();
        let known = table.get(&base).and_then(Weak::upgrade).filter(|pages| pages.len >= len);
        let _entered = context.enter()?;
        let pages = match known {
            Some(pages) => pages,
            None => {
                let flags = FLAGS | if is_io { IO } else { 0 };
                // SAFETY: the caller's contract.
                unsafe { context.calls.mem_host_register(pointer(base), len, flags) }?;
                let pages = Arc::new(Pages { context: Arc::clone(context), base, len });
                table.insert(base, Arc::downgrade(&pages));
                pages
            }
        };
        let mut device_base = 0;
        // SAFETY: registered for every context, and a writable address.
        let seen = unsafe { context.calls.mem_host_get_device_pointer(&mut device_base, pointer(base), 0) };
        // Dropped under the lock, if the driver does not say where kernels see them.
        seen.map(|()| Self { pages: Some(pages), base, device_base })
    }

    /// Where kernels see host address `addr`.
    pub(super) fn seen_by_kernels(&self, addr: u64) -> u64 {
        self.device_base + (addr - self.base)
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let mut table = REGISTERED.lock();
        drop(self.pages.take());
        if table.get(&self.base).is_some_and(|pages| pages.strong_count() == 0) {
            table.remove(&self.base);
        }
    }
}
