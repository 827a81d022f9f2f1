//! Bytes from independent sources, decoded to what they mean and encoded back.
//!
//! The files in `tests/golden` say where they come from. Each is read to its last line: a line that
//! no test understands fails, so that nothing in them goes unread.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message of a test")]

mod golden {
    mod facts;
    mod fields;
    mod prm;
    mod text;
    mod wqe;
}
