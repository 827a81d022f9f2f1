/// Lookup of a kernel by id.
#pragma once
#include <cstdint>

struct ibex_kernel;

namespace ibex::host {

/// Null when no kernel has this id.
const ibex_kernel* find_kernel(uint32_t id);

}  // namespace ibex::host
