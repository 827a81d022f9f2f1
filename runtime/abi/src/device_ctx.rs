//! Everything the host and the kernels agree on in memory: capacities, layouts, contexts, handles, arguments.
//!
//! The host allocates all of it, and fills what is not said to be a kernel's. Little-endian, because the GPU
//! is; big-endian only where a field name says `_be`. Pointers are device addresses as `u64`. The C++ twin is
//! `kernels/include/ibex/args.h`; `tests/device_abi.rs` compares every size and offset of both sides.
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
/// Places that one ring slot of the combine slab may have: one, and spare ones.
pub const MAX_PLACES: usize = 4;
/// A place in the combine slab that is none: nobody may send rows for that step.
pub const NOWHERE: u32 = 0xff;
/// Sequence numbers stay below this: a consumed word holds a place above them.
pub const SEQ_END: u64 = 1 << 56;
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

pub mod code;

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
        /// Ranks in the group, 1 to [`MAX_RANKS`].
        pub num_ranks: u32,
        /// This rank.
        pub rank: u32,
        /// Most tokens that one rank brings to a step.
        pub max_tokens: u32,
        /// Width of a token, in elements.
        pub hidden: u32,
        /// Most picks of one token, 1 to [`MAX_TOPK`].
        pub max_topk: u32,
        /// Experts of the group, and length of `MemberTable::owner_of`.
        pub max_experts: u32,
        /// Most experts that one rank serves.
        pub max_local_experts: u32,
        /// Queue pairs per peer; token t travels on channel t mod this.
        pub num_channels: u32,
        /// Ring slots N: steps of one operation that may be in flight.
        pub ring: u32,
        /// Messages that one channel carries in one step: ceil(max_tokens / num_channels).
        pub channel_tokens: u32,
        /// Warps that post in a dispatch; queue pair q belongs to owner q mod this.
        pub num_owner_warps: u32,
        /// How signal words are written: a `code::SIGNAL_*`.
        pub signal_mode: u32,
        /// Element type of a dispatched payload: a `code::WIRE_*`.
        pub wire_dtype: u32,
        /// How fp8 scales are stored: a `code::SCALE_*`; unused for bf16.
        pub scale_kind: u32,
        /// What experts send back: a `code::COMBINE_*`.
        pub combine_mode: u32,
        /// Rows in the combine staging ring of one queue pair.
        pub staging_rows: u32,
        /// Places of one ring slot in the combine slab, 1 to [`MAX_PLACES`].
        pub num_places: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// Byte plan of a source's region at a receiver, of a message, of the combine slab. All multiples of 16.
    ///
    /// ```text
    /// region  | messages: ring x num_channels x channel_tokens x message_stride
    ///         | counts: ring x max_local_experts x u32
    ///         | signals: op x ring x num_channels x u64 | consumed: op x ring x u64 | life: 8 x u64 |
    /// message | MessageHeader 16 | max_topk x Pick 16 | payload | scales |
    /// ```
    #[repr(C)]
    pub struct Layout {
        /// Offset of the payload in a message; also the bytes of a kept header.
        pub payload_off: u32,
        /// Bytes of one payload: hidden x 2 (bf16) or hidden x 1 (fp8).
        pub payload_bytes: u32,
        /// Offset of the scales in a message.
        pub scale_off: u32,
        /// Bytes of the scales of one message, rounded up to 16; 0 for bf16.
        pub scale_bytes: u32,
        /// Bytes between two messages.
        pub message_stride: u32,
        /// Bytes of one combine row: hidden bf16 elements.
        pub row_bytes: u32,
        /// Offset of the per-expert counts in a region.
        pub counts_off: u64,
        /// Offset of the signal words in a region.
        pub signals_off: u64,
        /// Offset of the consumed words (credits) in a region.
        pub consumed_off: u64,
        /// Offset of [`LifeWords`] in a region.
        pub life_off: u64,
        /// Bytes of one region, whole pages.
        pub region_bytes: u64,
        /// Bytes of one ring slot of the combine slab: max_tokens x max_topk rows.
        pub combine_slot_bytes: u64,
    }
}

device_struct! {
    /// One pick of a token as it travels: 16 bytes, so that a lane reads it in one load.
    #[repr(C)]
    pub struct Pick {
        /// Global expert index.
        pub expert: u16,
        /// The rank that serves it, [`NO_OWNER`] if masked, [`LOST_OWNER`] if nobody does.
        pub owner: u16,
        /// Index of the expert at its owner.
        pub local_expert: u16,
        /// How many earlier tokens of this source pick that expert: the row within its layout range.
        pub index: u16,
        /// Position among the token's picks.
        pub k: u8,
        /// Bit 0: first pick of its token at this owner. Bit 1: repeats an earlier pick and shares its row.
        pub flags: u8,
        /// Zero.
        pub reserved: u16,
        /// Router weight; 0 if the dispatch carried none.
        pub weight: f32,
    }
}

device_struct! {
    /// The fixed part of a message; [`Pick`]s, payload and scales follow as in [`Layout`].
    #[repr(C)]
    pub struct MessageHeader {
        /// Index of the token at its source.
        pub token: u32,
        /// Generation of the step, as in its signal words.
        pub generation: u32,
        /// Expert placement by which the sender chose owners; another one here is a violation.
        pub placement_version: u32,
        /// The rank that sent it.
        pub source: u16,
        /// Picks that follow: the call's top-k.
        pub num_picks: u8,
        /// Zero.
        pub reserved: u8,
    }
}

device_struct! {
    /// A queue pair as kernels see it; its address never changes, what it names may (recreation in place).
    #[repr(C, align(64))]
    pub struct QpDeviceCtx {
        /// Address of the send ring, `sq_mask + 1` WQEBBs of 64 bytes.
        pub sq: u64,
        /// Address of the send counter of the doorbell record (4 bytes, big-endian).
        pub doorbell_record: u64,
        /// Address of the doorbell register (8 bytes).
        pub doorbell: u64,
        /// Address of the one CQE of the collapsed completion queue.
        pub cqe: u64,
        /// WQEBBs in the ring - 1.
        pub sq_mask: u32,
        /// Big-endian qpn << 8: a WQE adds its ds.
        pub qpn_be: u32,
        /// A `code::QP_*`; only an active queue pair is posted to.
        pub state: u32,
        /// How often a queue pair was made in this slot.
        pub incarnation: u32,
        /// The rank at the other end.
        pub peer: u32,
        /// Which of the queue pairs to that peer.
        pub channel: u32,
        /// Zero.
        pub reserved0: u64,
        /// WQEBBs ever posted; monotonic, written by the owner warp only.
        pub producer_idx: u32,
        /// WQEBBs known to be completed; cached, monotonic.
        pub consumer_idx: u32,
        /// Last error syndrome seen, 0 = none.
        pub syndrome: u32,
        /// Bit s: `staging_pi[s]` stands.
        pub staged_valid: u32,
        /// `producer_idx` after the last WQE that names rows of that staging slot.
        pub staging_pi: [u32; MAX_STAGING_SLOTS],
        /// Fetch-add mode: the value that our adds have produced at the peer, per operation and ring slot.
        pub signal_last: [[u64; MAX_RING]; NUM_OPS],
        /// Next row of the combine staging ring.
        pub ring_head: u64,
        /// Zero.
        pub reserved1: u64,
        /// Producer index up to which WQEs have been added to the telemetry.
        pub counted_idx: u32,
        /// Doorbells rung and not yet added to the telemetry.
        pub doorbells: u32,
        /// CQEs seen and not yet added to the telemetry.
        pub cqes: u32,
        /// Most WQEBBs in flight when a doorbell was rung, by the cached consumer index.
        pub in_flight_max: u32,
        /// Zero.
        pub reserved3: [u64; 2],
    }
}

device_struct! {
    /// Where one peer lives. One entry per (lane, peer).
    #[repr(C, align(64))]
    pub struct PeerCtx {
        /// Our region at the peer, as WQEs address it.
        pub region_va: u64,
        /// The peer's combine slab, as WQEs address it.
        pub combine_va: u64,
        /// Our region at the peer, mapped into our address space; 0 = not mapped.
        pub region_ptr: u64,
        /// The peer's combine slab, mapped into our address space; 0 = not mapped.
        pub combine_ptr: u64,
        /// Key to our region there, big-endian.
        pub region_rkey_be: u32,
        /// Our key to its combine slab, big-endian.
        pub combine_rkey_be: u32,
        /// How the peer is reached: a `code::ROUTE_*`.
        pub route: u32,
        /// Zero.
        pub reserved: u32,
        /// Address of the local region that this peer writes into.
        pub my_region: u64,
        /// Zero.
        pub reserved1: u64,
        /// Per operation: the first sequence number of the pair. A dispatch owes it no older credit.
        pub base_seq: [u64; NUM_OPS],
        /// Last consumed word posted, per operation and ring slot; written by the owner of channel 0.
        pub posted_credit: [[u64; MAX_RING]; NUM_OPS],
        /// Zero.
        pub reserved2: [u64; 6],
    }
}

device_struct! {
    /// Sign of life and progress of a peer, written by its host into the region it has here, word by word.
    #[repr(C)]
    pub struct LifeWords {
        /// Counts signs of life; any change is one.
        pub beat: u64,
        /// Last send half finished, per operation.
        pub sent: [u64; NUM_OPS],
        /// Every step up to this one is consumed and its credit posted, per operation.
        pub credited: [u64; NUM_OPS],
        /// Bit p: the peer's kernels no longer wait for rank p.
        pub suspects: [u64; RANK_WORDS],
        /// Zero.
        pub reserved: [u64; 3],
    }
}

device_struct! {
    /// Members and expert placement. Two exist; the newer one is the one with the larger from_seq, and sequence s uses
    /// it iff s >= its from_seq.
    #[repr(C, align(64))]
    pub struct MemberTable {
        /// Membership version.
        pub epoch: u32,
        /// Version of `owner_of`; travels in every message header.
        pub placement_version: u32,
        /// Experts placed: valid entries of `owner_of`.
        pub num_experts: u32,
        /// Zero.
        pub reserved: u32,
        /// Per operation: the first sequence number that this table applies to.
        pub from_seq: [u64; NUM_OPS],
        /// Address of u32 `[max_experts]`: rank << 16 | local expert, or [`UNPLACED`].
        pub owner_of: u64,
        /// Zero.
        pub reserved1: [u64; 3],
        /// Bit per rank, 1 = alive.
        pub alive: [u64; RANK_WORDS],
    }
}

device_struct! {
    /// Time limits in nanoseconds; the host may change them at any time.
    #[repr(C)]
    pub struct Limits {
        /// Longest time without a sign of life.
        pub detect_ns: u64,
        /// Longest time that a live peer, past the half we wait for, may owe us what it produced.
        pub stall_ns: u64,
        /// Hard cap of any wait.
        pub cap_ns: u64,
        /// Polls of a wait between two looks at the peer's completion queues; 0 = never look.
        pub polls_per_cq_read: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// A place of the combine slab into which rows of an old step may still come.
    #[repr(C)]
    pub struct SoiledPlace {
        /// The step; 0 = the place is clean.
        pub seq: u64,
        /// Bit per rank: peers that it gave up.
        pub late: [u64; RANK_WORDS],
    }
}

device_struct! {
    /// Kernel state of one lane in device memory. Zeroed once by the host; `next` starts at 1.
    #[repr(C, align(64))]
    pub struct LaneState {
        /// Next sequence number to draw, per operation.
        pub next: [u64; NUM_OPS],
        /// Last step such that all up to it are consumed and their credits posted, per operation.
        pub credited: [u64; NUM_OPS],
        /// Nonce of the send half that runs, 0 = none.
        pub busy: u64,
        /// Staging slots handed out so far.
        pub staging_seq: u64,
        /// Last consumed word per slot, {place:8 | seq:56}; receive halves write it.
        pub pending: [[u64; MAX_RING]; NUM_OPS],
        /// Snapshot of `pending` that the running send half posts.
        pub posting: [[u64; MAX_RING]; NUM_OPS],
        /// Places of the combine slab, per slot; receive halves write them.
        pub places: [[SoiledPlace; MAX_PLACES]; MAX_RING],
        /// Zero.
        pub reserved: [u64; 2],
    }
}

device_struct! {
    /// Words in pinned host memory that the host reads without stopping a kernel.
    #[repr(C, align(64))]
    pub struct LaneHostWords {
        /// Halves that have entered; a Dekker pair with the fenced mark of a slot.
        pub entered: u64,
        /// Halves that have left; equal to `entered` when none runs.
        pub left: u64,
        /// Last send half finished, per operation; the host publishes it in [`LifeWords`].
        pub sent: [u64; NUM_OPS],
        /// As [`LaneState::credited`]; the host publishes it in [`LifeWords`].
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
        /// 1 once a writer has taken the record: the first one wins.
        pub claimed: u32,
        /// What happened: a `code::FAULT_*`.
        pub kind: u32,
        /// The rank it happened with.
        pub peer: u32,
        /// Slot of the queue pair involved; 0 where none is.
        pub qp_slot: u32,
        /// Operation of the half that found it: [`code::DISPATCH`] or [`code::COMBINE`].
        pub op: u32,
        /// The half that found it: [`code::SEND_HALF`] or [`code::RECEIVE_HALF`].
        pub half: u32,
        /// Syndrome of the error CQE; 0 without one.
        pub syndrome: u32,
        /// Vendor syndrome of the error CQE; 0 without one.
        pub vendor_syndrome: u32,
        /// Sequence number of the step.
        pub seq: u64,
        /// How long the finder had waited, in nanoseconds.
        pub waited_ns: u64,
        /// WQE counter of the error CQE; 0 without one.
        pub wqe_counter: u32,
        /// 1 once all other fields stand.
        pub published: u32,
        /// For a violation: {generation:32 | placement version:32} or {expected:32 | counted:32}.
        pub detail: u64,
    }
}

device_struct! {
    /// Counters of one (lane, peer), pinned; kernels add, the host only reads.
    #[repr(C, align(64))]
    pub struct PeerTelemetry {
        /// Time that queue pairs of send halves waited for this peer before they gave it up, in nanoseconds.
        pub send_wait_ns: u64,
        /// Time that warps of receive halves waited for this peer, in nanoseconds, summed over warps.
        pub receive_wait_ns: u64,
        /// WQEs posted to this peer.
        pub wqes: u64,
        /// Doorbells rung for them.
        pub doorbells: u64,
        /// CQEs seen; the device may have overwritten others in between.
        pub cqes: u64,
        /// Bytes of messages and rows copied to ourselves.
        pub bytes_local: u64,
        /// Bytes of messages and rows copied into mapped memory of the peer.
        pub bytes_mapped: u64,
        /// Bytes of messages and rows posted as RDMA writes.
        pub bytes_rdma: u64,
        /// Halves that lost this peer, counted per channel where a sender says so.
        pub steps_lost: u64,
        /// Consumed words posted.
        pub credits: u64,
        /// Waits of send halves for room in a send queue.
        pub sq_full: u64,
        /// Waits of send halves for a row of a combine's staging ring.
        pub ring_full: u64,
        /// Most WQEBBs in flight on one queue pair when a doorbell was rung, as far as the kernel knew.
        pub sq_high_water: u64,
        /// Dispatches that had to wait because a queue to this peer still named rows of the next staging slot; counted
        /// per queue.
        pub staging_full: u64,
        /// Zero.
        pub reserved: [u64; 2],
    }
}

device_struct! {
    /// One dispatch (a handle) or one combine (a ticket). Kernel-written but for the zeroing at start.
    #[repr(C, align(64))]
    pub struct HandleCtx {
        /// Sequence number drawn by the send half.
        pub seq: u64,
        /// Ring slot: seq mod N.
        pub slot: u32,
        /// Epoch of the member table in use.
        pub epoch: u32,
        /// Which of the two member tables; a combine uses the one of its dispatch.
        pub table_idx: u32,
        /// Placement version of that table.
        pub placement_version: u32,
        /// Staging slot that holds the rows of this step; 0 in a ticket.
        pub staging_slot: u32,
        /// Tokens of this step, as read from device memory when the send half entered.
        pub num_tokens: u32,
        /// Picks per token of this step.
        pub num_topk: u32,
        /// Bit 0: some token picks one expert twice. Bit 1, of a combine: it has given up somebody whose rows may come.
        pub flags: u32,
        /// {nonce:32 | go code:32} while a send half runs, else 0; see half.h.
        pub go_send: u64,
        /// {nonce:32 | go code:32} while a receive half runs, else 0; see half.h.
        pub go_receive: u64,
        /// Blocks that have left the running send half.
        pub send_done_blocks: u32,
        /// Blocks that have left the running receive half.
        pub receive_done_blocks: u32,
        /// Bit per rank: its picks of this step are lost; of a combine: it was given up.
        pub lost: [u64; RANK_WORDS],
        /// Of a combine: where in the slab its rows come, or [`NOWHERE`].
        pub place: u32,
        /// Zero.
        pub reserved0: u32,
        /// Zero.
        pub reserved: [u64; 7],
    }
}

device_struct! {
    /// How long one wait for one peer has gone on; see wait.h.
    #[repr(C)]
    pub struct WaitClock {
        /// When the wait began, on the kernel clock.
        pub started_ns: u64,
        /// When it was last looked at.
        pub last_poll_ns: u64,
        /// Time without a sign of life, in nanoseconds.
        pub silent_ns: u64,
        /// Time since the peer passed what we wait for, in nanoseconds.
        pub stalled_ns: u64,
        /// The peer's beat when it last changed.
        pub beat: u64,
        /// Looks so far.
        pub polls: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// Progress of one QP inside one send half; only its owner warp touches it, and only during that half.
    #[repr(C, align(64))]
    pub struct SendCursor {
        /// A `SendPhase` of send.h.
        pub phase: u16,
        /// Of a combine: where its rows go at the peer, or [`NOWHERE`].
        pub place: u16,
        /// Position in the list of what may have to be sent: tokens, kept messages, or (group, k) steps.
        pub next: u32,
        /// Messages sent so far.
        pub num_messages: u32,
        /// Picks that those messages carry, or combine rows sent.
        pub num_picks: u32,
        /// The wait that this queue pair is in.
        pub clock: WaitClock,
    }
}

device_struct! {
    /// Where a packed row came from; one per packed row.
    #[repr(C)]
    pub struct SourceInfo {
        /// Index of the token at its source.
        pub token: u32,
        /// The rank that it came from.
        pub source: u16,
        /// Which of the token's picks this row serves.
        pub k: u8,
        /// As [`Pick::flags`].
        pub flags: u8,
        /// As [`Pick::weight`].
        pub weight: f32,
        /// Where the message stood in the source's region: channel x channel_tokens + message in channel.
        pub message: u32,
    }
}

device_struct! {
    /// The packed rows of one source rank for one local expert.
    #[repr(C)]
    pub struct LayoutRange {
        /// First packed row.
        pub begin: u32,
        /// Number of rows.
        pub len: u32,
    }
}

device_struct! {
    /// What every half of a lane needs. Pointers are device addresses.
    #[repr(C)]
    pub struct LaneArgs {
        /// Capacities and modes.
        pub shape: Shape,
        /// The byte plan that follows from them.
        pub layout: Layout,
        /// [`QpDeviceCtx`] `[num_ranks][num_channels]`.
        pub qps: u64,
        /// [`PeerCtx`] `[num_ranks]`.
        pub peers: u64,
        /// u32 `[num_ranks]`: 1 = kernels no longer wait for that peer; they set it, the host clears it.
        pub suspects: u64,
        /// u64 `[num_ranks]`: rows of combines below this one cannot come any more from that peer; the host says so.
        pub fenced_below: u64,
        /// [`MemberTable`] `[2]`, oldest first.
        pub tables: u64,
        /// The one [`LaneState`].
        pub state: u64,
        /// [`SendCursor`] `[num_ranks][num_channels]`.
        pub cursors: u64,
        /// The one [`Limits`].
        pub limits: u64,
        /// The one [`LaneHostWords`].
        pub host_words: u64,
        /// [`DeviceFault`] `[num_ranks]`.
        pub faults: u64,
        /// [`PeerTelemetry`] `[num_ranks]`.
        pub telemetry: u64,
        /// Rows that come back: ring x max_tokens x max_topk x row_bytes.
        pub combine_slab: u64,
        /// Rows that go out: 2 x ring x max_tokens x message_stride.
        pub staging: u64,
        /// u32 `[2 x ring][max_tokens]`: the generation whose row stands there.
        pub staging_ready: u64,
        /// u32 `[2 x ring][num_ranks][max_local_experts]`: counts that go out with channel 0.
        pub counts_staging: u64,
        /// Combine rows on their way: `[num_ranks][num_channels][staging_rows][row_bytes]`.
        pub row_staging: u64,
        /// u32 `[num_ranks][num_channels][staging_rows]`: the producer index that gives the row back.
        pub row_staging_pi: u64,
        /// u64 `[num_ranks][num_channels]`: where FETCH_ADD returns the old value.
        pub atomic_result: u64,
        /// Key of everything above that a WQE may name, big-endian.
        pub lkey_be: u32,
        /// Index of the lane.
        pub lane: u32,
        /// Slot of the lane's first queue pair.
        pub qp_slot_base: u32,
        /// Guards of the protocol that a test has switched off ([`code::GUARD_CREDIT`] and so on), else 0.
        pub guards_off: u32,
    }
}

device_struct! {
    /// The arrays behind one dispatch handle, in device memory.
    #[repr(C)]
    pub struct HandleArrays {
        /// The [`HandleCtx`] of the dispatch.
        pub ctx: u64,
        /// u16 `[max_tokens][max_topk]`: who was chosen to serve each pick.
        pub pick_owner: u64,
        /// u32 `[num_ranks][num_channels]`: picks sent, which an exact combine must return.
        pub sent_picks: u64,
        /// u32 `[num_ranks][num_channels]`: messages sent, which a reduced combine must return.
        pub sent_messages: u64,
        /// u64 `[num_ranks][num_channels]`: {generation:32 | count:32}, what all warps hold about a channel.
        pub verdicts: u64,
        /// u32 `[num_ranks]`: the generation whose ranges stand.
        pub ranges_ready: u64,
        /// u32 `[max_local_experts]`: packed rows reserved so far; zero outside a receive half.
        pub pack_cursor: u64,
        /// [`LayoutRange`] `[max_local_experts][num_ranks]`.
        pub ranges: u64,
        /// Kept headers and picks: `[num_ranks][num_channels x channel_tokens][16 + 16 x max_topk]` bytes.
        pub headers: u64,
        /// u32 `[num_ranks]`: 1 = all of that source's tokens arrived.
        pub source_ok: u64,
    }
}

device_struct! {
    /// One dispatch launch: the lane, the handle, the caller's tensors.
    #[repr(C)]
    pub struct DispatchArgs {
        /// The lane.
        pub lane: LaneArgs,
        /// The handle that this dispatch fills.
        pub handle: HandleArrays,
        /// bf16 `[max_tokens][hidden]`.
        pub x: u64,
        /// int32 or int64 `[max_tokens][num_topk]`, -1 = masked.
        pub topk_idx: u64,
        /// f32 `[max_tokens][num_topk]`, or 0 for none.
        pub topk_weights: u64,
        /// u32 in device memory: a replay may change it.
        pub num_tokens: u64,
        /// Payloads `[max_local_experts][num_ranks x max_tokens][payload_bytes]`.
        pub packed_x: u64,
        /// Scales by the strides below, or 0 for none.
        pub packed_scales: u64,
        /// [`SourceInfo`] `[max_local_experts][num_ranks x max_tokens]`.
        pub source_info: u64,
        /// int32 `[max_local_experts]`: packed rows reserved.
        pub expert_counts: u64,
        /// [`LayoutRange`] `[max_local_experts][num_ranks]`.
        pub layout_ranges: u64,
        /// u32 `[num_ranks]`: 1 = all of that source's tokens stand in the packed rows.
        pub source_ok: u64,
        /// Bytes between the scales of two local experts.
        pub scale_expert_stride: u64,
        /// Bytes between the scales of two packed rows.
        pub scale_row_stride: u64,
        /// Bytes between two scales of one row.
        pub scale_block_stride: u64,
        /// Picks per token of this call.
        pub num_topk: u32,
        /// 1 if `topk_idx` is int64.
        pub topk_is_i64: u32,
        /// Bits [`code::SEND_HALF`] and [`code::RECEIVE_HALF`].
        pub halves: u32,
        /// Tells this launch from any other on the lane; never 0.
        pub nonce: u32,
    }
}

device_struct! {
    /// One combine launch: the lane, the dispatch it answers, the ticket, the caller's tensors.
    #[repr(C)]
    pub struct CombineArgs {
        /// The lane.
        pub lane: LaneArgs,
        /// Of the dispatch this combine answers.
        pub handle: HandleArrays,
        /// The [`HandleCtx`] of this combine.
        pub ticket: u64,
        /// u64 `[num_ranks][num_channels]`, of this combine.
        pub verdicts: u64,
        /// bf16 `[max_local_experts][num_ranks x max_tokens][hidden]`.
        pub expert_out: u64,
        /// f32 `[max_tokens][num_topk]`.
        pub topk_weights: u64,
        /// bf16 `[max_tokens][hidden]`.
        pub out: u64,
        /// u32 `[max_tokens]`: bit k = "w\[t,k\] * y was not summed".
        pub lost_topk: u64,
        /// Key of `expert_out`, big-endian.
        pub expert_out_lkey_be: u32,
        /// 1: WQEs name `expert_out` itself; 0: rows pass through the staging ring.
        pub zero_copy: u32,
        /// Bits [`code::SEND_HALF`] and [`code::RECEIVE_HALF`].
        pub halves: u32,
        /// Tells this launch from any other on the lane; never 0.
        pub nonce: u32,
    }
}

device_struct! {
    /// The post microbenchmark: every warp posts to its own QPs.
    #[repr(C)]
    pub struct PostArgs {
        /// [`QpDeviceCtx`] `[num_qps]`.
        pub qps: u64,
        /// [`PeerCtx`] `[num_qps]`.
        pub peers: u64,
        /// Address of the payload.
        pub source: u64,
        /// Bytes between two payloads.
        pub source_stride: u64,
        /// Bytes between two messages at the peer.
        pub target_stride: u64,
        /// When to give up on a queue pair, counted from its start.
        pub timeout_ns: u64,
        /// u64 `[num_qps]`: WQEs completed.
        pub result: u64,
        /// Queue pairs, spread over all warps.
        pub num_qps: u32,
        /// WQEs that each of them posts.
        pub wqes_per_qp: u32,
        /// Payload bytes of one WQE; 28 if inline.
        pub bytes: u32,
        /// 1: the payload stands in the WQE.
        pub inline_data: u32,
        /// WQEs per doorbell, at most 32.
        pub batch: u32,
        /// Key of the payload, big-endian.
        pub lkey_be: u32,
        /// Messages at the peer before they wrap.
        pub target_slots: u32,
        /// Zero.
        pub reserved: u32,
    }
}

device_struct! {
    /// The stand-in expert of benches and tests: y = bf16(x * (1 + 0.1 * expert)), packed rows to outputs.
    #[repr(C)]
    pub struct ExpertArgs {
        /// As [`DispatchArgs::packed_x`].
        pub packed_x: u64,
        /// As [`DispatchArgs::packed_scales`].
        pub packed_scales: u64,
        /// As [`DispatchArgs::layout_ranges`]; rows outside every range are left alone.
        pub layout_ranges: u64,
        /// u32 `[max_local_experts]`: the global expert of each local one.
        pub expert_ids: u64,
        /// bf16 `[max_local_experts][num_ranks x max_tokens][hidden]`.
        pub expert_out: u64,
        /// As [`DispatchArgs::scale_expert_stride`].
        pub scale_expert_stride: u64,
        /// As [`DispatchArgs::scale_row_stride`].
        pub scale_row_stride: u64,
        /// As [`DispatchArgs::scale_block_stride`].
        pub scale_block_stride: u64,
        /// Ranks in the group.
        pub num_ranks: u32,
        /// Most tokens of one rank.
        pub max_tokens: u32,
        /// Width of a row, in elements.
        pub hidden: u32,
        /// Local experts.
        pub max_local_experts: u32,
        /// Element type of `packed_x`: a `code::WIRE_*`.
        pub wire_dtype: u32,
        /// How its scales are stored: a `code::SCALE_*`.
        pub scale_kind: u32,
    }
}

device_struct! {
    /// One launch that is the launches of all ranks, each with an equal share of the blocks.
    #[repr(C)]
    pub struct GroupArgs {
        /// Each rank's own argument struct, one behind the other, in device memory.
        pub args: u64,
        /// Ranks of the group.
        pub num_ranks: u32,
        /// Zero.
        pub reserved: u32,
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
        SoiledPlace,
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
        GroupArgs,
    );
    table
}
