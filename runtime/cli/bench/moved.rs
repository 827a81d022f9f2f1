//! The bytes that a step must move, counted from its inputs: what the memcpy floor copies.
//!
//! Owns nothing. Each staged byte counts once, each wire byte once, each output byte once.

use ibex::config::{CombineMode, ValidConfig};
use ibex::ids::{ExpertIdx, Rank};
use ibex::layout::Plan;
use ibex::reference::inputs::RankInput;

use super::floor::Stage;

/// Bytes of a packed row's source info, which is an output like the row itself.
const SOURCE_INFO_LEN: usize = 16;

/// The bytes that a step must move, as chains of copies.
pub(super) struct Moved {
    /// Staged messages, messages on the wire, packed rows.
    pub(super) dispatch: Vec<Stage>,
    /// Staged rows where rows are staged, rows on the wire, outputs.
    pub(super) combine: Vec<Stage>,
}

impl Moved {
    /// Counts one step of all ranks.
    pub(super) fn new(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let routes = Routes::count(config, inputs);
        let layout = Plan::new(config, Rank(0)).layout;
        let message_len = layout.message_stride as usize;
        let packed_len = (layout.payload_bytes + layout.scale_bytes) as usize + SOURCE_INFO_LEN;
        let row_len = layout.row_bytes as usize;
        let stage = |piece_len, num_pieces| Stage { piece_len, num_pieces };
        let output = stage(row_len, routes.tokens);
        Self {
            dispatch: vec![
                stage(message_len, routes.tokens),
                stage(message_len, routes.messages),
                stage(packed_len, routes.rows),
            ],
            combine: match config.combine {
                // Rows leave from the expert's output itself: nothing is staged.
                CombineMode::Exact => vec![stage(row_len, routes.picks), output],
                CombineMode::Reduced => {
                    let row = stage(row_len, routes.messages);
                    vec![row, row, output]
                }
            },
        }
    }
}

/// How often tokens cross.
#[derive(Debug, Default, PartialEq, Eq)]
struct Routes {
    /// Tokens of all ranks.
    tokens: usize,
    /// Pairs of a token and a rank that serves at least one of its picks.
    messages: usize,
    /// Pairs of a token and an expert that it picks.
    rows: usize,
    /// Picks that somebody serves.
    picks: usize,
}

impl Routes {
    fn count(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let mut routes = Self::default();
        for input in inputs {
            routes.tokens += input.num_tokens as usize;
            for token in 0..input.num_tokens {
                let mut experts: Vec<u16> =
                    input.picks(token).iter().filter_map(|&pick| u16::try_from(pick).ok()).collect();
                routes.picks += experts.len();
                experts.sort_unstable();
                experts.dedup();
                routes.rows += experts.len();
                let owner = |&expert: &u16| config.owner_of(ExpertIdx(expert));
                // Experts are contiguous per rank, so equal owners stand side by side.
                let mut owners: Vec<Rank> = experts.iter().filter_map(owner).map(|(rank, _)| rank).collect();
                owners.dedup();
                routes.messages += owners.len();
            }
        }
        routes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ibex::config::Config;

    fn input(topk_idx: &[i32]) -> RankInput {
        RankInput {
            num_tokens: topk_idx.len() as u32 / 4,
            num_topk: 4,
            topk_idx: topk_idx.to_vec(),
            ..RankInput::default()
        }
    }

    #[test]
    fn the_floor_counts_each_crossing_once() {
        let config = Config { num_ranks: 2, num_experts: 6, max_topk: 4, ..Config::default() };
        let config = config.validate().unwrap();
        // Experts 0..3 on rank 0, 3..6 on rank 1.
        let inputs = [input(&[0, 1, 2, -1, 0, 3, 3, 5]), input(&[])];
        let routes = Routes::count(&config, &inputs);
        assert_eq!(routes, Routes { tokens: 2, messages: 3, rows: 6, picks: 7 });
        let moved = Moved::new(&config, &inputs);
        let pieces = |stages: &[Stage]| stages.iter().map(|s| s.num_pieces).collect::<Vec<_>>();
        assert_eq!((pieces(&moved.dispatch), pieces(&moved.combine)), (vec![2, 3, 6], vec![7, 2]));
        assert_eq!(moved.dispatch[2].piece_len, 7168 + 56 * 4 + 16);
        assert_eq!(moved.combine[0].piece_len, 14336);
    }
}
