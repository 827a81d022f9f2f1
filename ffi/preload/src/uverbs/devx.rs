//! The mailbox interface: commands as the program wrote them, memory for queues, doorbell pages.
//!
//! As in the kernel, a mailbox that the device refuses still comes back with its status, and the call fails with
//! `EREMOTEIO`; the caller finds the reason in the reply.

use std::sync::Arc;

use ibex_abi::doorbell::UAR_BLUE_FLAME_OFFSET;
use ibex_abi::eqe::EventType;
use ibex_abi::prm::{self, Field, Op};
use ibex_abi::types::{CqNum, QpNum};
use ibex_hca::{DoorbellPage, MemoryKind, MemoryRegion};
use zerocopy::IntoBytes;

use super::attrs::Call;
use super::{Context, Done, Object};
use crate::errno::Errno;
use crate::mailbox;
use crate::user::{self, PAGE};
use crate::world::{Subject, Subscription};

/// Every method and attribute of this driver has this bit.
const DRIVER: u16 = 0x1000;
/// First attribute of most methods: the handle.
const HANDLE: u16 = DRIVER;

/// Where a doorbell page lies in the context's file: a page of the file for each.
pub(super) fn mmap_offset(page: &DoorbellPage) -> u64 {
    u64::from(page.uar.get()) * PAGE
}

/// Address of a doorbell page.
pub(super) const fn page_of(page: &DoorbellPage) -> u64 {
    page.register - UAR_BLUE_FLAME_OFFSET as u64
}

impl Context {
    pub(super) fn devx_method(&self, call: &Call) -> Done {
        const OTHER: u16 = DRIVER;
        const QUERY_UAR: u16 = DRIVER + 1;
        const QUERY_EQN: u16 = DRIVER + 2;
        const SUBSCRIBE_EVENT: u16 = DRIVER + 3;
        const FIRST: u16 = DRIVER;
        const SECOND: u16 = DRIVER + 1;
        match call.method {
            OTHER => self.run(call, FIRST, SECOND, |_| {}).map(drop),
            // Pages are allocated one by one, so the program's index is the device's.
            QUERY_UAR => call.set_output(SECOND, call.number32(FIRST)?.as_bytes()),
            QUERY_EQN => call.set_output(SECOND, u32::from(self.device.eqn()).as_bytes()),
            SUBSCRIBE_EVENT => self.subscribe(call),
            _ => Err(Errno::NO_METHOD),
        }
    }

    /// Has events of an object told in an event file: a cookie for each, and no data.
    fn subscribe(&self, call: &Call) -> Done {
        const FILE: u16 = DRIVER;
        const OBJECT: u16 = DRIVER + 1;
        const EVENTS: u16 = DRIVER + 2;
        const EVENTFD: u16 = DRIVER + 3;
        const COOKIE: u16 = DRIVER + 4;
        if call.has(EVENTFD) || !call.has(OBJECT) {
            return Err(Errno::NOTSUPP);
        }
        let file = self.file(call.fd(FILE)?)?;
        let subject = self.with(call.number32(OBJECT)?, |object| match object {
            Object::Devx { destroy } => subject_of(destroy),
            _ => None,
        });
        let (of, cookie) = (subject?, call.number(COOKIE)?);
        let events = call.input(EVENTS)?;
        let (codes, _) = events.as_chunks::<2>();
        let known = |code: &[u8; 2]| {
            let is_it = |event: &EventType| *event as u16 == u16::from_ne_bytes(*code);
            EventType::ALL.into_iter().find(is_it).ok_or(Errno::INVAL)
        };
        for event in codes.iter().map(known).collect::<Result<Vec<_>, _>>()? {
            self.device.subscribe(Subscription { of, event, cookie, file: Arc::clone(&file) });
        }
        Ok(())
    }

    /// Makes a file for events without their data.
    pub(super) fn event_file_method(&self, call: &Call) -> Done {
        const ALLOC: u16 = DRIVER;
        const FLAGS: u16 = DRIVER + 1;
        const OMIT_DATA: u32 = 1;
        match call.method {
            ALLOC if call.number32(FLAGS)? != OMIT_DATA => Err(Errno::NOTSUPP),
            ALLOC => call.set_number(HANDLE, self.new_file()?.1),
            _ => Err(Errno::NO_METHOD),
        }
    }

    pub(super) fn devx_obj_method(&self, call: &Call) -> Done {
        const CREATE: u16 = DRIVER;
        const DESTROY: u16 = DRIVER + 1;
        const MODIFY: u16 = DRIVER + 2;
        const QUERY: u16 = DRIVER + 3;
        const CMD_IN: u16 = DRIVER + 1;
        const CMD_OUT: u16 = DRIVER + 2;
        match call.method {
            CREATE => {
                let (input, output) = self.run(call, CMD_IN, CMD_OUT, force_umems)?;
                let destroy = mailbox::destroyer(&input, &output).ok_or(Errno::NOTSUPP)?;
                call.set_number(HANDLE, self.add(Object::Devx { destroy }).into())
            }
            DESTROY => {
                let is_kind = |object: &Object| matches!(object, Object::Devx { .. });
                self.remove(call.number32(HANDLE)?, is_kind).map(drop)
            }
            // Queue pairs and completion queues of the verbs may be named here too.
            MODIFY | QUERY => {
                self.with(call.number32(HANDLE)?, |_| Some(()))?;
                self.run(call, CMD_IN, CMD_OUT, |_| {}).map(drop)
            }
            _ => Err(Errno::NO_METHOD),
        }
    }

    /// Runs a mailbox; gives it and its reply.
    fn run(
        &self,
        call: &Call,
        input: u16,
        output: u16,
        prepare: impl FnOnce(&mut [u8]),
    ) -> Result<(Vec<u8>, Vec<u8>), Errno> {
        let mut mailbox = call.input(input)?;
        prepare(&mut mailbox);
        let mut reply = vec![0; call.room(output)];
        let done = self.device.exec(&mailbox, &mut reply);
        call.set_output(output, &reply)?;
        done.map_err(|_| Errno::REMOTE_IO)?;
        Ok((mailbox, reply))
    }

    pub(super) fn umem_method(&self, call: &Call) -> Done {
        const REG: u16 = DRIVER;
        const DEREG: u16 = DRIVER + 1;
        match call.method {
            REG => self.reg_umem(call),
            DEREG => {
                self.remove(call.number32(HANDLE)?, |object| matches!(object, Object::Umem(_))).map(drop)
            }
            _ => Err(Errno::NO_METHOD),
        }
    }

    fn reg_umem(&self, call: &Call) -> Done {
        const ADDR: u16 = DRIVER + 1;
        const LEN: u16 = DRIVER + 2;
        const OUT_ID: u16 = DRIVER + 4;
        const DMABUF_FD: u16 = DRIVER + 6;
        let (addr, len) = (call.number(ADDR)?, call.number(LEN)?);
        let region = match call.has(DMABUF_FD) {
            true => {
                let kind = MemoryKind::DmaBuf { fd: call.fd(DMABUF_FD)?, offset: addr };
                MemoryRegion { addr: 0, len, kind }
            }
            false => {
                user::check_mapped(addr, len, true)?;
                MemoryRegion { addr, len, kind: MemoryKind::HostPtr }
            }
        };
        // SAFETY: the program promises that the memory stays mapped until the umem is destroyed, and that the device
        // may access it until then.
        let umem = unsafe { self.hca().create_umem(region) }?;
        call.set_output(OUT_ID, umem.id.get().as_bytes())?;
        call.set_number(HANDLE, self.add(Object::Umem(umem)).into())
    }

    pub(super) fn uar_method(&self, call: &Call) -> Done {
        const ALLOC: u16 = DRIVER;
        const DESTROY: u16 = DRIVER + 1;
        match call.method {
            ALLOC => self.alloc_uar(call),
            DESTROY => {
                self.remove(call.number32(HANDLE)?, |object| matches!(object, Object::Uar(_))).map(drop)
            }
            _ => Err(Errno::NO_METHOD),
        }
    }

    fn alloc_uar(&self, call: &Call) -> Done {
        const MMAP_OFFSET: u16 = DRIVER + 2;
        const MMAP_LENGTH: u16 = DRIVER + 3;
        const PAGE_ID: u16 = DRIVER + 4;
        let page = self.hca().alloc_doorbell()?;
        self.device.note_page(page_of(&page));
        let handle = self.add(Object::Uar(page));
        call.set_output(MMAP_OFFSET, mmap_offset(&page).as_bytes())?;
        call.set_output(MMAP_LENGTH, PAGE.as_bytes())?;
        call.set_output(PAGE_ID, page.uar.get().as_bytes())?;
        call.set_number(HANDLE, handle.into())
    }
}

/// The queue that a mailbox destroys; none if it is no queue.
pub(super) fn subject_of(destroy: &[u8]) -> Option<Subject> {
    // CAST: a 24-bit field.
    let number = prm::try_get(destroy, prm::destroy_qp_in::QPN)? as u32;
    match prm::op_of(destroy).ok()? {
        Op::DestroyCq => Some(Subject::Cq(CqNum::new(number))),
        Op::DestroyQp => Some(Subject::Qp(QpNum::new(number))),
        _ => None,
    }
}

/// Marks queues as lying in umems, which the kernel does because it lets programs create no others.
fn force_umems(mailbox: &mut [u8]) {
    let fields: &[Field] = match prm::op_of(mailbox) {
        Ok(Op::CreateCq) => &[
            prm::create_cq_in::CQ_UMEM_VALID,
            prm::cqc::DBR_UMEM_VALID.within(prm::create_cq_in::CQ_CONTEXT),
        ],
        Ok(Op::CreateQp) => {
            &[prm::create_qp_in::WQ_UMEM_VALID, prm::qpc::DBR_UMEM_VALID.within(prm::create_qp_in::QPC)]
        }
        _ => &[],
    };
    for field in fields {
        if prm::try_get(mailbox, *field).is_some() {
            prm::set(mailbox, *field, 1);
        }
    }
}
