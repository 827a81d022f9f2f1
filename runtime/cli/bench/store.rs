//! `ibex bench store`: what reading, publishing and noticing a change cost, beside the least that they could.
//!
//! A run owns its records, under a name of its own, and gives them back at the end. Every operation takes turns
//! with its limit, in the same process: a bare map for a store of this process, a bare round trip over loopback
//! for one behind a socket, bare commands for Redis, a bare write and sync for a file.

use core::time::Duration;
use std::path::PathBuf;
use std::sync::{Arc, mpsc};

use clap::builder::RangedU64ValueParser;
use ibex::time::{Deadline, Stopwatch, unix_ns};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::grpc::{Server, ServerConfig, host};
use ibex_metadata::ids::{BufferId, InstanceId, Version};
use ibex_metadata::layered::Layered;
use ibex_metadata::name::RecordName;
use ibex_metadata::record::{Buffer, BufferState, Identity, PeerRecord, RecordState, Tcp, Way};
use ibex_metadata::store::{Claim, Hold, Store};
use ibex_metadata::url::StoreUrl;
use serde::Serialize;

use self::limits::Limits;
use super::commit::commit;
use super::stats::Percentiles;
use crate::cli::progress::Progress;
use crate::cli::table::Table;
use crate::cli::{CliError, Outcome, claim_output, write_output};

mod limits;

/// Keys of the batches: one peer, one host's, a large group.
const BATCHES: [usize; 3] = [1, 64, 1024];
/// Looks per sample of what takes nanoseconds: shorter than a turn of another process on the same core.
const LOOKS: u32 = 1_000;
/// Buffers of a record, which make it about a kilobyte.
const BUFFERS: u64 = 32;
/// How long one operation may take before the run gives up.
const BUDGET: Duration = Duration::from_secs(60);
/// Lease of the run's records.
const TTL: Duration = Duration::from_secs(3600);
/// What a batch of 1024 keys from memory may cost, a cached resolve, and noticing a change over loopback.
const TARGETS_US: (f64, f64, f64) = (150.0, 0.1, 5000.0);

/// Flags of `bench store`.
#[derive(clap::Args)]
pub(in crate::cli) struct Args {
    /// Which store, as often as wanted; without: memory:, and memory: behind a server on loopback.
    #[arg(long, value_name = "URL")]
    store: Vec<String>,
    /// Samples per row.
    #[arg(long, default_value_t = 200, value_name = "N", value_parser = samples(1))]
    iters: u32,
    /// Samples before them.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = samples(0))]
    warmup: u32,
    /// Write the report as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn samples(min: u64) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(min..=100_000)
}

/// The machine-readable report; keys are part of the interface.
#[derive(Debug, Serialize)]
struct Report {
    commit: Option<String>,
    record_bytes: usize,
    rows: Vec<Row>,
    wrong: u64,
}

/// One operation on one store.
#[derive(Debug, Serialize)]
struct Row {
    store: String,
    operation: &'static str,
    keys: usize,
    us: Percentiles,
    limit: &'static str,
    limit_us: f64,
    ratio: f64,
    target_us: Option<f64>,
}

/// Runs the benchmark and reports.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    let urls = args.store.iter().map(|url| StoreUrl::parse(url)).collect::<Result<Vec<_>, _>>()?;
    claim_output(args.json.as_deref())?;
    let mut report = Report { commit: commit(), record_bytes: 0, rows: Vec::new(), wrong: 0 };
    if urls.is_empty() {
        measure(args, "memory:", &StoreUrl::parse("memory:")?, &mut report)?;
        let (url, _served) = serve()?;
        measure(args, "ibex://, loopback", &StoreUrl::parse(&url)?, &mut report)?;
    }
    for (text, url) in args.store.iter().zip(&urls) {
        measure(args, text, url, &mut report)?;
    }
    print(&report);
    if let Some(path) = &args.json {
        // PANIC: numbers, strings and named fields always serialise.
        let json = serde_json::to_string_pretty(&report).expect("a report is plain data");
        write_output(path, &format!("{json}\n"))?;
    }
    Ok(if report.wrong == 0 { Outcome::Good } else { Outcome::Wrong })
}

/// Ends the server of [`serve`] when it is dropped.
pub(super) struct Served {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.stop.take());
        // Its end is not this run's result.
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// A server over memory, on a thread of this process, and its URL.
pub(super) fn serve() -> Result<(String, Served), CliError> {
    let (stop, stopped) = mpsc::channel::<()>();
    let (ready, address) = mpsc::channel();
    let memory = StoreUrl::parse("memory:")?;
    let thread = std::thread::spawn(move || {
        let listen = Some(std::net::SocketAddr::from(([127, 0, 0, 1], 0)));
        let config = ServerConfig { listen, ..ServerConfig::default() };
        // Whoever waits for the address waits for as long as this thread runs.
        let tell = |server: &Server| ready.send(server.address()).unwrap_or_default();
        // A server that cannot begin drops `ready`, and the run ends.
        let _ = host(&memory, config, Clock::system(), tell, move || stopped.recv().unwrap_or_default());
    });
    let address = address.recv().ok().flatten().ok_or(StoreError::Unavailable { retry_after: BUDGET })?;
    Ok((format!("ibex://{address}"), Served { stop: Some(stop), thread: Some(thread) }))
}

/// What one store is measured with.
struct Bench<'a> {
    args: &'a Args,
    label: &'a str,
    store: Blocking,
    holds: Vec<Hold>,
    names: Vec<RecordName>,
    version: Version,
    limits: Limits,
}

fn measure(args: &Args, label: &str, url: &StoreUrl, report: &mut Report) -> Result<(), CliError> {
    let store = Blocking::open(url, Clock::system(), BUDGET)?;
    let largest = BATCHES.into_iter().max().unwrap_or(1);
    // CAST: a thousand or so.
    let mut progress = Progress::new("record", largest as u32);
    // PANIC: the lowest bit is set, so the number is not 0.
    let instance = InstanceId::new(u128::from(unix_ns()) | 1).expect("not 0");
    let mut holds = Vec::new();
    for index in 0..largest {
        let name = RecordName::new("bench", &instance.to_string()[16..], &format!("n{index}"));
        let name = name.map_err(StoreError::from)?;
        let hold = store.claim(&Claim { name, instance, ttl: TTL, takeover: false })?;
        store.publish(&hold, Version(0), &record(&hold, 1))?;
        holds.push(hold);
        // CAST: as above.
        progress.step(index as u32 + 1);
    }
    drop(progress);
    let value = record(&holds[0], 1).encode()?;
    report.record_bytes = value.len();
    let names: Vec<_> = holds.iter().map(|hold| hold.name.clone()).collect();
    let limits = Limits::new(url, &names, &value)?;
    let mut bench = Bench { args, label, store, holds, names, version: Version(1), limits };
    let measured = bench.rows(report);
    for hold in &bench.holds {
        bench.store.release(hold)?;
    }
    measured
}

/// A record of about a kilobyte; `turn` makes it another one.
fn record(hold: &Hold, turn: u64) -> PeerRecord {
    let buffer = |index| Buffer {
        buffer_id: BufferId(index),
        addr: index << 32,
        len: 1 << 20,
        location: "cuda:0".to_owned(),
        state: BufferState::Ready,
        since_version: Version(turn),
        ..Buffer::default()
    };
    PeerRecord {
        state: RecordState::Ready,
        transports: vec![Way::Tcp(Tcp { host: "10.0.0.1".into(), port: 7000, ..Tcp::default() }).into()],
        buffers: (0..BUFFERS).map(buffer).collect(),
        ..PeerRecord::empty(&hold.name, Identity::Instance(hold.instance))
    }
}

impl Bench<'_> {
    fn rows(&mut self, report: &mut Report) -> Result<(), CliError> {
        let is_memory = self.label == "memory:";
        for keys in BATCHES {
            let target = (is_memory && keys == 1024).then_some(TARGETS_US.0);
            let row = self.batch(keys, target, &mut report.wrong)?;
            report.rows.push(row);
        }
        report.rows.push(self.publish()?);
        let cache = self.cache()?;
        report.rows.push(self.resolve(&cache)?);
        report.rows.push(self.notice(&cache)?);
        Ok(())
    }

    /// Times `operation` and its limit by turns; both in nanoseconds.
    fn time(
        &mut self,
        mut operation: impl FnMut(&mut Self) -> Result<u64, CliError>,
        mut limit: impl FnMut(&mut Limits) -> Result<u64, CliError>,
    ) -> Result<(Percentiles, f64), CliError> {
        let (mut samples, mut bare) = (Vec::new(), Vec::new());
        for turn in 0..self.args.warmup + self.args.iters {
            let (took_ns, limit_ns) = (operation(self)?, limit(&mut self.limits)?);
            if turn >= self.args.warmup {
                samples.push(took_ns as f64 / 1e3);
                bare.push(limit_ns as f64 / 1e3);
            }
        }
        let none = Percentiles { p50: 0.0, p90: 0.0, p99: 0.0, p999: 0.0 };
        let us = Percentiles::of(&samples).unwrap_or(none);
        Ok((us, Percentiles::of(&bare).unwrap_or(none).p50))
    }

    fn row(
        &self,
        operation: &'static str,
        keys: usize,
        (us, limit_us): (Percentiles, f64),
        limit: &'static str,
        target_us: Option<f64>,
    ) -> Row {
        let ratio = us.p50 / limit_us.max(1e-6);
        Row { store: self.label.to_owned(), operation, keys, us, limit, limit_us, ratio, target_us }
    }

    fn batch(&mut self, keys: usize, target: Option<f64>, wrong: &mut u64) -> Result<Row, CliError> {
        let names = self.names[..keys].to_vec();
        let read = |bench: &mut Self| {
            let watch = Stopwatch::start();
            let outcomes = bench.store.batch_get(&names)?;
            let took_ns = watch.elapsed_ns();
            *wrong += outcomes.iter().filter(|outcome| outcome.is_err()).count() as u64;
            Ok(took_ns)
        };
        let times = self.time(read, |limits| limits.read(keys))?;
        Ok(self.row("batch_get", keys, times, self.limits.read_is(), target))
    }

    fn publish(&mut self) -> Result<Row, CliError> {
        let publish = |bench: &mut Self| {
            let record = record(&bench.holds[0], bench.version.0);
            let watch = Stopwatch::start();
            bench.version = bench.store.publish(&bench.holds[0], bench.version, &record)?;
            Ok(watch.elapsed_ns())
        };
        let times = self.time(publish, Limits::write)?;
        Ok(self.row("publish", 1, times, self.limits.write_is(), None))
    }

    /// A cache that follows the store.
    fn cache(&self) -> Result<Arc<Layered>, CliError> {
        let (inner, clock) = (Arc::clone(self.store.store()), self.store.clock().clone());
        self.on_its_thread(async move { Ok(Arc::new(Layered::new(inner, clock))) })
    }

    /// Runs something on the store's thread and waits for it.
    fn on_its_thread<T: Send + 'static>(
        &self,
        work: impl Future<Output = Result<T, StoreError>> + Send + 'static,
    ) -> Result<T, CliError> {
        let (sender, receiver) = mpsc::channel();
        self.store.spawn(async move { drop(sender.send(work.await)) });
        let late = StoreError::Deadline { budget: BUDGET };
        Ok(receiver.recv_timeout(BUDGET).map_err(|_| late)??)
    }

    /// Asks until the cache keeps the answer: while its watch begins, it keeps none.
    fn warm(&self, cache: &Arc<Layered>) -> Result<(), CliError> {
        let deadline = Deadline::after(BUDGET);
        while cache.cached(&self.names[0]).is_none() {
            if deadline.has_passed() {
                return Err(StoreError::Deadline { budget: BUDGET }.into());
            }
            let (cache, name) = (Arc::clone(cache), self.names[0].clone());
            self.on_its_thread(async move { cache.get(&name).await.map(drop) })?;
        }
        Ok(())
    }

    fn resolve(&mut self, cache: &Arc<Layered>) -> Result<Row, CliError> {
        let look = |bench: &mut Self| {
            bench.warm(cache)?;
            let name = &bench.names[0];
            let watch = Stopwatch::start();
            for _ in 0..LOOKS {
                // Looks, checks the lease, and gives out the guard.
                std::hint::black_box(cache.cached(std::hint::black_box(name)));
            }
            Ok(watch.elapsed_ns())
        };
        let (us, limit_us) = self.time(look, |limits| Ok(limits.look(LOOKS)))?;
        let per_look = |us: f64| us / f64::from(LOOKS);
        let us = Percentiles {
            p50: per_look(us.p50),
            p90: per_look(us.p90),
            p99: per_look(us.p99),
            p999: per_look(us.p999),
        };
        let target = Some(TARGETS_US.1);
        Ok(self.row("cached resolve", 1, (us, per_look(limit_us)), "map look", target))
    }

    /// From before a publication until the cache has dropped what it replaced.
    fn notice(&mut self, cache: &Arc<Layered>) -> Result<Row, CliError> {
        let notice = |bench: &mut Self| {
            bench.warm(cache)?;
            let record = record(&bench.holds[0], bench.version.0);
            let (watch, deadline) = (Stopwatch::start(), Deadline::after(BUDGET));
            bench.version = bench.store.publish(&bench.holds[0], bench.version, &record)?;
            while cache.cached(&bench.names[0]).is_some_and(|leased| leased.stamp().version < bench.version) {
                if deadline.has_passed() {
                    return Err(StoreError::Deadline { budget: BUDGET }.into());
                }
                std::thread::yield_now();
            }
            Ok(watch.elapsed_ns())
        };
        let times = self.time(notice, Limits::wake)?;
        let target = self.limits.is_remote().then_some(TARGETS_US.2);
        Ok(self.row("publish to invalidation", 1, times, self.limits.wake_is(), target))
    }
}

fn print(report: &Report) {
    let header = ["us", "operation", "keys", "p50", "p90", "p99", "limit", "its p50", "ratio", "wanted"];
    let mut table = Table::new(&header);
    for row in &report.rows {
        let target = row.target_us.map(|target| {
            let verdict = if row.us.p50 <= target { "met" } else { "missed" };
            format!("<= {target} {verdict}")
        });
        table.row([
            row.store.clone(),
            row.operation.to_owned(),
            row.keys.to_string(),
            format!("{:.3}", row.us.p50),
            format!("{:.3}", row.us.p90),
            format!("{:.3}", row.us.p99),
            row.limit.to_owned(),
            format!("{:.3}", row.limit_us),
            format!("{:.2}", row.ratio),
            target.unwrap_or_default(),
        ]);
    }
    print!("{table}");
    println!("records of {} B; {} outcomes wrong", report.record_bytes, report.wrong);
}
