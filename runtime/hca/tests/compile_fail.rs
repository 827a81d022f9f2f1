//! What must not compile: misuse that the types of `host_qp` and `host_memory` rule out.
//!
//! The expected messages are those of the compiler named in `rust-version`; another one words them
//! differently, so there the cases are skipped, and it is said.

use std::process::Command;

#[test]
fn misuse_does_not_compile() {
    let wanted = env!("CARGO_PKG_RUST_VERSION");
    let rustc = std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into());
    let output = Command::new(rustc).arg("--version").output().unwrap();
    let version = String::from_utf8_lossy(&output.stdout).into_owned();
    if !version.starts_with(&format!("rustc {wanted}.")) {
        eprintln!("skipped: compile-fail messages are recorded for rustc {wanted}, this is {version}");
        return;
    }
    trybuild::TestCases::new().compile_fail("tests/compile_fail/*.rs");
}
