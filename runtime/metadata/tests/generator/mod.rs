//! Makes Rust from the protos, without a protoc. The result is committed, so that a build of the crate
//! needs neither this nor its dependencies.

use std::path::{Path, PathBuf};

/// A committed file, relative to the crate, and what it should hold.
pub(crate) struct Generated {
    pub(crate) path: &'static str,
    pub(crate) contents: Vec<u8>,
}

/// Everything that is generated, made in `scratch`.
pub(crate) fn generate(scratch: &Path) -> Vec<Generated> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    let compile =
        |file: &str| protox::compile([root.join("proto").join(file)], [root.join("proto")]).unwrap();
    let code = |file: &str, package: &str, with_server: bool| {
        // Sorted maps: the same value has the same bytes.
        let builder = tonic_prost_build::configure().build_transport(false).btree_map(".");
        let builder = builder.emit_rerun_if_changed(false).build_server(with_server);
        builder.out_dir(scratch).compile_fds(compile(file)).unwrap();
        std::fs::read(scratch.join(format!("{package}.rs"))).unwrap()
    };
    let mut compiler = protox::Compiler::new([root.join("proto")]).unwrap();
    for file in ["store.proto", "record.proto", "model_express.proto"] {
        compiler.open_file(file).unwrap();
    }
    let descriptors = compiler.include_imports(true).encode_file_descriptor_set();
    vec![
        Generated { path: "src/grpc/generated.rs", contents: code("store.proto", "ibex.store.v1", true) },
        Generated {
            path: "src/grpc/express/generated.rs",
            contents: code("model_express.proto", "model_express.p2p", true),
        },
        Generated { path: "src/grpc/descriptors.bin", contents: descriptors },
        Generated {
            path: "tests/generated/record.rs",
            contents: code("record.proto", "ibex.metadata.v1", true),
        },
        Generated { path: "src/etcd/generated.rs", contents: code("etcd.proto", "etcdserverpb", false) },
    ]
}
