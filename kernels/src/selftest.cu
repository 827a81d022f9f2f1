/// Self-test kernels: the SIMT layer exercised on whichever machine this is compiled for (tests/simt.rs).
#include "ibex/selftest.h"

#include "ibex/kernel.h"
#include "ibex/ptx.h"
#include "ibex/warp.h"

namespace ibex::selftest {

IBEX_DEV uint32_t scramble(uint32_t x) { return (x * 2654435761u) ^ (x >> 7); }

/// Words 0..15: one value per collective.
IBEX_DEV void collectives(uint32_t* out, uint32_t seed) {
  warp::lanes<bool> third;
  warp::lanes<uint32_t> x, reversed_src, bit;
  warp::lanes<uint64_t> wide;
  warp::lanes<float> f;
  EACH_LANE(l) {
    third[l] = l % 3 == 0;
    x[l] = scramble(seed * 32 + l);
    reversed_src[l] = 31 - l;
    bit[l] = 1u << (l % 8);
    wide[l] = uint64_t{x[l]} << 16;
    f[l] = static_cast<float>(x[l] % 1000) - 500.0f;
  }
  const uint32_t votes = warp::ballot(third);
  const uint32_t seventh = warp::bcast(x, 7);
  const uint32_t sum = warp::reduce_add(x);
  const uint32_t high = warp::reduce_max(x);
  const uint32_t low = warp::reduce_min(x);
  const uint32_t bits = warp::reduce_or(bit);
  const uint64_t wide_sum = warp::reduce_add(wide);
  const warp::lanes<uint32_t> reversed = warp::shuffle(x, reversed_src);
  const uint32_t first_reversed = warp::bcast(reversed, 0);
  warp::reduce_max<16>(f);
  const float lower = warp::bcast(f, 3), upper = warp::bcast(f, 19);
  const uint32_t answer = warp::one_lane([&] { return seed + 41; });
  ONE_LANE {
    out[0] = votes;
    out[1] = seventh;
    out[2] = sum;
    out[3] = high;
    out[4] = low;
    out[5] = bits;
    out[6] = static_cast<uint32_t>(wide_sum);
    out[7] = static_cast<uint32_t>(wide_sum >> 32);
    out[8] = first_reversed;
    out[9] = static_cast<uint32_t>(static_cast<int32_t>(lower));
    out[10] = static_cast<uint32_t>(static_cast<int32_t>(upper));
    out[11] = answer;
    out[12] = warp::id() << 16 | warp::count();
    out[13] = warp::block_id() << 16 | warp::num_blocks();
  }
  warp::lanes<bool> none, every;
  EACH_LANE(l) {
    none[l] = false;
    every[l] = true;
  }
  const bool any_none = warp::any(none), any_third = warp::any(third);
  const bool all_every = warp::all(every), all_third = warp::all(third);
  const uint32_t any = uint32_t{any_none} | uint32_t{any_third} << 1;
  const uint32_t all = uint32_t{all_every} | uint32_t{all_third} << 1;
  ONE_LANE out[14] = any | all << 2;
}

/// Words 16..19: shared memory across a block barrier and a barrier of warp pairs.
IBEX_DEV void barriers(uint32_t* out) {
  IBEX_SHARED(uint32_t, squares, 32);
  IBEX_SHARED(uint32_t, pairs, 32);
  const uint32_t id = warp::id(), count = warp::count();
  ONE_LANE squares[id] = id * id;
  warp::sync_block();
  ONE_LANE out[16] = squares[count - 1 - id];
  const uint32_t partner = id ^ 1, barrier_id = 1 + id / 2;
  if (partner < count && barrier_id < 16) {
    ONE_LANE pairs[id] = 100 + id;
    warp::sync_warps(barrier_id, 2);
    ONE_LANE out[17] = pairs[partner];
  }
  warp::sync_block();
}

/// Every warp of the grid arrives; nobody goes on before all have.
IBEX_DEV void grid_barrier(uint32_t* arrived, uint32_t expected) {
  ONE_LANE {
    add_acq_rel_gpu(arrived, 1u);
    while (ld_acquire_gpu(arrived) < expected) backoff();
  }
  warp::sync();
}

/// Counters 1..7 and the wide words: every update once per warp, at both widths.
IBEX_DEV void atomics(const SelftestArgs& args, uint32_t global_warp) {
  ONE_LANE {
    add_relaxed_gpu(args.counters + 1, global_warp);
    or_relaxed_gpu(args.counters + 2, 1u << (global_warp % 32));
    max_relaxed_gpu(args.counters + 3, scramble(global_warp));
    uint32_t seen = ld_relaxed_gpu(args.counters + 4);
    for (;;) {
      const uint32_t old = cas_acq_rel_gpu(args.counters + 4, seen, seen + 3);
      if (old == seen) break;
      seen = old;
    }
    add_release_sys(args.wide, uint64_t{1} << 33);
    max_acq_rel_sys(args.wide + 1, uint64_t{global_warp} << 40);
    fence_acq_rel_gpu();
    fence_seq_cst_sys();
    if (exch_acq_rel_gpu(args.counters + 5, 1u) == 0) add_relaxed_sys(args.counters + 6, 1u);
    st_relaxed_mmio_sys(args.wide + 2, bswap64(0x0102030405060708u));
    st_release_sys(args.wide + 3, uint64_t{bswap32(0x01020304u)});
  }
}

IBEX_DEV void body(const SelftestArgs& args, BlockRange blocks) {
  const uint32_t global_warp = blocks.idx * warp::count() + warp::id();
  const uint32_t num_warps = blocks.num * warp::count();
  uint32_t* out = args.results + size_t{global_warp} * kSelftestWords;
  const uint64_t begin = clock_ns();
  collectives(out, global_warp);
  barriers(out);
  atomics(args, global_warp);
  const size_t first = size_t{global_warp} * args.n16;
  warp::fill16(args.dst + first, uint4{1, 2, 3, 4}, args.n16);
  warp::sync();
  warp::copy16<4>(args.dst + first, args.src + first, args.n16 - args.n16 / 4);
  warp::lanes<uint32_t> count;
  EACH_LANE(l) count[l] = l + 1;
  const uint32_t total = warp::exclusive_add(count);
  EACH_LANE(l) out[32 + l] = count[l];
  grid_barrier(args.counters, num_warps);
  ONE_LANE {
    out[18] = total;
    out[19] = ld_relaxed_gpu(args.counters);
    out[20] = clock_ns() >= begin;
  }
}

/// # Ordering
/// Payload -> flag: release (or fence) at sys scope by lane 0, after warp::sync has ordered the other
/// lanes' stores before it. Flag -> payload: acquire (or fence) at sys scope by lane 0, then warp::sync
/// before the other lanes read.
IBEX_DEV void pass(const SelftestPairArgs& args, uint32_t round) {
  for (uint32_t i = 0; i < args.n16; i += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t v = round * 1000 + i + l;
      if (i + l < args.n16) st_stream16(args.peer_payload + i + l, uint4{v, v + 1, v + 2, v + 3});
    }
  }
  warp::sync();
  ONE_LANE {
    if (args.fenced != 0) {
      fence_acq_rel_sys();
      st_relaxed_sys(args.peer_flag, round);
    } else {
      st_release_sys(args.peer_flag, round);
    }
  }
}

IBEX_DEV uint64_t receive(const SelftestPairArgs& args, uint32_t round) {
  ONE_LANE {
    if (args.fenced != 0) {
      while (ld_relaxed_sys(args.my_flag) != round) backoff();
      fence_acq_rel_sys();
    } else {
      while (ld_acquire_sys(args.my_flag) != round) backoff();
    }
  }
  warp::sync();
  warp::lanes<uint64_t> sum;
  EACH_LANE(l) sum[l] = 0;
  for (uint32_t i = 0; i < args.n16; i += kWarpSize) {
    EACH_LANE(l) {
      if (i + l < args.n16) {
        const uint4 v = ld_stream16(args.my_payload + i + l);
        sum[l] += uint64_t{v.x} + v.y + v.z + v.w;
      }
    }
  }
  return warp::reduce_add(sum);
}

IBEX_DEV void pair_body(const SelftestPairArgs& args, BlockRange blocks) {
  if (blocks.idx != 0 || warp::id() != 0) return;
  uint64_t sum = 0;
  for (uint32_t round = 1; round <= args.rounds; ++round) {
    if (args.device == 0) pass(args, round);
    sum += receive(args, round);
    if (args.device != 0) pass(args, round);
  }
  ONE_LANE* args.sum = sum;
}

IBEX_DEV void empty_body(const SelftestEmptyArgs& args, BlockRange) {
  ONE_LANE add_relaxed_gpu(args.counter, 1u);
}

IBEX_DEV void hazard_body(const SelftestHazardArgs& args, BlockRange) {
  if (args.hazard == kHazardBarrier && warp::id() != 0) warp::sync_block();
  if (args.hazard == kHazardLivelock) {
    ONE_LANE {
      while (add_relaxed_gpu(args.counter, 1u) != 0xffffffffu) backoff();
    }
  }
  if (args.hazard == kHazardLostUpdate) {
    for (uint32_t i = 0; i < args.rounds; ++i) {
      ONE_LANE st_relaxed_gpu(args.counter, ld_relaxed_gpu(args.counter) + 1);
    }
  }
}

}  // namespace ibex::selftest

IBEX_KERNEL(selftest, ibex::SelftestArgs, ibex::selftest::body, 1024, 1)
IBEX_KERNEL(selftest_pair, ibex::SelftestPairArgs, ibex::selftest::pair_body, 1024, 1)
IBEX_KERNEL(selftest_empty, ibex::SelftestEmptyArgs, ibex::selftest::empty_body, 1024, 1)
IBEX_KERNEL(selftest_hazard, ibex::SelftestHazardArgs, ibex::selftest::hazard_body, 1024, 1)
