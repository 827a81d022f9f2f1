//! `ibex store`: serve records to other processes, and show people what is in a store.
//!
//! Owns the server of `serve` until a signal ends it. Bad addresses, URLs, names and files are refused
//! with exit code 2 before anything is opened; a store that fails, or has no such name, is exit code 1.

use core::time::Duration;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use ibex::time::sleep;
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::grpc::{HostError, Server, ServerConfig, ServerError, TlsFiles, host};
use ibex_metadata::ids::Revision;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::open::{read_file, read_token};
use ibex_metadata::record::PeerRecord;
use ibex_metadata::store::{Change, Event, Filter, Snapshot};
use ibex_metadata::url::StoreUrl;
use signal_hook::consts::{SIGINT, SIGTERM};

use super::table::Table;
use super::{CliError, Outcome};

/// How often a waiting command looks whether a signal came.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// Serve a store, or look into one.
#[derive(clap::Subcommand)]
pub(super) enum Command {
    /// Serve a store to other processes, until SIGINT or SIGTERM.
    Serve(Serve),
    /// List names: owner, state, version, what is left of the lease.
    Ls(Ls),
    /// Show records.
    Get(Get),
    /// Follow changes, one line each.
    Watch(Watch),
}

/// What to serve, and where.
#[derive(clap::Args)]
pub(super) struct Serve {
    /// What to serve: memory:, or redb:PATH to survive a restart.
    #[arg(long, default_value = "memory:", value_name = "URL")]
    store: String,
    /// TCP address; port 0 takes a free one, and the first line printed says which.
    #[arg(long, default_value = "127.0.0.1:7400", value_name = "ADDRESS")]
    listen: SocketAddr,
    /// A Unix socket, beside TCP.
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Where Prometheus finds /metrics, over plain HTTP.
    #[arg(long, value_name = "ADDRESS")]
    metrics: Option<SocketAddr>,
    /// Certificate chain (PEM) for TLS on the TCP address.
    #[arg(long, value_name = "PATH", requires = "tls_key")]
    tls_cert: Option<PathBuf>,
    /// Its key (PEM).
    #[arg(long, value_name = "PATH", requires = "tls_cert")]
    tls_key: Option<PathBuf>,
    /// A file with the token that clients must present.
    #[arg(long, value_name = "PATH")]
    token_file: Option<PathBuf>,
}

/// Which store to look into.
#[derive(clap::Args)]
struct Source {
    /// redb:PATH, ibex://HOST:PORT, ibex+unix:PATH, redis://HOST:PORT, etcd://HOST:PORT or k8s://NAMESPACE.
    #[arg(long, value_name = "URL")]
    store: String,
}

/// What to list.
#[derive(clap::Args)]
pub(super) struct Ls {
    #[command(flatten)]
    source: Source,
    /// Only names under this: cluster, cluster/group or cluster/group/name.
    #[arg(default_value = "")]
    prefix: String,
}

/// What to show.
#[derive(clap::Args)]
pub(super) struct Get {
    #[command(flatten)]
    source: Source,
    /// cluster/group/name, as many as wanted.
    #[arg(required = true)]
    names: Vec<String>,
}

/// What to follow.
#[derive(clap::Args)]
pub(super) struct Watch {
    #[command(flatten)]
    source: Source,
    /// Only names under this: cluster, cluster/group or cluster/group/name.
    #[arg(default_value = "")]
    prefix: String,
    /// Start after this revision instead of now; 0: from as far back as the store remembers.
    #[arg(long)]
    from: Option<u64>,
    /// End after so many changes.
    #[arg(long)]
    count: Option<u64>,
}

/// Carries out one of the subcommands.
pub(super) fn run(command: &Command) -> Result<Outcome, CliError> {
    match command {
        Command::Serve(args) => serve(args),
        Command::Ls(args) => ls(args),
        Command::Get(args) => get(args),
        Command::Watch(args) => watch(args),
    }
}

/// Whether the store refused what it was asked, or failed at it.
pub(super) fn exit_code(error: &StoreError) -> u8 {
    match error {
        StoreError::Input(_) | StoreError::Unsupported(_) => 2,
        _ => 1,
    }
}

/// A flag that SIGINT and SIGTERM raise.
fn interrupted() -> Result<Arc<AtomicBool>, CliError> {
    let flag = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        signal_hook::flag::register(signal, Arc::clone(&flag))
            .map_err(|error| ibex::error::Error::from(ibex::error::OsError::from_io("sigaction", &error)))?;
    }
    Ok(flag)
}

fn serve(args: &Serve) -> Result<Outcome, CliError> {
    let url = StoreUrl::parse(&args.store)?;
    let config = ServerConfig {
        listen: Some(args.listen),
        unix: args.unix.clone(),
        metrics: args.metrics,
        tls: tls(args)?,
        token: args.token_file.as_deref().map(read_token).transpose().map_err(StoreError::from)?,
    };
    let flag = interrupted()?;
    let stop = move || {
        while !flag.load(Ordering::Relaxed) {
            sleep(LOOK_PERIOD);
        }
    };
    host(&url, config, Clock::system(), announce, stop).map_err(CliError::Serve)?;
    Ok(Outcome::Good)
}

/// One line per address, for people and for whoever started the server.
fn announce(server: &Server) {
    if let Some(address) = server.address() {
        println!("serving ibex://{address}");
    }
    if let Some(address) = server.metrics_address() {
        println!("metrics http://{address}/metrics");
    }
}

fn tls(args: &Serve) -> Result<Option<TlsFiles>, CliError> {
    let (Some(cert), Some(key)) = (&args.tls_cert, &args.tls_key) else { return Ok(None) };
    let cert_pem = read_file("tls-cert", cert).map_err(StoreError::from)?;
    let key_pem = read_file("tls-key", key).map_err(StoreError::from)?;
    Ok(Some(TlsFiles { cert_pem, key_pem }))
}

/// 2 where the server was refused a store, an address or a certificate; 1 where it failed later.
pub(super) fn serve_exit_code(error: &HostError) -> u8 {
    match error {
        HostError::Store(error) => exit_code(error),
        HostError::Server(ServerError::Transport(_)) | HostError::Threads(_) => 1,
        HostError::Server(_) => 2,
    }
}

impl Source {
    fn open(&self) -> Result<Blocking, CliError> {
        let url = StoreUrl::parse(&self.store)?;
        // A remote store has a budget of its own, from the URL; this one bounds the rest.
        let budget = url.timeout() * 2;
        Ok(Blocking::open(&url, Clock::system(), budget)?)
    }
}

fn ls(args: &Ls) -> Result<Outcome, CliError> {
    let prefix = Prefix::parse(&args.prefix).map_err(StoreError::from)?;
    let store = args.source.open()?;
    let mut filter = Filter::under(prefix);
    let mut table =
        Table::new(&["name", "state", "rank", "version", "lease", "transports", "buffers", "owner"]);
    loop {
        let page = store.list(&filter)?;
        for entry in &page.entries {
            let lease = entry.remaining.map_or("expired".into(), |left| format!("{} ms", left.as_millis()));
            table.row(summary(&entry.snapshot, lease));
        }
        filter.after = page.next;
        if filter.after.is_none() {
            break;
        }
    }
    print!("{table}");
    Ok(Outcome::Good)
}

fn summary(snapshot: &Snapshot, lease: String) -> [String; 8] {
    let record = &snapshot.record;
    [
        snapshot.name.to_string(),
        record.state.to_string(),
        record.rank.map_or("-".into(), |rank| rank.to_string()),
        snapshot.stamp.to_string(),
        lease,
        kinds(record),
        record.buffers.len().to_string(),
        snapshot.identity.to_string(),
    ]
}

fn kinds(record: &PeerRecord) -> String {
    let kinds: Vec<&str> = record.transports.iter().map(|transport| transport.way.kind()).collect();
    if kinds.is_empty() { "-".into() } else { kinds.join(",") }
}

fn get(args: &Get) -> Result<Outcome, CliError> {
    let names: Result<Vec<_>, _> = args.names.iter().map(|name| RecordName::parse(name)).collect();
    let names = names.map_err(StoreError::from)?;
    let store = args.source.open()?;
    let mut outcome = Outcome::Good;
    for (name, found) in names.iter().zip(store.batch_get(&names)?) {
        match found {
            Ok(leased) => {
                let left = leased.remaining(store.clock().now());
                show(leased.unchecked(), left);
            }
            Err(error) => {
                eprintln!("ibex: {name}: {error}");
                outcome = Outcome::Wrong;
            }
        }
    }
    Ok(outcome)
}

fn show(snapshot: &Snapshot, left: Duration) {
    let record = &snapshot.record;
    println!("{}", snapshot.name);
    println!("  owner     {}", snapshot.identity);
    println!("  stamp     fence {}, version {}", snapshot.stamp.fence, snapshot.stamp.version);
    println!("  lease     {} ms", left.as_millis());
    println!("  state     {}", record.state);
    if let Some(rank) = record.rank {
        println!("  rank      {rank} of {}", record.world_hint);
    }
    if let Some(source) = &record.source {
        println!("  source    {} {}", source.source_id(), source.model);
    }
    for device in &record.devices {
        let link = device.link_layer;
        println!("  device    {} port {}, {link}, lid {:#x}", device.name, device.port, device.lid);
    }
    for transport in &record.transports {
        println!("  transport {}", transport.way.kind());
    }
    for buffer in &record.buffers {
        let (id, len, keys) = (buffer.buffer_id, buffer.len, buffer.keys.len());
        println!(
            "  buffer    {id}: {len} B at {:#x}, {}, {}, {keys} keys",
            buffer.addr, buffer.kind, buffer.state
        );
    }
    for manifest in &record.manifests {
        println!("  manifest  {}: {} entries, {} B", manifest.kind, manifest.count, manifest.bytes);
    }
}

fn watch(args: &Watch) -> Result<Outcome, CliError> {
    let prefix = Prefix::parse(&args.prefix).map_err(StoreError::from)?;
    let store = args.source.open()?;
    let flag = interrupted()?;
    let from = match args.from {
        Some(from) => Revision(from),
        None => store.health()?.revision,
    };
    let mut watch = store.watch(&prefix, from)?;
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 && !flag.load(Ordering::Relaxed) {
        if let Some(event) = watch.next(LOOK_PERIOD)? {
            println!("{}", line(&event));
            left -= 1;
        }
    }
    Ok(Outcome::Good)
}

fn line(event: &Event) -> String {
    let revision = event.revision;
    match &event.change {
        Change::Put(snapshot) => {
            let (name, stamp, state) = (&snapshot.name, snapshot.stamp, snapshot.record.state);
            format!("{revision} put {name} {stamp} {state}")
        }
        Change::Expired { name, fence } => format!("{revision} expired {name} {fence}"),
        Change::Released { name, fence } => format!("{revision} released {name} {fence}"),
        Change::Cell { name, version } => format!("{revision} cell {name} {version}"),
        Change::Gap => format!("{revision} gap: changes before this are not remembered"),
    }
}
