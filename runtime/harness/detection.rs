//! How long survivors take to notice that a rank is gone, while a step waits for it.
//!
//! A [`DetectionRig`] owns a world of three ranks whose devices and kernels share the cores of this machine. A time
//! begins when the fault is done, and ends when the last survivor's kernels have masked the lost rank, as read from the
//! word that they set; the fault record of each survivor must say why. Both are read while the kernels run.

use core::time::Duration;

use ibex_abi::cqe::Syndrome;
use ibex_hca::Nanos;
use ibex_hca::emulated::PathState;

use super::{Rig, RigRank, StepPlan};
use crate::config::{Config, RoutePolicy, WireDtype};
use crate::error::Error;
use crate::ids::Rank;
use crate::reference::inputs::RankInput;
use crate::reference::rng::InputKey;
use crate::reference::routing::Routing;
use crate::session::{Replacement, WorldOptions};
use crate::telemetry::{Fault, FaultKind};
use crate::time::{Deadline, Stopwatch, sleep};

/// Whom the others lose.
const LOST: Rank = Rank(2);
const NUM_RANKS: u32 = 3;
/// A step that has not noticed by then never will.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks at the survivors' words.
const LOOK: Duration = Duration::from_micros(50);
/// By then kernels of a step that was launched wait for the lost rank.
const UNDER_WAY: Duration = Duration::from_millis(5);
/// What a device says of a peer that answers no more.
const SYNDROME: Syndrome = Syndrome::TRANSPORT_RETRY_EXC;

/// One rank lost.
#[derive(Clone, Debug)]
pub struct Detection {
    /// From the fault until the last survivor had masked the lost rank; none if one of them never did.
    pub took: Option<Duration>,
    /// The survivors' records of it.
    pub faults: Vec<Fault>,
}

impl Detection {
    /// Whether every survivor noticed, by a record of this kind.
    #[must_use]
    pub fn is_by(&self, kind: FaultKind) -> bool {
        let survivors = NUM_RANKS as usize - 1;
        let is_it = |fault: &Fault| fault.peer == LOST && fault.kind == kind;
        self.took.is_some() && self.faults.len() == survivors && self.faults.iter().all(is_it)
    }

    /// Whether every record has the syndrome of a completion: that of the first, or of those flushed behind it.
    #[must_use]
    pub fn has_syndrome(&self) -> bool {
        self.faults.iter().all(|fault| [SYNDROME, Syndrome::WR_FLUSH].map(|s| s.0).contains(&fault.syndrome))
    }
}

/// A group that loses a rank and takes it in again. See the module documentation.
pub struct DetectionRig {
    rig: Rig,
    iteration: u64,
}

impl DetectionRig {
    /// A connected group.
    ///
    /// # Errors
    /// `Config` for a `detect_ms` outside its limits, else what a part refused.
    pub fn new(detect_ms: u32) -> Result<Self, Error> {
        let config = Config {
            num_ranks: NUM_RANKS,
            max_tokens: 8,
            hidden: 256,
            num_experts: 6,
            max_topk: 2,
            dtype: WireDtype::Bf16,
            num_sms: 1,
            warps_per_block: 4,
            num_owner_warps: Some(1),
            sq_depth_log: 6,
            route: RoutePolicy::Ibgda,
            detect_ms,
            ..Config::default()
        };
        Ok(Self { rig: Rig::new(&config, &WorldOptions::default())?, iteration: 0 })
    }

    /// The lost rank's host falls silent, `into` its pause between two signs of life, and nothing reaches it or comes
    /// from it, while the others wait for its part of a step.
    ///
    /// # Errors
    /// What a part refused.
    pub fn silence(&mut self, into: Duration) -> Result<Detection, Error> {
        self.launch()?;
        sleep(UNDER_WAY + into);
        let watch = Stopwatch::start();
        self.rig.world().set_silent(LOST, true);
        self.cut(PathState::Cut);
        let detection = self.notice(watch)?;
        self.cut(PathState::Up);
        self.rig.world().set_silent(LOST, false);
        self.heal()?;
        Ok(detection)
    }

    /// A queue pair of each survivor to the lost rank completes in error, while they wait for its part of a step. What
    /// they have sent by then is not answered, so that there is something to complete.
    ///
    /// # Errors
    /// What a part refused.
    pub fn failure(&mut self, into: Duration) -> Result<Detection, Error> {
        self.cut_off(PathState::Cut);
        self.launch()?;
        sleep(UNDER_WAY + into);
        let world = self.rig.world();
        let watch = Stopwatch::start();
        for survivor in self.survivors() {
            for qpn in survivor.session.queue_pairs(LOST).into_iter().take(1) {
                let now = Nanos(world.pool().now_ns());
                world.devices()[survivor.rank().index()].set_qp_error(qpn, SYNDROME, now);
            }
        }
        let detection = self.notice(watch)?;
        self.cut_off(PathState::Up);
        self.heal()?;
        Ok(detection)
    }

    fn survivors(&self) -> impl Iterator<Item = &RigRank> {
        self.rig.ranks().iter().filter(|rank| rank.rank() != LOST)
    }

    /// Both survivors begin a step; the lost rank never does.
    fn launch(&mut self) -> Result<(), Error> {
        let (config, plan) = (self.rig.config(), StepPlan::default());
        self.iteration += 1;
        let input = |rank: u32| {
            // CAST: three ranks.
            let key = InputKey { seed: 1, iteration: self.iteration, rank: Rank(rank as u16) };
            RankInput::generate(config, Routing::Uniform, key, config.max_tokens)
        };
        let inputs: Vec<RankInput> = (0..NUM_RANKS).map(input).collect();
        self.rig.load(&inputs, &plan)?;
        self.survivors().try_for_each(|rank| rank.launch(config.max_topk, &plan))
    }

    /// The way to the lost rank.
    fn cut_off(&self, state: PathState) {
        self.survivors().for_each(|survivor| self.rig.world().set_path(survivor.rank(), LOST, state));
    }

    /// Both ways.
    fn cut(&self, state: PathState) {
        self.cut_off(state);
        self.survivors().for_each(|survivor| self.rig.world().set_path(LOST, survivor.rank(), state));
    }

    /// Looks until every survivor has masked the lost rank, and at what its kernels have recorded of it, while they
    /// run. Then fences that rank, as a host does once its group has agreed: combines wait for what they have sent.
    fn notice(&self, watch: Stopwatch) -> Result<Detection, Error> {
        let deadline = Deadline::after(PATIENCE);
        let mut detection = Detection { took: None, faults: Vec::new() };
        let mut waiting: Vec<&RigRank> = self.survivors().collect();
        while !waiting.is_empty() && !deadline.has_passed() {
            let mut left = Vec::new();
            for rank in waiting {
                match rank.session.suspected()?.contains(&LOST) {
                    true => detection.took = Some(watch.elapsed()),
                    false => left.push(rank),
                }
            }
            waiting = left;
            sleep(LOOK);
        }
        if !waiting.is_empty() {
            detection.took = None;
        }
        for rank in self.survivors() {
            let mut faults = rank.session.faults()?;
            // The warp that masks and the warp that writes the record may be two.
            while faults.is_empty() && !deadline.has_passed() {
                sleep(LOOK);
                faults = rank.session.faults()?;
            }
            detection.faults.extend(faults);
        }
        self.survivors().try_for_each(|rank| rank.session.mask(LOST))?;
        self.survivors().try_for_each(|rank| rank.session.fence(LOST))?;
        for rank in self.survivors() {
            rank.session.gpu().synchronize(&rank.stream)?;
        }
        Ok(detection)
    }

    fn heal(&self) -> Result<(), Error> {
        self.rig.world().replace_peer(LOST, Replacement::default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn silence_and_failure_are_noticed_as_such_again_and_again() {
        // Far more than a busy machine needs between two signs of life; the failure does not wait for it.
        let mut rig = DetectionRig::new(1_000).unwrap();
        for round in 0..2 {
            let failure = rig.failure(Duration::ZERO).unwrap();
            assert!(failure.is_by(FaultKind::Completion) && failure.has_syndrome(), "{round}: {failure:?}");
            let silence = rig.silence(Duration::ZERO).unwrap();
            assert!(silence.is_by(FaultKind::Silent), "{round}: {silence:?}");
            assert!(!silence.is_by(FaultKind::Completion));
        }
    }
}
