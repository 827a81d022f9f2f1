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
