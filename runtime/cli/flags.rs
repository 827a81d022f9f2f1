//! The flags that every command shares, and the configuration they spell.
//!
//! Owns nothing. Names and defaults are part of the interface: scripts and reports rely on them.

use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use ibex::config::{CombineMode, Config, Link, RoutePolicy, ScaleKind, SignalMode, ValidConfig, WireDtype};
use ibex::error::ConfigError;
use ibex::reference::routing::Routing;
use serde::Serialize;

use super::CliError;

/// Where RDMA commands go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Provider {
    Emulated,
    Mlx5,
}

/// What runs kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum GpuKind {
    Host,
    Cuda,
}

/// What lies between emulated devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum FabricKind {
    /// Memory of one process, in real time.
    Inproc,
    Shm,
    Udp,
    /// One thread, virtual time, a schedule chosen by the seed.
    Sim,
}

/// Where ranks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Hosts {
    /// This host.
    Local,
    /// A network namespace per host.
    Netns,
}

/// The machinery under a run.
#[derive(Args, Clone, Debug)]
pub(super) struct Machine {
    /// Where RDMA commands go.
    #[arg(long, default_value = "emulated")]
    provider: Provider,
    /// What runs kernels.
    #[arg(long, default_value = "host")]
    gpu: GpuKind,
    /// What lies between emulated devices.
    #[arg(long, default_value = "inproc")]
    pub(super) fabric: FabricKind,
    /// One process per rank.
    #[arg(long)]
    procs: bool,
    /// Where ranks run.
    #[arg(long, default_value = "local")]
    hosts: Hosts,
    /// Link layer of the ports.
    #[arg(long, default_value = "roce", value_parser = named::<Link>(Link::NAMES))]
    pub(super) link: Link,
    /// The metadata store.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
}

impl Machine {
    /// Refuses what this version does not have.
    ///
    /// # Errors
    /// The first such flag.
    pub(super) fn validate(&self) -> Result<(), CliError> {
        let refuse = |flag, value, available| Err(CliError::NotBuilt { flag, value, available });
        if self.provider == Provider::Mlx5 {
            return refuse("--provider", "mlx5", "the emulated device");
        }
        if self.gpu == GpuKind::Cuda {
            return refuse("--gpu", "cuda", "kernels on the host");
        }
        match self.fabric {
            FabricKind::Inproc | FabricKind::Sim => {}
            FabricKind::Shm => return refuse("--fabric", "shm", "inproc and sim"),
            FabricKind::Udp => return refuse("--fabric", "udp", "inproc and sim"),
        }
        if self.procs {
            return refuse("--procs", "(one process per rank)", "all ranks in one process");
        }
        if self.hosts == Hosts::Netns {
            return refuse("--hosts", "netns", "local ranks");
        }
        if self.store.is_some() {
            return refuse("--store", "URL", "no metadata store");
        }
        Ok(())
    }

    /// The name of the provider, for reports.
    pub(super) fn provider_name(&self) -> &'static str {
        match self.provider {
            Provider::Emulated => "emulated",
            Provider::Mlx5 => "mlx5",
        }
    }

    /// The name of what runs kernels, for reports.
    pub(super) fn gpu_name(&self) -> &'static str {
        match self.gpu {
            GpuKind::Host => "host",
            GpuKind::Cuda => "cuda",
        }
    }

    /// The name of the fabric, for reports.
    pub(super) fn fabric_name(&self) -> &'static str {
        match self.fabric {
            FabricKind::Inproc => "inproc",
            FabricKind::Shm => "shm",
            FabricKind::Udp => "udp",
            FabricKind::Sim => "sim",
        }
    }
}

/// Shape, device and protocol of a run.
#[derive(Args, Clone, Debug)]
pub(super) struct Shared {
    #[command(flatten)]
    pub(super) machine: Machine,
    /// Members of the group.
    #[arg(long, default_value_t = 8, value_name = "N")]
    pub(super) ranks: u32,
    /// Tokens of each rank; 0 is valid.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub(super) tokens: u32,
    /// Row width in elements.
    #[arg(long, default_value_t = 7168, value_name = "N")]
    pub(super) hidden: u32,
    /// Experts of the group.
    #[arg(long, default_value_t = 256, value_name = "N")]
    pub(super) experts: u32,
    /// Experts per token, at most 32 and at most --experts.
    #[arg(long, default_value_t = 8, value_name = "K")]
    pub(super) topk: u32,
    /// How dispatched rows travel.
    #[arg(long, default_value = "fp8", value_parser = named::<WireDtype>(WireDtype::NAMES))]
    pub(super) dtype: WireDtype,
    /// How fp8 scales are stored.
    #[arg(long, default_value = "f32", value_parser = named::<ScaleKind>(ScaleKind::NAMES))]
    pub(super) scales: ScaleKind,
    /// What experts send back.
    #[arg(long, default_value = "exact", value_parser = named::<CombineMode>(CombineMode::NAMES))]
    pub(super) combine: CombineMode,
    /// How tokens choose experts.
    #[arg(long, default_value = "uniform", value_parser = named::<Routing>(Routing::NAMES))]
    pub(super) routing: Routing,
    /// Seed of inputs and, with --fabric sim, of the schedule.
    #[arg(long, default_value_t = 1, value_name = "S")]
    pub(super) seed: u64,
    /// Steps that are measured.
    #[arg(long, default_value_t = 20, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    pub(super) iters: u32,
    /// Steps before them.
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1_000_000))]
    pub(super) warmup: u32,
    /// How long a peer may show no sign of life.
    #[arg(long, default_value_t = 100, value_name = "MS")]
    pub(super) detect_ms: u32,
    /// How long a live peer may make no progress [default: 20 x --detect-ms].
    #[arg(long, value_name = "MS")]
    pub(super) stall_ms: Option<u32>,
    /// How signal words are written.
    #[arg(long, default_value = "write", value_parser = named::<SignalMode>(SignalMode::NAMES))]
    pub(super) signal: SignalMode,
    /// Which routes peers are reached by.
    #[arg(long, default_value = "auto", value_parser = named::<RoutePolicy>(RoutePolicy::NAMES))]
    pub(super) route: RoutePolicy,
    /// Steps in flight.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(super) ring: u32,
    /// Blocks of one launch: streaming multiprocessors that a GPU gives to communication.
    #[arg(long, value_name = "N")]
    pub(super) sms: Option<u32>,
    /// Warps of one block.
    #[arg(long, value_name = "N")]
    pub(super) warps: Option<u32>,
    /// Warps that post, out of all warps of a launch.
    #[arg(long, value_name = "N")]
    pub(super) owners: Option<u32>,
    /// Lanes; steps go round them.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(super) lanes: u32,
    /// Queue pairs per lane and peer [default: 4 up to 8 ranks, 2 up to 32, 1 beyond].
    #[arg(long, value_name = "N")]
    pub(super) channels: Option<u32>,
    /// Capture each operation once and replay the graph.
    #[arg(long)]
    pub(super) graph: bool,
    /// Launch send and receive halves apart.
    #[arg(long)]
    pub(super) hooks: bool,
    /// Verify every step on every rank, warm-up included, under strict doorbells.
    #[arg(long)]
    pub(super) check: bool,
}

/// A parser for one of the named choices of the library, with the names in help and complaints.
fn named<T>(names: &'static [&'static str]) -> impl TypedValueParser<Value = T>
where
    T: FromStr<Err = ConfigError> + Clone + Send + Sync + 'static,
{
    PossibleValuesParser::new(names).try_map(|name| name.parse::<T>())
}

impl Shared {
    /// The configuration that the flags spell.
    ///
    /// # Errors
    /// A flag that this version does not have, a field outside its limit, a routing that does not fit.
    pub(super) fn config(&self) -> Result<ValidConfig, CliError> {
        self.machine.validate()?;
        if self.scales != ScaleKind::F32 && self.dtype == WireDtype::Bf16 {
            let because = "bf16 rows have no scales";
            return Err(CliError::Conflict { one: "--scales", other: "--dtype bf16", because });
        }
        let config = Config {
            num_ranks: self.ranks,
            // A buffer holds at least one token; a step may have none.
            max_tokens: self.tokens.max(1),
            hidden: self.hidden,
            num_experts: self.experts,
            max_topk: self.topk,
            dtype: self.dtype,
            scales: self.scales,
            combine: self.combine,
            ring: self.ring,
            lanes: self.lanes,
            num_sms: self.sms.unwrap_or(Config::default().num_sms),
            warps_per_block: self.warps.unwrap_or(Config::default().warps_per_block),
            num_owner_warps: self.owners,
            channels: self.channels,
            signal: self.signal,
            route: self.route,
            link: self.machine.link,
            detect_ms: self.detect_ms,
            stall_ms: self.stall_ms,
            ..Config::default()
        };
        let config = config.validate()?;
        self.routing.validate(&config)?;
        Ok(config)
    }
}

/// The flags and the values derived from them, as reports carry them.
#[derive(Clone, Debug, Serialize)]
pub(super) struct ConfigReport {
    ranks: u32,
    tokens: u32,
    hidden: u32,
    experts: u32,
    topk: u32,
    dtype: &'static str,
    scales: &'static str,
    combine: &'static str,
    routing: &'static str,
    iters: u32,
    warmup: u32,
    link: &'static str,
    signal: &'static str,
    route: &'static str,
    ring: u32,
    lanes: u32,
    channels: u32,
    num_sms: u32,
    warps_per_block: u32,
    num_owner_warps: u32,
    graph: bool,
    hooks: bool,
    check: bool,
    detect_ms: u32,
    stall_ms: u32,
    retry_total_ms: u64,
}

impl ConfigReport {
    /// Describes a run.
    pub(super) fn new(flags: &Shared, config: &ValidConfig) -> Self {
        Self {
            ranks: flags.ranks,
            tokens: flags.tokens,
            hidden: flags.hidden,
            experts: flags.experts,
            topk: flags.topk,
            dtype: flags.dtype.name(),
            scales: flags.scales.name(),
            combine: flags.combine.name(),
            routing: flags.routing.name(),
            iters: flags.iters,
            warmup: flags.warmup,
            link: flags.machine.link.name(),
            signal: flags.signal.name(),
            route: flags.route.name(),
            ring: flags.ring,
            lanes: flags.lanes,
            channels: config.num_channels(),
            num_sms: config.num_sms,
            warps_per_block: config.warps_per_block,
            num_owner_warps: config.num_owner_warps(),
            graph: flags.graph,
            hooks: flags.hooks,
            check: flags.check,
            detect_ms: flags.detect_ms,
            stall_ms: config.stall_ms(),
            retry_total_ms: config.rc_timers().total_ns() / 1_000_000,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Probe {
        #[command(flatten)]
        shared: Shared,
    }

    fn flags(args: &[&str]) -> Shared {
        Probe::try_parse_from(["probe"].iter().chain(args)).unwrap().shared
    }

    #[test]
    fn defaults_are_the_published_setting() {
        let shared = flags(&[]);
        let config = shared.config().unwrap();
        let defaults = Config::default();
        assert_eq!(*config, defaults, "flags and Config must not drift apart");
        assert_eq!((shared.iters, shared.warmup, shared.seed), (20, 3, 1));
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for args in [
            &["--provider", "mlx5"][..],
            &["--gpu", "cuda"],
            &["--fabric", "shm"],
            &["--fabric", "udp"],
            &["--procs"],
            &["--hosts", "netns"],
            &["--store", "tcp://127.0.0.1:1"],
        ] {
            let error = flags(args).config().unwrap_err();
            assert!(matches!(error, CliError::NotBuilt { flag, .. } if flag == args[0]), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn shapes_are_refused_by_the_library_and_exit_with_2() {
        for (args, message) in [
            (&["--topk", "33"][..], "max_topk = 33 is refused: it must be in 1..=32"),
            (&["--topk", "8", "--experts", "4"], "at most num_experts = 4"),
            (&["--routing", "group-limited", "--experts", "250"], "a multiple of 8"),
            (&["--hidden", "7170"], "a multiple of 16"),
            (&["--stall-ms", "3"], "at least detect_ms = 100"),
        ] {
            let error = flags(args).config().unwrap_err();
            assert!(error.to_string().contains(message), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn scales_without_fp8_are_refused() {
        let error = flags(&["--scales", "pow2", "--dtype", "bf16"]).config().unwrap_err();
        assert!(matches!(error, CliError::Conflict { .. }), "{error}");
    }

    #[test]
    fn no_tokens_is_a_step() {
        let shared = flags(&["--tokens", "0"]);
        assert_eq!((shared.tokens, shared.config().unwrap().max_tokens), (0, 1));
    }
}
