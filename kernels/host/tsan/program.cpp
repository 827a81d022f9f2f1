#include "host/tsan/program.h"

namespace ibex::rig {

namespace {
/// The launch that stands for "nothing to wait for".
constexpr uint32_t kNone = ~0u;
}  // namespace

Program::Program(World& world, Rig& rig, uint32_t rank, uint32_t first, uint32_t num)
    : world_(world), rig_(rig), rank_(rank), next_nonce_(1 + 1000 * first) {
  if (world.config().split) {
    build_split(first, num);
  } else {
    for (uint32_t step = first; step < first + num; ++step) build_in_turn(step);
  }
}

uint32_t Program::add(Kind kind, uint32_t step, std::initializer_list<uint32_t> after) {
  const uint32_t index = static_cast<uint32_t>(launches_.size());
  launches_.push_back(std::make_unique<Launch>(Launch{this, kind, step, 0, {}}));
  for (uint32_t before : after) {
    if (before == kNone) continue;
    launches_[before]->followers.push_back(index);
    ++launches_[index]->waits_for;
  }
  return index;
}

/// Both halves in one launch, everything on one stream.
void Program::build_in_turn(uint32_t step) {
  const uint32_t last = launches_.empty() ? kNone : static_cast<uint32_t>(launches_.size()) - 1;
  const uint32_t dispatch = add(Kind::dispatch, step, {last});
  const uint32_t expert = add(Kind::expert, step, {dispatch});
  add(Kind::combine, step, {expert});
}

/// Send halves on one stream, receive halves and experts on another. The dispatch of step s + 1 is sent before the
/// combine of step s, so that a send half meets a receive half of its own rank at any point of both. A receive half
/// comes after its own send half; send half s after receive half s - ring, whose credit it posts.
void Program::build_split(uint32_t first, uint32_t num) {
  const uint32_t ring = world_.config().ring;
  std::vector<uint32_t> received, combined;
  const auto at = [](const std::vector<uint32_t>& list, int64_t i) { return i < 0 ? kNone : list[i]; };
  uint32_t sends = kNone, receives = kNone;
  for (uint32_t i = 0; i <= num; ++i) {
    const uint32_t expert = receives;
    uint32_t dispatched = kNone;
    if (i < num) {
      // Handles and tensors come round after twice the ring.
      const uint32_t free = at(combined, int64_t{i} - 2 * ring);
      dispatched = sends = add(Kind::dispatch_send, first + i, {sends, at(received, int64_t{i} - ring), free});
    }
    if (i > 0) {
      const uint32_t credit = at(combined, int64_t{i} - 1 - ring);
      sends = add(Kind::combine_send, first + i - 1, {sends, expert, credit});
      receives = add(Kind::combine_receive, first + i - 1, {receives, sends});
      combined.push_back(receives);
    }
    if (i < num) {
      receives = add(Kind::dispatch_receive, first + i, {receives, dispatched});
      received.push_back(receives);
      receives = add(Kind::expert, first + i, {receives});
    }
  }
}

void Program::start() {
  // Running a launch may complete it and start its followers; those are not ours to start.
  std::vector<Launch*> ready;
  for (const auto& launch : launches_) {
    if (launch->waits_for == 0) ready.push_back(launch.get());
  }
  for (Launch* launch : ready) run(*launch);
}

void Program::run(Launch& launch) {
  const EpConfig& c = world_.config();
  const uint32_t step = launch.step, nonce = next_nonce_++;
  const auto dispatch = [&](uint32_t halves) {
    const DispatchArgs args = world_.dispatch_args(rank_, step, halves, nonce);
    const char* kernel = args.lane.shape.wire_dtype == kWireFp8 ? "dispatch_fp8" : "dispatch_bf16";
    rig_.launch(kernel, rank_, c.blocks, halves == kReceiveHalf ? c.receive_warps : c.warps, args, completed, &launch);
  };
  const auto combine = [&](uint32_t halves) {
    const CombineArgs args = world_.combine_args(rank_, step, halves, nonce);
    const char* kernel = args.lane.shape.combine_mode == kReduced ? "combine_reduced" : "combine_exact";
    rig_.launch(kernel, rank_, c.blocks, halves == kReceiveHalf ? c.receive_warps : c.warps, args, completed, &launch);
  };
  if (launch.kind == Kind::dispatch_send || launch.kind == Kind::dispatch) fill_inputs(world_, rank_, step);
  switch (launch.kind) {
    case Kind::dispatch_send: return dispatch(kSendHalf);
    case Kind::dispatch_receive: return dispatch(kReceiveHalf);
    case Kind::dispatch: return dispatch(kSendHalf | kReceiveHalf);
    case Kind::combine_send: return combine(kSendHalf);
    case Kind::combine_receive: return combine(kReceiveHalf);
    case Kind::combine: return combine(kSendHalf | kReceiveHalf);
    case Kind::expert:
      return rig_.launch("expert", rank_, 1, 1, world_.expert_args(rank_, step), completed, &launch);
  }
}

void Program::completed(void* self) {
  Launch& launch = *static_cast<Launch*>(self);
  Program& p = *launch.program;
  if (launch.kind == Kind::combine || launch.kind == Kind::combine_receive) {
    const uint32_t wrong = check_outputs(p.world_, p.rank_, launch.step, p.expected_lost_);
    p.num_wrong_.fetch_add(wrong, std::memory_order_relaxed);
  }
  for (uint32_t follower : launch.followers) {
    Launch& next = *p.launches_[follower];
    if (--next.waits_for == 0) p.run(next);
  }
}

}  // namespace ibex::rig
