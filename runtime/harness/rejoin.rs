//! What it costs to take a replacement in: one peer's queue pairs recreated, against all of them, in one run.
//!
//! A [`RejoinRig`] owns a world in which every rank stands for a host of its own. Hosts work at the same time; here
//! they share a few cores, so each one's calls are made by themselves and timed by themselves. Both ways of recreating
//! are the same calls in the same order: fence, offer, connect, activate. What differs is for how many peers.
//!
//! Commands take the time that the case says, one after another on each host. Everybody is told at once here what to
//! do; what agreeing on that takes is measured apart, by an [`AgreementRig`].

mod agreement;

use core::time::Duration;
use std::sync::Arc;

use ibex_abi::prm::{Op, Status};
use ibex_hca::Nanos;
use ibex_hca::emulated::CommandRecord;

use super::{Rig, StepPlan};
use crate::config::{Config, RoutePolicy, WireDtype};
use crate::error::{Error, Stale};
use crate::ids::Rank;
use crate::membership::{MembershipConfig, RankSet};
use crate::recovery::Offer;
use crate::reference::inputs::RankInput;
use crate::reference::rng::InputKey;
use crate::reference::routing::Routing;
use crate::session::{Session, Switch, WorldOptions};
use crate::time::{Stopwatch, now_ns};

pub use agreement::{Agreement, AgreementRig};

/// One group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RejoinCase {
    /// Its ranks.
    pub ranks: u32,
    /// Queue pairs that kernels drive to each peer; each pair has one more, for its signs of life.
    pub qps_per_peer: u32,
    /// What each command takes.
    pub command_latency: Duration,
}

/// What one replacement took.
#[derive(Clone, Debug, Default)]
pub struct Rejoin {
    /// Per survivor: its queue pairs to the replaced rank, from the fence to the activation.
    pub recreate: Vec<Duration>,
    /// The replacement: its queue pairs to everybody.
    pub joiner: Duration,
    /// From the first gate that closed to the last that opened.
    pub gate: Duration,
    /// Per survivor: how long its gate was closed.
    pub pause: Vec<Duration>,
    /// Queue pairs that one survivor made and destroyed.
    pub created: u64,
    /// See `created`.
    pub destroyed: u64,
    /// Bytes of one rank's offer to another.
    pub offer_bytes: usize,
}

/// What recreating all queue pairs of one rank took.
#[derive(Clone, Copy, Debug, Default)]
pub struct RecreateAll {
    /// From the first fence to the last activation.
    pub took: Duration,
    /// Queue pairs that it made.
    pub created: u64,
}

/// A group that loses ranks and takes them in again.
pub struct RejoinRig {
    rig: Rig,
    case: RejoinCase,
    iteration: u64,
}

impl RejoinRig {
    /// A connected group; making it takes no modelled time.
    ///
    /// # Errors
    /// `Config` for a case outside the limits of [`Config`], else what a part refused.
    pub fn new(case: RejoinCase) -> Result<Self, Error> {
        let config = Config {
            num_ranks: case.ranks,
            max_tokens: 4,
            hidden: 256,
            num_experts: case.ranks,
            max_topk: 2.min(case.ranks),
            dtype: WireDtype::Bf16,
            channels: Some(case.qps_per_peer),
            num_sms: 1,
            warps_per_block: 4,
            num_owner_warps: Some(2),
            route: RoutePolicy::Ibgda,
            sq_depth_log: 4,
            staging_rows: 2,
            // Hosts that share cores are slow, not dead.
            detect_ms: 60_000,
            ..Config::default()
        };
        Ok(Self { rig: Rig::new(&config, &WorldOptions::default())?, case, iteration: 0 })
    }

    /// Bytes of control memory that one rank holds: rings, completion queues, doorbell records.
    #[must_use]
    pub fn control_bytes(&self) -> u64 {
        let session = &self.rig.ranks()[0].session;
        session.control_report().live_bytes + session.host_bytes()
    }

    /// The limits that members of this group would agree by.
    #[must_use]
    pub fn membership(&self) -> MembershipConfig {
        MembershipConfig::new(self.rig.config(), RankSet::first(self.case.ranks))
    }

    /// One checked step of everybody; returns what was wrong or lost.
    ///
    /// # Errors
    /// As [`Rig::step`].
    pub fn step(&mut self) -> Result<u64, Error> {
        let config = self.rig.config();
        self.iteration += 1;
        let inputs: Vec<RankInput> = (0..config.num_ranks)
            .map(|rank| {
                // CAST: at most 512 ranks.
                let key = InputKey { seed: 1, iteration: self.iteration, rank: Rank(rank as u16) };
                RankInput::generate(config, Routing::Uniform, key, config.max_tokens)
            })
            .collect();
        let verdict = self.rig.step(&inputs, &StepPlan::default())?;
        Ok(verdict.wrong + verdict.lost)
    }

    fn session(&self, rank: Rank) -> &Arc<Session> {
        self.rig.world().session(rank)
    }

    fn set_latency(&self, latency: Duration) {
        let ns = u64::try_from(latency.as_nanos()).unwrap_or(u64::MAX);
        self.rig.world().devices().iter().for_each(|device| device.set_command_latency(Nanos(ns)));
    }

    /// Removes `rank`, recreates its pairs in place, and lets it in again at the gate.
    ///
    /// # Errors
    /// What a part refused.
    pub fn replace(&self, rank: Rank) -> Result<Rejoin, Error> {
        self.rig.world().remove_peers(&RankSet::from_iter([rank]))?;
        self.set_latency(self.case.command_latency);
        let done = self.recreate_pairs(rank);
        self.set_latency(Duration::ZERO);
        let mut rejoin = done?;
        self.pass_gate(rank, &mut rejoin)?;
        Ok(rejoin)
    }

    fn recreate_pairs(&self, rank: Rank) -> Result<Rejoin, Error> {
        let mut rejoin = Rejoin::default();
        let joiner = self.session(rank);
        let unknown = vec![[1; 2]; joiner.config().lanes as usize];
        for peer in self.peers_of(rank) {
            rejoin.joiner += timed(|| joiner.fence(peer))?.1;
        }
        let traced = &self.rig.world().devices()[self.peers_of(rank).next().map_or(0, Rank::index)];
        drop(traced.take_trace());
        for peer in self.peers_of(rank) {
            let survivor = self.session(peer);
            let mut own = timed(|| survivor.fence(rank))?.1;
            let (theirs, took) = timed(|| joiner.offer(peer, None))?;
            rejoin.joiner += took;
            rejoin.offer_bytes = theirs.to_bytes().len();
            let (ours, took) = timed(|| survivor.offer(rank, None))?;
            own += took + timed(|| survivor.connect(&theirs, &unknown))?.1;
            rejoin.joiner += timed(|| joiner.connect(&ours, &unknown))?.1;
            rejoin.recreate.push(own);
        }
        let trace = traced.take_trace();
        (rejoin.created, rejoin.destroyed) = (count(&trace, Op::CreateQp), count(&trace, Op::DestroyQp));
        Ok(rejoin)
    }

    /// Closes every gate, commits, opens: what members do when a replacement is ready.
    fn pass_gate(&self, rank: Rank, rejoin: &mut Rejoin) -> Result<(), Error> {
        let watch = Stopwatch::start();
        let survivors = || self.peers_of(rank).map(|peer| self.session(peer));
        let acks: Vec<_> = survivors().map(|session| session.close_gate(now_ns())).collect();
        let from_step = acks.iter().map(|ack| ack.step).max().unwrap_or(0);
        let from_seq = acks.into_iter().find_map(|ack| ack.next_seq);
        let from_seq = from_seq.ok_or(Stale { what: "step (open on every member)", found: 0, current: 1 })?;
        let joiner = self.session(rank);
        for peer in self.peers_of(rank) {
            self.session(peer).admit(rank, &from_seq)?;
            joiner.admit(peer, &from_seq)?;
        }
        let switch = Switch {
            epoch: joiner.epoch().next().next(),
            alive: RankSet::first(self.case.ranks),
            placement: joiner.placement(),
            from_step,
            from_seq,
        };
        joiner.start(&switch)?;
        for session in survivors() {
            session.commit(&switch)?;
            rejoin.pause.push(Duration::from_nanos(session.open_gate(now_ns())));
        }
        rejoin.gate = watch.elapsed();
        self.rig.world().note_members(switch.alive);
        Ok(())
    }

    /// Recreates every queue pair of `rank`, by the same calls; the ranks at the other ends do their part untimed.
    ///
    /// # Errors
    /// What a part refused.
    pub fn recreate_all(&self, rank: Rank) -> Result<RecreateAll, Error> {
        let one = self.session(rank);
        let next = one.next_seqs()?;
        for peer in self.peers_of(rank) {
            self.session(peer).fence(rank)?;
        }
        let offers: Vec<Offer> =
            self.peers_of(rank).map(|peer| self.session(peer).offer(rank, None)).collect::<Result<_, _>>()?;
        let device = &self.rig.world().devices()[rank.index()];
        drop(device.take_trace());
        self.set_latency(self.case.command_latency);
        let done = timed(|| {
            let mut made = Vec::new();
            for (peer, theirs) in self.peers_of(rank).zip(&offers) {
                one.fence(peer)?;
                made.push(one.offer(peer, None)?);
                one.connect(theirs, &next)?;
                one.activate(peer)?;
            }
            Ok(made)
        });
        self.set_latency(Duration::ZERO);
        let (made, took) = done?;
        for (peer, offer) in self.peers_of(rank).zip(&made) {
            self.session(peer).connect(offer, &next)?;
            self.session(peer).activate(rank)?;
        }
        Ok(RecreateAll { took, created: count(&device.take_trace(), Op::CreateQp) })
    }

    fn peers_of(&self, rank: Rank) -> impl Iterator<Item = Rank> + use<> {
        // CAST: at most 512 ranks.
        (0..self.case.ranks).map(|peer| Rank(peer as u16)).filter(move |peer| *peer != rank)
    }
}

fn timed<T>(call: impl FnOnce() -> Result<T, Error>) -> Result<(T, Duration), Error> {
    let watch = Stopwatch::start();
    let value = call()?;
    Ok((value, watch.elapsed()))
}

/// Commands of one kind that succeeded.
fn count(trace: &[CommandRecord], op: Op) -> u64 {
    trace.iter().filter(|record| record.op == Some(op) && record.status == Status::Ok).count() as u64
}
