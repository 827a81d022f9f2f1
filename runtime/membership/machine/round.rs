//! Suspicions, and the rounds in which members answer them.
//!
//! Within an epoch rounds count from 1. A new suspicion begins the next round; every member answers it with its row. A
//! round is closed when everybody has answered, when `detect_ns` has passed with the store up, or when those who are
//! silent are suspected by all who are not. Rows that come later still count, until the view has changed.

use std::collections::BTreeMap;

use super::{Membership, Standing, Stop, StoreState, Suspicion};
use crate::error::Evidence;
use crate::ids::{Epoch, Rank};
use crate::membership::view::{Instance, SlotState};
use crate::membership::{MembershipGuard, RankSet, is_quorum, propose};

/// The round of suspicions that is open, if any.
#[derive(Debug, Default)]
pub(super) struct Round {
    epoch: Epoch,
    /// 0 before the first of the epoch.
    number: u32,
    /// How long it has been waited for answers, and when that was last counted.
    waited_ns: u64,
    counted_at: u64,
    /// Since when the rows allow no proposal that this rank could follow.
    unresolved_since: Option<u64>,
    /// What peers' signs of life say.
    heard: BTreeMap<Rank, Heard>,
}

/// Suspicions of a peer that came by its sign of life.
#[derive(Debug)]
struct Heard {
    suspects: RankSet,
    since: u64,
    is_asked: bool,
}

impl Round {
    pub(super) fn number(&self) -> u32 {
        self.number
    }

    /// Whoever has not answered yet could not: its time starts now.
    pub(super) fn restart(&mut self, now: u64) {
        (self.waited_ns, self.counted_at) = (0, now);
        self.unresolved_since = None;
    }

    fn begin(&mut self, number: u32, now: u64) {
        self.number = number;
        (self.waited_ns, self.counted_at) = (0, now);
    }

    /// Time counts only in steps of at most an eighth of `detect_ns`: a rank that was itself stopped must not blame
    /// its peers for it, whose answers it has yet to read.
    fn count_time(&mut self, now: u64, detect_ns: u64) {
        let step = now.saturating_sub(self.counted_at).min(detect_ns / 8 + 1);
        self.waited_ns += step;
        self.counted_at = now;
    }

    /// Whether that was news.
    pub(super) fn hear(&mut self, now: u64, peer: Rank, suspects: RankSet) -> bool {
        let known = self.heard.get(&peer).map_or(RankSet::EMPTY, |heard| heard.suspects);
        if suspects == known {
            return false;
        }
        if suspects.is_empty() {
            self.heard.remove(&peer);
        } else {
            self.heard.insert(peer, Heard { suspects, since: now, is_asked: false });
        }
        true
    }
}

impl Membership {
    /// Notes evidence against an incarnation; whether it is news about the holder of the rank.
    pub(super) fn suspect(&mut self, peer: Rank, instance: Instance, evidence: Evidence) -> bool {
        let is_holder = self.view.holder(peer) == Some(instance);
        let is_known = self.suspects.get(&peer).is_some_and(|known| known.of == instance);
        if peer == self.me || !is_holder || is_known || self.stopped.is_some() {
            return false;
        }
        self.suspects.insert(peer, Suspicion { of: instance, evidence, since: self.now });
        let is_member = self.view.slot(peer).state == SlotState::Member;
        if is_member && self.standing == Standing::Member && self.round.epoch == self.view.epoch {
            self.round.begin(self.round.number + 1, self.now);
        }
        true
    }

    /// Forgets suspicions of those who are gone, and takes up what the store says of those who are not.
    pub(super) fn settle_suspects(&mut self) {
        let (view, now, detect_ns) = (&self.view, self.now, self.config.detect_ns);
        let is_sticky = self.has(MembershipGuard::StickySuspicion);
        self.suspects.retain(|peer, suspicion| {
            let is_fresh = is_sticky || now < suspicion.since + detect_ns / 2;
            view.holder(*peer) == Some(suspicion.of) && is_fresh
        });
        for peer in view.members().iter() {
            let slot = self.view.slot(peer);
            let Some(claim) = self.claims.get(&peer).copied() else { continue };
            if claim.fence > slot.fence {
                self.suspect(peer, slot.instance, Evidence::Superseded);
            } else if claim.fence == slot.fence && !claim.is_alive && self.can_judge_leases() {
                self.suspect(peer, slot.instance, Evidence::Lease);
            }
        }
    }

    /// A lease that ran out says something only if its owner could have renewed it all along.
    pub(super) fn can_judge_leases(&self) -> bool {
        match self.store {
            StoreState::Up { since, .. } => self.is_due(since.saturating_add(self.config.lease_ttl_ns)),
            StoreState::Away { .. } => false,
        }
    }

    /// Follows the rounds of this epoch; what they propose becomes a duty.
    pub(super) fn settle_round(&mut self) {
        self.duties.eviction = None;
        if self.stopped.is_some() || self.standing != Standing::Member {
            return;
        }
        self.enter_epoch();
        self.learn_rounds();
        self.ask_for_heard();
        if self.round.number == 0 || !self.is_store_up() {
            return;
        }
        self.round.count_time(self.now, self.config.detect_ns);
        let members = self.view.members();
        let answers = self.answers(members);
        if !self.is_round_over(members, &answers) {
            return;
        }
        let proposal = propose(&members, &answers);
        if proposal == members {
            self.round.unresolved_since = None;
            return;
        }
        let is_valid = is_quorum(&members, &proposal) || !self.has(MembershipGuard::Quorum);
        if is_valid && proposal.contains(self.me) {
            self.round.unresolved_since = None;
            self.duties.eviction = Some(proposal);
            return;
        }
        let since = *self.round.unresolved_since.get_or_insert(self.now);
        if self.is_due(since.saturating_add(self.config.store_grace_ns)) {
            // CAST: at most NUM_RANKS_MAX.
            let (members, reachable) = (members.len() as u32, proposal.len() as u32);
            self.stop(Stop::NoQuorum { epoch: self.view.epoch, members, reachable });
        }
    }

    /// Rounds start anew with each epoch; what is suspected still begins the first one.
    fn enter_epoch(&mut self) {
        if self.round.epoch == self.view.epoch {
            return;
        }
        self.round = Round { epoch: self.view.epoch, ..Round::default() };
        let members = self.view.members();
        if !self.suspects().intersection(&members).is_empty() {
            self.round.begin(1, self.now);
        }
    }

    /// Somebody has begun a later round: answer it.
    fn learn_rounds(&mut self) {
        let others = self.view.members().iter().filter_map(|rank| self.row_of(rank));
        let newest = others.filter(|row| row.epoch == self.view.epoch).map(|row| row.round).max();
        if let Some(newest) = newest.filter(|newest| *newest > self.round.number) {
            self.round.begin(newest, self.now);
        }
    }

    /// A member that suspects somebody and does not say so may be cut off from the store: everybody is asked, once,
    /// and who does not answer is gone.
    fn ask_for_heard(&mut self) {
        let mut is_anybody_to_ask = false;
        let members = self.view.members();
        for peer in members.iter() {
            let Some(heard) = self.round.heard.get(&peer).filter(|heard| !heard.is_asked) else { continue };
            let (suspects, since) = (heard.suspects.intersection(&members), heard.since);
            let said = self.row_of(peer).filter(|row| row.epoch == self.view.epoch);
            let says_so = said.is_some_and(|row| suspects.is_subset(&row.suspects));
            if suspects.is_empty() || says_so || !self.is_due(since.saturating_add(self.config.detect_ns)) {
                continue;
            }
            if let Some(heard) = self.round.heard.get_mut(&peer) {
                heard.is_asked = true;
            }
            is_anybody_to_ask = true;
        }
        if is_anybody_to_ask {
            self.round.begin(self.round.number + 1, self.now);
        }
    }

    /// Who has answered the open round, and whom they suspect.
    fn answers(&self, members: RankSet) -> BTreeMap<Rank, RankSet> {
        let rows = members.iter().filter_map(|rank| Some((rank, self.row_of(rank)?)));
        let is_answer = |epoch: Epoch, round: u32| epoch == self.view.epoch && round >= self.round.number;
        rows.filter(|(_, row)| is_answer(row.epoch, row.round))
            .map(|(rank, row)| (rank, row.suspects))
            .collect()
    }

    fn is_round_over(&self, members: RankSet, answers: &BTreeMap<Rank, RankSet>) -> bool {
        let is_lost_to_all = |rank: Rank| answers.values().all(|suspects| suspects.contains(rank));
        let mut silent = members.iter().filter(|rank| !answers.contains_key(rank));
        if silent.all(is_lost_to_all) {
            return true;
        }
        let detect_ns = self.config.detect_ns;
        let left_ns = detect_ns.saturating_sub(self.round.waited_ns);
        self.is_due(self.now + left_ns.min(detect_ns / 8 + 1)) || left_ns == 0
    }
}
