//! Style as a test: what the house looks like, who may import whom, what is not written here.
//!
//! Every rule answers with what to do instead, and has a sample beside it on which it fires. The
//! rules look at the files that git tracks (and at new ones that it does not ignore), so that a
//! finding is the same on every machine.
#![expect(clippy::unwrap_used, reason = "a tree that cannot be read is a failed test")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "tidy/bans.rs"]
mod bans;
#[path = "tidy/imports.rs"]
mod imports;
#[path = "tidy/packages.rs"]
mod packages;
#[path = "tidy/shape.rs"]
mod shape;
#[path = "tidy/source.rs"]
mod source;

use source::Source;

/// Rooms and files of the top level; a new one is a change of the design.
const TOP_LEVEL: &[&str] = &[
    ".cargo",
    ".ci",
    ".clippy.toml",
    ".config",
    ".gitattributes",
    ".gitignore",
    ".rustfmt.toml",
    "Cargo.lock",
    "Cargo.toml",
    "LICENSE-APACHE",
    "LICENSE-MIT",
    "README.md",
    "benches",
    "build.rs",
    "ffi",
    "kernels",
    "memheap",
    "runtime",
    "tests",
];

/// One place where a rule is broken.
#[derive(Debug)]
struct Finding {
    path: PathBuf,
    /// From 0.
    line: usize,
    what: String,
}

impl Finding {
    fn at(source: &Source, line: usize, what: String) -> Self {
        Self { path: source.path.clone(), line, what }
    }
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Tracked and new files, or none where this is not a git checkout.
fn files() -> Option<Vec<PathBuf>> {
    let listing = Command::new("git")
        .args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .ok()?;
    if !listing.status.success() {
        return None;
    }
    let names = String::from_utf8(listing.stdout).unwrap();
    let files: Vec<PathBuf> = names.split('\0').filter(|name| !name.is_empty()).map(PathBuf::from).collect();
    // A file that git knows but that was just deleted is not there to be read.
    Some(files.into_iter().filter(|file| root().join(file).is_file()).collect())
}

/// All text files, or none (and a line that says so) where this is not a git checkout.
fn sources() -> Vec<Source> {
    let Some(files) = files() else {
        // Straight to stderr: the runner hides what a passing test prints.
        let why = "SKIPPED: this is not a git checkout, nothing says which files belong to it";
        let _ = writeln!(std::io::stderr(), "{why}");
        return Vec::new();
    };
    let read = |path: PathBuf| {
        let text = String::from_utf8(std::fs::read(root().join(&path)).unwrap()).ok()?;
        Some(Source::new(&path, text))
    };
    files.into_iter().filter_map(read).collect()
}

fn report(findings: &[Finding]) {
    for Finding { path, line, what } in findings {
        println!("{}:{}: {what}", path.display(), line + 1);
    }
    assert!(findings.is_empty(), "{} findings, see above", findings.len());
}

fn check_each(check: impl Fn(&Source, &mut Vec<Finding>)) {
    let mut findings = Vec::new();
    for source in &sources() {
        check(source, &mut findings);
    }
    report(&findings);
}

#[test]
fn nothing_banned_is_written() {
    check_each(bans::check);
}

#[test]
fn rooms_import_only_along_the_arrows() {
    check_each(imports::check);
}

#[test]
fn lengths_names_and_reasons_are_in_order() {
    check_each(shape::check);
}

#[test]
fn every_ordering_edge_has_both_ends_and_a_row() {
    let mut findings = Vec::new();
    shape::check_ordering(&sources(), &mut findings);
    report(&findings);
}

#[test]
fn the_top_level_holds_only_the_rooms_of_the_design() {
    let unexpected: Vec<PathBuf> =
        files().unwrap_or_default().into_iter().filter(|file| !is_in_house(file)).collect();
    assert!(unexpected.is_empty(), "not in the list of rooms: {unexpected:?}");
}

fn is_in_house(file: &Path) -> bool {
    let room = file.iter().next().and_then(|room| room.to_str());
    room.is_some_and(|room| TOP_LEVEL.contains(&room))
}

#[test]
fn a_file_outside_the_rooms_is_found() {
    assert!(is_in_house(Path::new("runtime/gpu/mod.rs")));
    assert!(!is_in_house(Path::new("scripts/run.sh")));
    assert!(!is_in_house(Path::new("notes.md")));
}

#[test]
fn every_package_comes_from_crates_io() {
    check_each(|source, findings| {
        if source.path.file_name().is_some_and(|name| name == "Cargo.lock") {
            packages::check_lock(source, findings);
        }
    });
}

#[test]
fn every_licence_is_on_the_list() {
    let metadata = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked", "--offline"])
        .args(["--filter-platform", "x86_64-unknown-linux-gnu"])
        .current_dir(root())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&metadata.stderr);
    assert!(metadata.status.success(), "cargo metadata failed: {said}");
    let mut findings = Vec::new();
    packages::check_licences(&serde_json::from_slice(&metadata.stdout).unwrap(), &mut findings);
    report(&findings);
}
