//! Inputs of a step as a pure function of (seed, iteration, rank): activations, routes, weights.
//!
//! Owns the vectors of [`RankInput`]. The distributions are those of published benchmarks; 1 % of all
//! picks are masked (-1), and some blocks hold what arithmetic finds hard: NaN, infinities, denormals,
//! zeros, the boundary of e4m3.
//!
//! INVARIANT: two ranks that draw for the same key get the same bytes; different keys share no stream.

use std::fmt;
use std::str::FromStr;

use crate::config::{NUM_EXPERTS_MAX, SCALE_BLOCK, ValidConfig};
use crate::error::{ConfigError, Limit, Value};
use crate::ids::Rank;

/// Share of picks that the generator masks with -1.
pub const MASKED_SHARE: f64 = 0.01;
/// Exponent of the Zipf distribution: P(i) proportional to (i + 1)^-alpha.
pub const ZIPF_ALPHA: f64 = 1.0;
/// k-hot: this share of tokens takes all its experts from the hot ones.
pub const KHOT_SHARE: f64 = 0.5;
/// Group-limited: groups of experts, and how many of them a token may use.
pub const NUM_GROUPS: u32 = 8;
/// See [`NUM_GROUPS`].
pub const NUM_GROUPS_TAKEN: u32 = 4;
/// One block of channels in this many is an edge case.
const EDGE_BLOCK_ONE_IN: u64 = 64;

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
            let limit = Limit::MultipleOf {
                step: NUM_GROUPS.into(),
                max: NUM_EXPERTS_MAX.into(),
            };
            return Err(ConfigError {
                field: "num_experts",
                value: experts.into(),
                limit,
            });
        }
        let reachable = experts / NUM_GROUPS * NUM_GROUPS_TAKEN;
        if topk > reachable {
            let limit = Limit::AtMostField {
                field: "experts in 4 of 8 groups",
                max: reachable.into(),
            };
            return Err(ConfigError {
                field: "max_topk",
                value: topk.into(),
                limit,
            });
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
        Self::ALL
            .iter()
            .copied()
            .find(|routing| routing.name() == text)
            .ok_or(ConfigError {
                field: "routing",
                value: Value::Name("an unknown name"),
                limit: Limit::OneOf(Self::NAMES),
            })
    }
}

/// What one rank is given in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RankInput {
    /// Tokens of this step.
    pub num_tokens: u32,
    /// Picks per token.
    pub num_topk: u32,
    /// `[num_tokens][hidden]` bf16.
    pub x: Vec<u16>,
    /// `[num_tokens][num_topk]`, -1 = masked.
    pub topk_idx: Vec<i32>,
    /// `[num_tokens][num_topk]`.
    pub topk_weights: Vec<f32>,
}

/// Names one input.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InputKey {
    /// Seed of the run.
    pub seed: u64,
    /// Step of the run, warm-up included.
    pub iteration: u64,
    /// The rank it is for.
    pub rank: Rank,
}

/// Independent streams of one key.
#[derive(Clone, Copy)]
enum Stream {
    Activations = 1,
    Routes = 2,
    Masks = 3,
}

impl RankInput {
    /// Draws the input of one rank and step, with `max_topk` picks per token.
    ///
    /// # Panics
    /// PANIC: more tokens than `max_tokens`, or a routing that [`Routing::validate`] refuses.
    #[must_use]
    pub fn generate(
        config: &ValidConfig,
        routing: Routing,
        key: InputKey,
        num_tokens: u32,
    ) -> Self {
        assert!(
            num_tokens <= config.max_tokens,
            "{num_tokens} tokens do not fit"
        );
        routing
            .validate(config)
            .expect("the caller validated the routing");
        let num_topk = config.max_topk;
        let mut input = Self {
            num_tokens,
            num_topk,
            ..Self::default()
        };
        input.x = activations(
            &mut Rng::new(key, Stream::Activations),
            num_tokens,
            config.hidden,
        );
        let mut rng = Rng::new(key, Stream::Routes);
        let mut router = Router::new(
            config.num_experts,
            num_topk as usize,
            routing,
            num_tokens,
            &mut rng,
        );
        for token in 0..num_tokens {
            router.route(
                token,
                &mut rng,
                &mut input.topk_idx,
                &mut input.topk_weights,
            );
        }
        let mut masks = Rng::new(key, Stream::Masks);
        for pick in &mut input.topk_idx {
            if masks.unit() < MASKED_SHARE {
                *pick = -1;
            }
        }
        input
    }

    /// The row of one token.
    #[must_use]
    pub fn row(&self, token: u32) -> &[u16] {
        let hidden = self.x.len() / (self.num_tokens as usize).max(1);
        &self.x[token as usize * hidden..][..hidden]
    }

    /// The picks of one token.
    #[must_use]
    pub fn picks(&self, token: u32) -> &[i32] {
        &self.topk_idx[token as usize * self.num_topk as usize..][..self.num_topk as usize]
    }

    /// The weights of one token.
    #[must_use]
    pub fn weights(&self, token: u32) -> &[f32] {
        &self.topk_weights[token as usize * self.num_topk as usize..][..self.num_topk as usize]
    }
}

/// Rows of random values, with edge blocks among them.
fn activations(rng: &mut Rng, num_tokens: u32, hidden: u32) -> Vec<u16> {
    let mut x = Vec::with_capacity(num_tokens as usize * hidden as usize);
    for _ in 0..num_tokens {
        let mut left = hidden;
        while left > 0 {
            let len = left.min(SCALE_BLOCK);
            left -= len;
            let start = x.len();
            plain_block(rng, len, &mut x);
            if rng.below(EDGE_BLOCK_ONE_IN) == 0 {
                make_edge_block(rng.below(6), &mut x[start..]);
            }
        }
    }
    x
}

/// Appends random values, four from each draw: this is the hot loop of a checked run.
fn plain_block(rng: &mut Rng, len: u32, x: &mut Vec<u16>) {
    let end = x.len() + len as usize;
    while x.len() < end {
        let draw = rng.next();
        // CAST: the four 16-bit parts of the draw.
        let values =
            [draw, draw >> 16, draw >> 32, draw >> 48].map(|part| plain_value(part as u16));
        x.extend_from_slice(&values[..values.len().min(end - x.len())]);
    }
}

/// A bf16 in (-2, 2) with a random sign and mantissa; small exponents, down to 2^-15, are rarer.
fn plain_value(draw: u16) -> u16 {
    let exponent = 127 - ((draw >> 8) & 0xf).min(draw >> 12);
    (draw & 0x80) << 8 | exponent << 7 | (draw & 0x7f)
}

/// Turns a block into one of the six that the cast finds hard.
fn make_edge_block(kind: u64, block: &mut [u16]) {
    const SIGN: u16 = 0x8000;
    const MANTISSA: u16 = 0x007f;
    const INFINITY: u16 = 0x7f80;
    /// +-448, the numbers around the tie to the next code, and both zeros.
    const BOUNDARY: [u16; 6] = [0x43e0, 0xc3e0, 0x43e8, 0x43e7, 0x0000, 0x8000];
    for (i, value) in block.iter_mut().enumerate() {
        match kind {
            0 => *value = 0,
            1 => *value &= SIGN | MANTISSA, // Denormals.
            2 => *value = BOUNDARY[i % BOUNDARY.len()],
            3 if i % 17 == 3 => *value |= INFINITY | 1, // NaN of both signs among numbers.
            4 if i % 19 == 5 => *value = *value & SIGN | INFINITY,
            5 => *value = *value & !INFINITY | 0x7f00, // The largest finite exponent.
            _ => {}
        }
    }
}

/// Chooses experts and weights token by token.
struct Router {
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
    fn new(
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
        Self {
            num_experts: num_experts as usize,
            num_topk,
            routing,
            hot,
            order,
            scores,
        }
    }

    /// Appends the picks and weights of one token.
    fn route(&mut self, token: u32, rng: &mut Rng, picks: &mut Vec<i32>, weights: &mut Vec<f32>) {
        match self.routing {
            Routing::KHot if self.hot[token as usize] => self.subset(rng, self.num_topk, picks),
            Routing::Uniform | Routing::KHot => self.subset(rng, self.num_experts, picks),
            Routing::Zipf => self.zipf(rng, picks),
            Routing::GroupLimited => {
                self.group_limited(rng, picks);
                let chosen = &picks[picks.len() - self.num_topk..];
                // CAST: picks are indices of scores.
                let gates = chosen
                    .iter()
                    .map(|&expert| self.scores[expert as usize])
                    .collect();
                append_normalised(gates, weights);
                return;
            }
        }
        append_normalised(
            (0..self.num_topk).map(|_| exp(rng.unit())).collect(),
            weights,
        );
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
        let mut groups: Vec<(f64, usize)> = self
            .scores
            .chunks(group_len)
            .map(two_best)
            .zip(0..)
            .collect();
        groups.sort_by(|a, b| b.0.total_cmp(&a.0));
        let taken = groups.iter().take(NUM_GROUPS_TAKEN as usize);
        let mut reachable: Vec<usize> = taken
            .flat_map(|&(_, group)| group * group_len..(group + 1) * group_len)
            .collect();
        reachable.sort_by(|&a, &b| self.scores[b].total_cmp(&self.scores[a]));
        // CAST: at most 65 535 experts.
        picks.extend(
            reachable[..self.num_topk]
                .iter()
                .map(|&expert| expert as i32),
        );
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

/// e^x for |x| <= 8 without the system's libm, whose last bit differs between machines.
fn exp(x: f64) -> f64 {
    let small = x / 16.0;
    let series = (1..16)
        .rev()
        .fold(1.0, |tail, n| 1.0 + tail * small / f64::from(n));
    (0..4).fold(series, |power, _| power * power)
}

/// xoshiro256++, seeded through splitmix64.
struct Rng([u64; 4]);

impl Rng {
    fn new(key: InputKey, stream: Stream) -> Self {
        let mut state = 0;
        for part in [
            key.seed,
            key.iteration,
            u64::from(key.rank.0),
            stream as u64,
        ] {
            state = splitmix(state ^ part);
        }
        let mut words = [0; 4];
        for word in &mut words {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            *word = splitmix(state);
        }
        Self(words)
    }

    fn next(&mut self) -> u64 {
        let [a, b, c, d] = &mut self.0;
        let result = a.wrapping_add(*d).rotate_left(23).wrapping_add(*a);
        let shifted = *b << 17;
        *c ^= *a;
        *d ^= *b;
        *b ^= *c;
        *a ^= *d;
        *c ^= shifted;
        *d = d.rotate_left(45);
        result
    }

    /// Uniform in [0, 1), all 53 bits.
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n; the bias of 2^-64 x n is below what any run can see.
    fn below(&mut self, n: u64) -> u64 {
        // CAST: the high half of the product.
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// Nearly normal: the sum of twelve uniforms, centred.
    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            // CAST: an index.
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

fn splitmix(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, WireDtype};
    use crate::reference::numerics::bf16_to_f32;

    fn config(num_experts: u32, max_topk: u32) -> ValidConfig {
        let dtype = WireDtype::Bf16;
        let shape = Config {
            hidden: 512,
            num_experts,
            max_topk,
            dtype,
            ..Config::default()
        };
        shape.validate().unwrap()
    }

    fn key(iteration: u64, rank: u16) -> InputKey {
        InputKey {
            seed: 1,
            iteration,
            rank: Rank(rank),
        }
    }

    #[test]
    fn an_input_is_a_pure_function_of_its_key() {
        let config = config(64, 8);
        for &routing in Routing::ALL {
            let draw = |key| RankInput::generate(&config, routing, key, 16);
            let same = draw(key(3, 2));
            assert_eq!(same.topk_idx, draw(key(3, 2)).topk_idx);
            assert!(same.x == draw(key(3, 2)).x);
            for other in [
                key(4, 2),
                key(3, 1),
                InputKey {
                    seed: 2,
                    ..key(3, 2)
                },
            ] {
                let other = draw(other);
                assert_ne!(same.topk_idx, other.topk_idx);
                assert_ne!(same.topk_weights, other.topk_weights);
                assert!(same.x != other.x);
            }
        }
    }

    #[test]
    fn picks_are_distinct_experts_and_weights_sum_to_one() {
        for (num_experts, topk) in [(256, 8), (64, 32), (16, 8), (8, 1)] {
            let config = config(num_experts, topk);
            for &routing in Routing::ALL {
                let input = RankInput::generate(&config, routing, key(0, 0), 128);
                for token in 0..128 {
                    let mut picks: Vec<_> =
                        input.picks(token).iter().filter(|&&e| e >= 0).collect();
                    let num_picks = picks.len();
                    picks.sort();
                    picks.dedup();
                    assert_eq!(picks.len(), num_picks, "{routing}: a duplicate");
                    assert!(picks.iter().all(|&&e| e < num_experts as i32));
                    let sum: f32 = input.weights(token).iter().sum();
                    assert!(
                        (sum - 1.0).abs() < 1e-5 && input.weights(token).iter().all(|&w| w > 0.0)
                    );
                }
            }
        }
    }

    #[test]
    fn one_percent_of_picks_is_masked() {
        let config = config(256, 8);
        let masked: usize = (0..40)
            .map(|i| RankInput::generate(&config, Routing::Uniform, key(i, 0), 128))
            .map(|input| {
                input
                    .topk_idx
                    .iter()
                    .filter(|&&expert| expert == -1)
                    .count()
            })
            .sum();
        let share = masked as f64 / (40.0 * 1024.0);
        assert!((0.007..0.013).contains(&share), "{share}");
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
        assert!(
            uniform.iter().all(|&count| (320..480).contains(&count)),
            "{uniform:?}"
        );
        let zipf = histogram(Routing::Zipf, 64, 1);
        let ratio = f64::from(zipf[0]) / f64::from(zipf[3]);
        assert!(
            (3.0..5.5).contains(&ratio),
            "P(0) is four times P(3): {ratio}"
        );
        let khot = histogram(Routing::KHot, 64, 4);
        let hot: u32 = khot[..4].iter().sum();
        let share = f64::from(hot) / f64::from(khot.iter().sum::<u32>());
        assert!(
            (0.5..0.57).contains(&share),
            "half, and 4 of 64 of the other half: {share}"
        );
    }

    #[test]
    fn group_limited_uses_four_groups() {
        let config = config(64, 8);
        let input = RankInput::generate(&config, Routing::GroupLimited, key(0, 0), 128);
        for token in 0..128 {
            let mut groups: Vec<i32> = input
                .picks(token)
                .iter()
                .filter(|&&e| e >= 0)
                .map(|e| e / 8)
                .collect();
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

    #[test]
    fn inputs_hold_every_edge_block() {
        let config = config(64, 8);
        let draw = |i| RankInput::generate(&config, Routing::Uniform, key(i, 0), 128);
        assert_eq!(draw(0).row(5).len(), 512);
        let x: Vec<u16> = (0..20).flat_map(|i| draw(i).x).collect();
        let values: Vec<f32> = x.iter().map(|&bits| bf16_to_f32(bits)).collect();
        let has = |what: fn(f32) -> bool| values.iter().any(|&value| what(value));
        assert!(has(f32::is_nan) && has(f32::is_infinite) && has(f32::is_subnormal));
        assert!(has(|v| v == 448.0) && has(|v| v == -448.0) && has(|v| v.is_finite() && v > 1e38));
        let zeros = |block: &[u16]| block.iter().all(|&bits| bits == 0);
        assert!(x.chunks(128).any(zeros));
    }

    #[test]
    fn no_tokens_is_an_input() {
        let input = RankInput::generate(&config(64, 8), Routing::Uniform, key(0, 0), 0);
        assert!(input.x.is_empty() && input.topk_idx.is_empty());
    }

    #[test]
    fn exp_is_exact_enough() {
        for x in [-6.0, -1.0, 0.0, 0.5, 1.0, 6.0] {
            assert!((exp(x) / f64::exp(x) - 1.0).abs() < 1e-13, "{x}");
        }
    }
}
