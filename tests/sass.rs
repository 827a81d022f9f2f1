//! What nvcc makes of the kernels is not worse than the committed table, and within the limits of the design.
//!
//! benches/sass.py measures and judges; benches/results/sass-*.json is the table, of which the newest counts.
//! Without nvcc, cuobjdump or python3 there is nothing to measure: the test skips.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use ibex::gpu::image;
use serde_json::{Value, json};

mod rig;

/// sass.py's exit status where it finds no compiler.
const NO_COMPILER: i32 = 77;

fn sass(args: &[&Path]) -> std::io::Result<Output> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut command = Command::new("python3");
    command.arg(root.join("benches/sass.py")).args(args);
    // The compiler that the build found, wherever this test runs.
    if let Some(nvcc) = image::note().strip_prefix("built by ") {
        command.args(["--nvcc", nvcc]);
    }
    command.current_dir(root).output()
}

/// The newest committed table.
fn committed() -> PathBuf {
    let results = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/results");
    let entries = fs::read_dir(results).unwrap().map(|entry| entry.unwrap().path());
    let is_table = |path: &PathBuf| {
        let name = path.file_name().unwrap().to_string_lossy();
        name.starts_with("sass-") && name.ends_with(".json")
    };
    entries.filter(is_table).max().expect("a table is committed")
}

/// Measures into a file of its own, or says why it cannot.
fn measure() -> Result<PathBuf, String> {
    if image::bytes().is_empty() {
        return Err(format!("the CUDA image is {}", image::note()));
    }
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("sass.json");
    // The target that the limits speak of; the table has others, for people.
    let output = sass(&["--targets".as_ref(), "sm_90a".as_ref(), "--save".as_ref(), &file])
        .map_err(|error| format!("python3: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    match output.status.code() {
        Some(0) => Ok(file),
        Some(NO_COMPILER) => Err(text.trim().trim_start_matches("SKIPPED: ").into()),
        _ => panic!("sass.py failed:\n{text}{}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// Judges measured figures against a table: what is worse, or nothing.
fn judge(measured: &Path, table: &Path) -> Result<(), String> {
    let output = sass(&["--measured".as_ref(), measured, "--check".as_ref(), table]).unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for line in text.lines().filter_map(|line| line.strip_prefix("SKIPPED: ")) {
        rig::say_skipped(line);
    }
    match output.status.code() {
        Some(0) => Ok(()),
        Some(1) => Err(text),
        _ => panic!("sass.py failed:\n{text}{}", String::from_utf8_lossy(&output.stderr)),
    }
}

/// The same file with one figure changed.
fn altered(file: &Path, name: &str, kernel: &str, figure: &str, change: impl Fn(u64) -> u64) -> PathBuf {
    let mut report: Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
    let place = &mut report["targets"]["sm_90a"][kernel][figure];
    *place = json!(change(place.as_u64().unwrap()));
    let copy = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    fs::write(&copy, report.to_string()).unwrap();
    copy
}

#[test]
fn no_kernel_is_worse_than_committed_or_over_its_limit() {
    match measure() {
        Ok(measured) => judge(&measured, &committed()).unwrap_or_else(|found| panic!("{found}")),
        Err(why) => rig::say_skipped(&format!("no SASS to count: {why}")),
    }
}

/// Can the script run at all? Says so if not.
fn has_python() -> bool {
    let found = Command::new("python3").arg("--version").output().is_ok();
    if !found {
        rig::say_skipped("no python3 to run benches/sass.py");
    }
    found
}

#[test]
fn one_instruction_more_is_found() {
    if !has_python() {
        return;
    }
    let table = committed();
    let more = altered(&table, "sass-more.json", "combine_exact", "sass", |n| n + 1);
    let found = judge(&more, &table).unwrap_err();
    assert!(found.contains("sm_90a combine_exact: sass"), "{found}");
    judge(&table, &more).unwrap();
}

#[test]
fn a_limit_holds_whatever_is_committed() {
    if !has_python() {
        return;
    }
    for (kernel, figure, beyond) in [
        ("dispatch_fp8", "spill_load", 4),
        ("combine_reduced", "registers", 65),
        ("probe_post_warp", "registers", 33),
        ("probe_post_warp", "sass", 131),
        ("probe_post_one", "cas", 1),
        ("probe_wqe", "sass", 91),
        ("probe_copy", "narrow", 1),
        ("expert", "non_coherent", 1),
    ] {
        let over = altered(&committed(), "sass-over.json", kernel, figure, |_| beyond);
        let found = judge(&over, &over).unwrap_err();
        assert!(found.contains(&format!("{kernel}: {figure} {beyond}, limit")), "{found}");
    }
}
