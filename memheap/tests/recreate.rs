//! Queue pairs carved, fenced and carved again, as in-place recovery does it.
//!
//! A slot holds a send queue, a completion queue and a doorbell record. Its old blocks stay in quarantine
//! until the new ones are carved, which is the harder of the two orders.

use ibex_memheap::{Block, HeapError, SharedHeap};

/// Work-queue basic block.
const WQEBB: u64 = 64;
/// Alignment of a ring: what the mailboxes take as a page offset.
const PAGE: u64 = 4096;
/// A doorbell record has a line of its own.
const LINE: u64 = 64;

/// The blocks of one queue pair; dropping them is 2RST completed.
struct QpBlocks {
    send_queue: Block,
    completion_queue: Block,
    record: Block,
}

impl QpBlocks {
    fn carve(heap: &SharedHeap, depth: u64) -> Result<Self, HeapError> {
        Ok(QpBlocks {
            send_queue: heap.alloc(depth * WQEBB, PAGE)?,
            completion_queue: heap.alloc(64, LINE)?,
            record: heap.alloc(LINE, LINE)?,
        })
    }

    fn bytes(&self) -> u64 {
        self.blocks().map(Block::len).iter().sum()
    }

    fn blocks(&self) -> [&Block; 3] {
        [&self.send_queue, &self.completion_queue, &self.record]
    }
}

fn assert_disjoint(slots: &[QpBlocks]) {
    let blocks = slots.iter().flat_map(QpBlocks::blocks);
    let mut ranges: Vec<_> = blocks.map(|block| (block.offset().get(), block.len())).collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(pair[0].0 + pair[0].1 <= pair[1].0, "{:?} overlaps {:?}", pair[0], pair[1]);
    }
}

fn carve_all(heap: &SharedHeap, num_slots: usize, depth: u64) -> Vec<QpBlocks> {
    (0..num_slots).map(|_| QpBlocks::carve(heap, depth).expect("the heap holds all slots")).collect()
}

#[test]
fn recreate_64_queue_pairs_at_twice_the_depth_with_others_live() {
    let heap = SharedHeap::new(16 << 20).expect("a valid capacity");
    let mut slots = carve_all(&heap, 128, 256);
    let healthy: Vec<_> = slots.iter().skip(1).step_by(2).map(|qp| qp.send_queue.offset()).collect();
    for slot in slots.iter_mut().step_by(2) {
        *slot = QpBlocks::carve(&heap, 512).expect("twice the depth fits");
        heap.assert_consistent();
    }
    assert_disjoint(&slots);
    let untouched: Vec<_> = slots.iter().skip(1).step_by(2).map(|qp| qp.send_queue.offset()).collect();
    assert_eq!(healthy, untouched);
    let live: u64 = slots.iter().map(QpBlocks::bytes).sum();
    assert_eq!(heap.storage_report().live_bytes, live);
    drop(slots);
    assert_eq!(heap.storage_report().largest_free, 16 << 20);
    assert_eq!(heap.storage_report().free_extents, 1);
}

#[test]
fn ten_thousand_recreations_leak_nothing_and_stay_below_a_bounded_high_water() {
    const NUM_SLOTS: usize = 64;
    const DEPTH: u64 = 1024;
    let heap = SharedHeap::new(1 << 30).expect("a valid capacity");
    let mut slots = carve_all(&heap, NUM_SLOTS, DEPTH);
    for turn in 0..10_000u64 {
        // A hash picks the slot, so that no two rounds meet the same neighbours.
        let hash = turn.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ turn.wrapping_mul(0xd6e8_feb8_6659_fd93) >> 7;
        let slot = (hash >> 40) as usize % NUM_SLOTS;
        let depth = [DEPTH, 2 * DEPTH, DEPTH / 2][turn as usize % 3];
        slots[slot] = QpBlocks::carve(&heap, depth).expect("the heap never fills");
        let live: u64 = slots.iter().map(QpBlocks::bytes).sum();
        assert_eq!(heap.storage_report().live_bytes, live, "turn {turn}");
        if turn % 500 == 0 {
            heap.assert_consistent();
            assert_disjoint(&slots);
        }
    }
    let report = heap.storage_report();
    println!("{report:#?}");
    // Measured: 1.07 of the peak.
    assert!(report.high_water <= report.peak_live_bytes * 5 / 4, "fragmentation eats the heap");
    drop(slots);
    let report = heap.storage_report();
    assert_eq!((report.live_bytes, report.free_extents, report.largest_free), (0, 1, 1 << 30));
}

#[test]
fn a_recreation_that_fails_half_way_leaves_the_heap_as_it_was() {
    // Old blocks up to 32896, a hole up to the next page, and room for exactly one send queue.
    let heap = SharedHeap::new(9 * PAGE + 256 * WQEBB).expect("a valid capacity");
    let old = QpBlocks::carve(&heap, 512).expect("the first one fits");
    // One line of the hole is left: enough for the completion queue, not for the record too.
    let filler = heap.alloc(PAGE - 3 * LINE, LINE).expect("the filler fits");
    let before = heap.storage_report();
    let refused = QpBlocks::carve(&heap, 256).err();
    assert!(matches!(refused, Some(HeapError::Exhausted { requested: LINE, .. })), "{refused:?}");
    let after = heap.storage_report();
    assert_eq!((after.live_bytes, after.bins), (before.live_bytes, before.bins));
    heap.assert_consistent();
    drop(filler);
    let retry = QpBlocks::carve(&heap, 256).expect("a retry works once there is room");
    drop((old, retry));
    assert_eq!(heap.storage_report().free_extents, 1);
}
