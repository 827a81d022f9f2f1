//! Machines laid out as files: what is read from them, and what a bare one gives.

use std::os::unix::fs::symlink;

use super::*;

/// A directory that looks like the root of a machine.
fn lay_out(name: &str, files: &[(&str, &str)], links: &[(&str, &str)]) -> Root {
    let path = std::env::temp_dir().join(format!("ibex-doctor-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&path);
    for (file, text) in files {
        let file = path.join(file);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(file, text).unwrap();
    }
    for (link, target) in links {
        let link = path.join(link);
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        symlink(path.join(target), link).unwrap();
    }
    Root { path }
}

impl Drop for Root {
    fn drop(&mut self) {
        if self.path.starts_with(std::env::temp_dir()) {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

const NIC: &str = "sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0/0000:43:00.0";
const GPU: &str = "sys/devices/pci0000:40/0000:40:01.0/0000:41:00.0/0000:44:00.0";
const PORT: &str = "sys/class/infiniband/mlx5_0/ports/1";

fn machine_with_everything() -> Root {
    let files: Vec<(String, &str)> = [
        ("proc/sys/kernel/osrelease".to_owned(), "6.8.0\n"),
        (
            "proc/driver/nvidia/version".to_owned(),
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64 580.1\n",
        ),
        (
            "proc/driver/nvidia/params".to_owned(),
            "EnableMSI: 1\nRegistryDwords: \"PeerMappingOverride=1;\"\n",
        ),
        ("sys/module/nvidia/version".to_owned(), "580.95.05\n"),
        ("sys/module/nvidia_peermem/refcnt".to_owned(), "0\n"),
        ("sys/class/iommu/dmar0/version".to_owned(), "1\n"),
        ("sys/class/net/eth2/mtu".to_owned(), "9000\n"),
        ("sys/class/infiniband_verbs/uverbs0/ibdev".to_owned(), "mlx5_0\n"),
        ("dev/infiniband/uverbs0".to_owned(), ""),
        ("sys/class/infiniband/mlx5_0/fw_ver".to_owned(), "28.43.1014\n"),
        (format!("{PORT}/state"), "4: ACTIVE\n"),
        (format!("{PORT}/link_layer"), "Ethernet\n"),
        (format!("{PORT}/rate"), "400 Gb/sec (4X NDR)\n"),
        (format!("{PORT}/gids/0"), "fe80:0000:0000:0000:0ac0:ebff:fe12:3456\n"),
        (format!("{PORT}/gids/1"), "0000:0000:0000:0000:0000:0000:0000:0000\n"),
        (format!("{PORT}/gids/3"), "0000:0000:0000:0000:0000:ffff:0a00:0001\n"),
        (format!("{PORT}/gid_attrs/types/0"), "IB/RoCE v1\n"),
        (format!("{PORT}/gid_attrs/types/3"), "RoCE v2\n"),
        (format!("{PORT}/gid_attrs/ndevs/0"), "eth2\n"),
        (format!("{NIC}/vendor"), "0x15b3\n"),
        (format!("{NIC}/device"), "0x1021\n"),
        (format!("{NIC}/class"), "0x020000\n"),
        (format!("{NIC}/numa_node"), "0\n"),
        (format!("{NIC}/iommu_group/type"), "identity\n"),
        (format!("{NIC}/current_link_width"), "8\n"),
        (format!("{NIC}/max_link_width"), "16\n"),
        (format!("{NIC}/current_link_speed"), "32.0 GT/s PCIe\n"),
        (format!("{NIC}/max_link_speed"), "32.0 GT/s PCIe\n"),
        (format!("{GPU}/vendor"), "0x10de\n"),
        (format!("{GPU}/device"), "0x2335\n"),
        (format!("{GPU}/class"), "0x030200\n"),
        (format!("{GPU}/iommu_group/type"), "identity\n"),
        ("sys/bus/pci/drivers/mlx5_core/new_id".to_owned(), ""),
    ]
    .into();
    let files: Vec<(&str, &str)> = files.iter().map(|(file, text)| (file.as_str(), *text)).collect();
    let driver = format!("{NIC}/driver");
    let links = [
        ("sys/bus/pci/devices/0000:43:00.0", NIC),
        ("sys/bus/pci/devices/0000:44:00.0", GPU),
        ("sys/class/infiniband/mlx5_0/device", NIC),
        (driver.as_str(), "sys/bus/pci/drivers/mlx5_core"),
    ];
    lay_out("everything", &files, &links)
}

#[test]
fn files_of_a_machine_with_everything_are_understood() {
    let root = machine_with_everything();
    let mut machine = root.machine();
    assert_eq!((machine.host.kernel.as_str(), machine.host.iommu), ("6.8.0", Some(Iommu::PassThrough)));
    let nvidia = &machine.nvidia;
    assert_eq!((nvidia.pci_functions, nvidia.driver.as_deref()), (1, Some("580.95.05")));
    assert_eq!((nvidia.is_open, nvidia.has_peermem), (Some(true), true));
    assert_eq!(nvidia.registry.as_deref(), Some("PeerMappingOverride=1;"));
    assert_eq!((machine.rdma.pci_functions, machine.rdma.has_uverbs), (1, true));
    let nic = &machine.nics[0];
    assert_eq!((nic.name.as_str(), nic.pci.as_str()), ("mlx5_0", "0000:43:00.0"));
    assert_eq!((nic.firmware.as_str(), nic.node.as_deref()), ("28.43.1014", Some("/dev/infiniband/uverbs0")));
    let link = nic.pci_link.as_ref().unwrap();
    assert_eq!((link.width, link.width_max), (8, 16));
    let port = &nic.ports[0];
    assert_eq!((port.number, port.link, port.state.as_str()), (1, Link::Roce, "ACTIVE"));
    assert_eq!(port.netdev, Some(Netdev { name: "eth2".into(), mtu: 9000 }));
    let kinds: Vec<(u32, &str)> = port.gids.iter().map(|gid| (gid.index, gid.kind.as_str())).collect();
    assert_eq!(kinds, [(0, "IB/RoCE v1"), (3, "RoCE v2")], "the entry that is zero is none");
    machine.gpus.push(Gpu { pci: "0000:44:00.0".into(), ..Gpu::default() });
    root.measure(&mut machine);
    assert_eq!(machine.distances[0].path, PciPath::Switch);
}

#[test]
fn a_bare_machine_has_nothing_and_that_is_known() {
    let root = lay_out("bare", &[("sys/class/net/lo/mtu", "65536")], &[]);
    let machine = root.machine();
    assert_eq!(machine.host.iommu, Some(Iommu::Off));
    assert_eq!((machine.nvidia.pci_functions, machine.rdma.pci_functions), (0, 0));
    assert_eq!((machine.nics, machine.nvidia.driver), (Vec::new(), None));
}

#[test]
fn a_process_has_the_node_that_has_all_its_processors() {
    let node = |name: &str, allowed: &str, nodes: &[(&str, &str)]| {
        let status = format!("Name:\tibex\nCpus_allowed_list:\t{allowed}\n");
        let files: Vec<_> = nodes.iter().copied().chain([("proc/self/status", status.as_str())]).collect();
        Places(lay_out(name, &files, &[])).own_node()
    };
    const TWO: [(&str, &str); 2] = [
        ("sys/devices/system/node/node0/cpulist", "0-3,8-11"),
        ("sys/devices/system/node/node1/cpulist", "4-7,12-15"),
    ];
    assert_eq!(node("node-a", "4-5,12", &TWO), Some(1));
    assert_eq!(node("node-b", "0-15", &TWO), None, "it runs on both");
    assert_eq!(node("node-c", "0-3", &TWO[..1]), None, "there is no other");
    assert_eq!(node("node-d", "none", &TWO), None);
    assert_eq!(cpus("0-2,7"), Some([0, 1, 2, 7].into()));
    assert_eq!([cpus(""), cpus("3-"), cpus("2-1")], [None, None, None]);
}

#[test]
fn the_vendors_tool_is_understood() {
    let text = "Configurations:     Next Boot\n         PCI_WR_ORDERING    per_mkey(0)\n";
    assert_eq!(setting(text), Some(PciWriteOrdering::PerMkey));
    assert_eq!(setting("PCI_WR_ORDERING force_relax(1)"), Some(PciWriteOrdering::ForceRelax));
    assert_eq!(setting("-E- Failed to open the device"), None);
}

#[test]
fn this_machine_can_be_described() {
    let machine = machine();
    assert!(machine.host.cores > 0 && !machine.host.kernel.is_empty());
    let text = serde_json::to_string(&machine).unwrap();
    assert_eq!(serde_json::from_str::<Machine>(&text).unwrap(), machine);
}
