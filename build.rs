//! Compiles `kernels/`: always for the host, and into one CUDA fat binary where nvcc is found. Decides
//! nothing else.
//!
//! The host objects are the SIMT runtime (`kernels/host/*.cpp`) and every kernel (`kernels/src/*.cu`),
//! built with the C++ compiler that `CXX` names (default: g++ >= 12). The fat binary is
//! `$OUT_DIR/ibex.fatbin`: sm_80, sm_90a and sm_100a code and PTX for compute_90. Without nvcc it is empty,
//! everything else works, and `IBEX_CUDA_IMAGE` (read by `runtime/gpu/image.rs`) says why.
//!
//! nvcc is looked for in `$CUDA_HOME/bin`, on `PATH`, and in the pip wheels
//! (`<site-packages>/nvidia/cu13/bin`). `IBEX_NVCC=off` leaves it out, `IBEX_NVCC=<path>` names one.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// `-gencode` pairs: code for the supported parts, and PTX for what comes after them.
const TARGETS: [&str; 4] = [
    "arch=compute_80,code=sm_80",
    "arch=compute_90a,code=sm_90a",
    "arch=compute_100a,code=sm_100a",
    "arch=compute_90,code=compute_90",
];

fn main() {
    let kernels = PathBuf::from("kernels");
    for dir in ["include", "src", "host"] {
        println!("cargo:rerun-if-changed={}", kernels.join(dir).display());
    }
    for var in ["IBEX_NVCC", "CUDA_HOME"] {
        println!("cargo:rerun-if-env-changed={var}");
    }
    let sources = files(&kernels.join("src"), "cu");
    build_host(&kernels, &sources);

    let out_dir = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let image = out_dir.join("ibex.fatbin");
    let note = match find_nvcc() {
        Ok(nvcc) => build_cuda(&nvcc, &sources, &out_dir, &image),
        Err(why) => Err(why),
    };
    let note = note.unwrap_or_else(|why| {
        fs::write(&image, []).expect("OUT_DIR is writable");
        println!("cargo:warning=the CUDA image is empty: {why}");
        format!("empty: {why}")
    });
    println!("cargo:rustc-env=IBEX_CUDA_IMAGE={note}");
}

fn build_host(kernels: &Path, sources: &[PathBuf]) {
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .opt_level(3)
        .debug(false)
        // Kernels are judged by their speed and read by addr2line, whatever the Rust profile is.
        .flags(["-g1", "-march=x86-64-v3", "-fno-strict-aliasing"])
        // A multiply and an add round separately unless the source says fma: results are compared bit for
        // bit.
        .flag("-ffp-contract=off")
        .include(kernels)
        .include(kernels.join("include"))
        .files(files(&kernels.join("host"), "cpp"))
        .files(sources)
        .flags(["-x", "c++"])
        .compile("ibex_host_kernels");
}

/// One translation unit that includes every kernel, so that one image serves one `cuModuleLoadData`.
fn build_cuda(nvcc: &Path, sources: &[PathBuf], out_dir: &Path, image: &Path) -> Result<String, String> {
    let note = format!("built by {}", nvcc.display());
    let unit = out_dir.join("ibex.cu");
    let root = env::current_dir().expect("cargo sets a working directory");
    let line = |path: &PathBuf| format!("#include \"{}\"\n", root.join(path).display());
    let text = format!("// {note}\n{}", sources.iter().map(line).collect::<String>());
    if fs::read_to_string(&unit).is_ok_and(|old| old == text) && is_fresh(&unit, image) {
        return Ok(note);
    }
    let _ = fs::remove_file(image);
    fs::write(&unit, text).expect("OUT_DIR is writable");
    let mut command = Command::new(nvcc);
    // fmad: as -ffp-contract above. threads: one of the targets each.
    command.args(["-std=c++20", "-O3", "-fmad=false", "-lineinfo"]);
    command.args(["--threads", "0", "-fatbin", "-I", "kernels/include", "-o"]);
    command.arg(image).arg(&unit);
    for target in TARGETS {
        command.args(["-gencode", target]);
    }
    let output = command.output().map_err(|e| format!("{}: {e}", nvcc.display()))?;
    let log = String::from_utf8_lossy(&output.stderr);
    // A kernel that nvcc refuses is a bug, not a machine without CUDA.
    assert!(output.status.success(), "nvcc failed:\n{log}");
    for line in log.lines() {
        println!("cargo:warning={line}");
    }
    Ok(note)
}

/// Was the image begun (when `unit` was written) after the last change of what goes into it? Edits of the
/// host runtime alone do not cost an nvcc run.
fn is_fresh(unit: &Path, image: &Path) -> bool {
    let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
    let Some(begun) = modified(unit) else {
        return false;
    };
    let dirs = ["src", "include/ibex", "include/ibex/detail"].map(|dir| Path::new("kernels").join(dir));
    let mut inputs = dirs.iter().flat_map(fs::read_dir).flatten().flatten();
    fs::metadata(image).is_ok_and(|m| m.len() > 0)
        && inputs.all(|entry| modified(&entry.path()).is_some_and(|time| time < begun))
        && modified(Path::new("build.rs")).is_some_and(|time| time < begun)
}

fn find_nvcc() -> Result<PathBuf, String> {
    match env::var("IBEX_NVCC") {
        Ok(off) if off == "off" => return Err("IBEX_NVCC=off".into()),
        Ok(path) if Path::new(&path).is_file() => return Ok(path.into()),
        Ok(path) => return Err(format!("IBEX_NVCC={path} is no file")),
        Err(_) => {}
    }
    let home = env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin"));
    let path = env::var_os("PATH").unwrap_or_default();
    let dirs = home.into_iter().chain(env::split_paths(&path)).chain(wheel_dirs());
    dirs.map(|dir| dir.join("nvcc")).find(|nvcc| nvcc.is_file()).ok_or_else(|| "no nvcc found".into())
}

/// Where pip puts nvcc, as far as the python3 on the path knows.
fn wheel_dirs() -> Vec<PathBuf> {
    let script = "import site; print('\\n'.join(site.getsitepackages() + [site.getusersitepackages()]))";
    let Ok(output) = Command::new("python3").args(["-c", script]).output() else {
        return Vec::new();
    };
    let dirs = String::from_utf8_lossy(&output.stdout).into_owned();
    dirs.lines().map(|dir| Path::new(dir).join("nvidia/cu13/bin")).collect()
}

fn files(dir: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let mut found: Vec<PathBuf> = entries.map(|e| e.expect("readable directory").path()).collect();
    found.retain(|path| path.extension() == Some(OsStr::new(extension)));
    found.sort();
    found
}
