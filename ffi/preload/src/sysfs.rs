//! The class directories in which libibverbs looks for devices.
//!
//! libibverbs reads them below `SYSFS_PATH`, which is set when the library is loaded; the tree is made when somebody
//! first looks at it, and removed when the process ends.

use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::Path;

use ibex_hca::LinkLayer;

use crate::world::Device;

/// The device number of every node: that of `/dev/null`, which is what `open` of a node gives.
const NODE: &str = "1:3\n";
/// Version of the uverbs interface that libmlx5 speaks.
const ABI_VERSION: &str = "1\n";

/// Writes the tree of these devices below `root`.
pub(crate) fn make(root: &Path, devices: &[Device]) -> io::Result<()> {
    let verbs = root.join("class/infiniband_verbs");
    fs::create_dir_all(&verbs)?;
    fs::write(verbs.join("abi_version"), "6\n")?;
    for device in devices {
        make_node(&verbs.join(device.node_name()), device)?;
        make_device(&root.join("class/infiniband").join(device.name()), device)?;
        make_function(&root.join("bus/pci/devices").join(device.pci_name()), device)?;
    }
    Ok(())
}

fn make_node(dir: &Path, device: &Device) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("dev"), NODE)?;
    fs::write(dir.join("ibdev"), format!("{}\n", device.name()))?;
    fs::write(dir.join("abi_version"), ABI_VERSION)
}

fn make_device(dir: &Path, device: &Device) -> io::Result<()> {
    let port = device.port();
    let port_dir = dir.join("ports/1");
    let (gids, types) = (port_dir.join("gids"), port_dir.join("gid_attrs/types"));
    for made in [&dir.join("device"), &gids, &types, &port_dir.join("pkeys")] {
        fs::create_dir_all(made)?;
    }
    fs::write(dir.join("node_type"), "1: CA\n")?;
    fs::write(dir.join("fw_ver"), format!("{}\n", crate::world::FIRMWARE))?;
    fs::write(dir.join("hca_type"), "MT4129\n")?;
    fs::write(dir.join("board_id"), "IBEX_EMULATED\n")?;
    fs::write(dir.join("node_guid"), format!("{}\n", colons(&device.guid().to_be_bytes())))?;
    fs::write(dir.join("sys_image_guid"), format!("{}\n", colons(&device.guid().to_be_bytes())))?;
    fs::write(dir.join("device/modalias"), "pci:v000015B3d00001021sv000015B3sd00000001bc02sc07i00\n")?;
    fs::write(dir.join("device/numa_node"), "-1\n")?;
    let gid_type = match port.link {
        LinkLayer::Roce => "RoCE v2\n",
        LinkLayer::Ib => "IB/RoCE v1\n",
    };
    let layer = match port.link {
        LinkLayer::Roce => "Ethernet\n",
        LinkLayer::Ib => "InfiniBand\n",
    };
    fs::write(gids.join("0"), format!("{}\n", colons(&port.gid.0)))?;
    fs::write(types.join("0"), gid_type)?;
    fs::write(port_dir.join("pkeys/0"), "0xffff\n")?;
    fs::write(port_dir.join("link_layer"), layer)?;
    fs::write(port_dir.join("state"), "4: ACTIVE\n")
}

/// The PCI device, which VFIO's user-space driver looks for.
fn make_function(dir: &Path, device: &Device) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("vendor"), "0x15b3\n")?;
    fs::write(dir.join("device"), "0x1021\n")?;
    symlink(format!("../../../../kernel/iommu_groups/{}", device.group()), dir.join("iommu_group"))
}

/// Bytes as sysfs writes identifiers: groups of four digits.
fn colons(bytes: &[u8]) -> String {
    let groups =
        bytes.chunks(2).map(|pair| pair.iter().map(|byte| format!("{byte:02x}")).collect::<String>());
    groups.collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    use super::colons;

    #[test]
    fn identifiers_are_written_in_groups_of_four_digits() {
        assert_eq!(colons(&[0xfe, 0x80, 0, 0x1b]), "fe80:001b");
    }
}
