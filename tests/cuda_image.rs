//! The CUDA image: every kernel for every target, and no load that could return stale bytes.
//!
//! Reads the SASS with cuobjdump. Without nvcc the image is empty, without cuobjdump nobody can read it;
//! both skip.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use ibex::gpu::image;
use ibex::gpu::pool::kernel_name;

mod rig;

/// The SASS of the image, or why there is none to look at.
fn sass() -> Result<String, String> {
    if image::bytes().is_empty() {
        return Err(format!("the image is {}", image::note()));
    }
    let nvcc = Path::new(image::note().trim_start_matches("built by "));
    let beside = nvcc.with_file_name("cuobjdump");
    let tool = if beside.is_file() { beside } else { PathBuf::from("cuobjdump") };
    let file = Path::new(env!("CARGO_TARGET_TMPDIR")).join("image.fatbin");
    fs::write(&file, image::bytes()).unwrap();
    match Command::new(&tool).arg("-sass").arg(&file).output() {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).into_owned()),
        Ok(output) => Err(String::from_utf8_lossy(&output.stderr).into_owned()),
        Err(error) => Err(format!("{}: {error}", tool.display())),
    }
}

#[test]
fn every_kernel_is_in_the_image_and_reads_coherently() {
    let sass = match sass() {
        Ok(sass) => sass,
        Err(why) => {
            rig::say_skipped(&format!("no SASS to look at: {why}"));
            return;
        }
    };
    for target in ["sm_80", "sm_90a", "sm_100a"] {
        let of_target = |line: &&str| line.contains(&format!("code for {target}"));
        assert!(sass.lines().any(|line| of_target(&line)), "no code for {target}");
    }
    for name in (0..64).filter_map(kernel_name) {
        let function = format!("Function : ibex_{name}");
        let found = sass.lines().filter(|line| line.trim_end().ends_with(&function)).count();
        assert_eq!(found, 3, "{name} is not there once per target");
    }
    // The non-coherent path (`ld.global.nc`) shows as `.CONSTANT` in SASS. A kernel's peers write what it
    // reads.
    let stale: Vec<&str> = sass.lines().filter(|line| line.contains(".CONSTANT")).collect();
    assert!(stale.is_empty(), "{} non-coherent loads, first: {}", stale.len(), stale[0]);
}
