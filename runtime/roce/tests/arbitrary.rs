//! Arbitrary bytes against parsers and state machines: the bodies of the fuzz targets, bounded.

use ibex_roce::fuzz;
use proptest::collection::vec;
use proptest::prelude::*;

/// Scripts that never get anywhere would prove nothing.
#[test]
fn scripts_get_somewhere() {
    let (mut state, mut executed, mut completed) = (1_u64, 0, 0);
    for _ in 0..2000 {
        let script: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            state.to_be_bytes()[0]
        })
        .take(600)
        .collect();
        executed += fuzz::responder(&script);
        completed += fuzz::requester(&script);
    }
    println!("{executed} requests carried out, {completed} messages completed");
    assert!(executed > 1000 && completed > 1000, "{executed} carried out, {completed} completed");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, ..ProptestConfig::default() })]

    #[test]
    fn parsers_take_any_bytes(bytes in vec(any::<u8>(), 0..96)) {
        fuzz::parsers(&bytes);
    }

    #[test]
    fn parsers_take_nearly_right_bytes(
        bytes in vec(any::<u8>(), 0..64), opcode in 0..0x16_u8, ether in 0..3_usize,
    ) {
        let mut bytes = bytes;
        if let [first, second, ..] = &mut bytes[..] {
            (*first, *second) = (opcode, *second & 0xf0);
        }
        fuzz::parsers(&bytes);
        let header: [&[u8]; 3] = [
            &[0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0x08, 0x00, 0x45, 0],
            &[0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 1, 0x86, 0xdd, 0x60, 0],
            &[0x60, 0, 0, 0, 0, 24, 17],
        ];
        fuzz::parsers(&[header[ether], &bytes[..]].concat());
    }

    #[test]
    fn a_responder_takes_any_script(bytes in vec(any::<u8>(), 0..1500)) {
        fuzz::responder(&bytes);
    }

    #[test]
    fn a_requester_takes_any_script(bytes in vec(any::<u8>(), 0..1500)) {
        fuzz::requester(&bytes);
    }
}
