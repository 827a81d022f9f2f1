//! A bare loop over the same socket calls: what the path carries when nothing is done with it.
//!
//! *Who owns what.* A [`BareSocket`] owns its socket and one buffer of datagrams that it sends over and over.

use std::net::SocketAddr;

use super::super::frames::PACKET_LEN_MAX;
use super::ident::IdentTable;
use super::socket::{Inbox, Outbox, Socket};
use crate::HcaError;

/// A socket as a udp fabric uses it, without the protocol: the measure of how fast the fabric could be.
#[derive(Debug)]
pub struct BareSocket {
    socket: Socket,
    outbox: Outbox,
    inbox: Inbox,
    idents: IdentTable,
}

impl BareSocket {
    /// Binds `addr`, with the options that the fabric sets.
    ///
    /// # Errors
    /// As [`Fabric::udp`](super::super::Fabric::udp).
    pub fn bind(addr: SocketAddr) -> Result<Self, HcaError> {
        let socket = Socket::bind(addr)?;
        let outbox = Outbox::new(&socket);
        Ok(Self { socket, outbox, inbox: Inbox::new(), idents: IdentTable::default() })
    }

    /// Where it is bound.
    #[must_use]
    pub fn local(&self) -> SocketAddr {
        self.socket.local()
    }

    /// Sends datagrams of these lengths, over and over, as many as one flush takes; how many and how many
    /// bytes the kernel was given.
    ///
    /// # Panics
    /// PANIC: if a length is more than a packet's, or there are none.
    pub fn send(&mut self, to: SocketAddr, lens: &[usize]) -> (u64, u64) {
        assert!(lens.iter().all(|len| *len <= PACKET_LEN_MAX), "a datagram is at most a packet");
        let (mut count, mut bytes) = (0, 0);
        for len in lens.iter().cycle() {
            if self.outbox.room(*len).is_none() {
                break;
            }
            self.outbox.keep(to, *len, &mut self.idents);
            (count, bytes) = (count + 1, bytes + *len as u64);
        }
        self.outbox.flush(&self.socket);
        (count, bytes)
    }

    /// Takes in what arrived; how many datagrams and bytes that were.
    pub fn receive(&mut self) -> (u64, u64) {
        self.inbox.fill(&self.socket);
        let sum = |(count, bytes): (u64, u64), len: usize| (count + 1, bytes + len as u64);
        self.inbox.datagrams().map(|datagram| datagram.payload.len()).fold((0, 0), sum)
    }

    /// As [`receive`](Self::receive); if nothing is there, waits a while for something.
    pub fn receive_or_wait(&mut self) -> (u64, u64) {
        const NAP_NS: u64 = 1_000_000;
        let arrived = self.receive();
        if arrived.0 == 0 && self.socket.wait(NAP_NS) { self.receive() } else { arrived }
    }
}
