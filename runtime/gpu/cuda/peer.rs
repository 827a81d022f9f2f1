//! Device memory between processes of one host, by CUDA's own handles or by descriptors; and to NICs by dma-buf.
//!
//! An exported allocation belongs to its exporter; a mapping of it to the importer, until dropped. Nothing in the bytes
//! of a handle is believed: the driver says whether it knows the allocation, and how long that is; the system, whether
//! the exporter is the process that it was.
//!
//! ```text
//!  0         8            24       32       40                       64    104
//!  | IBEXCUD1| GPU's UUID | offset | length | CUipcMemHandle                |
//!  | IBEXCUD2| GPU's UUID | offset | length | size | pid | fd | start |
//! ```

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use ibex_hca::shared_memory::SharedMemoryError;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use super::super::GpuError;
use super::calls::{CallError, IpcHandle, RawDevice};
use super::context::Context;
use super::vmm::Mapped;

/// Says what the bytes are: CUDA's own handle, or a descriptor.
const MAGIC_IPC: [u8; 8] = *b"IBEXCUD1";
const MAGIC_DESCRIPTOR: [u8; 8] = *b"IBEXCUD2";
/// Where the two begin to differ, and how long they are.
const HEAD_LEN: usize = 40;
const IPC_LEN: usize = HEAD_LEN + IpcHandle::LEN;
const DESCRIPTOR_LEN: usize = HEAD_LEN + 24;
/// Longest allocation that is believed.
const SIZE_MAX: u64 = 1 << 46;
/// Maps a peer's memory also where peer access was not enabled before.
///
/// SPEC: cuda.h `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY_PEER_ACCESS: u32 = 1;
/// SPEC: cuda.h `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
const DMA_BUF_FD: c_int = 1;
/// Field of `/proc/PID/stat` behind the name: when the process started, in ticks since boot.
const STAT_START: usize = 19;

/// What an exporter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exported {
    pub(super) uuid: [u8; 16],
    /// Of the range, in the allocation.
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) by: Means,
}

/// What names the allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Means {
    /// CUDA's handle.
    Ipc(IpcHandle),
    /// A descriptor of a process.
    Descriptor(Descriptor),
}

/// A descriptor of pages, and whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Descriptor {
    /// Bytes of the pages.
    size: u64,
    pid: u32,
    fd: c_int,
    /// When the process started: a later one with its number is another.
    started: u64,
}

impl Descriptor {
    /// One of this process.
    pub(super) fn ours(fd: c_int, size: u64) -> Result<Self, GpuError> {
        let pid = std::process::id();
        let unknown = SharedMemoryError::Unreachable { pid, fd, errno: libc::ESRCH };
        let started = started_at(pid).ok_or(GpuError::Shared(unknown))?;
        Ok(Self { size, pid, fd, started })
    }

    /// The same descriptor, in this process.
    fn fetch(&self) -> Result<OwnedFd, GpuError> {
        let Self { pid, fd, started, .. } = *self;
        let refused = |errno: rustix::io::Errno| {
            GpuError::Shared(SharedMemoryError::Unreachable { pid, fd, errno: errno.raw_os_error() })
        };
        let number = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let number = number.ok_or_else(|| refused(rustix::io::Errno::SRCH))?;
        let process = pidfd_open(number, PidfdFlags::empty()).map_err(refused)?;
        // Held by its descriptor, it is no other process from here on.
        if started_at(pid) != Some(started) {
            let what = "the process is a later one";
            return Err(GpuError::Shared(SharedMemoryError::Replaced { pid, fd, what }));
        }
        pidfd_getfd(&process, fd, PidfdGetfdFlags::empty()).map_err(refused)
    }
}

/// When a process started; `None` if there is none.
fn started_at(pid: u32) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name stands in brackets, and may hold any character.
    stat.rsplit_once(')')?.1.split_whitespace().nth(STAT_START)?.parse().ok()
}

impl Exported {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(IPC_LEN);
        bytes.extend_from_slice(match self.by {
            Means::Ipc(_) => &MAGIC_IPC,
            Means::Descriptor(_) => &MAGIC_DESCRIPTOR,
        });
        bytes.extend_from_slice(&self.uuid);
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        match self.by {
            Means::Ipc(handle) => bytes.extend_from_slice(&handle.0),
            Means::Descriptor(Descriptor { size, pid, fd, started }) => {
                bytes.extend_from_slice(&size.to_le_bytes());
                bytes.extend_from_slice(&pid.to_le_bytes());
                bytes.extend_from_slice(&fd.to_le_bytes());
                bytes.extend_from_slice(&started.to_le_bytes());
            }
        }
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, GpuError> {
        let malformed =
            |what| GpuError::Shared(SharedMemoryError::Malformed { what, len: bytes.len() as u64 });
        let by = Means::from_bytes(bytes).map_err(malformed)?;
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside, by the layout"));
        let (offset, len) = (word(24), word(32));
        let uuid = *bytes[8..].first_chunk().expect("inside, by the layout");
        if len == 0 || offset.checked_add(len).is_none() {
            return Err(malformed("the range is empty or wraps round"));
        }
        Ok(Self { uuid, offset, len, by })
    }
}

impl Means {
    /// What stands behind the common part, by what stands before it.
    fn from_bytes(bytes: &[u8]) -> Result<Self, &'static str> {
        let magic = bytes.first_chunk().copied().unwrap_or_default();
        let right_len = match magic {
            MAGIC_IPC => IPC_LEN,
            MAGIC_DESCRIPTOR => DESCRIPTOR_LEN,
            _ => return Err("they do not begin as handles of CUDA memory do"),
        };
        if bytes.len() != right_len {
            return Err("no handle of CUDA memory has this length");
        }
        if magic == MAGIC_IPC {
            let handle = bytes[HEAD_LEN..].first_chunk().expect("inside, by the length");
            return Ok(Self::Ipc(IpcHandle(*handle)));
        }
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside, by the length"));
        let half = |at: usize| u32::from_le_bytes(*bytes[at..].first_chunk().expect("inside, by the length"));
        let (size, pid, started) = (word(40), half(48), word(56));
        let fd = c_int::try_from(half(52)).map_err(|_| "a descriptor is not negative")?;
        if !(1..=SIZE_MAX).contains(&size) {
            return Err("no allocation is that long");
        }
        Ok(Self::Descriptor(Descriptor { size, pid, fd, started }))
    }
}

/// The driver's handle of the allocation that begins at `base`.
pub(super) fn handle_of(context: &Context, base: u64) -> Result<IpcHandle, CallError> {
    let mut handle = IpcHandle([0; IpcHandle::LEN]);
    let _entered = context.enter()?;
    // SAFETY: a writable handle; the driver refuses an address that it did not give out.
    unsafe { context.calls.ipc_get_mem_handle(&mut handle, base) }?;
    Ok(handle)
}

/// Whether kernels of `context` reach memory of `peer`.
pub(super) fn can_reach(context: &Context, peer: RawDevice) -> Result<bool, CallError> {
    if peer == context.device {
        return Ok(true);
    }
    let mut can = 0;
    // SAFETY: a writable integer, and devices that the driver named.
    unsafe { context.calls.device_can_access_peer(&mut can, context.device, peer) }?;
    Ok(can != 0)
}

/// Another process's allocation, mapped here.
#[derive(Debug)]
pub(super) struct Imported(#[expect(dead_code, reason = "owned until it is dropped")] Opened);

#[derive(Debug)]
#[expect(dead_code, reason = "owned until it is dropped")]
enum Opened {
    Ipc(OpenedIpc),
    Descriptor(Mapped),
}

/// What CUDA's handle opened.
#[derive(Debug)]
struct OpenedIpc {
    context: Arc<Context>,
    base: u64,
}

impl Imported {
    /// Maps what `exported` names and checks that the range lies inside; returns the address of its first byte.
    pub(super) fn open(context: &Arc<Context>, exported: &Exported) -> Result<(Self, u64), GpuError> {
        let (opened, base, room) = match &exported.by {
            Means::Ipc(handle) => {
                let (opened, room) = OpenedIpc::open(context, *handle)?;
                let base = opened.base;
                (Opened::Ipc(opened), base, room)
            }
            Means::Descriptor(descriptor) => {
                // CAST: a 64-bit host.
                let mapped = Mapped::import(context, &descriptor.fetch()?, descriptor.size as usize)?;
                let base = mapped.addr();
                (Opened::Descriptor(mapped), base, descriptor.size)
            }
        };
        if exported.offset + exported.len > room {
            let (what, len) = ("the range is longer than the allocation", exported.len);
            return Err(GpuError::Shared(SharedMemoryError::Malformed { what, len }));
        }
        Ok((Self(opened), base + exported.offset))
    }
}

impl OpenedIpc {
    /// Maps the allocation; returns its length too.
    fn open(context: &Arc<Context>, handle: IpcHandle) -> Result<(Self, u64), CallError> {
        let _entered = context.enter()?;
        let mut base = 0;
        // SAFETY: a writable address; the driver refuses a handle that it does not know.
        unsafe { context.calls.ipc_open_mem_handle(&mut base, handle, LAZY_PEER_ACCESS) }?;
        let opened = Self { context: Arc::clone(context), base };
        let (mut begin, mut room) = (0, 0);
        // SAFETY: writable values, and an address that the driver just gave.
        unsafe { context.calls.mem_get_address_range(&mut begin, &mut room, base) }?;
        Ok((opened, room as u64))
    }
}

impl Drop for OpenedIpc {
    fn drop(&mut self) {
        // SAFETY: opened once. A refusal leaves it mapped, to memory that its owner may not reuse.
        self.context.release(|calls| unsafe { calls.ipc_close_mem_handle(self.base) });
    }
}

/// A descriptor of device memory for a NIC.
pub(super) fn dma_buf(context: &Context, addr: u64, len: usize) -> Result<OwnedFd, CallError> {
    let mut fd: c_int = -1;
    let _entered = context.enter()?;
    // SAFETY: the driver writes one descriptor; it refuses ranges that are not device memory.
    unsafe { context.calls.mem_get_handle_for_range((&raw mut fd).cast(), addr, len, DMA_BUF_FD, 0) }?;
    // SAFETY: the driver gave it to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn by_handle() -> Exported {
        let by = Means::Ipc(IpcHandle([9; IpcHandle::LEN]));
        Exported { uuid: [7; 16], offset: 4096, len: 1 << 20, by }
    }

    fn by_descriptor(descriptor: Descriptor) -> Exported {
        Exported { by: Means::Descriptor(descriptor), ..by_handle() }
    }

    fn descriptor() -> Descriptor {
        Descriptor::ours(1 << 20, 1 << 21).unwrap()
    }

    #[test]
    fn a_handle_travels_as_bytes() {
        for exported in [by_handle(), by_descriptor(descriptor())] {
            let bytes = exported.to_bytes();
            assert_eq!(Exported::from_bytes(&bytes).unwrap(), exported);
        }
        let lens = [by_handle(), by_descriptor(descriptor())].map(|exported| exported.to_bytes().len());
        assert_eq!(lens, [IPC_LEN, DESCRIPTOR_LEN]);
    }

    #[test]
    fn bytes_of_strangers_are_refused() {
        let refused = |bytes: &[u8]| {
            let error = Exported::from_bytes(bytes).unwrap_err();
            assert!(matches!(error, GpuError::Shared(SharedMemoryError::Malformed { .. })), "{error}");
        };
        refused(&[]);
        for exported in [by_handle(), by_descriptor(descriptor())] {
            let good = exported.to_bytes();
            refused(&good[1..]);
            refused(&good[..40]);
            refused(&[&good[..], &[0]].concat());
            refused(&[b"other...", &good[8..]].concat());
            refused(&Exported { len: 0, ..exported }.to_bytes());
            refused(&Exported { offset: u64::MAX, ..exported }.to_bytes());
        }
        refused(&by_descriptor(Descriptor { size: 0, ..descriptor() }).to_bytes());
        refused(&by_descriptor(Descriptor { size: SIZE_MAX + 1, ..descriptor() }).to_bytes());
        refused(&by_descriptor(Descriptor { fd: -1, ..descriptor() }).to_bytes());
    }

    #[test]
    fn a_descriptor_of_another_process_or_of_none_is_refused() {
        let refusal = |descriptor: Descriptor| match descriptor.fetch().unwrap_err() {
            GpuError::Shared(refusal) => refusal,
            other => panic!("{other}"),
        };
        let closed = refusal(descriptor());
        assert!(matches!(closed, SharedMemoryError::Unreachable { errno: libc::EBADF, .. }), "{closed}");
        let nobody = refusal(Descriptor { pid: i32::MAX as u32, ..descriptor() });
        assert!(matches!(nobody, SharedMemoryError::Unreachable { .. }), "{nobody}");
        let beyond = refusal(Descriptor { pid: u32::MAX, ..descriptor() });
        assert!(matches!(beyond, SharedMemoryError::Unreachable { errno: libc::ESRCH, .. }), "{beyond}");
        let later = refusal(Descriptor { started: descriptor().started + 1, ..descriptor() });
        assert!(matches!(later, SharedMemoryError::Replaced { .. }), "{later}");
        let _ = Descriptor::ours(2, 4096).unwrap().fetch().unwrap();
    }
}
