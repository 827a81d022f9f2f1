//! The devices of a run: emulated, or real ones that ranks share in turn.
//!
//! Owns the devices that it opened until the run is over. Which rank got which device, port and GID is printed.

use std::sync::Arc;

use ibex::session::DeviceWrapper;
use ibex_hca::mlx5::{self, Mlx5Config, Mlx5Hca, PortState};
use ibex_hca::{Hca, LinkLayer};

use super::CliError;
use super::flags::{Machine, Nics};

/// What ranks are given.
pub(super) enum Devices {
    /// Emulated devices, made by the world.
    Emulated,
    /// Open devices, one per rank; ranks may share one.
    Real(Vec<Arc<Mlx5Hca>>),
}

impl Devices {
    pub(super) const fn is_given(&self) -> bool {
        matches!(self, Self::Real(_))
    }

    /// What a world is made with.
    pub(super) fn wrapper(&self) -> DeviceWrapper {
        match self {
            Self::Emulated => DeviceWrapper::default(),
            Self::Real(devices) => DeviceWrapper::given(
                devices.iter().map(|device| Arc::clone(device) as Arc<dyn Hca>).collect(),
            ),
        }
    }
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
    let names = names(&machine.nics, link)?;
    let mut opened: Vec<Arc<Mlx5Hca>> = Vec::new();
    for rank in 0..ranks as usize {
        // Several ranks of one device share its context: keys and queues are told apart by their domains.
        if rank < names.len().max(1) {
            opened.push(Mlx5Hca::open(&config(&machine.nics, names.get(rank), link))?);
        } else {
            opened.push(Arc::clone(&opened[rank % names.len().max(1)]));
        }
        let (device, port) = (&opened[rank], opened[rank].port());
        println!(
            "rank {rank:<4} {} port {}, GID {} {}, MTU {}",
            device.name(),
            port.port_num,
            port.gid_index,
            port.gid,
            port.mtu.bytes()
        );
    }
    Ok(Devices::Real(opened))
}

/// The devices asked for, else every one with an active port of this link layer. None at all leaves it to opening to
/// say why.
fn names(nics: &Nics, link: LinkLayer) -> Result<Vec<String>, CliError> {
    if !nics.nics.is_empty() {
        return Ok(nics.nics.clone());
    }
    let devices = mlx5::devices().map_err(mlx5::OpenError::from)?;
    let is_active = |device: &mlx5::DeviceInfo| {
        device.ports.iter().any(|port| port.state == PortState::Active && port.link == link)
    };
    Ok(devices.into_iter().filter(is_active).map(|device| device.name).collect())
}

fn config(nics: &Nics, name: Option<&String>, link: LinkLayer) -> Mlx5Config {
    Mlx5Config {
        device: name.cloned(),
        near: None,
        port: nics.nic_port,
        gid_index: nics.gid_index,
        pkey_index: nics.pkey_index.unwrap_or(0),
        sl: nics.service_level.unwrap_or(0),
        traffic_class: nics.traffic_class.unwrap_or(0),
        link: Some(link),
    }
}
