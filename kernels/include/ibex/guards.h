/// The guards of the protocol by name, so that a test can switch one off and prove that it would be missed.
///
/// On CUDA every guard always stands: `guarded` is the constant true there, and nothing of this reaches the code.
/// The host build reads a mask in `LaneArgs`, which only tests set (`Session::switch_guard_off`).
#pragma once
#include "ibex/args.h"
#include "ibex/defs.h"

namespace ibex {

/// Bits of `LaneArgs::guards_off`. Those of the host, which has bits of its own there, are the grace period of a fence
/// and the wait before a member table is overwritten.
enum Guard : uint32_t {
  kGuardCredit = 1,       ///< a ring slot is rewritten at a peer only after that peer consumed it
  kGuardSourceRows = 2,   ///< a row is overwritten only after a CQE covers every WQE that names it
  kGuardGeneration = 4,   ///< signal words and headers are compared with the generation of the step
  kGuardLost = 8,         ///< a peer that cannot be served is told so
  kGuardDoorbell = 16,    ///< the doorbell is rung after the record
  kGuardFromSeq = 64,     ///< the newer member table applies from its first sequence number on
  kGuardLateRows = 512,   ///< a combine slot moves away from rows that may come too late
  kGuardMembership = 256, ///< masks, suspicions, signs of life and loss bits are looked at; off to see what they cost
};

#if defined(IBEX_CUDA)
IBEX_DEV constexpr bool guarded(const LaneArgs&, Guard) { return true; }
#else
IBEX_DEV bool guarded(const LaneArgs& a, Guard guard) { return (a.guards_off & guard) == 0; }
#endif

}  // namespace ibex
