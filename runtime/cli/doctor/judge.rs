//! What a machine's description means for Ibex: findings, what each costs, what mends it.
//!
//! Pure: the same description gives the same findings anywhere. Nothing is owned but strings.
//!
//! INVARIANT: whatever is worse than a note says what it costs and how it is mended.

use serde::Serialize;

use super::machine::{Machine, PciPath};

mod gpu;
mod host;
mod nic;

/// How bad a finding is; the worst one decides the exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Severity {
    /// As it should be.
    Good,
    /// Absent or unknown, and nothing is wrong with that.
    Note,
    /// It works, but slower or with less than the hardware could.
    Warning,
    /// Hardware is there and cannot be used as it is.
    Blocker,
}

impl Severity {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Note => "note",
            Self::Warning => "warning",
            Self::Blocker => "blocker",
        }
    }

    /// 2 belongs to refused requests, as everywhere in this command.
    pub(super) const fn exit_code(self) -> u8 {
        match self {
            Self::Good | Self::Note => 0,
            Self::Warning => 1,
            Self::Blocker => 3,
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// "host", "gpu", "nic", or a device's name.
    pub(super) area: String,
    pub(super) severity: Severity,
    /// What is there, or is not.
    pub(super) what: String,
    /// What that costs.
    pub(super) costs: Option<&'static str>,
    /// The command or step that mends it.
    pub(super) mend: Option<String>,
}

/// What Ibex wants of a machine, for the shape that was asked about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Needs {
    /// Bytes that a rank registers with its NIC.
    pub(super) buffer_bytes: u64,
    /// One attempt of a connection's transport, in nanoseconds, as the configuration wants it.
    pub(super) attempt_ns: u64,
    /// This build embeds kernels for GPUs.
    pub(super) has_cuda_image: bool,
    /// This build runs kernels on GPUs.
    pub(super) has_cuda_backend: bool,
    /// This build drives mlx5 devices.
    pub(super) has_mlx5_provider: bool,
}

/// All findings, and what follows from them.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Diagnosis {
    pub(super) findings: Vec<Finding>,
    /// What to run on this machine, one sentence each.
    pub(super) verdict: Vec<String>,
}

impl Diagnosis {
    pub(super) fn worst(&self) -> Severity {
        self.findings.iter().map(|finding| finding.severity).max().unwrap_or(Severity::Good)
    }
}

/// Collects findings about one area.
struct Report<'a> {
    area: &'a str,
    findings: &'a mut Vec<Finding>,
}

impl Report<'_> {
    fn push(&mut self, severity: Severity, what: String, costs: Option<&'static str>, mend: Option<String>) {
        self.findings.push(Finding { area: self.area.to_owned(), severity, what, costs, mend });
    }

    fn good(&mut self, what: impl Into<String>) {
        self.push(Severity::Good, what.into(), None, None);
    }

    fn note(&mut self, what: impl Into<String>, costs: &'static str, mend: Option<&str>) {
        self.push(Severity::Note, what.into(), Some(costs), mend.map(str::to_owned));
    }

    fn warning(&mut self, what: impl Into<String>, costs: &'static str, mend: impl Into<String>) {
        self.push(Severity::Warning, what.into(), Some(costs), Some(mend.into()));
    }

    fn blocker(&mut self, what: impl Into<String>, costs: &'static str, mend: impl Into<String>) {
        self.push(Severity::Blocker, what.into(), Some(costs), Some(mend.into()));
    }
}

/// Judges a machine.
pub(super) fn judge(machine: &Machine, needs: &Needs) -> Diagnosis {
    let mut findings = Vec::new();
    host::judge(machine, needs, &mut findings);
    gpu::judge(machine, needs, &mut findings);
    nic::judge(machine, needs, &mut findings);
    topology(machine, &mut findings);
    let verdict = verdict(machine, needs, &findings);
    Diagnosis { findings, verdict }
}

/// Every GPU wants a NIC behind the same PCI switch.
fn topology(machine: &Machine, findings: &mut Vec<Finding>) {
    for (idx, gpu) in machine.gpus.iter().enumerate() {
        let to = machine.distances.iter().filter(|distance| distance.gpu == gpu.pci);
        let Some(nearest) = to.min_by_key(|distance| distance.path) else { continue };
        let area = format!("gpu {idx}");
        let mut report = Report { area: &area, findings };
        let nic = &nearest.nic;
        const COSTS: &str = "payload crosses more of the machine than it must: less bandwidth, more latency";
        match nearest.path {
            PciPath::Switch => report.good(format!("{nic} is behind the same PCI switch")),
            PciPath::HostBridge => report.warning(
                format!("its nearest NIC, {nic}, is across the host bridge"),
                COSTS,
                "move one of the cards to the other's switch, if the chassis has such slots",
            ),
            PciPath::Node | PciPath::Sockets => report.warning(
                format!(
                    "its nearest NIC, {nic}, is across {}",
                    if nearest.path == PciPath::Node {
                        "two host bridges"
                    } else {
                        "the link between sockets"
                    }
                ),
                COSTS,
                format!("give the rank of this gpu another machine, or put a NIC beside {}", gpu.pci),
            ),
        }
    }
}

fn verdict(machine: &Machine, needs: &Needs, findings: &[Finding]) -> Vec<String> {
    let is_blocked = |start: &str| {
        let here = findings.iter().filter(|finding| finding.area.starts_with(start));
        here.map(|finding| finding.severity).max() == Some(Severity::Blocker)
    };
    if !machine.host.has_avx2 {
        return vec!["nothing of Ibex runs on this processor".into()];
    }
    let mut verdict = Vec::new();
    let has_nic = machine.rdma.pci_functions > 0 || !machine.nics.is_empty();
    let has_gpu = machine.nvidia.pci_functions > 0 || !machine.gpus.is_empty();
    if has_nic {
        // What blocks the host here is the limit on the memory that a NIC can be given.
        let blocked = ["host", "nic", "mlx5"].into_iter().any(is_blocked);
        verdict.push(match (needs.has_mlx5_provider, blocked) {
            (false, _) => "the NICs stay unused: this version has no mlx5 provider".into(),
            (true, true) => {
                "--provider mlx5 will not work until the blockers of host and NIC are mended".into()
            }
            (true, false) => "queue pairs on the NIC: ibex bench ep --provider mlx5 --check".into(),
        });
    }
    if has_gpu {
        verdict.push(match (needs.has_cuda_backend, is_blocked("gpu")) {
            (false, _) => "the GPUs stay unused: this version runs kernels on the host".into(),
            (true, true) => "--gpu cuda will not work until the GPU's blockers are mended".into(),
            (true, false) => "kernels on the GPU: ibex bench ep --gpu cuda --check".into(),
        });
    }
    verdict.push("the emulator will serve: ibex bench ep --check".into());
    verdict
}
