//! The device behind [`Hca`]: memory, doorbell pages, paths, by the libraries' own calls.

use std::ffi::c_void;
use std::io;

use ibex_abi::prm::Op;
use ibex_abi::types::{Eqn, Iova, Lkey, Mac, MkeyIndex, Pd, Rkey, UarIdx, UmemId};
use ibex_mlx5dv_sys as sys;

use super::Mlx5Hca;
use super::devices::{answered, errno};
use super::error::{busy, failed, unknown};
use super::table::{Key, Page, released};
use crate::{
    Access, AsyncEvent, CommandError, DoorbellPage, Hca, HcaCaps, HcaError, LinkLayer, MemoryKind,
    MemoryRegion, Mkey, Path, PathAddress, PortAddress, PortInfo, UDP_SPORT_MIN, Umem,
};

/// Pages of the host; addresses and iovas must have the same offset in them.
const PAGE: u64 = 4096;
/// Kinds of doorbell registers that nobody shares, best first: one with a page of its own, which older libraries refuse
/// (rdma-core's `MLX5DV_UAR_ALLOC_TYPE_NC_DEDICATED`), and one of a page that combines writes (`.._BF`), which libmlx5
/// gives to several callers, a register each. The third kind (`.._NC`) is one register for all, and loses doorbells.
const UAR_DEDICATED: u32 = 1 << 31;
const UAR_BLUE_FLAME: u32 = 0;
/// The object that `mlx5dv_init_obj` fills.
const OBJ_AH: u64 = sys::MLX5DV_OBJ_AH as u64;
const OBJ_PD: u64 = sys::MLX5DV_OBJ_PD as u64;
/// The umem is described by a dma-buf (mlx5dv.h `MLX5DV_UMEM_MASK_DMABUF`).
const UMEM_BY_DMA_BUF: u64 = 1;
/// Offset of the next hop's Ethernet address in an address vector (mlx5dv.h `mlx5_wqe_av.rmac`).
const AV_RMAC: usize = 20;
/// What only an emulated device can use.
const COPIED: &str = "memory that is reached by copies";
/// Routers that a packet may pass.
const HOP_LIMIT: u8 = 255;

impl Hca for Mlx5Hca {
    fn caps(&self) -> &HcaCaps {
        &self.caps
    }

    fn port(&self) -> PortInfo {
        self.port
    }

    fn alloc_pd(&self) -> Result<Pd, HcaError> {
        let (library, context) = (self.opened.library(), self.opened.context());
        let mut table = self.table.lock();
        // SAFETY: an open context.
        let handle = unsafe { library.ibv_alloc_pd(context) };
        if handle.is_null() {
            return Err(failed("ibv_alloc_pd", &io::Error::last_os_error()));
        }
        let mut found = sys::mlx5dv_pd { pdn: 0, comp_mask: 0 };
        // SAFETY: plain pointers, null but for the pair that is asked for.
        let mut object: sys::mlx5dv_obj = unsafe { std::mem::zeroed() };
        object.pd = sys::mlx5dv_obj__bindgen_ty_7 { in_: handle, out: &mut found };
        // SAFETY: a live domain, and room for what is said of it.
        if let Err(error) = answered(unsafe { library.mlx5dv_init_obj(&mut object, OBJ_PD) }) {
            // SAFETY: allocated above, and nobody knows of it.
            unsafe { library.ibv_dealloc_pd(handle) };
            return Err(failed("mlx5dv_init_obj", &error));
        }
        table.pds.insert(found.pdn, handle);
        Ok(Pd::new(found.pdn))
    }

    fn dealloc_pd(&self, pd: Pd) -> Result<(), HcaError> {
        let mut table = self.table.lock();
        let Some(&handle) = table.pds.get(&pd.get()) else { return Err(unknown(Op::DeallocPd)) };
        if table.uses_pd(pd.get()) {
            return Err(busy(Op::DeallocPd));
        }
        // SAFETY: a live domain of the table, forgotten once it is released.
        let answer = unsafe { self.opened.library().ibv_dealloc_pd(handle) };
        self.released(answer).map_err(|error| refusal(Op::DeallocPd, "ibv_dealloc_pd", &error))?;
        table.pds.remove(&pd.get());
        Ok(())
    }

    unsafe fn register(
        &self,
        pd: Pd,
        mem: MemoryRegion,
        iova: Iova,
        access: Access,
    ) -> Result<Mkey, HcaError> {
        check_range(&mem)?;
        let offset = match mem.kind {
            MemoryKind::HostPtr => mem.addr,
            MemoryKind::DmaBuf { offset, .. } => offset,
            MemoryKind::Copied { .. } => return Err(HcaError::OnlyEmulated { what: COPIED }),
        };
        let value = offset ^ iova.get();
        if !value.is_multiple_of(PAGE) {
            return Err(HcaError::Misaligned { field: "difference of address and iova", value, align: PAGE });
        }
        let mut table = self.table.lock();
        let Some(&domain) = table.pds.get(&pd.get()) else { return Err(unknown(Op::CreateMkey)) };
        let library = self.opened.library();
        let flags = access_flags(access);
        // CAST: lengths of mapped memory.
        let len = mem.len as usize;
        let (call, handle) = match mem.kind {
            // SAFETY: a live domain, and memory that the caller vouches for until `deregister`.
            MemoryKind::HostPtr => ("ibv_reg_mr_iova2", unsafe {
                library.ibv_reg_mr_iova2(domain, pointer(mem.addr), len, iova.get(), flags)
            }),
            // SAFETY: as above; the kernel keeps a reference of its own to the buffer.
            MemoryKind::DmaBuf { fd, offset } => ("ibv_reg_dmabuf_mr", unsafe {
                library.ibv_reg_dmabuf_mr(domain, offset, len, iova.get(), fd, flags.cast_signed())
            }),
            MemoryKind::Copied { .. } => return Err(HcaError::OnlyEmulated { what: COPIED }),
        };
        if handle.is_null() {
            return Err(failed(call, &io::Error::last_os_error()));
        }
        // SAFETY: the library's structure, which lives until the key is released.
        let (lkey, rkey) = unsafe { ((*handle).lkey, (*handle).rkey) };
        let index = MkeyIndex::new(lkey >> 8);
        table.keys.insert(index.get(), Key { handle, pd: pd.get() });
        Ok(Mkey { index, lkey: Lkey(lkey), rkey: Rkey(rkey), iova, len: mem.len })
    }

    fn deregister(&self, key: Mkey) -> Result<(), HcaError> {
        let mut table = self.table.lock();
        let Some(found) = table.keys.get(&key.index.get()) else { return Err(unknown(Op::DestroyMkey)) };
        // SAFETY: a live key of the table, forgotten once it is released.
        let answer = unsafe { self.opened.library().ibv_dereg_mr(found.handle) };
        self.released(answer).map_err(|error| refusal(Op::DestroyMkey, "ibv_dereg_mr", &error))?;
        table.keys.remove(&key.index.get());
        Ok(())
    }

    unsafe fn create_umem(&self, mem: MemoryRegion) -> Result<Umem, HcaError> {
        check_range(&mem)?;
        let (library, context) = (self.opened.library(), self.opened.context());
        // CAST: lengths of mapped memory.
        let len = mem.len as usize;
        let access = sys::IBV_ACCESS_LOCAL_WRITE;
        let mut table = self.table.lock();
        let (call, handle) = match mem.kind {
            // SAFETY: an open context, and memory that the caller vouches for until `destroy_umem`.
            MemoryKind::HostPtr => ("mlx5dv_devx_umem_reg", unsafe {
                library.mlx5dv_devx_umem_reg(context, pointer(mem.addr), len, access)
            }),
            MemoryKind::DmaBuf { fd, offset } => {
                let mut described = sys::mlx5dv_devx_umem_in {
                    addr: pointer(offset),
                    size: len,
                    access,
                    pgsz_bitmap: !(PAGE - 1),
                    comp_mask: UMEM_BY_DMA_BUF,
                    dmabuf_fd: fd,
                };
                // SAFETY: as above; the kernel keeps a reference of its own to the buffer.
                ("mlx5dv_devx_umem_reg_ex", unsafe {
                    library.mlx5dv_devx_umem_reg_ex(context, &mut described)
                })
            }
            MemoryKind::Copied { .. } => return Err(HcaError::OnlyEmulated { what: COPIED }),
        };
        if handle.is_null() {
            return Err(failed(call, &io::Error::last_os_error()));
        }
        // SAFETY: the library's structure, which lives until the umem is released.
        let id = unsafe { (*handle).umem_id };
        table.umems.insert(id, handle);
        Ok(Umem { id: UmemId(id), len: mem.len })
    }

    fn destroy_umem(&self, umem: Umem) -> Result<(), HcaError> {
        let mut table = self.table.lock();
        let id = umem.id.get();
        let Some(&handle) = table.umems.get(&id) else { return Err(unknown(Op::DestroyUmem)) };
        if table.uses_umem(id) {
            return Err(busy(Op::DestroyUmem));
        }
        // SAFETY: a live umem of the table, forgotten once it is released.
        let answer = unsafe { self.opened.library().mlx5dv_devx_umem_dereg(handle) };
        self.released(answer).map_err(|error| refusal(Op::DestroyUmem, "mlx5dv_devx_umem_dereg", &error))?;
        table.umems.remove(&id);
        Ok(())
    }

    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError> {
        let mut table = self.table.lock();
        if let Some((&register, free)) = table.pages.iter_mut().find(|(_, page)| page.is_free) {
            free.is_free = false;
            return Ok(DoorbellPage { uar: UarIdx::new(free.uar), register });
        }
        let (library, context) = (self.opened.library(), self.opened.context());
        let mut handle = std::ptr::null_mut();
        for kind in [UAR_DEDICATED, UAR_BLUE_FLAME] {
            // SAFETY: an open context.
            handle = unsafe { library.mlx5dv_devx_alloc_uar(context, kind) };
            if !handle.is_null() {
                break;
            }
        }
        if handle.is_null() {
            return Err(failed("mlx5dv_devx_alloc_uar", &io::Error::last_os_error()));
        }
        // SAFETY: the library's structure, which lives until the page is released.
        let (uar, register) = unsafe { ((*handle).page_id, (*handle).reg_addr.expose_provenance() as u64) };
        table.pages.insert(register, Page { handle, uar, is_free: false });
        Ok(DoorbellPage { uar: UarIdx::new(uar), register })
    }

    fn free_doorbell(&self, page: DoorbellPage) -> Result<(), HcaError> {
        let mut table = self.table.lock();
        let uar = page.uar.get();
        // A caller that knows only the number of a page gives no register.
        let is_it = |(at, held): &(&u64, &mut Page)| {
            held.uar == uar && !held.is_free && (page.register == 0 || page.register == **at)
        };
        if !table.pages.values().any(|held| held.uar == uar && !held.is_free) {
            return Err(unknown(Op::DeallocUar));
        }
        if table.uses_page(uar) && !table.shares_page(uar) {
            return Err(busy(Op::DeallocUar));
        }
        match table.pages.iter_mut().find(is_it) {
            Some((_, held)) => held.is_free = true,
            None => return Err(unknown(Op::DeallocUar)),
        }
        Ok(())
    }

    fn eqn(&self, vector: u32) -> Result<Eqn, HcaError> {
        let max = self.opened.num_vectors().saturating_sub(1);
        if vector > max {
            let (field, value, max) = ("completion vector", vector.into(), max.into());
            return Err(HcaError::OutOfRange { field, value, min: 0, max });
        }
        let mut eqn = 0;
        let (library, context) = (self.opened.library(), self.opened.context());
        // SAFETY: an open context, and room for a number.
        let answer = unsafe { library.mlx5dv_devx_query_eqn(context, vector, &mut eqn) };
        answered(answer).map_err(|error| failed("mlx5dv_devx_query_eqn", &error))?;
        Ok(Eqn::new(eqn))
    }

    fn resolve(&self, remote: &PortAddress) -> Result<Path, HcaError> {
        if remote.link != self.port.link {
            return Err(HcaError::Unreachable { reason: "the ports have different link layers" });
        }
        let to = match remote.link {
            LinkLayer::Ib if remote.lid.0 == 0 => {
                return Err(HcaError::Unreachable { reason: "the remote port has no LID" });
            }
            LinkLayer::Ib => PathAddress::Ib { rlid: remote.lid },
            LinkLayer::Roce => PathAddress::Roce {
                rgid: remote.gid,
                rmac: self.next_hop(remote)?,
                sgid_index: self.port.gid_index,
                hop_limit: HOP_LIMIT,
                tclass: self.config.traffic_class,
                udp_sport: UDP_SPORT_MIN,
            },
        };
        Ok(Path { port_num: self.port.port_num, sl: self.config.sl, to, mtu: self.port.mtu })
    }

    fn doorbells_are_registers(&self) -> bool {
        true
    }

    fn is_on_bus(&self) -> bool {
        true
    }

    fn pkey_index(&self) -> u16 {
        self.config.pkey_index
    }

    fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        self.command(input, output)
    }

    fn poll_async_event(&self) -> Option<AsyncEvent> {
        self.events.next(&self.opened)
    }
}

impl Mlx5Hca {
    fn released(&self, code: i32) -> Result<(), io::Error> {
        released(code, &|| self.events.is_gone(&self.opened))
    }

    /// The Ethernet address of the next hop to a remote port, as the kernel's neighbour table has it. Where the kernel
    /// does not answer such questions it is the address that the peer says it has, which is right without routers.
    fn next_hop(&self, remote: &PortAddress) -> Result<Mac, HcaError> {
        // Any domain does; who connects has one.
        let there_is = self.table.lock().pds.keys().next().copied().map(Pd::new);
        let answer = match there_is {
            Some(domain) => self.ask_next_hop(domain, remote),
            None => {
                let domain = self.alloc_pd()?;
                let answer = self.ask_next_hop(domain, remote);
                self.dealloc_pd(domain)?;
                answer
            }
        };
        let unreachable = |reason| Err(HcaError::Unreachable { reason });
        match answer.as_ref().map_err(errno) {
            Ok(mac) if *mac != Mac::default() => Ok(*mac),
            Err(libc::EHOSTUNREACH | libc::ENETUNREACH | libc::ETIMEDOUT) => {
                unreachable("no neighbour answers for the remote GID")
            }
            _ if remote.mac != Mac::default() => Ok(remote.mac),
            _ => unreachable("neither the kernel nor the peer knows the peer's Ethernet address"),
        }
    }

    fn ask_next_hop(&self, pd: Pd, remote: &PortAddress) -> Result<Mac, io::Error> {
        let library = self.opened.library();
        let table = self.table.lock();
        let Some(&domain) = table.pds.get(&pd.get()) else { return Err(io::ErrorKind::NotFound.into()) };
        // SAFETY: plain numbers, all of them valid when zero.
        let mut attr: sys::ibv_ah_attr = unsafe { std::mem::zeroed() };
        attr.grh.dgid.raw = remote.gid.0;
        attr.grh.sgid_index = self.port.gid_index;
        attr.grh.hop_limit = HOP_LIMIT;
        attr.grh.traffic_class = self.config.traffic_class;
        attr.is_global = 1;
        attr.port_num = self.port.port_num;
        attr.sl = self.config.sl;
        // SAFETY: a live domain, kept so by the lock, and attributes that are read during the call.
        let handle = unsafe { library.ibv_create_ah(domain, &mut attr) };
        if handle.is_null() {
            return Err(io::Error::last_os_error());
        }
        let mut found = sys::mlx5dv_ah { av: std::ptr::null_mut(), comp_mask: 0 };
        // SAFETY: plain pointers, null but for the pair that is asked for.
        let mut object: sys::mlx5dv_obj = unsafe { std::mem::zeroed() };
        object.ah = sys::mlx5dv_obj__bindgen_ty_6 { in_: handle, out: &mut found };
        // SAFETY: a live address handle, and room for what is said of it.
        let answer = answered(unsafe { library.mlx5dv_init_obj(&mut object, OBJ_AH) });
        let mut mac = [0; 6];
        if answer.is_ok() && !found.av.is_null() {
            // SAFETY: the library's address vector, which lives as long as the handle and has the address there.
            unsafe { std::ptr::copy_nonoverlapping(found.av.cast::<u8>().add(AV_RMAC), mac.as_mut_ptr(), 6) };
        }
        // SAFETY: made above, released once.
        unsafe { library.ibv_destroy_ah(handle) };
        answer.map(|()| Mac(mac))
    }
}

fn check_range(mem: &MemoryRegion) -> Result<(), HcaError> {
    let max = i64::MAX as u64;
    match mem.len == 0 || mem.len > max || mem.addr.checked_add(mem.len).is_none() {
        true => Err(HcaError::OutOfRange { field: "region length", value: mem.len, min: 1, max }),
        false => Ok(()),
    }
}

/// A refusal to release an object: in use if the kernel says so.
fn refusal(op: Op, call: &'static str, error: &io::Error) -> HcaError {
    match errno(error) {
        libc::EBUSY => busy(op),
        _ => failed(call, error),
    }
}

/// Rights of a key. Relaxed ordering is never asked for: a signal must not pass the data before it.
fn access_flags(access: Access) -> u32 {
    let flag = |is_set: bool, flag: u32| if is_set { flag } else { 0 };
    flag(access.local_write, sys::IBV_ACCESS_LOCAL_WRITE)
        | flag(access.remote_write, sys::IBV_ACCESS_REMOTE_WRITE)
        | flag(access.remote_read, sys::IBV_ACCESS_REMOTE_READ)
        | flag(access.remote_atomic, sys::IBV_ACCESS_REMOTE_ATOMIC)
}

fn pointer(addr: u64) -> *mut c_void {
    // CAST: an address of this process, or an offset that is passed as one.
    std::ptr::with_exposed_provenance_mut(addr as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_key_asks_for_relaxed_ordering() {
        let all = access_flags(Access::ALL);
        assert_eq!(all & sys::IBV_ACCESS_RELAXED_ORDERING, 0);
        assert_eq!(all.count_ones(), 4);
        assert_eq!(access_flags(Access::LOCAL_READ), 0);
    }

    #[test]
    fn the_next_hop_lies_where_the_header_says() {
        // key (8), dqp_dct (4), stat_rate_sl, fl_mlid, rlid (2), reserved (4).
        assert_eq!(AV_RMAC, 8 + 4 + 1 + 1 + 2 + 4);
    }
}
