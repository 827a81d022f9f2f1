//! NVIDIA's driver, its libraries, and GPUs.

use super::super::super::table::bytes;
use super::super::machine::{Gpu, Library, Machine, Nvidia, WriteOrdering};
use super::{Finding, Needs, Report};

/// CUDA version that the embedded kernels were compiled for; older drivers refuse them.
const CUDA_MIN: (u32, u32) = (13, 0);
/// Compute capability of the oldest target.
const CAPABILITY_MIN: (u32, u32) = (8, 0);
/// Major capabilities with machine code in the image; later ones compile its PTX at load time.
const CAPABILITIES_BUILT: [u32; 3] = [8, 9, 10];
const INSTALL_DRIVER: &str = "apt-get install nvidia-open (driver 580 or later), reboot";

pub(super) fn judge(machine: &Machine, needs: &Needs, findings: &mut Vec<Finding>) {
    let nvidia = &machine.nvidia;
    let mut report = Report { area: "gpu", findings };
    if nvidia.pci_functions == 0 && machine.gpus.is_empty() {
        report.note("no NVIDIA GPU", "kernels run on the host's cores", None);
        return;
    }
    driver(nvidia, &mut report);
    library(nvidia, &mut report);
    if !needs.has_cuda_image {
        report.note(
            "this build has no kernels for GPUs",
            "kernels run on the host's cores",
            Some("build where nvcc 13 is found (the pip wheels listed in .ci/run will do)"),
        );
    }
    if !machine.nics.is_empty() {
        doorbells(nvidia, &mut report);
    }
    match &nvidia.nccl {
        Library::Loaded(version) => report.good(format!("libnccl.so.2 {version}")),
        Library::Missing(why) => report.note(
            format!("libnccl.so.2 cannot be used ({why})"),
            "benches lack the all-to-all of NCCL as a baseline",
            Some("apt-get install libnccl2, or pip install nvidia-nccl-cu13"),
        ),
    }
    for (idx, gpu) in machine.gpus.iter().enumerate() {
        let area = format!("gpu {idx}");
        let mut report = Report { area: &area, findings: report.findings };
        one(gpu, machine, &mut report);
    }
}

fn driver(nvidia: &Nvidia, report: &mut Report<'_>) {
    let Some(version) = &nvidia.driver else {
        report.blocker(
            format!("{} NVIDIA GPUs on the PCI bus, and no driver is loaded", nvidia.pci_functions),
            "kernels run on the host's cores",
            format!("modprobe nvidia; if there is none: {INSTALL_DRIVER}"),
        );
        return;
    };
    let flavour = match nvidia.is_open {
        Some(true) => ", open kernel modules",
        Some(false) => ", closed kernel modules",
        None => "",
    };
    report.good(format!("driver {version}{flavour}"));
}

fn library(nvidia: &Nvidia, report: &mut Report<'_>) {
    const COSTS: &str = "kernels run on the host's cores";
    let version = match &nvidia.cuda {
        Library::Loaded(version) => version,
        Library::Missing(why) => {
            report.blocker(
                format!("libcuda.so.1 cannot be used ({why})"),
                COSTS,
                "install the driver's user part (libcuda1); in a container: --gpus all, and compute among \
                 NVIDIA_DRIVER_CAPABILITIES",
            );
            return;
        }
    };
    let mut numbers = version.split('.').map_while(|number| number.parse::<u32>().ok());
    let found = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if found < CUDA_MIN {
        let (major, minor) = CUDA_MIN;
        report.blocker(
            format!("the driver supports CUDA {version}; the kernels need {major}.{minor}"),
            COSTS,
            INSTALL_DRIVER,
        );
    } else {
        report.good(format!("libcuda.so.1 for CUDA {version}"));
    }
}

/// What it takes to ring a NIC's doorbell from a GPU.
fn doorbells(nvidia: &Nvidia, report: &mut Report<'_>) {
    let is_mapped = |registry: &String| {
        let mut words = registry.split(';').filter_map(|word| word.split_once('='));
        words.any(|(name, value)| name.trim() == "PeerMappingOverride" && value.trim() == "1")
    };
    match nvidia.registry.as_ref().map(is_mapped) {
        Some(true) => report.good("PeerMappingOverride=1: doorbell pages can be mapped into GPUs"),
        Some(false) => report.warning(
            "PeerMappingOverride is not set: doorbell pages cannot be mapped into GPUs",
            "a host thread rings doorbells for the kernels: one more hop per batch",
            "echo 'options nvidia NVreg_RegistryDwords=\"PeerMappingOverride=1;\"' \
             >/etc/modprobe.d/ibex-nvidia.conf && update-initramfs -u && reboot",
        ),
        None => report.note(
            "the driver's registry cannot be read: PeerMappingOverride is unknown",
            "where it is not set, a host thread rings doorbells for the kernels",
            Some("grep RegistryDwords /proc/driver/nvidia/params"),
        ),
    }
}

fn one(gpu: &Gpu, machine: &Machine, report: &mut Report<'_>) {
    let (major, minor) = gpu.capability;
    let shown = format!("{}, sm_{major}{minor}, {} SMs, {}", gpu.name, gpu.sms, bytes(gpu.memory));
    if gpu.capability < CAPABILITY_MIN {
        let mend = "use an A100 or later; the emulator serves meanwhile";
        report.blocker(shown, "its kernels are not built: the oldest target is sm_80", mend);
    } else if CAPABILITIES_BUILT.contains(&major) {
        report.good(shown);
    } else {
        let costs = "kernels are compiled by the driver when they are first loaded";
        report.note(shown, costs, None);
    }
    if machine.nics.is_empty() {
        return;
    }
    memory_for_nics(gpu, &machine.nvidia, report);
    match gpu.write_ordering {
        Some(WriteOrdering::Owner | WriteOrdering::AllDevices) => {
            report.good("writes of a NIC become visible to its kernels in order");
        }
        Some(WriteOrdering::Nobody) => report.blocker(
            "writes of a NIC do not become visible to its kernels in order",
            "a signal could overtake its data, so the queue pair route is refused",
            "use a data centre GPU (A100 or later); ranks of one machine reach each other by peer mapping",
        ),
        None => report.note(
            "the order in which a NIC's writes become visible is unknown",
            "the queue pair route asks the driver again and is refused below OWNER",
            None,
        ),
    }
}

/// How a NIC reaches the GPU's memory: dma-buf, else nvidia-peermem, else not at all.
fn memory_for_nics(gpu: &Gpu, nvidia: &Nvidia, report: &mut Report<'_>) {
    if gpu.has_gpudirect == Some(false) {
        report.blocker(
            "it does not let other devices reach its memory (GPUDirect RDMA)",
            "no queue pair can read or write its buffers",
            "use a data centre GPU, or pass it through to the virtual machine with its BAR1",
        );
        return;
    }
    match (gpu.has_dma_buf, nvidia.has_peermem) {
        (Some(true), _) => report.good("NICs reach its memory by dma-buf"),
        (_, true) => report.note(
            "NICs reach its memory by nvidia-peermem, not by dma-buf",
            "one more kernel module to keep; otherwise nothing",
            Some("apt-get install nvidia-open"),
        ),
        (Some(false), false) => report.blocker(
            "NICs cannot reach its memory: neither dma-buf nor nvidia-peermem",
            "no queue pair can read or write its buffers",
            "modprobe nvidia-peermem; or the open kernel modules with Linux 5.12 or later: apt-get install \
             nvidia-open",
        ),
        (None, false) => report.note(
            "whether it exports dma-bufs is unknown, and nvidia-peermem is not loaded",
            "registration will tell",
            Some("modprobe nvidia-peermem"),
        ),
    }
}
