//! Reliable connections (RC) over RoCEv2, without input or output: wire formats, requester, responder.
//!
//! *Who owns what.* State machines own sequence numbers, timers and lists of what is outstanding; they
//! own no payload. Payload stays where the device keeps it: a [`requester::Payload`] or a
//! [`responder::Host`] is asked for bytes when a packet is written, straight into the caller's buffer, and
//! is given bytes when a packet arrived. Time is an argument.
//!
//! ```text
//!            post(message)                                        Host: write, read, atomic, receive
//!                 |                                                          ^
//!          +-------------+   requests: SEND WRITE READ ATOMIC         +-------------+
//!          |  Requester  | -----------------------------------------> |  Responder  |
//!          |             | <----------------------------------------- |             |
//!          +-------------+   answers: ACK NAK RNR, READ data, ATOMIC  +-------------+
//!                 |
//!       Completed, Failed, Flushed: in the order of posting, once each
//! ```
//!
//! Either is driven the same way: `handle_packet` for what arrived, `poll_transmit` until it gives
//! nothing, `poll_event` until it gives nothing; a requester also `handle_timeout` when `poll_timeout`
//! says so. A queue pair has one of each; [`wire::Opcode::is_request`] says which one a packet is for.
//! Queue pair numbers, addresses and the invariant CRC ([`wire::Flow::open`]) are checked before.
//!
//! # Examples
//!
//! One WRITE, from posting to completion; a socket would carry the two packets.
//!
//! ```
//! use ibex_roce::requester::{
//!     Event, LocalFault, MessageId, Operation, Payload, Requester, RequesterConfig, ResponseSink,
//! };
//! use ibex_roce::responder::{Host, NoReceive, Received, Refusal, Responder, ResponderConfig};
//! use ibex_roce::wire::{Flow, Packet};
//! use ibex_roce::{AtomicOp, Mtu, Nanos, Psn, QpNum, RemoteAddr, RemoteRange};
//!
//! struct Source(Vec<u8>);
//!
//! impl Payload for Source {
//!     fn read(&mut self, _id: MessageId, offset: u32, into: &mut [u8]) -> Result<(), LocalFault> {
//!         into.copy_from_slice(&self.0[offset as usize..][..into.len()]);
//!         Ok(())
//!     }
//! }
//!
//! impl ResponseSink for Source {
//!     fn place(&mut self, _: MessageId, _: u32, _: &[u8]) -> Result<(), LocalFault> {
//!         Err(LocalFault)
//!     }
//!     fn original(&mut self, _: MessageId, _: u64) -> Result<(), LocalFault> {
//!         Err(LocalFault)
//!     }
//! }
//!
//! /// Memory at address 0, which anyone may write and nobody may read.
//! struct Memory(Vec<u8>);
//!
//! impl Host for Memory {
//!     fn write(&mut self, range: RemoteRange, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
//!         let (start, len) = (range.addr.va as usize, range.len as usize);
//!         let whole = self.0.get_mut(start..).and_then(|rest| rest.get_mut(..len));
//!         whole.ok_or(Refusal::RemoteAccess)?[offset as usize..][..bytes.len()].copy_from_slice(bytes);
//!         Ok(())
//!     }
//!     // ...
//! #   fn check_read(&mut self, _: RemoteRange) -> Result<(), Refusal> { Err(Refusal::RemoteAccess) }
//! #   fn read(&mut self, _: RemoteRange, _: u32, _: &mut [u8]) -> Result<(), Refusal> {
//! #       Err(Refusal::RemoteAccess)
//! #   }
//! #   fn atomic(&mut self, _: RemoteAddr, _: AtomicOp) -> Result<u64, Refusal> {
//! #       Err(Refusal::RemoteAccess)
//! #   }
//! #   fn open_receive(&mut self) -> Result<(), NoReceive> { Err(NoReceive) }
//! #   fn fill_receive(&mut self, _: u32, _: &[u8]) -> Result<(), Refusal> { Ok(()) }
//! #   fn complete_receive(&mut self, _: Received) -> Result<(), Refusal> { Ok(()) }
//! }
//!
//! let (mtu, psn) = (Mtu::B1024, Psn::new(0xff_ffff));
//! let mut requester = Requester::new(RequesterConfig::new(QpNum::new(0x11), mtu, psn));
//! let mut responder = Responder::new(ResponderConfig::new(QpNum::new(0x22), mtu, psn));
//! let (mut source, mut memory) = (Source(b"tokens".to_vec()), Memory(vec![0; 64]));
//! let [here, there] = ["10.0.0.1", "10.0.0.2"].map(|text| text.parse().unwrap());
//! let to_there = Flow::new(here, there, 0xc000).unwrap();
//! let to_here = Flow::new(there, here, 0xc000).unwrap();
//! let mut datagram = vec![0; mtu.packet_len_max()];
//!
//! let to = RemoteRange { addr: RemoteAddr { va: 8, rkey: 1 }, len: 6 };
//! requester.post(MessageId(7), Operation::Write { to, imm: None, solicited: false })?;
//! let sent = requester.poll_transmit(Nanos(0), &mut source, &mut datagram).unwrap();
//! to_there.seal(&mut datagram[..sent.len])?;
//!
//! let packet = Packet::parse(to_there.open(&datagram[..sent.len])?)?;
//! assert!(packet.bth().opcode.is_request());
//! responder.handle_packet(&packet, &mut memory);
//! assert_eq!(memory.0[8..14], *b"tokens");
//! let sent = responder.poll_transmit(&mut memory, &mut datagram).unwrap();
//! to_here.seal(&mut datagram[..sent.len])?;
//!
//! let packet = Packet::parse(to_here.open(&datagram[..sent.len])?)?;
//! requester.handle_packet(Nanos(9_000), &packet, &mut source);
//! assert_eq!(requester.poll_event(), Some(Event::Completed { id: MessageId(7) }));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! INVARIANT: no bytes from the wire panic, allocate without bound, or reach memory past
//! [`responder::Host`].
#![forbid(unsafe_code)]

#[doc(hidden)]
pub mod fuzz;
pub mod requester;
pub mod responder;
mod types;
pub mod wire;

pub use types::{AckTimeout, AtomicOp, Msn, Mtu, Nanos, PKey, Psn, QpNum, RemoteAddr, RemoteRange, RnrTimer};

/// Longest message in bytes.
///
/// SPEC: IBTA allows 2^31; mlx5 devices report `log_max_msg` 30, and 2^22 packets of the smallest size
/// leave every sequence number's place on the circle unambiguous.
pub const MESSAGE_LEN_MAX: u32 = 1 << 30;

/// Why a packet was not taken in, though it was well-formed; nothing changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Dropped {
    /// Another partition.
    PKey,
    /// An answer given to a responder, or a request to a requester.
    WrongHalf,
    /// The connection has failed.
    Failed,
    /// An answer to what was never sent.
    NotSent,
    /// A request that pretends to be a repeated one, and is not.
    BadRepeat,
    /// Too many repeated requests wait for their answers.
    TooManyRepeats,
}

/// Pads a packet whose payload ends at `end` and leaves room for the invariant CRC; its length.
fn finish_packet(out: &mut [u8], end: usize, pad: u8) -> usize {
    let len = end + usize::from(pad) + wire::ICRC_LEN;
    out[end..len].fill(0);
    len
}
