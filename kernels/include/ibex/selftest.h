/// Arguments of the self-test kernels: every collective, barrier, atomic and copy of the SIMT layer, with
/// results that a test computes for itself.
///
/// The Rust twins stand in tests/simt.rs, the C++ user in host/tsan/.
#pragma once
#include <cstdint>

#include "ibex/defs.h"

namespace ibex {

/// Words of results per warp: see selftest.cu for what each one holds.
constexpr uint32_t kSelftestWords = 64;

struct SelftestArgs {
  uint32_t* results;   ///< kSelftestWords per warp of the grid, kernel writes
  uint32_t* counters;  ///< 8 words, zeroed by the host
  uint64_t* wide;      ///< 4 words, zeroed by the host
  const uint4* src;    ///< n16 units per warp
  uint4* dst;
  uint32_t n16;
  uint32_t reserved;
};
static_assert(sizeof(SelftestArgs) == 48);

/// Two devices pass a payload to and fro; device 0 begins.
struct SelftestPairArgs {
  uint32_t* my_flag;
  uint32_t* peer_flag;
  uint4* my_payload;
  uint4* peer_payload;
  uint64_t* sum;       ///< of all words received
  uint32_t n16;
  uint32_t rounds;
  uint32_t device;
  uint32_t fenced;     ///< 1: a fence and a relaxed access where otherwise a release and an acquire stand
};
static_assert(sizeof(SelftestPairArgs) == 56);

struct SelftestEmptyArgs {
  uint32_t* counter;   ///< every warp adds 1
};

/// What must go wrong, so that a test can see it reported.
enum SelftestHazard : uint32_t {
  kHazardBarrier = 0,     ///< warp 0 leaves, the others wait for it at a barrier: deadlock
  kHazardLivelock = 1,    ///< memory changes for ever, and no time passes
  kHazardLostUpdate = 2,  ///< every warp adds `rounds` by a load and a store instead of one update
};

struct SelftestHazardArgs {
  uint32_t* counter;
  uint32_t hazard;
  uint32_t rounds;
};

}  // namespace ibex
