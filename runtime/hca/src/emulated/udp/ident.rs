//! The IPv4 identification that the kernel writes, as the ICRC sees it.
//!
//! The ICRC covers the identification field, and with a UDP socket the kernel fills that field: 0 on an
//! unconnected socket that never fragments, and 0, 1, 2, … for the datagrams that one segmented send
//! becomes (measured with Linux 6.18, 2026-11-21, on a veth pair; the same rule stands in
//! `ip_select_ident_segs` and `inet_gso_segment`). A sender therefore knows the number that each datagram
//! gets. A checksum is linear: the number is put into an ICRC, or taken out of it, by one XOR with a value
//! that depends on the datagram's length and the number only.
//!
//! *Who owns what.* The table owns one row per length that was asked for; lengths are bounded.

use crc32fast::Hasher;

/// Datagrams that one segmented send may become; the identifications are below it.
pub(super) const SEGMENTS_MAX: u16 = 64;
/// Bits of an identification below [`SEGMENTS_MAX`].
const BITS: usize = SEGMENTS_MAX.trailing_zeros() as usize;
/// Bytes between the identification field and the UDP payload: the rest of the IPv4 header, and UDP's.
const HEADERS_AFTER: usize = 14 + 8;
/// Bytes of the ICRC, which does not cover itself.
const ICRC: usize = 4;

/// What each bit of the identification changes in an ICRC, by length of the UDP payload.
#[derive(Debug, Default)]
pub(super) struct IdentTable {
    /// By length / 4: RoCE packets are padded to words.
    rows: Vec<Option<[u32; BITS]>>,
}

impl IdentTable {
    /// What identification `ident` instead of 0 changes in the ICRC of a UDP payload of `len` bytes.
    pub(super) fn change(&mut self, len: usize, ident: u16) -> u32 {
        if ident == 0 {
            return 0;
        }
        let row = self.row(len);
        (0..BITS).filter(|bit| ident >> bit & 1 == 1).fold(0, |change, bit| change ^ row[bit])
    }

    /// Puts `ident` into the ICRC at the end of a UDP payload that was made for identification 0.
    ///
    /// Putting it in twice takes it out.
    pub(super) fn put(&mut self, payload: &mut [u8], ident: u16) {
        if ident == 0 {
            return;
        }
        let change = self.change(payload.len(), ident);
        if let Some(icrc) = payload.last_chunk_mut::<ICRC>() {
            *icrc = (u32::from_le_bytes(*icrc) ^ change).to_le_bytes();
        }
    }

    /// The identification that explains why an ICRC differs by `difference` from the one for 0.
    ///
    /// `likely` is tried first. `None` if no identification below [`SEGMENTS_MAX`] does.
    pub(super) fn explain(&mut self, len: usize, difference: u32, likely: u16) -> Option<u16> {
        if difference == 0 {
            return Some(0);
        }
        if likely < SEGMENTS_MAX && self.change(len, likely) == difference {
            return Some(likely);
        }
        (1..SEGMENTS_MAX).find(|ident| self.change(len, *ident) == difference)
    }

    fn row(&mut self, len: usize) -> [u32; BITS] {
        let slot = len / 4;
        if slot >= self.rows.len() {
            self.rows.resize(slot + 1, None);
        }
        // A length that is no multiple of four is none of ours; its row is made and not kept.
        if len.is_multiple_of(4) {
            *self.rows[slot].get_or_insert_with(|| make_row(len))
        } else {
            make_row(len)
        }
    }
}

fn make_row(len: usize) -> [u32; BITS] {
    let after = HEADERS_AFTER + len.saturating_sub(ICRC);
    std::array::from_fn(|bit| {
        let changed = crc32fast::hash(&(1_u16 << bit).to_be_bytes()) ^ crc32fast::hash(&[0; 2]);
        // Followed by zero bytes: the linear part of what the rest of the datagram does to it.
        let mut shifted = Hasher::new_with_initial_len(changed, 2);
        shifted.combine(&Hasher::new_with_initial_len(0, after as u64));
        shifted.finalize()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The checksum of a header with this identification and a payload whose last word is not covered.
    fn icrc_of(ident: u16, payload: &[u8]) -> u32 {
        let mut covered = vec![0xff; 8 + 4];
        covered.extend(ident.to_be_bytes());
        covered.extend([0x5a; HEADERS_AFTER]);
        covered.extend(&payload[..payload.len() - ICRC]);
        crc32fast::hash(&covered)
    }

    #[test]
    fn an_identification_is_put_in_and_explained_at_every_length() {
        let mut table = IdentTable::default();
        for len in [16, 20, 72, 1056, 4136, 4139] {
            let mut payload: Vec<u8> = (0..len).map(|at: usize| at.to_le_bytes()[0]).collect();
            let plain = icrc_of(0, &payload);
            for ident in [0, 1, 2, 3, 31, 63] {
                let wanted = icrc_of(ident, &payload);
                payload[len - 4..].copy_from_slice(&plain.to_le_bytes());
                table.put(&mut payload, ident);
                assert_eq!(payload[len - 4..], wanted.to_le_bytes(), "{len} bytes, {ident}");
                for likely in [ident, 7, u16::MAX] {
                    assert_eq!(table.explain(len, plain ^ wanted, likely), Some(ident));
                }
                assert_eq!(table.explain(len, plain ^ wanted ^ 0x1000, ident), None);
            }
        }
    }
}
