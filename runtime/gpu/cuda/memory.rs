//! What a GPU has allocated: where it lives, how the host and devices reach it, and when it is given back.
//!
//! [`Memory`] owns every live block and every dropped one that a queued launch may still name. Blocks on the device are
//! reached by copies on a stream of their own, which waits for no kernel; blocks on the host by the processor itself.
//!
//! INVARIANT: kernels and devices write this memory while we look at it. Host blocks are accessed by atomics only, and
//! no reference to any block is ever formed.

use std::collections::BTreeMap;
use std::ffi::c_void;
use std::os::fd::{AsRawFd, OwnedFd};
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use ibex_hca::control_region::RegionPlace;
use ibex_hca::shared_memory::SharedMemoryError;
use parking_lot::{Mutex, RwLock};

use super::super::host::raw;
use super::super::{GpuError, GpuField, NicWay, NicWays};
use super::calls::CallError;
use super::context::{Context, OwnedStream};
use super::gpu::CudaSharing;
use super::peer::{self, Descriptor, Means};
use super::vmm::Mapped;

/// Longest allocation; far beyond any device.
const ALLOC_LEN_MAX: usize = 1 << 46;
/// What the driver aligns every allocation to, at least.
const ALLOC_ALIGN: usize = 256;
/// Bytes that a fill copies at a time.
const FILL_PIECE: usize = 1 << 20;
/// Pages of the host, of which dma-bufs are made.
const PAGE: usize = 4096;
/// Host memory is reached by kernels of every context, at its own address.
///
/// SPEC: cuda.h `CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP`.
const HOST_ALLOC_FLAGS: u32 = 0x1 | 0x2;

/// Where an allocation lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Home {
    Device,
    Host,
}

/// One allocation, given back when dropped.
#[derive(Debug)]
pub(super) struct Block {
    context: Arc<Context>,
    /// What the driver gave; what is used begins at the first aligned address in it.
    given: Given,
    pub(super) addr: u64,
    pub(super) len: usize,
    /// What NICs reach it by, made when it is first asked for.
    dma_buf: OnceLock<Result<Arc<OwnedFd>, CallError>>,
    /// What other processes open, made when it is first asked for.
    descriptor: OnceLock<Result<OwnedFd, CallError>>,
}

/// What the driver gave, and how it is given back.
#[derive(Debug)]
enum Given {
    /// Device memory at an address.
    Device(u64),
    /// Device memory that gives itself back.
    Mapped(Mapped),
    /// Host memory at an address.
    Host(u64),
}

impl Block {
    fn new(
        context: &Arc<Context>,
        home: Home,
        sharing: CudaSharing,
        len: usize,
        align: usize,
    ) -> Result<Self, GpuError> {
        let align = checked_align(len, align)?;
        // Whole pages on the device: a dma-buf has no smaller parts.
        let used = if home == Home::Device { len.next_multiple_of(PAGE) } else { len };
        let room = used + (align - ALLOC_ALIGN);
        let _entered = context.enter()?;
        let given = match (home, sharing) {
            (Home::Device, CudaSharing::Ipc) => {
                let mut base = 0;
                // SAFETY: a writable address.
                unsafe { context.calls.mem_alloc(&mut base, room) }?;
                Given::Device(base)
            }
            (Home::Device, CudaSharing::Descriptor) => Given::Mapped(Mapped::create(context, used, align)?),
            (Home::Host, _) => {
                let mut base: *mut c_void = null_mut();
                // SAFETY: a writable pointer.
                unsafe { context.calls.mem_host_alloc(&mut base, room, HOST_ALLOC_FLAGS) }?;
                Given::Host(base.expose_provenance() as u64)
            }
        };
        let addr = given.base().next_multiple_of(align as u64);
        let (dma_buf, descriptor) = (OnceLock::new(), OnceLock::new());
        Ok(Self { context: Arc::clone(context), given, addr, len, dma_buf, descriptor })
    }

    pub(super) fn home(&self) -> Home {
        match self.given {
            Given::Device(_) | Given::Mapped(_) => Home::Device,
            Given::Host(_) => Home::Host,
        }
    }

    /// By what another process opens it, and where `addr` lies in that.
    pub(super) fn share(&self, addr: u64) -> Result<(Means, u64), GpuError> {
        let base = self.given.base();
        let means = match &self.given {
            Given::Device(base) => Means::Ipc(peer::handle_of(&self.context, *base)?),
            Given::Mapped(mapped) => {
                let descriptor = self.descriptor.get_or_init(|| mapped.export());
                let fd = descriptor.as_ref().map_err(|refused| *refused)?.as_raw_fd();
                Means::Descriptor(Descriptor::ours(fd, mapped.size() as u64)?)
            }
            Given::Host(_) => {
                let (addr, len) = (self.addr, self.len as u64);
                return Err(GpuError::Shared(SharedMemoryError::NotShared { addr, len }));
            }
        };
        Ok((means, addr - base))
    }

    /// A descriptor of all of it, which lies on the device and begins at a page.
    fn dma_buf(&self) -> Result<Arc<OwnedFd>, CallError> {
        let make = || peer::dma_buf(&self.context, self.addr, self.len.next_multiple_of(PAGE)).map(Arc::new);
        self.dma_buf.get_or_init(make).clone()
    }

    /// The ways by which a device that moves bytes itself reaches it, best first.
    pub(super) fn nic_ways(&self) -> NicWays {
        if self.home() == Home::Host {
            return NicWays::host();
        }
        let by_buffer = match self.addr.is_multiple_of(PAGE as u64) {
            true => self.dma_buf().map_err(GpuError::from),
            false => Err(GpuError::Misaligned { addr: self.addr, align: PAGE as u64 }),
        };
        match by_buffer {
            Ok(buffer) => {
                NicWays { ways: vec![NicWay::DmaBuf(buffer), NicWay::Address], refused: Vec::new() }
            }
            Err(why) => NicWays { ways: vec![NicWay::Address], refused: vec![(RegionPlace::GpuDmaBuf, why)] },
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // No descriptor of ours outlives what it describes.
        self.dma_buf.take();
        self.descriptor.take();
        // SAFETY: given by the driver, given back once.
        self.context.release(|calls| unsafe {
            match &self.given {
                Given::Device(base) => calls.mem_free(*base),
                Given::Host(base) => calls.mem_free_host(pointer(*base)),
                Given::Mapped(_) => Ok(()),
            }
        });
    }
}

impl Given {
    /// First byte of what the driver gave, which is what its handles name.
    const fn base(&self) -> u64 {
        match self {
            Self::Device(base) | Self::Host(base) => *base,
            Self::Mapped(mapped) => mapped.addr(),
        }
    }
}

fn checked_align(len: usize, align: usize) -> Result<usize, GpuError> {
    let max = ALLOC_LEN_MAX as u64;
    for (field, value) in [(GpuField::AllocLen, len), (GpuField::AllocAlign, align)] {
        let value = value as u64;
        if !(1..=max).contains(&value) {
            return Err(GpuError::OutOfRange { field, value, min: 1, max });
        }
    }
    if !align.is_power_of_two() {
        return Err(GpuError::BadAlignment { align });
    }
    Ok(align.max(ALLOC_ALIGN))
}

/// All blocks of one GPU, and the stream that copies to and from them.
#[derive(Debug)]
pub(super) struct Memory {
    /// By first address.
    live: RwLock<BTreeMap<u64, Block>>,
    /// Dropped by their owners while work was queued.
    retired: Mutex<Vec<Block>>,
    /// One copy at a time: whoever waits for the stream waits for its own copy.
    copies: Mutex<OwnedStream>,
    context: Arc<Context>,
    sharing: CudaSharing,
}

impl Memory {
    pub(super) fn new(context: &Arc<Context>, sharing: CudaSharing) -> Result<Self, CallError> {
        Ok(Self {
            live: RwLock::default(),
            retired: Mutex::default(),
            copies: Mutex::new(OwnedStream::new(context)?),
            context: Arc::clone(context),
            sharing,
        })
    }

    /// Allocates zeroed bytes; returns the address of the first.
    pub(super) fn alloc(&self, home: Home, len: usize, align: usize) -> Result<u64, GpuError> {
        let block = Block::new(&self.context, home, self.sharing, len, align)?;
        let addr = block.addr;
        match home {
            Home::Device => self.set_on_device(addr, 0, len)?,
            // SAFETY: the block is ours alone, and `len` bytes long at `addr`.
            Home::Host => unsafe { raw::fill_in(addr as usize, 0, len) },
        }
        self.live.write().insert(addr, block);
        Ok(addr)
    }

    /// Ends a block's life; it is given back by [`take_retired`](Self::take_retired).
    pub(super) fn retire(&self, addr: u64) {
        // Waits for copies in progress, which hold the table for reading.
        let block = self.live.write().remove(&addr);
        self.retired.lock().extend(block);
    }

    /// Everything retired so far. Call when no queued work can name it, and drop the result without a lock.
    pub(super) fn take_retired(&self) -> Vec<Block> {
        std::mem::take(&mut *self.retired.lock())
    }

    pub(super) fn has_retired(&self) -> bool {
        !self.retired.lock().is_empty()
    }

    pub(super) fn live_bytes(&self) -> u64 {
        self.live.read().values().map(|block| block.len as u64).sum()
    }

    /// Runs `access` while the range is known to live; it is told where.
    pub(super) fn with_live<T>(
        &self,
        addr: u64,
        len: usize,
        access: impl FnOnce(&Block) -> Result<T, GpuError>,
    ) -> Result<T, GpuError> {
        let live = self.live.read();
        let refused = GpuError::NotAllocated { addr, len };
        let Some((&begin, block)) = live.range(..=addr).next_back() else {
            return Err(refused);
        };
        let (offset, has) = (addr - begin, block.len as u64);
        if offset > has || len as u64 > has - offset {
            return Err(refused);
        }
        access(block)
    }

    pub(super) fn write(&self, addr: u64, bytes: &[u8]) -> Result<(), GpuError> {
        self.with_live(addr, bytes.len(), |block| match block.home() {
            Home::Host => {
                // SAFETY: `with_live` has checked the range, and keeps it.
                unsafe { raw::copy_in(addr as usize, bytes) };
                Ok(())
            }
            Home::Device => self.copy(|calls, stream| {
                // SAFETY: the range lives, the bytes are ours until the copy is over.
                unsafe { calls.memcpy_htod(addr, bytes.as_ptr().cast(), bytes.len(), stream) }
            }),
        })
    }

    pub(super) fn read(&self, addr: u64, bytes: &mut [u8]) -> Result<(), GpuError> {
        self.with_live(addr, bytes.len(), |block| match block.home() {
            Home::Host => {
                // SAFETY: as in `write`.
                unsafe { raw::copy_out(addr as usize, bytes) };
                Ok(())
            }
            Home::Device => self.copy(|calls, stream| {
                // SAFETY: as in `write`.
                unsafe { calls.memcpy_dtoh(bytes.as_mut_ptr().cast(), addr, bytes.len(), stream) }
            }),
        })
    }

    pub(super) fn fill(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        self.with_live(addr, len, |block| match block.home() {
            Home::Host => {
                // SAFETY: as in `write`.
                unsafe { raw::fill_in(addr as usize, byte, len) };
                Ok(())
            }
            Home::Device => self.fill_on_device(addr, byte, len),
        })
    }

    /// By copies, and not by the driver's own fill, which is a kernel: those that run may wait for what the host does
    /// next, and leave no room for another.
    fn fill_on_device(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        let bytes = vec![byte; len.min(FILL_PIECE)];
        let mut done = 0;
        while done < len {
            let piece = &bytes[..(len - done).min(FILL_PIECE)];
            self.copy(|calls, stream| {
                // SAFETY: the caller holds the range; the bytes are ours until the copy is over.
                unsafe { calls.memcpy_htod(addr + done as u64, piece.as_ptr().cast(), piece.len(), stream) }
            })?;
            done += piece.len();
        }
        Ok(())
    }

    /// For memory that nobody uses yet.
    fn set_on_device(&self, addr: u64, byte: u8, len: usize) -> Result<(), GpuError> {
        // SAFETY: the caller vouches for the range.
        self.copy(|calls, stream| unsafe { calls.memset_d8(addr, byte, len, stream) })
    }

    /// Queues one copy and waits for it; an empty one is none.
    fn copy(
        &self,
        queue: impl FnOnce(&super::calls::Calls, *mut c_void) -> Result<(), CallError>,
    ) -> Result<(), GpuError> {
        let stream = self.copies.lock();
        let _entered = self.context.enter()?;
        queue(&self.context.calls, stream.raw)?;
        // SAFETY: a live stream.
        Ok(unsafe { self.context.calls.stream_synchronize(stream.raw) }?)
    }

    pub(super) fn load_u32(&self, addr: u64) -> Result<u32, GpuError> {
        self.with_word(addr, 4, |block| match block.home() {
            // SAFETY: live and aligned; everyone accesses this memory atomically.
            Home::Host => Ok(unsafe { AtomicU32::from_ptr(pointer(addr).cast()) }.load(Ordering::Acquire)),
            Home::Device => self.copied_word(addr).map(u32::from_ne_bytes),
        })
    }

    pub(super) fn store_u32(&self, addr: u64, value: u32) -> Result<(), GpuError> {
        self.with_word(addr, 4, |block| match block.home() {
            Home::Host => {
                // SAFETY: as in `load_u32`.
                unsafe { AtomicU32::from_ptr(pointer(addr).cast()) }.store(value, Ordering::Release);
                Ok(())
            }
            Home::Device => self.copy_word(addr, &value.to_ne_bytes()),
        })
    }

    pub(super) fn load_u64(&self, addr: u64) -> Result<u64, GpuError> {
        self.with_word(addr, 8, |block| match block.home() {
            // SAFETY: as in `load_u32`.
            Home::Host => Ok(unsafe { AtomicU64::from_ptr(pointer(addr).cast()) }.load(Ordering::Acquire)),
            Home::Device => self.copied_word(addr).map(u64::from_ne_bytes),
        })
    }

    pub(super) fn store_u64(&self, addr: u64, value: u64) -> Result<(), GpuError> {
        self.with_word(addr, 8, |block| match block.home() {
            Home::Host => {
                // SAFETY: as in `load_u32`.
                unsafe { AtomicU64::from_ptr(pointer(addr).cast()) }.store(value, Ordering::Release);
                Ok(())
            }
            Home::Device => self.copy_word(addr, &value.to_ne_bytes()),
        })
    }

    /// A word on the device: one copy, which the copy engine does not split.
    fn copied_word<const N: usize>(&self, addr: u64) -> Result<[u8; N], GpuError> {
        let mut word = [0; N];
        // SAFETY: the caller holds the range, and waits for the copy here.
        self.copy(|calls, stream| unsafe { calls.memcpy_dtoh(word.as_mut_ptr().cast(), addr, N, stream) })?;
        Ok(word)
    }

    fn copy_word(&self, addr: u64, word: &[u8]) -> Result<(), GpuError> {
        // SAFETY: as in `copied_word`.
        self.copy(|calls, stream| unsafe {
            calls.memcpy_htod(addr, word.as_ptr().cast(), word.len(), stream)
        })
    }

    fn with_word<T>(
        &self,
        addr: u64,
        len: usize,
        access: impl FnOnce(&Block) -> Result<T, GpuError>,
    ) -> Result<T, GpuError> {
        let align = len as u64;
        if !addr.is_multiple_of(align) {
            return Err(GpuError::Misaligned { addr, align });
        }
        self.with_live(addr, len, access)
    }
}

pub(super) fn pointer(addr: u64) -> *mut c_void {
    // CAST: a 64-bit host.
    std::ptr::with_exposed_provenance_mut(addr as usize)
}
