//! One finished step judged: what is wrong, what is missing and unsaid, what was reported lost and whose it was.
//!
//! Pure, and independent of the kernels: the reference computes every output anew. The oracle does not decide whether
//! a loss is excused; the [`ledger`](super::ledger) does, which knows what was injected.

use crate::ids::Rank;
use crate::reference::check::Step;
use crate::reference::inputs::RankInput;

/// What one rank's combine left, judged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Judgement {
    /// Tokens whose output is nothing that the reference can explain.
    pub wrong_tokens: u64,
    /// Picks that are not in the sum although nobody said so.
    pub unreported_losses: u64,
    /// Owners of the picks that were reported lost; `None` for a pick that names nobody who could lose it.
    pub lost: Vec<Option<Rank>>,
}

/// Judges the outputs of `rank`. `owner_of(token, k)` is who serves that pick, if anybody does.
///
/// A lost pick is taken out of the reference. An output that fits with still fewer picks has unreported losses; one
/// that fits with no subset is wrong.
#[must_use]
pub fn judge_combine(
    step: &Step<'_>,
    rank: Rank,
    input: &RankInput,
    (out, lost_topk): (&[u16], &[u32]),
    owner_of: impl Fn(u32, usize) -> Option<Rank>,
) -> Judgement {
    let mut judgement = Judgement::default();
    let hidden = out.len() / (input.num_tokens as usize).max(1);
    for token in 0..input.num_tokens {
        let lost = lost_topk[token as usize];
        for k in (0..32).filter(|k| lost >> k & 1 == 1) {
            let is_pick = k < input.num_topk as usize && input.picks(token)[k] >= 0;
            judgement.lost.push(is_pick.then(|| owner_of(token, k)).flatten());
        }
        // What nobody serves cannot have been summed: not to say so is a loss unsaid.
        let is_unsaid = |k: &usize| lost >> k & 1 == 0 && input.picks(token)[*k] >= 0;
        let unserved = (0..input.num_topk as usize).filter(|&k| !step.is_served(rank, token, k));
        judgement.unreported_losses += unserved.filter(is_unsaid).count() as u64;
        let found = &out[token as usize * hidden..][..hidden];
        if found == step.expected_output(rank, token, lost) {
            continue;
        }
        match missing_picks(step, rank, input, token, lost, found) {
            Some(missing) => judgement.unreported_losses += u64::from(missing.count_ones()),
            None => judgement.wrong_tokens += 1,
        }
    }
    judgement
}

/// The fewest further picks without which the reference gives what was found.
fn missing_picks(
    step: &Step<'_>,
    rank: Rank,
    input: &RankInput,
    token: u32,
    lost: u32,
    found: &[u16],
) -> Option<u32> {
    /// Picks of one token that are tried in all combinations.
    const TRIED_MAX: u32 = 10;
    let summed: Vec<u32> = (0..input.num_topk.min(TRIED_MAX)).filter(|k| lost >> k & 1 == 0).collect();
    let subsets = (1_u32..1 << summed.len()).map(|subset| {
        let bits = summed.iter().enumerate().filter(|(i, _)| subset >> i & 1 == 1);
        bits.fold(0, |mask, (_, k)| mask | 1 << k)
    });
    subsets
        .filter(|more| found == step.expected_output(rank, token, lost | more))
        .min_by_key(|m| m.count_ones())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Config, ValidConfig, WireDtype};
    use crate::ids::ExpertIdx;
    use crate::reference::rng::InputKey;
    use crate::reference::routing::Routing;

    fn setting() -> (ValidConfig, Vec<RankInput>) {
        let config = Config {
            num_ranks: 2,
            max_tokens: 3,
            hidden: 32,
            num_experts: 6,
            max_topk: 3,
            dtype: WireDtype::Bf16,
            ..Config::default()
        };
        let config = config.validate().unwrap();
        let input = |rank| {
            let key = InputKey { seed: 5, iteration: 1, rank: Rank(rank) };
            RankInput::generate(&config, Routing::Uniform, key, 3)
        };
        let inputs = vec![input(0), input(1)];
        (config, inputs)
    }

    fn judge(tamper: impl Fn(&Step<'_>, &mut Vec<u16>, &mut Vec<u32>)) -> (Judgement, Vec<RankInput>) {
        let (config, inputs) = setting();
        let step = Step::new(&config, &inputs);
        let mut out: Vec<u16> = (0..3).flat_map(|t| step.expected_output(Rank(0), t, 0)).collect();
        let mut lost = vec![0; 3];
        tamper(&step, &mut out, &mut lost);
        let owner = |token, k: usize| {
            let expert = u16::try_from(inputs[0].picks(token)[k]).ok()?;
            config.owner_of(ExpertIdx(expert)).map(|(rank, _)| rank)
        };
        (judge_combine(&step, Rank(0), &inputs[0], (&out, &lost), owner), inputs)
    }

    #[test]
    fn outputs_as_they_should_be_are_good() {
        assert_eq!(judge(|_, _, _| {}).0, Judgement::default());
    }

    #[test]
    fn a_flipped_bit_is_a_wrong_token() {
        let (judgement, _) = judge(|_, out, _| out[40] ^= 1);
        assert_eq!((judgement.wrong_tokens, judgement.unreported_losses), (1, 0));
    }

    #[test]
    fn a_pick_that_is_missing_is_a_loss_said_or_unsaid() {
        let unsaid = judge(|step, out, _| {
            out[32..64].copy_from_slice(&step.expected_output(Rank(0), 1, 0b10));
        });
        assert_eq!((unsaid.0.wrong_tokens, unsaid.0.unreported_losses), (0, 1));
        let (said, inputs) = judge(|step, out, lost| {
            out[32..64].copy_from_slice(&step.expected_output(Rank(0), 1, 0b10));
            lost[1] = 0b10;
        });
        assert_eq!((said.wrong_tokens, said.unreported_losses), (0, 0));
        let owner = Rank((inputs[0].picks(1)[1] / 3) as u16);
        assert_eq!(said.lost, [Some(owner)]);
        // Said lost, and summed all the same.
        let (liar, _) = judge(|_, _, lost| lost[1] = 0b10);
        assert_eq!(liar.wrong_tokens, 1);
    }

    #[test]
    fn a_bit_beyond_the_picks_has_no_owner() {
        let (judgement, _) = judge(|_, _, lost| lost[0] = 1 << 9);
        assert_eq!(judgement.lost, [None]);
    }
}
