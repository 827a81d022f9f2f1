/// rig CASE [--blocks N] [--warps N] [--n16 N] [--rounds N] [--workers N] [--seed N]
///     [--plant KIND [--at PLACE]] [--guards-off MASK] [--file PATH] [--print]
///
/// Exit status: 0 good, 1 the case's own check failed, 2 usage, 66 ThreadSanitizer found a race.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/tsan/rig.h"

namespace {

using ibex::host::Plant;
using ibex::rig::kCases;
using ibex::rig::NamedCase;
using ibex::rig::Options;

struct PlantName {
  const char* name;
  Plant plant;
};
constexpr PlantName kPlants[] = {
    {"none", Plant::none},
    {"drop-release", Plant::drop_release},
    {"drop-acquire", Plant::drop_acquire},
    {"narrow-scope", Plant::narrow_scope},
    {"drop-fence", Plant::drop_fence},
    {"narrow-fence", Plant::narrow_fence},
    {"skip-warp-sync", Plant::skip_warp_sync},
    {"hold-back", Plant::hold_back},
};

bool parse_plant(const char* text, Plant* plant) {
  for (const PlantName& p : kPlants) {
    if (std::strcmp(p.name, text) != 0) continue;
    *plant = p.plant;
    return true;
  }
  return false;
}

bool parse_option(const char* name, const char* value, Options* o) {
  if (std::strcmp(name, "--plant") == 0) return parse_plant(value, &o->plant);
  if (std::strcmp(name, "--at") == 0) {
    o->at = value;
    return true;
  }
  if (std::strcmp(name, "--file") == 0) {
    o->file = value;
    return true;
  }
  char* end;
  const unsigned long long number = std::strtoull(value, &end, 10);
  if (end == value || *end != '\0') return false;
  if (std::strcmp(name, "--seed") == 0) {
    o->seed = number;
    return true;
  }
  const struct {
    const char* name;
    uint32_t* field;
  } fields[] = {{"--blocks", &o->blocks}, {"--warps", &o->warps},     {"--n16", &o->n16},
                {"--rounds", &o->rounds}, {"--workers", &o->workers}, {"--guards-off", &o->guards_off}};
  for (const auto& f : fields) {
    if (std::strcmp(f.name, name) != 0) continue;
    *f.field = static_cast<uint32_t>(number);
    return true;
  }
  return false;
}

int usage() {
  std::fprintf(stderr,
               "usage: rig CASE [--blocks N] [--warps N] [--n16 N] [--rounds N] [--workers N]\n"
               "                [--seed N] [--plant KIND [--at PLACE]] [--guards-off MASK]\n"
               "                [--file PATH] [--print]\nplants:");
  for (const PlantName& p : kPlants) std::fprintf(stderr, " %s", p.name);
  std::fprintf(stderr, "\ncases:");
  for (const NamedCase* c = kCases; c->name != nullptr; ++c) std::fprintf(stderr, " %s", c->name);
  std::fprintf(stderr, "\n");
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) return usage();
  Options options;
  for (int i = 2; i < argc; ++i) {
    if (std::strcmp(argv[i], "--print") == 0) {
      options.print = true;
      continue;
    }
    if (i + 1 == argc || !parse_option(argv[i], argv[i + 1], &options)) return usage();
    ++i;
  }
  for (const NamedCase* c = kCases; c->name != nullptr; ++c) {
    if (std::strcmp(c->name, argv[1]) == 0) return c->run(options);
  }
  return usage();
}
