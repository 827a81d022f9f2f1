/// Every kernel by name, in the order of its id. Ids are stable: append, never reorder.
///
/// The host table (host/registry.cpp) and the Rust side (runtime/gpu) resolve a kernel by this name; the CUDA image
/// has it as `ibex_<name>`.
#pragma once

#define IBEX_KERNEL_LIST(X) \
  X(selftest)               \
  X(selftest_pair)          \
  X(selftest_empty)
