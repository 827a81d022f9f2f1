//! Kernel modules and libraries of RDMA, and mlx5 devices.

use super::super::machine::{Library, Link, Machine, Nic, PciWriteOrdering, Port};
use super::{Finding, Needs, Report, Severity};

/// Unit of transport timers, in nanoseconds: one attempt waits this times a power of two.
const TIMER_UNIT_NS: u64 = 4096;
/// Bytes that an interface must carry for a path MTU of 4096: payload, headers of RoCEv2 over IPv6, room.
const NETDEV_MTU_MIN: u32 = 4200;
/// What the path MTU should be.
const PATH_MTU: u32 = 4096;

pub(super) fn judge(machine: &Machine, needs: &Needs, findings: &mut Vec<Finding>) {
    let rdma = &machine.rdma;
    let mut report = Report { area: "nic", findings };
    if rdma.pci_functions == 0 && machine.nics.is_empty() {
        report.note("no mlx5 device", "queue pairs live on the emulated device", None);
        return;
    }
    if machine.nics.is_empty() {
        report.blocker(
            format!("{} mlx5 functions on the PCI bus, and no RDMA device", rdma.pci_functions),
            "queue pairs live on the emulated device",
            "modprobe mlx5_ib; in a container: --device /dev/infiniband, and the host's modules loaded",
        );
        return;
    }
    match &rdma.libmlx5 {
        Library::Loaded(version) => report.good(format!("libmlx5.so.1 {version}")),
        Library::Missing(why) => report.blocker(
            format!("libmlx5.so.1 cannot be used ({why})"),
            "queue pairs live on the emulated device",
            "apt-get install ibverbs-providers (rdma-core 44 or later)",
        ),
    }
    if !rdma.has_uverbs {
        let costs = "no process can open a device";
        report.blocker("the kernel module ib_uverbs is not loaded", costs, "modprobe ib_uverbs");
    }
    for nic in &machine.nics {
        let mut report = Report { area: &nic.name, findings: report.findings };
        one(nic, machine, needs, &mut report);
    }
    any_port(machine, findings);
}

fn one(nic: &Nic, machine: &Machine, needs: &Needs, report: &mut Report<'_>) {
    report.good(format!("at {}, firmware {}", nic.pci, nic.firmware));
    access(nic, report);
    write_ordering(nic, !machine.gpus.is_empty(), report);
    timers(nic, needs, report);
    if let Some(link) = &nic.pci_link {
        let shown = format!("PCI link {} x{}", link.speed, link.width);
        if link.width < link.width_max || link.speed != link.speed_max {
            report.warning(
                format!("{shown}, where {} x{} is possible", link.speed_max, link.width_max),
                "less bandwidth than the port has",
                "reseat the card, or take a slot with all lanes; see `lspci -vv` (LnkSta)",
            );
        } else {
            report.good(shown);
        }
    }
    for port in &nic.ports {
        one_port(port, report);
    }
}

/// The right to open the device, and to have doorbell pages of it.
fn access(nic: &Nic, report: &mut Report<'_>) {
    const COSTS: &str = "this process cannot use the device";
    match (&nic.node, nic.may_open) {
        (None, _) => report.blocker(
            "it has no node below /dev/infiniband",
            COSTS,
            "modprobe ib_uverbs; in a container: --device /dev/infiniband",
        ),
        (Some(node), false) => report.blocker(
            format!("this process may not open {node}"),
            COSTS,
            format!("chmod 0666 {node}, or a udev rule with MODE=\"0666\" (rdma-core ships one)"),
        ),
        (Some(node), true) => match nic.has_devx {
            Some(true) => {
                report.good(format!("{node} opens with DevX: commands and doorbell pages of our own"))
            }
            Some(false) => report.blocker(
                format!("{node} does not open with DevX"),
                COSTS,
                "update kernel and firmware; in a virtual machine ask for a function with DevX (mlx5 UCTX)",
            ),
            None => report.note(format!("{node} was not opened"), "whether it has DevX is unknown", None),
        },
    }
}

/// Signals follow data only if the NIC keeps writes in order where the key says so.
fn write_ordering(nic: &Nic, has_gpu: bool, report: &mut Report<'_>) {
    match nic.pci_write_ordering {
        Some(PciWriteOrdering::PerMkey) => report.good("PCI_WR_ORDERING=per_mkey: our keys ask for order"),
        Some(PciWriteOrdering::ForceRelax) => report.blocker(
            "PCI_WR_ORDERING=force_relax: writes pass each other whatever the key says",
            "a signal could overtake its data: wrong rows",
            format!("mstconfig -d {} set PCI_WR_ORDERING=per_mkey, then reboot or mstfwreset", nic.pci),
        ),
        None => {
            let command =
                format!("mstconfig -d {} q PCI_WR_ORDERING (as root; apt-get install mstflint)", nic.pci);
            let severity = if has_gpu { Severity::Warning } else { Severity::Note };
            let costs = "if it is force_relax, a signal could overtake its data: wrong rows";
            report.push(severity, "PCI_WR_ORDERING is unknown".into(), Some(costs), Some(command));
        }
    }
}

/// What one attempt of the transport really waits.
fn timers(nic: &Nic, needs: &Needs, report: &mut Report<'_>) {
    let millis = |ns: u64| format!("{:.1} ms", ns as f64 / 1e6);
    let Some(exponent) = nic.ack_delay else {
        let costs = "how late a lost packet is noticed is not known before a run";
        report.note("the device's part of the transport timer is unknown", costs, None);
        return;
    };
    let floor = TIMER_UNIT_NS << exponent.min(31);
    let wanted = needs.attempt_ns;
    let shown =
        format!("transport timer: {} wanted, the device adds up to {}", millis(wanted), millis(floor));
    if floor > wanted {
        report.warning(
            shown,
            "a lost packet is noticed later than the configuration says; retries take longer than stall_ms",
            "raise --stall-ms until the wanted time is above the device's",
        );
    } else {
        report.good(shown);
    }
}

fn one_port(port: &Port, report: &mut Report<'_>) {
    let number = port.number;
    if port.state != "ACTIVE" {
        // Whether that is bad depends on the other ports; see `any_port`.
        report.note(format!("port {number} is {}", port.state), "it carries nothing", None);
        return;
    }
    let link = match port.link {
        Link::Ib => "InfiniBand",
        Link::Roce => "Ethernet",
    };
    report.good(format!("port {number} is active: {link}, {}", port.rate));
    mtu(port, report);
    if port.link == Link::Roce {
        gids(port, report);
    }
}

fn mtu(port: &Port, report: &mut Report<'_>) {
    const COSTS: &str = "smaller packets: more headers, fewer messages per second";
    let number = port.number;
    match (&port.netdev, port.active_mtu) {
        (Some(netdev), _) if port.link == Link::Roce && netdev.mtu < NETDEV_MTU_MIN => report.warning(
            format!(
                "port {number}: {} carries {} bytes, a path MTU of {PATH_MTU} needs {NETDEV_MTU_MIN}",
                netdev.name, netdev.mtu
            ),
            COSTS,
            format!("ip link set {} mtu 9000, on both ends and on every switch between", netdev.name),
        ),
        (_, Some(mtu)) if mtu < PATH_MTU => report.warning(
            format!("port {number}: path MTU {mtu}"),
            COSTS,
            "set 4096 in the subnet manager's partition file (mtu=5), or 9000 on the interface",
        ),
        (_, Some(mtu)) => report.good(format!("port {number}: path MTU {mtu}")),
        (_, None) => report.note(
            format!("port {number}: its path MTU is unknown"),
            "connections agree on one, and print it",
            None,
        ),
    }
}

fn gids(port: &Port, report: &mut Report<'_>) {
    let number = port.number;
    let interface = port.netdev.as_ref().map_or("the interface", |netdev| netdev.name.as_str());
    let mut usable = port.gids.iter().filter(|entry| entry.kind == "RoCE v2");
    let is_routable = |gid: &str| !gid.starts_with("fe80:");
    let Some(first) = usable.clone().next() else {
        report.blocker(
            format!("port {number} has no RoCE v2 GID"),
            "no queue pair can be connected (INIT->RTR is refused)",
            format!(
                "ip addr add ADDRESS dev {interface}; see also `rdma system show` for the GID's namespace"
            ),
        );
        return;
    };
    match usable.find(|entry| is_routable(&entry.gid)) {
        Some(entry) => report.good(format!("port {number}: GID {} is {}, RoCE v2", entry.index, entry.gid)),
        None => report.warning(
            format!("port {number}: its only RoCE v2 GIDs are link-local ({} at {})", first.gid, first.index),
            "peers behind a router cannot be reached",
            format!("ip addr add ADDRESS dev {interface}"),
        ),
    }
}

/// One port in use is enough; none is not.
fn any_port(machine: &Machine, findings: &mut Vec<Finding>) {
    let ports = || machine.nics.iter().flat_map(|nic| nic.ports.iter().map(move |port| (nic, port)));
    if ports().any(|(_, port)| port.state == "ACTIVE") {
        return;
    }
    let mend = match ports().next() {
        Some((_, Port { link: Link::Ib, state, .. })) if state == "INIT" => {
            "start a subnet manager: systemctl start opensm, on one machine or on the switch".into()
        }
        Some((_, Port { netdev: Some(netdev), .. })) => {
            format!("ip link set {} up; check the cable", netdev.name)
        }
        _ => "check the cable and the switch; `rdma link`".into(),
    };
    let mut report = Report { area: "nic", findings };
    report.blocker("no port of any NIC is active", "no queue pair can be connected", mend);
}
