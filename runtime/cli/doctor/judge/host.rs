//! Processor, kernel, limits.

use super::super::super::table::bytes;
use super::super::machine::{Iommu, Machine};
use super::{Finding, Needs, Report};

pub(super) fn judge(machine: &Machine, needs: &Needs, findings: &mut Vec<Finding>) {
    let host = &machine.host;
    let mut report = Report { area: "host", findings };
    match host.has_avx2 {
        true => report.good(format!("Linux {}, {} cores with AVX2", host.kernel, host.cores)),
        false => report.blocker(
            format!("Linux {}, {} cores without AVX2", host.kernel, host.cores),
            "the emulator's kernels do not run",
            "use a processor of 2013 or later; in a virtual machine pass its features through (-cpu host)",
        ),
    }
    let has_nic = !machine.nics.is_empty();
    match host.memlock {
        None => report.good("no limit on locked memory"),
        Some(limit) if !has_nic => {
            report.good(format!("{} may be locked, which matters only with a NIC", bytes(limit)));
        }
        Some(limit) if limit < needs.buffer_bytes => report.blocker(
            format!("{} may be locked, a rank registers {}", bytes(limit), bytes(needs.buffer_bytes)),
            "host memory cannot be registered with the NIC: control regions in host memory and buffers fail",
            "ulimit -l unlimited (for good: `* - memlock unlimited` in /etc/security/limits.conf; in a \
             container --ulimit memlock=-1; under systemd LimitMEMLOCK=infinity)",
        ),
        Some(limit) => report.warning(
            format!("{} may be locked, a rank registers {}", bytes(limit), bytes(needs.buffer_bytes)),
            "larger shapes, or several ranks of one user, run into the limit",
            "ulimit -l unlimited",
        ),
    }
    if host.iommu == Some(Iommu::Translating) && has_nic && !machine.gpus.is_empty() {
        report.warning(
            "the IOMMU translates every access of devices",
            "writes between NIC and GPU go through it: less bandwidth, and on some machines none at all",
            "add iommu=pt to the kernel's command line (GRUB_CMDLINE_LINUX), update-grub, reboot",
        );
    }
}
