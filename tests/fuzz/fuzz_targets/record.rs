//! The decoder of records against arbitrary bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let _ = ibex_metadata::fuzz::record(bytes);
});
