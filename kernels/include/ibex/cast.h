/// Numbers: bf16, fp8 e4m3 and its scales, and the row operations of dispatch, combine and the stand-in expert.
///
/// Every function here is bit-exact: the same bytes come out of nvcc, warp fibers, lane fibers and the plain Rust
/// of runtime/reference/numerics.rs. So each multiply, add and fma is rounded where it is written: the host build
/// passes -ffp-contract=off, CUDA uses the intrinsics that forbid contraction.
///
///   bf16     round to nearest even; any NaN becomes 0x7fff
///   e4m3fn   round to nearest even, saturating to 448 (Inf too); NaN becomes 0x7f | sign
///   scale    per 128 channels (the last block may be short), amax = max(1e-4, max|x|), where NaN counts as
///            nothing and Inf as the largest finite bf16:
///              f32     multiplier 448 * (1 / amax), stored amax * (1 / 448)
///              pow2    stored 2^e, e = ceil(log2(amax * (1 / 448))), multiplier 2^-e
///              ue8m0   the same, stored as the byte e + 127
///
///   copy_row(out, from, n16)                            one warp: the bytes as they are
///   cast_row_fp8(payload, scales, x, hidden, kind)      one warp: a bf16 row -> e4m3 and scales
///   fma_rows(out, rows, weights, num_rows, n16)         one warp: bf16(sum of w * row), fma in order, from +0
///   add_rows(out, rows, num_rows, n16)                  one warp: bf16(sum of row), plain adds in order, from +0
///   scale_row_bf16(out, x, n16, factor)                 one warp: bf16(x * factor)
///   scale_row_fp8(out, q, scales, block_stride, kind, hidden, factor)   one warp: bf16((q * scale) * factor)
#pragma once
#include "ibex/args.h"
#include "ibex/warp.h"

#if !defined(IBEX_CUDA)
#include <cmath>
#endif

namespace ibex {

/// Channels that share a scale.
constexpr uint32_t kScaleBlock = 128;
/// Lanes (of 8 channels each) that share a scale.
constexpr uint32_t kScaleLanes = kScaleBlock / 8;
constexpr float kFp8Max = 448.0f;
constexpr float kFp8MaxInverse = 1.0f / 448.0f;
constexpr float kAmaxFloor = 1e-4f;
constexpr uint32_t kBf16MaxBits = 0x7f7f0000u;

IBEX_HD float bits_f32(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, sizeof(f));
  return f;
}

IBEX_HD uint32_t f32_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, sizeof(bits));
  return bits;
}

#if defined(IBEX_CUDA)
IBEX_DEV float mul_rn(float a, float b) { return __fmul_rn(a, b); }
IBEX_DEV float add_rn(float a, float b) { return __fadd_rn(a, b); }
IBEX_DEV float fma_rn(float a, float b, float c) { return __fmaf_rn(a, b, c); }
IBEX_DEV float rcp_rn(float a) { return __frcp_rn(a); }
#else
IBEX_DEV float mul_rn(float a, float b) { return a * b; }
IBEX_DEV float add_rn(float a, float b) { return a + b; }
IBEX_DEV float fma_rn(float a, float b, float c) { return std::fma(a, b, c); }
IBEX_DEV float rcp_rn(float a) { return 1.0f / a; }
#endif

IBEX_DEV bool is_nan_bits(uint32_t bits) { return (bits & 0x7fffffffu) > 0x7f800000u; }

// ---- bf16 -----------------------------------------------------------------------------------------------------

IBEX_DEV float bf16_to_f32(uint16_t b) { return bits_f32(static_cast<uint32_t>(b) << 16); }

/// Two floats as packed bf16, `lo` in the low half.
IBEX_DEV uint32_t f32x2_to_bf16x2(float lo, float hi) {
#if defined(IBEX_CUDA)
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(hi), "f"(lo));
  return r;
#else
  const auto round = [](float f) {
    const uint32_t u = f32_bits(f);
    return is_nan_bits(u) ? 0x7fffu : (u + 0x7fffu + (u >> 16 & 1u)) >> 16;
  };
  return round(hi) << 16 | round(lo);
#endif
}

IBEX_DEV uint16_t f32_to_bf16_rne(float f) { return static_cast<uint16_t>(f32x2_to_bf16x2(f, 0.0f)); }

/// The eight bf16 of 16 bytes.
IBEX_DEV void unpack_row8(float (&f)[8], uint4 v) {
  const uint32_t w[4] = {v.x, v.y, v.z, v.w};
  IBEX_UNROLL
  for (uint32_t j = 0; j < 4; ++j) {
    f[2 * j] = bits_f32(w[j] << 16);
    f[2 * j + 1] = bits_f32(w[j] & 0xffff0000u);
  }
}

IBEX_DEV uint4 pack_row8(const float (&f)[8]) {
  return uint4{f32x2_to_bf16x2(f[0], f[1]), f32x2_to_bf16x2(f[2], f[3]), f32x2_to_bf16x2(f[4], f[5]),
               f32x2_to_bf16x2(f[6], f[7])};
}

/// acc += w * v with one rounding each: the step of `exact`, and of the expert's side of `reduced`.
IBEX_DEV void fma_row8(float (&acc)[8], uint4 v, float w) {
  float f[8];
  unpack_row8(f, v);
  IBEX_UNROLL
  for (uint32_t j = 0; j < 8; ++j) acc[j] = fma_rn(w, f[j], acc[j]);
}

/// acc += v: the source's side of `reduced`.
IBEX_DEV void add_row8(float (&acc)[8], uint4 v) {
  float f[8];
  unpack_row8(f, v);
  IBEX_UNROLL
  for (uint32_t j = 0; j < 8; ++j) acc[j] = add_rn(acc[j], f[j]);
}

// ---- e4m3fn ---------------------------------------------------------------------------------------------------

/// Without hardware: below 2^-6 an add at 2^14 rounds to e4m3's subnormal step, above it integers round the mantissa.
IBEX_HD uint32_t f32_to_e4m3_soft(float f) {
  const uint32_t u = f32_bits(f);
  const uint32_t magnitude = u & 0x7fffffffu;
  const uint32_t rounded = magnitude + 0x7ffffu + (magnitude >> 20 & 1u);
  const uint32_t normal = (rounded >> 20) - (120u << 3);
  const uint32_t subnormal = f32_bits(bits_f32(magnitude) + 16384.0f) - 0x46800000u;
  uint32_t q = min_of(magnitude < 0x3c800000u ? subnormal : normal, 0x7eu);
  if (is_nan_bits(u)) q = 0x7fu;
  return q | (u >> 24 & 0x80u);
}

/// Two floats as packed e4m3, `lo` in the low byte.
IBEX_DEV uint32_t f32x2_to_e4m3x2(float lo, float hi) {
#if defined(IBEX_CUDA) && defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  uint16_t r;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(hi), "f"(lo));
  // The instruction makes every NaN positive; for any other value its sign is already there.
  const uint32_t signs = __byte_perm(f32_bits(lo), f32_bits(hi), 0x4473);
  return r | (signs & 0x8080u);
#else
  return f32_to_e4m3_soft(hi) << 8 | f32_to_e4m3_soft(lo);
#endif
}

/// Exact: e4m3's exponent and mantissa stand at the right place of a float whose exponent is 120 too small.
IBEX_DEV float e4m3_to_f32(uint32_t q) {
  const uint32_t sign = (q & 0x80u) << 24;
  const float magnitude = mul_rn(bits_f32((q & 0x7fu) << 20), 0x1p120f);
  return bits_f32(((q & 0x7fu) == 0x7fu ? 0x7fc00000u : f32_bits(magnitude)) | sign);
}

// ---- scales ---------------------------------------------------------------------------------------------------

/// What a block is multiplied by, and the fp32 number that undoes it.
struct BlockScale {
  float multiplier, stored;
};

/// `max_abs`: the largest |x| of the block, NaN left out.
IBEX_DEV BlockScale block_scale(float max_abs, uint32_t kind) {
  const float amax = min_of(max_of(max_abs, kAmaxFloor), bits_f32(kBf16MaxBits));
  const float scale = mul_rn(amax, kFp8MaxInverse);
  if (kind == kScaleF32) return {mul_rn(kFp8Max, rcp_rn(amax)), scale};
  const uint32_t biased = (f32_bits(scale) + 0x7fffffu) >> 23;  // Up to the next power of two.
  return {bits_f32((254u - biased) << 23), bits_f32(biased << 23)};
}

IBEX_DEV uint32_t scale_bytes_of(uint32_t kind) { return kind == kScaleUe8m0 ? 1u : 4u; }

IBEX_DEV void store_scale(uint8_t* p, float stored, uint32_t kind) {
  if (kind == kScaleUe8m0) {
    *p = static_cast<uint8_t>(f32_bits(stored) >> 23);
  } else {
    *reinterpret_cast<float*>(p) = stored;
  }
}

IBEX_DEV float load_scale(const uint8_t* p, uint32_t kind) {
  if (kind == kScaleUe8m0) return bits_f32(static_cast<uint32_t>(*p) << 23);
  return *reinterpret_cast<const float*>(p);
}

// ---- rows, one warp each --------------------------------------------------------------------------------------

/// The row operations in lane regions: what CUDA and lane fibers run, and warp fibers on a host without AVX2.
namespace lane_rows {

/// 32 lanes cast 32 x 8 channels from unit `first` on: two scale blocks, of which the second may be short or absent.
IBEX_DEV void cast_chunk(uint64_t* payload, uint8_t* scales, const uint4* x, uint32_t first, uint32_t n16,
                         uint32_t kind) {
  warp::lanes<uint4> v;
  warp::lanes<float> amax;
  EACH_LANE(l) {
    const uint32_t i = first + l;
    v[l] = i < n16 ? ld_stream16(x + i) : uint4{0, 0, 0, 0};
    float f[8];
    unpack_row8(f, v[l]);
    float a = 0.0f;
    IBEX_UNROLL
    for (uint32_t j = 0; j < 8; ++j) a = max_num(a, bits_f32(f32_bits(f[j]) & 0x7fffffffu));
    amax[l] = a;
  }
  warp::reduce_max<kScaleLanes>(amax);
  EACH_LANE(l) {
    const uint32_t i = first + l;
    const BlockScale s = block_scale(amax[l], kind);
    float f[8];
    unpack_row8(f, v[l]);
    uint32_t half[2];
    IBEX_UNROLL
    for (uint32_t h = 0; h < 2; ++h) {
      const float* g = f + 4 * h;
      half[h] = f32x2_to_e4m3x2(mul_rn(g[0], s.multiplier), mul_rn(g[1], s.multiplier)) |
                f32x2_to_e4m3x2(mul_rn(g[2], s.multiplier), mul_rn(g[3], s.multiplier)) << 16;
    }
    if (i < n16) payload[i] = static_cast<uint64_t>(half[1]) << 32 | half[0];
    if (i < n16 && l % kScaleLanes == 0) store_scale(scales + i / kScaleLanes * scale_bytes_of(kind), s.stored, kind);
  }
}

IBEX_DEV void cast_row_fp8(uint8_t* payload, uint8_t* scales, const uint16_t* x, uint32_t hidden, uint32_t kind) {
  auto* q = reinterpret_cast<uint64_t*>(payload);
  const auto* in = reinterpret_cast<const uint4*>(x);
  const uint32_t n16 = hidden / 8;
  for (uint32_t i = 0; i < n16; i += kWarpSize) cast_chunk(q, scales, in, i, n16, kind);
}

/// kWeighted: fma with the row's weight, else plain adds.
template <bool kWeighted>
IBEX_DEV void sum_rows(uint4* out, const uint4* const* rows, const float* weights, uint32_t num_rows, uint32_t n16) {
  for (uint32_t i0 = 0; i0 < n16; i0 += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t i = i0 + l;
      if (i < n16) {
        float acc[8] = {};
        // Four rows in flight: the sum is bound by latency, not by arithmetic.
        IBEX_ROLLED
        for (uint32_t k0 = 0; k0 < num_rows; k0 += 4) {
          uint4 v[4] = {};
          IBEX_UNROLL
          for (uint32_t k = 0; k < 4; ++k) {
            if (k0 + k < num_rows) v[k] = ld_stream16(rows[k0 + k] + i);
          }
          IBEX_UNROLL
          for (uint32_t k = 0; k < 4; ++k) {
            if (k0 + k >= num_rows) continue;
            if constexpr (kWeighted) {
              fma_row8(acc, v[k], weights[k0 + k]);
            } else {
              add_row8(acc, v[k]);
            }
          }
        }
        st_stream16(out + i, pack_row8(acc));
      }
    }
  }
}

IBEX_DEV void scale_row_bf16(uint4* out, const uint4* x, uint32_t n16, float factor) {
  for (uint32_t i0 = 0; i0 < n16; i0 += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t i = i0 + l;
      if (i < n16) {
        float f[8];
        unpack_row8(f, ld_stream16(x + i));
        IBEX_UNROLL
        for (uint32_t j = 0; j < 8; ++j) f[j] = mul_rn(f[j], factor);
        st_stream16(out + i, pack_row8(f));
      }
    }
  }
}

IBEX_DEV void scale_row_fp8(uint4* out, const uint64_t* q, const uint8_t* scales, uint64_t block_stride,
                            uint32_t kind, uint32_t hidden, float factor) {
  const uint32_t n16 = hidden / 8;
  for (uint32_t i0 = 0; i0 < n16; i0 += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t i = i0 + l;
      if (i < n16) {
        const float scale = load_scale(scales + i / kScaleLanes * block_stride, kind);
        float f[8];
        IBEX_UNROLL
        for (uint32_t j = 0; j < 8; ++j) {
          f[j] = mul_rn(mul_rn(e4m3_to_f32(static_cast<uint32_t>(q[i] >> 8 * j) & 0xffu), scale), factor);
        }
        st_stream16(out + i, pack_row8(f));
      }
    }
  }
}

}  // namespace lane_rows
}  // namespace ibex

#if defined(IBEX_WARP_FIBERS) && defined(__AVX2__) && defined(__FMA__)
#include "ibex/detail/cast_avx2.h"
#define IBEX_ROWS avx2_rows
#else
#define IBEX_ROWS lane_rows
#endif

namespace ibex {

/// Copies n16 units of 16 bytes, all lanes side by side.
IBEX_CALL void copy_row(uint4* out, const uint4* from, uint32_t n16) { warp::copy16<4>(out, from, n16); }

/// Casts one bf16 row of `hidden` channels, a multiple of 16, to e4m3. `payload` is 8-byte, `x` 16-byte, an fp32
/// `scales` 4-byte aligned.
IBEX_DEV void cast_row_fp8(uint8_t* payload, uint8_t* scales, const uint16_t* x, uint32_t hidden, uint32_t kind) {
  IBEX_ROWS::cast_row_fp8(payload, scales, x, hidden, kind);
}

/// out = bf16(sum of weights[k] * rows[k]): fp32 fma in ascending k from +0. Every lane reads `rows` and `weights`
/// (shared or local memory).
IBEX_DEV void fma_rows(uint4* out, const uint4* const* rows, const float* weights, uint32_t num_rows, uint32_t n16) {
  IBEX_ROWS::sum_rows<true>(out, rows, weights, num_rows, n16);
}

/// out = bf16(sum of rows[k]): plain fp32 adds in ascending k from +0.
IBEX_DEV void add_rows(uint4* out, const uint4* const* rows, uint32_t num_rows, uint32_t n16) {
  IBEX_ROWS::sum_rows<false>(out, rows, nullptr, num_rows, n16);
}

/// out = bf16(x * factor).
IBEX_DEV void scale_row_bf16(uint4* out, const uint4* x, uint32_t n16, float factor) {
  IBEX_ROWS::scale_row_bf16(out, x, n16, factor);
}

/// out = bf16((q * scale) * factor), two roundings in fp32. Scale b of the row stands at `scales + b * block_stride`.
IBEX_DEV void scale_row_fp8(uint4* out, const uint64_t* q, const uint8_t* scales, uint64_t block_stride,
                            uint32_t kind, uint32_t hidden, float factor) {
  IBEX_ROWS::scale_row_fp8(out, q, scales, block_stride, kind, hidden, factor);
}

}  // namespace ibex
#undef IBEX_ROWS
