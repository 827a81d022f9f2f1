//! The limits that membership works with.

use super::RankSet;
use crate::config::ValidConfig;

/// Evictions soon after a rank had come that cost it nothing; from the next one on it is held down.
const FREE_EVICTIONS: u32 = 3;

/// A rule that tests switch off, to see that they would miss it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MembershipGuard {
    /// Only more than half of the members evict the others.
    Quorum,
    /// A suspicion holds until the incarnation that it is about is gone; otherwise for `detect_ns`.
    StickySuspicion,
}

/// How long things may take, and who begins. All times are in nanoseconds of the caller's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MembershipConfig {
    /// Ranks that the group has room for.
    pub num_ranks: u32,
    /// Who forms the first epoch.
    pub initial: RankSet,
    /// The first sequence number of every lane and operation.
    pub first_seq: Vec<[u64; 2]>,
    /// The first step.
    pub first_step: u64,
    /// How long a member may take to answer a round of suspicions, and each rank to do what a lower one should.
    pub detect_ns: u64,
    /// The lease of a name; its expiry counts only after the store was up that long.
    pub lease_ttl_ns: u64,
    /// How long a rank goes on without the store, or without a quorum.
    pub store_grace_ns: u64,
    /// How long an admitted rank may take to be connected with every member.
    pub join_ns: u64,
    /// A rank evicted sooner than this after it had come is flapping.
    pub flap_window_ns: u64,
    /// The first hold-down of a flapping rank; it doubles each time.
    pub hold_down_ns: u64,
    /// The longest hold-down.
    pub hold_down_max_ns: u64,
    /// Rules that are off; for tests.
    pub guards_off: Vec<MembershipGuard>,
}

impl MembershipConfig {
    /// What a session's configuration implies; `initial` forms the first epoch.
    #[must_use]
    pub fn new(config: &ValidConfig, initial: RankSet) -> Self {
        let ns = |ms: u32| u64::from(ms) * 1_000_000;
        let detect_ns = ns(config.detect_ms);
        Self {
            num_ranks: config.num_ranks,
            initial,
            first_seq: vec![[1; 2]; config.lanes as usize],
            first_step: 0,
            detect_ns,
            lease_ttl_ns: ns(config.lease_ttl_ms()),
            store_grace_ns: ns(config.store_grace_ms),
            join_ns: 100 * detect_ns,
            flap_window_ns: 100 * detect_ns,
            hold_down_ns: detect_ns,
            hold_down_max_ns: 32 * detect_ns,
            guards_off: Vec::new(),
        }
    }

    /// How long a rank stays out after so many evictions in a row.
    #[must_use]
    pub fn hold_down(&self, evictions: u32) -> u64 {
        let Some(doublings) = evictions.checked_sub(FREE_EVICTIONS + 1) else { return 0 };
        let factor = 1_u64.checked_shl(doublings).unwrap_or(u64::MAX);
        self.hold_down_ns.saturating_mul(factor).min(self.hold_down_max_ns)
    }
}
