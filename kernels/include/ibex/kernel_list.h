/// Every kernel by name, with the id under which host and device sides know it (`KernelId` in runtime/gpu/mod.rs).
///
/// The host table (host/registry.cpp) is made from this list; the CUDA image has a kernel as `ibex_<name>`.
#pragma once

#define IBEX_KERNEL_LIST(X)    \
  X(dispatch_bf16, 0)          \
  X(combine_exact, 1)          \
  X(post, 2)                   \
  X(expert, 3)                 \
  X(selftest, 4)               \
  X(selftest_pair, 5)          \
  X(selftest_empty, 6)         \
  X(selftest_hazard, 7)        \
  X(dispatch_fp8, 8)           \
  X(combine_reduced, 9)        \
  X(group_dispatch_bf16, 10)   \
  X(group_dispatch_fp8, 11)    \
  X(group_combine_exact, 12)   \
  X(group_combine_reduced, 13) \
  X(group_expert, 14)
