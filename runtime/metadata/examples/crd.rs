//! Writes `crd/ibexentries.yaml`: `cargo run -p ibex-metadata --features k8s --example crd`.

#![expect(clippy::unwrap_used, reason = "a developer's tool: a failure is the message")]

use std::path::Path;

fn main() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("crd/ibexentries.yaml");
    std::fs::write(path, ibex_metadata::k8s::crd_yaml().unwrap()).unwrap();
}
