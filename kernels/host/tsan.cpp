/// ThreadSanitizer's edges by (address, domain), and the plants. Empty in every other build.
#include "host/tsan.h"

#if defined(IBEX_TSAN)

#include <sanitizer/tsan_interface.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/sched.h"
#include "host/tsan_sched.h"

namespace ibex::host {

namespace {
/// Address space for keys, never touched: ThreadSanitizer only wants the addresses. 64 domains of 256 MiB.
constexpr size_t kDomainLog2 = 28;
constexpr size_t kDomains = 64;
constexpr uint32_t kSysDomain = 0;

char* key_space() {
  static char* const space = [] {
    constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* mem = mmap(nullptr, kDomains << kDomainLog2, PROT_NONE, kFlags, -1, 0);
    if (mem == MAP_FAILED) {
      std::perror("tsan keys");
      std::abort();
    }
    return static_cast<char*>(mem);
  }();
  return space;
}

/// A collision merges two keys: it can hide a race, never invent one.
void* key(const void* p, uint32_t domain) {
  const uint64_t hash = reinterpret_cast<uintptr_t>(p) * 0x9e3779b97f4a7c15u;
  const size_t slot = hash >> (64 - (kDomainLog2 - 3));
  return key_space() + (size_t{domain} << kDomainLog2) + slot * 8;
}

/// The device this code runs on; the host and the NIC are on none.
bool device_domain(uint32_t* domain) {
  if (tl_fiber == nullptr) return false;
  *domain = 1 + tl_fiber->block->grid->device % (kDomains - 1);
  return true;
}

template <class F>
void as_fiber(void*& fiber, F f) {
  if (fiber == nullptr) fiber = __tsan_create_fiber(0);
  void* me = __tsan_get_current_fiber();
  tsan_switch(fiber);
  f();
  tsan_switch(me);
}

/// The last relaxed loads of one fiber. Not a fiber that gathers their clocks: ThreadSanitizer follows 255 fibers
/// well, and forgets more and more beyond.
class Loads {
 public:
  struct Load {
    const void* p;
    Scope scope;
  };

  void add(const Load& load) {
    for (uint32_t i = 0; i < num(); ++i) {
      if (loads_[i].p == load.p && loads_[i].scope == load.scope) return;
    }
    loads_[next_++ % kMax] = load;
  }
  uint32_t num() const { return next_ < kMax ? next_ : kMax; }
  const Load& operator[](uint32_t i) const { return loads_[i]; }
  void clear() { next_ = 0; }

 private:
  /// More than any fence here is about: the loop of a wait reads a handful of words.
  static constexpr uint32_t kMax = 64;
  Load loads_[kMax];
  uint32_t next_ = 0;
};

Planting g_planted;

bool contains(const Range& range, const void* p) { return p >= range.begin && p < range.end; }
bool hits(Plant what, const void* p) { return g_planted.plant == what && contains(g_planted.at, p); }

struct Held {
  const Block* block;
  uint32_t warp;
  uint4* p;
  uint4 v;
};
/// Fibers stay on their thread, so what their warp held back does as well. Neither a container nor malloc:
/// the sanitizer intercepts those and would see one fiber free what another wrote.
constexpr size_t kHeldMax = 4096;
thread_local Held tl_held[kHeldMax];
thread_local size_t tl_num_held = 0;
}  // namespace

void tsan_plant(const Planting& planting) { g_planted = planting; }

bool tsan_skips_warp_sync(const char* function) {
  if (g_planted.plant != Plant::skip_warp_sync) return false;
  return g_planted.function[0] == '\0' || std::strcmp(g_planted.function, function) == 0;
}

Order tsan_planted(const void* p, Order order, Scope* scope) {
  if (!releases(order)) return order;
  if (hits(Plant::drop_release, p)) return Order::relaxed;
  if (hits(Plant::narrow_scope, p)) *scope = Scope::gpu;
  return order;
}

bool tsan_forgets_acquire(const void* p) { return hits(Plant::drop_acquire, p); }

void tsan_acquire(const void* p, Scope scope) {
  uint32_t device;
  if (scope == Scope::sys) __tsan_acquire(key(p, kSysDomain));
  if (device_domain(&device)) __tsan_acquire(key(p, device));
}

void tsan_release(const void* p, Scope scope) {
  uint32_t device;
  if (scope == Scope::sys) __tsan_release(key(p, kSysDomain));
  if (device_domain(&device)) __tsan_release(key(p, device));
}

// A fence takes over what was released, until then, at the addresses of the relaxed loads before it: a little more
// than those loads have seen. `tsan_fenced` holds, by scope, the clock at the last fence of at least that scope.

void tsan_relaxed_load(const void* p, Scope scope) {
  Fiber* f = tl_fiber;
  if (f == nullptr) return;
  if (f->tsan_loads == nullptr) f->tsan_loads = new Loads;
  static_cast<Loads*>(f->tsan_loads)->add({p, scope});
}

void tsan_relaxed_store(const void* p, Scope scope) {
  Fiber* f = tl_fiber;
  uint32_t device;
  if (!device_domain(&device)) return;
  void*& gpu = f->tsan_fenced[static_cast<int>(Scope::gpu)];
  void*& sys = f->tsan_fenced[static_cast<int>(Scope::sys)];
  if (gpu != nullptr) as_fiber(gpu, [&] { __tsan_release(key(p, device)); });
  if (sys != nullptr && scope == Scope::sys) as_fiber(sys, [&] { __tsan_release(key(p, kSysDomain)); });
}

void tsan_fence(Scope scope) {
  Fiber* f = tl_fiber;
  if (f == nullptr || g_planted.plant == Plant::drop_fence) return;
  if (g_planted.plant == Plant::narrow_fence) scope = Scope::gpu;
  uint32_t device;
  if (f->tsan_loads != nullptr && device_domain(&device)) {
    Loads& loads = *static_cast<Loads*>(f->tsan_loads);
    for (uint32_t i = 0; i < loads.num(); ++i) {
      __tsan_acquire(key(loads[i].p, device));
      if (scope == Scope::sys && loads[i].scope == Scope::sys) __tsan_acquire(key(loads[i].p, kSysDomain));
    }
    if (scope == Scope::sys) loads.clear();
  }
  for (int i = 0; i <= static_cast<int>(scope); ++i) {
    __tsan_release(&f->tsan_fenced[i]);
    as_fiber(f->tsan_fenced[i], [&] { __tsan_acquire(&f->tsan_fenced[i]); });
  }
}

bool tsan_hold_back(uint4* p, const uint4& v) {
  if (tl_fiber == nullptr || !hits(Plant::hold_back, p)) return false;
  if (tl_num_held == kHeldMax) return false;
  tl_held[tl_num_held++] = {tl_fiber->block, tl_fiber->warp, p, v};
  return true;
}

bool tsan_next_held(const void* released, uint4** p, uint4* v) {
  const Fiber* f = tl_fiber;
  if (f == nullptr || tl_num_held == 0 || !contains(g_planted.until, released)) return false;
  for (size_t i = 0; i < tl_num_held; ++i) {
    Held& held = tl_held[i];
    if (held.block != f->block || held.warp != f->warp) continue;
    *p = held.p;
    *v = held.v;
    held = tl_held[--tl_num_held];
    return true;
  }
  return false;
}

void tsan_destroy_fiber(Fiber* f) {
  __tsan_destroy_fiber(f->tsan);
  delete static_cast<Loads*>(f->tsan_loads);
  for (void* helper : f->tsan_fenced) {
    if (helper != nullptr) __tsan_destroy_fiber(helper);
  }
}

}  // namespace ibex::host

#endif
