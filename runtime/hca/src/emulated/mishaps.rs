//! What happens to a device from outside: its link goes and comes, its addresses change, it is removed.
//!
//! Tests call these, and `ffi/preload` for programs under it. Nothing is owned here; [`ObjectCounts`] is a snapshot by
//! which a test sees that everything was given back.
//!
//! INVARIANT: a removed device touches no memory any more, not even an event queue's, and carries no packet. Commands
//! that end objects succeed on it, all others are refused.

use std::sync::atomic::Ordering;

use ibex_abi::eqe::{Event, PortChange};

use super::EmulatedHca;
use crate::{AsyncEvent, LinkLayer};

/// How many objects of each kind a device has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ObjectCounts {
    /// Protection domains.
    pub pds: usize,
    /// Memory keys.
    pub keys: usize,
    /// Umems.
    pub umems: usize,
    /// Doorbell pages.
    pub pages: usize,
    /// Event queues that drivers made.
    pub eqs: usize,
    /// Completion queues.
    pub cqs: usize,
    /// Queue pairs.
    pub qps: usize,
}

impl ObjectCounts {
    /// Every count with the name of its kind.
    #[must_use]
    pub const fn by_kind(&self) -> [(&'static str, usize); 7] {
        let Self { pds, keys, umems, pages, eqs, cqs, qps } = *self;
        [("pd", pds), ("mkey", keys), ("umem", umems), ("uar", pages), ("eq", eqs), ("cq", cqs), ("qp", qps)]
    }
}

impl EmulatedHca {
    /// Takes the port's link away, or gives it back, and tells of it. While it is down no packet comes or goes; queue
    /// pairs go on trying for as long as their timers say.
    pub fn set_port_up(&self, is_up: bool) {
        if !self.fabric_port().set_up(is_up) {
            return;
        }
        let port_num = self.port.port_num;
        match is_up {
            true => self.tell_of_port(PortChange::Active, AsyncEvent::PortUp { port_num }),
            false => self.tell_of_port(PortChange::Down, AsyncEvent::PortDown { port_num }),
        }
    }

    /// Whether the port has its link.
    #[must_use]
    pub fn is_port_up(&self) -> bool {
        self.fabric_port().is_up() && !self.is_removed()
    }

    /// Tells that the port's addresses are others than they were. They stay what they are: who asks again finds the
    /// same, as after a change that was taken back.
    pub fn announce_new_address(&self) {
        let change = match self.port.link {
            LinkLayer::Ib => PortChange::Lid,
            LinkLayer::Roce => PortChange::Guid,
        };
        self.tell_of_port(change, AsyncEvent::AddressChanged { port_num: self.port.port_num });
    }

    /// Takes the device out of its slot: for its peers it is silent from now on. Its owner is told, once.
    pub fn remove(&self) {
        if self.removed.swap(true, Ordering::AcqRel) {
            return;
        }
        self.fabric.kill(self.port_id());
        self.queue_event(AsyncEvent::DeviceRemoved);
    }

    /// Whether the device was removed.
    #[must_use]
    pub fn is_removed(&self) -> bool {
        self.removed.load(Ordering::Acquire)
    }

    /// How many objects there are now.
    #[must_use]
    pub fn object_counts(&self) -> ObjectCounts {
        let objects = self.objects.lock();
        ObjectCounts {
            pds: objects.num_pds(),
            keys: self.keys.read().len(),
            umems: objects.num_umems(),
            pages: objects.num_uars(),
            eqs: self.num_eqs.load(Ordering::Relaxed),
            cqs: objects.num_cqs(),
            qps: self.qps.lock().list.len(),
        }
    }

    fn tell_of_port(&self, change: PortChange, event: AsyncEvent) {
        if self.is_removed() {
            return;
        }
        self.tell(Event::PortChange { port: self.port.port_num, change });
        self.queue_event(event);
    }
}
