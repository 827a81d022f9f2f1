/// What one kernel source needs in order to compile for three machines: nvcc, warp fibers, lane fibers.
///
///   IBEX_CUDA         nvcc, device code
///   IBEX_WARP_FIBERS  host, one fiber per warp; a lane region is a loop (default host build, fast)
///   IBEX_LANE_FIBERS  host, one fiber per CUDA thread (fidelity; the build that ThreadSanitizer judges)
///
/// Exactly one of them is defined after this header. The host runtime behind the fibers is kernels/host/.
///
///   IBEX_DEV          a function that is inlined wherever it is used: the rule
///   IBEX_CALL         on CUDA a function of its own, for what waits, fails, or happens once per half: its
///                     registers do not add to its callers'. It takes scalars and references to global, shared
///                     or parameter memory; a reference to a local would force the local onto the stack.
///   IBEX_UNROLL       a loop whose iterations should be in flight together
///   IBEX_ROLLED       a loop that is off the hot path: unrolled, as nvcc likes to, it would only be code
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define IBEX_CUDA 1
#define IBEX_DEV __device__ __forceinline__
#define IBEX_HD __host__ __device__ __forceinline__
#define IBEX_UNROLL _Pragma("unroll")
#define IBEX_CALL static __device__ __noinline__
#define IBEX_ROLLED _Pragma("unroll 1")
#else
#if !defined(IBEX_LANE_FIBERS)
#define IBEX_WARP_FIBERS 1
#endif
#define IBEX_DEV inline __attribute__((always_inline))
#define IBEX_HD inline __attribute__((always_inline))
#define IBEX_UNROLL
#define IBEX_CALL inline
#define IBEX_ROLLED
/// CUDA's 16-byte vector, for the accesses that move payload and WQE segments.
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
#endif

namespace ibex {

constexpr uint32_t kWarpSize = 32;
constexpr uint32_t kFullMask = 0xffffffffu;
/// Warps of one block at most, and so the size of what shared memory holds per warp.
constexpr uint32_t kMaxWarps = 32;

/// The blocks a kernel body works as: a launch of its own, or one rank's share of a cooperative launch.
struct BlockRange {
  uint32_t idx;  ///< this block, 0-based within the share
  uint32_t num;
};

IBEX_HD uint32_t popc(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint32_t>(__popc(static_cast<int>(x)));
#else
  return static_cast<uint32_t>(__builtin_popcount(x));
#endif
}

/// Index of the lowest set bit; 32 when there is none.
IBEX_HD uint32_t lowest_bit(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return x == 0 ? 32u : static_cast<uint32_t>(__ffs(static_cast<int>(x))) - 1u;
#else
  return x == 0 ? 32u : static_cast<uint32_t>(__builtin_ctz(x));
#endif
}

/// Index of the highest set bit of a non-zero word.
IBEX_HD uint32_t highest_bit(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return 31u - static_cast<uint32_t>(__clz(static_cast<int>(x)));
#else
  return 31u - static_cast<uint32_t>(__builtin_clz(x));
#endif
}

/// Bits below lane `l`: the mask that turns a ballot into an exclusive prefix count.
IBEX_HD uint32_t lanes_below(uint32_t l) { return (1u << l) - 1u; }

IBEX_HD uint32_t bswap32(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return __byte_perm(x, 0, 0x0123);
#else
  return __builtin_bswap32(x);
#endif
}

IBEX_HD uint64_t bswap64(uint64_t x) {
#if defined(__CUDA_ARCH__)
  const uint32_t lo = __byte_perm(static_cast<uint32_t>(x), 0, 0x0123);
  const uint32_t hi = __byte_perm(static_cast<uint32_t>(x >> 32), 0, 0x0123);
  return static_cast<uint64_t>(lo) << 32 | hi;
#else
  return __builtin_bswap64(x);
#endif
}

template <class T>
IBEX_HD T min_of(T a, T b) {
  return a < b ? a : b;
}

template <class T>
IBEX_HD T max_of(T a, T b) {
  return a > b ? a : b;
}

/// The larger of two floats; a NaN loses against any number (as CUDA's fmaxf).
IBEX_HD float max_num(float a, float b) {
#if defined(__CUDA_ARCH__)
  return fmaxf(a, b);
#else
  return b > a || a != a ? b : a;
#endif
}

}  // namespace ibex
