//! An open device as the kernel keeps it: a context with its objects, and the methods that make, change and end them.
//!
//! ```text
//!   attrs    one ioctl: object, method, attributes          abi      structures inside attributes
//!   device   context, capabilities, ports, addresses        write    older commands in a method of their own
//!   memory   protection domains, regions                    cq, qp   queues: verbs turned into mailboxes
//!   devx     mailboxes as they are, umems, doorbell pages    events   files from which events are read
//! ```
//!
//! *Who owns what.* A context owns its objects by handle; they end with their own destroy method, or with the context,
//! the youngest first. Objects refer to each other by the device's numbers, and the device refuses to destroy what is
//! in use: nothing here counts references.

use std::collections::BTreeMap;
use std::os::fd::RawFd;
use std::sync::Arc;

use ibex_abi::types::Pd;
use ibex_hca::{DoorbellPage, Hca, Mkey, Umem};
use parking_lot::Mutex;

use crate::errno::Errno;
use crate::world::Device;
use attrs::Call;
use cq::Cq;
use events::EventFile;
use qp::Qp;

mod abi;
mod attrs;
mod cq;
mod device;
mod devx;
pub(crate) mod events;
mod memory;
mod qp;
mod write;

/// What a method answers.
type Done = Result<(), Errno>;

/// Objects, as `object_id` names them. SPEC: ib_user_ioctl_cmds.h, mlx5_user_ioctl_cmds.h.
mod object {
    pub(super) const DEVICE: u16 = 0;
    pub(super) const PD: u16 = 1;
    pub(super) const CQ: u16 = 3;
    pub(super) const QP: u16 = 4;
    pub(super) const AH: u16 = 6;
    pub(super) const MR: u16 = 7;
    pub(super) const ASYNC_EVENT: u16 = 16;
    pub(super) const DEVX: u16 = 0x1000;
    pub(super) const DEVX_OBJ: u16 = 0x1001;
    pub(super) const DEVX_UMEM: u16 = 0x1002;
    pub(super) const DEVX_EVENT_FILE: u16 = 0x1005;
    pub(super) const UAR: u16 = 0x1008;
}

/// Something that a handle names.
#[derive(Debug)]
pub(crate) enum Object {
    Pd(Pd),
    Mr(Mkey),
    Cq(Cq),
    Qp(Qp),
    Umem(Umem),
    Uar(DoorbellPage),
    /// An address handle, of which the device knows nothing.
    Ah,
    /// An object of the mailbox interface: the mailbox that destroys it.
    Devx {
        destroy: [u8; 16],
    },
}

#[derive(Debug, Default)]
struct Objects {
    by_handle: BTreeMap<u32, Object>,
    last: u32,
}

/// An open device.
#[derive(Debug)]
pub(crate) struct Context {
    device: &'static Device,
    objects: Mutex<Objects>,
    /// Completion channels and the file of asynchronous events, by the descriptor that the program reads.
    files: Mutex<BTreeMap<RawFd, Arc<EventFile>>>,
}

impl Context {
    /// Opens a device.
    pub(crate) fn open(device: &'static Device) -> Self {
        Self { device, objects: Mutex::default(), files: Mutex::default() }
    }

    /// Whether it is a context of this device.
    pub(crate) fn is_of(&self, device: &Device) -> bool {
        std::ptr::eq(self.device, device)
    }

    fn hca_is_removed(&self) -> bool {
        self.device.hca().is_removed()
    }

    fn hca(&self) -> &dyn Hca {
        &**self.device.hca()
    }

    /// Answers one `RDMA_VERBS_IOCTL`.
    ///
    /// # Safety
    /// `addr` is the ioctl's argument; the program vouches for all that it leads to.
    pub(crate) unsafe fn ioctl(&self, addr: u64) -> Done {
        if self.hca_is_removed() {
            return Err(Errno(libc::EIO));
        }
        // SAFETY: the caller's contract.
        let call = unsafe { Call::read(addr) }?;
        match call.object {
            object::DEVICE => self.device_method(&call),
            object::PD => self.pd_method(&call),
            object::CQ => self.cq_method(&call),
            object::QP => self.qp_method(&call),
            object::MR => self.mr_method(&call),
            object::AH => self.ah_method(&call),
            object::ASYNC_EVENT => self.async_event_method(&call),
            object::DEVX => self.devx_method(&call),
            object::DEVX_OBJ => self.devx_obj_method(&call),
            object::DEVX_UMEM => self.umem_method(&call),
            object::DEVX_EVENT_FILE => self.event_file_method(&call),
            object::UAR => self.uar_method(&call),
            _ => Err(Errno::NO_METHOD),
        }
    }

    /// The page behind an offset of the context's file, for `mmap`.
    pub(crate) fn page_at(&self, offset: u64) -> Option<u64> {
        let objects = self.objects.lock();
        objects.by_handle.values().find_map(|object| match object {
            Object::Uar(page) if devx::mmap_offset(page) == offset => Some(devx::page_of(page)),
            _ => None,
        })
    }

    /// The program has closed a descriptor that may be one of an event file.
    pub(crate) fn forget_file(&self, fd: RawFd) {
        // Dropping it closes its other end, which comes back here: not under the lock.
        let forgotten = self.files.lock().remove(&fd);
        if let Some(file) = &forgotten {
            self.device.unsubscribe(|subscription| Arc::ptr_eq(&subscription.file, file));
        }
        drop(forgotten);
    }

    /// Destroys everything, the youngest first; what cannot be destroyed is left to the device.
    pub(crate) fn close(&self) {
        let mut objects = std::mem::take(&mut self.objects.lock().by_handle);
        while let Some((_, object)) = objects.pop_last() {
            let _ = self.destroy(&object);
        }
    }

    fn add(&self, object: Object) -> u32 {
        let mut objects = self.objects.lock();
        // Handles are not used again, so that a stale one is refused.
        objects.last += 1;
        let handle = objects.last;
        objects.by_handle.insert(handle, object);
        handle
    }

    /// What `pick` finds in the object that a handle names.
    fn with<T>(&self, handle: u32, pick: impl FnOnce(&mut Object) -> Option<T>) -> Result<T, Errno> {
        self.objects.lock().by_handle.get_mut(&handle).and_then(pick).ok_or(Errno::NOENT)
    }

    fn pd(&self, handle: u32) -> Result<Pd, Errno> {
        self.with(handle, |object| match object {
            Object::Pd(pd) => Some(*pd),
            _ => None,
        })
    }

    /// Destroys an object of the kind that `is_kind` accepts, and gives what was left of it.
    fn remove(&self, handle: u32, is_kind: impl Fn(&Object) -> bool) -> Result<Object, Errno> {
        let mut objects = self.objects.lock();
        let found = objects.by_handle.get(&handle).filter(|object| is_kind(object));
        self.destroy(found.ok_or(Errno::NOENT)?)?;
        objects.by_handle.remove(&handle).ok_or(Errno::NOENT)
    }

    /// Ends an object on the device.
    fn destroy(&self, object: &Object) -> Done {
        let hca = self.hca();
        match object {
            Object::Pd(pd) => Ok(hca.dealloc_pd(*pd)?),
            Object::Mr(key) => Ok(hca.deregister(*key)?),
            Object::Cq(cq) => self.end_cq(cq),
            Object::Qp(qp) => self.end_qp(qp),
            Object::Umem(umem) => Ok(hca.destroy_umem(*umem)?),
            Object::Uar(page) => Ok(hca.free_doorbell(*page)?),
            Object::Ah => Ok(()),
            Object::Devx { destroy } => {
                self.device.exec(destroy, &mut [0; 16])?;
                if let Some(subject) = devx::subject_of(destroy) {
                    self.device.unsubscribe(|subscription| subscription.of == subject);
                }
                Ok(())
            }
        }
    }

    fn async_event_method(&self, call: &Call) -> Done {
        const ALLOC: u16 = 0;
        const FD: u16 = 0;
        match call.method {
            ALLOC => {
                let (file, fd) = self.new_file()?;
                self.device.listen(&file);
                call.set_number(FD, fd)
            }
            _ => Err(Errno::NO_METHOD),
        }
    }

    /// Makes an event file; the number is the descriptor that the program reads.
    fn new_file(&self) -> Result<(Arc<EventFile>, u64), Errno> {
        let file = Arc::new(EventFile::new()?);
        let fd = file.reader();
        self.files.lock().insert(fd, Arc::clone(&file));
        Ok((file, u64::try_from(fd).map_err(|_| Errno::INVAL)?))
    }

    fn file(&self, fd: RawFd) -> Result<Arc<EventFile>, Errno> {
        self.files.lock().get(&fd).cloned().ok_or(Errno(libc::EBADF))
    }
}
