//! Bringing a function up as libmlx5's user-space driver does, and the registers of its port.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

use std::sync::Arc;

use ibex_abi::eqe::{Event, EventType, PortChange};
use ibex_abi::prm::{self, Op, Status};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::host_eq::HostEq;
use ibex_hca::{Hca, LinkLayer};

fn device() -> Arc<EmulatedHca> {
    let config = EmulatedConfig { link: LinkLayer::Ib, ..EmulatedConfig::default() };
    EmulatedHca::new(Fabric::inproc(FabricConfig::default()), config).unwrap()
}

/// A command of `len` bytes with these fields; its reply.
fn run(
    hca: &dyn Hca,
    op: Op,
    len: usize,
    fields: &[(prm::Field, u64)],
    reply: usize,
) -> Result<Vec<u8>, Status> {
    let (mut input, mut output) = (vec![0; len], vec![0; reply]);
    prm::set(&mut input, prm::cmd_in::OPCODE, op.code().into());
    for (field, value) in fields {
        prm::set(&mut input, *field, *value);
    }
    hca.exec(&input, &mut output).map_err(|error| error.status)?;
    Ok(output)
}

/// A PAOS register behind the header of ACCESS_REG.
fn paos(field: prm::Field) -> prm::Field {
    let start = prm::access_register_in::REGISTER_DATA.bit_off();
    prm::Field::new(start + field.bit_off(), field.width())
}

#[test]
fn a_driver_that_brings_the_function_up_in_order_is_answered() {
    let device = device();
    let hca = &*device;
    run(hca, Op::EnableHca, 16, &[], 12).unwrap();
    let issis = run(hca, Op::QueryIssi, 16, &[], prm::query_issi_out::LEN).unwrap();
    assert_eq!(prm::get(&issis, prm::query_issi_out::SUPPORTED_ISSI_DW0) & 2, 2);
    run(hca, Op::SetIssi, 16, &[(prm::set_issi_in::CURRENT_ISSI, 1)], 16).unwrap();
    for boot in [1, 2] {
        let mode = (prm::query_pages_in::OP_MOD, boot);
        let pages = run(hca, Op::QueryPages, 16, &[mode], 16).unwrap();
        assert_eq!(prm::get(&pages, prm::query_pages_out::NUM_PAGES), 0);
        run(hca, Op::ManagePages, 16, &[], 16).unwrap();
    }
    run(hca, Op::AccessReg, 32, &[(prm::access_register_in::REGISTER_ID, 0x7004)], 32).unwrap();
    run(hca, Op::SetHcaCap, prm::set_hca_cap_in::LEN, &[], 16).unwrap();
    run(hca, Op::InitHca, 16, &[], 16).unwrap();
    run(hca, Op::TeardownHca, 16, &[], 16).unwrap();
}

#[test]
fn what_a_function_has_not_is_refused() {
    let device = device();
    let refused = |op, len, fields: &[_], reply| run(&*device, op, len, fields, reply).unwrap_err();
    let issi = [(prm::set_issi_in::CURRENT_ISSI, 2)];
    assert_eq!(refused(Op::SetIssi, 16, &issi, 16), Status::BadParam);
    let pages = [(prm::manage_pages_in::INPUT_NUM_ENTRIES, 1)];
    assert_eq!(refused(Op::ManagePages, 24, &pages, 16), Status::BadParam);
    let register = [(prm::access_register_in::REGISTER_ID, 0x1234)];
    assert_eq!(refused(Op::AccessReg, 32, &register, 32), Status::BadParam);
    let port = [(prm::access_register_in::REGISTER_ID, 0x5006), (paos(prm::paos_reg::LOCAL_PORT), 1)];
    assert_eq!(refused(Op::AccessReg, 20, &port, 32), Status::BadInpLen);
    let down = [&port[..], &[(paos(prm::paos_reg::ASE), 1), (paos(prm::paos_reg::ADMIN_STATUS), 2)]].concat();
    assert_eq!(refused(Op::AccessReg, 32, &down, 32), Status::BadParam);
    assert_eq!(refused(Op::MadIfc, 272, &[], 272), Status::BadPkt);
}

#[test]
fn a_port_that_is_asked_to_go_up_says_so_to_the_event_queue_that_wants_to_know() {
    let device = device();
    let region = ControlRegion::host(&(Arc::clone(&device) as Arc<dyn Hca>), 1 << 16).unwrap();
    let mut wants = HostEq::create(&region, 4, &[EventType::PortChange]).unwrap();
    let mut other = HostEq::create(&region, 4, &[EventType::QpFatal]).unwrap();
    let register = (prm::access_register_in::REGISTER_ID, 0x5006);
    let port = (paos(prm::paos_reg::LOCAL_PORT), 1);
    let status = run(&*device, Op::AccessReg, 32, &[register, port], 32).unwrap();
    assert_eq!(wants.poll(), Ok(None), "reading changes nothing");
    assert_eq!(device.events_written(wants.eqn()), Some(0));
    assert_eq!(prm::get(&status, paos(prm::paos_reg::OPER_STATUS)), 1);
    let up = [register, port, (paos(prm::paos_reg::ASE), 1), (paos(prm::paos_reg::ADMIN_STATUS), 1)];
    run(&*device, Op::AccessReg, 32, &up, 32).unwrap();
    assert_eq!(wants.poll(), Ok(Some(Event::PortChange { port: 1, change: PortChange::Active })));
    assert_eq!(other.poll(), Ok(None));
    assert_eq!([wants.eqn(), other.eqn()].map(|eqn| device.events_written(eqn)), [Some(1), Some(0)]);
    device.tell_commands_done(1);
    assert_eq!((wants.poll(), other.poll()), (Ok(None), Ok(None)), "neither asked for that");
}

#[test]
fn port_info_and_port_context_agree_with_the_port() {
    let device = device();
    let start = prm::mad_ifc_in::MAD.bit_off();
    let in_mad = |field: prm::Field| prm::Field::new(start + field.bit_off(), field.width());
    let get = [(in_mad(prm::mad::METHOD), 1), (in_mad(prm::mad::ATTRIBUTE_ID), 0x15)];
    let answer = run(&*device, Op::MadIfc, 272, &get, 272).unwrap();
    let info = &answer[16 + 64..];
    assert_eq!(info[32] & 0xf, 4, "active");
    assert_eq!(info[16..18], device.port().lid.0.to_be_bytes());
    assert_eq!(prm::get(&answer, in_mad(prm::mad::METHOD)), 0x81);
    let reply = prm::query_hca_vport_context_out::LEN;
    let answer = run(&*device, Op::QueryHcaVportContext, 16, &[], reply).unwrap();
    let context = prm::part(&answer, prm::query_hca_vport_context_out::HCA_VPORT_CONTEXT);
    let lid = u64::from(device.port().lid.0);
    assert_eq!(prm::get(context, prm::hca_vport_context::LID), lid);
    assert_eq!(prm::get(context, prm::hca_vport_context::PORT_STATE), 4);
}
