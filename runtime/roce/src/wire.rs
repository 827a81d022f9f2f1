//! Wire formats: every header of a RoCEv2 packet, as checked views and as parsed forms.
//!
//! *Who owns what.* Views borrow the bytes of a packet; parsed forms are plain values; nothing here
//! allocates. A *view* ([`views`]) is a header's bytes with the length checked and nothing else; a
//! *parsed form* ([`Bth`], [`Aeth`], …) has meaning, and only meaningful ones exist. Parsing never
//! panics on any bytes; emitting needs a buffer that is long enough and says so if it is not.
//!
//! ```text
//!  | Ethernet 14 | IPv4 20 or IPv6 40 | UDP 8 | BTH 12 | extended headers | payload | pad 0-3 | ICRC 4 |
//!  |<------------------ Frame ------------------------->|                                             |
//!                                               |<- Headers ------------->|                           |
//!                                               |<- Packet --------------------------------->|
//!                                               |<- what a UDP socket carries ----------------------->|
//! ```

mod error;
mod frame;
mod headers;
mod hidden_id;
mod icrc;
mod opcode;
mod packet;
pub mod views;

pub use error::WireError;
pub use frame::{ETHERNET_LEN, Ecn, Flow, Frame, IPV4_LEN, IPV6_LEN, Ips, Link, ROCE_PORT, UDP_LEN};
pub use headers::{Aeth, AtomicAckEth, AtomicEth, Bth, ImmDt, NakCode, Reth, Syndrome};
pub use hidden_id::HiddenId;
pub use icrc::ICRC_LEN;
pub use opcode::{Class, Opcode, Part};
pub(crate) use packet::pad_of;
pub use packet::{Extension, HEADERS_LEN_MAX, Headers, Packet};
