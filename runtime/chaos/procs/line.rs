//! What supervisor and ranks say to each other: one JSON value a line.
//!
//! Pure. Orders go to a rank's standard input, words come from its standard output. Times are nanoseconds since 1970:
//! ranks and supervisor run on one machine, and nothing but reports depends on them.

use serde::{Deserialize, Serialize};

use ibex_hca::emulated::switch::FaultPlan;

use crate::chaos::app::{Stage, Style};
use crate::config::{Config, RoutePolicy, ValidConfig, WireDtype};
use crate::error::{ConfigError, Evidence};

/// What lies between the devices of a group of processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Between {
    /// Shared memory of one host.
    Shm,
    /// RC over RoCEv2 through UDP sockets.
    Udp,
}

/// What all ranks of a group have in common.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shape {
    /// Inputs are a function of it, of the step and the rank.
    pub seed: u64,
    /// Ranks.
    pub ranks: u32,
    /// Most tokens per rank.
    pub tokens: u32,
    /// Row width.
    pub hidden: u32,
    /// Experts.
    pub experts: u32,
    /// Experts per token.
    pub topk: u32,
    /// How long a peer may be silent.
    pub detect_ms: u32,
    /// How long a live peer may take.
    pub stall_ms: u32,
    /// How long ranks go on without the store.
    pub store_grace_ms: u32,
    /// What lies between devices.
    pub between: Between,
    /// Where the group finds its records.
    pub store: String,
    /// Its name there.
    pub group: String,
}

impl Shape {
    /// The configuration of its ranks.
    ///
    /// # Errors
    /// The field, its value and its limit.
    pub fn config(&self) -> Result<ValidConfig, ConfigError> {
        let config = Config {
            num_ranks: self.ranks,
            max_tokens: self.tokens,
            hidden: self.hidden,
            num_experts: self.experts,
            max_topk: self.topk,
            dtype: WireDtype::Fp8,
            num_sms: 1,
            // Memory of a process that was killed is nothing to stand on: everything goes through queue pairs.
            route: RoutePolicy::Ibgda,
            // Two ranks may die in different steps of one ring slot before anybody has fenced the first.
            spare_regions: 2,
            detect_ms: self.detect_ms,
            stall_ms: Some(self.stall_ms),
            store_grace_ms: self.store_grace_ms,
            ..Config::default()
        };
        config.validate()
    }
}

/// How a rank launches its steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Way {
    /// Dispatch, expert and combine at once.
    Whole,
    /// The combine when the dispatch has ended, after some thought.
    Apart,
    /// Send and receive halves apart.
    Halves,
    /// A graph that was captured before the first step.
    Graph,
}

impl Way {
    /// All of them; incarnations take them in turn.
    pub const ALL: [Self; 4] = [Self::Apart, Self::Graph, Self::Halves, Self::Whole];

    /// Whether its steps have such a moment.
    #[must_use]
    pub const fn has(self, moment: Moment) -> bool {
        match moment {
            Moment::Dispatch => !matches!(self, Self::Graph),
            Moment::Between => matches!(self, Self::Apart | Self::Halves),
            Moment::Combine => !matches!(self, Self::Graph),
            Moment::Replay => matches!(self, Self::Graph),
        }
    }

    pub(super) const fn style(self) -> Style {
        match self {
            Self::Whole => Style::Whole,
            Self::Apart => Style::Apart,
            Self::Halves => Style::Halves,
            Self::Graph => Style::Graph,
        }
    }
}

/// A part of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Moment {
    /// Its dispatch runs.
    Dispatch,
    /// Its dispatch has ended, its combine is not launched.
    Between,
    /// Its combine runs.
    Combine,
    /// A captured graph runs.
    Replay,
}

impl Moment {
    pub(super) fn is(self, stage: Stage) -> bool {
        match self {
            Self::Dispatch => stage == Stage::Dispatching,
            Self::Between => stage == Stage::Between,
            Self::Combine => stage == Stage::Combining,
            Self::Replay => stage == Stage::Replaying,
        }
    }
}

/// Who a rank is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Role {
    /// The group.
    pub shape: Shape,
    /// The rank to be.
    pub rank: u16,
    /// Take the name from a process whose lease still runs.
    pub takeover: bool,
    /// How it launches its steps.
    pub way: Way,
    /// Whatever else it chooses.
    pub draw: u64,
}

/// What a supervisor tells a rank.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// The first line: who to be.
    Be(Box<Role>),
    /// Nothing that this rank sends reaches a peer, or all of it does again.
    Cut {
        /// The peer.
        peer: u16,
        /// Whether nothing does.
        is_cut: bool,
    },
    /// What goes wrong with packets that this rank sends.
    Packets(FaultPlan),
    /// One queue pair to a peer goes to ERR.
    FailQueue {
        /// The peer.
        peer: u16,
        /// With this syndrome.
        syndrome: u8,
        /// Which of them.
        draw: u64,
    },
    /// The device refuses the command behind so many others.
    Refuse {
        /// How many pass.
        skip: u32,
    },
    /// End by SIGKILL so long after the next such moment.
    DieIn {
        /// When.
        moment: Moment,
        /// How long after it began.
        after_us: u64,
    },
    /// End by SIGKILL within a message: its first packet has left, its last never does.
    DieWithinMessage,
    /// Everybody is here: what is held now is the measure for the end.
    Baseline,
    /// Launch nothing from this step on.
    Finish {
        /// The first step that is not launched.
        until: u64,
    },
    /// Take everything down and end.
    End,
}

/// Picks and sources that a step has lost, by whose they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lost {
    /// Who serves or sent them; nobody who could lose them if absent.
    pub owner: Option<u16>,
    /// How many.
    pub count: u64,
}

/// A step that a rank has finished, judged.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepWord {
    /// Which.
    pub step: u64,
    /// The epoch under which it ended.
    pub epoch: u32,
    /// How long it took.
    pub took_ns: u64,
    /// Outputs and rows that no reference explains.
    pub wrong: u64,
    /// Picks that are missing and not reported lost.
    pub unreported: u64,
    /// What was reported lost.
    pub lost: Vec<Lost>,
}

/// What a rank tells its supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Said {
    /// It has claimed its name.
    Hello {
        /// Its incarnation, low half first.
        instance: [u64; 2],
    },
    /// It has its weights and said that it is ready.
    Ready {
        /// Bytes read from survivors.
        read_bytes: u64,
    },
    /// A step.
    Step(StepWord),
    /// It no longer waits for a peer.
    Suspects {
        /// Whom.
        peer: u16,
        /// Why.
        why: Why,
        /// The same with all that is known, for people.
        details: String,
    },
    /// Its gate is closed, or open again after so long; `switched`: behind a commit.
    Gate {
        /// How long it was closed; none while it is.
        closed_ns: Option<u64>,
        /// A commit opened it.
        switched: bool,
        /// It was a member before.
        has_served: bool,
    },
    /// A device refused something that is tried again.
    Refused {
        /// What.
        doing: String,
        /// How often.
        attempts: u32,
    },
    /// This process was late by its own clock, more than a machine with time for it is: the longest times since its
    /// last such word.
    Late {
        /// Between two of its signs of life.
        silent_ns: u64,
        /// Between two steps of its device.
        unattended_ns: u64,
    },
    /// Commands on queue pairs to healthy members.
    Touched {
        /// How many, and an example.
        count: u64,
        /// In words.
        example: String,
    },
    /// It ends by its own SIGKILL, as it was told to.
    Dies,
    /// The group is lost to it.
    Stopped {
        /// Whether others went on without it.
        is_fenced: bool,
        /// In words.
        why: String,
    },
    /// It could not go on.
    Failed {
        /// In words.
        why: String,
    },
    /// It has launched what it was to launch.
    Done {
        /// The next step.
        step: u64,
        /// Bytes and objects beyond the baseline.
        grown: u64,
        /// In words.
        held: String,
        /// Graphs captured again.
        recaptures: u64,
    },
    /// It has taken everything down.
    Gone {
        /// Objects that are still there.
        left: u64,
        /// WQEs that no doorbell covered.
        unrung: u64,
    },
}

/// Why a rank no longer waits for a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Why {
    /// Its process ended.
    Exit,
    /// An error completion.
    Syndrome,
    /// Silence, or no progress.
    Deadline,
    /// Its lease ran out, or its name is another's.
    Name,
    /// Others said so.
    Report,
    /// Anything else.
    Other,
}

impl From<Evidence> for Why {
    fn from(evidence: Evidence) -> Self {
        match evidence {
            Evidence::Exit => Self::Exit,
            Evidence::Syndrome { .. } => Self::Syndrome,
            Evidence::Silent { .. } | Evidence::Stalled { .. } => Self::Deadline,
            Evidence::Lease | Evidence::Superseded => Self::Name,
            Evidence::Reported => Self::Report,
            _ => Self::Other,
        }
    }
}

/// One line of a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Word {
    /// When.
    pub at_ns: u64,
    /// What.
    pub said: Said,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_survive_their_text_and_are_lines() {
        let shape = Shape {
            seed: 3,
            ranks: 4,
            tokens: 16,
            hidden: 512,
            experts: 32,
            topk: 4,
            detect_ms: 1000,
            stall_ms: 5000,
            store_grace_ms: 60_000,
            between: Between::Udp,
            store: "memory:".into(),
            group: "chaos".into(),
        };
        assert!(shape.config().is_ok());
        let role = Role { shape, rank: 3, takeover: true, way: Way::Graph, draw: u64::MAX };
        let orders =
            [Order::Be(Box::new(role)), Order::Packets(FaultPlan::default()), Order::Baseline, Order::End];
        for order in orders {
            let line = serde_json::to_string(&order).unwrap();
            assert!(!line.contains('\n'));
            assert_eq!(serde_json::from_str::<Order>(&line).unwrap(), order);
        }
        let step = StepWord { lost: vec![Lost { owner: None, count: 2 }], ..StepWord::default() };
        for said in [Said::Hello { instance: [u64::MAX, 1] }, Said::Step(step), Said::Dies] {
            let word = Word { at_ns: u64::MAX, said };
            let line = serde_json::to_string(&word).unwrap();
            assert_eq!(serde_json::from_str::<Word>(&line).unwrap(), word);
        }
    }

    #[test]
    fn every_moment_has_a_way_and_every_way_a_moment() {
        let moments = [Moment::Dispatch, Moment::Between, Moment::Combine, Moment::Replay];
        assert!(moments.iter().all(|moment| Way::ALL.iter().any(|way| way.has(*moment))));
        assert!(Way::ALL.iter().all(|way| moments.iter().any(|moment| way.has(*moment))));
    }
}
