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
#include "ibex/half.h"
#include "ibex/kernel.h"
#include "ibex/layout.h"
#include "ibex/send.h"
#include "ibex/wait.h"
#include "ibex/warp.h"

namespace ibex {
namespace {

/// Rows to be summed into one, with their weights: a token's rows at the source, a message's rows at the expert.
/// One per warp in shared memory; lane 0 fills it.
struct RowSet {
  const uint4* rows[kMaxTopk];
  float weights[kMaxTopk];
};

constexpr uint32_t kMaxWarps = 32;

IBEX_DEV RowSet& row_set_of_this_warp() {
  IBEX_SHARED(RowSet, sets, kMaxWarps);
  return sets[warp::id()];
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
      say_go(&c.ticket->go_send, c.nonce, kGoRun);
    }
  }
}

/// What an owner sends in a combine: see send.h for the contract. The cursor counts kept messages; in `exact` mode
/// it counts (group of messages, k) steps, so that one step never needs more WQEs than a queue holds.
struct CombineRows {
  const CombineArgs& c;

  IBEX_DEV bool reduced() const { return c.lane.shape.combine_mode == kReduced; }
  IBEX_DEV bool through_ring(const SendJob& j) const { return j.rdma() && (reduced() || c.zero_copy == 0); }
  IBEX_DEV bool owed_nothing(SendJob& j) const { return c.handle.source_ok[j.peer] == 0; }
  IBEX_DEV bool must_drain(SendJob& j) const { return j.rdma() && !through_ring(j); }
  IBEX_DEV uint32_t count(const SendCursor& cursor) const { return reduced() ? cursor.num_messages : cursor.num_picks; }
  IBEX_DEV uint32_t trailer_wqes(const SendJob&) const { return 0; }
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

  IBEX_DEV RowStep step(SendJob& j) { return reduced() ? step_reduced(j) : step_exact(j); }

  /// Messages per group in `exact` mode.
  IBEX_DEV uint32_t group_size(const SendJob& j) const {
    const uint32_t limit = batch_limit(j);
    return through_ring(j) ? min_of(limit, j.a.shape.staging_rows) : limit;
  }

  /// One k of one group of messages: at most one row per message.
  IBEX_DEV RowStep step_exact(SendJob& j) {
    const uint32_t load = channel_load(j), group = group_size(j);
    const uint32_t num_topk = c.ticket->num_topk;
    const uint32_t first = j.cursor.next / num_topk * group, k = j.cursor.next % num_topk;
    if (first >= load) return RowStep{false, true, false};
    warp::lanes<bool> goes;
    warp::lanes<uint64_t> local;
    warp::lanes<uint32_t> token;
    EACH_LANE(l) {
      goes[l] = false;
      local[l] = 0;
      token[l] = 0;
      if (l < group && first + l < load) {
        const uint8_t* header = kept(j, first + l);
        const Pick pick = picks_of(header)[k];
        goes[l] = owns(j, pick);
        token[l] = token_of(header);
        if (goes[l]) local[l] = reinterpret_cast<uint64_t>(output_row(j, pick));
      }
    }
    const uint32_t mask = warp::ballot(goes), n = popc(mask);
    if (n != 0) {
      if (j.rdma() && data_space(j, n) < n) return RowStep{false, false, true};
      if (through_ring(j) && !has_ring_rows(j, n)) return RowStep{false, false, true};
      send_picks(j, k, mask, local, token);
    }
    advance_cursor(j, j.cursor.next + 1, 0, n);
    return RowStep{true, k + 1 == num_topk && first + group >= load, false};
  }

  /// Sends row `local` of each lane in `mask` to place (token, k) in the peer's slab.
  IBEX_DEV void send_picks(SendJob& j, uint32_t k, uint32_t mask, const warp::lanes<uint64_t>& local,
                           const warp::lanes<uint32_t>& token) {
    if (!j.rdma() || through_ring(j)) {
      for (uint32_t rest = mask; rest != 0; rest &= rest - 1) {
        const uint32_t l = lowest_bit(rest);
        const uint64_t offset = combine_offset(j.a, j.h.slot, warp::bcast(token, l), k);
        const uint4* from = reinterpret_cast<const uint4*>(warp::bcast(local, l));
        uint8_t* to = j.rdma() ? ring_row(j) : reinterpret_cast<uint8_t*>(j.to.combine_ptr + offset);
        warp::copy16<4>(reinterpret_cast<uint4*>(to), from, j.a.layout.row_bytes / 16);
        if (j.rdma()) post_ring_row(j, offset);
      }
      return;
    }
    Batch b = begin_batch(j.qp);
    const uint32_t n = popc(mask);
    EACH_LANE(l) {
      if ((mask >> l & 1) != 0) {
        const uint32_t position = popc(mask & lanes_below(l));
        const RemoteAddress remote{j.to.combine_va + combine_offset(j.a, j.h.slot, token[l], k),
                                   j.to.combine_rkey_be};
        put_write(j.qp, b.next_idx + position, remote, local[l], c.expert_out_lkey_be, j.a.layout.row_bytes,
                  position + 1 == n ? kSignaled : kUnsignaled);
      }
    }
    count_in(b, n);
    ring_doorbell(b, make_ctrl(j.qp, b.next_idx - 1, kOpRdmaWrite, 3));
  }

  /// One message: the weighted sum of its rows here, under its first k here.
  IBEX_DEV RowStep step_reduced(SendJob& j) {
    const uint32_t load = channel_load(j);
    if (j.cursor.next >= load) return RowStep{false, true, false};
    const uint8_t* header = kept(j, j.cursor.next);
    const Pick* picks = picks_of(header);
    if (j.rdma() && data_space(j, 1) < 1) return RowStep{false, false, true};
    if (j.rdma() && !has_ring_rows(j, 1)) return RowStep{false, false, true};
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
    const uint64_t offset = combine_offset(j.a, j.h.slot, token_of(header), first_k);
    uint8_t* to = j.rdma() ? ring_row(j) : reinterpret_cast<uint8_t*>(j.to.combine_ptr + offset);
    fma_rows(reinterpret_cast<uint4*>(to), set.rows, set.weights, num_rows, j.a.layout.row_bytes / 16);
    if (j.rdma()) post_ring_row(j, offset);
    advance_cursor(j, j.cursor.next + 1, 1, num_rows);
    return RowStep{true, j.cursor.next >= load, false};
  }

  IBEX_DEV uint64_t ring_index(const SendJob& j, uint64_t head) const {
    return uint64_t{qp_index(j.a.shape, j.peer, j.channel)} * j.a.shape.staging_rows + head % j.a.shape.staging_rows;
  }
  IBEX_DEV uint8_t* ring_row(const SendJob& j) const {
    return j.a.row_staging + ring_index(j, j.qp.ring_head) * j.a.layout.row_bytes;
  }

  /// Are the next `n` rows of this QP's ring free, that is, covered by CQEs? The owner waits, nobody else.
  IBEX_DEV bool has_ring_rows(SendJob& j, uint32_t n) const {
    const bool free = warp::one_lane([&] {
      const uint64_t last = j.qp.ring_head + n - 1;
      if (last < j.a.shape.staging_rows) return true;
      const uint32_t pi = j.a.row_staging_pi[ring_index(j, last)];
      if (static_cast<int32_t>(j.qp.consumer_idx - pi) < 0) poll_cq(j.qp);
      return static_cast<int32_t>(j.qp.consumer_idx - pi) >= 0;
    });
    warp::sync();
    return free;
  }

  /// Posts the ring row just filled. Every row is signalled: its CQE is what gives the row back.
  IBEX_DEV void post_ring_row(SendJob& j, uint64_t offset) {
    Batch b = begin_batch(j.qp);
    const RemoteAddress remote{j.to.combine_va + offset, j.to.combine_rkey_be};
    warp::sync();
    ONE_LANE {
      put_write(j.qp, b.next_idx, remote, reinterpret_cast<uint64_t>(ring_row(j)), j.a.lkey_be,
                j.a.layout.row_bytes, kSignaled);
      j.a.row_staging_pi[ring_index(j, j.qp.ring_head)] = b.next_idx + 1;
      j.qp.ring_head += 1;
    }
    count_in(b, 1);
    ring_doorbell(b, make_ctrl(j.qp, b.next_idx - 1, kOpRdmaWrite, 3));
  }

  IBEX_DEV void posted(SendJob& j) {
    ONE_LANE count_bytes(j, uint64_t{count(j.cursor)} * j.a.layout.row_bytes);
    warp::sync();
  }
};

/// Returns false if the lane was busy.
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
  const HalfContext h = read_context(a, ctx, kCombine, kSendHalf, go);
  // There is nothing to cast, so every warp may own queues; blocks take turns so that all of them post.
  CombineRows rows{c};
  drive_queues(a, h, ctx, rows, warp::id() * blocks.num + blocks.idx, blocks.num * warp::count());
  if (is_last_block_out(&ctx.send_done_blocks, blocks) && warp::id() == 0) {
    ONE_LANE close_send_half(a, ctx, h);
  }
  return true;
}

/// Did everything that was dispatched to `owner` on this channel come back?
IBEX_DEV bool came_back(const CombineArgs& c, const HalfContext& h, uint32_t owner, uint32_t channel) {
  const LaneArgs& a = c.lane;
  const bool lost = warp::one_lane([&] { return has_bit(c.handle.ctx->lost, owner); });
  if (lost) return false;
  const uint32_t count = await_signal(a, h, c.verdicts, owner, channel);
  if (count == kCountLost) return false;
  const uint32_t q = qp_index(a.shape, owner, channel);
  const uint32_t sent = a.shape.combine_mode == kReduced ? c.handle.sent_messages[q] : c.handle.sent_picks[q];
  if (count == sent) return true;
  // Rows are counted against what was dispatched there: any other count loses all those picks.
  ONE_LANE {
    Evidence e{};
    e.detail = static_cast<uint64_t>(sent) << 32 | count;
    record_fault(a, h, owner, kFaultViolation, e);
  }
  return false;
}

/// Sums one token. Returns its loss bits.
IBEX_DEV uint32_t combine_token(const CombineArgs& c, const HalfContext& h, uint32_t token) {
  const LaneArgs& a = c.lane;
  const uint32_t num_topk = c.ticket->num_topk, channel = token % a.shape.num_channels;
  const uint16_t* owners = c.handle.pick_owner + token * a.shape.max_topk;
  const bool reduced = a.shape.combine_mode == kReduced;
  uint32_t lost = 0, num_rows = 0;
  RowSet& set = row_set_of_this_warp();
  warp::sync();  // The previous token's rows have been read by every lane.
  for (uint32_t k = 0; k < num_topk; ++k) {
    const uint32_t owner = owners[k];
    if (owner == kNoOwner) continue;
    if (owner == kLostOwner || !came_back(c, h, owner, channel)) {
      lost |= 1u << k;
      continue;
    }
    bool first = true;
    for (uint32_t i = 0; i < k && first; ++i) first = owners[i] != owner;
    if (reduced && !first) continue;
    ONE_LANE {
      set.rows[num_rows] = reinterpret_cast<const uint4*>(a.combine_slab + combine_offset(a, h.slot, token, k));
      set.weights[num_rows] = reduced ? 1.0f : c.topk_weights[token * num_topk + k];
    }
    num_rows += 1;
  }
  warp::sync();
  uint4* out = reinterpret_cast<uint4*>(c.out + uint64_t{token} * a.shape.hidden);
  if (reduced) {
    add_rows(out, set.rows, num_rows, a.layout.row_bytes / 16);
  } else {
    fma_rows(out, set.rows, set.weights, num_rows, a.layout.row_bytes / 16);
  }
  return lost;
}

IBEX_DEV void receive_half(const CombineArgs& c, BlockRange blocks) {
  const LaneArgs& a = c.lane;
  HandleCtx& ctx = *c.ticket;
  if (is_leader(blocks)) {
    ONE_LANE {
      announce_entry(a);
      say_go(&ctx.go_receive, c.nonce, kGoRun);
    }
  }
  const HalfContext h = read_context(a, ctx, kCombine, kReceiveHalf, wait_for_go(&ctx.go_receive, c.nonce));
  const uint32_t total = blocks.num * warp::count();
  for (uint32_t token = warp::id() * blocks.num + blocks.idx; token < h.num_tokens; token += total) {
    const uint32_t lost = combine_token(c, h, token);
    ONE_LANE c.lost_topk[token] = lost;
  }
  if (is_last_block_out(&ctx.receive_done_blocks, blocks) && warp::id() == 0) {
    ONE_LANE close_receive_half(a, ctx, h);
  }
}

IBEX_DEV void combine_body(const CombineArgs& c, BlockRange blocks) {
  if ((c.halves & kSendHalf) != 0 && !send_half(c, blocks)) return;
  if ((c.halves & kReceiveHalf) != 0) receive_half(c, blocks);
}

}  // namespace

IBEX_KERNEL(combine, CombineArgs, combine_body, 1024)

}  // namespace ibex
