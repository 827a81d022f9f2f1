//! Builds the C++ rig of `kernels/host/tsan`: the same kernels on lane fibers, plain or under
//! ThreadSanitizer.
//!
//! A build lands in cargo's temporary directory and is kept while it is newer than every file in `kernels/`.

#![allow(dead_code, reason = "each test binary uses one of the flavors")]

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::SystemTime;

/// Says why a test skipped, straight to stderr: the runner hides what a passing test prints.
pub(crate) fn say_skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// How the rig is compiled.
#[derive(Clone, Copy)]
pub(crate) enum Flavor {
    /// g++ (or `CXX`), no sanitizer.
    Plain,
    /// clang-19 with ThreadSanitizer in kernels and cases, not in the SIMT runtime itself.
    ThreadSanitizer,
}

const COMMON: [&str; 6] = [
    "-DIBEX_LANE_FIBERS",
    "-std=c++20",
    "-g1",
    "-march=x86-64-v3",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
];

/// The rig's path, or why this machine cannot build it.
pub(crate) fn build(flavor: Flavor) -> Result<PathBuf, String> {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
    let name = match flavor {
        Flavor::Plain => "rig-lane",
        Flavor::ThreadSanitizer => "rig-tsan",
    };
    let rig = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    check_compiler(flavor)?;
    if modified(&rig).is_some_and(|built| built > newest(&kernels)) {
        return Ok(rig);
    }
    // Entry points for tests of the default build, not part of the runtime.
    let mut runtime = files(&kernels.join("host"), "cpp");
    runtime.retain(|path| path.file_name() != Some(OsStr::new("rows.cpp")));
    let cases = files(&kernels.join("host/tsan"), "cpp");
    let sources = files(&kernels.join("src"), "cu");
    let object = rig.with_extension("runtime.o");
    let compiler = |sanitized: bool| {
        let mut command = compiler(flavor, sanitized);
        command.arg("-I").arg(&kernels).arg("-I").arg(kernels.join("include"));
        command
    };
    // One relocatable object of the runtime, which the sanitizer must not see.
    let unit = rig.with_extension("runtime.cpp");
    let includes = runtime.iter().map(|path| format!("#include \"{}\"\n", path.display()));
    fs::write(&unit, includes.collect::<String>()).unwrap();
    run(compiler(false).arg("-c").arg(&unit).arg("-o").arg(&object));
    let mut link = compiler(true);
    link.args(cases).args(["-x", "c++"]).args(sources);
    run(link.args(["-x", "none"]).arg(&object).args(["-lpthread", "-ldl", "-o"]).arg(&rig));
    Ok(rig)
}

/// Runs a case.
pub(crate) fn run_case(rig: &Path, args: &[&str]) -> Output {
    Command::new(rig).args(args).output().unwrap()
}

fn compiler(flavor: Flavor, sanitized: bool) -> Command {
    let mut command = match flavor {
        Flavor::Plain => Command::new(std::env::var_os("CXX").unwrap_or_else(|| "g++".into())),
        Flavor::ThreadSanitizer => Command::new("clang++-19"),
    };
    command.args(COMMON);
    match flavor {
        Flavor::Plain => command.arg("-O1"),
        Flavor::ThreadSanitizer => command.args(["-O1", "-DIBEX_TSAN"]),
    };
    if sanitized && matches!(flavor, Flavor::ThreadSanitizer) {
        // A memcpy that is expanded in line would move bytes unseen.
        command.args(["-fsanitize=thread", "-fno-builtin-memcpy"]);
    }
    command
}

/// Compiles, links and runs an empty program: is everything installed that the rig needs?
fn check_compiler(flavor: Flavor) -> Result<(), String> {
    let probe = Path::new(env!("CARGO_TARGET_TMPDIR")).join("rig-probe");
    let probe = probe.with_extension(if matches!(flavor, Flavor::Plain) { "lane" } else { "tsan" });
    let source = probe.with_extension("cpp");
    fs::write(&source, "int main() { return 0; }\n").unwrap();
    let mut command = compiler(flavor, true);
    command.arg(&source).arg("-o").arg(&probe);
    let tool = command.get_program().to_string_lossy().into_owned();
    match command.output() {
        Err(error) => return Err(format!("{tool}: {error}")),
        Ok(output) if !output.status.success() => {
            return Err(format!("{tool}: {}", String::from_utf8_lossy(&output.stderr)));
        }
        Ok(_) => {}
    }
    match Command::new(&probe).status() {
        Ok(status) if status.success() => Ok(()),
        other => Err(format!("{tool}: an empty program does not run here: {other:?}")),
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}\n{}", String::from_utf8_lossy(&output.stderr));
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    found.retain(|path| path.extension() == Some(OsStr::new(extension)));
    found.sort();
    found
}

fn modified(path: &Path) -> Option<SystemTime> {
    fs::metadata(path).and_then(|m| m.modified()).ok()
}

/// When anything below `dir` was last changed.
fn newest(dir: &Path) -> SystemTime {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let times = entries.map(|path| if path.is_dir() { newest(&path) } else { modified(&path).unwrap() });
    times.max().unwrap_or(SystemTime::UNIX_EPOCH)
}
