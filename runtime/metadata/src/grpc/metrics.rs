//! What the server counts, as Prometheus reads it.

use core::time::Duration;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::StoreError;
use crate::store::Health;

/// Operations, in the order of [`Op`].
const OPS: [&str; 19] = [
    "claim",
    "publish",
    "renew",
    "release",
    "batch_get",
    "list",
    "watch",
    "ack",
    "readers",
    "read_cell",
    "swap_cell",
    "health",
    "express_publish",
    "express_list",
    "express_get",
    "express_update",
    "mooncake_get",
    "mooncake_put",
    "mooncake_delete",
];
/// Outcomes, in the order of [`outcome_index`].
const OUTCOMES: [&str; 13] = [
    "ok",
    "not_found",
    "held",
    "fenced",
    "conflict",
    "lease_expired",
    "unavailable",
    "corrupt",
    "too_large",
    "unsupported",
    "deadline",
    "unauthenticated",
    "input",
];
/// Upper ends of the latency buckets.
const BUCKETS_US: [u64; 10] = [50, 100, 250, 500, 1_000, 2_500, 10_000, 50_000, 250_000, 1_000_000];

/// One operation of the store, or of a view of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    Claim,
    Publish,
    Renew,
    Release,
    BatchGet,
    List,
    Watch,
    Ack,
    Readers,
    ReadCell,
    SwapCell,
    Health,
    ExpressPublish,
    ExpressList,
    ExpressGet,
    ExpressUpdate,
    MooncakeGet,
    MooncakePut,
    MooncakeDelete,
}

/// Counters of one server. Only grow, except for the number of open watches.
#[derive(Debug, Default)]
pub struct Metrics {
    ops: [OpMetrics; OPS.len()],
    refused_tokens: AtomicU64,
    keys_read: AtomicU64,
    open_watches: AtomicU64,
}

#[derive(Debug, Default)]
struct OpMetrics {
    outcomes: [AtomicU64; OUTCOMES.len()],
    buckets: [AtomicU64; BUCKETS_US.len()],
    sum_ns: AtomicU64,
}

fn outcome_index(error: Option<&StoreError>) -> usize {
    match error {
        None => 0,
        Some(StoreError::NotFound) => 1,
        Some(StoreError::Held { .. }) => 2,
        Some(StoreError::Fenced { .. }) => 3,
        Some(StoreError::Conflict { .. }) => 4,
        Some(StoreError::LeaseExpired { .. }) => 5,
        Some(StoreError::Unavailable { .. }) => 6,
        Some(StoreError::Corrupt(_)) => 7,
        Some(StoreError::TooLarge { .. }) => 8,
        Some(StoreError::Unsupported(_)) => 9,
        Some(StoreError::Deadline { .. }) => 10,
        Some(StoreError::Unauthenticated) => 11,
        Some(StoreError::Input(_)) => 12,
    }
}

fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

impl Metrics {
    /// Counts one operation.
    pub(super) fn count<T>(&self, op: Op, took: Duration, result: &Result<T, StoreError>) {
        let op = &self.ops[op as usize];
        add(&op.outcomes[outcome_index(result.as_ref().err())], 1);
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        if let Some(bucket) = BUCKETS_US.iter().position(|&end| us <= end) {
            add(&op.buckets[bucket], 1);
        }
        add(&op.sum_ns, u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    pub(super) fn count_keys(&self, keys: usize) {
        add(&self.keys_read, keys as u64);
    }

    pub(super) fn count_refused_token(&self) {
        add(&self.refused_tokens, 1);
    }

    pub(super) fn watch_opened(&self) {
        add(&self.open_watches, 1);
    }

    pub(super) fn watch_closed(&self) {
        self.open_watches.fetch_sub(1, Ordering::Relaxed);
    }

    /// The counters in Prometheus' text format; without the store's own figures while it is not healthy.
    #[must_use]
    pub fn render(&self, health: Option<&Health>) -> String {
        let mut out = String::new();
        header(&mut out, "ibex_store_up", "gauge", "Whether the store behind the server answers.");
        line(&mut out, "ibex_store_up", "", u64::from(health.is_some()));
        if let Some(health) = health {
            header(&mut out, "ibex_store_names", "gauge", "Names that somebody owns.");
            line(&mut out, "ibex_store_names", "", health.num_names);
            header(&mut out, "ibex_store_revision", "gauge", "The newest change.");
            line(&mut out, "ibex_store_revision", "", health.revision.0);
            header(&mut out, "ibex_store_up_seconds", "gauge", "Time since the store came up.");
            line(&mut out, "ibex_store_up_seconds", "", health.up_for.as_secs());
        }
        header(&mut out, "ibex_store_open_watches", "gauge", "Watches that are being served.");
        line(&mut out, "ibex_store_open_watches", "", read(&self.open_watches));
        header(&mut out, "ibex_store_keys_read_total", "counter", "Names asked for in batches.");
        line(&mut out, "ibex_store_keys_read_total", "", read(&self.keys_read));
        header(&mut out, "ibex_store_refused_tokens_total", "counter", "Calls without the right token.");
        line(&mut out, "ibex_store_refused_tokens_total", "", read(&self.refused_tokens));
        self.render_calls(&mut out);
        self.render_latency(&mut out);
        out
    }

    fn render_calls(&self, out: &mut String) {
        header(out, "ibex_store_calls_total", "counter", "Calls, by operation and outcome.");
        for (op, metrics) in OPS.iter().zip(&self.ops) {
            for (outcome, counter) in OUTCOMES.iter().zip(&metrics.outcomes) {
                let count = read(counter);
                if count > 0 {
                    let labels = format!("{{op=\"{op}\",outcome=\"{outcome}\"}}");
                    line(out, "ibex_store_calls_total", &labels, count);
                }
            }
        }
    }

    fn render_latency(&self, out: &mut String) {
        header(out, "ibex_store_call_seconds", "histogram", "How long calls took.");
        for (op, metrics) in OPS.iter().zip(&self.ops) {
            let count: u64 = metrics.outcomes.iter().map(read).sum();
            if count == 0 {
                continue;
            }
            let mut below = 0;
            for (end_us, bucket) in BUCKETS_US.iter().zip(&metrics.buckets) {
                below += read(bucket);
                let (s, us) = (end_us / 1_000_000, end_us % 1_000_000);
                let labels = format!("{{op=\"{op}\",le=\"{s}.{us:06}\"}}");
                line(out, "ibex_store_call_seconds_bucket", &labels, below);
            }
            let labels = format!("{{op=\"{op}\",le=\"+Inf\"}}");
            line(out, "ibex_store_call_seconds_bucket", &labels, count);
            let labels = format!("{{op=\"{op}\"}}");
            line(out, "ibex_store_call_seconds_count", &labels, count);
            let sum = Duration::from_nanos(read(&metrics.sum_ns));
            line(out, "ibex_store_call_seconds_sum", &labels, format_args!("{:.9}", sum.as_secs_f64()));
        }
    }
}

fn header(out: &mut String, name: &str, kind: &str, help: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn line(out: &mut String, name: &str, labels: &str, value: impl std::fmt::Display) {
    let _ = writeln!(out, "{name}{labels} {value}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Revision;

    #[test]
    fn counters_are_rendered_by_operation_and_outcome() {
        let metrics = Metrics::default();
        metrics.count(Op::Claim, Duration::from_micros(70), &Ok(()));
        metrics.count(Op::Claim, Duration::from_secs(2), &Err::<(), _>(StoreError::NotFound));
        metrics.count_keys(3);
        let health = Health { up_for: Duration::from_secs(5), revision: Revision(u64::MAX), num_names: 2 };
        let text = metrics.render(Some(&health));
        for wanted in [
            "ibex_store_up 1\n",
            "ibex_store_revision 18446744073709551615\n",
            "ibex_store_keys_read_total 3\n",
            "ibex_store_calls_total{op=\"claim\",outcome=\"ok\"} 1\n",
            "ibex_store_calls_total{op=\"claim\",outcome=\"not_found\"} 1\n",
            "ibex_store_call_seconds_bucket{op=\"claim\",le=\"0.000050\"} 0\n",
            "ibex_store_call_seconds_bucket{op=\"claim\",le=\"0.000100\"} 1\n",
            "ibex_store_call_seconds_bucket{op=\"claim\",le=\"1.000000\"} 1\n",
            "ibex_store_call_seconds_bucket{op=\"claim\",le=\"+Inf\"} 2\n",
            "ibex_store_call_seconds_sum{op=\"claim\"} 2.000070000\n",
        ] {
            assert!(text.contains(wanted), "{wanted} in\n{text}");
        }
        assert!(metrics.render(None).starts_with("# HELP ibex_store_up"));
        assert!(metrics.render(None).contains("ibex_store_up 0\n"));
    }
}
