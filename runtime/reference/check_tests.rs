//! A naive device in memory, right in every byte, and then wrong in one.

use ibex_abi::device_ctx::{LayoutRange, SourceInfo};

use super::*;
use crate::config::{Config, SCALE_BLOCK, ScaleKind};
use crate::reference::inputs::InputKey;
use crate::reference::routing::Routing;

/// The packed tensors of one rank, and the small arrays beside them.
struct Device {
    config: ValidConfig,
    payload: Vec<u8>,
    /// `[expert][block][row]`, as some consumers want scales.
    scales: Vec<u8>,
    info: Vec<SourceInfo>,
    counts: Vec<i32>,
    ranges: Vec<LayoutRange>,
    source_ok: Vec<u32>,
}

impl Device {
    fn capacity(&self) -> usize {
        (self.config.num_ranks * self.config.max_tokens) as usize
    }

    fn row(&self, expert: LocalExpertIdx, row: u32) -> usize {
        expert.index() * self.capacity() + row as usize
    }

    fn payload_len(&self) -> usize {
        self.config.hidden as usize * if self.config.dtype == WireDtype::Fp8 { 1 } else { 2 }
    }

    fn scale_place(&self, expert: LocalExpertIdx, row: u32, block: usize) -> usize {
        let blocks = self.config.hidden.div_ceil(SCALE_BLOCK) as usize;
        let len = numerics::scale_len(self.config.scales);
        ((expert.index() * blocks + block) * self.capacity() + row as usize) * len
    }

    /// Runs a dispatch one pick at a time, sources in descending order: ranges may begin in any order.
    fn dispatch(config: &ValidConfig, inputs: &[RankInput], rank: Rank) -> Self {
        let (experts, ranks) = (config.max_local_experts() as usize, config.num_ranks as usize);
        let mut device = Self {
            config: config.clone(),
            payload: Vec::new(),
            scales: Vec::new(),
            info: vec![SourceInfo::default(); experts * ranks * config.max_tokens as usize],
            counts: vec![0; experts],
            ranges: vec![LayoutRange::default(); experts * ranks],
            source_ok: vec![1; ranks],
        };
        device.payload = vec![0xa5; device.info.len() * device.payload_len()];
        device.scales = vec![0xa5; device.info.len() * config.hidden.div_ceil(128) as usize * 4];
        for source in (0..config.num_ranks as u16).rev().map(Rank) {
            for expert in 0..experts {
                let begin = device.counts[expert] as u32;
                device.ranges[expert * ranks + source.index()] = LayoutRange { begin, len: 0 };
            }
            let input = &inputs[source.index()];
            for token in 0..input.num_tokens {
                device.deliver(input, source, token, rank);
            }
        }
        device
    }

    fn deliver(&mut self, input: &RankInput, source: Rank, token: u32, rank: Rank) {
        for (k, &pick) in input.picks(token).iter().enumerate() {
            let Ok(expert) = u16::try_from(pick) else {
                continue;
            };
            let (owner, local) = self.config.owner_of(ExpertIdx(expert)).unwrap();
            if owner != rank || input.picks(token)[..k].contains(&pick) {
                continue;
            }
            let row = self.counts[local.index()] as u32;
            self.counts[local.index()] += 1;
            let ranks = self.config.num_ranks as usize;
            self.ranges[local.index() * ranks + source.index()].len += 1;
            let flat = self.row(local, row);
            let weight = input.weights(token)[k];
            self.info[flat] =
                SourceInfo { token, source: source.0, k: k as u8, weight, ..SourceInfo::default() };
            let (payload, scales) = match self.config.dtype {
                WireDtype::Fp8 => numerics::cast_row(input.row(token), self.config.scales),
                WireDtype::Bf16 => (input.row(token).iter().flat_map(|b| b.to_le_bytes()).collect(), vec![]),
            };
            let len = self.payload_len();
            self.payload[flat * len..][..len].copy_from_slice(&payload);
            for (block, scale) in scales.chunks(numerics::scale_len(self.config.scales)).enumerate() {
                let place = self.scale_place(local, row, block);
                self.scales[place..][..scale.len()].copy_from_slice(scale);
            }
        }
    }

    fn output(&self) -> DispatchOutput<'_> {
        DispatchOutput {
            expert_counts: &self.counts,
            layout_ranges: &self.ranges,
            source_ok: &self.source_ok,
            rows: self,
        }
    }
}

impl PackedRows for Device {
    fn payload(&self, expert: LocalExpertIdx, first: u32, into: &mut [u8]) {
        let start = self.row(expert, first) * self.payload_len();
        into.copy_from_slice(&self.payload[start..][..into.len()]);
    }

    fn scales(&self, expert: LocalExpertIdx, row: u32, into: &mut [u8]) {
        for (block, scale) in into.chunks_mut(numerics::scale_len(self.config.scales)).enumerate() {
            let place = self.scale_place(expert, row, block);
            scale.copy_from_slice(&self.scales[place..][..scale.len()]);
        }
    }

    fn source_info(&self, expert: LocalExpertIdx, row: u32) -> SourceInfo {
        self.info[self.row(expert, row)]
    }
}

fn config(change: impl FnOnce(&mut Config)) -> ValidConfig {
    let mut config = Config {
        num_ranks: 3,
        num_experts: 10,
        max_topk: 4,
        max_tokens: 12,
        hidden: 208,
        ..Config::default()
    };
    change(&mut config);
    config.validate().unwrap()
}

/// Inputs of all ranks; ranks differ in their number of tokens, the last has none.
fn inputs(config: &ValidConfig) -> Vec<RankInput> {
    let draw = |rank: u32| {
        let key = InputKey { seed: 7, iteration: 0, rank: Rank(rank as u16) };
        let num_tokens = config.max_tokens * (config.num_ranks - 1 - rank) / (config.num_ranks - 1);
        RankInput::generate(config, Routing::Uniform, key, num_tokens)
    };
    (0..config.num_ranks).map(draw).collect()
}

/// All wire formats.
fn formats() -> impl Iterator<Item = ValidConfig> {
    let fp8 = ScaleKind::ALL.iter().map(|&scales| config(|config| config.scales = scales));
    fp8.chain([config(|config| config.dtype = WireDtype::Bf16)])
}

#[test]
fn a_right_dispatch_is_right_in_every_format() {
    for config in formats() {
        let inputs = inputs(&config);
        let step = Step::new(&config, &inputs);
        let mut checked = 0;
        for rank in (0..3).map(Rank) {
            let device = Device::dispatch(&config, &inputs, rank);
            let verdict = step.check_dispatch(rank, &device.output());
            assert_eq!(verdict, Verdict { checked: verdict.checked, ..Verdict::default() });
            checked += verdict.checked;
        }
        let picks = inputs.iter().flat_map(|input| &input.topk_idx).filter(|&&pick| pick >= 0);
        assert_eq!(checked, picks.count() as u64);
    }
}

/// The first packed row of a device, as (expert, flat row).
fn some_row(device: &Device) -> (LocalExpertIdx, usize) {
    let expert = device.counts.iter().position(|&count| count > 1).unwrap();
    let expert = LocalExpertIdx(expert as u16);
    (expert, device.row(expert, 1))
}

#[test]
fn one_corrupted_byte_is_one_wrong_row() {
    let config = config(|_| ());
    let inputs = inputs(&config);
    let step = Step::new(&config, &inputs);
    let wrong_after = |corrupt: fn(&mut Device, LocalExpertIdx, usize)| {
        let mut device = Device::dispatch(&config, &inputs, Rank(1));
        let (expert, row) = some_row(&device);
        corrupt(&mut device, expert, row);
        step.check_dispatch(Rank(1), &device.output()).wrong
    };
    assert_eq!(wrong_after(|_, _, _| ()), 0);
    assert_eq!(wrong_after(|device, _, row| device.payload[row * 208 + 207] ^= 1), 1);
    assert_eq!(
        wrong_after(|device, expert, _| {
            let at = device.scale_place(expert, 1, 1);
            device.scales[at] ^= 1;
        }),
        1
    );
    assert_eq!(wrong_after(|device, _, row| device.info[row].token ^= 1), 1);
    assert_eq!(wrong_after(|device, _, row| device.info[row].source ^= 1), 1);
    assert_eq!(wrong_after(|device, _, row| device.info[row].k ^= 1), 1);
    assert_eq!(wrong_after(|device, _, row| device.info[row].weight += 0.5), 1);
    assert_eq!(wrong_after(|device, expert, _| device.counts[expert.index()] += 1), 1);
    assert!(wrong_after(|device, _, _| device.ranges[0].len += 1) > 0);
    assert!(wrong_after(|device, _, _| device.ranges[0].begin += 1) > 0);
    let wild = wrong_after(|device, _, _| device.ranges[0].begin = u32::MAX);
    assert!(wild > 0, "a wild index is not followed");
}

#[test]
fn a_lost_source_is_counted_and_must_leave_no_rows() {
    let config = config(|_| ());
    let inputs = inputs(&config);
    let step = Step::new(&config, &inputs);
    let mut device = Device::dispatch(&config, &inputs, Rank(0));
    let rows: u32 = (0..4).map(|expert| device.ranges[expert * 3].len).sum();
    device.source_ok[0] = 0;
    assert!(step.check_dispatch(Rank(0), &device.output()).wrong > 0, "its rows are still there");

    let mut survivors = inputs.clone();
    survivors[0] = RankInput { num_topk: 4, ..RankInput::default() };
    let mut device = Device::dispatch(&config, &survivors, Rank(0));
    device.source_ok[0] = 0;
    let verdict = step.check_dispatch(Rank(0), &device.output());
    assert_eq!((verdict.wrong, verdict.lost), (0, u64::from(rows)));
}

#[test]
fn a_source_lost_after_its_counts_leaves_holes_and_no_others_are_excused() {
    let config = config(|_| ());
    let inputs = inputs(&config);
    let step = Step::new(&config, &inputs);
    let mut device = Device::dispatch(&config, &inputs, Rank(0));
    device.source_ok[0] = 0;
    let num_ranks = config.num_ranks as usize;
    let of_lost = |device: &Device| (0..device.ranges.len()).step_by(num_ranks).collect::<Vec<_>>();
    let places = of_lost(&device);
    let reserved: u32 = places.iter().map(|&at| device.ranges[at].len).sum();
    assert!(reserved > 0);
    for &at in &places {
        device.ranges[at].len = 0;
    }
    let verdict = step.check_dispatch(Rank(0), &device.output());
    assert_eq!((verdict.wrong, verdict.lost), (0, u64::from(reserved)));
    device.counts[0] += 1;
    assert_eq!(step.check_dispatch(Rank(0), &device.output()).wrong, 1, "a row that nobody reserved");
    device.counts[0] -= 1;
    device.source_ok[0] = 1;
    assert!(step.check_dispatch(Rank(0), &device.output()).wrong > 0, "a hole that nobody lost");
}

#[test]
fn a_repeated_pick_shares_its_row_and_adds_its_weight() {
    let config = config(|config| config.num_ranks = 1);
    let mut input =
        RankInput::generate(&config, Routing::Uniform, InputKey { seed: 1, iteration: 0, rank: Rank(0) }, 1);
    input.topk_idx = vec![2, 5, 2, -1];
    input.topk_weights = vec![0.5, 0.25, 0.125, 1.0];
    let inputs = [input];
    let step = Step::new(&config, &inputs);
    let rows = step.expected_rows(Rank(0), LocalExpertIdx(2), Rank(0));
    assert_eq!(rows, [PackedRow { token: 0, k: 0, weight: 0.5 }]);
    let device = Device::dispatch(&config, &inputs, Rank(0));
    let verdict = step.check_dispatch(Rank(0), &device.output());
    assert_eq!((verdict.checked, verdict.wrong), (2, 0));

    let mut merged = inputs.clone();
    merged[0].topk_idx = vec![2, 5, -1, -1];
    merged[0].topk_weights[0] = 0.625;
    let merged = Step::new(&config, &merged).expected_output(Rank(0), 0, 0);
    let both = step.expected_output(Rank(0), 0, 0);
    let close = |(&a, &b): (&u16, &u16)| {
        let (a, b) = (numerics::bf16_to_f32(a), numerics::bf16_to_f32(b));
        (a - b).abs() <= b.abs() / 64.0 || a.to_bits() == b.to_bits()
    };
    assert!(both.iter().zip(&merged).all(close));
}

/// The formula of the fault-tolerant reference, in f64: sum of w * x * (1 + 0.1 e), and of the magnitudes.
fn exact_sum(step: &Step<'_>, rank: Rank, token: u32, element: usize) -> (f64, f64) {
    let x = f64::from(step.received_values(rank, token)[element]);
    let input = &step.inputs[rank.index()];
    let picks = input.picks(token).iter().zip(input.weights(token)).filter(|&(&expert, _)| expert >= 0);
    picks.fold((0.0, 0.0), |(sum, magnitudes), (&expert, &weight)| {
        let term = f64::from(weight) * x * (1.0 + 0.1 * f64::from(expert));
        (sum + term, magnitudes + term.abs())
    })
}

#[test]
fn both_combines_are_within_their_bound_of_the_formula() {
    for mode in [CombineMode::Exact, CombineMode::Reduced] {
        let config = config(|config| config.combine = mode);
        let inputs = inputs(&config);
        let step = Step::new(&config, &inputs);
        let mut compared = 0;
        for token in 0..inputs[0].num_tokens {
            let output = step.expected_output(Rank(0), token, 0);
            for (element, &bits) in output.iter().enumerate() {
                let (sum, magnitudes) = exact_sum(&step, Rank(0), token, element);
                if !sum.is_finite() || magnitudes > 1e38 {
                    continue;
                }
                // Besides the bound: the expert's own output is rounded to bf16.
                let bound = reduced_bound(magnitudes) + magnitudes / 255.0;
                let error = (f64::from(numerics::bf16_to_f32(bits)) - sum).abs();
                assert!(error <= bound, "{mode} token {token} element {element}: {error} > {bound}");
                compared += 1;
            }
        }
        assert!(compared > 1000, "{compared}");
    }
}

#[test]
fn the_two_combines_differ_somewhere() {
    let outputs = [CombineMode::Exact, CombineMode::Reduced].map(|mode| {
        let config = config(|config| config.combine = mode);
        let inputs = inputs(&config);
        let step = Step::new(&config, &inputs);
        (0..8).flat_map(|token| step.expected_output(Rank(0), token, 0)).collect::<Vec<_>>()
    });
    assert_ne!(outputs[0], outputs[1]);
}

/// A right combine of rank 0 with the given losses.
fn combined(step: &Step<'_>, lost: &[u32]) -> Vec<u16> {
    lost.iter().zip(0..).flat_map(|(&lost, token)| step.expected_output(Rank(0), token, lost)).collect()
}

#[test]
fn a_combine_is_judged_given_its_losses() {
    let config = config(|_| ());
    let mut inputs = inputs(&config);
    inputs[0].topk_idx[..4].copy_from_slice(&[0, 9, -1, 3]); // Token 0: owners 0, 2, none, 0.
    let step = Step::new(&config, &inputs);
    let mut lost = vec![0u32; inputs[0].num_tokens as usize];
    let check = |out: &[u16], lost: &[u32], dead: Option<Rank>| {
        let output = CombineOutput { out, lost_topk: lost };
        step.check_combine(Rank(0), &output, &[0, 1, 2].map(|rank| Some(Rank(rank)) != dead))
    };
    let out = combined(&step, &lost);
    let verdict = check(&out, &lost, None);
    assert_eq!((verdict.checked, verdict.wrong, verdict.lost), (12, 0, 0));

    let mut corrupted = out.clone();
    corrupted[5] ^= 1;
    assert_eq!(check(&corrupted, &lost, None).wrong, 1);

    // A reported loss is taken out of the sum, counted, and excess unless the owner had left.
    lost[0] = 0b0010;
    assert_eq!(check(&out, &lost, None).wrong, 1, "the output still contains the lost pick");
    let out = combined(&step, &lost);
    let verdict = check(&out, &lost, None);
    assert_eq!((verdict.wrong, verdict.lost, verdict.excess_losses), (0, 1, 1));
    assert_eq!(check(&out, &lost, Some(Rank(2))).excess_losses, 0);

    // A masked pick is never lost, nor is one beyond top-k.
    for bit in [2, 4, 31] {
        let mut lost = vec![0; lost.len()];
        lost[0] = 1 << bit;
        assert_eq!(check(&combined(&step, &lost), &lost, None).wrong, 1, "bit {bit}");
    }
}

#[test]
fn an_unreported_pick_of_a_dead_owner_is_wrong() {
    let config = config(|_| ());
    let inputs = inputs(&config);
    let step = Step::new(&config, &inputs);
    let lost = vec![0; inputs[0].num_tokens as usize];
    let out = combined(&step, &lost);
    let output = CombineOutput { out: &out, lost_topk: &lost };
    let verdict = step.check_combine(Rank(0), &output, &[true, false, true]);
    let touched = (0..12).filter(|&token| inputs[0].picks(token).iter().any(|&pick| (4..7).contains(&pick)));
    assert_eq!(verdict.wrong, touched.count() as u64);
}

#[test]
fn ranges_must_tile_their_expert() {
    let range = |begin, len| LayoutRange { begin, len };
    assert!(is_dense(&[range(3, 2), range(0, 3), range(9, 0)], &[], 5));
    assert!(!is_dense(&[range(3, 2), range(0, 3)], &[], 4), "the count disagrees");
    assert!(!is_dense(&[range(2, 2), range(0, 3)], &[], 5), "an overlap");
    assert!(!is_dense(&[range(4, 2), range(0, 3)], &[], 5), "a gap");
    assert!(!is_dense(&[], &[], -1), "a count below none");
    assert!(is_dense(&[], &[], 0));
}

#[test]
fn a_gap_is_right_only_where_lost_sources_reserved() {
    let range = |begin, len| LayoutRange { begin, len };
    let live = [range(0, 3), range(7, 2)];
    assert!(is_dense(&live, &[(3, 4)], 9), "one hole");
    assert!(is_dense(&live, &[(5, 2), (3, 2)], 9), "two that follow each other");
    assert!(is_dense(&live, &[(3, 4), (9, 2)], 11), "one at the end");
    assert!(
        is_dense(&live, &[(3, 1), (3, 4), (7, 6), (9, 6)], 9),
        "those lost before their counts reserve nothing"
    );
    assert!(!is_dense(&live, &[(3, 3)], 9), "too short");
    assert!(!is_dense(&live, &[(3, 5)], 9), "too long");
    assert!(!is_dense(&live, &[(4, 3)], 9), "begins too late");
    assert!(!is_dense(&live, &[(3, 4)], 10), "the count names a row of nobody");
}
