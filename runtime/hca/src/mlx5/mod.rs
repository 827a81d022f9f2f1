//! Real mlx5 devices, through the distribution's libibverbs and libmlx5, which are loaded at run time.
//!
//! [`Mlx5Hca`] is a device behind [`Hca`](crate::Hca); [`devices`] looks at what is there. Nothing here is needed to
//! build or to run without a device: where libraries or devices are missing, the answer is a typed error.
//!
//! *Who owns what.* Everything that the C libraries give is owned by a guard or by the `table` of this module, and
//! released in the order that they demand: queues, keys and umems, pages, domains, events, the device, the library. A
//! guard keeps the loaded library, so no function outlives its code. Callers own all memory that is registered.
//!
//! ```text
//!  exec(mailbox) --> table: does the object exist, who uses it --> DevX create/modify/query/destroy, general commands
//!  register      --> ibv_reg_mr_iova2, ibv_reg_dmabuf_mr          (never with relaxed ordering)
//!  create_umem   --> mlx5dv_devx_umem_reg, .._reg_ex for dma-bufs
//!  doorbells     --> mlx5dv_devx_alloc_uar, not cached by the processor
//!  resolve       --> an address handle: the kernel asks the neighbour
//!  events        --> DevX events of queues, verbs events of device and port
//! ```
#![expect(unsafe_code, reason = "calls into C libraries that are loaded at run time")]

mod devices;
mod error;
mod events;
mod exec;
mod hca_impl;
mod port;
mod table;

use std::sync::Arc;

use parking_lot::Mutex;

pub use devices::{DeviceInfo, PortReport, PortState, devices};
pub use error::OpenError;
use ibex_mlx5dv_sys::Library;
pub use ibex_mlx5dv_sys::LoadError;
pub use table::LiveObjects;

use crate::{HcaCaps, HcaError, LinkLayer, PortInfo};
use devices::{DeviceList, Opened, by_number, errno, name_of};
use events::Events;
use table::Table;

/// Which device, and how its connections travel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mlx5Config {
    /// Name of the device, "mlx5_0"; by default the nearest one to `near` with an active port.
    pub device: Option<String>,
    /// PCI address of the GPU whose memory it serves.
    pub near: Option<String>,
    /// Port, from 1; by default the first active one.
    pub port: Option<u8>,
    /// Index into the port's GID table; by default the first RoCE v2 entry, IPv4 before IPv6 before link-local.
    pub gid_index: Option<u8>,
    /// Index into the port's table of partition keys.
    pub pkey_index: u16,
    /// Service level, or Ethernet priority.
    pub sl: u8,
    /// Traffic class, whose upper six bits are the DSCP.
    pub traffic_class: u8,
    /// Only ports of this link layer, where the caller needs one.
    pub link: Option<LinkLayer>,
}

/// An mlx5 device that is open for commands and doorbells of this process.
#[derive(Debug)]
pub struct Mlx5Hca {
    // Fields drop in this order, after `drop` has released what is in the table.
    table: Mutex<Table>,
    events: Events,
    opened: Arc<Opened>,
    config: Mlx5Config,
    name: String,
    caps: HcaCaps,
    port: PortInfo,
}

impl Mlx5Hca {
    /// Opens a device.
    ///
    /// # Errors
    /// [`OpenError`]; nothing stays open.
    pub fn open(config: &Mlx5Config) -> Result<Arc<Self>, OpenError> {
        Self::open_with(&Arc::new(Library::load()?), config)
    }

    fn open_with(library: &Arc<Library>, config: &Mlx5Config) -> Result<Arc<Self>, OpenError> {
        let list = DeviceList::read(library);
        let mut named: Vec<_> = list.mlx5().map(|device| (name_of(library, device), device)).collect();
        named.sort_by(|(one, _), (other, _)| by_number(one).cmp(&by_number(other)));
        if let Some(near) = &config.near {
            named.sort_by_key(|(name, _)| port::distance(name, near));
        }
        let found: Vec<String> = named.iter().map(|(name, _)| name.clone()).collect();
        named.retain(|(name, _)| config.device.as_ref().is_none_or(|wanted| wanted == name));
        // The reason of the first candidate is the one that is told: it was the nearest.
        let mut first_refusal = None;
        for (name, device) in named {
            let opened = match Opened::open(library, device) {
                Ok(opened) => Arc::new(opened),
                Err(error) => {
                    let refusal = OpenError::NotOpened { device: name, errno: errno(&error) };
                    first_refusal.get_or_insert(refusal);
                    continue;
                }
            };
            match Self::with(opened, name, config) {
                Ok(hca) => return Ok(Arc::new(hca)),
                Err(refusal) => {
                    first_refusal.get_or_insert(refusal);
                }
            }
        }
        Err(first_refusal.unwrap_or(OpenError::NoDevice { wanted: config.device.clone(), found }))
    }

    /// The device in an open context, if one of its ports can be used.
    fn with(opened: Arc<Opened>, name: String, config: &Mlx5Config) -> Result<Self, OpenError> {
        let port = port::choose(&opened, &name, config)?;
        let failed = |source: HcaError| OpenError::Device { device: name.clone(), source };
        let caps = port::caps(&opened, port.link).map_err(failed)?;
        let events = Events::open(&opened);
        Ok(Self { table: Mutex::default(), events, opened, config: config.clone(), name, caps, port })
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether failures of queues arrive as events; otherwise only completions tell of them.
    #[must_use]
    pub const fn has_queue_events(&self) -> bool {
        self.events.has_queues()
    }

    /// How many objects of this process exist on it.
    #[must_use]
    pub fn live(&self) -> LiveObjects {
        self.table.lock().live()
    }
}

impl Drop for Mlx5Hca {
    fn drop(&mut self) {
        self.table.get_mut().release_all(self.opened.library());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_that_is_not_there_is_a_typed_error() {
        let config = Mlx5Config { device: Some("mlx5_ibex_none".into()), ..Mlx5Config::default() };
        let error = Mlx5Hca::open(&config).unwrap_err();
        match &error {
            OpenError::Load(_) => assert!(error.to_string().contains("ibverbs-providers"), "{error}"),
            OpenError::NoDevice { .. } => assert!(error.to_string().contains("mlx5_ibex_none"), "{error}"),
            other => panic!("{other}"),
        }
    }
}
