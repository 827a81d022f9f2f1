//! Inputs of a step as a pure function of (seed, iteration, rank): activations, routes, weights.
//!
//! Owns the vectors of [`RankInput`]. 1 % of all picks are masked (-1), and some blocks hold what
//! arithmetic finds hard: NaN, infinities, denormals, zeros, the boundary of e4m3.
//!
//! INVARIANT: two ranks that draw for the same key get the same bytes; different keys share no stream.

use crate::config::{SCALE_BLOCK, ValidConfig};
pub use crate::reference::rng::InputKey;
use crate::reference::rng::{Rng, Stream};
use crate::reference::routing::{Router, Routing};

/// Share of picks that the generator masks with -1.
pub const MASKED_SHARE: f64 = 0.01;
/// One block of channels in this many is an edge case.
const EDGE_BLOCK_ONE_IN: u64 = 64;

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

impl RankInput {
    /// Draws the input of one rank and step, with `max_topk` picks per token.
    ///
    /// # Panics
    /// PANIC: more tokens than `max_tokens`, or a routing that [`Routing::validate`] refuses.
    #[must_use]
    pub fn generate(config: &ValidConfig, routing: Routing, key: InputKey, num_tokens: u32) -> Self {
        assert!(num_tokens <= config.max_tokens, "{num_tokens} tokens do not fit");
        routing.validate(config).expect("the caller validated the routing");
        let num_topk = config.max_topk;
        let mut input = Self { num_tokens, num_topk, ..Self::default() };
        input.x = activations(&mut Rng::new(key, Stream::Activations), num_tokens, config.hidden);
        let mut rng = Rng::new(key, Stream::Routes);
        let mut router = Router::new(config.num_experts, num_topk as usize, routing, num_tokens, &mut rng);
        for token in 0..num_tokens {
            router.route(token, &mut rng, &mut input.topk_idx, &mut input.topk_weights);
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
        let values = [draw, draw >> 16, draw >> 32, draw >> 48].map(|part| plain_value(part as u16));
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

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::config::{Config, WireDtype};
    use crate::ids::Rank;
    use crate::reference::numerics::bf16_to_f32;

    pub(in crate::reference) fn config(num_experts: u32, max_topk: u32) -> ValidConfig {
        let dtype = WireDtype::Bf16;
        let shape = Config { hidden: 512, num_experts, max_topk, dtype, ..Config::default() };
        shape.validate().unwrap()
    }

    pub(in crate::reference) fn key(iteration: u64, rank: u16) -> InputKey {
        InputKey { seed: 1, iteration, rank: Rank(rank) }
    }

    #[test]
    fn an_input_is_a_pure_function_of_its_key() {
        let config = config(64, 8);
        for &routing in Routing::ALL {
            let draw = |key| RankInput::generate(&config, routing, key, 16);
            let same = draw(key(3, 2));
            assert_eq!(same.topk_idx, draw(key(3, 2)).topk_idx);
            assert!(same.x == draw(key(3, 2)).x);
            for other in [key(4, 2), key(3, 1), InputKey { seed: 2, ..key(3, 2) }] {
                let other = draw(other);
                assert_ne!(same.topk_idx, other.topk_idx);
                assert_ne!(same.topk_weights, other.topk_weights);
                assert!(same.x != other.x);
            }
        }
    }

    #[test]
    fn one_percent_of_picks_is_masked() {
        let config = config(256, 8);
        let masked: usize = (0..40)
            .map(|i| RankInput::generate(&config, Routing::Uniform, key(i, 0), 128))
            .map(|input| input.topk_idx.iter().filter(|&&expert| expert == -1).count())
            .sum();
        let share = masked as f64 / (40.0 * 1024.0);
        assert!((0.007..0.013).contains(&share), "{share}");
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
}
