/// Rows that come too late: where in the combine slab the rows of the next step go.
///
/// All peers write into one slab. A peer that a combine of step s has given up may be slow, not dead: its rows of s can
/// come at any later time, to places that another peer's rows take in step s + N, and nothing in a row tells the two
/// apart. So every ring slot has a few *places*, and a place into which late rows may come is *soiled*: the slot moves
/// to another one. Which one, the consumed word says together with the credit, so that every sender learns it exactly
/// when it may use it. Where no place is clean the word says `kNowhere`: nobody sends rows for that step, and its sums
/// are lost, and said so. Nobody waits.
///
/// A peer under suspicion is told `kNowhere` from then on, so that it soils at most one place of each slot, however
/// long it takes until the group has agreed and fenced it.
///
/// A place is clean again once every peer that soiled it has ended its combine of s, which its signals say (they follow
/// its rows on the same route), or cannot write here any more, which the host says (`LaneArgs::fenced_below`).
#pragma once
#include "ibex/args.h"
#include "ibex/guards.h"
#include "ibex/half.h"
#include "ibex/layout.h"
#include "ibex/warp.h"

namespace ibex {

/// Has `peer`, a member, said on every channel that its combine of `seq`, or a later one, is over? One lane.
IBEX_DEV bool has_ended_combine(const LaneArgs& a, uint32_t peer, uint64_t seq) {
  const uint32_t generation = generation_of(seq), slot = ring_slot(a.shape, seq);
  const PeerCtx& from = a.peers[peer];
  // Words of a later pair say nothing of an earlier one.
  if (seq < from.base_seq[kCombine]) return false;
  IBEX_ROLLED
  for (uint32_t c = 0; c < a.shape.num_channels; ++c) {
    const uint64_t* word = reinterpret_cast<const uint64_t*>(from.my_region + signal_offset(a, kCombine, slot, c));
    // ORDER(5): rows placed by the NIC -> signal word. ORDER(6): rows copied by a mapped peer -> signal word. Acquire
    // at sys.
    const uint32_t g = signal_generation(ld_acquire_sys(word));
    if (g != generation && !is_newer(g, generation)) return false;
  }
  return true;
}

/// May rows of the combine `seq` still come from `peer`? One lane.
///
/// # Ordering
/// ORDER(19): the end of a peer's writes -> fenced_below -> rows of others in the place. Acquire at sys.
IBEX_DEV bool may_rows_come(const LaneArgs& a, const MemberTable& table, uint32_t peer, uint64_t seq) {
  if (seq < ld_acquire_sys(&a.fenced_below[peer])) return false;
  // Only a member's context may be read: the host rewrites those of others.
  return !is_alive(a, table, peer) || !has_ended_combine(a, peer, seq);
}

/// Is no late row to be expected in this place any more? One lane.
IBEX_DEV bool is_clean(const LaneArgs& a, const MemberTable& table, SoiledPlace& place) {
  if (place.seq == 0) return true;
  IBEX_ROLLED
  for (uint32_t p = 0; p < a.shape.num_ranks; ++p) {
    if ((place.late[p / 64] >> (p % 64) & 1) != 0 && may_rows_come(a, table, p, place.seq)) return false;
  }
  place.seq = 0;
  return true;
}

/// Was `peer` ever given a place for its rows of this combine? Without one it sends none. One lane.
///
/// The host zeroes the word of a peer that it has fenced, whose rows cannot come either.
IBEX_DEV bool was_given_place(const LaneArgs& a, const HalfContext& h, uint32_t peer) {
  if (h.seq <= a.shape.ring) return true;
  const uint64_t word = ld_relaxed_sys(&a.peers[peer].posted_credit[kCombine][h.slot]);
  return consumed_seq(word) + a.shape.ring >= h.seq && consumed_place(word) != kNowhere;
}

/// Notes whom this combine has given up, and finds the place for the next rows of its slot. One lane.
IBEX_CALL uint32_t next_place(const LaneArgs& a, const HalfContext& h) {
  SoiledPlace* places = a.state->places[h.slot];
  if (h.place != kNowhere) {
    SoiledPlace& soiled = places[h.place];
    soiled.seq = h.seq;
    IBEX_ROLLED
    for (uint32_t w = 0; w < kRankWords; ++w) soiled.late[w] = ld_relaxed_gpu(&h.ctx->lost[w]);
    IBEX_ROLLED
    for (uint32_t p = 0; p < a.shape.num_ranks; ++p) {
      if (!was_given_place(a, h, p)) soiled.late[p / 64] &= ~(uint64_t{1} << (p % 64));
    }
  }
  IBEX_ROLLED
  for (uint32_t place = 0; place < a.shape.num_places; ++place) {
    if (is_clean(a, *h.table, places[place])) return place;
  }
  return kNowhere;
}

/// The place for the rows of one ring later. Lane 0 of the last block of a combine's receive half only.
IBEX_DEV uint32_t place_after(const LaneArgs& a, const HalfContext& h) {
  // Almost always nobody was given up, and all this costs is one look.
  const bool stays = ld_relaxed_gpu(&h.ctx->flags) == 0 && h.place != kNowhere;
  return stays || !guarded(a, kGuardLateRows) ? h.place : next_place(a, h);
}

}  // namespace ibex
