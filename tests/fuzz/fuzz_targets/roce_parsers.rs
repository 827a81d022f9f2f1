//! Every parser of `ibex_roce::wire` against arbitrary bytes.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex_roce::fuzz::parsers(bytes);
});
