//! Files from which a program reads events: completion channels and the asynchronous event file of a context.
//!
//! Such a file is one end of a socket pair with message boundaries, so that `read`, `poll` and `O_NONBLOCK` are the
//! kernel's own; the event thread writes to the other end.
//!
//! *Who owns what.* The program owns the end that it reads and closes it; an [`EventFile`] owns the other. Events of
//! an object that is destroyed are taken back if nobody has read them, because the program waits until it has
//! acknowledged all that it was told of.

use std::collections::HashMap;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use parking_lot::Mutex;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::errno::Errno;

/// SPEC: ib_user_verbs.h `ib_uverbs_async_event_desc`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct AsyncEvent {
    element: u64,
    event_type: u32,
    reserved: u32,
}

/// SPEC: verbs.h `enum ibv_event_type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(crate) enum AsyncKind {
    CqError = 0,
    QpFatal = 1,
    QpRequestError = 2,
    QpAccessError = 3,
    DeviceFatal = 8,
    PortActive = 9,
    PortError = 10,
    LidChange = 11,
    GidChange = 18,
}

/// Where events go.
#[derive(Debug)]
pub(crate) struct EventFile {
    /// The end that the program reads.
    reader: RawFd,
    writer: OwnedFd,
    /// Events delivered and not taken back, by the program's name of the object.
    told: Mutex<HashMap<u64, u32>>,
}

impl EventFile {
    /// A new file; the descriptor that the program gets is [`reader`](Self::reader).
    pub(crate) fn new() -> Result<Self, Errno> {
        let mut ends = [0; 2];
        let kind = libc::SOCK_SEQPACKET | libc::SOCK_CLOEXEC;
        // SAFETY: the array has room for two descriptors.
        if unsafe { libc::socketpair(libc::AF_UNIX, kind, 0, ends.as_mut_ptr()) } != 0 {
            return Err(Errno::last());
        }
        let [reader, writer] = ends;
        // SAFETY: a descriptor that was just made and that nobody else has.
        let writer = unsafe { OwnedFd::from_raw_fd(writer) };
        Ok(Self { reader, writer, told: Mutex::default() })
    }

    pub(crate) const fn reader(&self) -> RawFd {
        self.reader
    }

    pub(crate) fn push_completion(&self, user_handle: u64) {
        self.push(user_handle, user_handle.as_bytes());
    }

    /// An event of DevX without its data.
    pub(crate) fn push_cookie(&self, cookie: u64) {
        self.push(cookie, cookie.as_bytes());
    }

    pub(crate) fn push_async(&self, element: u64, kind: AsyncKind) {
        // CAST: a fieldless enum of representation u32.
        let event = AsyncEvent { element, event_type: kind as u32, reserved: 0 };
        self.push(element, event.as_bytes());
    }

    fn push(&self, name: u64, message: &[u8]) {
        let mut told = self.told.lock();
        if self.send(message) {
            *told.entry(name).or_default() += 1;
        }
    }

    /// False if the program has closed its end, or reads too little.
    fn send(&self, message: &[u8]) -> bool {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        let (fd, from) = (self.writer.as_raw_fd(), message.as_ptr().cast());
        // SAFETY: `message` is readable for its length.
        let sent = unsafe { libc::send(fd, from, message.len(), flags) };
        usize::try_from(sent) == Ok(message.len())
    }

    /// Takes back what the program has not read of an object, and says how many events it was told of.
    pub(crate) fn forget(&self, name: u64) -> u32 {
        let mut told = self.told.lock();
        let delivered = told.remove(&name).unwrap_or(0);
        if delivered == 0 {
            return 0;
        }
        let mut unread = 0;
        for message in self.drain() {
            // Both kinds of event begin with the object's name.
            let is_its = message.first_chunk().is_some_and(|first| u64::from_ne_bytes(*first) == name);
            if is_its {
                unread += 1;
            } else if !self.send(&message) {
                break;
            }
        }
        delivered.saturating_sub(unread)
    }

    fn drain(&self) -> Vec<Vec<u8>> {
        let mut messages = Vec::new();
        let mut buffer = [0_u8; size_of::<AsyncEvent>()];
        loop {
            let (to, flags) = (buffer.as_mut_ptr().cast(), libc::MSG_DONTWAIT);
            // SAFETY: `buffer` is writable for its length.
            let got = unsafe { libc::recv(self.reader, to, buffer.len(), flags) };
            match usize::try_from(got) {
                Ok(len) if len != 0 => messages.push(buffer[..len].to_vec()),
                _ => return messages,
            }
        }
    }
}
