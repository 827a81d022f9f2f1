//! The store of a simulated group: cells, claims and leases in virtual time, with every delay drawn from the seed.
//!
//! A [`SimStore`] is shared by the boards of all ranks; it owns what they wrote and what is on its way to them. It can
//! go away, be restarted, and be cut off from single ranks. What a rank has written and the store has not seen yet is
//! the rank's; it dies with it.
//!
//! INVARIANT: a board is never told an older content of a cell after a newer one; it may be told late, or twice.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::chaos::draws::Draws;
use crate::ids::Rank;
use crate::membership::{Board, BoardEvent, Claimed, Instance};

/// How long a write or a notification takes, in nanoseconds.
const DELAY_NS: (u64, u64) = (10_000, 2_000_000);
/// How long a rank takes to see that the store is away, or back.
const NOTICE_NS: (u64, u64) = (100_000, 5_000_000);
/// One notification in so many comes twice.
const TWICE_ONE_IN: u64 = 16;
/// A lease is renewed so many times within its length.
const RENEWALS: u64 = 3;

/// A cell of the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cell {
    View,
    Row(Rank),
    Offers(Rank),
    Placement(u32),
    Claim(Rank),
    /// Not a cell: whether the store answers.
    Link,
    /// Not a cell: the answer to a compare-and-set.
    Answer,
}

/// What is on its way.
#[derive(Debug)]
enum Happening {
    /// A rank's write reaches the store.
    Write { board: u64, cell: Cell },
    /// A rank is told.
    Tell { board: u64, event: BoardEvent },
    /// A lease is renewed, or runs out.
    Lease(Rank),
    /// A rank reaches the store (again), and is told everything.
    Linked { board: u64 },
}

/// Who holds a name.
#[derive(Debug)]
struct Claim {
    claim: Claimed,
    board: u64,
    is_alive: bool,
    expires_ns: u64,
}

/// One board's side.
#[derive(Debug)]
struct Seat {
    rank: Rank,
    /// The way to the store is cut.
    is_cut: bool,
    /// Its process stands still.
    is_frozen: bool,
    inbox: VecDeque<BoardEvent>,
    /// Written, not yet in the store.
    pending: BTreeMap<Cell, (u64, Vec<u8>)>,
    /// When the last notification per cell is due.
    told: BTreeMap<Cell, u64>,
}

impl Seat {
    fn new(rank: Rank) -> Self {
        let (inbox, pending, told) = (VecDeque::new(), BTreeMap::new(), BTreeMap::new());
        Self { rank, is_cut: false, is_frozen: false, inbox, pending, told }
    }
}

#[derive(Debug)]
struct Inner {
    draws: Draws,
    now_ns: u64,
    lease_ttl_ns: u64,
    is_up: bool,
    up_since_ns: u64,
    cells: BTreeMap<Cell, (u64, Vec<u8>)>,
    /// Views that the observer has not seen.
    unseen: VecDeque<Vec<u8>>,
    claims: BTreeMap<Rank, Claim>,
    seats: BTreeMap<u64, Seat>,
    /// By the instant that they are due, then in order.
    queue: BTreeMap<(u64, u64), Happening>,
    nth: u64,
    fence: u64,
}

/// See the module documentation.
#[derive(Clone, Debug)]
pub(super) struct SimStore(Arc<Mutex<Inner>>);

/// One rank's way to the store; dropping it is the end of its process.
#[derive(Debug)]
pub(super) struct SimBoard {
    store: SimStore,
    id: u64,
}

impl SimStore {
    /// An empty store that has been up since the beginning.
    #[must_use]
    pub(super) fn new(seed: u64, lease_ttl_ns: u64) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            draws: Draws::new(seed, 3),
            now_ns: 0,
            lease_ttl_ns,
            is_up: true,
            up_since_ns: 0,
            cells: BTreeMap::new(),
            unseen: VecDeque::new(),
            claims: BTreeMap::new(),
            seats: BTreeMap::new(),
            queue: BTreeMap::new(),
            nth: 0,
            fence: 0,
        })))
    }

    /// A board for a process that claims `rank`; none if the store is away, or the name is held. With `takes_over` the
    /// old holder is known to be dead and its name is taken at once; otherwise its lease must run out first.
    #[must_use]
    pub(super) fn board(
        &self,
        rank: Rank,
        instance: Instance,
        takes_over: bool,
    ) -> Option<(SimBoard, Claimed)> {
        let mut inner = self.0.lock();
        let is_held = inner.claims.get(&rank).is_some_and(|claim| claim.is_alive);
        if !inner.is_up || (is_held && !takes_over) {
            return None;
        }
        inner.nth += 1;
        let id = inner.nth;
        inner.seats.insert(id, Seat::new(rank));
        inner.link(id);
        let claim = inner.grant(rank, id, instance);
        Some((SimBoard { store: self.clone(), id }, claim))
    }

    /// Lets time pass up to `now_ns`; whether anything happened.
    pub(super) fn advance(&self, now_ns: u64) -> bool {
        let mut inner = self.0.lock();
        let mut happened = false;
        while let Some(entry) = inner.queue.first_entry()
            && entry.key().0 <= now_ns
        {
            let ((due, _), happening) = entry.remove_entry();
            inner.now_ns = inner.now_ns.max(due);
            inner.happen(happening);
            happened = true;
        }
        inner.now_ns = inner.now_ns.max(now_ns);
        happened
    }

    /// When something happens next.
    #[must_use]
    pub(super) fn next_due(&self) -> Option<u64> {
        self.0.lock().queue.first_key_value().map(|((due, _), _)| *due)
    }

    /// The next view that was written, of those that have not been asked for yet.
    #[must_use]
    pub(super) fn next_view(&self) -> Option<Vec<u8>> {
        self.0.lock().unseen.pop_front()
    }

    /// The store goes away, or comes back: with what was written, and leases that start anew.
    pub(super) fn set_up(&self, is_up: bool) {
        let mut inner = self.0.lock();
        if inner.is_up == is_up {
            return;
        }
        inner.is_up = is_up;
        let (now, ttl) = (inner.now_ns, inner.lease_ttl_ns);
        if is_up {
            inner.up_since_ns = now;
            inner.claims.values_mut().for_each(|claim| claim.expires_ns = now + ttl);
        }
        let ids: Vec<u64> = inner.seats.keys().copied().collect();
        ids.into_iter().for_each(|id| inner.relink(id));
    }
}

impl SimBoard {
    /// What [`SimStore`] calls this board.
    #[must_use]
    pub(super) const fn id(&self) -> u64 {
        self.id
    }
}

impl SimStore {
    /// Cuts one rank's way to the store, or heals it.
    pub(super) fn set_cut(&self, board: u64, is_cut: bool) {
        let mut inner = self.0.lock();
        if let Some(seat) = inner.seats.get_mut(&board)
            && seat.is_cut != is_cut
        {
            seat.is_cut = is_cut;
            inner.relink(board);
        }
    }

    /// Stops or resumes the part of a process that renews its lease.
    pub(super) fn set_frozen(&self, board: u64, is_frozen: bool) {
        if let Some(seat) = self.0.lock().seats.get_mut(&board) {
            seat.is_frozen = is_frozen;
        }
    }
}

impl Inner {
    fn schedule(&mut self, due: u64, happening: Happening) {
        self.nth += 1;
        self.queue.insert((due, self.nth), happening);
    }

    fn delay(&mut self, (min, max): (u64, u64)) -> u64 {
        // Most are short: a long one should find short ones to be overtaken by.
        let max = if self.draws.one_in(4) { max } else { min + (max - min) / 16 };
        self.draws.between(min, max)
    }

    fn reaches(&self, board: u64) -> bool {
        self.is_up && self.seats.get(&board).is_some_and(|seat| !seat.is_cut)
    }

    /// Tells one board, after what it was told before about the same cell.
    fn tell(&mut self, board: u64, cell: Cell, event: BoardEvent, within: (u64, u64)) {
        let due = self.now_ns + self.delay(within);
        let twice = !matches!(cell, Cell::Link | Cell::Answer) && self.draws.one_in(TWICE_ONE_IN);
        let Some(seat) = self.seats.get_mut(&board) else { return };
        let due = due.max(seat.told.get(&cell).map_or(0, |last| last + 1));
        let last = due + u64::from(twice);
        seat.told.insert(cell, last);
        if twice {
            self.schedule(last, Happening::Tell { board, event: event.clone() });
        }
        self.schedule(due, Happening::Tell { board, event });
    }

    fn tell_all(&mut self, cell: Cell, but: Option<u64>) {
        let Some(event) = self.content(cell) else { return };
        let ids: Vec<u64> = self.seats.keys().copied().filter(|id| Some(*id) != but).collect();
        for id in ids.into_iter().filter(|id| self.reaches(*id)).collect::<Vec<_>>() {
            self.tell(id, cell, event.clone(), DELAY_NS);
        }
    }

    /// What a board is told about a cell.
    fn content(&self, cell: Cell) -> Option<BoardEvent> {
        if let Cell::Claim(rank) = cell {
            let claim = self.claims.get(&rank)?;
            return Some(BoardEvent::Claim { claim: claim.claim, is_alive: claim.is_alive });
        }
        let (version, bytes) = self.cells.get(&cell)?.clone();
        match cell {
            Cell::View => Some(BoardEvent::View { version, bytes }),
            Cell::Row(from) => Some(BoardEvent::Row { from, bytes }),
            Cell::Offers(from) => Some(BoardEvent::Offers { from, bytes }),
            Cell::Placement(version) => Some(BoardEvent::Placement { version, bytes }),
            Cell::Claim(_) | Cell::Link | Cell::Answer => None,
        }
    }

    fn link(&mut self, board: u64) {
        let due = self.now_ns + self.delay(NOTICE_NS);
        self.schedule(due, Happening::Linked { board });
    }

    /// A board's way to the store has changed: what was on its way to it is lost.
    fn relink(&mut self, board: u64) {
        self.queue.retain(|_, happening| match happening {
            Happening::Tell { board: to, .. } | Happening::Write { board: to, .. } => *to != board,
            Happening::Linked { board: to } => *to != board,
            Happening::Lease(_) => true,
        });
        if self.reaches(board) {
            self.link(board);
        } else {
            self.tell(board, Cell::Link, BoardEvent::Unavailable, NOTICE_NS);
        }
    }

    fn happen(&mut self, happening: Happening) {
        match happening {
            Happening::Write { board, cell } if self.reaches(board) => self.written(board, cell),
            Happening::Write { .. } => {}
            Happening::Tell { board, event } => {
                let is_notice = matches!(event, BoardEvent::Unavailable);
                if (is_notice || self.reaches(board))
                    && let Some(seat) = self.seats.get_mut(&board)
                {
                    seat.inbox.push_back(event);
                }
            }
            Happening::Lease(rank) => self.lease(rank),
            Happening::Linked { board } if self.reaches(board) => self.linked(board),
            Happening::Linked { .. } => {}
        }
    }

    /// A board reaches the store: it is told everything, and what it had written arrives.
    fn linked(&mut self, board: u64) {
        let up_for_ns = self.now_ns - self.up_since_ns;
        let Some(seat) = self.seats.get_mut(&board) else { return };
        seat.inbox.push_back(BoardEvent::Available { up_for_ns });
        // Whether it was carried out before the outage, nobody can say.
        seat.pending.remove(&Cell::View);
        let (own, pending): (Rank, Vec<Cell>) = (seat.rank, seat.pending.keys().copied().collect());
        let others = |cell: &Cell| ![Cell::View, Cell::Row(own), Cell::Offers(own)].contains(cell);
        let claims = self.claims.keys().map(|rank| Cell::Claim(*rank));
        let cells = self.cells.keys().copied().filter(others);
        let mut events: Vec<BoardEvent> = claims.chain(cells).filter_map(|cell| self.content(cell)).collect();
        let (version, bytes) = self.cells.get(&Cell::View).cloned().unwrap_or_default();
        events.push(BoardEvent::View { version, bytes });
        if let Some(seat) = self.seats.get_mut(&board) {
            seat.inbox.extend(events);
        }
        for cell in pending {
            let due = self.now_ns + self.delay(DELAY_NS);
            self.schedule(due, Happening::Write { board, cell });
        }
    }

    fn put(&mut self, board: u64, cell: Cell, expect: u64, bytes: Vec<u8>) {
        let due = self.now_ns + self.delay(DELAY_NS);
        let reaches = self.reaches(board);
        let Some(seat) = self.seats.get_mut(&board) else { return };
        let is_first = seat.pending.insert(cell, (expect, bytes)).is_none();
        if is_first && reaches {
            self.schedule(due, Happening::Write { board, cell });
        }
    }

    fn written(&mut self, board: u64, cell: Cell) {
        let taken = self.seats.get_mut(&board).and_then(|seat| seat.pending.remove(&cell));
        let Some((expect, bytes)) = taken else { return };
        let version = self.cells.get(&cell).map_or(0, |(version, _)| *version);
        let is_done = cell != Cell::View || version == expect;
        if is_done {
            if cell == Cell::View {
                self.unseen.push_back(bytes.clone());
            }
            self.cells.insert(cell, (version + 1, bytes));
            let but = (cell != Cell::View).then_some(board);
            self.tell_all(cell, but);
        }
        if cell == Cell::View {
            self.tell(board, Cell::Answer, BoardEvent::ViewCas { expect, is_done }, DELAY_NS);
        }
    }

    fn grant(&mut self, rank: Rank, board: u64, instance: Instance) -> Claimed {
        let (now, ttl) = (self.now_ns, self.lease_ttl_ns);
        self.fence += 1;
        let claim = Claimed { rank, instance, fence: self.fence };
        let new = Claim { claim, board, is_alive: true, expires_ns: now + ttl };
        if self.claims.insert(rank, new).is_none() {
            self.schedule(now + ttl / RENEWALS, Happening::Lease(rank));
        }
        self.tell_all(Cell::Claim(rank), Some(board));
        claim
    }

    fn lease(&mut self, rank: Rank) {
        let (now, ttl, is_up) = (self.now_ns, self.lease_ttl_ns, self.is_up);
        self.schedule(now + ttl / RENEWALS, Happening::Lease(rank));
        let Some(claim) = self.claims.get(&rank) else { return };
        let runs = self.seats.get(&claim.board).is_some_and(|seat| !seat.is_frozen);
        let renews = runs && self.reaches(claim.board);
        let Some(claim) = self.claims.get_mut(&rank) else { return };
        if renews && claim.is_alive {
            claim.expires_ns = now + ttl;
        } else if is_up && now >= claim.expires_ns && claim.is_alive {
            claim.is_alive = false;
            self.tell_all(Cell::Claim(rank), None);
        }
    }
}

impl Board for SimBoard {
    fn put_row(&mut self, row: Vec<u8>) {
        self.put(Cell::Row, row);
    }

    fn put_offers(&mut self, offers: Vec<u8>) {
        self.put(Cell::Offers, offers);
    }

    fn put_placement(&mut self, version: u32, placement: Vec<u8>) {
        self.put(|_| Cell::Placement(version), placement);
    }

    fn cas_view(&mut self, expect: u64, view: Vec<u8>) {
        self.store.0.lock().put(self.id, Cell::View, expect, view);
    }

    fn poll(&mut self) -> Option<BoardEvent> {
        self.store.0.lock().seats.get_mut(&self.id)?.inbox.pop_front()
    }
}

impl SimBoard {
    fn put(&self, cell: impl Fn(Rank) -> Cell, bytes: Vec<u8>) {
        let mut inner = self.store.0.lock();
        let Some(rank) = inner.seats.get(&self.id).map(|seat| seat.rank) else { return };
        inner.put(self.id, cell(rank), 0, bytes);
    }
}

impl Drop for SimBoard {
    fn drop(&mut self) {
        self.store.0.lock().seats.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(board: &mut SimBoard) -> Vec<BoardEvent> {
        core::iter::from_fn(|| board.poll()).collect()
    }

    fn settled(store: &SimStore, until_ns: u64) {
        store.advance(until_ns);
    }

    fn claimed(store: &SimStore, rank: u16, instance: u128) -> SimBoard {
        store.board(Rank(rank), Instance(instance), false).expect("the name is free").0
    }

    fn claim(rank: u16, instance: u128, fence: u64) -> Claimed {
        Claimed { rank: Rank(rank), instance: Instance(instance), fence }
    }

    #[test]
    fn one_of_two_writers_wins_and_everybody_learns_of_it() {
        for seed in 0..50 {
            let store = SimStore::new(seed, 1_000_000_000);
            let mut boards: Vec<SimBoard> = (0..3).map(|r| claimed(&store, r, 1 + u128::from(r))).collect();
            settled(&store, 100_000_000);
            boards.iter_mut().for_each(|board| drop(drain(board)));
            boards[0].cas_view(0, vec![10]);
            boards[1].cas_view(0, vec![11]);
            settled(&store, 200_000_000);
            let bytes = store.next_view().unwrap();
            assert_eq!(store.next_view(), None);
            let won =
                |events: &[BoardEvent]| events.contains(&BoardEvent::ViewCas { expect: 0, is_done: true });
            let seen: Vec<Vec<BoardEvent>> = boards.iter_mut().map(drain).collect();
            assert_eq!([won(&seen[0]), won(&seen[1])], [bytes == [10], bytes == [11]], "seed {seed}");
            for events in &seen {
                assert!(events.contains(&BoardEvent::View { version: 1, bytes: bytes.clone() }));
            }
        }
    }

    #[test]
    fn a_lease_runs_out_only_while_the_store_is_up_and_its_holder_does_not_renew() {
        let store = SimStore::new(1, 30_000_000);
        let (zero, mut one) = (claimed(&store, 0, 7), claimed(&store, 1, 8));
        settled(&store, 500_000_000);
        drop(drain(&mut one));
        store.set_up(false);
        drop(zero);
        settled(&store, 900_000_000);
        assert_eq!(drain(&mut one), [BoardEvent::Unavailable]);
        store.set_up(true);
        settled(&store, 925_000_000);
        let dead = BoardEvent::Claim { claim: claim(0, 7, 1), is_alive: false };
        let events = drain(&mut one);
        assert!(matches!(events[0], BoardEvent::Available { up_for_ns } if up_for_ns < 25_000_000));
        assert!(!events.contains(&dead), "leases start anew");
        settled(&store, 1_000_000_000);
        assert!(drain(&mut one).contains(&dead));
    }

    #[test]
    fn a_name_is_taken_over_at_once_or_after_its_lease() {
        let store = SimStore::new(2, 30_000_000);
        let (zero, mut one) = (claimed(&store, 0, 7), claimed(&store, 1, 8));
        settled(&store, 100_000_000);
        drop((drain(&mut one), zero));
        assert!(store.board(Rank(0), Instance(9), false).is_none(), "the lease runs");
        let (again, taken) = store.board(Rank(0), Instance(9), true).unwrap();
        assert_eq!(taken, claim(0, 9, 3));
        settled(&store, 110_000_000);
        assert!(drain(&mut one).contains(&BoardEvent::Claim { claim: taken, is_alive: true }));
        drop(again);
        settled(&store, 200_000_000);
        assert!(drain(&mut one).contains(&BoardEvent::Claim { claim: taken, is_alive: false }));
        assert!(store.board(Rank(0), Instance(10), false).is_some());
        store.set_up(false);
        assert!(store.board(Rank(2), Instance(11), false).is_none());
    }

    #[test]
    fn a_board_that_was_cut_off_is_told_everything_once_it_is_back() {
        let store = SimStore::new(3, 1_000_000_000);
        let (mut zero, mut one) = (claimed(&store, 0, 7), claimed(&store, 1, 8));
        settled(&store, 100_000_000);
        drop(drain(&mut one));
        store.set_cut(one.id(), true);
        zero.put_row(vec![1]);
        one.put_row(vec![2]);
        settled(&store, 200_000_000);
        zero.put_row(vec![3]);
        settled(&store, 300_000_000);
        assert_eq!(drain(&mut one), [BoardEvent::Unavailable]);
        drop(drain(&mut zero));
        store.set_cut(one.id(), false);
        settled(&store, 400_000_000);
        let events = drain(&mut one);
        let rows = events.iter().filter(|event| matches!(event, BoardEvent::Row { .. }));
        assert!(rows.clone().all(|row| *row == BoardEvent::Row { from: Rank(0), bytes: vec![3] }));
        assert!(rows.count() > 0);
        assert!(drain(&mut zero).contains(&BoardEvent::Row { from: Rank(1), bytes: vec![2] }));
    }
}
