//! Typed builders of command mailboxes: the driver's way to queues, over any [`Hca`].
//!
//! *Who owns what.* Rings, completion queues and doorbell records live in umems that the caller created;
//! these functions only name places in them. One umem may hold everything.
//!
//! INVARIANT: a value that does not fit its field is refused before the command is sent.

use ibex_abi::prm::{self, Field, Op};
use ibex_abi::types::{CqNum, Eqn, PathMtu, Pd, Psn, QpNum, QpState, UarIdx, UmemId};

use crate::{Access, CommandError, Hca, HcaError, Path, PathAddress};

/// Umem and offset of a queue or record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The umem.
    pub umem: UmemId,
    /// Bytes from its start.
    pub offset: u64,
}

/// A completion queue to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CqSpec {
    /// Event queue, from [`Hca::eqn`].
    pub eqn: Eqn,
    /// Log2 of the number of 64-byte entries.
    pub log_size: u8,
    /// Where the entries are; a multiple of 64.
    pub ring: Place,
    /// Where the 8-byte doorbell record is.
    pub record: Place,
    /// Doorbell page.
    pub uar: UarIdx,
    /// All completions overwrite entry 0 (`cc`).
    pub collapsed: bool,
    /// Completions are written whether consumed or not (`oi`).
    pub overrun_ignore: bool,
}

/// An event queue to create.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EqSpec {
    /// Doorbell page.
    pub uar: UarIdx,
    /// Log2 of the number of 64-byte entries.
    pub log_size: u8,
    /// Address of the entries as the device knows it; a multiple of 4096, inside one umem.
    pub addr: u64,
    /// Bit t: asynchronous events of type t.
    pub events: u64,
}

/// What QUERY_EQ says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EqInfo {
    /// An event found the queue full; it takes no more.
    pub overflowed: bool,
    /// The next event raises the interrupt.
    pub is_armed: bool,
    /// Entries that the driver has consumed, low 24 bits.
    pub consumer: u32,
    /// Entries that the device has written, low 24 bits.
    pub producer: u32,
    /// As in [`EqSpec::events`].
    pub events: u64,
}

/// A receive queue of a queue pair.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RecvSpec {
    /// Log2 of the number of receive WQEs.
    pub log_size: u8,
    /// Log2 of the number of 16-byte scatter entries in each.
    pub log_segs: u8,
}

impl RecvSpec {
    /// Bytes of the receive ring, which precedes the send ring.
    #[must_use]
    pub const fn len(&self) -> u64 {
        let ring: u64 = 16 << (self.log_segs + self.log_size);
        ring.next_multiple_of(64)
    }

    /// Whether the ring has no bytes; it never has none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }
}

/// A queue pair to create, for the RC service.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QpSpec {
    /// Protection domain.
    pub pd: Pd,
    /// Log2 of the number of WQEBBs in the send queue.
    pub log_sq_size: u8,
    /// Receive queue, if it has one.
    pub recv: Option<RecvSpec>,
    /// Where the rings are: the receive ring, then the send ring; a multiple of 64.
    pub rings: Place,
    /// Where the 8-byte doorbell record is.
    pub record: Place,
    /// Doorbell page.
    pub uar: UarIdx,
    /// Where sends complete.
    pub send_cq: CqNum,
    /// Where receives complete.
    pub recv_cq: CqNum,
    /// Number that completions carry back, 24 bits.
    pub user_index: u32,
}

/// RST to INIT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitSpec {
    /// The queue pair.
    pub qpn: QpNum,
    /// Index into the partition key table.
    pub pkey_index: u16,
    /// Local port, from 1.
    pub port_num: u8,
    /// What the remote end may do.
    pub access: Access,
}

/// INIT to RTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RtrSpec {
    /// The queue pair.
    pub qpn: QpNum,
    /// Its remote end.
    pub remote_qpn: QpNum,
    /// First sequence number that the remote end sends.
    pub rq_psn: Psn,
    /// The way there.
    pub path: Path,
    /// MTU of the connection, at most the path's.
    pub mtu: PathMtu,
    /// Timer code that a receiver-not-ready answer carries.
    pub min_rnr_nak: u8,
    /// Log2 of the READs and atomics that the remote end may have in flight.
    pub log_rra_max: u8,
}

/// RTR to RTS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RtsSpec {
    /// The queue pair.
    pub qpn: QpNum,
    /// First sequence number that it sends.
    pub sq_psn: Psn,
    /// Timer code: 4.096 us * 2^code without an answer is a timeout; 0 waits for ever.
    pub ack_timeout: u8,
    /// Timeouts that are answered by sending again.
    pub retry_count: u8,
    /// Receiver-not-ready answers that are answered by sending again; 7 is for ever.
    pub rnr_retry: u8,
    /// Log2 of the READs and atomics in flight.
    pub log_sra_max: u8,
}

/// What QUERY_QP says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QpInfo {
    /// State.
    pub state: QpState,
    /// Remote end; zero before RTR.
    pub remote_qpn: QpNum,
    /// Sequence number of the next message sent.
    pub next_send_psn: Psn,
    /// Sequence number of the next message expected.
    pub next_rcv_psn: Psn,
    /// Next WQEBB that the device fetches, modulo 2^16.
    pub hw_sq_wqebb_counter: u16,
}

/// Longest message, log2: what drivers ask for.
const LOG_MSG_MAX: u64 = 30;
/// Path migration state "migrated", which every driver sets.
const PM_MIGRATED: u64 = 3;
/// Pages in which an event queue's memory is listed.
const EQ_PAGE: u64 = 4096;
/// `eqc.st` of an event queue that raises an interrupt at the next event.
const EQ_ARMED: u64 = 0x9;
/// Receive queue types.
const RQ_OWN: u64 = 0;
const RQ_NONE: u64 = 3;
/// Atomics of up to 8 bytes on the responder.
const ATOMIC_MODE_8B: u64 = 3;

/// A value for a field, if it fits.
fn fitting(name: &'static str, field: Field, value: u64) -> Result<(Field, u64), HcaError> {
    let max = field.value_max();
    match value <= max {
        true => Ok((field, value)),
        false => Err(HcaError::OutOfRange { field: name, value, min: 0, max }),
    }
}

fn set_all(bytes: &mut [u8], values: &[(Field, u64)]) {
    for (field, value) in values {
        prm::set(bytes, *field, *value);
    }
}

/// Sends a command that names one object by number; gives the reply.
pub(crate) fn simple_out(hca: &dyn Hca, op: Op, number: Option<u32>) -> Result<[u8; 16], CommandError> {
    let mut input = [0; 16];
    prm::set(&mut input, prm::cmd_in::OPCODE, op.code().into());
    if let Some(number) = number {
        // Every command of this shape has its object's number in the same place.
        prm::set(&mut input, prm::qp_2err_in::QPN, number.into());
    }
    let mut output = [0; 16];
    hca.exec(&input, &mut output)?;
    Ok(output)
}

/// Sends a command that names one object by number.
pub(crate) fn simple(hca: &dyn Hca, op: Op, number: u32) -> Result<(), CommandError> {
    simple_out(hca, op, Some(number)).map(|_| ())
}

/// Creates an event queue.
///
/// # Errors
/// A value that does not fit, or the device's refusal.
pub fn create_eq(hca: &dyn Hca, spec: &EqSpec) -> Result<Eqn, HcaError> {
    use prm::{create_eq_in as cmd, eqc};
    let log_size = fitting("log_size", eqc::LOG_EQ_SIZE, spec.log_size.into())?;
    let num_pages = (64_u64 << spec.log_size.min(31)).div_ceil(EQ_PAGE);
    // A list of pages follows the mailbox.
    let mut input = vec![0; cmd::LEN];
    input.extend((0..num_pages).flat_map(|page| spec.addr.wrapping_add(page * EQ_PAGE).to_be_bytes()));
    let context = prm::part_mut(&mut input, cmd::EQ_CONTEXT_ENTRY);
    set_all(context, &[log_size, (eqc::UAR_PAGE, spec.uar.into())]);
    set_all(&mut input, &[(cmd::OPCODE, Op::CreateEq.code().into()), (cmd::EVENT_BITMASK, spec.events)]);
    let mut output = [0; prm::create_eq_out::LEN];
    hca.exec(&input, &mut output)?;
    Ok(Eqn::new(get32(&output, prm::create_eq_out::EQ_NUMBER)))
}

/// Destroys an event queue.
///
/// # Errors
/// `RES_BUSY` while a completion queue names it; an unknown number.
pub fn destroy_eq(hca: &dyn Hca, eqn: Eqn) -> Result<(), HcaError> {
    Ok(simple(hca, Op::DestroyEq, eqn.get())?)
}

/// Reads an event queue's state.
///
/// # Errors
/// An unknown number.
pub fn query_eq(hca: &dyn Hca, eqn: Eqn) -> Result<EqInfo, HcaError> {
    use prm::{eqc, query_eq_in as cmd, query_eq_out as out};
    let mut input = [0; cmd::LEN];
    set_all(&mut input, &[(cmd::OPCODE, Op::QueryEq.code().into()), (cmd::EQ_NUMBER, eqn.into())]);
    let mut output = [0; out::LEN];
    hca.exec(&input, &mut output)?;
    let context = prm::part(&output, out::EQ_CONTEXT_ENTRY);
    Ok(EqInfo {
        overflowed: prm::get(context, eqc::STATUS) != 0,
        is_armed: prm::get(context, eqc::ST) == EQ_ARMED,
        consumer: get32(context, eqc::CONSUMER_COUNTER),
        producer: get32(context, eqc::PRODUCER_COUNTER),
        events: prm::get(&output, out::EVENT_BITMASK),
    })
}

/// Creates a completion queue.
///
/// # Errors
/// A value that does not fit, or the device's refusal.
pub fn create_cq(hca: &dyn Hca, spec: &CqSpec) -> Result<CqNum, HcaError> {
    use prm::{cqc, create_cq_in as cmd};
    let mut input = [0; cmd::LEN];
    let context = prm::part_mut(&mut input, cmd::CQ_CONTEXT);
    set_all(
        context,
        &[
            (cqc::DBR_UMEM_VALID, 1),
            (cqc::CC, spec.collapsed.into()),
            (cqc::OI, spec.overrun_ignore.into()),
            (cqc::DBR_UMEM_ID, spec.record.umem.into()),
            (cqc::DBR_ADDR, spec.record.offset),
            fitting("log_size", cqc::LOG_CQ_SIZE, spec.log_size.into())?,
            (cqc::UAR_PAGE, spec.uar.into()),
            (cqc::C_EQN, spec.eqn.into()),
        ],
    );
    set_all(
        &mut input,
        &[
            (cmd::OPCODE, Op::CreateCq.code().into()),
            (cmd::CQ_UMEM_VALID, 1),
            (cmd::CQ_UMEM_ID, spec.ring.umem.into()),
            (cmd::CQ_UMEM_OFFSET, spec.ring.offset),
        ],
    );
    let mut output = [0; prm::create_cq_out::LEN];
    hca.exec(&input, &mut output)?;
    Ok(CqNum::new(get32(&output, prm::create_cq_out::CQN)))
}

/// Destroys a completion queue.
///
/// # Errors
/// `RES_BUSY` while a queue pair uses it; an unknown number.
pub fn destroy_cq(hca: &dyn Hca, cqn: CqNum) -> Result<(), HcaError> {
    Ok(simple(hca, Op::DestroyCq, cqn.get())?)
}

/// Creates a queue pair in RST.
///
/// # Errors
/// A value that does not fit, or the device's refusal.
pub fn create_qp(hca: &dyn Hca, spec: &QpSpec) -> Result<QpNum, HcaError> {
    use prm::{create_qp_in as cmd, qpc};
    let mut input = [0; cmd::LEN];
    let context = prm::part_mut(&mut input, cmd::QPC);
    let recv = spec.recv.unwrap_or(RecvSpec { log_size: 0, log_segs: 0 });
    set_all(
        context,
        &[
            (qpc::PM_STATE, PM_MIGRATED),
            (qpc::PD, spec.pd.into()),
            fitting("recv.log_size", qpc::LOG_RQ_SIZE, recv.log_size.into())?,
            fitting("recv.log_segs", qpc::LOG_RQ_STRIDE, recv.log_segs.into())?,
            (qpc::RQ_TYPE, if spec.recv.is_some() { RQ_OWN } else { RQ_NONE }),
            fitting("log_sq_size", qpc::LOG_SQ_SIZE, spec.log_sq_size.into())?,
            (qpc::UAR_PAGE, spec.uar.into()),
            fitting("user_index", qpc::USER_INDEX, spec.user_index.into())?,
            (qpc::CQN_SND, spec.send_cq.into()),
            (qpc::CQN_RCV, spec.recv_cq.into()),
            (qpc::DBR_UMEM_VALID, 1),
            (qpc::DBR_UMEM_ID, spec.record.umem.into()),
            (qpc::DBR_ADDR, spec.record.offset),
        ],
    );
    set_all(
        &mut input,
        &[
            (cmd::OPCODE, Op::CreateQp.code().into()),
            (cmd::WQ_UMEM_VALID, 1),
            (cmd::WQ_UMEM_ID, spec.rings.umem.into()),
            (cmd::WQ_UMEM_OFFSET, spec.rings.offset),
        ],
    );
    let mut output = [0; prm::create_qp_out::LEN];
    hca.exec(&input, &mut output)?;
    Ok(QpNum::new(get32(&output, prm::create_qp_out::QPN)))
}

/// Destroys a queue pair, whatever its state.
///
/// # Errors
/// An unknown number.
pub fn destroy_qp(hca: &dyn Hca, qpn: QpNum) -> Result<(), HcaError> {
    Ok(simple(hca, Op::DestroyQp, qpn.get())?)
}

/// Sends a command that carries a queue pair context.
fn modify(
    hca: &dyn Hca,
    op: Op,
    qpn: QpNum,
    context: &[(Field, u64)],
    gid: Option<&[u8]>,
) -> Result<(), HcaError> {
    use prm::{ads, qpc, rst2init_qp_in as cmd};
    let mut input = [0; cmd::LEN];
    prm::set(&mut input, cmd::OPCODE, op.code().into());
    prm::set(&mut input, cmd::QPN, qpn.into());
    let qpc = prm::part_mut(&mut input, cmd::QPC);
    set_all(qpc, context);
    if let Some(gid) = gid {
        prm::set_bytes(prm::part_mut(qpc, qpc::PRIMARY_ADDRESS_PATH), ads::RGID_RIP, gid);
    }
    Ok(hca.exec(&input, &mut [0; 16])?)
}

/// Moves a queue pair from RST to INIT.
///
/// # Errors
/// A value that does not fit, or the device's refusal.
pub fn rst2init(hca: &dyn Hca, spec: &InitSpec) -> Result<(), HcaError> {
    use prm::{ads, qpc};
    let path = |field: Field| field.within(qpc::PRIMARY_ADDRESS_PATH);
    let context = [
        (qpc::PM_STATE, PM_MIGRATED),
        (path(ads::PKEY_INDEX), spec.pkey_index.into()),
        (path(ads::VHCA_PORT_NUM), spec.port_num.into()),
        (qpc::RRE, spec.access.remote_read.into()),
        (qpc::RWE, spec.access.remote_write.into()),
        (qpc::RAE, spec.access.remote_atomic.into()),
        (qpc::ATOMIC_MODE, ATOMIC_MODE_8B),
    ];
    modify(hca, Op::Rst2InitQp, spec.qpn, &context, None)
}

/// Moves a queue pair from INIT to RTR.
///
/// # Errors
/// A value that does not fit, or the device's refusal.
pub fn init2rtr(hca: &dyn Hca, spec: &RtrSpec) -> Result<(), HcaError> {
    use prm::{ads, qpc};
    let path = |field: Field| field.within(qpc::PRIMARY_ADDRESS_PATH);
    let mut context = vec![
        (qpc::PM_STATE, PM_MIGRATED),
        (qpc::MTU, spec.mtu.code().into()),
        (qpc::LOG_MSG_MAX, LOG_MSG_MAX),
        (qpc::REMOTE_QPN, spec.remote_qpn.into()),
        (qpc::NEXT_RCV_PSN, spec.rq_psn.get().into()),
        fitting("min_rnr_nak", qpc::MIN_RNR_NAK, spec.min_rnr_nak.into())?,
        fitting("log_rra_max", qpc::LOG_RRA_MAX, spec.log_rra_max.into())?,
        (path(ads::VHCA_PORT_NUM), spec.path.port_num.into()),
    ];
    let mut gid = None;
    match &spec.path.to {
        PathAddress::Ib { rlid } => context.extend([
            (path(ads::RLID), (*rlid).into()),
            fitting("path.sl", path(ads::SL), spec.path.sl.into())?,
        ]),
        PathAddress::Roce { rgid, rmac, sgid_index, hop_limit, tclass, udp_sport } => {
            let (high, low) = rmac.split();
            gid = Some(rgid.0.as_slice());
            context.extend([
                (path(ads::RMAC_47_32), high.into()),
                (path(ads::RMAC_31_0), low.into()),
                (path(ads::SRC_ADDR_INDEX), (*sgid_index).into()),
                (path(ads::HOP_LIMIT), (*hop_limit).into()),
                (path(ads::TCLASS), (*tclass).into()),
                (path(ads::UDP_SPORT), (*udp_sport).into()),
                fitting("path.sl", path(ads::ETH_PRIO), spec.path.sl.into())?,
            ]);
        }
    }
    modify(hca, Op::Init2RtrQp, spec.qpn, &context, gid)
}

/// Moves a queue pair from RTR to RTS.
///
/// # Errors
/// A value that does not fit, or the device's refusal.
pub fn rtr2rts(hca: &dyn Hca, spec: &RtsSpec) -> Result<(), HcaError> {
    use prm::{ads, qpc};
    let ack_timeout = ads::ACK_TIMEOUT.within(qpc::PRIMARY_ADDRESS_PATH);
    let context = [
        (qpc::PM_STATE, PM_MIGRATED),
        (qpc::NEXT_SEND_PSN, spec.sq_psn.get().into()),
        fitting("ack_timeout", ack_timeout, spec.ack_timeout.into())?,
        fitting("retry_count", qpc::RETRY_COUNT, spec.retry_count.into())?,
        fitting("rnr_retry", qpc::RNR_RETRY, spec.rnr_retry.into())?,
        fitting("log_sra_max", qpc::LOG_SRA_MAX, spec.log_sra_max.into())?,
    ];
    modify(hca, Op::Rtr2RtsQp, spec.qpn, &context, None)
}

/// Moves a queue pair to ERR: it executes nothing more and flushes what is posted.
///
/// # Errors
/// An unknown number.
pub fn to_err(hca: &dyn Hca, qpn: QpNum) -> Result<(), HcaError> {
    Ok(simple(hca, Op::ToErrQp, qpn.get())?)
}

/// Moves a queue pair to RST. When this returns the device no longer touches its rings.
///
/// # Errors
/// An unknown number.
pub fn to_reset(hca: &dyn Hca, qpn: QpNum) -> Result<(), HcaError> {
    Ok(simple(hca, Op::ToRstQp, qpn.get())?)
}

/// Asks for a queue pair's state.
///
/// # Errors
/// An unknown number, or a reply that names no state.
pub fn query_qp(hca: &dyn Hca, qpn: QpNum) -> Result<QpInfo, HcaError> {
    use prm::{qpc, query_qp_in as cmd, query_qp_out as reply};
    let mut input = [0; cmd::LEN];
    prm::set(&mut input, cmd::OPCODE, Op::QueryQp.code().into());
    prm::set(&mut input, cmd::QPN, qpn.into());
    let mut output = [0; reply::LEN];
    hca.exec(&input, &mut output)?;
    let context = prm::part(&output, reply::QPC);
    let code = prm::get(context, qpc::STATE);
    let unknown = HcaError::Unknown { what: "queue pair state", number: code };
    Ok(QpInfo {
        state: QpState::from_code(code).ok_or(unknown)?,
        remote_qpn: QpNum::new(get32(context, qpc::REMOTE_QPN)),
        next_send_psn: Psn::new(get32(context, qpc::NEXT_SEND_PSN)),
        next_rcv_psn: Psn::new(get32(context, qpc::NEXT_RCV_PSN)),
        // CAST: a 16-bit field.
        hw_sq_wqebb_counter: get32(context, qpc::HW_SQ_WQEBB_COUNTER) as u16,
    })
}

fn get32(bytes: &[u8], field: Field) -> u32 {
    // CAST: the fields read this way have at most 32 bits.
    prm::get(bytes, field) as u32
}
