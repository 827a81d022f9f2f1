//! Handles of open segments: a slot, and which use of it.

use crate::error::{Bounded, Result, StoreError};

/// Names an entry of [`Segments`]. A slot is used again under another generation, and a handle of an
/// earlier one finds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SegmentHandle {
    /// Where.
    pub slot: u32,
    /// Which use of the slot, from 1.
    pub generation: u32,
}

/// A handle whose slot is free, or in use for something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("segment {} of generation {} is stale: the slot is at generation {current}", .handle.slot, .handle.generation)]
pub struct StaleSegment {
    /// The handle.
    pub handle: SegmentHandle,
    /// The slot's present generation; 0 for a slot that was never used.
    pub current: u32,
}

/// Open segments, up to a bound. Owns the entries.
#[derive(Debug)]
pub struct Segments<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    limit: u32,
}

#[derive(Debug)]
struct Slot<T> {
    generation: u32,
    entry: Option<T>,
}

impl<T> Segments<T> {
    /// Room for so many segments.
    #[must_use]
    pub fn new(limit: u32) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), limit }
    }

    /// Open segments.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Whether none is open.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes an entry in. A slot whose generations are used up is never used again.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] if there is no room.
    pub fn insert(&mut self, entry: T) -> Result<SegmentHandle> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None => {
                let slot = u32::try_from(self.slots.len()).unwrap_or(u32::MAX);
                if slot >= self.limit {
                    let (len, limit) = (u64::from(slot) + 1, self.limit.into());
                    return Err(StoreError::TooLarge { what: Bounded::Segments, len, limit });
                }
                self.slots.push(Slot { generation: 0, entry: None });
                slot
            }
        };
        let place = &mut self.slots[slot as usize];
        place.generation += 1;
        place.entry = Some(entry);
        Ok(SegmentHandle { slot, generation: place.generation })
    }

    /// The entry of a handle.
    ///
    /// # Errors
    /// [`StaleSegment`].
    pub fn get(&self, handle: SegmentHandle) -> Result<&T, StaleSegment> {
        let slot = self.slots.get(handle.slot as usize);
        let current = slot.map_or(0, |slot| slot.generation);
        let entry =
            slot.filter(|slot| slot.generation == handle.generation).and_then(|slot| slot.entry.as_ref());
        entry.ok_or(StaleSegment { handle, current })
    }

    /// Takes an entry out; the handle, and every copy of it, is stale from now on.
    ///
    /// # Errors
    /// [`StaleSegment`].
    pub fn remove(&mut self, handle: SegmentHandle) -> Result<T, StaleSegment> {
        let stale = self.get(handle).err();
        let slot = self.slots.get_mut(handle.slot as usize).filter(|_| stale.is_none());
        let Some((entry, generation)) = slot.and_then(|slot| Some((slot.entry.take()?, slot.generation)))
        else {
            return Err(stale.unwrap_or(StaleSegment { handle, current: 0 }));
        };
        if generation < u32::MAX {
            self.free.push(handle.slot);
        }
        Ok(entry)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reused_slot_is_another_segment() {
        let mut segments = Segments::new(2);
        let first = segments.insert("first").unwrap();
        assert_eq!(segments.remove(first), Ok("first"));
        let second = segments.insert("second").unwrap();
        assert_eq!(second.slot, first.slot);
        assert_eq!(segments.get(first), Err(StaleSegment { handle: first, current: second.generation }));
        assert!(segments.remove(first).is_err());
        assert_eq!(segments.get(second), Ok(&"second"));
    }

    #[test]
    fn there_is_room_for_as_many_as_was_said() {
        let mut segments = Segments::new(1);
        let only = segments.insert(()).unwrap();
        let full = StoreError::TooLarge { what: Bounded::Segments, len: 2, limit: 1 };
        assert_eq!(segments.insert(()), Err(full));
        segments.remove(only).unwrap();
        assert!(segments.is_empty());
        segments.insert(()).unwrap();
        let nowhere = SegmentHandle { slot: 9, generation: 1 };
        assert_eq!(segments.get(nowhere), Err(StaleSegment { handle: nowhere, current: 0 }));
    }
}
