//! Writes the code that is made from `proto/`: `cargo run -p ibex-metadata --example generate`.

#![expect(clippy::unwrap_used, reason = "a developer's tool: a failure is the message")]

use std::path::Path;

#[path = "../tests/generator/mod.rs"]
mod generator;

fn main() {
    let scratch = std::env::temp_dir().join(format!("ibex-generate-{}", std::process::id()));
    std::fs::create_dir_all(&scratch).unwrap();
    for file in generator::generate(&scratch) {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(file.path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, file.contents).unwrap();
    }
    std::fs::remove_dir_all(scratch).unwrap();
}
