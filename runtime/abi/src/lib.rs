//! Bytes both sides agree on.
