/// Combine: expert outputs go back to the ranks their tokens came from, and are weighted and summed there.
///
/// Send half. Owners go through the messages that a source's dispatch brought here (their headers are kept in the
/// handle) and send, for each, one row per pick (`exact`) or one weighted sum per message (`reduced`). Rows leave
/// from the registered expert output itself, or through the QP's staging ring.
///
/// Receive half. One warp per token sums its rows in ascending k and says, per pick, what was not summed.
///
/// # Ordering
/// Sums are `acc = fma(w, y, acc)` in fp32 from +0 in ascending k, rounded once to bf16 (`exact`); `reduced` rounds
/// each rank's partial sum to bf16 and adds those in ascending order of the rank's first k.
#include "ibex/args.h"
#include "ibex/cast.h"
#include "ibex/guards.h"
#include "ibex/half.h"
#include "ibex/kernel.h"
#include "ibex/late.h"
#include "ibex/layout.h"
#include "ibex/send.h"
#include "ibex/wait.h"
#include "ibex/warp.h"

namespace ibex {
namespace {

/// The rows that a warp works on, in shared memory, one set per warp. Either rows to be summed into one, with their
/// weights (a token's rows at the source, a message's rows at the expert), or rows to be sent, with their tokens.
struct RowSet {
  const uint4* rows[kWarpSize];
  float weights[kWarpSize];
  uint32_t tokens[kWarpSize];
};
static_assert(kMaxTopk <= kWarpSize);

IBEX_DEV RowSet& row_set_of_this_warp() {
  IBEX_SHARED(RowSet, sets, kMaxWarps);
  return sets[warp::id()];
}

/// out = the weighted sum of the first `num_rows` rows of this warp's set. The whole warp.
IBEX_DEV void sum_row_set(uint8_t* out, uint32_t num_rows, uint32_t row_bytes) {
  const RowSet& set = row_set_of_this_warp();
  fma_rows(reinterpret_cast<uint4*>(out), set.rows, set.weights, num_rows, row_bytes / 16);
}

/// The leader's entry into a send half.
IBEX_DEV void lead_send(const CombineArgs& c) {
  const LaneArgs& a = c.lane;
  ONE_LANE {
    if (!take_lane(a, c.nonce)) {
      say_go(&c.ticket->go_send, c.nonce, kGoBusy);
    } else {
      const HandleCtx& dispatched = *c.handle.ctx;
      announce_entry(a);
      draw_sequence(a, *c.ticket, kCombine);
      // The members and the placement are those of the dispatch this answers.
      c.ticket->table_idx = dispatched.table_idx;
      c.ticket->epoch = dispatched.epoch;
      c.ticket->placement_version = dispatched.placement_version;
      c.ticket->num_tokens = dispatched.num_tokens;
      c.ticket->num_topk = dispatched.num_topk;
      c.ticket->staging_slot = 0;
      c.ticket->flags = 0;
      say_go(&c.ticket->go_send, c.nonce, kGoRun);
    }
  }
}

/// What an owner sends in a combine: see send.h for the contract. The cursor counts kept messages; in `exact` mode
/// it counts (group of messages, k) steps, so that one step never needs more WQEs than a queue holds.
template <CombineMode kMode>
struct CombineRows {
  const CombineArgs& c;

  static constexpr bool kSums = kMode == kReduced;
  static constexpr bool kMayDrain = !kSums;
  IBEX_DEV bool through_ring(const SendJob& j) const { return j.rdma() && (kSums || c.zero_copy == 0); }
  IBEX_DEV bool owed_nothing(SendJob& j) const { return c.handle.source_ok[j.peer] == 0; }
  IBEX_DEV bool must_drain(SendJob& j) const {
    return j.rdma() && !through_ring(j) && guarded(j.a, kGuardSourceRows);
  }
  IBEX_DEV uint32_t count(const SendCursor& cursor) const { return kSums ? cursor.num_messages : cursor.num_picks; }
  IBEX_DEV bool has_trailer(const SendJob&) const { return false; }
  IBEX_DEV void copy_trailer(SendJob&) {}
  IBEX_DEV void put_trailer(SendJob&, Batch&) {}

  /// Messages that the dispatch brought on this job's channel.
  IBEX_DEV uint32_t channel_load(const SendJob& j) const {
    return signal_count(c.handle.verdicts[qp_index(j.a.shape, j.peer, j.channel)]);
  }

  IBEX_DEV const uint8_t* kept(const SendJob& j, uint32_t message) const {
    const uint64_t index = uint64_t{j.peer} * messages_per_source(j.a.shape) +
                           j.channel * j.a.shape.channel_tokens + message;
    return c.handle.headers + index * header_bytes(j.a.shape);
  }
  IBEX_DEV static const Pick* picks_of(const uint8_t* header) {
    return reinterpret_cast<const Pick*>(header + sizeof(MessageHeader));
  }
  IBEX_DEV static uint32_t token_of(const uint8_t* header) {
    return reinterpret_cast<const MessageHeader*>(header)->token;
  }

  /// Expert output of one pick: the packed row that the dispatch gave it.
  IBEX_DEV const uint16_t* output_row(const SendJob& j, const Pick& pick) const {
    const LayoutRange range = c.handle.ranges[pick.local_expert * j.a.shape.num_ranks + j.peer];
    const uint64_t row = pick.local_expert * packed_capacity(j.a.shape) + range.begin + pick.index;
    return c.expert_out + row * j.a.shape.hidden;
  }

  IBEX_DEV bool owns(const SendJob& j, const Pick& pick) const { return pick.owner == j.a.shape.rank; }

  IBEX_DEV uint32_t step(SendJob& j) {
    if constexpr (kSums) {
      return step_reduced(j);
    } else {
      return step_exact(j);
    }
  }

  /// Messages per group in `exact` mode.
  IBEX_DEV uint32_t group_size(const SendJob& j) const {
    const uint32_t limit = batch_limit(j);
    return through_ring(j) ? min_of(limit, j.a.shape.staging_rows) : limit;
  }

  /// One k of one group of messages: at most one row per message.
  IBEX_DEV uint32_t step_exact(SendJob& j) {
    const uint32_t load = channel_load(j), group = group_size(j);
    const uint32_t num_topk = c.ticket->num_topk;
    const uint32_t first = j.cursor.next / num_topk * group, k = j.cursor.next % num_topk;
    if (first >= load) return kPhaseSignal;
    if (j.cursor.place == kNowhere) return kPhaseLost;
    RowSet& set = row_set_of_this_warp();
    warp::lanes<bool> goes;
    EACH_LANE(l) {
      goes[l] = false;
      if (l < group && first + l < load) {
        const uint8_t* header = kept(j, first + l);
        const Pick pick = picks_of(header)[k];
        goes[l] = owns(j, pick);
        if (goes[l]) {
          set.rows[l] = reinterpret_cast<const uint4*>(output_row(j, pick));
          set.tokens[l] = token_of(header);
        }
      }
    }
    const uint32_t mask = warp::ballot(goes), n = popc(mask);
    const bool is_last = k + 1 == num_topk && first + group >= load;
    warp::sync();
    if (n != 0) {
      if (j.rdma() && data_space(j, n) < n) return starve_for_space(j);
      if (through_ring(j) && !has_ring_rows(j, n)) return starve_for_rows(j);
      if (j.rdma() && !through_ring(j)) {
        post_picks(j, set, k, mask);
      } else {
        copy_picks(j, set, k, mask);
      }
    }
    advance_cursor(j, j.cursor.next + 1, 0, n);
    return is_last ? kPhaseSignal : kStays;
  }

  /// Copies the row of each lane in `mask` to place (token, k) in the peer's slab, or to the ring and posts it.
  IBEX_DEV void copy_picks(SendJob& j, const RowSet& set, uint32_t k, uint32_t mask) {
    IBEX_ROLLED
    for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
      const uint32_t l = lowest_bit(rest);
      const uint64_t offset = combine_offset(j.a, j.h.slot, j.cursor.place, set.tokens[l], k);
      uint8_t* to = j.rdma() ? ring_row(j) : reinterpret_cast<uint8_t*>(j.to.combine_ptr + offset);
      copy_row(reinterpret_cast<uint4*>(to), set.rows[l], j.a.layout.row_bytes / 16);
      if (j.rdma()) post_ring_row(j, offset);
    }
  }

  /// Posts the row of each lane in `mask` from where it lies to place (token, k) in the peer's slab.
  IBEX_DEV void post_picks(SendJob& j, const RowSet& set, uint32_t k, uint32_t mask) {
    Batch b = begin_batch(j.qp);
    const uint32_t n = popc(mask);
    EACH_LANE(l) {
      if ((mask >> l & 1) != 0) {
        const uint32_t position = popc(mask & lanes_below(l));
        const uint64_t offset = combine_offset(j.a, j.h.slot, j.cursor.place, set.tokens[l], k);
        const RemoteAddress remote{j.to.combine_va + offset, j.to.combine_rkey_be};
        put_write(j.qp, b.next_idx + position, remote, reinterpret_cast<uint64_t>(set.rows[l]),
                  c.expert_out_lkey_be, j.a.layout.row_bytes, position + 1 == n ? kSignaled : kUnsignaled);
      }
    }
    count_in(b, n);
    ring(j, b, make_ctrl(j.qp, b.next_idx - 1, kOpRdmaWrite, 3));
  }

  /// One message: the weighted sum of its rows here, under its first k here.
  IBEX_DEV uint32_t step_reduced(SendJob& j) {
    const uint32_t load = channel_load(j);
    if (j.cursor.next >= load) return kPhaseSignal;
    if (j.cursor.place == kNowhere) return kPhaseLost;
    const uint8_t* header = kept(j, j.cursor.next);
    const Pick* picks = picks_of(header);
    if (j.rdma() && data_space(j, 1) < 1) return starve_for_space(j);
    if (j.rdma() && !has_ring_rows(j, 1)) return starve_for_rows(j);
    RowSet& set = row_set_of_this_warp();
    uint32_t first_k = 0, num_rows = 0;
    for (uint32_t k = 0; k < c.ticket->num_topk; ++k) {
      const Pick pick = picks[k];
      if (!owns(j, pick)) continue;
      if ((pick.flags & kPickFirstAtOwner) != 0) first_k = k;
      ONE_LANE {
        set.rows[num_rows] = reinterpret_cast<const uint4*>(output_row(j, pick));
        set.weights[num_rows] = pick.weight;
      }
      num_rows += 1;
    }
    warp::sync();
    const uint64_t offset = combine_offset(j.a, j.h.slot, j.cursor.place, token_of(header), first_k);
    uint8_t* to = j.rdma() ? ring_row(j) : reinterpret_cast<uint8_t*>(j.to.combine_ptr + offset);
    sum_row_set(to, num_rows, j.a.layout.row_bytes);
    if (j.rdma()) post_ring_row(j, offset);
    advance_cursor(j, j.cursor.next + 1, 1, num_rows);
    return j.cursor.next >= load ? kPhaseSignal : kStays;
  }

  /// Index of the row that is `ahead` rows after the next one of this QP's staging ring.
  IBEX_DEV uint64_t ring_index(const SendJob& j, uint32_t ahead) const {
    const uint32_t num_rows = j.a.shape.staging_rows, row = static_cast<uint32_t>(j.qp.ring_head) + ahead;
    return uint64_t{j.queue()} * num_rows + (row < num_rows ? row : row - num_rows);
  }
  IBEX_DEV uint8_t* ring_row(const SendJob& j) const {
    return j.a.row_staging + ring_index(j, 0) * j.a.layout.row_bytes;
  }

  /// Are the next `n` rows of this QP's ring free, that is, covered by CQEs (ORDER(15))? The owner waits, nobody
  /// else. Rows are taken in order, so the last of them decides.
  IBEX_DEV bool has_ring_rows(SendJob& j, uint32_t n) const {
    const bool free = warp::one_lane([&] {
      if (!guarded(j.a, kGuardSourceRows)) return true;
      const uint32_t pi = j.a.row_staging_pi[ring_index(j, n - 1)];
      if (is_in_flight(j.qp, pi)) poll_cq(j.qp);
      return !is_in_flight(j.qp, pi);
    });
    warp::sync();
    return free;
  }

  IBEX_DEV uint32_t starve_for_rows(SendJob& j) const {
    return starve_for_room(j, j.a.telemetry[j.peer].ring_full);
  }

  /// Posts the ring row just filled. Every row is signalled: its CQE is what gives the row back.
  IBEX_DEV void post_ring_row(SendJob& j, uint64_t offset) {
    Batch b = begin_batch(j.qp);
    const RemoteAddress remote{j.to.combine_va + offset, j.to.combine_rkey_be};
    warp::sync();
    ONE_LANE {
      put_write(j.qp, b.next_idx, remote, reinterpret_cast<uint64_t>(ring_row(j)), j.a.lkey_be,
                j.a.layout.row_bytes, kSignaled);
      j.a.row_staging_pi[ring_index(j, 0)] = b.next_idx + 1;
      j.qp.ring_head = j.qp.ring_head + 1 == j.a.shape.staging_rows ? 0 : j.qp.ring_head + 1;
    }
    count_in(b, 1);
    ring(j, b, make_ctrl(j.qp, b.next_idx - 1, kOpRdmaWrite, 3));
  }

  IBEX_DEV void posted(SendJob& j) {
    ONE_LANE count_bytes(j, uint64_t{count(j.cursor)} * j.a.layout.row_bytes);
    warp::sync();
  }
};

/// Returns false if the lane was busy.
template <CombineMode kMode>
IBEX_DEV bool send_half(const CombineArgs& c, BlockRange blocks) {
  const LaneArgs& a = c.lane;
  HandleCtx& ctx = *c.ticket;
  if (is_leader(blocks)) lead_send(c);
  const uint32_t go = wait_for_go(&ctx.go_send, c.nonce);
  if (go == kGoBusy) {
    if (is_last_block_out(&ctx.send_done_blocks, blocks) && warp::id() == 0) {
      ONE_LANE st_relaxed_gpu(&ctx.go_send, uint64_t{0});
    }
    return false;
  }
  const HalfContext& h = read_context(a, ctx, kCombine, kSendHalf, go);
  // There is nothing to cast, so every warp may own queues; blocks take turns so that all of them post.
  CombineRows<kMode> rows{c};
  drive_queues(a, h, rows, warp::id() * blocks.num + blocks.idx, blocks.num * warp::count());
  if (is_last_block_out(&h.ctx->send_done_blocks, blocks) && warp::id() == 0) {
    ONE_LANE close_send_half(a, h);
  }
  return true;
}

/// Notes that this combine goes on without `owner`, whose rows may come later (late.h). Returns false.
IBEX_DEV bool give_up(const CombineArgs& c, uint32_t owner) {
  ONE_LANE {
    set_bit(c.ticket->lost, owner);
    st_relaxed_gpu(&c.ticket->flags, kGaveUp);
  }
  return false;
}

/// Did everything that was dispatched to `owner` on this channel come back?
template <CombineMode kMode>
IBEX_DEV bool came_back(const CombineArgs& c, const HalfContext& h, uint32_t owner, uint32_t channel) {
  const LaneArgs& a = c.lane;
  if (guarded(a, kGuardMembership)) {
    const bool lost = warp::one_lane([&] { return has_bit(c.handle.ctx->lost, owner); });
    // It was told so, and sends nothing.
    if (lost) return false;
  }
  const uint32_t count = await_signal(a, h, c.verdicts, owner, channel);
  if (count == kCountLost) return give_up(c, owner);
  const uint32_t q = qp_index(a.shape, owner, channel);
  const uint32_t sent = kMode == kReduced ? c.handle.sent_messages[q] : c.handle.sent_picks[q];
  if (count == sent) return true;
  // Rows are counted against what was dispatched there: any other count loses all those picks.
  ONE_LANE {
    Evidence e{};
    e.detail = static_cast<uint64_t>(sent) << 32 | count;
    record_fault(a, h, owner, kFaultViolation, e);
  }
  return false;
}

/// Sums one token and says what of it is lost.
template <CombineMode kMode>
IBEX_DEV void combine_token(const CombineArgs& c, const HalfContext& h, uint32_t token) {
  const LaneArgs& a = c.lane;
  const uint32_t num_topk = c.ticket->num_topk, channel = token % a.shape.num_channels;
  const uint16_t* owners = c.handle.pick_owner + token * a.shape.max_topk;
  constexpr bool reduced = kMode == kReduced;
  uint32_t lost = 0, num_rows = 0;
  RowSet& set = row_set_of_this_warp();
  warp::sync();  // The previous token's rows have been read by every lane.
  for (uint32_t k = 0; k < num_topk; ++k) {
    const uint32_t owner = owners[k];
    if (owner == kNoOwner) continue;
    if (owner == kLostOwner || h.place == kNowhere || !came_back<kMode>(c, h, owner, channel)) {
      lost |= 1u << k;
      continue;
    }
    bool first = true;
    for (uint32_t i = 0; i < k && first; ++i) first = owners[i] != owner;
    if (reduced && !first) continue;
    ONE_LANE {
      const uint64_t offset = combine_offset(a, h.slot, h.place, token, k);
      set.rows[num_rows] = reinterpret_cast<const uint4*>(a.combine_slab + offset);
      set.weights[num_rows] = reduced ? 1.0f : c.topk_weights[token * num_topk + k];
    }
    num_rows += 1;
  }
  warp::sync();
  ONE_LANE c.lost_topk[token] = lost;
  // With weight 1 the product is exact, so a partial sum of `reduced` is added with one rounding, as by a plain add.
  sum_row_set(reinterpret_cast<uint8_t*>(c.out + uint64_t{token} * a.shape.hidden), num_rows, a.layout.row_bytes);
}

template <CombineMode kMode>
IBEX_DEV void receive_half(const CombineArgs& c, BlockRange blocks) {
  const LaneArgs& a = c.lane;
  HandleCtx& ctx = *c.ticket;
  if (is_leader(blocks)) {
    ONE_LANE {
      announce_entry(a);
      say_go(&ctx.go_receive, c.nonce, kGoRun);
    }
  }
  const HalfContext& h = read_context(a, ctx, kCombine, kReceiveHalf, wait_for_go(&ctx.go_receive, c.nonce));
  const uint32_t total = blocks.num * warp::count();
  for (uint32_t token = warp::id() * blocks.num + blocks.idx; token < h.num_tokens; token += total) {
    combine_token<kMode>(c, h, token);
  }
  if (is_last_block_out(&h.ctx->receive_done_blocks, blocks) && warp::id() == 0) {
    ONE_LANE close_receive_half(a, h, place_after(a, h));
  }
}

template <CombineMode kMode>
IBEX_DEV void combine_body(const CombineArgs& c, BlockRange blocks) {
  if ((c.halves & kSendHalf) != 0 && !send_half<kMode>(c, blocks)) return;
  if ((c.halves & kReceiveHalf) != 0) receive_half<kMode>(c, blocks);
}

}  // namespace

IBEX_KERNEL(combine_exact, CombineArgs, combine_body<kExact>, 1024, 1)
IBEX_KERNEL(combine_reduced, CombineArgs, combine_body<kReduced>, 1024, 1)
IBEX_KERNEL(group_combine_exact, GroupArgs, (group_body<CombineArgs, combine_body<kExact>>), 1024, 1)
IBEX_KERNEL(group_combine_reduced, GroupArgs, (group_body<CombineArgs, combine_body<kReduced>>), 1024, 1)

}  // namespace ibex
