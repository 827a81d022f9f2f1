//! A latency histogram as one self-contained SVG.
//!
//! Owns nothing. Panels share one axis, so that series are compared by eye; the figure carries its own
//! caption, because it will be looked at apart from the run that made it.

use std::fmt::Write;

use super::bench::stats::percentile;

/// One histogram.
pub(super) struct Series<'a> {
    /// What was measured.
    pub(super) name: &'a str,
    /// Samples in microseconds, in any order.
    pub(super) samples_us: &'a [f64],
}

const WIDTH: f64 = 760.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 80.0;
const PANEL: f64 = 150.0;
const GAP: f64 = 46.0;
const BOTTOM: f64 = 52.0;
const NUM_BINS: usize = 40;
const COLOURS: [&str; 2] = ["#2f6fab", "#c8643c"];

/// Draws the series below each other, with a title and two lines of caption.
pub(super) fn histogram(title: &str, caption: [&str; 2], series: &[Series<'_>]) -> String {
    let axis = Axis::over(series.iter().flat_map(|one| one.samples_us).copied());
    let height = TOP + series.len() as f64 * (PANEL + GAP) - GAP + BOTTOM;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" \
         width=\"{WIDTH}\" height=\"{height}\" role=\"img\" \
         font-family=\"system-ui, 'Segoe UI', Helvetica, Arial, sans-serif\">\n\
         <title>{title}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
         <text x=\"{LEFT}\" y=\"26\" font-size=\"16\" font-weight=\"600\" fill=\"#1b1f24\">{title}</text>\n\
         <text x=\"{LEFT}\" y=\"45\" font-size=\"11.5\" fill=\"#57606a\">{above}</text>\n\
         <text x=\"{LEFT}\" y=\"60\" font-size=\"11.5\" fill=\"#57606a\">{below}</text>\n",
        title = escape(title),
        above = escape(caption[0]),
        below = escape(caption[1]),
    );
    for (index, one) in series.iter().enumerate() {
        let top = TOP + index as f64 * (PANEL + GAP);
        panel(&mut svg, one, &axis, top, COLOURS[index % COLOURS.len()]);
    }
    let label_y = height - 12.0;
    let middle = (LEFT + WIDTH - RIGHT) / 2.0;
    line(
        &mut svg,
        format_args!(
            "<text x=\"{middle}\" y=\"{label_y}\" font-size=\"11.5\" text-anchor=\"middle\" \
             fill=\"#57606a\">{}, slowest rank of each step</text>",
            axis.unit.name
        ),
    );
    svg.push_str("</svg>\n");
    svg
}

fn panel(svg: &mut String, series: &Series<'_>, axis: &Axis, top: f64, colour: &str) {
    let base = top + PANEL;
    let bins = axis.bins(series.samples_us);
    let tallest = bins.iter().copied().max().unwrap_or(0).max(1);
    for tick in axis.ticks() {
        let x = axis.x(tick);
        line(
            svg,
            format_args!("<path d=\"M{x:.1} {top:.1}V{base:.1}\" stroke=\"#e6e8eb\" stroke-width=\"1\"/>"),
        );
        line(
            svg,
            format_args!(
                "<text x=\"{x:.1}\" y=\"{:.1}\" font-size=\"11\" text-anchor=\"middle\" fill=\"#57606a\">{}</text>",
                base + 16.0,
                axis.label(tick)
            ),
        );
    }
    let bin_width = (WIDTH - RIGHT - LEFT) / NUM_BINS as f64;
    for (bin, &count) in bins.iter().enumerate().filter(|&(_, &count)| count > 0) {
        let height = (PANEL - 22.0) * count as f64 / tallest as f64;
        let (x, y) = (LEFT + bin as f64 * bin_width, base - height);
        line(
            svg,
            format_args!(
                "<rect x=\"{:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{height:.1}\" fill=\"{colour}\" \
                 fill-opacity=\"0.8\"><title>{count}</title></rect>",
                x + 0.5,
                bin_width - 1.0
            ),
        );
    }
    let right = WIDTH - RIGHT;
    line(svg, format_args!("<path d=\"M{LEFT} {base:.1}H{right}\" stroke=\"#8c959f\" stroke-width=\"1\"/>"));
    let most = LEFT - 8.0;
    line(
        svg,
        format_args!(
            "<text x=\"{most}\" y=\"{:.1}\" font-size=\"11\" text-anchor=\"end\" fill=\"#57606a\">{tallest}</text>",
            top + 26.0
        ),
    );
    summary(svg, series, axis, top, base, colour);
}

/// The series' name with its percentiles, and a mark at each of them.
fn summary(svg: &mut String, series: &Series<'_>, axis: &Axis, top: f64, base: f64, colour: &str) {
    let mut text = format!("{} · {} steps", series.name, series.samples_us.len());
    for (name, share) in [("p50", 0.5), ("p99", 0.99)] {
        let Some(value) = percentile(series.samples_us, share) else {
            continue;
        };
        let x = axis.x(value);
        // Writing to a String cannot fail.
        let _ = write!(text, " · {name} {}", axis.unit.of(value));
        line(
            svg,
            format_args!(
                "<path d=\"M{x:.1} {:.1}V{base:.1}\" stroke=\"{colour}\" stroke-width=\"1.5\" \
                 stroke-dasharray=\"4 3\"/>",
                top + 14.0
            ),
        );
    }
    line(
        svg,
        format_args!(
            "<text x=\"{LEFT}\" y=\"{:.1}\" font-size=\"12.5\" font-weight=\"600\" fill=\"{colour}\">{}</text>",
            top + 6.0,
            escape(&text)
        ),
    );
}

fn line(svg: &mut String, text: std::fmt::Arguments<'_>) {
    // Writing to a String cannot fail.
    let _ = writeln!(svg, "{text}");
}

/// What numbers on the figure are counted in.
struct Unit {
    name: &'static str,
    short: &'static str,
    us: f64,
    digits: usize,
}

const MICROSECONDS: Unit = Unit { name: "microseconds", short: "us", us: 1.0, digits: 0 };
const MILLISECONDS: Unit = Unit { name: "milliseconds", short: "ms", us: 1e3, digits: 2 };

impl Unit {
    fn of(&self, us: f64) -> String {
        let (value, digits) = (us / self.us, self.digits);
        format!("{value:.digits$} {}", self.short)
    }
}

/// The shared horizontal axis: a range of round numbers, in microseconds.
struct Axis {
    min: f64,
    max: f64,
    step: f64,
    unit: Unit,
}

impl Axis {
    fn over(samples: impl Iterator<Item = f64>) -> Self {
        let finite = samples.filter(|sample| sample.is_finite());
        let (low, high) =
            finite.fold((f64::INFINITY, 0.0f64), |(low, high), sample| (low.min(sample), high.max(sample)));
        let (low, high) = if low.is_finite() { (low, high) } else { (0.0, 1.0) };
        let step = round_step((high - low).max(high * 0.02).max(1e-3) / 6.0);
        let min = (low / step).floor() * step;
        let max = ((high / step).ceil() * step).max(min + step);
        let unit = if max >= 10_000.0 { MILLISECONDS } else { MICROSECONDS };
        Self { min, max, step, unit }
    }

    fn x(&self, value: f64) -> f64 {
        let share = ((value - self.min) / (self.max - self.min)).clamp(0.0, 1.0);
        LEFT + share * (WIDTH - RIGHT - LEFT)
    }

    fn ticks(&self) -> impl Iterator<Item = f64> + '_ {
        // CAST: a handful of steps.
        let steps = ((self.max - self.min) / self.step).round() as u32;
        (0..=steps).map(|i| self.min + f64::from(i) * self.step)
    }

    fn label(&self, tick: f64) -> String {
        let (tick, step) = (tick / self.unit.us, self.step / self.unit.us);
        // CAST: a few digits, as many as tell one tick from the next.
        let digits = (-step.log10().floor()).max(0.0) as usize;
        format!("{tick:.digits$}")
    }

    fn bins(&self, samples: &[f64]) -> Vec<usize> {
        let mut bins = vec![0; NUM_BINS];
        for &sample in samples.iter().filter(|sample| sample.is_finite()) {
            let share = (sample - self.min) / (self.max - self.min);
            // CAST: a share of the bins; the largest sample belongs to the last one.
            let bin = (share * NUM_BINS as f64) as usize;
            bins[bin.min(NUM_BINS - 1)] += 1;
        }
        bins
    }
}

/// The next of 1, 2, 5 times a power of ten.
fn round_step(step: f64) -> f64 {
    let power = 10f64.powf(step.log10().floor());
    let nice = [1.0, 2.0, 5.0].into_iter().find(|nice| nice * power >= step * 0.999);
    nice.unwrap_or(10.0) * power
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn draw(samples: &[f64]) -> String {
        let series = [Series { name: "dispatch", samples_us: samples }];
        histogram("a < b", ["one", "two"], &series)
    }

    #[test]
    fn every_sample_is_in_a_bar_and_text_is_escaped() {
        let svg = draw(&[10.0, 10.1, 12.0, 30.0]);
        let bars: usize = svg
            .split("<title>")
            .skip(2)
            .filter_map(|rest| rest.split('<').next()?.parse::<usize>().ok())
            .sum();
        assert_eq!(bars, 4);
        assert!(svg.contains("a &lt; b") && !svg.contains("a < b"));
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }

    #[test]
    fn degenerate_samples_still_draw() {
        for samples in [&[][..], &[5.0], &[0.0, 0.0], &[f64::NAN], &[1e9, 1e9 + 1.0]] {
            let svg = draw(samples);
            assert!(!svg.contains("NaN") && !svg.contains("inf"), "{samples:?}");
        }
    }

    #[test]
    fn long_times_are_shown_in_milliseconds() {
        let svg = draw(&[12_340.0, 15_000.0, 11_000.0]);
        assert!(svg.contains("milliseconds") && svg.contains("p50 12.34 ms"), "{svg}");
        assert!(svg.contains(">12<") && !svg.contains(">12000<"), "{svg}");
        assert!(draw(&[900.0]).contains("p50 900 us"));
    }

    #[test]
    fn steps_are_round() {
        assert_eq!([round_step(0.9), round_step(1.3), round_step(21.0)], [1.0, 2.0, 50.0]);
    }
}
