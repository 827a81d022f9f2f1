/// Grids, blocks and the worker that runs their fibers.
///
/// A worker owns its grids: it builds their fibers from the inbox, runs them on its one OS thread and frees
/// them when the last fiber has left. The *main context* is the OS thread's own stack; there, and only
/// there, run `progress`, `on_done`, allocation and the inbox. Fibers switch to each other directly and
/// come back to the main context when all of them stall, every `kServiceSwitches` switches, and when a grid
/// is done.
#pragma once
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "ibex/kernel.h"
#include "host/fiber.h"
#include "host/pool.h"
#include "host/sim.h"
#include "host/stacks.h"

namespace ibex::host {

#if defined(IBEX_LANE_FIBERS)
constexpr uint32_t kFibersPerWarp = kWarpSize;
#else
constexpr uint32_t kFibersPerWarp = 1;
#endif

/// PTX has barriers 0..15 per block.
constexpr uint32_t kBarriers = 16;
/// Declarations of shared memory in one kernel.
constexpr uint32_t kSharedMax = 32;
/// The main context runs at least once per so many fiber switches.
constexpr uint32_t kServiceSwitches = 256;

struct Grid;

struct Waiters {
  Fiber* head = nullptr;
  Fiber* tail = nullptr;
  uint32_t num = 0;
};

/// Fibers that meet. ThreadSanitizer's edges alternate between two keys: who is early for the next meeting
/// must not be seen by who is late in leaving this one.
struct Meeting {
  Waiters waiters;
  uint32_t arrived = 0;
  uint32_t phase = 0;
  char keys[2] = {};
};

/// Lane fibers: where the lanes of one warp meet. Two rows, used alternately: a lane may enter the next
/// collective while others still read this one, and the next can only complete when all have read.
struct Warp {
  Meeting meeting;
  uint64_t slots[2][kWarpSize] = {};
};

struct SharedEntry {
  const void* tag;
  size_t offset;
};

struct Block {
  Grid* grid = nullptr;
  uint32_t idx = 0;
  Meeting barriers[kBarriers];
  SharedEntry shared[kSharedMax];
  uint32_t num_shared = 0;
  size_t shared_len = 0;
  char* arena = nullptr;  ///< IBEX_SHARED_MAX bytes, untouched until the kernel declares shared memory
  std::unique_ptr<Warp[]> warps;
};

struct Grid {
  const ibex_kernel* kernel = nullptr;
  uint32_t device = 0;
  uint32_t num_blocks = 0;
  uint32_t warps_per_block = 0;
  uint32_t live = 0;  ///< fibers that have not left
  void (*on_done)(void*, bool) = nullptr;
  void* done_ctx = nullptr;
  Grid* next = nullptr;  ///< in the inbox, or among the finished
  std::unique_ptr<Block[]> blocks;
  std::unique_ptr<Fiber[]> fibers;
  alignas(64) unsigned char args[IBEX_ARGS_LEN_MAX];

  uint32_t num_fibers() const { return num_blocks * warps_per_block * kFibersPerWarp; }
};

struct Worker {
  Worker(uint32_t index, const ibex_pool_config& config);
  ~Worker();

  // Any thread.
  ibex_status launch(std::unique_ptr<Grid> grid);
  void shutdown();

  // The worker's thread, main context.
  void run();
  ibex_status simulate(bool (*until)(void*), void* ctx);
  // Simulation, main context or outside `simulate`: faults of one device (faults.cpp).
  void kill(uint32_t device);
  void freeze(uint32_t device, bool frozen);

  // A fiber's context (see fiber.h).
  void stall(Fiber* f, const void* address, uint64_t value);
  /// Returns once `need` fibers have met here.
  void meet(Meeting& meeting, uint32_t need, Fiber* f, FiberState state, bool orders_memory);
  void step(Fiber* f);
  [[noreturn]] void leave(Fiber* f);

  uint32_t num_ready() const { return sim ? static_cast<uint32_t>(sim->ready.size()) : ready_.num; }
  void dump(const char* why) const;

  const uint32_t index;
  const ibex_pool_config config;
  Fiber* current = nullptr;
  uint32_t idle_stalls = 0;  ///< consecutive stalls; more than there are ready fibers means that all spin
  std::unique_ptr<Sim> sim;
  std::atomic<uint64_t> launches{0}, switches{0}, stalls{0}, progress_calls{0}, stacks_mapped{0};

 private:
  bool take_inbox();  ///< false: shut down
  void build(Grid* grid);
  char* take_arena();
  void finish_grids();
  /// Gives a grid's stacks and its share of the worker back; it stays in nobody's list.
  void release_grid(Grid* grid);
  void unlink_inbox(uint32_t device, std::vector<Grid*>& killed);
  void unlink_running(uint32_t device, std::vector<Grid*>& killed);
  /// Frees it and calls `on_done`.
  void free_grid(Grid* grid, bool finished);
  bool run_progress(uint64_t* deadline);
  void wait_for_launch();
  void rest();
  void resume(Fiber* f);
  void to_main(Fiber* from);
  void switch_to(Fiber* from, Fiber* to);
  void make_ready(Fiber* f);
  bool is_settled(const Fiber* f) const;
  void release(Waiters& waiters);
  Fiber* next_ready();
  /// The fiber's side of giving up the processor; `f` is queued somewhere, or has left.
  void give_way(Fiber* f);
  ibex_status pass_time();

  void* main_sp_ = nullptr;
  void* tsan_main_ = nullptr;
  Waiters ready_;                  ///< real time: round robin
  uint32_t since_service_ = 0;
  uint32_t live_ = 0;              ///< fibers of all grids here
  std::vector<Grid*> grids_;       ///< being run, in the order of launch
  Grid* done_ = nullptr;           ///< finished, `on_done` not yet called
  std::vector<char*> arenas_;      ///< free shared-memory arenas
  uint64_t idle_since_ns_ = 0;     ///< 0: not idle
  uint64_t rested_ns_ = 0;         ///< when `rest` last returned
  uint64_t moves_ = 0;             ///< `tl_moves` at the last rest
  bool reported_stuck_ = false;
  uint32_t next_fiber_id_ = 0;

  std::mutex mutex_;               ///< guards what follows
  std::condition_variable wake_;
  Stacks stacks_;
  Grid* inbox_head_ = nullptr;
  Grid* inbox_tail_ = nullptr;
  uint32_t admitted_ = 0;          ///< fibers of queued and running grids
  bool shut_down_ = false;
  std::atomic<bool> attention_{false};  ///< inbox or shutdown, read without the lock
};

extern constinit thread_local Worker* tl_worker __attribute__((tls_model("initial-exec")));

}  // namespace ibex::host
