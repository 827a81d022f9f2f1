/// Send WQEs as the mlx5 device reads them; every one of ours fits one 64-byte basic block.
///
///   ctrl   {opmod:8 idx:16 opcode:8} {qpn:24 ds:8} {signature, stream, fm_ce_se} {immediate}
///   raddr  {va:64 rkey:32 0:32}
///   data   {byte count:32 lkey:32 va:64}      or inline {0x80000000 | len:32, bytes…}
///   atomic {add:64 compare:64}
///
/// All fields big-endian. Keys and the QP number arrive big-endian from the host, so that a WQE costs few swaps.
/// SPEC: mlx5dv.h mlx5_wqe_ctrl_seg, mlx5_wqe_raddr_seg, mlx5_wqe_data_seg, mlx5_wqe_atomic_seg.
#pragma once
#include "ibex/args.h"
#include "ibex/ptx.h"

namespace ibex {

constexpr uint32_t kWqebbBytes = 64;
constexpr uint32_t kOpRdmaWrite = 0x08;
constexpr uint32_t kOpAtomicFetchAdd = 0x12;
/// fm_ce_se byte that asks for a CQE, already in its place in the third dword of ctrl.
constexpr uint32_t kSignaled = 0x08u << 24;
constexpr uint32_t kUnsignaled = 0;

/// The first eight bytes of a WQE are also what its doorbell says.
struct Ctrl {
  uint32_t opcode_idx_be, qpn_ds_be;
};

IBEX_DEV Ctrl make_ctrl(const QpDeviceCtx& qp, uint32_t wqe_idx, uint32_t opcode, uint32_t ds) {
  return Ctrl{bswap32((wqe_idx & 0xffffu) << 8 | opcode), qp.qpn_be | ds << 24};
}

IBEX_DEV uint4* wqe_at(const QpDeviceCtx& qp, uint32_t wqe_idx) {
  return reinterpret_cast<uint4*>(qp.sq + uint64_t{wqe_idx & qp.sq_mask} * kWqebbBytes);
}

struct RemoteAddress {
  uint64_t va;
  uint32_t rkey_be;
};

IBEX_DEV uint32_t high_be(uint64_t va) { return bswap32(static_cast<uint32_t>(va >> 32)); }
IBEX_DEV uint32_t low_be(uint64_t va) { return bswap32(static_cast<uint32_t>(va)); }

IBEX_DEV void put_ctrl_and_raddr(uint4* wqe, Ctrl ctrl, uint32_t flags, RemoteAddress remote) {
  st_wqe(wqe, uint4{ctrl.opcode_idx_be, ctrl.qpn_ds_be, flags, 0});
  st_wqe(wqe + 1, uint4{high_be(remote.va), low_be(remote.va), remote.rkey_be, 0});
}

/// RDMA WRITE of `bytes` from registered memory.
IBEX_DEV Ctrl put_write(const QpDeviceCtx& qp, uint32_t wqe_idx, RemoteAddress remote, uint64_t local_va,
                        uint32_t lkey_be, uint32_t bytes, uint32_t flags) {
  uint4* wqe = wqe_at(qp, wqe_idx);
  const Ctrl ctrl = make_ctrl(qp, wqe_idx, kOpRdmaWrite, 3);
  put_ctrl_and_raddr(wqe, ctrl, flags, remote);
  st_wqe(wqe + 2, uint4{bswap32(bytes), lkey_be, high_be(local_va), low_be(local_va)});
  return ctrl;
}

/// RDMA WRITE of one little-endian 64-bit word carried in the WQE itself.
IBEX_DEV Ctrl put_write_inline8(const QpDeviceCtx& qp, uint32_t wqe_idx, RemoteAddress remote, uint64_t word,
                                uint32_t flags) {
  uint4* wqe = wqe_at(qp, wqe_idx);
  const Ctrl ctrl = make_ctrl(qp, wqe_idx, kOpRdmaWrite, 3);
  put_ctrl_and_raddr(wqe, ctrl, flags, remote);
  st_wqe(wqe + 2, uint4{bswap32(0x80000008u), static_cast<uint32_t>(word), static_cast<uint32_t>(word >> 32), 0});
  return ctrl;
}

/// RDMA WRITE of 28 bytes carried in the WQE; only the post benchmark uses it.
IBEX_DEV Ctrl put_write_inline28(const QpDeviceCtx& qp, uint32_t wqe_idx, RemoteAddress remote, uint32_t fill,
                                 uint32_t flags) {
  uint4* wqe = wqe_at(qp, wqe_idx);
  const Ctrl ctrl = make_ctrl(qp, wqe_idx, kOpRdmaWrite, 4);
  put_ctrl_and_raddr(wqe, ctrl, flags, remote);
  st_wqe(wqe + 2, uint4{bswap32(0x8000001cu), fill, fill, fill});
  st_wqe(wqe + 3, uint4{fill, fill, fill, fill});
  return ctrl;
}

/// FETCH_ADD of 64 bits; the old value comes back to `result_va`.
IBEX_DEV Ctrl put_fetch_add(const QpDeviceCtx& qp, uint32_t wqe_idx, RemoteAddress remote, uint64_t add,
                            uint64_t result_va, uint32_t lkey_be, uint32_t flags) {
  uint4* wqe = wqe_at(qp, wqe_idx);
  const Ctrl ctrl = make_ctrl(qp, wqe_idx, kOpAtomicFetchAdd, 4);
  put_ctrl_and_raddr(wqe, ctrl, flags, remote);
  st_wqe(wqe + 2, uint4{high_be(add), low_be(add), 0, 0});
  st_wqe(wqe + 3, uint4{bswap32(8), lkey_be, high_be(result_va), low_be(result_va)});
  return ctrl;
}

}  // namespace ibex
