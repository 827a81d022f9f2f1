//! Sleeping until a word of shared memory changes, in this process or another.
#![expect(unsafe_code, reason = "system calls that the C library does not wrap")]

use crate::Nanos;

/// Most words that one call can wait for.
pub(super) const WORDS_MAX: usize = 128;

/// A word to wait for, as the kernel reads it.
///
/// SPEC: linux/futex.h futex_waitv
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct Waiter {
    expected: u64,
    addr: u64,
    flags: u32,
    zero: u32,
}

/// A 32-bit word that other processes may change and wake.
///
/// SPEC: linux/futex.h FUTEX2_SIZE_U32, without FUTEX2_PRIVATE
const SHARED_U32: u32 = 2;

impl Waiter {
    /// Waits for the word at `addr` to be something other than `expected`.
    pub(super) const fn new(addr: u64, expected: u32) -> Self {
        Self { expected: expected as u64, addr, flags: SHARED_U32, zero: 0 }
    }
}

/// Wakes all threads, of all processes, that wait for the word at `addr`.
pub(super) fn wake_all(addr: u64) {
    let nobody = std::ptr::null::<libc::timespec>();
    // SAFETY: waking reads no memory of ours; an address that is not mapped is an error, which means that
    // nobody waits there.
    unsafe { libc::syscall(libc::SYS_futex, addr, libc::FUTEX_WAKE, i32::MAX, nobody, 0, 0) };
}

/// The instant `limit` from now on the monotonic clock, because the kernel takes no time span here.
fn after(limit: Nanos) -> libc::timespec {
    const SECOND: u64 = 1_000_000_000;
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    let nanos = now.tv_nsec.cast_unsigned() + limit.0 % SECOND;
    // CAST: limits are far below 2^63 s, and nanoseconds below 2 * 10^9.
    let tv_sec = now.tv_sec + (limit.0 / SECOND + nanos / SECOND) as i64;
    libc::timespec { tv_sec, tv_nsec: (nanos % SECOND) as i64 }
}

/// How a wait ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    /// A word was not what was expected, or somebody woke us.
    Changed,
    /// The time is over, or a signal came.
    Over,
    /// Nothing to wait for, too much of it, or a kernel before 5.16: we did not sleep.
    CouldNot,
}

/// Sleeps until one of the words is not what is expected, or is woken, or `limit` is over.
pub(super) fn wait_any(words: &[Waiter], limit: Nanos) -> Waited {
    if words.is_empty() || words.len() > WORDS_MAX {
        return Waited::CouldNot;
    }
    let until = after(limit);
    let clock = libc::CLOCK_MONOTONIC;
    // SAFETY: the kernel reads the list and the time, which live until the call returns; the words are
    // mapped as long as the caller holds them, and are only compared.
    let slept = unsafe {
        libc::syscall(libc::SYS_futex_waitv, words.as_ptr(), words.len(), 0, &raw const until, clock)
    };
    if slept >= 0 {
        return Waited::Changed;
    }
    match std::io::Error::last_os_error().raw_os_error() {
        Some(libc::EAGAIN) => Waited::Changed,
        Some(libc::EINTR | libc::ETIMEDOUT) => Waited::Over,
        _ => Waited::CouldNot,
    }
}
