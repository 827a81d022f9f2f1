/// warp.h where a lane is a thread: nvcc, and lane fibers on the host.
#pragma once
#include "ibex/defs.h"
#include "ibex/ptx.h"

#define EACH_LANE(l) if (const uint32_t l = ::ibex::warp::lane(); true)
#define ONE_LANE if (::ibex::warp::lane() == 0)

#if defined(IBEX_CUDA)
#define IBEX_SHARED(T, name, n) __shared__ T name[n]
#else
#define IBEX_SHARED(T, name, n)     \
  static const char name##_tag = 0; \
  T* const name = static_cast<T*>(::ibex::host::shared_memory(&name##_tag, sizeof(T) * (n), alignof(T)))
#endif

namespace ibex::warp {

#if defined(IBEX_CUDA)
IBEX_DEV uint32_t lane() {
  uint32_t l;
  asm("mov.u32 %0, %%laneid;" : "=r"(l));
  return l;
}
IBEX_DEV uint32_t id() { return threadIdx.x / kWarpSize; }
IBEX_DEV uint32_t count() { return blockDim.x / kWarpSize; }
IBEX_DEV uint32_t block_id() { return blockIdx.x; }
IBEX_DEV uint32_t num_blocks() { return gridDim.x; }
IBEX_DEV void sync() { __syncwarp(); }
IBEX_DEV void sync_block() { __syncthreads(); }
IBEX_DEV void sync_warps(uint32_t barrier_id, uint32_t num_warps) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier_id), "r"(num_warps * kWarpSize) : "memory");
}
#else
IBEX_DEV uint32_t lane() { return host::tl_fiber->lane; }
IBEX_DEV uint32_t id() { return host::tl_fiber->warp; }
IBEX_DEV uint32_t count() { return host::num_warps(); }
IBEX_DEV uint32_t block_id() { return host::block_id(); }
IBEX_DEV uint32_t num_blocks() { return host::num_blocks(); }
/// `function` is the caller's name, for bugs planted by name (host/tsan.h).
IBEX_DEV void sync(const char* function = __builtin_FUNCTION()) {
  if (!host::tsan_skips_warp_sync(function)) host::exchange(0, true);
}
IBEX_DEV void sync_block() { host::barrier(0, host::num_warps()); }
IBEX_DEV void sync_warps(uint32_t barrier_id, uint32_t num_warps) { host::barrier(barrier_id, num_warps); }
#endif

/// One value per lane: here each thread holds its own.
template <class T>
struct lanes {
  T v;
  IBEX_HD T& operator[](uint32_t) { return v; }
  IBEX_HD const T& operator[](uint32_t) const { return v; }
};

namespace detail {

template <class T>
IBEX_DEV T shfl(T v, uint32_t src) {
  static_assert(sizeof(T) <= 8);
#if defined(IBEX_CUDA)
  return __shfl_sync(kFullMask, v, static_cast<int>(src));
#else
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &v, sizeof(T));
  bits = host::exchange(bits, false)[src % kWarpSize];
  __builtin_memcpy(&v, &bits, sizeof(T));
  return v;
#endif
}

/// Combines all lanes' values pairwise; every lane gets the result.
template <uint32_t kWidth, class T, class F>
IBEX_DEV T butterfly(T v, F combine) {
  IBEX_UNROLL
  for (uint32_t d = kWidth / 2; d != 0; d /= 2) v = combine(v, shfl(v, lane() ^ d));
  return v;
}

}  // namespace detail

IBEX_DEV uint32_t ballot(const lanes<bool>& x) {
#if defined(IBEX_CUDA)
  return __ballot_sync(kFullMask, x.v);
#else
  const uint64_t* all = host::exchange(x.v, false);
  uint32_t mask = 0;
  for (uint32_t l = 0; l < kWarpSize; ++l) mask |= static_cast<uint32_t>(all[l]) << l;
  return mask;
#endif
}

IBEX_DEV bool any(const lanes<bool>& x) { return ballot(x) != 0; }
IBEX_DEV bool all(const lanes<bool>& x) { return ballot(x) == kFullMask; }

template <class T>
IBEX_DEV T bcast(const lanes<T>& x, uint32_t src) {
  return detail::shfl(x.v, src);
}

template <class T>
IBEX_DEV lanes<T> shuffle(const lanes<T>& x, const lanes<uint32_t>& src) {
  return {detail::shfl(x.v, src.v)};
}

template <uint32_t kWidth>
IBEX_DEV void reduce_max(lanes<float>& x) {
  x.v = detail::butterfly<kWidth>(x.v, max_num);
}

#if defined(IBEX_CUDA)
IBEX_DEV uint32_t reduce_add(const lanes<uint32_t>& x) { return __reduce_add_sync(kFullMask, x.v); }
IBEX_DEV uint32_t reduce_max(const lanes<uint32_t>& x) { return __reduce_max_sync(kFullMask, x.v); }
IBEX_DEV uint32_t reduce_min(const lanes<uint32_t>& x) { return __reduce_min_sync(kFullMask, x.v); }
IBEX_DEV uint32_t reduce_or(const lanes<uint32_t>& x) { return __reduce_or_sync(kFullMask, x.v); }
#else
IBEX_DEV uint32_t reduce_add(const lanes<uint32_t>& x) {
  return detail::butterfly<32>(x.v, [](uint32_t a, uint32_t b) { return a + b; });
}
IBEX_DEV uint32_t reduce_max(const lanes<uint32_t>& x) {
  return detail::butterfly<32>(x.v, max_of<uint32_t>);
}
IBEX_DEV uint32_t reduce_min(const lanes<uint32_t>& x) {
  return detail::butterfly<32>(x.v, min_of<uint32_t>);
}
IBEX_DEV uint32_t reduce_or(const lanes<uint32_t>& x) {
  return detail::butterfly<32>(x.v, [](uint32_t a, uint32_t b) { return a | b; });
}
#endif

IBEX_DEV uint64_t reduce_add(const lanes<uint64_t>& x) {
  return detail::butterfly<32>(x.v, [](uint64_t a, uint64_t b) { return a + b; });
}

IBEX_DEV uint32_t exclusive_add(lanes<uint32_t>& x) {
  uint32_t sum = x.v;
  IBEX_UNROLL
  for (uint32_t d = 1; d < kWarpSize; d *= 2) {
    const uint32_t l = lane();
    const uint32_t below = detail::shfl(sum, l >= d ? l - d : l);
    if (l >= d) sum += below;
  }
  const uint32_t total = detail::shfl(sum, kWarpSize - 1);
  x.v = sum - x.v;
  return total;
}

template <class F>
IBEX_DEV auto one_lane(F f) -> decltype(f()) {
  decltype(f()) r{};
  if (lane() == 0) r = f();
  return detail::shfl(r, 0);
}

/// The loads of one batch of kUnroll are all in flight before its first store.
template <uint32_t kUnroll>
IBEX_DEV void copy16(uint4* dst, const uint4* src, uint32_t n16) {
  constexpr uint32_t kBatch = kWarpSize * kUnroll;
  uint32_t i = lane();
  for (; i + kBatch - kWarpSize < n16; i += kBatch) {
    uint4 t[kUnroll];
    IBEX_UNROLL
    for (uint32_t j = 0; j < kUnroll; ++j) t[j] = ld_stream16(src + i + kWarpSize * j);
    IBEX_UNROLL
    for (uint32_t j = 0; j < kUnroll; ++j) st_stream16(dst + i + kWarpSize * j, t[j]);
  }
  for (; i < n16; i += kWarpSize) st_stream16(dst + i, ld_stream16(src + i));
}

IBEX_DEV void fill16(uint4* dst, uint4 v, uint32_t n16) {
  for (uint32_t i = lane(); i < n16; i += kWarpSize) st_stream16(dst + i, v);
}

}  // namespace ibex::warp
