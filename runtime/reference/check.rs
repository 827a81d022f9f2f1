//! Compares what a device left in memory with what dispatch and combine must compute.
//!
//! [`Step`] owns the inputs of all ranks and their cast rows. Device memory is read through
//! [`PackedRows`], rows at a time: the packed tensors are sized for the worst routing and mostly empty.
//!
//! INVARIANT: nothing a device wrote is trusted: any index it left is checked before it is followed.
//!
//! A token that picks one expert twice shares one packed row (of the first pick); every pick still
//! adds its own weight in combine.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::ops::AddAssign;

use ibex_abi::device_ctx::{LayoutRange, SourceInfo};

use crate::config::{CombineMode, ValidConfig, WireDtype};
use crate::ids::{ExpertIdx, LocalExpertIdx, Rank};
use crate::membership::RankSet;
use crate::placement::Placement;
use crate::reference::inputs::RankInput;
use crate::reference::numerics;

/// What a check found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Rows (dispatch) or outputs (combine) looked at.
    pub checked: u64,
    /// Rows or outputs that differ from the reference, given the losses.
    pub wrong: u64,
    /// Picks reported lost.
    pub lost: u64,
    /// Picks reported lost although their owner was a member.
    pub excess_losses: u64,
}

impl AddAssign for Verdict {
    fn add_assign(&mut self, other: Self) {
        self.checked += other.checked;
        self.wrong += other.wrong;
        self.lost += other.lost;
        self.excess_losses += other.excess_losses;
    }
}

/// Read access to the packed tensors of one rank; rows are numbered within their local expert.
pub trait PackedRows {
    /// Reads the payload of consecutive rows.
    fn payload(&self, expert: LocalExpertIdx, first: u32, into: &mut [u8]);
    /// Reads the stored scales of one row, block after block, whatever the strides are.
    fn scales(&self, expert: LocalExpertIdx, row: u32, into: &mut [u8]);
    /// Reads where one row came from.
    fn source_info(&self, expert: LocalExpertIdx, row: u32) -> SourceInfo;
}

/// What a dispatch left at one rank.
pub struct DispatchOutput<'a> {
    /// `[max_local_experts]`.
    pub expert_counts: &'a [i32],
    /// `[max_local_experts][num_ranks]`.
    pub layout_ranges: &'a [LayoutRange],
    /// `[num_ranks]`.
    pub source_ok: &'a [u32],
    /// The packed tensors.
    pub rows: &'a dyn PackedRows,
}

/// What a combine left at one rank.
pub struct CombineOutput<'a> {
    /// `[num_tokens][hidden]` bf16.
    pub out: &'a [u16],
    /// `[num_tokens]`: bit k = the pick was not summed.
    pub lost_topk: &'a [u32],
}

/// One packed row that a dispatch must produce.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PackedRow {
    /// Token at the source.
    pub token: u32,
    /// Pick of that token.
    pub k: u8,
    /// Weight of that pick.
    pub weight: f32,
}

/// Every row of a step as it travels: per rank and token, payload and stored scales.
#[derive(Clone, Debug)]
pub struct CastRows(Vec<Vec<(Vec<u8>, Vec<u8>)>>);

impl CastRows {
    /// Casts every row of `inputs`, which are those of all ranks in order.
    #[must_use]
    pub fn new(config: &ValidConfig, inputs: &[RankInput]) -> Self {
        let travel = |row: &[u16]| match config.dtype {
            WireDtype::Bf16 => (row.iter().flat_map(|bits| bits.to_le_bytes()).collect(), Vec::new()),
            WireDtype::Fp8 => numerics::cast_row(row, config.scales),
        };
        let rows_of =
            |input: &RankInput| (0..input.num_tokens).map(|token| travel(input.row(token))).collect();
        Self(inputs.iter().map(rows_of).collect())
    }

    fn row(&self, source: Rank, token: u32) -> &(Vec<u8>, Vec<u8>) {
        &self.0[source.index()][token as usize]
    }
}

/// Whose replicas sources choose among.
enum Members {
    /// All sources have switched with the same members.
    Same(RankSet),
    /// By source.
    Each(Vec<RankSet>),
}

impl Members {
    fn of(&self, source: Rank) -> &RankSet {
        match self {
            Self::Same(alive) => alive,
            Self::Each(alive) => &alive[source.index()],
        }
    }
}

/// One step of all ranks: inputs, and the rows as they travel.
pub struct Step<'a> {
    config: &'a ValidConfig,
    inputs: &'a [RankInput],
    /// Who serves an expert, where that is not what the configuration says.
    placed: Option<(&'a Placement, Members)>,
    travelling: Cow<'a, CastRows>,
}

impl<'a> Step<'a> {
    /// Casts every row of `inputs`, which are those of all ranks in order.
    ///
    /// # Panics
    /// PANIC: the number of inputs is not the number of ranks.
    #[must_use]
    pub fn new(config: &'a ValidConfig, inputs: &'a [RankInput]) -> Self {
        assert_eq!(inputs.len(), config.num_ranks as usize, "one input per rank");
        let travelling = Cow::Owned(CastRows::new(config, inputs));
        Self { config, inputs, placed: None, travelling }
    }

    /// [`Step::new`] for who judges one step of several ranks: `rows` are its cast rows.
    #[must_use]
    pub fn with_rows(config: &'a ValidConfig, inputs: &'a [RankInput], rows: &'a CastRows) -> Self {
        Self { config, inputs, placed: None, travelling: Cow::Borrowed(rows) }
    }

    /// The same step under the placement of a switch, whose members were `alive`.
    #[must_use]
    pub fn placed(mut self, placement: &'a Placement, alive: &RankSet) -> Self {
        self.placed = Some((placement, Members::Same(*alive)));
        self
    }

    /// [`Step::placed`] where sources may have switched with different members: one of them left the group meanwhile.
    #[must_use]
    pub fn placed_by_source(mut self, placement: &'a Placement, alive: Vec<RankSet>) -> Self {
        self.placed = Some((placement, Members::Each(alive)));
        self
    }

    /// Who serves pick (`token`, `k`) of `source`; `None` if it is masked or names no expert.
    fn owner(&self, source: Rank, token: u32, k: usize) -> Option<(Rank, LocalExpertIdx)> {
        let expert = ExpertIdx(u16::try_from(self.inputs[source.index()].picks(token)[k]).ok()?);
        match &self.placed {
            Some((placement, alive)) => placement.owner_for(source, expert, alive.of(source)),
            None => self.config.owner_of(expert),
        }
    }

    /// Whether anybody serves pick (`token`, `k`) of `source`.
    #[must_use]
    pub fn is_served(&self, source: Rank, token: u32, k: usize) -> bool {
        self.owner(source, token, k).is_some()
    }

    /// The packed rows of `source` for one local expert of `rank`, in the order that the format fixes.
    #[must_use]
    pub fn expected_rows(&self, rank: Rank, expert: LocalExpertIdx, source: Rank) -> Vec<PackedRow> {
        let input = &self.inputs[source.index()];
        let first_pick = |token| {
            let picks = 0..input.num_topk as usize;
            picks.into_iter().find(|&k| self.owner(source, token, k) == Some((rank, expert)))
        };
        let row = |token| {
            let k = first_pick(token)?;
            // CAST: at most 32 picks.
            Some(PackedRow { token, k: k as u8, weight: input.weights(token)[k] })
        };
        (0..input.num_tokens).filter_map(row).collect()
    }

    /// Checks everything that a dispatch left at `rank`.
    #[must_use]
    pub fn check_dispatch(&self, rank: Rank, output: &DispatchOutput<'_>) -> Verdict {
        let mut verdict = Verdict::default();
        for local in 0..self.config.max_local_experts() {
            // CAST: at most 65 535 experts.
            let expert = LocalExpertIdx(local as u16);
            let num_ranks = self.config.num_ranks as usize;
            let ranges = &output.layout_ranges[expert.index() * num_ranks..][..num_ranks];
            let holes = self.holes(rank, expert, ranges, output.source_ok);
            if !is_dense(ranges, &holes, output.expert_counts[expert.index()]) {
                verdict.wrong += 1;
            }
            for (source, &range) in (0..).map(Rank).zip(ranges) {
                verdict += self.check_range(rank, expert, source, range, output);
            }
        }
        verdict
    }

    /// Where rows of lost sources may have been reserved: a source that is lost after its counts arrived leaves a
    /// hole at the begin of its range, which has length 0.
    fn holes(
        &self,
        rank: Rank,
        expert: LocalExpertIdx,
        ranges: &[LayoutRange],
        source_ok: &[u32],
    ) -> Vec<(u64, u64)> {
        let hole = |(source, range): (Rank, &LayoutRange)| {
            let reserved = || self.expected_rows(rank, expert, source).len() as u64;
            (source_ok[source.index()] != 1).then(|| (u64::from(range.begin), reserved()))
        };
        (0..).map(Rank).zip(ranges).filter_map(hole).filter(|&(_, len)| len > 0).collect()
    }

    fn check_range(
        &self,
        rank: Rank,
        expert: LocalExpertIdx,
        source: Rank,
        range: LayoutRange,
        output: &DispatchOutput<'_>,
    ) -> Verdict {
        let mut expected = self.expected_rows(rank, expert, source);
        let mut verdict = Verdict::default();
        if output.source_ok[source.index()] != 1 {
            verdict.lost += expected.len() as u64;
            expected.clear();
        }
        verdict.checked += expected.len() as u64;
        let capacity = u64::from(self.config.num_ranks) * u64::from(self.config.max_tokens);
        let fits = u64::from(range.begin) + u64::from(range.len) <= capacity;
        if range.len as usize != expected.len() || !fits {
            verdict.wrong += (expected.len() as u64).max(1);
            return verdict;
        }
        let payload_len = self.payload_len();
        let mut payload = vec![0; payload_len * expected.len()];
        output.rows.payload(expert, range.begin, &mut payload);
        let received = payload.chunks(payload_len).zip(range.begin..);
        for (row, (payload, index)) in expected.iter().zip(received) {
            let (wanted_payload, wanted_scales) = self.travelling.row(source, row.token);
            let info = output.rows.source_info(expert, index);
            let mut scales = vec![0; wanted_scales.len()];
            output.rows.scales(expert, index, &mut scales);
            let same = payload == wanted_payload
                && scales == *wanted_scales
                && (info.token, info.source, info.k) == (row.token, source.0, row.k)
                && info.weight.to_bits() == row.weight.to_bits();
            verdict.wrong += u64::from(!same);
        }
        verdict
    }

    fn payload_len(&self) -> usize {
        let hidden = self.config.hidden as usize;
        match self.config.dtype {
            WireDtype::Bf16 => 2 * hidden,
            WireDtype::Fp8 => hidden,
        }
    }

    /// Checks everything that a combine left at `rank`, with the stand-in expert in between.
    ///
    /// `alive` says per rank whether it is a member. A lost pick is taken out of the sum; a pick whose
    /// owner is no member must be reported lost.
    #[must_use]
    pub fn check_combine(&self, rank: Rank, output: &CombineOutput<'_>, alive: &[bool]) -> Verdict {
        let is_member = |rank: Rank| alive[rank.index()];
        let input = &self.inputs[rank.index()];
        let hidden = self.config.hidden as usize;
        let mut verdict = Verdict::default();
        for token in 0..input.num_tokens {
            let lost = output.lost_topk[token as usize];
            let mut plausible = true;
            for k in 0..32 {
                let is_lost = lost >> k & 1 == 1;
                let owner = (k < input.num_topk as usize)
                    .then(|| self.owner(rank, token, k))
                    .flatten()
                    .map(|(owner, _)| owner);
                match owner {
                    // A masked pick is not lost; one that names no expert is.
                    None => {
                        plausible &= is_lost == (k < input.num_topk as usize && input.picks(token)[k] >= 0)
                    }
                    Some(owner) if is_lost => verdict.excess_losses += u64::from(is_member(owner)),
                    Some(owner) => plausible &= is_member(owner),
                }
            }
            let out = &output.out[token as usize * hidden..][..hidden];
            verdict.checked += 1;
            verdict.lost += u64::from(lost.count_ones());
            verdict.wrong += u64::from(!plausible || out != self.expected_output(rank, token, lost));
        }
        verdict
    }

    /// The output of one token, the lost picks left out.
    #[must_use]
    pub fn expected_output(&self, rank: Rank, token: u32, lost: u32) -> Vec<u16> {
        let values = self.received_values(rank, token);
        let weights = self.inputs[rank.index()].weights(token);
        let picks = self.inputs[rank.index()].picks(token);
        // (owner, weight, row) of every pick that counts, in ascending k.
        let rows = (0..picks.len()).filter(|&k| lost >> k & 1 == 0).filter_map(|k| {
            let (owner, _) = self.owner(rank, token, k)?;
            let expert = u16::try_from(picks[k]).ok()?;
            let row = numerics::expert_row(&values, numerics::expert_factor(expert));
            Some((owner, weights[k], row))
        });
        match self.config.combine {
            CombineMode::Exact => {
                let mut sums = vec![0.0; values.len()];
                rows.for_each(|(_, weight, row)| numerics::add_weighted(&mut sums, &row, weight));
                numerics::round_row(&sums)
            }
            CombineMode::Reduced => reduce_by_owner(rows, values.len()),
        }
    }

    /// A token's row as its experts see it.
    fn received_values(&self, source: Rank, token: u32) -> Vec<f32> {
        match self.config.dtype {
            WireDtype::Bf16 => {
                let row = self.inputs[source.index()].row(token);
                row.iter().map(|&bits| numerics::bf16_to_f32(bits)).collect()
            }
            WireDtype::Fp8 => {
                let (payload, scales) = self.travelling.row(source, token);
                numerics::decode_row(payload, scales, self.config.scales)
            }
        }
    }
}

/// How far a `reduced` output may lie from the exact sum, given the sum of the magnitudes `|w * y|`.
///
/// Each owner's sum is rounded once to bf16 and so is their total: 2^-8 of its magnitude each time, and
/// fp32 adds little. The constant part covers outputs that are denormal.
#[must_use]
pub fn reduced_bound(magnitude_sum: f64) -> f64 {
    magnitude_sum * (1.0 / 127.0) + f64::from(f32::MIN_POSITIVE)
}

/// `reduced`: per owner a weighted sum rounded once; then their plain sum, owners by their first pick.
fn reduce_by_owner(rows: impl Iterator<Item = (Rank, f32, Vec<u16>)>, hidden: usize) -> Vec<u16> {
    let mut partial: Vec<(Rank, Vec<f32>)> = Vec::new();
    for (owner, weight, row) in rows {
        let known = partial.iter().position(|&(other, _)| other == owner);
        let place = known.unwrap_or_else(|| {
            partial.push((owner, vec![0.0; hidden]));
            partial.len() - 1
        });
        numerics::add_weighted(&mut partial[place].1, &row, weight);
    }
    let mut sums = vec![0.0; hidden];
    for (_, owned) in &partial {
        numerics::add_plain(&mut sums, &numerics::round_row(owned));
    }
    numerics::round_row(&sums)
}

/// Whether the ranges of one expert tile `0..count` without overlaps, in any order, and what they leave open is
/// exactly the (begin, length) of some of `holes`.
fn is_dense(ranges: &[LayoutRange], holes: &[(u64, u64)], count: i32) -> bool {
    let Ok(count) = u64::try_from(count) else { return false };
    let mut used: Vec<(u64, u64)> = ranges
        .iter()
        .filter(|range| range.len > 0)
        .map(|range| (u64::from(range.begin), u64::from(range.len)))
        .collect();
    used.sort_unstable();
    used.push((count, 0));
    let mut holes = holes.to_vec();
    holes.sort_unstable();
    let mut end = 0;
    for (begin, len) in used {
        if !is_tiled(end, begin, &holes) {
            return false;
        }
        end = begin + len;
    }
    true
}

/// Whether some of `holes`, which are sorted, tile `from..to`.
///
/// Not all must be there: a source that is lost before its counts arrive reserves nothing, and its range begins
/// where the next one does.
fn is_tiled(from: u64, to: u64, holes: &[(u64, u64)]) -> bool {
    let mut reached = BTreeSet::from([from]);
    for (begin, len) in holes {
        if reached.contains(begin) {
            reached.insert(begin + len);
        }
    }
    reached.contains(&to)
}

#[cfg(test)]
#[path = "check_tests.rs"]
mod tests;
