//! What stands before the transport headers: Ethernet, IP and UDP.
//!
//! A [`Flow`] is what the invariant CRC needs to know of them, and all that a UDP socket lets one
//! choose; a [`Frame`] is all of it, for simulated switches, captures and raw links.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use zerocopy::IntoBytes;

use super::WireError;
use super::views::{EthernetView, Ipv4View, Ipv6View, UdpView};

/// UDP destination port of RoCEv2.
pub const ROCE_PORT: u16 = 4791;
/// Bytes of an Ethernet header.
pub const ETHERNET_LEN: usize = EthernetView::LEN;
/// Bytes of an IPv4 header without options.
pub const IPV4_LEN: usize = Ipv4View::LEN;
/// Bytes of an IPv6 header.
pub const IPV6_LEN: usize = Ipv6View::LEN;
/// Bytes of a UDP header.
pub const UDP_LEN: usize = UdpView::LEN;

const ETHER_IPV4: u16 = 0x0800;
const ETHER_IPV6: u16 = 0x86dd;
const PROTOCOL_UDP: u8 = 17;
const DONT_FRAGMENT: u16 = 0x4000;
/// More fragments follow, and the offset.
const FRAGMENT: u16 = 0x3fff;

/// The IP addresses of a packet, with what else of the IP header no router changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Ips {
    /// IPv4.
    V4 {
        /// Source address.
        src: Ipv4Addr,
        /// Destination address.
        dst: Ipv4Addr,
        /// Identification; the invariant CRC covers it.
        id: u16,
        /// Whether routers must not fragment; the invariant CRC covers it.
        dont_fragment: bool,
    },
    /// IPv6.
    V6 {
        /// Source address.
        src: Ipv6Addr,
        /// Destination address.
        dst: Ipv6Addr,
    },
}

/// The way of a packet: addresses and ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// Addresses.
    pub ips: Ips,
    /// Source port; RoCEv2 uses it to spread flows over paths.
    pub src_port: u16,
    /// Destination port; [`ROCE_PORT`], unless both ends agreed on another.
    pub dst_port: u16,
}

impl Flow {
    /// A flow to [`ROCE_PORT`]; with IPv4, identification 0 and no fragmentation.
    ///
    /// `None` if one address is IPv4 and the other is IPv6.
    #[must_use]
    pub const fn new(src: IpAddr, dst: IpAddr, src_port: u16) -> Option<Self> {
        let ips = match (src, dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => Ips::V4 { src, dst, id: 0, dont_fragment: true },
            (IpAddr::V6(src), IpAddr::V6(dst)) => Ips::V6 { src, dst },
            _ => return None,
        };
        Some(Self { ips, src_port, dst_port: ROCE_PORT })
    }

    /// The flow with another IPv4 identification; IPv6 has none.
    #[must_use]
    pub const fn with_id(mut self, id: u16) -> Self {
        if let Ips::V4 { id: ours, .. } = &mut self.ips {
            *ours = id;
        }
        self
    }

    /// Source and destination address.
    #[must_use]
    pub const fn addrs(&self) -> (IpAddr, IpAddr) {
        match self.ips {
            Ips::V4 { src, dst, .. } => (IpAddr::V4(src), IpAddr::V4(dst)),
            Ips::V6 { src, dst } => (IpAddr::V6(src), IpAddr::V6(dst)),
        }
    }

    /// Bytes of the IP header.
    #[must_use]
    pub const fn ip_len(&self) -> usize {
        match self.ips {
            Ips::V4 { .. } => IPV4_LEN,
            Ips::V6 { .. } => IPV6_LEN,
        }
    }

    /// The UDP header of `datagram_len` bytes of payload, without checksum.
    pub(super) fn udp(&self, datagram_len: usize) -> UdpView {
        UdpView {
            src_port: self.src_port.into(),
            dst_port: self.dst_port.into(),
            len: field(UDP_LEN + datagram_len).into(),
            checksum: 0.into(),
        }
    }

    /// The IPv4 header, its mutable fields zero; zero altogether for IPv6.
    pub(super) fn ipv4(&self, datagram_len: usize) -> Ipv4View {
        let (src, dst, id, dont_fragment) = match self.ips {
            Ips::V4 { src, dst, id, dont_fragment } => (src.octets(), dst.octets(), id, dont_fragment),
            Ips::V6 { .. } => ([0; 4], [0; 4], 0, false),
        };
        Ipv4View {
            version_len: 0x45,
            tos: 0,
            total_len: field(IPV4_LEN + UDP_LEN + datagram_len).into(),
            id: id.into(),
            fragment: if dont_fragment { DONT_FRAGMENT } else { 0 }.into(),
            ttl: 0,
            protocol: PROTOCOL_UDP,
            checksum: 0.into(),
            src,
            dst,
        }
    }

    /// The IPv6 header, its mutable fields zero; addresses zero for IPv4.
    pub(super) fn ipv6(&self, datagram_len: usize) -> Ipv6View {
        let (src, dst) = match self.ips {
            Ips::V6 { src, dst } => (src.octets(), dst.octets()),
            Ips::V4 { .. } => ([0; 16], [0; 16]),
        };
        Ipv6View {
            version_class_flow: (6 << 28).into(),
            payload_len: field(UDP_LEN + datagram_len).into(),
            next_header: PROTOCOL_UDP,
            hop_limit: 0,
            src,
            dst,
        }
    }
}

/// A length as its 16-bit field carries it.
fn field(len: usize) -> u16 {
    // Packets are shorter than 5 KiB; a longer one is refused where frames are written.
    u16::try_from(len).unwrap_or(u16::MAX)
}

/// Ethernet addresses of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Link {
    /// Source address.
    pub src: [u8; 6],
    /// Destination address.
    pub dst: [u8; 6],
}

/// Congestion bits of an IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Ecn {
    /// The transport does not react to congestion marks.
    NotCapable = 0,
    /// It does.
    Capable1 = 1,
    /// It does.
    Capable0 = 2,
    /// A switch met congestion.
    Congested = 3,
}

impl Ecn {
    const ALL: [Self; 4] = [Self::NotCapable, Self::Capable1, Self::Capable0, Self::Congested];
}

/// Everything before a UDP payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    /// Ethernet addresses; none in a bare IP packet.
    pub link: Option<Link>,
    /// Addresses and ports.
    pub flow: Flow,
    /// Service class, 6 bits.
    pub dscp: u8,
    /// Congestion bits.
    pub ecn: Ecn,
    /// Routers that may still be passed.
    pub hop_limit: u8,
}

impl Frame {
    /// The usual frame on a flow: best effort, 64 hops.
    #[must_use]
    pub const fn new(link: Option<Link>, flow: Flow) -> Self {
        Self { link, flow, dscp: 0, ecn: Ecn::NotCapable, hop_limit: 64 }
    }

    /// Bytes before the UDP payload.
    #[must_use]
    pub const fn headers_len(&self) -> usize {
        let link = if self.link.is_some() { ETHERNET_LEN } else { 0 };
        link + self.flow.ip_len() + UDP_LEN
    }

    /// Writes all headers for a UDP payload of `datagram_len` bytes and says how many bytes they are.
    ///
    /// The UDP checksum is 0, which is none; the invariant CRC covers more than it would.
    ///
    /// # Errors
    /// [`WireError::TooShort`] for the buffer, [`WireError::Length`] if the payload fits no datagram.
    pub fn emit_headers(&self, datagram_len: usize, out: &mut [u8]) -> Result<usize, WireError> {
        let max = usize::from(u16::MAX) - IPV4_LEN - UDP_LEN;
        if datagram_len > max {
            return Err(WireError::Length { what: "udp", field: datagram_len, len: max });
        }
        let (ether_type, class) = match self.flow.ips {
            Ips::V4 { .. } => (ETHER_IPV4, self.class()),
            Ips::V6 { .. } => (ETHER_IPV6, self.class()),
        };
        let mut rest = out;
        if let Some(link) = self.link {
            let (view, after) = EthernetView::checked_mut(rest)?;
            *view = EthernetView { dst: link.dst, src: link.src, ether_type: ether_type.into() };
            rest = after;
        }
        let rest = match self.flow.ips {
            Ips::V4 { .. } => {
                let (view, after) = Ipv4View::checked_mut(rest)?;
                *view = Ipv4View { tos: class, ttl: self.hop_limit, ..self.flow.ipv4(datagram_len) };
                view.checksum = (!ones_sum(view.as_bytes())).into();
                after
            }
            Ips::V6 { .. } => {
                let (view, after) = Ipv6View::checked_mut(rest)?;
                *view = Ipv6View { hop_limit: self.hop_limit, ..self.flow.ipv6(datagram_len) };
                view.version_class_flow = (6 << 28 | u32::from(class) << 20).into();
                after
            }
        };
        *UdpView::checked_mut(rest)?.0 = self.flow.udp(datagram_len);
        Ok(self.headers_len())
    }

    const fn class(&self) -> u8 {
        // CAST: a discriminant of two bits.
        self.dscp << 2 | self.ecn as u8
    }

    /// Reads the headers of an Ethernet frame; also gives the UDP payload, link padding taken off.
    ///
    /// # Errors
    /// [`WireError`]: what is not RoCEv2 about it. The destination port is the caller's to check.
    pub fn parse_ethernet(bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let (view, rest) = EthernetView::checked(bytes)?;
        let ether_type = view.ether_type.get();
        let version = match ether_type {
            ETHER_IPV4 => 4,
            ETHER_IPV6 => 6,
            _ => return Err(WireError::EtherType(ether_type)),
        };
        let (mut frame, datagram) = Self::parse_version(version, rest)?;
        frame.link = Some(Link { src: view.src, dst: view.dst });
        Ok((frame, datagram))
    }

    /// Reads the headers of an IP packet; also gives the UDP payload.
    ///
    /// # Errors
    /// As [`Self::parse_ethernet`].
    pub fn parse_ip(bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let short = WireError::TooShort { what: "ip header", len: 0, need: 1 };
        Self::parse_version(bytes.first().ok_or(short)? >> 4, bytes)
    }

    fn parse_version(version: u8, bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        match version {
            4 => Self::parse_ipv4(bytes),
            6 => Self::parse_ipv6(bytes),
            _ => Err(WireError::IpVersion(version)),
        }
    }

    fn parse_ipv4(bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let (view, rest) = Ipv4View::checked(bytes)?;
        if view.version_len >> 4 != 4 {
            return Err(WireError::IpVersion(view.version_len >> 4));
        }
        if view.version_len != 0x45 {
            return Err(WireError::IpOptions((view.version_len & 15) * 4));
        }
        // A sum with its own complement in it is all ones.
        if ones_sum(view.as_bytes()) != 0xffff {
            return Err(WireError::IpChecksum);
        }
        let fragment = view.fragment.get();
        if fragment & FRAGMENT != 0 {
            return Err(WireError::Fragment);
        }
        let payload = ip_payload("ipv4", view.total_len.get(), IPV4_LEN, rest)?;
        let ips = Ips::V4 {
            src: view.src.into(),
            dst: view.dst.into(),
            id: view.id.get(),
            dont_fragment: fragment & DONT_FRAGMENT != 0,
        };
        Self::parse_udp(view.protocol, ips, view.tos, view.ttl, payload)
    }

    fn parse_ipv6(bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let (view, rest) = Ipv6View::checked(bytes)?;
        let [first, second, ..] = view.version_class_flow.get().to_be_bytes();
        if first >> 4 != 6 {
            return Err(WireError::IpVersion(first >> 4));
        }
        let payload = ip_payload("ipv6", view.payload_len.get(), 0, rest)?;
        let ips = Ips::V6 { src: view.src.into(), dst: view.dst.into() };
        Self::parse_udp(view.next_header, ips, first << 4 | second >> 4, view.hop_limit, payload)
    }

    fn parse_udp(
        protocol: u8,
        ips: Ips,
        class: u8,
        hop_limit: u8,
        bytes: &[u8],
    ) -> Result<(Self, &[u8]), WireError> {
        if protocol != PROTOCOL_UDP {
            return Err(WireError::Protocol(protocol));
        }
        let (view, datagram) = UdpView::checked(bytes)?;
        let len = usize::from(view.len.get());
        if len != bytes.len() {
            return Err(WireError::Length { what: "udp", field: len, len: bytes.len() });
        }
        let flow = Flow { ips, src_port: view.src_port.get(), dst_port: view.dst_port.get() };
        let ecn = Ecn::ALL[usize::from(class & 3)];
        Ok((Self { link: None, flow, dscp: class >> 2, ecn, hop_limit }, datagram))
    }
}

/// What follows an IP header, by its length field, which counts `counted` bytes of the header.
fn ip_payload<'a>(
    what: &'static str,
    field: u16,
    counted: usize,
    rest: &'a [u8],
) -> Result<&'a [u8], WireError> {
    let field = usize::from(field);
    let wrong = WireError::Length { what, field, len: rest.len() + counted };
    rest.get(..field.checked_sub(counted).ok_or(wrong)?).ok_or(wrong)
}

/// Ones' complement sum of the 16-bit words of a header.
fn ones_sum(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2).map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    // CAST: at most ten words were added, so two folds leave 16 bits.
    ((folded & 0xffff) + (folded >> 16)) as u16
}
