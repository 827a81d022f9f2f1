//! Single packets, written and read by `ibex_roce::wire` and moved by a plain UDP socket.
//!
//! No state machine stands between a check and the guest: what a requester of ours would never send can be
//! sent, and every field that comes back is looked at.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use ibex_roce::wire::{
    Aeth, Bth, Extension, Flow, HEADERS_LEN_MAX, Headers, HiddenId, ICRC_LEN, Opcode, Packet, ROCE_PORT,
    Syndrome,
};
use ibex_roce::{PKey, Psn, QpNum};

/// What a check waits for an answer that must come.
const PATIENCE: Duration = Duration::from_secs(30);
/// What it waits to see that none comes. Long for Linux, which answers in microseconds; the checks that rely
/// on it send a good packet afterwards, whose answer proves that the bad one was dealt with.
const SILENCE: Duration = Duration::from_millis(50);

/// One end of a connection without memory.
pub(crate) struct Raw {
    socket: UdpSocket,
    peer: IpAddr,
    hidden: HiddenId,
}

/// An answer, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    pub(crate) headers: Headers,
    pub(crate) payload: Vec<u8>,
}

impl Answer {
    pub(crate) fn opcode(&self) -> Opcode {
        self.headers.bth.opcode
    }

    pub(crate) fn psn(&self) -> Psn {
        self.headers.bth.psn
    }

    /// The syndrome, if this is an answer that has one.
    pub(crate) fn syndrome(&self) -> Option<Syndrome> {
        match self.headers.ext {
            Extension::Aeth(Aeth { syndrome, .. }) | Extension::AtomicAck(Aeth { syndrome, .. }, _) => {
                Some(syndrome)
            }
            _ => None,
        }
    }
}

impl Raw {
    /// Binds the RoCE port of this address.
    pub(crate) fn bind(own: IpAddr, peer: IpAddr) -> Self {
        let socket = UdpSocket::bind((own, ROCE_PORT)).expect("nothing else uses this address");
        socket.set_read_timeout(Some(PATIENCE)).expect("a positive timeout");
        if own.is_ipv4() {
            // Only so is the identification known, which the CRC covers: zero, since nothing is fragmented.
            option(&socket, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO);
        } else {
            // Linux' RoCE sends no UDP checksum, which sockets refuse with IPv6 unless told otherwise.
            option(&socket, libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1);
        }
        Self { socket, peer, hidden: HiddenId::default() }
    }

    /// The address packets leave from.
    pub(crate) fn own(&self) -> IpAddr {
        self.socket.local_addr().expect("it is bound").ip()
    }

    /// Sends a packet as it is.
    pub(crate) fn send(&self, headers: Headers, payload: &[u8]) {
        self.send_changed(headers, payload, |_| {});
    }

    /// Sends a packet after its last four bytes were made right and `change` made it wrong.
    pub(crate) fn send_changed(&self, headers: Headers, payload: &[u8], change: impl FnOnce(&mut [u8])) {
        let flow = Flow::new(self.own(), self.peer, ROCE_PORT).expect("one family");
        let mut bytes = vec![0xa5; HEADERS_LEN_MAX + payload.len() + 3 + ICRC_LEN];
        let len = Packet::new(headers, payload).emit(&mut bytes).expect("it fits");
        let datagram = &mut bytes[..len + ICRC_LEN];
        flow.seal(datagram).expect("it holds a packet");
        change(datagram);
        let sent = self.socket.send_to(datagram, (self.peer, ROCE_PORT)).expect("it fits the link");
        assert_eq!(sent, datagram.len());
    }

    /// The next packet of the guest, which must come and must be right in every byte.
    pub(crate) fn receive(&mut self) -> Answer {
        self.receive_within(PATIENCE).expect("the guest answers")
    }

    /// Nothing comes.
    pub(crate) fn expect_silence(&mut self) {
        let answer = self.receive_within(SILENCE);
        assert_eq!(answer, None, "nothing should have come");
    }

    fn receive_within(&mut self, patience: Duration) -> Option<Answer> {
        self.socket.set_read_timeout(Some(patience)).expect("a positive timeout");
        let mut bytes = [0; 5000];
        let (len, from) = match self.socket.recv_from(&mut bytes) {
            Ok(received) => received,
            Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock) => return None,
            Err(error) => panic!("{error}"),
        };
        let datagram = &bytes[..len];
        let flow = self.flow_from(from);
        let (packet, _) = self.hidden.open(&flow, datagram).expect("its CRC is right");
        let packet = Packet::parse(packet).expect("it is a packet");
        assert!(packet.bth().pkey == PKey::DEFAULT && !packet.bth().migrated, "{packet:?}");
        Some(Answer { headers: packet.headers, payload: packet.payload.to_vec() })
    }

    fn flow_from(&self, from: SocketAddr) -> Flow {
        assert_eq!(from.ip(), self.peer);
        Flow::new(from.ip(), self.own(), from.port()).expect("one family")
    }
}

/// The usual start of a request: nothing special, an answer wanted.
pub(crate) fn bth(opcode: Opcode, qpn: u32, psn: Psn) -> Bth {
    Bth {
        opcode,
        solicited: false,
        migrated: false,
        pad: 0,
        pkey: PKey::DEFAULT,
        fecn: false,
        becn: false,
        dest_qpn: QpNum::new(qpn),
        ack_req: true,
        psn,
    }
}

#[expect(unsafe_code, reason = "std sets neither option")]
fn option(socket: &UdpSocket, level: i32, name: i32, value: i32) {
    let len = size_of::<i32>() as libc::socklen_t;
    // SAFETY: the descriptor is open, and the option's value is one int that lives across the call.
    let code = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
}
