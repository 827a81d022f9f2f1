/// ptx.h on the host: the atomic of the same order; a yield point; under ThreadSanitizer a scoped edge.
///
/// Scopes collapse on x86, so only ThreadSanitizer (host/tsan.h) can see `gpu` where `sys` is needed. There
/// the atomics themselves are relaxed and the edge is one happens-before key per (address, scope).
#pragma once
#include "ibex/defs.h"
#include "host/fiber.h"
#include "host/tsan.h"

namespace ibex {

namespace detail {

using host::Order;
using host::Scope;

constexpr int memory_order(Order order) {
  if (host::kTsan) return __ATOMIC_RELAXED;
  switch (order) {
    case Order::relaxed: return __ATOMIC_RELAXED;
    case Order::acquire: return __ATOMIC_ACQUIRE;
    case Order::release: return __ATOMIC_RELEASE;
    case Order::acq_rel: return __ATOMIC_ACQ_REL;
  }
  return __ATOMIC_SEQ_CST;
}

template <Order kOrder, Scope kScope, class T>
IBEX_DEV T load(const T* p) {
  host::step_point();
  const T v = __atomic_load_n(p, memory_order(kOrder));
  host::tsan_after_load<kOrder, kScope>(p);
  host::poll(p, v);
  return v;
}

template <Scope kScope, class T>
IBEX_DEV T peek(const T* p) {
  host::step_point();
  const T v = __atomic_load_n(p, __ATOMIC_RELAXED);
  host::tsan_after_load<Order::relaxed, kScope>(p);
  return v;
}

template <Order kOrder, Scope kScope, class T>
IBEX_DEV void store(T* p, T v) {
  host::step_before_store(p, v);
  host::tsan_before_store<kOrder, kScope>(p);
  __atomic_store_n(p, v, memory_order(kOrder));
  host::tsan_after_store<kOrder>(p);
}

/// `combine(old)` gives the value to store; the loop is a single iteration unless another thread interferes.
template <Order kOrder, Scope kScope, class T, class F>
IBEX_DEV T update(T* p, F combine) {
  host::step_point();
  host::tsan_before_rmw<kOrder, kScope>(p);
  T old = __atomic_load_n(p, __ATOMIC_RELAXED);
  T wanted = combine(old);
  while (!__atomic_compare_exchange_n(p, &old, wanted, false, memory_order(kOrder), __ATOMIC_RELAXED)) {
    wanted = combine(old);
  }
  host::tsan_after_rmw<kOrder, kScope>(p);
  host::note_update(wanted != old);
  return old;
}

template <Order kOrder, Scope kScope, class T>
IBEX_DEV T add(T* p, T v) {
  host::step_point();
  host::tsan_before_rmw<kOrder, kScope>(p);
  const T old = __atomic_fetch_add(p, v, memory_order(kOrder));
  host::tsan_after_rmw<kOrder, kScope>(p);
  host::note_update(v != 0);
  return old;
}

template <Order kOrder, Scope kScope, class T>
IBEX_DEV T compare_and_swap(T* p, T expected, T wanted) {
  host::step_point();
  host::tsan_before_rmw<kOrder, kScope>(p);
  T old = expected;
  constexpr int kFailure = kOrder == Order::relaxed || host::kTsan ? __ATOMIC_RELAXED : __ATOMIC_ACQUIRE;
  const bool swapped = __atomic_compare_exchange_n(p, &old, wanted, false, memory_order(kOrder), kFailure);
  host::tsan_after_rmw<kOrder, kScope>(p);
  host::note_update(swapped && wanted != expected);
  if (!swapped) host::poll(p, old);
  return old;
}

}  // namespace detail

#define IBEX_HOST_LD(order, scope, type)                                \
  IBEX_DEV type ld_##order##_##scope(const type* p) {                   \
    return detail::load<host::Order::order, host::Scope::scope>(p);     \
  }

#define IBEX_HOST_PEEK(scope, type) \
  IBEX_DEV type peek_relaxed_##scope(const type* p) { return detail::peek<host::Scope::scope>(p); }

#define IBEX_HOST_ST(order, scope, type)                         \
  IBEX_DEV void st_##order##_##scope(type* p, type v) {          \
    detail::store<host::Order::order, host::Scope::scope>(p, v); \
  }

#define IBEX_HOST_UPDATE(order, scope) detail::update<host::Order::order, host::Scope::scope>

#define IBEX_HOST_RMW(order, scope, type)                                                               \
  IBEX_DEV type add_##order##_##scope(type* p, type v) {                                                \
    return detail::add<host::Order::order, host::Scope::scope>(p, v);                                   \
  }                                                                                                     \
  IBEX_DEV type exch_##order##_##scope(type* p, type v) {                                               \
    return IBEX_HOST_UPDATE(order, scope)(p, [&](type) { return v; });                                  \
  }                                                                                                     \
  IBEX_DEV type or_##order##_##scope(type* p, type v) {                                                 \
    return IBEX_HOST_UPDATE(order, scope)(p, [&](type old) { return old | v; });                        \
  }                                                                                                     \
  IBEX_DEV type max_##order##_##scope(type* p, type v) {                                                \
    return IBEX_HOST_UPDATE(order, scope)(p, [&](type old) { return max_of(old, v); });                 \
  }

#define IBEX_HOST_CAS(order, scope, type)                                                    \
  IBEX_DEV type cas_##order##_##scope(type* p, type expected, type wanted) {                 \
    return detail::compare_and_swap<host::Order::order, host::Scope::scope>(p, expected, wanted); \
  }

#define IBEX_HOST_TYPE(scope, type)  \
  IBEX_HOST_LD(relaxed, scope, type) \
  IBEX_HOST_LD(acquire, scope, type) \
  IBEX_HOST_PEEK(scope, type) \
  IBEX_HOST_ST(relaxed, scope, type) \
  IBEX_HOST_ST(release, scope, type) \
  IBEX_HOST_RMW(relaxed, scope, type) \
  IBEX_HOST_RMW(acquire, scope, type) \
  IBEX_HOST_RMW(release, scope, type) \
  IBEX_HOST_RMW(acq_rel, scope, type) \
  IBEX_HOST_CAS(relaxed, scope, type) \
  IBEX_HOST_CAS(acq_rel, scope, type)

IBEX_HOST_TYPE(gpu, uint32_t)
IBEX_HOST_TYPE(gpu, uint64_t)
IBEX_HOST_TYPE(sys, uint32_t)
IBEX_HOST_TYPE(sys, uint64_t)

#undef IBEX_HOST_TYPE
#undef IBEX_HOST_CAS
#undef IBEX_HOST_RMW
#undef IBEX_HOST_UPDATE
#undef IBEX_HOST_ST
#undef IBEX_HOST_PEEK
#undef IBEX_HOST_LD

IBEX_DEV void fence_acq_rel_gpu() { host::fence<host::Scope::gpu>(false); }
IBEX_DEV void fence_acq_rel_sys() { host::fence<host::Scope::sys>(false); }
IBEX_DEV void fence_seq_cst_gpu() { host::fence<host::Scope::gpu>(true); }
IBEX_DEV void fence_seq_cst_sys() { host::fence<host::Scope::sys>(true); }

IBEX_DEV void st_relaxed_mmio_sys(uint64_t* p, uint64_t v) { st_relaxed_sys(p, v); }

IBEX_DEV void st_wqe(uint4* p, uint4 v) {
  host::step_before_write();
  if (host::tsan_hold_back(p, v)) return;
  *p = v;
}

IBEX_DEV uint4 ld_stream16(const uint4* p) {
  host::step_point();
  return *p;
}

IBEX_DEV void st_stream16(uint4* p, uint4 v) {
  host::step_before_write();
  if (host::tsan_hold_back(p, v)) return;
  *p = v;
}

IBEX_DEV uint64_t clock_ns() { return host::clock_ns(); }
IBEX_DEV void backoff() { host::backoff(); }

}  // namespace ibex
