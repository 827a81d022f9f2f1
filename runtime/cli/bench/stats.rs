//! Percentiles of a handful of samples.
//!
//! Owns nothing.

use serde::Serialize;

/// The percentiles that reports carry, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(in crate::cli) struct Percentiles {
    pub(in crate::cli) p50: f64,
    pub(in crate::cli) p90: f64,
    pub(in crate::cli) p99: f64,
    pub(in crate::cli) p999: f64,
}

impl Percentiles {
    /// The percentiles of `samples`, or `None` if there are none.
    pub(in crate::cli) fn of(samples: &[f64]) -> Option<Self> {
        Some(Self {
            p50: percentile(samples, 0.5)?,
            p90: percentile(samples, 0.9)?,
            p99: percentile(samples, 0.99)?,
            p999: percentile(samples, 0.999)?,
        })
    }
}

/// The smallest sample that at least `share` of all samples do not exceed.
pub(in crate::cli) fn percentile(samples: &[f64], share: f64) -> Option<f64> {
    let mut sorted: Vec<f64> = samples.iter().copied().filter(|sample| sample.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    // CAST: a rank within the samples.
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

/// The median.
pub(in crate::cli) fn median(samples: &[f64]) -> Option<f64> {
    percentile(samples, 0.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_samples() {
        let samples: Vec<f64> = (1..=1000).rev().map(f64::from).collect();
        let expected = Percentiles { p50: 500.0, p90: 900.0, p99: 990.0, p999: 999.0 };
        assert_eq!(Percentiles::of(&samples), Some(expected));
        let few = Percentiles::of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((few.p50, few.p999), (2.0, 3.0));
        assert_eq!(Percentiles::of(&[]), None);
    }
}
