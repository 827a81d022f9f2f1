//! Carrying faults out: each waits for its step and its moment, strikes, and ends what it began.
//!
//! Faults that may cost a rank its place come one after the other: the next one waits until the group is whole again,
//! since a group that loses its quorum stops, as it should. Those that may cost nothing come whenever their step does.

use ibex_abi::cqe::Syndrome;
use ibex_abi::prm::Status;
use ibex_hca::Nanos;
use ibex_hca::emulated::switch::{Fault as PacketFault, FaultPlan, FaultRule};
use ibex_hca::emulated::{PathState, PortId};
use ibex_hca::fault::{Effect, Fault as CommandFault};

use super::group::{Birth, Group};
use super::node::Motion;
use crate::chaos::app::Stage;
use crate::chaos::draws::Draws;
use crate::chaos::fault::{Fault, FaultKind, Licence};
use crate::chaos::plan::Plan;
use crate::chaos::timeline::Happened;
use crate::error::Error;
use crate::ids::Rank;
use crate::membership::SlotState;
use crate::recovery::Route;

/// How long a fault waits for its moment before it strikes at any.
const MOMENT_NS_MAX: u64 = 60_000_000;
/// Longest way of a replacement that is quick.
const QUICK_NS: u64 = 10_000_000;
/// How often a flapping rank dies.
const FLAPS: u32 = 4;

/// Something that was begun and must end.
#[derive(Clone, Copy, Debug)]
enum Lasting {
    Freeze { node: u32 },
    Slow { node: u32 },
    Path { src: Rank, dst: Rank, ports: (PortId, PortId) },
    Packets,
    Store,
    StorePath { board: u64 },
}

impl Lasting {
    fn is_path(&self, from: Rank, to: Rank) -> bool {
        matches!(self, Self::Path { src, dst, .. } if (*src, *dst) == (from, to))
    }
}

/// What a fault waits for between its parts.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// The moment of its first part, after so many turns more.
    Moment { since_ns: u64, turns: u64 },
    /// A second death, once this instant has come and the group can bear it.
    SecondDeath { not_before_ns: u64 },
    /// A death while the victim's slot is being filled again.
    InReconnect { seen_ns: Option<u64> },
    /// A death while gates are closed.
    InCommit { seen_ns: Option<u64> },
    /// Another death of the same rank once it serves again.
    Flap { left: u32, not_before_ns: u64 },
    /// A stopped process wakes up once it was evicted, and after this time.
    Wake { node: u32, evicted_ns: Option<u64> },
}

/// See the module documentation.
pub(super) struct Injector {
    waiting: Vec<Fault>,
    /// What is being carried out.
    present: Vec<(Fault, Rank, Next)>,
    lasting: Vec<(u64, FaultKind, Lasting)>,
    draws: Draws,
}

impl Injector {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut waiting = plan.faults.clone();
        waiting.sort_by_key(|fault| core::cmp::Reverse(fault.at_step));
        Self { waiting, present: Vec::new(), lasting: Vec::new(), draws: Draws::new(plan.seed, 7) }
    }

    /// Whether nothing strikes now that may cost anybody anything, and nothing lasts.
    pub(super) fn is_at_rest(&self) -> bool {
        self.present.is_empty() && self.lasting.is_empty()
    }

    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.present.is_empty() && self.lasting.is_empty()
    }

    /// When something ends or is to be looked at again.
    pub(super) fn next_due(&self) -> Option<u64> {
        let present = self.present.iter().filter_map(|(_, _, next)| match next {
            Next::SecondDeath { not_before_ns } | Next::Flap { not_before_ns, .. } => Some(*not_before_ns),
            Next::InReconnect { seen_ns } | Next::InCommit { seen_ns } => *seen_ns,
            Next::Wake { evicted_ns, .. } => *evicted_ns,
            Next::Moment { .. } => None,
        });
        self.lasting.iter().map(|(until, ..)| *until).chain(present).min()
    }

    /// One look; `is_changing`: the group is being changed on purpose, which only harmless faults may meet.
    pub(super) fn turn(&mut self, group: &mut Group, now_ns: u64, is_changing: bool) -> Result<(), Error> {
        self.end_lasting(group, now_ns)?;
        self.begin(group, now_ns, is_changing);
        for (fault, victim, next) in core::mem::take(&mut self.present) {
            if let Some((victim, next)) = self.go_on(group, now_ns, &fault, victim, next)? {
                self.present.push((fault, victim, next));
            }
        }
        Ok(())
    }

    /// Takes the next fault up if its step has come and the group can bear it.
    fn begin(&mut self, group: &Group, now_ns: u64, is_changing: bool) {
        let Some(fault) = self.waiting.last().copied().filter(|fault| group.step() > fault.at_step) else {
            return;
        };
        let harmless = fault.kind.licence() == Licence::Nothing;
        let is_free = self.present.is_empty() && group.watch.ledger.is_whole() && group.is_whole();
        // Times of one kind must not overlap: the first to end would end both.
        let is_alone = !self.lasting.iter().any(|(_, kind, _)| *kind == fault.kind) && self.lasting.len() < 2;
        let may = match harmless {
            _ if group.is_reckless => true,
            true => is_alone && (is_changing || group.is_whole()),
            false => is_free && !is_changing && self.lasting.is_empty(),
        };
        if !may {
            return;
        }
        self.waiting.pop();
        let turns = self.draws.below(64);
        self.present.push((fault, Rank(fault.rank), Next::Moment { since_ns: now_ns, turns }));
    }

    fn go_on(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
        next: Next,
    ) -> Result<Option<(Rank, Next)>, Error> {
        match next {
            Next::Moment { since_ns, turns } => {
                let victim = mortal(group, victim, fault.kind);
                let waited = now_ns.saturating_sub(since_ns) > MOMENT_NS_MAX;
                if !waited && !is_moment(group, victim, fault.kind) {
                    return Ok(Some((victim, next)));
                }
                if turns > 0 && !waited {
                    return Ok(Some((victim, Next::Moment { since_ns, turns: turns - 1 })));
                }
                self.strike(group, now_ns, fault, victim)
            }
            Next::SecondDeath { not_before_ns } if now_ns >= not_before_ns => {
                let second = mortal(group, Rank(fault.other), fault.kind);
                if second == victim || !can_lose(group, second) {
                    return Ok(Some((victim, Next::SecondDeath { not_before_ns: now_ns + 500_000 })));
                }
                self.kill(group, now_ns, fault, second)?;
                Ok(None)
            }
            Next::InReconnect { seen_ns } => self.in_reconnect(group, now_ns, fault, victim, seen_ns),
            Next::InCommit { seen_ns } => self.in_commit(group, now_ns, fault, victim, seen_ns),
            Next::Flap { left, not_before_ns } if now_ns >= not_before_ns => {
                if !group.is_serving(victim) || !can_lose(group, victim) {
                    return Ok(Some((victim, Next::Flap { left, not_before_ns: now_ns + 500_000 })));
                }
                self.kill(group, now_ns, fault, victim)?;
                let next = Next::Flap { left: left - 1, not_before_ns: now_ns + 1 };
                Ok((left > 1).then_some((victim, next)))
            }
            Next::Wake { node, evicted_ns } => self.wake(group, now_ns, victim, node, evicted_ns),
            later => Ok(Some((victim, later))),
        }
    }

    /// The first part of a fault.
    fn strike(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
    ) -> Result<Option<(Rank, Next)>, Error> {
        group.watch.report.count_fault(fault.kind);
        let text = format!("{} {victim}", fault.kind);
        group.watch.timeline.push(now_ns, Some(victim), Happened::Fault(text));
        let until = now_ns + fault.lasts_us * 1_000;
        match fault.kind {
            FaultKind::Pause => self.freeze(group, now_ns, fault, victim)?,
            FaultKind::Slow => {
                if let Some(node) = group.node_mut(victim) {
                    node.motion = Motion::Slow { again_ns: now_ns, turns: 1 };
                    self.lasting.push((until, fault.kind, Lasting::Slow { node: node.id }));
                }
            }
            FaultKind::Zombie => return self.stop_for_good(group, now_ns, fault, victim).map(Some),
            FaultKind::OneWay => self.cut(group, fault, until, victim, far_end(fault, victim)),
            FaultKind::TwoWay => {
                self.cut(group, fault, until, victim, far_end(fault, victim));
                self.cut(group, fault, until, far_end(fault, victim), victim);
            }
            FaultKind::Drop
            | FaultKind::Delay
            | FaultKind::Duplicate
            | FaultKind::Reorder
            | FaultKind::Corrupt => {
                self.disturb(group, fault, now_ns)?;
                self.lasting.push((until, fault.kind, Lasting::Packets));
            }
            FaultKind::QpError => fail_queue_pair(group, now_ns, fault, victim),
            FaultKind::StoreOutage => self.store_outage(group, now_ns, fault, victim),
            FaultKind::StoreAndRank => {
                group.ground.store.set_up(false);
                self.lasting.push((until, fault.kind, Lasting::Store));
                self.kill(group, now_ns, fault, victim)?;
            }
            FaultKind::CommandError => {
                refuse_commands(group, fault, victim);
                self.kill(group, now_ns, fault, victim)?;
            }
            _ => return self.strike_dead(group, now_ns, fault, victim),
        }
        Ok(None)
    }

    /// Kinds that begin with a death.
    fn strike_dead(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
    ) -> Result<Option<(Rank, Next)>, Error> {
        self.kill(group, now_ns, fault, victim)?;
        Ok(match fault.kind {
            FaultKind::TwoDeaths => {
                let not_before_ns = now_ns + self.draws.pick(&[0, 1_000, 100_000, 2_000_000, 30_000_000]);
                Some((victim, Next::SecondDeath { not_before_ns }))
            }
            FaultKind::KillInReconnect => Some((victim, Next::InReconnect { seen_ns: None })),
            FaultKind::KillInCommit => Some((victim, Next::InCommit { seen_ns: None })),
            FaultKind::Flapping => Some((victim, Next::Flap { left: FLAPS - 1, not_before_ns: now_ns + 1 })),
            _ => None,
        })
    }

    /// Ends the newest process of `victim`; another one is on its way.
    fn kill(&mut self, group: &mut Group, now_ns: u64, fault: &Fault, victim: Rank) -> Result<(), Error> {
        let Some(index) = group.nodes.iter().rposition(|node| node.rank == victim) else { return Ok(()) };
        group.watch.died(now_ns, victim);
        group.end(now_ns, index)?;
        let is_quick = matches!(fault.kind, FaultKind::QuickRejoin | FaultKind::Flapping);
        let wait = if is_quick { self.draws.between(1_000, QUICK_NS) } else { fault.lasts_us * 1_000 };
        let takes_over = is_quick || self.draws.one_in(2);
        if !group.births.iter().any(|birth| birth.rank == victim) {
            group.births.push(Birth { rank: victim, at_ns: now_ns + wait, takes_over });
        }
        Ok(())
    }

    /// Stops a process for at most half of what its peers bear.
    fn freeze(&mut self, group: &mut Group, now_ns: u64, fault: &Fault, victim: Rank) -> Result<(), Error> {
        let half_ns = u64::from(group.ground.config.detect_ms) * 500_000;
        let (draws, agents, store) = (&mut self.draws, &group.agents.clone(), group.ground.store.clone());
        let Some(node) = group.node_mut(victim) else { return Ok(()) };
        node.gpu.set_frozen(true)?;
        node.motion = Motion::Frozen;
        // The NIC of a stopped process may go on.
        agents.set_running(node.id, false, draws.one_in(2));
        store.set_frozen(node.board, true);
        let until = now_ns + draws.between(1_000, half_ns);
        self.lasting.push((until, fault.kind, Lasting::Freeze { node: node.id }));
        let rank = node.rank;
        group.watch.timeline.push(now_ns, Some(rank), Happened::Frozen(true));
        Ok(())
    }

    /// Stops a process until it was evicted.
    fn stop_for_good(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
    ) -> Result<(Rank, Next), Error> {
        self.freeze(group, now_ns, fault, victim)?;
        let frozen = self.lasting.pop();
        group.watch.died(now_ns, victim);
        if let Some(node) = group.node_mut(victim) {
            node.is_zombie = true;
        }
        let node = match frozen {
            Some((_, _, Lasting::Freeze { node })) => node,
            _ => u32::MAX,
        };
        // Whom the group cannot evict wakes up by itself.
        let woken_ns = (!can_lose(group, victim)).then(|| now_ns + fault.lasts_us * 1_000);
        if woken_ns.is_some() {
            // Its peers give it up, and those who are more when it wakes up go on without the others.
            let others = group.expected.iter().filter(|rank| *rank != victim).collect::<Vec<_>>();
            others.into_iter().for_each(|other| group.watch.ledger.touch_pair(victim, other, false));
        }
        Ok((victim, Next::Wake { node, evicted_ns: woken_ns }))
    }

    /// A stopped process goes on after it was evicted: before, while or after another one takes its place.
    fn wake(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        victim: Rank,
        node: u32,
        evicted_ns: Option<u64>,
    ) -> Result<Option<(Rank, Next)>, Error> {
        let Some(zombie) = group.nodes.iter().find(|other| other.id == node) else { return Ok(None) };
        if let Some(wake_ns) = evicted_ns {
            if now_ns >= wake_ns {
                if group.watch.view.holder(victim) == Some(zombie.instance) {
                    group.watch.ledger.survived(victim);
                }
                thaw(group, now_ns, node)?;
                return Ok(None);
            }
            return Ok(Some((victim, Next::Wake { node, evicted_ns })));
        }
        if group.watch.view.holder(victim) == Some(zombie.instance) {
            return Ok(Some((victim, Next::Wake { node, evicted_ns })));
        }
        let wake_ns = now_ns + self.draws.below(60_000_000);
        let at_ns = now_ns + self.draws.below(30_000_000);
        group.births.push(Birth { rank: victim, at_ns, takes_over: true });
        Ok(Some((victim, Next::Wake { node, evicted_ns: Some(wake_ns) })))
    }

    fn in_reconnect(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
        seen_ns: Option<u64>,
    ) -> Result<Option<(Rank, Next)>, Error> {
        let is_joining = group.watch.view.slot(victim).state == SlotState::Joining;
        match seen_ns {
            None if is_joining => {
                let strike_ns = now_ns + self.draws.below(6_000_000);
                Ok(Some((victim, Next::InReconnect { seen_ns: Some(strike_ns) })))
            }
            Some(strike_ns) if now_ns >= strike_ns => self.second_of_two(group, now_ns, fault, victim),
            // Too late: nobody saw it.
            None if group.is_serving(victim) => self.second_of_two(group, now_ns, fault, victim),
            _ => Ok(Some((victim, Next::InReconnect { seen_ns }))),
        }
    }

    fn in_commit(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
        seen_ns: Option<u64>,
    ) -> Result<Option<(Rank, Next)>, Error> {
        match seen_ns {
            None if group.watch.view.plan.is_some() => {
                let strike_ns = now_ns + self.draws.below(5_000_000);
                Ok(Some((victim, Next::InCommit { seen_ns: Some(strike_ns) })))
            }
            Some(strike_ns) if now_ns >= strike_ns => self.second_of_two(group, now_ns, fault, victim),
            None if group.is_serving(victim) => self.second_of_two(group, now_ns, fault, victim),
            _ => Ok(Some((victim, Next::InCommit { seen_ns }))),
        }
    }

    /// The replacement dies, or somebody else whom the group can lose.
    fn second_of_two(
        &mut self,
        group: &mut Group,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
    ) -> Result<Option<(Rank, Next)>, Error> {
        let other = Rank(fault.other);
        let second =
            if fault.draw & 1 == 0 && other != victim && can_lose(group, other) { other } else { victim };
        if can_lose(group, second) {
            self.kill(group, now_ns, fault, second)?;
        }
        Ok(None)
    }

    /// The store goes away for everybody, or for one rank.
    fn store_outage(&mut self, group: &Group, now_ns: u64, fault: &Fault, victim: Rank) {
        let mut until = now_ns + fault.lasts_us * 1_000;
        let lasting = match group.node(victim).filter(|_| fault.draw.is_multiple_of(3)) {
            Some(node) => {
                // While the store itself is up, a lease that runs out counts.
                until = until.min(now_ns + u64::from(group.ground.config.lease_ttl_ms()) * 500_000);
                group.ground.store.set_cut(node.board, true);
                Lasting::StorePath { board: node.board }
            }
            None => {
                group.ground.store.set_up(false);
                Lasting::Store
            }
        };
        self.lasting.push((until, fault.kind, lasting));
    }

    fn cut(&mut self, group: &mut Group, fault: &Fault, until: u64, src: Rank, dst: Rank) {
        let port = |rank| group.node(rank).map(|node| node.device.port_id());
        let (Some(from), Some(to)) = (port(src), port(dst)) else { return };
        group.ground.fabric.set_path(from, to, PathState::Cut);
        group.watch.ledger.touch_pair(src, dst, true);
        self.lasting.push((until, fault.kind, Lasting::Path { src, dst, ports: (from, to) }));
    }

    /// Packets between everybody are treated badly for a while.
    fn disturb(&mut self, group: &Group, fault: &Fault, now_ns: u64) -> Result<(), Error> {
        let ppm = fault.ppm;
        let fault = match fault.kind {
            FaultKind::Drop => PacketFault::Drop { ppm },
            FaultKind::Delay => PacketFault::Delay { ppm: 10 * ppm, min_us: 1, max_us: 2_000 },
            FaultKind::Duplicate => PacketFault::Duplicate { ppm: 10 * ppm },
            FaultKind::Reorder => PacketFault::Reorder { ppm: 10 * ppm, overtake_max: 8, hold_us: 500 },
            _ => PacketFault::Corrupt { ppm },
        };
        let rules = vec![FaultRule::always(fault)];
        group.ground.fabric.set_fault_plan(FaultPlan { seed: now_ns, rules })?;
        Ok(())
    }

    fn end_lasting(&mut self, group: &mut Group, now_ns: u64) -> Result<(), Error> {
        let (over, rest) =
            core::mem::take(&mut self.lasting).into_iter().partition(|(until, ..)| now_ns >= *until);
        self.lasting = rest;
        let over: Vec<(u64, FaultKind, Lasting)> = over;
        for (_, kind, lasting) in over {
            group.watch.timeline.push(now_ns, None, Happened::Ended(kind.to_string()));
            match lasting {
                Lasting::Freeze { node } => thaw(group, now_ns, node)?,
                Lasting::Slow { node } => {
                    if let Some(node) = group.nodes.iter_mut().find(|other| other.id == node) {
                        node.motion = Motion::Runs;
                        node.gpu.set_frozen(false)?;
                    }
                }
                Lasting::Path { src, dst, ports } => {
                    group.ground.fabric.set_path(ports.0, ports.1, PathState::Up);
                    let is_cut = self.lasting.iter().any(|(_, _, other)| other.is_path(dst, src));
                    if !is_cut {
                        group.watch.ledger.pair_ended(src, dst);
                        group.heal_if_unharmed(now_ns, src, dst);
                    }
                }
                Lasting::Packets => group.ground.fabric.set_fault_plan(FaultPlan::default())?,
                Lasting::Store => group.ground.store.set_up(true),
                Lasting::StorePath { board } => group.ground.store.set_cut(board, false),
            }
        }
        Ok(())
    }
}

/// The end of a path that is not `victim`.
fn far_end(fault: &Fault, victim: Rank) -> Rank {
    if Rank(fault.other) == victim { Rank(fault.rank) } else { Rank(fault.other) }
}

/// Lets a stopped process go on.
fn thaw(group: &mut Group, now_ns: u64, node: u32) -> Result<(), Error> {
    let (agents, store) = (group.agents.clone(), group.ground.store.clone());
    let Some(node) = group.nodes.iter_mut().find(|other| other.id == node) else { return Ok(()) };
    node.motion = Motion::Runs;
    node.gpu.set_frozen(false)?;
    agents.set_running(node.id, true, true);
    store.set_frozen(node.board, false);
    let rank = node.rank;
    group.watch.timeline.push(now_ns, Some(rank), Happened::Frozen(false));
    Ok(())
}

/// Whether the group keeps its quorum without a rank: more than half, or half with the lowest.
fn can_lose(group: &Group, rank: Rank) -> bool {
    let members = group.watch.view.members();
    if !members.contains(rank) {
        return true;
    }
    let alive = members.iter().filter(|other| *other != rank && group.is_serving(*other));
    let (alive, lowest): (Vec<Rank>, Option<Rank>) = (alive.collect(), members.lowest());
    let twice = 2 * alive.len() as u32;
    let count = members.len() as u32;
    twice > count || (twice == count && lowest.is_some_and(|lowest| alive.contains(&lowest)))
}

/// The victim, or the next rank that may end; for kinds that end nobody, the victim itself.
fn mortal(group: &Group, victim: Rank, kind: FaultKind) -> Rank {
    if kind.licence() != Licence::Rank || group.is_reckless {
        return victim;
    }
    let count = group.ground.config.num_ranks;
    // CAST: at most 512 ranks.
    let from = |nth: u32| Rank(((u32::from(victim.0) + nth) % count) as u16);
    (0..count).map(from).find(|rank| group.is_serving(*rank) && can_lose(group, *rank)).unwrap_or(victim)
}

/// Whether this is a moment as the kind is named after.
fn is_moment(group: &Group, victim: Rank, kind: FaultKind) -> bool {
    let may_lose = group.is_reckless || can_lose(group, victim);
    if kind.licence() == Licence::Rank && !(group.is_serving(victim) && may_lose) {
        return false;
    }
    let Some(node) = group.node(victim) else { return false };
    match kind {
        FaultKind::KillInDispatch => matches!(node.app.stage(), Stage::Dispatching | Stage::Replaying),
        FaultKind::KillBetween => node.app.stage() == Stage::Between,
        FaultKind::KillInCombine => node.app.stage() == Stage::Combining,
        FaultKind::KillInReplay => node.app.stage() == Stage::Replaying,
        FaultKind::PartialMessage => node.device.is_mid_message(),
        _ => true,
    }
}

/// One queue pair of a rank goes to ERR.
fn fail_queue_pair(group: &mut Group, now_ns: u64, fault: &Fault, victim: Rank) {
    let far = far_end(fault, victim);
    let Some(node) = group.node(victim) else { return };
    let qpns = node.session.queue_pairs(far);
    if qpns.is_empty() {
        return;
    }
    // CAST: an index into a short list.
    let qpn = qpns[(fault.draw % qpns.len() as u64) as usize];
    node.device.set_qp_error(qpn, Syndrome(fault.syndrome), Nanos(now_ns));
    // Where both store into each other's memory nobody feels it.
    let posts = |from, to| group.node(from).is_some_and(|node| node.session.route(to).route == Route::Ibgda);
    if posts(victim, far) || posts(far, victim) {
        group.watch.ledger.touch_pair(victim, far, false);
    }
}

/// Commands of a survivor's device fail while its peer is replaced.
fn refuse_commands(group: &Group, fault: &Fault, victim: Rank) {
    let mut draws = Draws::new(fault.draw, 8);
    for node in group.nodes.iter().filter(|node| node.rank != victim) {
        // CAST: below the number of commands of one replacement.
        let skip = draws.below(24) as u32;
        node.hca.inject(CommandFault { op: None, skip, effect: Effect::Refuse(Status::IntErr) });
    }
}
