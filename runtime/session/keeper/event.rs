//! What a keeper has seen and done, for reports.

use crate::error::Evidence;
use crate::ids::{Epoch, Rank};
use crate::membership::{Instance, RankSet, Stop};
use crate::recovery::DeviceEvent;
use crate::telemetry::Fault;

/// Something that a keeper has seen or done.
#[derive(Clone, Debug, PartialEq)]
pub struct KeeperEvent {
    /// When, by the caller's clock.
    pub at_ns: u64,
    /// What.
    pub what: Happening,
}

/// What a keeper has seen or done.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub enum Happening {
    /// A peer is lost to this rank.
    Suspected {
        /// Who.
        peer: Rank,
        /// Why.
        evidence: Evidence,
        /// What a kernel has recorded about it.
        fault: Option<Fault>,
    },
    /// This rank's device has reported something.
    Device(DeviceEvent),
    /// The group has agreed on other members.
    Agreed {
        /// The epoch that begins with it.
        epoch: Epoch,
        /// Its members.
        members: RankSet,
    },
    /// Nothing of an incarnation of a peer is held any more.
    Fenced {
        /// Who.
        peer: Rank,
        /// Which incarnation.
        instance: Instance,
    },
    /// Queue pairs to a peer exist and are offered to it.
    Offered {
        /// To whom.
        peer: Rank,
    },
    /// This side is connected with a peer.
    Connected {
        /// With whom.
        peer: Rank,
        /// Which incarnation.
        instance: Instance,
    },
    /// The peer's record does not offer any more what this side was connected to: another process has its name, or it
    /// has other queue pairs.
    Retired {
        /// Whose.
        peer: Rank,
        /// Which incarnation's.
        instance: Instance,
    },
    /// The gate is closed for a switch.
    GateClosed {
        /// The first step that is not launched.
        step: u64,
    },
    /// A switch came to nothing; the gate is open again.
    GateOpened {
        /// How long the gate was closed.
        closed_ns: u64,
    },
    /// A switch is done, and the gate open; for a rank that joins, its start.
    Switched {
        /// The epoch from here on.
        epoch: Epoch,
        /// The first step under it.
        from_step: u64,
        /// How long the gate was closed.
        closed_ns: u64,
    },
    /// The store answers, or does not.
    Store {
        /// Whether it does.
        is_up: bool,
    },
    /// Something was refused, and is tried again.
    Refused {
        /// What.
        doing: &'static str,
        /// For which peer.
        peer: Rank,
        /// How often by now.
        attempts: u32,
    },
    /// A cell of a peer could not be read.
    Unreadable {
        /// Whose.
        from: Rank,
        /// Which cell.
        what: &'static str,
    },
    /// The group may not be used any more.
    Stopped(Stop),
}
