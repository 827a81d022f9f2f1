//! What a campaign breaks: kinds of faults by name, and one planned fault as data.
//!
//! Pure. The same kinds are carried out in simulation and between processes; a carrier that cannot do one refuses it
//! by name before anything runs ([`FaultKind::needs_packets`]).

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// A kind of fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// A process ends at any instruction (kill -9); a replacement starts later.
    Kill,
    /// A process stands still for at most half the budget, and goes on (SIGSTOP, SIGCONT).
    Pause,
    /// A process stands still until it was evicted, and wakes up as a zombie.
    Zombie,
    /// A rank is many times slower for a while.
    Slow,
    /// Packets from one rank to another vanish.
    OneWay,
    /// Packets between two ranks vanish.
    TwoWay,
    /// Packets are lost at random.
    Drop,
    /// Packets come late.
    Delay,
    /// Packets come twice.
    Duplicate,
    /// Packets overtake each other.
    Reorder,
    /// Bits of packets flip.
    Corrupt,
    /// A queue pair goes to ERR with a chosen syndrome.
    QpError,
    /// A process ends while a message of it has been placed in part.
    PartialMessage,
    /// A process ends while its dispatch runs.
    KillInDispatch,
    /// A process ends after its dispatch and before its combine.
    KillBetween,
    /// A process ends while its combine runs.
    KillInCombine,
    /// A process ends while a replacement is being connected: the replacement, or a survivor.
    KillInReconnect,
    /// A process ends while it replays a captured graph.
    KillInReplay,
    /// A process ends while gates are closed for a commit.
    KillInCommit,
    /// The store does not answer for a while, or is restarted.
    StoreOutage,
    /// The store goes away and a process ends.
    StoreAndRank,
    /// Two processes end, at once or one after the other.
    TwoDeaths,
    /// A process ends and another one claims its name within 10 ms.
    QuickRejoin,
    /// A rank dies again as soon as it is back, several times.
    Flapping,
    /// A device refuses a command while a peer is replaced.
    CommandError,
}

/// All kinds, in the order of the reports.
pub const ALL_KINDS: &[FaultKind] = &[
    FaultKind::Kill,
    FaultKind::Pause,
    FaultKind::Zombie,
    FaultKind::Slow,
    FaultKind::OneWay,
    FaultKind::TwoWay,
    FaultKind::Drop,
    FaultKind::Delay,
    FaultKind::Duplicate,
    FaultKind::Reorder,
    FaultKind::Corrupt,
    FaultKind::QpError,
    FaultKind::PartialMessage,
    FaultKind::KillInDispatch,
    FaultKind::KillBetween,
    FaultKind::KillInCombine,
    FaultKind::KillInReconnect,
    FaultKind::KillInReplay,
    FaultKind::KillInCommit,
    FaultKind::StoreOutage,
    FaultKind::StoreAndRank,
    FaultKind::TwoDeaths,
    FaultKind::QuickRejoin,
    FaultKind::Flapping,
    FaultKind::CommandError,
];

/// What a kind of fault may do to a group that works as it should.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Licence {
    /// Nothing at all: no pick may be lost, no member evicted.
    Nothing,
    /// Picks between two ranks may be lost, and one of the two evicted.
    Pair,
    /// The picks of one rank may be lost, and the rank evicted.
    Rank,
}

impl FaultKind {
    /// Its name in reports and on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Zombie => "zombie",
            Self::Slow => "slow",
            Self::OneWay => "one_way",
            Self::TwoWay => "two_way",
            Self::Drop => "drop",
            Self::Delay => "delay",
            Self::Duplicate => "duplicate",
            Self::Reorder => "reorder",
            Self::Corrupt => "corrupt",
            Self::QpError => "qp_error",
            Self::PartialMessage => "partial_message",
            Self::KillInDispatch => "kill_in_dispatch",
            Self::KillBetween => "kill_between",
            Self::KillInCombine => "kill_in_combine",
            Self::KillInReconnect => "kill_in_reconnect",
            Self::KillInReplay => "kill_in_replay",
            Self::KillInCommit => "kill_in_commit",
            Self::StoreOutage => "store_outage",
            Self::StoreAndRank => "store_and_rank",
            Self::TwoDeaths => "two_deaths",
            Self::QuickRejoin => "quick_rejoin",
            Self::Flapping => "flapping",
            Self::CommandError => "command_error",
        }
    }

    /// Whether a network of packets is what it needs.
    #[must_use]
    pub const fn needs_packets(self) -> bool {
        matches!(self, Self::Drop | Self::Delay | Self::Duplicate | Self::Reorder | Self::Corrupt)
    }

    /// What it may cost.
    #[must_use]
    pub const fn licence(self) -> Licence {
        match self {
            Self::Pause | Self::Slow | Self::StoreOutage => Licence::Nothing,
            Self::Drop | Self::Delay | Self::Duplicate | Self::Reorder | Self::Corrupt => Licence::Nothing,
            Self::OneWay | Self::TwoWay | Self::QpError => Licence::Pair,
            _ => Licence::Rank,
        }
    }

    /// The fewest ranks that can bear it and stay a quorum.
    #[must_use]
    pub const fn ranks_min(self) -> u32 {
        match self {
            Self::TwoDeaths => 3,
            _ => 2,
        }
    }
}

impl fmt::Display for FaultKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that no kind of fault has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no kind of fault is called {name:?}; there are: {}", names())]
pub struct UnknownKind {
    /// What was given.
    pub name: String,
}

fn names() -> String {
    ALL_KINDS.iter().map(|kind| kind.name()).collect::<Vec<_>>().join(", ")
}

impl FromStr for FaultKind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        let found = ALL_KINDS.iter().find(|kind| kind.name() == name);
        found.copied().ok_or_else(|| UnknownKind { name: name.to_owned() })
    }
}

/// One fault of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fault {
    /// What happens.
    pub kind: FaultKind,
    /// It strikes once some member has begun this step.
    pub at_step: u64,
    /// To whom. Where its end would cost the quorum, the next rank that may end takes its place.
    pub rank: u16,
    /// The other end of a path, or the second victim.
    pub other: u16,
    /// How long a condition lasts, or how long until a replacement starts, in microseconds.
    pub lasts_us: u64,
    /// How often, in parts per million, where packets are concerned.
    pub ppm: u32,
    /// The syndrome of an error completion.
    pub syndrome: u8,
    /// Whatever else is chosen while it is carried out.
    pub draw: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kind_is_found_by_its_name_and_named_alike_in_json() {
        for kind in ALL_KINDS {
            assert_eq!(kind.name().parse::<FaultKind>().as_ref(), Ok(kind));
            assert_eq!(serde_json::to_string(kind).unwrap(), format!("{:?}", kind.name()));
        }
        let refused = "explode".parse::<FaultKind>().unwrap_err().to_string();
        assert!(refused.contains("explode") && refused.contains("kill_in_commit"), "{refused}");
    }
}
