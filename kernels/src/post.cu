/// The post microbenchmark: owner warps write WQEs, ring doorbells and read completions, and do nothing else.
///
/// It drives the same `qp.h` and `wqe.h` as dispatch and combine, so what it measures is what they pay.
#include "ibex/args.h"
#include "ibex/kernel.h"
#include "ibex/qp.h"
#include "ibex/warp.h"

namespace ibex {
namespace {

/// Writes one batch of up to 32 WQEs, one per lane, and rings once.
template <bool kInline>
IBEX_DEV void post_batch(const PostArgs& p, QpDeviceCtx& qp, const PeerCtx& to, uint32_t first, uint32_t n) {
  Batch b = begin_batch(qp);
  EACH_LANE(l) {
    if (l < n) {
      const uint64_t i = (first + l) % p.target_slots;
      const RemoteAddress remote{to.region_va + i * p.target_stride, to.region_rkey_be};
      const uint32_t flags = l + 1 == n ? kSignaled : kUnsignaled;
      if constexpr (kInline) {
        put_write_inline28(qp, b.next_idx + l, remote, first + l, flags);
      } else {
        put_write(qp, b.next_idx + l, remote, p.source + i * p.source_stride, p.lkey_be, p.bytes, flags);
      }
    }
  }
  count_in(b, n);
  ring_doorbell(b, make_ctrl(qp, b.next_idx - 1, kOpRdmaWrite, kInline ? 4 : 3));
}

/// Runs one QP until all its WQEs are completed, an error is seen, or time is up. Result: WQEs completed.
template <bool kInline>
IBEX_DEV void run_queue(const PostArgs& p, uint32_t q) {
  QpDeviceCtx& qp = p.qps[q];
  const PeerCtx& to = p.peers[q];
  // In shared memory: 64 bits that are looked at once per wait are not worth two registers while posting.
  IBEX_SHARED(uint64_t, deadlines, kMaxWarps);
  uint64_t& deadline = deadlines[warp::id()];
  warp::sync();
  ONE_LANE deadline = clock_ns() + p.timeout_ns;
  uint32_t posted = 0;
  for (;;) {
    if (posted < p.wqes_per_qp) {
      const uint32_t n = min_of(min_of(p.batch, kWarpSize), p.wqes_per_qp - posted);
      if (has_space(qp, n)) {
        post_batch<kInline>(p, qp, to, posted, n);
        posted += n;
        continue;
      }
    }
    const bool over = warp::one_lane([&] {
      const bool failed = poll_cq(qp);
      const uint32_t completed = posted - (qp.producer_idx - qp.consumer_idx);
      p.result[q] = completed;
      return failed || completed == p.wqes_per_qp || clock_ns() > deadline;
    });
    warp::sync();
    if (over) return;
    backoff();
  }
}

IBEX_DEV void post_body(const PostArgs& p, BlockRange blocks) {
  const uint32_t total = blocks.num * warp::count();
  for (uint32_t q = warp::id() * blocks.num + blocks.idx; q < p.num_qps; q += total) {
    if (p.inline_data != 0) {
      run_queue<true>(p, q);
    } else {
      run_queue<false>(p, q);
    }
  }
}

}  // namespace

IBEX_KERNEL(post, PostArgs, post_body, 1024, 2)

}  // namespace ibex
