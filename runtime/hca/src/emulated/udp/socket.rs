//! One UDP socket: many datagrams per system call, none of which blocks.
//!
//! *Who owns what.* A [`Socket`] owns its descriptor. [`Outbox`] and [`Inbox`] own the bytes of
//! datagrams on their way; nothing is allocated per datagram. The kernel reads and writes these buffers
//! only during a call.
//!
//! Datagrams to one place are sent as one segmented send (`UDP_SEGMENT`) where the kernel can, and
//! arrive joined (`UDP_GRO`); where it cannot, one by one. Both are probed when the socket is made.
#![expect(unsafe_code, reason = "system calls on many datagrams at once have no safe wrapper in std")]

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;

use libc::{c_int, c_void};

use super::ident::{IdentTable, SEGMENTS_MAX};
use crate::HcaError;

/// Groups of datagrams that wait to be sent.
const GROUPS_MAX: usize = 64;
/// Bytes of datagrams that wait to be sent.
const OUTBOX: usize = 512 << 10;
/// Bytes of one group: what a 16-bit UDP length holds besides its own header and that of IPv4.
const GROUP_BYTES_MAX: usize = 65_535 - 8 - 20;
/// Receives of one call.
const RECEIVES: usize = 16;
/// Bytes of one receive: the longest that joined datagrams may be.
const RECEIVE_BYTES: usize = 65_536;
/// Bytes of socket buffer asked for; the kernel may give less.
const BUFFER_WANTED: c_int = 16 << 20;
/// What the kernel gives, in `SO_RCVBUF`'s terms, at most for real data.
const ACCOUNTING: usize = 2;
/// `IP_MTU`'s counterpart, which libc does not name everywhere.
const IPV6_MTU: c_int = 24;

/// What the kernel can do for datagrams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// It cuts a long send into datagrams.
    pub gso: bool,
    /// It joins datagrams of one sender.
    pub gro: bool,
    /// Bytes of datagrams that may wait to be received.
    pub receive_buffer: usize,
}

/// A bound, non-blocking UDP socket that never fragments.
#[derive(Debug)]
pub(super) struct Socket {
    socket: UdpSocket,
    local: SocketAddr,
    offloads: Offloads,
}

fn os(call: &'static str, error: &io::Error) -> HcaError {
    HcaError::Os { call, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

impl Socket {
    /// Binds `addr`; port 0 takes any.
    pub(super) fn bind(addr: SocketAddr) -> Result<Self, HcaError> {
        if addr.ip().is_unspecified() || addr.ip().is_multicast() {
            return Err(HcaError::Unreachable {
                reason: "a port needs one address of its own: the checksum of every packet covers it",
            });
        }
        let socket = UdpSocket::bind(addr).map_err(|error| os("bind", &error))?;
        socket.set_nonblocking(true).map_err(|error| os("ioctl", &error))?;
        let local = socket.local_addr().map_err(|error| os("getsockname", &error))?;
        let mut made = Self { socket, local, offloads: Offloads::default() };
        let never_fragment = match local {
            SocketAddr::V4(_) => made.set(libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO),
            SocketAddr::V6(_) => {
                made.set(libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)
            }
        };
        never_fragment.map_err(|error| os("setsockopt", &error))?;
        if local.is_ipv6() {
            // Other stacks rely on the ICRC and send no UDP checksum, which sockets refuse by default.
            let lenient = made.set(libc::SOL_UDP, libc::UDP_NO_CHECK6_RX, 1);
            lenient.map_err(|error| os("setsockopt", &error))?;
        }
        made.offloads = made.probe();
        Ok(made)
    }

    pub(super) const fn local(&self) -> SocketAddr {
        self.local
    }

    pub(super) const fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn probe(&self) -> Offloads {
        for (force, plain) in
            [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            // Without the privilege the system's limit holds; the size is read back below.
            if self.set(libc::SOL_SOCKET, force, BUFFER_WANTED).is_err() {
                let _ = self.set(libc::SOL_SOCKET, plain, BUFFER_WANTED);
            }
        }
        let buffer = self.get(libc::SOL_SOCKET, libc::SO_RCVBUF).unwrap_or(0);
        Offloads {
            // Size 0 means: as before, unsegmented. A kernel without it refuses the option.
            gso: self.set(libc::SOL_UDP, libc::UDP_SEGMENT, 0).is_ok(),
            gro: self.set(libc::SOL_UDP, libc::UDP_GRO, 1).is_ok(),
            receive_buffer: usize::try_from(buffer).unwrap_or(0) / ACCOUNTING,
        }
    }

    fn set(&self, level: c_int, name: c_int, value: c_int) -> io::Result<()> {
        let len = size_of::<c_int>() as libc::socklen_t;
        // SAFETY: reads one c_int from `value`, which lives through the call.
        let done =
            unsafe { libc::setsockopt(self.socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    fn get(&self, level: c_int, name: c_int) -> io::Result<c_int> {
        option(&self.socket, level, name)
    }

    /// Bytes of UDP payload that a datagram to `to` may have, as the route says now.
    pub(super) fn payload_max(&self, to: IpAddr) -> Result<usize, HcaError> {
        // Only a connected socket has a route to ask about. Nothing is sent.
        let probe = UdpSocket::bind((self.local.ip(), 0)).map_err(|error| os("bind", &error))?;
        probe.connect((to, 9)).map_err(|error| os("connect", &error))?;
        let (level, name, headers) = match self.local {
            SocketAddr::V4(_) => (libc::IPPROTO_IP, libc::IP_MTU, 20 + 8),
            SocketAddr::V6(_) => (libc::IPPROTO_IPV6, IPV6_MTU, 40 + 8),
        };
        let mtu = option(&probe, level, name).map_err(|error| os("getsockopt", &error))?;
        Ok(usize::try_from(mtu).unwrap_or(0).saturating_sub(headers))
    }

    /// Waits until a datagram is there, or for `nanos`; whether one is.
    pub(super) fn wait(&self, nanos: u64) -> bool {
        let mut poll = libc::pollfd { fd: self.socket.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let (secs, rest) = (nanos / 1_000_000_000, nanos % 1_000_000_000);
        let timeout = libc::timespec {
            tv_sec: libc::time_t::try_from(secs).unwrap_or(libc::time_t::MAX),
            // CAST: below 10^9.
            tv_nsec: rest as libc::c_long,
        };
        // SAFETY: one pollfd and one timespec, both ours; no signal mask.
        unsafe { libc::ppoll(&raw mut poll, 1, &raw const timeout, std::ptr::null()) > 0 }
    }
}

fn option(socket: &UdpSocket, level: c_int, name: c_int) -> io::Result<c_int> {
    let (mut value, mut len) = (0 as c_int, size_of::<c_int>() as libc::socklen_t);
    // SAFETY: writes at most one c_int to `value`, whose size `len` says.
    let done =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    if done == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Room for one `cmsghdr` with a 16-bit or 32-bit value, aligned as the kernel wants it.
type Control = [u64; 3];

/// Datagrams to one place that one send carries.
#[derive(Debug, Clone, Copy)]
struct Group {
    to: SocketAddr,
    offset: usize,
    len: usize,
    /// Bytes of every datagram but the last.
    segment: usize,
    count: u16,
    /// The last datagram is shorter: no other may follow it.
    closed: bool,
}

/// How an attempt to send went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Flushed {
    /// Datagrams that the kernel took.
    pub(super) sent: u64,
    /// Datagrams that it refused for good.
    pub(super) refused: u64,
}

/// Datagrams that wait to be sent, back to back in one buffer.
#[derive(Debug)]
pub(super) struct Outbox {
    bytes: Box<[u8]>,
    used: usize,
    groups: Vec<Group>,
    /// Segmented sends are possible.
    segments: bool,
    /// The address family has an identification that the kernel counts.
    counts_idents: bool,
}

impl Outbox {
    pub(super) fn new(socket: &Socket) -> Self {
        Self {
            bytes: vec![0; OUTBOX].into_boxed_slice(),
            used: 0,
            groups: Vec::with_capacity(GROUPS_MAX),
            segments: socket.offloads.gso,
            counts_idents: socket.local.is_ipv4(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.groups.is_empty()
    }

    /// Where the next datagram, of at most `len_max` bytes, may be written; `None` if there is no room.
    pub(super) fn room(&mut self, len_max: usize) -> Option<&mut [u8]> {
        let free = &mut self.bytes[self.used..];
        if self.groups.len() == GROUPS_MAX || free.len() < len_max {
            return None;
        }
        Some(&mut free[..len_max])
    }

    /// Keeps the first `len` bytes of the room as a datagram to `to`, its ICRC made for identification 0;
    /// gives the identification that it gets, and the bytes.
    pub(super) fn keep(&mut self, to: SocketAddr, len: usize, idents: &mut IdentTable) -> (u16, &[u8]) {
        let offset = self.used;
        self.used += len;
        let datagram = &mut self.bytes[offset..offset + len];
        if self.segments
            && let Some(group) = self.groups.last_mut()
            && group.takes(to, len)
        {
            let ident = if self.counts_idents { group.count } else { 0 };
            idents.put(datagram, ident);
            group.len += len;
            group.count += 1;
            group.closed = len < group.segment;
            return (ident, datagram);
        }
        self.groups.push(Group { to, offset, len, segment: len, count: 1, closed: false });
        (0, datagram)
    }

    /// Sends what waits; what the kernel has no room for goes on waiting.
    pub(super) fn flush(&mut self, socket: &Socket) -> Flushed {
        let mut done = Flushed::default();
        let mut first = 0;
        while first < self.groups.len() {
            match self.send(socket, first) {
                Ok(count) => {
                    let taken = &self.groups[first..first + count];
                    done.sent += taken.iter().map(|group| u64::from(group.count)).sum::<u64>();
                    first += count;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    // An interface that cannot cut sends says EIO; the lost datagrams are sent again.
                    self.segments &= error.raw_os_error() != Some(libc::EIO);
                    done.refused += u64::from(self.groups[first].count);
                    first += 1;
                }
            }
        }
        self.groups.drain(..first);
        self.compact();
        done
    }

    /// Moves what goes on waiting to the front.
    fn compact(&mut self) {
        let Some(start) = self.groups.first().map(|group| group.offset) else {
            self.used = 0;
            return;
        };
        self.bytes.copy_within(start..self.used, 0);
        self.groups.iter_mut().for_each(|group| group.offset -= start);
        self.used -= start;
    }

    /// One system call for the groups from `first` on; how many it took.
    fn send(&mut self, socket: &Socket, first: usize) -> io::Result<usize> {
        let groups = &self.groups[first..];
        let mut names = [Name::default(); GROUPS_MAX];
        let mut controls = [Control::default(); GROUPS_MAX];
        // SAFETY: plain C structures of integers and pointers, for which zero is a value.
        let mut vecs: [libc::iovec; GROUPS_MAX] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; GROUPS_MAX] = unsafe { zeroed() };
        for (nth, group) in groups.iter().enumerate() {
            let bytes = &mut self.bytes[group.offset..group.offset + group.len];
            vecs[nth] = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            names[nth] = Name::of(group.to);
            let header = &mut headers[nth].msg_hdr;
            header.msg_name = names[nth].as_mut_ptr();
            header.msg_namelen = names[nth].len;
            header.msg_iov = &raw mut vecs[nth];
            header.msg_iovlen = 1;
            if group.count > 1 {
                // CAST: a segment is at most 65 535 bytes, as its group is.
                put_segment(header, &mut controls[nth], group.segment as u16);
            }
        }
        // CAST: at most GROUPS_MAX.
        let count = groups.len() as u32;
        // SAFETY: `count` headers, each of which names buffers that live through the call.
        let sent = unsafe {
            libc::sendmmsg(socket.socket.as_raw_fd(), headers.as_mut_ptr(), count, libc::MSG_NOSIGNAL)
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }
}

impl Group {
    /// Whether a datagram of `len` bytes to `to` may join this group.
    fn takes(&self, to: SocketAddr, len: usize) -> bool {
        !self.closed
            && self.to == to
            && len <= self.segment
            && self.count < SEGMENTS_MAX
            && self.len + len <= GROUP_BYTES_MAX
    }
}

/// Adds the control message that makes a send a segmented one.
fn put_segment(header: &mut libc::msghdr, control: &mut Control, segment: u16) {
    let len = size_of::<u16>() as u32;
    header.msg_control = control.as_mut_ptr().cast();
    // SAFETY: computes a size.
    header.msg_controllen = unsafe { libc::CMSG_SPACE(len) } as usize;
    // SAFETY: `msg_control` points to at least CMSG_SPACE(2) bytes, aligned for a cmsghdr.
    unsafe {
        let message = libc::CMSG_FIRSTHDR(header);
        (*message).cmsg_level = libc::SOL_UDP;
        (*message).cmsg_type = libc::UDP_SEGMENT;
        (*message).cmsg_len = libc::CMSG_LEN(len) as usize;
        libc::CMSG_DATA(message).cast::<u16>().write_unaligned(segment);
    }
}

/// A datagram that arrived.
#[derive(Debug)]
pub(super) struct Datagram<'a> {
    pub(super) from: SocketAddr,
    /// Position among the datagrams that arrived joined with it: likely its identification.
    pub(super) nth: u16,
    pub(super) payload: &'a [u8],
}

#[derive(Debug, Clone, Copy)]
struct Received {
    from: Option<SocketAddr>,
    len: usize,
    segment: usize,
}

/// Datagrams that arrived.
#[derive(Debug)]
pub(super) struct Inbox {
    bytes: Box<[u8]>,
    received: Vec<Received>,
}

impl Inbox {
    pub(super) fn new() -> Self {
        let bytes = vec![0; RECEIVES * RECEIVE_BYTES].into_boxed_slice();
        Self { bytes, received: Vec::with_capacity(RECEIVES) }
    }

    /// Takes in what is there, in place of what was there before; whether there may be more.
    pub(super) fn fill(&mut self, socket: &Socket) -> bool {
        self.received.clear();
        let mut names = [Name::default(); RECEIVES];
        let mut controls = [Control::default(); RECEIVES];
        // SAFETY: plain C structures of integers and pointers, for which zero is a value.
        let mut vecs: [libc::iovec; RECEIVES] = unsafe { zeroed() };
        // SAFETY: as above.
        let mut headers: [libc::mmsghdr; RECEIVES] = unsafe { zeroed() };
        for (nth, bytes) in self.bytes.chunks_mut(RECEIVE_BYTES).enumerate() {
            vecs[nth] = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
            let header = &mut headers[nth].msg_hdr;
            header.msg_name = names[nth].as_mut_ptr();
            header.msg_namelen = size_of::<libc::sockaddr_storage>() as u32;
            header.msg_iov = &raw mut vecs[nth];
            header.msg_iovlen = 1;
            header.msg_control = controls[nth].as_mut_ptr().cast();
            header.msg_controllen = size_of::<Control>();
        }
        // SAFETY: RECEIVES headers, each of which names buffers of ours that live through the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.socket.as_raw_fd(),
                headers.as_mut_ptr(),
                RECEIVES as u32,
                libc::MSG_DONTWAIT,
                std::ptr::null_mut(),
            )
        };
        // An error that a datagram of ours caused at its destination is reported here; it tells nothing
        // that silence does not.
        let count = usize::try_from(count).unwrap_or(0);
        for (nth, header) in headers[..count].iter().enumerate() {
            let len = header.msg_len as usize;
            let whole = header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            let from = names[nth].address().filter(|_| whole);
            let segment = segment_of(&header.msg_hdr).unwrap_or(len).max(1);
            self.received.push(Received { from, len, segment });
        }
        count == RECEIVES
    }

    /// Whether the last fill took in nothing.
    pub(super) fn is_empty(&self) -> bool {
        self.received.is_empty()
    }

    /// The datagrams, in order of arrival.
    pub(super) fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        let slots = self.received.iter().zip(self.bytes.chunks(RECEIVE_BYTES));
        slots.filter_map(|(received, bytes)| Some((received.from?, received, bytes))).flat_map(
            |(from, received, bytes)| {
                let Received { len, segment, .. } = *received;
                // An empty datagram is one too.
                // CAST: at most 65 536 parts.
                (0..len.div_ceil(segment).max(1) as u16).map(move |nth| {
                    let start = usize::from(nth) * segment;
                    Datagram { from, nth, payload: &bytes[start..len.min(start + segment)] }
                })
            },
        )
    }
}

/// The size of joined datagrams, if this receive is of that kind.
fn segment_of(header: &libc::msghdr) -> Option<usize> {
    // SAFETY: `msg_control` holds `msg_controllen` bytes that the kernel wrote; the macros stay inside.
    unsafe {
        let mut message = libc::CMSG_FIRSTHDR(header);
        while !message.is_null() {
            if (*message).cmsg_level == libc::SOL_UDP && (*message).cmsg_type == libc::UDP_GRO {
                let size = libc::CMSG_DATA(message).cast::<c_int>().read_unaligned();
                return usize::try_from(size).ok().filter(|size| *size != 0);
            }
            message = libc::CMSG_NXTHDR(header, message);
        }
    }
    None
}

/// A socket address as the kernel spells it.
#[derive(Clone, Copy)]
struct Name {
    storage: libc::sockaddr_storage,
    len: u32,
}

impl Default for Name {
    fn default() -> Self {
        // SAFETY: a structure of integers, for which zero is a value.
        Self { storage: unsafe { zeroed() }, len: 0 }
    }
}

impl Name {
    fn of(addr: SocketAddr) -> Self {
        let mut name = Self::default();
        match addr {
            SocketAddr::V4(v4) => {
                let raw = libc::sockaddr_in {
                    // CAST: a small constant of the system.
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: v4.port().to_be(),
                    sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.ip().octets()) },
                    sin_zero: [0; 8],
                };
                name.len = size_of::<libc::sockaddr_in>() as u32;
                // SAFETY: the storage is larger than, and aligned for, every socket address.
                unsafe { (&raw mut name.storage).cast::<libc::sockaddr_in>().write(raw) };
            }
            SocketAddr::V6(v6) => {
                let raw = libc::sockaddr_in6 {
                    // CAST: as above.
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: v6.port().to_be(),
                    sin6_flowinfo: v6.flowinfo(),
                    sin6_addr: libc::in6_addr { s6_addr: v6.ip().octets() },
                    sin6_scope_id: v6.scope_id(),
                };
                name.len = size_of::<libc::sockaddr_in6>() as u32;
                // SAFETY: as above.
                unsafe { (&raw mut name.storage).cast::<libc::sockaddr_in6>().write(raw) };
            }
        }
        name
    }

    fn as_mut_ptr(&mut self) -> *mut c_void {
        (&raw mut self.storage).cast()
    }

    /// The address, if it is of a family that we know.
    fn address(&self) -> Option<SocketAddr> {
        match c_int::from(self.storage.ss_family) {
            libc::AF_INET => {
                // SAFETY: the storage is larger than, and aligned for, a sockaddr_in, of plain integers.
                let raw = unsafe { (&raw const self.storage).cast::<libc::sockaddr_in>().read() };
                let ip = Ipv4Addr::from(raw.sin_addr.s_addr.to_ne_bytes());
                Some(SocketAddrV4::new(ip, u16::from_be(raw.sin_port)).into())
            }
            libc::AF_INET6 => {
                // SAFETY: as above, for a sockaddr_in6.
                let raw = unsafe { (&raw const self.storage).cast::<libc::sockaddr_in6>().read() };
                let (ip, port) = (Ipv6Addr::from(raw.sin6_addr.s6_addr), u16::from_be(raw.sin6_port));
                Some(SocketAddrV6::new(ip, port, raw.sin6_flowinfo, raw.sin6_scope_id).into())
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pair(ip: &str) -> Option<[Socket; 2]> {
        let addr = SocketAddr::new(ip.parse().unwrap(), 0);
        match (Socket::bind(addr), Socket::bind(addr)) {
            (Ok(one), Ok(other)) => Some([one, other]),
            (Err(error), _) | (_, Err(error)) => {
                skip(&format!("no socket on {ip}: {error}; give the loopback interface that address"));
                None
            }
        }
    }

    /// Straight to stderr: the runner hides what a passing test prints.
    fn skip(why: &str) {
        let _ = writeln!(io::stderr(), "SKIPPED: {why}");
    }

    /// Everything that arrives: sender, position, payload.
    fn receive(socket: &Socket, count: usize) -> Vec<(SocketAddr, u16, Vec<u8>)> {
        let (mut inbox, mut all) = (Inbox::new(), Vec::new());
        while all.len() < count && socket.wait(10_000_000_000) {
            inbox.fill(socket);
            all.extend(inbox.datagrams().map(|one| (one.from, one.nth, one.payload.to_vec())));
        }
        all
    }

    fn keep(outbox: &mut Outbox, idents: &mut IdentTable, to: SocketAddr, bytes: &[u8]) {
        outbox.room(bytes.len()).unwrap().copy_from_slice(bytes);
        outbox.keep(to, bytes.len(), idents);
    }

    /// Lengths of datagrams that make four groups.
    const MIXTURE: [usize; 10] = [1000, 1000, 1000, 20, 4136, 4136, 300, 300, 304, 16];

    /// Fills an outbox with the mixture; the datagrams.
    fn keep_mixture(outbox: &mut Outbox, to: SocketAddr) -> Vec<Vec<u8>> {
        let mut idents = IdentTable::default();
        // Without an identification nothing but the payload is compared below.
        outbox.counts_idents = false;
        let sent: Vec<Vec<u8>> = (0_u8..).zip(MIXTURE).map(|(nth, len)| vec![nth; len]).collect();
        sent.iter().for_each(|bytes| keep(outbox, &mut idents, to, bytes));
        sent
    }

    #[test]
    fn datagrams_of_any_mixture_arrive_whole_and_in_order() {
        for (ip, segments) in [("127.0.0.1", true), ("::1", true), ("127.0.0.1", false), ("::1", false)] {
            let Some([near, far]) = pair(ip) else { continue };
            let offloads = near.offloads();
            println!("{ip}, may be joined: {segments}: {offloads:?}");
            let mut outbox = Outbox::new(&near);
            outbox.segments &= segments;
            let joins = outbox.segments;
            let sent = keep_mixture(&mut outbox, far.local());
            let groups = if joins { 4 } else { MIXTURE.len() };
            assert_eq!(outbox.groups.len(), groups, "runs of one size, each ended by a shorter one");
            assert_eq!(outbox.flush(&near), Flushed { sent: 10, refused: 0 });
            assert!(outbox.is_empty());
            let arrived = receive(&far, sent.len());
            assert!(arrived.iter().all(|(from, ..)| *from == near.local()));
            if joins && offloads.gro {
                let nths: Vec<u16> = arrived.iter().map(|(_, nth, _)| *nth).collect();
                assert_eq!(nths, [0, 1, 2, 3, 0, 1, 2, 0, 0, 1], "joined as they left");
            }
            assert_eq!(arrived.into_iter().map(|(_, _, bytes)| bytes).collect::<Vec<_>>(), sent);
        }
    }

    /// Puts an IPv6 header of options in front of all that a socket sends: older kernels refuse to cut such
    /// sends with EIO, newer ones cut them in software.
    fn add_options(socket: &Socket) -> io::Result<()> {
        // One option of padding.
        let header: [u8; 8] = [0, 0, 1, 4, 0, 0, 0, 0];
        // SAFETY: the kernel reads as many bytes as `header` has.
        let status = unsafe {
            libc::setsockopt(
                socket.socket.as_raw_fd(),
                libc::IPPROTO_IPV6,
                libc::IPV6_DSTOPTS,
                header.as_ptr().cast(),
                size_of_val(&header) as u32,
            )
        };
        if status == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }

    #[test]
    fn sends_that_hardware_cannot_cut_arrive_all_the_same() {
        let Some([near, far]) = pair("::1") else { return };
        if let Err(error) = add_options(&near) {
            skip(&format!("no options on an IPv6 socket: {error}; run as root"));
            return;
        }
        let mut outbox = Outbox::new(&near);
        let had_segments = outbox.segments;
        keep_mixture(&mut outbox, far.local());
        let first = outbox.flush(&near);
        if had_segments && !outbox.segments {
            assert_eq!(first, Flushed { sent: 1, refused: 9 }, "all but the one that is alone");
        } else {
            assert_eq!(first, Flushed { sent: 10, refused: 0 });
        }
        let sent = keep_mixture(&mut outbox, far.local());
        assert_eq!(outbox.flush(&near), Flushed { sent: 10, refused: 0 });
        let before = usize::try_from(first.sent).unwrap();
        let arrived = receive(&far, before + sent.len()).into_iter().map(|(_, _, bytes)| bytes);
        assert_eq!(arrived.skip(before).collect::<Vec<_>>(), sent);
    }

    #[test]
    fn an_outbox_is_bounded() {
        let Some([near, far]) = pair("127.0.0.1") else { return };
        let (mut outbox, mut idents) = (Outbox::new(&near), IdentTable::default());
        for nth in 0..GROUPS_MAX {
            let to = if nth % 2 == 0 { far.local() } else { near.local() };
            keep(&mut outbox, &mut idents, to, &[0; 16]);
        }
        assert!(outbox.room(16).is_none());
        assert_eq!(outbox.flush(&near).sent, GROUPS_MAX as u64);
        assert!(outbox.room(OUTBOX).is_some() && outbox.room(OUTBOX + 1).is_none());
    }

    #[test]
    fn addresses_and_routes_that_cannot_serve_are_refused() {
        let any = Socket::bind("0.0.0.0:0".parse().unwrap());
        assert!(matches!(any, Err(HcaError::Unreachable { .. })));
        let foreign = Socket::bind("192.0.2.1:4791".parse().unwrap());
        assert!(matches!(foreign, Err(HcaError::Os { call: "bind", errno: libc::EADDRNOTAVAIL })));
        let Some([near, _]) = pair("127.0.0.1") else { return };
        let loopback = near.payload_max("127.0.0.1".parse().unwrap()).unwrap();
        assert!(loopback > 1200, "{loopback} bytes");
        assert!(near.payload_max("::1".parse().unwrap()).is_err(), "another family");
        assert!(!near.wait(1000), "nothing was sent");
    }
}
