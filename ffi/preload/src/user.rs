//! The program's memory, read and written on its behalf, as the kernel's `copy_from_user` and `copy_to_user` do.
//!
//! *Who owns what.* Nothing here is ours. An address comes from the program with the promise that it is good for the
//! length that goes with it; the null address is refused, and so is memory that is to be registered and is not mapped.

use crate::errno::Errno;

/// Bytes in a page.
pub(crate) const PAGE: u64 = 4096;

/// Reads `len` bytes.
///
/// # Safety
/// The program vouches for `[addr, addr + len)`.
pub(crate) unsafe fn read(addr: u64, len: usize) -> Result<Vec<u8>, Errno> {
    let mut bytes = vec![0; len];
    if len == 0 {
        return Ok(bytes);
    }
    let from = pointer(addr)?.cast_const();
    // SAFETY: the caller's contract; the buffer is ours.
    unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), len) };
    Ok(bytes)
}

/// Writes bytes.
///
/// # Safety
/// The program vouches for `[addr, addr + bytes.len())`.
pub(crate) unsafe fn write(addr: u64, bytes: &[u8]) -> Result<(), Errno> {
    if bytes.is_empty() {
        return Ok(());
    }
    let to = pointer(addr)?;
    // SAFETY: the caller's contract; `bytes` is ours.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    Ok(())
}

fn pointer(addr: u64) -> Result<*mut u8, Errno> {
    // CAST: addresses of this process fit usize.
    let pointer = std::ptr::with_exposed_provenance_mut::<u8>(addr as usize);
    if pointer.is_null() { Err(Errno::FAULT) } else { Ok(pointer) }
}

/// Refuses memory that the kernel could not pin: it must all be mapped, and writable if the device is to write it.
pub(crate) fn check_mapped(addr: u64, len: u64, writable: bool) -> Result<(), Errno> {
    let start = addr & !(PAGE - 1);
    let end = addr.checked_add(len).and_then(|end| end.checked_next_multiple_of(PAGE)).ok_or(Errno::INVAL)?;
    if len == 0 {
        return Err(Errno::INVAL);
    }
    let advice = if writable { libc::MADV_POPULATE_WRITE } else { libc::MADV_POPULATE_READ };
    let base = pointer(start)?.cast();
    // CAST: a range of this process's addresses.
    let span = (end - start) as usize;
    // SAFETY: populating pages changes no byte of them; ranges that are not mapped are refused.
    if unsafe { libc::madvise(base, span, advice) } == 0 {
        return Ok(());
    }
    if Errno::last() != Errno::INVAL {
        return Err(Errno::FAULT);
    }
    // Older kernels and special mappings know no such advice: look at least whether something is mapped there.
    // SAFETY: as above.
    match unsafe { libc::msync(base, span, libc::MS_ASYNC) } {
        0 => Ok(()),
        _ => Err(Errno::FAULT),
    }
}
