/// ThreadSanitizer's view of the named accesses; empty inline functions in every other build.
///
/// C++ atomics know no scope, so the edges are drawn by hand: one happens-before key per (address, domain),
/// where the domain is `sys` or one device. A release at `gpu` scope publishes in its device's domain only,
/// a release at `sys` scope in both; an acquire at `gpu` scope looks in its device's domain, one at `sys`
/// in both. Fences carry clocks through helper fibers: a relaxed store after a fence publishes exactly what
/// the fence covered.
///
/// A *plant* weakens accesses to one address range, so that a test can see the harness find the bug.
#pragma once
#include <cstddef>
#include <cstdint>

#include "ibex/defs.h"
#include "host/fiber.h"

namespace ibex::host {

enum class Order : uint8_t { relaxed, acquire, release, acq_rel };
enum class Scope : uint8_t { gpu, sys };

/// A bug to plant: what happens to accesses in [begin, end).
enum class Plant : uint8_t {
  none,
  drop_release,    ///< a release store or update is performed relaxed
  drop_acquire,    ///< an acquire load or update is performed relaxed
  narrow_scope,    ///< a release at sys scope is performed at gpu scope
  drop_fence,      ///< fences do nothing (everywhere)
  narrow_fence,    ///< fences at sys scope are performed at gpu scope (everywhere)
  skip_warp_sync,  ///< warp::sync does not synchronise (in one function, or everywhere)
  hold_back,       ///< 16-byte stores wait until after their warp's next release store in a second range: record
                   ///< before WQE, signal before data
};

#if defined(IBEX_TSAN)

constexpr bool kTsan = true;

/// Memory that a plant aims at.
struct Range {
  const void* begin;
  const void* end;
};
/// What to plant, where. `function`: where warps do not synchronise; empty: everywhere. `until`: releases that end
/// the holding back.
struct Planting {
  Plant plant = Plant::none;
  Range at{};
  const char* function = "";
  Range until{};
};
void tsan_plant(const Planting& planting);
bool tsan_skips_warp_sync(const char* function);

void tsan_acquire(const void* p, Scope scope);
void tsan_release(const void* p, Scope scope);
void tsan_relaxed_load(const void* p, Scope scope);
void tsan_relaxed_store(const void* p, Scope scope);
void tsan_fence(Scope scope);
/// Applies the plants to a release at `p`: returns the order to perform and narrows `scope`.
Order tsan_planted(const void* p, Order order, Scope* scope);
/// Is the acquire of an access to `p` left out?
bool tsan_forgets_acquire(const void* p);
bool tsan_hold_back(uint4* p, const uint4& v);
/// The next held-back store of this warp after a release at `released`; the instrumented caller performs it.
bool tsan_next_held(const void* released, uint4** p, uint4* v);

constexpr bool acquires(Order order) { return order == Order::acquire || order == Order::acq_rel; }
constexpr bool releases(Order order) { return order == Order::release || order == Order::acq_rel; }

template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_after_load(const void* p) {
  if (acquires(kOrder) && !tsan_forgets_acquire(p)) tsan_acquire(p, kScope);
  else tsan_relaxed_load(p, kScope);
}

template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_before_store(const void* p) {
  Scope scope = kScope;
  if (releases(tsan_planted(p, kOrder, &scope))) tsan_release(p, scope);
  else tsan_relaxed_store(p, scope);
}

template <Order kOrder>
IBEX_DEV void tsan_after_store(const void* released) {
  uint4* p;
  uint4 v;
  if constexpr (releases(kOrder)) {
    while (tsan_next_held(released, &p, &v)) *p = v;
  }
}

template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_before_rmw(const void* p) {
  tsan_before_store<kOrder, kScope>(p);
}

template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_after_rmw(const void* p) {
  tsan_after_load<kOrder, kScope>(p);
  tsan_after_store<kOrder>(p);
}

template <Scope kScope>
IBEX_DEV void fence(bool) {
  tsan_fence(kScope);
}

#else

constexpr bool kTsan = false;

template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_after_load(const void*) {}
template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_before_store(const void*) {}
template <Order kOrder>
IBEX_DEV void tsan_after_store(const void*) {}
template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_before_rmw(const void*) {}
template <Order kOrder, Scope kScope>
IBEX_DEV void tsan_after_rmw(const void*) {}
IBEX_DEV bool tsan_hold_back(uint4*, const uint4&) { return false; }
IBEX_DEV bool tsan_skips_warp_sync(const char*) { return false; }

template <Scope kScope>
IBEX_DEV void fence(bool seq_cst) {
  step_point();
  __atomic_thread_fence(seq_cst ? __ATOMIC_SEQ_CST : __ATOMIC_ACQ_REL);
}

#endif

/// Simulation: an atomic update that changed memory is an event like a store.
IBEX_DEV void note_update(bool changed) {
  if (changed) count_move();
  Fiber* f = tl_fiber;
  if (changed && f != nullptr && f->simulated) sim_event(f);
}

}  // namespace ibex::host
