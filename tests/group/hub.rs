//! A store in memory, and boards on it: everything arrives at once, in order.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use ibex::Rank;
use ibex::membership::{Board, BoardEvent, Claimed, Instance};
use parking_lot::Mutex;

#[derive(Default)]
struct State {
    is_away: bool,
    version: u64,
    view: Vec<u8>,
    rows: BTreeMap<Rank, Vec<u8>>,
    offers: BTreeMap<Rank, Vec<u8>>,
    placements: BTreeMap<u32, Vec<u8>>,
    names: BTreeMap<Rank, (Claimed, bool)>,
    queues: BTreeMap<(Rank, Instance), VecDeque<BoardEvent>>,
}

impl State {
    fn tell_all(&mut self, event: &BoardEvent) {
        self.queues.values_mut().for_each(|queue| queue.push_back(event.clone()));
    }

    /// Everything that a board that has just connected must know.
    fn listing(&self) -> VecDeque<BoardEvent> {
        let mut events = VecDeque::from([BoardEvent::Available { up_for_ns: 1 << 40 }]);
        let claims = self.names.values();
        events
            .extend(claims.map(|(claim, is_alive)| BoardEvent::Claim { claim: *claim, is_alive: *is_alive }));
        let row = |(from, bytes): (&Rank, &Vec<u8>)| BoardEvent::Row { from: *from, bytes: bytes.clone() };
        events.extend(self.rows.iter().map(row));
        let offers =
            |(from, bytes): (&Rank, &Vec<u8>)| BoardEvent::Offers { from: *from, bytes: bytes.clone() };
        events.extend(self.offers.iter().map(offers));
        for (version, bytes) in &self.placements {
            events.push_back(BoardEvent::Placement { version: *version, bytes: bytes.clone() });
        }
        events.push_back(BoardEvent::View { version: self.version, bytes: self.view.clone() });
        events
    }
}

/// The store.
#[derive(Clone, Default)]
pub(crate) struct Hub(Arc<Mutex<State>>);

impl Hub {
    /// Claims the name of a rank, whoever held it.
    pub(crate) fn claim(&self, rank: Rank, instance: Instance) -> (Claimed, HubBoard) {
        let mut state = self.0.lock();
        let fence = state.names.get(&rank).map_or(0, |(claim, _)| claim.fence) + 1;
        let claim = Claimed { rank, instance, fence };
        state.names.insert(rank, (claim, true));
        state.tell_all(&BoardEvent::Claim { claim, is_alive: true });
        let listing = state.listing();
        state.queues.insert((rank, instance), listing);
        (claim, HubBoard { hub: self.clone(), rank, instance })
    }

    /// Nothing is written or told from here on, or again.
    pub(crate) fn set_away(&self, is_away: bool) {
        let mut state = self.0.lock();
        state.is_away = is_away;
        let listing = if is_away { VecDeque::from([BoardEvent::Unavailable]) } else { state.listing() };
        state.queues.values_mut().for_each(|queue| queue.extend(listing.clone()));
    }
}

/// One rank's board.
pub(crate) struct HubBoard {
    hub: Hub,
    rank: Rank,
    instance: Instance,
}

impl HubBoard {
    fn write(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.hub.0.lock();
        if !state.is_away {
            change(&mut state);
        }
    }
}

impl Board for HubBoard {
    fn put_row(&mut self, row: Vec<u8>) {
        let from = self.rank;
        self.write(|state| {
            state.rows.insert(from, row.clone());
            state.tell_all(&BoardEvent::Row { from, bytes: row });
        });
    }

    fn put_offers(&mut self, offers: Vec<u8>) {
        let from = self.rank;
        self.write(|state| {
            state.offers.insert(from, offers.clone());
            state.tell_all(&BoardEvent::Offers { from, bytes: offers });
        });
    }

    fn put_placement(&mut self, version: u32, placement: Vec<u8>) {
        self.write(|state| {
            state.placements.insert(version, placement.clone());
            state.tell_all(&BoardEvent::Placement { version, bytes: placement });
        });
    }

    fn cas_view(&mut self, expect: u64, view: Vec<u8>) {
        let key = (self.rank, self.instance);
        self.write(|state| {
            let is_done = expect == state.version;
            if is_done {
                (state.version, state.view) = (expect + 1, view.clone());
                state.tell_all(&BoardEvent::View { version: expect + 1, bytes: view });
            }
            let answer = BoardEvent::ViewCas { expect, is_done };
            state.queues.entry(key).or_default().push_back(answer);
        });
    }

    fn poll(&mut self) -> Option<BoardEvent> {
        self.hub.0.lock().queues.get_mut(&(self.rank, self.instance))?.pop_front()
    }
}

impl Drop for HubBoard {
    /// A process that dies says nothing; its lease runs on.
    fn drop(&mut self) {
        self.hub.0.lock().queues.remove(&(self.rank, self.instance));
    }
}
