/// The device reader against WQEs that the real libmlx5 wrote (tests/golden/wqe.txt, given as `--file`).
///
/// Every WQE of the file is parsed and compared with its title; what the reader knows is executed from a ring whose
/// record and doorbell stand as libmlx5 left them, and the memory and the completion are compared with what the
/// title says. WQEs of other kinds must be refused, not executed as something else.
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <initializer_list>
#include <string>
#include <vector>

#include "host/tsan/device.h"
#include "host/tsan/rig.h"
#include "ibex/ptx.h"
#include "ibex/qp.h"
#include "ibex/wqe.h"

namespace ibex::rig {

int run_golden(const Options& options);

namespace {

constexpr uint32_t kRingWqebbs = 128;
constexpr uint64_t kRemoteOff = 0x2000;
constexpr uint64_t kAtomicOff = 0x4000;
constexpr uint64_t kBufferLen = 0x6000;
constexpr uint8_t kInlineFill = 0x5a;
constexpr int kStepsUntilIdle = 1000;

/// One WQE of the file, with what its lines say about it.
struct GoldenWqe {
  std::string title;
  uint32_t ds = 0, record = 0;
  std::vector<uint8_t> bytes;

  bool is(const char* word) const { return title.find(word) != std::string::npos; }
  uint16_t idx() const { return static_cast<uint16_t>(bytes[1] << 8 | bytes[2]); }
};

struct GoldenFile {
  uint32_t qpn = 0, key = 0, wqe_cnt = 0;
  uint64_t buffer = 0;
  std::vector<GoldenWqe> wqes;
};

bool parse_bytes(const std::string& line, std::vector<uint8_t>* bytes) {
  unsigned at;
  int used;
  if (std::sscanf(line.c_str(), " %2x:%n", &at, &used) != 1 || at != bytes->size()) return false;
  const char* p = line.c_str() + used;
  unsigned byte;
  for (int n; std::sscanf(p, " %2x%n", &byte, &n) == 1; p += n) bytes->push_back(static_cast<uint8_t>(byte));
  return true;
}

GoldenFile read_file(const char* path) {
  GoldenFile file;
  std::ifstream in(path);
  bool in_wqe = false;
  for (std::string line; std::getline(in, line);) {
    const char* s = line.c_str();
    const size_t ds_at = line.find("ds=");
    std::sscanf(s, "qpn=%" SCNx32 " lkey=%" SCNx32 " buf=%" SCNx64 " sq: wqe_cnt=%" SCNu32, &file.qpn, &file.key,
                &file.buffer, &file.wqe_cnt);
    if (line.rfind("WQE ", 0) == 0 && ds_at != std::string::npos) {
      GoldenWqe wqe;
      wqe.title = line.substr(0, ds_at);
      std::sscanf(s + ds_at, "ds=%" SCNu32 " (%*u WQEBB) dbrec[SND]=%" SCNx32, &wqe.ds, &wqe.record);
      file.wqes.push_back(wqe);
      in_wqe = true;
    } else if (in_wqe && line.find("CQE->wc") == std::string::npos) {
      in_wqe = parse_bytes(line, &file.wqes.back().bytes);
    }
  }
  return file;
}

/// A queue between two ports of one process, with the file's key over one buffer as libmlx5's test had it.
struct Bench {
  explicit Bench(const GoldenFile& f) : file(f) {
    for (size_t i = 0; i < buffer.size(); ++i) buffer[i] = static_cast<uint8_t>(i * 7 + i / 256);
    keys.add(MemoryKey{f.key, f.buffer, buffer.data(), kBufferLen});
    std::memset(cqe, 0xff, sizeof(cqe));
  }

  /// Lays the WQEs into the ring as libmlx5 did, sets record and doorbell as they stood after the last one, and runs
  /// the queue until it is idle.
  void run(std::initializer_list<const GoldenWqe*> wqes) {
    for (const GoldenWqe* wqe : wqes) {
      const size_t at = wqe->idx() * kWqebbBytes;
      for (size_t i = 0; i < wqe->bytes.size(); ++i) ring[(at + i) % sizeof(ring)] = wqe->bytes[i];
      record = bswap32(wqe->record);
      std::memcpy(&doorbell, wqe->bytes.data(), sizeof(doorbell));
    }
    Queue queue({file.qpn, ring, kRingWqebbs, &record, &doorbell, cqe, &keys, &keys, (*wqes.begin())->idx()}, 1);
    queue.start();
    for (int i = 0; i < kStepsUntilIdle; ++i) queue.step();
    violations = queue.violations();
    executed = queue.executed();
  }

  uint32_t cqe_word(uint32_t off) const {
    uint32_t word;
    std::memcpy(&word, cqe + off, sizeof(word));
    return bswap32(word);
  }

  const GoldenFile& file;
  std::vector<uint8_t> buffer = std::vector<uint8_t>(kBufferLen);
  Keys keys;
  alignas(64) uint8_t ring[kRingWqebbs * kWqebbBytes] = {};
  alignas(64) uint8_t cqe[64];
  uint32_t record = 0;
  uint64_t doorbell = 0;
  uint64_t executed = 0;
  Violations violations{};
};

uint32_t opcode_of(const GoldenWqe& wqe) {
  if (wqe.is("NOP")) return 0x00;
  if (wqe.is("FETCH_ADD")) return 0x12;
  if (wqe.is("CMP_SWAP")) return 0x11;
  if (wqe.is("RDMA_READ")) return 0x10;
  if (wqe.is("WRITE_IMM")) return 0x09;
  if (wqe.is("SEND")) return 0x0a;
  return 0x08;
}

/// Bytes of payload by the title: "… 7168B", "inline 40B"; 0 where it names none.
uint32_t bytes_of(const GoldenWqe& wqe) {
  const size_t b = wqe.title.rfind('B');
  if (b == std::string::npos || b == 0 || wqe.title[b - 1] < '0' || wqe.title[b - 1] > '9') return 0;
  size_t first = b;
  while (first > 0 && wqe.title[first - 1] >= '0' && wqe.title[first - 1] <= '9') --first;
  return static_cast<uint32_t>(std::stoul(wqe.title.substr(first, b - first)));
}

/// Collects what does not hold.
struct Checks {
  const char* title = "";
  uint32_t num = 0, failed = 0;

  void expect(bool holds, const char* what) {
    ++num;
    if (holds) return;
    ++failed;
    std::fprintf(stderr, "golden: %s: %s\n", title, what);
  }
};

void check_parsed(const GoldenFile& file, const GoldenWqe& golden, Checks& checks) {
  uint8_t bytes[kWqeBytesMax] = {};
  std::memcpy(bytes, golden.bytes.data(), golden.bytes.size());
  ParsedWqe wqe;
  const bool known = parse_wqe(bytes, &wqe);
  const uint32_t opcode = opcode_of(golden);
  checks.expect(wqe.ds == golden.ds && wqe.ds * 16u == golden.bytes.size(), "ds");
  checks.expect(wqe.qpn == file.qpn, "qpn");
  checks.expect(wqe.opcode == opcode, "opcode");
  checks.expect(wqe.opmod == 0 && wqe.signaled, "opmod, signaled");
  checks.expect(((wqe.idx + wqe.num_wqebbs) & 0xffffu) == golden.record, "index and doorbell record");
  checks.expect(known == (opcode == 0x00 || opcode == 0x08 || opcode == 0x12), "known or refused");
  if (!known || opcode == 0x00) return;
  checks.expect(wqe.remote_va == file.buffer + (opcode == 0x12 ? kAtomicOff : kRemoteOff), "remote address");
  checks.expect((wqe.rkey == file.key) == !(golden.is("bad") || golden.is("next")), "rkey");
  checks.expect((wqe.inline_data != nullptr) == golden.is("inline"), "inline");
  if (wqe.bytes != 0 && wqe.inline_data == nullptr) {
    checks.expect(wqe.lkey == file.key && wqe.local_va == file.buffer, "lkey and local address");
  }
  if (bytes_of(golden) != 0) checks.expect(wqe.bytes == bytes_of(golden), "bytes");
  if (opcode == 0x12) checks.expect(wqe.add == 0x0102030405060708u, "addend");
}

void check_placed(const Bench& before, const Bench& after, const GoldenWqe& golden, Checks& checks) {
  std::vector<uint8_t> expected = before.buffer;
  const uint32_t opcode = opcode_of(golden), bytes = bytes_of(golden);
  if (opcode == 0x12) {
    uint64_t old, sum;
    std::memcpy(&old, &expected[kAtomicOff], sizeof(old));
    sum = old + 0x0102030405060708u;
    std::memcpy(&expected[kAtomicOff], &sum, sizeof(sum));
    std::memcpy(&expected[0], &old, sizeof(old));
  } else if (opcode == 0x08 && golden.is("inline")) {
    std::memset(&expected[kRemoteOff], kInlineFill, bytes);
  } else if (opcode == 0x08) {
    const size_t len = golden.is("0 sge") ? 0 : bytes != 0 ? bytes : 7168;
    std::memcpy(&expected[kRemoteOff], &expected[0], len);
  }
  checks.expect(after.buffer == expected, "memory after the WQE");
}

void check_run(const GoldenFile& file, const GoldenWqe& golden, Checks& checks) {
  Bench before(file), bench(file);
  bench.run({&golden});
  const uint32_t opcode = opcode_of(golden), last = bench.cqe_word(kCqeCompletionOff);
  checks.expect(bench.executed == 1, "one WQE");
  checks.expect(bench.violations.unrung == 0, "record and doorbell agree");
  checks.expect(last >> 16 == golden.idx(), "wqe_counter");
  checks.expect(bench.cqe_word(0x38) == (0x08u << 24 | file.qpn), "opcode and qpn of the completion");
  const uint32_t error = bench.cqe_word(kCqeSyndromeOff) & 0xffffu;
  if (golden.is("bad") || golden.is("next")) {
    // libmlx5 reports vendor 0x88 and "remote access error" for syndrome 0x13.
    checks.expect((last & 0xffu) == kCqeOpcodeRequesterError << 4 && error == 0x8813, "remote access error");
    checks.expect(bench.buffer == before.buffer, "nothing is written under a bad key");
  } else if (opcode == 0x00 || opcode == 0x08 || opcode == 0x12) {
    checks.expect((last & 0xffu) == 0 && error == 0, "good completion");
    check_placed(before, bench, golden, checks);
  } else {
    checks.expect((last & 0xffu) == kCqeOpcodeRequesterError << 4 && error == 0x6802, "refused");
    checks.expect(bench.buffer == before.buffer, "nothing is written by a refused WQE");
  }
}

/// The WQE after the one with the bad key is flushed with it; in a collapsed CQ its completion is what stays.
void check_flush(const GoldenFile& file, const GoldenWqe& bad, const GoldenWqe& next, Checks& checks) {
  Bench bench(file);
  bench.run({&bad, &next});
  checks.expect(bench.executed == 2 && bench.violations.unrung == 0, "both WQEs");
  checks.expect(bench.cqe_word(kCqeSyndromeOff) == 0xf905, "flushed");
  checks.expect(bench.cqe_word(kCqeCompletionOff) >> 16 == next.idx(), "wqe_counter of the flush");
}

/// A record without its doorbell is not work, and is counted.
void check_unrung(const GoldenFile& file, const GoldenWqe& first, Checks& checks) {
  Bench bench(file);
  GoldenWqe unrung = first;
  unrung.record += 1;
  bench.run({&unrung});
  checks.expect(bench.violations.unrung == 1, "the missing doorbell is counted");
}

/// What no kernel posts is refused: a second data segment, inline bytes beyond the WQE.
void check_malformed(const GoldenWqe& write, Checks& checks) {
  uint8_t bytes[kWqeBytesMax] = {};
  ParsedWqe wqe;
  std::memcpy(bytes, write.bytes.data(), write.bytes.size());
  bytes[7] = 4;
  checks.expect(!parse_wqe(bytes, &wqe), "two data segments are refused");
  bytes[7] = 3;
  bytes[0x20] = 0x80;
  bytes[0x23] = 13;
  checks.expect(!parse_wqe(bytes, &wqe), "13 inline bytes do not fit 3 segments");
  bytes[0x22] = 0;
  bytes[0x23] = 12;
  checks.expect(parse_wqe(bytes, &wqe) && wqe.bytes == 12, "12 inline bytes do");
}

}  // namespace

int run_golden(const Options& options) {
  const GoldenFile file = read_file(options.file);
  Checks checks;
  const GoldenWqe* last = nullptr;
  for (const GoldenWqe& wqe : file.wqes) {
    checks.title = wqe.title.c_str();
    check_parsed(file, wqe, checks);
    check_run(file, wqe, checks);
    if (last != nullptr && wqe.is("next")) check_flush(file, *last, wqe, checks);
    last = &wqe;
  }
  if (!file.wqes.empty()) {
    check_unrung(file, file.wqes.front(), checks);
    check_malformed(file.wqes.front(), checks);
  }
  std::printf("%zu WQEs, %" PRIu32 " checks, %" PRIu32 " failed\n", file.wqes.size(), checks.num, checks.failed);
  return checks.failed == 0 && !file.wqes.empty() ? 0 : 1;
}

}  // namespace ibex::rig
