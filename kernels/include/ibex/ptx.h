/// Every access to memory that another agent may touch at the same time, named by order and scope.
///
/// On CUDA each function is one PTX instruction; on the host it is the atomic of the same order, a yield
/// point of the simulation, and a scoped annotation for ThreadSanitizer. No name without order and scope: a
/// reader sees at the call what is promised. Pointers are global memory: device, peer-mapped or
/// host-mapped.
///
///   ld_{relaxed,acquire}_{gpu,sys}(const T*)         T = uint32_t | uint64_t
///   peek_relaxed_{gpu,sys}(const T*)                 the same as ld_relaxed, for words that nobody waits for
///   st_{relaxed,release}_{gpu,sys}(T*, T)
///   {add,exch,or,max}_{relaxed,acquire,release,acq_rel}_{gpu,sys}(T*, T) -> old value
///   cas_{acq_rel,relaxed}_{gpu,sys}(T*, expected, wanted) -> old value
///   fence_acq_rel_{gpu,sys}(), fence_seq_cst_{gpu,sys}()
///   st_relaxed_mmio_sys(uint64_t*, uint64_t)         a doorbell register
///   st_wqe(uint4*, uint4)                            16 bytes of a WQE; relaxed, sys
///   ld_stream16(const uint4*), st_stream16(uint4*, uint4)   payload passing through; weak, no L1 allocation
///   clock_ns()                                       globaltimer | monotonic clock | the simulation's clock
///   backoff()                                        the body of a wait loop has nothing new
///
/// # Ordering
/// `ld_stream16` is a weak load, not `.nc`: the kernel itself, a peer or the NIC writes what it reads, and
/// the non-coherent path may return stale lines within one kernel.
///
/// A wait loop needs no yield of its own on the host: a load that finds the unchanged value at an address
/// where this fiber has been before hands the worker to the next fiber. `peek` does not.
#pragma once
#include "ibex/defs.h"

#if defined(IBEX_CUDA)
#include "ibex/detail/ptx_cuda.h"
#else
#include "ibex/detail/ptx_host.h"
#endif
