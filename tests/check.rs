//! The check behind `--check`, on device memory: a right step is right, one corrupted byte is seen.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use ibex::config::{CombineMode, Config, ValidConfig};
use ibex::harness::{Rig, RigRank, StepPlan};
use ibex::ids::Rank;
use ibex::reference::check::{Step, Verdict};
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::reference::routing::Routing;
use ibex::session::WorldOptions;

fn inputs(config: &ValidConfig) -> Vec<RankInput> {
    let draw = |rank| {
        let key = InputKey { seed: 11, iteration: 0, rank: Rank(rank) };
        RankInput::generate(config, Routing::Uniform, key, config.max_tokens)
    };
    (0..config.num_ranks as u16).map(draw).collect()
}

/// Flips one bit of a byte in device memory.
fn flip(rank: &RigRank, addr: u64) {
    let gpu = rank.session.gpu();
    let mut byte = [0];
    gpu.read(addr, &mut byte).unwrap();
    gpu.write(addr, &[byte[0] ^ 1]).unwrap();
}

#[test]
fn one_corrupted_byte_of_device_memory_is_seen() {
    for combine in [CombineMode::Exact, CombineMode::Reduced] {
        let config = Config {
            num_ranks: 2,
            max_tokens: 6,
            hidden: 144,
            num_experts: 4,
            max_topk: 2,
            combine,
            ..Config::default()
        };
        let rig = Rig::new(&config, &WorldOptions::default()).unwrap();
        let inputs = inputs(rig.config());
        let clean = rig.step(&inputs, &StepPlan::default()).unwrap();
        assert_eq!(clean, Verdict { checked: clean.checked, ..Verdict::default() });
        assert!(clean.checked >= 12 + 20, "outputs and packed rows: {}", clean.checked);

        let step = Step::new(rig.config(), &inputs);
        let rank = &rig.ranks()[1];
        let t = &rank.tensors;
        // The first packed row of the first local expert, whichever source it came from.
        for addr in [t.packed_x.addr() + 143, t.packed_scales.as_ref().unwrap().addr(), t.source_info.addr()]
        {
            assert_eq!(rank.check_dispatch(&step).unwrap().wrong, 0);
            flip(rank, addr);
            assert_eq!(rank.check_dispatch(&step).unwrap().wrong, 1);
            flip(rank, addr);
        }
        let wrong = || rank.check_combine(&step, &inputs[1], &[true; 2]).unwrap().wrong;
        assert_eq!(wrong(), 0);
        flip(rank, t.out.addr() + 5 * 2 * 144 + 287);
        assert_eq!(wrong(), 1);
    }
}
