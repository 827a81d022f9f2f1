//! A device function handed to a program whole, as VFIO hands it: a container for its memory, a group, a device.
//!
//! ```text
//!   container   which of the program's memory the device reaches, and at which addresses (IOMMU)
//!   group       the device's place in the container
//!   function    registers (bar), the command queue in the program's memory (commands), interrupts as eventfds
//! ```
//!
//! libmlx5 has a driver of its own for such a device: it brings the function up by mailboxes and makes event queues.
//! Its mailboxes name addresses of the IOMMU; here they are turned into the program's own, which the emulated device
//! knows.
//!
//! *Who owns what.* As for `uverbs`: memory and descriptors are the program's. A function owns what its commands made;
//! closing its descriptor resets it.

use std::os::fd::RawFd;
use std::sync::Arc;

use ibex_hca::{Hca, MemoryKind, MemoryRegion, Umem};
use parking_lot::Mutex;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::errno::Errno;
use crate::user;
use crate::world::Device;
use function::Function;

mod bar;
mod commands;
mod function;

/// Requests. SPEC: linux/vfio.h, type `;`, from 100.
mod request {
    pub(super) const GET_API_VERSION: u64 = 0x3b64;
    pub(super) const CHECK_EXTENSION: u64 = 0x3b65;
    pub(super) const SET_IOMMU: u64 = 0x3b66;
    pub(super) const GROUP_GET_STATUS: u64 = 0x3b67;
    pub(super) const GROUP_SET_CONTAINER: u64 = 0x3b68;
    pub(super) const GROUP_GET_DEVICE_FD: u64 = 0x3b6a;
    pub(super) const DEVICE_GET_REGION_INFO: u64 = 0x3b6c;
    pub(super) const DEVICE_GET_IRQ_INFO: u64 = 0x3b6d;
    pub(super) const DEVICE_SET_IRQS: u64 = 0x3b6e;
    pub(super) const IOMMU_GET_INFO: u64 = 0x3b70;
    pub(super) const IOMMU_MAP_DMA: u64 = 0x3b71;
    pub(super) const IOMMU_UNMAP_DMA: u64 = 0x3b72;
}

/// The IOMMU model that is offered.
const TYPE1V2_IOMMU: u64 = 3;
/// Longest name of a PCI device.
const NAME_MAX: usize = 64;

/// `vfio_iommu_type1_info`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IommuInfo {
    argsz: u32,
    flags: u32,
    iova_pgsizes: u64,
    cap_offset: u32,
    pad: u32,
}

/// `vfio_iommu_type1_dma_map`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

/// `vfio_iommu_type1_dma_unmap`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

/// `vfio_group_status`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

/// Reads a structure that the program passed.
///
/// # Safety
/// The program vouches for the address.
unsafe fn take<T: FromBytes>(addr: u64) -> Result<T, Errno> {
    // SAFETY: the caller's contract.
    let bytes = unsafe { user::read(addr, size_of::<T>()) }?;
    T::read_from_bytes(&bytes).map_err(|_| Errno::INVAL)
}

/// Writes a structure back.
///
/// # Safety
/// As for [`take`].
unsafe fn give<T: IntoBytes + Immutable>(addr: u64, value: &T) -> Result<(), Errno> {
    // SAFETY: the caller's contract.
    unsafe { user::write(addr, value.as_bytes()) }
}

/// Memory that the device reaches.
#[derive(Debug, Clone, Copy)]
struct Mapped {
    vaddr: u64,
    iova: u64,
    len: u64,
    umem: Umem,
}

/// A container: the device that is in it, and the memory that it reaches.
#[derive(Debug, Default)]
pub(crate) struct Container {
    device: Mutex<Option<&'static Device>>,
    maps: Mutex<Vec<Mapped>>,
}

impl Container {
    /// Answers an ioctl of the container's descriptor.
    ///
    /// # Safety
    /// The program vouches for the argument, and for memory that it maps, until it is unmapped.
    pub(crate) unsafe fn ioctl(&self, request: u64, argument: u64) -> Result<i32, Errno> {
        match request {
            request::GET_API_VERSION => Ok(0),
            request::CHECK_EXTENSION => Ok(i32::from(argument == TYPE1V2_IOMMU)),
            request::SET_IOMMU if argument == TYPE1V2_IOMMU => Ok(0),
            request::IOMMU_GET_INFO => {
                const HAS_PGSIZES: u32 = 1;
                let argsz = size_of::<IommuInfo>() as u32; // CAST: 24.
                let info =
                    IommuInfo { argsz, flags: HAS_PGSIZES, iova_pgsizes: user::PAGE, cap_offset: 0, pad: 0 };
                // SAFETY: the caller's contract. An older caller's structure ends before `cap_offset`.
                unsafe { user::write(argument, &info.as_bytes()[..16]) }?;
                Ok(0)
            }
            request::IOMMU_MAP_DMA => {
                // SAFETY: the caller's contract.
                let map: DmaMap = unsafe { take(argument) }?;
                // SAFETY: the program promises that the memory stays mapped until it unmaps it here.
                unsafe { self.map(&map) }
            }
            request::IOMMU_UNMAP_DMA => {
                // SAFETY: the caller's contract.
                let unmap: DmaUnmap = unsafe { take(argument) }?;
                self.unmap(&unmap)
            }
            _ => Err(Errno::INVAL),
        }
    }

    fn device(&self) -> Result<&'static Device, Errno> {
        self.device.lock().ok_or(Errno::INVAL)
    }

    /// # Safety
    /// The memory stays mapped until [`unmap`](Self::unmap).
    unsafe fn map(&self, map: &DmaMap) -> Result<i32, Errno> {
        let hca = self.device()?.hca();
        let mut maps = self.maps.lock();
        let end = map.iova.checked_add(map.size).ok_or(Errno::INVAL)?;
        if maps.iter().any(|other| map.iova < other.iova + other.len && other.iova < end) {
            return Err(Errno(libc::EEXIST));
        }
        user::check_mapped(map.vaddr, map.size, true)?;
        let region = MemoryRegion { addr: map.vaddr, len: map.size, kind: MemoryKind::HostPtr };
        // SAFETY: the caller's contract.
        let umem = unsafe { hca.create_umem(region) }?;
        maps.push(Mapped { vaddr: map.vaddr, iova: map.iova, len: map.size, umem });
        Ok(0)
    }

    fn unmap(&self, unmap: &DmaUnmap) -> Result<i32, Errno> {
        let mut maps = self.maps.lock();
        let is_it = |map: &Mapped| map.iova == unmap.iova && map.len == unmap.size;
        let idx = maps.iter().position(is_it).ok_or(Errno::INVAL)?;
        self.device()?.hca().destroy_umem(maps[idx].umem)?;
        maps.swap_remove(idx);
        Ok(0)
    }

    /// Where `[iova, iova + len)` lies in the program's memory, if it is all mapped by one mapping.
    fn find(&self, iova: u64, len: u64) -> Option<u64> {
        self.maps.lock().iter().find_map(|map| {
            let offset = iova.checked_sub(map.iova)?;
            (offset <= map.len && len <= map.len - offset).then(|| map.vaddr + offset)
        })
    }

    /// Where a page of `size` bytes at `iova` would begin, of which a part is mapped.
    ///
    /// libmlx5 names pages larger than what it maps; the device never reaches beyond the part.
    fn page(&self, iova: u64, size: u64) -> Option<u64> {
        let end = iova.checked_add(size)?;
        let maps = self.maps.lock();
        let map = maps.iter().find(|map| map.iova < end && iova < map.iova + map.len)?;
        Some(map.vaddr.wrapping_add(iova).wrapping_sub(map.iova))
    }

    /// Unmaps everything.
    pub(crate) fn close(&self) {
        let Ok(device) = self.device() else { return };
        for map in self.maps.lock().drain(..) {
            // What a queue still lies in stays the device's.
            let _ = device.hca().destroy_umem(map.umem);
        }
    }
}

/// A group: one device, and the container that it was put in.
#[derive(Debug)]
pub(crate) struct Group {
    device: &'static Device,
    container: Mutex<Option<Arc<Container>>>,
}

impl Group {
    pub(crate) fn new(device: &'static Device) -> Self {
        Self { device, container: Mutex::default() }
    }

    /// Answers an ioctl of the group's descriptor; `container_of` finds a container by its descriptor, and `add` takes
    /// in a function that was opened.
    ///
    /// # Safety
    /// The program vouches for the argument.
    pub(crate) unsafe fn ioctl(
        &self,
        request: u64,
        argument: u64,
        container_of: impl FnOnce(RawFd) -> Option<Arc<Container>>,
        add: impl FnOnce(RawFd, Arc<Function>),
    ) -> Result<i32, Errno> {
        match request {
            request::GROUP_GET_STATUS => {
                const VIABLE: u32 = 1;
                let argsz = size_of::<GroupStatus>() as u32; // CAST: 8.
                // SAFETY: the caller's contract.
                unsafe { give(argument, &GroupStatus { argsz, flags: VIABLE }) }?;
                Ok(0)
            }
            request::GROUP_SET_CONTAINER => {
                // SAFETY: the caller's contract.
                let fd: RawFd = unsafe { take(argument) }?;
                let container = container_of(fd).ok_or(Errno(libc::EBADF))?;
                *container.device.lock() = Some(self.device);
                *self.container.lock() = Some(container);
                Ok(0)
            }
            request::GROUP_GET_DEVICE_FD => {
                // SAFETY: the caller's contract.
                if unsafe { name_at(argument) }? != self.device.pci_name() {
                    return Err(Errno(libc::ENODEV));
                }
                let container = self.container.lock().clone().ok_or(Errno::INVAL)?;
                let (fd, function) = Function::open(self.device, container)?;
                add(fd, function);
                Ok(fd)
            }
            _ => Err(Errno::INVAL),
        }
    }
}

pub(crate) use function::Function as OpenFunction;

/// A short string that the program passed.
///
/// # Safety
/// The program vouches for the address.
unsafe fn name_at(addr: u64) -> Result<String, Errno> {
    let mut name = Vec::new();
    while name.len() < NAME_MAX {
        // SAFETY: the caller's contract: a string ends with its first zero.
        match unsafe { user::read(addr + name.len() as u64, 1) }?.as_slice() {
            [0] => return String::from_utf8(name).map_err(|_| Errno::INVAL),
            byte => name.extend_from_slice(byte),
        }
    }
    Err(Errno::INVAL)
}
