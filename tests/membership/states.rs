//! Every event in every state, as a table: `states.txt`.
//!
//! A line that changes is a change of behaviour and is reviewed as such. To write the table anew after such a change:
//! `IBEX_BLESS=1 cargo test --test membership`. Each state is reached by a script of events from the beginning; the
//! outcome names the actions that follow, and where the rank stands then. A dash changes nothing.

use std::fmt::Write as _;
use std::path::Path;

use super::*;
use ibex::membership::{Plan, Slot};

const DETECT_NS: u64 = 100;

/// Time at which states are looked at.
const NOW: u64 = 10_000;

fn claim(rank: u16, instance: u128) -> Claimed {
    // CAST: small numbers.
    Claimed { rank: Rank(rank), instance: Instance(instance), fence: instance as u64 }
}

fn config() -> MembershipConfig {
    MembershipConfig {
        num_ranks: 4,
        initial: RankSet::first(3),
        first_step: 0,
        first_seq: vec![[1; 2]],
        detect_ns: DETECT_NS,
        lease_ttl_ns: 3 * DETECT_NS,
        store_grace_ns: 50 * DETECT_NS,
        join_ns: 100 * DETECT_NS,
        flap_window_ns: DETECT_NS,
        hold_down_ns: DETECT_NS,
        hold_down_max_ns: DETECT_NS,
        guards_off: Vec::new(),
    }
}

/// Slots by rank: `.` vacant, `j` joining, `m` member; instances are 10 + rank.
fn view(serial: u64, epoch: u32, slots: &str) -> View {
    let slot = |(rank, state): (u128, char)| {
        let state = match state {
            '.' => return Slot::default(),
            'j' => SlotState::Joining,
            _ => SlotState::Member,
        };
        Slot { state, instance: Instance(10 + rank), fence: 10 + rank as u64, since: 1, evictions: 0 }
    };
    let slots = (0..).zip(slots.chars()).map(slot).collect();
    View { serial, epoch: Epoch(epoch), placement_version: 1, slots, plan: None, start: None }
}

fn plan(id: u64, join: &[u16], leave: &[u16]) -> Plan {
    let ranks = |ranks: &[u16]| ranks.iter().map(|rank| Rank(*rank)).collect();
    Plan { id, join: ranks(join), leave: ranks(leave), placement_version: 1 }
}

fn start(plan: Plan, epoch: u32) -> Option<Start> {
    Some(Start { plan, epoch: Epoch(epoch), from_step: 7, from_seq: vec![[8; 2]] })
}

fn row(rank: u16, seen: u64, epoch: u32) -> Row {
    Row {
        instance: Instance(10 + u128::from(rank)),
        seen,
        epoch: Epoch(epoch),
        applied: Epoch(epoch),
        placement_version: 1,
        ..Row::default()
    }
}

/// What happens to a machine on its way to a state.
type Script<'a> = &'a [&'a dyn Fn(&mut Membership, u64)];

/// A machine to which these have happened.
fn machine(events: Script<'_>) -> Membership {
    let mut machine = Membership::new(config(), claim(1, 11), NOW - 1_000);
    for (event, now) in events.iter().zip((1..).map(|n| NOW - 1_000 + n)) {
        event(&mut machine, now);
    }
    while machine.poll_action().is_some() {}
    machine
}

fn up(machine: &mut Membership, now: u64) {
    machine.handle_store_up(now, 1 << 30);
    for rank in [0, 1, 2] {
        machine.handle_claim(now, claim(rank, 10 + u128::from(rank)), true);
    }
}

fn joined(machine: &mut Membership, now: u64) {
    let began = plan(3, &[0, 1, 2], &[]);
    machine.handle_view(now, 2, View { start: start(began, 1), ..view(3, 1, "mmm.") });
    for peer in [0, 2] {
        machine.handle_connected(now, Rank(peer), Instance(10 + u128::from(peer)));
        machine.handle_row(now, Rank(peer), row(peer, 3, 1));
    }
    machine.handle_committed(now, 3);
}

type State = (&'static str, fn() -> Membership);

const STATES: [State; 9] = [
    ("outside, store away", || machine(&[])),
    ("outside", || machine(&[&up, &|m, now| m.handle_view(now, 0, View::empty(4))])),
    ("joining", || machine(&[&up, &|m, now| m.handle_view(now, 1, view(2, 0, "jjj."))])),
    ("member", || machine(&[&up, &joined])),
    ("member, store away", || machine(&[&up, &joined, &|m, now| m.handle_store_away(now)])),
    ("member, rank 2 suspected", || {
        machine(&[&up, &joined, &|m, now| {
            m.handle_suspicion(now, Rank(2), Instance(12), Evidence::Reported);
        }])
    }),
    ("member, gate closed for rank 2 to leave", || {
        machine(&[&up, &joined, &|m, now| {
            m.handle_view(now, 3, View { plan: Some(plan(4, &[], &[2])), ..view(4, 1, "mmm.") });
        }])
    }),
    ("leaving", || {
        machine(&[&up, &joined, &|m, now| {
            m.handle_view(now, 3, View { plan: Some(plan(4, &[], &[1])), ..view(4, 1, "mmm.") });
            let mut left = View { start: start(plan(4, &[], &[1]), 2), ..view(5, 2, "mmm.") };
            left.slots[1] = Slot { state: SlotState::Vacant, since: 5, ..left.slots[1] };
            m.handle_view(now, 4, left);
        }])
    }),
    ("stopped", || machine(&[&up, &joined, &|m, now| m.handle_claim(now, claim(1, 90), true)])),
];

type Event = (&'static str, fn(&mut Membership));

const EVENTS: [Event; 22] = [
    ("store up", |m| m.handle_store_up(NOW, 1 << 30)),
    ("store away", |m| m.handle_store_away(NOW)),
    ("store away for its grace", |m| {
        m.handle_store_away(NOW);
        m.handle_timeout(NOW + 50 * DETECT_NS);
    }),
    ("view: never written", |m| m.handle_view(NOW, 0, View::empty(4))),
    ("view: another size", |m| m.handle_view(NOW, 9, View::empty(5))),
    ("view: this rank joining", |m| m.handle_view(NOW, 9, view(9, 0, "jj.."))),
    ("view: first epoch", |m| {
        m.handle_view(NOW, 9, View { start: start(plan(9, &[0, 1, 2], &[]), 1), ..view(9, 1, "mmm.") });
    }),
    ("view: rank 2 evicted", |m| {
        let mut evicted = View { start: start(plan(3, &[0, 1, 2], &[]), 1), ..view(9, 2, "mmm.") };
        evicted.slots[2].state = SlotState::Vacant;
        m.handle_view(NOW, 9, evicted);
    }),
    ("view: this rank evicted", |m| {
        let mut evicted = view(9, 2, "mmm.");
        evicted.slots[1].state = SlotState::Vacant;
        m.handle_view(NOW, 9, evicted);
    }),
    ("view: rank 3 joining", |m| {
        m.handle_view(NOW, 9, View { start: start(plan(3, &[0, 1, 2], &[]), 1), ..view(9, 1, "mmmj") });
    }),
    ("view: a plan", |m| {
        let began = start(plan(3, &[0, 1, 2], &[]), 1);
        m.handle_view(NOW, 9, View { plan: Some(plan(9, &[], &[0])), start: began, ..view(9, 1, "mmm.") });
    }),
    ("view: rank 2 has left", |m| {
        let mut left = View { start: start(plan(4, &[], &[2]), 2), ..view(9, 2, "mmm.") };
        left.slots[2].state = SlotState::Vacant;
        m.handle_view(NOW, 9, left);
    }),
    ("row: rank 0 suspects rank 2", |m| {
        let said = Row { round: 1, suspects: [Rank(2)].into_iter().collect(), ..row(0, 4, 1) };
        m.handle_row(NOW, Rank(0), said);
    }),
    ("row: rank 0 lets go of this rank", |m| m.handle_row(NOW, Rank(0), row(0, 9, 2))),
    ("claim: rank 3, alive", |m| m.handle_claim(NOW, claim(3, 13), true)),
    ("claim: rank 2 again, by another", |m| m.handle_claim(NOW, claim(2, 90), true)),
    ("claim: rank 2 expired", |m| m.handle_claim(NOW, claim(2, 12), false)),
    ("claim: this rank, by another", |m| m.handle_claim(NOW, claim(1, 90), true)),
    ("suspicion of rank 0", |m| {
        m.handle_suspicion(NOW, Rank(0), Instance(10), Evidence::Reported);
    }),
    ("suspicion of an older rank 0", |m| {
        m.handle_suspicion(NOW, Rank(0), Instance(5), Evidence::Reported);
    }),
    ("committed", |m| m.handle_committed(NOW, 4)),
    ("time: detect_ms", |m| m.handle_timeout(NOW + 2 * DETECT_NS)),
];

/// The actions in short, and the standing.
fn outcome(mut machine: Membership) -> String {
    let mut text = String::new();
    while let Some(action) = machine.poll_action() {
        let short = match action {
            Action::PutRow(row) => format!("row(round {}, suspects {})", row.round, row.suspects),
            Action::CasView { view, .. } => {
                format!("view(epoch {}, members {})", view.epoch, view.members())
            }
            Action::Connect { peer, .. } => format!("connect {peer}"),
            Action::Fence { peer, .. } => format!("fence {peer}"),
            Action::Remove { ranks, .. } => format!("remove {ranks}"),
            Action::CloseGate(_) => "close gate".into(),
            Action::OpenGate => "open gate".into(),
            Action::Commit(start) => format!("commit epoch {}", start.epoch),
            Action::Stop(stop) => format!("stop: {stop}"),
        };
        let comma = if text.is_empty() { "" } else { ", " };
        write!(text, "{comma}{short}").unwrap();
    }
    if text.is_empty() { "-".into() } else { text }
}

#[test]
fn every_event_in_every_state_is_in_the_table() {
    let mut table = String::new();
    for (state, reach) in STATES {
        writeln!(table, "{state}").unwrap();
        for (event, happen) in EVENTS {
            let mut machine = reach();
            let before = machine.standing();
            happen(&mut machine);
            let after = machine.standing();
            let moved = if before == after { String::new() } else { format!("{after:?}: ") };
            writeln!(table, "  {event:<34} {moved}{}", outcome(machine)).unwrap();
        }
    }
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/membership/states.txt");
    if std::env::var_os("IBEX_BLESS").is_some() {
        std::fs::write(&path, &table).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let changed: Vec<String> = kept
        .lines()
        .zip(table.lines())
        .filter(|(kept, now)| kept != now)
        .map(|(kept, now)| format!("- {kept}\n+ {now}"))
        .collect();
    assert!(changed.is_empty(), "{}", changed.join("\n"));
    assert_eq!(kept.lines().count(), table.lines().count(), "the table has other lines");
}
