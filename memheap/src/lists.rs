//! The size lists: which extents are free, by bin.
//!
//! Every bin has a ring of links through a head of its own; every record of the slab has a link, in use
//! while its extent is free. Heads and links are one array that grows with the slab:
//!
//! ```text
//!  links   | head of bin 0 | ... | head of the last bin | extent 0 | extent 1 | ...
//! ```
//!
//! Lists hold few extents each, and whether one has a neighbour there is close to a coin toss. With rings,
//! linking and unlinking take no branch on it.

use crate::bins::{NUM_BINS, Occupancy};
use crate::extents::ExtentId;

/// Position in the array of links.
type Place = u32;

#[derive(Clone, Copy, Debug)]
struct Link {
    prev: Place,
    next: Place,
}

// CAST: a bin is below 1440.
const FIRST_EXTENT: Place = NUM_BINS as Place;

fn place_of(id: ExtentId) -> Place {
    FIRST_EXTENT + id.0
}

/// One list of free extents per bin, and which of them are not empty.
#[derive(Debug)]
pub(crate) struct FreeLists {
    links: Vec<Link>,
    occupancy: Occupancy,
}

impl FreeLists {
    pub(crate) fn new() -> Self {
        let links = (0..FIRST_EXTENT).map(|head| Link { prev: head, next: head }).collect();
        FreeLists { links, occupancy: Occupancy::new() }
    }

    /// The first bin at or after `from` that has an extent.
    #[inline]
    pub(crate) fn first_from(&self, from: usize) -> Option<usize> {
        self.occupancy.first_from(from)
    }

    /// The last bin that has an extent: the longest is in it.
    pub(crate) fn last(&self) -> Option<usize> {
        self.occupancy.last()
    }

    /// The extent of a bin that was inserted last.
    #[inline]
    pub(crate) fn first_of(&self, bin: usize) -> Option<ExtentId> {
        self.links[bin].next.checked_sub(FIRST_EXTENT).map(ExtentId)
    }

    /// Makes room for the link of a record; records come in order, the sentinel first.
    pub(crate) fn admit(&mut self, id: ExtentId) {
        let place = place_of(id);
        debug_assert_eq!(self.links.len(), place as usize);
        self.links.push(Link { prev: place, next: place });
    }

    /// Every extent of one bin, the last inserted first.
    #[inline]
    pub(crate) fn iter(&self, bin: usize) -> impl Iterator<Item = ExtentId> {
        let mut at = self.links[bin].next;
        std::iter::from_fn(move || {
            let id = ExtentId(at.checked_sub(FIRST_EXTENT)?);
            at = self.links[at as usize].next;
            Some(id)
        })
    }

    #[inline]
    pub(crate) fn insert(&mut self, id: ExtentId, bin: usize) {
        let place = place_of(id);
        let next = std::mem::replace(&mut self.links[bin].next, place);
        // CAST: a bin is below 1440.
        self.links[place as usize] = Link { prev: bin as Place, next };
        self.links[next as usize].prev = place;
        self.occupancy.set(bin);
    }

    #[inline]
    pub(crate) fn remove(&mut self, id: ExtentId, bin: usize) {
        let Link { prev, next } = self.links[place_of(id) as usize];
        self.links[prev as usize].next = next;
        self.links[next as usize].prev = prev;
        // Alone in the ring, an extent has the head on both sides.
        self.occupancy.clear_if(bin, prev == next);
    }
}
