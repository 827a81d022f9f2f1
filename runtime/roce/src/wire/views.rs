//! Checked views: the bytes of one header, typed, exactly as they stand in the packet.
//!
//! A view borrows from the packet. Its length is checked and nothing else; every bit pattern is a view,
//! reserved bits included. What the bits mean is said by the parsed forms in [`crate::wire`].

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

/// Declares views with their length checks.
macro_rules! views {
    ($($(#[$doc:meta])* $name:ident, $len:literal, $what:literal {
        $($(#[$field_doc:meta])* $at:literal $field:ident: $ty:ty,)*
    })*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_doc])* pub $field: $ty,)*
        }

        impl $name {
            /// Bytes of the header.
            pub const LEN: usize = $len;

            /// The header at the start of `bytes`, and what follows it.
            ///
            /// # Errors
            /// [`WireError::TooShort`].
            pub fn checked(bytes: &[u8]) -> Result<(&Self, &[u8]), WireError> {
                let short = WireError::TooShort { what: $what, len: bytes.len(), need: $len };
                Self::ref_from_prefix(bytes).map_err(|_| short)
            }

            /// The same, to be written.
            ///
            /// # Errors
            /// [`WireError::TooShort`].
            pub fn checked_mut(bytes: &mut [u8]) -> Result<(&mut Self, &mut [u8]), WireError> {
                let short = WireError::TooShort { what: $what, len: bytes.len(), need: $len };
                Self::mut_from_prefix(bytes).map_err(|_| short)
            }
        }

        const _: () = assert!(size_of::<$name>() == $len);
        $(const _: () = assert!(offset_of!($name, $field) == $at);)*
    )*};
}

views! {
    /// Base transport header.
    ///
    /// ```text
    ///  0               1               2               3
    /// | opcode        |S|M|pad| tver  | partition key                 |
    /// |F|B| reserved  | destination QP number (24)                    |
    /// |A| reserved    | packet sequence number (24)                   |
    /// ```
    BthView, 12, "bth" {
        /// Operation code.
        0 opcode: u8,
        /// Solicited event, migrated, pad count, transport version.
        1 flags: u8,
        /// Partition key.
        2 pkey: U16,
        /// Congestion bits and reserved bits; not covered by the invariant CRC.
        4 congestion: u8,
        /// Destination queue pair number.
        5 dest_qpn: [u8; 3],
        /// Acknowledge request and reserved bits.
        8 ack_req: u8,
        /// Packet sequence number.
        9 psn: [u8; 3],
    }

    /// RDMA extended transport header.
    ///
    /// ```text
    /// | virtual address (64)                                          |
    /// |                                                               |
    /// | rkey                                                          |
    /// | length of the whole message                                   |
    /// ```
    RethView, 16, "reth" {
        /// Virtual address at the responder.
        0 va: U64,
        /// Key.
        8 rkey: U32,
        /// Bytes of the whole message.
        12 len: U32,
    }

    /// Acknowledgement extended transport header.
    ///
    /// ```text
    /// | syndrome      | message sequence number (24)                  |
    /// ```
    AethView, 4, "aeth" {
        /// What kind of answer, and its number.
        0 syndrome: u8,
        /// Messages completed.
        1 msn: [u8; 3],
    }

    /// Atomic extended transport header.
    ///
    /// ```text
    /// | virtual address (64)                                          |
    /// |                                                               |
    /// | rkey                                                          |
    /// | swap, or what is added (64)                                   |
    /// |                                                               |
    /// | compare (64)                                                  |
    /// |                                                               |
    /// ```
    AtomicEthView, 28, "atomiceth" {
        /// Virtual address at the responder.
        0 va: U64,
        /// Key.
        8 rkey: U32,
        /// New value, or what is added.
        12 swap_add: U64,
        /// Value that the word must have; unused by FETCH_ADD.
        20 compare: U64,
    }

    /// Atomic acknowledgement extended transport header.
    ///
    /// ```text
    /// | what the word was (64)                                        |
    /// |                                                               |
    /// ```
    AtomicAckEthView, 8, "atomicacketh" {
        /// The word before the operation.
        0 original: U64,
    }

    /// Immediate data.
    ///
    /// ```text
    /// | immediate                                                     |
    /// ```
    ImmDtView, 4, "immdt" {
        /// Four bytes for the receiver.
        0 imm: U32,
    }

    /// Ethernet header.
    ///
    /// ```text
    /// | destination (48)                                              |
    /// |                               | source (48)                   |
    /// |                                                               |
    /// | ether type                    |
    /// ```
    EthernetView, 14, "ethernet header" {
        /// Destination address.
        0 dst: [u8; 6],
        /// Source address.
        6 src: [u8; 6],
        /// 0x0800 or 0x86dd.
        12 ether_type: U16,
    }

    /// IPv4 header without options.
    ///
    /// ```text
    /// | ver 4 | len 5 | dscp    |ecn  | total length                  |
    /// | identification                |0|D|M| fragment offset         |
    /// | time to live  | protocol 17   | header checksum               |
    /// | source (32)                                                   |
    /// | destination (32)                                              |
    /// ```
    Ipv4View, 20, "ipv4 header" {
        /// Version and header length in words.
        0 version_len: u8,
        /// Service and congestion bits.
        1 tos: u8,
        /// Bytes of header and payload.
        2 total_len: U16,
        /// Identification.
        4 id: U16,
        /// Flags and fragment offset.
        6 fragment: U16,
        /// Time to live.
        8 ttl: u8,
        /// Protocol.
        9 protocol: u8,
        /// Header checksum.
        10 checksum: U16,
        /// Source address.
        12 src: [u8; 4],
        /// Destination address.
        16 dst: [u8; 4],
    }

    /// IPv6 header.
    ///
    /// ```text
    /// | ver 6 | traffic class | flow label (20)                       |
    /// | payload length                | next hdr 17   | hop limit     |
    /// | source (128)                                                  |
    /// | destination (128)                                             |
    /// ```
    Ipv6View, 40, "ipv6 header" {
        /// Version, traffic class, flow label.
        0 version_class_flow: U32,
        /// Bytes after this header.
        4 payload_len: U16,
        /// Protocol.
        6 next_header: u8,
        /// Hop limit.
        7 hop_limit: u8,
        /// Source address.
        8 src: [u8; 16],
        /// Destination address.
        24 dst: [u8; 16],
    }

    /// UDP header.
    ///
    /// ```text
    /// | source port                   | destination port 4791         |
    /// | length                        | checksum                      |
    /// ```
    UdpView, 8, "udp header" {
        /// Source port.
        0 src_port: U16,
        /// Destination port.
        2 dst_port: U16,
        /// Bytes of header and payload.
        4 len: U16,
        /// Checksum; 0 is none.
        6 checksum: U16,
    }
}

/// A 24-bit field as a number.
pub(crate) const fn get24(field: [u8; 3]) -> u32 {
    u32::from_be_bytes([0, field[0], field[1], field[2]])
}

/// The low 24 bits of a number as a field.
pub(crate) const fn put24(value: u32) -> [u8; 3] {
    let [_, a, b, c] = value.to_be_bytes();
    [a, b, c]
}
