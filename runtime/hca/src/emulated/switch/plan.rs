//! The fault plan: what goes wrong, between whom, when and how often, as data.
//!
//! A plan is read from JSON, checked once, and means the same in simulation and between processes:
//!
//! ```json
//! { "seed": 7,
//!   "rules": [ { "fault": { "drop": { "ppm": 10000 } } },
//!              { "src": 0, "dst": 1, "from_us": 50000, "to_us": 90000, "fault": "partition" } ] }
//! ```
//!
//! *Who owns what.* A plan owns its rules and nothing else; it names nodes by number and reads no file.

use serde::{Deserialize, Serialize};

/// Most rules of one plan.
pub const RULES_MAX: usize = 1024;
/// Longest time that a rule may name, in microseconds: an hour.
pub const TIME_US_MAX: u64 = 3_600_000_000;
/// Certainty, in parts per million.
pub const PPM_MAX: u32 = 1_000_000;
/// Most frames that may overtake a reordered one.
pub const OVERTAKE_MAX: u32 = 1024;

/// What goes wrong on the paths between nodes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultPlan {
    /// Starts the generator that every probability draws from.
    #[serde(default)]
    pub seed: u64,
    /// Looked at in this order for every frame.
    #[serde(default)]
    pub rules: Vec<FaultRule>,
}

/// One fault, on some paths, for some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FaultRule {
    /// The node that sends; every node if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub src: Option<u16>,
    /// The node that receives; every node if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dst: Option<u16>,
    /// The opposite direction too.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub both_ways: bool,
    /// First microsecond in which the rule holds, on the clock of whoever drives the switch.
    #[serde(default)]
    pub from_us: u64,
    /// First microsecond in which it holds no longer; for ever if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub to_us: Option<u64>,
    /// What happens.
    pub fault: Fault,
}

/// What may happen to a frame. Probabilities are in parts per million.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Fault {
    /// The frame vanishes.
    Drop {
        /// How often.
        ppm: u32,
    },
    /// The frame arrives twice.
    Duplicate {
        /// How often.
        ppm: u32,
    },
    /// The frame, and with it whatever follows on its path, arrives later.
    Delay {
        /// How often.
        ppm: u32,
        /// Shortest delay.
        min_us: u64,
        /// Longest delay.
        max_us: u64,
    },
    /// Frames that follow on its path overtake the frame.
    Reorder {
        /// How often.
        ppm: u32,
        /// How many overtake it at most.
        overtake_max: u32,
        /// It arrives after this time, even if nothing overtakes it.
        hold_us: u64,
    },
    /// One to three bits of the frame flip.
    Corrupt {
        /// How often.
        ppm: u32,
    },
    /// Each path carries so much and no more; what finds its queue full vanishes.
    RateLimit {
        /// Bytes of frames per second.
        bytes_per_s: u64,
        /// Bytes that may wait.
        queue_bytes: u64,
    },
    /// Nothing arrives.
    Partition,
    /// The link goes down and comes up again, over and over, beginning up.
    Flap {
        /// How long it is up.
        up_us: u64,
        /// How long it is down.
        down_us: u64,
    },
}

/// Why a plan is not one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// The text is not a plan in JSON.
    #[error("fault plan: {0}")]
    Json(#[from] serde_json::Error),
    /// A value is outside its range.
    #[error(transparent)]
    Limit(#[from] PlanLimit),
}

/// Which limit a plan exceeds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanLimit {
    /// There are too many rules.
    #[error("fault plan: {count} rules; at most {RULES_MAX}")]
    TooManyRules {
        /// How many there are.
        count: usize,
    },
    /// A value of a rule is outside its range.
    #[error("fault plan: rule {rule}: {field} is {value}; it must be {min}..={max}")]
    OutOfRange {
        /// Which rule, from 0.
        rule: usize,
        /// Which field of it.
        field: &'static str,
        /// What it was.
        value: u64,
        /// Smallest valid value.
        min: u64,
        /// Largest valid value.
        max: u64,
    },
}

impl FaultPlan {
    /// Reads and checks a plan.
    ///
    /// # Errors
    /// [`PlanError`]: what is not JSON, or the limit that a value exceeds.
    pub fn from_json(text: &str) -> Result<Self, PlanError> {
        let plan: Self = serde_json::from_str(text)?;
        plan.check()?;
        Ok(plan)
    }

    /// The plan as JSON, one line per field: what [`from_json`](Self::from_json) reads.
    #[must_use]
    pub fn to_json(&self) -> String {
        serde_json::to_string_pretty(self).expect("a plan is plain data with string keys")
    }

    /// Checks every value against its range.
    ///
    /// # Errors
    /// [`PlanLimit`], which names the rule, the field, the value and the limit.
    pub fn check(&self) -> Result<(), PlanLimit> {
        if self.rules.len() > RULES_MAX {
            return Err(PlanLimit::TooManyRules { count: self.rules.len() });
        }
        self.rules.iter().enumerate().try_for_each(|(idx, rule)| rule.check(idx))
    }

    /// When the last rule that ends has ended, in microseconds; `None` if one never does.
    #[must_use]
    pub fn ends_us(&self) -> Option<u64> {
        self.rules.iter().try_fold(0, |latest, rule| Some(rule.to_us?.max(latest)))
    }
}

impl FaultRule {
    /// A rule for every path and all time.
    #[must_use]
    pub const fn always(fault: Fault) -> Self {
        Self { src: None, dst: None, both_ways: false, from_us: 0, to_us: None, fault }
    }

    /// Whether frames from `src` to `dst` are concerned at this microsecond.
    #[must_use]
    pub fn concerns(&self, src: u16, dst: u16, us: u64) -> bool {
        let is = |wanted: Option<u16>, node| wanted.is_none_or(|wanted| wanted == node);
        let forth = is(self.src, src) && is(self.dst, dst);
        let back = self.both_ways && is(self.src, dst) && is(self.dst, src);
        (forth || back) && us >= self.from_us && self.to_us.is_none_or(|to| us < to)
    }

    fn check(&self, rule: usize) -> Result<(), PlanLimit> {
        let within = |field, value, min, max| match value >= min && value <= max {
            true => Ok(()),
            false => Err(PlanLimit::OutOfRange { rule, field, value, min, max }),
        };
        let often = |ppm: u32| within("ppm", ppm.into(), 0, PPM_MAX.into());
        within("from_us", self.from_us, 0, TIME_US_MAX)?;
        if let Some(to) = self.to_us {
            within("to_us", to, self.from_us, TIME_US_MAX)?;
        }
        match self.fault {
            Fault::Drop { ppm } | Fault::Duplicate { ppm } | Fault::Corrupt { ppm } => often(ppm),
            Fault::Delay { ppm, min_us, max_us } => {
                often(ppm)?;
                within("max_us", max_us, 0, TIME_US_MAX)?;
                within("min_us", min_us, 0, max_us)
            }
            Fault::Reorder { ppm, overtake_max, hold_us } => {
                often(ppm)?;
                within("overtake_max", overtake_max.into(), 1, OVERTAKE_MAX.into())?;
                within("hold_us", hold_us, 1, TIME_US_MAX)
            }
            Fault::RateLimit { bytes_per_s, queue_bytes } => {
                within("bytes_per_s", bytes_per_s, 1, 1 << 40)?;
                within("queue_bytes", queue_bytes, 1, 1 << 40)
            }
            Fault::Partition => Ok(()),
            Fault::Flap { up_us, down_us } => {
                within("up_us", up_us, 1, TIME_US_MAX)?;
                within("down_us", down_us, 1, TIME_US_MAX)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_survives_its_own_text() {
        let kinds = [
            Fault::Drop { ppm: 10_000 },
            Fault::Duplicate { ppm: 1 },
            Fault::Delay { ppm: PPM_MAX, min_us: 0, max_us: 50 },
            Fault::Reorder { ppm: 5, overtake_max: 3, hold_us: 100 },
            Fault::Corrupt { ppm: 0 },
            Fault::RateLimit { bytes_per_s: 1 << 30, queue_bytes: 1 << 16 },
            Fault::Partition,
            Fault::Flap { up_us: 10, down_us: 20 },
        ];
        let mut rules: Vec<FaultRule> = kinds.map(FaultRule::always).to_vec();
        rules[0] = FaultRule { src: Some(3), to_us: Some(9), both_ways: true, ..rules[0] };
        let plan = FaultPlan { seed: 42, rules };
        assert_eq!(FaultPlan::from_json(&plan.to_json()).unwrap(), plan);
        assert_eq!(FaultPlan::from_json("{}").unwrap(), FaultPlan::default());
    }

    #[test]
    fn what_is_wrong_with_a_plan_is_named_with_its_limit() {
        let refused = |fault: &str| {
            let text = format!(r#"{{"rules": [{{"fault": "partition"}}, {{{fault}}}]}}"#);
            FaultPlan::from_json(&text).unwrap_err().to_string()
        };
        for (rule, why) in [
            (r#""fault": {"drop": {"ppm": 1000001}}"#, "rule 1: ppm is 1000001; it must be 0..=1000000"),
            (r#""from_us": 5, "to_us": 4, "fault": "partition""#, "rule 1: to_us is 4; it must be 5..="),
            (r#""fault": {"delay": {"ppm": 1, "min_us": 9, "max_us": 8}}"#, "min_us is 9; it must be 0..=8"),
            (r#""fault": {"reorder": {"ppm": 1, "overtake_max": 0, "hold_us": 8}}"#, "overtake_max is 0"),
            (r#""fault": {"rate_limit": {"bytes_per_s": 0, "queue_bytes": 8}}"#, "bytes_per_s is 0"),
            (r#""fault": {"flap": {"up_us": 0, "down_us": 8}}"#, "up_us is 0; it must be 1..="),
            (r#""fault": {"explode": {}}"#, "unknown variant `explode`"),
            (r#""fault": {"drop": {"ppm": 1, "dst": 2}}"#, "unknown field `dst`"),
            (r#""to": 1, "fault": "partition""#, "unknown field `to`"),
        ] {
            let said = refused(rule);
            assert!(said.contains(why), "{said}: expected {why}");
        }
        let rules = vec![FaultRule::always(Fault::Partition); RULES_MAX + 1];
        let many = FaultPlan { seed: 0, rules }.check();
        assert!(matches!(many, Err(PlanLimit::TooManyRules { count: 1025 })));
    }

    #[test]
    fn a_rule_concerns_its_paths_for_its_time() {
        let rule = FaultRule::always(Fault::Partition);
        let one_way = FaultRule { src: Some(1), dst: Some(2), from_us: 10, to_us: Some(20), ..rule };
        let both = FaultRule { both_ways: true, ..one_way };
        let from_three = FaultRule { src: Some(3), ..rule };
        for (rule, src, dst, us, expected) in [
            (rule, 7, 8, 0, true),
            (one_way, 1, 2, 10, true),
            (one_way, 1, 2, 9, false),
            (one_way, 1, 2, 20, false),
            (one_way, 2, 1, 15, false),
            (both, 2, 1, 15, true),
            (both, 2, 3, 15, false),
            (from_three, 3, 9, u64::MAX, true),
            (from_three, 9, 3, 0, false),
        ] {
            assert_eq!(rule.concerns(src, dst, us), expected, "{rule:?} {src} -> {dst} at {us}");
        }
        let plan = |rules: &[FaultRule]| FaultPlan { seed: 0, rules: rules.to_vec() }.ends_us();
        assert_eq!((plan(&[]), plan(&[one_way]), plan(&[one_way, rule])), (Some(0), Some(20), None));
    }
}
