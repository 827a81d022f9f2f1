//! The random numbers behind the reference inputs: one small generator, many independent streams.
//!
//! Owns its state and nothing else. The system's libm is avoided, because its last bit differs between
//! machines and every rank must draw the same bytes.

use crate::ids::Rank;

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
pub(super) enum Stream {
    Activations = 1,
    Routes = 2,
    Masks = 3,
}

/// e^x for |x| <= 8 without the system's libm, whose last bit differs between machines.
pub(super) fn exp(x: f64) -> f64 {
    let small = x / 16.0;
    let series = (1..16).rev().fold(1.0, |tail, n| 1.0 + tail * small / f64::from(n));
    (0..4).fold(series, |power, _| power * power)
}

/// xoshiro256++, seeded through splitmix64.
pub(super) struct Rng([u64; 4]);

impl Rng {
    pub(super) fn new(key: InputKey, stream: Stream) -> Self {
        let mut state = 0;
        for part in [key.seed, key.iteration, u64::from(key.rank.0), stream as u64] {
            state = splitmix(state ^ part);
        }
        let mut words = [0; 4];
        for word in &mut words {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            *word = splitmix(state);
        }
        Self(words)
    }

    pub(super) fn next(&mut self) -> u64 {
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
    pub(super) fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in 0..n; the bias of 2^-64 x n is below what any run can see.
    pub(super) fn below(&mut self, n: u64) -> u64 {
        // CAST: the high half of the product.
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// Nearly normal: the sum of twelve uniforms, centred.
    pub(super) fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.unit()).sum::<f64>() - 6.0
    }

    pub(super) fn shuffle<T>(&mut self, items: &mut [T]) {
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

    #[test]
    fn the_generator_is_the_published_one() {
        // First outputs of xoshiro256++ from state {1, 2, 3, 4}, as in rand_xoshiro's own test.
        let mut rng = Rng([1, 2, 3, 4]);
        let outputs = [41943041, 58720359, 3588806011781223, 3591011842654386];
        assert_eq!(outputs.map(|_| rng.next()), outputs);
    }

    #[test]
    fn streams_differ_in_every_part_of_the_key() {
        let key = InputKey { seed: 1, iteration: 1, rank: Rank(1) };
        let keys = [
            (key, Stream::Routes),
            (key, Stream::Masks),
            (InputKey { seed: 2, ..key }, Stream::Routes),
            (InputKey { iteration: 2, ..key }, Stream::Routes),
            (InputKey { rank: Rank(2), ..key }, Stream::Routes),
        ];
        let mut firsts = keys.map(|(key, stream)| Rng::new(key, stream).next());
        firsts.sort_unstable();
        assert!(firsts.windows(2).all(|pair| pair[0] != pair[1]));
    }

    #[test]
    fn exp_is_exact_enough() {
        for x in [-6.0, -1.0, 0.0, 0.5, 1.0, 6.0] {
            assert!((exp(x) / f64::exp(x) - 1.0).abs() < 1e-13, "{x}");
        }
    }
}
