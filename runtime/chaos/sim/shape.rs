//! The group of a plan: its configuration and its network, drawn from the plan's seed.

use ibex_hca::emulated::Placement;

use crate::chaos::draws::Draws;
use crate::chaos::plan::Plan;
use crate::config::{CombineMode, Config, RoutePolicy, SignalMode, ValidConfig, WireDtype, min_sq_depth_log};
use crate::error::ConfigError;

/// How long a peer may be silent: in virtual time a wait costs nothing, but every millisecond of it is simulated.
const DETECT_MS: u32 = 20;
/// The same where packets may be lost: a sign of life that is sent again must arrive in time.
const DETECT_MS_PACKETS: u32 = 200;

/// What a seed decides besides its faults.
pub(super) struct Shape {
    pub(super) config: ValidConfig,
    pub(super) placement: Placement,
}

pub(super) fn shape(plan: &Plan) -> Result<Shape, ConfigError> {
    let mut draws = Draws::new(plan.seed, 2);
    let any_order = !plan.packets && draws.one_in(4);
    let signal = draws.pick(&[SignalMode::Write, SignalMode::FetchAdd]);
    let per_rank = draws.between(1, 3) as u32;
    // Where experts move, every rank has a place for each of them.
    let moves = !plan.changes.is_empty();
    let num_experts = plan.ranks * if moves { per_rank.min(2) } else { per_rank };
    let ring = draws.between(1, 3) as u32;
    let config = Config {
        num_ranks: plan.ranks,
        max_tokens: plan.tokens,
        hidden: plan.hidden,
        num_experts,
        local_experts: moves.then_some(num_experts),
        lanes: plan.lanes,
        max_topk: draws.between(1, num_experts.min(4).into()) as u32,
        dtype: draws.pick(&[WireDtype::Bf16, WireDtype::Fp8]),
        combine: draws.pick(&[CombineMode::Exact, CombineMode::Reduced]),
        ring,
        channels: Some(draws.between(1, 2) as u32),
        num_sms: 1,
        warps_per_block: draws.between(2, 3) as u32,
        num_owner_warps: Some(1),
        // A written signal may overtake its data where writes keep no order.
        signal: if any_order { SignalMode::FetchAdd } else { signal },
        route: if plan.hosts == 0 { RoutePolicy::Ibgda } else { RoutePolicy::Auto },
        detect_ms: if plan.packets { DETECT_MS_PACKETS } else { DETECT_MS },
        sq_depth_log: min_sq_depth_log(ring) + draws.below(3) as u32,
        // As many as may be given up in different steps before one of them is fenced: two deaths in one fault.
        spare_regions: 2,
        staging_rows: draws.between(2, 8) as u32,
        ..Config::default()
    };
    let placement = if any_order { Placement::WritesAnyOrder } else { Placement::InOrder };
    Ok(Shape { config: config.validate()?, placement })
}
