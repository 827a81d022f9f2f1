//! The store of the model: a view, rows, claims with leases.

use super::*;

/// A name and its lease.
#[derive(Clone, Copy, Debug)]
pub(super) struct Name {
    pub(super) claim: Claimed,
    pub(super) expires_ns: u64,
    pub(super) is_alive: bool,
}

/// What the store holds. It is the same before and after an outage.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) is_up: bool,
    pub(super) up_since_ns: u64,
    pub(super) version: u64,
    view: View,
    pub(super) rows: BTreeMap<Rank, Row>,
    pub(super) names: BTreeMap<Rank, Name>,
    last_fence: u64,
    pub(super) placement_version: u32,
    /// Members of every epoch that was ever committed.
    pub(super) epochs: BTreeMap<Epoch, RankSet>,
}

impl Store {
    pub(super) fn new(num_ranks: u32) -> Self {
        Self {
            is_up: true,
            up_since_ns: 0,
            version: 0,
            view: View::empty(num_ranks),
            rows: BTreeMap::new(),
            names: BTreeMap::new(),
            last_fence: 0,
            placement_version: 1,
            epochs: BTreeMap::new(),
        }
    }

    pub(super) fn view(&self) -> &View {
        &self.view
    }

    /// Claims a name, whoever held it.
    pub(super) fn claim(&mut self, rank: Rank, instance: Instance, expires_ns: u64) -> Claimed {
        self.last_fence += 1;
        let claim = Claimed { rank, instance, fence: self.last_fence };
        self.names.insert(rank, Name { claim, expires_ns, is_alive: true });
        claim
    }

    /// Replaces the view, and holds the change against what a group must never do; the view before, unless refused.
    pub(super) fn cas(&mut self, expect: u64, view: View, is_any_change_allowed: bool) -> Option<View> {
        if expect != self.version {
            return None;
        }
        let before = core::mem::replace(&mut self.view, view);
        self.version += 1;
        let after = &self.view;
        assert_eq!(after.serial, before.serial + 1);
        let (old, new) = (before.members(), after.members());
        if after.epoch == before.epoch {
            assert_eq!(old, new, "members change only with the epoch");
        } else {
            assert_eq!(after.epoch, before.epoch.next());
            let is_planned = after.start.as_ref().is_some_and(|start| start.epoch == after.epoch);
            let is_dissolved = new.is_empty() && after.start.is_none();
            let is_removal = new.is_subset(&old) && is_quorum(&old, &new);
            assert!(is_planned || is_dissolved || is_removal || is_any_change_allowed, "{old} -> {new}");
            let known = self.epochs.insert(after.epoch, new);
            assert_eq!(known, None, "an epoch has one set of members");
        }
        Some(before)
    }
}
