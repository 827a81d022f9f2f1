/// C entry points to the row operations of cast.h, for tests and measurements: one call is one warp's work.
///
/// `variant` chooses the implementation, so that both of this build are held against the same reference:
/// 0 = what kernels use here, 1 = lane regions.
#include "ibex/cast.h"

using namespace ibex;

extern "C" {

void ibex_rows_cast_fp8(uint32_t variant, uint8_t* payload, uint8_t* scales, const uint16_t* x, uint32_t hidden,
                        uint32_t kind) {
  if (variant == 0) {
    cast_row_fp8(payload, scales, x, hidden, kind);
  } else {
    lane_rows::cast_row_fp8(payload, scales, x, hidden, kind);
  }
}

/// `weights` null: plain adds.
void ibex_rows_sum(uint32_t variant, uint16_t* out, const uint16_t* const* rows, const float* weights,
                   uint32_t num_rows, uint32_t hidden) {
  auto* o = reinterpret_cast<uint4*>(out);
  const auto* r = reinterpret_cast<const uint4* const*>(rows);
  const uint32_t n16 = hidden / 8;
  if (variant == 0 && weights != nullptr) fma_rows(o, r, weights, num_rows, n16);
  if (variant == 0 && weights == nullptr) add_rows(o, r, num_rows, n16);
  if (variant != 0 && weights != nullptr) lane_rows::sum_rows<true>(o, r, weights, num_rows, n16);
  if (variant != 0 && weights == nullptr) lane_rows::sum_rows<false>(o, r, nullptr, num_rows, n16);
}

void ibex_rows_scale_bf16(uint32_t variant, uint16_t* out, const uint16_t* x, uint32_t hidden, float factor) {
  auto* o = reinterpret_cast<uint4*>(out);
  const auto* in = reinterpret_cast<const uint4*>(x);
  if (variant == 0) {
    scale_row_bf16(o, in, hidden / 8, factor);
  } else {
    lane_rows::scale_row_bf16(o, in, hidden / 8, factor);
  }
}

void ibex_rows_scale_fp8(uint32_t variant, uint16_t* out, const uint8_t* payload, const uint8_t* scales,
                         uint64_t block_stride, uint32_t kind, uint32_t hidden, float factor) {
  auto* o = reinterpret_cast<uint4*>(out);
  const auto* q = reinterpret_cast<const uint64_t*>(payload);
  if (variant == 0) {
    scale_row_fp8(o, q, scales, block_stride, kind, hidden, factor);
  } else {
    lane_rows::scale_row_fp8(o, q, scales, block_stride, kind, hidden, factor);
  }
}

}  // extern "C"
