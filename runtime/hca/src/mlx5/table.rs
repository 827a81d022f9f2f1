//! What a process has made on its device: queues, keys, umems, doorbell pages, protection domains.
//!
//! The table owns every handle that the C libraries gave, and knows who uses whom. The libraries trust their caller to
//! destroy in order (some calls cannot even say that an object is in use), so the order is checked here.
//!
//! INVARIANT: a handle is in the table exactly while the library knows it; each is released once.

use std::collections::HashMap;
use std::io;

use ibex_abi::prm::{self, Op};
use ibex_mlx5dv_sys::{self as sys, Library};

use super::devices::answered;

/// Kinds of objects that commands create.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum QueueKind {
    Cq,
    Qp,
}

/// A queue that a command created, and what it stands on.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) handle: *mut sys::mlx5dv_devx_obj,
    uar: u32,
    pd: Option<u32>,
    cqs: [Option<u32>; 2],
    umems: [u32; 2],
}

impl Queue {
    /// What the mailbox of a successful create names.
    pub(super) fn new(kind: QueueKind, handle: *mut sys::mlx5dv_devx_obj, input: &[u8]) -> Self {
        // CAST: fields of at most 32 bits.
        let get = |bytes: &[u8], field| prm::get(bytes, field) as u32;
        match kind {
            QueueKind::Cq => {
                use prm::{cqc, create_cq_in as cmd};
                let context = prm::part(input, cmd::CQ_CONTEXT);
                let umems = [get(input, cmd::CQ_UMEM_ID), get(context, cqc::DBR_UMEM_ID)];
                Self { handle, uar: get(context, cqc::UAR_PAGE), pd: None, cqs: [None; 2], umems }
            }
            QueueKind::Qp => {
                use prm::{create_qp_in as cmd, qpc};
                let context = prm::part(input, cmd::QPC);
                Self {
                    handle,
                    uar: get(context, qpc::UAR_PAGE),
                    pd: Some(get(context, qpc::PD)),
                    cqs: [Some(get(context, qpc::CQN_SND)), Some(get(context, qpc::CQN_RCV))],
                    umems: [get(input, cmd::WQ_UMEM_ID), get(context, qpc::DBR_UMEM_ID)],
                }
            }
        }
    }
}

/// A registered range and the domain it belongs to.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    pub(super) handle: *mut sys::ibv_mr,
    pub(super) pd: u32,
}

/// A doorbell page. It stays mapped while the device is open, so that a late doorbell is harmless.
#[derive(Debug, Clone, Copy)]
pub(super) struct Page {
    pub(super) handle: *mut sys::mlx5dv_devx_uar,
    /// The page's number; several registers may lie on one.
    pub(super) uar: u32,
    /// Nobody has it; the next allocation gets it.
    pub(super) is_free: bool,
}

/// How many objects of each kind exist; all zero once everything was released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LiveObjects {
    /// Queue pairs.
    pub qps: usize,
    /// Completion queues.
    pub cqs: usize,
    /// Memory keys.
    pub keys: usize,
    /// Umems.
    pub umems: usize,
    /// Doorbell pages that somebody has.
    pub pages: usize,
    /// Protection domains.
    pub pds: usize,
}

/// Every object, by the number that mailboxes call it.
#[derive(Debug, Default)]
pub(super) struct Table {
    pub(super) queues: HashMap<(QueueKind, u32), Queue>,
    pub(super) keys: HashMap<u32, Key>,
    pub(super) umems: HashMap<u32, *mut sys::mlx5dv_devx_umem>,
    /// By the address of the register.
    pub(super) pages: HashMap<u64, Page>,
    pub(super) pds: HashMap<u32, *mut sys::ibv_pd>,
}

// SAFETY: the libraries allow calls on one object from any thread, one at a time; the table stands behind a lock.
unsafe impl Send for Table {}

impl Table {
    pub(super) fn live(&self) -> LiveObjects {
        let count = |kind| self.queues.keys().filter(|key| key.0 == kind).count();
        LiveObjects {
            qps: count(QueueKind::Qp),
            cqs: count(QueueKind::Cq),
            keys: self.keys.len(),
            umems: self.umems.len(),
            pages: self.pages.values().filter(|page| !page.is_free).count(),
            pds: self.pds.len(),
        }
    }

    pub(super) fn uses_cq(&self, cqn: u32) -> bool {
        self.queues.values().any(|queue| queue.cqs.contains(&Some(cqn)))
    }

    pub(super) fn uses_umem(&self, id: u32) -> bool {
        self.queues.values().any(|queue| queue.umems.contains(&id))
    }

    pub(super) fn uses_page(&self, uar: u32) -> bool {
        self.queues.values().any(|queue| queue.uar == uar)
    }

    /// Two holders have registers of one page: who of them uses it cannot be told.
    pub(super) fn shares_page(&self, uar: u32) -> bool {
        self.pages.values().filter(|page| page.uar == uar && !page.is_free).count() > 1
    }

    pub(super) fn uses_pd(&self, pd: u32) -> bool {
        let by_queue = self.queues.values().any(|queue| queue.pd == Some(pd));
        by_queue || self.keys.values().any(|key| key.pd == pd)
    }

    /// Destroys one queue; `is_gone` is asked if the library cannot.
    pub(super) fn destroy_queue(
        &mut self,
        library: &Library,
        is_gone: &dyn Fn() -> bool,
        key: (QueueKind, u32),
    ) -> Result<(), io::Error> {
        let Some(queue) = self.queues.get(&key) else { return Ok(()) };
        // SAFETY: a live object of this table, forgotten once it is destroyed.
        let answer = unsafe { library.mlx5dv_devx_obj_destroy(queue.handle) };
        released(answer, is_gone)?;
        self.queues.remove(&key);
        Ok(())
    }

    /// Releases everything in the order in which objects stand on each other. What the library would not release is
    /// left to the kernel, which releases it with the device's file.
    pub(super) fn release_all(&mut self, library: &Library) {
        for kind in [QueueKind::Qp, QueueKind::Cq] {
            let keys: Vec<_> = self.queues.keys().copied().filter(|key| key.0 == kind).collect();
            for key in keys {
                let _ = self.destroy_queue(library, &|| false, key);
            }
        }
        // SAFETY: live objects of this table, each taken out of it and released once.
        unsafe {
            for (_, umem) in self.umems.drain() {
                library.mlx5dv_devx_umem_dereg(umem);
            }
            for (_, key) in self.keys.drain() {
                library.ibv_dereg_mr(key.handle);
            }
            for (_, page) in self.pages.drain() {
                library.mlx5dv_devx_free_uar(page.handle);
            }
            for (_, pd) in self.pds.drain() {
                library.ibv_dealloc_pd(pd);
            }
        }
    }
}

/// The answer of a call that releases something. What stood on a device that is gone went with it: the kernel has
/// released it, and refuses to hear of it. (The library keeps a few bytes then; it knows no way to give them back.)
pub(super) fn released(code: i32, is_gone: &dyn Fn() -> bool) -> Result<(), io::Error> {
    match answered(code) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODEV)) && is_gone() => Ok(()),
        answer => answer,
    }
}

/// The kind of queue that a command creates or names.
pub(super) const fn kind_of(op: Op) -> Option<QueueKind> {
    Some(match op {
        Op::CreateCq | Op::DestroyCq => QueueKind::Cq,
        Op::CreateQp
        | Op::DestroyQp
        | Op::Rst2InitQp
        | Op::Init2InitQp
        | Op::Init2RtrQp
        | Op::Rtr2RtsQp
        | Op::Rts2RtsQp
        | Op::SqErr2RtsQp
        | Op::SqdRtsQp
        | Op::ToErrQp
        | Op::ToRstQp
        | Op::QueryQp => QueueKind::Qp,
        _ => return None,
    })
}
