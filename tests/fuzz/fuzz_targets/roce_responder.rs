//! A responder against arbitrary requests.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex_roce::fuzz::responder(bytes);
});
