/// Inputs and expected outputs of a step, in plain arithmetic. Rough on purpose: bit-exactness is judged elsewhere;
/// here a wrong, stale or missing row must be seen.
#include <cmath>
#include <cstdio>

#include "host/tsan/program.h"
#include "ibex/cast.h"

namespace ibex::rig {

namespace {

uint32_t mix(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {
  uint32_t h = 0x9e3779b9u;
  for (uint32_t v : {a, b, c, d}) {
    h = (h ^ v) * 0x85ebca6bu;
    h ^= h >> 15;
  }
  return h;
}

uint16_t input(uint32_t rank, uint32_t step, uint32_t token, uint32_t i) {
  const float f = static_cast<float>(mix(rank + 1, step + 1, token + 1, i + 1) % 4001) / 1000.0f - 2.0f;
  return static_cast<uint16_t>(f32_bits(f) >> 16);
}

uint32_t tokens_of(const EpConfig& c, uint32_t rank, uint32_t step) {
  // Also no token at all.
  return mix(rank, step, 7, 7) % 8 == 0 ? 0 : 1 + mix(rank, step, 1, 1) % c.max_tokens;
}

int32_t pick(const EpConfig& c, uint32_t rank, uint32_t step, uint32_t token, uint32_t k) {
  const uint32_t h = mix(rank, step, token, 0);
  if (mix(rank, step, token, k + 1) % 10 == 0) return -1;
  // Every third step some tokens pick one expert twice.
  const uint32_t nth = step % 3 == 2 && token % 2 == 1 && k == 1 ? 0 : k;
  return static_cast<int32_t>((h + nth) % c.num_experts);
}

float weight(uint32_t rank, uint32_t step, uint32_t token, uint32_t k) {
  return 0.25f + static_cast<float>(mix(token, k, rank, step) % 100) / 100.0f;
}

/// What one pick adds to one output, and by how much the formats on the way may change it.
struct Term {
  float value, error;
};

Term term(const EpConfig& c, float x, float scale_step, float w, int32_t expert) {
  const float factor = w * (1.0f + 0.1f * static_cast<float>(expert));
  const float relative = c.wire_dtype == kWireFp8 ? 0.0625f : 0.0f;
  const float value = factor * x;
  return {value, std::fabs(value) * (relative + 0.02f) + factor * scale_step};
}

}  // namespace

void fill_inputs(World& world, uint32_t rank, uint32_t step) {
  const EpConfig& c = world.config();
  const Tensors& t = world.rank(rank).tensors[step % world.rank(rank).tensors.size()];
  *t.num_tokens = tokens_of(c, rank, step);
  for (uint32_t token = 0; token < *t.num_tokens; ++token) {
    for (uint32_t i = 0; i < c.hidden; ++i) t.x[token * c.hidden + i] = input(rank, step, token, i);
    for (uint32_t k = 0; k < c.max_topk; ++k) {
      t.topk_idx[token * c.max_topk + k] = pick(c, rank, step, token, k);
      t.topk_weights[token * c.max_topk + k] = weight(rank, step, token, k);
    }
  }
}

uint32_t check_outputs(World& world, uint32_t rank, uint32_t step, uint32_t expected_lost) {
  const EpConfig& c = world.config();
  const Tensors& t = world.rank(rank).tensors[step % world.rank(rank).tensors.size()];
  // e4m3's subnormals are this far apart, relative to a block whose largest value is below 2.
  const float scale_step = c.wire_dtype == kWireFp8 ? 2.0f / 448.0f / 512.0f : 0.0f;
  uint32_t num_wrong = 0;
  for (uint32_t token = 0; token < tokens_of(c, rank, step); ++token) {
    uint32_t lost = 0;
    for (uint32_t k = 0; k < c.max_topk; ++k) {
      const int32_t e = pick(c, rank, step, token, k);
      if (e >= 0 && static_cast<uint32_t>(e) % c.num_ranks == expected_lost) lost |= 1u << k;
    }
    bool wrong = t.lost_topk[token] != lost;
    for (uint32_t i = 0; i < c.hidden && !wrong; ++i) {
      const float x = bf16_to_f32(input(rank, step, token, i));
      float sum = 0.0f, error = 1e-3f;
      for (uint32_t k = 0; k < c.max_topk; ++k) {
        const int32_t e = pick(c, rank, step, token, k);
        if (e < 0 || (lost >> k & 1) != 0) continue;
        const Term add = term(c, x, scale_step, weight(rank, step, token, k), e);
        sum += add.value;
        error += add.error;
      }
      const float out = bf16_to_f32(t.out[token * c.hidden + i]);
      wrong = !(std::fabs(out - sum) <= error);
    }
    if (wrong && num_wrong++ == 0) {
      std::fprintf(stderr, "%s: rank %u step %u token %u is wrong (lost %x, expected %x)\n", c.name, rank, step,
                   token, t.lost_topk[token], lost);
    }
  }
  return num_wrong;
}

}  // namespace ibex::rig
