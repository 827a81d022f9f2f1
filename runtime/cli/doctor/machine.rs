//! What a machine has, as plain values: recorded by `probe`, judged by `judge`, kept as JSON.
//!
//! Owns strings. A description that one machine recorded can be judged on another: nothing here looks anything up.
//! What could not be found out is `None` (`null` in a file); what is known to be absent is `false`, 0 or empty.
//!
//! INVARIANT: unknown fields are refused, so that a description of another version is not half understood.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Everything that `ibex doctor` looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Machine {
    pub(super) host: Host,
    pub(super) nvidia: Nvidia,
    pub(super) gpus: Vec<Gpu>,
    pub(super) rdma: Rdma,
    pub(super) nics: Vec<Nic>,
    /// How far every GPU is from every NIC.
    pub(super) distances: Vec<Distance>,
}

/// Processor, kernel and limits.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Host {
    pub(super) kernel: String,
    pub(super) cores: usize,
    pub(super) has_avx2: bool,
    /// Bytes that this process may lock; `None` is no limit.
    pub(super) memlock: Option<u64>,
    pub(super) iommu: Option<Iommu>,
}

/// What stands between devices and memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Iommu {
    Off,
    PassThrough,
    Translating,
}

/// NVIDIA's driver and the libraries above it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Nvidia {
    /// GPUs on the PCI bus, with a driver or without.
    pub(super) pci_functions: usize,
    /// Version of the kernel driver, if it is loaded.
    pub(super) driver: Option<String>,
    /// Whether that is the open flavour of the kernel modules.
    pub(super) is_open: Option<bool>,
    /// The driver's registry, as `/proc/driver/nvidia/params` has it.
    pub(super) registry: Option<String>,
    /// `nvidia_peermem` is loaded.
    pub(super) has_peermem: bool,
    /// CUDA version that `libcuda.so.1` supports, or why it cannot be used.
    pub(super) cuda: Library,
    /// Version of `libnccl.so.2`.
    pub(super) nccl: Library,
}

/// A shared object that is loaded at run time.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Library {
    /// It is there, in this version.
    Loaded(String),
    /// It cannot be used, and the reason.
    Missing(String),
}

impl Default for Library {
    fn default() -> Self {
        Self::Missing("not looked for".into())
    }
}

/// A GPU, as its driver describes it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Gpu {
    pub(super) name: String,
    pub(super) uuid: String,
    /// Address on the PCI bus.
    pub(super) pci: String,
    /// Major and minor compute capability.
    pub(super) capability: (u32, u32),
    pub(super) sms: u32,
    pub(super) memory: u64,
    /// Its memory can be exported as a dma-buf.
    pub(super) has_dma_buf: Option<bool>,
    /// It lets other devices reach its memory at all.
    pub(super) has_gpudirect: Option<bool>,
    /// Up to whom a remote write is visible in order.
    pub(super) write_ordering: Option<WriteOrdering>,
}

/// To whom writes of other devices become visible in order, without a flush.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum WriteOrdering {
    Nobody,
    Owner,
    AllDevices,
}

/// The kernel's side of RDMA and the libraries above it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Rdma {
    /// mlx5 functions on the PCI bus, with a driver or without.
    pub(super) pci_functions: usize,
    /// `ib_uverbs` is loaded or built in.
    pub(super) has_uverbs: bool,
    /// libmlx5 with libibverbs.
    pub(super) libmlx5: Library,
}

/// An mlx5 device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Nic {
    pub(super) name: String,
    pub(super) pci: String,
    pub(super) firmware: String,
    /// The node by which processes reach it.
    pub(super) node: Option<String>,
    /// This process may open the node.
    pub(super) may_open: bool,
    /// It opened with DevX: commands and doorbell pages of this process's own.
    pub(super) has_devx: Option<bool>,
    /// Exponent of the device's own part of an acknowledgement's delay: 4.096 us x 2^t.
    pub(super) ack_delay: Option<u8>,
    /// Width and speed of its PCI link, as they are and as they could be.
    pub(super) pci_link: Option<PciLink>,
    /// Its setting of PCI_WR_ORDERING.
    pub(super) pci_write_ordering: Option<PciWriteOrdering>,
    pub(super) ports: Vec<Port>,
}

/// A PCI Express link.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct PciLink {
    pub(super) width: u32,
    pub(super) width_max: u32,
    pub(super) speed: String,
    pub(super) speed_max: String,
}

/// Who decides whether a NIC's writes may pass each other on PCI Express.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum PciWriteOrdering {
    /// The key that a write goes through.
    PerMkey,
    /// Always relaxed, whatever the key says.
    ForceRelax,
}

/// A port of a NIC.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Port {
    pub(super) number: u8,
    pub(super) link: Link,
    /// The port's state in capital letters, "ACTIVE".
    pub(super) state: String,
    /// "400 Gb/sec (4X NDR)".
    pub(super) rate: String,
    /// MTU in force, in bytes.
    pub(super) active_mtu: Option<u32>,
    /// The network interface of an Ethernet port.
    pub(super) netdev: Option<Netdev>,
    /// Entries of the GID table that are not zero.
    pub(super) gids: Vec<GidEntry>,
}

/// Link layer of a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Link {
    Ib,
    #[default]
    Roce,
}

/// A network interface.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Netdev {
    pub(super) name: String,
    pub(super) mtu: u32,
}

/// An entry of a GID table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct GidEntry {
    pub(super) index: u32,
    pub(super) gid: String,
    /// "RoCE v2", "IB/RoCE v1".
    pub(super) kind: String,
}

/// How far a GPU is from a NIC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Distance {
    pub(super) gpu: String,
    pub(super) nic: String,
    pub(super) path: PciPath,
}

/// What a transfer between two PCI functions passes, nearest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(in crate::cli) enum PciPath {
    /// PCI switches only.
    Switch,
    /// One host bridge.
    HostBridge,
    /// Two host bridges of one NUMA node.
    Node,
    /// The link between sockets.
    Sockets,
}

impl fmt::Display for PciPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Switch => "PCI switches away",
            Self::HostBridge => "one host bridge away",
            Self::Node => "two host bridges of one NUMA node away",
            Self::Sockets => "the link between sockets away",
        })
    }
}

impl PciPath {
    /// The way between two functions, from their places in the tree of devices and their NUMA nodes.
    ///
    /// A place is the list of bridges from the root to the function, as the links below `/sys/bus/pci` spell it.
    pub(super) fn between(one: &[String], other: &[String], nodes: (Option<i32>, Option<i32>)) -> Self {
        let common = one.iter().zip(other).take_while(|(a, b)| a == b).count();
        match common {
            0 if nodes.0.is_some() && nodes.0 == nodes.1 => Self::Node,
            0 => Self::Sockets,
            1 => Self::HostBridge,
            _ => Self::Switch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distance_follows_from_the_bridges_that_both_share() {
        let place = |text: &str| -> Vec<String> { text.split('/').map(str::to_owned).collect() };
        let gpu = place("pci0000:40/0000:40:01.1/0000:41:00.0/0000:42:00.0");
        let near = place("pci0000:40/0000:40:01.1/0000:41:00.1/0000:43:00.0");
        let bridge = place("pci0000:40/0000:40:03.1/0000:48:00.0");
        let far = place("pci0000:c0/0000:c0:01.1/0000:c1:00.0");
        let path = |other: &[String], nodes| PciPath::between(&gpu, other, nodes);
        assert_eq!(path(&near, (Some(0), Some(0))), PciPath::Switch);
        assert_eq!(path(&bridge, (Some(0), Some(0))), PciPath::HostBridge);
        assert_eq!(path(&far, (Some(0), Some(0))), PciPath::Node);
        assert_eq!(path(&far, (Some(0), Some(1))), PciPath::Sockets);
        assert_eq!(path(&far, (None, None)), PciPath::Sockets);
        assert!(PciPath::Switch < PciPath::Sockets);
    }

    #[test]
    fn a_description_of_another_version_is_refused() {
        let machine: Machine = serde_json::from_str(r#"{"host": {"cores": 2}}"#).unwrap();
        assert_eq!(machine.host.cores, 2);
        assert!(serde_json::from_str::<Machine>(r#"{"host": {"sockets": 2}}"#).is_err());
    }
}
