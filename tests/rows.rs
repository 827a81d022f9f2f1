//! The kernels' arithmetic against the plain reference, bit for bit: bf16, e4m3, scales, row operations.
//!
//! Both host forms are judged: what kernels use in this build, and the lane regions that CUDA and the lane
//! fibers run. Oracle: `ibex::reference::numerics`, written from the definitions.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]
#![expect(unsafe_code, reason = "calls the kernels' C entry points with slices of checked lengths")]

use ibex::config::ScaleKind;
use ibex::reference::numerics;

unsafe extern "C" {
    fn ibex_rows_cast_fp8(
        variant: u32,
        payload: *mut u8,
        scales: *mut u8,
        x: *const u16,
        hidden: u32,
        kind: u32,
    );
    fn ibex_rows_sum(
        variant: u32,
        out: *mut u16,
        rows: *const *const u16,
        weights: *const f32,
        num_rows: u32,
        hidden: u32,
    );
    fn ibex_rows_scale_bf16(variant: u32, out: *mut u16, x: *const u16, hidden: u32, factor: f32);
    fn ibex_rows_scale_fp8(
        variant: u32,
        out: *mut u16,
        payload: *const u8,
        scales: *const u8,
        block_stride: u64,
        kind: u32,
        hidden: u32,
        factor: f32,
    );
}

/// What kernels use here, and lane regions.
const VARIANTS: [u32; 2] = [0, 1];

/// Rows start on 16 bytes, as everywhere in the runtime.
#[repr(align(16))]
#[derive(Clone, Copy)]
struct Unit([u16; 8]);

/// A row of bf16 with the alignment that kernels rely on.
#[derive(Clone)]
struct Row(Vec<Unit>);

impl Row {
    fn new(values: &[u16]) -> Self {
        assert!(values.len().is_multiple_of(8));
        Self(values.chunks_exact(8).map(|unit| Unit(unit.try_into().unwrap())).collect())
    }

    fn zeros(hidden: usize) -> Self {
        Self::new(&vec![0; hidden])
    }

    fn values(&self) -> Vec<u16> {
        self.0.iter().flat_map(|unit| unit.0).collect()
    }

    fn hidden(&self) -> u32 {
        8 * self.0.len() as u32
    }

    fn ptr(&self) -> *const u16 {
        self.0.as_ptr().cast()
    }

    fn ptr_mut(&mut self) -> *mut u16 {
        self.0.as_mut_ptr().cast()
    }
}

fn code_of(kind: ScaleKind) -> u32 {
    ScaleKind::ALL.iter().position(|&other| other == kind).unwrap() as u32
}

/// Casts into buffers of 0xa5 with a guard behind them.
fn cast(variant: u32, x: &Row, kind: ScaleKind) -> (Vec<u8>, Vec<u8>) {
    let hidden = x.hidden() as usize;
    // Eight-byte alignment for the payload, four for fp32 scales.
    let mut payload = vec![0xa5a5_a5a5_a5a5_a5a5u64; hidden / 8 + 1];
    let mut scales = vec![0xa5a5_a5a5u32; hidden.div_ceil(128) + 1];
    // SAFETY: hidden is a multiple of 16; the payload has that many bytes, scales four for each block of 128.
    unsafe {
        let (payload, scales) = (payload.as_mut_ptr().cast(), scales.as_mut_ptr().cast());
        ibex_rows_cast_fp8(variant, payload, scales, x.ptr(), x.hidden(), code_of(kind));
    }
    let payload: Vec<u8> = payload.iter().flat_map(|word| word.to_le_bytes()).collect();
    let scales: Vec<u8> = scales.iter().flat_map(|word| word.to_le_bytes()).collect();
    let scales_len = hidden.div_ceil(128) * numerics::scale_len(kind);
    assert!(payload[hidden..].iter().all(|&byte| byte == 0xa5), "wrote behind the payload");
    assert!(scales[scales_len..].iter().all(|&byte| byte == 0xa5), "wrote behind the scales");
    (payload[..hidden].to_vec(), scales[..scales_len].to_vec())
}

fn check_cast(x: &[u16], what: &str) {
    let row = Row::new(x);
    for &kind in ScaleKind::ALL {
        let (payload, scales) = numerics::cast_row(x, kind);
        for variant in VARIANTS {
            let (got_payload, got_scales) = cast(variant, &row, kind);
            assert_eq!(got_scales, scales, "{what}, {kind} scales, variant {variant}");
            if let Some(at) = (0..x.len()).find(|&i| got_payload[i] != payload[i]) {
                panic!(
                    "{what}, {kind}, variant {variant}: element {at} of {:#06x} is {:#04x}, not {:#04x}",
                    x[at], got_payload[at], payload[at]
                );
            }
        }
    }
}

/// Every bf16 beside a value that sets the block's scale: all numbers at this scale, NaN and Inf included.
#[test]
fn every_bf16_is_cast_alike_at_several_scales() {
    // amax floor, 2^-10, 1, 448 x 2^k exactly and just above, the e4m3 boundary, the largest finite bf16.
    for leader in [0x0000, 0x3a80, 0x3f80, 0x43e0, 0x43e1, 0x4260, 0x4261, 0x43e8, 0x7f7f, 0xc560] {
        for values in (0..=u16::MAX).collect::<Vec<_>>().chunks(127 * 16) {
            let mut row: Vec<u16> = values.chunks(127).flat_map(|part| [&[leader], part].concat()).collect();
            row.resize(row.len().next_multiple_of(16), 0);
            check_cast(&row, &format!("beside {leader:#06x}"));
        }
    }
}

#[test]
fn edge_blocks_are_cast_alike() {
    let nan = |sign: u16| sign | 0x7fc1;
    type Value = fn(usize) -> u16;
    let blocks: [(&str, Value); 7] = [
        ("zeros of both signs", |i| (i as u16 % 2) << 15),
        ("denormals", |i| i as u16 | (i as u16 % 2) << 15),
        ("only NaN", |_| 0xffff),
        ("only infinities", |i| 0x7f80 | (i as u16 % 2) << 15),
        ("infinities and NaN", |i| if i % 3 == 0 { 0xff80 } else { 0x7f81 }),
        ("the boundary", |i| [0x43e0, 0xc3e0, 0x43e8, 0x43e7, 0x43e9, 0xc3e8][i % 6]),
        ("the largest", |i| 0x7f7f | (i as u16 % 2) << 15),
    ];
    for (what, value) in blocks {
        check_cast(&(0..128).map(value).collect::<Vec<_>>(), what);
    }
    // One special value at every place of a block of numbers.
    for place in 0..128 {
        for special in [nan(0), nan(0x8000), 0x7f80, 0xff80] {
            let mut row: Vec<u16> = (0..128).map(|i| 0x3f00 + i).collect();
            row[place] = special;
            check_cast(&row, &format!("{special:#06x} at {place}"));
        }
    }
}

/// xorshift, so that rows are the same in every run.
fn random_values(seed: u64, count: usize) -> Vec<u16> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    (0..count).map(|_| (next() >> 24) as u16).collect()
}

/// Values of moderate size: sums of them stay finite.
fn moderate_values(seed: u64, count: usize) -> Vec<u16> {
    let exponent = |bits: u16| 120 + (bits >> 7) % 12;
    let shape = |bits: u16| (bits & 0x807f) | exponent(bits) << 7;
    random_values(seed, count).into_iter().map(shape).collect()
}

#[test]
fn rows_of_any_width_are_cast_alike() {
    for hidden in (16..=320).step_by(16).chain([2880, 3584, 6400, 7168, 7680]) {
        for seed in 0..3 {
            check_cast(&random_values(seed + 7, hidden), &format!("hidden {hidden}, seed {seed}"));
            check_cast(&moderate_values(seed + 70, hidden), &format!("moderate {hidden}, seed {seed}"));
        }
    }
}

fn sum(variant: u32, rows: &[Row], weights: Option<&[f32]>, hidden: usize) -> Vec<u16> {
    let mut out = Row::zeros(hidden);
    let pointers: Vec<*const u16> = rows.iter().map(Row::ptr).collect();
    let weights = weights.map_or(std::ptr::null(), <[f32]>::as_ptr);
    // SAFETY: every row and the output have `hidden` elements; weights, where given, one per row.
    unsafe {
        let (rows, len) = (pointers.as_ptr(), pointers.len() as u32);
        ibex_rows_sum(variant, out.ptr_mut(), rows, weights, len, hidden as u32);
    }
    out.values()
}

#[test]
fn sums_are_fused_in_order_and_rounded_once() {
    for hidden in [8, 24, 32, 40, 256, 2880, 7168] {
        for num_rows in [0, 1, 2, 8, 32] {
            for make in [moderate_values, random_values] {
                let values: Vec<Vec<u16>> = (0..num_rows).map(|k| make(k + 3, hidden)).collect();
                let weights: Vec<f32> = (0..num_rows).map(|k| 0.3 / (k + 1) as f32 - 0.01).collect();
                let (mut fused, mut plain) = (vec![0.0; hidden], vec![0.0; hidden]);
                for (row, &weight) in values.iter().zip(&weights) {
                    numerics::add_weighted(&mut fused, row, weight);
                    numerics::add_plain(&mut plain, row);
                }
                let rows: Vec<Row> = values.iter().map(|row| Row::new(row)).collect();
                for variant in VARIANTS {
                    let case = format!("hidden {hidden}, {num_rows} rows, variant {variant}");
                    let got = sum(variant, &rows, Some(&weights), hidden);
                    assert!(got == numerics::round_row(&fused), "weighted, {case}");
                    assert!(
                        sum(variant, &rows, None, hidden) == numerics::round_row(&plain),
                        "plain, {case}"
                    );
                }
            }
        }
    }
}

/// A fused and an unfused sum differ: else the test above could not tell them apart.
#[test]
fn the_sums_of_the_test_depend_on_fusing() {
    let values = moderate_values(3, 7168);
    let weight = 0.3f32;
    let fused: Vec<u32> =
        values.iter().map(|&bits| weight.mul_add(numerics::bf16_to_f32(bits), 1.0f32).to_bits()).collect();
    let unfused: Vec<u32> =
        values.iter().map(|&bits| (weight * numerics::bf16_to_f32(bits) + 1.0).to_bits()).collect();
    assert_ne!(fused, unfused);
}

#[test]
fn the_expert_multiplies_like_the_reference() {
    for hidden in [16, 48, 144, 2880, 7168] {
        for expert in [0, 1, 7, 255, 65_534] {
            let factor = numerics::expert_factor(expert);
            let values = random_values(u64::from(expert) + 9, hidden);
            let row = Row::new(&values);
            let wide: Vec<f32> = values.iter().map(|&bits| numerics::bf16_to_f32(bits)).collect();
            for variant in VARIANTS {
                let mut out = Row::zeros(hidden);
                // SAFETY: both rows have `hidden` elements.
                unsafe {
                    ibex_rows_scale_bf16(variant, out.ptr_mut(), row.ptr(), hidden as u32, factor);
                }
                assert!(out.values() == numerics::expert_row(&wide, factor), "bf16 {hidden} {expert}");
                for &kind in ScaleKind::ALL {
                    check_expert_fp8(variant, &values, kind, factor);
                }
            }
        }
    }
}

fn check_expert_fp8(variant: u32, values: &[u16], kind: ScaleKind, factor: f32) {
    let (payload, scales) = numerics::cast_row(values, kind);
    let expected = numerics::expert_row(&numerics::decode_row(&payload, &scales, kind), factor);
    // Scales apart from each other, as a transposed layout has them.
    let len = numerics::scale_len(kind);
    let stride = 12;
    let mut spread = vec![0u32; scales.len() / len * stride / 4];
    for (block, scale) in scales.chunks(len).enumerate() {
        let mut word = [0; 4];
        word[..len].copy_from_slice(scale);
        spread[block * stride / 4] = u32::from_le_bytes(word);
    }
    let aligned: Vec<u64> =
        payload.chunks(8).map(|unit| u64::from_le_bytes(unit.try_into().unwrap())).collect();
    let mut out = Row::zeros(values.len());
    // SAFETY: the payload has one byte per element, the output one element each, and a scale of at most four bytes
    // stands at every `stride` bytes for every block.
    unsafe {
        let (payload, scales) = (aligned.as_ptr().cast(), spread.as_ptr().cast());
        let (hidden, kind) = (values.len() as u32, code_of(kind));
        ibex_rows_scale_fp8(variant, out.ptr_mut(), payload, scales, stride as u64, kind, hidden, factor);
    }
    assert!(out.values() == expected, "fp8, {kind}, variant {variant}, {} elements", values.len());
}
