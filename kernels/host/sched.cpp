/// The worker's two sides: fibers giving way to each other, and the main context that serves them.
#include "host/sched.h"

#include <sched.h>
#include <time.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/clock.h"
#include "host/switch.h"
#include "host/tsan_sched.h"

namespace ibex::host {

constinit thread_local Fiber* tl_fiber __attribute__((tls_model("initial-exec"))) = nullptr;
constinit thread_local uint64_t tl_moves __attribute__((tls_model("initial-exec"))) = 0;
constinit thread_local Worker* tl_worker __attribute__((tls_model("initial-exec"))) = nullptr;

namespace {
// How an idle worker waits: spin, then offer the core, then sleep. Chosen for latency first; a wait longer
// than a few milliseconds is a fault being detected, and there the other processes matter more.
constexpr uint64_t kSpinNs = 20'000;
constexpr uint64_t kYieldNs = 2'000'000;
constexpr long kSleepNs = 50'000;
/// A round in which every fiber only polls takes less than this; a longer one has done work in between.
constexpr uint64_t kRoundNs = 5'000;
constexpr uint64_t kRoundPerFiberNs = 500;
/// The first round may have begun before the event; the second has seen whatever changed.
constexpr uint32_t kRoundsToSettle = 2;

void push_back(Waiters& q, Fiber* f) {
  f->next = nullptr;
  if (q.tail != nullptr) q.tail->next = f;
  else q.head = f;
  q.tail = f;
  ++q.num;
}

/// Counters have one writer; others may read them at any time.
void bump(std::atomic<uint64_t>& counter) {
  counter.store(counter.load(std::memory_order_relaxed) + 1, std::memory_order_relaxed);
}

void enter_fiber() {
  Fiber* f = tl_fiber;
  Grid* grid = f->block->grid;
  tsan_edge_acquire(grid);
  grid->kernel->run(grid->args);
  tsan_edge_release(grid);
  tl_worker->leave(f);
}
}  // namespace

// ---- A fiber's side.

void Worker::make_ready(Fiber* f) {
  f->state = FiberState::ready;
  if (sim && sim->is_frozen(f->block->grid->device)) {
    sim->frozen.push_back(f);
    return;
  }
  if (!sim) push_back(ready_, f);
  else if (is_settled(f)) sim->parked.push_back(f);
  else sim->ready.push_back(f);
}

/// Whether a fiber has come round often enough since the last event to have seen all of it.
bool Worker::is_settled(const Fiber* f) const {
  return f->stall_event == sim->events() && f->stall_rounds >= kRoundsToSettle;
}

/// Those who were waiting go first: what they waited for is in the cache.
void Worker::release(Waiters& waiters) {
  if (sim) sim->event();
  idle_stalls = 0;
  if (waiters.head == nullptr) return;
  for (Fiber* f = waiters.head; f != nullptr; f = f->next) {
    f->state = FiberState::ready;
    if (sim) sim->ready.push_back(f);
  }
  if (!sim) {
    waiters.tail->next = ready_.head;
    ready_.head = waiters.head;
    if (ready_.tail == nullptr) ready_.tail = waiters.tail;
    ready_.num += waiters.num;
  }
  waiters = Waiters{};
}

Fiber* Worker::next_ready() {
  if (num_ready() == 0) return nullptr;
  if (sim) {
    const uint32_t i = sim->pick(sim->ready);
    Fiber* f = sim->ready[i];
    sim->ready[i] = sim->ready.back();
    sim->ready.pop_back();
    return f;
  }
  Fiber* f = ready_.head;
  ready_.head = f->next;
  if (ready_.head == nullptr) ready_.tail = nullptr;
  --ready_.num;
  return f;
}

void Worker::switch_to(Fiber* from, Fiber* to) {
  if (sim) sim->note(to->id);
  if (from == to) return;
  bump(switches);
  current = to;
  tl_fiber = to;
  tsan_switch(to->tsan);
  switch_context(&from->sp, to->sp);
}

void Worker::to_main(Fiber* from) {
  current = nullptr;
  tl_fiber = nullptr;
  tsan_switch(tsan_main_);
  switch_context(&from->sp, main_sp_);
}

void Worker::resume(Fiber* f) {
  if (sim) sim->note(f->id);
  current = f;
  tl_fiber = f;
  tsan_switch(f->tsan);
  switch_context(&main_sp_, f->sp);
}

void Worker::give_way(Fiber* f) {
  bool service;
  if (sim) {
    service = num_ready() == 0 || sim->progress_turn();
  } else {
    service = num_ready() == 0 || idle_stalls > num_ready() || ++since_service_ > kServiceSwitches;
  }
  if (service) to_main(f);
  else switch_to(f, next_ready());
}

void Worker::stall(Fiber* f, const void* address, uint64_t value) {
  f->last = address;
  f->last_value = value;
  ++idle_stalls;
  bump(stalls);
  if (sim) {
    if (f->stall_event != sim->events()) f->stall_rounds = 0;
    f->stall_event = sim->events();
    ++f->stall_rounds;
  }
  make_ready(f);
  f->state = FiberState::polling;
  give_way(f);
}

void Worker::meet(Meeting& meeting, uint32_t need, Fiber* f, FiberState state, bool orders_memory) {
  char* key = &meeting.keys[meeting.phase & 1];
  if (orders_memory) tsan_edge_release(key);
  if (++meeting.arrived == need) {
    meeting.arrived = 0;
    ++meeting.phase;
    release(meeting.waiters);
  } else {
    push_back(meeting.waiters, f);
    f->state = state;
    give_way(f);
  }
  if (orders_memory) tsan_edge_acquire(key);
}

void Worker::step(Fiber* f) {
  if (!sim->switches_here()) return;
  make_ready(f);
  give_way(f);
}

void Worker::leave(Fiber* f) {
  f->state = FiberState::exited;
  --live_;
  idle_stalls = 0;
  if (sim) sim->event();
  Grid* grid = f->block->grid;
  if (--grid->live == 0) {
    grid->next = done_;
    done_ = grid;
    to_main(f);
  } else {
    give_way(f);
  }
  std::abort();  // A fiber that has left is never resumed.
}

// ---- The main context.

Worker::Worker(uint32_t idx, const ibex_pool_config& cfg) : index(idx), config(cfg), stacks_(cfg.stack_len) {
  if (cfg.mode == IBEX_SIMULATION) sim = std::make_unique<Sim>(cfg.seed);
}

Worker::~Worker() {
  for (Grid* grid : grids_) free_grid(grid, false);
  while (inbox_head_ != nullptr) {
    Grid* grid = inbox_head_;
    inbox_head_ = grid->next;
    free_grid(grid, false);
  }
  for (char* arena : arenas_) std::free(arena);
}

ibex_status Worker::launch(std::unique_ptr<Grid> grid) {
  const uint32_t num = grid->num_fibers();
  std::lock_guard lock(mutex_);
  if (shut_down_) return IBEX_SHUT_DOWN;
  if (num > IBEX_FIBERS_MAX - admitted_) return IBEX_BAD_GRID;
  if (!stacks_.map(admitted_ + num)) return IBEX_NO_MEMORY;
  stacks_mapped.store(stacks_.num_mapped(), std::memory_order_relaxed);
  admitted_ += num;
  launches.fetch_add(1, std::memory_order_relaxed);
  tsan_edge_release(grid.get());
  Grid* g = grid.release();
  if (inbox_tail_ != nullptr) inbox_tail_->next = g;
  else inbox_head_ = g;
  inbox_tail_ = g;
  attention_.store(true, std::memory_order_release);
  wake_.notify_one();
  return IBEX_OK;
}

void Worker::shutdown() {
  std::lock_guard lock(mutex_);
  shut_down_ = true;
  attention_.store(true, std::memory_order_release);
  wake_.notify_one();
}

bool Worker::take_inbox() {
  if (!attention_.load(std::memory_order_acquire)) return true;
  std::lock_guard lock(mutex_);
  if (shut_down_) return false;
  attention_.store(false, std::memory_order_relaxed);
  while (inbox_head_ != nullptr) {
    Grid* grid = inbox_head_;
    inbox_head_ = grid->next;
    grid->next = nullptr;
    build(grid);
  }
  inbox_tail_ = nullptr;
  return true;
}

void Worker::build(Grid* grid) {
  const uint32_t fibers_per_block = grid->warps_per_block * kFibersPerWarp;
  grid->blocks = std::make_unique<Block[]>(grid->num_blocks);
  grid->fibers = std::make_unique<Fiber[]>(grid->num_fibers());
  grid->live = grid->num_fibers();
  if (sim) sim->reserve(live_ + grid->live);
  for (uint32_t b = 0; b < grid->num_blocks; ++b) {
    Block& block = grid->blocks[b];
    block.grid = grid;
    block.idx = b;
    block.arena = take_arena();
    if (kFibersPerWarp > 1) block.warps = std::make_unique<Warp[]>(grid->warps_per_block);
    for (uint32_t i = 0; i < fibers_per_block; ++i) {
      Fiber& f = grid->fibers[b * fibers_per_block + i];
      f.simulated = sim != nullptr;
      f.block = &block;
      f.warp = i / kFibersPerWarp;
      f.lane = i % kFibersPerWarp;
      f.id = next_fiber_id_++;
      f.stack = stacks_.take();
      f.sp = prepare_stack(stacks_.top(f.stack), enter_fiber);
      f.tsan = tsan_create_fiber();
      make_ready(&f);
    }
  }
  live_ += grid->live;
  grids_.push_back(grid);
  idle_stalls = 0;
  if (sim) sim->event();
}

void Worker::finish_grids() {
  while (done_ != nullptr) {
    Grid* grid = done_;
    done_ = grid->next;
    tsan_edge_acquire(grid);
    for (size_t i = 0; i < grids_.size(); ++i) {
      if (grids_[i] != grid) continue;
      grids_.erase(grids_.begin() + static_cast<ptrdiff_t>(i));
      break;
    }
    release_grid(grid);
    free_grid(grid, true);
  }
}

void Worker::release_grid(Grid* grid) {
  std::lock_guard lock(mutex_);
  admitted_ -= grid->num_fibers();
  if (!grid->fibers) return;
  for (uint32_t i = 0; i < grid->num_fibers(); ++i) stacks_.give(grid->fibers[i].stack);
}

void Worker::free_grid(Grid* grid, bool finished) {
  const auto on_done = grid->on_done;
  void* ctx = grid->done_ctx;
  if (grid->blocks) {
    for (uint32_t i = 0; i < grid->num_fibers(); ++i) tsan_destroy_fiber(&grid->fibers[i]);
    for (uint32_t b = 0; b < grid->num_blocks; ++b) {
      if (grid->blocks[b].arena != nullptr) arenas_.push_back(grid->blocks[b].arena);
    }
  }
  delete grid;
  if (on_done != nullptr) on_done(ctx, finished);
}

char* Worker::take_arena() {
  if (arenas_.empty()) return static_cast<char*>(std::aligned_alloc(64, IBEX_SHARED_MAX));
  char* arena = arenas_.back();
  arenas_.pop_back();
  return arena;
}

bool Worker::run_progress(uint64_t* deadline) {
  *deadline = IBEX_PROGRESS_IDLE;
  if (config.progress == nullptr) return false;
  bump(progress_calls);
  const uint64_t now = sim ? sim->now_ns() : monotonic_ns();
  const uint64_t r = config.progress(config.progress_ctx, index, now, sim ? sim->random() : 0);
  if (r == IBEX_PROGRESS_WORKED) return true;
  *deadline = r;
  return false;
}

/// No fiber lives here: step the device while it has something to do, then sleep.
void Worker::wait_for_launch() {
  uint64_t deadline;
  while (!attention_.load(std::memory_order_acquire) && run_progress(&deadline)) {
  }
  std::unique_lock lock(mutex_);
  wake_.wait(lock, [this] { return attention_.load(std::memory_order_relaxed); });
}

/// All fibers spin and the device has nothing to do: somebody else has to move first.
void Worker::rest() {
  const uint64_t now = monotonic_ns();
  // Fibers that work also poll words that do not change (a mask, a deadline); they must not be put to sleep.
  const bool worked = moves_ != tl_moves || now - rested_ns_ > kRoundNs + num_ready() * kRoundPerFiberNs;
  moves_ = tl_moves;
  if (idle_since_ns_ == 0 || worked) idle_since_ns_ = now;
  const uint64_t quiet = now - idle_since_ns_;
  if (quiet < kSpinNs) {
    __builtin_ia32_pause();
  } else if (quiet < kYieldNs) {
    sched_yield();
  } else {
    const timespec t{0, kSleepNs};
    nanosleep(&t, nullptr);
  }
  if (quiet > config.stuck_after_ns && !reported_stuck_) {
    reported_stuck_ = true;
    dump("nothing has moved for a long time; still waiting");
  }
  rested_ns_ = monotonic_ns();
}

void Worker::run() {
  tl_worker = this;
  tsan_main_ = tsan_this_fiber();
  while (take_inbox()) {
    finish_grids();
    if (live_ == 0) {
      wait_for_launch();
      continue;
    }
    const bool idle = idle_stalls > num_ready();
    uint64_t deadline;
    const bool worked = run_progress(&deadline);
    if (idle && !worked) rest();
    else idle_since_ns_ = 0;
    idle_stalls = 0;
    since_service_ = 0;
    Fiber* f = next_ready();
    if (f == nullptr) {
      dump("deadlock: every fiber waits at a barrier or collective");
      std::abort();
    }
    resume(f);
  }
  tl_worker = nullptr;
}

/// All is quiet: the device, and if that has nothing to do, time.
ibex_status Worker::pass_time() {
  uint64_t deadline;
  if (run_progress(&deadline) || attention_.load(std::memory_order_relaxed)) {
    sim->event();
    return IBEX_OK;
  }
  if (live_ > 0 && sim->parked.empty() && sim->frozen.empty()) {
    dump("deadlock: every fiber waits at a barrier or collective");
    return IBEX_STUCK;
  }
  if (sim->quiet_ns() > config.stuck_after_ns) {
    dump("stuck: time passes and nothing moves");
    return IBEX_STUCK;
  }
  sim->advance(deadline);
  return IBEX_OK;
}

ibex_status Worker::simulate(bool (*until)(void*), void* ctx) {
  constexpr uint64_t kMain = ~uint64_t{0};
  tl_worker = this;
  tsan_main_ = tsan_this_fiber();
  ibex_status status = IBEX_OK;
  while (status == IBEX_OK) {
    sim->note(kMain);
    // In this order: what `on_done` and `until` launch is taken in before anybody could think that all is
    // quiet.
    finish_grids();
    if (until(ctx)) break;
    if (!take_inbox()) {
      status = IBEX_SHUT_DOWN;
      break;
    }
    if (sim->count_step() > config.steps_max) {
      dump("livelock: accesses change memory, but time never moves");
      status = IBEX_LIVELOCK;
      break;
    }
    Fiber* f = nullptr;
    if (num_ready() == 0) {
      status = pass_time();
    } else {
      uint64_t deadline;
      if (run_progress(&deadline)) sim->event();
      f = next_ready();
    }
    if (f != nullptr) resume(f);
  }
  tl_worker = nullptr;
  return status;
}

}  // namespace ibex::host
