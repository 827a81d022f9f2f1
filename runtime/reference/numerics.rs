//! bf16, e4m3fn, scales and rows, from their definitions.
//!
//! Owns nothing. Where the kernels use bit tricks, this file searches tables and compares remainders.
//!
//! INVARIANT: every operation is rounded where it is written; fused only where it says `mul_add`.

use std::array;
use std::sync::LazyLock;

use crate::config::{SCALE_BLOCK, ScaleKind};

/// The canonical bf16 NaN: what every NaN becomes when it is rounded.
pub const BF16_NAN: u16 = 0x7fff;
/// The largest finite e4m3 value.
pub const FP8_MAX: f32 = 448.0;
/// Smallest amax of a block, so that an all-zero block has a finite multiplier.
pub const AMAX_FLOOR: f32 = 1e-4;
/// Largest amax of a block: the largest finite bf16, taken for an infinite one.
pub const AMAX_CEILING: f32 = f32::from_bits(0x7f7f_0000);

/// The value of a bf16.
#[must_use]
pub fn bf16_to_f32(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Rounds to bf16, to nearest, ties to even; any NaN becomes [`BF16_NAN`].
#[must_use]
pub fn f32_to_bf16(value: f32) -> u16 {
    if value.is_nan() {
        return BF16_NAN;
    }
    let bits = value.to_bits();
    let (kept, rest) = (bits >> 16, bits & 0xffff);
    let up = rest > 0x8000 || (rest == 0x8000 && kept & 1 == 1);
    // CAST: kept has 16 bits; the largest, an infinity, has no rest and does not go up.
    (kept + u32::from(up)) as u16
}

/// The value of an e4m3fn: 4 exponent bits with bias 7, 3 mantissa bits, no infinities, 0x7f is NaN.
#[must_use]
pub fn e4m3_to_f32(bits: u8) -> f32 {
    E4M3_VALUES[usize::from(bits)]
}

static E4M3_VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| {
    array::from_fn(|bits| {
        let (exponent, mantissa) = ((bits >> 3) & 0xf, (bits & 7) as f32);
        let magnitude = match (exponent, bits & 7) {
            (15, 7) => f32::NAN,
            (0, _) => mantissa / 8.0 * 2f32.powi(-6),
            // CAST: a four-bit exponent.
            _ => (1.0 + mantissa / 8.0) * 2f32.powi(exponent as i32 - 7),
        };
        if bits & 0x80 == 0 { magnitude } else { -magnitude }
    })
});

/// Midpoints between neighbouring magnitudes: `[i]` lies between codes i and i + 1.
static E4M3_MIDPOINTS: LazyLock<[f32; 126]> = LazyLock::new(|| {
    // CAST: codes below 0x7f.
    array::from_fn(|code| (e4m3_to_f32(code as u8) + e4m3_to_f32(code as u8 + 1)) / 2.0)
});

/// Rounds to e4m3fn, to nearest, ties to the even code, saturating to 448; NaN becomes 0x7f | sign.
#[must_use]
pub fn f32_to_e4m3(value: f32) -> u8 {
    let sign = if value.is_sign_negative() { 0x80 } else { 0 };
    if value.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = value.abs();
    let below = E4M3_MIDPOINTS.partition_point(|&midpoint| midpoint < magnitude);
    // On a midpoint the search stops at the lower code; an odd one goes up to the even one.
    let tie = below < E4M3_MIDPOINTS.len() && E4M3_MIDPOINTS[below] == magnitude;
    // CAST: at most 126 midpoints lie below anything, so the code is at most 0x7e = 448.
    let code = below as u8;
    sign | (code + u8::from(tie && code % 2 == 1))
}

/// What a block of a row is multiplied by before the cast, and what undoes it afterwards.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BlockScale {
    /// Multiplier of the cast.
    pub multiplier: f32,
    /// Multiplier of the way back.
    pub stored: f32,
}

impl BlockScale {
    /// The scale of one block of bf16 values.
    ///
    /// NaN counts as nothing, an infinity as the largest finite bf16.
    #[must_use]
    pub fn of(block: &[u16], kind: ScaleKind) -> Self {
        let magnitudes = block.iter().map(|&bits| bf16_to_f32(bits).abs()).filter(|m| !m.is_nan());
        let amax = magnitudes.fold(0.0, f32::max).clamp(AMAX_FLOOR, AMAX_CEILING);
        let stored = amax * (1.0 / FP8_MAX);
        if kind == ScaleKind::F32 {
            return Self { multiplier: FP8_MAX * (1.0 / amax), stored };
        }
        let exponent = ceil_log2(stored);
        Self { multiplier: 2f32.powi(-exponent), stored: 2f32.powi(exponent) }
    }

    /// Appends the scale as it is stored: four bytes little-endian, or one with the biased exponent.
    fn append_to(self, scales: &mut Vec<u8>, kind: ScaleKind) {
        match kind {
            ScaleKind::F32 | ScaleKind::Pow2 => scales.extend(self.stored.to_le_bytes()),
            // CAST: stored is a normal power of two, so bits 23..31 are all there is.
            ScaleKind::Ue8m0 => scales.push((self.stored.to_bits() >> 23) as u8),
        }
    }
}

/// The smallest e with 2^e >= value, for a normal positive value.
fn ceil_log2(value: f32) -> i32 {
    let mut exponent = -126;
    while 2f32.powi(exponent) < value {
        exponent += 1;
    }
    exponent
}

/// Bytes of one stored scale.
#[must_use]
pub fn scale_len(kind: ScaleKind) -> usize {
    match kind {
        ScaleKind::F32 | ScaleKind::Pow2 => 4,
        ScaleKind::Ue8m0 => 1,
    }
}

/// The fp32 value of a stored scale.
///
/// # Panics
/// PANIC: `bytes` is not [`scale_len`] long.
#[must_use]
pub fn decode_scale(bytes: &[u8], kind: ScaleKind) -> f32 {
    match kind {
        ScaleKind::F32 | ScaleKind::Pow2 => {
            f32::from_le_bytes(bytes.try_into().expect("a stored fp32 scale has four bytes"))
        }
        ScaleKind::Ue8m0 => 2f32.powi(i32::from(bytes[0]) - 127),
    }
}

/// Casts one bf16 row: e4m3 payload and one stored scale per 128 channels, the last block possibly short.
#[must_use]
pub fn cast_row(row: &[u16], kind: ScaleKind) -> (Vec<u8>, Vec<u8>) {
    let mut payload = Vec::with_capacity(row.len());
    let mut scales = Vec::new();
    for block in row.chunks(SCALE_BLOCK as usize) {
        let scale = BlockScale::of(block, kind);
        payload.extend(block.iter().map(|&bits| f32_to_e4m3(bf16_to_f32(bits) * scale.multiplier)));
        scale.append_to(&mut scales, kind);
    }
    (payload, scales)
}

/// The fp32 values of a cast row.
#[must_use]
pub fn decode_row(payload: &[u8], scales: &[u8], kind: ScaleKind) -> Vec<f32> {
    let blocks = payload.chunks(SCALE_BLOCK as usize).zip(scales.chunks(scale_len(kind)));
    let mut row = Vec::with_capacity(payload.len());
    for (block, scale) in blocks {
        let scale = decode_scale(scale, kind);
        row.extend(block.iter().map(|&bits| e4m3_to_f32(bits) * scale));
    }
    row
}

/// What the stand-in expert multiplies its rows by: `1 + 0.1 e` in fp32, two roundings.
#[must_use]
pub fn expert_factor(expert: u16) -> f32 {
    1.0 + 0.1 * f32::from(expert)
}

/// The stand-in expert: bf16 of each value times `factor`.
#[must_use]
pub fn expert_row(values: &[f32], factor: f32) -> Vec<u16> {
    values.iter().map(|&value| f32_to_bf16(value * factor)).collect()
}

/// Adds `weight * row` to fp32 sums, fused.
pub fn add_weighted(sums: &mut [f32], row: &[u16], weight: f32) {
    for (sum, &bits) in sums.iter_mut().zip(row) {
        *sum = weight.mul_add(bf16_to_f32(bits), *sum);
    }
}

/// Adds a bf16 row to fp32 sums.
pub fn add_plain(sums: &mut [f32], row: &[u16]) {
    for (sum, &bits) in sums.iter_mut().zip(row) {
        *sum += bf16_to_f32(bits);
    }
}

/// Rounds fp32 sums to bf16.
#[must_use]
pub fn round_row(sums: &[f32]) -> Vec<u16> {
    sums.iter().map(|&sum| f32_to_bf16(sum)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bf16(value: f32) -> u16 {
        f32_to_bf16(value)
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        let cases = [
            (0x3f80_0000, 0x3f80), // 1
            (0x3f80_8000, 0x3f80), // A tie above an even code stays.
            (0x3f81_8000, 0x3f82), // A tie above an odd code goes up.
            (0x3f80_8001, 0x3f81),
            (0x7f7f_ffff, 0x7f80), // The largest f32 is nearer to infinity.
            (0x7f80_0000, 0x7f80),
            (0xff80_0000, 0xff80),
            (0x8000_0000, 0x8000),
            (0x0000_8000, 0x0000), // Denormals are kept and rounded alike.
            (0x0000_8001, 0x0001),
            (0x7f80_0001, BF16_NAN),
            (0xffff_ffff, BF16_NAN),
        ];
        for (bits, expected) in cases {
            assert_eq!(f32_to_bf16(f32::from_bits(bits)), expected, "{bits:#010x}");
        }
        for bits in (0..=u16::MAX).filter(|&bits| !bf16_to_f32(bits).is_nan()) {
            assert_eq!(f32_to_bf16(bf16_to_f32(bits)), bits);
        }
    }

    #[test]
    fn e4m3_values_are_the_published_ones() {
        let cases = [
            (0x00, 0.0),
            (0x01, 2f32.powi(-9)),
            (0x07, 7.0 * 2f32.powi(-9)),
            (0x08, 2f32.powi(-6)),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x77, 240.0),
            (0x7e, 448.0),
            (0xfe, -448.0),
        ];
        for (bits, value) in cases {
            assert_eq!(e4m3_to_f32(bits), value);
        }
        assert!(e4m3_to_f32(0x7f).is_nan() && e4m3_to_f32(0xff).is_nan());
    }

    #[test]
    fn e4m3_codes_round_trip() {
        for bits in (0..=0xff).filter(|&bits| !e4m3_to_f32(bits).is_nan()) {
            assert_eq!(f32_to_e4m3(e4m3_to_f32(bits)), bits, "{bits:#04x}");
        }
    }

    #[test]
    fn e4m3_rounds_to_the_nearest_of_all_codes_and_ties_to_even() {
        // Every bf16 magnitude against the definition: no code is nearer, and an equal one is odd.
        for bits in 0..0x7f80 {
            let value = bf16_to_f32(bits);
            let code = f32_to_e4m3(value);
            assert_eq!(f32_to_e4m3(-value), code | 0x80);
            let distance = |code: u8| (f64::from(e4m3_to_f32(code)) - f64::from(value)).abs();
            for other in (0..0x7f).filter(|&other| other != code) {
                let (ours, theirs) = (distance(code), distance(other));
                assert!(
                    ours < theirs || (ours == theirs && code.is_multiple_of(2)),
                    "{value}: {code} {other}"
                );
            }
        }
    }

    #[test]
    fn e4m3_saturates_and_keeps_the_sign_of_nan() {
        for (value, code) in [(464.0, 0x7e), (1e30, 0x7e), (f32::INFINITY, 0x7e), (f32::NAN, 0x7f)] {
            assert_eq!(f32_to_e4m3(value), code);
            assert_eq!(f32_to_e4m3(-value), code | 0x80);
        }
        assert_eq!(f32_to_e4m3(-0.0), 0x80);
        assert_eq!(f32_to_e4m3(2f32.powi(-10)), 0, "half of the smallest code ties to zero");
        assert_eq!(f32_to_e4m3(2f32.powi(-10) * 1.01), 1);
    }

    #[test]
    fn scale_of_the_edge_blocks() {
        let of = |values: &[f32], kind| {
            let block: Vec<u16> = values.iter().map(|&value| bf16(value)).collect();
            BlockScale::of(&block, kind)
        };
        let zeros = of(&[0.0; 128], ScaleKind::F32);
        assert_eq!(zeros.stored, 1e-4 * (1.0 / 448.0));
        assert_eq!(zeros, of(&[f32::NAN, 1e-40], ScaleKind::F32), "NaN counts as nothing");
        let infinite = of(&[f32::NEG_INFINITY, 1.0], ScaleKind::F32);
        assert_eq!(infinite, of(&[AMAX_CEILING], ScaleKind::F32));
        assert!(infinite.multiplier > 0.0 && infinite.stored.is_finite());
        assert_eq!(of(&[448.0], ScaleKind::F32), BlockScale { multiplier: 1.0, stored: 1.0 });
    }

    #[test]
    fn power_of_two_scales_go_up_and_stop_at_exact_powers() {
        for k in -20..100 {
            let exact = 448.0 * 2f32.powi(k);
            let scale = BlockScale::of(&[bf16(exact)], ScaleKind::Pow2);
            assert_eq!(scale, BlockScale { multiplier: 2f32.powi(-k), stored: 2f32.powi(k) });
            let above = BlockScale::of(&[bf16(exact) + 1], ScaleKind::Pow2);
            assert_eq!(above.stored, 2f32.powi(k + 1));
        }
    }

    #[test]
    fn stored_scales_decode_to_what_the_cast_used() {
        for &kind in ScaleKind::ALL {
            for value in [1.0, 448.0, 1e-9, 3e38, 5.7] {
                let scale = BlockScale::of(&[bf16(value)], kind);
                let mut bytes = Vec::new();
                scale.append_to(&mut bytes, kind);
                assert_eq!(bytes.len(), scale_len(kind));
                assert_eq!(decode_scale(&bytes, kind), scale.stored, "{kind} {value}");
            }
        }
        let scale = BlockScale::of(&[bf16(448.0 * 4.0)], ScaleKind::Ue8m0);
        let mut bytes = Vec::new();
        scale.append_to(&mut bytes, ScaleKind::Ue8m0);
        assert_eq!(bytes, [129], "byte e means 2^(e-127)");
    }

    #[test]
    fn a_cast_row_comes_back_within_half_a_step() {
        let row: Vec<u16> = (0..144).map(|i| bf16((i as f32 - 70.0) * 0.37)).collect();
        for &kind in ScaleKind::ALL {
            let (payload, scales) = cast_row(&row, kind);
            assert_eq!((payload.len(), scales.len()), (144, 2 * scale_len(kind)), "a short last block");
            for (value, &bits) in decode_row(&payload, &scales, kind).iter().zip(&row) {
                let wanted = bf16_to_f32(bits);
                assert!((value - wanted).abs() <= wanted.abs() / 16.0 + 1e-3, "{wanted} {value}");
            }
        }
    }

    #[test]
    fn the_expert_rounds_twice_in_fp32_and_once_in_bf16() {
        assert_eq!(expert_factor(3), 1.0f32 + 0.1f32 * 3.0f32);
        assert_eq!(expert_row(&[1.0, f32::NAN], 1.5), [bf16(1.5), BF16_NAN]);
    }
}
