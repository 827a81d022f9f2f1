//! The static byte plan of a session's memory: messages, regions, slabs, staging, and their sizes.
//!
//! Pure: numbers in, numbers out; it owns no memory and names no address. The kernels' view of the same plan is
//! `kernels/include/ibex/layout.h`; the byte pictures stand in `kernels/include/ibex/args.h`.
//!
//! Invariants: every offset and stride is a multiple of 16, so that every row can be moved in 16-byte units; every
//! array that two agents touch starts on a line of its own.

use ibex_abi::device_ctx::{
    Layout, LayoutRange, LifeWords, MessageHeader, NUM_OPS, Pick, Shape, SourceInfo, code,
};

use crate::config::{CombineMode, SCALE_BLOCK, ScaleKind, SignalMode, ValidConfig, WireDtype};
use crate::ids::{Lane, Rank};

/// Bytes of one unit that kernels move.
pub const UNIT: u64 = 16;
/// Bytes of a line that one writer should have to itself.
pub const LINE: u64 = 64;
/// Regions and slabs start on pages, because memory keys do.
pub const PAGE: u64 = 4096;

/// Dispatch handles of one lane: as many steps as the ring has slots, twice, so that a backward pass may hold the
/// handles of a full ring while the next ring of steps is launched.
#[must_use]
pub fn num_handles(config: &ValidConfig) -> u32 {
    2 * config.ring
}

/// The plan of one rank.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Capacities as kernels read them.
    pub shape: Shape,
    /// Offsets and strides as kernels read them.
    pub layout: Layout,
    /// Ring of steps, lanes and handles that the sizes below are for.
    pub lanes: u32,
    /// Handles per lane.
    pub handles: u32,
    /// WQEBBs of one send queue.
    pub sq_depth: u32,
    /// Regions of the window that belong to no source yet.
    pub spare_regions: u32,
}

const fn align(value: u64, to: u64) -> u64 {
    value.next_multiple_of(to)
}

/// Scale blocks of one row.
#[must_use]
pub fn num_scale_blocks(hidden: u32) -> u32 {
    hidden.div_ceil(SCALE_BLOCK)
}

fn scale_bytes(config: &ValidConfig) -> u64 {
    let blocks = u64::from(num_scale_blocks(config.hidden));
    match (config.dtype, config.scales) {
        (WireDtype::Bf16, _) => 0,
        (WireDtype::Fp8, ScaleKind::Ue8m0) => blocks,
        (WireDtype::Fp8, ScaleKind::F32 | ScaleKind::Pow2) => 4 * blocks,
    }
}

fn shape(config: &ValidConfig, rank: Rank) -> Shape {
    Shape {
        num_ranks: config.num_ranks,
        rank: rank.0.into(),
        max_tokens: config.max_tokens,
        hidden: config.hidden,
        max_topk: config.max_topk,
        max_experts: config.num_experts,
        max_local_experts: config.max_local_experts(),
        num_channels: config.num_channels(),
        ring: config.ring,
        channel_tokens: config.channel_tokens(),
        num_owner_warps: config.num_owner_warps(),
        signal_mode: match config.signal {
            SignalMode::Write => code::SIGNAL_WRITE,
            SignalMode::FetchAdd => code::SIGNAL_FETCH_ADD,
        },
        wire_dtype: match config.dtype {
            WireDtype::Bf16 => code::WIRE_BF16,
            WireDtype::Fp8 => code::WIRE_FP8,
        },
        scale_kind: match config.scales {
            ScaleKind::F32 => code::SCALE_F32,
            ScaleKind::Pow2 => code::SCALE_POW2,
            ScaleKind::Ue8m0 => code::SCALE_UE8M0,
        },
        combine_mode: match config.combine {
            CombineMode::Exact => code::COMBINE_EXACT,
            CombineMode::Reduced => code::COMBINE_REDUCED,
        },
        staging_rows: config.staging_rows,
        num_places: 1 + config.spare_regions,
        reserved: 0,
    }
}

/// CAST: every value here is bounded by the limits of `Config`: a message is below 65536 * 2 + 64 KiB.
fn small(value: u64) -> u32 {
    u32::try_from(value).expect("a message is smaller than 4 GiB by the limits of Config")
}

fn layout(config: &ValidConfig, s: &Shape) -> Layout {
    let header = size_of::<MessageHeader>() as u64 + u64::from(s.max_topk) * size_of::<Pick>() as u64;
    let element = match config.dtype {
        WireDtype::Bf16 => 2,
        WireDtype::Fp8 => 1,
    };
    let payload = u64::from(s.hidden) * element;
    let scale = align(scale_bytes(config), UNIT);
    let stride = align(header, UNIT) + payload + scale;
    let messages = u64::from(s.ring) * u64::from(s.num_channels) * u64::from(s.channel_tokens) * stride;
    let counts_off = align(messages, LINE);
    let counts = u64::from(s.ring) * u64::from(s.max_local_experts) * 4;
    let signals_off = align(counts_off + counts, LINE);
    let signals = NUM_OPS as u64 * u64::from(s.ring) * u64::from(s.num_channels) * 8;
    let consumed_off = align(signals_off + signals, LINE);
    let consumed = NUM_OPS as u64 * u64::from(s.ring) * 8;
    let life_off = align(consumed_off + consumed, LINE);
    let row = u64::from(s.hidden) * 2;
    Layout {
        payload_off: small(header),
        payload_bytes: small(payload),
        scale_off: small(header + payload),
        scale_bytes: small(scale),
        message_stride: small(stride),
        row_bytes: small(row),
        counts_off,
        signals_off,
        consumed_off,
        life_off,
        region_bytes: align(life_off + size_of::<LifeWords>() as u64, PAGE),
        combine_slot_bytes: u64::from(s.max_tokens) * u64::from(s.max_topk) * row,
    }
}

impl Plan {
    /// Plans the memory of `rank`.
    #[must_use]
    pub fn new(config: &ValidConfig, rank: Rank) -> Self {
        let shape = shape(config, rank);
        Self {
            layout: layout(config, &shape),
            shape,
            lanes: config.lanes,
            handles: num_handles(config),
            sq_depth: 1 << config.sq_depth_log,
            spare_regions: config.spare_regions,
        }
    }

    /// Queue pairs of one lane, the unused ones to ourselves included.
    #[must_use]
    pub fn num_qps(&self) -> u64 {
        u64::from(self.shape.num_ranks) * u64::from(self.shape.num_channels)
    }

    /// Regions in the receive window of one lane: one per source, and spare ones.
    #[must_use]
    pub fn num_regions(&self) -> u32 {
        self.shape.num_ranks + self.spare_regions
    }

    /// Bytes of the receive window of one lane.
    #[must_use]
    pub fn window_bytes(&self) -> u64 {
        u64::from(self.num_regions()) * self.layout.region_bytes
    }

    /// Offset of a region in the window. The first ones belong to the source of the same number to begin with.
    #[must_use]
    pub fn region_offset(&self, index: u32) -> u64 {
        u64::from(index) * self.layout.region_bytes
    }

    /// Bytes of the combine slab of one lane: all places of all ring slots.
    #[must_use]
    pub fn combine_slab_bytes(&self) -> u64 {
        let slots = u64::from(self.shape.num_places) * u64::from(self.shape.ring);
        align(slots * self.layout.combine_slot_bytes, PAGE)
    }

    /// Where the parts of one lane's source memory lie: what WQEs of this rank read from, or return results to.
    #[must_use]
    pub fn source(&self) -> SourcePlan {
        let s = &self.shape;
        let slots = 2 * u64::from(s.ring);
        let staging = slots * u64::from(s.max_tokens) * u64::from(self.layout.message_stride);
        let counts_off = align(staging, LINE);
        let counts = slots * u64::from(s.num_ranks) * u64::from(s.max_local_experts) * 4;
        let rows_off = align(counts_off + counts, PAGE);
        let rows = self.num_qps() * u64::from(s.staging_rows) * u64::from(self.layout.row_bytes);
        let atomics_off = align(rows_off + rows, LINE);
        SourcePlan { counts_off, rows_off, atomics_off, bytes: align(atomics_off + self.num_qps() * 8, PAGE) }
    }

    /// Packed rows of one local expert.
    #[must_use]
    pub fn packed_capacity(&self) -> u64 {
        u64::from(self.shape.num_ranks) * u64::from(self.shape.max_tokens)
    }

    /// Packed rows of all local experts.
    #[must_use]
    pub fn packed_rows(&self) -> u64 {
        u64::from(self.shape.max_local_experts) * self.packed_capacity()
    }

    /// Bytes of one kept message header.
    #[must_use]
    pub fn header_bytes(&self) -> u64 {
        u64::from(self.layout.payload_off)
    }

    /// Bytes between the scales of two packed rows; the scales of a row are contiguous.
    #[must_use]
    pub fn scale_row_bytes(&self) -> u64 {
        u64::from(num_scale_blocks(self.shape.hidden)) * self.scale_block_bytes()
    }

    /// Bytes of one stored scale.
    #[must_use]
    pub fn scale_block_bytes(&self) -> u64 {
        if self.shape.scale_kind == code::SCALE_UE8M0 { 1 } else { 4 }
    }

    /// Sizes of the tensors that a caller brings, by name.
    #[must_use]
    pub fn tensors(&self) -> TensorPlan {
        let s = &self.shape;
        let picks = u64::from(s.max_tokens) * u64::from(s.max_topk);
        let fp8 = s.wire_dtype == code::WIRE_FP8;
        TensorPlan {
            x: u64::from(s.max_tokens) * u64::from(self.layout.row_bytes),
            topk_idx: picks * 8,
            topk_weights: picks * 4,
            packed_x: self.packed_rows() * u64::from(self.layout.payload_bytes),
            packed_scales: if fp8 { self.packed_rows() * self.scale_row_bytes() } else { 0 },
            source_info: self.packed_rows() * size_of::<SourceInfo>() as u64,
            expert_counts: u64::from(s.max_local_experts) * 4,
            layout_ranges: u64::from(s.max_local_experts)
                * u64::from(s.num_ranks)
                * size_of::<LayoutRange>() as u64,
            source_ok: u64::from(s.num_ranks) * 4,
            expert_out: self.packed_rows() * u64::from(self.layout.row_bytes),
            out: u64::from(s.max_tokens) * u64::from(self.layout.row_bytes),
            lost_topk: u64::from(s.max_tokens) * 4,
            expert_ids: u64::from(s.max_local_experts) * 4,
        }
    }
}

/// Offsets in one lane's source memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourcePlan {
    /// Counts that travel before channel 0's signal; staging rows stand before them.
    pub counts_off: u64,
    /// Rings of combine rows.
    pub rows_off: u64,
    /// Where FETCH_ADD returns old values.
    pub atomics_off: u64,
    /// All of it.
    pub bytes: u64,
}

/// Bytes of each caller tensor at full capacity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the tensors' names; shapes and dtypes stand at DispatchArgs")]
pub struct TensorPlan {
    pub x: u64,
    pub topk_idx: u64,
    pub topk_weights: u64,
    pub packed_x: u64,
    pub packed_scales: u64,
    pub source_info: u64,
    pub expert_counts: u64,
    pub layout_ranges: u64,
    pub source_ok: u64,
    pub expert_out: u64,
    pub out: u64,
    pub lost_topk: u64,
    pub expert_ids: u64,
}

impl TensorPlan {
    /// All tensors together, the word that holds the token count included.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.x
            + self.topk_idx
            + self.topk_weights
            + self.packed_x
            + self.packed_scales
            + self.source_info
            + self.expert_counts
            + self.layout_ranges
            + self.source_ok
            + self.expert_out
            + self.out
            + self.lost_topk
            + self.expert_ids
            + 4
    }
}

/// Index of a QP slot: (lane, peer, channel), dense.
#[must_use]
pub fn qp_slot(shape: &Shape, lane: Lane, peer: Rank, channel: u32) -> u32 {
    (lane.0 * shape.num_ranks + u32::from(peer.0)) * shape.num_channels + channel
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn plan(config: Config) -> Plan {
        Plan::new(&config.validate().unwrap(), Rank(0))
    }

    #[test]
    fn the_published_setting_needs_7_7_mb_of_dispatch_slab() {
        let p = plan(Config::default());
        let slab = 8 * 128 * u64::from(p.layout.message_stride);
        assert_eq!(p.layout.message_stride, 16 + 8 * 16 + 7168 + 56 * 4);
        assert!((7_600_000..7_800_000).contains(&slab), "{slab}");
    }

    #[test]
    fn every_offset_is_a_multiple_of_a_unit_for_odd_shapes() {
        for (hidden, dtype, topk, tokens, experts) in [
            (2880, WireDtype::Fp8, 1, 1, 7),
            (3584, WireDtype::Bf16, 16, 127, 250),
            (6400, WireDtype::Fp8, 32, 333, 65),
            (16, WireDtype::Fp8, 3, 5, 11),
            (8, WireDtype::Bf16, 5, 9, 5),
        ] {
            let p = plan(Config {
                hidden,
                dtype,
                max_topk: topk,
                max_tokens: tokens,
                num_experts: experts.max(topk),
                ..Config::default()
            });
            let l = &p.layout;
            for v in
                [l.payload_off, l.payload_bytes, l.scale_off, l.scale_bytes, l.message_stride, l.row_bytes]
            {
                assert_eq!(v % 16, 0, "{hidden} {dtype:?}");
            }
            for v in [l.counts_off, l.signals_off, l.consumed_off, l.life_off] {
                assert_eq!(v % LINE, 0);
            }
            assert!(l.region_bytes >= l.life_off + size_of::<LifeWords>() as u64);
            let s = p.source();
            assert!(s.counts_off < s.rows_off && s.rows_off < s.atomics_off && s.atomics_off < s.bytes);
        }
    }

    #[test]
    fn regions_and_slots_do_not_overlap() {
        let p = plan(Config { num_ranks: 3, num_experts: 9, ..Config::default() });
        assert_eq!(p.region_offset(p.num_regions()), p.window_bytes());
        let mut seen = std::collections::HashSet::new();
        for lane in 0..2 {
            for peer in 0..3 {
                for channel in 0..p.shape.num_channels {
                    assert!(seen.insert(qp_slot(&p.shape, Lane(lane), Rank(peer), channel)));
                }
            }
        }
    }
}
