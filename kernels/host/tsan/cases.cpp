/// Every case of the rig by name.
#include "host/tsan/rig.h"

namespace ibex::rig {

int run_selftest(const Options& options);
int run_pair(const Options& options);
int run_fence_pair(const Options& options);
int run_golden(const Options& options);
int run_recreate(const Options& options);
int run_ep_ibgda(const Options& options);
int run_ep_mapped(const Options& options);
int run_ep_staged(const Options& options);
int run_ep_reduced(const Options& options);
int run_ep_split(const Options& options);
int run_ep_split_mapped(const Options& options);

const NamedCase kCases[] = {
    {"selftest", run_selftest},
    {"pair", run_pair},
    {"fence-pair", run_fence_pair},
    {"golden", run_golden},
    {"recreate", run_recreate},
    {"ep-ibgda", run_ep_ibgda},
    {"ep-mapped", run_ep_mapped},
    {"ep-staged", run_ep_staged},
    {"ep-reduced", run_ep_reduced},
    {"ep-split", run_ep_split},
    {"ep-split-mapped", run_ep_split_mapped},
    {nullptr, nullptr},
};

}  // namespace ibex::rig
