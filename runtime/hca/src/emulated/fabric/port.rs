//! One port, as its fabric knows it: who it is, where it is, and what is cut.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::RwLock;

use super::shm::PortMemory;
use super::{PathState, PortId};
use crate::emulated::EmulatedHca;
use crate::emulated::capture::Capture;
use crate::{LinkLayer, PathAddress, PortInfo};

/// A port of this process, or one of another that was admitted.
#[derive(Debug)]
pub(in crate::emulated) struct Port {
    pub(super) id: PortId,
    /// The device behind it; dangling for a port of another process.
    pub(super) device: Weak<EmulatedHca>,
    info: PortInfo,
    dead: AtomicBool,
    /// Its link is gone for the moment.
    down: AtomicBool,
    /// `cut[dst]`: packets from this port to `dst` vanish.
    cut: RwLock<Vec<PortId>>,
    any_cut: AtomicBool,
    capture: OnceLock<Arc<Capture>>,
    /// What other processes read of a port of this one.
    memory: Option<Arc<PortMemory>>,
}

impl Port {
    pub(super) fn new(id: PortId, device: Weak<EmulatedHca>, info: PortInfo) -> Self {
        let (dead, down, any_cut) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
        let (cut, memory, capture) = (RwLock::default(), None, OnceLock::new());
        Self { id, device, info, dead, down, cut, any_cut, memory, capture }
    }

    pub(super) fn with_memory(self, memory: Option<Arc<PortMemory>>) -> Self {
        Self { memory, ..self }
    }

    pub(in crate::emulated) const fn memory(&self) -> Option<&Arc<PortMemory>> {
        self.memory.as_ref()
    }

    /// A port on no fabric, for a device that could not be attached.
    pub(in crate::emulated) fn detached(info: PortInfo) -> Self {
        let port = Self::new(PortId(u16::MAX), Weak::new(), info);
        port.kill();
        port
    }

    /// Whether its device is, or was, in this process.
    pub(super) fn is_local(&self) -> bool {
        !self.device.ptr_eq(&Weak::new())
    }

    pub(in crate::emulated) const fn id(&self) -> PortId {
        self.id
    }

    pub(in crate::emulated) const fn info(&self) -> &PortInfo {
        &self.info
    }

    /// Where the port's frames are written, if anywhere.
    #[inline]
    pub(in crate::emulated) fn capture(&self) -> Option<&Arc<Capture>> {
        self.capture.get()
    }

    /// Has the port's frames written; false if they are already.
    pub(super) fn capture_to(&self, capture: Arc<Capture>) -> bool {
        self.capture.set(capture).is_ok()
    }

    pub(in crate::emulated) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Acquire)
    }

    pub(super) fn kill(&self) {
        self.dead.store(true, Ordering::Release);
    }

    pub(in crate::emulated) fn is_up(&self) -> bool {
        !self.down.load(Ordering::Acquire)
    }

    /// Takes the link away, or gives it back; whether that changed anything.
    pub(in crate::emulated) fn set_up(&self, is_up: bool) -> bool {
        self.down.swap(!is_up, Ordering::AcqRel) == is_up
    }

    pub(super) fn answers_to(&self, to: &PathAddress) -> bool {
        match (to, self.info.link) {
            (PathAddress::Ib { rlid }, LinkLayer::Ib) => *rlid == self.info.lid,
            (PathAddress::Roce { rgid, rmac, .. }, LinkLayer::Roce) => {
                *rgid == self.info.gid && *rmac == self.info.mac
            }
            _ => false,
        }
    }

    /// Whether a port with this address would get this one's packets.
    pub(super) fn has_address_of(&self, info: &PortInfo) -> bool {
        match (info.link, self.info.link) {
            (LinkLayer::Ib, LinkLayer::Ib) => info.lid == self.info.lid,
            (LinkLayer::Roce, LinkLayer::Roce) => (info.gid, info.mac) == (self.info.gid, self.info.mac),
            _ => false,
        }
    }

    pub(super) fn set_path(&self, dst: PortId, state: PathState) {
        let mut cut = self.cut.write();
        cut.retain(|other| *other != dst);
        if state == PathState::Cut {
            cut.push(dst);
        }
        self.any_cut.store(!cut.is_empty(), Ordering::Release);
    }

    /// Whether packets from this port reach `to` now.
    #[inline]
    pub(in crate::emulated) fn passes(&self, to: &Self) -> bool {
        let dead = self.is_dead() || to.is_dead() || !self.is_up() || !to.is_up();
        let cut = self.any_cut.load(Ordering::Acquire) && self.cut.read().contains(&to.id);
        !dead && !cut
    }
}
