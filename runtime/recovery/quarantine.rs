//! Regions of processes that were fenced and may still write into them.
//!
//! A queue pair in ERR or RST lets nothing through, and a retired key neither. A mapping has no such fence: a process
//! that was stopped, and wakes up, goes on in the middle of its kernel and stores where it would have. So the region of
//! a peer in another process that may have our memory mapped serves again only after that process has ended, which a
//! descriptor tells ([`ProcessWatch`]). Until then its successor gets a spare region, and the places of the combine
//! slab that the process soiled stay soiled (`kernels/include/ibex/late.h`).
//!
//! INVARIANT: a region is in use, spare or in quarantine, and in one of them only.

use ibex_abi::device_ctx::{LaneState, NOWHERE, SEQ_END};
use zerocopy::FromBytes;

use super::BASE_SEQ_OFF;
use super::watch::ProcessWatch;
use crate::buffer::bytes;
use crate::error::Error;
use crate::ids::Rank;
use crate::session::{COMBINE, Session};

/// The regions of one process, one per lane.
struct Haunted {
    peer: Rank,
    process: ProcessWatch,
    regions: Vec<u32>,
}

/// All regions of one session that somebody fenced may still write into.
#[derive(Default)]
pub(crate) struct Quarantine(Vec<Haunted>);

impl Session {
    /// Regions that serve nobody because a process that was fenced, and has not ended, may still write into them.
    #[must_use]
    pub fn quarantined_regions(&self) -> u64 {
        self.quarantine.lock().0.iter().map(|haunted| haunted.regions.len() as u64).sum()
    }

    /// All that `peer` may write here and that this rank goes by: its region but for the signs of life, and the places
    /// of the combine slab that the next rows go to. For tests.
    ///
    /// # Errors
    /// `Gpu` if memory cannot be read.
    #[doc(hidden)]
    pub fn bytes_in_use_of(&self, peer: Rank) -> Result<Vec<u8>, Error> {
        let (layout, shape) = (&self.plan.layout, &self.plan.shape);
        let mut all = Vec::new();
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            let mut state = [0; size_of::<LaneState>()];
            self.gpu.read(buffers.state_addr(), &mut state)?;
            let state = LaneState::read_from_bytes(&state).expect("the buffer has the structure's size");
            let mut ranges = vec![(buffers.region_addr(peer), layout.life_off)];
            for slot in 0..shape.ring {
                let place = state.pending[COMBINE][slot as usize] / SEQ_END;
                let index = place * u64::from(shape.ring) + u64::from(slot);
                let at = buffers.combine_slab().0 + index * layout.combine_slot_bytes;
                ranges.extend((place != u64::from(NOWHERE)).then_some((at, layout.combine_slot_bytes)));
            }
            for (addr, len) in ranges {
                let mut part = vec![0; bytes(len)];
                self.gpu.read(addr, &mut part)?;
                all.extend(part);
            }
        }
        Ok(all)
    }

    /// What stands in the regions in quarantine. For tests.
    ///
    /// # Errors
    /// `Gpu` if memory cannot be read.
    #[doc(hidden)]
    pub fn quarantined_bytes(&self) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        for haunted in &self.quarantine.lock().0 {
            for (runtime, region) in self.lanes.iter().zip(&haunted.regions) {
                let mut part = vec![0; bytes(self.plan.layout.region_bytes)];
                self.gpu.read(runtime.buffers.read().region_at(*region), &mut part)?;
                all.extend(part);
            }
        }
        Ok(all)
    }

    /// Takes back regions whose last writers have ended. The keeper calls this; it never waits.
    ///
    /// # Errors
    /// `Gpu` if memory cannot be written.
    pub fn release_quarantine(&self) -> Result<(), Error> {
        let ended: Vec<Haunted> =
            self.quarantine.lock().0.extract_if(.., |h| h.process.has_ended()).collect();
        for Haunted { peer, regions, .. } in ended {
            for (runtime, region) in self.lanes.iter().zip(regions) {
                runtime.buffers.write().give_back_region(region);
            }
            self.note_reach(peer)?;
        }
        Ok(())
    }

    /// Gives a peer that is fenced another region, if its process may still write into the one it has. Says whether its
    /// region may serve again: not as long as no spare one is left.
    pub(super) fn part_from(&self, peer: Rank) -> Result<bool, Error> {
        self.release_quarantine()?;
        let mut reaches = self.reaches.lock();
        if !reaches[peer.index()].may_still_write() {
            return Ok(true);
        }
        if !self.lanes.iter().all(|runtime| runtime.buffers.read().has_spare_region()) {
            return Ok(false);
        }
        let replaced = self.lanes.iter().map(|runtime| runtime.buffers.write().replace_region(peer));
        let regions: Vec<u32> = replaced.flatten().collect();
        if let Some(process) = reaches[peer.index()].take_process() {
            self.quarantine.lock().0.push(Haunted { peer, process, regions });
        }
        Ok(true)
    }

    /// Says from which combine on rows of `peer` can come: of its present pair, or of none. As long as a process of an
    /// earlier one may still write, all of them can.
    pub(super) fn note_reach(&self, peer: Rank) -> Result<(), Error> {
        let reaches = self.reaches.lock();
        let is_haunted = self.quarantine.lock().0.iter().any(|haunted| haunted.peer == peer);
        for runtime in &self.lanes {
            let buffers = runtime.buffers.read();
            let first = match (is_haunted, reaches[peer.index()].is_used()) {
                (true, _) => 0,
                (false, true) => self.gpu.load_u64(buffers.peer_ctx_addr(peer) + FIRST_COMBINE_OFF)?,
                (false, false) => u64::MAX,
            };
            // ORDER(19): 2RST, or the end of the process -> fenced_below. Release at sys.
            self.gpu.store_u64(buffers.fenced_below_addr(peer), first)?;
        }
        Ok(())
    }
}

/// Offset of the first combine of a pair in its `PeerCtx`.
const FIRST_COMBINE_OFF: u64 = BASE_SEQ_OFF + 8 * COMBINE as u64;
