//! Carrying planned changes out: a rank comes, one leaves and comes back, experts move. None of them may cost a pick.
//!
//! One change at a time, and only while nobody is missing and no fault that may cost something is under way; faults
//! that may cost nothing strike while it lasts as well.

use super::group::{Birth, Group};
use crate::chaos::draws::Draws;
use crate::chaos::plan::{Change, ChangeKind, Plan};
use crate::chaos::timeline::Happened;
use crate::ids::{ExpertIdx, LocalExpertIdx, Rank};
use crate::membership::RankSet;
use crate::placement::Placement;

/// Longest time that a rank which has left stays away.
const AWAY_NS: u64 = 20_000_000;

/// What the group is being asked for.
#[derive(Clone, Copy, Debug)]
enum Doing {
    /// Another placement; and then somebody leaves, who owns nothing alone in it.
    Placing { version: u32, leaver: Option<Rank> },
    /// A member leaves.
    Leaving(Rank),
    /// Somebody comes; experts move to it afterwards.
    Joining,
}

/// See the module documentation.
pub(super) struct Changer {
    waiting: Vec<Change>,
    doing: Option<Doing>,
    draws: Draws,
}

impl Changer {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut waiting = plan.changes.clone();
        waiting.sort_by_key(|change| core::cmp::Reverse(change.at_step));
        Self { waiting, doing: None, draws: Draws::new(plan.seed, 12) }
    }

    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.doing.is_none()
    }

    /// Whether a change is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.doing.is_some()
    }

    pub(super) fn turn(&mut self, group: &mut Group, now_ns: u64, may_begin: bool) {
        match self.doing {
            None if may_begin => self.begin(group, now_ns),
            None => {}
            Some(Doing::Placing { version, leaver }) => {
                let is_in_use = group.watch.view.placement_version == version;
                match leaver {
                    _ if !is_in_use || !group.is_whole() => {}
                    Some(rank) => self.leave(group, now_ns, rank),
                    None => self.doing = None,
                }
            }
            Some(Doing::Leaving(rank)) => {
                let has_left = group.watch.view.members() == group.expected && group.node(rank).is_none();
                if has_left && group.is_whole() {
                    let at_ns = now_ns + self.draws.below(AWAY_NS);
                    self.come(group, rank, at_ns);
                }
            }
            Some(Doing::Joining) if group.is_whole() => self.place(group, now_ns, None),
            Some(Doing::Joining) => {}
        }
    }

    fn begin(&mut self, group: &mut Group, now_ns: u64) {
        let Some(change) = self.waiting.last().copied().filter(|change| group.step() > change.at_step) else {
            return;
        };
        self.waiting.pop();
        let rank = Rank(change.rank);
        group.watch.report.count_change(change.kind);
        let text = format!("{} {rank}", change.kind.name());
        group.watch.timeline.push(now_ns, Some(rank), Happened::Fault(text));
        match change.kind {
            ChangeKind::Grow => self.come(group, rank, now_ns),
            ChangeKind::Leave => self.place(group, now_ns, Some(rank)),
            ChangeKind::Place => self.place(group, now_ns, None),
        }
    }

    fn come(&mut self, group: &mut Group, rank: Rank, at_ns: u64) {
        group.expected.insert(rank);
        group.births.push(Birth { rank, at_ns, takes_over: false });
        self.doing = Some(Doing::Joining);
    }

    fn leave(&mut self, group: &mut Group, now_ns: u64, rank: Rank) {
        group.expected.remove(rank);
        if let Some(node) = group.node_mut(rank) {
            node.keeper.leave(now_ns);
        }
        self.doing = Some(Doing::Leaving(rank));
    }

    /// Asks for another placement, through any member.
    fn place(&mut self, group: &mut Group, now_ns: u64, leaver: Option<Rank>) {
        let members = group.watch.view.members();
        let version = group.watch.tables.newest() + 1;
        let owners = self.owners(group.ground.config.num_experts, &members, leaver);
        let placement = Placement::new(&group.ground.config, version, owners)
            .expect("every rank has a place for every expert, of the same number");
        let members: Vec<Rank> = members.iter().collect();
        let asks = self.draws.pick(&members);
        group.watch.tables.add(placement.clone());
        if let Some(node) = group.node_mut(asks) {
            node.keeper.propose_placement(now_ns, placement);
        }
        self.doing = Some(Doing::Placing { version, leaver });
    }

    /// Every expert at one or more members, of whom at least one stays.
    fn owners(
        &mut self,
        num_experts: u32,
        members: &RankSet,
        leaver: Option<Rank>,
    ) -> Vec<Vec<(Rank, LocalExpertIdx)>> {
        let stays: Vec<Rank> = members.iter().filter(|rank| Some(*rank) != leaver).collect();
        // CAST: at most 65 535 experts.
        let experts = (0..num_experts as u16).map(ExpertIdx);
        let serve = |expert: ExpertIdx| {
            let sure = self.draws.pick(&stays);
            let also = members.iter().filter(|rank| *rank == sure || self.draws.one_in(3));
            also.map(|rank| (rank, LocalExpertIdx(expert.0))).collect()
        };
        experts.map(serve).collect()
    }
}
