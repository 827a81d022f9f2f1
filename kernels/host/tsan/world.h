/// Ranks of dispatch and combine in one C++ process: their memory, their queues, and the device that serves them.
///
/// The mirror of what `LaneBuffers` and `PeerQueues` of the Rust runtime set up for one lane, at small shapes. All
/// memory is allocated once and freed with the world; kernels, the device and the host parts below share it as they
/// do in the product.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "host/tsan/device.h"
#include "host/tsan/rig.h"
#include "ibex/args.h"

namespace ibex::rig {

/// How peers reach each other; a rank always reaches itself by local copies.
enum class Routes : uint8_t { ibgda, mapped, mixed };

struct EpConfig {
  const char* name;
  uint32_t num_ranks = 2, num_channels = 2, ring = 2;
  uint32_t max_tokens = 5, hidden = 144, max_topk = 3, num_experts = 5;
  uint32_t wire_dtype = kWireFp8, scale_kind = kScaleF32;
  uint32_t combine_mode = kExact, signal_mode = kSignalWrite;
  Routes routes = Routes::ibgda;
  bool zero_copy = true;
  uint32_t staging_rows = 4, sq_wqebbs = 32, num_owner_warps = 2, num_places = 2;
  uint32_t num_steps = 5;
  /// Grids. ThreadSanitizer follows 255 fibers well: all lanes of all ranks should be fewer.
  uint32_t blocks = 1, warps = 3;
  uint32_t receive_warps = 1;  ///< of a launch that only receives
  uint32_t detect_ms = 10'000;
  bool split = false;  ///< send and receive halves on two streams, so that steps overlap
};

/// Zeroed, line-aligned memory, freed together.
class Memory {
 public:
  ~Memory();
  template <class T>
  T* take(size_t count = 1) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

 private:
  void* take_bytes(size_t len);
  std::vector<void*> blocks_;
};

/// What the callers of one step bring and get; see DispatchArgs and CombineArgs.
struct Tensors {
  uint16_t* x;
  int32_t* topk_idx;
  float* topk_weights;
  uint32_t* num_tokens;
  uint8_t *packed_x, *packed_scales;
  SourceInfo* source_info;
  int32_t* expert_counts;
  LayoutRange* layout_ranges;
  uint32_t* source_ok;
  uint16_t *expert_out, *out;
  uint32_t* lost_topk;
};

/// One handle of a dispatch with the ticket of its combine.
struct Handle {
  HandleArrays dispatch;
  HandleCtx* ticket;
  uint64_t* verdicts;
};

/// The queues that a slot has in turn: made with the world, started when their contexts stand.
struct Slot {
  static constexpr uint32_t kIncarnations = 2;
  std::unique_ptr<Queue> queues[kIncarnations];  ///< null where the route needs none
  uint32_t num_started = 0;

  Queue* current() const { return num_started == 0 ? nullptr : queues[num_started - 1].get(); }
};

/// One rank: its memory as kernels see it, and its queues as the device sees them.
struct Rank {
  LaneArgs lane;
  uint64_t* fenced_below = nullptr;  ///< as in `lane`, for the host
  std::vector<Handle> handles;   ///< by step, modulo
  std::vector<Tensors> tensors;  ///< likewise
  uint32_t expert_out_lkey;
  uint32_t* expert_ids;
  Keys keys;
  std::vector<uint8_t*> regions;  ///< by source rank
  // The control memory, one entry per QP.
  uint8_t *rings, *cqes;
  uint32_t* records;    ///< 16 words apart: {receive, send} counters
  uint64_t* doorbells;  ///< 8 words apart
  std::vector<Slot> slots;
  bool alive = true;           ///< writes its sign of life
  host::Agent* host = nullptr; ///< what its host does while kernels run, if anything
};

class World {
 public:
  World(const EpConfig& config, const Options& options);

  const EpConfig& config() const { return config_; }
  Rank& rank(uint32_t r) { return *ranks_[r]; }
  uint32_t route(uint32_t from, uint32_t to) const;
  Slot& slot(uint32_t from, uint32_t to, uint32_t channel);
  /// Aims the options' plant at what `--at` names: queue states, left-words and verdicts of all ranks; else at the
  /// object of rank 0, or of rank 1 as rank 0 writes it.
  void plant() const;

  DispatchArgs dispatch_args(uint32_t rank, uint32_t step, uint32_t halves, uint32_t nonce) const;
  ExpertArgs expert_args(uint32_t rank, uint32_t step) const;
  CombineArgs combine_args(uint32_t rank, uint32_t step, uint32_t halves, uint32_t nonce) const;

  /// Ends a rank without a word: no sign of life, no completion. Nobody steps the device meanwhile.
  void kill(uint32_t rank);
  /// As the recreation of one end in RST: `from` forgets its queues to `to` and what `to` has written here.
  void forget(uint32_t from, uint32_t to);
  /// One direction: `from` may write to `to` from `base_seq` on, through one queue per channel where the route needs
  /// it. Contexts first, then Active.
  void connect(uint32_t from, uint32_t to, const uint64_t (&base_seq)[kNumOps]);

  /// The device and the hosts' signs of life, as the pool's progress.
  static uint64_t progress(void* world, uint32_t worker, uint64_t now_ns, uint64_t random);
  /// Says what no legal driver does, on stderr. Returns whether there was nothing to say.
  bool queues_are_clean() const;

 private:
  void make_shape(uint32_t rank);
  void make_state(Rank& r);
  void make_buffers(Rank& r);
  void make_handles(Rank& r);
  void make_tensors(Rank& r);
  void make_slots(uint32_t from);
  void connect_queue(uint32_t from, uint32_t to, uint32_t channel);
  void write_life(uint32_t rank);
  bool step_hosts(uint32_t worker, uint64_t random);
  bool step_queues(uint32_t worker, uint64_t random);

  const EpConfig config_;
  const Options options_;
  Memory memory_;
  std::vector<std::unique_ptr<Rank>> ranks_;
  QpDeviceCtx* qps_;           ///< of all ranks
  LaneHostWords* host_words_;  ///< likewise
  uint64_t* verdicts_;         ///< of all dispatches of all ranks
  /// Per worker, touched by its thread only.
  struct Turn {
    uint64_t next_queue = 0, next_beat_ns = 0;
  };
  std::vector<Turn> turns_;
};

}  // namespace ibex::rig
