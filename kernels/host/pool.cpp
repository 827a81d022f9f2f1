/// The C surface, and what kernels' inline code asks of the fiber it runs on.
#include "host/pool.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "host/clock.h"
#include "host/registry.h"
#include "host/sched.h"
#include "host/tsan_sched.h"

using ibex::host::Grid;
using ibex::host::Worker;

struct ibex_pool {
  ibex_pool_config config;
  std::vector<std::unique_ptr<Worker>> workers;
};

namespace {

constexpr size_t kStackLenDefault = 64 << 10;
constexpr size_t kStackLenMin = 16 << 10;
constexpr size_t kStackLenMax = size_t{1} << 30;
constexpr uint64_t kStuckAfterRealNs = 30'000'000'000;
constexpr uint64_t kStuckAfterSimNs = 1'000'000'000'000;
constexpr uint64_t kStepsMax = 50'000'000;

bool with_defaults(ibex_pool_config& c) {
  if (c.mode != IBEX_REAL_TIME && c.mode != IBEX_SIMULATION) return false;
  if (c.num_workers == 0 || c.num_workers > IBEX_WORKERS_MAX) return false;
  if (c.mode == IBEX_SIMULATION && c.num_workers != 1) return false;
  if (c.stack_len == 0) c.stack_len = kStackLenDefault;
  if (c.stack_len < kStackLenMin || c.stack_len > kStackLenMax) return false;
  const bool real_time = c.mode == IBEX_REAL_TIME;
  if (c.stuck_after_ns == 0) c.stuck_after_ns = real_time ? kStuckAfterRealNs : kStuckAfterSimNs;
  if (c.steps_max == 0) c.steps_max = kStepsMax;
  return true;
}

bool grid_is_valid(const ibex_launch& l, const ibex_kernel& kernel) {
  if (l.num_blocks == 0 || l.num_blocks > IBEX_FIBERS_MAX) return false;
  if (l.warps_per_block == 0 || l.warps_per_block > IBEX_WARPS_PER_BLOCK_MAX) return false;
  return l.warps_per_block * ibex::kWarpSize <= kernel.threads_max;
}

}  // namespace

ibex_pool* ibex_pool_create(const ibex_pool_config* config, ibex_status* status) {
  *status = IBEX_BAD_CONFIG;
  ibex_pool_config c = *config;
  if (!with_defaults(c)) return nullptr;
  *status = IBEX_OK;
  auto pool = std::make_unique<ibex_pool>();
  pool->config = c;
  for (uint32_t i = 0; i < c.num_workers; ++i) {
    pool->workers.push_back(std::make_unique<Worker>(i, c));
  }
  return pool.release();
}

void ibex_pool_shutdown(ibex_pool* pool) {
  for (auto& w : pool->workers) w->shutdown();
}

void ibex_pool_destroy(ibex_pool* pool) { delete pool; }

void ibex_pool_worker(ibex_pool* pool, uint32_t worker) { pool->workers[worker]->run(); }

ibex_status ibex_pool_launch(ibex_pool* pool, const ibex_launch* launch) {
  const ibex_kernel* kernel = ibex::host::find_kernel(launch->kernel_id);
  if (kernel == nullptr) return IBEX_UNKNOWN_KERNEL;
  if (launch->args_len != kernel->args_len || launch->args_len > IBEX_ARGS_LEN_MAX) return IBEX_BAD_ARGS_LEN;
  if (!grid_is_valid(*launch, *kernel)) return IBEX_BAD_GRID;
  std::unique_ptr<Grid> grid(new Grid);
  grid->kernel = kernel;
  grid->device = launch->device;
  grid->num_blocks = launch->num_blocks;
  grid->warps_per_block = launch->warps_per_block;
  grid->on_done = launch->on_done;
  grid->done_ctx = launch->done_ctx;
  std::memcpy(grid->args, launch->args, launch->args_len);
  return pool->workers[launch->device % pool->workers.size()]->launch(std::move(grid));
}

ibex_status ibex_pool_simulate(ibex_pool* pool, bool (*until)(void*), void* ctx) {
  if (pool->config.mode != IBEX_SIMULATION) return IBEX_BAD_CONFIG;
  return pool->workers[0]->simulate(until, ctx);
}

ibex_status ibex_pool_kill(ibex_pool* pool, uint32_t device) {
  if (pool->config.mode != IBEX_SIMULATION) return IBEX_BAD_CONFIG;
  pool->workers[0]->kill(device);
  return IBEX_OK;
}

ibex_status ibex_pool_freeze(ibex_pool* pool, uint32_t device, bool frozen) {
  if (pool->config.mode != IBEX_SIMULATION) return IBEX_BAD_CONFIG;
  pool->workers[0]->freeze(device, frozen);
  return IBEX_OK;
}

uint64_t ibex_pool_now_ns(const ibex_pool* pool) {
  const auto& sim = pool->workers[0]->sim;
  return sim ? sim->now_ns() : ibex::host::monotonic_ns();
}

void ibex_pool_get_stats(const ibex_pool* pool, ibex_pool_stats* stats) {
  *stats = ibex_pool_stats{};
  for (const auto& w : pool->workers) {
    stats->launches += w->launches.load(std::memory_order_relaxed);
    stats->switches += w->switches.load(std::memory_order_relaxed);
    stats->stalls += w->stalls.load(std::memory_order_relaxed);
    stats->progress_calls += w->progress_calls.load(std::memory_order_relaxed);
    stats->stacks += w->stacks_mapped.load(std::memory_order_relaxed);
    if (!w->sim) continue;
    stats->schedule_hash = w->sim->hash();
    stats->events = w->sim->events();
  }
}

namespace ibex::host {

namespace {
[[noreturn]] void broken(const char* what) {
  tl_worker->dump(what);
  std::abort();
}
}  // namespace

void stalled(Fiber* f, const void* address, uint64_t value) {
  f->pc = __builtin_return_address(0);
  tl_worker->stall(f, address, value);
}

void moved(Fiber*) {
  ++tl_moves;
  tl_worker->idle_stalls = 0;
}
void sim_step(Fiber* f) { tl_worker->step(f); }
void sim_event(Fiber*) { tl_worker->sim->event(); }

uint64_t clock_ns() {
  const Fiber* f = tl_fiber;
  if (f == nullptr || !f->simulated) return monotonic_ns();
  step_point();
  // A loop that only waits for time to pass is a wait like any other.
  poll(tl_worker, 0);
  return tl_worker->sim->now_ns();
}

void backoff() {
  Fiber* f = tl_fiber;
  if (f == nullptr) return __builtin_ia32_pause();
  f->pc = __builtin_return_address(0);
  tl_worker->stall(f, f->last, f->last_value);
}

uint32_t block_id() { return tl_fiber->block->idx; }
uint32_t num_blocks() { return tl_fiber->block->grid->num_blocks; }
uint32_t num_warps() { return tl_fiber->block->grid->warps_per_block; }

void barrier(uint32_t id, uint32_t num_warps) {
  Fiber* f = tl_fiber;
  f->wait_id = static_cast<uint16_t>(id);
  if (id >= kBarriers) broken("barrier id above 15");
  const uint32_t warps_max = f->block->grid->warps_per_block;
  if (num_warps == 0 || num_warps > warps_max) broken("barrier for more warps than the block has");
  if (f->simulated) sim_step(f);
  tl_worker->meet(f->block->barriers[id], num_warps * kFibersPerWarp, f, FiberState::barrier, true);
}

const uint64_t* exchange(uint64_t bits, bool orders_memory) {
  Fiber* f = tl_fiber;
  Warp& warp = f->block->warps[f->warp];
  uint64_t* row = warp.slots[f->collective++ & 1];
  row[f->lane] = bits;
  tl_worker->meet(warp.meeting, kWarpSize, f, FiberState::collective, orders_memory);
  return row;
}

void* shared_memory(const void* tag, size_t len, size_t align) {
  constexpr unsigned char kPoison = 0xa5;
  Block& b = *tl_fiber->block;
  for (uint32_t i = 0; i < b.num_shared; ++i) {
    if (b.shared[i].tag == tag) return b.arena + b.shared[i].offset;
  }
  if (b.arena == nullptr) broken("out of memory for a block's shared memory");
  const size_t offset = (b.shared_len + align - 1) / align * align;
  if (b.num_shared == kSharedMax) broken("too many IBEX_SHARED declarations in one kernel");
  if (len > IBEX_SHARED_MAX - offset) broken("shared memory of one block above IBEX_SHARED_MAX");
  b.shared[b.num_shared++] = {tag, offset};
  b.shared_len = offset + len;
  // As on a GPU, shared memory starts with no particular content; make that visible.
  for (size_t i = 0; i < len; ++i) b.arena[offset + i] = static_cast<char>(kPoison);
  return b.arena + offset;
}

}  // namespace ibex::host
