//! Where experts are served: the owners of each one, and which of them a source chooses.
//!
//! Pure: values in, values out. A [`Placement`] that exists fits its configuration: every rank and every place of an
//! expert is within its limits, and no two experts share a place. It changes only at a switch, on every member at the
//! same step, so that source and owner never disagree.
//!
//! INVARIANT: [`Placement::chosen_for`] depends on its arguments alone: every member can tell what another one chose.

use std::collections::BTreeSet;

use ibex_abi::device_ctx::UNPLACED;

use crate::config::ValidConfig;
use crate::error::{ConfigError, Limit};
use crate::ids::{ExpertIdx, LocalExpertIdx, Rank};
use crate::membership::RankSet;

/// Who serves each expert; an expert may have several owners, its replicas, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    version: u32,
    /// By expert.
    owners: Vec<Vec<(Rank, LocalExpertIdx)>>,
}

impl Placement {
    /// The placement with these owners, by expert, if it fits `config`.
    ///
    /// # Errors
    /// The number of experts, a rank or a local index outside its limit, or a place that two experts share.
    pub fn new(
        config: &ValidConfig,
        version: u32,
        owners: Vec<Vec<(Rank, LocalExpertIdx)>>,
    ) -> Result<Self, ConfigError> {
        if owners.len() as u64 != u64::from(config.num_experts) {
            let limit = Limit::Exactly { field: "num_experts", value: config.num_experts.into() };
            return Err(refused("experts of a placement", owners.len() as u64, limit));
        }
        let mut taken = BTreeSet::new();
        for &(rank, local) in owners.iter().flatten() {
            within("rank of an owner", rank.0, config.num_ranks)?;
            within("local index of an owner", local.0, config.max_local_experts())?;
            if !taken.insert((rank, local)) {
                let limit = Limit::Exactly { field: "experts at one place of a rank", value: 1 };
                return Err(refused("local index of an owner (shared)", local.0.into(), limit));
            }
        }
        Ok(Self { version, owners })
    }

    /// Each expert at one of `members`, in equal contiguous shares; for all ranks of a group what
    /// [`ValidConfig::owner_of`] says.
    ///
    /// # Errors
    /// `local_experts` if the members have too few places for all experts.
    pub fn contiguous(config: &ValidConfig, version: u32, members: &RankSet) -> Result<Self, ConfigError> {
        let members: Vec<Rank> = members.iter().collect();
        let (experts, count) = (config.num_experts as usize, members.len().max(1));
        if experts.div_ceil(count) > config.max_local_experts() as usize || members.is_empty() {
            let limit =
                Limit::AtLeastField { field: "experts / members", min: experts.div_ceil(count) as u64 };
            return Err(refused("local_experts", config.max_local_experts().into(), limit));
        }
        let (each, extra) = (experts / count, experts % count);
        let mut owners = Vec::with_capacity(experts);
        for (index, &rank) in members.iter().enumerate() {
            for local in 0..each + usize::from(index < extra) {
                // CAST: local indices are below num_experts, which fits.
                owners.push(vec![(rank, LocalExpertIdx(local as u16))]);
            }
        }
        Self::new(config, version, owners)
    }

    /// Its version, which travels in every message.
    #[must_use]
    pub const fn version(&self) -> u32 {
        self.version
    }

    /// All owners, by expert.
    #[must_use]
    pub fn owners(&self) -> &[Vec<(Rank, LocalExpertIdx)>] {
        &self.owners
    }

    /// Which owner `source` sends picks of `expert` to while `alive` are members: itself if it is one of them, else
    /// sources spread over the replicas. `None` for an expert that nobody alive serves.
    #[must_use]
    pub fn owner_for(
        &self,
        source: Rank,
        expert: ExpertIdx,
        alive: &RankSet,
    ) -> Option<(Rank, LocalExpertIdx)> {
        let owners = self.owners.get(expert.index())?;
        let mut replicas = owners.iter().filter(|(rank, _)| alive.contains(*rank));
        if let Some(own) = replicas.clone().find(|(rank, _)| *rank == source) {
            return Some(*own);
        }
        let count = replicas.clone().count();
        if count == 0 {
            return None;
        }
        replicas.nth((source.index() + expert.index()) % count).copied()
    }

    /// [`Placement::owner_for`] of every expert, as kernels read it: rank << 16 | local index.
    #[must_use]
    pub fn chosen_for(&self, source: Rank, alive: &RankSet) -> Vec<u32> {
        let entry = |expert: usize| {
            // CAST: at most 65 535 experts.
            self.owner_for(source, ExpertIdx(expert as u16), alive)
                .map_or(UNPLACED, |(rank, local)| u32::from(rank.0) << 16 | u32::from(local.0))
        };
        (0..self.owners.len()).map(entry).collect()
    }

    /// The experts that `rank` serves, each with its place there.
    pub fn served_by(&self, rank: Rank) -> impl Iterator<Item = (LocalExpertIdx, ExpertIdx)> {
        let owned = (0..).zip(&self.owners).flat_map(|(expert, owners)| {
            owners.iter().map(move |(owner, local)| (*owner, *local, ExpertIdx(expert)))
        });
        owned.filter(move |(owner, ..)| *owner == rank).map(|(_, local, expert)| (local, expert))
    }
}

fn refused(field: &'static str, value: u64, limit: Limit) -> ConfigError {
    ConfigError { field, value: value.into(), limit }
}

fn within(field: &'static str, value: u16, len: u32) -> Result<(), ConfigError> {
    if u32::from(value) < len {
        return Ok(());
    }
    Err(refused(field, value.into(), Limit::Range { min: 0, max: u64::from(len) - 1 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Config;

    fn config(local_experts: Option<u32>) -> ValidConfig {
        let config = Config { num_ranks: 3, num_experts: 7, max_topk: 2, local_experts, ..Config::default() };
        config.validate().unwrap()
    }

    fn at(rank: u16, local: u16) -> (Rank, LocalExpertIdx) {
        (Rank(rank), LocalExpertIdx(local))
    }

    #[test]
    fn contiguous_over_all_ranks_is_the_configured_placement() {
        let config = config(None);
        let all = RankSet::first(3);
        let placement = Placement::contiguous(&config, 1, &all).unwrap();
        for expert in (0..7).map(ExpertIdx) {
            assert_eq!(placement.owner_for(Rank(2), expert, &all), config.owner_of(expert));
        }
        assert_eq!(placement.owner_for(Rank(0), ExpertIdx(7), &all), None);
    }

    #[test]
    fn fewer_members_need_more_places() {
        let members: RankSet = [Rank(0), Rank(2)].into_iter().collect();
        let error = Placement::contiguous(&config(None), 1, &members).unwrap_err();
        assert_eq!((error.field, error.value), ("local_experts", 3_u32.into()));
        let placement = Placement::contiguous(&config(Some(4)), 1, &members).unwrap();
        let served: Vec<_> = placement.served_by(Rank(2)).collect();
        assert_eq!(served, [(0, 4), (1, 5), (2, 6)].map(|(l, e)| (LocalExpertIdx(l), ExpertIdx(e))));
        assert!(Placement::contiguous(&config(Some(7)), 1, &RankSet::EMPTY).is_err());
    }

    #[test]
    fn a_source_chooses_itself_else_replicas_in_turn_and_never_the_dead() {
        let config = config(Some(7));
        let mut owners: Vec<_> = (0..7).map(|expert| vec![at(0, expert), at(1, expert)]).collect();
        owners[6] = vec![at(2, 6)];
        let placement = Placement::new(&config, 3, owners).unwrap();
        let all = RankSet::first(3);
        let chosen = |source, alive: &RankSet| placement.chosen_for(Rank(source), alive);
        assert_eq!(chosen(0, &all)[..6], [0, 1, 2, 3, 4, 5]);
        assert_eq!(chosen(1, &all)[..6], [0, 1, 2, 3, 4, 5].map(|local| 1 << 16 | local));
        assert_eq!(chosen(2, &all), [0, 1 << 16 | 1, 2, 1 << 16 | 3, 4, 1 << 16 | 5, 2 << 16 | 6]);
        let survivors = RankSet::first(2);
        assert_eq!(chosen(1, &survivors)[6], UNPLACED);
        let last: RankSet = [Rank(1), Rank(2)].into_iter().collect();
        assert!(chosen(2, &last)[..6].iter().all(|entry| entry >> 16 == 1));
    }

    #[test]
    fn what_does_not_fit_is_refused_by_name() {
        let config = config(None);
        type Owners = Vec<Vec<(Rank, LocalExpertIdx)>>;
        let with = |change: &dyn Fn(&mut Owners)| {
            let mut owners = Placement::contiguous(&config, 1, &RankSet::first(3)).unwrap().owners;
            change(&mut owners);
            Placement::new(&config, 2, owners).unwrap_err().field
        };
        assert_eq!(with(&|owners| _ = owners.pop()), "experts of a placement");
        assert_eq!(with(&|owners| owners[0][0].0 = Rank(3)), "rank of an owner");
        assert_eq!(with(&|owners| owners[0][0].1 = LocalExpertIdx(3)), "local index of an owner");
        assert_eq!(with(&|owners| owners[1].push(at(0, 0))), "local index of an owner (shared)");
    }
}
