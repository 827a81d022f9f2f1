//! The flags that every command shares, and the configuration they spell.
//!
//! Owns nothing. Names and defaults are part of the interface: scripts and reports rely on them.

use std::path::PathBuf;
use std::str::FromStr;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, ValueEnum};
use ibex::bootstrap::Place;
use ibex::config::{CombineMode, Config, Link, RoutePolicy, ScaleKind, SignalMode, ValidConfig, WireDtype};
use ibex::error::ConfigError;
use ibex::gpu::cuda::Uuid;
use ibex::reference::routing::Routing;
use ibex_hca::emulated::switch::FaultPlan;
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
    /// Memory that processes of one host share.
    Shm,
    /// RC over RoCEv2, in UDP packets.
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

/// Which real devices, and how their packets travel; only with --provider mlx5.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Nics {
    /// Devices that ranks share in turn [default: of those with an active port the nearest to the rank's GPU, or to
    /// the NUMA node of this process].
    #[arg(long, value_name = "NAME,..", value_delimiter = ',')]
    pub(super) nics: Vec<String>,
    /// Port of each device [default: the first active one].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=2))]
    pub(super) nic_port: Option<u8>,
    /// Entry of the GID table [default: RoCE v2, IPv4 before IPv6 before link-local].
    #[arg(long, value_name = "N")]
    pub(super) gid_index: Option<u8>,
    /// Entry of the P_Key table [default: 0].
    #[arg(long, value_name = "N")]
    pub(super) pkey_index: Option<u16>,
    /// Service level, or Ethernet priority [default: 0].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=15))]
    pub(super) service_level: Option<u8>,
    /// Traffic class of packets; its upper six bits are the DSCP [default: 0].
    #[arg(long, value_name = "N")]
    pub(super) traffic_class: Option<u8>,
    /// A thread of the host carries doorbells to the device, for GPUs that cannot reach its pages.
    #[arg(long)]
    pub(super) assist_doorbells: bool,
}

impl Nics {
    /// A flag that was given, if any was.
    fn first(&self) -> Option<&'static str> {
        let given = [
            ("--nics", !self.nics.is_empty()),
            ("--nic-port", self.nic_port.is_some()),
            ("--gid-index", self.gid_index.is_some()),
            ("--pkey-index", self.pkey_index.is_some()),
            ("--service-level", self.service_level.is_some()),
            ("--traffic-class", self.traffic_class.is_some()),
            ("--assist-doorbells", self.assist_doorbells),
        ];
        given.into_iter().find(|(_, is_given)| *is_given).map(|(flag, _)| flag)
    }
}

/// The machinery under a run.
#[derive(Args, Clone, Debug)]
pub(super) struct Machine {
    /// Where RDMA commands go.
    #[arg(long, default_value = "emulated")]
    provider: Provider,
    #[command(flatten)]
    pub(super) nics: Nics,
    /// What runs kernels.
    #[arg(long, default_value = "host")]
    gpu: GpuKind,
    /// Which GPU, as nvidia-smi -L prints it; all ranks share it [default: the first; ranks with processes of their own
    /// take the GPUs of their host in turn].
    #[arg(long, value_name = "GPU-UUID")]
    pub(super) gpu_uuid: Option<Uuid>,
    /// What lies between emulated devices [default: inproc; between processes shm, between hosts udp].
    #[arg(long)]
    fabric: Option<FabricKind>,
    /// One process per rank, started by this command.
    #[arg(long)]
    pub(super) procs: bool,
    /// Where these processes run: here, or in network namespaces joined by a bridge.
    #[arg(long, default_value = "local")]
    pub(super) hosts: Hosts,
    /// Network namespaces, each with an equal share of the ranks [default: one per rank].
    #[arg(long, value_name = "H", value_parser = clap::value_parser!(u32).range(1..=64))]
    num_hosts: Option<u32>,
    /// Address by which other processes reach this one [default: HOST_IP, POD_IP, or the route to rank 0].
    #[arg(long, value_name = "ADDRESS")]
    pub(super) advertise: Option<String>,
    /// What goes wrong with packets between processes: a fault plan, as JSON.
    #[arg(long, value_name = "FILE")]
    faults_plan: Option<PathBuf>,
    /// Link layer of the ports.
    #[arg(long, default_value = "roce", value_parser = named::<Link>(Link::NAMES))]
    pub(super) link: Link,
    /// The metadata store.
    #[arg(long, value_name = "URL")]
    store: Option<String>,
    /// A launcher has started this process as one of several.
    #[arg(skip)]
    is_launched: bool,
}

impl Machine {
    /// Refuses what this version does not have, and what excludes each other.
    ///
    /// # Errors
    /// The first such flag.
    pub(super) fn validate(&self) -> Result<(), CliError> {
        let refuse = |flag, value, available| Err(CliError::NotBuilt { flag, value, available });
        self.validate_gpu()?;
        if self.store.is_some() {
            return refuse("--store", "URL", "no metadata store");
        }
        self.validate_provider()?;
        self.validate_processes()
    }

    /// Whether kernels run on a GPU.
    pub(super) fn is_cuda(&self) -> bool {
        self.gpu == GpuKind::Cuda
    }

    /// GPUs have a name, and run kernels in real time.
    fn validate_gpu(&self) -> Result<(), CliError> {
        if !self.is_cuda() {
            return match self.gpu_uuid {
                Some(_) => {
                    let because = "there is only one host";
                    Err(CliError::Conflict { one: "--gpu-uuid", other: "--gpu host", because })
                }
                None => Ok(()),
            };
        }
        if self.fabric() == FabricKind::Sim {
            let because = "a simulation runs kernels itself";
            return Err(CliError::Conflict { one: "--gpu cuda", other: "--fabric sim", because });
        }
        Ok(())
    }

    /// Whether queue pairs live on real devices.
    pub(super) fn is_mlx5(&self) -> bool {
        self.provider == Provider::Mlx5
    }

    fn validate_provider(&self) -> Result<(), CliError> {
        if !self.is_mlx5() {
            return match self.nics.first() {
                Some(one) => {
                    let because = "emulated devices are all alike";
                    Err(CliError::Conflict { one, other: "--provider emulated", because })
                }
                None => Ok(()),
            };
        }
        if self.is_group() {
            let available = "real devices within one process";
            return Err(CliError::NotBuilt {
                flag: "--provider",
                value: "mlx5 between processes",
                available,
            });
        }
        if self.fabric.is_some() {
            let because = "real devices have a fabric of their own";
            return Err(CliError::Conflict { one: "--fabric", other: "--provider mlx5", because });
        }
        Ok(())
    }

    fn validate_processes(&self) -> Result<(), CliError> {
        let conflict = |one, other, because| Err(CliError::Conflict { one, other, because });
        let is_group = self.is_group();
        match self.fabric() {
            FabricKind::Shm if !is_group => {
                return conflict("--fabric shm", "one process", "say --procs, or use a launcher");
            }
            FabricKind::Udp if !is_group => {
                return conflict("--fabric udp", "one process", "say --procs, or use a launcher");
            }
            FabricKind::Inproc if is_group => {
                return conflict("--fabric inproc", "several processes", "it lies within one");
            }
            FabricKind::Sim if is_group => {
                return conflict("--fabric sim", "several processes", "it lies within one");
            }
            FabricKind::Udp if self.link == Link::Ib => {
                return conflict("--fabric udp", "--link ib", "its ports are Ethernet ports");
            }
            FabricKind::Shm if self.hosts == Hosts::Netns => {
                return conflict("--fabric shm", "--hosts netns", "hosts share no memory");
            }
            _ => {}
        }
        if self.hosts == Hosts::Netns && !self.procs {
            return conflict("--hosts netns", "one process", "say --procs");
        }
        if self.num_hosts.is_some() && self.hosts == Hosts::Local {
            return conflict("--num-hosts", "--hosts local", "only namespaces have a number");
        }
        if self.fabric() != FabricKind::Udp && (self.faults_plan.is_some() || self.advertise.is_some()) {
            let one = if self.faults_plan.is_some() { "--faults-plan" } else { "--advertise" };
            return conflict(one, "a fabric other than udp", "no packets leave the host");
        }
        Ok(())
    }

    /// Refuses everything that has to do with several processes, for a command that runs in one.
    ///
    /// # Errors
    /// The first such flag.
    pub(super) fn validate_one_process(&self) -> Result<(), CliError> {
        let refuse = |flag, value| {
            Err(CliError::NotBuilt {
                flag,
                value,
                available: "emulated devices in one process, fabric inproc",
            })
        };
        if self.is_mlx5() {
            return refuse("--provider", "mlx5");
        }
        if self.procs {
            return refuse("--procs", "(one process per rank)");
        }
        if self.hosts == Hosts::Netns {
            return refuse("--hosts", "netns");
        }
        match self.fabric() {
            FabricKind::Shm => return refuse("--fabric", "shm"),
            FabricKind::Udp => return refuse("--fabric", "udp"),
            FabricKind::Inproc | FabricKind::Sim => {}
        }
        self.validate()
    }

    /// What lies between devices: as asked for, or what suits where the ranks run.
    pub(super) fn fabric(&self) -> FabricKind {
        self.fabric.unwrap_or(match (self.is_group(), self.hosts) {
            (false, _) => FabricKind::Inproc,
            (true, Hosts::Local) => FabricKind::Shm,
            (true, Hosts::Netns) => FabricKind::Udp,
        })
    }

    /// Whether ranks are processes.
    fn is_group(&self) -> bool {
        self.procs || self.is_launched
    }

    /// Network namespaces for this many ranks.
    pub(super) fn num_hosts(&self, ranks: u32) -> u32 {
        self.num_hosts.unwrap_or(ranks)
    }

    /// The fault plan, read and checked.
    ///
    /// # Errors
    /// A file that cannot be read, or what is wrong with the plan.
    pub(super) fn faults(&self) -> Result<Option<FaultPlan>, CliError> {
        let Some(path) = &self.faults_plan else { return Ok(None) };
        let text =
            std::fs::read_to_string(path).map_err(|source| CliError::Input { path: path.clone(), source })?;
        FaultPlan::from_json(&text)
            .map(Some)
            .map_err(|source| CliError::Plan { path: path.clone(), source: Box::new(source) })
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

    /// Where ranks run, for reports.
    fn hosts_name(&self) -> &'static str {
        match self.hosts {
            Hosts::Local => "local",
            Hosts::Netns => "netns",
        }
    }

    /// The name of the fabric, for reports.
    pub(super) fn fabric_name(&self) -> &'static str {
        if self.is_mlx5() {
            return "the devices' own";
        }
        match self.fabric() {
            FabricKind::Inproc => "inproc",
            FabricKind::Shm => "shm",
            FabricKind::Udp => "udp",
            FabricKind::Sim => "sim",
        }
    }
}

/// What decides the memory of a run, and its limits.
#[derive(Args, Clone, Debug)]
pub(super) struct Shape {
    /// Members of the group [default: what the launcher says, else 8].
    #[arg(long, value_name = "N")]
    ranks: Option<u32>,
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
    /// How long a peer may show no sign of life.
    #[arg(long, default_value_t = 100, value_name = "MS")]
    pub(super) detect_ms: u32,
    /// How long a live peer may make no progress [default: 20 x --detect-ms].
    #[arg(long, value_name = "MS")]
    pub(super) stall_ms: Option<u32>,
    /// Steps in flight.
    #[arg(long, default_value_t = 2, value_name = "N")]
    pub(super) ring: u32,
    /// Blocks of one launch: streaming multiprocessors that a GPU gives to communication [default: 1; on a GPU the
    /// rank's equal share].
    #[arg(long, value_name = "N")]
    pub(super) sms: Option<u32>,
    /// Warps of one block [default: 8; on a GPU 32].
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
}

/// Warps of a block where ranks share a GPU: one block then has a multiprocessor for itself.
const WARPS_PER_SM: u32 = 32;

impl Shape {
    /// Members of the group.
    pub(super) fn ranks(&self) -> u32 {
        self.ranks.unwrap_or(8)
    }

    /// Lets each rank use its equal share of a GPU's multiprocessors, unless the flags say otherwise.
    pub(super) fn fill(&mut self, sms: u32) {
        self.sms.get_or_insert((sms / self.ranks()).max(1));
        self.warps.get_or_insert(WARPS_PER_SM);
    }

    /// The configuration that the flags spell, with the defaults of everything else.
    ///
    /// # Errors
    /// Flags that exclude each other; fields are not looked at yet.
    pub(super) fn config(&self) -> Result<Config, CliError> {
        if self.scales != ScaleKind::F32 && self.dtype == WireDtype::Bf16 {
            let because = "bf16 rows have no scales";
            return Err(CliError::Conflict { one: "--scales", other: "--dtype bf16", because });
        }
        Ok(Config {
            num_ranks: self.ranks(),
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
            detect_ms: self.detect_ms,
            stall_ms: self.stall_ms,
            ..Config::default()
        })
    }
}

/// Shape, device and protocol of a run.
#[derive(Args, Clone, Debug)]
pub(super) struct Shared {
    #[command(flatten)]
    pub(super) machine: Machine,
    #[command(flatten)]
    pub(super) shape: Shape,
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
    /// How signal words are written.
    #[arg(long, default_value = "write", value_parser = named::<SignalMode>(SignalMode::NAMES))]
    pub(super) signal: SignalMode,
    /// Which routes peers are reached by.
    #[arg(long, default_value = "auto", value_parser = named::<RoutePolicy>(RoutePolicy::NAMES))]
    pub(super) route: RoutePolicy,
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
    /// Members of the group.
    pub(super) fn ranks(&self) -> u32 {
        self.shape.ranks()
    }

    /// Makes this process the rank that a launcher says it is. A fabric of one process that was asked for by name
    /// stays: then the process is no rank of anything.
    ///
    /// # Errors
    /// `--ranks` of another number than the launcher's.
    pub(super) fn take_place(&mut self, place: Option<Place>) -> Result<Option<Place>, CliError> {
        let is_alone = matches!(self.machine.fabric, Some(FabricKind::Inproc | FabricKind::Sim));
        let Some(place) = place.filter(|_| self.machine.procs || !is_alone) else { return Ok(None) };
        if self.shape.ranks.is_some_and(|ranks| ranks != place.num_ranks) {
            let because = "the launcher started another number of ranks";
            return Err(CliError::Conflict { one: "--ranks", other: "WORLD_SIZE", because });
        }
        self.shape.ranks = Some(place.num_ranks);
        self.machine.is_launched = true;
        Ok(Some(place))
    }

    /// The configuration that the flags spell.
    ///
    /// # Errors
    /// A flag that this version does not have, a field outside its limit, a routing that does not fit.
    pub(super) fn config(&self) -> Result<ValidConfig, CliError> {
        self.machine.validate()?;
        let Self { signal, route, .. } = *self;
        let config = Config { signal, route, link: self.machine.link, ..self.shape.config()? };
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
    /// Whether every rank is a process.
    procs: bool,
    hosts: &'static str,
    /// Network namespaces, where there are any.
    num_hosts: Option<u32>,
    faults_plan: Option<FaultPlan>,
}

impl ConfigReport {
    /// Describes a run, through whose network `faults_plan` goes.
    pub(super) fn new(flags: &Shared, config: &ValidConfig, faults_plan: Option<FaultPlan>) -> Self {
        let Shared { machine, shape, .. } = flags;
        Self {
            ranks: shape.ranks(),
            tokens: shape.tokens,
            hidden: shape.hidden,
            experts: shape.experts,
            topk: shape.topk,
            dtype: shape.dtype.name(),
            scales: shape.scales.name(),
            combine: shape.combine.name(),
            routing: flags.routing.name(),
            iters: flags.iters,
            warmup: flags.warmup,
            link: machine.link.name(),
            signal: flags.signal.name(),
            route: flags.route.name(),
            ring: shape.ring,
            lanes: shape.lanes,
            channels: config.num_channels(),
            num_sms: config.num_sms,
            warps_per_block: config.warps_per_block,
            num_owner_warps: config.num_owner_warps(),
            graph: flags.graph,
            hooks: flags.hooks,
            check: flags.check,
            detect_ms: shape.detect_ms,
            stall_ms: config.stall_ms(),
            retry_total_ms: config.rc_timers().total_ns() / 1_000_000,
            procs: machine.is_group(),
            hosts: machine.hosts_name(),
            num_hosts: (machine.hosts == Hosts::Netns).then(|| machine.num_hosts(shape.ranks())),
            faults_plan,
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
        assert_eq!(*config, Config::default(), "flags and Config must not drift apart");
        // Word for word: both could drift together.
        let sizes = [config.num_ranks, config.max_tokens, config.hidden, config.num_experts, config.max_topk];
        assert_eq!(sizes, [8, 128, 7168, 256, 8]);
        assert_eq!([config.ring, config.lanes, config.num_channels()], [2, 1, 4]);
        assert_eq!([config.detect_ms, config.stall_ms()], [100, 2_000]);
        let report = ConfigReport::new(&shared, &config, None);
        let names = [report.dtype, report.combine, report.routing, report.signal, report.route, report.link];
        assert_eq!(names, ["fp8", "exact", "uniform", "write", "auto", "roce"]);
        let machine = &shared.machine;
        let names = [machine.provider_name(), machine.gpu_name(), machine.fabric_name(), report.hosts];
        assert_eq!(names, ["emulated", "host", "inproc", "local"]);
        assert_eq!((shared.iters, shared.warmup, shared.seed), (20, 3, 1));
        assert_eq!([report.graph, report.hooks, report.check, report.procs], [false; 4]);
    }

    #[test]
    fn what_is_not_built_is_refused_by_name() {
        for args in [&["--provider", "mlx5", "--procs"][..], &["--store", "tcp://127.0.0.1:1"]] {
            let error = flags(args).config().unwrap_err();
            assert!(matches!(error, CliError::NotBuilt { flag, .. } if flag == args[0]), "{error}");
            assert_eq!(error.exit_code(), 2);
        }
    }

    #[test]
    fn fabrics_and_processes_must_fit() {
        for (args, message) in [
            (&["--fabric", "shm"][..], "--fabric shm cannot be combined with one process"),
            (&["--fabric", "udp"], "say --procs"),
            (&["--procs", "--fabric", "inproc"], "--fabric inproc cannot be combined with several processes"),
            (&["--procs", "--fabric", "sim"], "--fabric sim"),
            (&["--procs", "--fabric", "udp", "--link", "ib"], "Ethernet"),
            (&["--procs", "--fabric", "shm", "--hosts", "netns"], "hosts share no memory"),
            (&["--hosts", "netns"], "say --procs"),
            (&["--procs", "--num-hosts", "2"], "--num-hosts"),
            (&["--procs", "--advertise", "::1"], "--advertise"),
            (&["--faults-plan", "f"], "--faults-plan"),
            (&["--provider", "mlx5", "--fabric", "inproc"], "a fabric of their own"),
            (&["--gpu", "cuda", "--fabric", "sim"], "a simulation runs kernels itself"),
            (&["--gpu-uuid", "GPU-00000000-0000-0000-0000-000000000000"], "--gpu host"),
            (&["--nics", "mlx5_0"], "--nics cannot be combined with --provider emulated"),
            (&["--traffic-class", "104"], "--traffic-class"),
            (&["--assist-doorbells"], "--assist-doorbells cannot be combined with --provider emulated"),
        ] {
            let error = flags(args).config().unwrap_err();
            assert!(error.to_string().contains(message), "{args:?}: {error}");
            assert_eq!(error.exit_code(), 2);
        }
        let fabric = |args| flags(args).machine.fabric();
        assert_eq!(fabric(&[]), FabricKind::Inproc);
        assert_eq!(fabric(&["--procs"]), FabricKind::Shm);
        assert_eq!(fabric(&["--procs", "--hosts", "netns"]), FabricKind::Udp);
    }

    #[test]
    fn a_launchers_word_counts_unless_one_process_was_asked_for() {
        let place = |num_ranks: u32| {
            let vars = [("RANK", "1".to_string()), ("WORLD_SIZE", num_ranks.to_string())];
            let lookup = |name: &str| match name {
                "MASTER_ADDR" => Some("127.0.0.1".into()),
                name => Some(vars.iter().find(|(known, _)| *known == name)?.1.clone()),
            };
            Place::from_vars(lookup).unwrap()
        };
        let mut shared = flags(&[]);
        assert!(shared.take_place(place(3)).unwrap().is_some());
        assert_eq!((shared.ranks(), shared.machine.fabric()), (3, FabricKind::Shm));
        assert!(flags(&["--fabric", "inproc"]).take_place(place(3)).unwrap().is_none());
        assert!(flags(&["--ranks", "4"]).take_place(place(3)).is_err());
        assert!(flags(&["--ranks", "4"]).take_place(None).unwrap().is_none());
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
        assert_eq!((shared.shape.tokens, shared.config().unwrap().max_tokens), (0, 1));
    }
}
