//! Memory that the processor reaches by calls only, such as a GPU's: how an emulated device moves bytes where a real
//! one would use PCI Express.
//!
//! A [`Bus`] is attached once and named by a [`BusId`] in [`MemoryKind::Copied`](crate::MemoryKind). *Who owns what.*
//! Whoever attached a bus owns it; what stands here refers to it weakly. A bus that is gone, or refuses, answers reads
//! with ones and takes no writes, as an absent device does.
//!
//! INVARIANT: each call is over when it returns, so that what a device writes first is there first.

use std::sync::{Arc, Weak};

use parking_lot::RwLock;

use crate::HcaError;

/// Most buses of a process at a time.
pub const BUSES_MAX: usize = 1 << 12;

/// Memory that is reached by copies.
pub trait Bus: Send + Sync {
    /// Copies memory at `addr` into `bytes`; whether it did.
    fn read(&self, addr: u64, bytes: &mut [u8]) -> bool;

    /// Copies `bytes` to `addr`; whether it did. A naturally aligned word of 4 or 8 bytes is not torn.
    fn write(&self, addr: u64, bytes: &[u8]) -> bool;
}

/// Names an attached bus.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BusId(u16);

impl BusId {
    pub(crate) const fn get(self) -> u16 {
        self.0
    }

    pub(crate) const fn of(number: u16) -> Self {
        Self(number)
    }
}

static BUSES: RwLock<Vec<Option<Weak<dyn Bus>>>> = RwLock::new(Vec::new());

/// Attaches a bus until it is dropped.
///
/// # Errors
/// There are [`BUSES_MAX`] already.
pub fn attach(bus: Weak<dyn Bus>) -> Result<BusId, HcaError> {
    let mut buses = BUSES.write();
    let is_free = |slot: &Option<Weak<dyn Bus>>| slot.as_ref().is_none_or(|held| held.strong_count() == 0);
    let place = buses.iter().position(is_free).unwrap_or(buses.len());
    if place >= BUSES_MAX {
        let limit = BUSES_MAX as u64;
        return Err(HcaError::Exhausted { what: "buses", requested: 1, limit });
    }
    if place == buses.len() {
        buses.push(None);
    }
    buses[place] = Some(bus);
    // CAST: below BUSES_MAX.
    Ok(BusId(place as u16))
}

fn find(id: BusId) -> Option<Arc<dyn Bus>> {
    BUSES.read().get(usize::from(id.0))?.as_ref()?.upgrade()
}

/// Reads through a bus.
pub(crate) fn read(id: BusId, addr: u64, bytes: &mut [u8]) {
    if !find(id).is_some_and(|bus| bus.read(addr, bytes)) {
        bytes.fill(0xff);
    }
}

/// Writes through a bus.
pub(crate) fn write(id: BusId, addr: u64, bytes: &[u8]) {
    // Nobody answers for a posted write.
    let _ = find(id).is_some_and(|bus| bus.write(addr, bytes));
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Words(parking_lot::Mutex<[u8; 16]>);

    impl Bus for Words {
        fn read(&self, addr: u64, bytes: &mut [u8]) -> bool {
            let (words, at) = (self.0.lock(), addr as usize);
            words.get(at..at + bytes.len()).map(|found| bytes.copy_from_slice(found)).is_some()
        }

        fn write(&self, addr: u64, bytes: &[u8]) -> bool {
            let (mut words, at) = (self.0.lock(), addr as usize);
            words.get_mut(at..at + bytes.len()).map(|found| found.copy_from_slice(bytes)).is_some()
        }
    }

    #[test]
    fn who_is_gone_or_refuses_reads_as_ones_and_takes_no_writes() {
        let bus: Arc<dyn Bus> = Arc::new(Words(parking_lot::Mutex::new([7; 16])));
        let id = attach(Arc::downgrade(&bus)).unwrap();
        let mut bytes = [0; 4];
        write(id, 2, &[1, 2]);
        read(id, 1, &mut bytes);
        assert_eq!(bytes, [7, 1, 2, 7]);
        read(id, 14, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
        drop(bus);
        write(id, 0, &[9]);
        read(id, 0, &mut bytes);
        assert_eq!(bytes, [0xff; 4]);
    }
}
