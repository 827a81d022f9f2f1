//! The invariant CRC: everything that no router changes, from the IP header to the padding.
//!
//! Fields that may change on the way count as ones; eight bytes of ones stand for the local routing
//! header that InfiniBand would have there.
//!
//! ```text
//!  | ff*8 | IPv4: tos, ttl, checksum = ff        | UDP: checksum = ff | BTH: byte 4 = ff | ... pad |
//!         | IPv6: class, flow, hop limit = ff    |
//! ```
//!
//! SPEC: IBTA A17.3.3 and vol. 1 §7.8.1; polynomial and bit order are Ethernet's, the result goes out in
//! little-endian order.

use zerocopy::IntoBytes;

use super::views::{BthView, Ipv4View, Ipv6View, UdpView};
use super::{Flow, IPV4_LEN, IPV6_LEN, Ips, UDP_LEN, WireError};

/// Bytes of the invariant CRC after the padding.
pub const ICRC_LEN: usize = 4;

/// Ones in place of a local routing header.
const ROUTING_LEN: usize = 8;
/// Bytes that are masked, or come from the flow: all before the second half of the BTH.
const MASKED_LEN_MAX: usize = ROUTING_LEN + IPV6_LEN + UDP_LEN + BthView::LEN;
/// Where in a BTH the congestion bits stand, which switches may set.
const CONGESTION_AT: usize = 4;

impl Flow {
    /// The invariant CRC of a packet on this flow; `packet` is everything from the BTH to the padding.
    #[must_use]
    pub fn icrc(&self, packet: &[u8]) -> u32 {
        let mut masked = [0xff; MASKED_LEN_MAX];
        let ip_end = ROUTING_LEN + self.ip_len();
        let datagram_len = packet.len() + ICRC_LEN;
        self.masked_ip(datagram_len, &mut masked[ROUTING_LEN..ip_end]);
        let udp_end = ip_end + UDP_LEN;
        let udp = UdpView { checksum: 0xffff.into(), ..self.udp(datagram_len) };
        masked[ip_end..udp_end].copy_from_slice(udp.as_bytes());
        let (head, rest) = packet.split_at(packet.len().min(BthView::LEN));
        let end = udp_end + head.len();
        masked[udp_end..end].copy_from_slice(head);
        if head.len() > CONGESTION_AT {
            masked[udp_end + CONGESTION_AT] = 0xff;
        }
        let mut crc = crc32fast::Hasher::new();
        crc.update(&masked[..end]);
        crc.update(rest);
        crc.finalize()
    }

    fn masked_ip(&self, datagram_len: usize, out: &mut [u8]) {
        match self.ips {
            Ips::V4 { .. } => {
                let header =
                    Ipv4View { tos: 0xff, ttl: 0xff, checksum: 0xffff.into(), ..self.ipv4(datagram_len) };
                out.copy_from_slice(header.as_bytes());
            }
            Ips::V6 { .. } => {
                let header = Ipv6View {
                    version_class_flow: 0x6fff_ffff.into(),
                    hop_limit: 0xff,
                    ..self.ipv6(datagram_len)
                };
                out.copy_from_slice(header.as_bytes());
            }
        }
    }

    /// Writes the invariant CRC over the last four bytes of a UDP payload that holds a whole packet.
    ///
    /// # Errors
    /// [`WireError::TooShort`] if there is no room for a BTH and the CRC.
    pub fn seal(&self, datagram: &mut [u8]) -> Result<(), WireError> {
        let end = packet_end(datagram.len())?;
        let icrc = self.icrc(&datagram[..end]);
        datagram[end..].copy_from_slice(&icrc.to_le_bytes());
        Ok(())
    }

    /// Checks the invariant CRC of a UDP payload and takes it off.
    ///
    /// # Errors
    /// [`WireError::Icrc`], [`WireError::TooShort`].
    pub fn open<'a>(&self, datagram: &'a [u8]) -> Result<&'a [u8], WireError> {
        let (packet, icrc) = datagram.split_at(packet_end(datagram.len())?);
        let mut found = [0; ICRC_LEN];
        found.copy_from_slice(icrc);
        let (found, computed) = (u32::from_le_bytes(found), self.icrc(packet));
        if found != computed {
            return Err(WireError::Icrc { found, computed });
        }
        Ok(packet)
    }
}

fn packet_end(len: usize) -> Result<usize, WireError> {
    const NEED: usize = BthView::LEN + ICRC_LEN;
    if len < NEED {
        return Err(WireError::TooShort { what: "datagram", len, need: NEED });
    }
    Ok(len - ICRC_LEN)
}

const _: () = assert!(IPV4_LEN <= IPV6_LEN);
