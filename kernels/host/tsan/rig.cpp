#include "host/tsan/rig.h"

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "host/tsan_sched.h"

namespace ibex::rig {

namespace {
[[noreturn]] void fail(const char* what, const char* detail) {
  std::fprintf(stderr, "rig: %s: %s\n", what, detail);
  std::exit(1);
}

uint32_t kernel_id(const char* name) {
  constexpr uint32_t kIdsMax = 64;
  for (uint32_t id = 0; id < kIdsMax; ++id) {
    const char* candidate = ibex_kernel_name(id);
    if (candidate != nullptr && std::strcmp(candidate, name) == 0) return id;
  }
  fail("no such kernel", name);
}
}  // namespace

void plant(const Options& options, const void* begin, size_t len, const void* until, size_t until_len) {
#if defined(IBEX_TSAN)
  const auto range = [](const void* p, size_t n) { return host::Range{p, static_cast<const char*>(p) + n}; };
  host::tsan_plant({options.plant, range(begin, len), options.at, range(until, until_len)});
#else
  if (options.plant != host::Plant::none) fail("plants need the sanitizer build", "IBEX_TSAN");
  (void)begin, (void)len, (void)until, (void)until_len;
#endif
}

Rig::Rig(const Options& options, ibex_progress_fn progress, void* progress_ctx)
    : simulation_(options.seed != 0) {
  ibex_pool_config config{};
  config.num_workers = simulation_ ? 1 : options.workers;
  config.mode = simulation_ ? IBEX_SIMULATION : IBEX_REAL_TIME;
  config.seed = options.seed;
  config.progress = progress;
  config.progress_ctx = progress_ctx;
  // Instrumented frames are several times larger.
  config.stack_len = 256 << 10;
  ibex_status status;
  pool_ = ibex_pool_create(&config, &status);
  if (pool_ == nullptr) fail("cannot create the pool", "see ibex_pool_config");
  if (simulation_) return;
  for (uint32_t i = 0; i < options.workers; ++i) threads_.emplace_back(ibex_pool_worker, pool_, i);
}

Rig::~Rig() {
  stop();
  ibex_pool_destroy(pool_);
}

void Rig::stop() {
  ibex_pool_shutdown(pool_);
  for (std::thread& thread : threads_) thread.join();
  threads_.clear();
}

struct Rig::Outstanding {
  Rig* rig;
  Completed completed;
  void* ctx;
};

void Rig::launch_bytes(const char* kernel, uint32_t device, uint32_t blocks, uint32_t warps,
                       const void* args, size_t len, Completed completed, void* ctx) {
  ibex_launch launch{};
  launch.kernel_id = kernel_id(kernel);
  launch.device = device;
  launch.num_blocks = blocks;
  launch.warps_per_block = warps;
  launch.args = args;
  launch.args_len = len;
  launch.on_done = on_done;
  launch.done_ctx = new Outstanding{this, completed, ctx};
  outstanding_.fetch_add(1, std::memory_order_relaxed);
  if (ibex_pool_launch(pool_, &launch) != IBEX_OK) fail("launch refused", kernel);
}

void Rig::on_done(void* outstanding, bool finished) {
  const std::unique_ptr<Outstanding> done(static_cast<Outstanding*>(outstanding));
  if (!finished) return;
  Rig* rig = done->rig;
  // What this starts is counted before it is counted as done itself.
  if (done->completed != nullptr) done->completed(done->ctx);
  // For `wait`: all launches publish here, and only it looks.
  host::tsan_edge_release(rig);
  rig->outstanding_.fetch_sub(1, std::memory_order_relaxed);
}

bool Rig::all_done() const { return outstanding_.load(std::memory_order_relaxed) == 0; }

void Rig::wait() {
  if (simulation_) {
    const auto done = [](void* self) { return static_cast<Rig*>(self)->all_done(); };
    if (ibex_pool_simulate(pool_, done, this) != IBEX_OK) fail("simulation", "stuck");
  }
  while (!all_done()) std::this_thread::sleep_for(std::chrono::microseconds(100));
  host::tsan_edge_acquire(this);
}

}  // namespace ibex::rig
