//! An offer of queue pairs, as another process may send it.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex::harness::fuzz::offer(bytes);
});
