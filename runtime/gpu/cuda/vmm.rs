//! Device memory whose pages and addresses are apart (CUDA's virtual memory management): a descriptor names exactly one
//! allocation, and NICs may reach it.
//!
//! A [`Mapped`] owns pages, a range of addresses and the mapping between them, and gives them back in the order that
//! the driver demands: mapping, addresses, pages. Pages live on while another process has them mapped.
//!
//! INVARIANT: what is mapped is as long as its pages, a multiple of the driver's granularity, from the first page on.

use std::ffi::{c_int, c_void};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use super::calls::{CallError, RawDevice};
use super::context::Context;

/// SPEC: cuda.h `CU_MEM_ALLOCATION_TYPE_PINNED`.
const PINNED: c_int = 1;
/// SPEC: cuda.h `CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR`.
const DESCRIPTOR: c_int = 1;
/// SPEC: cuda.h `CU_MEM_LOCATION_TYPE_DEVICE`.
const ON_DEVICE: c_int = 1;
/// SPEC: cuda.h `CU_MEM_ACCESS_FLAGS_PROT_READWRITE`.
const READ_WRITE: c_int = 3;
/// SPEC: cuda.h `CU_MEM_ALLOC_GRANULARITY_MINIMUM`.
const GRANULARITY_MINIMUM: c_int = 0;

/// SPEC: cuda.h `CUmemLocation`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Location {
    kind: c_int,
    device: RawDevice,
}

/// SPEC: cuda.h `CUmemAllocationProp`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AllocationProp {
    kind: c_int,
    handle_types: c_int,
    location: Location,
    win32_metadata: *mut c_void,
    compression: u8,
    gpu_direct_rdma: u8,
    usage: u16,
    reserved: [u8; 4],
}

const _: () = assert!(size_of::<AllocationProp>() == 32);
const _: () = assert!(offset_of!(AllocationProp, win32_metadata) == 16);
const _: () = assert!(offset_of!(AllocationProp, gpu_direct_rdma) == 25);

/// SPEC: cuda.h `CUmemAccessDesc`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct AccessDesc {
    location: Location,
    flags: c_int,
}

const _: () = assert!(size_of::<AccessDesc>() == 12);

/// Pages on a device, with or without an address.
#[derive(Debug)]
struct Pages {
    context: Arc<Context>,
    handle: u64,
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: ours, released once; mappings of it are gone.
        self.context.release(|calls| unsafe { calls.mem_release(self.handle) });
    }
}

/// Addresses that nothing else has.
#[derive(Debug)]
struct Range {
    context: Arc<Context>,
    addr: u64,
    size: usize,
}

impl Drop for Range {
    fn drop(&mut self) {
        // SAFETY: ours, given back once; nothing is mapped there any more.
        self.context.release(|calls| unsafe { calls.mem_address_free(self.addr, self.size) });
    }
}

/// That the pages are at the addresses.
#[derive(Debug)]
struct Mapping {
    context: Arc<Context>,
    addr: u64,
    size: usize,
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped once, over the same range.
        self.context.release(|calls| unsafe { calls.mem_unmap(self.addr, self.size) });
    }
}

/// See the module documentation.
#[derive(Debug)]
pub(super) struct Mapped {
    // Fields drop in this order.
    _mapping: Mapping,
    range: Range,
    pages: Pages,
}

impl Mapped {
    /// Allocates at least `len` bytes on the context's device, at a multiple of `align`.
    pub(super) fn create(context: &Arc<Context>, len: usize, align: usize) -> Result<Self, CallError> {
        let prop = AllocationProp {
            kind: PINNED,
            handle_types: DESCRIPTOR,
            location: Location { kind: ON_DEVICE, device: context.device },
            win32_metadata: std::ptr::null_mut(),
            compression: 0,
            gpu_direct_rdma: 1,
            usage: 0,
            reserved: [0; 4],
        };
        let (mut granularity, mut handle) = (0, 0);
        let _entered = context.enter()?;
        // SAFETY: a writable number, and properties that are read during the call.
        unsafe { context.calls.mem_granularity(&mut granularity, &prop, GRANULARITY_MINIMUM) }?;
        let size = len.next_multiple_of(granularity.max(1));
        // SAFETY: as above.
        unsafe { context.calls.mem_create(&mut handle, size, &prop, 0) }?;
        Self::map(Pages { context: Arc::clone(context), handle }, size, align)
    }

    /// Maps what another process has exported; the driver refuses a size that its pages do not have.
    pub(super) fn import(
        context: &Arc<Context>,
        descriptor: &OwnedFd,
        size: usize,
    ) -> Result<Self, CallError> {
        let mut handle = 0;
        let _entered = context.enter()?;
        // The driver takes the number itself where it says pointer.
        let number = std::ptr::without_provenance_mut(descriptor.as_raw_fd().unsigned_abs() as usize);
        // SAFETY: a writable handle, and an open descriptor, of which the driver keeps what it needs.
        unsafe { context.calls.mem_import(&mut handle, number, DESCRIPTOR) }?;
        Self::map(Pages { context: Arc::clone(context), handle }, size, 0)
    }

    fn map(pages: Pages, size: usize, align: usize) -> Result<Self, CallError> {
        let context = Arc::clone(&pages.context);
        let mut addr = 0;
        // SAFETY: a writable address.
        unsafe { context.calls.mem_address_reserve(&mut addr, size, align, 0, 0) }?;
        let range = Range { context: Arc::clone(&context), addr, size };
        // SAFETY: addresses that were just reserved, and live pages; the driver knows how many there are.
        unsafe { context.calls.mem_map(addr, size, 0, pages.handle, 0) }?;
        let mapping = Mapping { context: Arc::clone(&context), addr, size };
        let location = Location { kind: ON_DEVICE, device: context.device };
        let access = AccessDesc { location, flags: READ_WRITE };
        // SAFETY: a mapped range, and one description.
        unsafe { context.calls.mem_set_access(addr, size, &access, 1) }?;
        Ok(Self { _mapping: mapping, range, pages })
    }

    /// Address of the first byte.
    pub(super) const fn addr(&self) -> u64 {
        self.range.addr
    }

    /// Bytes of its pages.
    pub(super) const fn size(&self) -> usize {
        self.range.size
    }

    /// A descriptor by which another process maps the pages.
    pub(super) fn export(&self) -> Result<OwnedFd, CallError> {
        let mut fd: c_int = -1;
        let context = &self.pages.context;
        let _entered = context.enter()?;
        let place = (&raw mut fd).cast();
        // SAFETY: the driver writes one descriptor; live pages, made to be exported so.
        unsafe { context.calls.mem_export(place, self.pages.handle, DESCRIPTOR, 0) }?;
        // SAFETY: the driver gave it to us, and nobody else has it.
        Ok(unsafe { OwnedFd::from_raw_fd(fd) })
    }
}
