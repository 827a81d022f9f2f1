//! Carrying faults out on processes: signals, orders, and the end of the store.
//!
//! As in simulation, each waits for its step and its moment, strikes, and ends what it began. Faults that may cost a
//! rank its place come one after the other: the next one waits until the group is whole again.

use core::fmt;

use ibex::chaos::draws::Draws;
use ibex::chaos::fault::Licence;
use ibex::chaos::plan::Plan;
use ibex::chaos::procs::{Between, Moment, Order};
use ibex::chaos::timeline::Happened;
use ibex::chaos::{Fault, FaultKind};
use ibex::ids::Rank;
use ibex::membership::SlotState;
use ibex_hca::emulated::switch::{Fault as PacketFault, FaultPlan, FaultRule};
use rustix::process::Signal;

use super::supervisor::{Birth, Supervisor};
use crate::cli::launch::LaunchError;

/// What `detect_ms` is where the lengths of faults are drawn: they stretch with it, up to one and a half times of it.
const DETECT_MS_OF_PLANS: u64 = 40;
/// One replacement in so many has to wait until the lease of its predecessor has run out.
const WAITS_FOR_LEASE: u64 = 8;
/// How long a rank may take to reach the moment at which it is to end.
const MOMENT_NS_MAX: u64 = 20_000_000_000;
/// Longest way of a replacement that is quick.
const QUICK_NS: u64 = 10_000_000;
/// How often a flapping rank dies.
const FLAPS: u32 = 3;
/// A slow rank runs for so long, then stands still for so long: a tenth of its speed.
const SLOW_NS: (u64, u64) = (2_000_000, 18_000_000);
/// Pause before something that the group cannot bear yet is tried again.
const AGAIN_NS: u64 = 5_000_000;

/// Something that was begun and must end.
#[derive(Clone, Copy, Debug)]
enum Lasting {
    Freeze { process: u64 },
    Slow { process: u64, turn_ns: u64 },
    Path { src: Rank, dst: Rank, process: u64 },
    Packets,
    Store,
}

impl Lasting {
    fn is_path(&self, from: Rank, to: Rank) -> bool {
        matches!(self, Self::Path { src, dst, .. } if (*src, *dst) == (from, to))
    }
}

/// What a fault waits for between its parts.
#[derive(Clone, Copy, Debug)]
enum Next {
    /// The group can bear it.
    Start,
    /// The victim ends at its moment.
    Death {
        process: u64,
        told_ns: u64,
    },
    SecondDeath {
        not_before_ns: u64,
    },
    InReconnect {
        strike_ns: Option<u64>,
    },
    InCommit {
        strike_ns: Option<u64>,
    },
    Flap {
        left: u32,
        not_before_ns: u64,
    },
    /// A stopped process wakes up once it was evicted.
    Wake {
        process: u64,
        wake_ns: Option<u64>,
    },
}

/// See the module documentation.
pub(super) struct Injector {
    waiting: Vec<Fault>,
    present: Vec<(Fault, Rank, Next)>,
    lasting: Vec<(u64, FaultKind, Lasting)>,
    draws: Draws,
}

/// Why a kind cannot be carried out on processes; none if it can.
pub(super) fn why_not(kind: FaultKind, between: Between, has_own_store: bool) -> Option<&'static str> {
    match kind {
        FaultKind::PartialMessage if between == Between::Shm => Some(
            "peers pull a message from its sender's memory, which outlives it until they have: --fabric udp",
        ),
        kind if kind.needs_packets() && between == Between::Shm => Some("it needs packets: --fabric udp"),
        FaultKind::StoreOutage | FaultKind::StoreAndRank if !has_own_store => {
            Some("a store that was given with --store is not ours to kill")
        }
        _ => None,
    }
}

impl Injector {
    pub(super) fn new(plan: &Plan) -> Self {
        let mut waiting = plan.faults.clone();
        waiting.sort_by_key(|fault| core::cmp::Reverse(fault.at_step));
        Self { waiting, present: Vec::new(), lasting: Vec::new(), draws: Draws::new(plan.seed, 12) }
    }

    pub(super) fn is_done(&self) -> bool {
        self.waiting.is_empty() && self.present.is_empty() && self.lasting.is_empty()
    }

    pub(super) fn turn(&mut self, group: &mut Supervisor<'_>, now_ns: u64) -> Result<(), LaunchError> {
        self.end_lasting(group, now_ns)?;
        self.throttle(group, now_ns);
        self.begin(group, now_ns);
        for (fault, victim, next) in core::mem::take(&mut self.present) {
            if let Some((victim, next)) = self.go_on(group, now_ns, &fault, victim, next)? {
                self.present.push((fault, victim, next));
            }
        }
        Ok(())
    }

    /// Takes the next fault up if its step has come and the group can bear it.
    fn begin(&mut self, group: &mut Supervisor<'_>, now_ns: u64) {
        let Some(fault) = self.waiting.last().copied() else { return };
        if group.observer.step() < fault.at_step || !group.is_whole() {
            return;
        }
        let harmless = fault.kind.licence() == Licence::Nothing;
        let is_alone = !self.lasting.iter().any(|(_, kind, _)| *kind == fault.kind) && self.lasting.len() < 2;
        let is_free = self.present.is_empty() && self.lasting.is_empty() && group.observer.ledger.is_whole();
        if is_free {
            group.observer.is_whole_again(now_ns);
        }
        if if harmless { is_alone } else { is_free } {
            self.waiting.pop();
            self.present.push((fault, Rank(fault.rank), Next::Start));
        }
    }

    fn go_on(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
        next: Next,
    ) -> Result<Option<(Rank, Next)>, LaunchError> {
        match next {
            Next::Start => {
                let victim = mortal(group, victim, fault.kind);
                if fault.kind.licence() == Licence::Rank && !can_lose(group, victim) {
                    return Ok(Some((victim, next)));
                }
                let way = group.newest(victim).map(|process| process.role.way);
                let is_named =
                    moment_of(fault.kind).is_none_or(|moment| way.is_some_and(|way| way.has(moment)));
                // Nobody's steps have such a moment: it is a death like any other.
                let kind = if is_named { fault.kind } else { FaultKind::Kill };
                self.strike(group, now_ns, &Fault { kind, ..*fault }, victim)
            }
            Next::Death { process, told_ns } => {
                Ok(self.await_death(group, now_ns, fault, victim, process, told_ns))
            }
            Next::SecondDeath { not_before_ns } if now_ns >= not_before_ns => {
                let second = mortal(group, Rank(fault.other), fault.kind);
                if second == victim || !can_lose(group, second) {
                    return Ok(Some((victim, Next::SecondDeath { not_before_ns: now_ns + AGAIN_NS })));
                }
                self.kill(group, now_ns, fault, second);
                Ok(None)
            }
            Next::InReconnect { strike_ns } => {
                let is_so = group.observer.view().slot(victim).state == SlotState::Joining;
                let strike_ns = self.seen(group, victim, is_so, strike_ns, now_ns);
                Ok(self
                    .second_of_two(group, now_ns, fault, victim, strike_ns)
                    .then_some((victim, Next::InReconnect { strike_ns })))
            }
            Next::InCommit { strike_ns } => {
                let is_so = group.observer.view().plan.is_some();
                let strike_ns = self.seen(group, victim, is_so, strike_ns, now_ns);
                Ok(self
                    .second_of_two(group, now_ns, fault, victim, strike_ns)
                    .then_some((victim, Next::InCommit { strike_ns })))
            }
            Next::Flap { left, not_before_ns } if now_ns >= not_before_ns => {
                if !group.is_serving(victim) || !can_lose(group, victim) {
                    return Ok(Some((victim, Next::Flap { left, not_before_ns: now_ns + AGAIN_NS })));
                }
                self.kill(group, now_ns, fault, victim);
                Ok((left > 1).then_some((victim, Next::Flap { left: left - 1, not_before_ns: now_ns + 1 })))
            }
            Next::Wake { process, wake_ns } => Ok(self.wake(group, now_ns, victim, process, wake_ns)),
            later => Ok(Some((victim, later))),
        }
    }

    /// The first part of a fault.
    fn strike(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
    ) -> Result<Option<(Rank, Next)>, LaunchError> {
        group.observer.struck(now_ns, victim, fault.kind);
        let stretch = u64::from(group.shape.detect_ms) / DETECT_MS_OF_PLANS;
        let until = now_ns + fault.lasts_us * 1_000 * stretch.max(1);
        match fault.kind {
            FaultKind::Pause => self.pause(group, now_ns, fault, victim),
            FaultKind::Slow => {
                if let Some(process) = group.newest(victim).map(|process| process.id) {
                    self.lasting.push((until, fault.kind, Lasting::Slow { process, turn_ns: now_ns }));
                }
            }
            FaultKind::Zombie => return Ok(self.stop_for_good(group, now_ns, victim)),
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
                disturb(group, fault);
                self.lasting.push((until, fault.kind, Lasting::Packets));
            }
            FaultKind::QpError => {
                let far = far_end(fault, victim);
                group.observer.ledger.touch_pair(victim, far, false);
                group.heal_if_unharmed(now_ns, victim, far);
                let order = Order::FailQueue { peer: far.0, syndrome: fault.syndrome, draw: fault.draw };
                tell(group, victim, &order);
            }
            FaultKind::StoreOutage => self.end_store(group, fault, until)?,
            FaultKind::StoreAndRank => {
                self.end_store(group, fault, until)?;
                self.kill(group, now_ns, fault, victim);
            }
            FaultKind::CommandError => {
                self.refuse_commands(group, victim);
                self.kill(group, now_ns, fault, victim);
            }
            _ => return Ok(self.strike_dead(group, now_ns, fault, victim)),
        }
        Ok(None)
    }

    /// Kinds that begin with a death.
    fn strike_dead(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
    ) -> Option<(Rank, Next)> {
        let after_us = self.draws.below(1_500);
        let order = match fault.kind {
            FaultKind::PartialMessage => Some(Order::DieWithinMessage),
            kind => moment_of(kind).map(|moment| Order::DieIn { moment, after_us }),
        };
        if let Some(order) = order {
            let process = group.newest(victim)?.id;
            group.observer.died(now_ns, victim);
            tell(group, victim, &order);
            return Some((victim, Next::Death { process, told_ns: now_ns }));
        }
        self.kill(group, now_ns, fault, victim);
        match fault.kind {
            FaultKind::TwoDeaths => {
                let pause = self.draws.pick(&[0, 1_000_000, 20_000_000, 200_000_000]);
                Some((victim, Next::SecondDeath { not_before_ns: now_ns + pause }))
            }
            FaultKind::KillInReconnect => Some((victim, Next::InReconnect { strike_ns: None })),
            FaultKind::KillInCommit => Some((victim, Next::InCommit { strike_ns: None })),
            FaultKind::Flapping => {
                Some((victim, Next::Flap { left: FLAPS - 1, not_before_ns: now_ns + AGAIN_NS }))
            }
            _ => None,
        }
    }

    /// Waits until the victim has ended at its moment; one that does not come to it is killed.
    fn await_death(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
        process: u64,
        told_ns: u64,
    ) -> Option<(Rank, Next)> {
        let dying = group.with_id(process)?;
        let is_dying = dying.seen.is_doomed;
        dying.is_condemned |= is_dying;
        if !is_dying && now_ns.saturating_sub(told_ns) > MOMENT_NS_MAX {
            self.kill(group, now_ns, fault, victim);
            return None;
        }
        Some((victim, Next::Death { process, told_ns }))
    }

    /// Ends the newest process of `victim`; another one is on its way.
    fn kill(&mut self, group: &mut Supervisor<'_>, now_ns: u64, fault: &Fault, victim: Rank) {
        let Some(process) = group.newest_mut(victim) else { return };
        process.kill();
        group.observer.died(now_ns, victim);
        group.observer.died_at(now_ns, victim);
        let is_quick = matches!(fault.kind, FaultKind::QuickRejoin | FaultKind::Flapping);
        let wait = if is_quick { self.draws.between(1_000, QUICK_NS) } else { fault.lasts_us * 1_000 };
        let takes_over = is_quick || !self.draws.one_in(WAITS_FOR_LEASE);
        if !group.births.iter().any(|birth| birth.rank == victim) {
            group.births.push(Birth { rank: victim, at_ns: now_ns + wait, takes_over });
        }
    }

    /// Stops a process for at most half of what its peers bear.
    fn pause(&mut self, group: &mut Supervisor<'_>, now_ns: u64, fault: &Fault, victim: Rank) {
        let half_ns = u64::from(group.shape.detect_ms) * 500_000;
        let until = now_ns + self.draws.between(half_ns / 8, half_ns);
        if let Some(process) = stop(group, now_ns, victim) {
            self.lasting.push((until, fault.kind, Lasting::Freeze { process }));
        }
    }

    /// Stops a process until it was evicted.
    fn stop_for_good(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        victim: Rank,
    ) -> Option<(Rank, Next)> {
        let process = stop(group, now_ns, victim)?;
        group.observer.died(now_ns, victim);
        if let Some(stopped) = group.with_id(process) {
            stopped.seen.is_doomed = true;
        }
        Some((victim, Next::Wake { process, wake_ns: None }))
    }

    /// A stopped process goes on after it was evicted: before, while or after another one takes its place.
    fn wake(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        victim: Rank,
        process: u64,
        wake_ns: Option<u64>,
    ) -> Option<(Rank, Next)> {
        let instance = group.with_id(process)?.seen.instance;
        match wake_ns {
            Some(wake_ns) if now_ns >= wake_ns => {
                go_on(group, now_ns, process);
                None
            }
            None if group.observer.view().holder(victim) != Some(instance) => {
                let wake_ns = Some(now_ns + self.draws.below(400_000_000));
                let at_ns = now_ns + self.draws.below(200_000_000);
                group.births.push(Birth { rank: victim, at_ns, takes_over: true });
                Some((victim, Next::Wake { process, wake_ns }))
            }
            waiting => Some((victim, Next::Wake { process, wake_ns: waiting })),
        }
    }

    /// When to strike at what was waited for; at once if the victim serves again and it was never seen.
    fn seen(
        &mut self,
        group: &Supervisor<'_>,
        victim: Rank,
        is_so: bool,
        strike_ns: Option<u64>,
        now_ns: u64,
    ) -> Option<u64> {
        match strike_ns {
            None if is_so => Some(now_ns + self.draws.below(8_000_000)),
            None if group.is_serving(victim) => Some(now_ns),
            known => known,
        }
    }

    /// The replacement dies, or somebody else whom the group can lose. Whether that is still to come.
    fn second_of_two(
        &mut self,
        group: &mut Supervisor<'_>,
        now_ns: u64,
        fault: &Fault,
        victim: Rank,
        strike_ns: Option<u64>,
    ) -> bool {
        if strike_ns.is_none_or(|strike_ns| now_ns < strike_ns) {
            return true;
        }
        let other = Rank(fault.other);
        let takes_other = fault.draw & 1 == 0 && other != victim && can_lose(group, other);
        let second = if takes_other { other } else { victim };
        if can_lose(group, second) {
            self.kill(group, now_ns, fault, second);
        }
        false
    }

    fn cut(&mut self, group: &mut Supervisor<'_>, fault: &Fault, until: u64, src: Rank, dst: Rank) {
        let Some(process) = group.newest(src).map(|process| process.id) else { return };
        group.observer.ledger.touch_pair(src, dst, true);
        tell(group, src, &Order::Cut { peer: dst.0, is_cut: true });
        self.lasting.push((until, fault.kind, Lasting::Path { src, dst, process }));
    }

    fn end_store(
        &mut self,
        group: &mut Supervisor<'_>,
        fault: &Fault,
        until: u64,
    ) -> Result<(), LaunchError> {
        if let Some(store) = &mut group.store {
            store.set_up(false)?;
            self.lasting.push((until, fault.kind, Lasting::Store));
        }
        Ok(())
    }

    /// Commands of survivors' devices fail while their peer is replaced.
    fn refuse_commands(&mut self, group: &mut Supervisor<'_>, victim: Rank) {
        for rank in group.ranks().filter(|rank| *rank != victim) {
            // CAST: below the number of commands of one replacement.
            let skip = self.draws.below(24) as u32;
            tell(group, rank, &Order::Refuse { skip });
        }
    }

    fn end_lasting(&mut self, group: &mut Supervisor<'_>, now_ns: u64) -> Result<(), LaunchError> {
        let (over, rest): (Vec<_>, Vec<_>) =
            core::mem::take(&mut self.lasting).into_iter().partition(|(until, ..)| now_ns >= *until);
        self.lasting = rest;
        for (_, kind, lasting) in over {
            group.observer.note(now_ns, None, Happened::Ended(kind.to_string()));
            match lasting {
                Lasting::Freeze { process } | Lasting::Slow { process, .. } => go_on(group, now_ns, process),
                Lasting::Path { src, dst, process } => {
                    if let Some(process) = group.with_id(process) {
                        process.tell(&Order::Cut { peer: dst.0, is_cut: false });
                    }
                    if !self.lasting.iter().any(|(_, _, other)| other.is_path(dst, src)) {
                        group.observer.ledger.pair_ended(src, dst);
                        group.heal_if_unharmed(now_ns, src, dst);
                    }
                }
                Lasting::Packets => {
                    for rank in group.ranks() {
                        tell(group, rank, &Order::Packets(FaultPlan::default()));
                    }
                }
                Lasting::Store => {
                    if let Some(store) = &mut group.store {
                        store.set_up(true)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Lets slow ranks run and stand still in turn.
    fn throttle(&mut self, group: &mut Supervisor<'_>, now_ns: u64) {
        for (_, _, lasting) in &mut self.lasting {
            let Lasting::Slow { process, turn_ns } = lasting else { continue };
            if now_ns < *turn_ns {
                continue;
            }
            let Some(process) = group.with_id(*process) else { continue };
            let (signal, lasts) =
                if process.is_stopped { (Signal::CONT, SLOW_NS.0) } else { (Signal::STOP, SLOW_NS.1) };
            process.signal(signal);
            process.is_stopped = !process.is_stopped;
            *turn_ns = now_ns + lasts;
        }
    }
}

impl fmt::Display for Injector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let waiting = self.waiting.len();
        write!(f, "present faults {:?}, lasting {:?}, {waiting} to come", self.present, self.lasting)
    }
}

/// The part of a step in which a kind strikes.
fn moment_of(kind: FaultKind) -> Option<Moment> {
    Some(match kind {
        FaultKind::KillInDispatch => Moment::Dispatch,
        FaultKind::KillBetween => Moment::Between,
        FaultKind::KillInCombine => Moment::Combine,
        FaultKind::KillInReplay => Moment::Replay,
        _ => return None,
    })
}

/// The end of a path that is not `victim`.
fn far_end(fault: &Fault, victim: Rank) -> Rank {
    if Rank(fault.other) == victim { Rank(fault.rank) } else { Rank(fault.other) }
}

fn tell(group: &mut Supervisor<'_>, rank: Rank, order: &Order) {
    if let Some(process) = group.newest_mut(rank) {
        process.tell(order);
    }
}

/// Stops the newest process of a rank; its number.
fn stop(group: &mut Supervisor<'_>, now_ns: u64, rank: Rank) -> Option<u64> {
    let process = group.newest_mut(rank)?;
    process.signal(Signal::STOP);
    process.is_stopped = true;
    let id = process.id;
    group.observer.stopped(now_ns, rank, true);
    Some(id)
}

/// Lets a stopped process go on.
fn go_on(group: &mut Supervisor<'_>, now_ns: u64, id: u64) {
    let Some(process) = group.with_id(id) else { return };
    process.signal(Signal::CONT);
    process.is_stopped = false;
    let rank = process.rank();
    group.observer.stopped(now_ns, rank, false);
}

/// Whether the group keeps its quorum without a rank: more than half, or half with the lowest.
fn can_lose(group: &Supervisor<'_>, rank: Rank) -> bool {
    let members = group.observer.view().members();
    if !members.contains(rank) {
        return true;
    }
    let alive: Vec<Rank> =
        members.iter().filter(|other| *other != rank && group.is_serving(*other)).collect();
    let (twice, count) = (2 * alive.len() as u32, members.len() as u32);
    twice > count || (twice == count && members.lowest().is_some_and(|lowest| alive.contains(&lowest)))
}

/// The victim, or the next rank that may end and has the moment at which it is to; for kinds that end nobody, the
/// victim itself.
fn mortal(group: &Supervisor<'_>, victim: Rank, kind: FaultKind) -> Rank {
    if kind.licence() != Licence::Rank {
        return victim;
    }
    let count = group.shape.ranks;
    // CAST: at most 512 ranks.
    let from = |nth: u32| Rank(((u32::from(victim.0) + nth) % count) as u16);
    let may = |rank: &Rank| group.is_serving(*rank) && can_lose(group, *rank);
    let has_moment = |rank: &Rank| {
        let process = group.newest(*rank);
        moment_of(kind).is_none_or(|moment| process.is_some_and(|process| process.role.way.has(moment)))
    };
    let mut all = (0..count).map(from).filter(may);
    all.clone().find(has_moment).or_else(|| all.next()).unwrap_or(victim)
}

/// Packets between everybody are treated badly.
fn disturb(group: &mut Supervisor<'_>, fault: &Fault) {
    let ppm = fault.ppm;
    let what = match fault.kind {
        FaultKind::Drop => PacketFault::Drop { ppm },
        FaultKind::Delay => PacketFault::Delay { ppm: 10 * ppm, min_us: 1, max_us: 2_000 },
        FaultKind::Duplicate => PacketFault::Duplicate { ppm: 10 * ppm },
        FaultKind::Reorder => PacketFault::Reorder { ppm: 10 * ppm, overtake_max: 8, hold_us: 500 },
        _ => PacketFault::Corrupt { ppm },
    };
    for rank in group.ranks() {
        let seed = fault.draw ^ u64::from(rank.0);
        tell(group, rank, &Order::Packets(FaultPlan { seed, rules: vec![FaultRule::always(what)] }));
    }
}
