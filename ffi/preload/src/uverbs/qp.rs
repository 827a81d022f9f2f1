//! Queue pairs: created, moved and queried by verbs, which become mailboxes.
//!
//! The state that decides which mailbox a modification becomes is the one that the program brought the queue pair to,
//! as in the kernel; what the device did on its own account shows in a query.

use std::sync::Arc;

use ibex_abi::prm::{self, Field, Op};
use ibex_abi::types::{Gid, QpNum};
use ibex_hca::{LinkLayer, Umem};
use zerocopy::IntoBytes;

use super::abi::{CreateQp, CreateQpAnswer, ModifyQp, QpAttr, QpCap, QpDest, QueryQp};
use super::attrs::{Call, UHW_IN, UHW_OUT};
use super::events::EventFile;
use super::write::{CORE_IN, CORE_OUT};
use super::{Context, Done, Object};
use crate::errno::Errno;
use crate::world::{self, QpListener};

/// The transport that the device offers. SPEC: `IB_UVERBS_QPT_RC`.
const RC: u64 = 2;
/// The library signals every request by itself. SPEC: `IB_UVERBS_QP_CREATE_SQ_SIG_ALL`.
const SQ_SIG_ALL: u32 = 1 << 12;
/// The driver data names the doorbell page. SPEC: libmlx5 `MLX5_QP_FLAG_UAR_PAGE_INDEX`.
const UAR_PAGE_INDEX: u32 = 1 << 10;
/// Receive queue types of `qpc`.
const RQ_OWN: u64 = 0;
const RQ_NONE: u64 = 3;
/// `qpc.pm_state` without path migration.
const PM_MIGRATED: u64 = 3;

/// States of the verbs. SPEC: `enum ibv_qp_state`.
mod state {
    pub(super) const RESET: u8 = 0;
    pub(super) const INIT: u8 = 1;
    pub(super) const RTR: u8 = 2;
    pub(super) const RTS: u8 = 3;
    pub(super) const SQD: u8 = 4;
    pub(super) const SQE: u8 = 5;
    pub(super) const ERR: u8 = 6;
}

/// Bits that say which attributes a modification has. SPEC: `enum ibv_qp_attr_mask`.
mod given {
    pub(super) const STATE: u32 = 1 << 0;
    pub(super) const CUR_STATE: u32 = 1 << 1;
    pub(super) const ACCESS: u32 = 1 << 3;
    pub(super) const PKEY_INDEX: u32 = 1 << 4;
    pub(super) const PORT: u32 = 1 << 5;
    pub(super) const PATH: u32 = 1 << 7;
    pub(super) const PATH_MTU: u32 = 1 << 8;
    pub(super) const TIMEOUT: u32 = 1 << 9;
    pub(super) const RETRY_COUNT: u32 = 1 << 10;
    pub(super) const RNR_RETRY: u32 = 1 << 11;
    pub(super) const RQ_PSN: u32 = 1 << 12;
    pub(super) const MAX_RD_ATOMIC: u32 = 1 << 13;
    pub(super) const MIN_RNR_TIMER: u32 = 1 << 15;
    pub(super) const SQ_PSN: u32 = 1 << 16;
    pub(super) const MAX_DEST_RD_ATOMIC: u32 = 1 << 17;
    pub(super) const DEST_QPN: u32 = 1 << 20;
}

/// What each step needs, and what it may have besides. SPEC: IBTA vol. 1 table 91; the kernel refuses anything else.
const INIT_NEEDS: u32 = given::PKEY_INDEX | given::PORT | given::ACCESS;
const RTR_NEEDS: u32 = given::PATH
    | given::PATH_MTU
    | given::DEST_QPN
    | given::RQ_PSN
    | given::MAX_DEST_RD_ATOMIC
    | given::MIN_RNR_TIMER;
const RTR_MAY: u32 = given::ACCESS | given::PKEY_INDEX;
const RTS_NEEDS: u32 =
    given::TIMEOUT | given::RETRY_COUNT | given::RNR_RETRY | given::SQ_PSN | given::MAX_RD_ATOMIC;
const RTS_MAY: u32 = given::CUR_STATE | given::ACCESS | given::MIN_RNR_TIMER;

/// Bits of `opt_param_mask`. SPEC: mlx5 `MLX5_QP_OPTPAR_*`.
mod optional {
    pub(super) const ACCESS: u32 = 1 << 1 | 1 << 2 | 1 << 3;
    pub(super) const RNR_TIMEOUT: u32 = 1 << 6;
}

/// A queue pair of the verbs.
#[derive(Debug)]
pub(crate) struct Qp {
    num: QpNum,
    umems: Vec<Umem>,
    cap: QpCap,
    sq_sig_all: bool,
    state: u8,
    dest: QpDest,
    user_handle: u64,
    asynchronous: Option<Arc<EventFile>>,
}

/// What a program asks for.
struct Wanted {
    driver: CreateQp,
    pd: u64,
    send_cq: u64,
    recv_cq: u64,
}

impl Wanted {
    /// Log2 of a number of entries that must be a power of two.
    fn log(count: u32) -> Result<u64, Errno> {
        if count.is_power_of_two() { Ok(count.trailing_zeros().into()) } else { Err(Errno::INVAL) }
    }

    /// Both rings: the receive ring comes first.
    fn rings_len(&self) -> Result<u64, Errno> {
        let recv = u64::from(self.driver.rq_wqe_count).checked_shl(self.driver.rq_wqe_shift);
        let recv = recv.filter(|_| self.driver.rq_wqe_shift < 32).ok_or(Errno::INVAL)?;
        Ok(recv + u64::from(self.driver.sq_wqe_count) * 64)
    }
}

impl Context {
    pub(super) fn qp_method(&self, call: &Call) -> Done {
        const CREATE: u16 = 0;
        const DESTROY: u16 = 1;
        match call.method {
            CREATE => self.create_qp(call),
            DESTROY => self.destroy_qp(call),
            _ => Err(Errno::NO_METHOD),
        }
    }

    fn cqn(&self, handle: u32) -> Result<u64, Errno> {
        self.with(handle, |object| match object {
            Object::Cq(cq) => Some(cq.num.into()),
            _ => None,
        })
    }

    fn create_qp(&self, call: &Call) -> Done {
        const HANDLE: u16 = 0;
        const PD: u16 = 2;
        const SRQ: u16 = 3;
        const SEND_CQ: u16 = 4;
        const RECV_CQ: u16 = 5;
        const USER_HANDLE: u16 = 7;
        const CAP: u16 = 8;
        const TYPE: u16 = 9;
        const FLAGS: u16 = 10;
        const EVENT_FD: u16 = 12;
        const RESP_CAP: u16 = 13;
        const RESP_QP_NUM: u16 = 14;
        let flags = if call.has(FLAGS) { call.number32(FLAGS)? } else { 0 };
        if call.number(TYPE)? != RC || call.has(SRQ) || flags & !SQ_SIG_ALL != 0 {
            return Err(Errno::NOTSUPP);
        }
        let wanted = Wanted {
            driver: call.input_as(UHW_IN)?,
            pd: self.pd(call.number32(PD)?)?.into(),
            send_cq: self.cqn(call.number32(SEND_CQ)?)?,
            recv_cq: self.cqn(call.number32(RECV_CQ)?)?,
        };
        let asynchronous = if call.has(EVENT_FD) { Some(self.file(call.fd(EVENT_FD)?)?) } else { None };
        let (driver, user_handle) = (wanted.driver, call.number(USER_HANDLE)?);
        let umems = self.umems_at(driver.buf_addr, wanted.rings_len()?, driver.db_addr)?;
        let num = self.exec_create_qp(&wanted, &umems).inspect_err(|_| self.drop_umems(&umems))?;
        self.device.listen_qp(num, QpListener { user_handle, asynchronous: asynchronous.clone() });
        let cap: QpCap = call.input_as(CAP)?;
        let handle = self.add(Object::Qp(Qp {
            num,
            umems: umems.to_vec(),
            cap,
            sq_sig_all: flags & SQ_SIG_ALL != 0,
            state: state::RESET,
            dest: zerocopy::FromZeros::new_zeroed(),
            user_handle,
            asynchronous,
        }));
        let answer = CreateQpAnswer { bfreg_index: driver.bfreg_index, rest: [0; 9] };
        call.set_output(UHW_OUT, answer.as_bytes())?;
        call.set_output(RESP_CAP, cap.as_bytes())?;
        call.set_output(RESP_QP_NUM, u32::from(num).as_bytes())?;
        call.set_number(HANDLE, handle.into())
    }

    fn exec_create_qp(&self, wanted: &Wanted, umems: &[Umem; 2]) -> Result<QpNum, Errno> {
        use prm::{create_qp_in as cmd, qpc};
        let driver = &wanted.driver;
        if driver.flags & UAR_PAGE_INDEX == 0 {
            return Err(Errno::INVAL);
        }
        let has_rq = driver.rq_wqe_count != 0;
        let (log_rq, stride) = match has_rq {
            true => {
                (Wanted::log(driver.rq_wqe_count)?, driver.rq_wqe_shift.checked_sub(4).ok_or(Errno::INVAL)?)
            }
            false => (0, 0),
        };
        let mut input = [0; cmd::LEN];
        set_all(
            prm::part_mut(&mut input, cmd::QPC),
            &[
                (qpc::PM_STATE, PM_MIGRATED),
                (qpc::PD, wanted.pd),
                (qpc::LOG_RQ_SIZE, log_rq),
                (qpc::LOG_RQ_STRIDE, stride.into()),
                (qpc::RQ_TYPE, if has_rq { RQ_OWN } else { RQ_NONE }),
                (qpc::LOG_SQ_SIZE, Wanted::log(driver.sq_wqe_count)?),
                (qpc::UAR_PAGE, driver.bfreg_index.into()),
                (qpc::USER_INDEX, driver.uidx.into()),
                (qpc::CQN_SND, wanted.send_cq),
                (qpc::CQN_RCV, wanted.recv_cq),
                (qpc::DBR_UMEM_VALID, 1),
                (qpc::DBR_UMEM_ID, umems[1].id.into()),
            ],
        )?;
        set_all(
            &mut input,
            &[
                (cmd::OPCODE, Op::CreateQp.code().into()),
                (cmd::WQ_UMEM_VALID, 1),
                (cmd::WQ_UMEM_ID, umems[0].id.into()),
            ],
        )?;
        let mut output = [0; prm::create_qp_out::LEN];
        self.device.exec(&input, &mut output)?;
        // CAST: a 24-bit field.
        Ok(QpNum::new(prm::get(&output, prm::create_qp_out::QPN) as u32))
    }

    fn destroy_qp(&self, call: &Call) -> Done {
        const HANDLE: u16 = 0;
        const RESP: u16 = 1;
        let is_kind = |object: &Object| matches!(object, Object::Qp(_));
        let Object::Qp(qp) = self.remove(call.number32(HANDLE)?, is_kind)? else { return Err(Errno::NOENT) };
        let told = qp.asynchronous.as_ref().map_or(0, |file| file.forget(qp.user_handle));
        call.set_output(RESP, told.as_bytes())
    }

    /// Destroys the queue pair on the device and gives its umems back.
    pub(super) fn end_qp(&self, qp: &Qp) -> Done {
        self.simple(Op::DestroyQp, qp.num)?;
        self.device.forget_qp(qp.num);
        self.drop_umems(&qp.umems);
        Ok(())
    }

    /// A command that names a queue pair and nothing else.
    fn simple(&self, op: Op, num: QpNum) -> Done {
        let mut input = [0; prm::qp_2rst_in::LEN];
        prm::set(&mut input, prm::qp_2rst_in::OPCODE, op.code().into());
        prm::set(&mut input, prm::qp_2rst_in::QPN, num.into());
        Ok(self.device.exec(&input, &mut [0; 16])?)
    }

    pub(super) fn modify_qp(&self, call: &Call) -> Done {
        let attr: ModifyQp = call.input_as(CORE_IN)?;
        let (num, before) = self.with(attr.qp_handle, |object| match object {
            Object::Qp(qp) => Some((qp.num, qp.state)),
            _ => None,
        })?;
        let mask = attr.attr_mask;
        let before = if mask & given::CUR_STATE != 0 { attr.cur_qp_state } else { before };
        let after = if mask & given::STATE != 0 { attr.qp_state } else { before };
        self.step(num, before, after, &attr)?;
        self.with(attr.qp_handle, |object| match object {
            Object::Qp(qp) => {
                qp.state = after;
                if mask & given::PATH != 0 {
                    qp.dest = attr.dest;
                }
                Some(())
            }
            _ => None,
        })
    }

    /// The mailbox of one step.
    fn step(&self, num: QpNum, before: u8, after: u8, attr: &ModifyQp) -> Done {
        let has = attr.attr_mask & !given::STATE;
        let legal = |needs: u32, may: u32| match has & needs == needs && has & !(needs | may) == 0 {
            true => Ok(()),
            false => Err(Errno::INVAL),
        };
        let op = match (before, after) {
            (_, state::RESET) => return self.simple(Op::ToRstQp, num),
            (_, state::ERR) => return self.simple(Op::ToErrQp, num),
            (state::RESET, state::INIT) => legal(INIT_NEEDS, 0).map(|()| Op::Rst2InitQp),
            (state::INIT, state::INIT) => legal(0, INIT_NEEDS).map(|()| Op::Init2InitQp),
            (state::INIT, state::RTR) => legal(RTR_NEEDS, RTR_MAY).map(|()| Op::Init2RtrQp),
            (state::RTR, state::RTS) => legal(RTS_NEEDS, RTS_MAY).map(|()| Op::Rtr2RtsQp),
            (state::RTS, state::RTS) => legal(0, RTS_MAY).map(|()| Op::Rts2RtsQp),
            (state::SQD | state::SQE, _) | (_, state::SQD | state::SQE) => Err(Errno::NOTSUPP),
            _ => Err(Errno::INVAL),
        }?;
        let mut input = [0; prm::rst2init_qp_in::LEN];
        let mut opt = 0;
        if has & given::ACCESS != 0 && op != Op::Rst2InitQp {
            opt |= optional::ACCESS;
        }
        if has & given::MIN_RNR_TIMER != 0 && op != Op::Init2RtrQp {
            opt |= optional::RNR_TIMEOUT;
        }
        set_all(
            &mut input,
            &[
                (prm::rst2init_qp_in::OPCODE, op.code().into()),
                (prm::rst2init_qp_in::QPN, num.into()),
                (prm::rst2init_qp_in::OPT_PARAM_MASK, opt.into()),
            ],
        )?;
        self.fill_context(prm::part_mut(&mut input, prm::rst2init_qp_in::QPC), attr)?;
        Ok(self.device.exec(&input, &mut [0; 16])?)
    }

    /// Puts the given attributes where a queue pair's context has them.
    fn fill_context(&self, context: &mut [u8], attr: &ModifyQp) -> Done {
        use prm::{ads, qpc};
        let path = |field: Field| field.within(qpc::PRIMARY_ADDRESS_PATH);
        let right = |flag: u32| u64::from(attr.qp_access_flags & flag != 0);
        let log = |count: u8| u64::from(count.max(1).ilog2());
        // The port stands in every context, as the kernel driver puts it there.
        let port = self.device.port().port_num;
        set_all(
            context,
            &[
                (qpc::PM_STATE, PM_MIGRATED),
                (
                    path(ads::VHCA_PORT_NUM),
                    if attr.attr_mask & given::PORT != 0 { attr.port_num } else { port }.into(),
                ),
            ],
        )?;
        let sets: [(u32, &[(Field, u64)]); 11] = [
            (
                given::ACCESS,
                &[(qpc::RWE, right(2)), (qpc::RRE, right(4)), (qpc::RAE, right(8)), (qpc::ATOMIC_MODE, 3)],
            ),
            (given::PKEY_INDEX, &[(path(ads::PKEY_INDEX), attr.pkey_index.into())]),
            (
                given::PATH_MTU,
                &[(qpc::MTU, attr.path_mtu.into()), (qpc::LOG_MSG_MAX, self.hca().caps().log_max_msg.into())],
            ),
            (given::DEST_QPN, &[(qpc::REMOTE_QPN, attr.dest_qp_num.into())]),
            (given::RQ_PSN, &[(qpc::NEXT_RCV_PSN, (attr.rq_psn & 0xff_ffff).into())]),
            (given::MAX_DEST_RD_ATOMIC, &[(qpc::LOG_RRA_MAX, log(attr.max_dest_rd_atomic))]),
            (given::MIN_RNR_TIMER, &[(qpc::MIN_RNR_NAK, attr.min_rnr_timer.into())]),
            (given::TIMEOUT, &[(path(ads::ACK_TIMEOUT), attr.timeout.into())]),
            (given::RETRY_COUNT, &[(qpc::RETRY_COUNT, attr.retry_cnt.into())]),
            (given::RNR_RETRY, &[(qpc::RNR_RETRY, attr.rnr_retry.into())]),
            (
                given::SQ_PSN | given::MAX_RD_ATOMIC,
                &[
                    (qpc::NEXT_SEND_PSN, (attr.sq_psn & 0xff_ffff).into()),
                    (qpc::LOG_SRA_MAX, log(attr.max_rd_atomic)),
                ],
            ),
        ];
        for (bits, fields) in sets {
            if attr.attr_mask & bits != 0 {
                set_all(context, fields)?;
            }
        }
        if attr.attr_mask & given::PATH != 0 {
            self.fill_path(prm::part_mut(context, qpc::PRIMARY_ADDRESS_PATH), &attr.dest)?;
        }
        Ok(())
    }

    /// The way to the remote port; on Ethernet the kernel finds its address.
    fn fill_path(&self, path: &mut [u8], dest: &QpDest) -> Done {
        use prm::ads;
        match self.device.port().link {
            LinkLayer::Ib => {
                set_all(path, &[(ads::RLID, dest.dlid.into()), (ads::SL, (dest.sl & 15).into())])
            }
            LinkLayer::Roce => {
                if dest.is_global == 0 {
                    return Err(Errno::INVAL);
                }
                let mac = world::existing().and_then(|world| world.mac_of(Gid(dest.dgid)));
                let (high, low) = mac.ok_or(Errno(libc::EHOSTUNREACH))?.split();
                prm::set_bytes(path, ads::RGID_RIP, &dest.dgid);
                set_all(
                    path,
                    &[
                        (ads::RMAC_47_32, high.into()),
                        (ads::RMAC_31_0, low.into()),
                        (ads::SRC_ADDR_INDEX, dest.sgid_index.into()),
                        // A hop limit of 0 means that the kernel chooses.
                        (ads::HOP_LIMIT, if dest.hop_limit == 0 { 64 } else { dest.hop_limit }.into()),
                        (ads::TCLASS, dest.traffic_class.into()),
                        (ads::UDP_SPORT, 0xc000),
                        (ads::ETH_PRIO, (dest.sl & 7).into()),
                    ],
                )
            }
        }
    }

    pub(super) fn query_qp(&self, call: &Call) -> Done {
        use prm::{ads, qpc, query_qp_in as cmd, query_qp_out as reply};
        let wanted: QueryQp = call.input_as(CORE_IN)?;
        let (num, cap, sq_sig_all, dest) = self.with(wanted.qp_handle, |object| match object {
            Object::Qp(qp) => Some((qp.num, qp.cap, qp.sq_sig_all, qp.dest)),
            _ => None,
        })?;
        let mut input = [0; cmd::LEN];
        prm::set(&mut input, cmd::OPCODE, Op::QueryQp.code().into());
        prm::set(&mut input, cmd::QPN, num.into());
        let mut output = [0; reply::LEN];
        self.device.exec(&input, &mut output)?;
        let context = prm::part(&output, reply::QPC);
        let get = |field| prm::get(context, field);
        // CAST: fields of at most 8 bits.
        let get8 = |field| get(field) as u8;
        let right = |field, flag: u32| if get(field) == 1 { flag } else { 0 };
        let state = verbs_state(get8(qpc::STATE));
        let mut attr: QpAttr = zerocopy::FromZeros::new_zeroed();
        attr.dest = dest;
        (attr.max_send_wr, attr.max_recv_wr) = (cap.max_send_wr, cap.max_recv_wr);
        (attr.max_send_sge, attr.max_recv_sge) = (cap.max_send_sge, cap.max_recv_sge);
        attr.max_inline_data = cap.max_inline_data;
        // CAST: fields of 24 bits.
        (attr.rq_psn, attr.sq_psn) = (get(qpc::NEXT_RCV_PSN) as u32, get(qpc::NEXT_SEND_PSN) as u32);
        attr.dest_qp_num = get(qpc::REMOTE_QPN) as u32;
        attr.qp_access_flags = right(qpc::RWE, 2) | right(qpc::RRE, 4) | right(qpc::RAE, 8);
        (attr.qp_state, attr.cur_qp_state) = (state, state);
        attr.path_mtu = get8(qpc::MTU);
        (attr.max_rd_atomic, attr.max_dest_rd_atomic) =
            (1 << get8(qpc::LOG_SRA_MAX), 1 << get8(qpc::LOG_RRA_MAX));
        attr.min_rnr_timer = get8(qpc::MIN_RNR_NAK);
        attr.port_num = self.device.port().port_num;
        attr.timeout = get8(ads::ACK_TIMEOUT.within(qpc::PRIMARY_ADDRESS_PATH));
        (attr.retry_cnt, attr.rnr_retry) = (get8(qpc::RETRY_COUNT), get8(qpc::RNR_RETRY));
        attr.sq_sig_all = sq_sig_all.into();
        call.set_output(CORE_OUT, attr.as_bytes())
    }
}

/// The verbs' number of a state of `qpc`.
const fn verbs_state(code: u8) -> u8 {
    match code {
        1 => state::INIT,
        2 => state::RTR,
        3 => state::RTS,
        4 => state::SQE,
        5 | 7 => state::SQD,
        6 => state::ERR,
        _ => state::RESET,
    }
}

/// Sets fields to values that a program chose; one that does not fit is refused.
fn set_all(bytes: &mut [u8], fields: &[(Field, u64)]) -> Done {
    for (field, value) in fields {
        if *value > field.value_max() {
            return Err(Errno::INVAL);
        }
        prm::set(bytes, *field, *value);
    }
    Ok(())
}
