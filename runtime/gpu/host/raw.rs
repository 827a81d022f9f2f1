//! Copies to and from memory that kernels and devices access at the same time: atomic, word by word.
//!
//! Owns nothing. INVARIANT: no reference to the memory is ever formed, and no byte of it is accessed otherwise.
#![expect(unsafe_code, reason = "raw addresses; callers check ranges")]

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

/// Splits a range into unaligned head, 8-byte words and tail, as byte counts.
fn split(addr: usize, len: usize) -> (usize, usize, usize) {
    let head = (addr.next_multiple_of(8) - addr).min(len);
    let words = (len - head) / 8;
    (head, words, len - head - words * 8)
}

/// # Safety
/// `addr` must be mapped for `bytes.len()` bytes.
pub(in crate::gpu) unsafe fn copy_in(addr: usize, bytes: &[u8]) {
    let (head, words, _) = split(addr, bytes.len());
    let (head_bytes, rest) = bytes.split_at(head);
    let (word_bytes, tail_bytes) = rest.split_at(words * 8);
    // SAFETY: every byte written lies in the caller's range.
    unsafe {
        store_bytes(addr, head_bytes);
        for (i, word) in word_bytes.chunks_exact(8).enumerate() {
            let mut value = [0; 8];
            value.copy_from_slice(word);
            word_at(addr + head + i * 8).store(u64::from_ne_bytes(value), Ordering::Relaxed);
        }
        store_bytes(addr + head + words * 8, tail_bytes);
    }
}

/// # Safety
/// `addr` must be mapped for `bytes.len()` bytes.
pub(in crate::gpu) unsafe fn copy_out(addr: usize, bytes: &mut [u8]) {
    let (head, words, _) = split(addr, bytes.len());
    let (head_bytes, rest) = bytes.split_at_mut(head);
    let (word_bytes, tail_bytes) = rest.split_at_mut(words * 8);
    // SAFETY: every byte read lies in the caller's range.
    unsafe {
        load_bytes(addr, head_bytes);
        for (i, word) in word_bytes.chunks_exact_mut(8).enumerate() {
            let value = word_at(addr + head + i * 8).load(Ordering::Relaxed);
            word.copy_from_slice(&value.to_ne_bytes());
        }
        load_bytes(addr + head + words * 8, tail_bytes);
    }
}

/// # Safety
/// `addr` must be mapped for `len` bytes.
pub(in crate::gpu) unsafe fn fill_in(addr: usize, byte: u8, len: usize) {
    let (head, words, tail) = split(addr, len);
    let value = u64::from_ne_bytes([byte; 8]);
    // SAFETY: every byte written lies in the caller's range.
    unsafe {
        store_bytes(addr, &[byte; 8][..head]);
        for i in 0..words {
            word_at(addr + head + i * 8).store(value, Ordering::Relaxed);
        }
        store_bytes(addr + head + words * 8, &[byte; 8][..tail]);
    }
}

/// # Safety
/// `addr` must be a multiple of 8 and mapped for 8 bytes for as long as the result is used.
unsafe fn word_at<'a>(addr: usize) -> &'a AtomicU64 {
    // SAFETY: by the contract of this function.
    unsafe { AtomicU64::from_ptr(addr as *mut u64) }
}

/// # Safety
/// `addr` must be mapped for `bytes.len()` bytes.
unsafe fn store_bytes(addr: usize, bytes: &[u8]) {
    for (i, &byte) in bytes.iter().enumerate() {
        // SAFETY: by the contract of this function.
        unsafe { AtomicU8::from_ptr((addr + i) as *mut u8) }.store(byte, Ordering::Relaxed);
    }
}

/// # Safety
/// `addr` must be mapped for `bytes.len()` bytes.
unsafe fn load_bytes(addr: usize, bytes: &mut [u8]) {
    for (i, byte) in bytes.iter_mut().enumerate() {
        // SAFETY: by the contract of this function.
        *byte = unsafe { AtomicU8::from_ptr((addr + i) as *mut u8) }.load(Ordering::Relaxed);
    }
}
