//! A requester against arbitrary answers.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex_roce::fuzz::requester(bytes);
});
