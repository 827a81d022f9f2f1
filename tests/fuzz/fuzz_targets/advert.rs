//! An advert of a port, as another process may send it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex_hca::fuzz::advert(bytes);
});
