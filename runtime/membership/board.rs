//! The seam to a store: a board on which ranks pin what the others read.
//!
//! A board belongs to one rank and one instance; it has claimed the name `rank-<r>` for that instance and keeps the
//! lease alive by itself. It never blocks: wishes are taken and carried out later, what happened is polled. A board
//! may deliver late, twice, and only the newest of several contents; it may not deliver an older content of a cell
//! after a newer one.

use super::Claimed;
use crate::ids::Rank;

/// Where a rank publishes and reads. See the module documentation.
pub trait Board: Send {
    /// Pins this rank's row; replaces one that was not written yet.
    fn put_row(&mut self, row: Vec<u8>);

    /// Pins what this rank offers to its peers; replaces what was not written yet.
    fn put_offers(&mut self, offers: Vec<u8>);

    /// Pins a placement, before any plan names its version.
    fn put_placement(&mut self, version: u32, placement: Vec<u8>);

    /// Replaces the view if its cell still has version `expect`; 0: if it was never written. Answered by
    /// [`BoardEvent::ViewCas`], except across an outage.
    fn cas_view(&mut self, expect: u64, view: Vec<u8>);

    /// What happened next; none for now.
    fn poll(&mut self) -> Option<BoardEvent>;
}

/// Something that happened on a [`Board`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BoardEvent {
    /// The store answers again, or for the first time. Everything that it holds follows as events: claims, rows,
    /// offers and placements, then the view, of version 0 and without bytes if it was never written. It comes after
    /// every outage, also after one that was over before [`BoardEvent::Unavailable`] could be told.
    Available {
        /// How long the store itself has been up without interruption. An outage of this rank alone does not count.
        up_for_ns: u64,
    },
    /// The store does not answer. Nothing that was seen before is undone by it.
    Unavailable,
    /// The view's cell has this content; whoever wrote it.
    View {
        /// Its version in the store.
        version: u64,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// The answer to [`Board::cas_view`]; what the cell holds now comes as [`BoardEvent::View`], before or after it.
    ViewCas {
        /// The version that was expected.
        expect: u64,
        /// Whether it stood.
        is_done: bool,
    },
    /// The row of another rank.
    Row {
        /// Whose.
        from: Rank,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// The offers of another rank.
    Offers {
        /// Whose.
        from: Rank,
        /// Their bytes.
        bytes: Vec<u8>,
    },
    /// A placement.
    Placement {
        /// Its version.
        version: u32,
        /// Its bytes.
        bytes: Vec<u8>,
    },
    /// Who holds the name of a rank.
    Claim {
        /// Which name, by whom; this board's own, too.
        claim: Claimed,
        /// Whether its lease runs; `false` once it ran out or was given back.
        is_alive: bool,
    },
}
