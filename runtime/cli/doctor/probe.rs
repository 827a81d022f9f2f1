//! Looks at this machine: files below `/sys` and `/proc`, libraries, the tools of the NIC's vendor.
//!
//! Owns nothing, changes nothing, judges nothing. A file that cannot be read is a fact that is not known.
//!
//! INVARIANT: every file is read below one root directory, so that a test can lay out a machine of its own.

use std::collections::BTreeSet;
use std::fs;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use ibex::gpu::cuda;
use ibex_hca::mlx5;
use rustix::process::{Resource, getrlimit};

use super::machine::{
    Distance, GidEntry, Gpu, Host, Iommu, Library, Link, Machine, Netdev, Nic, Nvidia, PciLink, PciPath,
    PciWriteOrdering, Port, Rdma, WriteOrdering,
};

const VENDOR_NVIDIA: &str = "0x10de";
const VENDOR_MELLANOX: &str = "0x15b3";
/// First device number that the mlx5 driver serves; those below are ConnectX-3 and older.
const MLX5_DEVICE_MIN: u32 = 0x1011;
/// Most processors of a machine that are told apart.
const CPUS_MAX: u32 = 1 << 16;
/// Most entries of a GID table that are looked at.
const GIDS_MAX: u32 = 256;

/// Describes the machine that this process runs on.
pub(super) fn machine() -> Machine {
    let root = Root { path: "/".into() };
    let mut machine = root.machine();
    machine.host.cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    machine.host.has_avx2 = std::is_x86_feature_detected!("avx2");
    machine.host.memlock = getrlimit(Resource::Memlock).current;
    ask_cuda(&mut machine);
    ask_libmlx5(&mut machine);
    for nic in &mut machine.nics {
        nic.may_open = nic.node.as_ref().is_some_and(may_open);
        nic.pci_write_ordering = ask_mstconfig(&nic.pci);
    }
    root.measure(&mut machine);
    machine
}

fn may_open(node: &String) -> bool {
    rustix::fs::access(node, rustix::fs::Access::READ_OK | rustix::fs::Access::WRITE_OK).is_ok()
}

fn ask_cuda(machine: &mut Machine) {
    machine.nvidia.nccl = match cuda::nccl_version() {
        Ok((major, minor, patch)) => Library::Loaded(format!("{major}.{minor}.{patch}")),
        Err(error) => Library::Missing(one_line(&error)),
    };
    let asked = cuda::Driver::load().and_then(|driver| Ok((driver.version()?, driver.devices()?)));
    match asked {
        Ok(((major, minor), devices)) => {
            machine.nvidia.cuda = Library::Loaded(format!("{major}.{minor}"));
            machine.gpus = devices.into_iter().map(gpu).collect();
        }
        Err(error) => machine.nvidia.cuda = Library::Missing(one_line(&error)),
    }
}

fn gpu(info: cuda::DeviceInfo) -> Gpu {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let [a, b, c, d] = [&info.uuid[..4], &info.uuid[4..6], &info.uuid[6..8], &info.uuid[8..10]].map(hex);
    Gpu {
        uuid: format!("GPU-{a}-{b}-{c}-{d}-{}", hex(&info.uuid[10..])),
        name: info.name,
        pci: info.pci,
        capability: info.capability,
        sms: info.sms,
        memory: info.memory,
        has_dma_buf: info.has_dma_buf,
        has_gpudirect: info.has_gpudirect,
        write_ordering: info.write_ordering.map(|level| match level {
            0..100 => WriteOrdering::Nobody,
            100..200 => WriteOrdering::Owner,
            _ => WriteOrdering::AllDevices,
        }),
    }
}

fn ask_libmlx5(machine: &mut Machine) {
    let devices = match mlx5::devices() {
        Ok(devices) => devices,
        Err(error) => {
            machine.rdma.libmlx5 = Library::Missing(one_line(&error));
            return;
        }
    };
    machine.rdma.libmlx5 = Library::Loaded("has every function that is needed".into());
    for nic in &mut machine.nics {
        let Some(info) = devices.iter().find(|info| info.name == nic.name) else { continue };
        nic.has_devx = Some(info.devx.is_ok());
        nic.ack_delay = info.devx.is_ok().then_some(info.ack_delay);
        for port in &mut nic.ports {
            let report = info.ports.iter().find(|report| report.number == port.number);
            port.active_mtu = report.map(|report| report.active_mtu.bytes());
        }
    }
}

/// The setting of the firmware, where the vendor's tool is installed and this process may ask.
fn ask_mstconfig(pci: &str) -> Option<PciWriteOrdering> {
    let ask = |tool: &str| {
        // A tool that hangs on a broken device must not hang the doctor.
        let mut command = Command::new("timeout");
        let output = command.args(["10", tool, "-d", pci, "q", "PCI_WR_ORDERING"]).output().ok()?;
        setting(&String::from_utf8_lossy(&output.stdout))
    };
    ask("mstconfig").or_else(|| ask("mlxconfig"))
}

/// The value in a line such as "PCI_WR_ORDERING    per_mkey(0)".
fn setting(text: &str) -> Option<PciWriteOrdering> {
    let line = text.lines().find(|line| line.contains("PCI_WR_ORDERING"))?;
    match line.split_whitespace().last()? {
        value if value.starts_with("per_mkey") => Some(PciWriteOrdering::PerMkey),
        value if value.starts_with("force_relax") => Some(PciWriteOrdering::ForceRelax),
        _ => None,
    }
}

fn one_line(error: &dyn std::error::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Where PCI functions and this process stand, for whoever chooses between NICs.
pub(in crate::cli) struct Places(Root);

impl Places {
    /// Those of this machine.
    pub(in crate::cli) fn of_this_machine() -> Self {
        Self(Root { path: "/".into() })
    }

    /// The PCI address of an RDMA device.
    pub(in crate::cli) fn pci_of_nic(&self, name: &str) -> Option<String> {
        self.0.link(&format!("sys/class/infiniband/{name}/device"))
    }

    /// The way between two PCI functions.
    pub(in crate::cli) fn path(&self, one: &str, other: &str) -> Option<PciPath> {
        self.0.path_between(one, other)
    }

    /// The NUMA node of a PCI function, where the machine has several.
    pub(in crate::cli) fn node(&self, pci: &str) -> Option<i32> {
        self.0.node(pci)
    }

    /// The NUMA node that has all processors on which this process may run, where there is another one.
    pub(in crate::cli) fn own_node(&self) -> Option<i32> {
        const DIR: &str = "sys/devices/system/node";
        let status = self.0.read("proc/self/status")?;
        let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
        let allowed = cpus(allowed)?;
        let names = self.0.names(DIR);
        let nodes: Vec<i32> =
            names.iter().filter_map(|name| name.strip_prefix("node")?.parse().ok()).collect();
        let has_all = |node: &i32| {
            let list = self.0.read(format!("{DIR}/node{node}/cpulist")).and_then(|list| cpus(&list));
            list.is_some_and(|list| allowed.iter().all(|cpu| list.contains(cpu)))
        };
        nodes.iter().copied().find(has_all).filter(|_| nodes.len() > 1)
    }
}

/// The numbers of a list such as "0-3,8"; `None` if it is none or names nothing.
fn cpus(list: &str) -> Option<BTreeSet<u32>> {
    let mut all = BTreeSet::new();
    for range in list.trim().split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        all.extend(first..=last.min(CPUS_MAX));
    }
    (!all.is_empty()).then_some(all)
}

/// A file system with `/proc` and `/sys` below a directory.
struct Root {
    path: PathBuf,
}

impl Root {
    /// What files say; libraries and limits are asked by [`machine`].
    fn machine(&self) -> Machine {
        let host = Host {
            kernel: self.read("proc/sys/kernel/osrelease").unwrap_or_default(),
            iommu: self.iommu(),
            ..Host::default()
        };
        Machine { host, nvidia: self.nvidia(), rdma: self.rdma(), nics: self.nics(), ..Machine::default() }
    }

    /// Fills in how far every GPU is from every NIC.
    fn measure(&self, machine: &mut Machine) {
        for gpu in &machine.gpus {
            for nic in &machine.nics {
                let Some(path) = self.path_between(&gpu.pci, &nic.pci) else { continue };
                let distance = Distance { gpu: gpu.pci.clone(), nic: nic.name.clone(), path };
                machine.distances.push(distance);
            }
        }
    }

    fn path_between(&self, one: &str, other: &str) -> Option<PciPath> {
        let nodes = (self.node(one), self.node(other));
        Some(PciPath::between(&self.place(one)?, &self.place(other)?, nodes))
    }

    fn at(&self, file: impl AsRef<Path>) -> PathBuf {
        self.path.join(file)
    }

    fn exists(&self, file: &str) -> bool {
        self.at(file).exists()
    }

    fn read(&self, file: impl AsRef<Path>) -> Option<String> {
        fs::read_to_string(self.at(file)).ok().map(|text| text.trim().to_owned())
    }

    fn number<T: std::str::FromStr>(&self, file: impl AsRef<Path>) -> Option<T> {
        self.read(file)?.parse().ok()
    }

    /// Names in a directory, in order.
    fn names(&self, dir: impl AsRef<Path>) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.at(dir)) else { return Vec::new() };
        let mut names: Vec<String> =
            entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect();
        names.sort_unstable();
        names
    }

    /// The last part of what a link points to.
    fn link(&self, file: &str) -> Option<String> {
        let target = fs::read_link(self.at(file)).ok()?;
        Some(target.file_name()?.to_str()?.to_owned())
    }

    /// PCI functions that satisfy `wanted(vendor, device, class)`.
    fn functions(&self, wanted: impl Fn(&str, u32, &str) -> bool) -> Vec<String> {
        const DIR: &str = "sys/bus/pci/devices";
        let mut names = self.names(DIR);
        names.retain(|name| {
            let file = |file: &str| self.read(format!("{DIR}/{name}/{file}")).unwrap_or_default();
            let device = u32::from_str_radix(file("device").trim_start_matches("0x"), 16).unwrap_or(0);
            wanted(&file("vendor"), device, &file("class"))
        });
        names
    }

    fn gpus_on_bus(&self) -> Vec<String> {
        self.functions(|vendor, _, class| vendor == VENDOR_NVIDIA && class.starts_with("0x03"))
    }

    fn nics_on_bus(&self) -> Vec<String> {
        self.functions(|vendor, device, class| {
            vendor == VENDOR_MELLANOX && device >= MLX5_DEVICE_MIN && class.starts_with("0x02")
        })
    }

    /// Bridges from the root of the PCI tree to a function.
    fn place(&self, pci: &str) -> Option<Vec<String>> {
        let place = fs::canonicalize(self.at(format!("sys/bus/pci/devices/{pci}"))).ok()?;
        let parts: Vec<String> = place.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let root = parts.iter().position(|part| part.starts_with("pci"))?;
        Some(parts[root..].to_vec())
    }

    fn node(&self, pci: &str) -> Option<i32> {
        let node = self.number(format!("sys/bus/pci/devices/{pci}/numa_node"))?;
        (node >= 0).then_some(node)
    }

    fn iommu(&self) -> Option<Iommu> {
        if self.names("sys/class/iommu").is_empty() {
            return self.exists("sys/class").then_some(Iommu::Off);
        }
        let device = self.gpus_on_bus().into_iter().chain(self.nics_on_bus()).next()?;
        match self.read(format!("sys/bus/pci/devices/{device}/iommu_group/type"))?.as_str() {
            "identity" => Some(Iommu::PassThrough),
            _ => Some(Iommu::Translating),
        }
    }

    fn nvidia(&self) -> Nvidia {
        let version = self.read("proc/driver/nvidia/version");
        let params = self.read("proc/driver/nvidia/params");
        let registry = params.as_deref().and_then(|params| {
            let line = params.lines().find_map(|line| line.strip_prefix("RegistryDwords:"))?;
            Some(line.trim().trim_matches('"').to_owned())
        });
        Nvidia {
            pci_functions: self.gpus_on_bus().len(),
            driver: self.read("sys/module/nvidia/version"),
            is_open: version.map(|text| text.contains("Open Kernel Module")),
            registry,
            has_peermem: self.exists("sys/module/nvidia_peermem") || self.exists("sys/module/nv_peer_mem"),
            ..Nvidia::default()
        }
    }

    fn rdma(&self) -> Rdma {
        Rdma {
            pci_functions: self.nics_on_bus().len(),
            has_uverbs: self.exists("sys/class/infiniband_verbs"),
            libmlx5: Library::default(),
        }
    }

    fn nics(&self) -> Vec<Nic> {
        const DIR: &str = "sys/class/infiniband";
        let is_mlx5 = |name: &String| {
            self.link(&format!("{DIR}/{name}/device/driver")).is_some_and(|driver| driver.starts_with("mlx5"))
        };
        self.names(DIR).into_iter().filter(is_mlx5).map(|name| self.nic(DIR, name)).collect()
    }

    fn nic(&self, dir: &str, name: String) -> Nic {
        let device = format!("{dir}/{name}/device");
        let verbs = "sys/class/infiniband_verbs";
        let is_its = |node: &String| self.read(format!("{verbs}/{node}/ibdev")).as_deref() == Some(&*name);
        let node = self.names(verbs).into_iter().find(is_its).map(|node| format!("/dev/infiniband/{node}"));
        let ports = self.names(format!("{dir}/{name}/ports"));
        Nic {
            pci: self.link(&device).unwrap_or_default(),
            firmware: self.read(format!("{dir}/{name}/fw_ver")).unwrap_or_default(),
            node: node.filter(|node| self.exists(node.trim_start_matches('/'))),
            pci_link: self.pci_link(&device),
            ports: ports
                .iter()
                .filter_map(|port| self.port(&format!("{dir}/{name}/ports/{port}"), port.parse().ok()?))
                .collect(),
            name,
            ..Nic::default()
        }
    }

    fn pci_link(&self, device: &str) -> Option<PciLink> {
        Some(PciLink {
            width: self.number(format!("{device}/current_link_width"))?,
            width_max: self.number(format!("{device}/max_link_width"))?,
            speed: self.read(format!("{device}/current_link_speed"))?,
            speed_max: self.read(format!("{device}/max_link_speed"))?,
        })
    }

    fn port(&self, dir: &str, number: u8) -> Option<Port> {
        let state = self.read(format!("{dir}/state"))?;
        let link = match self.read(format!("{dir}/link_layer"))?.as_str() {
            "InfiniBand" => Link::Ib,
            _ => Link::Roce,
        };
        let netdev = (link == Link::Roce).then(|| self.netdev(dir)).flatten();
        Some(Port {
            number,
            link,
            // "4: ACTIVE"
            state: state.rsplit(' ').next().unwrap_or_default().to_owned(),
            rate: self.read(format!("{dir}/rate")).unwrap_or_default(),
            active_mtu: None,
            netdev,
            gids: (0..GIDS_MAX).filter_map(|index| self.gid(dir, index)).collect(),
        })
    }

    fn netdev(&self, dir: &str) -> Option<Netdev> {
        let mut names = (0..GIDS_MAX).filter_map(|index| self.read(format!("{dir}/gid_attrs/ndevs/{index}")));
        let name = names.next()?;
        Some(Netdev { mtu: self.number(format!("sys/class/net/{name}/mtu"))?, name })
    }

    fn gid(&self, dir: &str, index: u32) -> Option<GidEntry> {
        let gid = self.read(format!("{dir}/gids/{index}"))?;
        if gid.bytes().all(|byte| matches!(byte, b'0' | b':')) {
            return None;
        }
        let kind = self.read(format!("{dir}/gid_attrs/types/{index}")).unwrap_or_default();
        Some(GidEntry { index, gid, kind })
    }
}

#[cfg(test)]
mod tests;
