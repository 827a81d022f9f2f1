//! Entries of the rings in a peer's port memory, as a peer may write them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex_hca::fuzz::shm_entries(bytes);
});
