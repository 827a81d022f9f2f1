/// Entering and leaving one half of an operation, for send and receive halves of dispatch and combine alike.
///
/// One warp of the grid, the leader, enters for all: it refuses an overlapping send half, draws the sequence number,
/// fixes slot, member table and staging slot in the handle, and says go. Everyone else waits for that word. The last
/// block out advances the counters. So whatever the host changes between two halves is read at one point.
///
/// INVARIANT: `go_send` and `go_receive` are zero outside a half; a block never acts on an earlier launch's word.
#pragma once
#include "ibex/args.h"
#include "ibex/guards.h"
#include "ibex/layout.h"
#include "ibex/warp.h"

namespace ibex {

/// Low half of a go word; the high half is the launch's nonce.
enum GoCode : uint32_t {
  kGoNone = 0,
  kGoRun = 1,
  kGoBusy = 2,     ///< another send half of this lane runs: nothing is posted, nothing is drawn
  kGoNoRows = 3,   ///< no staging slot is free: every pick of the step is lost, and said so
};

/// What every warp of a half knows after the leader said go. It stands in shared memory, once per warp: in registers
/// it would be live from end to end of a half.
struct HalfContext {
  uint64_t seq;
  uint32_t op, half;
  uint32_t slot, generation;
  uint32_t go, staging_slot;
  uint32_t num_tokens, place;
  const MemberTable* table;
  HandleCtx* ctx;
};

IBEX_DEV bool is_leader(BlockRange blocks) { return blocks.idx == 0 && warp::id() == warp::count() - 1; }

/// For work that is done once per pick, and that no removal needs to end.
IBEX_DEV bool is_member(const LaneArgs& a, const MemberTable& table, uint32_t rank) {
  if (!guarded(a, kGuardMembership)) return true;
  return (peek_relaxed_gpu(&table.alive[rank / 64]) >> (rank % 64) & 1) != 0;
}

/// For a wait that a removal must end.
IBEX_DEV bool is_alive(const LaneArgs& a, const MemberTable& table, uint32_t rank) {
  if (!guarded(a, kGuardMembership)) return true;
  return (ld_relaxed_gpu(&table.alive[rank / 64]) >> (rank % 64) & 1) != 0;
}

/// The newer table, the one with the larger from_seq, applies from there on. A combine uses the table of its dispatch.
///
/// The host may be writing the older table for a later step: then its from_seq is the largest number first, and that
/// step's last; either way the answer for a step that was launched before is the same.
IBEX_DEV uint32_t table_for(const LaneArgs& a, uint32_t op, uint64_t seq) {
  const uint64_t first0 = ld_relaxed_sys(&a.tables[0].from_seq[op]);
  const uint64_t first1 = ld_relaxed_sys(&a.tables[1].from_seq[op]);
  const uint32_t newer = first1 > first0 ? 1u : 0u;
  if (!guarded(a, kGuardFromSeq)) return newer;
  return seq >= (newer != 0 ? first1 : first0) ? newer : 1u - newer;
}

/// Announces the half to the host. Lane 0 of the leader only.
///
/// # Ordering
/// ORDER(9): entered -> QP states, a Dekker pair with the host's "mark Fenced -> read entered". Both sides put a
/// seq_cst system fence between their store and their load, so at least one sees the other.
IBEX_DEV void announce_entry(const LaneArgs& a) {
  add_relaxed_sys(&a.host_words->entered, uint64_t{1});
  fence_seq_cst_sys();
}

/// Lane 0 only. ORDER(10): everything the half did -> left. Release; pairs with the host's acquire.
IBEX_DEV void announce_exit(const LaneArgs& a) { add_release_sys(&a.host_words->left, uint64_t{1}); }

/// Takes the lane for one send half. Lane 0 of the leader only.
///
/// # Ordering
/// ORDER(13): counters of the send half before -> the lane is free. Acquire, by the compare-and-swap.
IBEX_DEV bool take_lane(const LaneArgs& a, uint32_t nonce) {
  if (cas_acq_rel_gpu(&a.state->busy, uint64_t{0}, uint64_t{nonce}) == 0) return true;
  add_relaxed_sys(&a.host_words->lane_busy, uint64_t{1});
  return false;
}

IBEX_DEV uint64_t go_word(uint32_t nonce, uint32_t code) { return static_cast<uint64_t>(nonce) << 32 | code; }

/// ORDER(11): what the leader fixed -> go. Release at gpu scope; pairs with the acquire in wait_for_go.
IBEX_DEV void say_go(uint64_t* go, uint32_t nonce, uint32_t code) { st_release_gpu(go, go_word(nonce, code)); }

/// Waits for this launch's go word. Bounded: the leader never waits for another warp.
///
/// # Ordering
/// ORDER(11): what the leader fixed -> go. Acquire at gpu scope by one lane, then `warp::sync`.
IBEX_DEV uint32_t wait_for_go(const uint64_t* go, uint32_t nonce) {
  const uint32_t code = warp::one_lane([&] {
    for (;;) {
      const uint64_t word = ld_acquire_gpu(go);
      if (static_cast<uint32_t>(word >> 32) == nonce) return static_cast<uint32_t>(word);
      backoff();
    }
  });
  warp::sync();
  return code;
}

/// Counts this block out. Returns, in every warp, whether it was the last one of the grid.
///
/// # Ordering
/// ORDER(12): all stores of all blocks -> the last block's closing work. Block barrier, then acq_rel at gpu scope.
IBEX_DEV bool is_last_block_out(uint32_t* done_blocks, BlockRange blocks) {
  IBEX_SHARED(uint32_t, last, 1);
  warp::sync_block();
  if (warp::id() == 0) {
    ONE_LANE {
      const bool is_last = add_acq_rel_gpu(done_blocks, 1u) == blocks.num - 1;
      if (is_last) st_relaxed_gpu(done_blocks, 0u);
      *last = is_last ? 1 : 0;
    }
  }
  warp::sync_block();
  return *last != 0;
}

/// Reads what the leader fixed. The whole warp calls it; the result stands until its next call.
IBEX_DEV const HalfContext& read_context(const LaneArgs& a, HandleCtx& ctx, uint32_t op, uint32_t half,
                                         uint32_t go) {
  IBEX_SHARED(HalfContext, contexts, kMaxWarps);
  HalfContext& h = contexts[warp::id()];
  warp::sync();
  ONE_LANE {
    h.seq = ctx.seq;
    h.op = op;
    h.half = half;
    h.slot = ctx.slot;
    h.generation = generation_of(ctx.seq);
    h.go = go;
    h.staging_slot = ctx.staging_slot;
    h.num_tokens = ctx.num_tokens;
    h.place = ctx.place;
    h.table = &a.tables[ctx.table_idx];
    h.ctx = &ctx;
  }
  warp::sync();
  return h;
}

/// Draws the next sequence number into `ctx` and snapshots the credits to post. Lane 0 of the leader only.
IBEX_DEV void draw_sequence(const LaneArgs& a, HandleCtx& ctx, uint32_t op) {
  ctx.seq = a.state->next[op];
  ctx.slot = ring_slot(a.shape, ctx.seq);
  // What the slot's last step has told every peer. It is over: a send half follows the receive half of one ring before.
  ctx.place = consumed_place(ld_acquire_gpu(&a.state->pending[op][ctx.slot]));
  IBEX_ROLLED
  for (uint32_t w = 0; w < kRankWords; ++w) ctx.lost[w] = 0;
  IBEX_ROLLED
  for (uint32_t o = 0; o < kNumOps; ++o) {
    IBEX_ROLLED
    for (uint32_t s = 0; s < a.shape.ring; ++s) {
      // ORDER(8): pending credit -> the consumed word posted from here. Acquire at gpu scope.
      a.state->posting[o][s] = ld_acquire_gpu(&a.state->pending[o][s]);
    }
  }
}

/// Every consumed step up to here has its credit posted; peers run their stall clocks by it. Lane 0 only.
IBEX_DEV uint64_t credited_up_to(const LaneArgs& a, uint32_t op) {
  uint64_t credited = a.state->credited[op];
  while (consumed_seq(a.state->posting[op][ring_slot(a.shape, credited + 1)]) >= credited + 1) ++credited;
  return credited;
}

/// Closes a send half: counters, progress words, the lane. Lane 0 of the last block only.
IBEX_DEV void close_send_half(const LaneArgs& a, const HalfContext& h) {
  IBEX_ROLLED
  for (uint32_t op = 0; op < kNumOps; ++op) {
    a.state->credited[op] = credited_up_to(a, op);
    st_relaxed_sys(&a.host_words->credited[op], a.state->credited[op]);
  }
  st_relaxed_sys(&a.host_words->sent[h.op], h.seq);
  a.state->next[h.op] = h.seq + 1;
  st_relaxed_gpu(&h.ctx->go_send, uint64_t{0});
  // ORDER(13): this half's counters -> the lane is free. Release; pairs with the compare-and-swap in take_lane.
  st_release_gpu(&a.state->busy, uint64_t{0});
  announce_exit(a);
}

/// Closes a receive half: the step is consumed, lost or not, and its credit, `place` with it, waits to be posted.
/// Lane 0 only.
IBEX_DEV void close_receive_half(const LaneArgs& a, const HalfContext& h, uint32_t place) {
  // ORDER(8): slab reads of all blocks, gathered by ORDER(12) -> the pending credit. Release at gpu scope.
  st_release_gpu(&a.state->pending[h.op][h.slot], consumed_word(h.seq, place));
  st_relaxed_gpu(&h.ctx->go_receive, uint64_t{0});
  announce_exit(a);
}

}  // namespace ibex
