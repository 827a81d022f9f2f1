//! Host and kernels agree on every byte they share: sizes and field offsets of both compilers, side by side.
//!
//! The C++ side's table is `kernels/src/abi_parity.cu`, as the host compiler sees `args.h`; nvcc checks the same
//! header through the static assertions in it.

#![expect(unsafe_code, reason = "the other side's table is read through a C interface")]
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use core::ffi::{CStr, c_char};
use std::collections::BTreeMap;

// The kernels' objects come with the library.
use ibex as _;
use ibex_abi::device_ctx::layout_table;

unsafe extern "C" {
    fn ibex_abi_entries() -> u64;
    fn ibex_abi_name(index: u64) -> *const c_char;
    fn ibex_abi_value(index: u64) -> u64;
}

/// The table as the C++ compiler made it.
fn kernel_table() -> BTreeMap<String, u64> {
    // SAFETY: the function takes nothing and reads a constant.
    let entries = unsafe { ibex_abi_entries() };
    (0..entries)
        .map(|index| {
            // SAFETY: the index is below the table's length; the name is a string literal of the C++ side.
            let name = unsafe { CStr::from_ptr(ibex_abi_name(index)) };
            // SAFETY: as above.
            let value = unsafe { ibex_abi_value(index) };
            (name.to_str().unwrap().to_owned(), value)
        })
        .collect()
}

#[test]
fn both_sides_lay_out_every_shared_structure_alike() {
    let host: BTreeMap<String, u64> =
        layout_table().into_iter().map(|(name, value)| (name, value as u64)).collect();
    let kernels = kernel_table();
    assert!(host.len() > 200, "{} entries: the table is not complete", host.len());
    let only_one: Vec<_> = host
        .iter()
        .filter(|(name, value)| kernels.get(*name) != Some(value))
        .chain(kernels.iter().filter(|(name, _)| !host.contains_key(*name)))
        .map(|(name, value)| (name, value, host.get(name), kernels.get(name)))
        .collect();
    assert!(only_one.is_empty(), "(name, value, host, kernels): {only_one:#?}");
}
