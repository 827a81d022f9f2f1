//! Bodies of the fuzz targets of this crate: arbitrary bytes where ranks read what other processes wrote.
//!
//! `tests/fuzz` runs them under cargo-fuzz, the tests below as bounded property tests; both call these functions.
//!
//! What must hold: nothing panics, what is kept stays bounded, and what parses is written and parsed again.

use crate::bootstrap::rendezvous_script;
use crate::recovery::Offer;

/// Reads bytes as a script of what members and strangers send to the rendezvous.
///
/// # Panics
/// PANIC: more is kept of a connection than its limit, or a rank that is taken was given away.
pub fn rendezvous(bytes: &[u8]) {
    rendezvous_script(bytes);
}

/// Reads bytes as an offer of queue pairs.
///
/// # Panics
/// PANIC: an offer that does not survive its own bytes.
pub fn offer(bytes: &[u8]) {
    if let Ok(offer) = Offer::from_bytes(bytes) {
        assert_eq!(Offer::from_bytes(&offer.to_bytes()), Ok(offer), "an offer survives its bytes");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn arbitrary_bytes_hurt_nobody(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
            super::offer(&bytes);
            super::rendezvous(&bytes);
        }
    }
}
