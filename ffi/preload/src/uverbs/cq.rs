//! Completion queues: a verb becomes two umems and one mailbox.

use std::sync::Arc;

use ibex_abi::prm::{self, Op};
use ibex_abi::types::CqNum;
use ibex_hca::{MemoryKind, MemoryRegion, Umem};
use zerocopy::IntoBytes;

use super::abi::{CreateCq, DestroyCqAnswer};
use super::attrs::{Call, UHW_IN, UHW_OUT};
use super::device::COMP_VECTORS;
use super::events::EventFile;
use super::{Context, Done, Object};
use crate::errno::Errno;
use crate::user;
use crate::world::CqListener;

/// Bytes of a doorbell record.
pub(super) const RECORD_LEN: u64 = 8;
/// The driver data names the doorbell page. SPEC: `MLX5_IB_CREATE_CQ_FLAGS_UAR_PAGE_INDEX`.
const UAR_PAGE_INDEX: u16 = 1 << 1;
/// The queue takes completions whether there is room or not. SPEC: `IB_UVERBS_CQ_FLAGS_IGNORE_OVERRUN`.
const IGNORE_OVERRUN: u32 = 1 << 1;
/// Completions carry a time stamp, as all of this device do. SPEC: `IB_UVERBS_CQ_FLAGS_TIMESTAMP_COMPLETION`.
const TIMESTAMP: u32 = 1 << 0;

/// A completion queue of the verbs.
#[derive(Debug)]
pub(crate) struct Cq {
    pub(super) num: CqNum,
    umems: Vec<Umem>,
    user_handle: u64,
    channel: Option<Arc<EventFile>>,
    asynchronous: Option<Arc<EventFile>>,
}

/// What a program asks for.
struct Wanted {
    driver: CreateCq,
    log_size: u8,
    cqe_sz: u64,
    overrun_ignore: bool,
}

impl Wanted {
    fn read(call: &Call, log_max: u8) -> Result<Self, Errno> {
        const CQE: u16 = 1;
        const FLAGS: u16 = 5;
        let driver: CreateCq = call.input_as(UHW_IN)?;
        let flags = if call.has(FLAGS) { call.number32(FLAGS)? } else { 0 };
        let unknown = flags & !(IGNORE_OVERRUN | TIMESTAMP) != 0 || driver.flags & !UAR_PAGE_INDEX != 0;
        if unknown || driver.cqe_comp_en != 0 {
            return Err(Errno::NOTSUPP);
        }
        // One entry more than asked for, as the kernel rounds.
        let entries = call.number32(CQE)?.checked_add(1).and_then(u32::checked_next_power_of_two);
        // CAST: below 32.
        let log_size = entries.ok_or(Errno::INVAL)?.trailing_zeros() as u8;
        let cqe_sz = match driver.cqe_size {
            64 => 0,
            128 => 1,
            _ => return Err(Errno::INVAL),
        };
        if log_size > log_max {
            return Err(Errno::INVAL);
        }
        Ok(Self { driver, log_size, cqe_sz, overrun_ignore: flags & IGNORE_OVERRUN != 0 })
    }

    const fn ring_len(&self) -> u64 {
        64 << self.cqe_sz << self.log_size
    }
}

impl Context {
    pub(super) fn cq_method(&self, call: &Call) -> Done {
        const CREATE: u16 = 0;
        const DESTROY: u16 = 1;
        match call.method {
            CREATE => self.create_cq(call),
            DESTROY => self.destroy_cq(call),
            _ => Err(Errno::NO_METHOD),
        }
    }

    fn create_cq(&self, call: &Call) -> Done {
        const HANDLE: u16 = 0;
        const USER_HANDLE: u16 = 2;
        const COMP_CHANNEL: u16 = 3;
        const COMP_VECTOR: u16 = 4;
        const RESP_CQE: u16 = 6;
        const EVENT_FD: u16 = 7;
        if call.number32(COMP_VECTOR)? >= COMP_VECTORS {
            return Err(Errno::INVAL);
        }
        let wanted = Wanted::read(call, self.hca().caps().log_max_cq_sz)?;
        let file = |id| if call.has(id) { self.file(call.fd(id)?).map(Some) } else { Ok(None) };
        let (channel, asynchronous) = (file(COMP_CHANNEL)?, file(EVENT_FD)?);
        let user_handle = call.number(USER_HANDLE)?;
        let umems = self.umems_at(wanted.driver.buf_addr, wanted.ring_len(), wanted.driver.db_addr)?;
        let num = match self.exec_create_cq(&wanted, &umems) {
            Ok(num) => num,
            Err(error) => {
                self.drop_umems(&umems);
                return Err(error);
            }
        };
        let listener =
            CqListener { user_handle, channel: channel.clone(), asynchronous: asynchronous.clone() };
        self.device.listen_cq(num, listener);
        let cq = Cq { num, umems: umems.to_vec(), user_handle, channel, asynchronous };
        let handle = self.add(Object::Cq(cq));
        call.set_output(UHW_OUT, u32::from(num).as_bytes())?;
        call.set_output(RESP_CQE, ((1_u32 << wanted.log_size) - 1).as_bytes())?;
        call.set_number(HANDLE, handle.into())
    }

    fn exec_create_cq(&self, wanted: &Wanted, umems: &[Umem; 2]) -> Result<CqNum, Errno> {
        use prm::{cqc, create_cq_in as cmd};
        if wanted.driver.flags & UAR_PAGE_INDEX == 0 {
            return Err(Errno::INVAL);
        }
        let mut input = [0; cmd::LEN];
        let context = prm::part_mut(&mut input, cmd::CQ_CONTEXT);
        for (field, value) in [
            (cqc::DBR_UMEM_VALID, 1),
            (cqc::DBR_UMEM_ID, umems[1].id.into()),
            (cqc::CQE_SZ, wanted.cqe_sz),
            (cqc::OI, wanted.overrun_ignore.into()),
            (cqc::LOG_CQ_SIZE, wanted.log_size.into()),
            (cqc::UAR_PAGE, wanted.driver.uar_page_index.into()),
            (cqc::C_EQN, self.device.eqn().into()),
        ] {
            prm::set(context, field, value);
        }
        for (field, value) in [
            (cmd::OPCODE, Op::CreateCq.code().into()),
            (cmd::CQ_UMEM_VALID, 1),
            (cmd::CQ_UMEM_ID, umems[0].id.into()),
        ] {
            prm::set(&mut input, field, value);
        }
        let mut output = [0; prm::create_cq_out::LEN];
        self.device.exec(&input, &mut output)?;
        // CAST: a 24-bit field.
        Ok(CqNum::new(prm::get(&output, prm::create_cq_out::CQN) as u32))
    }

    /// Umems of a queue's rings and of its doorbell record.
    pub(super) fn umems_at(&self, ring: u64, ring_len: u64, record: u64) -> Result<[Umem; 2], Errno> {
        let at = |addr, len| {
            user::check_mapped(addr, len, true)?;
            let region = MemoryRegion { addr, len, kind: MemoryKind::HostPtr };
            // SAFETY: the program promises, as it promises the kernel, that queues stay mapped until they are
            // destroyed, and knows that the device reads and writes them.
            Ok::<_, Errno>(unsafe { self.hca().create_umem(region) }?)
        };
        let rings = at(ring, ring_len)?;
        match at(record, RECORD_LEN) {
            Ok(record) => Ok([rings, record]),
            Err(error) => {
                self.drop_umems(&[rings]);
                Err(error)
            }
        }
    }

    /// Gives umems back; the device refuses only what a queue still lies in.
    pub(super) fn drop_umems(&self, umems: &[Umem]) {
        for umem in umems {
            let _ = self.hca().destroy_umem(*umem);
        }
    }

    fn destroy_cq(&self, call: &Call) -> Done {
        const HANDLE: u16 = 0;
        const RESP: u16 = 1;
        let is_kind = |object: &Object| matches!(object, Object::Cq(_));
        let Object::Cq(cq) = self.remove(call.number32(HANDLE)?, is_kind)? else { return Err(Errno::NOENT) };
        let told =
            |file: &Option<Arc<EventFile>>| file.as_ref().map_or(0, |file| file.forget(cq.user_handle));
        let answer = DestroyCqAnswer {
            comp_events_reported: told(&cq.channel),
            async_events_reported: told(&cq.asynchronous),
        };
        call.set_output(RESP, answer.as_bytes())
    }

    /// Destroys the queue on the device and gives its umems back.
    pub(super) fn end_cq(&self, cq: &Cq) -> Done {
        let mut input = [0; prm::destroy_cq_in::LEN];
        prm::set(&mut input, prm::destroy_cq_in::OPCODE, Op::DestroyCq.code().into());
        prm::set(&mut input, prm::destroy_cq_in::CQN, cq.num.into());
        self.device.exec(&input, &mut [0; 16])?;
        self.device.forget_cq(cq.num);
        self.drop_umems(&cq.umems);
        Ok(())
    }
}
