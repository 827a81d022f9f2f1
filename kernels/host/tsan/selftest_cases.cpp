/// The self-test kernels on lane fibers.
///
/// `selftest --print` writes every result word to stdout; tests/simt.rs holds them against its own
/// arithmetic.
#include <cinttypes>
#include <cstdio>
#include <vector>

#include "ibex/selftest.h"
#include "host/tsan/rig.h"

namespace ibex::rig {

int run_selftest(const Options& options);
int run_pair(const Options& options);
int run_fence_pair(const Options& options);

namespace {

uint32_t scramble(uint32_t x) { return (x * 2654435761u) ^ (x >> 7); }

template <class T>
void print(const char* name, const T* words, size_t num) {
  std::printf("%s", name);
  for (size_t i = 0; i < num; ++i) std::printf(" %" PRIx64, uint64_t{words[i]});
  std::printf("\n");
}

/// Two devices pass a payload to and fro; `flags` and `payloads` are what the plants aim at.
int run_devices(const Options& options, uint32_t fenced) {
  uint32_t flags[2] = {};
  std::vector<uint4> payloads[2] = {std::vector<uint4>(options.n16), std::vector<uint4>(options.n16)};
  uint64_t sums[2] = {};
  if (options.plant == host::Plant::hold_back) {
    plant(options, payloads[1].data(), payloads[1].size() * sizeof(uint4), flags, sizeof(flags));
  } else {
    plant(options, flags, sizeof(flags));
  }
  Rig rig(options);
  for (uint32_t device = 0; device < 2; ++device) {
    const uint32_t peer = 1 - device;
    SelftestPairArgs args{};
    args.my_flag = &flags[device];
    args.peer_flag = &flags[peer];
    args.my_payload = payloads[device].data();
    args.peer_payload = payloads[peer].data();
    args.sum = &sums[device];
    args.n16 = options.n16;
    args.rounds = options.rounds;
    args.device = device;
    args.fenced = fenced;
    rig.launch("selftest_pair", device, 1, 1, args);
  }
  rig.wait();
  uint64_t expected = 0;
  for (uint64_t round = 1; round <= options.rounds; ++round) {
    for (uint64_t i = 0; i < options.n16; ++i) expected += 4 * (round * 1000 + i) + 6;
  }
  if (options.plant == host::Plant::none && (sums[0] != expected || sums[1] != expected)) {
    std::fprintf(stderr, "pair: sums %" PRIu64 " and %" PRIu64 ", expected %" PRIu64 "\n", sums[0], sums[1],
                 expected);
    return 1;
  }
  return 0;
}

}  // namespace

int run_selftest(const Options& options) {
  const size_t warps = size_t{options.blocks} * options.warps;
  std::vector<uint32_t> results(warps * kSelftestWords, 0xdeadbeef);
  std::vector<uint32_t> counters(8);
  std::vector<uint64_t> wide(4);
  std::vector<uint4> src(warps * options.n16), dst(warps * options.n16);
  for (uint32_t i = 0; i < src.size(); ++i) src[i] = {i, ~i, i * 3, scramble(i)};
  plant(options, counters.data(), counters.size() * sizeof(uint32_t));
  {
    Rig rig(options);
    const SelftestArgs args{results.data(), counters.data(), wide.data(), src.data(),
                            dst.data(),     options.n16,     0};
    rig.launch("selftest", 0, options.blocks, options.warps, args);
    rig.wait();
  }
  if (!options.print) return 0;
  print("results", results.data(), results.size());
  print("counters", counters.data(), counters.size());
  print("wide", wide.data(), wide.size());
  print("dst", reinterpret_cast<const uint32_t*>(dst.data()), dst.size() * 4);
  return 0;
}

int run_pair(const Options& options) { return run_devices(options, 0); }
int run_fence_pair(const Options& options) { return run_devices(options, 1); }

}  // namespace ibex::rig
