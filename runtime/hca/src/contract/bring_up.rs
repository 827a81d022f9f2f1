//! Objects and states: what may be made, changed and destroyed, and what may not.

use ibex_abi::prm::{self, Op, Status};
use ibex_abi::types::{Gid, Lid, Mac, QpState, QpTransition};

use super::{End, PATIENCE_NS, Rig, SIGNALED, World, connected, inline, write};
use crate::host_qp::{ConnectSpec, HostQp, HostQpSpec, Reset};
use crate::objects::{self, CqSpec, InitSpec, Place, QpSpec, RtrSpec, RtsSpec};
use crate::{Access, CommandError, HcaError, LinkLayer, PortAddress};

fn status(error: HcaError) -> Status {
    match error {
        HcaError::Command(error) => error.status,
        other => panic!("the device should have refused: {other}"),
    }
}

pub(super) fn a_pair_comes_up_and_goes_down_without_trace(world: &mut dyn World) {
    for _ in 0..3 {
        let [mut near, far] = connected(world, Rig::default());
        assert_eq!(near.hca.port().link, near.hca.caps().link);
        near.qp().post(SIGNALED, write(far.remote(0), inline(&[7; 8]))).expect("room");
        world.settle(PATIENCE_NS);
        near.good();
        for end in [near, far] {
            let (hca, pd) = (end.hca.clone(), end.pd);
            let live = end.region.storage_report().live_bytes;
            assert_ne!(live, 0);
            drop(end);
            hca.dealloc_pd(pd).expect("nothing is left that uses the protection domain");
        }
    }
}

/// Every command that moves a queue pair, against every state that commands lead to.
pub(super) fn illegal_transitions_are_refused_and_change_nothing(world: &mut dyn World) {
    let end = End::new(world.hca(0), Access::ALL);
    for from in [QpState::Reset, QpState::Init, QpState::Rtr, QpState::Rts, QpState::Err] {
        for command in QpTransition::ALL {
            let qp = end.create(HostQpSpec::default());
            drive_to(&end, &qp, from);
            let outcome = command_of(&end, &qp, command);
            let now = qp.query().expect("the queue pair exists").state;
            match from.after(command) {
                Ok(after) => {
                    outcome.unwrap_or_else(|error| panic!("{from} {command}: {error}"));
                    assert_eq!(now, after, "{from} {command}");
                }
                Err(_) => {
                    let Err(HcaError::Command(error)) = outcome else {
                        panic!("{from} {command} must be refused")
                    };
                    assert_eq!((error.status, error.qp_state), (Status::BadQpState, Some(from)));
                    assert_eq!(now, from, "a refused {command} changes nothing");
                }
            }
        }
    }
}

fn drive_to(end: &End, qp: &HostQp<Reset>, state: QpState) {
    let steps = [QpTransition::Rst2Init, QpTransition::Init2Rtr, QpTransition::Rtr2Rts];
    let count = match state {
        QpState::Init => 1,
        QpState::Rtr => 2,
        QpState::Rts => 3,
        _ => 0,
    };
    for command in steps.into_iter().take(count) {
        command_of(end, qp, command).expect("a legal transition");
    }
    if state == QpState::Err {
        command_of(end, qp, QpTransition::ToErr).expect("2ERR is legal");
    }
}

/// Sends the command, with parameters that are right whatever the state.
fn command_of(end: &End, qp: &HostQp<Reset>, command: QpTransition) -> Result<(), HcaError> {
    let (hca, qpn) = (&*end.hca, qp.qpn());
    let connect = ConnectSpec::default();
    match command {
        QpTransition::Rst2Init => {
            objects::rst2init(hca, &InitSpec { qpn, pkey_index: 0, port_num: 1, access: Access::ALL })
        }
        QpTransition::Init2Rtr => {
            let path = hca.resolve(&hca.port().address())?;
            let (rq_psn, mtu) = (connect.psn, path.mtu);
            let (min_rnr_nak, log_rra_max) = (connect.min_rnr_nak, connect.log_reads);
            let rtr = RtrSpec { qpn, remote_qpn: qpn, rq_psn, path, mtu, min_rnr_nak, log_rra_max };
            objects::init2rtr(hca, &rtr)
        }
        QpTransition::Rtr2Rts => objects::rtr2rts(
            hca,
            &RtsSpec {
                qpn,
                sq_psn: connect.psn,
                ack_timeout: connect.ack_timeout,
                retry_count: connect.retry_count,
                rnr_retry: connect.rnr_retry,
                log_sra_max: connect.log_reads,
            },
        ),
        other => {
            let op = Op::of_transition(other);
            let mut input = [0; prm::rst2init_qp_in::LEN];
            prm::set(&mut input, prm::rst2init_qp_in::OPCODE, op.code().into());
            prm::set(&mut input, prm::rst2init_qp_in::QPN, qpn.into());
            Ok(hca.exec(&input, &mut [0; 16])?)
        }
    }
}

pub(super) fn malformed_commands_are_refused_with_the_right_status(world: &mut dyn World) {
    let hca = world.hca(0);
    let refused = |input: &[u8], output: &mut [u8]| -> CommandError {
        hca.exec(input, output).expect_err("a malformed command")
    };
    let mut command = [0; 272];
    let mut reply = [0xa5; 16];
    let unknown = refused(&[0x7f, 0xff, 0, 0], &mut reply);
    assert_eq!((unknown.status, unknown.opcode, unknown.op()), (Status::BadOp, 0x7fff, None));
    assert_eq!(prm::status_of(&reply), Ok((Status::BadOp, unknown.syndrome)));
    assert_eq!(refused(&[], &mut []).status, Status::BadOp);
    for op in [Op::CreateQp, Op::CreateCq, Op::CreateMkey, Op::Rst2InitQp, Op::QueryQp] {
        prm::set(&mut command, prm::cmd_in::OPCODE, op.code().into());
        let short = &command[..op.input_len_min() - 1];
        assert_eq!(refused(short, &mut [0; 272]).status, Status::BadInpLen, "{op}");
        let room = op.output_len_min() - 1;
        assert_eq!(refused(&command, &mut vec![0; room]).status, Status::BadOutpLen, "{op}");
    }
    // Objects that do not exist.
    for op in [
        Op::DeallocPd,
        Op::DestroyMkey,
        Op::DestroyUmem,
        Op::DeallocUar,
        Op::DestroyCq,
        Op::DestroyQp,
        Op::ToErrQp,
        Op::ToRstQp,
        Op::QueryQp,
    ] {
        let mut input = [0; 16];
        prm::set(&mut input, prm::cmd_in::OPCODE, op.code().into());
        prm::set(&mut input, prm::qp_2err_in::QPN, 0xab_cdef);
        assert_eq!(refused(&input, &mut [0; 272]).status, Status::BadRes, "{op}");
    }
}

/// A valid specification of a completion queue and of a queue pair, to be spoilt by a test.
fn valid_specs(end: &End, qp: &HostQp<Reset>) -> (CqSpec, QpSpec) {
    let page = end.hca.alloc_doorbell().expect("a doorbell page");
    let place = |offset| Place { umem: end.region.umem(), offset };
    let cq = CqSpec {
        eqn: end.hca.eqn(0).expect("an event queue"),
        log_size: 4,
        ring: place(0),
        record: place(4096),
        uar: page.uar,
        collapsed: false,
        overrun_ignore: true,
    };
    let cqn = qp.send_cq().num();
    let qp = QpSpec {
        pd: end.pd,
        log_sq_size: 4,
        recv: None,
        rings: place(0),
        record: place(4096),
        uar: page.uar,
        send_cq: cqn,
        recv_cq: cqn,
        user_index: 0,
    };
    (cq, qp)
}

pub(super) fn queues_must_lie_inside_their_umem(world: &mut dyn World) {
    let end = End::new(world.hca(0), Access::ALL);
    let hca = &*end.hca;
    let holder = end.create(HostQpSpec::default());
    let (cq, qp) = valid_specs(&end, &holder);
    let len = 4 << 20;
    let at = |offset| Place { offset, ..cq.ring };
    objects::destroy_cq(hca, objects::create_cq(hca, &cq).expect("valid")).expect("unused");
    objects::destroy_qp(hca, objects::create_qp(hca, &qp).expect("valid")).expect("exists");
    let no_umem = Place { umem: ibex_abi::types::UmemId(0xffff), offset: 0 };
    for (spec, expected) in [
        (CqSpec { ring: at(len - 64 * 15), ..cq }, Status::BadParam),
        (CqSpec { ring: at(len), ..cq }, Status::BadParam),
        (CqSpec { ring: at(u64::MAX - 63), ..cq }, Status::BadParam),
        (CqSpec { ring: at(32), ..cq }, Status::BadParam),
        (CqSpec { record: at(len - 4), ..cq }, Status::BadParam),
        (CqSpec { record: at(4), ..cq }, Status::BadParam),
        (CqSpec { log_size: 30, ..cq }, Status::BadParam),
        (CqSpec { ring: no_umem, ..cq }, Status::BadRes),
        (CqSpec { uar: ibex_abi::types::UarIdx::new(0xffff), ..cq }, Status::BadRes),
        (CqSpec { eqn: ibex_abi::types::Eqn::new(0xff), ..cq }, Status::BadRes),
    ] {
        assert_eq!(status(objects::create_cq(hca, &spec).expect_err("bad")), expected, "{spec:?}");
    }
    let no_cq = ibex_abi::types::CqNum::new(0xffff);
    for (spec, expected) in [
        (QpSpec { rings: at(len - 64 * 15), ..qp }, Status::BadParam),
        (QpSpec { rings: at(16), ..qp }, Status::BadParam),
        (QpSpec { record: at(len), ..qp }, Status::BadParam),
        (QpSpec { pd: ibex_abi::types::Pd::new(0xffff), ..qp }, Status::BadRes),
        (QpSpec { send_cq: no_cq, ..qp }, Status::BadRes),
        (QpSpec { recv_cq: no_cq, ..qp }, Status::BadRes),
        (QpSpec { uar: ibex_abi::types::UarIdx::new(0xffff), ..qp }, Status::BadRes),
        (QpSpec { rings: no_umem, ..qp }, Status::BadRes),
    ] {
        assert_eq!(status(objects::create_qp(hca, &spec).expect_err("bad")), expected, "{spec:?}");
    }
    let too_wide = QpSpec { log_sq_size: 16, ..qp };
    let refused = objects::create_qp(hca, &too_wide);
    let (field, value, min, max) = ("log_sq_size", 16, 0, 15);
    assert_eq!(refused, Err(HcaError::OutOfRange { field, value, min, max }));
}

pub(super) fn objects_in_use_are_not_destroyed(world: &mut dyn World) {
    let end = End::new(world.hca(0), Access::ALL);
    let hca = &*end.hca;
    let busy = |result: Result<(), HcaError>| {
        assert_eq!(status(result.expect_err("in use")), Status::ResBusy);
    };
    let qp = end.create(HostQpSpec::default());
    let (cq, _) = valid_specs(&end, &qp);
    busy(hca.dealloc_pd(end.pd));
    busy(objects::destroy_cq(hca, qp.send_cq().num()));
    busy(hca.destroy_umem(crate::Umem { id: end.region.umem(), len: 4 << 20 }));
    drop(qp);
    let alone = objects::create_cq(hca, &cq).expect("valid");
    busy(hca.destroy_umem(crate::Umem { id: end.region.umem(), len: 4 << 20 }));
    objects::destroy_cq(hca, alone).expect("nobody uses it");
}

pub(super) fn unreachable_ports_are_not_resolved(world: &mut dyn World) {
    let hca = world.hca(0);
    let here = hca.port().address();
    let there = world.hca(1).port().address();
    hca.resolve(&there).expect("the other device is reachable");
    let link = match here.link {
        LinkLayer::Ib => LinkLayer::Roce,
        LinkLayer::Roce => LinkLayer::Ib,
    };
    let nowhere = PortAddress { lid: Lid(0xbeef), gid: Gid([0x5a; 16]), mac: Mac([2; 6]), ..here };
    let unreachable = [PortAddress { link, ..there }, nowhere];
    for remote in unreachable.into_iter().take(if world.knows_neighbours() { 2 } else { 1 }) {
        let error = hca.resolve(&remote).expect_err("unreachable");
        assert!(matches!(error, HcaError::Unreachable { .. }), "{error}");
    }
}
