//! Running the command as its users do, with nothing of this test's own environment that a launcher might have set.

use std::io::Write;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// What a launcher may have said to whoever runs the tests.
const LAUNCHERS_WORDS: [&str; 12] = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "OMPI_COMM_WORLD_RANK",
    "PMI_RANK",
    "HOST_IP",
    "POD_IP",
    "IBEX_TOKEN",
];

/// A network that is worse than it should be.
pub(crate) struct BadNetwork {
    pub(crate) name: &'static str,
    /// Of a `--faults-plan`.
    pub(crate) rules: &'static str,
    /// What must have happened, as the report's `fault_counts` call it.
    pub(crate) counts: &'static [&'static str],
}

/// One of each kind that a group bears without a loss.
pub(crate) const BAD_NETWORKS: [BadNetwork; 3] = [
    BadNetwork { name: "drop-1", rules: r#"{"fault": {"drop": {"ppm": 10000}}}"#, counts: &["dropped"] },
    BadNetwork { name: "drop-5", rules: r#"{"fault": {"drop": {"ppm": 50000}}}"#, counts: &["dropped"] },
    BadNetwork {
        name: "mixed",
        rules: r#"{"fault": {"duplicate": {"ppm": 10000}}}, {"fault": {"corrupt": {"ppm": 10000}}},
           {"fault": {"reorder": {"ppm": 10000, "overtake_max": 4, "hold_us": 2000}}}"#,
        counts: &["duplicated", "corrupted", "reordered"],
    },
];

/// The command, started by nobody in particular.
pub(crate) fn command(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ibex"));
    command.args(args);
    for name in LAUNCHERS_WORDS {
        command.env_remove(name);
    }
    command
}

/// Runs it to its end.
pub(crate) fn ibex(args: &[&str]) -> Output {
    command(args).output().unwrap()
}

/// Runs `bench ep` to its end.
pub(crate) fn bench(args: &[&str]) -> Output {
    ibex(&[&["bench", "ep"], args].concat())
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A port that nobody listened on a moment ago.
pub(crate) fn free_port() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port().to_string()
}

/// A file of one test, in cargo's directory for tests.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str, extension: &str) -> Self {
        let path = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("multi-node-{name}"));
        Self(path.with_extension(extension))
    }

    pub(crate) fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }

    pub(crate) fn write(&self, text: &str) {
        std::fs::write(&self.0, text).unwrap();
    }
}

pub(crate) fn report_of(file: &Scratch) -> Value {
    serde_json::from_str(&std::fs::read_to_string(&file.0).unwrap()).unwrap()
}

/// Says why a test skipped, straight to stderr: the runner hides what a passing test prints.
fn say_skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// What this machine allows.
pub(crate) struct Machine;

impl Machine {
    /// Tries what `--hosts netns` needs.
    pub(crate) fn lacks_namespaces() -> bool {
        let output = ibex(&["launch", "--ranks", "1", "--hosts", "netns", "--", "true"]);
        if output.status.success() {
            return false;
        }
        let said = text(&output.stderr);
        say_skipped(&format!(
            "no network namespaces (run as root, apt-get install iproute2): {}",
            said.trim()
        ));
        true
    }

    /// Looks for an IPv6 address in a namespace.
    pub(crate) fn lacks_ipv6() -> bool {
        let has = [
            "launch",
            "--ranks",
            "1",
            "--hosts",
            "netns",
            "--",
            "grep",
            "-q",
            "^fd77",
            "/proc/self/net/if_inet6",
        ];
        let lacks = !ibex(&has).status.success();
        if lacks {
            say_skipped("this system has no IPv6 (sysctl net.ipv6.conf.all.disable_ipv6=0)");
        }
        lacks
    }

    /// Tries whether packets can be dropped by rule.
    pub(crate) fn lacks_nft() -> bool {
        let rule = "nft 'add table inet probe; add chain inet probe in { type filter hook input priority 0; }; \
                    add rule inet probe in numgen random mod 100 < 1 drop'";
        let output = ibex(&["launch", "--ranks", "1", "--hosts", "netns", "--", "sh", "-c", rule]);
        if output.status.success() {
            return false;
        }
        let said = text(&output.stderr);
        let said = said.lines().next().unwrap_or_default();
        say_skipped(&format!("the kernel drops no packets for us (apt-get install nftables): {said}"));
        true
    }
}
