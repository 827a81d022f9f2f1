//! The committed code is what the protos say.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::path::Path;

#[path = "generator/mod.rs"]
mod generator;

#[test]
fn committed_code_is_made_from_the_committed_protos() {
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR")).join("generated");
    std::fs::create_dir_all(&scratch).unwrap();
    for file in generator::generate(&scratch) {
        let committed = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(file.path)).unwrap();
        let hint = "run `cargo run -p ibex-metadata --example generate`";
        assert!(committed == file.contents, "{} is not current: {hint}", file.path);
    }
}
