//! How tokens choose experts: the distributions of published benchmarks.
//!
//! Owns the scratch of a router. Every distribution draws k different experts per token.

use std::fmt;
use std::str::FromStr;

use crate::config::{NUM_EXPERTS_MAX, ValidConfig};
use crate::error::{ConfigError, Limit, Value};
use crate::reference::rng::{Rng, exp};

/// Exponent of the Zipf distribution: P(i) proportional to (i + 1)^-alpha.
pub const ZIPF_ALPHA: f64 = 1.0;
/// k-hot: this share of tokens takes all its experts from the hot ones.
pub const KHOT_SHARE: f64 = 0.5;
/// Group-limited: groups of experts, and how many of them a token may use.
pub const NUM_GROUPS: u32 = 8;
/// See [`NUM_GROUPS`].
pub const NUM_GROUPS_TAKEN: u32 = 4;

/// How tokens choose experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Routing {
    /// A uniform subset of k experts.
    Uniform,
    /// k experts without replacement, expert i with probability proportional to 1 / (i + 1).
    Zipf,
    /// Half of the tokens take all k from the first k experts (incast); the rest are uniform.
    KHot,
    /// Sigmoid scores; the best 4 of 8 groups by the sum of their two best; then the best k.
    GroupLimited,
}

impl Routing {
    /// Every distribution.
    pub const ALL: &'static [Self] = &[Self::Uniform, Self::Zipf, Self::KHot, Self::GroupLimited];
    /// The accepted names, in the order of [`Self::ALL`].
    pub const NAMES: &'static [&'static str] = &["uniform", "zipf", "khot", "group-limited"];

    /// The name, as flags and reports spell it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Uniform => "uniform",
            Self::Zipf => "zipf",
            Self::KHot => "khot",
            Self::GroupLimited => "group-limited",
        }
    }

    /// Checks that the distribution exists for a shape.
    ///
    /// # Errors
    /// Group-limited routing needs experts in 8 equal groups, and k of them in 4 groups.
    pub fn validate(self, config: &ValidConfig) -> Result<(), ConfigError> {
        if self != Self::GroupLimited {
            return Ok(());
        }
        let (experts, topk) = (config.num_experts, config.max_topk);
        if !experts.is_multiple_of(NUM_GROUPS) {
            let limit = Limit::MultipleOf { step: NUM_GROUPS.into(), max: NUM_EXPERTS_MAX.into() };
            return Err(ConfigError { field: "num_experts", value: experts.into(), limit });
        }
        let reachable = experts / NUM_GROUPS * NUM_GROUPS_TAKEN;
        if topk > reachable {
            let limit = Limit::AtMostField { field: "experts in 4 of 8 groups", max: reachable.into() };
            return Err(ConfigError { field: "max_topk", value: topk.into(), limit });
        }
        Ok(())
    }
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Routing {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        Self::ALL.iter().copied().find(|routing| routing.name() == text).ok_or(ConfigError {
            field: "routing",
            value: Value::Name("an unknown name"),
            limit: Limit::OneOf(Self::NAMES),
        })
    }
}

/// Chooses experts and weights token by token.
pub(super) struct Router {
    num_experts: usize,
    num_topk: usize,
    routing: Routing,
    /// k-hot: which tokens are hot.
    hot: Vec<bool>,
    /// Scratch: experts in some order, and their scores.
    order: Vec<i32>,
    scores: Vec<f64>,
}

impl Router {
    pub(super) fn new(
        num_experts: u32,
        num_topk: usize,
        routing: Routing,
        num_tokens: u32,
        rng: &mut Rng,
    ) -> Self {
        // CAST: a share of a u32, rounded down.
        let num_hot = (f64::from(num_tokens) * KHOT_SHARE) as u32;
        let mut hot: Vec<bool> = (0..num_tokens).map(|token| token < num_hot).collect();
        rng.shuffle(&mut hot);
        // CAST: at most 65 535 experts.
        let order = (0..num_experts as i32).collect();
        let scores = vec![0.0; num_experts as usize];
        Self { num_experts: num_experts as usize, num_topk, routing, hot, order, scores }
    }

    /// Appends the picks and weights of one token.
    pub(super) fn route(&mut self, token: u32, rng: &mut Rng, picks: &mut Vec<i32>, weights: &mut Vec<f32>) {
        match self.routing {
            Routing::KHot if self.hot[token as usize] => self.subset(rng, self.num_topk, picks),
            Routing::Uniform | Routing::KHot => self.subset(rng, self.num_experts, picks),
            Routing::Zipf => self.zipf(rng, picks),
            Routing::GroupLimited => {
                self.group_limited(rng, picks);
                let chosen = &picks[picks.len() - self.num_topk..];
                // CAST: picks are indices of scores.
                let gates = chosen.iter().map(|&expert| self.scores[expert as usize]).collect();
                append_normalised(gates, weights);
                return;
            }
        }
        append_normalised((0..self.num_topk).map(|_| exp(rng.unit())).collect(), weights);
    }

    /// A uniform k-subset of the first `among` experts, in random order.
    fn subset(&mut self, rng: &mut Rng, among: usize, picks: &mut Vec<i32>) {
        // Starting over keeps the first `among` entries the first `among` experts.
        reset(&mut self.order);
        for k in 0..self.num_topk {
            // CAST: indices of experts.
            let other = k + rng.below((among - k) as u64) as usize;
            self.order.swap(k, other);
        }
        picks.extend_from_slice(&self.order[..self.num_topk]);
    }

    /// k draws without replacement, the next one always proportional to what is left.
    fn zipf(&mut self, rng: &mut Rng, picks: &mut Vec<i32>) {
        for (i, score) in self.scores.iter_mut().enumerate() {
            *score = 1.0 / (i + 1) as f64;
        }
        for _ in 0..self.num_topk {
            let mut left = rng.unit() * self.scores.iter().sum::<f64>();
            let remaining = (0..self.num_experts).filter(|&expert| self.scores[expert] > 0.0);
            let mut chosen = None;
            for expert in remaining {
                chosen = Some(expert);
                left -= self.scores[expert];
                if left < 0.0 {
                    break;
                }
            }
            let chosen = chosen.expect("max_topk is at most num_experts");
            self.scores[chosen] = 0.0;
            // CAST: at most 65 535 experts.
            picks.push(chosen as i32);
        }
    }

    /// The gate of DeepSeek-V3 on sigmoid scores of normal logits; scores are left in `self.scores`.
    fn group_limited(&mut self, rng: &mut Rng, picks: &mut Vec<i32>) {
        for score in &mut self.scores {
            *score = 1.0 / (1.0 + exp(-rng.normal()));
        }
        let group_len = self.num_experts / NUM_GROUPS as usize;
        let two_best = |group: &[f64]| {
            let mut sorted = group.to_vec();
            sorted.sort_by(|a, b| b.total_cmp(a));
            sorted.iter().take(2).sum::<f64>()
        };
        let mut groups: Vec<(f64, usize)> = self.scores.chunks(group_len).map(two_best).zip(0..).collect();
        groups.sort_by(|a, b| b.0.total_cmp(&a.0));
        let taken = groups.iter().take(NUM_GROUPS_TAKEN as usize);
        let mut reachable: Vec<usize> =
            taken.flat_map(|&(_, group)| group * group_len..(group + 1) * group_len).collect();
        reachable.sort_by(|&a, &b| self.scores[b].total_cmp(&self.scores[a]));
        // CAST: at most 65 535 experts.
        picks.extend(reachable[..self.num_topk].iter().map(|&expert| expert as i32));
    }
}

fn reset(order: &mut [i32]) {
    for (expert, entry) in (0..).zip(order) {
        *entry = expert;
    }
}

/// Appends positive numbers divided by their sum.
fn append_normalised(numbers: Vec<f64>, weights: &mut Vec<f32>) {
    let sum: f64 = numbers.iter().sum();
    // CAST: weights are fp32.
    weights.extend(numbers.iter().map(|number| (number / sum) as f32));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference::inputs::RankInput;
    use crate::reference::inputs::tests::{config, key};

    #[test]
    fn picks_are_distinct_experts_and_weights_sum_to_one() {
        for (num_experts, topk) in [(256, 8), (64, 32), (16, 8), (8, 1)] {
            let config = config(num_experts, topk);
            for &routing in Routing::ALL {
                let input = RankInput::generate(&config, routing, key(0, 0), 128);
                for token in 0..128 {
                    let mut picks: Vec<_> = input.picks(token).iter().filter(|&&e| e >= 0).collect();
                    let num_picks = picks.len();
                    picks.sort();
                    picks.dedup();
                    assert_eq!(picks.len(), num_picks, "{routing}: a duplicate");
                    assert!(picks.iter().all(|&&e| e < num_experts as i32));
                    let sum: f32 = input.weights(token).iter().sum();
                    assert!((sum - 1.0).abs() < 1e-5 && input.weights(token).iter().all(|&w| w > 0.0));
                }
            }
        }
    }

    /// Picks per expert over many tokens.
    fn histogram(routing: Routing, num_experts: u32, topk: u32) -> Vec<u32> {
        let config = config(num_experts, topk);
        let mut counts = vec![0; num_experts as usize];
        for i in 0..50 {
            let input = RankInput::generate(&config, routing, key(i, 1), 128);
            for &expert in input.topk_idx.iter().filter(|&&expert| expert >= 0) {
                counts[expert as usize] += 1;
            }
        }
        counts
    }

    #[test]
    fn distributions_have_their_shape() {
        let uniform = histogram(Routing::Uniform, 64, 4);
        assert!(uniform.iter().all(|&count| (320..480).contains(&count)), "{uniform:?}");
        let zipf = histogram(Routing::Zipf, 64, 1);
        let ratio = f64::from(zipf[0]) / f64::from(zipf[3]);
        assert!((3.0..5.5).contains(&ratio), "P(0) is four times P(3): {ratio}");
        let khot = histogram(Routing::KHot, 64, 4);
        let hot: u32 = khot[..4].iter().sum();
        let share = f64::from(hot) / f64::from(khot.iter().sum::<u32>());
        assert!((0.5..0.57).contains(&share), "half, and 4 of 64 of the other half: {share}");
    }

    #[test]
    fn group_limited_uses_four_groups() {
        let config = config(64, 8);
        let input = RankInput::generate(&config, Routing::GroupLimited, key(0, 0), 128);
        for token in 0..128 {
            let mut groups: Vec<i32> =
                input.picks(token).iter().filter(|&&e| e >= 0).map(|e| e / 8).collect();
            groups.sort_unstable();
            groups.dedup();
            assert!(groups.len() <= 4, "{groups:?}");
        }
    }

    #[test]
    fn group_limited_refuses_what_its_groups_cannot_hold() {
        let error = Routing::GroupLimited.validate(&config(60, 8)).unwrap_err();
        assert_eq!((error.field, error.value), ("num_experts", 60u32.into()));
        let error = Routing::GroupLimited.validate(&config(16, 9)).unwrap_err();
        assert_eq!((error.field, error.value), ("max_topk", 9u32.into()));
        assert_eq!(Routing::Uniform.validate(&config(60, 8)), Ok(()));
    }
}
