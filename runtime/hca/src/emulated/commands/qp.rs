//! Queue pairs: created in RST, moved by transitions, queried, destroyed.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use ibex_abi::prm::{self, Op, Status};
use ibex_abi::types::{Gid, Lid, Mac, PathMtu, Psn, QpNum, QpState, QpTransition};
use ibex_abi::wqe::WQEBB;

use super::queues::RECORD_LEN;
use super::{
    CommandSyndrome, Done, OBJECTS_MAX, Objects, Refusal, Touched, get8, get32, next_number, refuse,
};
use crate::emulated::EmulatedHca;
use crate::emulated::cq::Cq;
use crate::emulated::qp::{Qp, QpLayout, RecvRing};
use crate::emulated::requester::{Connection, Mtu, Requester};
use crate::emulated::responder::{RECV_WQE_MAX, Responder};
use crate::emulated::trace::ObjectKind;
use crate::{Access, LinkLayer, PathAddress};

/// Service type RC.
const ST_RC: u64 = 0;
/// Receive queue types: a queue of its own, or none.
const RQ_OWN: u64 = 0;
const RQ_NONE: u64 = 3;

/// Bits of `opt_param_mask`. SPEC: mlx5 `MLX5_QP_OPTPAR_*`.
mod optional {
    pub(super) const RRE: u32 = 1 << 1;
    pub(super) const RAE: u32 = 1 << 2;
    pub(super) const RWE: u32 = 1 << 3;
    pub(super) const RNR_TIMEOUT: u32 = 1 << 6;
    pub(super) const RETRY_COUNT: u32 = 1 << 12;
    pub(super) const RNR_RETRY: u32 = 1 << 13;
    pub(super) const ACK_TIMEOUT: u32 = 1 << 14;
}

impl Objects {
    fn cq(&self, num: u32) -> Result<&Arc<Cq>, Refusal> {
        self.cqs.get(&num).ok_or(refuse(Status::BadRes, CommandSyndrome::UnknownCq))
    }
}

impl EmulatedHca {
    pub(super) fn create_qp(&self, objects: &mut Objects, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{create_qp_in as cmd, qpc};
        let context = prm::part(input, cmd::QPC);
        let existing = self.qps();
        if existing.len() >= OBJECTS_MAX {
            return Err(refuse(Status::NoRes, CommandSyndrome::TableFull));
        }
        let rq_type = prm::get(context, qpc::RQ_TYPE);
        if prm::get(context, qpc::ST) != ST_RC || !matches!(rq_type, RQ_OWN | RQ_NONE) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadServiceType));
        }
        if prm::get(input, cmd::WQ_UMEM_VALID) == 0 || prm::get(context, qpc::DBR_UMEM_VALID) == 0 {
            return Err(refuse(Status::BadParam, CommandSyndrome::NotInUmem));
        }
        let pd = objects.pd(get32(context, qpc::PD))?;
        let send_cq = Arc::clone(objects.cq(get32(context, qpc::CQN_SND))?);
        let recv_cq = Arc::clone(objects.cq(get32(context, qpc::CQN_RCV))?);
        let uar = Arc::clone(objects.uar(get32(context, qpc::UAR_PAGE))?);
        let (rq_len, log_rq, stride) = recv_size(context, rq_type)?;
        let log_sq = get8(context, qpc::LOG_SQ_SIZE);
        if log_sq > self.caps.log_max_qp_sz || prm::get(context, qpc::NO_SQ) != 0 {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadQueueSize));
        }
        // The receive ring comes first, the send ring follows it.
        let sq_len = (WQEBB as u64) << log_sq;
        let (umem, at) = (get32(input, cmd::WQ_UMEM_ID), prm::get(input, cmd::WQ_UMEM_OFFSET));
        let (rings, ring_hold) = objects.carve(umem, at, rq_len + sq_len, 64)?;
        let record_umem = get32(context, qpc::DBR_UMEM_ID);
        let record_at = prm::get(context, qpc::DBR_ADDR);
        let (record, record_hold) = objects.carve(record_umem, record_at, RECORD_LEN, RECORD_LEN)?;
        let carved = refuse(Status::BadParam, CommandSyndrome::OutsideUmem);
        let sq = rings.slice(rq_len, sq_len).ok_or(carved)?;
        let rq_memory = rings.slice(0, rq_len).filter(|_| rq_len != 0);
        let rq = rq_memory.map(|memory| RecvRing { memory, log_size: log_rq, stride });
        let taken = |num| existing.iter().any(|qp| qp.num().get() == num);
        let number = next_number(&mut objects.next_qp, super::FIRST_QPN, taken);
        send_cq.users.fetch_add(1, Ordering::AcqRel);
        recv_cq.users.fetch_add(1, Ordering::AcqRel);
        let (num, user_index) = (QpNum::new(number), get32(context, qpc::USER_INDEX));
        let layout = QpLayout { num, pd, user_index, sq, rq, record, send_cq, recv_cq, uar };
        let port = self.fabric_port().memory().cloned();
        self.publish_qp(Qp::new(layout, vec![ring_hold, record_hold], port));
        prm::set(output, prm::create_qp_out::QPN, number.into());
        Ok(Touched::new(ObjectKind::Qp, number))
    }

    fn named_qp(&self, input: &[u8]) -> Result<Arc<Qp>, Refusal> {
        let num = QpNum::new(get32(input, prm::qp_2err_in::QPN));
        self.find_qp(num).ok_or(refuse(Status::BadRes, CommandSyndrome::UnknownQp))
    }

    pub(super) fn destroy_qp(&self, input: &[u8]) -> Done {
        let qp = self.named_qp(input)?;
        self.withdraw_qp(qp.num());
        reset(&qp);
        // Nobody finds it any more and its halves are in RST: its memory is no longer touched.
        qp.holds.lock().clear();
        qp.layout.send_cq.users.fetch_sub(1, Ordering::AcqRel);
        qp.layout.recv_cq.users.fetch_sub(1, Ordering::AcqRel);
        Ok(Touched::new(ObjectKind::Qp, qp.num().get()))
    }

    pub(super) fn modify_qp(&self, op: Op, transition: QpTransition, input: &[u8]) -> Done {
        let qp = self.named_qp(input)?;
        let touched = Touched::new(ObjectKind::Qp, qp.num().get());
        if transition == QpTransition::ToReset {
            reset(&qp);
            return Ok(touched);
        }
        let mut requester = qp.requester.lock();
        let mut responder = qp.responder.lock();
        let before = qp.state();
        let after = before.after(transition).map_err(|_| Refusal {
            status: Status::BadQpState,
            syndrome: CommandSyndrome::IllegalTransition,
            qp_state: Some(before),
        })?;
        let in_state = |refusal| Refusal { qp_state: Some(before), ..refusal };
        if transition != QpTransition::ToErr {
            let context = prm::part(input, prm::rst2init_qp_in::QPC);
            let mask = get32(input, prm::rst2init_qp_in::OPT_PARAM_MASK);
            match op {
                Op::Rst2InitQp => self.to_init(context, &mut responder),
                Op::Init2RtrQp => self.to_rtr(context, &mut requester, &mut responder),
                Op::Rtr2RtsQp => {
                    to_rts(context, &mut requester);
                    Ok(())
                }
                _ => Ok(()),
            }
            .map_err(in_state)?;
            apply_optional(mask, context, &mut requester, &mut responder);
        }
        qp.set_state(after);
        Ok(touched)
    }

    fn to_init(&self, context: &[u8], responder: &mut Responder) -> Result<(), Refusal> {
        use prm::{ads, qpc};
        let path = prm::part(context, qpc::PRIMARY_ADDRESS_PATH);
        if prm::get(path, ads::VHCA_PORT_NUM) != u64::from(self.port.port_num) {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPort));
        }
        if prm::get(path, ads::PKEY_INDEX) != 0 {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadPkeyIndex));
        }
        responder.rights = rights(context);
        Ok(())
    }

    fn to_rtr(
        &self,
        context: &[u8],
        requester: &mut Requester,
        responder: &mut Responder,
    ) -> Result<(), Refusal> {
        use prm::qpc;
        let mtu = PathMtu::from_code(prm::get(context, qpc::MTU)).filter(|mtu| *mtu <= self.port.mtu);
        let mtu = mtu.ok_or(refuse(Status::BadParam, CommandSyndrome::BadMtu))?;
        let to = self.path_of(prm::part(context, qpc::PRIMARY_ADDRESS_PATH))?;
        let log_msg_max = get8(context, qpc::LOG_MSG_MAX);
        if log_msg_max > self.caps.log_max_msg {
            return Err(refuse(Status::BadParam, CommandSyndrome::BadQueueSize));
        }
        let remote_qpn = QpNum::new(get32(context, qpc::REMOTE_QPN));
        responder.from = Some((to, remote_qpn));
        responder.mtu = Some(mtu);
        responder.expected = Psn::new(get32(context, qpc::NEXT_RCV_PSN));
        responder.min_rnr_nak = get8(context, qpc::MIN_RNR_NAK);
        responder.log_max_reads = get8(context, qpc::LOG_RRA_MAX);
        requester.connection = Some(Connection { to, remote_qpn, mtu: Mtu(mtu), log_msg_max });
        Ok(())
    }

    /// The address in a path, checked against the port's link layer.
    fn path_of(&self, path: &[u8]) -> Result<PathAddress, Refusal> {
        use prm::ads;
        let bad = refuse(Status::BadParam, CommandSyndrome::BadPath);
        match self.port.link {
            LinkLayer::Ib => match get32(path, ads::RLID) {
                // CAST: a 16-bit field.
                rlid if rlid != 0 => Ok(PathAddress::Ib { rlid: Lid(rlid as u16) }),
                _ => Err(bad),
            },
            LinkLayer::Roce => {
                let sgid_index = get8(path, ads::SRC_ADDR_INDEX);
                let hop_limit = get8(path, ads::HOP_LIMIT);
                let rgid = Gid(prm::get_bytes(path, ads::RGID_RIP));
                if sgid_index != self.port.gid_index || hop_limit == 0 || rgid == Gid::default() {
                    return Err(bad);
                }
                // CAST: 16-bit fields.
                let high = get32(path, ads::RMAC_47_32) as u16;
                let rmac = Mac::join(high, get32(path, ads::RMAC_31_0));
                let (tclass, udp_sport) = (get8(path, ads::TCLASS), get32(path, ads::UDP_SPORT) as u16);
                Ok(PathAddress::Roce { rgid, rmac, sgid_index, hop_limit, tclass, udp_sport })
            }
        }
    }

    pub(super) fn query_qp(&self, input: &[u8], output: &mut [u8]) -> Done {
        use prm::{ads, qpc};
        let qp = self.named_qp(input)?;
        let requester = qp.requester.lock();
        let responder = qp.responder.lock();
        let context = prm::part_mut(output, prm::query_qp_out::QPC);
        let layout = &qp.layout;
        let sq_blocks = layout.sq.len() / WQEBB as u64;
        for (field, value) in [
            (qpc::STATE, qp.state().code().into()),
            (qpc::PD, layout.pd.into()),
            (qpc::LOG_SQ_SIZE, sq_blocks.trailing_zeros().into()),
            (qpc::UAR_PAGE, layout.uar.idx.into()),
            (qpc::USER_INDEX, layout.user_index.into()),
            (qpc::CQN_SND, layout.send_cq.num.into()),
            (qpc::CQN_RCV, layout.recv_cq.num.into()),
            (qpc::LOG_SRA_MAX, requester.patience.log_max_reads.into()),
            (qpc::RETRY_COUNT, requester.patience.retry_count.into()),
            (qpc::RNR_RETRY, requester.patience.rnr_retry.into()),
            (qpc::NEXT_SEND_PSN, requester.psn.get().into()),
            (qpc::LAST_ACKED_PSN, requester.last_acked().get().into()),
            (qpc::HW_SQ_WQEBB_COUNTER, requester.next.into()),
            (qpc::LOG_RRA_MAX, responder.log_max_reads.into()),
            (qpc::MIN_RNR_NAK, responder.min_rnr_nak.into()),
            (qpc::NEXT_RCV_PSN, responder.expected.get().into()),
            (qpc::RMSN, responder.msn.into()),
            (qpc::RRE, responder.rights.remote_read.into()),
            (qpc::RWE, responder.rights.remote_write.into()),
            (qpc::RAE, responder.rights.remote_atomic.into()),
        ] {
            prm::set(context, field, value);
        }
        if let Some(connection) = &requester.connection {
            prm::set(context, qpc::MTU, connection.mtu.0.code().into());
            prm::set(context, qpc::LOG_MSG_MAX, connection.log_msg_max.into());
            prm::set(context, qpc::REMOTE_QPN, connection.remote_qpn.into());
            let timeout = ads::ACK_TIMEOUT.within(qpc::PRIMARY_ADDRESS_PATH);
            prm::set(context, timeout, requester.patience.ack_timeout.into());
        }
        Ok(Touched::new(ObjectKind::Qp, qp.num().get()))
    }
}

/// Length of the receive ring, its log2 number of entries and their stride.
fn recv_size(context: &[u8], rq_type: u64) -> Result<(u64, u8, u64), Refusal> {
    if rq_type == RQ_NONE {
        return Ok((0, 0, 0));
    }
    let (log_size, log_stride) =
        (get8(context, prm::qpc::LOG_RQ_SIZE), get8(context, prm::qpc::LOG_RQ_STRIDE));
    let stride = 16_u64 << log_stride;
    if stride > RECV_WQE_MAX as u64 {
        return Err(refuse(Status::BadParam, CommandSyndrome::BadQueueSize));
    }
    Ok(((stride << log_size).next_multiple_of(WQEBB as u64), log_size, stride))
}

fn rights(context: &[u8]) -> Access {
    let flag = |field| prm::get(context, field) == 1;
    Access {
        local_write: true,
        remote_write: flag(prm::qpc::RWE),
        remote_read: flag(prm::qpc::RRE),
        remote_atomic: flag(prm::qpc::RAE),
    }
}

fn to_rts(context: &[u8], requester: &mut Requester) {
    use prm::{ads, qpc};
    requester.psn = Psn::new(get32(context, qpc::NEXT_SEND_PSN));
    requester.patience.retry_count = get8(context, qpc::RETRY_COUNT);
    requester.patience.rnr_retry = get8(context, qpc::RNR_RETRY);
    requester.patience.log_max_reads = get8(context, qpc::LOG_SRA_MAX);
    let path = prm::part(context, qpc::PRIMARY_ADDRESS_PATH);
    requester.patience.ack_timeout = get8(path, ads::ACK_TIMEOUT);
}

/// Applies the parameters that a transition may change besides its own.
fn apply_optional(mask: u32, context: &[u8], requester: &mut Requester, responder: &mut Responder) {
    use prm::{ads, qpc};
    let given = rights(context);
    let named = |bit| mask & bit != 0;
    if named(optional::RRE) {
        responder.rights.remote_read = given.remote_read;
    }
    if named(optional::RWE) {
        responder.rights.remote_write = given.remote_write;
    }
    if named(optional::RAE) {
        responder.rights.remote_atomic = given.remote_atomic;
    }
    if named(optional::RNR_TIMEOUT) {
        responder.min_rnr_nak = get8(context, qpc::MIN_RNR_NAK);
    }
    if named(optional::RETRY_COUNT) {
        requester.patience.retry_count = get8(context, qpc::RETRY_COUNT);
    }
    if named(optional::RNR_RETRY) {
        requester.patience.rnr_retry = get8(context, qpc::RNR_RETRY);
    }
    if named(optional::ACK_TIMEOUT) {
        let path = prm::part(context, qpc::PRIMARY_ADDRESS_PATH);
        requester.patience.ack_timeout = get8(path, ads::ACK_TIMEOUT);
    }
}

/// Takes a queue pair to RST: nothing of it executes, and nothing of its past is left.
fn reset(qp: &Qp) {
    let mut requester = qp.requester.lock();
    let mut responder = qp.responder.lock();
    qp.set_state(QpState::Reset);
    qp.forget_doorbell();
    qp.layout.uar.forget(qp.num());
    (*requester, *responder) = (Requester::default(), Responder::default());
}
