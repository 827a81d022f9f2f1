/// What posting costs, instruction by instruction: the pieces of qp.h and wqe.h, each alone in a kernel.
///
/// benches/sass.py compiles this file and counts; nothing launches it. A probe takes what its caller would have in
/// registers anyway as arguments, and nothing else, so that the count is the piece and its loads.
#include "ibex/args.h"
#include "ibex/cast.h"
#include "ibex/qp.h"
#include "ibex/warp.h"

namespace ibex {
namespace {

/// What one owner posts in one go: a lane's source and target lie `stride` apart.
struct Post {
  QpDeviceCtx* qp;
  RemoteAddress remote;
  uint64_t local, stride;
  uint32_t lkey_be, bytes, num_wqes;
  uint32_t* posted;
};

}  // namespace

/// One thread, one WQE: no doorbell, no look at the queue.
extern "C" __global__ void ibex_probe_wqe(QpDeviceCtx* qp, uint32_t wqe_idx, RemoteAddress remote, uint64_t local,
                                          uint32_t lkey_be, uint32_t bytes) {
  put_write(*qp, wqe_idx, remote, local, lkey_be, bytes, kSignaled);
}

/// One WQE of one lane with all that posting takes: error check, space, WQE, record, doorbell.
extern "C" __global__ void ibex_probe_post_one(const __grid_constant__ Post p) {
  QpDeviceCtx& qp = *p.qp;
  if (qp.syndrome != 0 || !has_space(qp, 1)) return;
  Batch b = begin_batch(qp);
  ONE_LANE put_write(qp, b.next_idx, p.remote, p.local, p.lkey_be, p.bytes, kSignaled);
  count_in(b, 1);
  ring_doorbell(b, make_ctrl(qp, b.next_idx - 1, kOpRdmaWrite, 3));
}

/// As an owner runs it: up to 32 WQEs, one per lane, one doorbell, with error check and space.
extern "C" __global__ void ibex_probe_post_warp(const __grid_constant__ Post p) {
  QpDeviceCtx& qp = *p.qp;
  if (qp.syndrome != 0 || !has_space(qp, p.num_wqes)) return;
  Batch b = begin_batch(qp);
  EACH_LANE(l) {
    if (l < p.num_wqes) {
      const RemoteAddress remote{p.remote.va + l * p.stride, p.remote.rkey_be};
      put_write(qp, b.next_idx + l, remote, p.local + l * p.stride, p.lkey_be, p.bytes,
                l + 1 == p.num_wqes ? kSignaled : kUnsignaled);
    }
  }
  count_in(b, p.num_wqes);
  ring_doorbell(b, make_ctrl(qp, b.next_idx - 1, kOpRdmaWrite, 3));
}

/// One signal word, inline, with its doorbell.
extern "C" __global__ void ibex_probe_signal(QpDeviceCtx* qp, RemoteAddress remote, uint64_t word) {
  Batch b = begin_batch(*qp);
  ONE_LANE put_write_inline8(*qp, b.next_idx, remote, word, kSignaled);
  count_in(b, 1);
  ring_doorbell(b, make_ctrl(*qp, b.next_idx - 1, kOpRdmaWrite, 3));
}

/// One look at the completion queue: opcode, counter, error.
extern "C" __global__ void ibex_probe_poll_cq(QpDeviceCtx* qp, uint32_t* failed) {
  ONE_LANE *failed = poll_cq(*qp) ? 1 : 0;
}

/// How payload moves: every access 16 bytes, lane next to lane.
extern "C" __global__ void ibex_probe_copy(uint4* dst, const uint4* src, uint32_t n16) {
  warp::copy16<4>(dst, src, n16);
}

/// One row cast to fp8 with its scales.
extern "C" __global__ void ibex_probe_cast(uint8_t* payload, uint8_t* scales, const uint16_t* x, uint32_t hidden,
                                           uint32_t kind) {
  cast_row_fp8(payload, scales, x, hidden, kind);
}

}  // namespace ibex
