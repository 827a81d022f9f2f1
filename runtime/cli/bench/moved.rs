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
    /// What crosses from rank to rank.
    pub(super) pairs: Pairs,
}

/// Bytes from each rank to each, itself included; in the order of the sender, then of the receiver.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Pairs {
    pub(super) dispatch: Vec<usize>,
    pub(super) combine: Vec<usize>,
}

/// Bytes of a chain of copies.
pub(super) fn bytes(stages: &[Stage]) -> usize {
    stages.iter().map(|stage| stage.bytes()).sum()
}

impl Moved {
    /// Counts one step of all ranks.
    pub(super) fn new(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let routes = Routes::count(config, inputs);
        let (messages, picks) = (routes.messages(), routes.picks());
        let layout = Plan::new(config, Rank(0)).layout;
        let message_len = layout.message_stride as usize;
        let packed_len = (layout.payload_bytes + layout.scale_bytes) as usize + SOURCE_INFO_LEN;
        let row_len = layout.row_bytes as usize;
        let stage = |piece_len, num_pieces| Stage { piece_len, num_pieces };
        let output = stage(row_len, routes.tokens);
        Self {
            dispatch: vec![
                stage(message_len, routes.tokens),
                stage(message_len, messages),
                stage(packed_len, routes.rows),
            ],
            combine: match config.combine {
                // Rows leave from the expert's output itself: nothing is staged.
                CombineMode::Exact => vec![stage(row_len, picks), output],
                CombineMode::Reduced => {
                    let row = stage(row_len, messages);
                    vec![row, row, output]
                }
            },
            pairs: routes.pairs(message_len, row_len, config.combine),
        }
    }
}

/// How often tokens cross.
#[derive(Debug, PartialEq, Eq)]
struct Routes {
    /// Tokens of all ranks.
    tokens: usize,
    /// Pairs of a token and an expert that it picks.
    rows: usize,
    num_ranks: usize,
    /// By sender, then receiver: pairs of a token and a rank that serves at least one of its picks, and those picks.
    ways: Vec<Way>,
}

/// How often tokens of one rank cross to another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Way {
    messages: usize,
    picks: usize,
}

impl Routes {
    fn count(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let num_ranks = config.num_ranks as usize;
        let ways = vec![Way::default(); num_ranks * num_ranks];
        let mut routes = Self { tokens: 0, rows: 0, num_ranks, ways };
        for (input, ways) in inputs.iter().zip(routes.ways.chunks_mut(num_ranks)) {
            routes.tokens += input.num_tokens as usize;
            for token in 0..input.num_tokens {
                let picks = input.picks(token).iter().filter_map(|&pick| u16::try_from(pick).ok());
                let mut served: Vec<(Rank, u16)> = picks
                    .filter_map(|expert| Some((config.owner_of(ExpertIdx(expert))?.0, expert)))
                    .collect();
                for (owner, _) in &served {
                    ways[owner.index()].picks += 1;
                }
                served.sort_unstable();
                served.dedup();
                routes.rows += served.len();
                served.dedup_by_key(|(owner, _)| *owner);
                for (owner, _) in served {
                    ways[owner.index()].messages += 1;
                }
            }
        }
        routes
    }

    fn messages(&self) -> usize {
        self.ways.iter().map(|way| way.messages).sum()
    }

    /// Picks that somebody serves.
    fn picks(&self) -> usize {
        self.ways.iter().map(|way| way.picks).sum()
    }

    /// Bytes of messages, and of the rows that come back.
    fn pairs(&self, message_len: usize, row_len: usize, mode: CombineMode) -> Pairs {
        let rows_back = |way: &Way| match mode {
            CombineMode::Exact => way.picks,
            CombineMode::Reduced => way.messages,
        };
        // Rows go back: the owner is their sender.
        let turned = (0..self.num_ranks).flat_map(|owner| {
            (0..self.num_ranks).map(move |source| &self.ways[source * self.num_ranks + owner])
        });
        Pairs {
            dispatch: self.ways.iter().map(|way| way.messages * message_len).collect(),
            combine: turned.map(|way| rows_back(way) * row_len).collect(),
        }
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
        assert_eq!((routes.tokens, routes.messages(), routes.rows, routes.picks()), (2, 3, 6, 7));
        let moved = Moved::new(&config, &inputs);
        let pieces = |stages: &[Stage]| stages.iter().map(|s| s.num_pieces).collect::<Vec<_>>();
        assert_eq!((pieces(&moved.dispatch), pieces(&moved.combine)), (vec![2, 3, 6], vec![7, 2]));
        assert_eq!(moved.dispatch[2].piece_len, 7168 + 56 * 4 + 16);
        assert_eq!(moved.combine[0].piece_len, 14336);
    }

    #[test]
    fn what_crosses_between_two_ranks_comes_back_between_the_same_two() {
        let config = Config { num_ranks: 2, num_experts: 6, max_topk: 4, ..Config::default() };
        let inputs = [input(&[0, 1, 2, -1, 0, 3, 3, 5]), input(&[4, -1, -1, 0])];
        let exact = Moved::new(&config.clone().validate().unwrap(), &inputs);
        let message = exact.dispatch[1].piece_len;
        let Pairs { dispatch, combine } = exact.pairs;
        assert_eq!(dispatch, [2 * message, message, message, message]);
        assert_eq!(combine, [4, 1, 3, 1].map(|rows| rows * 14_336));
        let reduced = Config { combine: CombineMode::Reduced, ..config };
        let reduced = Moved::new(&reduced.validate().unwrap(), &inputs);
        assert_eq!(reduced.pairs.combine, [2, 1, 1, 1].map(|rows| rows * 14_336));
        assert_eq!(bytes(&reduced.combine), (5 + 5 + 3) * 14_336);
    }
}
