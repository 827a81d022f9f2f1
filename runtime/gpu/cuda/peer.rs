//! Device memory between processes of one host: by CUDA's own handles, and to NICs by dma-buf.
//!
//! An exported allocation belongs to its exporter; a mapping of it to the importer, until dropped. Nothing in the bytes
//! of a handle is believed: the driver says whether it knows the allocation, and how long that is.
//!
//! ```text
//!  0        8            24       32       40                104
//!  | magic  | GPU's UUID | offset | length | CUipcMemHandle   |
//! ```

use std::ffi::c_int;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use ibex_hca::shared_memory::SharedMemoryError;

use super::super::GpuError;
use super::calls::{CallError, IpcHandle, RawDevice};
use super::context::Context;

/// Says what the bytes are, and of which version.
const MAGIC: [u8; 8] = *b"IBEXCUD1";
/// Length of a handle.
const LEN: usize = 40 + IpcHandle::LEN;
/// Maps a peer's memory also where peer access was not enabled before.
///
/// SPEC: cuda.h `CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS`.
const LAZY_PEER_ACCESS: u32 = 1;
/// SPEC: cuda.h `CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD`.
const DMA_BUF_FD: c_int = 1;

/// What an exporter says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Exported {
    pub(super) uuid: [u8; 16],
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) handle: IpcHandle,
}

impl Exported {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(LEN);
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&self.uuid);
        bytes.extend_from_slice(&self.offset.to_le_bytes());
        bytes.extend_from_slice(&self.len.to_le_bytes());
        bytes.extend_from_slice(&self.handle.0);
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, GpuError> {
        let malformed =
            |what| GpuError::Shared(SharedMemoryError::Malformed { what, len: bytes.len() as u64 });
        let Some(bytes) = bytes.first_chunk::<LEN>().filter(|_| bytes.len() == LEN) else {
            return Err(malformed("no handle of CUDA memory has this length"));
        };
        if bytes[..8] != MAGIC {
            return Err(malformed("they do not begin as handles of CUDA memory do"));
        }
        let word = |at: usize| u64::from_le_bytes(*bytes[at..].first_chunk().expect("inside, by the layout"));
        let exported = Self {
            uuid: *bytes[8..].first_chunk().expect("inside, by the layout"),
            offset: word(24),
            len: word(32),
            handle: IpcHandle(*bytes[40..].first_chunk().expect("inside, by the layout")),
        };
        if exported.len == 0 || exported.offset.checked_add(exported.len).is_none() {
            return Err(malformed("the range is empty or wraps round"));
        }
        Ok(exported)
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
pub(super) struct Imported {
    context: Arc<Context>,
    base: u64,
}

impl Imported {
    /// Maps what `exported` names and checks that the range lies inside; returns the address of its first byte.
    pub(super) fn open(context: &Arc<Context>, exported: &Exported) -> Result<(Self, u64), GpuError> {
        let _entered = context.enter()?;
        let mut base = 0;
        // SAFETY: a writable address; the driver refuses a handle that it does not know.
        unsafe { context.calls.ipc_open_mem_handle(&mut base, exported.handle, LAZY_PEER_ACCESS) }?;
        let imported = Self { context: Arc::clone(context), base };
        let (mut begin, mut room) = (0, 0);
        // SAFETY: writable values, and an address that the driver just gave.
        unsafe { context.calls.mem_get_address_range(&mut begin, &mut room, base) }?;
        if exported.offset + exported.len > room as u64 {
            let what = "the range is longer than the allocation";
            return Err(GpuError::Shared(SharedMemoryError::Malformed { what, len: LEN as u64 }));
        }
        Ok((imported, base + exported.offset))
    }
}

impl Drop for Imported {
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

    fn exported() -> Exported {
        Exported { uuid: [7; 16], offset: 4096, len: 1 << 20, handle: IpcHandle([9; IpcHandle::LEN]) }
    }

    #[test]
    fn a_handle_travels_as_bytes() {
        let bytes = exported().to_bytes();
        assert_eq!(bytes.len(), LEN);
        assert_eq!(Exported::from_bytes(&bytes).unwrap(), exported());
    }

    #[test]
    fn bytes_of_strangers_are_refused() {
        let refused = |bytes: &[u8]| {
            let error = Exported::from_bytes(bytes).unwrap_err();
            assert!(matches!(error, GpuError::Shared(SharedMemoryError::Malformed { .. })), "{error}");
        };
        let good = exported().to_bytes();
        refused(&[]);
        refused(&good[1..]);
        refused(&[&good[..], &[0]].concat());
        refused(&[b"other...", &good[8..]].concat());
        refused(&Exported { len: 0, ..exported() }.to_bytes());
        refused(&Exported { offset: u64::MAX, ..exported() }.to_bytes());
    }
}
