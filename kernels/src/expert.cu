/// The stand-in expert of benches and tests: y = bf16(x * (1 + 0.1 * expert)) on every packed row.
///
/// It runs on the stream between dispatch and combine, so that a whole step can be captured in one graph and
/// checked against reference mathematics. Rows outside any layout range are left alone.
#include "ibex/args.h"
#include "ibex/cast.h"
#include "ibex/kernel.h"
#include "ibex/warp.h"

namespace ibex {
namespace {

IBEX_DEV void run_row(const ExpertArgs& e, uint32_t local_expert, uint32_t row, float factor) {
  const uint64_t flat = uint64_t{local_expert} * e.num_ranks * e.max_tokens + row;
  uint4* out = reinterpret_cast<uint4*>(e.expert_out + flat * e.hidden);
  if (e.wire_dtype == kWireBf16) {
    scale_row_bf16(out, reinterpret_cast<const uint4*>(e.packed_x + flat * e.hidden * 2), e.hidden / 8, factor);
    return;
  }
  const uint8_t* scales = e.packed_scales + local_expert * e.scale_expert_stride + row * e.scale_row_stride;
  scale_row_fp8(out, reinterpret_cast<const uint64_t*>(e.packed_x + flat * e.hidden), scales, e.scale_block_stride,
                e.scale_kind, e.hidden, factor);
}

IBEX_DEV void expert_body(const ExpertArgs& e, BlockRange blocks) {
  const uint32_t total = blocks.num * warp::count(), me = warp::id() * blocks.num + blocks.idx;
  for (uint32_t local_expert = 0; local_expert < e.max_local_experts; ++local_expert) {
    const float factor = add_rn(1.0f, mul_rn(0.1f, static_cast<float>(e.expert_ids[local_expert])));
    for (uint32_t source = 0; source < e.num_ranks; ++source) {
      const LayoutRange range = e.layout_ranges[local_expert * e.num_ranks + source];
      for (uint32_t i = me; i < range.len; i += total) run_row(e, local_expert, range.begin + i, factor);
    }
  }
}

}  // namespace

IBEX_KERNEL(expert, ExpertArgs, expert_body, 1024, 2)
IBEX_KERNEL(group_expert, GroupArgs, (group_body<ExpertArgs, expert_body>), 1024, 1)

}  // namespace ibex
