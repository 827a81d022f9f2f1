//! The invariant CRC of IPv4 packets whose identification the receiver cannot see.
//!
//! The CRC covers the identification, and senders differ in it: some always send 0, some count, Linux
//! soft-RoCE draws it. A UDP socket does not show it. But a CRC is linear: an identification that is off by
//! `x` changes the CRC by `x` times a power of the CRC's polynomial ring that depends on the packet's length
//! alone. Dividing the difference by that power gives `x` back, if nothing but the identification differs:
//! of the 32 bits found, 16 then are zero.
//!
//! So a packet that is damaged elsewhere passes with a probability of 2^-16, not 2^-32; UDP's own checksum
//! is checked besides, where the sender filled it in.
//!
//! *Who owns what.* Nothing but one remembered power; nothing allocates.

use super::{Flow, Ips, WireError};

/// The CRC's polynomial, lowest power in the highest bit.
const POLYNOMIAL: u32 = 0xedb8_8320;
/// The power 0.
const ONE: u32 = 0x8000_0000;
/// Bytes of an IPv4 header from its identification on, and of a UDP header.
const FROM_ID_LEN: usize = 16 + 8;

/// Opens packets without being told their IPv4 identification.
///
/// One per receiver: it remembers the power of the last packet length, since bulk traffic has one.
#[derive(Debug, Clone, Default)]
pub struct HiddenId {
    last: Option<(usize, u32)>,
}

impl HiddenId {
    /// Checks the invariant CRC of a UDP payload and takes it off; `flow` may have a wrong identification.
    ///
    /// Also gives the flow with the identification that the sender used.
    ///
    /// # Errors
    /// [`WireError::Icrc`] if no identification makes the CRC right, [`WireError::TooShort`].
    pub fn open<'a>(&mut self, flow: &Flow, datagram: &'a [u8]) -> Result<(&'a [u8], Flow), WireError> {
        let error = match flow.open(datagram) {
            Ok(packet) => return Ok((packet, *flow)),
            Err(error) => error,
        };
        let (WireError::Icrc { found, computed }, Ips::V4 { id, .. }) = (error, flow.ips) else {
            return Err(error);
        };
        // The CRC's own four bytes are not covered.
        let covered_len = FROM_ID_LEN + datagram.len() - super::ICRC_LEN;
        let difference = multiply(found ^ computed, self.inverse(covered_len));
        // The first byte on the wire stands in the lowest bits.
        let Ok(difference) = u16::try_from(difference) else { return Err(error) };
        let flow = flow.with_id(id ^ difference.swap_bytes());
        Ok((flow.open(datagram)?, flow))
    }

    /// `x^(-8 * len)`.
    fn inverse(&mut self, len: usize) -> u32 {
        match self.last {
            Some((last_len, power)) if last_len == len => power,
            _ => {
                let power = inverse_power(len);
                self.last = Some((len, power));
                power
            }
        }
    }
}

/// The product of two remainders.
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut product, mut shifted, mut power) = (0, b, ONE);
    while power != 0 {
        if a & power != 0 {
            product ^= shifted;
        }
        let carry = if shifted & 1 != 0 { POLYNOMIAL } else { 0 };
        shifted = (shifted >> 1) ^ carry;
        power >>= 1;
    }
    product
}

/// `x^(-8 * len)`, by squaring.
const fn inverse_power(len: usize) -> u32 {
    let (mut power, mut square, mut rest) = (ONE, PER_BYTE, len);
    while rest != 0 {
        if rest & 1 != 0 {
            power = multiply(power, square);
        }
        square = multiply(square, square);
        rest >>= 1;
    }
    power
}

/// `x^-8`.
const PER_BYTE: u32 = {
    // What times x is 1: the polynomial without its lowest term, divided by x.
    let inverse = ((POLYNOMIAL ^ ONE) << 1) | 1;
    let squared = multiply(inverse, inverse);
    let fourth = multiply(squared, squared);
    multiply(fourth, fourth)
};

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 2));
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 0, 1));

    fn flow() -> Flow {
        Flow::new(HERE, THERE, 0xd353).unwrap()
    }

    /// A datagram of this many bytes on the flow, with an arbitrary but fixed content.
    fn datagram(flow: &Flow, len: usize) -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..len).map(|i| (i * 37 % 256) as u8).collect();
        flow.seal(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn every_identification_is_found_at_every_length() {
        let mut hidden = HiddenId::default();
        for id in (0..=u16::MAX).step_by(257).chain([1, 2, 3, 0x8000]) {
            let sent = flow().with_id(id);
            let bytes = datagram(&sent, 16 + 4 * usize::from(id % 1100));
            let (packet, found) = hidden.open(&flow(), &bytes).unwrap();
            assert_eq!((packet, found), (&bytes[..bytes.len() - 4], sent));
        }
    }

    #[test]
    fn an_acknowledgement_of_linux_gives_its_identification_away() {
        // From Debian's 6.1 rxe in a guest: 10.77.0.2:54099 to 10.77.0.1, identification 0x9a68.
        let bytes = [
            0x11, 0x00, 0xff, 0xff, 0x00, 0x00, 0x01, 0x23, 0x00, 0x00, 0x00, 0x64, 0x1f, 0x00, 0x00, 0x01,
            0x9a, 0xd8, 0x6b, 0x25,
        ];
        let (_, found) = HiddenId::default().open(&flow(), &bytes).unwrap();
        assert_eq!(found, flow().with_id(0x9a68));
    }

    #[test]
    fn a_flipped_bit_is_not_explained_by_an_identification() {
        let mut hidden = HiddenId::default();
        let sent = datagram(&flow().with_id(77), 1052);
        for bit in 0..sent.len() * 8 {
            let mut bytes = sent.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            // The congestion bits of the BTH are not covered.
            assert_eq!(hidden.open(&flow(), &bytes).is_ok(), (32..40).contains(&bit), "bit {bit}");
        }
    }

    #[test]
    fn a_wrong_address_port_or_fragment_bit_is_not_explained_either() {
        let bytes = datagram(&flow().with_id(9), 64);
        let mut others = [flow(); 4];
        others[0] = Flow::new(THERE, THERE, 0xd353).unwrap();
        others[1].src_port ^= 1;
        others[2].dst_port += 1;
        if let Ips::V4 { dont_fragment, .. } = &mut others[3].ips {
            *dont_fragment = false;
        }
        for other in others {
            assert!(matches!(HiddenId::default().open(&other, &bytes), Err(WireError::Icrc { .. })));
        }
    }

    #[test]
    fn ipv6_has_none_to_find() {
        let flow = Flow::new(Ipv6Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into(), 4791).unwrap();
        let mut bytes = datagram(&flow, 64);
        assert_eq!(HiddenId::default().open(&flow, &bytes).unwrap().1, flow);
        bytes[20] ^= 1;
        assert!(matches!(HiddenId::default().open(&flow, &bytes), Err(WireError::Icrc { .. })));
    }

    #[test]
    fn too_short_a_datagram_is_refused() {
        for len in 0..16 {
            let bytes = vec![0; len];
            let found = HiddenId::default().open(&flow(), &bytes);
            assert!(matches!(found, Err(WireError::TooShort { .. })), "{len}");
        }
    }
}
