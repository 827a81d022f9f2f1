//! What every rank dispatches in every step, drawn when somebody needs it first.
//!
//! Inputs are a function of (seed, step, set, rank), so that every rank's outputs can be checked whoever has died.

use std::collections::BTreeMap;
use std::sync::Arc;

use crate::chaos::draws::Draws;
use crate::config::ValidConfig;
use crate::ids::Rank;
use crate::reference::check::CastRows;
use crate::reference::inputs::{InputKey, RankInput};
use crate::reference::routing::Routing;

/// How long ranks think at most while nothing is being repaired.
pub(super) const THINK_NS_MAX: u64 = 3_000_000;
/// Steps whose inputs are kept.
const INPUTS_KEPT: u64 = 8;

/// The inputs of all ranks in one dispatch.
pub(super) struct StepInputs {
    pub(super) by_rank: Vec<RankInput>,
    /// The same as they travel: cast once for all ranks that judge.
    pub(super) cast: CastRows,
}

/// Inputs by step and set; and how long ranks think.
pub(super) struct Inputs {
    /// Longest time that a rank computes between two launches.
    pub(super) think_ns_max: u64,
    seed: u64,
    config: ValidConfig,
    by_step: BTreeMap<(u64, usize), Arc<StepInputs>>,
}

impl Inputs {
    pub(super) fn new(seed: u64, config: &ValidConfig) -> Self {
        Self { think_ns_max: THINK_NS_MAX, seed, config: config.clone(), by_step: BTreeMap::new() }
    }

    pub(super) fn of(&mut self, step: u64, set: usize) -> Arc<StepInputs> {
        self.by_step = self.by_step.split_off(&(step.saturating_sub(INPUTS_KEPT), 0));
        let (config, seed) = (&self.config, self.seed ^ (set as u64) << 40);
        let draw = |rank: u16| {
            let key = InputKey { seed, iteration: step, rank: Rank(rank) };
            let spread = Draws::new(seed ^ step << 8, 100 + u64::from(rank)).below(4) as u32;
            // 0 tokens are as valid as all of them.
            let tokens = if spread == 3 { config.max_tokens / 3 } else { config.max_tokens };
            RankInput::generate(config, Routing::Uniform, key, tokens)
        };
        let all = || {
            // CAST: at most 512 ranks.
            let by_rank: Vec<RankInput> = (0..config.num_ranks as u16).map(draw).collect();
            let cast = CastRows::new(config, &by_rank);
            Arc::new(StepInputs { by_rank, cast })
        };
        Arc::clone(self.by_step.entry((step, set)).or_insert_with(all))
    }
}
