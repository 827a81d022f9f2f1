//! rdma-core's own tests: where they are, and what each run of them says.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::{PYTHON, is_there, say_skipped, text, under_shim};

/// The modules that the emulated device is held to.
const MODULES: &[&str] = &[
    "test_pd",
    "test_mr",
    "test_cq",
    "test_qp",
    "test_qpex",
    "test_mlx5_devx",
    "test_mlx5_cq",
    "test_mlx5_raw_wqe",
    "test_mlx5_vfio",
];
/// Where the shim's first device stands on the PCI bus, for tests that take it whole.
const PCI_DEVICE: &str = "1be8:00:00.0";

/// What became of one test.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TestResult {
    /// Such as `test_pd.PDTest.test_alloc_pd`.
    pub(crate) test: String,
    /// `passed`, `skipped`, `error`, `failed`, or `crashed`.
    pub(crate) outcome: String,
    pub(crate) reason: String,
}

/// Whether libmlx5 is installed; says what to do if not.
pub(crate) fn has_provider() -> bool {
    is_there("/etc/libibverbs.d/mlx5.driver", "ibverbs-providers")
}

/// The tests as they were unpacked.
pub(crate) struct Suite {
    dir: PathBuf,
}

/// Finds everything that the tests need; says what is missing.
pub(crate) fn find() -> Option<Suite> {
    if !has_provider() || !is_there(PYTHON, "python3-pyverbs") {
        return None;
    }
    for (module, package) in [("pyverbs.device", "python3-pyverbs"), ("scapy", "python3-scapy")] {
        let found = Command::new(PYTHON).args(["-c", &format!("import {module}")]).output();
        if !found.is_ok_and(|output| output.status.success()) {
            say_skipped(&format!("{PYTHON} has no {module}: apt-get install {package}"));
            return None;
        }
    }
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("pyverbs");
    if !dir.join("tests/__init__.py").exists() {
        say_skipped(&format!("rdma-core's tests are missing: tests/preload/suite.sh {}", dir.display()));
        return None;
    }
    Some(Suite { dir })
}

impl Suite {
    /// Runs every module in a process of its own, so that one that crashes takes no other with it.
    pub(crate) fn run(&self, link: &str) -> Vec<TestResult> {
        MODULES.iter().flat_map(|module| self.run_module(module, link)).collect()
    }

    fn run_module(&self, module: &str, link: &str) -> Vec<TestResult> {
        let mut command = under_shim(PYTHON, link);
        command.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/preload/run.py"));
        // A stand-in for the system's `rdma`, which knows nothing of these devices.
        let path = format!("{}:{}", self.stand_ins().display(), std::env::var("PATH").unwrap());
        let output = command
            .arg(&self.dir)
            .args([module, "--pci-dev", PCI_DEVICE])
            .env("PATH", path)
            .output()
            .unwrap();
        let text = text(&output);
        let mut results = parse(&text);
        if !output.status.success() {
            let what = format!("{} after {:?}\n{text}", output.status, results.last());
            let (test, outcome) = (module.to_owned(), "crashed".to_owned());
            results.push(TestResult { test, outcome, reason: what });
        }
        results
    }

    fn stand_ins(&self) -> PathBuf {
        use std::os::unix::fs::PermissionsExt;
        let dir = self.dir.join("bin");
        std::fs::create_dir_all(&dir).unwrap();
        let rdma = dir.join("rdma");
        if !rdma.exists() {
            std::fs::write(&rdma, "#!/bin/sh\necho '[]'\n").unwrap();
            std::fs::set_permissions(&rdma, std::fs::Permissions::from_mode(0o755)).unwrap();
        }
        dir
    }
}

/// Reads what `run.py` printed; a test that began and did not end crashed.
fn parse(text: &str) -> Vec<TestResult> {
    let mut results: Vec<TestResult> = Vec::new();
    for line in text.lines() {
        // The program may have written something before it, without a line end.
        let Some(at) = line.find("RESULT\t") else { continue };
        let fields: Vec<_> = line[at..].split('\t').collect();
        let [_, outcome, test, reason] = fields[..] else { continue };
        let test = test.strip_prefix("tests.").unwrap_or(test).to_owned();
        let outcome = if outcome == "started" { "crashed" } else { outcome }.to_owned();
        let result = TestResult { test, outcome, reason: reason.to_owned() };
        match results.last_mut().filter(|last| last.test == result.test) {
            Some(last) => *last = result,
            None => results.push(result),
        }
    }
    results
}

#[test]
fn a_test_that_began_and_did_not_end_counts_as_crashed() {
    let text = "RESULT\tstarted\ttests.a.B.c\t\nnoise RESULT\tpassed\ttests.a.B.c\t\nRESULT\tstarted\ttests.a.B.d\t\n";
    let outcomes: Vec<_> = parse(text).into_iter().map(|result| (result.test, result.outcome)).collect();
    let wanted = [("a.B.c", "passed"), ("a.B.d", "crashed")];
    assert_eq!(outcomes, wanted.map(|(test, outcome)| (test.to_owned(), outcome.to_owned())));
}
