/// Dispatch: a token goes once to every rank that owns one of its picks, and is fanned out there to its experts.
///
/// Send half. Casters, one warp per token, fill a staging row (header, picks, cast payload, scales) and publish it.
/// Owners take the rows that are ready, in token order per channel, and post them. The row of a token is the same
/// for every destination; a receiver keeps the picks it owns.
///
/// Receive half. Per source, one warp reserves the packed rows of its tokens from the counts; then every message
/// is fanned out by one warp as soon as its channel has signalled.
///
/// Owns: staging rows (written by casters, read by the NIC until a CQE covers them), the handle's arrays.
#include "ibex/args.h"
#include "ibex/cast.h"
#include "ibex/guards.h"
#include "ibex/half.h"
#include "ibex/kernel.h"
#include "ibex/layout.h"
#include "ibex/send.h"
#include "ibex/wait.h"
#include "ibex/warp.h"

namespace ibex {
namespace {

/// Top-k ids are int32 or int64 as the caller's framework likes; both read as int32. Out of range reads as invalid.
struct TopkIds {
  const void* ids;
  uint32_t is_i64, num_topk;

  IBEX_DEV int32_t at(uint32_t flat) const {
    // Both widths are little-endian: the low word of an int64 is its value if the high word is its sign.
    const int32_t* words = static_cast<const int32_t*>(ids) + (uint64_t{flat} << is_i64);
    const int32_t value = words[0];
    return is_i64 != 0 && words[1] != value >> 31 ? INT32_MAX : value;
  }
  IBEX_DEV int32_t at(uint32_t token, uint32_t k) const { return at(token * num_topk + k); }
};

IBEX_DEV TopkIds topk_ids(const DispatchArgs& d) { return TopkIds{d.topk_idx, d.topk_is_i64, d.num_topk}; }

/// Does pick k of this token repeat an earlier one? Such a pick shares the earlier one's packed row.
IBEX_DEV bool is_duplicate(const TopkIds& ids, uint32_t token, uint32_t k) {
  const int32_t e = ids.at(token, k);
  bool found = false;
  // To the end, though the answer may be known sooner: so the loads do not wait for each other.
  for (uint32_t i = 0; i < k; ++i) found |= ids.at(token, i) == e;
  return found;
}

IBEX_DEV bool has_duplicates(const TopkIds& ids, uint32_t num_tokens) {
  bool found = false;
  IBEX_ROLLED
  for (uint32_t base = 0; base < num_tokens; base += kWarpSize) {
    warp::lanes<bool> dup;
    EACH_LANE(l) {
      dup[l] = false;
      if (base + l < num_tokens) {
        IBEX_ROLLED
        for (uint32_t k = 1; k < ids.num_topk; ++k) {
          dup[l] = dup[l] || (ids.at(base + l, k) >= 0 && is_duplicate(ids, base + l, k));
        }
      }
    }
    found = found || warp::any(dup);
  }
  return found;
}

/// Do WQEs of this queue still name rows of a staging slot? Reads its CQ (ORDER(15)). Any single lane.
///
/// Of a queue that is not Active only these words may be read; the host zeroes them once the queue is reset, and a
/// half-zeroed mixture of them says "free" only if that has happened.
IBEX_DEV bool holds_staging_slot(QpDeviceCtx& qp, uint32_t staging_slot) {
  if ((ld_relaxed_sys(&qp.staged_valid) >> staging_slot & 1) == 0) return false;
  if (is_active(qp)) poll_cq(qp);
  return static_cast<int32_t>(ld_relaxed_sys(&qp.consumer_idx) - ld_relaxed_sys(&qp.staging_pi[staging_slot])) < 0;
}

/// A staging slot is free when CQEs cover every WQE that names its rows, on every QP. Reads all CQs at most once.
IBEX_DEV bool is_staging_free(const LaneArgs& a, uint32_t staging_slot) {
  if (!guarded(a, kGuardSourceRows)) return true;
  const uint32_t num_qps = a.shape.num_ranks * a.shape.num_channels;
  bool free = true;
  IBEX_ROLLED
  for (uint32_t base = 0; base < num_qps; base += kWarpSize) {
    warp::lanes<bool> held;
    EACH_LANE(l) {
      held[l] = base + l < num_qps && holds_staging_slot(a.qps[base + l], staging_slot);
    }
    free = free && !warp::any(held);
  }
  warp::sync();
  return free;
}

/// Suspects every peer whose queue still holds rows of a staging slot.
IBEX_CALL void suspect_holders(const LaneArgs& a, const HalfContext& h, uint64_t waited_ns) {
  IBEX_ROLLED
  for (uint32_t q = 0; q < a.shape.num_ranks * a.shape.num_channels; ++q) {
    IBEX_ROLLED
    for (uint32_t s = 0; s < 2 * a.shape.ring; ++s) {
      if (!holds_staging_slot(a.qps[q], s)) continue;
      Evidence e{};
      e.waited_ns = waited_ns;
      e.qp_slot = a.qp_slot_base + q;
      suspect(a, h, q / a.shape.num_channels, kFaultSourceRows, e);
    }
  }
}

/// Counts a wait for a staging slot with every queue that holds its rows.
IBEX_CALL void count_holders(const LaneArgs& a, uint32_t staging_slot) {
  IBEX_ROLLED
  for (uint32_t q = 0; q < a.shape.num_ranks * a.shape.num_channels; ++q) {
    if (!holds_staging_slot(a.qps[q], staging_slot)) continue;
    add_relaxed_sys(&a.telemetry[q / a.shape.num_channels].staging_full, uint64_t{1});
  }
}

/// Says that no pick of this step goes out, whatever an earlier step has left in the handle. The whole warp.
IBEX_CALL void lose_all_picks(const DispatchArgs& d, const HalfContext& h) {
  const TopkIds ids = topk_ids(d);
  IBEX_ROLLED
  for (uint32_t base = 0; base < h.num_tokens * d.num_topk; base += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t i = base + l, token = i / d.num_topk, k = i % d.num_topk;
      if (token < h.num_tokens) {
        d.handle.pick_owner[token * d.lane.shape.max_topk + k] = ids.at(i) < 0 ? kNoOwner : kLostOwner;
      }
    }
  }
  warp::sync();
}

/// Finds a staging slot whose rows may be overwritten. The source-row rule: a NIC may retransmit from a row until
/// a CQE covers every WQE that names it; a consumer's credit is not enough. Leader only.
IBEX_DEV uint32_t take_staging_slot(const DispatchArgs& d, HandleCtx& ctx) {
  const LaneArgs& a = d.lane;
  const uint32_t num_slots = 2 * a.shape.ring;
  // One lane reads: the others could see what it advances below.
  const uint32_t start = warp::one_lane([&] { return static_cast<uint32_t>(a.state->staging_seq % num_slots); });
  WaitClock& clock = clock_of_this_warp();
  ONE_LANE start_clock(clock, clock_ns());
  for (;;) {
    IBEX_ROLLED
    for (uint32_t i = 0; i < num_slots; ++i) {
      const uint32_t slot = (start + i) % num_slots;
      if (!is_staging_free(a, slot)) continue;
      ONE_LANE {
        a.state->staging_seq += 1;
        ctx.staging_slot = slot;
      }
      return kGoRun;
    }
    const bool expired = warp::one_lane([&] {
      if (clock.polls == 0) count_holders(a, start);
      return tick(a, clock, a.shape.rank, true) != kFaultNone;
    });
    if (expired) {
      const HalfContext& h = read_context(a, ctx, kDispatch, kSendHalf, kGoNoRows);
      ONE_LANE suspect_holders(a, h, waited(clock));
      lose_all_picks(d, h);
      return kGoNoRows;
    }
    backoff();
  }
}

/// The leader's entry into a send half.
IBEX_DEV void lead_send(const DispatchArgs& d) {
  const LaneArgs& a = d.lane;
  HandleCtx& ctx = *d.handle.ctx;
  if (!warp::one_lane([&] { return take_lane(a, d.nonce); })) {
    warp::sync();
    ONE_LANE say_go(&ctx.go_send, d.nonce, kGoBusy);
    return;
  }
  const TopkIds ids = topk_ids(d);
  ONE_LANE {
    announce_entry(a);
    draw_sequence(a, ctx, kDispatch);
    ctx.table_idx = table_for(a, kDispatch, ctx.seq);
    ctx.epoch = a.tables[ctx.table_idx].epoch;
    ctx.placement_version = a.tables[ctx.table_idx].placement_version;
    ctx.num_tokens = min_of(*d.num_tokens, a.shape.max_tokens);
    ctx.num_topk = d.num_topk;
  }
  warp::sync();
  const bool duplicates = has_duplicates(ids, ctx.num_tokens);
  ONE_LANE ctx.flags = duplicates ? kHasDuplicates : 0;
  const uint32_t go = take_staging_slot(d, ctx);
  warp::sync();
  ONE_LANE say_go(&ctx.go_send, d.nonce, go);
}

/// How many tokens before `token` pick expert `e`. Contiguous ids, so that the host vectorises it.
IBEX_DEV uint32_t picks_before(const TopkIds& ids, uint32_t token, int32_t e, bool duplicates) {
  warp::lanes<uint32_t> n;
  EACH_LANE(l) n[l] = 0;
  const uint32_t end = token * ids.num_topk;
  if (duplicates) {
    IBEX_ROLLED
    for (uint32_t base = 0; base < token; base += kWarpSize) {
      EACH_LANE(l) {
        bool picks = false;
        IBEX_ROLLED
        for (uint32_t k = 0; k < ids.num_topk && base + l < token; ++k) picks = picks || ids.at(base + l, k) == e;
        n[l] += picks ? 1 : 0;
      }
    }
  } else if (ids.is_i64 == 0) {
    const int32_t* flat = static_cast<const int32_t*>(ids.ids);
    uint32_t base = 0;
    for (; base + kWarpSize <= end; base += kWarpSize) {
      EACH_LANE(l) n[l] += flat[base + l] == e ? 1 : 0;
    }
    EACH_LANE(l) {
      if (base + l < end) n[l] += flat[base + l] == e ? 1 : 0;
    }
  } else {
    for (uint32_t base = 0; base < end; base += kWarpSize) {
      EACH_LANE(l) {
        if (base + l < end) n[l] += ids.at(base + l) == e ? 1 : 0;
      }
    }
  }
  return warp::reduce_add(n);
}

/// Where expert `e` is served in this step, or kNoOwner (masked) or kLostOwner (placed nowhere, or owner dead).
struct Placement {
  uint16_t owner, local_expert;
};

IBEX_DEV Placement place(const LaneArgs& a, const MemberTable& table, int32_t e) {
  if (e < 0) return Placement{kNoOwner, 0};
  if (static_cast<uint32_t>(e) >= table.num_experts) return Placement{kLostOwner, 0};
  const uint32_t where = reinterpret_cast<const uint32_t*>(table.owner_of)[e];
  if (where == kUnplaced || !is_member(a, table, where >> 16)) return Placement{kLostOwner, 0};
  return Placement{static_cast<uint16_t>(where >> 16), static_cast<uint16_t>(where & 0xffffu)};
}

/// Writes the picks of one token into its staging row and its owners into the handle: one pick per lane.
IBEX_DEV void write_picks(const DispatchArgs& d, const HalfContext& h, const TopkIds& ids, uint32_t token,
                          bool duplicates, Pick* picks) {
  warp::lanes<int32_t> expert;
  warp::lanes<uint32_t> owner, local_expert, index, flags;
  EACH_LANE(l) {
    expert[l] = l < ids.num_topk ? ids.at(token, l) : -1;
    const Placement p = place(d.lane, *h.table, expert[l]);
    owner[l] = p.owner;
    local_expert[l] = p.local_expert;
    index[l] = 0;
    flags[l] = p.owner < kLostOwner ? kPickFirstAtOwner : 0;
  }
  IBEX_ROLLED
  for (uint32_t k = 0; k < ids.num_topk; ++k) {
    const int32_t e = warp::bcast(expert, k);
    const uint32_t o = warp::bcast(owner, k);
    if (o >= kLostOwner) continue;
    const uint32_t before = picks_before(ids, token, e, duplicates);
    EACH_LANE(l) {
      if (l == k) index[l] = before;
      if (l > k && owner[l] == o) flags[l] &= ~uint32_t{kPickFirstAtOwner};
      if (l > k && expert[l] == e) flags[l] |= kPickDuplicate;
    }
  }
  EACH_LANE(l) {
    if (l < ids.num_topk) {
      Pick pick{};
      pick.expert = static_cast<uint16_t>(expert[l]);
      pick.owner = static_cast<uint16_t>(owner[l]);
      pick.local_expert = static_cast<uint16_t>(local_expert[l]);
      pick.index = static_cast<uint16_t>(index[l]);
      pick.k = static_cast<uint8_t>(l);
      pick.flags = static_cast<uint8_t>(flags[l]);
      pick.weight = d.topk_weights != nullptr ? d.topk_weights[token * ids.num_topk + l] : 0.0f;
      picks[l] = pick;
      d.handle.pick_owner[token * d.lane.shape.max_topk + l] = pick.owner;
    }
  }
}

/// One caster warp: its share of the tokens, each published as soon as its row stands.
template <WireDtype kDtype>
IBEX_DEV void cast_tokens(const DispatchArgs& d, const HalfContext& h, uint32_t first, uint32_t stride) {
  const LaneArgs& a = d.lane;
  const TopkIds ids = topk_ids(d);
  const bool duplicates = (d.handle.ctx->flags & kHasDuplicates) != 0;
  uint32_t* ready = a.staging_ready + uint64_t{h.staging_slot} * a.shape.max_tokens;
  for (uint32_t token = first; token < h.num_tokens; token += stride) {
    uint8_t* row = staged_message(a, h.staging_slot, token);
    const uint16_t* x = d.x + uint64_t{token} * a.shape.hidden;
    if constexpr (kDtype == kWireFp8) {
      cast_row_fp8(row + a.layout.payload_off, row + a.layout.scale_off, x, a.shape.hidden, a.shape.scale_kind);
    } else {
      copy_row(reinterpret_cast<uint4*>(row + a.layout.payload_off), reinterpret_cast<const uint4*>(x),
                      a.layout.payload_bytes / 16);
    }
    write_picks(d, h, ids, token, duplicates, reinterpret_cast<Pick*>(row + sizeof(MessageHeader)));
    ONE_LANE {
      *reinterpret_cast<MessageHeader*>(row) =
          MessageHeader{token, h.generation, h.table->placement_version, static_cast<uint16_t>(a.shape.rank),
                        static_cast<uint8_t>(ids.num_topk), 0};
    }
    // ORDER(1): staging row -> ready word. `warp::sync` gathers the lanes; release at gpu scope.
    warp::sync();
    ONE_LANE st_release_gpu(&ready[token], h.generation);
  }
}

/// Counts, per expert of the peer, the tokens that pick it: what the peer reserves its packed rows from.
IBEX_CALL uint32_t* fill_counts(const DispatchArgs& d, const HalfContext& h, uint32_t peer) {
  uint32_t* counts = staged_counts(d.lane, h.staging_slot, peer);
  const TopkIds ids = topk_ids(d);
  const bool duplicates = (d.handle.ctx->flags & kHasDuplicates) != 0;
  const uint32_t num_experts = d.lane.shape.max_local_experts, num_picks = h.num_tokens * d.num_topk;
  IBEX_ROLLED
  for (uint32_t base = 0; base < num_experts; base += kWarpSize) {
    EACH_LANE(l) {
      if (base + l < num_experts) st_relaxed_gpu(&counts[base + l], 0u);
    }
  }
  warp::sync();
  IBEX_ROLLED
  for (uint32_t base = 0; base < num_picks; base += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t i = base + l;
      if (i < num_picks) {
        const Placement p = place(d.lane, *h.table, ids.at(i));
        if (p.owner == peer && !(duplicates && is_duplicate(ids, i / d.num_topk, i % d.num_topk))) {
          add_relaxed_gpu(&counts[p.local_expert], 1u);
        }
      }
    }
  }
  warp::sync();
  return counts;
}

/// What an owner sends in a dispatch: see send.h for the contract.
struct DispatchRows {
  const DispatchArgs& d;

  IBEX_DEV bool owed_nothing(SendJob&) const { return false; }
  static constexpr bool kMayDrain = false;
  IBEX_DEV bool must_drain(SendJob&) const { return false; }
  IBEX_DEV uint32_t count(const SendCursor& c) const { return c.num_messages; }
  IBEX_DEV bool has_trailer(const SendJob& j) const { return j.channel == 0; }

  /// Tokens of this step that travel on the job's channel.
  IBEX_DEV static uint32_t channel_load(const SendJob& j) {
    const uint32_t c = j.a.shape.num_channels;
    return j.h.num_tokens > j.channel ? (j.h.num_tokens - j.channel + c - 1) / c : 0;
  }

  /// Picks of `token` that the peer owns.
  IBEX_DEV uint32_t picks_at(const SendJob& j, uint32_t token) const {
    uint32_t n = 0;
    const uint16_t* owners = d.handle.pick_owner + token * j.a.shape.max_topk;
    IBEX_ROLLED
    for (uint32_t k = 0; k < d.num_topk; ++k) n += owners[k] == j.peer ? 1 : 0;
    return n;
  }

  /// The run of tokens from the cursor on whose rows stand, at most 32. Never waits to fill a batch.
  ///
  /// # Ordering
  /// ORDER(1): staging row -> ready word. Acquire at gpu scope by each lane, then `warp::sync`.
  IBEX_DEV uint32_t ready_run(const SendJob& j) const {
    const uint32_t* ready = j.a.staging_ready + uint64_t{j.h.staging_slot} * j.a.shape.max_tokens;
    const uint32_t load = channel_load(j);
    warp::lanes<bool> stands;
    EACH_LANE(l) {
      const uint32_t ordinal = j.cursor.next + l;
      const uint32_t token = j.channel + ordinal * j.a.shape.num_channels;
      stands[l] = ordinal < load && ld_acquire_gpu(&ready[token]) == j.h.generation;
    }
    const uint32_t run = lowest_bit(~warp::ballot(stands));
    warp::sync();
    return run;
  }

  IBEX_DEV uint32_t step(SendJob& j) {
    const uint32_t first = j.cursor.next;
    uint32_t run = ready_run(j);
    if (run == 0) return first >= channel_load(j) ? kPhaseSignal : kIdles;
    warp::lanes<uint32_t> picks;
    warp::lanes<bool> goes;
    EACH_LANE(l) {
      picks[l] = l < run ? picks_at(j, j.channel + (first + l) * j.a.shape.num_channels) : 0;
      goes[l] = picks[l] != 0;
    }
    uint32_t mask = warp::ballot(goes);
    if (j.rdma() && mask != 0) {
      const uint32_t budget = data_space(j, min_of(popc(mask), batch_limit(j)));
      if (budget == 0) return starve_for_space(j);
      // Cut the run after the last message that fits.
      while (popc(mask) > budget) {
        run = highest_bit(mask);
        mask &= lanes_below(run);
      }
    }
    EACH_LANE(l) {
      if (l >= run) picks[l] = 0;
    }
    if (mask != 0) move(j, first, mask);
    const uint32_t num_picks = warp::reduce_add(picks);
    advance_cursor(j, first + run, popc(mask), num_picks);
    return first + run >= channel_load(j) ? kPhaseSignal : kStays;
  }

  /// Sends the messages of the lanes in `mask`, dense after those already sent.
  IBEX_DEV void move(SendJob& j, uint32_t first, uint32_t mask) {
    const uint64_t base = message_offset(j.a, j.h.slot, j.channel, j.cursor.num_messages);
    const uint32_t stride = j.a.layout.message_stride;
    if (!j.rdma()) {
      uint64_t offset = base;
      for (uint32_t rest = mask; rest != 0; rest &= rest - 1, offset += stride) {
        const uint32_t token = j.channel + (first + lowest_bit(rest)) * j.a.shape.num_channels;
        copy_row(reinterpret_cast<uint4*>(j.to.region_ptr + offset),
                        reinterpret_cast<const uint4*>(staged_message(j.a, j.h.staging_slot, token)), stride / 16);
      }
      return;
    }
    Batch b = begin_batch(j.qp);
    const uint32_t n = popc(mask);
    EACH_LANE(l) {
      if ((mask >> l & 1) != 0) {
        const uint32_t position = popc(mask & lanes_below(l));
        const uint32_t token = j.channel + (first + l) * j.a.shape.num_channels;
        const RemoteAddress remote{j.to.region_va + base + uint64_t{position} * stride, j.to.region_rkey_be};
        const uint64_t local = reinterpret_cast<uint64_t>(staged_message(j.a, j.h.staging_slot, token));
        put_write(j.qp, b.next_idx + position, remote, local, j.a.lkey_be, stride,
                  position + 1 == n ? kSignaled : kUnsignaled);
      }
    }
    count_in(b, n);
    ring(j, b, make_ctrl(j.qp, b.next_idx - 1, kOpRdmaWrite, 3));
  }

  IBEX_DEV void copy_trailer(SendJob& j) {
    const uint32_t* counts = fill_counts(d, j.h, j.peer);
    uint32_t* remote = reinterpret_cast<uint32_t*>(j.to.region_ptr + counts_offset(j.a, j.h.slot));
    IBEX_ROLLED
    for (uint32_t base = 0; base < j.a.shape.max_local_experts; base += kWarpSize) {
      EACH_LANE(l) {
        if (base + l < j.a.shape.max_local_experts) remote[base + l] = ld_relaxed_gpu(&counts[base + l]);
      }
    }
  }

  IBEX_DEV void put_trailer(SendJob& j, Batch& b) {
    const uint32_t* counts = fill_counts(d, j.h, j.peer);
    const RemoteAddress remote{j.to.region_va + counts_offset(j.a, j.h.slot), j.to.region_rkey_be};
    ONE_LANE {
      put_write(j.qp, b.next_idx, remote, reinterpret_cast<uint64_t>(counts), j.a.lkey_be,
                j.a.shape.max_local_experts * 4, kUnsignaled);
    }
    count_in(b, 1);
  }

  /// Remembers what this QP was given: the source-row rule of the staging slot, and what a combine must return.
  IBEX_DEV void posted(SendJob& j) {
    const uint32_t q = qp_index(j.a.shape, j.peer, j.channel);
    warp::sync();
    ONE_LANE {
      d.handle.sent_picks[q] = j.cursor.num_picks;
      d.handle.sent_messages[q] = j.cursor.num_messages;
      const uint64_t bytes = uint64_t{j.cursor.num_messages} * j.a.layout.message_stride;
      const bool names_rows = j.cursor.num_messages != 0 || (j.cursor.phase == kPhaseSignal && j.channel == 0);
      if (j.rdma() && names_rows) {
        j.qp.staging_pi[j.h.staging_slot] = j.qp.producer_idx;
        j.qp.staged_valid |= 1u << j.h.staging_slot;
      }
      count_bytes(j, bytes);
    }
    warp::sync();
  }
};

/// Returns false if the lane was busy: then nothing happened, and there is nothing to receive.
template <WireDtype kDtype>
IBEX_DEV bool send_half(const DispatchArgs& d, BlockRange blocks) {
  const LaneArgs& a = d.lane;
  HandleCtx& ctx = *d.handle.ctx;
  if (is_leader(blocks)) lead_send(d);
  const uint32_t go = wait_for_go(&ctx.go_send, d.nonce);
  if (go == kGoBusy) {
    if (is_last_block_out(&ctx.send_done_blocks, blocks) && warp::id() == 0) {
      ONE_LANE st_relaxed_gpu(&ctx.go_send, uint64_t{0});
    }
    return false;
  }
  const HalfContext& h = read_context(a, ctx, kDispatch, kSendHalf, go);
  // Owners are the last warps of the blocks, so that the leader is one of them and casters start at once.
  const uint32_t total = blocks.num * warp::count();
  const uint32_t rank_from_back = (warp::count() - 1 - warp::id()) * blocks.num + blocks.idx;
  if (rank_from_back < a.shape.num_owner_warps) {
    DispatchRows rows{d};
    drive_queues(a, h, rows, rank_from_back, a.shape.num_owner_warps);
  } else if (go == kGoRun) {
    cast_tokens<kDtype>(d, h, total - 1 - rank_from_back, total - a.shape.num_owner_warps);
  }
  if (is_last_block_out(&h.ctx->send_done_blocks, blocks) && warp::id() == 0) {
    ONE_LANE close_send_half(a, h);
  }
  return true;
}

/// Reserves the packed rows of one source from its counts, and tells the other warps.
///
/// # Ordering
/// ORDER(17): ranges -> ranges_ready. Release at gpu scope; pairs with the acquire in `wait_for_ranges`.
IBEX_DEV void reserve_ranges(const DispatchArgs& d, const HalfContext& h, uint32_t source, bool lost) {
  const LaneArgs& a = d.lane;
  const uint32_t* counts = nullptr;
  if (!lost) counts = reinterpret_cast<const uint32_t*>(a.peers[source].my_region + counts_offset(a, h.slot));
  IBEX_ROLLED
  for (uint32_t base = 0; base < a.shape.max_local_experts; base += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t le = base + l;
      if (le < a.shape.max_local_experts) {
        // A count beyond what one source can pick contradicts the protocol; none of its rows is taken.
        const uint32_t n = lost ? 0 : ld_relaxed_sys(&counts[le]);
        const uint32_t len = n <= a.shape.max_tokens ? n : 0;
        const uint32_t begin = add_relaxed_gpu(&d.handle.pack_cursor[le], len);
        d.handle.ranges[le * a.shape.num_ranks + source] = LayoutRange{begin, len};
      }
    }
  }
  warp::sync();
  ONE_LANE st_release_gpu(&d.handle.ranges_ready[source], h.generation);
}

/// # Ordering
/// ORDER(17): ranges -> ranges_ready. Acquire at gpu scope by one lane, then `warp::sync`.
IBEX_DEV void wait_for_ranges(const DispatchArgs& d, const HalfContext& h, uint32_t source) {
  warp::one_lane([&] {
    while (ld_acquire_gpu(&d.handle.ranges_ready[source]) != h.generation) backoff();
    return 0u;
  });
  warp::sync();
}

/// Does a message belong to this step and this source?
IBEX_DEV bool is_valid(const DispatchArgs& d, const HalfContext& h, const MessageHeader& m, uint32_t source) {
  const bool this_step = m.generation == h.generation || !guarded(d.lane, kGuardGeneration);
  return this_step && m.source == source && m.token < d.lane.shape.max_tokens &&
         m.placement_version == h.table->placement_version && m.num_picks <= d.lane.shape.max_topk;
}

/// A message that contradicts its step is not fanned out (any further); the whole source is lost.
IBEX_DEV void reject_message(const DispatchArgs& d, const HalfContext& h, uint32_t source, uint32_t channel,
                             const MessageHeader& m) {
  ONE_LANE {
    Evidence e{};
    e.detail = static_cast<uint64_t>(m.generation) << 32 | m.placement_version;
    record_fault(d.lane, h, source, kFaultViolation, e);
    st_release_gpu(&d.handle.verdicts[qp_index(d.lane.shape, source, channel)],
                   signal_word(h.generation, kCountLost));
  }
  warp::sync();
}

/// Copies one message's payload and scales into packed row `row` of `local_expert`.
template <WireDtype kDtype>
IBEX_DEV void fill_row(const DispatchArgs& d, const uint8_t* message, uint32_t local_expert, uint32_t row) {
  const LaneArgs& a = d.lane;
  const uint64_t flat = local_expert * packed_capacity(a.shape) + row;
  copy_row(reinterpret_cast<uint4*>(d.packed_x + flat * a.layout.payload_bytes),
                  reinterpret_cast<const uint4*>(message + a.layout.payload_off), a.layout.payload_bytes / 16);
  if (kDtype != kWireFp8 || d.packed_scales == nullptr) return;
  const uint32_t num_blocks = (a.shape.hidden + 127) / 128;
  uint8_t* to = d.packed_scales + local_expert * d.scale_expert_stride + row * d.scale_row_stride;
  const uint8_t* from = message + a.layout.scale_off;
  IBEX_ROLLED
  for (uint32_t base = 0; base < num_blocks; base += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t block = base + l;
      if (block < num_blocks && a.shape.scale_kind == kScaleUe8m0) {
        to[block * d.scale_block_stride] = from[block];
      } else if (block < num_blocks) {
        *reinterpret_cast<float*>(to + block * d.scale_block_stride) = reinterpret_cast<const float*>(from)[block];
      }
    }
  }
}

/// Fans one message out to the experts here that its token picked, and keeps its header for the combine. Returns
/// false where the message contradicts its step.
template <WireDtype kDtype>
IBEX_DEV bool fan_out(const DispatchArgs& d, const HalfContext& h, uint32_t source, uint32_t channel,
                      uint32_t message, const uint8_t* bytes) {
  const LaneArgs& a = d.lane;
  const MessageHeader header = *reinterpret_cast<const MessageHeader*>(bytes);
  if (!is_valid(d, h, header, source)) return false;
  const uint32_t index = channel * a.shape.channel_tokens + message;
  const uint32_t kept = header_bytes(a.shape);
  uint8_t* keep = d.handle.headers + (uint64_t{source} * messages_per_source(a.shape) + index) * kept;
  warp::copy16<1>(reinterpret_cast<uint4*>(keep), reinterpret_cast<const uint4*>(bytes), kept / 16);
  const Pick* picks = reinterpret_cast<const Pick*>(bytes + sizeof(MessageHeader));
  for (uint32_t k = 0; k < header.num_picks; ++k) {
    const Pick pick = picks[k];
    if (pick.owner != a.shape.rank || (pick.flags & kPickDuplicate) != 0) continue;
    if (pick.local_expert >= a.shape.max_local_experts) return false;
    const LayoutRange range = d.handle.ranges[pick.local_expert * a.shape.num_ranks + source];
    if (pick.index >= range.len) return false;
    const uint32_t row = range.begin + pick.index;
    fill_row<kDtype>(d, bytes, pick.local_expert, row);
    ONE_LANE {
      d.source_info[pick.local_expert * packed_capacity(a.shape) + row] =
          SourceInfo{header.token, static_cast<uint16_t>(source), pick.k, pick.flags, pick.weight, index};
    }
  }
  return true;
}

/// Was every channel of this source received? Only then do its tokens count.
IBEX_DEV bool is_complete(const DispatchArgs& d, const HalfContext& h, uint32_t source) {
  IBEX_ROLLED
  for (uint32_t c = 0; c < d.lane.shape.num_channels; ++c) {
    const uint64_t v = ld_relaxed_gpu(&d.handle.verdicts[qp_index(d.lane.shape, source, c)]);
    if (signal_generation(v) != h.generation || signal_count(v) == kCountLost) return false;
  }
  return true;
}

/// Publishes what the callers read, after all blocks are done. One warp.
IBEX_DEV void publish(const DispatchArgs& d, const HalfContext& h) {
  const Shape& s = d.lane.shape;
  IBEX_ROLLED
  for (uint32_t source = 0; source < s.num_ranks; ++source) {
    const bool ok = is_complete(d, h, source);
    ONE_LANE {
      d.handle.source_ok[source] = ok ? 1 : 0;
      d.source_ok[source] = ok ? 1 : 0;
      if (!ok) add_relaxed_sys(&d.lane.telemetry[source].steps_lost, uint64_t{1});
    }
    IBEX_ROLLED
    for (uint32_t base = 0; base < s.max_local_experts; base += kWarpSize) {
      EACH_LANE(l) {
        const uint32_t le = base + l;
        if (le < s.max_local_experts) {
          LayoutRange& range = d.handle.ranges[le * s.num_ranks + source];
          if (!ok) range.len = 0;
          d.layout_ranges[le * s.num_ranks + source] = range;
        }
      }
    }
  }
  IBEX_ROLLED
  for (uint32_t base = 0; base < s.max_local_experts; base += kWarpSize) {
    EACH_LANE(l) {
      const uint32_t le = base + l;
      if (le < s.max_local_experts) {
        d.expert_counts[le] = static_cast<int32_t>(ld_relaxed_gpu(&d.handle.pack_cursor[le]));
        st_relaxed_gpu(&d.handle.pack_cursor[le], 0u);
      }
    }
  }
  warp::sync();
}

template <WireDtype kDtype>
IBEX_DEV void receive_half(const DispatchArgs& d, BlockRange blocks) {
  const LaneArgs& a = d.lane;
  HandleCtx& ctx = *d.handle.ctx;
  if (is_leader(blocks)) {
    ONE_LANE {
      announce_entry(a);
      say_go(&ctx.go_receive, d.nonce, kGoRun);
    }
  }
  const HalfContext& h = read_context(a, ctx, kDispatch, kReceiveHalf, wait_for_go(&ctx.go_receive, d.nonce));
  const uint32_t total = blocks.num * warp::count(), num_ranks = a.shape.num_ranks;
  const uint32_t per_source = messages_per_source(a.shape);
  // First the sources' ranges, then all messages. Start with ourselves and go round, so that ranks do not all read
  // the same source first.
  for (uint32_t i = warp::id() * blocks.num + blocks.idx; i < num_ranks * (1 + per_source); i += total) {
    const bool reserves = i < num_ranks;
    const uint32_t item = reserves ? 0 : (i - num_ranks) % per_source;
    const uint32_t turn = reserves ? i : (i - num_ranks) / per_source;
    const uint32_t source = (a.shape.rank + turn) % num_ranks;
    const uint32_t channel = item / a.shape.channel_tokens, message = item % a.shape.channel_tokens;
    const uint32_t count = await_signal(a, h, d.handle.verdicts, source, channel);
    if (reserves) {
      reserve_ranges(d, h, source, count == kCountLost);
    } else if (count != kCountLost && message < min_of(count, a.shape.channel_tokens)) {
      wait_for_ranges(d, h, source);
      const uint8_t* bytes = reinterpret_cast<const uint8_t*>(a.peers[source].my_region) +
                             message_offset(a, h.slot, channel, message);
      if (!fan_out<kDtype>(d, h, source, channel, message, bytes)) {
        reject_message(d, h, source, channel, *reinterpret_cast<const MessageHeader*>(bytes));
      }
    }
  }
  if (is_last_block_out(&h.ctx->receive_done_blocks, blocks) && warp::id() == 0) {
    publish(d, h);
    ONE_LANE close_receive_half(a, h, 0);
  }
}

template <WireDtype kDtype>
IBEX_DEV void dispatch_body(const DispatchArgs& d, BlockRange blocks) {
  if ((d.halves & kSendHalf) != 0 && !send_half<kDtype>(d, blocks)) return;
  if ((d.halves & kReceiveHalf) != 0) receive_half<kDtype>(d, blocks);
}

}  // namespace

IBEX_KERNEL(dispatch_bf16, DispatchArgs, dispatch_body<kWireBf16>, 1024, 1)
IBEX_KERNEL(dispatch_fp8, DispatchArgs, dispatch_body<kWireFp8>, 1024, 1)
IBEX_KERNEL(group_dispatch_bf16, GroupArgs, (group_body<DispatchArgs, dispatch_body<kWireBf16>>), 1024, 1)
IBEX_KERNEL(group_dispatch_fp8, GroupArgs, (group_body<DispatchArgs, dispatch_body<kWireFp8>>), 1024, 1)

}  // namespace ibex
