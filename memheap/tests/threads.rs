//! One heap, many threads: no two of them ever hold the same byte.

use std::sync::atomic::{AtomicBool, Ordering};

use ibex_memheap::{Block, HeapError, HeapOffset, SharedHeap};

/// Bytes in the heap, and claims on them.
const CAPACITY: u64 = 64 << 10;

/// Says whether the bytes of a block change hands; each must come from the other state.
fn claim(claims: &[AtomicBool], block: &Block, held: bool) {
    let begin = block.offset().get();
    for byte in begin..begin + block.len() {
        let was = claims[byte as usize].swap(held, Ordering::Relaxed);
        assert_ne!(was, held, "byte {byte} has two holders");
    }
}

#[test]
fn threads_never_hold_the_same_byte_and_leave_one_extent() {
    let heap = SharedHeap::new(CAPACITY).expect("a valid capacity");
    let claims: Vec<_> = (0..CAPACITY).map(|_| AtomicBool::new(false)).collect();
    let work = |thread: u64| {
        let mut held: Vec<Block> = Vec::new();
        for turn in 0..5_000u64 {
            let random = (turn * 4 + thread).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
            if let Ok(block) = heap.alloc(1 + random % 900, 1 << (random % 8)) {
                claim(&claims, &block, true);
                held.push(block);
            }
            if held.len() > 24 {
                let block = held.swap_remove(random as usize % 24);
                claim(&claims, &block, false);
            }
        }
        held.iter().for_each(|block| claim(&claims, block, false));
    };
    std::thread::scope(|scope| {
        (0..4).for_each(|thread| drop(scope.spawn(move || work(thread))));
    });
    heap.assert_consistent();
    assert!(claims.iter().all(|held| !held.load(Ordering::Relaxed)));
    assert_eq!(heap.storage_report().largest_free, CAPACITY);
    assert!(heap.storage_report().peak_live_bytes > CAPACITY / 2, "the threads hardly met");
}

#[test]
fn a_block_keeps_the_books_alive_after_the_last_handle() {
    let heap = SharedHeap::new(CAPACITY).expect("a valid capacity");
    let block = heap.alloc(64, 64).expect("an empty heap");
    drop(heap);
    assert_eq!((block.offset(), block.len()), (HeapOffset::new(0), 64));
}

#[test]
fn raw_blocks_stay_live_until_they_are_freed_once() {
    let heap = SharedHeap::new(CAPACITY).expect("a valid capacity");
    let raw = heap.alloc_raw(64, 64).expect("an empty heap");
    assert_eq!(heap.storage_report().live_blocks, 1);
    assert_eq!(heap.free_raw(raw), Ok(()));
    assert_eq!(heap.free_raw(raw), Err(HeapError::DoubleFree { offset: raw.offset() }));
}
