/// The fiber as kernels' inline code sees it: who am I, have I polled here before, may the simulation step
/// in.
///
/// A fiber is one warp (warp fibers) or one CUDA thread (lane fibers). It never leaves the OS thread of its
/// worker, so thread-local state may be cached across a switch. Everything else about it lives in sched.h.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ibex::host {

struct Block;
struct Worker;

enum class FiberState : uint8_t { ready, polling, barrier, collective, exited };

struct Fiber {
  // Poll detection (see `poll`). One cache line, touched by every polling load.
  const void* anchor = nullptr;
  uint64_t anchor_value = 0;
  const void* last = nullptr;
  uint64_t last_value = 0;
  uint32_t strays = 0;
  bool simulated = false;
  FiberState state = FiberState::ready;
  uint16_t wait_id = 0;  ///< barrier id while state is barrier

  // Scheduling.
  void* sp = nullptr;
  Fiber* next = nullptr;
  Block* block = nullptr;
  uint32_t warp = 0;
  uint32_t lane = 0;
  const void* pc = nullptr;      ///< where it last stalled, for the dump
  uint64_t stall_event = 0;      ///< simulation: the event count at its last stall
  uint32_t stall_rounds = 0;     ///< simulation: stalls since that event
  uint32_t id = 0;               ///< simulation: index in creation order, stable across runs
  uint32_t collective = 0;       ///< lane fibers: collectives entered; parity picks the slot row
  char* stack = nullptr;
  void* tsan = nullptr;          ///< ThreadSanitizer's fiber, and the helpers that carry fence clocks
  void* tsan_loads = nullptr;    ///< relaxed loads that the next fence takes over
  void* tsan_fenced[2] = {};     ///< by scope: the clock at its last fence, published by relaxed stores
};

/// The fiber running on this OS thread; null outside kernels.
extern constinit thread_local Fiber* tl_fiber __attribute__((tls_model("initial-exec")));

/// Counts what fibers of this thread changed or saw change: a worker whose count stands still is idle.
extern constinit thread_local uint64_t tl_moves __attribute__((tls_model("initial-exec")));

/// Hands the worker over because `fiber` found nothing new at `address`.
void stalled(Fiber* fiber, const void* address, uint64_t value);
/// Tells the worker that `fiber` saw a change, so the others may be about to move as well.
void moved(Fiber* fiber);
/// Simulation: lets the seeded schedule decide who runs before the next access.
void sim_step(Fiber* fiber);
/// Simulation: a store changed memory, so whoever was stalled may move.
void sim_event(Fiber* fiber);

/// How many polls of other addresses make a fiber give up its anchor (a wait loop over more words than this
/// still yields once per so many polls).
constexpr uint32_t kStraysMax = 32;

/// Called with every value that a polling load returns.
///
/// A loop over one word stalls at once. A loop over several words has an *anchor*: coming back to it
/// unchanged means that a whole round brought nothing. Either way the fiber gives way once per round, not
/// once per word.
inline __attribute__((always_inline)) void poll(const void* address, uint64_t value) {
  Fiber* f = tl_fiber;
  if (f == nullptr) return;
  if (address == f->last) {
    f->anchor = address;
    f->anchor_value = value;
    f->strays = 0;
    if (value == f->last_value) return stalled(f, address, value);
    f->last_value = value;
    return moved(f);
  }
  f->last = address;
  f->last_value = value;
  if (address == f->anchor) {
    f->strays = 0;
    if (value == f->anchor_value) return stalled(f, address, value);
    f->anchor_value = value;
    return moved(f);
  }
  if (++f->strays > kStraysMax) {
    f->strays = 0;
    f->anchor = address;
    f->anchor_value = value;
    stalled(f, address, value);
  }
}

inline __attribute__((always_inline)) void step_point() {
  Fiber* f = tl_fiber;
  if (f != nullptr && f->simulated) sim_step(f);
}

/// Not under ThreadSanitizer, which would see the fibers of one thread race for its counter.
inline __attribute__((always_inline)) void count_move() {
#if !defined(IBEX_TSAN)
  ++tl_moves;
#endif
}

inline __attribute__((always_inline)) void step_before_write() {
  count_move();
  step_point();
}

template <class T>
inline __attribute__((always_inline)) void step_before_store(const T* p, T value) {
  count_move();
  Fiber* f = tl_fiber;
  if (f == nullptr || !f->simulated) return;
  sim_step(f);
  if (__atomic_load_n(p, __ATOMIC_RELAXED) != value) sim_event(f);
}

// What the SIMT layer asks of the runtime; implemented in sched.cpp and pool.cpp.
uint64_t clock_ns();
void backoff();
uint32_t block_id();
uint32_t num_blocks();
uint32_t num_warps();
/// Waits until `num_warps` warps of the block have arrived at barrier `id`.
void barrier(uint32_t id, uint32_t num_warps);
/// The block's storage for one IBEX_SHARED declaration, created (and poisoned) at first use.
void* shared_memory(const void* tag, size_t len, size_t align);
/// Lane fibers: every lane of the warp gives `bits`; returns the 32 values once all have arrived. They stay
/// valid until this lane's next collective. As on CUDA only warp::sync orders memory, a shuffle or ballot does not:
/// ThreadSanitizer sees an edge if `orders_memory`.
const uint64_t* exchange(uint64_t bits, bool orders_memory);

}  // namespace ibex::host
