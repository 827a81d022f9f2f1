//! The registers of a function: the initialization segment, and a page for each doorbell page.
//!
//! ```text
//!   0000 fw_rev  0004 cmdif_rev, fw_sub  0010 cmdq_addr_h  0014 cmdq_addr_l, nic_interface, log_sz, log_stride
//!   0018 command doorbell   01fc initializing   0200 health   1010 health counter          all big-endian
//!   n * 1000 doorbell page n, from 4
//!   100000 PCI configuration space
//! ```
//!
//! *Who owns what.* The bytes are a file in memory, which the program maps and reads through the function's descriptor
//! and which is mapped here as well: every access is one atomic word.

use std::ffi::CStr;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use crate::errno::Errno;

/// Bytes of the registers.
pub(super) const BAR_LEN: u64 = 1 << 20;
/// Where configuration space begins in the file, and its bytes.
pub(super) const CONFIG_OFFSET: u64 = BAR_LEN;
pub(super) const CONFIG_LEN: u64 = 4096;
/// Doorbell pages below this one are the initialization segment's.
pub(super) const FIRST_UAR: u32 = 4;
/// Log2 of the number of slots in the command queue, and of their stride.
pub(super) const LOG_SLOTS: u32 = 5;
pub(super) const LOG_STRIDE: u32 = 6;

const NAME: &CStr = c"ibex-preload-bar";
const CMDIF_REV: u32 = 5;
const CMDIF: u64 = 0x04;
const CMDQ_ADDR_H: u64 = 0x10;
const CMDQ_ADDR_L: u64 = 0x14;
const CMD_DOORBELL: u64 = 0x18;
const HEALTH_COUNTER: u64 = 0x1010;

/// The registers, mapped.
#[derive(Debug)]
pub(super) struct Bar {
    base: *mut u8,
    file: OwnedFd,
}

// SAFETY: an address of a mapping that this value owns; every access to it is atomic.
unsafe impl Send for Bar {}
// SAFETY: as above.
unsafe impl Sync for Bar {}

impl Bar {
    pub(super) fn new() -> Result<Self, Errno> {
        // SAFETY: the name is a string.
        let fd = unsafe { libc::memfd_create(NAME.as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(Errno::last());
        }
        // SAFETY: a descriptor that was just made and that nobody else has.
        let file = unsafe { OwnedFd::from_raw_fd(fd) };
        // CAST: a little over a megabyte.
        let len = (BAR_LEN + CONFIG_LEN) as libc::off_t;
        // SAFETY: sets the size of our own file.
        if unsafe { libc::ftruncate(fd, len) } != 0 {
            return Err(Errno::last());
        }
        let rights = libc::PROT_READ | libc::PROT_WRITE;
        let len = BAR_LEN as usize; // CAST: a megabyte.
        // SAFETY: a new mapping at an address of the kernel's choice touches no other memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, rights, libc::MAP_SHARED, fd, 0) };
        if base == libc::MAP_FAILED {
            return Err(Errno::last());
        }
        let bar = Self { base: base.cast(), file };
        bar.store32(CMDIF, CMDIF_REV << 16);
        bar.store32(CMDQ_ADDR_L, LOG_SLOTS << 4 | LOG_STRIDE);
        Ok(bar)
    }

    /// A descriptor of the registers for the program.
    pub(super) fn descriptor(&self) -> Result<RawFd, Errno> {
        let copy =
            self.file.try_clone().map_err(|error| Errno(error.raw_os_error().unwrap_or(libc::EMFILE)))?;
        debug_assert_ne!(copy.as_raw_fd(), self.file.as_raw_fd());
        Ok(copy.into_raw_fd())
    }

    fn word32(&self, offset: u64) -> &AtomicU32 {
        assert!(offset + 4 <= BAR_LEN && offset.is_multiple_of(4), "a register outside the function");
        // CAST: inside the mapping, as asserted.
        let word = self.base.wrapping_add(offset as usize).cast();
        // SAFETY: inside the mapping and aligned, as asserted; it lives as long as `self`, and everybody accesses it by
        // whole words.
        unsafe { AtomicU32::from_ptr(word) }
    }

    /// The 8-byte register at `offset`, in memory order.
    pub(super) fn load64(&self, offset: u64) -> u64 {
        assert!(offset + 8 <= BAR_LEN && offset.is_multiple_of(8), "a register outside the function");
        // CAST: inside the mapping, as asserted.
        let word = self.base.wrapping_add(offset as usize).cast();
        // SAFETY: as for `word32`, with 8 bytes.
        unsafe { AtomicU64::from_ptr(word) }.load(Ordering::Acquire)
    }

    fn store32(&self, offset: u64, value: u32) {
        self.word32(offset).store(value.to_be(), Ordering::Release);
    }

    fn load32(&self, offset: u64) -> u32 {
        u32::from_be(self.word32(offset).load(Ordering::Acquire))
    }

    /// Whether the command doorbell was rung since the last call.
    pub(super) fn take_command_doorbell(&self) -> bool {
        self.word32(CMD_DOORBELL).swap(0, Ordering::AcqRel) != 0
    }

    /// Address of the command queue, as the IOMMU knows it.
    pub(super) fn command_queue(&self) -> u64 {
        u64::from(self.load32(CMDQ_ADDR_H)) << 32 | u64::from(self.load32(CMDQ_ADDR_L) & !0xfff)
    }

    /// Shows that the device lives: libmlx5 ends the process if it does not.
    pub(super) fn beat(&self) {
        let count = self.load32(HEALTH_COUNTER).wrapping_add(1) & 0xff_ffff;
        self.store32(HEALTH_COUNTER, count);
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        // CAST: a megabyte.
        // SAFETY: mapped in `new` and not unmapped before; nothing refers to it any more.
        unsafe { libc::munmap(self.base.cast(), BAR_LEN as usize) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_function_says_what_it_is_and_hears_its_doorbell_once() {
        let bar = Bar::new().unwrap();
        assert_eq!((bar.load32(CMDIF) >> 16, bar.load32(CMDQ_ADDR_L)), (5, 0x56));
        assert!(!bar.take_command_doorbell());
        bar.store32(CMD_DOORBELL, 1 << 31);
        assert!(bar.take_command_doorbell());
        assert!(!bar.take_command_doorbell());
        bar.store32(CMDQ_ADDR_H, 0x12);
        bar.store32(CMDQ_ADDR_L, 0x3456_7000);
        assert_eq!(bar.command_queue(), 0x12_3456_7000);
        bar.beat();
        assert_eq!(bar.load32(HEALTH_COUNTER), 1);
    }
}
