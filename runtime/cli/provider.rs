//! The devices and GPUs of a run: emulated, or real ones. Ranks share the nearest NICs, and one GPU.
//!
//! Owns what it opened until the run is over. Which rank got which device, port and GID, and why that device, is
//! printed, and so is the GPU.

use core::num::NonZeroU32;
use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::Arc;

use ibex::bootstrap::{Place, cuda_connections};
use ibex::config::RoutePolicy;
use ibex::error::OsError;
use ibex::gpu::cuda::{CudaError, Driver};
use ibex::gpu::{CudaGpu, CudaMemory, CudaOptions, Gpu};
use ibex::session::{DeviceWrapper, Gpus, reaches_doorbells};
use ibex_hca::assisted::{AssistedHca, Forwarder, PAGES_MAX};
use ibex_hca::mlx5::{self, Mlx5Config, Mlx5Hca, PortState};
use ibex_hca::shared::SharedHca;
use ibex_hca::{Hca, LinkLayer};

use super::CliError;
use super::doctor::Places;
use super::flags::{Machine, Nics};
use super::nearest::{self, Anchor, Choice};

/// By which the driver is told how many streams make progress beside each other; how many do if it is not told, and the
/// most that it takes.
///
/// SPEC: CUDA C++ programming guide, environment variables.
const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
const CONNECTIONS_DEFAULT: u32 = 8;
const CONNECTIONS_MAX: u32 = 32;

/// What ranks are given.
pub(super) enum Devices {
    /// Emulated devices, made by the world.
    Emulated,
    /// What each rank has of an open device; of one that ranks share, each has a view. The threads that carry
    /// doorbells, if the host does.
    Real(Vec<Arc<dyn Hca>>, #[expect(dead_code, reason = "owned until the run is over")] Vec<Forwarder>),
}

/// Most doorbell pages of one device that the host carries for: one per queue pair of every rank on it.
const ASSISTED_PAGES: u32 = PAGES_MAX;

impl Devices {
    pub(super) const fn is_given(&self) -> bool {
        matches!(self, Self::Real(..))
    }

    /// What a world is made with.
    pub(super) fn wrapper(&self) -> DeviceWrapper {
        match self {
            Self::Emulated => DeviceWrapper::default(),
            Self::Real(devices, _) => DeviceWrapper::given(devices.clone()),
        }
    }
}

/// The GPUs of a run.
#[derive(Default)]
pub(super) struct OpenGpus {
    /// What a world is made with.
    pub(super) gpus: Gpus,
    /// The one that all ranks share; none where kernels run on the host.
    pub(super) shared: Option<Arc<CudaGpu>>,
    /// As each rank of this process has it.
    pub(super) each: Vec<Arc<CudaGpu>>,
}

/// Where a run keeps payload: on the GPU, unless emulated devices move it, which only copy it there and back.
pub(super) fn payload(machine: &Machine, route: RoutePolicy) -> CudaMemory {
    match (machine.is_mlx5(), route) {
        (true, _) | (false, RoutePolicy::Auto) => CudaMemory::Device,
        (false, RoutePolicy::Ibgda) => CudaMemory::HostMapped,
    }
}

/// How many connections the driver must be told to give the streams of these ranks; `None` if there are enough.
///
/// A rank has a stream for kernels and one for copies. Streams that share a connection wait for each other, and a
/// kernel may wait for the very one that is behind it.
fn missing_connections(ranks: u32, told: Option<u32>) -> Option<u32> {
    // One more to measure on.
    let wanted = ranks.saturating_mul(2).saturating_add(1).min(CONNECTIONS_MAX);
    (told.unwrap_or(CONNECTIONS_DEFAULT) < wanted).then_some(wanted)
}

/// Refuses to start ranks that could not open a GPU.
///
/// # Errors
/// No driver, or one without this GPU.
pub(super) fn check_driver(machine: &Machine) -> Result<(), CliError> {
    if machine.is_cuda() {
        chosen(machine, 0)?;
    }
    Ok(())
}

/// The GPU that a rank of this host takes, and how many there are.
fn chosen(machine: &Machine, local_rank: u32) -> Result<([u8; 16], usize), CudaError> {
    let devices = Driver::load()?.devices()?;
    if let Some(wanted) = machine.gpu_uuid {
        let found = devices.len();
        let is_there = devices.iter().any(|device| device.uuid == wanted.0);
        let missing = CudaError::NoDevice { wanted: Some(wanted.0), found };
        return if is_there { Ok((wanted.0, 1)) } else { Err(missing) };
    }
    let turn = local_rank as usize % devices.len().max(1);
    let device = devices.get(turn).ok_or(CudaError::NoDevice { wanted: None, found: 0 })?;
    Ok((device.uuid, devices.len()))
}

/// Opens the GPU of a rank in a process of its own: ranks of a host take its GPUs in turn.
///
/// # Errors
/// As [`open_gpus`].
pub(super) fn open_gpu_of(
    machine: &Machine,
    place: &Place,
    memory: CudaMemory,
) -> Result<OpenGpus, CliError> {
    if !machine.is_cuda() {
        return Ok(OpenGpus::default());
    }
    ensure_connections(1)?;
    let (uuid, count) = chosen(machine, place.local_rank)?;
    // As if all ranks were on this host: no fewer share a GPU then.
    // CAST: GPUs of one host.
    let sharers = place.num_ranks.div_ceil(count.max(1) as u32);
    let ranks_per_device = NonZeroU32::new(sharers).unwrap_or(NonZeroU32::MIN);
    let uuid = Some(uuid);
    let options = CudaOptions { uuid, ranks_per_device, memory, ..CudaOptions::default() };
    let gpu = Arc::new(CudaGpu::open(&options)?);
    let gpus = Gpus::Given(vec![Arc::clone(&gpu) as Arc<dyn Gpu>]);
    Ok(OpenGpus { gpus, each: vec![Arc::clone(&gpu)], shared: Some(gpu) })
}

/// Sees to it that no stream of this process waits for another's connection, as far as the driver lets it.
fn ensure_connections(ranks: u32) -> Result<(), CliError> {
    let told = cuda_connections();
    match missing_connections(ranks, told) {
        Some(wanted) if told.is_none() => Err(start_again(wanted)),
        Some(wanted) => {
            println!("gpu       {CONNECTIONS} is less than {wanted}: kernels of some ranks may wait");
            Ok(())
        }
        None => Ok(()),
    }
}

/// Runs this program in this process from the start, with a driver that will be told; returns only if that fails.
fn start_again(connections: u32) -> CliError {
    let started = std::env::current_exe().map(|program| {
        let mut command = Command::new(program);
        command.args(std::env::args_os().skip(1)).env(CONNECTIONS, connections.to_string()).exec()
    });
    let (Ok(error) | Err(error)) = started;
    CliError::Runtime(OsError::from_io("execve", &error).into())
}

/// Opens the GPU that the flags ask for, once for each rank: all of them share it.
///
/// # Errors
/// No driver, no such GPU, or one that cannot run the kernels: refused before anything runs.
pub(super) fn open_gpus(machine: &Machine, ranks: u32, memory: CudaMemory) -> Result<OpenGpus, CliError> {
    if !machine.is_cuda() {
        return Ok(OpenGpus::default());
    }
    ensure_connections(ranks)?;
    let options = CudaOptions {
        uuid: machine.gpu_uuid.map(|uuid| uuid.0),
        ranks_per_device: NonZeroU32::new(ranks).unwrap_or(NonZeroU32::MIN),
        memory,
        ..CudaOptions::default()
    };
    let opened = (0..ranks).map(|_| CudaGpu::open(&options).map(Arc::new)).collect::<Result<Vec<_>, _>>()?;
    if let Some(gpu) = opened.first() {
        let info = gpu.info();
        println!("gpu       {} at {}, {} SMs for {ranks} ranks", info.name, info.pci, info.sms);
    }
    let shared = opened.first().cloned();
    let gpus = opened.iter().map(|gpu| Arc::clone(gpu) as Arc<dyn Gpu>).collect();
    Ok(OpenGpus { gpus: Gpus::Given(gpus), shared, each: opened })
}

/// Opens what the flags ask for.
///
/// # Errors
/// No library, no device, no usable port: refused before anything runs.
pub(super) fn devices(machine: &Machine, ranks: u32, gpus: &OpenGpus) -> Result<Devices, CliError> {
    if !machine.is_mlx5() {
        return Ok(Devices::Emulated);
    }
    let link = match machine.link {
        ibex::config::Link::Ib => LinkLayer::Ib,
        ibex::config::Link::Roce => LinkLayer::Roce,
    };
    let gpu = gpus.shared.as_deref();
    let choices = choices(machine, link, ranks, gpu)?;
    if choices.is_empty() {
        // Opening says why there is none.
        Mlx5Hca::open(&config(&machine.nics, None, link))?;
    }
    let mut users: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
    for (rank, choice) in choices.iter().enumerate() {
        users.entry(&choice.name).or_default().push(rank);
    }
    let mut given: Vec<Option<Arc<dyn Hca>>> = vec![None; choices.len()];
    let mut forwarders = Vec::new();
    for (name, ranks) in users {
        let mut device: Arc<dyn Hca> = Mlx5Hca::open(&config(&machine.nics, Some(name), link))?;
        if machine.nics.assist_doorbells || !rings(gpu, &*device, name) {
            let (assisted, forwarder) = assist(device)?;
            forwarders.push(forwarder);
            device = assisted;
        }
        // Keys and queues are told apart by their domains; events by whose queue they are about.
        for (view, rank) in SharedHca::split(&device, ranks.len()).into_iter().zip(ranks) {
            given[rank] = Some(view as Arc<dyn Hca>);
        }
    }
    let given: Vec<_> = given.into_iter().flatten().collect();
    for ((rank, choice), device) in choices.iter().enumerate().zip(&given) {
        let port = device.port();
        println!(
            "rank {rank:<4} {} port {}, GID {} {}, MTU {} ({choice})",
            choice.name,
            port.port_num,
            port.gid_index,
            port.gid,
            port.mtu.bytes()
        );
    }
    Ok(Devices::Real(given, forwarders))
}

/// Whether the GPU reaches a device's doorbells; if not, the reason is printed.
fn rings(gpu: Option<&CudaGpu>, device: &dyn Hca, name: &str) -> bool {
    let Some(gpu) = gpu else { return true };
    match reaches_doorbells(gpu, device) {
        Ok(()) => true,
        Err(refused) => {
            println!("doorbells of {name} are carried by the host: {refused}");
            false
        }
    }
}

/// A device for which the host carries doorbells, and the thread that does.
fn assist(device: Arc<dyn Hca>) -> Result<(Arc<dyn Hca>, Forwarder), ibex::Error> {
    let assisted = AssistedHca::new(device, ASSISTED_PAGES)?;
    let forwarder = assisted.spawn().map_err(|error| OsError::from_io("pthread_create", &error))?;
    Ok((assisted, forwarder))
}

/// The device of each rank.
fn choices(
    machine: &Machine,
    link: LinkLayer,
    ranks: u32,
    gpu: Option<&CudaGpu>,
) -> Result<Vec<Choice>, CliError> {
    let places = Places::of_this_machine();
    let found = if machine.nics.nics.is_empty() { active(link)? } else { Vec::new() };
    // All ranks share one GPU, if they have any.
    let anchor = gpu.map_or_else(|| Anchor::of_process(&places), |gpu| Anchor::Gpu(gpu.info().pci.clone()));
    let anchors = vec![anchor; ranks as usize];
    let measure = |anchor: &Anchor, name: &str| nearest::measure(&places, anchor, name);
    Ok(nearest::choose(&machine.nics.nics, &found, &anchors, measure))
}

/// Every device with an active port of this link layer.
fn active(link: LinkLayer) -> Result<Vec<String>, CliError> {
    let devices = mlx5::devices().map_err(mlx5::OpenError::from)?;
    let is_active = |device: &mlx5::DeviceInfo| {
        device.ports.iter().any(|port| port.state == PortState::Active && port.link == link)
    };
    Ok(devices.into_iter().filter(is_active).map(|device| device.name).collect())
}

fn config(nics: &Nics, name: Option<&str>, link: LinkLayer) -> Mlx5Config {
    Mlx5Config {
        device: name.map(str::to_owned),
        near: None,
        port: nics.nic_port,
        gid_index: nics.gid_index,
        pkey_index: nics.pkey_index.unwrap_or(0),
        sl: nics.service_level.unwrap_or(0),
        traffic_class: nics.traffic_class.unwrap_or(0),
        link: Some(link),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_stream_of_every_rank_has_a_connection_as_far_as_the_driver_gives_them() {
        assert_eq!(missing_connections(3, None), None);
        assert_eq!(missing_connections(4, None), Some(9));
        assert_eq!((missing_connections(8, Some(16)), missing_connections(8, Some(17))), (Some(17), None));
        assert_eq!(missing_connections(64, None), Some(CONNECTIONS_MAX));
        assert_eq!(missing_connections(64, Some(CONNECTIONS_MAX)), None);
    }
}
