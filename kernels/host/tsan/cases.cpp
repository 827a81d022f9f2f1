/// Every case of the rig by name.
#include "host/tsan/rig.h"

namespace ibex::rig {

int run_selftest(const Options& options);
int run_pair(const Options& options);
int run_fence_pair(const Options& options);

const NamedCase kCases[] = {
    {"selftest", run_selftest},
    {"pair", run_pair},
    {"fence-pair", run_fence_pair},
    {nullptr, nullptr},
};

}  // namespace ibex::rig
