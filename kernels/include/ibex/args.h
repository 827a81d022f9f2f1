/// Everything the host and the kernels agree on in memory: capacities, layouts, contexts, handles, arguments.
///
/// The host allocates all of it, and fills what is not said to be a kernel's. The Rust twin, which documents every
/// field, is runtime/abi/src/device_ctx.rs; tests/device_abi.rs compares sizes and offsets of both sides through
/// kernels/src/abi_parity.cu.
///
/// INVARIANT: what a captured graph freezes stands in `LaneArgs`, `DispatchArgs` and `CombineArgs`; whatever may
/// change between two replays is reached through a pointer in them.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ibex {

constexpr uint32_t kMaxRanks = 512;
constexpr uint32_t kMaxTopk = 32;
constexpr uint32_t kMaxRing = 8;
constexpr uint32_t kMaxChannels = 16;
constexpr uint32_t kMaxStagingSlots = 2 * kMaxRing;
/// Places that one ring slot of the combine slab may have: one, and spare ones; see late.h.
constexpr uint32_t kMaxPlaces = 4;
constexpr uint32_t kRankWords = kMaxRanks / 64;
constexpr uint32_t kNumOps = 2;

/// Count in a signal word that says: this step's input from the writer is lost, do not wait for it.
constexpr uint32_t kCountLost = 0xffffffffu;
/// Owner of a pick that the caller masked (-1).
constexpr uint16_t kNoOwner = 0xffff;
/// `HandleArrays::pick_owner` of a pick that was not dispatched although it was not masked: lost.
constexpr uint16_t kLostOwner = 0xfffe;
/// Entry of `MemberTable::owner_of` for an expert that is placed nowhere.
constexpr uint32_t kUnplaced = 0xffffffffu;

enum Op : uint32_t { kDispatch = 0, kCombine = 1 };
/// Bits of `halves`: which part of the operation a launch runs.
enum Half : uint32_t { kSendHalf = 1, kReceiveHalf = 2 };
enum WireDtype : uint32_t { kWireBf16 = 0, kWireFp8 = 1 };
/// fp8 scales: amax/448, the next power of two of it, or that power's biased exponent in one byte.
enum ScaleKind : uint32_t { kScaleF32 = 0, kScalePow2 = 1, kScaleUe8m0 = 2 };
enum CombineMode : uint32_t { kExact = 0, kReduced = 1 };
enum SignalMode : uint32_t { kSignalWrite = 0, kSignalFetchAdd = 1 };
enum Route : uint32_t { kRouteLocal = 0, kRouteMapped = 1, kRouteIbgda = 2 };
/// Life of a QP slot as kernels see it. Only `kQpActive` may be posted to.
enum QpCtxState : uint32_t { kQpMasked = 0, kQpActive = 1, kQpFenced = 2 };
enum FaultKind : uint32_t {
  kFaultNone = 0,
  kFaultSilent = 1,      ///< no sign of life for detect_ns
  kFaultStalled = 2,     ///< alive, past the half we wait for, and still nothing for stall_ns
  kFaultCap = 3,         ///< the hard cap of one half
  kFaultCompletion = 4,  ///< error CQE
  kFaultReported = 5,    ///< the peer said LOST, or skipped the step
  kFaultViolation = 6,   ///< a header or count that contradicts the protocol
  kFaultSourceRows = 7,  ///< rows could not be reused: no CQE covers the WQEs that name them
};

/// Capacities and modes; the grid and every layout are sized by these.
struct Shape {
  uint32_t num_ranks, rank;
  uint32_t max_tokens, hidden;         ///< hidden in elements
  uint32_t max_topk, max_experts;
  uint32_t max_local_experts, num_channels;
  uint32_t ring, channel_tokens;       ///< ring slots N; messages per channel = ceil(max_tokens / num_channels)
  uint32_t num_owner_warps, signal_mode;
  uint32_t wire_dtype, scale_kind;
  uint32_t combine_mode, staging_rows; ///< staging_rows: rows in the combine staging ring of one QP
  uint32_t num_places, reserved;       ///< places of one ring slot in the combine slab
};
static_assert(sizeof(Shape) == 72);

/// Byte plan of one source's region at a receiver, of a message, and of the combine slab. All multiples of 16.
///
///   region  | messages: ring x num_channels x channel_tokens x message_stride | counts: ring x max_local_experts x u32
///           | signals: op x ring x num_channels x u64 | consumed: op x ring x u64 | life: 8 x u64 |
///   message | MessageHeader 16 | max_topk x Pick 16 | payload | scales |
struct Layout {
  uint32_t payload_off, payload_bytes;
  uint32_t scale_off, scale_bytes;
  uint32_t message_stride, row_bytes;  ///< row_bytes: one bf16 row of hidden elements (combine)
  uint64_t counts_off, signals_off;
  uint64_t consumed_off, life_off;
  uint64_t region_bytes, combine_slot_bytes;
};
static_assert(sizeof(Layout) == 72);

/// One pick of a token as it travels: 16 bytes, so that a lane reads it in one load.
struct Pick {
  uint16_t expert, owner;         ///< owner: the rank that serves it, kNoOwner or kLostOwner
  uint16_t local_expert, index;   ///< index: how many earlier tokens of this source pick that expert
  uint8_t k, flags;               ///< position among the token's picks; kPickFirstAtOwner, kPickDuplicate
  uint16_t reserved;
  float weight;                   ///< 0 if the dispatch carried no weights
};
static_assert(sizeof(Pick) == 16);
/// First pick of this token at this owner: `reduced` combine sends its row under this k.
constexpr uint8_t kPickFirstAtOwner = 1;
/// An earlier pick of this token names the same expert: it shares that pick's packed row.
constexpr uint8_t kPickDuplicate = 2;
/// `HandleCtx::flags`: some token of this step picks one expert twice.
constexpr uint32_t kHasDuplicates = 1;
/// `HandleCtx::flags` of a combine: it has given somebody up whose rows may still come.
constexpr uint32_t kGaveUp = 2;
/// A place in the combine slab that is none: nobody may send rows for this step.
constexpr uint32_t kNowhere = 0xff;

/// The fixed part of a message.
struct MessageHeader {
  uint32_t token, generation;      ///< index at the source; the step, as in its signal words
  uint32_t placement_version;      ///< by which the sender chose owners; another one here is a violation
  uint16_t source;
  uint8_t num_picks, reserved;     ///< the call's top-k
};
static_assert(sizeof(MessageHeader) == 16);

/// A queue pair as kernels see it; its address never changes, what it names may (recreation in place).
struct alignas(64) QpDeviceCtx {
  // Host-written while the slot is not Active.
  uint64_t sq;                ///< address of the WQE ring
  uint64_t doorbell_record;   ///< address of the SND counter (4 bytes, big-endian)
  uint64_t doorbell;          ///< address of the doorbell register (8 bytes)
  uint64_t cqe;               ///< address of the one CQE of the collapsed CQ
  uint32_t sq_mask;           ///< WQEBBs in the ring - 1
  uint32_t qpn_be;            ///< big-endian qpn << 8: a WQE adds its ds
  uint32_t state;             ///< QpCtxState
  uint32_t incarnation;       ///< counts recreations
  uint32_t peer, channel;
  uint64_t reserved0;
  // Kernel: only the owner warp of the QP.
  uint32_t producer_idx, consumer_idx;  ///< WQEBBs, monotonic; consumer_idx is the cached one
  uint32_t syndrome;                    ///< last error syndrome seen, 0 = none
  uint32_t staged_valid;                ///< bit s: staging_pi[s] stands
  uint32_t staging_pi[kMaxStagingSlots];///< producer_idx after the last WQE that names rows of that staging slot
  uint64_t signal_last[kNumOps][kMaxRing];  ///< fetch-add mode: value our adds have produced at the peer
  uint64_t ring_head, reserved1;            ///< ring_head: next row of the combine staging ring
  uint32_t counted_idx, doorbells;          ///< producer_idx up to which WQEs are counted; doorbells to be counted
  uint32_t cqes, in_flight_max;             ///< CQEs seen, to be counted; most WQEBBs in flight at a doorbell
  uint64_t reserved3[2];
};
static_assert(sizeof(QpDeviceCtx) == 320 && offsetof(QpDeviceCtx, producer_idx) == 64);

/// Where one peer lives. One entry per (lane, peer).
struct alignas(64) PeerCtx {
  uint64_t region_va, combine_va;        ///< our region and the combine slab there, as WQEs address them
  uint64_t region_ptr, combine_ptr;      ///< the same, mapped into our address space; 0 = not mapped
  uint32_t region_rkey_be, combine_rkey_be;
  uint32_t route, reserved;
  uint64_t my_region;                    ///< the local region that this peer writes into
  uint64_t reserved1;
  uint64_t base_seq[kNumOps];            ///< first sequence number of the pair; a dispatch owes it no older credit
  uint64_t posted_credit[kNumOps][kMaxRing];  ///< kernel (owner of channel 0): last consumed word posted
  uint64_t reserved2[6];
};
static_assert(sizeof(PeerCtx) == 256);

/// Sign of life and progress of a peer; written by the peer's host into our region of it, each word by itself.
struct LifeWords {
  uint64_t beat;               ///< counts signs of life; any change is one
  uint64_t sent[kNumOps];      ///< last send half finished, per op
  uint64_t credited[kNumOps];  ///< every step up to this one is consumed and its credit posted, per op
  uint64_t suspects[kRankWords];  ///< bit p: the peer's kernels no longer wait for rank p
  uint64_t reserved[3];
};
static_assert(sizeof(LifeWords) == 128);

/// Members and expert placement. Two exist; the newer one is the one with the larger from_seq, and sequence s uses it
/// iff s >= its from_seq.
struct alignas(64) MemberTable {
  uint32_t epoch, placement_version;
  uint32_t num_experts, reserved;
  uint64_t from_seq[kNumOps];      ///< first sequence number that this table applies to
  uint64_t owner_of;               ///< const uint32_t[max_experts]: rank << 16 | local expert, replicas already chosen
  uint64_t reserved1[3];
  uint64_t alive[kRankWords];      ///< 1 = alive
};
static_assert(sizeof(MemberTable) == 128);

/// Time limits in nanoseconds; the host may change them at any time.
struct Limits {
  uint64_t detect_ns, stall_ns, cap_ns;
  uint32_t polls_per_cq_read, reserved;  ///< polls of a wait between two looks at the peer's CQs; 0 = never
};
static_assert(sizeof(Limits) == 32);

/// A place of the combine slab into which rows of an old step may still come.
struct SoiledPlace {
  uint64_t seq;                    ///< the step; 0 = the place is clean
  uint64_t late[kRankWords];       ///< peers that it gave up
};
static_assert(sizeof(SoiledPlace) == 72);

/// Kernel state of one lane in device memory. Zeroed once by the host; `next` starts at 1.
struct alignas(64) LaneState {
  uint64_t next[kNumOps];          ///< next sequence number to draw
  uint64_t credited[kNumOps];      ///< contiguous consumed-and-posted steps
  uint64_t busy;                   ///< nonce of the send half that runs, 0 = none
  uint64_t staging_seq;            ///< staging slots handed out so far
  uint64_t pending[kNumOps][kMaxRing];  ///< last consumed word per slot; receive halves write it
  uint64_t posting[kNumOps][kMaxRing];  ///< snapshot of `pending` that the running send half posts
  SoiledPlace places[kMaxRing][kMaxPlaces];  ///< by slot of the combine slab; receive halves write it
  uint64_t reserved[2];
};
static_assert(sizeof(LaneState) == 2624);

/// Words in pinned host memory that the host reads without stopping a kernel.
struct alignas(64) LaneHostWords {
  uint64_t entered, left;          ///< halves; a Dekker pair with the Fenced mark of a QP slot
  uint64_t sent[kNumOps], credited[kNumOps];
  uint64_t lane_busy;              ///< overlapping send halves that were refused
  uint64_t reserved;
};
static_assert(sizeof(LaneHostWords) == 64);

/// First fault of a peer since the host cleared it (pinned memory, first writer wins).
struct alignas(64) DeviceFault {
  uint32_t claimed, kind;          ///< claimed: 1 once a writer has taken the record
  uint32_t peer, qp_slot;
  uint32_t op, half;
  uint32_t syndrome, vendor_syndrome;  ///< of the error CQE; 0 without one
  uint64_t seq, waited_ns;
  uint32_t wqe_counter, published; ///< published: 1 once all other fields stand
  uint64_t detail;                 ///< {generation:32 | placement version:32} or {expected:32 | counted:32}
};
static_assert(sizeof(DeviceFault) == 64);

/// Counters of one (lane, peer), pinned; kernels add, the host only reads.
struct alignas(64) PeerTelemetry {
  uint64_t send_wait_ns, receive_wait_ns;          ///< until given up; summed over warps
  uint64_t wqes, doorbells, cqes;                  ///< cqes: those seen; others were overwritten
  uint64_t bytes_local, bytes_mapped, bytes_rdma;  ///< of messages and rows, by route
  uint64_t steps_lost, credits;
  uint64_t sq_full, ring_full;                     ///< waits for room: in a send queue, in a combine staging ring
  uint64_t sq_high_water;                          ///< most WQEBBs in flight at a doorbell, as the kernel knew
  uint64_t staging_full;                           ///< dispatches that found this peer's queues on a staging slot
  uint64_t reserved[2];
};
static_assert(sizeof(PeerTelemetry) == 128);

/// One dispatch (a handle) or one combine (a ticket). Kernel-written but for the zeroing at start.
struct alignas(64) HandleCtx {
  uint64_t seq;
  uint32_t slot, epoch;            ///< seq mod ring
  uint32_t table_idx, placement_version;  ///< which of the two member tables
  uint32_t staging_slot, num_tokens;
  uint32_t num_topk, flags;        ///< flags: kHasDuplicates, kGaveUp
  uint64_t go_send, go_receive;    ///< {nonce:32 | go code:32} while a half runs, else 0; see half.h
  uint32_t send_done_blocks, receive_done_blocks;  ///< blocks that have left the running half
  uint64_t lost[kRankWords];       ///< peers whose picks of this step are lost; of a combine: that it gave up
  uint32_t place, reserved0;       ///< of a combine: where in the slab its rows come, or kNowhere
  uint64_t reserved[7];
};
static_assert(sizeof(HandleCtx) == 192);

/// How long one wait for one peer has gone on; see wait.h.
struct WaitClock {
  uint64_t started_ns, last_poll_ns;
  uint64_t silent_ns, stalled_ns;  ///< time without a sign of life; time after the peer passed what we wait for
  uint64_t beat;                   ///< the peer's beat when it last changed
  uint32_t polls, reserved;
};
static_assert(sizeof(WaitClock) == 48);

/// Progress of one QP inside one send half; only its owner warp touches it, and only during that half.
struct alignas(64) SendCursor {
  uint16_t phase, place;           ///< SendPhase; of a combine: where its rows go at the peer, or kNowhere
  uint32_t next;                   ///< position in the list of what may have to be sent
  uint32_t num_messages, num_picks;  ///< sent so far
  WaitClock clock;
};
static_assert(sizeof(SendCursor) == 64);

/// Where a packed row came from; one per packed row.
struct SourceInfo {
  uint32_t token;
  uint16_t source;
  uint8_t k, flags;
  float weight;
  uint32_t message;                ///< channel * channel_tokens + message in channel
};
static_assert(sizeof(SourceInfo) == 16);

/// The packed rows of one source rank for one local expert.
struct LayoutRange {
  uint32_t begin, len;           ///< first packed row, number of rows
};
static_assert(sizeof(LayoutRange) == 8);

/// What every half of a lane needs. Pointers are device addresses.
struct LaneArgs {
  Shape shape;
  Layout layout;
  QpDeviceCtx* qps;            ///< [num_ranks][num_channels]
  PeerCtx* peers;              ///< [num_ranks]
  uint32_t* suspects;          ///< [num_ranks], sticky; kernels set, the host clears
  const uint64_t* fenced_below;  ///< [num_ranks]; host: rows of combines below this one cannot come any more
  MemberTable* tables;         ///< [2]; which one is newer, from_seq says
  LaneState* state;
  SendCursor* cursors;         ///< [num_ranks][num_channels]
  const Limits* limits;
  LaneHostWords* host_words;
  DeviceFault* faults;         ///< [num_ranks]
  PeerTelemetry* telemetry;    ///< [num_ranks]
  uint8_t* combine_slab;       ///< num_places x ring x max_tokens x max_topk x row_bytes
  uint8_t* staging;            ///< 2 x ring x max_tokens x message_stride
  uint32_t* staging_ready;     ///< [2 x ring][max_tokens]: generation whose row stands there
  uint32_t* counts_staging;    ///< [2 x ring][num_ranks][max_local_experts]
  uint8_t* row_staging;        ///< [num_ranks][num_channels][staging_rows][row_bytes]
  uint32_t* row_staging_pi;    ///< [num_ranks][num_channels][staging_rows]
  uint64_t* atomic_result;     ///< [num_ranks][num_channels]: where FETCH_ADD returns the old value
  uint32_t lkey_be;            ///< of everything above that a WQE may name
  uint32_t lane;
  uint32_t qp_slot_base;
  uint32_t guards_off;         ///< tests on the host only, else 0; see guards.h
};

/// The arrays behind one dispatch handle, in device memory.
struct HandleArrays {
  HandleCtx* ctx;
  uint16_t* pick_owner;        ///< [max_tokens][max_topk]
  uint32_t* sent_picks;        ///< [num_ranks][num_channels]
  uint32_t* sent_messages;     ///< [num_ranks][num_channels]
  uint64_t* verdicts;          ///< [num_ranks][num_channels]: {generation:32 | count:32}
  uint32_t* ranges_ready;      ///< [num_ranks]: generation
  uint32_t* pack_cursor;       ///< [max_local_experts]; zero outside a receive half
  LayoutRange* ranges;         ///< [max_local_experts][num_ranks]
  uint8_t* headers;            ///< [num_ranks][num_channels x channel_tokens][16 + 16 x max_topk]
  uint32_t* source_ok;         ///< [num_ranks]
};

/// One dispatch launch.
struct DispatchArgs {
  LaneArgs lane;
  HandleArrays handle;
  // Send half.
  const uint16_t* x;             ///< [max_tokens][hidden] bf16
  const void* topk_idx;          ///< [max_tokens][num_topk] int32 or int64, -1 = masked
  const float* topk_weights;     ///< [max_tokens][num_topk] or null
  const uint32_t* num_tokens;    ///< device memory: a replay may change it
  // Receive half.
  uint8_t* packed_x;             ///< [max_local_experts][num_ranks x max_tokens][payload]
  uint8_t* packed_scales;        ///< [max_local_experts] x scale_expert_stride, or null
  SourceInfo* source_info;       ///< [max_local_experts][num_ranks x max_tokens]
  int32_t* expert_counts;        ///< [max_local_experts]
  LayoutRange* layout_ranges;    ///< [max_local_experts][num_ranks]
  uint32_t* source_ok;           ///< [num_ranks]: 1 = all of that source's tokens stand in the packed rows
  uint64_t scale_expert_stride, scale_row_stride, scale_block_stride;  ///< bytes
  uint32_t num_topk, topk_is_i64;
  uint32_t halves, nonce;        ///< nonce: tells this launch from any other on the lane; never 0
};

/// One combine launch.
struct CombineArgs {
  LaneArgs lane;
  HandleArrays handle;           ///< of the dispatch this combine answers
  HandleCtx* ticket;             ///< of this combine
  uint64_t* verdicts;            ///< of this combine: [num_ranks][num_channels]
  // Send half.
  const uint16_t* expert_out;    ///< [max_local_experts][num_ranks x max_tokens][hidden] bf16
  // Receive half.
  const float* topk_weights;     ///< [max_tokens][num_topk]
  uint16_t* out;                 ///< [max_tokens][hidden] bf16
  uint32_t* lost_topk;           ///< [max_tokens]: bit k = "w[t,k] * y was not summed"
  uint32_t expert_out_lkey_be, zero_copy;
  uint32_t halves, nonce;
};

/// The post microbenchmark: every warp posts to its own QPs.
struct PostArgs {
  QpDeviceCtx* qps;              ///< [num_qps]
  const PeerCtx* peers;          ///< [num_qps]
  uint64_t source;               ///< address of the payload
  uint64_t source_stride, target_stride;  ///< bytes between two messages
  uint64_t timeout_ns;
  uint64_t* result;              ///< [num_qps]: WQEs completed
  uint32_t num_qps, wqes_per_qp;
  uint32_t bytes, inline_data;
  uint32_t batch, lkey_be;
  uint32_t target_slots, reserved;
};

/// The stand-in expert of benches and tests: y = bf16(x * (1 + 0.1 * expert)), from packed rows to expert_out.
struct ExpertArgs {
  const uint8_t* packed_x;       ///< as DispatchArgs
  const uint8_t* packed_scales;
  const LayoutRange* layout_ranges;
  const uint32_t* expert_ids;    ///< [max_local_experts]: global expert of each local one
  uint16_t* expert_out;          ///< [max_local_experts][num_ranks x max_tokens][hidden] bf16
  uint64_t scale_expert_stride, scale_row_stride, scale_block_stride;
  uint32_t num_ranks, max_tokens, hidden, max_local_experts;
  uint32_t wire_dtype, scale_kind;
};

/// One launch that is the launches of all ranks: what a sanitizer runs that allows no second launch beside one.
struct GroupArgs {
  const void* args;              ///< [num_ranks]: each rank's own argument struct, in device memory
  uint32_t num_ranks, reserved;
};

}  // namespace ibex
