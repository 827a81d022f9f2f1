//! What the heap promises one call at a time: placement, refusals, stale handles, limits, the report.

use ibex_memheap::{Allocation, CAPACITY_MAX, EXTENTS_MAX, Heap, HeapError, HeapOffset};

/// Bytes `0..lens.sum()` of the heap as live blocks, in order.
fn fill(heap: &mut Heap, lens: &[u64]) -> Vec<Allocation> {
    lens.iter().map(|&len| heap.alloc(len, 1).expect("the heap is large enough")).collect()
}

#[test]
fn the_whole_heap_is_one_block_at_any_capacity() {
    for capacity in [1, 31, 32, 33, 4095, 4097, (1 << 30) + 12345, CAPACITY_MAX - 1, CAPACITY_MAX] {
        let mut heap = Heap::new(capacity).unwrap();
        let block = heap.alloc(capacity, 1 << 63).unwrap();
        assert_eq!((block.offset().get(), block.len()), (0, capacity));
        assert_eq!(heap.storage_report().free_extents, 0);
        assert_eq!(heap.storage_report().fragmentation(), 0.0);
        heap.assert_consistent();
        heap.free(block).unwrap();
        assert_eq!(heap.storage_report().largest_free, capacity);
    }
}

#[test]
fn any_power_of_two_is_an_alignment() {
    for log2 in 0..48 {
        let mut heap = Heap::new(CAPACITY_MAX).unwrap();
        let odd = heap.alloc(1, 1).unwrap();
        let block = heap.alloc(4096, 1 << log2).unwrap();
        assert_eq!(block.offset().get(), 1 << log2, "2^{log2}");
        heap.assert_consistent();
        heap.free(odd).unwrap();
        heap.free(block).unwrap();
        assert_eq!(heap.storage_report().free_extents, 1);
    }
}

#[test]
fn bytes_skipped_for_alignment_serve_the_next_block() {
    let mut heap = Heap::new(4 << 20).unwrap();
    let record = heap.alloc(8, 64).unwrap();
    let slab = heap.alloc(2 << 20, 2 << 20).unwrap();
    let next = heap.alloc(8, 64).unwrap();
    assert_eq!(record.offset().get(), 0);
    assert_eq!(slab.offset().get(), 2 << 20);
    assert_eq!(next.offset().get(), 64);
}

#[test]
fn a_freed_block_is_found_again_at_its_alignment() {
    // Its own hole promises no room for an aligned start and must be tried all the same.
    let mut heap = Heap::new(1 << 30).unwrap();
    let blocks: Vec<_> = (0..8).map(|_| heap.alloc(5000, 4096).unwrap()).collect();
    heap.free(blocks[3]).unwrap();
    let again = heap.alloc(5000, 4096).unwrap();
    assert_eq!(again.offset(), blocks[3].offset());
}

#[test]
fn the_last_hole_that_fits_is_found_among_many_that_do_not() {
    // Sixteen holes of one length; only the one at 4096 begins at a multiple of 4096.
    let mut heap = Heap::new(16 * 512).unwrap();
    let blocks = fill(&mut heap, &[256; 32]);
    for index in (0..32).step_by(2).rev() {
        heap.free(blocks[index]).unwrap();
    }
    let first = heap.alloc(256, 4096).unwrap();
    let second = heap.alloc(256, 4096).unwrap();
    assert_eq!((first.offset().get(), second.offset().get()), (0, 4096));
    let refused = heap.alloc(256, 4096).unwrap_err();
    let (live, largest_free) = (18 * 256, 256);
    assert_eq!(refused, HeapError::Exhausted { requested: 256, align: 4096, largest_free, live });
    heap.assert_consistent();
}

#[test]
fn blocks_join_in_every_order_of_three() {
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        let mut heap = Heap::new(300).unwrap();
        let blocks = fill(&mut heap, &[100; 3]);
        for index in order {
            heap.free(blocks[index]).unwrap();
            heap.assert_consistent();
        }
        let report = heap.storage_report();
        assert_eq!((report.free_extents, report.largest_free), (1, 300), "{order:?}");
    }
}

#[test]
fn bad_requests_name_the_value_and_change_nothing() {
    let mut heap = Heap::new(4096).unwrap();
    let kept = heap.alloc(1000, 1).unwrap();
    let before = heap.storage_report();
    assert_eq!(heap.alloc(0, 1), Err(HeapError::ZeroSize));
    for align in [0, 3, 48, u64::MAX] {
        assert_eq!(heap.alloc(8, align), Err(HeapError::BadAlign { align }));
    }
    for requested in [3097, 4097, CAPACITY_MAX + 1, u64::MAX] {
        let expected = HeapError::Exhausted { requested, align: 1, largest_free: 3096, live: 1000 };
        assert_eq!(heap.alloc(requested, 1), Err(expected));
    }
    // Only offset 0 is aligned to more than the capacity, and that byte is taken.
    let expected = HeapError::Exhausted { requested: 8, align: 1 << 63, largest_free: 3096, live: 1000 };
    assert_eq!(heap.alloc(8, 1 << 63), Err(expected));
    assert_eq!(heap.storage_report(), before);
    assert!(heap.is_live(&kept));
}

#[test]
fn bad_limits_are_refused_before_anything_is_made() {
    for capacity in [0, CAPACITY_MAX + 1] {
        let expected = HeapError::BadCapacity { capacity, max: CAPACITY_MAX };
        assert_eq!(Heap::new(capacity).unwrap_err(), expected);
    }
    for extents_max in [0, EXTENTS_MAX + 1] {
        let expected = HeapError::BadExtentsMax { extents_max, max: EXTENTS_MAX };
        assert_eq!(Heap::with_extents_max(4096, extents_max).unwrap_err(), expected);
    }
}

#[test]
fn a_stale_handle_never_frees_the_block_that_came_after() {
    let mut heap = Heap::new(4096).unwrap();
    let old = heap.alloc(64, 64).unwrap();
    heap.free(old).unwrap();
    let new = heap.alloc(64, 64).unwrap();
    assert_eq!(old.offset(), new.offset());
    assert_eq!(heap.free(old), Err(HeapError::DoubleFree { offset: HeapOffset::new(0) }));
    assert!(heap.is_live(&new) && !heap.is_live(&old));
    heap.free(new).unwrap();
    assert_eq!(heap.free(new), Err(HeapError::DoubleFree { offset: HeapOffset::new(0) }));
}

#[test]
fn a_block_of_another_heap_is_unknown_even_where_both_carved_alike() {
    let mut ours = Heap::new(4096).unwrap();
    let mut theirs = Heap::new(4096).unwrap();
    let (our_block, their_block) = (ours.alloc(64, 64).unwrap(), theirs.alloc(64, 64).unwrap());
    assert_eq!(our_block.offset(), their_block.offset());
    assert!(!ours.is_live(&their_block));
    assert_eq!(ours.free(their_block), Err(HeapError::UnknownOffset { offset: HeapOffset::new(0) }));
    assert!(ours.is_live(&our_block) && theirs.is_live(&their_block));
}

#[test]
fn full_books_refuse_a_block_and_change_nothing() {
    let mut heap = Heap::with_extents_max(4096, 2).unwrap();
    let block = heap.alloc(100, 1).unwrap();
    let before = heap.storage_report();
    // At 128 a hole stays before the block and one behind it.
    let expected = HeapError::ExtentsExhausted { limit: 2, in_use: 2, needed: 2 };
    assert_eq!(heap.alloc(100, 128), Err(expected));
    let expected = HeapError::ExtentsExhausted { limit: 2, in_use: 2, needed: 1 };
    assert_eq!(heap.alloc(100, 1), Err(expected));
    assert_eq!(heap.storage_report(), before);
    // What takes a whole extent needs no record.
    let rest = heap.alloc(3996, 1).unwrap();
    heap.free(block).unwrap();
    heap.free(rest).unwrap();
    assert_eq!(heap.storage_report().free_extents, 1);
}

#[test]
fn the_report_keeps_live_peak_and_high_water_apart() {
    let mut heap = Heap::new(4096).unwrap();
    let blocks = fill(&mut heap, &[1000, 1000, 1000]);
    heap.free(blocks[0]).unwrap();
    heap.free(blocks[1]).unwrap();
    let small = heap.alloc(500, 1).unwrap();
    let report = heap.storage_report();
    // The new block came from the smaller hole at the end, and is now the highest.
    assert_eq!(small.offset().get(), 3000);
    assert_eq!((report.live_bytes, report.live_blocks), (1500, 2));
    assert_eq!((report.peak_live_bytes, report.high_water), (3000, 3500));
    assert_eq!((report.free_bytes, report.free_extents, report.largest_free), (2596, 2, 2000));
    let bins: Vec<_> = report.bins.iter().map(|bin| (bin.shortest, bin.extents, bin.bytes)).collect();
    assert_eq!(bins, [(592, 1, 596), (1984, 1, 2000)]);
    assert!((report.fragmentation() - 596.0 / 2596.0).abs() < 1e-12);
}

#[test]
fn messages_carry_the_values_and_what_would_have_been_right() {
    let mut heap = Heap::new(4096).unwrap();
    let text = |error: HeapError| error.to_string();
    assert_eq!(text(heap.alloc(8, 48).unwrap_err()), "alignment is 48; it must be a power of two");
    assert_eq!(
        text(heap.alloc(5000, 64).unwrap_err()),
        "heap exhausted: 5000 bytes aligned to 64 requested, largest free extent 4096, 0 live; \
         it needs a larger heap or fewer live blocks"
    );
    let block = heap.alloc(8, 64).unwrap();
    heap.free(block).unwrap();
    assert_eq!(text(heap.free(block).unwrap_err()), "block at offset 0 was already freed");
}
