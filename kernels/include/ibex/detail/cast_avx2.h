/// The row operations of cast.h where a warp is one fiber and the host has AVX2 and FMA.
///
/// A lane region is a loop here, and the compiler does not turn the cast's into good vector code; this file says it
/// outright. Same bytes as the lane regions: tests/rows.rs holds both against the Rust reference.
#pragma once
#include <immintrin.h>

#include "ibex/cast.h"

namespace ibex::avx2_rows {

IBEX_DEV __m256 load_bf16x8(const uint4* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}

/// Eight floats as bf16 in the low halves of eight 32-bit integers.
IBEX_DEV __m256i round_bf16(__m256 f) {
  const __m256i u = _mm256_castps_si256(f);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fff), nan);
}

IBEX_DEV void store_bf16x16(uint4* p, __m256 lo, __m256 hi) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(lo), round_bf16(hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}

IBEX_DEV void store_bf16x8(uint4* p, __m256 f) {
  const __m256i packed = _mm256_packus_epi32(round_bf16(f), _mm256_setzero_si256());
  const __m128i row = _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xd8));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), row);
}

/// f32_to_e4m3_soft on eight floats that need not saturate: products of a finite block stay below 448 * (1 + 2^-22).
IBEX_DEV __m256i round_e4m3(__m256 f) {
  const __m256i u = _mm256_castps_si256(f);
  const __m256i magnitude = _mm256_and_si256(u, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(magnitude, 20), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(magnitude, _mm256_set1_epi32(0x7ffff)), odd);
  const __m256i normal = _mm256_sub_epi32(_mm256_srli_epi32(sum, 20), _mm256_set1_epi32(120 << 3));
  const __m256 shifted = _mm256_add_ps(_mm256_castsi256_ps(magnitude), _mm256_set1_ps(16384.0f));
  const __m256i subnormal = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x46800000));
  const __m256i is_small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x3c800000), magnitude);
  const __m256i q = _mm256_blendv_epi8(normal, subnormal, is_small);
  return _mm256_or_si256(q, _mm256_and_si256(_mm256_srli_epi32(u, 24), _mm256_set1_epi32(0x80)));
}

/// Largest |x| of `n16` units as bf16 bits: magnitudes of bf16 order like integers, Inf and NaN above all numbers.
IBEX_DEV uint32_t max_magnitude(const uint4* x, uint32_t n16) {
  const __m256i mask = _mm256_set1_epi16(0x7fff);
  __m256i m = _mm256_setzero_si256();
  for (uint32_t i = 0; i < n16; i += 2) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    m = _mm256_max_epi16(m, _mm256_and_si256(v, mask));
  }
  // The horizontal minimum instruction, on complements.
  const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(m), _mm256_extracti128_si256(m, 1));
  const __m128i least = _mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)));
  return ~static_cast<uint32_t>(_mm_cvtsi128_si32(least)) & 0xffffu;
}

/// A block of finite numbers. hidden is a multiple of 16, so units come in pairs.
IBEX_DEV void cast_finite(uint64_t* payload, const uint4* x, uint32_t n16, float multiplier) {
  const __m256 m = _mm256_set1_ps(multiplier);
  for (uint32_t i = 0; i < n16; i += 2) {
    const __m256i lo = round_e4m3(_mm256_mul_ps(load_bf16x8(x + i), m));
    const __m256i hi = round_e4m3(_mm256_mul_ps(load_bf16x8(x + i + 1), m));
    const __m256i p16 = _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
    const __m128i p8 = _mm_packus_epi16(_mm256_castsi256_si128(p16), _mm256_extracti128_si256(p16, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(payload + i), p8);
  }
}

/// A block that holds Inf or NaN: rare, so plain code.
inline BlockScale __attribute__((noinline)) cast_special(uint64_t* payload, const uint4* x, uint32_t n16,
                                                         uint32_t kind) {
  float amax = 0.0f;
  float f[8];
  for (uint32_t i = 0; i < n16; ++i) {
    unpack_row8(f, x[i]);
    for (const float g : f) amax = max_num(amax, bits_f32(f32_bits(g) & 0x7fffffffu));
  }
  const BlockScale s = block_scale(amax, kind);
  for (uint32_t i = 0; i < n16; ++i) {
    unpack_row8(f, x[i]);
    uint64_t q = 0;
    for (uint32_t j = 0; j < 8; ++j) q |= static_cast<uint64_t>(f32_to_e4m3_soft(mul_rn(f[j], s.multiplier))) << 8 * j;
    payload[i] = q;
  }
  return s;
}

template <bool kWeighted>
IBEX_DEV __m256 accumulate(__m256 acc, const uint4* row, float weight) {
  const __m256 v = load_bf16x8(row);
  if constexpr (kWeighted) return _mm256_fmadd_ps(_mm256_set1_ps(weight), v, acc);
  return _mm256_add_ps(acc, v);
}

/// Four units at a time: four independent sums hide the latency of the fma.
template <bool kWeighted>
IBEX_DEV void sum_rows(uint4* out, const uint4* const* rows, const float* weights, uint32_t num_rows, uint32_t n16) {
  const auto weight = [&](uint32_t k) { return kWeighted ? weights[k] : 1.0f; };
  uint32_t i = 0;
  for (; i + 4 <= n16; i += 4) {
    if (i % kWarpSize == 0) host::step_point();
    __m256 acc[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (uint32_t k = 0; k < num_rows; ++k) {
      for (uint32_t j = 0; j < 4; ++j) acc[j] = accumulate<kWeighted>(acc[j], rows[k] + i + j, weight(k));
    }
    store_bf16x16(out + i, acc[0], acc[1]);
    store_bf16x16(out + i + 2, acc[2], acc[3]);
  }
  for (; i < n16; ++i) {
    __m256 acc = _mm256_setzero_ps();
    for (uint32_t k = 0; k < num_rows; ++k) acc = accumulate<kWeighted>(acc, rows[k] + i, weight(k));
    store_bf16x8(out + i, acc);
  }
}

/// e4m3_to_f32 on the eight bytes of one unit.
IBEX_DEV __m256 load_e4m3x8(const uint64_t* p) {
  const __m256i q = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_and_si256(q, _mm256_set1_epi32(0x7f));
  const __m256i sign = _mm256_slli_epi32(_mm256_and_si256(q, _mm256_set1_epi32(0x80)), 24);
  const __m256 small = _mm256_castsi256_ps(_mm256_slli_epi32(magnitude, 20));
  const __m256i value = _mm256_castps_si256(_mm256_mul_ps(small, _mm256_set1_ps(0x1p120f)));
  const __m256i nan = _mm256_cmpeq_epi32(magnitude, _mm256_set1_epi32(0x7f));
  const __m256i number = _mm256_blendv_epi8(value, _mm256_set1_epi32(0x7fc00000), nan);
  return _mm256_castsi256_ps(_mm256_or_si256(number, sign));
}

IBEX_DEV void cast_row_fp8(uint8_t* payload, uint8_t* scales, const uint16_t* x, uint32_t hidden, uint32_t kind) {
  const auto* in = reinterpret_cast<const uint4*>(x);
  auto* out = reinterpret_cast<uint64_t*>(payload);
  const uint32_t n16 = hidden / 8;
  for (uint32_t i = 0; i < n16; i += kScaleLanes, scales += scale_bytes_of(kind)) {
    host::step_point();
    const uint32_t n = min_of(kScaleLanes, n16 - i);
    const uint32_t max_bits = max_magnitude(in + i, n) << 16;
    BlockScale s;
    if (max_bits <= kBf16MaxBits) {
      s = block_scale(bits_f32(max_bits), kind);
      cast_finite(out + i, in + i, n, s.multiplier);
    } else {
      s = cast_special(out + i, in + i, n, kind);
    }
    store_scale(scales, s.stored, kind);
  }
}

IBEX_DEV void scale_row_bf16(uint4* out, const uint4* x, uint32_t n16, float factor) {
  const __m256 f = _mm256_set1_ps(factor);
  for (uint32_t i = 0; i < n16; ++i) {
    if (i % kWarpSize == 0) host::step_point();
    store_bf16x8(out + i, _mm256_mul_ps(load_bf16x8(x + i), f));
  }
}

IBEX_DEV void scale_row_fp8(uint4* out, const uint64_t* q, const uint8_t* scales, uint64_t block_stride,
                            uint32_t kind, uint32_t hidden, float factor) {
  const __m256 f = _mm256_set1_ps(factor);
  const uint32_t n16 = hidden / 8;
  for (uint32_t i = 0; i < n16; i += 2) {
    if (i % kWarpSize == 0) host::step_point();
    const __m256 scale = _mm256_set1_ps(load_scale(scales + i / kScaleLanes * block_stride, kind));
    const __m256 lo = _mm256_mul_ps(_mm256_mul_ps(load_e4m3x8(q + i), scale), f);
    const __m256 hi = _mm256_mul_ps(_mm256_mul_ps(load_e4m3x8(q + i + 1), scale), f);
    store_bf16x16(out + i, lo, hi);
  }
}

}  // namespace ibex::avx2_rows
