//! The rendezvous, and what members and strangers may send there.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ibex::harness::fuzz::rendezvous(bytes);
});
