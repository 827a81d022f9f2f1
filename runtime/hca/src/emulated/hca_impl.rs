//! The emulated device behind [`Hca`]: typed calls become the mailboxes that a driver would send.
#![expect(unsafe_code, reason = "grants memory under the contract of the unsafe trait methods")]

use ibex_abi::prm::{self, Op};
use ibex_abi::types::{Eqn, Iova, Lkey, MkeyIndex, Pd, Rkey, UarIdx, UmemId};

use super::EmulatedHca;
use super::commands::{FIRST_EQN, Granted, NUM_VECTORS};
use super::memory::{COPIED_END, PAGE, WindowId};
use crate::objects::{simple, simple_out};
use crate::{
    Access, AsyncEvent, CommandError, DoorbellPage, Hca, HcaCaps, HcaError, LinkLayer, MemoryKind,
    MemoryRegion, Mkey, Path, PathAddress, PortAddress, PortInfo, Umem,
};

/// Log2 of the largest page that a mailbox can name.
const LOG_PAGE_MAX: u32 = 31;

impl Hca for EmulatedHca {
    fn caps(&self) -> &HcaCaps {
        &self.caps
    }

    fn port(&self) -> PortInfo {
        self.port
    }

    fn alloc_pd(&self) -> Result<Pd, HcaError> {
        let output = simple_out(self, Op::AllocPd, None)?;
        Ok(Pd::new(number(&output)))
    }

    fn dealloc_pd(&self, pd: Pd) -> Result<(), HcaError> {
        Ok(simple(self, Op::DeallocPd, pd.get())?)
    }

    unsafe fn register(
        &self,
        pd: Pd,
        mem: MemoryRegion,
        iova: Iova,
        access: Access,
    ) -> Result<Mkey, HcaError> {
        // SAFETY: this function's own contract, until `deregister`.
        let (window, addr) = unsafe { self.grant(&mem) }?;
        let made = self.make_mkey(pd, addr, mem.len, iova, access);
        let mut objects = self.objects.lock();
        match made {
            Ok(index) => {
                objects.key_grants.insert(index, Granted { window });
                let key = index.key(0);
                Ok(Mkey { index, lkey: Lkey(key), rkey: Rkey(key), iova, len: mem.len })
            }
            Err(error) => {
                objects.iommu.revoke(window);
                Err(error)
            }
        }
    }

    fn deregister(&self, key: Mkey) -> Result<(), HcaError> {
        Ok(simple(self, Op::DestroyMkey, key.index.get())?)
    }

    unsafe fn create_umem(&self, mem: MemoryRegion) -> Result<Umem, HcaError> {
        if matches!(mem.kind, MemoryKind::Copied { .. }) {
            return Err(HcaError::QueueInCopied);
        }
        // SAFETY: this function's own contract, until `destroy_umem`.
        let (window, addr) = unsafe { self.grant(&mem) }?;
        let made = self.make_umem(addr, mem.len);
        let mut objects = self.objects.lock();
        match made {
            Ok(id) => {
                objects.umem_grants.insert(id.get(), Granted { window });
                Ok(Umem { id, len: mem.len })
            }
            Err(error) => {
                objects.iommu.revoke(window);
                Err(error)
            }
        }
    }

    fn destroy_umem(&self, umem: Umem) -> Result<(), HcaError> {
        simple(self, Op::DestroyUmem, umem.id.get())?;
        let mut objects = self.objects.lock();
        if let Some(granted) = objects.umem_grants.remove(&umem.id.get()) {
            objects.iommu.revoke(granted.window);
        }
        Ok(())
    }

    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError> {
        let output = simple_out(self, Op::AllocUar, None)?;
        let uar = UarIdx::new(number(&output));
        let unknown = HcaError::Unknown { what: "doorbell page", number: uar.into() };
        let uars = self.uars.lock();
        let page = uars.iter().find(|page| page.idx == uar).ok_or(unknown)?;
        Ok(DoorbellPage { uar, register: page.register() })
    }

    fn free_doorbell(&self, page: DoorbellPage) -> Result<(), HcaError> {
        Ok(simple(self, Op::DeallocUar, page.uar.get())?)
    }

    fn eqn(&self, vector: u32) -> Result<Eqn, HcaError> {
        match vector < NUM_VECTORS {
            true => Ok(Eqn::new(FIRST_EQN + vector)),
            false => Err(HcaError::OutOfRange {
                field: "completion vector",
                value: vector.into(),
                min: 0,
                max: (NUM_VECTORS - 1).into(),
            }),
        }
    }

    fn resolve(&self, remote: &PortAddress) -> Result<Path, HcaError> {
        if remote.link != self.port.link {
            return Err(HcaError::Unreachable { reason: "the ports have different link layers" });
        }
        let to = match remote.link {
            LinkLayer::Ib => PathAddress::Ib { rlid: remote.lid },
            LinkLayer::Roce => PathAddress::Roce {
                rgid: remote.gid,
                rmac: remote.mac,
                sgid_index: self.port.gid_index,
                hop_limit: 255,
                tclass: 0,
                udp_sport: 0xc000,
            },
        };
        let mtu = self.fabric.path_mtu(self.fabric_port(), &to)?;
        Ok(Path { port_num: self.port.port_num, sl: 0, to, mtu })
    }

    fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        self.command(input, output)
    }

    fn poll_async_event(&self) -> Option<AsyncEvent> {
        self.events.lock().pop_front()
    }

    fn unrung_wqes(&self) -> Option<u64> {
        self.is_strict().then(|| self.counters().unrung_wqes)
    }
}

/// The number of a new object, which most replies carry in the same place.
fn number(output: &[u8]) -> u32 {
    // CAST: a 24-bit field.
    prm::get(output, prm::alloc_pd_out::PD) as u32
}

impl EmulatedHca {
    /// Grants a region to the device; gives the grant and the region's address in this process.
    ///
    /// # Safety
    /// As for [`Hca::register`], until the grant is revoked.
    unsafe fn grant(&self, mem: &MemoryRegion) -> Result<(WindowId, u64), HcaError> {
        let max = i64::MAX as u64;
        if mem.len == 0 || mem.len > max || mem.addr.checked_add(mem.len).is_none() {
            return Err(HcaError::OutOfRange { field: "region length", value: mem.len, min: 1, max });
        }
        let mut objects = self.objects.lock();
        match mem.kind {
            // SAFETY: the caller's contract.
            MemoryKind::HostPtr => Ok((unsafe { objects.iommu.grant(mem.addr, mem.len) }, mem.addr)),
            MemoryKind::DmaBuf { fd, offset } => objects
                .iommu
                .map(fd, offset, mem.len)
                .map_err(|failed| HcaError::Os { call: "mmap", errno: failed.errno }),
            MemoryKind::Copied { bus } => {
                objects.iommu.grant_copied(bus, mem.addr, mem.len).ok_or(HcaError::OutOfRange {
                    field: "end of memory on a bus",
                    value: mem.addr + mem.len,
                    min: 1,
                    max: COPIED_END,
                })
            }
        }
    }

    fn make_mkey(
        &self,
        pd: Pd,
        addr: u64,
        len: u64,
        iova: Iova,
        access: Access,
    ) -> Result<MkeyIndex, HcaError> {
        use prm::{create_mkey_in as cmd, mkc};
        // The largest page in which both addresses have the same offset needs the fewest entries.
        let log_page = (addr ^ iova.get()).trailing_zeros().min(LOG_PAGE_MAX);
        if 1 << log_page < PAGE {
            return Err(HcaError::Misaligned {
                field: "difference of address and iova",
                value: addr ^ iova.get(),
                align: PAGE,
            });
        }
        let list = page_list(addr, len, log_page);
        let mut input = vec![0; cmd::LEN];
        let context = prm::part_mut(&mut input, cmd::MEMORY_KEY_MKEY_ENTRY);
        for (field, value) in [
            (mkc::A, access.remote_atomic.into()),
            (mkc::RW, access.remote_write.into()),
            (mkc::RR, access.remote_read.into()),
            (mkc::LW, access.local_write.into()),
            (mkc::LR, 1),
            (mkc::ACCESS_MODE_1_0, 1),
            (mkc::QPN, 0xff_ffff),
            (mkc::PD, pd.into()),
            (mkc::START_ADDR, iova.get()),
            (mkc::REGION_LEN, len),
            (mkc::LOG_PAGE_SIZE, log_page.into()),
        ] {
            prm::set(context, field, value);
        }
        let octwords = list.len().div_ceil(16) as u64;
        prm::set(&mut input, cmd::OPCODE, Op::CreateMkey.code().into());
        prm::set(&mut input, cmd::PG_ACCESS, 1);
        prm::set(&mut input, cmd::TRANSLATIONS_OCTWORD_ACTUAL_SIZE, octwords);
        input.extend(list);
        let mut output = [0; prm::create_mkey_out::LEN];
        self.exec(&input, &mut output)?;
        Ok(MkeyIndex::new(number(&output)))
    }

    fn make_umem(&self, addr: u64, len: u64) -> Result<UmemId, HcaError> {
        use prm::{create_umem_in as cmd, umem};
        let log_page = LOG_PAGE_MAX;
        let list = page_list(addr, len, log_page);
        let mut input = vec![0; cmd::LEN];
        let context = prm::part_mut(&mut input, cmd::UMEM);
        prm::set(context, umem::LOG_PAGE_SIZE, u64::from(log_page) - u64::from(PAGE.trailing_zeros()));
        prm::set(context, umem::PAGE_OFFSET, addr & ((1 << log_page) - 1));
        prm::set(context, umem::NUM_OF_MTT, list.len() as u64 / 8);
        prm::set(&mut input, cmd::OPCODE, Op::CreateUmem.code().into());
        input.extend(list);
        let mut output = [0; prm::create_umem_out::LEN];
        self.exec(&input, &mut output)?;
        Ok(UmemId(number(&output)))
    }
}

/// Translation entries of the pages that `[addr, addr + len)` touches, readable and writable.
fn page_list(addr: u64, len: u64, log_page: u32) -> Vec<u8> {
    let page = 1_u64 << log_page;
    let first = addr & !(page - 1);
    let count = (addr + len - first).div_ceil(page);
    (0..count).flat_map(|idx| ((first + idx * page) | 3).to_be_bytes()).collect()
}
