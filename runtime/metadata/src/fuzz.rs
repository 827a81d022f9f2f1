//! The body of a fuzz target: arbitrary bytes against the decoder of records.
//!
//! `tests/fuzz` runs it under cargo-fuzz, `tests/encoding.rs` as a bounded property test.

use crate::error::StoreError;
use crate::record::PeerRecord;

/// Decodes bytes; what decodes is a record that keeps the rules, and stays the same from then on. Says
/// whether it was one.
///
/// # Panics
/// When that is not so.
#[must_use]
pub fn record(bytes: &[u8]) -> bool {
    let Ok(record) = PeerRecord::decode(bytes) else { return false };
    let again = match record.encode() {
        Ok(again) => again,
        Err(error) => {
            // What was read may take more room in the present encoding; every other rule was checked.
            assert!(matches!(error, StoreError::TooLarge { .. }), "decoded, and refused: {error}");
            return true;
        }
    };
    assert_eq!(PeerRecord::decode(&again).as_ref(), Ok(&record));
    assert_eq!(record.encode().as_ref(), Ok(&again), "one record, one encoding");
    true
}
