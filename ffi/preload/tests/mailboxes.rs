//! The mailboxes that our driver sends, field by field beside those that rdma-core sends for the same object.
//!
//! rdma-core's own test of libmlx5's user-space driver runs under the shim, which records every mailbox. Of each that
//! makes, moves or ends a queue, the values are read, our builder is asked for the same object, and every field that
//! this workspace knows is compared. What may differ stands in [`differences`] with the reason.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]
#![expect(unsafe_code, reason = "implements a trait with methods whose callers vouch for memory")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use ibex_abi::prm::{self, Field, Op};
use ibex_abi::types::{CqNum, Eqn, Iova, Lid, PathMtu, Pd, Psn, QpNum, UarIdx, UmemId};
use ibex_hca::objects::{self, CqSpec, EqSpec, InitSpec, Place, QpSpec, RecvSpec, RtrSpec, RtsSpec};
use ibex_hca::{
    Access, AsyncEvent, CommandError, DoorbellPage, Hca, HcaCaps, HcaError, MemoryRegion, Mkey, PathAddress,
    PortAddress, PortInfo, Umem,
};
use parking_lot::Mutex;

const PYTHON: &str = "/usr/bin/python3";
/// libmlx5 takes the whole function; the module's queues are those of its tests.
const MODULE: &str = "test_mlx5_vfio";

/// What is compared.
const OPS: [Op; 9] = [
    Op::CreateEq,
    Op::CreateCq,
    Op::CreateQp,
    Op::Rst2InitQp,
    Op::Init2RtrQp,
    Op::Rtr2RtsQp,
    Op::DestroyQp,
    Op::DestroyCq,
    Op::DestroyEq,
];

/// A driver's view of a device that keeps what it is sent and answers with zeros.
#[derive(Default)]
struct Recorder {
    sent: Mutex<Vec<Vec<u8>>>,
}

const NOTHING: HcaError = HcaError::Unreachable { reason: "this device only records" };

impl Hca for Recorder {
    fn caps(&self) -> &HcaCaps {
        unreachable!("builders of mailboxes do not ask for capabilities")
    }

    fn port(&self) -> PortInfo {
        unreachable!("builders of mailboxes do not ask for the port")
    }

    fn alloc_pd(&self) -> Result<Pd, HcaError> {
        Err(NOTHING)
    }

    fn dealloc_pd(&self, _: Pd) -> Result<(), HcaError> {
        Err(NOTHING)
    }

    unsafe fn register(&self, _: Pd, _: MemoryRegion, _: Iova, _: Access) -> Result<Mkey, HcaError> {
        Err(NOTHING)
    }

    fn deregister(&self, _: Mkey) -> Result<(), HcaError> {
        Err(NOTHING)
    }

    unsafe fn create_umem(&self, _: MemoryRegion) -> Result<Umem, HcaError> {
        Err(NOTHING)
    }

    fn destroy_umem(&self, _: Umem) -> Result<(), HcaError> {
        Err(NOTHING)
    }

    fn alloc_doorbell(&self) -> Result<DoorbellPage, HcaError> {
        Err(NOTHING)
    }

    fn free_doorbell(&self, _: DoorbellPage) -> Result<(), HcaError> {
        Err(NOTHING)
    }

    fn eqn(&self, _: u32) -> Result<Eqn, HcaError> {
        Err(NOTHING)
    }

    fn resolve(&self, _: &PortAddress) -> Result<ibex_hca::Path, HcaError> {
        Err(NOTHING)
    }

    fn exec(&self, input: &[u8], output: &mut [u8]) -> Result<(), CommandError> {
        self.sent.lock().push(input.to_vec());
        output.fill(0);
        Ok(())
    }

    fn poll_async_event(&self) -> Option<AsyncEvent> {
        None
    }
}

/// Fields of one mailbox, read by place.
struct Theirs<'a>(&'a [u8]);

impl Theirs<'_> {
    fn get(&self, field: Field) -> u64 {
        prm::get(self.0, field)
    }

    fn get32(&self, field: Field) -> u32 {
        u32::try_from(self.get(field)).unwrap()
    }

    fn get8(&self, field: Field) -> u8 {
        u8::try_from(self.get(field)).unwrap()
    }

    fn place(&self, umem: Field, offset: Field) -> Place {
        Place { umem: UmemId(self.get32(umem)), offset: self.get(offset) }
    }
}

/// Our mailbox for the object that theirs is about; none for commands that our driver has no builder of.
fn ours(op: Op, theirs: &[u8]) -> Option<Vec<u8>> {
    let (recorder, they) = (Recorder::default(), Theirs(theirs));
    let qpn = || QpNum::new(they.get32(prm::destroy_qp_in::QPN));
    match op {
        Op::CreateEq => drop(objects::create_eq(&recorder, &eq_spec(&they)).unwrap()),
        Op::CreateCq => drop(objects::create_cq(&recorder, &cq_spec(&they)).unwrap()),
        Op::CreateQp => drop(objects::create_qp(&recorder, &qp_spec(&they)).unwrap()),
        Op::Rst2InitQp => objects::rst2init(&recorder, &init_spec(&they)).unwrap(),
        Op::Init2RtrQp => objects::init2rtr(&recorder, &rtr_spec(&they)).unwrap(),
        Op::Rtr2RtsQp => objects::rtr2rts(&recorder, &rts_spec(&they)).unwrap(),
        Op::DestroyQp => objects::destroy_qp(&recorder, qpn()).unwrap(),
        Op::DestroyCq => {
            let cqn = CqNum::new(they.get32(prm::destroy_cq_in::CQN));
            objects::destroy_cq(&recorder, cqn).unwrap();
        }
        Op::DestroyEq => {
            let eqn = Eqn::new(they.get32(prm::destroy_eq_in::EQ_NUMBER));
            objects::destroy_eq(&recorder, eqn).unwrap();
        }
        _ => return None,
    }
    recorder.sent.into_inner().pop()
}

fn eq_spec(they: &Theirs<'_>) -> EqSpec {
    use prm::{create_eq_in as cmd, eqc};
    let context = |field: Field| field.within(cmd::EQ_CONTEXT_ENTRY);
    EqSpec {
        uar: UarIdx::new(they.get32(context(eqc::UAR_PAGE))),
        log_size: they.get8(context(eqc::LOG_EQ_SIZE)),
        addr: they.get(cmd::PAS),
        events: they.get(cmd::EVENT_BITMASK),
    }
}

fn cq_spec(they: &Theirs<'_>) -> CqSpec {
    use prm::{cqc, create_cq_in as cmd};
    let context = |field: Field| field.within(cmd::CQ_CONTEXT);
    CqSpec {
        eqn: Eqn::new(they.get32(context(cqc::C_EQN))),
        log_size: they.get8(context(cqc::LOG_CQ_SIZE)),
        ring: they.place(cmd::CQ_UMEM_ID, cmd::CQ_UMEM_OFFSET),
        record: they.place(context(cqc::DBR_UMEM_ID), context(cqc::DBR_ADDR)),
        uar: UarIdx::new(they.get32(context(cqc::UAR_PAGE))),
        collapsed: they.get(context(cqc::CC)) == 1,
        overrun_ignore: they.get(context(cqc::OI)) == 1,
    }
}

fn qp_spec(they: &Theirs<'_>) -> QpSpec {
    use prm::{create_qp_in as cmd, qpc};
    let context = |field: Field| field.within(cmd::QPC);
    QpSpec {
        pd: Pd::new(they.get32(context(qpc::PD))),
        log_sq_size: they.get8(context(qpc::LOG_SQ_SIZE)),
        recv: Some(RecvSpec {
            log_size: they.get8(context(qpc::LOG_RQ_SIZE)),
            log_segs: they.get8(context(qpc::LOG_RQ_STRIDE)),
        }),
        rings: they.place(cmd::WQ_UMEM_ID, cmd::WQ_UMEM_OFFSET),
        record: they.place(context(qpc::DBR_UMEM_ID), context(qpc::DBR_ADDR)),
        uar: UarIdx::new(they.get32(context(qpc::UAR_PAGE))),
        send_cq: CqNum::new(they.get32(context(qpc::CQN_SND))),
        recv_cq: CqNum::new(they.get32(context(qpc::CQN_RCV))),
        user_index: they.get32(context(qpc::USER_INDEX)),
    }
}

fn in_qpc(field: Field) -> Field {
    field.within(prm::rst2init_qp_in::QPC)
}

fn in_path(field: Field) -> Field {
    in_qpc(field.within(prm::qpc::PRIMARY_ADDRESS_PATH))
}

fn init_spec(they: &Theirs<'_>) -> InitSpec {
    use prm::{ads, qpc};
    let flag = |field| they.get(in_qpc(field)) == 1;
    InitSpec {
        qpn: QpNum::new(they.get32(prm::rst2init_qp_in::QPN)),
        pkey_index: u16::try_from(they.get(in_path(ads::PKEY_INDEX))).unwrap(),
        port_num: they.get8(in_path(ads::VHCA_PORT_NUM)),
        access: Access {
            local_write: true,
            remote_write: flag(qpc::RWE),
            remote_read: flag(qpc::RRE),
            remote_atomic: flag(qpc::RAE),
        },
    }
}

fn rtr_spec(they: &Theirs<'_>) -> RtrSpec {
    use prm::{ads, qpc};
    let mtu = PathMtu::from_code(they.get(in_qpc(qpc::MTU))).unwrap();
    let to = PathAddress::Ib { rlid: Lid(u16::try_from(they.get(in_path(ads::RLID))).unwrap()) };
    RtrSpec {
        qpn: QpNum::new(they.get32(prm::init2rtr_qp_in::QPN)),
        remote_qpn: QpNum::new(they.get32(in_qpc(qpc::REMOTE_QPN))),
        rq_psn: Psn::new(they.get32(in_qpc(qpc::NEXT_RCV_PSN))),
        path: ibex_hca::Path {
            port_num: they.get8(in_path(ads::VHCA_PORT_NUM)),
            sl: they.get8(in_path(ads::SL)),
            to,
            mtu,
        },
        mtu,
        min_rnr_nak: they.get8(in_qpc(qpc::MIN_RNR_NAK)),
        log_rra_max: they.get8(in_qpc(qpc::LOG_RRA_MAX)),
    }
}

fn rts_spec(they: &Theirs<'_>) -> RtsSpec {
    use prm::{ads, qpc};
    RtsSpec {
        qpn: QpNum::new(they.get32(prm::rtr2rts_qp_in::QPN)),
        sq_psn: Psn::new(they.get32(in_qpc(qpc::NEXT_SEND_PSN))),
        ack_timeout: they.get8(in_path(ads::ACK_TIMEOUT)),
        retry_count: they.get8(in_qpc(qpc::RETRY_COUNT)),
        rnr_retry: they.get8(in_qpc(qpc::RNR_RETRY)),
        log_sra_max: they.get8(in_qpc(qpc::LOG_SRA_MAX)),
    }
}

/// Fields in which both may differ, and why.
fn differences(op: Op) -> &'static [(&'static str, &'static str)] {
    match op {
        Op::CreateEq => &[
            ("eqc.LOG_PAGE_SIZE", "libmlx5 names one large page, we name pages of 4 KiB"),
            ("eqc.INTR", "libmlx5 has interrupts, our event queues are polled"),
        ],
        Op::CreateQp => &[("qpc.TS_FORMAT", "the test asks for a free-running time stamp, we read none")],
        Op::Rst2InitQp => &[
            ("qpc.PM_STATE", "the test leaves out that there is no path migration"),
            ("qpc.ATOMIC_MODE", "the test leaves atomics out"),
        ],
        Op::Init2RtrQp => &[
            ("qpc.PM_STATE", "as before"),
            ("qpc.LOG_MSG_MAX", "the test says 2^20 bytes, we say what the device can"),
        ],
        Op::Rtr2RtsQp => &[
            ("qpc.PM_STATE", "as before"),
            ("ads.VHCA_PORT_NUM", "the test repeats the port, which INIT fixed"),
        ],
        _ => &[],
    }
}

/// Every field of a command, with its name and its place, those of nested structures included.
fn fields_of(op: Op) -> Vec<(String, Field)> {
    let (name, nested): (&str, &[(&str, Field)]) = match op {
        Op::CreateEq => ("create_eq_in", &[("eqc", prm::create_eq_in::EQ_CONTEXT_ENTRY)]),
        Op::CreateCq => ("create_cq_in", &[("cqc", prm::create_cq_in::CQ_CONTEXT)]),
        Op::CreateQp => ("create_qp_in", &[("qpc", prm::create_qp_in::QPC)]),
        Op::Rst2InitQp | Op::Init2RtrQp | Op::Rtr2RtsQp => {
            ("rst2init_qp_in", &[("qpc", prm::rst2init_qp_in::QPC)])
        }
        Op::DestroyEq => ("destroy_eq_in", &[]),
        Op::DestroyCq => ("destroy_cq_in", &[]),
        _ => ("destroy_qp_in", &[]),
    };
    let layout = |name: &str| prm::all_layouts().find(|layout| layout.name == name).unwrap();
    let mut fields = Vec::new();
    let mut add = |name: &str, outer: u32| {
        for (field_name, field) in layout(name).fields {
            if field.width() <= 64 {
                let place = Field::new(outer + field.bit_off(), field.width());
                fields.push((format!("{name}.{field_name}"), place));
            }
        }
    };
    add(name, 0);
    for (name, outer) in nested {
        add(name, outer.bit_off());
        if *name == "qpc" {
            add("ads", outer.bit_off() + prm::qpc::PRIMARY_ADDRESS_PATH.bit_off());
        }
    }
    fields
}

/// The fields that differ: their names, and what both say.
fn differing(op: Op, theirs: &[u8], ours: &[u8]) -> Vec<(String, String)> {
    let both = |field| (prm::try_get(theirs, field), prm::try_get(ours, field));
    let differs = |(name, field): (String, Field)| {
        let (they, we) = both(field);
        let said = format!("{op}: {name} is {they:x?} with rdma-core and {we:x?} with us");
        (they != we).then_some((name, said))
    };
    fields_of(op).into_iter().filter_map(differs).collect()
}

/// Runs rdma-core's test and gives the mailboxes that it sent; none if something is missing.
fn record() -> Option<Vec<Vec<u8>>> {
    let kept = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let suite = kept.join("pyverbs");
    let has_pyverbs = Command::new(PYTHON).args(["-c", "import pyverbs.device, scapy"]).output();
    if !has_pyverbs.is_ok_and(|output| output.status.success()) || !suite.join("tests").exists() {
        let what =
            "python3-pyverbs, python3-scapy or rdma-core's tests are missing: see tests/preload/suite.sh";
        let _ = writeln!(std::io::stderr(), "SKIPPED: mailboxes: {what}");
        return None;
    }
    let (shim, file) = (shim(), kept.join(format!("mailboxes-{}", std::process::id())));
    let run = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/preload/run.py");
    let output = Command::new("timeout")
        .args(["300", PYTHON, run])
        .arg(suite)
        .args([MODULE, "--pci-dev", "1be8:00:00.0"])
        .envs([("IBEX_PRELOAD_LINK", "ib".as_ref()), ("IBEX_PRELOAD_MAILBOXES", file.as_os_str())])
        .env("IBEX_PRELOAD_DIR", kept)
        .env("LD_PRELOAD", shim)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert_eq!(text.matches("RESULT\tpassed").count(), 2, "{text}");
    let lines = std::fs::read_to_string(&file).unwrap();
    std::fs::remove_file(file).unwrap();
    Some(lines.lines().map(|line| unhex(line.split(' ').nth(2).unwrap())).collect())
}

fn shim() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("libibex_preload.so")
}

fn unhex(text: &str) -> Vec<u8> {
    let byte = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).unwrap();
    (0..text.len()).step_by(2).map(byte).collect()
}

#[test]
fn our_mailboxes_agree_with_rdma_cores_field_by_field() {
    let Some(mailboxes) = record() else { return };
    let (mut num, mut seen, mut wrong) = (0, Vec::new(), Vec::new());
    for theirs in mailboxes {
        let Ok(op) = prm::op_of(&theirs) else { continue };
        let Some(ours) = ours(op, &theirs) else { continue };
        num += 1;
        seen.push((op, String::new()));
        for (name, said) in differing(op, &theirs, &ours) {
            if !differences(op).iter().any(|(excused, _)| *excused == name) {
                wrong.push(said);
            }
            seen.push((op, name));
        }
    }
    for op in OPS {
        assert!(seen.contains(&(op, String::new())), "{op} was not sent");
        for (name, why) in differences(op) {
            if !seen.contains(&(op, (*name).into())) {
                wrong.push(format!("{op}: {name} does not differ; it was excused because {why}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let _ = writeln!(std::io::stderr(), "mailboxes: {num} of rdma-core's compared with ours, field by field");
}

#[test]
fn a_field_that_differs_is_found() {
    let mut theirs = vec![0; prm::create_cq_in::LEN];
    prm::set(&mut theirs, prm::create_cq_in::OPCODE, Op::CreateCq.code().into());
    let mut ours = theirs.clone();
    let place = prm::cqc::LOG_CQ_SIZE.within(prm::create_cq_in::CQ_CONTEXT);
    prm::set(&mut ours, place, 3);
    let names: Vec<_> = differing(Op::CreateCq, &theirs, &ours).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["cqc.LOG_CQ_SIZE"]);
}
