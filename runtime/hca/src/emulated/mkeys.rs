//! Memory keys: which bytes a WQE or a packet may touch, and how.
//!
//! *Who owns what.* The table owns entries, never memory. An entry names one contiguous range that the
//! IOMMU granted; the spans it hands out are good as long as the table's read guard is held, because
//! destroying a key needs the write guard. That is why `deregister` may promise that no access follows.
//!
//! INVARIANT: a key index is not used again before [`REUSE_AFTER`] others were, so that a stale key is
//! refused rather than aliased.

use std::collections::VecDeque;

use ibex_abi::types::{MkeyIndex, Pd};

use super::memory::Span;
use crate::Access;

/// Index of the first key; below lie the reserved keys, 0x100 (list end) among them.
const FIRST: u32 = 0x10;
/// Freed indices rest until this many wait.
const REUSE_AFTER: usize = 1 << 12;

/// Why a key does not cover an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum KeyFault {
    /// No such key.
    Unknown,
    /// The key belongs to another protection domain.
    WrongPd,
    /// The range is not inside the key's.
    OutOfRange,
    /// The key does not allow this kind of access.
    Denied,
}

/// What an access wants to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
    LocalRead,
    LocalWrite,
    RemoteRead,
    RemoteWrite,
    RemoteAtomic,
}

impl Want {
    const fn allowed_by(self, access: Access) -> bool {
        match self {
            Self::LocalRead => true,
            Self::LocalWrite => access.local_write,
            Self::RemoteRead => access.remote_read,
            Self::RemoteWrite => access.remote_write,
            Self::RemoteAtomic => access.remote_atomic,
        }
    }
}

/// One memory key.
#[derive(Debug)]
pub(super) struct MkeyEntry {
    pub(super) key: u32,
    pub(super) pd: Pd,
    pub(super) access: Access,
    /// Address of the first byte, as WQEs and packets name it.
    pub(super) start: u64,
    pub(super) memory: Span,
}

impl MkeyEntry {
    #[inline]
    fn reach(&self, pd: Pd, va: u64, len: u64, want: Want) -> Result<Span, KeyFault> {
        if self.pd != pd {
            return Err(KeyFault::WrongPd);
        }
        if !want.allowed_by(self.access) {
            return Err(KeyFault::Denied);
        }
        let offset = va.checked_sub(self.start).ok_or(KeyFault::OutOfRange)?;
        self.memory.slice(offset, len).ok_or(KeyFault::OutOfRange)
    }
}

/// All keys of a device.
#[derive(Debug, Default)]
pub(super) struct MkeyTable {
    entries: Vec<Option<MkeyEntry>>,
    resting: VecDeque<u32>,
    live: usize,
}

impl MkeyTable {
    /// The memory behind `[va, va + len)` of `key`, if it covers the access.
    #[inline]
    pub(super) fn reach(&self, pd: Pd, key: u32, va: u64, len: u64, want: Want) -> Result<Span, KeyFault> {
        let slot = (key >> 8).wrapping_sub(FIRST);
        // CAST: u32 to usize on a 64-bit host.
        match self.entries.get(slot as usize) {
            Some(Some(entry)) if entry.key == key => entry.reach(pd, va, len, want),
            _ => Err(KeyFault::Unknown),
        }
    }

    /// Adds a key whose index the table chooses; `entry.key` holds the variant byte on entry.
    pub(super) fn insert(&mut self, mut entry: MkeyEntry) -> Option<MkeyIndex> {
        let slot = if self.resting.len() > REUSE_AFTER { self.resting.pop_front() } else { None };
        let slot = match slot {
            Some(slot) => slot,
            None => u32::try_from(self.entries.len()).ok()?,
        };
        let index = MkeyIndex::try_from(slot + FIRST).ok()?;
        entry.key = index.key(entry.key.to_le_bytes()[0]);
        // CAST: u32 to usize on a 64-bit host.
        let slot = slot as usize;
        if slot == self.entries.len() {
            self.entries.push(None);
        }
        self.entries[slot] = Some(entry);
        self.live += 1;
        Some(index)
    }

    /// Removes a key; false if there is none.
    pub(super) fn remove(&mut self, index: MkeyIndex) -> Option<MkeyEntry> {
        let slot = index.get().checked_sub(FIRST)?;
        let entry = self.entries.get_mut(slot as usize)?.take()?;
        self.resting.push_back(slot);
        self.live -= 1;
        Some(entry)
    }

    /// Whether any key belongs to this protection domain.
    pub(super) const fn len(&self) -> usize {
        self.live
    }

    pub(super) fn uses_pd(&self, pd: Pd) -> bool {
        self.entries.iter().flatten().any(|entry| entry.pd == pd)
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::Iommu;
    use super::*;

    fn table(access: Access, words: &mut [u64; 8]) -> (MkeyTable, u32) {
        let addr = words.as_mut_ptr().expose_provenance() as u64;
        let mut iommu = Iommu::default();
        let memory = iommu_span(&mut iommu, addr);
        let entry = MkeyEntry { key: 0xab, pd: Pd::new(3), access, start: 0x1000, memory };
        let mut table = MkeyTable::default();
        let index = table.insert(entry).unwrap();
        (table, index.key(0xab))
    }

    #[expect(unsafe_code, reason = "granting memory is unsafe by contract")]
    fn iommu_span(iommu: &mut Iommu, addr: u64) -> Span {
        // SAFETY: these tests never access the memory.
        unsafe { iommu.grant(addr, 64) };
        iommu.span(addr, 64).unwrap()
    }

    #[test]
    fn each_check_refuses_with_its_own_reason() {
        let mut words = [0; 8];
        let (table, key) = table(Access { remote_write: true, ..Access::LOCAL_READ }, &mut words);
        let reach = |pd, key, va, len, want| table.reach(Pd::new(pd), key, va, len, want).map(|s| s.len());
        assert_eq!(reach(3, key, 0x1000, 64, Want::RemoteWrite), Ok(64));
        assert_eq!(reach(3, key, 0x103f, 1, Want::LocalRead), Ok(1));
        assert_eq!(reach(3, key ^ 1, 0x1000, 8, Want::RemoteWrite), Err(KeyFault::Unknown));
        assert_eq!(reach(3, key + 0x100, 0x1000, 8, Want::RemoteWrite), Err(KeyFault::Unknown));
        assert_eq!(reach(3, 0x100, 0x1000, 8, Want::LocalRead), Err(KeyFault::Unknown));
        assert_eq!(reach(4, key, 0x1000, 8, Want::RemoteWrite), Err(KeyFault::WrongPd));
        assert_eq!(reach(3, key, 0x0fff, 8, Want::RemoteWrite), Err(KeyFault::OutOfRange));
        assert_eq!(reach(3, key, 0x1001, 64, Want::RemoteWrite), Err(KeyFault::OutOfRange));
        assert_eq!(reach(3, key, u64::MAX, 8, Want::RemoteWrite), Err(KeyFault::OutOfRange));
        for want in [Want::LocalWrite, Want::RemoteRead, Want::RemoteAtomic] {
            assert_eq!(reach(3, key, 0x1000, 8, want), Err(KeyFault::Denied));
        }
    }

    #[test]
    fn a_removed_key_is_unknown_and_its_index_rests() {
        let mut words = [0; 8];
        let (mut table, key) = table(Access::ALL, &mut words);
        let entry = table.remove(MkeyIndex::of_key(key)).unwrap();
        assert!(table.remove(MkeyIndex::of_key(key)).is_none());
        let gone = table.reach(Pd::new(3), key, 0x1000, 8, Want::LocalRead);
        assert_eq!(gone.map(|s| s.len()), Err(KeyFault::Unknown));
        let again = table.insert(entry).unwrap();
        assert_ne!(again, MkeyIndex::of_key(key));
        assert!(table.uses_pd(Pd::new(3)));
    }
}
