//! Everything the host and the kernels agree on in memory: capacities, layouts, contexts, handles, launch arguments.
//!
//! The host allocates and fills all of it; kernels write only what is marked so. Little-endian, because the GPU
//! is; big-endian only where a field name says `_be`. The C++ twin is `kernels/include/ibex/args.h`; the test
//! `device_abi` compares every size and offset of both sides. Pointers are device addresses as `u64`.
//!
//! INVARIANT: what a captured graph freezes stands in [`LaneArgs`], [`DispatchArgs`] and [`CombineArgs`];
//! whatever may change between two replays is reached through an address in them.

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

/// Most ranks that one session can name.
pub const MAX_RANKS: usize = 512;
/// Most picks of one token; a loss mask is 32 bits.
pub const MAX_TOPK: usize = 32;
/// Deepest ring of steps in flight.
pub const MAX_RING: usize = 8;
/// Most channels (queue pairs) per peer.
pub const MAX_CHANNELS: usize = 16;
/// Staging slots: twice the ring, because a slot outlives its step until a CQE covers it.
pub const MAX_STAGING_SLOTS: usize = 2 * MAX_RING;
/// 64-bit words of a rank bit set.
pub const RANK_WORDS: usize = MAX_RANKS / 64;
/// Operations with a sequence of their own: dispatch and combine.
pub const NUM_OPS: usize = 2;

/// Count in a signal word that says: this step's input from the writer is lost, do not wait for it.
pub const COUNT_LOST: u32 = u32::MAX;
/// Owner of a pick that the caller masked (-1).
pub const NO_OWNER: u16 = u16::MAX;
/// `pick_owner` of a pick that was not dispatched although it was not masked: lost.
pub const LOST_OWNER: u16 = u16::MAX - 1;
/// Entry of [`MemberTable::owner_of`] for an expert that is placed nowhere.
pub const UNPLACED: u32 = u32::MAX;

/// Numbers of the enumerations that kernels read, spelled as in the C++ twin.
pub mod code {
    /// Operation indices.
    pub const DISPATCH: u32 = 0;
    /// See [`DISPATCH`].
    pub const COMBINE: u32 = 1;
    /// Bits of `halves`.
    pub const SEND_HALF: u32 = 1;
    /// See [`SEND_HALF`].
    pub const RECEIVE_HALF: u32 = 2;
    /// Wire dtypes of a dispatch.
    pub const WIRE_BF16: u32 = 0;
    /// See [`WIRE_BF16`].
    pub const WIRE_FP8: u32 = 1;
    /// Scale kinds.
    pub const SCALE_F32: u32 = 0;
    /// See [`SCALE_F32`].
    pub const SCALE_POW2: u32 = 1;
    /// See [`SCALE_F32`].
    pub const SCALE_UE8M0: u32 = 2;
    /// Combine modes.
    pub const COMBINE_EXACT: u32 = 0;
    /// See [`COMBINE_EXACT`].
    pub const COMBINE_REDUCED: u32 = 1;
    /// Signal modes.
    pub const SIGNAL_WRITE: u32 = 0;
    /// See [`SIGNAL_WRITE`].
    pub const SIGNAL_FETCH_ADD: u32 = 1;
    /// Routes.
    pub const ROUTE_LOCAL: u32 = 0;
    /// See [`ROUTE_LOCAL`].
    pub const ROUTE_MAPPED: u32 = 1;
    /// See [`ROUTE_LOCAL`].
    pub const ROUTE_IBGDA: u32 = 2;
    /// States of a QP slot as kernels see it; only an active one may be posted to.
    pub const QP_MASKED: u32 = 0;
    /// See [`QP_MASKED`].
    pub const QP_ACTIVE: u32 = 1;
    /// See [`QP_MASKED`].
    pub const QP_FENCED: u32 = 2;
    /// Kinds of a [`super::DeviceFault`]: no sign of life.
    pub const FAULT_SILENT: u32 = 1;
    /// Alive, past the half we wait for, and still nothing.
    pub const FAULT_STALLED: u32 = 2;
    /// The hard cap of one half.
    pub const FAULT_CAP: u32 = 3;
    /// Error CQE.
    pub const FAULT_COMPLETION: u32 = 4;
    /// The peer said LOST, or skipped the step.
    pub const FAULT_REPORTED: u32 = 5;
    /// A header or count that contradicts the protocol.
    pub const FAULT_VIOLATION: u32 = 6;
    /// Source rows could not be reused.
    pub const FAULT_SOURCE_ROWS: u32 = 7;
    /// Kernels.
    pub const KERNEL_DISPATCH: u32 = 0;
    /// See [`KERNEL_DISPATCH`].
    pub const KERNEL_COMBINE: u32 = 1;
    /// See [`KERNEL_DISPATCH`].
    pub const KERNEL_POST: u32 = 2;
    /// See [`KERNEL_DISPATCH`].
    pub const KERNEL_EXPERT: u32 = 3;
    /// See [`KERNEL_DISPATCH`].
    pub const KERNEL_SELFTEST: u32 = 4;
}

/// Defines a structure together with the table of its field offsets, which the parity test reads.
macro_rules! device_struct {
    ($(#[doc = $doc:literal])* #[repr($($repr:tt)*)] pub struct $name:ident {
        $($(#[doc = $fdoc:literal])* pub $field:ident: $ty:ty,)*
    }) => {
        $(#[doc = $doc])*
        #[repr($($repr)*)]
        #[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
        pub struct $name {
            $($(#[doc = $fdoc])* pub $field: $ty,)*
        }

        impl $name {
            /// Name and byte offset of every field, in order.
            pub const FIELDS: &'static [(&'static str, usize)] =
                &[$((stringify!($field), core::mem::offset_of!($name, $field)),)*];
        }

        impl Default for $name {
            fn default() -> Self {
                Self::new_zeroed()
            }
        }
    };
}

device_struct! {
    /// Capacities and modes; the grid and every layout are sized by these.
    #[repr(C)]
    pub struct Shape {
        /// Num ranks.
        pub num_ranks: u32,
        /// Rank.
        pub rank: u32,
        /// Hidden in elements.
        pub max_tokens: u32,
        /// Hidden in elements.
        pub hidden: u32,
        /// Max topk.
        pub max_topk: u32,
        /// Max experts.
        pub max_experts: u32,
        /// Max local experts.
        pub max_local_experts: u32,
        /// Num channels.
        pub num_channels: u32,
        /// Ring slots N; messages per channel = ceil(max_tokens / num_channels).
        pub ring: u32,
        /// Ring slots N; messages per channel = ceil(max_tokens / num_channels).
        pub channel_tokens: u32,
        /// Num owner warps.
        pub num_owner_warps: u32,
        /// Signal mode.
        pub signal_mode: u32,
        /// Wire dtype.
        pub wire_dtype: u32,
        /// Scale kind.
        pub scale_kind: u32,
        /// Staging_rows: rows in the combine staging ring of one QP.
        pub combine_mode: u32,
        /// Staging_rows: rows in the combine staging ring of one QP.
        pub staging_rows: u32,
    }
}

device_struct! {
    /// Byte plan of one source's region at a receiver, of a message, and of the combine slab. All multiples of 16.
    ///
    ///   region  | messages: ring x num_channels x channel_tokens x message_stride
    ///           | counts: ring x max_local_experts x u32
    ///           | signals: op x ring x num_channels x u64 | consumed: op x ring x u64 | life: 8 x u64 |
    ///   message | MessageHeader 16 | max_topk x Pick 16 | payload | scales |
    #[repr(C)]
    pub struct Layout {
        /// Payload off.
        pub payload_off: u32,
        /// Payload bytes.
        pub payload_bytes: u32,
        /// Scale off.
        pub scale_off: u32,
        /// Scale bytes.
        pub scale_bytes: u32,
        /// Row_bytes: one bf16 row of hidden elements (combine).
        pub message_stride: u32,
        /// Row_bytes: one bf16 row of hidden elements (combine).
        pub row_bytes: u32,
        /// Counts off.
        pub counts_off: u64,
        /// Signals off.
        pub signals_off: u64,
        /// Consumed off.
        pub consumed_off: u64,
        /// Life off.
        pub life_off: u64,
        /// Region bytes.
        pub region_bytes: u64,
        /// Combine slot bytes.
        pub combine_slot_bytes: u64,
    }
}

device_struct! {
    /// One pick of a token as it travels: 16 bytes, so that a lane reads it in one load.
    #[repr(C)]
    pub struct Pick {
        /// Owner: the rank that serves it, or kNoOwner.
        pub expert: u16,
        /// Owner: the rank that serves it, or kNoOwner.
        pub owner: u16,
        /// Index: how many earlier tokens of this source pick that expert.
        pub local_expert: u16,
        /// Index: how many earlier tokens of this source pick that expert.
        pub index: u16,
        /// Flags: bit 0 = first pick of this token at this owner.
        pub k: u8,
        /// Flags: bit 0 = first pick of this token at this owner.
        pub flags: u8,
        /// Zero.
        pub reserved: u16,
        /// Weight.
        pub weight: f32,
    }
}

device_struct! {
    /// See the C++ twin `MessageHeader`.
    #[repr(C)]
    pub struct MessageHeader {
        /// Token.
        pub token: u32,
        /// Generation.
        pub generation: u32,
        /// Placement version.
        pub placement_version: u32,
        /// Source.
        pub source: u16,
        /// Num picks.
        pub num_picks: u8,
        /// Zero.
        pub reserved: u8,
    }
}

device_struct! {
    /// A queue pair as kernels see it; its address never changes, what it names may (recreation in place).
    #[repr(C, align(64))]
    pub struct QpDeviceCtx {
        /// Address of the WQE ring.
        pub sq: u64,
        /// Address of the SND counter (4 bytes, big-endian).
        pub doorbell_record: u64,
        /// Address of the doorbell register (8 bytes).
        pub doorbell: u64,
        /// Address of the one CQE of the collapsed CQ.
        pub cqe: u64,
        /// WQEBBs in the ring - 1.
        pub sq_mask: u32,
        /// Big-endian qpn << 8: a WQE adds its ds.
        pub qpn_be: u32,
        /// QpCtxState.
        pub state: u32,
        /// Counts recreations.
        pub incarnation: u32,
        /// Peer.
        pub peer: u32,
        /// Channel.
        pub channel: u32,
        /// Zero.
        pub reserved0: u64,
        /// WQEBBs, monotonic; consumer_idx is the cached one.
        pub producer_idx: u32,
        /// WQEBBs, monotonic; consumer_idx is the cached one.
        pub consumer_idx: u32,
        /// Last error syndrome seen, 0 = none.
        pub syndrome: u32,
        /// Bit s: staging_pi\[s\] stands.
        pub staged_valid: u32,
        /// Producer_idx after the last WQE that names rows of that staging slot.
        pub staging_pi: [u32; MAX_STAGING_SLOTS],
        /// Fetch-add mode: value our adds have produced at the peer.
        pub signal_last: [[u64; MAX_RING]; NUM_OPS],
        /// Combine staging ring: rows taken so far.
        pub ring_head: u64,
        /// Combine staging ring: rows taken so far.
        pub reserved1: u64,
        /// Zero.
        pub reserved2: [u64; 4],
    }
}

device_struct! {
    /// Where one peer lives. One entry per (lane, peer).
    #[repr(C, align(64))]
    pub struct PeerCtx {
        /// Our region and the combine slab there, as WQEs address them.
        pub region_va: u64,
        /// Our region and the combine slab there, as WQEs address them.
        pub combine_va: u64,
        /// The same, mapped into our address space; 0 = not mapped.
        pub region_ptr: u64,
        /// The same, mapped into our address space; 0 = not mapped.
        pub combine_ptr: u64,
        /// Region rkey be.
        pub region_rkey_be: u32,
        /// Combine rkey be.
        pub combine_rkey_be: u32,
        /// Route.
        pub route: u32,
        /// Zero.
        pub reserved: u32,
        /// The local region that this peer writes into.
        pub my_region: u64,
        /// Zero.
        pub reserved1: u64,
        /// Sequence numbers below this one need no credit.
        pub base_seq: [u64; NUM_OPS],
        /// Kernel (owner of channel 0): last consumed word posted.
        pub posted_credit: [[u64; MAX_RING]; NUM_OPS],
        /// Zero.
        pub reserved2: [u64; 6],
    }
}

device_struct! {
    /// Sign of life and progress of a peer; written by the peer's host into our region of it, each word by itself.
    #[repr(C)]
    pub struct LifeWords {
        /// Beat.
        pub beat: u64,
        /// Last send half finished, per op.
        pub sent: [u64; NUM_OPS],
        /// Every step up to this one is consumed and its credit posted, per op.
        pub credited: [u64; NUM_OPS],
        /// The peer's suspicion bits, ranks 0..63 (telemetry).
        pub suspects: u64,
        /// Zero.
        pub reserved: [u64; 2],
    }
}

device_struct! {
    /// Members and expert placement. Two exist; sequence s uses the newer one iff s >= its from_seq.
    #[repr(C, align(64))]
    pub struct MemberTable {
        /// Epoch.
        pub epoch: u32,
        /// Placement version.
        pub placement_version: u32,
        /// Num experts.
        pub num_experts: u32,
        /// Zero.
        pub reserved: u32,
        /// From seq.
        pub from_seq: [u64; NUM_OPS],
        /// Const uint32_t\[max_experts\]: rank << 16 | local expert, replicas already chosen.
        pub owner_of: u64,
        /// Zero.
        pub reserved1: [u64; 3],
        /// 1 = alive.
        pub alive: [u64; RANK_WORDS],
    }
}

device_struct! {
    /// Time limits in nanoseconds; the host may change them at any time.
    #[repr(C)]
    pub struct Limits {
        /// Detect ns.
        pub detect_ns: u64,
        /// Stall ns.
        pub stall_ns: u64,
        /// Cap ns.
        pub cap_ns: u64,
        /// Polls per cq read.
        pub polls_per_cq_read: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// Kernel state of one lane in device memory. Zeroed once by the host; `next` starts at 1.
    #[repr(C, align(64))]
    pub struct LaneState {
        /// Next sequence number to draw.
        pub next: [u64; NUM_OPS],
        /// Contiguous consumed-and-posted steps.
        pub credited: [u64; NUM_OPS],
        /// Nonce + 1 of the send half that runs, 0 = none.
        pub busy: u64,
        /// Staging slots handed out so far.
        pub staging_seq: u64,
        /// Last consumed sequence number per slot; receive halves write it.
        pub pending: [[u64; MAX_RING]; NUM_OPS],
        /// Snapshot of `pending` that the running send half posts.
        pub posting: [[u64; MAX_RING]; NUM_OPS],
        /// Zero.
        pub reserved: [u64; 2],
    }
}

device_struct! {
    /// Words in pinned host memory that the host reads without stopping a kernel.
    #[repr(C, align(64))]
    pub struct LaneHostWords {
        /// Halves; a Dekker pair with the Fenced mark of a QP slot.
        pub entered: u64,
        /// Halves; a Dekker pair with the Fenced mark of a QP slot.
        pub left: u64,
        /// Sent.
        pub sent: [u64; NUM_OPS],
        /// Credited.
        pub credited: [u64; NUM_OPS],
        /// Overlapping send halves that were refused.
        pub lane_busy: u64,
        /// Zero.
        pub reserved: u64,
    }
}

device_struct! {
    /// First fault of a peer since the host cleared it (pinned memory, first writer wins).
    #[repr(C, align(64))]
    pub struct DeviceFault {
        /// Claimed.
        pub claimed: u32,
        /// Kind.
        pub kind: u32,
        /// Peer.
        pub peer: u32,
        /// Qp slot.
        pub qp_slot: u32,
        /// Op.
        pub op: u32,
        /// Half.
        pub half: u32,
        /// Syndrome.
        pub syndrome: u32,
        /// Vendor syndrome.
        pub vendor_syndrome: u32,
        /// Seq.
        pub seq: u64,
        /// Waited ns.
        pub waited_ns: u64,
        /// Published: 1 once all other fields stand.
        pub wqe_counter: u32,
        /// Published: 1 once all other fields stand.
        pub published: u32,
        /// Detail.
        pub detail: u64,
    }
}

device_struct! {
    /// Counters of one (lane, peer), pinned; kernels add, the host only reads.
    #[repr(C, align(64))]
    pub struct PeerTelemetry {
        /// Send wait ns.
        pub send_wait_ns: u64,
        /// Receive wait ns.
        pub receive_wait_ns: u64,
        /// Wqes.
        pub wqes: u64,
        /// Doorbells.
        pub doorbells: u64,
        /// Cqes.
        pub cqes: u64,
        /// Bytes local.
        pub bytes_local: u64,
        /// Bytes mapped.
        pub bytes_mapped: u64,
        /// Bytes rdma.
        pub bytes_rdma: u64,
        /// Steps lost.
        pub steps_lost: u64,
        /// Credits.
        pub credits: u64,
        /// Sq full.
        pub sq_full: u64,
        /// Ring full.
        pub ring_full: u64,
        /// Sq high water.
        pub sq_high_water: u64,
        /// Zero.
        pub reserved: [u64; 3],
    }
}

device_struct! {
    /// One dispatch (a handle) or one combine (a ticket). Kernel-written but for the zeroing at start.
    #[repr(C, align(64))]
    pub struct HandleCtx {
        /// Seq.
        pub seq: u64,
        /// Slot.
        pub slot: u32,
        /// Epoch.
        pub epoch: u32,
        /// Table idx.
        pub table_idx: u32,
        /// Placement version.
        pub placement_version: u32,
        /// Staging slot.
        pub staging_slot: u32,
        /// Num tokens.
        pub num_tokens: u32,
        /// Num topk.
        pub num_topk: u32,
        /// Flags.
        pub flags: u32,
        /// {nonce:32 | go code:32} while a half runs, else 0; see half.h.
        pub go_send: u64,
        /// {nonce:32 | go code:32} while a half runs, else 0; see half.h.
        pub go_receive: u64,
        /// Send done blocks.
        pub send_done_blocks: u32,
        /// Receive done blocks.
        pub receive_done_blocks: u32,
        /// Peers whose picks of this step are lost.
        pub lost: [u64; RANK_WORDS],
        /// Zero.
        pub reserved: [u64; 8],
    }
}

device_struct! {
    /// How long one wait for one peer has gone on; see wait.h.
    #[repr(C)]
    pub struct WaitClock {
        /// Started ns.
        pub started_ns: u64,
        /// Last poll ns.
        pub last_poll_ns: u64,
        /// Time without a sign of life; time after the peer passed what we wait for.
        pub silent_ns: u64,
        /// Time without a sign of life; time after the peer passed what we wait for.
        pub stalled_ns: u64,
        /// The peer's beat when it last changed.
        pub beat: u64,
        /// Polls.
        pub polls: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// Progress of one QP inside one send half; only its owner warp touches it, and only during that half.
    #[repr(C, align(64))]
    pub struct SendCursor {
        /// Next: position in the list of what may have to be sent.
        pub phase: u32,
        /// Next: position in the list of what may have to be sent.
        pub next: u32,
        /// Sent so far.
        pub num_messages: u32,
        /// Sent so far.
        pub num_picks: u32,
        /// Clock.
        pub clock: WaitClock,
    }
}

device_struct! {
    /// Where a packed row came from; one per packed row.
    #[repr(C)]
    pub struct SourceInfo {
        /// Token.
        pub token: u32,
        /// Source.
        pub source: u16,
        /// K.
        pub k: u8,
        /// Flags.
        pub flags: u8,
        /// Weight.
        pub weight: f32,
        /// Channel * channel_tokens + message in channel.
        pub message: u32,
    }
}

device_struct! {
    /// The packed rows of one source rank for one local expert.
    #[repr(C)]
    pub struct LayoutRange {
        /// First packed row, number of rows.
        pub begin: u32,
        /// First packed row, number of rows.
        pub len: u32,
    }
}

device_struct! {
    /// What every half of a lane needs. Pointers are device addresses.
    #[repr(C)]
    pub struct LaneArgs {
        /// Shape.
        pub shape: Shape,
        /// Layout.
        pub layout: Layout,
        /// \[num_ranks\]\[num_channels\].
        pub qps: u64,
        /// \[num_ranks\].
        pub peers: u64,
        /// \[num_ranks\], sticky; kernels set, the host clears.
        pub suspects: u64,
        /// \[2\], oldest first.
        pub tables: u64,
        /// State.
        pub state: u64,
        /// \[num_ranks\]\[num_channels\].
        pub cursors: u64,
        /// Limits.
        pub limits: u64,
        /// Host words.
        pub host_words: u64,
        /// \[num_ranks\].
        pub faults: u64,
        /// \[num_ranks\].
        pub telemetry: u64,
        /// Ring x max_tokens x max_topk x row_bytes.
        pub combine_slab: u64,
        /// 2 x ring x max_tokens x message_stride.
        pub staging: u64,
        /// \[2 x ring\]\[max_tokens\]: generation whose row stands there.
        pub staging_ready: u64,
        /// \[2 x ring\]\[num_ranks\]\[max_local_experts\].
        pub counts_staging: u64,
        /// \[num_ranks\]\[num_channels\]\[staging_rows\]\[row_bytes\].
        pub row_staging: u64,
        /// \[num_ranks\]\[num_channels\]\[staging_rows\].
        pub row_staging_pi: u64,
        /// \[num_ranks\]\[num_channels\]: where FETCH_ADD returns the old value.
        pub atomic_result: u64,
        /// Of everything above that a WQE may name.
        pub lkey_be: u32,
        /// Lane.
        pub lane: u32,
        /// Qp slot base.
        pub qp_slot_base: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// The arrays behind one dispatch handle, in device memory.
    #[repr(C)]
    pub struct HandleArrays {
        /// Ctx.
        pub ctx: u64,
        /// \[max_tokens\]\[max_topk\].
        pub pick_owner: u64,
        /// \[num_ranks\]\[num_channels\].
        pub sent_picks: u64,
        /// \[num_ranks\]\[num_channels\].
        pub sent_messages: u64,
        /// \[num_ranks\]\[num_channels\]: {generation:32 | count:32}.
        pub verdicts: u64,
        /// \[num_ranks\]: generation.
        pub ranges_ready: u64,
        /// \[max_local_experts\]; zero outside a receive half.
        pub pack_cursor: u64,
        /// \[max_local_experts\]\[num_ranks\].
        pub ranges: u64,
        /// \[num_ranks\]\[num_channels x channel_tokens\]\[16 + 16 x max_topk\].
        pub headers: u64,
        /// \[num_ranks\].
        pub source_ok: u64,
    }
}

device_struct! {
    /// See the C++ twin `DispatchArgs`.
    #[repr(C)]
    pub struct DispatchArgs {
        /// Lane.
        pub lane: LaneArgs,
        /// Handle.
        pub handle: HandleArrays,
        /// \[max_tokens\]\[hidden\] bf16.
        pub x: u64,
        /// \[max_tokens\]\[num_topk\] int32 or int64, -1 = masked.
        pub topk_idx: u64,
        /// \[max_tokens\]\[num_topk\] or null.
        pub topk_weights: u64,
        /// Device memory: a replay may change it.
        pub num_tokens: u64,
        /// \[max_local_experts\]\[num_ranks x max_tokens\]\[payload\].
        pub packed_x: u64,
        /// \[max_local_experts\] x scale_expert_stride, or null.
        pub packed_scales: u64,
        /// \[max_local_experts\]\[num_ranks x max_tokens\].
        pub source_info: u64,
        /// \[max_local_experts\].
        pub expert_counts: u64,
        /// \[max_local_experts\]\[num_ranks\].
        pub layout_ranges: u64,
        /// \[num_ranks\]: 1 = all of that source's tokens stand in the packed rows.
        pub source_ok: u64,
        /// Bytes.
        pub scale_expert_stride: u64,
        /// Bytes.
        pub scale_row_stride: u64,
        /// Bytes.
        pub scale_block_stride: u64,
        /// Num topk.
        pub num_topk: u32,
        /// Topk is i64.
        pub topk_is_i64: u32,
        /// Halves.
        pub halves: u32,
        /// Nonce.
        pub nonce: u32,
    }
}

device_struct! {
    /// See the C++ twin `CombineArgs`.
    #[repr(C)]
    pub struct CombineArgs {
        /// Lane.
        pub lane: LaneArgs,
        /// Of the dispatch this combine answers.
        pub handle: HandleArrays,
        /// Of this combine.
        pub ticket: u64,
        /// Of this combine: \[num_ranks\]\[num_channels\].
        pub verdicts: u64,
        /// \[max_local_experts\]\[num_ranks x max_tokens\]\[hidden\] bf16.
        pub expert_out: u64,
        /// \[max_tokens\]\[num_topk\].
        pub topk_weights: u64,
        /// \[max_tokens\]\[hidden\] bf16.
        pub out: u64,
        /// \[max_tokens\]: bit k = "w\[t,k\] * y was not summed".
        pub lost_topk: u64,
        /// Expert out lkey be.
        pub expert_out_lkey_be: u32,
        /// Zero copy.
        pub zero_copy: u32,
        /// Halves.
        pub halves: u32,
        /// Nonce.
        pub nonce: u32,
    }
}

device_struct! {
    /// The post microbenchmark: every warp posts to its own QPs.
    #[repr(C)]
    pub struct PostArgs {
        /// \[num_qps\].
        pub qps: u64,
        /// \[num_qps\].
        pub peers: u64,
        /// Address of the payload.
        pub source: u64,
        /// Bytes between two messages.
        pub source_stride: u64,
        /// Bytes between two messages.
        pub target_stride: u64,
        /// Timeout ns.
        pub timeout_ns: u64,
        /// \[num_qps\]: WQEs completed.
        pub result: u64,
        /// Num qps.
        pub num_qps: u32,
        /// Wqes per qp.
        pub wqes_per_qp: u32,
        /// Bytes.
        pub bytes: u32,
        /// Inline data.
        pub inline_data: u32,
        /// Batch.
        pub batch: u32,
        /// Lkey be.
        pub lkey_be: u32,
        /// Target slots.
        pub target_slots: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// The stand-in expert of benches and tests: y = bf16(x * (1 + 0.1 * expert)), from packed rows to expert_out.
    #[repr(C)]
    pub struct ExpertArgs {
        /// As DispatchArgs.
        pub packed_x: u64,
        /// Packed scales.
        pub packed_scales: u64,
        /// Layout ranges.
        pub layout_ranges: u64,
        /// \[max_local_experts\]: global expert of each local one.
        pub expert_ids: u64,
        /// \[max_local_experts\]\[num_ranks x max_tokens\]\[hidden\] bf16.
        pub expert_out: u64,
        /// Scale expert stride.
        pub scale_expert_stride: u64,
        /// Scale row stride.
        pub scale_row_stride: u64,
        /// Scale block stride.
        pub scale_block_stride: u64,
        /// Num ranks.
        pub num_ranks: u32,
        /// Max tokens.
        pub max_tokens: u32,
        /// Hidden.
        pub hidden: u32,
        /// Max local experts.
        pub max_local_experts: u32,
        /// Wire dtype.
        pub wire_dtype: u32,
        /// Scale kind.
        pub scale_kind: u32,
    }
}

/// Size and field offsets of every structure, under the C++ names; what the parity test compares.
pub fn layout_table() -> Vec<(String, usize)> {
    let mut table = Vec::new();
    macro_rules! add {
        ($($name:ident),* $(,)?) => {$(
            table.push((stringify!($name).to_owned(), size_of::<$name>()));
            for (field, offset) in $name::FIELDS {
                table.push((format!("{}.{field}", stringify!($name)), *offset));
            }
        )*};
    }
    add!(
        Shape,
        Layout,
        Pick,
        MessageHeader,
        QpDeviceCtx,
        PeerCtx,
        LifeWords,
        MemberTable,
        Limits,
        LaneState,
        LaneHostWords,
        DeviceFault,
        PeerTelemetry,
        HandleCtx,
        WaitClock,
        SendCursor,
        SourceInfo,
        LayoutRange,
        LaneArgs,
        HandleArrays,
        DispatchArgs,
        CombineArgs,
        PostArgs,
        ExpertArgs,
    );
    table
}
