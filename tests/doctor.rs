//! `ibex doctor` against described machines, from one with everything to one with nothing.
//!
//! `tests/doctor/NAME.json` describes a machine as `ibex doctor --json` records one (these were composed: no such
//! machine was at hand); `NAME.txt` is the whole answer that it must get, with the exit code in the first line.
//! `IBEX_BLESS=1` writes the answers anew, to be read in the diff.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn ibex(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ibex")).arg("doctor").args(args).output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

fn described() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/doctor");
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<PathBuf> =
        files.filter(|path| path.extension().is_some_and(|end| end == "json")).collect();
    files.sort();
    files
}

/// What depends on the build and not on the machine: whether kernels for GPUs were compiled in.
fn without_the_build(answer: &str) -> String {
    let mut lines = answer.lines();
    let mut kept = String::new();
    while let Some(line) = lines.next() {
        if line.contains("this build has no kernels for GPUs") {
            // Its cost and what mends it.
            lines.by_ref().take(2).for_each(drop);
        } else {
            kept += line;
            kept.push('\n');
        }
    }
    kept
}

#[test]
fn every_described_machine_gets_its_answer() {
    let files = described();
    assert!(files.len() >= 9, "{files:?}");
    for file in files {
        let output = ibex(&["--machine", file.to_str().unwrap()]);
        assert_eq!(text(&output.stderr), "", "{}", file.display());
        let code = output.status.code().unwrap();
        let answer = format!("exit code {code}\n{}", without_the_build(&text(&output.stdout)));
        let expected = file.with_extension("txt");
        if std::env::var_os("IBEX_BLESS").is_some() {
            fs::write(&expected, &answer).unwrap();
        }
        assert_eq!(answer, fs::read_to_string(&expected).unwrap(), "{}", file.display());
    }
}

#[test]
fn this_machine_is_judged_and_its_report_can_be_judged_again() {
    let report = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("doctor.json");
    let first = ibex(&["--json", report.to_str().unwrap()]);
    assert!(matches!(first.status.code(), Some(0 | 1 | 3)), "{first:?}");
    assert!(text(&first.stdout).contains("the emulator will serve"), "{}", text(&first.stdout));
    let again = ibex(&["--machine", report.to_str().unwrap()]);
    assert_eq!((again.status.code(), text(&again.stdout)), (first.status.code(), text(&first.stdout)));
    let value: Value = serde_json::from_str(&fs::read_to_string(report).unwrap()).unwrap();
    let mut keys: Vec<&String> = value.as_object().unwrap().keys().collect();
    keys.sort_unstable();
    assert_eq!(keys, ["findings", "machine", "severity", "verdict"]);
}

#[test]
fn the_shape_decides_how_much_memory_must_be_locked() {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/doctor/fresh-server.json");
    let file = file.to_str().unwrap();
    assert!(text(&ibex(&["--machine", file]).stdout).contains("blocker  host"));
    let small = [
        "--machine",
        file,
        "--ranks",
        "2",
        "--tokens",
        "8",
        "--hidden",
        "256",
        "--experts",
        "8",
        "--topk",
        "2",
    ];
    let answer = text(&ibex(&small).stdout);
    assert!(!answer.contains("blocker  host") && answer.contains("warning  host"), "{answer}");
}

#[test]
fn refusals_are_explained() {
    let answer = ibex(&[
        "--explain",
        "INIT2RTR_QP(0x503) op_mod(0x0) failed, status bad parameter(0x3), syndrome (0x1)",
    ]);
    assert_eq!(answer.status.code(), Some(0));
    assert!(text(&answer.stdout).contains("GID index"), "{}", text(&answer.stdout));
    assert!(text(&ibex(&["--explain", "cqe 0x15 0x81"]).stdout).contains("UDP 4791"));
}

#[test]
fn bad_requests_are_refused_in_one_line() {
    for (args, words) in [
        (&["--explain", "nonsense"][..], "not understood"),
        (&["--machine", "no-such-file"], "no-such-file"),
        (&["--machine", concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.toml")], "Cargo.toml"),
        (&["--machine", "a", "--explain", "b"], "cannot be used with"),
        (&["--topk", "33"], "max_topk"),
        (&["--json", "no/such/dir/file"], "cannot write"),
    ] {
        let output = ibex(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {said}");
        assert!(said.contains(words) && said.lines().count() == 1, "{args:?}: {said}");
    }
}
