#include "host/tsan/world.h"

#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "host/clock.h"
#include "ibex/cast.h"
#include "ibex/layout.h"
#include "ibex/ptx.h"
#include "ibex/wqe.h"

namespace ibex::rig {

namespace {

constexpr uint64_t kMs = 1'000'000;
constexpr uint64_t kBeatNs = kMs / 2;
constexpr uint32_t kRecordWords = 16;
constexpr uint32_t kDoorbellWords = 8;
constexpr uint32_t kCqeBytes = 64;
/// Queue steps of one progress call in real time.
constexpr uint32_t kPiecesPerTurn = 8;

uint64_t align_up(uint64_t value, uint64_t to) { return (value + to - 1) / to * to; }

uint64_t address(const void* p) { return reinterpret_cast<uint64_t>(p); }

// Keys name memory by its own address, so `iova` is the pointer.
uint32_t source_key(uint32_t rank) { return 0x100 + rank; }
uint32_t expert_out_key(uint32_t rank) { return 0x200 + rank; }
uint32_t region_key(uint32_t rank, uint32_t source) { return 0x1000 + 0x100 * rank + source; }
uint32_t combine_key(uint32_t rank, uint32_t source) { return 0x8000 + 0x100 * rank + source; }

void add_key(Keys& keys, uint32_t key, void* memory, uint64_t len) {
  keys.add(MemoryKey{key, address(memory), static_cast<uint8_t*>(memory), len});
}

/// The byte plan of runtime/layout.rs.
Layout plan(const EpConfig& c, const Shape& s) {
  const uint64_t blocks = (s.hidden + kScaleBlock - 1) / kScaleBlock;
  const bool fp8 = s.wire_dtype == kWireFp8;
  Layout l{};
  l.payload_off = sizeof(MessageHeader) + s.max_topk * sizeof(Pick);
  l.payload_bytes = s.hidden * (fp8 ? 1 : 2);
  l.scale_off = l.payload_off + l.payload_bytes;
  l.scale_bytes = fp8 ? static_cast<uint32_t>(align_up(blocks * scale_bytes_of(s.scale_kind), 16)) : 0;
  l.message_stride = l.scale_off + l.scale_bytes;
  l.row_bytes = s.hidden * 2;
  const uint64_t messages = uint64_t{s.ring} * s.num_channels * s.channel_tokens * l.message_stride;
  l.counts_off = align_up(messages, 64);
  l.signals_off = align_up(l.counts_off + uint64_t{s.ring} * s.max_local_experts * 4, 64);
  l.consumed_off = align_up(l.signals_off + uint64_t{kNumOps} * s.ring * s.num_channels * 8, 64);
  l.life_off = align_up(l.consumed_off + uint64_t{kNumOps} * s.ring * 8, 64);
  l.region_bytes = align_up(l.life_off + sizeof(LifeWords), 64);
  l.combine_slot_bytes = uint64_t{c.max_tokens} * c.max_topk * l.row_bytes;
  return l;
}

}  // namespace

Memory::~Memory() {
  for (void* block : blocks_) std::free(block);
}

void* Memory::take_bytes(size_t len) {
  const size_t size = align_up(len > 0 ? len : 1, 64);
  void* block = std::aligned_alloc(64, size);
  if (block == nullptr) std::abort();
  std::memset(block, 0, size);
  blocks_.push_back(block);
  return block;
}

World::World(const EpConfig& config, const Options& options) : config_(config), options_(options) {
  turns_.resize(options.seed != 0 ? 1 : options.workers);
  qps_ = memory_.take<QpDeviceCtx>(uint64_t{config.num_ranks} * config.num_ranks * config.num_channels);
  host_words_ = memory_.take<LaneHostWords>(config.num_ranks);
  const uint64_t num_handles = uint64_t{2} * config.ring * config.num_ranks;
  verdicts_ = memory_.take<uint64_t>(num_handles * config.num_ranks * config.num_channels);
  for (uint32_t r = 0; r < config.num_ranks; ++r) {
    ranks_.push_back(std::make_unique<Rank>());
    make_shape(r);
    make_buffers(*ranks_[r]);
    make_state(*ranks_[r]);
    make_handles(*ranks_[r]);
    make_tensors(*ranks_[r]);
  }
  for (uint32_t from = 0; from < config.num_ranks; ++from) {
    make_slots(from);
    for (uint32_t to = 0; to < config.num_ranks; ++to) connect(from, to, {1, 1});
  }
}

void World::make_shape(uint32_t rank) {
  LaneArgs& a = ranks_[rank]->lane;
  a = LaneArgs{};
  Shape& s = a.shape;
  s.num_ranks = config_.num_ranks;
  s.rank = rank;
  s.max_tokens = config_.max_tokens;
  s.hidden = config_.hidden;
  s.max_topk = config_.max_topk;
  s.max_experts = config_.num_experts;
  s.max_local_experts = (config_.num_experts + config_.num_ranks - 1) / config_.num_ranks;
  s.num_channels = config_.num_channels;
  s.ring = config_.ring;
  s.channel_tokens = (config_.max_tokens + config_.num_channels - 1) / config_.num_channels;
  s.num_owner_warps = config_.num_owner_warps;
  s.signal_mode = config_.signal_mode;
  s.wire_dtype = config_.wire_dtype;
  s.scale_kind = config_.scale_kind;
  s.combine_mode = config_.combine_mode;
  s.staging_rows = config_.staging_rows;
  s.num_places = config_.num_places;
  a.layout = plan(config_, s);
  a.guards_off = options_.guards_off;
}

/// What peers write into, and what our WQEs read from.
void World::make_buffers(Rank& r) {
  LaneArgs& a = r.lane;
  const Shape& s = a.shape;
  const uint32_t num_qps = s.num_ranks * s.num_channels, slots = 2 * s.ring;
  const uint64_t combine_bytes = s.num_places * s.ring * a.layout.combine_slot_bytes;
  a.combine_slab = memory_.take<uint8_t>(combine_bytes);
  for (uint32_t source = 0; source < s.num_ranks; ++source) {
    r.regions.push_back(memory_.take<uint8_t>(a.layout.region_bytes));
    add_key(r.keys, region_key(s.rank, source), r.regions[source], a.layout.region_bytes);
    add_key(r.keys, combine_key(s.rank, source), a.combine_slab, combine_bytes);
  }
  const uint64_t staging = uint64_t{slots} * s.max_tokens * a.layout.message_stride;
  const uint64_t counts = uint64_t{slots} * s.num_ranks * s.max_local_experts;
  const uint64_t rows = uint64_t{num_qps} * s.staging_rows * a.layout.row_bytes;
  a.staging = memory_.take<uint8_t>(staging);
  a.counts_staging = memory_.take<uint32_t>(counts);
  a.row_staging = memory_.take<uint8_t>(rows);
  a.atomic_result = memory_.take<uint64_t>(num_qps);
  add_key(r.keys, source_key(s.rank), a.staging, staging);
  add_key(r.keys, source_key(s.rank), a.counts_staging, counts * sizeof(uint32_t));
  add_key(r.keys, source_key(s.rank), a.row_staging, rows);
  add_key(r.keys, source_key(s.rank), a.atomic_result, num_qps * sizeof(uint64_t));
  a.lkey_be = bswap32(source_key(s.rank));
  r.rings = memory_.take<uint8_t>(uint64_t{num_qps} * config_.sq_wqebbs * kWqebbBytes);
  r.cqes = memory_.take<uint8_t>(uint64_t{num_qps} * kCqeBytes);
  r.records = memory_.take<uint32_t>(uint64_t{num_qps} * kRecordWords);
  r.doorbells = memory_.take<uint64_t>(uint64_t{num_qps} * kDoorbellWords);
}

/// What kernels and host share: contexts, tables, counters.
void World::make_state(Rank& r) {
  LaneArgs& a = r.lane;
  const Shape& s = a.shape;
  const uint32_t num_qps = s.num_ranks * s.num_channels;
  a.qps = qps_ + uint64_t{s.rank} * num_qps;
  a.peers = memory_.take<PeerCtx>(s.num_ranks);
  a.suspects = memory_.take<uint32_t>(s.num_ranks);
  r.fenced_below = memory_.take<uint64_t>(s.num_ranks);
  a.fenced_below = r.fenced_below;
  a.tables = memory_.take<MemberTable>(2);
  a.state = memory_.take<LaneState>();
  a.cursors = memory_.take<SendCursor>(num_qps);
  Limits* limits = memory_.take<Limits>();
  a.limits = limits;
  a.host_words = host_words_ + s.rank;
  a.faults = memory_.take<DeviceFault>(s.num_ranks);
  a.telemetry = memory_.take<PeerTelemetry>(s.num_ranks);
  a.staging_ready = memory_.take<uint32_t>(uint64_t{2} * s.ring * s.max_tokens);
  a.row_staging_pi = memory_.take<uint32_t>(uint64_t{num_qps} * s.staging_rows);
  // A planted bug may take what peers wait for; it must not take the test's time as well.
  const uint32_t planted_ms = min_of(config_.detect_ms, 400u);
  const uint64_t detect_ns = (options_.plant != host::Plant::none ? planted_ms : config_.detect_ms) * kMs;
  *limits = Limits{detect_ns, 2 * detect_ns, 4 * detect_ns, 16, 0};
  for (uint32_t op = 0; op < kNumOps; ++op) a.state->next[op] = 1;
  for (uint32_t t = 0; t < 2; ++t) {
    MemberTable& table = a.tables[t];
    table.epoch = table.placement_version = t + 1;
    table.num_experts = s.max_experts;
    for (uint32_t op = 0; op < kNumOps; ++op) table.from_seq[op] = t == 0 ? 0 : 2;
    uint32_t* owner_of = memory_.take<uint32_t>(s.max_experts);
    for (uint32_t e = 0; e < s.max_experts; ++e) owner_of[e] = e % s.num_ranks << 16 | e / s.num_ranks;
    table.owner_of = address(owner_of);
    for (uint32_t p = 0; p < s.num_ranks; ++p) table.alive[p / 64] |= uint64_t{1} << p % 64;
  }
}

void World::make_handles(Rank& r) {
  const Shape& s = r.lane.shape;
  const uint32_t num_qps = s.num_ranks * s.num_channels;
  const uint64_t messages = uint64_t{s.num_ranks} * messages_per_source(s);
  for (uint32_t i = 0; i < 2 * s.ring; ++i) {
    Handle h{};
    h.dispatch.ctx = memory_.take<HandleCtx>();
    h.dispatch.pick_owner = memory_.take<uint16_t>(uint64_t{s.max_tokens} * s.max_topk);
    h.dispatch.sent_picks = memory_.take<uint32_t>(num_qps);
    h.dispatch.sent_messages = memory_.take<uint32_t>(num_qps);
    h.dispatch.verdicts = verdicts_ + (uint64_t{s.rank} * 2 * s.ring + i) * num_qps;
    h.dispatch.ranges_ready = memory_.take<uint32_t>(s.num_ranks);
    h.dispatch.pack_cursor = memory_.take<uint32_t>(s.max_local_experts);
    h.dispatch.ranges = memory_.take<LayoutRange>(uint64_t{s.max_local_experts} * s.num_ranks);
    h.dispatch.headers = memory_.take<uint8_t>(messages * header_bytes(s));
    h.dispatch.source_ok = memory_.take<uint32_t>(s.num_ranks);
    h.ticket = memory_.take<HandleCtx>();
    h.verdicts = memory_.take<uint64_t>(num_qps);
    r.handles.push_back(h);
  }
}

void World::make_tensors(Rank& r) {
  const LaneArgs& a = r.lane;
  const Shape& s = a.shape;
  const uint64_t picks = uint64_t{s.max_tokens} * s.max_topk;
  const uint64_t rows = s.max_local_experts * packed_capacity(s);
  const uint64_t blocks = (s.hidden + kScaleBlock - 1) / kScaleBlock;
  r.expert_ids = memory_.take<uint32_t>(s.max_local_experts);
  for (uint32_t le = 0; le < s.max_local_experts; ++le) r.expert_ids[le] = le * s.num_ranks + s.rank;
  r.expert_out_lkey = expert_out_key(s.rank);
  for (uint32_t i = 0; i < 2 * s.ring; ++i) {
    Tensors t{};
    t.x = memory_.take<uint16_t>(uint64_t{s.max_tokens} * s.hidden);
    t.topk_idx = memory_.take<int32_t>(picks);
    t.topk_weights = memory_.take<float>(picks);
    t.num_tokens = memory_.take<uint32_t>();
    t.packed_x = memory_.take<uint8_t>(rows * a.layout.payload_bytes);
    t.packed_scales = memory_.take<uint8_t>(rows * blocks * scale_bytes_of(s.scale_kind));
    t.source_info = memory_.take<SourceInfo>(rows);
    t.expert_counts = memory_.take<int32_t>(s.max_local_experts);
    t.layout_ranges = memory_.take<LayoutRange>(uint64_t{s.max_local_experts} * s.num_ranks);
    t.source_ok = memory_.take<uint32_t>(s.num_ranks);
    t.expert_out = memory_.take<uint16_t>(rows * s.hidden);
    t.out = memory_.take<uint16_t>(uint64_t{s.max_tokens} * s.hidden);
    t.lost_topk = memory_.take<uint32_t>(s.max_tokens);
    add_key(r.keys, r.expert_out_lkey, t.expert_out, rows * a.layout.row_bytes);
    r.tensors.push_back(t);
  }
}

uint32_t World::route(uint32_t from, uint32_t to) const {
  if (from == to) return kRouteLocal;
  const bool mapped = config_.routes == Routes::mapped || (config_.routes == Routes::mixed && (from + to) % 2 == 0);
  return mapped ? kRouteMapped : kRouteIbgda;
}

void World::connect(uint32_t from, uint32_t to, const uint64_t (&base_seq)[kNumOps]) {
  Rank& r = *ranks_[from];
  const Rank& peer = *ranks_[to];
  PeerCtx p{};
  p.region_va = address(peer.regions[from]);
  p.combine_va = address(peer.lane.combine_slab);
  p.route = route(from, to);
  p.region_ptr = p.route != kRouteIbgda ? p.region_va : 0;
  p.combine_ptr = p.route != kRouteIbgda ? p.combine_va : 0;
  p.region_rkey_be = bswap32(region_key(to, from));
  p.combine_rkey_be = bswap32(combine_key(to, from));
  p.my_region = address(r.regions[to]);
  for (uint32_t op = 0; op < kNumOps; ++op) p.base_seq[op] = base_seq[op];
  PeerCtx& ctx = r.lane.peers[to];
  // Word by word what kernels read of a fenced peer (late.h), the rest as it comes.
  for (auto& words : ctx.posted_credit) {
    for (uint64_t& word : words) std::atomic_ref(word).store(0, std::memory_order_relaxed);
  }
  constexpr size_t before = offsetof(PeerCtx, posted_credit), after = before + sizeof p.posted_credit;
  std::memcpy(&ctx, &p, before);
  std::memcpy(reinterpret_cast<uint8_t*>(&ctx) + after, reinterpret_cast<const uint8_t*>(&p) + after, sizeof p - after);
  for (uint32_t c = 0; c < config_.num_channels; ++c) {
    if (p.route == kRouteIbgda) connect_queue(from, to, c);
  }
}

Slot& World::slot(uint32_t from, uint32_t to, uint32_t channel) {
  return ranks_[from]->slots[qp_index(ranks_[from]->lane.shape, to, channel)];
}

void World::make_slots(uint32_t from) {
  Rank& r = *ranks_[from];
  const uint32_t num_qps = config_.num_ranks * config_.num_channels;
  r.slots.resize(num_qps);
  for (uint32_t q = 0; q < num_qps; ++q) {
    const uint32_t to = q / config_.num_channels;
    for (uint32_t i = 0; i < Slot::kIncarnations && route(from, to) == kRouteIbgda; ++i) {
      const uint32_t qpn = 0x1000 * (i + 1) + 0x100 * from + q;
      const QueueConfig queue{qpn,
                              r.rings + uint64_t{q} * config_.sq_wqebbs * kWqebbBytes,
                              config_.sq_wqebbs,
                              r.records + uint64_t{q} * kRecordWords + 1,
                              r.doorbells + uint64_t{q} * kDoorbellWords,
                              r.cqes + uint64_t{q} * kCqeBytes,
                              &r.keys,
                              &ranks_[to]->keys};
      r.slots[q].queues[i] = std::make_unique<Queue>(queue, options_.seed ^ qpn);
    }
  }
}

void World::connect_queue(uint32_t from, uint32_t to, uint32_t channel) {
  Slot& s = slot(from, to, channel);
  Queue& queue = *s.queues[s.num_started++];
  const QueueConfig& c = queue.config();
  QpDeviceCtx& qp = ranks_[from]->lane.qps[qp_index(ranks_[from]->lane.shape, to, channel)];
  std::memset(const_cast<uint32_t*>(c.record), 0, sizeof(*c.record));
  std::memset(const_cast<uint64_t*>(c.doorbell), 0, sizeof(*c.doorbell));
  std::memset(c.cqe, 0xff, kCqeBytes);
  qp.sq = address(c.sq);
  qp.doorbell_record = address(c.record);
  qp.doorbell = address(c.doorbell);
  qp.cqe = address(c.cqe);
  qp.sq_mask = c.num_wqebbs - 1;
  qp.qpn_be = bswap32(c.qpn << 8);
  qp.incarnation = s.num_started;
  qp.peer = to;
  qp.channel = channel;
  queue.start();
  // ORDER(16): every field of the context -> state Active. Release at sys.
  st_release_sys(&qp.state, static_cast<uint32_t>(kQpActive));
}

void World::kill(uint32_t rank) {
  ranks_[rank]->alive = false;
  for (auto& r : ranks_) {
    for (uint32_t q = 0; q < r->slots.size(); ++q) {
      const bool gone = r.get() == ranks_[rank].get() || q / config_.num_channels == rank;
      if (gone && r->slots[q].current() != nullptr) r->slots[q].current()->freeze();
    }
  }
}

/// As `zero_words` of runtime/recovery.rs. A half that enters later still reads whether a queue holds staged rows,
/// and reads it atomically.
void World::forget(uint32_t from, uint32_t to) {
  Rank& r = *ranks_[from];
  const Layout& l = r.lane.layout;
  const Shape& s = r.lane.shape;
  std::memset(r.regions[to] + l.counts_off, 0, l.region_bytes - l.counts_off);
  for (uint32_t c = 0; c < s.num_channels; ++c) {
    const uint32_t q = qp_index(s, to, c);
    QpDeviceCtx& qp = r.lane.qps[q];
    uint32_t* words = reinterpret_cast<uint32_t*>(&qp);
    for (uint32_t i = 0; i < sizeof(QpDeviceCtx) / sizeof(uint32_t); ++i) {
      if (words + i != &qp.state) st_relaxed_sys(words + i, 0u);
    }
    std::memset(r.lane.row_staging_pi + uint64_t{q} * s.staging_rows, 0, s.staging_rows * sizeof(uint32_t));
    st_relaxed_sys(&qp.state, static_cast<uint32_t>(kQpMasked));
  }
  std::memset(&r.lane.faults[to], 0, sizeof(DeviceFault));
  st_relaxed_sys(&r.lane.suspects[to], 0u);
}

void World::plant() const {
  const Rank& writer = *ranks_[0];
  const Rank& reader = *ranks_[1];
  const Layout& l = reader.lane.layout;
  const uint32_t num_qps = config_.num_ranks * config_.num_channels;
  const uint64_t num_verdicts = uint64_t{config_.num_ranks} * 2 * config_.ring * num_qps;
  const Handle& h = writer.handles[0];
  uint8_t* region = reader.regions[0];
  const struct {
    const char* name;
    const void* begin;
    size_t len;
    const void* until;
    size_t until_len;
  } places[] = {
      {"messages", region, l.counts_off, region + l.signals_off, l.consumed_off - l.signals_off},
      {"signals", region + l.signals_off, l.consumed_off - l.signals_off, nullptr, 0},
      {"consumed", region + l.consumed_off, l.life_off - l.consumed_off, nullptr, 0},
      {"rings", writer.rings, uint64_t{num_qps} * config_.sq_wqebbs * kWqebbBytes, writer.records,
       uint64_t{num_qps} * kRecordWords * sizeof(uint32_t)},
      {"records", writer.records, uint64_t{num_qps} * kRecordWords * sizeof(uint32_t), nullptr, 0},
      {"completions", writer.cqes, uint64_t{num_qps} * kCqeBytes, nullptr, 0},
      {"ranges", h.dispatch.ranges_ready, config_.num_ranks * sizeof(uint32_t), nullptr, 0},
      {"go", &h.dispatch.ctx->go_send, 2 * sizeof(uint64_t), nullptr, 0},
      {"done", &h.dispatch.ctx->send_done_blocks, 2 * sizeof(uint32_t), nullptr, 0},
      {"busy", &writer.lane.state->busy, sizeof(uint64_t), nullptr, 0},
      {"pending", writer.lane.state->pending, sizeof(LaneState::pending), nullptr, 0},
      {"ready", writer.lane.staging_ready, 2 * config_.ring * config_.max_tokens * sizeof(uint32_t), nullptr, 0},
      {"verdicts", verdicts_, num_verdicts * sizeof(uint64_t), nullptr, 0},
      {"states", qps_, uint64_t{config_.num_ranks} * num_qps * sizeof(QpDeviceCtx), nullptr, 0},
      {"left", host_words_, config_.num_ranks * sizeof(LaneHostWords), nullptr, 0},
  };
  for (const auto& p : places) {
    if (std::strcmp(p.name, options_.at) == 0) return rig::plant(options_, p.begin, p.len, p.until, p.until_len);
  }
  rig::plant(options_, nullptr, 0);
}

DispatchArgs World::dispatch_args(uint32_t rank, uint32_t step, uint32_t halves, uint32_t nonce) const {
  const Rank& r = *ranks_[rank];
  const Tensors& t = r.tensors[step % r.tensors.size()];
  const uint64_t blocks = (config_.hidden + kScaleBlock - 1) / kScaleBlock;
  DispatchArgs d{};
  d.lane = r.lane;
  d.handle = r.handles[step % r.handles.size()].dispatch;
  d.x = t.x;
  d.topk_idx = t.topk_idx;
  d.topk_weights = t.topk_weights;
  d.num_tokens = t.num_tokens;
  d.packed_x = t.packed_x;
  d.packed_scales = config_.wire_dtype == kWireFp8 ? t.packed_scales : nullptr;
  d.source_info = t.source_info;
  d.expert_counts = t.expert_counts;
  d.layout_ranges = t.layout_ranges;
  d.source_ok = t.source_ok;
  d.scale_block_stride = scale_bytes_of(config_.scale_kind);
  d.scale_row_stride = blocks * d.scale_block_stride;
  d.scale_expert_stride = packed_capacity(r.lane.shape) * d.scale_row_stride;
  d.num_topk = config_.max_topk;
  d.halves = halves;
  d.nonce = nonce;
  return d;
}

ExpertArgs World::expert_args(uint32_t rank, uint32_t step) const {
  const Rank& r = *ranks_[rank];
  const Tensors& t = r.tensors[step % r.tensors.size()];
  const DispatchArgs d = dispatch_args(rank, step, 0, 0);
  ExpertArgs e{};
  e.packed_x = t.packed_x;
  e.packed_scales = t.packed_scales;
  e.layout_ranges = t.layout_ranges;
  e.expert_ids = r.expert_ids;
  e.expert_out = t.expert_out;
  e.scale_expert_stride = d.scale_expert_stride;
  e.scale_row_stride = d.scale_row_stride;
  e.scale_block_stride = d.scale_block_stride;
  e.num_ranks = config_.num_ranks;
  e.max_tokens = config_.max_tokens;
  e.hidden = config_.hidden;
  e.max_local_experts = r.lane.shape.max_local_experts;
  e.wire_dtype = config_.wire_dtype;
  e.scale_kind = config_.scale_kind;
  return e;
}

CombineArgs World::combine_args(uint32_t rank, uint32_t step, uint32_t halves, uint32_t nonce) const {
  const Rank& r = *ranks_[rank];
  const Tensors& t = r.tensors[step % r.tensors.size()];
  const Handle& h = r.handles[step % r.handles.size()];
  CombineArgs c{};
  c.lane = r.lane;
  c.handle = h.dispatch;
  c.ticket = h.ticket;
  c.verdicts = h.verdicts;
  c.expert_out = t.expert_out;
  c.topk_weights = t.topk_weights;
  c.out = t.out;
  c.lost_topk = t.lost_topk;
  c.expert_out_lkey_be = bswap32(r.expert_out_lkey);
  c.zero_copy = config_.zero_copy ? 1 : 0;
  c.halves = halves;
  c.nonce = nonce;
  return c;
}

/// The sign of life that a host writes into its region at every member, and the progress it carries.
void World::write_life(uint32_t rank) {
  Rank& r = *ranks_[rank];
  if (!r.alive) return;
  for (uint32_t peer = 0; peer < config_.num_ranks; ++peer) {
    auto* life = reinterpret_cast<LifeWords*>(ranks_[peer]->regions[rank] + r.lane.layout.life_off);
    for (uint32_t op = 0; op < kNumOps; ++op) {
      st_relaxed_sys(&life->sent[op], ld_relaxed_sys(&r.lane.host_words->sent[op]));
      st_relaxed_sys(&life->credited[op], ld_relaxed_sys(&r.lane.host_words->credited[op]));
    }
    st_relaxed_sys(&life->beat, ld_relaxed_sys(&life->beat) + 1);
  }
}

/// A host takes its turn now and then: it is slow, compared with kernels and devices.
bool World::step_hosts(uint32_t worker, uint64_t random) {
  Rank& r = *ranks_[(worker + random / 64 * turns_.size()) % config_.num_ranks];
  return r.host != nullptr && random % 64 == 0 && host::tsan_step_agent(r.host);
}

bool World::step_queues(uint32_t worker, uint64_t random) {
  const uint32_t num_qps = config_.num_ranks * config_.num_channels;
  const uint64_t total = uint64_t{config_.num_ranks} * num_qps;
  Turn& turn = turns_[worker];
  const uint64_t first = random != 0 ? random : turn.next_queue;
  for (uint64_t i = 0; i < total; ++i) {
    const uint64_t index = (first + i) % total;
    if (index / num_qps % turns_.size() != worker) continue;
    // Every incarnation: a queue that is not started, or is reset, does nothing.
    for (const auto& queue : ranks_[index / num_qps]->slots[index % num_qps].queues) {
      if (queue == nullptr || !queue->step()) continue;
      turn.next_queue = index + 1;
      return true;
    }
  }
  return false;
}

uint64_t World::progress(void* self, uint32_t worker, uint64_t now_ns, uint64_t random) {
  World& w = *static_cast<World*>(self);
  Turn& turn = w.turns_[worker];
  if (now_ns >= turn.next_beat_ns) {
    turn.next_beat_ns = now_ns + kBeatNs;
    for (uint32_t r = worker; r < w.config_.num_ranks; r += static_cast<uint32_t>(w.turns_.size())) w.write_life(r);
  }
  bool worked = w.step_hosts(worker, random) || w.step_queues(worker, random);
  for (uint32_t i = 1; random == 0 && worked && i < kPiecesPerTurn; ++i) worked = w.step_queues(worker, 0);
  return worked ? IBEX_PROGRESS_WORKED : turn.next_beat_ns;
}

bool World::queues_are_clean() const {
  bool clean = true;
  for (const auto& rank : ranks_) {
    for (uint32_t q = 0; q < rank->slots.size(); ++q) {
      for (uint32_t i = 0; i < rank->slots[q].num_started; ++i) {
        const Violations v = rank->slots[q].queues[i]->violations();
        if (v.bad_wqes == 0 && v.unrung == 0) continue;
        std::fprintf(stderr, "%s: rank %u queue %u: %u bad WQEs, %u doorbells missed\n", config_.name,
                     rank->lane.shape.rank, q, v.bad_wqes, v.unrung);
        clean = false;
      }
    }
  }
  return clean;
}

}  // namespace ibex::rig
