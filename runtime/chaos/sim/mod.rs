//! A campaign of one seed in simulation: processes, store and network on one thread, in virtual time.
//!
//! [`run`] owns everything while it runs and leaves nothing behind. The same plan gives the same run, decision for
//! decision; [`Outcome::schedule_hash`] proves it.

mod agents;
mod changes;
mod group;
mod inject;
mod node;
mod shape;
mod store;
mod watch;

use std::sync::Arc;

use ibex_abi::types::PathMtu;
use ibex_hca::emulated::switch::FaultPlan;
use ibex_hca::emulated::{Fabric, FabricConfig};

use super::app::{Sets, Style};
use super::draws::Draws;
use super::fault::FaultKind;
use super::plan::Plan;
use super::report::Report;
use super::timeline::Timeline;
use crate::error::{ConfigError, Error};
use crate::gpu::GpuError;
use crate::gpu::pool::{Pool, PoolConfig, PoolError, Progress};
use crate::membership::{MembershipGuard, RankSet};
use crate::session::Guard;

use agents::Agents;
use group::Group;
use node::Ground;
use store::SimStore;

/// Takes a guard of the protocol away, so that a test can prove that it would be missed.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unguarded {
    /// A guard of the session and its kernels.
    pub guard: Option<Guard>,
    /// A rule of membership.
    pub membership: Option<MembershipGuard>,
    /// Hosts send no sign of life.
    pub is_mute: bool,
}

/// What became of one plan.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The findings, counts and times.
    pub report: Report,
    /// What happened when.
    pub timeline: Timeline,
    /// What is wrong, in words; empty after a good run.
    pub flaws: Vec<String>,
    /// A hash over every decision of the schedule.
    pub schedule_hash: u64,
    /// Virtual time that passed.
    pub virtual_ns: u64,
}

impl Outcome {
    /// Whether nothing was found.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.report.is_good() && self.flaws.is_empty()
    }
}

/// Runs a plan.
///
/// # Errors
/// What a part refused that no fault explains.
pub fn run(plan: &Plan) -> Result<Outcome, Error> {
    run_without(plan, Unguarded::default())
}

/// Refuses a plan whose group cannot be.
///
/// # Errors
/// The field, its value and its limit.
pub fn check(plan: &Plan) -> Result<(), ConfigError> {
    shape::shape(plan).map(|_| ())
}

/// [`run`] without some guard.
///
/// # Errors
/// As [`run`].
#[doc(hidden)]
pub fn run_without(plan: &Plan, unguarded: Unguarded) -> Result<Outcome, Error> {
    let shape = shape::shape(plan)?;
    let mut draws = Draws::new(plan.seed, 9);
    let fabric_config = FabricConfig {
        seed: plan.seed,
        placement: shape.placement,
        mtu: draws.pick(&[PathMtu::B256, PathMtu::B1024, PathMtu::B4096]),
    };
    let fabric = match plan.packets {
        true => Fabric::switched(fabric_config, FaultPlan::default())?,
        false => Fabric::inproc(fabric_config),
    };
    let detect_ns = u64::from(shape.config.detect_ms) * 1_000_000;
    let agents = Arc::new(Agents::new(detect_ns / 4, !unguarded.is_mute));
    let progress: Arc<dyn Progress> = Arc::clone(&agents) as _;
    let pool =
        Pool::new(PoolConfig::simulation(plan.seed).with_progress(progress)).map_err(GpuError::from)?;
    let pool = Arc::new(pool);
    agents.set_pool(&pool);
    let lease_ttl_ns = u64::from(shape.config.lease_ttl_ms()) * 1_000_000;
    let ground = Ground {
        store: SimStore::new(plan.seed, lease_ttl_ns),
        hosts: Arc::default(),
        num_hosts: plan.hosts,
        config: shape.config,
        pool: Arc::clone(&pool),
        fabric,
        unguarded,
        initial: RankSet::first(plan.initial()),
        sets: Sets { lanes: plan.lanes, per_lane: plan.per_lane },
        style: style_for(plan, &mut draws),
    };
    let mut group = Group::new(plan, ground, agents)?;
    let ended = pool.simulate(&mut || group.turn());
    close(&pool, group, ended)
}

/// Kinds that strike in one stage of a step need steps that have it.
fn style_for(plan: &Plan, draws: &mut Draws) -> Option<Style> {
    plan.faults.iter().find_map(|fault| match fault.kind {
        FaultKind::KillInReplay => Some(Style::Graph),
        FaultKind::KillBetween => Some(draws.pick(&[Style::Apart, Style::Halves])),
        FaultKind::KillInDispatch => Some(draws.pick(&[Style::Whole, Style::Apart, Style::Halves])),
        _ => None,
    })
}

/// Judges what is left when nothing moves any more.
fn close(pool: &Arc<Pool>, mut group: Group, ended: Result<(), PoolError>) -> Result<Outcome, Error> {
    if let Some(error) = group.take_failure() {
        return Err(error);
    }
    let now_ns = pool.now_ns();
    if let Err(error) = ended {
        group.watch.report.findings.hangs += 1;
        group.watch.flaw(now_ns, error.to_string());
    }
    group.close()?;
    let (watch, schedule_hash) = (group.watch, pool.stats().schedule_hash);
    let (report, timeline, flaws) = (watch.report, watch.timeline, watch.flaws);
    Ok(Outcome { report, timeline, flaws, schedule_hash, virtual_ns: now_ns })
}
