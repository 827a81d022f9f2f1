//! Bodies of this crate's fuzz targets: arbitrary bytes where a device reads what other processes wrote.
//!
//! `tests/fuzz` runs them under cargo-fuzz; property tests beside the parsers call the same functions.
//!
//! What must hold: nothing panics, and what parses stays within its limits and survives being written again.

use crate::emulated;

/// Opens bytes as adverts of every kind.
///
/// # Panics
/// PANIC: an advert that does not survive its own bytes.
pub fn advert(bytes: &[u8]) {
    emulated::open_arbitrary_advert(bytes);
}

/// Parses bytes as entries of the rings in a peer's port memory.
///
/// # Panics
/// PANIC: an entry that parses though it leaves its message or its slot.
pub fn shm_entries(bytes: &[u8]) {
    emulated::parse_arbitrary_entries(bytes);
}
