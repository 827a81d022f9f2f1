/// A kernel is a body `void body(const Args&, BlockRange)` and one line that makes it launchable on both
/// machines.
///
///   template <WireDtype kDtype> void dispatch_body(const DispatchArgs& args, BlockRange blocks);
///   IBEX_KERNEL(dispatch_bf16, DispatchArgs, dispatch_body<kWireBf16>, 1024, 1)
///
/// CUDA: a `__global__` function `ibex_dispatch_bf16` whose arguments are a grid constant. Host: an
/// `ibex_kernel` record of the same name, collected in the table of host/registry.cpp under the id that
/// kernel_list.h gives it.
///
/// `threads_max` and `blocks_per_sm` bound the registers on CUDA: so many full blocks fit one multiprocessor. 1024
/// and 1 allow 64 registers, 1024 and 2 allow 32.
#pragma once
#include "ibex/defs.h"
#include "ibex/warp.h"

namespace ibex {

/// A body that runs all ranks of a group in one launch: an equal share of the blocks, and arguments of its own, each.
template <class Args, void (*kBody)(const Args&, BlockRange), class Group>
IBEX_DEV void group_body(const Group& group, BlockRange blocks) {
  const uint32_t share = blocks.num / group.num_ranks;
  const Args* const args = static_cast<const Args*>(group.args);
  kBody(args[blocks.idx / share], BlockRange{blocks.idx % share, share});
}

}  // namespace ibex

#if defined(IBEX_CUDA)

#define IBEX_KERNEL(name, Args, body, threads_max, blocks_per_sm)                                   \
  extern "C" __global__ void __launch_bounds__(threads_max, blocks_per_sm)                          \
      ibex_##name(const __grid_constant__ Args args) {                                              \
    body(args, ::ibex::BlockRange{::ibex::warp::block_id(), ::ibex::warp::num_blocks()});           \
  }

#else

/// What the host's launcher knows about a kernel.
struct ibex_kernel {
  const char* name;
  void (*run)(const void* args);
  uint32_t args_len;
  uint32_t threads_max;
};

#define IBEX_KERNEL(name, Args, body, threads_max, blocks_per_sm)                                   \
  static_assert(alignof(Args) <= 64, "the pool aligns copied arguments to 64 bytes");               \
  static void ibex_run_##name(const void* args) {                                                   \
    body(*static_cast<const Args*>(args),                                                           \
         ::ibex::BlockRange{::ibex::warp::block_id(), ::ibex::warp::num_blocks()});                 \
  }                                                                                                 \
  extern "C" const ibex_kernel ibex_kernel_##name;                                                  \
  extern "C" const ibex_kernel ibex_kernel_##name = {#name, ibex_run_##name, sizeof(Args), threads_max};

#endif
