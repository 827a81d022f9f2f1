//! The devices and GPUs of a run: emulated, or real ones. Ranks share the nearest NICs, and one GPU.
//!
//! Owns what it opened until the run is over. Which rank got which device, port and GID, and why that device, is
//! printed, and so is the GPU.

use core::num::NonZeroU32;
use std::collections::BTreeMap;
use std::sync::Arc;

use ibex::error::OsError;
use ibex::gpu::cuda::{self, CudaError};
use ibex::gpu::{CudaGpu, CudaMemory, CudaOptions, Gpu};
use ibex::session::{DeviceWrapper, Gpus};
use ibex_hca::assisted::{AssistedHca, Forwarder, PAGES_MAX};
use ibex_hca::mlx5::{self, Mlx5Config, Mlx5Hca, PortState};
use ibex_hca::shared::SharedHca;
use ibex_hca::{Hca, LinkLayer};

use super::CliError;
use super::doctor::Places;
use super::flags::{Machine, Nics};
use super::nearest::{self, Anchor, Choice};

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

/// Opens the GPU that the flags ask for, once for each rank: all of them share it.
///
/// # Errors
/// No driver, no such GPU, or one that cannot run the kernels: refused before anything runs.
pub(super) fn open_gpus(machine: &Machine, ranks: u32) -> Result<Gpus, CudaError> {
    if !machine.is_cuda() {
        return Ok(Gpus::Host);
    }
    let options = CudaOptions {
        uuid: machine.gpu_uuid.map(|uuid| uuid.0),
        ranks_per_device: NonZeroU32::new(ranks).unwrap_or(NonZeroU32::MIN),
        // The emulated devices are the processor's work.
        memory: CudaMemory::HostMapped,
        ..CudaOptions::default()
    };
    let mut opened: Vec<Arc<dyn Gpu>> = Vec::new();
    for rank in 0..ranks {
        let gpu = CudaGpu::open(&options)?;
        if rank == 0 {
            let info = gpu.info();
            println!("gpu       {} at {}, {} SMs for {ranks} ranks", info.name, info.pci, info.sms);
        }
        opened.push(Arc::new(gpu));
    }
    Ok(Gpus::Given(opened))
}

/// Opens what the flags ask for.
///
/// # Errors
/// No library, no device, no usable port: refused before anything runs.
pub(super) fn devices(machine: &Machine, ranks: u32) -> Result<Devices, CliError> {
    if !machine.is_mlx5() {
        return Ok(Devices::Emulated);
    }
    let link = match machine.link {
        ibex::config::Link::Ib => LinkLayer::Ib,
        ibex::config::Link::Roce => LinkLayer::Roce,
    };
    let choices = choices(machine, link, ranks)?;
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
        if machine.nics.assist_doorbells {
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

/// A device for which the host carries doorbells, and the thread that does.
fn assist(device: Arc<dyn Hca>) -> Result<(Arc<dyn Hca>, Forwarder), ibex::Error> {
    let assisted = AssistedHca::new(device, ASSISTED_PAGES)?;
    let forwarder = assisted.spawn().map_err(|error| OsError::from_io("pthread_create", &error))?;
    Ok((assisted, forwarder))
}

/// The device of each rank.
fn choices(machine: &Machine, link: LinkLayer, ranks: u32) -> Result<Vec<Choice>, CliError> {
    let places = Places::of_this_machine();
    let found = if machine.nics.nics.is_empty() { active(link)? } else { Vec::new() };
    let gpus = if machine.is_cuda() { gpus() } else { Vec::new() };
    let of_process = Anchor::of_process(&places);
    let anchor = |rank: usize| match gpus.len() {
        0 => of_process.clone(),
        count => Anchor::Gpu(gpus[rank % count].clone()),
    };
    let anchors: Vec<_> = (0..ranks as usize).map(anchor).collect();
    let measure = |anchor: &Anchor, name: &str| nearest::measure(&places, anchor, name);
    Ok(nearest::choose(&machine.nics.nics, &found, &anchors, measure))
}

/// PCI addresses of the GPUs, in the order in which ranks are given them. A driver that does not answer is told of
/// where a GPU is opened.
fn gpus() -> Vec<String> {
    let devices = cuda::Driver::load().and_then(|driver| driver.devices()).unwrap_or_default();
    devices.into_iter().map(|device| device.pci).collect()
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
