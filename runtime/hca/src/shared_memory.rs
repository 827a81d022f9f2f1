//! Memory that processes of one host share: anonymous, sealed files, named by plain bytes.
//!
//! A [`SharedRegion`] is a range that this process allocated from a memfd of its own. Its handle (from
//! [`export`]) is a few bytes that another process of the same user turns into a [`PeerRegion`], through
//! `/proc/<pid>/fd/<fd>`. A handle says which process, which descriptor, and a random nonce that also
//! stands in the file's last page: a reused process id or descriptor leads to another nonce, and to a
//! typed refusal.
//!
//! ```text
//!  memfd   | lead: 0 .. align | data: what the owner was given ...           | last page: magic, nonce |
//!          '- so that the data is aligned in the owner's address space
//! ```
//!
//! *Who owns what.* The region owns file, mapping and its entry in the process-wide table of regions; a
//! peer region owns its own mapping and outlives the peer. Files have no name: they vanish with the last
//! process that maps them. They are sealed against shrinking and growing before anybody learns of them,
//! and only sealed files are opened, so that no mapping ever loses its pages.
//!
//! INVARIANT: bytes are accessed by atomics or opaque copies only, because others access them too.
#![expect(unsafe_code, reason = "system calls on descriptors, and views of mapped memory")]

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::{MmapOptions, MmapRaw};
use parking_lot::RwLock;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::MemoryRegion;
use crate::host_memory::View;

/// Unit of mappings, and the length of a file's last part.
const PAGE: u64 = 4096;
/// Largest alignment of a region's data.
pub const ALIGN_MAX: u64 = 1 << 30;
/// Longest region.
pub const LEN_MAX: u64 = 1 << 46;
/// First bytes of a file's last page.
const TRAILER_MAGIC: [u8; 8] = *b"IBXMEM\0\x01";
/// First bytes of a handle.
const HANDLE_MAGIC: [u8; 4] = *b"IBXM";
/// Version of handles and of the last page.
const VERSION: u16 = 1;
/// Bytes of a handle.
pub const HANDLE_LEN: usize = size_of::<Handle>();
/// What every file is sealed with before its handle is given away.
const SEALS: libc::c_int = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW;

/// Why memory could not be shared, or a peer's could not be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SharedMemoryError {
    /// A value is outside what is possible; nothing was created.
    #[error("{field} is {value}; it must be {min}..={max}")]
    OutOfRange {
        /// Which value.
        field: &'static str,
        /// What it was.
        value: u64,
        /// Smallest valid value.
        min: u64,
        /// Largest valid value.
        max: u64,
    },
    /// The operating system refused a call.
    #[error("{call} failed with errno {errno}")]
    Os {
        /// Name of the call.
        call: &'static str,
        /// Its error number.
        errno: i32,
    },
    /// The range does not lie in one shared region of this process.
    #[error("{len} bytes at {addr:#x} are not inside a shared region of this process")]
    NotShared {
        /// First byte.
        addr: u64,
        /// Length.
        len: u64,
    },
    /// The bytes are not a handle of this version.
    #[error("these {len} bytes are no handle of shared memory: {what}")]
    Malformed {
        /// What is wrong with them.
        what: &'static str,
        /// How many bytes there were.
        len: u64,
    },
    /// The process is gone, closed the descriptor, or belongs to somebody else.
    #[error("descriptor {fd} of process {pid} cannot be opened: errno {errno} (ended? another user?)")]
    Unreachable {
        /// The process.
        pid: u32,
        /// Its descriptor.
        fd: i32,
        /// Why: ENOENT for what is gone, EACCES for what is not ours.
        errno: i32,
    },
    /// What stands there now is not the memory that the handle was made for.
    #[error("descriptor {fd} of process {pid} is another file than the handle's: {what}")]
    Replaced {
        /// The process.
        pid: u32,
        /// Its descriptor.
        fd: i32,
        /// Which property differs.
        what: &'static str,
    },
}

fn os(call: &'static str) -> SharedMemoryError {
    SharedMemoryError::Os { call, errno: errno_of(&std::io::Error::last_os_error()) }
}

fn errno_of(error: &std::io::Error) -> i32 {
    error.raw_os_error().unwrap_or(libc::EIO)
}

/// The last page of every file: what proves that it is the one a handle means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Trailer {
    magic: [u8; 8],
    nonce: U64,
}

/// A range of another process's memory, as plain bytes.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Handle {
    magic: [u8; 4],
    version: U16,
    zero: U16,
    pid: U32,
    fd: U32,
    nonce: U64,
    file_len: U64,
    offset: U64,
    len: U64,
}

const _: () = assert!(size_of::<Handle>() == 48);

/// Which file, of which process: what a handle says besides the range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FileId {
    pub(crate) pid: u32,
    pub(crate) fd: i32,
    pub(crate) nonce: u64,
    pub(crate) file_len: u64,
}

/// A region of this process, as the table knows it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Known {
    pub(crate) addr: u64,
    pub(crate) len: u64,
    /// Position of `addr` in the file.
    pub(crate) lead: u64,
    pub(crate) file: FileId,
}

/// Regions of this process by the address of their first byte.
static REGIONS: RwLock<BTreeMap<u64, Known>> = RwLock::new(BTreeMap::new());
/// Counts regions that were dropped: whoever remembers a [`Known`] forgets it when this moves.
static DROPPED: AtomicU64 = AtomicU64::new(0);

/// The region of this process that holds `[addr, addr + len)`.
pub(crate) fn find(addr: u64, len: u64) -> Option<Known> {
    let regions = REGIONS.read();
    let (_, known) = regions.range(..=addr).next_back()?;
    let offset = addr - known.addr;
    (offset <= known.len && len <= known.len - offset).then_some(*known)
}

/// A number that changes whenever a region of this process is dropped.
pub(crate) fn drops() -> u64 {
    DROPPED.load(Ordering::Acquire)
}

/// Makes the handle of a range that lies in a [`SharedRegion`] of this process.
///
/// The handle is good while the region lives; it may be sent to any process of this host and user.
///
/// # Errors
/// [`SharedMemoryError::NotShared`] if no region holds the range.
pub fn export(addr: u64, len: u64) -> Result<Vec<u8>, SharedMemoryError> {
    let known = find(addr, len).ok_or(SharedMemoryError::NotShared { addr, len })?;
    let FileId { pid, fd, nonce, file_len } = known.file;
    let handle = Handle {
        magic: HANDLE_MAGIC,
        version: U16::new(VERSION),
        zero: U16::ZERO,
        pid: U32::new(pid),
        fd: U32::new(fd.cast_unsigned()),
        nonce: U64::new(nonce),
        file_len: U64::new(file_len),
        offset: U64::new(known.lead + (addr - known.addr)),
        len: U64::new(len),
    };
    Ok(handle.as_bytes().to_vec())
}

/// Memory of this process that others may map.
#[derive(Debug)]
pub struct SharedRegion {
    map: MmapRaw,
    file: File,
    known: Known,
}

impl SharedRegion {
    /// Allocates `len` zeroed bytes whose address is a multiple of `align`, a power of two.
    ///
    /// # Errors
    /// [`SharedMemoryError::OutOfRange`] for a length or alignment that cannot be;
    /// [`SharedMemoryError::Os`] if memory or descriptors are used up.
    pub fn new(len: u64, align: u64) -> Result<Self, SharedMemoryError> {
        if len == 0 || len > LEN_MAX {
            let (field, min, max) = ("length of a shared region", 1, LEN_MAX);
            return Err(SharedMemoryError::OutOfRange { field, value: len, min, max });
        }
        if !align.is_power_of_two() || align > ALIGN_MAX {
            let (field, min, max) = ("alignment of a shared region", 1, ALIGN_MAX);
            return Err(SharedMemoryError::OutOfRange { field, value: align, min, max });
        }
        let slack = if align > PAGE { align } else { 0 };
        let file_len = len.next_multiple_of(PAGE) + slack + PAGE;
        let (file, nonce) = sealed_file(file_len)?;
        // CAST: at most LEN_MAX and some, which fits usize on a 64-bit host.
        let map = MmapOptions::new().len((file_len - PAGE) as usize).map_raw(&file);
        let map = map.map_err(|error| SharedMemoryError::Os { call: "mmap", errno: errno_of(&error) })?;
        let start = map.as_mut_ptr().expose_provenance() as u64;
        let lead = start.next_multiple_of(align.max(PAGE)) - start;
        let file_id = FileId { pid: std::process::id(), fd: file.as_raw_fd(), nonce, file_len };
        let known = Known { addr: start + lead, len, lead, file: file_id };
        REGIONS.write().insert(known.addr, known);
        Ok(Self { map, file, known })
    }

    /// The first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        // CAST: within the mapping.
        self.map.as_mut_ptr().wrapping_add(self.known.lead as usize)
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.known.len
    }

    /// Always false: a region has at least one byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.known.len == 0
    }

    /// Access to the bytes.
    #[must_use]
    pub fn view(&self) -> View<'_> {
        // SAFETY: the mapping lives as long as `self`; other processes map it for atomic access and copies.
        unsafe { View::from_raw(self.as_ptr(), self.known.len) }
    }

    /// The region to register with a device.
    #[must_use]
    pub fn region(&self) -> MemoryRegion {
        MemoryRegion::host(self.as_ptr(), self.known.len)
    }

    /// The handle of the whole region; see [`export`].
    ///
    /// # Errors
    /// None while the region lives.
    pub fn handle(&self) -> Result<Vec<u8>, SharedMemoryError> {
        export(self.known.addr, self.known.len)
    }

    pub(crate) const fn file_id(&self) -> FileId {
        self.known.file
    }
}

impl Drop for SharedRegion {
    fn drop(&mut self) {
        debug_assert!(self.file.as_raw_fd() == self.known.file.fd, "a region keeps its descriptor");
        REGIONS.write().remove(&self.known.addr);
        DROPPED.fetch_add(1, Ordering::AcqRel);
    }
}

/// A new anonymous file of `len` bytes with a nonce in its last page, sealed.
fn sealed_file(len: u64) -> Result<(File, u64), SharedMemoryError> {
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
    // SAFETY: a system call with a constant name.
    let fd = unsafe { libc::memfd_create(c"ibex".as_ptr(), flags) };
    if fd < 0 {
        return Err(os("memfd_create"));
    }
    // SAFETY: a descriptor that was just made and that nobody else knows.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let failed = |call| move |error: std::io::Error| SharedMemoryError::Os { call, errno: errno_of(&error) };
    file.set_len(len).map_err(failed("ftruncate"))?;
    let nonce = random()?;
    let trailer = Trailer { magic: TRAILER_MAGIC, nonce: U64::new(nonce) };
    file.write_all_at(trailer.as_bytes(), len - PAGE).map_err(failed("pwrite"))?;
    // SAFETY: a system call on our descriptor.
    if unsafe { libc::fcntl(fd, libc::F_ADD_SEALS, SEALS | libc::F_SEAL_SEAL) } != 0 {
        return Err(os("fcntl"));
    }
    Ok((file, nonce))
}

/// A random number other than zero.
pub(crate) fn random() -> Result<u64, SharedMemoryError> {
    let mut bytes = [0; 8];
    // SAFETY: fills a buffer of that length.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), bytes.len(), 0) };
    match u64::from_ne_bytes(bytes) {
        _ if got != 8 => Err(os("getrandom")),
        nonce => Ok(nonce.max(1)),
    }
}

/// How a peer's memory is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerAccess {
    /// For reading; a write is not possible through this mapping.
    ReadOnly,
    /// For reading and writing.
    ReadWrite,
}

/// A range of another process's [`SharedRegion`], mapped here.
#[derive(Debug)]
pub struct PeerRegion {
    map: MmapRaw,
    len: u64,
    access: PeerAccess,
}

impl PeerRegion {
    /// Maps what a handle names.
    ///
    /// The bytes are not trusted: the file must be sealed and carry the handle's nonce, and the range must
    /// lie inside it.
    ///
    /// # Errors
    /// [`SharedMemoryError`]: malformed bytes, a process or descriptor that is gone or not ours, another
    /// file in its place, or a refusal to map.
    pub fn open(handle: &[u8], access: PeerAccess) -> Result<Self, SharedMemoryError> {
        let malformed = |what| SharedMemoryError::Malformed { what, len: handle.len() as u64 };
        let parsed = Handle::read_from_bytes(handle).map_err(|_| malformed("a handle has 48 bytes"))?;
        if parsed.magic != HANDLE_MAGIC || parsed.version.get() != VERSION {
            return Err(malformed("it does not begin with IBXM and version 1"));
        }
        let file = FileId {
            pid: parsed.pid.get(),
            fd: parsed.fd.get().cast_signed(),
            nonce: parsed.nonce.get(),
            file_len: parsed.file_len.get(),
        };
        Self::map(file, parsed.offset.get(), parsed.len.get(), access)
    }

    /// Maps `len` bytes from `offset` of a file, after checking that it is that file.
    pub(crate) fn map(
        id: FileId,
        offset: u64,
        len: u64,
        access: PeerAccess,
    ) -> Result<Self, SharedMemoryError> {
        let room = id.file_len.checked_sub(PAGE).and_then(|data| data.checked_sub(offset)).unwrap_or(0);
        if len == 0 || len > room {
            let field = "length of a peer's range";
            return Err(SharedMemoryError::OutOfRange { field, value: len, min: 1, max: room });
        }
        let file = open_checked(id, access)?;
        let mut options = MmapOptions::new();
        // CAST: within a file that exists, so it fits usize on a 64-bit host.
        options.offset(offset).len(len as usize);
        let map = match access {
            PeerAccess::ReadOnly => options.map_raw_read_only(&file),
            PeerAccess::ReadWrite => options.map_raw(&file),
        };
        let map = map.map_err(|error| SharedMemoryError::Os { call: "mmap", errno: errno_of(&error) })?;
        Ok(Self { map, len, access })
    }

    /// The first byte. Writing through it is possible only with [`PeerAccess::ReadWrite`].
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Length in bytes.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Always false: a region has at least one byte.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Access to the bytes; `None` for a mapping that cannot be written.
    #[must_use]
    pub fn view(&self) -> Option<View<'_>> {
        // SAFETY: the mapping lives as long as `self`; whoever else maps it uses atomics and copies.
        (self.access == PeerAccess::ReadWrite).then(|| unsafe { View::from_raw(self.as_ptr(), self.len) })
    }
}

/// Opens a peer's file, if it is the one meant.
fn open_checked(id: FileId, access: PeerAccess) -> Result<File, SharedMemoryError> {
    let FileId { pid, fd, .. } = id;
    if pid == 0 || fd < 0 {
        return Err(SharedMemoryError::Unreachable { pid, fd, errno: libc::ENOENT });
    }
    let writes = access == PeerAccess::ReadWrite;
    let mut options = OpenOptions::new();
    // Not blocking: what stands there now may be a pipe.
    options.read(true).write(writes).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK);
    let file = options.open(format!("/proc/{pid}/fd/{fd}"));
    let file = file.map_err(|e| SharedMemoryError::Unreachable { pid, fd, errno: errno_of(&e) })?;
    let replaced = |what| SharedMemoryError::Replaced { pid, fd, what };
    // SAFETY: a system call on our descriptor; it fails on anything but a file in memory.
    let seals = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GET_SEALS) };
    if seals < 0 || seals & SEALS != SEALS {
        return Err(replaced("it is not sealed"));
    }
    let len = file.metadata().map_err(|_| replaced("its length is unknown"))?.len();
    if len != id.file_len {
        return Err(replaced("its length"));
    }
    let mut trailer = [0; size_of::<Trailer>()];
    file.read_exact_at(&mut trailer, len - PAGE).map_err(|_| replaced("its last page"))?;
    let expected = Trailer { magic: TRAILER_MAGIC, nonce: U64::new(id.nonce) };
    match Trailer::read_from_bytes(&trailer) == Ok(expected) {
        true => Ok(file),
        false => Err(replaced("its nonce")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr_of(region: &SharedRegion) -> u64 {
        region.as_ptr().addr() as u64
    }

    #[test]
    fn a_range_is_seen_through_its_handle() {
        let region = SharedRegion::new(10_000, 8).unwrap();
        region.view().write(5000, b"shared");
        let handle = export(addr_of(&region) + 5000, 6).unwrap();
        assert_eq!(handle.len(), HANDLE_LEN);
        let peer = PeerRegion::open(&handle, PeerAccess::ReadWrite).unwrap();
        assert_eq!(peer.view().unwrap().to_vec(0, 6), b"shared");
        peer.view().unwrap().write(0, b"S");
        assert_eq!(region.view().to_vec(5000, 6), b"Shared");
        let read_only = PeerRegion::open(&handle, PeerAccess::ReadOnly).unwrap();
        assert!(read_only.view().is_none());
        drop(region);
        assert_eq!(peer.view().unwrap().to_vec(0, 6), b"Shared", "it outlives its owner");
    }

    #[test]
    fn data_is_aligned_as_asked() {
        for align in [1, 64, 4096, 1 << 16, 1 << 21] {
            let region = SharedRegion::new(100, align).unwrap();
            assert!(addr_of(&region).is_multiple_of(align.max(PAGE)), "{align}");
            let peer = PeerRegion::open(&region.handle().unwrap(), PeerAccess::ReadWrite).unwrap();
            region.view().write(99, &[7]);
            assert_eq!(peer.view().unwrap().to_vec(99, 1), [7]);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        let refused = |len, align| SharedRegion::new(len, align).map(|_| ()).unwrap_err();
        assert!(matches!(refused(0, 8), SharedMemoryError::OutOfRange { value: 0, .. }));
        assert!(matches!(refused(LEN_MAX + 1, 8), SharedMemoryError::OutOfRange { .. }));
        assert!(matches!(refused(8, 3), SharedMemoryError::OutOfRange { value: 3, .. }));
        assert!(matches!(refused(8, ALIGN_MAX * 2), SharedMemoryError::OutOfRange { .. }));
        let region = SharedRegion::new(100, 8).unwrap();
        let addr = addr_of(&region);
        for (addr, len) in [(addr - 1, 1), (addr, 101), (addr + 101, 0), (addr + 50, 51), (8, 8)] {
            assert_eq!(export(addr, len), Err(SharedMemoryError::NotShared { addr, len }));
        }
    }

    fn open_with(handle: &[u8], at: usize, bytes: &[u8]) -> SharedMemoryError {
        let mut handle = handle.to_vec();
        handle[at..at + bytes.len()].copy_from_slice(bytes);
        PeerRegion::open(&handle, PeerAccess::ReadOnly).map(|_| ()).unwrap_err()
    }

    #[test]
    fn every_lie_in_a_handle_is_refused_with_its_reason() {
        let region = SharedRegion::new(8192, 8).unwrap();
        let other = SharedRegion::new(8192, 8).unwrap();
        let good = region.handle().unwrap();
        assert!(matches!(open_with(&good, 0, b"X"), SharedMemoryError::Malformed { .. }));
        assert!(matches!(open_with(&good, 4, &[2]), SharedMemoryError::Malformed { .. }));
        let short = PeerRegion::open(&good[..47], PeerAccess::ReadOnly).unwrap_err();
        assert!(matches!(short, SharedMemoryError::Malformed { len: 47, .. }));
        // A process that does not exist, one that is not there any more, a descriptor that is closed.
        let gone = |error| matches!(error, SharedMemoryError::Unreachable { errno: libc::ENOENT, .. });
        assert!(gone(open_with(&good, 8, &[0xff, 0xff, 0xff, 0x7f])));
        assert!(gone(open_with(&good, 8, &[0; 4])));
        assert!(gone(open_with(&good, 12, &[0xff, 0xff, 0, 0])));
        assert!(gone(open_with(&good, 12, &[0xff; 4])));
        // Another file under the same descriptor.
        let fd = other.file_id().fd.to_le_bytes();
        let replaced =
            |what| move |error| matches!(error, SharedMemoryError::Replaced { what: w, .. } if w == what);
        assert!(replaced("its nonce")(open_with(&good, 12, &fd)));
        assert!(replaced("its nonce")(open_with(&good, 16, &[1, 2, 3])));
        assert!(replaced("its length")(open_with(&good, 25, &[0x90])));
        let plain = File::open("/proc/self/exe").unwrap();
        assert!(replaced("it is not sealed")(open_with(&good, 12, &plain.as_raw_fd().to_le_bytes())));
        // A range outside the file, by length and by offset.
        assert!(matches!(open_with(&good, 40, &[1, 0x20]), SharedMemoryError::OutOfRange { .. }));
        assert!(matches!(open_with(&good, 32, &[0xff; 8]), SharedMemoryError::OutOfRange { .. }));
        assert!(matches!(open_with(&good, 40, &[0; 8]), SharedMemoryError::OutOfRange { .. }));
    }

    #[test]
    fn nobody_can_shrink_a_region_under_those_who_mapped_it() {
        let region = SharedRegion::new(8192, 8).unwrap();
        let file = open_checked(region.file_id(), PeerAccess::ReadWrite).unwrap();
        assert_eq!(file.set_len(0).unwrap_err().raw_os_error(), Some(libc::EPERM));
        assert_eq!(file.set_len(1 << 20).unwrap_err().raw_os_error(), Some(libc::EPERM));
    }
}
