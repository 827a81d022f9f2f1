//! The command interface: mailboxes in, objects made, changed and destroyed.
//!
//! *Who owns what.* [`Objects`] is the device's table of objects, behind one lock: commands execute one
//! at a time. What the data path needs of an object is published apart (key table, queue pair table,
//! doorbell pages), so that commands never wait for traffic, save to end an object's use.
//!
//! INVARIANT: a command that fails changes nothing. INVARIANT: an object in use is not destroyed.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use ibex_abi::prm::{self, Field, Op, Status};
use ibex_abi::types::{MkeyIndex, QpNum, QpState, UarIdx};

use super::EmulatedHca;
use super::cq::Cq;
use super::doorbell::Uar;
use super::memory::{Iommu, WindowId};
use super::trace::{CommandRecord, ObjectKind};
use super::umem::UmemOwner;
use crate::CommandError;

mod caps;
mod events;
mod function;
mod memory;
mod qp;
mod queues;

/// Why the emulated device refused a command: the syndrome of its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum CommandSyndrome {
    /// The opcode is unknown, or not one that this device executes.
    UnknownOpcode = 0x1b_0001,
    /// The input mailbox is too short.
    InputLength,
    /// The output mailbox is too short.
    OutputLength,
    /// No such protection domain.
    UnknownPd,
    /// No such memory key.
    UnknownMkey,
    /// No such umem.
    UnknownUmem,
    /// No such doorbell page.
    UnknownUar,
    /// No such event queue.
    UnknownEq,
    /// No such completion queue.
    UnknownCq,
    /// No such queue pair.
    UnknownQp,
    /// Another object still uses this one.
    InUse,
    /// The table of objects is full.
    TableFull,
    /// A page address is not memory that was granted to the device, or pages are not contiguous.
    BadPages,
    /// A length is zero or larger than the pages given.
    BadLength,
    /// The access mode is not one that this device translates.
    BadAccessMode,
    /// A size code is outside the device's limits.
    BadQueueSize,
    /// An entry size code is unknown.
    BadEntrySize,
    /// The queue is not in a umem (`*_umem_valid` is 0).
    NotInUmem,
    /// A queue or record is misaligned or reaches beyond its umem.
    OutsideUmem,
    /// The transport or receive queue type is not supported.
    BadServiceType,
    /// The transition is illegal in the queue pair's state.
    IllegalTransition,
    /// The port number is not 1.
    BadPort,
    /// The partition key index is not 0.
    BadPkeyIndex,
    /// The MTU code is invalid or above the port's.
    BadMtu,
    /// The address path does not fit the port's link layer.
    BadPath,
    /// A capability group is unknown.
    BadCapability,
    /// A table index is out of range.
    BadIndex,
    /// The device was removed: it makes and changes nothing any more.
    Removed,
    /// An injected failure, see [`crate::fault::FaultHca`].
    Injected,
}

impl CommandSyndrome {
    /// The number that the reply carries.
    #[must_use]
    pub const fn code(self) -> u32 {
        // CAST: a fieldless enum of representation u32.
        self as u32
    }
}

/// A refusal: status and syndrome of the reply.
#[derive(Debug, Clone, Copy)]
pub(super) struct Refusal {
    status: Status,
    syndrome: CommandSyndrome,
    qp_state: Option<QpState>,
}

const fn refuse(status: Status, syndrome: CommandSyndrome) -> Refusal {
    Refusal { status, syndrome, qp_state: None }
}

/// What a command touched, for the trace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Touched {
    kind: ObjectKind,
    number: Option<u32>,
}

impl Touched {
    const fn new(kind: ObjectKind, number: u32) -> Self {
        Self { kind, number: Some(number) }
    }
}

type Done = Result<Touched, Refusal>;

/// A registered key's backing, beside its entry in the key table.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) window: WindowId,
}

/// All objects of a device that commands refer to.
#[derive(Debug)]
pub(super) struct Objects {
    pub(super) iommu: Iommu,
    pds: HashSet<u32>,
    umems: HashMap<u32, UmemOwner>,
    uars: HashMap<u32, Arc<Uar>>,
    /// Event queues of the completion vectors.
    eqs: HashSet<u32>,
    cqs: HashMap<u32, Arc<Cq>>,
    /// Grants made by the typed calls, given back with the object.
    pub(super) key_grants: HashMap<MkeyIndex, Granted>,
    pub(super) umem_grants: HashMap<u32, Granted>,
    next_pd: u32,
    next_umem: u32,
    next_cq: u32,
    next_qp: u32,
}

/// The event queue that the device itself has, for completion vector 0.
pub(super) const FIRST_EQN: u32 = 0x10;
/// Completion vectors.
pub(super) const NUM_VECTORS: u32 = 4;
/// Most objects of a kind.
const OBJECTS_MAX: usize = 1 << 16;
/// First queue pair number, as libmlx5 users see them.
const FIRST_QPN: u32 = 0x100;

impl Default for Objects {
    fn default() -> Self {
        Self {
            iommu: Iommu::default(),
            pds: HashSet::new(),
            umems: HashMap::new(),
            uars: HashMap::new(),
            eqs: (FIRST_EQN..FIRST_EQN + NUM_VECTORS).collect(),
            cqs: HashMap::new(),
            key_grants: HashMap::new(),
            umem_grants: HashMap::new(),
            next_pd: 1,
            next_umem: 1,
            next_cq: 1,
            next_qp: FIRST_QPN,
        }
    }
}

impl Objects {
    pub(super) fn num_pds(&self) -> usize {
        self.pds.len()
    }

    pub(super) fn num_umems(&self) -> usize {
        self.umems.len()
    }

    pub(super) fn num_uars(&self) -> usize {
        self.uars.len()
    }

    pub(super) fn num_cqs(&self) -> usize {
        self.cqs.len()
    }

    /// A page that was freed and whose register still exists, or a new one.
    fn uar(&self, idx: u32) -> Result<&Arc<Uar>, Refusal> {
        self.uars.get(&idx).ok_or(refuse(Status::BadRes, CommandSyndrome::UnknownUar))
    }
}

/// The next number of a 24-bit space that is not taken.
fn next_number(next: &mut u32, first: u32, taken: impl Fn(u32) -> bool) -> u32 {
    loop {
        let number = *next;
        *next = if number == 0xff_ffff { first } else { number + 1 };
        if !taken(number) {
            return number;
        }
    }
}

/// Reads a field of at most 32 bits.
fn get32(bytes: &[u8], field: Field) -> u32 {
    // CAST: the fields read this way have at most 32 bits.
    prm::get(bytes, field) as u32
}

/// Reads a field of at most 8 bits.
fn get8(bytes: &[u8], field: Field) -> u8 {
    // CAST: the fields read this way have at most 8 bits.
    prm::get(bytes, field) as u8
}

impl EmulatedHca {
    /// Executes one mailbox; the typed calls and [`crate::Hca::exec`] come here.
    pub(super) fn command(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        self.await_command_latency();
        let mut objects = self.objects.lock();
        output.fill(0);
        // CAST: a 16-bit field.
        let opcode = prm::try_get(input, prm::cmd_in::OPCODE).unwrap_or(0) as u16;
        let op = Op::from_code(opcode).ok();
        let done = match op {
            None => Err(refuse(Status::BadOp, CommandSyndrome::UnknownOpcode)),
            Some(op) if input.len() < op.input_len_min() => {
                Err(refuse(Status::BadInpLen, CommandSyndrome::InputLength))
            }
            Some(op) if output.len() < op.output_len_min() => {
                Err(refuse(Status::BadOutpLen, CommandSyndrome::OutputLength))
            }
            Some(op) if self.is_removed() && !outlives_device(op) => {
                Err(refuse(Status::BadSysState, CommandSyndrome::Removed))
            }
            Some(op) => self.dispatch(&mut objects, op, input, output),
        };
        let status = done.as_ref().map_or_else(|refusal| refusal.status, |_| Status::Ok);
        self.record(op, input, done.as_ref().ok(), status);
        let Err(refusal) = done else { return Ok(()) };
        let syndrome = refusal.syndrome.code();
        answer(output, refusal.status, syndrome);
        Err(CommandError::new(opcode, refusal.status, syndrome, refusal.qp_state))
    }

    fn dispatch(&self, objects: &mut Objects, op: Op, input: &[u8], output: &mut [u8]) -> Done {
        match op {
            Op::QueryHcaCap => self.query_caps(input, output),
            Op::QueryRoceAddress => self.query_roce_address(input, output),
            Op::QueryHcaVportContext => self.query_vport(input, output),
            Op::EnableHca | Op::DisableHca | Op::InitHca | Op::TeardownHca | Op::SetHcaCap => {
                self.change_function()
            }
            Op::QueryIssi => self.query_issi(output),
            Op::SetIssi => self.set_issi(input),
            // No pages are wanted: the number in the reply is zero.
            Op::QueryPages => self.change_function(),
            Op::ManagePages => self.manage_pages(input),
            Op::AccessReg => self.access_register(input, output),
            Op::MadIfc => self.mad_ifc(input, output),
            Op::AllocPd => objects.alloc_pd(output),
            Op::DeallocPd => self.dealloc_pd(objects, input),
            Op::CreateMkey => self.create_mkey(objects, input, output),
            Op::DestroyMkey => self.destroy_mkey(objects, input),
            Op::CreateUmem => objects.create_umem(input, output),
            Op::DestroyUmem => objects.destroy_umem(input),
            Op::AllocUar => self.alloc_uar(objects, output),
            Op::DeallocUar => self.dealloc_uar(objects, input),
            Op::CreateEq => self.create_eq(objects, input, output),
            Op::DestroyEq => self.destroy_eq(input),
            Op::QueryEq => self.query_eq(input, output),
            Op::CreateCq => objects.create_cq(&mut self.event_table.lock(), input, output),
            Op::DestroyCq => objects.destroy_cq(&mut self.event_table.lock(), input),
            Op::CreateQp => self.create_qp(objects, input, output),
            Op::DestroyQp => self.destroy_qp(input),
            Op::QueryQp => self.query_qp(input, output),
            _ => match op.transition() {
                Some(transition) => self.modify_qp(op, transition, input),
                None => Err(refuse(Status::BadOp, CommandSyndrome::UnknownOpcode)),
            },
        }
    }

    fn record(&self, op: Option<Op>, input: &[u8], touched: Option<&Touched>, status: Status) {
        let touched = touched.copied().unwrap_or_else(|| named_by(op, input));
        let is_qp = touched.kind == ObjectKind::Qp;
        self.trace.lock().push(CommandRecord {
            op,
            object: touched.kind,
            number: touched.number,
            qpn: touched.number.filter(|_| is_qp).map(QpNum::new),
            status,
        });
    }
}

/// Commands that end something succeed on a device that is gone: what they end is gone with it. Linux answers so in
/// its driver's place, lest nobody could give back what belongs to a removed device.
///
/// SPEC: Linux drivers/net/ethernet/mellanox/mlx5/core/cmd.c, answers in the internal error state.
const fn outlives_device(op: Op) -> bool {
    matches!(
        op,
        Op::DestroyMkey
            | Op::DestroyUmem
            | Op::DestroyEq
            | Op::DestroyCq
            | Op::DestroyQp
            | Op::DeallocPd
            | Op::DeallocUar
            | Op::ToErrQp
            | Op::ToRstQp
            | Op::TeardownHca
            | Op::DisableHca
            | Op::ManagePages
    )
}

/// The object that a refused command named.
fn named_by(op: Option<Op>, input: &[u8]) -> Touched {
    let kind = match op {
        Some(Op::AllocPd | Op::DeallocPd) => ObjectKind::Pd,
        Some(Op::CreateMkey | Op::DestroyMkey) => ObjectKind::Mkey,
        Some(Op::CreateUmem | Op::DestroyUmem) => ObjectKind::Umem,
        Some(Op::AllocUar | Op::DeallocUar) => ObjectKind::Uar,
        Some(Op::CreateEq | Op::DestroyEq | Op::QueryEq) => ObjectKind::Eq,
        Some(Op::CreateCq | Op::DestroyCq) => ObjectKind::Cq,
        Some(Op::CreateQp | Op::DestroyQp | Op::QueryQp) => ObjectKind::Qp,
        Some(op) if op.transition().is_some() => ObjectKind::Qp,
        _ => ObjectKind::Device,
    };
    let creates = matches!(
        op,
        Some(
            Op::AllocPd
                | Op::CreateMkey
                | Op::CreateUmem
                | Op::AllocUar
                | Op::CreateEq
                | Op::CreateCq
                | Op::CreateQp
        )
    );
    // Every command that names an object names it in the same 24 bits; an event queue's 8 are the last of them.
    let number = prm::try_get(input, prm::qp_2err_in::QPN).filter(|_| !creates);
    let number = number.filter(|_| kind != ObjectKind::Device);
    // CAST: 24 bits.
    Touched { kind, number: number.map(|number| number as u32) }
}

/// Fills a reply's header, as far as there is room for it.
fn answer(output: &mut [u8], status: Status, syndrome: u32) {
    if output.len() >= 8 {
        prm::set(output, prm::cmd_out::STATUS, status.code().into());
        prm::set(output, prm::cmd_out::SYNDROME, syndrome.into());
    }
}

fn uar_idx(number: u32) -> UarIdx {
    UarIdx::new(number & 0xff_ffff)
}
