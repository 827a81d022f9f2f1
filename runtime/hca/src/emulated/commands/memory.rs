//! Protection domains, memory keys, umems and doorbell pages.

use std::sync::Arc;

use ibex_abi::prm::{self, Status};
use ibex_abi::types::{MkeyIndex, Pd};

use super::{
    CommandSyndrome, Done, OBJECTS_MAX, Objects, Refusal, Touched, get8, get32, next_number, refuse, uar_idx,
};
use crate::Access;
use crate::emulated::EmulatedHca;
use crate::emulated::doorbell::Uar;
use crate::emulated::memory::PAGE;
use crate::emulated::mkeys::MkeyEntry;
use crate::emulated::trace::ObjectKind;
use crate::emulated::umem::UmemOwner;

/// Memory translation by a list of pages of one size.
const ACCESS_MODE_MTT: u64 = 1;
/// Bits of a translation entry that are not address.
const MTT_FLAGS: u64 = 7;

/// Address of the first of `count` contiguous pages.
///
/// A page list must be contiguous: all memory of one registration is, in the address space of one
/// process. That is this device's only narrowing of the translation.
pub(super) fn first_page(list: &[u8], count: u64, page: u64) -> Result<u64, Refusal> {
    let (entries, _) = list.as_chunks::<8>();
    if (entries.len() as u64) < count {
        return Err(refuse(Status::BadInpLen, CommandSyndrome::InputLength));
    }
    let address = |entry: &[u8; 8]| u64::from_be_bytes(*entry) & !MTT_FLAGS;
    let no_pages = refuse(Status::BadParam, CommandSyndrome::BadLength);
    let first = entries.first().filter(|_| count != 0).map(address).ok_or(no_pages)?;
    for (idx, entry) in (0..count).zip(entries) {
        if address(entry) != first.wrapping_add(idx * page) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPages));
        }
    }
    Ok(first)
}

impl Objects {
    pub(super) fn alloc_pd(&mut self, output: &mut [u8]) -> Done {
        if self.pds.len() >= OBJECTS_MAX {
            return Err(refuse(Status::NoRes, CommandSyndrome::TableFull));
        }
        let pd = next_number(&mut self.next_pd, 1, |pd| self.pds.contains(&pd));
        self.pds.insert(pd);
        prm::set(output, prm::alloc_pd_out::PD, pd.into());
        Ok(Touched::new(ObjectKind::Pd, pd))
    }

    /// The protection domain with this number, if it exists.
    pub(super) fn pd(&self, pd: u32) -> Result<Pd, Refusal> {
        match self.pds.contains(&pd) {
            true => Ok(Pd::new(pd)),
            false => Err(refuse(Status::BadRes, CommandSyndrome::UnknownPd)),
        }
    }

    pub(super) fn create_umem(&mut self, input: &[u8], output: &mut [u8]) -> Done {
        if self.umems.len() >= OBJECTS_MAX {
            return Err(refuse(Status::NoRes, CommandSyndrome::TableFull));
        }
        let umem = prm::part(input, prm::create_umem_in::UMEM);
        // The code is relative to 4 KiB.
        let page = PAGE << prm::get(umem, prm::umem::LOG_PAGE_SIZE);
        let offset = prm::get(umem, prm::umem::PAGE_OFFSET);
        let count = prm::get(umem, prm::umem::NUM_OF_MTT);
        let bad_length = refuse(Status::BadParam, CommandSyndrome::BadLength);
        let len = count.checked_mul(page).and_then(|bytes| bytes.checked_sub(offset)).ok_or(bad_length)?;
        let first = first_page(&input[prm::create_umem_in::LEN..], count, page)?;
        // The last page may reach past what was granted; what a queue needs is checked when it is carved.
        let start = first.checked_add(offset).ok_or(bad_length)?;
        let granted = self.iommu.span_up_to(start, len);
        let memory = granted.ok_or(refuse(Status::BadParam, CommandSyndrome::BadPages))?;
        let id = next_number(&mut self.next_umem, 1, |id| self.umems.contains_key(&id));
        self.umems.insert(id, UmemOwner::new(memory));
        prm::set(output, prm::create_umem_out::UMEM_ID, id.into());
        Ok(Touched::new(ObjectKind::Umem, id))
    }

    pub(super) fn umem(&self, id: u32) -> Result<&UmemOwner, Refusal> {
        self.umems.get(&id).ok_or(refuse(Status::BadRes, CommandSyndrome::UnknownUmem))
    }

    pub(super) fn destroy_umem(&mut self, input: &[u8]) -> Done {
        let id = get32(input, prm::destroy_umem_in::UMEM_ID);
        if self.umem(id)?.is_held() {
            return Err(refuse(Status::ResBusy, CommandSyndrome::InUse));
        }
        self.umems.remove(&id);
        Ok(Touched::new(ObjectKind::Umem, id))
    }
}

impl EmulatedHca {
    pub(super) fn dealloc_pd(&self, objects: &mut Objects, input: &[u8]) -> Done {
        let pd = objects.pd(get32(input, prm::dealloc_pd_in::PD))?;
        let used = self.keys.read().uses_pd(pd) || self.qps().iter().any(|qp| qp.layout.pd == pd);
        if used {
            return Err(refuse(Status::ResBusy, CommandSyndrome::InUse));
        }
        objects.pds.remove(&pd.get());
        Ok(Touched::new(ObjectKind::Pd, pd.get()))
    }

    pub(super) fn create_mkey(&self, objects: &mut Objects, input: &[u8], output: &mut [u8]) -> Done {
        use prm::mkc;
        let context = prm::part(input, prm::create_mkey_in::MEMORY_KEY_MKEY_ENTRY);
        let pd = objects.pd(get32(context, mkc::PD))?;
        if prm::get(context, mkc::ACCESS_MODE_1_0) != ACCESS_MODE_MTT
            || prm::get(context, mkc::ACCESS_MODE_4_2) != 0
            || prm::get(context, mkc::FREE) != 0
        {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadAccessMode));
        }
        let log_page = prm::get(context, mkc::LOG_PAGE_SIZE);
        if !(12..=31).contains(&log_page) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPages));
        }
        let page = 1 << log_page;
        let (start, len) = (prm::get(context, mkc::START_ADDR), prm::get(context, mkc::REGION_LEN));
        // Two translations of 8 bytes stand in an octword.
        let octwords = get32(input, prm::create_mkey_in::TRANSLATIONS_OCTWORD_ACTUAL_SIZE);
        let offset = start & (page - 1);
        let count = offset.checked_add(len).map_or(u64::MAX, |bytes| bytes.div_ceil(page));
        if len == 0 || count > u64::from(octwords) * 2 || start.checked_add(len).is_none() {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadLength));
        }
        let first = first_page(&input[prm::create_mkey_in::LEN..], count, page)?;
        let memory = first.checked_add(offset).and_then(|start| objects.iommu.span(start, len));
        let memory = memory.ok_or(refuse(Status::BadParam, CommandSyndrome::BadPages))?;
        let flag = |field| prm::get(context, field) == 1;
        let access = Access {
            local_write: flag(mkc::LW),
            remote_write: flag(mkc::RW),
            remote_read: flag(mkc::RR),
            remote_atomic: flag(mkc::A),
        };
        let key = get8(context, mkc::MKEY_7_0).into();
        let entry = MkeyEntry { key, pd, access, start, memory };
        let index = self.keys.write().insert(entry);
        let index = index.ok_or(refuse(Status::NoRes, CommandSyndrome::TableFull))?;
        prm::set(output, prm::create_mkey_out::MKEY_INDEX, index.into());
        Ok(Touched::new(ObjectKind::Mkey, index.get()))
    }

    pub(super) fn destroy_mkey(&self, objects: &mut Objects, input: &[u8]) -> Done {
        let index = get32(input, prm::destroy_mkey_in::MKEY_INDEX);
        let unknown = refuse(Status::BadRes, CommandSyndrome::UnknownMkey);
        let index = MkeyIndex::try_from(index).map_err(|_| unknown)?;
        // The write guard waits for every access that holds a span of this key.
        let removed = self.keys.write().remove(index);
        removed.ok_or(unknown)?;
        if let Some(granted) = objects.key_grants.remove(&index) {
            objects.iommu.revoke(granted.window);
        }
        Ok(Touched::new(ObjectKind::Mkey, index.get()))
    }

    pub(super) fn alloc_uar(&self, objects: &mut Objects, output: &mut [u8]) -> Done {
        let mut pages = self.uars.lock();
        let free = pages.iter().find(|page| !objects.uars.contains_key(&page.idx.get()));
        let uar = match free {
            Some(uar) => Arc::clone(uar),
            None if pages.len() >= OBJECTS_MAX => {
                return Err(refuse(Status::NoRes, CommandSyndrome::TableFull));
            }
            None => {
                // CAST: fewer than OBJECTS_MAX.
                let uar = Arc::new(Uar::new(uar_idx(pages.len() as u32 + 1), self.config.second_register));
                let mut grown = pages.to_vec();
                grown.push(Arc::clone(&uar));
                *pages = grown.into();
                uar
            }
        };
        let idx = uar.idx.get();
        objects.uars.insert(idx, uar);
        prm::set(output, prm::alloc_uar_out::UAR, idx.into());
        Ok(Touched::new(ObjectKind::Uar, idx))
    }

    pub(super) fn dealloc_uar(&self, objects: &mut Objects, input: &[u8]) -> Done {
        let idx = get32(input, prm::dealloc_uar_in::UAR);
        objects.uar(idx)?;
        let by_qp = self.qps().iter().any(|qp| qp.layout.uar.idx.get() == idx);
        if by_qp || self.event_table.lock().eqs.values().any(|eq| eq.layout.uar.get() == idx) {
            return Err(refuse(Status::ResBusy, CommandSyndrome::InUse));
        }
        objects.uars.remove(&idx);
        Ok(Touched::new(ObjectKind::Uar, idx))
    }
}
