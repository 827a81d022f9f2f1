//! What a user asks for, and the proof that it makes sense.
//!
//! Owns no memory. [`Config`] is open: every field is public and [`Config::default`] is the published
//! benchmark setting. [`ValidConfig`] is closed: whoever holds one knows that every limit below was
//! checked, so nothing behind it checks again.
//!
//! INVARIANT: validation reads only the configuration: no clock, environment, file or device.

use std::fmt;
use std::ops::Deref;
use std::str::FromStr;

use crate::error::{ConfigError, Limit, Value};
use crate::ids::{ExpertIdx, LocalExpertIdx, Rank};

/// Most ranks in one world.
pub const NUM_RANKS_MAX: u32 = 512;
/// Most tokens of one rank in one step; token counts travel in 16 bits.
pub const MAX_TOKENS_MAX: u32 = 65_535;
/// Widest row, in elements.
pub const HIDDEN_MAX: u32 = 65_536;
/// Most experts; a pick names its expert in 16 bits and 0xffff means none.
pub const NUM_EXPERTS_MAX: u32 = 65_535;
/// Most picks of one token; loss is reported in one 32-bit word per token.
pub const TOPK_MAX: u32 = 32;
/// Deepest ring of one lane.
pub const RING_MAX: u32 = 8;
/// Most lanes of one session.
pub const LANES_MAX: u32 = 8;
/// Most channels (queue pairs of one lane and peer).
pub const CHANNELS_MAX: u32 = 16;
/// Most blocks of one launch.
pub const NUM_SMS_MAX: u32 = 1024;
/// Fewest and most warps of one block: one posts, at least one casts.
pub const WARPS_PER_BLOCK: (u32, u32) = (2, 32);
/// Smallest and largest send queue, as the logarithm of its WQEBBs.
pub const SQ_DEPTH_LOG: (u32, u32) = (4, 15);
/// Most rows in the combine staging ring of one queue pair.
pub const STAGING_ROWS_MAX: u32 = 65_536;
/// Most spare regions per ring slot.
pub const SPARE_REGIONS_MAX: u32 = 3;
/// Longest `detect_ms`: a minute without a sign of life is an outage.
pub const DETECT_MS_MAX: u32 = 60_000;
/// Longest `stall_ms`: an hour.
pub const STALL_MS_MAX: u32 = 3_600_000;
/// `stall_ms` as a multiple of `detect_ms` where none is given.
pub const STALL_PER_DETECT: u32 = 20;
/// Shortest lease that a store grants (`ibex_metadata::limits::TTL_MIN`).
pub const LEASE_TTL_MS_MIN: u32 = 50;
/// Longest lease: a day.
pub const LEASE_TTL_MS_MAX: u32 = 86_400_000;
/// A lease as a multiple of `detect_ms` where none is given, and the shortest one that is accepted.
pub const LEASE_PER_DETECT: u32 = 3;
/// Longest time without a store: a day.
pub const STORE_GRACE_MS_MAX: u32 = 86_400_000;
/// Channels of a fp8 scale.
pub const SCALE_BLOCK: u32 = 128;

/// Defines a choice by name: the enum, its names, `Display` and `FromStr`.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident as $field:literal {
        $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+
    }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant,)+ }

        impl $name {
            /// The accepted names, in the order of [`Self::ALL`].
            pub const NAMES: &'static [&'static str] = &[$($text),+];
            /// Every choice.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name, as flags and reports spell it.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.name())
            }
        }

        impl FromStr for $name {
            type Err = ConfigError;

            fn from_str(text: &str) -> Result<Self, ConfigError> {
                Self::ALL.iter().copied().find(|choice| choice.name() == text).ok_or(ConfigError {
                    field: $field,
                    value: Value::Name("an unknown name"),
                    limit: Limit::OneOf(Self::NAMES),
                })
            }
        }
    };
}

choice! {
    /// How a dispatched row travels.
    WireDtype as "dtype" {
        /// As it came: 2 bytes per element.
        Bf16 = "bf16",
        /// e4m3fn with one scale per 128 elements.
        Fp8 = "fp8",
    }
}
choice! {
    /// How the scales of fp8 rows are stored.
    ScaleKind as "scales" {
        /// `amax / 448` in fp32.
        F32 = "f32",
        /// The next power of two not below `amax / 448`, in fp32.
        Pow2 = "pow2",
        /// The same power of two as one byte, its biased exponent.
        Ue8m0 = "ue8m0",
    }
}
choice! {
    /// What the expert's side sends back.
    CombineMode as "combine" {
        /// One row per pick; the source weights and sums in fp32.
        Exact = "exact",
        /// One row per (token, rank), weighted and summed there and rounded once.
        Reduced = "reduced",
    }
}
choice! {
    /// How a signal word is written at the peer.
    SignalMode as "signal" {
        /// An inline RDMA WRITE behind the data.
        Write = "write",
        /// A FETCH_ADD of (new - last), where a fabric may reorder writes.
        FetchAdd = "fetch-add",
    }
}
choice! {
    /// Which routes a peer may be reached by.
    RoutePolicy as "route" {
        /// Local copy and peer-mapped memory where possible.
        Auto = "auto",
        /// Queue pairs only, the rank's own traffic included.
        Ibgda = "ibgda",
    }
}
choice! {
    /// Link layer of the port.
    Link as "link" {
        /// InfiniBand: peers have a LID.
        Ib = "ib",
        /// RoCEv2: peers have a GID.
        Roce = "roce",
    }
}

/// What a session is sized and tuned by.
///
/// # Examples
/// ```
/// use ibex::config::Config;
///
/// let config = Config { num_ranks: 4, num_experts: 10, ..Config::default() }.validate()?;
/// assert_eq!(config.max_local_experts(), 3);
///
/// let refused = Config { max_topk: 33, ..Config::default() }.validate().unwrap_err();
/// assert_eq!(refused.to_string(), "max_topk = 33 is refused: it must be in 1..=32");
/// # Ok::<(), ibex::error::ConfigError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Members of the world.
    pub num_ranks: u32,
    /// Most tokens of one rank in one step; a call may use fewer, 0 included.
    pub max_tokens: u32,
    /// Row width in elements: a multiple of 8 for bf16, of 16 for fp8.
    pub hidden: u32,
    /// Experts in the world; ranks need not hold the same number.
    pub num_experts: u32,
    /// Places for experts at each rank, for replicas and for fewer members than ranks; by default what an equal share
    /// of all ranks needs.
    pub local_experts: Option<u32>,
    /// Most picks per token.
    pub max_topk: u32,
    /// How dispatched rows travel.
    pub dtype: WireDtype,
    /// How the scales of fp8 rows are stored.
    pub scales: ScaleKind,
    /// What the expert's side sends back.
    pub combine: CombineMode,
    /// Ring slots: steps in flight per operation.
    pub ring: u32,
    /// Independent streams of work.
    pub lanes: u32,
    /// Queue pairs per lane and peer; by default 4 up to 8 ranks, 2 up to 32, 1 beyond.
    pub channels: Option<u32>,
    /// Blocks of one launch.
    pub num_sms: u32,
    /// Warps of one block.
    pub warps_per_block: u32,
    /// Warps that post, out of all warps of a launch; by default one in four, and no more than queue pairs.
    pub num_owner_warps: Option<u32>,
    /// How signal words are written.
    pub signal: SignalMode,
    /// Which routes may be used.
    pub route: RoutePolicy,
    /// Link layer of the port.
    pub link: Link,
    /// How long a peer may show no sign of life.
    pub detect_ms: u32,
    /// How long a live peer may make no progress; by default 20 x `detect_ms`.
    pub stall_ms: Option<u32>,
    /// How long a rank's name outlives its last renewal in the store: the backstop for idle ranks; by default
    /// 3 x `detect_ms`, and at least what a store grants.
    pub lease_ttl_ms: Option<u32>,
    /// How long a rank goes on without the store, or without a quorum, before it stops.
    pub store_grace_ms: u32,
    /// Send queue depth, as the logarithm of its WQEBBs.
    pub sq_depth_log: u32,
    /// Rows in the combine staging ring of one queue pair.
    pub staging_rows: u32,
    /// Spare regions per ring slot: places for combine rows while late ones may come into others, and regions for the
    /// successors of processes that may still write into theirs. So many of them are borne at once without a loss.
    pub spare_regions: u32,
}

impl Default for Config {
    /// The published benchmark setting: EP8, 128 tokens, hidden 7168, top-8 of 256 experts, fp8.
    fn default() -> Self {
        Self {
            num_ranks: 8,
            max_tokens: 128,
            hidden: 7168,
            num_experts: 256,
            local_experts: None,
            max_topk: 8,
            dtype: WireDtype::Fp8,
            scales: ScaleKind::F32,
            combine: CombineMode::Exact,
            ring: 2,
            lanes: 1,
            channels: None,
            num_sms: 1,
            warps_per_block: 8,
            num_owner_warps: None,
            signal: SignalMode::Write,
            route: RoutePolicy::Auto,
            link: Link::Roce,
            detect_ms: 100,
            stall_ms: None,
            lease_ttl_ms: None,
            store_grace_ms: 30_000,
            sq_depth_log: 9,
            staging_rows: 32,
            spare_regions: 1,
        }
    }
}

impl Config {
    /// Checks every field and returns the configuration that the rest of Ibex accepts.
    ///
    /// # Errors
    /// The first field outside its limit, with its value and the limit.
    pub fn validate(&self) -> Result<ValidConfig, ConfigError> {
        self.validate_shape()?;
        self.validate_queues()?;
        self.validate_time()?;
        Ok(ValidConfig { config: self.clone() })
    }

    fn validate_shape(&self) -> Result<(), ConfigError> {
        in_range("num_ranks", self.num_ranks, 1, NUM_RANKS_MAX)?;
        in_range("max_tokens", self.max_tokens, 1, MAX_TOKENS_MAX)?;
        multiple_of("hidden", self.hidden, self.dtype.hidden_step(), HIDDEN_MAX)?;
        in_range("num_experts", self.num_experts, 1, NUM_EXPERTS_MAX)?;
        in_range("max_topk", self.max_topk, 1, TOPK_MAX)?;
        at_most_field("max_topk", self.max_topk, "num_experts", self.num_experts)?;
        if let Some(places) = self.local_experts {
            in_range("local_experts", places, self.num_experts.div_ceil(self.num_ranks), self.num_experts)?;
        }
        if self.dtype == WireDtype::Bf16 && self.scales != ScaleKind::F32 {
            let value = self.scales.name().into();
            let limit = Limit::OneOf(&["f32 (the default) where dtype is bf16"]);
            return Err(ConfigError { field: "scales", value, limit });
        }
        Ok(())
    }

    fn validate_queues(&self) -> Result<(), ConfigError> {
        in_range("ring", self.ring, 1, RING_MAX)?;
        in_range("lanes", self.lanes, 1, LANES_MAX)?;
        if let Some(channels) = self.channels {
            in_range("channels", channels, 1, CHANNELS_MAX)?;
        }
        in_range("num_sms", self.num_sms, 1, NUM_SMS_MAX)?;
        let (min, max) = WARPS_PER_BLOCK;
        in_range("warps_per_block", self.warps_per_block, min, max)?;
        if let Some(owners) = self.num_owner_warps {
            // At least one warp must cast, or owners would wait for rows that nobody fills.
            in_range("num_owner_warps", owners, 1, self.num_sms * self.warps_per_block - 1)?;
        }
        in_range("sq_depth_log", self.sq_depth_log, min_sq_depth_log(self.ring), SQ_DEPTH_LOG.1)?;
        in_range("staging_rows", self.staging_rows, 1, STAGING_ROWS_MAX)?;
        in_range("spare_regions", self.spare_regions, 0, SPARE_REGIONS_MAX)
    }

    fn validate_time(&self) -> Result<(), ConfigError> {
        in_range("detect_ms", self.detect_ms, 1, DETECT_MS_MAX)?;
        in_range("store_grace_ms", self.store_grace_ms, 1, STORE_GRACE_MS_MAX)?;
        if let Some(lease_ttl_ms) = self.lease_ttl_ms {
            in_range("lease_ttl_ms", lease_ttl_ms, self.shortest_lease_ms(), LEASE_TTL_MS_MAX)?;
        }
        let Some(stall_ms) = self.stall_ms else {
            return Ok(());
        };
        in_range("stall_ms", stall_ms, 1, STALL_MS_MAX)?;
        if stall_ms < self.detect_ms {
            let limit = Limit::AtLeastField { field: "detect_ms", min: self.detect_ms.into() };
            return Err(ConfigError { field: "stall_ms", value: stall_ms.into(), limit });
        }
        Ok(())
    }
}

impl Config {
    /// A lease that a rank can always renew in time, and that a store grants.
    const fn shortest_lease_ms(&self) -> u32 {
        let renewed = self.detect_ms * LEASE_PER_DETECT;
        if renewed > LEASE_TTL_MS_MIN { renewed } else { LEASE_TTL_MS_MIN }
    }
}

/// Smallest send queue for a ring: beside one row it must hold what a step always keeps room for, a credit per slot of
/// both operations, a trailer, a signal and LOST (`reserved_wqebbs` in kernels/include/ibex/send.h).
#[must_use]
pub const fn min_sq_depth_log(ring: u32) -> u32 {
    let wqebbs: u32 = 2 * ring + 3 + 1;
    let log = wqebbs.next_power_of_two().ilog2();
    if log > SQ_DEPTH_LOG.0 { log } else { SQ_DEPTH_LOG.0 }
}

impl WireDtype {
    /// Elements in 16 bytes: rows are moved in pieces of that size.
    const fn hidden_step(self) -> u32 {
        match self {
            Self::Bf16 => 8,
            Self::Fp8 => 16,
        }
    }
}

fn in_range(field: &'static str, value: u32, min: u32, max: u32) -> Result<(), ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(());
    }
    let limit = Limit::Range { min: min.into(), max: max.into() };
    Err(ConfigError { field, value: value.into(), limit })
}

fn multiple_of(field: &'static str, value: u32, step: u32, max: u32) -> Result<(), ConfigError> {
    if value != 0 && value <= max && value.is_multiple_of(step) {
        return Ok(());
    }
    let limit = Limit::MultipleOf { step: step.into(), max: max.into() };
    Err(ConfigError { field, value: value.into(), limit })
}

fn at_most_field(field: &'static str, value: u32, other: &'static str, max: u32) -> Result<(), ConfigError> {
    if value <= max {
        return Ok(());
    }
    let limit = Limit::AtMostField { field: other, max: max.into() };
    Err(ConfigError { field, value: value.into(), limit })
}

/// A configuration whose every limit was checked; made only by [`Config::validate`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ValidConfig {
    config: Config,
}

impl Deref for ValidConfig {
    type Target = Config;

    fn deref(&self) -> &Config {
        &self.config
    }
}

impl ValidConfig {
    /// Queue pairs per lane and peer.
    #[must_use]
    pub fn num_channels(&self) -> u32 {
        self.channels.unwrap_or(match self.num_ranks {
            0..=8 => 4,
            9..=32 => 2,
            _ => 1,
        })
    }

    /// Most tokens that travel on one channel: token t uses channel `t mod num_channels`.
    #[must_use]
    pub fn channel_tokens(&self) -> u32 {
        self.max_tokens.div_ceil(self.num_channels())
    }

    /// Warps of one launch.
    #[must_use]
    pub fn num_warps(&self) -> u32 {
        self.num_sms * self.warps_per_block
    }

    /// Warps that post; the others cast.
    #[must_use]
    pub fn num_owner_warps(&self) -> u32 {
        self.config.num_owner_warps.unwrap_or_else(|| {
            let num_qps = self.num_ranks * self.num_channels();
            (self.num_warps() / 4).clamp(1, num_qps)
        })
    }

    /// The effective limit for a live peer without progress.
    #[must_use]
    pub fn stall_ms(&self) -> u32 {
        self.config.stall_ms.unwrap_or(self.detect_ms * STALL_PER_DETECT)
    }

    /// The effective lease of a rank's name.
    #[must_use]
    pub fn lease_ttl_ms(&self) -> u32 {
        self.config.lease_ttl_ms.unwrap_or(self.shortest_lease_ms())
    }

    /// Experts of one rank: the first `num_experts mod num_ranks` ranks hold one more than the rest.
    #[must_use]
    pub fn num_local_experts(&self, rank: Rank) -> u32 {
        let extra = self.num_experts % self.num_ranks;
        self.num_experts / self.num_ranks + u32::from(u32::from(rank.0) < extra)
    }

    /// Most experts of any rank, at least 1: its places.
    #[must_use]
    pub fn max_local_experts(&self) -> u32 {
        self.local_experts.unwrap_or(self.num_experts.div_ceil(self.num_ranks))
    }

    /// The first global expert of `rank`; experts are contiguous per rank.
    ///
    /// For a rank without experts this is `num_experts`, which names no expert.
    #[must_use]
    pub fn first_expert(&self, rank: Rank) -> u32 {
        let rank = u32::from(rank.0);
        let (each, extra) = (self.num_experts / self.num_ranks, self.num_experts % self.num_ranks);
        rank * each + rank.min(extra)
    }

    /// Who serves an expert, and under which local index; `None` for an expert that does not exist.
    #[must_use]
    pub fn owner_of(&self, expert: ExpertIdx) -> Option<(Rank, LocalExpertIdx)> {
        let expert = u32::from(expert.0);
        if expert >= self.num_experts {
            return None;
        }
        let (each, extra) = (self.num_experts / self.num_ranks, self.num_experts % self.num_ranks);
        let in_larger = extra * (each + 1);
        let (rank, local) = if expert < in_larger {
            (expert / (each + 1), expert % (each + 1))
        } else {
            // Here each > 0: with each = 0 every expert stands in the first branch.
            let rest = expert - in_larger;
            (extra + rest / each, rest % each)
        };
        // CAST: rank < 512, local < 65 535 by the limits above.
        Some((Rank(rank as u16), LocalExpertIdx(local as u16)))
    }

    /// Timers of the reliable connections.
    #[must_use]
    pub fn rc_timers(&self) -> RcTimers {
        RcTimers::at_least_ms(self.stall_ms())
    }
}

/// Retransmission timers of a queue pair.
///
/// RC retries are there for loss; deadlines belong to kernels. So all retries together last at least
/// `stall_ms`. Devices have floors: what counts is the effective value that the device reports.
///
/// SPEC: IBTA §9.7.6.1.3 (local ack timeout: 4.096 us x 2^t).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RcTimers {
    /// Exponent t of the ack timeout, 1..=31.
    pub ack_timeout: u8,
    /// Retries after the first attempt, 0..=7.
    pub retry_count: u8,
}

impl RcTimers {
    const RETRY_COUNT: u8 = 7;

    /// The smallest exponent whose total reaches `total_ms`, with all seven retries.
    #[must_use]
    pub fn at_least_ms(total_ms: u32) -> Self {
        let wanted_ns = u64::from(total_ms) * 1_000_000;
        let reaches =
            |t: &u8| Self { ack_timeout: *t, retry_count: Self::RETRY_COUNT }.total_ns() >= wanted_ns;
        // 2^31 x 4.096 us x 8 is 19 hours, beyond every u32 of milliseconds that STALL_MS_MAX lets through.
        let ack_timeout = (1..31).find(reaches).unwrap_or(31);
        Self { ack_timeout, retry_count: Self::RETRY_COUNT }
    }

    /// Time of one attempt.
    #[must_use]
    pub fn timeout_ns(self) -> u64 {
        4096 << self.ack_timeout
    }

    /// Time until the queue pair gives up.
    #[must_use]
    pub fn total_ns(self) -> u64 {
        self.timeout_ns() * (u64::from(self.retry_count) + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(change: impl FnOnce(&mut Config)) -> ConfigError {
        let mut config = Config::default();
        change(&mut config);
        config.validate().unwrap_err()
    }

    fn accepted(change: impl FnOnce(&mut Config)) -> ValidConfig {
        let mut config = Config::default();
        change(&mut config);
        config.validate().unwrap()
    }

    /// Sets one field to a value just outside each end and expects that field, value and range.
    macro_rules! range_test {
        ($test:ident, $field:ident, $name:literal, $min:expr, $max:expr $(, $wrap:path)?) => {
            #[test]
            fn $test() {
                let (min, max): (u32, u32) = ($min, $max);
                let limit = Limit::Range { min: min.into(), max: max.into() };
                let outside = [min.checked_sub(1), max.checked_add(1), Some(u32::MAX)];
                for value in outside.into_iter().flatten() {
                    let error = refused(|config| config.$field = $($wrap)?(value));
                    assert_eq!(error, ConfigError { field: $name, value: value.into(), limit });
                }
                for value in [min, max] {
                    accepted(|config| {
                        config.max_topk = 1;
                        config.$field = $($wrap)?(value);
                    });
                }
            }
        };
    }

    range_test!(num_ranks_is_bounded, num_ranks, "num_ranks", 1, 512);
    range_test!(max_tokens_is_bounded, max_tokens, "max_tokens", 1, 65_535);
    range_test!(num_experts_is_bounded, num_experts, "num_experts", 1, 65_535);
    range_test!(max_topk_is_bounded, max_topk, "max_topk", 1, 32);
    range_test!(ring_is_bounded, ring, "ring", 1, 8);
    range_test!(lanes_is_bounded, lanes, "lanes", 1, 8);
    range_test!(channels_is_bounded, channels, "channels", 1, 16, Some);
    range_test!(num_sms_is_bounded, num_sms, "num_sms", 1, 1024);
    range_test!(warps_per_block_is_bounded, warps_per_block, "warps_per_block", 2, 32);
    range_test!(sq_depth_log_is_bounded, sq_depth_log, "sq_depth_log", 4, 15);
    range_test!(staging_rows_is_bounded, staging_rows, "staging_rows", 1, 65_536);
    range_test!(detect_ms_is_bounded, detect_ms, "detect_ms", 1, 60_000);
    // 2 x 12 warps, one of which must cast.
    range_test!(owner_warps_leave_a_caster, num_owner_warps, "num_owner_warps", 1, 7, Some);

    #[test]
    fn stall_ms_is_bounded_and_not_below_detect_ms() {
        let limit = Limit::Range { min: 1, max: 3_600_000 };
        for value in [0, 3_600_001] {
            let error = refused(|config| config.stall_ms = Some(value));
            assert_eq!(error, ConfigError { field: "stall_ms", value: value.into(), limit });
        }
        let error = refused(|config| config.stall_ms = Some(99));
        let limit = Limit::AtLeastField { field: "detect_ms", min: 100 };
        assert_eq!(error, ConfigError { field: "stall_ms", value: 99u32.into(), limit });
        assert_eq!(accepted(|config| config.stall_ms = Some(100)).stall_ms(), 100);
        assert_eq!(accepted(|config| config.detect_ms = 7).stall_ms(), 140);
    }

    #[test]
    fn hidden_is_a_multiple_of_16_bytes_on_the_wire() {
        for (dtype, step, bad) in [(WireDtype::Fp8, 16, 7176), (WireDtype::Bf16, 8, 7172)] {
            let limit = Limit::MultipleOf { step, max: 65_536 };
            for value in [0, bad, 65_536 + 16] {
                let error = refused(|config| (config.dtype, config.hidden) = (dtype, value));
                assert_eq!(error, ConfigError { field: "hidden", value: value.into(), limit });
            }
            for value in [step as u32, 2880, 65_536] {
                accepted(|config| (config.dtype, config.hidden) = (dtype, value));
            }
        }
    }

    #[test]
    fn topk_is_not_above_experts() {
        let error = refused(|config| config.num_experts = 7);
        let limit = Limit::AtMostField { field: "num_experts", max: 7 };
        assert_eq!(error, ConfigError { field: "max_topk", value: 8u32.into(), limit });
        accepted(|config| config.num_experts = 8);
    }

    #[test]
    fn places_of_experts_hold_at_least_an_equal_share() {
        let limit = Limit::Range { min: 32, max: 256 };
        for value in [0, 31, 257] {
            let error = refused(|config| config.local_experts = Some(value));
            assert_eq!(error, ConfigError { field: "local_experts", value: value.into(), limit });
        }
        for value in [32, 256] {
            assert_eq!(accepted(|config| config.local_experts = Some(value)).max_local_experts(), value);
        }
    }

    #[test]
    fn bf16_has_no_scales_to_choose() {
        let error = refused(|config| {
            (config.dtype, config.scales) = (WireDtype::Bf16, ScaleKind::Ue8m0);
        });
        assert_eq!((error.field, error.value), ("scales", Value::Name("ue8m0")));
    }

    #[test]
    fn names_round_trip_and_unknown_names_list_what_exists() {
        for &dtype in WireDtype::ALL {
            assert_eq!(dtype.name().parse(), Ok(dtype));
        }
        assert_eq!("fetch-add".parse(), Ok(SignalMode::FetchAdd));
        let error = "fp4".parse::<WireDtype>().unwrap_err();
        assert_eq!((error.field, error.limit), ("dtype", Limit::OneOf(&["bf16", "fp8"])));
    }

    #[test]
    fn channels_follow_the_number_of_ranks() {
        for (ranks, channels) in [(1, 4), (8, 4), (9, 2), (32, 2), (33, 1), (512, 1)] {
            let config = accepted(|config| config.num_ranks = ranks);
            assert_eq!(config.num_channels(), channels, "{ranks} ranks");
        }
        let config = accepted(|config| (config.channels, config.max_tokens) = (Some(3), 128));
        assert_eq!((config.num_channels(), config.channel_tokens()), (3, 43));
    }

    #[test]
    fn owners_are_a_quarter_of_the_warps_but_not_more_than_queue_pairs() {
        assert_eq!(accepted(|_| ()).num_owner_warps(), 2);
        assert_eq!(accepted(|c| (c.num_sms, c.warps_per_block) = (1, 2)).num_owner_warps(), 1);
        assert_eq!(accepted(|c| (c.num_sms, c.num_ranks) = (100, 1)).num_owner_warps(), 4);
    }

    #[test]
    fn every_expert_has_one_place_and_places_are_contiguous() {
        for (ranks, experts) in [(8, 256), (8, 250), (8, 1), (3, 10), (512, 65_535), (7, 7), (5, 4)] {
            let config = accepted(|c| (c.num_ranks, c.num_experts, c.max_topk) = (ranks, experts, 1));
            let mut expert = 0;
            for rank in (0..ranks).map(|rank| Rank(rank as u16)) {
                assert_eq!(config.first_expert(rank), expert);
                let num_local = config.num_local_experts(rank);
                assert!(num_local <= config.max_local_experts());
                for local in 0..num_local {
                    let owner = Some((rank, LocalExpertIdx(local as u16)));
                    assert_eq!(config.owner_of(ExpertIdx(expert as u16)), owner);
                    expert += 1;
                }
            }
            assert_eq!(expert, experts);
            assert_eq!(config.owner_of(ExpertIdx(experts as u16)), None);
        }
    }

    #[test]
    fn retries_outlast_stall_ms_but_not_by_more_than_twice() {
        for stall_ms in [100, 2_000, 60_000, STALL_MS_MAX] {
            let config = accepted(|config| config.stall_ms = Some(stall_ms));
            let total_ns = config.rc_timers().total_ns();
            let wanted_ns = u64::from(stall_ms) * 1_000_000;
            assert!((wanted_ns..2 * wanted_ns).contains(&total_ns), "{stall_ms} ms: {total_ns} ns");
        }
        assert_eq!(RcTimers::at_least_ms(2_000).ack_timeout, 16);
        assert_eq!(RcTimers::at_least_ms(0).ack_timeout, 1);
    }
}
