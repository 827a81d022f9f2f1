/// Warp-region style: control flow is uniform per warp, per-lane work stands in lane regions, lanes talk
/// only through the collectives here.
///
///   warp::lanes<float> amax;                    // one value per lane
///   EACH_LANE(l) { amax[l] = fabsf(x[l]); }     // CUDA: straight-line code; warp fibers: a loop of 32
///   warp::reduce_max<16>(amax);                 // collective, outside any region
///   ONE_LANE { st_release_gpu(flag, 1u); }      // lane 0
///
/// Rules. A lane region touches a `lanes<T>` only at its own `l`. A collective stands outside regions and
/// is reached by all 32 lanes. `ONE_LANE` and `EACH_LANE` do not synchronise: what one lane wrote to memory
/// and another reads needs `warp::sync()` in between, as on CUDA (warp fibers cannot see its absence; lane
/// fibers under TSan do).
///
///   warp::id() count() block_id() num_blocks()
///   ballot(lanes<bool>) any all -> uint32_t | bool        prefix counts: popc(ballot & lanes_below(l))
///   bcast(lanes<T>, src) -> T
///   shuffle(lanes<T>, lanes<uint32_t> src) -> lanes<T>
///   reduce_add reduce_max reduce_min reduce_or (lanes<uint32_t>) -> uint32_t     reduce_add(lanes<uint64_t>)
///   reduce_max<W>(lanes<float>&)                           maximum of each W lanes, in place; NaN loses
///   exclusive_add(lanes<uint32_t>&) -> total               prefix sum in place
///   one_lane(F) -> result of F, run by lane 0, in every lane
///   copy16<kUnroll>(dst, src, n16)   fill16(dst, v, n16)   the whole warp moves n16 units of 16 bytes
///   sync()                                                 memory order between the lanes of this warp
///   sync_warps(id, num_warps)   sync_block()               barriers; ids 1..15, 0 is sync_block's
///   IBEX_SHARED(T, name, n)                                T* name: n elements of the block's shared memory
#pragma once
#include "ibex/defs.h"
#include "ibex/ptx.h"

#if defined(IBEX_WARP_FIBERS)
#include "ibex/detail/warp_fibers.h"
#else
#include "ibex/detail/warp_simt.h"
#endif
