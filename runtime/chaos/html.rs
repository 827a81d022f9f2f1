//! A campaign as one page that needs nothing else: figures, and a timeline of ranks against time.
//!
//! Pure: text in, text out.

use core::fmt::Write as _;

use super::report::ReportJson;
use super::timeline::{Entry, Happened, Timeline};
use crate::ids::Rank;

/// Width of the drawing for one millisecond at the densest, and its bounds, in pixels.
const WIDTH_MIN: f64 = 1_100.0;
const WIDTH_MAX: f64 = 12_000.0;
const PX_PER_MS: f64 = 6.0;
const LEFT: f64 = 70.0;
const TOP: f64 = 70.0;
const ROW: f64 = 64.0;
const LANE: f64 = 30.0;

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1c2733;--soft:#8795a3;--line:#d5dce3;--ground:#fff;--run:#2f7ed8;
--lost:#e08b1e;--dead:#c3cad2;--gate:#8e5bd0;--fault:#d3352b;--good:#2c9b57;--wait:#7fc4e8}
@media (prefers-color-scheme:dark){:root{--ink:#e4e9ee;--soft:#8b98a5;--line:#36414c;--ground:#12171c;--dead:#47525d}}
body{font:14px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--ground);margin:24px}
h1{font-size:20px;margin:0 0 4px}p{color:var(--soft);margin:0 0 16px}
table{border-collapse:collapse;margin:0 24px 20px 0;display:inline-table;vertical-align:top}
td,th{padding:2px 10px 2px 0;text-align:right;border-bottom:1px solid var(--line);font-variant-numeric:tabular-nums}
td:first-child,th:first-child{text-align:left}.bad{color:var(--fault);font-weight:600}.good{color:var(--good)}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:6px}text{fill:var(--ink);font-size:11px}
.soft{fill:var(--soft)}.key span{margin-right:18px;white-space:nowrap}
.key i{display:inline-block;width:12px;height:12px;margin-right:5px;vertical-align:-1px;
border-radius:2px}li{margin:2px 0}";

/// The page.
#[must_use]
pub fn page(
    title: &str,
    command: &str,
    report: &ReportJson,
    timeline: &Timeline,
    flaws: &[String],
) -> String {
    let mut page = String::new();
    let _ = write!(
        page,
        "<!doctype html><html lang=en><meta charset=utf-8><title>{0}</title><style>{STYLE}</style><h1>{0}</h1>\
         <p><code>{1}</code></p>",
        escape(title),
        escape(command)
    );
    tables(&mut page, report);
    if !flaws.is_empty() {
        page.push_str("<h1 class=bad>Found</h1><ul>");
        flaws.iter().take(50).for_each(|flaw| {
            let _ = write!(page, "<li>{}</li>", escape(flaw));
        });
        page.push_str("</ul>");
    }
    key(&mut page);
    drawing(&mut page, timeline);
    page.push_str("</html>\n");
    page
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

fn tables(page: &mut String, report: &ReportJson) {
    let found = &report.findings;
    let findings = [
        ("wrong tokens", found.wrong_tokens),
        ("unreported losses", found.unreported_losses),
        ("excess losses", found.excess_losses),
        ("false deaths", found.false_deaths),
        ("hangs", found.hangs),
        ("leaked bytes", found.leaked_bytes),
        ("healthy queue pairs touched", found.healthy_qps_touched),
        ("graphs captured again", found.graph_recaptures),
    ];
    page.push_str("<table><tr><th>must be 0<th></tr>");
    for (name, count) in findings {
        let class = if count == 0 { "good" } else { "bad" };
        let _ = write!(page, "<tr><td>{name}<td class={class}>{count}</tr>");
    }
    page.push_str("</table><table><tr><th>seen<th></tr>");
    let seen = [
        ("seeds", report.seeds),
        ("steps, all ranks", report.steps),
        ("faults", report.faults),
        ("members lost", report.kills),
        ("replacements", report.rejoins),
        ("picks reported lost", report.lost_picks),
    ];
    seen.iter().for_each(|(name, count)| {
        let _ = write!(page, "<tr><td>{name}<td>{count}</tr>");
    });
    page.push_str("</table><table><tr><th>ms<th>count<th>p50<th>p99<th>max</tr>");
    let times = [
        ("detected", report.detected_ms),
        ("agreed", report.agree_ms),
        ("gate", report.gate_ms),
        ("recreated", report.recreate_ms),
        ("rejoined", report.rejoin_ms),
        ("survivor pause", report.survivor_pause_ms),
    ];
    for (name, t) in times {
        let (count, p50, p99, max) = (t.count, t.p50, t.p99, t.max);
        let _ = write!(page, "<tr><td>{name}<td>{count}<td>{p50:.2}<td>{p99:.2}<td>{max:.2}</tr>");
    }
    page.push_str("</table><table><tr><th>fault<th></tr>");
    for (kind, count) in &report.fault_counts {
        let _ = write!(page, "<tr><td>{kind}<td>{count}</tr>");
    }
    page.push_str("</table>");
}

fn key(page: &mut String) {
    let entries = [
        ("run", "a step"),
        ("lost", "a step with reported losses"),
        ("dead", "no process"),
        ("wait", "starts, not yet a member"),
        ("soft", "stands still"),
        ("gate", "gate closed"),
        ("fault", "a fault"),
    ];
    page.push_str("<p class=key>");
    for (colour, name) in entries {
        let _ = write!(page, "<span><i style=\"background:var(--{colour})\"></i>{name}</span>");
    }
    page.push_str("dashed lines: epochs</p>");
}

/// Where things are drawn.
struct Scale {
    from_ns: u64,
    px_per_ns: f64,
    width: f64,
}

impl Scale {
    fn new(timeline: &Timeline) -> Self {
        let from_ns = timeline.entries.first().map_or(0, |entry| entry.at_ns);
        let to_ns = timeline.entries.iter().map(|entry| entry.at_ns).max().unwrap_or(1);
        // CAST: times of one campaign, exact enough for pixels.
        let span = (to_ns - from_ns).max(1) as f64;
        let width = (span / 1e6 * PX_PER_MS).clamp(WIDTH_MIN, WIDTH_MAX);
        Self { from_ns, px_per_ns: width / span, width }
    }

    fn x(&self, ns: u64) -> f64 {
        LEFT + ns.saturating_sub(self.from_ns) as f64 * self.px_per_ns
    }
}

fn row_y(rank: Rank) -> f64 {
    TOP + f64::from(rank.0) * ROW
}

fn drawing(page: &mut String, timeline: &Timeline) {
    let scale = Scale::new(timeline);
    let height = TOP + f64::from(timeline.num_ranks) * ROW + 30.0;
    let width = LEFT + scale.width + 40.0;
    let _ = write!(page, "<div class=scroll><svg width={width:.0} height={height:.0}>");
    axis(page, &scale, height);
    // CAST: at most 512 ranks.
    for rank in (0..timeline.num_ranks as u16).map(Rank) {
        let y = row_y(rank);
        let _ = write!(page, "<text x=8 y={:.0}>rank {rank}</text>", y + 20.0);
        spans(page, &scale, timeline, rank);
    }
    timeline.entries.iter().for_each(|entry| mark(page, &scale, entry, height));
    page.push_str("</svg></div>");
    if timeline.dropped != 0 {
        let _ = write!(page, "<p>{} more entries were not kept.</p>", timeline.dropped);
    }
}

fn axis(page: &mut String, scale: &Scale, height: f64) {
    // About a label per 110 pixels, at 1, 2 or 5 times a power of ten.
    let wanted_ms = 110.0 / scale.px_per_ns / 1e6;
    let power = 10_f64.powf(wanted_ms.log10().floor());
    let step_ms =
        [1.0, 2.0, 5.0, 10.0].iter().map(|m| m * power).find(|step| *step >= wanted_ms).unwrap_or(power);
    let mut at_ms = 0.0;
    while at_ms * 1e6 * scale.px_per_ns <= scale.width {
        let x = LEFT + at_ms * 1e6 * scale.px_per_ns;
        let _ = write!(
            page,
            "<line x1={x:.1} x2={x:.1} y1=24 y2={height:.0} stroke=\"var(--line)\"/>\
             <text class=soft x={:.1} y=18>{at_ms:.0} ms</text>",
            x + 3.0
        );
        at_ms += step_ms;
    }
}

/// What a rank was at a time: from one entry to the one that ends it.
fn spans(page: &mut String, scale: &Scale, timeline: &Timeline, rank: Rank) {
    let end_ns = timeline.entries.iter().map(|entry| entry.at_ns).max().unwrap_or(0);
    let mut begun: [Option<u64>; 4] = [Some(scale.from_ns), None, None, None];
    const KINDS: [(&str, f64, f64); 4] =
        [("dead", 2.0, LANE), ("wait", 2.0, LANE), ("soft", 2.0, LANE), ("gate", LANE + 6.0, 6.0)];
    let draw = |page: &mut String, which: usize, from: u64, to: u64| {
        let (colour, dy, h) = KINDS[which];
        let (x, y) = (scale.x(from), row_y(rank) + dy);
        let w = (scale.x(to) - x).max(1.0);
        let _ = write!(
            page,
            "<rect x={x:.1} y={y:.1} width={w:.1} height={h:.1} rx=2 fill=\"var(--{colour})\" opacity=.75>\
             <title>{colour}: {:.3} ms</title></rect>",
            (to - from) as f64 / 1e6
        );
    };
    for entry in timeline.entries.iter().filter(|entry| entry.rank == Some(rank)) {
        let (ends, begins): (&[usize], Option<usize>) = match &entry.what {
            Happened::Started => (&[0], Some(1)),
            Happened::Joined => (&[1], None),
            Happened::Died => (&[0, 1, 2, 3], Some(0)),
            Happened::Frozen(true) => (&[], Some(2)),
            Happened::Frozen(false) => (&[2], None),
            Happened::GateClosed => (&[], Some(3)),
            Happened::GateOpened => (&[3], None),
            _ => (&[], None),
        };
        for &which in ends {
            if let Some(from) = begun[which].take() {
                draw(page, which, from, entry.at_ns);
            }
        }
        if let Some(which) = begins {
            begun[which].get_or_insert(entry.at_ns);
        }
    }
    for (which, from) in begun.into_iter().enumerate() {
        if let Some(from) = from {
            draw(page, which, from, end_ns);
        }
    }
}

fn mark(page: &mut String, scale: &Scale, entry: &Entry, height: f64) {
    let x = scale.x(entry.at_ns);
    let y = entry.rank.map_or(30.0, row_y);
    let ms = entry.at_ns.saturating_sub(scale.from_ns) as f64 / 1e6;
    let _ = match &entry.what {
        Happened::Step { step, since_ns, lost } => {
            let from = scale.x(*since_ns);
            let (w, colour) = ((x - from).max(1.5), if *lost == 0 { "run" } else { "lost" });
            write!(
                page,
                "<rect x={from:.1} y={:.1} width={w:.1} height=14 rx=2 fill=\"var(--{colour})\">\
                 <title>step {step}, {lost} lost, {:.3} ms</title></rect>",
                y + 10.0,
                entry.at_ns.saturating_sub(*since_ns) as f64 / 1e6
            )
        }
        Happened::Epoch(epoch, members) => write!(
            page,
            "<line x1={x:.1} x2={x:.1} y1=40 y2={height:.0} stroke=\"var(--ink)\" stroke-dasharray=\"3 4\" opacity=.5/>\
             <text x={:.1} y=36>epoch {} <tspan class=soft>{} members</tspan></text>",
            x + 2.0,
            epoch.0,
            members.len()
        ),
        Happened::Fault(text) => write!(
            page,
            "<path d=\"M{x:.1} {tip:.1}l-6 -9h12z\" fill=\"var(--fault)\"><title>{ms:.3} ms: {text}</title></path>\
             <text x={right:.1} y={above:.1} style=\"fill:var(--fault)\">{text}</text>",
            tip = y + 2.0,
            text = escape(text),
            right = x + 8.0,
            above = y - 2.0
        ),
        Happened::Flaw(text) => write!(
            page,
            "<circle cx={x:.1} cy=50 r=6 fill=\"var(--fault)\"><title>{ms:.3} ms: {}</title></circle>",
            escape(text)
        ),
        Happened::Suspects(peer) => {
            small(page, x, y + 34.0, "fault", &format!("{ms:.3} ms: suspects {peer}"))
        }
        Happened::Evicted => small(page, x, y + 17.0, "fault", &format!("{ms:.3} ms: evicted")),
        Happened::Joined => small(page, x, y + 17.0, "good", &format!("{ms:.3} ms: a member")),
        Happened::Stopped(why) => {
            small(page, x, y + 17.0, "ink", &format!("{ms:.3} ms: stops, {}", escape(why)))
        }
        Happened::Late(what) => {
            small(page, x, y + 34.0, "ink", &format!("{ms:.3} ms: late, {}", escape(what)))
        }
        _ => Ok(()),
    };
}

fn small(page: &mut String, x: f64, y: f64, colour: &str, title: &str) -> core::fmt::Result {
    write!(
        page,
        "<circle cx={x:.1} cy={y:.1} r=4 fill=\"var(--{colour})\" stroke=\"var(--ground)\">\
         <title>{title}</title></circle>"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::Epoch;
    use crate::membership::RankSet;

    #[test]
    fn a_page_shows_what_happened_and_trusts_no_text() {
        let mut timeline = Timeline::new(2);
        for rank in [Rank(0), Rank(1)] {
            timeline.push(1_000, Some(rank), Happened::Started);
            timeline.push(2_000_000, Some(rank), Happened::Joined);
        }
        timeline.push(2_000_000, None, Happened::Epoch(Epoch(1), RankSet::first(2)));
        timeline.push(5_000_000, Some(Rank(1)), Happened::Fault("kill 1".into()));
        timeline.push(5_000_000, Some(Rank(1)), Happened::Died);
        timeline.push(9_000_000, Some(Rank(0)), Happened::Step { step: 3, since_ns: 4_000_000, lost: 7 });
        let flaws = ["a <b> & c".to_owned()];
        let page = page("title", "ibex chaos --seed 1", &ReportJson::default(), &timeline, &flaws);
        for wanted in ["epoch 1", "kill 1", "step 3, 7 lost", "a &lt;b&gt; &amp; c", "rank 1", "</svg>"] {
            assert!(page.contains(wanted), "{wanted}");
        }
        assert!(!page.contains("http"), "it needs nothing from elsewhere");
    }
}
