//! Who serves which expert in which step, as every rank's member table says: what the oracle compares with.
//!
//! A rank switches to a placement with the members of the view that it knows then; who dies later stays in its table
//! until the next switch. So the tables are kept by rank, and come from the ranks' own switches and the store's views.

use std::collections::BTreeMap;

use crate::config::ValidConfig;
use crate::error::ConfigError;
use crate::ids::{Epoch, ExpertIdx, LocalExpertIdx, Rank};
use crate::membership::{RankSet, View};
use crate::placement::Placement;

/// A table of one rank, from one step on.
#[derive(Clone, Copy, Debug)]
struct Entry {
    from_step: u64,
    version: u32,
    alive: RankSet,
}

/// See the module documentation.
pub(super) struct Tables {
    placements: BTreeMap<u32, Placement>,
    /// The members of every epoch.
    epochs: BTreeMap<Epoch, RankSet>,
    /// The placement of every switch, by its first step.
    switches: BTreeMap<u64, u32>,
    by_rank: BTreeMap<Rank, Vec<Entry>>,
}

impl Tables {
    /// Before anybody has switched; `first` is the placement that groups begin with.
    pub(super) fn new(first: Placement) -> Self {
        Self {
            placements: BTreeMap::from([(first.version(), first)]),
            epochs: BTreeMap::new(),
            switches: BTreeMap::new(),
            by_rank: BTreeMap::new(),
        }
    }

    /// Tables that never change: all ranks are members, under the placement that the configuration implies.
    pub(super) fn constant(config: &ValidConfig) -> Result<Self, ConfigError> {
        let alive = RankSet::first(config.num_ranks);
        let mut tables = Self::new(Placement::contiguous(config, 1, &alive)?);
        let entry = Entry { from_step: 0, version: 1, alive };
        tables.by_rank = alive.iter().map(|rank| (rank, vec![entry])).collect();
        Ok(tables)
    }

    /// Another placement that somebody has asked for.
    pub(super) fn add(&mut self, placement: Placement) {
        self.placements.insert(placement.version(), placement);
    }

    /// The newest version that anybody has asked for.
    pub(super) fn newest(&self) -> u32 {
        self.placements.last_key_value().map_or(0, |(version, _)| *version)
    }

    /// Notes what the group has agreed on.
    pub(super) fn note_view(&mut self, view: &View) {
        self.epochs.insert(view.epoch, view.members());
        if let Some(start) = &view.start {
            self.switches.insert(start.from_step, start.plan.placement_version);
        }
    }

    /// Notes that a rank has switched.
    pub(super) fn note_switch(&mut self, rank: Rank, epoch: Epoch, from_step: u64) {
        let (version, alive) = (self.switches.get(&from_step), self.epochs.get(&epoch));
        if let (Some(&version), Some(&alive)) = (version, alive) {
            self.by_rank.entry(rank).or_default().push(Entry { from_step, version, alive });
        }
    }

    fn entry(&self, rank: Rank, step: u64) -> Option<&Entry> {
        self.by_rank.get(&rank)?.iter().rev().find(|entry| entry.from_step <= step)
    }

    /// The placement of `step` with each source's members; none before `rank` has switched for the first time.
    pub(super) fn placed(&self, rank: Rank, step: u64, num_ranks: u32) -> Option<(&Placement, Vec<RankSet>)> {
        let own = self.entry(rank, step)?;
        // CAST: at most 512 ranks.
        let sources = (0..num_ranks as u16).map(Rank);
        let alive = |source| self.entry(source, step).map_or(own.alive, |entry| entry.alive);
        Some((self.placements.get(&own.version)?, sources.map(alive).collect()))
    }

    /// Who would have to serve an expert that nobody in the table serves.
    pub(super) fn any_owner(placement: &Placement, expert: ExpertIdx) -> Option<(Rank, LocalExpertIdx)> {
        placement.owners().get(expert.index())?.first().copied()
    }
}
