//! The CUDA image that `build.rs` made of `kernels/`, embedded in the library.
//!
//! Owns static bytes. Invariant: empty exactly when the build had no nvcc; [`note`] says which one built
//! it, or why there is none.

/// `cuModuleLoadData` reads structures from the image in place.
#[repr(C, align(64))]
struct Aligned<Bytes: ?Sized>(Bytes);

static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/ibex.fatbin")));

/// The fat binary: sm_80, sm_90a, sm_100a and PTX for compute_90. Empty without nvcc.
pub fn bytes() -> &'static [u8] {
    &IMAGE.0
}

/// How the image came about: "built by PATH", or "empty: REASON".
pub fn note() -> &'static str {
    env!("IBEX_CUDA_IMAGE")
}
