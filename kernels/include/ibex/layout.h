/// Where things lie: offsets into a source's region, rows of the slabs, generations and signal words.
///
/// Pure arithmetic over `Shape` and `Layout`; nothing here touches memory.
#pragma once
#include "ibex/args.h"
#include "ibex/defs.h"

namespace ibex {

/// The low bits of a sequence number as a signal word carries them: never 0, equal only for the same step.
IBEX_HD uint32_t generation_of(uint64_t seq) { return 1u + static_cast<uint32_t>(seq % 0xffffffffull); }

/// Circular order of generations; 0 means "nothing yet" and is never newer.
IBEX_HD bool is_newer(uint32_t a, uint32_t b) { return a != 0 && static_cast<int32_t>(a - b) > 0; }

IBEX_HD uint64_t signal_word(uint32_t generation, uint32_t count) {
  return static_cast<uint64_t>(generation) << 32 | count;
}
IBEX_HD uint32_t signal_generation(uint64_t word) { return static_cast<uint32_t>(word >> 32); }
IBEX_HD uint32_t signal_count(uint64_t word) { return static_cast<uint32_t>(word); }

IBEX_HD uint32_t ring_slot(const Shape& s, uint64_t seq) { return static_cast<uint32_t>(seq % s.ring); }

IBEX_HD uint32_t qp_index(const Shape& s, uint32_t peer, uint32_t channel) { return peer * s.num_channels + channel; }

IBEX_HD uint64_t message_offset(const LaneArgs& a, uint32_t slot, uint32_t channel, uint32_t message) {
  const uint64_t index = (uint64_t{slot} * a.shape.num_channels + channel) * a.shape.channel_tokens + message;
  return index * a.layout.message_stride;
}

IBEX_HD uint64_t counts_offset(const LaneArgs& a, uint32_t slot) {
  return a.layout.counts_off + uint64_t{slot} * a.shape.max_local_experts * sizeof(uint32_t);
}

IBEX_HD uint64_t signal_offset(const LaneArgs& a, uint32_t op, uint32_t slot, uint32_t channel) {
  return a.layout.signals_off + ((uint64_t{op} * a.shape.ring + slot) * a.shape.num_channels + channel) * 8;
}

IBEX_HD uint64_t consumed_offset(const LaneArgs& a, uint32_t op, uint32_t slot) {
  return a.layout.consumed_off + (uint64_t{op} * a.shape.ring + slot) * 8;
}

/// A consumed word: {place:8 | seq:56}, the newest step that a slot's owner is done with, and the place in its combine
/// slab for the rows of the next one (late.h; 0 in a dispatch).
IBEX_HD uint64_t consumed_word(uint64_t seq, uint32_t place) { return uint64_t{place} << 56 | seq; }
IBEX_HD uint64_t consumed_seq(uint64_t word) { return word & 0x00ffffffffffffffull; }
IBEX_HD uint32_t consumed_place(uint64_t word) { return static_cast<uint32_t>(word >> 56); }

/// Row of pick (token, k) in one place of a slot of a rank's combine slab.
IBEX_HD uint64_t combine_offset(const LaneArgs& a, uint32_t slot, uint32_t place, uint32_t token, uint32_t k) {
  return (place * a.shape.ring + slot) * a.layout.combine_slot_bytes +
         (uint64_t{token} * a.shape.max_topk + k) * a.layout.row_bytes;
}

/// Rows that the packed outputs hold per local expert.
IBEX_HD uint64_t packed_capacity(const Shape& s) { return uint64_t{s.num_ranks} * s.max_tokens; }

IBEX_HD uint8_t* staged_message(const LaneArgs& a, uint32_t staging_slot, uint32_t token) {
  return a.staging + (uint64_t{staging_slot} * a.shape.max_tokens + token) * a.layout.message_stride;
}

IBEX_HD uint32_t* staged_counts(const LaneArgs& a, uint32_t staging_slot, uint32_t peer) {
  return a.counts_staging + (uint64_t{staging_slot} * a.shape.num_ranks + peer) * a.shape.max_local_experts;
}

/// Bytes of a kept message header: the fixed part and the picks.
IBEX_HD uint32_t header_bytes(const Shape& s) {
  return static_cast<uint32_t>(sizeof(MessageHeader) + s.max_topk * sizeof(Pick));
}

/// Messages that one source can send in one step, over all its channels.
IBEX_HD uint32_t messages_per_source(const Shape& s) { return s.num_channels * s.channel_tokens; }

}  // namespace ibex
