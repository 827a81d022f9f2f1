/// The one clock of the host runtime in real time.
#pragma once
#include <time.h>

#include <cstdint>

namespace ibex::host {

inline uint64_t monotonic_ns() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<uint64_t>(t.tv_sec) * 1'000'000'000u + static_cast<uint64_t>(t.tv_nsec);
}

}  // namespace ibex::host
