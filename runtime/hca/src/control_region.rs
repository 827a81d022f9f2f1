//! The control region: one umem from which the rings, completion queues and doorbell records of all
//! queue pairs are carved.
//!
//! *Who owns what.* The region owns its umem and, where it allocated it, the memory; a [`Carved`] piece
//! owns its bytes of it and gives them back when dropped. Keep the pieces of a queue pair until the
//! device has taken it to RST: holding them *is* the quarantine.
//!
//! INVARIANT: pieces never overlap, whatever the order of carving and dropping. INVARIANT: the umem
//! outlives every piece.
#![expect(unsafe_code, reason = "registers memory whose life it controls")]

use std::mem::ManuallyDrop;
use std::sync::Arc;

use ibex_abi::types::UmemId;
use ibex_memheap::{Block, HeapError, SharedHeap, StorageReport};

use crate::host_memory::{HostMemory, View};
use crate::objects::Place;
use crate::{Hca, HcaError, MemoryRegion, Umem};

/// Each doorbell record has a line of its own: two agents must not share one.
pub const RECORD_LINE: u64 = 64;
/// Rings start at pages, which every device generation accepts.
pub const RING_ALIGN: u64 = 4096;

/// Why a region could not be made or carved.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// The device refused.
    #[error(transparent)]
    Hca(#[from] HcaError),
    /// The heap refused.
    #[error("control region: {0}")]
    Heap(#[from] HeapError),
}

enum Backing {
    Own(HostMemory),
    /// Memory that the caller keeps, mapped here or not.
    External {
        host_base: Option<*mut u8>,
    },
}

/// What pieces keep alive.
struct Shared {
    hca: Arc<dyn Hca>,
    umem: Umem,
    base: u64,
    backing: Option<Backing>,
}

// SAFETY: the raw pointer is only turned into views, whose access is atomic.
unsafe impl Send for Shared {}
// SAFETY: as above.
unsafe impl Sync for Shared {}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.hca.destroy_umem(self.umem).is_err() {
            // A queue still lives in it: the device may write there, so the memory is never reused.
            std::mem::forget(self.backing.take());
        }
    }
}

/// Whose memory a device works on, and how it reaches it; best first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum RegionPlace {
    /// Memory of a GPU, exported as a dma-buf.
    GpuDmaBuf,
    /// Memory of a GPU, by its virtual address (nvidia-peermem).
    GpuAddress,
    /// Memory of a GPU, by copies that the host makes for an emulated device.
    GpuCopies,
    /// Memory of the host that kernels reach.
    HostMapped,
}

impl std::fmt::Display for RegionPlace {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::GpuDmaBuf => "gpu memory by dma-buf",
            Self::GpuAddress => "gpu memory by address",
            Self::GpuCopies => "gpu memory by copies",
            Self::HostMapped => "host memory",
        })
    }
}

/// One registered region and its heap.
pub struct ControlRegion {
    shared: Arc<Shared>,
    heap: SharedHeap,
}

impl ControlRegion {
    /// A region of `len` bytes of host memory.
    ///
    /// # Errors
    /// A length the heap or the device refuses.
    pub fn host(hca: &Arc<dyn Hca>, len: u64) -> Result<Self, ControlError> {
        let heap = SharedHeap::new(len)?;
        let memory = HostMemory::new(len)?;
        let base = memory.view().addr(0);
        // SAFETY: the memory is accessed by atomics only, and `Shared` keeps it until the umem is gone.
        let umem = unsafe { hca.create_umem(memory.region()) }?;
        let backing = Some(Backing::Own(memory));
        let shared = Arc::new(Shared { hca: Arc::clone(hca), umem, base, backing });
        Ok(Self { shared, heap })
    }

    /// A region over memory that the caller provides, such as GPU memory behind a dma-buf.
    ///
    /// `region.addr` is the address that kernels use; `host_base` is where the host sees it, if it does.
    ///
    /// # Errors
    /// A length the heap or the device refuses.
    ///
    /// # Safety
    /// The memory stays valid, at both addresses, until the region and all pieces are dropped.
    pub unsafe fn external(
        hca: &Arc<dyn Hca>,
        region: MemoryRegion,
        host_base: Option<*mut u8>,
    ) -> Result<Self, ControlError> {
        let heap = SharedHeap::new(region.len)?;
        // SAFETY: the caller's contract.
        let umem = unsafe { hca.create_umem(region) }?;
        let backing = Some(Backing::External { host_base });
        let shared = Arc::new(Shared { hca: Arc::clone(hca), umem, base: region.addr, backing });
        Ok(Self { shared, heap })
    }

    /// The umem that everything lies in.
    #[must_use]
    pub fn umem(&self) -> UmemId {
        self.shared.umem.id
    }

    /// Address of its first byte, as kernels use it.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.shared.base
    }

    /// The device that it is registered with.
    #[must_use]
    pub fn hca(&self) -> &Arc<dyn Hca> {
        &self.shared.hca
    }

    /// Takes `len` bytes at a multiple of `align`.
    ///
    /// # Errors
    /// As [`SharedHeap::alloc`].
    pub fn carve(&self, len: u64, align: u64) -> Result<Carved, ControlError> {
        let block = self.heap.alloc(len, align)?;
        let block = ManuallyDrop::new(block);
        Ok(Carved { shared: Arc::clone(&self.shared), block, leaked: false })
    }

    /// Takes a ring of `len` bytes.
    ///
    /// # Errors
    /// As [`Self::carve`].
    pub fn carve_ring(&self, len: u64) -> Result<Carved, ControlError> {
        self.carve(len, RING_ALIGN.min(len.next_power_of_two().max(64)))
    }

    /// Takes a line for one doorbell record.
    ///
    /// # Errors
    /// As [`Self::carve`].
    pub fn carve_record(&self) -> Result<Carved, ControlError> {
        self.carve(RECORD_LINE, RECORD_LINE)
    }

    /// What is free and what is live.
    #[must_use]
    pub fn storage_report(&self) -> StorageReport {
        self.heap.storage_report()
    }
}

impl std::fmt::Debug for ControlRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (umem, heap) = (self.shared.umem, &self.heap);
        f.debug_struct("ControlRegion").field("umem", &umem).field("heap", heap).finish_non_exhaustive()
    }
}

/// A piece of a control region; its bytes return to the heap when it is dropped.
pub struct Carved {
    shared: Arc<Shared>,
    /// Freed on drop, unless leaked.
    block: ManuallyDrop<Block>,
    leaked: bool,
}

impl Drop for Carved {
    fn drop(&mut self) {
        if !self.leaked {
            // SAFETY: dropped here and nowhere else; the field is not used afterwards.
            unsafe { ManuallyDrop::drop(&mut self.block) };
        }
    }
}

impl Carved {
    /// Where it lies, as mailboxes name it.
    #[must_use]
    pub fn place(&self) -> Place {
        Place { umem: self.shared.umem.id, offset: self.block.offset().get() }
    }

    /// Its address, as kernels use it.
    #[must_use]
    pub fn addr(&self) -> u64 {
        self.shared.base + self.block.offset().get()
    }

    /// Its length in bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.block.len()
    }

    /// Whether it has no bytes; it never has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Keeps its bytes for ever: the device would not let go of them.
    pub fn leak(&mut self) {
        self.leaked = true;
    }

    /// Host access to it, where the host sees the region.
    #[must_use]
    pub fn view(&self) -> Option<View<'_>> {
        let (offset, len) = (self.block.offset().get(), self.block.len());
        match self.shared.backing.as_ref()? {
            Backing::Own(memory) => Some(memory.view().part(offset, len)),
            Backing::External { host_base } => {
                // CAST: inside a mapped range.
                let base = (*host_base)?.wrapping_add(offset as usize);
                // SAFETY: mapped for as long as the region lives, by the contract of `external`; the
                // view borrows this piece, which keeps the region.
                Some(unsafe { View::from_raw(base, len) })
            }
        }
    }
}

impl std::fmt::Debug for Carved {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Carved").field(&*self.block).finish()
    }
}
