//! The heap against a naive model: a sorted map of live blocks and the gaps between them.
//!
//! Checked at every operation: bounds, alignment, overlap, the accounting, and that a refusal is true. An
//! operation list that fails shrinks to the shortest one that does.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::collections::BTreeMap;

use ibex_memheap::{Allocation, CAPACITY_MAX, Heap, HeapError};
use proptest::prelude::*;

/// One step of a history. Blocks are picked by a number modulo what there is to pick from.
#[derive(Clone, Debug)]
enum Op {
    Alloc { len: u64, align: u64 },
    Free { pick: usize },
    FreeStale { pick: usize },
}

/// Stale allocations that are kept to be freed again.
const STALE_MAX: usize = 64;

struct Model {
    heap: Heap,
    /// Length of every live block by offset: the whole of the naive model.
    blocks: BTreeMap<u64, u64>,
    live: Vec<Allocation>,
    stale: Vec<Allocation>,
    live_bytes: u64,
    peak_live_bytes: u64,
    high_water: u64,
    refusals: u64,
}

impl Model {
    fn new(capacity: u64) -> Self {
        Model {
            heap: Heap::new(capacity).unwrap(),
            blocks: BTreeMap::new(),
            live: Vec::new(),
            stale: Vec::new(),
            live_bytes: 0,
            peak_live_bytes: 0,
            high_water: 0,
            refusals: 0,
        }
    }

    fn apply(&mut self, op: &Op) {
        match *op {
            Op::Alloc { len, align } => self.alloc(len, align),
            Op::Free { pick } if !self.live.is_empty() => self.free(pick % self.live.len()),
            Op::FreeStale { pick } if !self.stale.is_empty() => self.free_stale(pick % self.stale.len()),
            Op::Free { .. } | Op::FreeStale { .. } => {}
        }
        assert_eq!(self.heap.live_bytes(), self.live_bytes);
        assert_eq!(self.heap.high_water(), self.high_water);
    }

    fn alloc(&mut self, len: u64, align: u64) {
        let block = match self.heap.alloc(len, align) {
            Ok(block) => block,
            Err(error) => return self.refused(len, align, error),
        };
        let begin = block.offset().get();
        let end = begin + len;
        assert_eq!(block.len(), len);
        assert_eq!(begin % align, 0, "{begin} is not aligned to {align}");
        assert!(end <= self.heap.capacity(), "{begin}..{end} is outside");
        if let Some((&other, &other_len)) = self.blocks.range(..end).next_back() {
            assert!(other + other_len <= begin, "{begin}..{end} overlaps {other}..{}", other + other_len);
        }
        self.blocks.insert(begin, len);
        self.live.push(block);
        self.live_bytes += len;
        self.peak_live_bytes = self.peak_live_bytes.max(self.live_bytes);
        self.high_water = self.high_water.max(end);
    }

    /// A refusal is true, and says what the gaps say.
    fn refused(&mut self, requested: u64, align: u64, error: HeapError) {
        let gaps = self.gaps();
        let largest_free = gaps.iter().map(|&(begin, end)| end - begin).max().unwrap_or(0);
        let live = self.live_bytes;
        assert_eq!(error, HeapError::Exhausted { requested, align, largest_free, live });
        for (begin, end) in gaps {
            let start = u128::from(begin).next_multiple_of(u128::from(align));
            let fits = start + u128::from(requested) <= u128::from(end);
            assert!(!fits, "{requested} bytes aligned to {align} would have fitted {begin}..{end}");
        }
        self.refusals += 1;
    }

    fn free(&mut self, index: usize) {
        let block = self.live.swap_remove(index);
        assert!(self.heap.is_live(&block));
        self.heap.free(block).unwrap();
        assert!(!self.heap.is_live(&block));
        self.live_bytes -= self.blocks.remove(&block.offset().get()).unwrap();
        if self.stale.len() < STALE_MAX {
            self.stale.push(block);
        } else {
            let oldest = self.live.len() % STALE_MAX;
            self.stale[oldest] = block;
        }
    }

    fn free_stale(&mut self, index: usize) {
        let block = self.stale[index];
        let offset = block.offset();
        assert_eq!(self.heap.free(block), Err(HeapError::DoubleFree { offset }));
    }

    fn gaps(&self) -> Vec<(u64, u64)> {
        let mut gaps = Vec::new();
        let mut at = 0;
        for (&begin, &len) in &self.blocks {
            if begin > at {
                gaps.push((at, begin));
            }
            at = begin + len;
        }
        if at < self.heap.capacity() {
            gaps.push((at, self.heap.capacity()));
        }
        gaps
    }

    /// The whole of the books against the gaps.
    fn check(&self) {
        self.heap.assert_consistent();
        let (report, gaps) = (self.heap.storage_report(), self.gaps());
        let lens = || gaps.iter().map(|&(begin, end)| end - begin);
        assert_eq!(report.free_bytes, lens().sum::<u64>());
        assert_eq!(report.free_bytes + report.live_bytes, report.capacity);
        assert_eq!(report.free_extents, gaps.len() as u64);
        assert_eq!(report.largest_free, lens().max().unwrap_or(0));
        assert_eq!(report.live_blocks, self.blocks.len() as u64);
        assert_eq!(report.peak_live_bytes, self.peak_live_bytes);
        assert_eq!(report.bins.iter().map(|bin| bin.bytes).sum::<u64>(), report.free_bytes);
        for (index, bin) in report.bins.iter().enumerate() {
            let next = report.bins.get(index + 1).map_or(u64::MAX, |next| next.shortest);
            let inside = lens().filter(|len| (bin.shortest..next).contains(len)).count();
            assert_eq!(bin.extents, inside as u64, "bin of {} bytes", bin.shortest);
        }
    }

    fn free_all(&mut self, mut pick: impl FnMut(usize) -> usize) {
        while !self.live.is_empty() {
            self.free(pick(self.live.len()));
        }
        self.check();
        let report = self.heap.storage_report();
        assert_eq!((report.free_extents, report.largest_free), (1, self.heap.capacity()));
        assert_eq!((report.live_bytes, report.live_blocks), (0, 0));
        assert_eq!(report.fragmentation(), 0.0);
    }
}

/// Lengths of every order of magnitude up to `len_log2`.
fn len_of(len_log2: u32, random: u64) -> u64 {
    1 + (random & ((1 << len_log2) - 1))
}

fn op(len_log2: u32) -> impl Strategy<Value = Op> {
    let len = (0..=len_log2, any::<u64>()).prop_map(|(log2, random)| len_of(log2, random));
    let align = prop_oneof![4 => 0u32..=12, 2 => 13u32..=21, 1 => 22u32..=63].prop_map(|log2| 1u64 << log2);
    let pick = 0..usize::MAX;
    prop_oneof![
        10 => (len, align).prop_map(|(len, align)| Op::Alloc { len, align }),
        9 => pick.clone().prop_map(|pick| Op::Free { pick }),
        1 => pick.prop_map(|pick| Op::FreeStale { pick }),
    ]
}

/// A heap and its history, from a page of odd length to the largest there is.
fn history(num_ops: usize) -> impl Strategy<Value = (u64, Vec<Op>)> {
    let capacity = prop_oneof![
        Just((4099, 9)),
        Just((1 << 20, 16)),
        Just(((1 << 30) + 12345, 25)),
        Just((CAPACITY_MAX, 44)),
    ];
    capacity.prop_flat_map(move |(capacity, len_log2)| {
        (Just(capacity), prop::collection::vec(op(len_log2), num_ops))
    })
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: 1000,
        // A history that fails becomes a named test below, where it can be read.
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    /// 1000 histories of 1000 operations each.
    #[test]
    fn heap_agrees_with_the_model_and_ends_as_one_extent((capacity, ops) in history(1000)) {
        let mut model = Model::new(capacity);
        for (index, op) in ops.iter().enumerate() {
            model.apply(op);
            if index % 128 == 0 {
                model.check();
            }
        }
        model.check();
        model.free_all(|num_live| num_live / 2);
    }
}

/// SplitMix64: enough randomness for a history, and none of it from outside.
fn splitmix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// A heap that stays nearly full for 10^6 operations, as histories from empty never are.
#[test]
fn a_million_operations_on_a_full_heap_agree_with_the_model() {
    const SEED: u64 = 1;
    println!("seed {SEED}");
    let mut random = SEED;
    let mut model = Model::new(8 << 20);
    for step in 0..1_000_000u32 {
        let (kind, size) = (splitmix(&mut random) % 20, splitmix(&mut random));
        let pick = splitmix(&mut random) as usize;
        let op = match kind {
            0..=9 => Op::Alloc { len: len_of(6 + (size >> 60) as u32 % 12, size), align: 1 << (pick % 14) },
            10..=18 => Op::Free { pick },
            _ => Op::FreeStale { pick },
        };
        model.apply(&op);
        if step % 4096 == 0 {
            model.check();
        }
    }
    let blocks = model.live.len();
    println!("{} refusals, {blocks} blocks live at the end, {:?}", model.refusals, model.heap);
    assert!(model.refusals > 1000, "the heap was never full");
    model.free_all(|num_live| splitmix(&mut random) as usize % num_live);
}

/// The history on which the best-known control heap hands out bytes of a live block: its one counter is
/// both bytes in use and the end of what was handed out, and freeing lowers it.
#[test]
fn freeing_the_first_of_two_never_exposes_the_second() {
    let mut model = Model::new(1 << 20);
    model.alloc(4096, 1);
    model.alloc(4096, 1);
    model.free(0);
    model.alloc(8192, 1);
    let offsets: Vec<u64> = model.live.iter().map(|block| block.offset().get()).collect();
    assert_eq!(offsets, [4096, 8192]);
    model.check();
    model.free_all(|_| 0);
}
