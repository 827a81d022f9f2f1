/// warp.h where a warp is one fiber: a lane region is a loop that the compiler vectorises, a collective is
/// a function.
#pragma once
#include <cstring>

#include "ibex/defs.h"
#include "ibex/ptx.h"

/// Lanes are independent within a region (that is what makes it a region), hence `ivdep`.
#define EACH_LANE(l) _Pragma("GCC ivdep") for (uint32_t l = 0; l < ::ibex::kWarpSize; ++l)
#define ONE_LANE
#define IBEX_SHARED(T, name, n)     \
  static const char name##_tag = 0; \
  T* const name = static_cast<T*>(::ibex::host::shared_memory(&name##_tag, sizeof(T) * (n), alignof(T)))

namespace ibex::warp {

IBEX_DEV uint32_t id() { return host::tl_fiber->warp; }
IBEX_DEV uint32_t count() { return host::num_warps(); }
IBEX_DEV uint32_t block_id() { return host::block_id(); }
IBEX_DEV uint32_t num_blocks() { return host::num_blocks(); }
/// Program order is all there is to synchronise; the simulation may still interleave other warps here.
IBEX_DEV void sync() { host::step_point(); }
IBEX_DEV void sync_block() { host::barrier(0, host::num_warps()); }
IBEX_DEV void sync_warps(uint32_t barrier_id, uint32_t num_warps) { host::barrier(barrier_id, num_warps); }

/// One value per lane, all of them on this fiber's stack.
template <class T>
struct alignas(64) lanes {
  T v[kWarpSize];
  T& operator[](uint32_t l) { return v[l]; }
  const T& operator[](uint32_t l) const { return v[l]; }
};

namespace detail {

template <class T, class F>
IBEX_DEV T fold(const lanes<T>& x, F combine) {
  T r = x.v[0];
  for (uint32_t l = 1; l < kWarpSize; ++l) r = combine(r, x.v[l]);
  return r;
}

}  // namespace detail

IBEX_DEV uint32_t ballot(const lanes<bool>& x) {
  uint32_t mask = 0;
  for (uint32_t l = 0; l < kWarpSize; ++l) mask |= static_cast<uint32_t>(x.v[l]) << l;
  return mask;
}

IBEX_DEV bool any(const lanes<bool>& x) { return ballot(x) != 0; }
IBEX_DEV bool all(const lanes<bool>& x) { return ballot(x) == kFullMask; }

template <class T>
IBEX_DEV T bcast(const lanes<T>& x, uint32_t src) {
  return x.v[src % kWarpSize];
}

template <class T>
IBEX_DEV lanes<T> shuffle(const lanes<T>& x, const lanes<uint32_t>& src) {
  lanes<T> r;
  for (uint32_t l = 0; l < kWarpSize; ++l) r.v[l] = x.v[src.v[l] % kWarpSize];
  return r;
}

template <uint32_t kWidth>
IBEX_DEV void reduce_max(lanes<float>& x) {
  for (uint32_t g = 0; g < kWarpSize; g += kWidth) {
    float m = x.v[g];
    for (uint32_t i = 1; i < kWidth; ++i) m = max_num(m, x.v[g + i]);
    for (uint32_t i = 0; i < kWidth; ++i) x.v[g + i] = m;
  }
}

IBEX_DEV uint32_t reduce_add(const lanes<uint32_t>& x) {
  return detail::fold(x, [](uint32_t a, uint32_t b) { return a + b; });
}
IBEX_DEV uint32_t reduce_max(const lanes<uint32_t>& x) { return detail::fold(x, max_of<uint32_t>); }
IBEX_DEV uint32_t reduce_min(const lanes<uint32_t>& x) { return detail::fold(x, min_of<uint32_t>); }
IBEX_DEV uint32_t reduce_or(const lanes<uint32_t>& x) {
  return detail::fold(x, [](uint32_t a, uint32_t b) { return a | b; });
}
IBEX_DEV uint64_t reduce_add(const lanes<uint64_t>& x) {
  return detail::fold(x, [](uint64_t a, uint64_t b) { return a + b; });
}

IBEX_DEV uint32_t exclusive_add(lanes<uint32_t>& x) {
  uint32_t total = 0;
  for (uint32_t l = 0; l < kWarpSize; ++l) {
    const uint32_t own = x.v[l];
    x.v[l] = total;
    total += own;
  }
  return total;
}

template <class F>
IBEX_DEV auto one_lane(F f) -> decltype(f()) {
  return f();
}

/// One memcpy; the simulation cuts it in pieces, so that others may see a copy half done.
template <uint32_t kUnroll>
IBEX_DEV void copy16(uint4* dst, const uint4* src, uint32_t n16) {
  if (host::tl_fiber != nullptr && host::tl_fiber->simulated) {
    constexpr uint32_t kPiece = kWarpSize * kUnroll;
    for (uint32_t i = 0; i < n16; i += kPiece) {
      host::step_before_write();
      std::memcpy(dst + i, src + i, size_t{min_of(kPiece, n16 - i)} * 16);
    }
    return;
  }
  host::step_before_write();
  std::memcpy(dst, src, size_t{n16} * 16);
}

IBEX_DEV void fill16(uint4* dst, uint4 v, uint32_t n16) {
  host::step_before_write();
  for (uint32_t i = 0; i < n16; ++i) dst[i] = v;
}

}  // namespace ibex::warp
