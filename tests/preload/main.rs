//! Software that was written for the real device, run on the emulated one through the shim of `ffi/preload`.
//!
//! The distribution's libibverbs and libmlx5 are unmodified, and so are rdma-core's own tests: each passes, or stands
//! in `expected.txt` with the reason. Wants ibverbs-utils, ibverbs-providers, python3-pyverbs, python3-scapy, and the
//! tests, which `suite.sh` fetches; says what is missing.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

mod expected;
mod suite;

/// Debian's interpreter, for which its packages are; another one may come first on the path.
const PYTHON: &str = "/usr/bin/python3";
/// Room for a slow machine; a run takes seconds.
const PATIENCE: &str = "300";

/// Says why a test skipped, straight to stderr: the runner hides what a passing test prints.
fn say_skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: preload: {why}");
}

/// The shim, which cargo builds beside the tests.
fn shim() -> PathBuf {
    let shim = std::env::current_exe().unwrap().with_file_name("libibex_preload.so");
    assert!(shim.exists(), "{} is not there", shim.display());
    shim
}

/// A command under the shim, which ends even if what it runs does not.
fn under_shim(program: &str, link: &str) -> Command {
    let mut command = Command::new("timeout");
    command.arg(PATIENCE).arg(program);
    command.env("IBEX_PRELOAD_LINK", link).env("IBEX_PRELOAD_DIR", env!("CARGO_TARGET_TMPDIR"));
    command.env("LD_PRELOAD", shim());
    command
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Whether a tool is installed; says what to do if not.
fn is_there(path: &str, package: &str) -> bool {
    let is_there = Path::new(path).exists();
    if !is_there {
        say_skipped(&format!("no {path}: apt-get install {package}"));
    }
    is_there
}

#[test]
fn ibv_devinfo_lists_every_device_of_both_links() {
    if !is_there("/usr/bin/ibv_devinfo", "ibverbs-utils") || !suite::has_provider() {
        return;
    }
    let dir = concat!(env!("CARGO_TARGET_TMPDIR"), "/preload-devinfo");
    std::fs::create_dir_all(dir).unwrap();
    for (link, layer) in [("roce", "Ethernet"), ("ib", "InfiniBand")] {
        let mut command = under_shim("ibv_devinfo", link);
        let output = command.env("IBEX_PRELOAD_DEVICES", "3").env("IBEX_PRELOAD_DIR", dir).output().unwrap();
        let text = text(&output);
        assert!(output.status.success(), "{text}");
        for device in ["mlx5_0", "mlx5_1", "mlx5_2"] {
            assert!(text.lines().any(|line| line.contains("hca_id") && line.contains(device)), "{text}");
        }
        let ports = text.lines().filter(|line| line.contains("link_layer") && line.contains(layer));
        assert_eq!(ports.count(), 3, "{text}");
        assert_eq!(text.matches("PORT_ACTIVE").count(), 3, "{text}");
    }
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0, "a sysfs tree was left behind");
}

#[test]
fn a_setting_that_means_nothing_is_said_and_no_device_appears() {
    if !is_there("/usr/bin/ibv_devinfo", "ibverbs-utils") || !suite::has_provider() {
        return;
    }
    let output = under_shim("ibv_devinfo", "token-ring").output().unwrap();
    let text = text(&output);
    assert!(!output.status.success(), "{text}");
    assert!(text.contains("IBEX_PRELOAD_LINK is \"token-ring\"; it must be roce or ib"), "{text}");
}

#[test]
fn rdma_cores_own_tests_pass_or_are_listed() {
    let Some(suite) = suite::find() else { return };
    let list = expected::read(include_str!("expected.txt"));
    let (mut passed, mut listed, mut wrong) = (0, 0, Vec::new());
    for link in ["ib", "roce"] {
        let results = suite.run(link);
        wrong.extend(expected::unseen(&list, link, &results));
        for result in results {
            match expected::judge(&list, link, &result) {
                expected::Verdict::Passed => passed += 1,
                expected::Verdict::Listed => listed += 1,
                expected::Verdict::Wrong(why) => wrong.push(why),
            }
        }
    }
    let failed = wrong.len();
    let _ = writeln!(
        std::io::stderr(),
        "preload: rdma-core's tests on both links: {passed} passed, {listed} listed with reason, {failed} failed"
    );
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(passed > 0);
}
