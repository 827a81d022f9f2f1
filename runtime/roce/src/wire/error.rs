//! Why bytes are not a packet.

/// Why bytes are not a packet, or a packet cannot be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Bytes are missing.
    #[error("{what} needs {need} bytes, only {len} are left")]
    TooShort {
        /// Which header or field.
        what: &'static str,
        /// Bytes there are.
        len: usize,
        /// Bytes it needs.
        need: usize,
    },
    /// No opcode of the reliable connection service.
    #[error("opcode {0:#04x} is not one of reliable connections (0x00 to 0x14)")]
    Opcode(u8),
    /// A transport header of another version.
    #[error("transport version is {0}, only 0 is known")]
    TransportVersion(u8),
    /// The pad count does not fit the payload, or the packet's length is no multiple of four.
    #[error("{len} bytes of payload and padding cannot end in {pad} bytes of padding")]
    Padding {
        /// The pad count.
        pad: u8,
        /// Bytes after the headers.
        len: usize,
    },
    /// A reserved acknowledgement.
    #[error("acknowledgement syndrome {0:#04x} is reserved")]
    Syndrome(u8),
    /// The invariant CRC is not what the packet's bytes give.
    #[error("invariant crc is {found:#010x}, the packet's bytes give {computed:#010x}")]
    Icrc {
        /// What the packet carries.
        found: u32,
        /// What it should carry.
        computed: u32,
    },
    /// Extended headers that do not go with the opcode.
    #[error("opcode {0:#04x} goes with other extended headers")]
    Extension(u8),
    /// Neither IPv4 nor IPv6.
    #[error("ether type is {0:#06x}, only 0x0800 and 0x86dd carry packets")]
    EtherType(u16),
    /// Neither IPv4 nor IPv6, by the first nibble.
    #[error("ip version is {0}, only 4 and 6 exist")]
    IpVersion(u8),
    /// An IPv4 header with options.
    #[error("the ipv4 header has {0} bytes, only 20 are taken")]
    IpOptions(u8),
    /// A length field that contradicts the bytes.
    #[error("{what} length field is {field}, the bytes allow {len}")]
    Length {
        /// Which header.
        what: &'static str,
        /// What the field says.
        field: usize,
        /// What there is.
        len: usize,
    },
    /// A fragment.
    #[error("the datagram is a fragment")]
    Fragment,
    /// A damaged IPv4 header.
    #[error("the ipv4 header checksum is wrong")]
    IpChecksum,
    /// A damaged datagram.
    #[error("the udp checksum is wrong")]
    UdpChecksum,
    /// Not UDP.
    #[error("ip protocol is {0}, only 17 carries packets")]
    Protocol(u8),
    /// Not RoCEv2.
    #[error("udp destination port is {0}, not 4791")]
    Port(u16),
}
