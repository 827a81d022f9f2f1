//! `prm.txt`: the commands of a whole bring-up, read field by field.

use std::collections::BTreeSet;

use ibex_abi::prm::{self, Field, Layout, Op, cmd_in};
use ibex_abi::prm::{
    access_register_in, create_cq_in, create_mkey_in, create_qp_in, create_umem_in, rst2init_qp_in,
};
use ibex_abi::prm::{cqc, mkc, qpc, umem};
use ibex_abi::types::{MkeyIndex, QpState};

use super::text::{hex, lines, number, value};

/// One command as the file shows it.
struct Sent {
    line: usize,
    op: u64,
    op_mod: u64,
    input_len: usize,
    output_len: usize,
    /// At most the first 256 bytes of the input.
    bytes: Vec<u8>,
    /// What the device that answered read out of it.
    remarks: Vec<String>,
}

fn read() -> Vec<Sent> {
    let mut all: Vec<Sent> = Vec::new();
    for (line, text) in lines("prm.txt") {
        if let Some(header) = text.strip_prefix("PRM ") {
            all.push(Sent {
                line,
                op: value(header, "op"),
                op_mod: value(header, "op_mod"),
                input_len: value(header, "ilen") as usize,
                output_len: value(header, "olen") as usize,
                bytes: Vec::new(),
                remarks: Vec::new(),
            });
            continue;
        }
        let sent = all.last_mut().unwrap();
        let text = text.trim();
        match text.split_once(": ") {
            Some((offset, bytes)) => {
                assert_eq!(usize::from_str_radix(offset, 16), Ok(sent.bytes.len()), "line {line}");
                sent.bytes.extend(hex(bytes));
            }
            None if text == "in" => {}
            None => sent.remarks.push(text.to_owned()),
        }
    }
    for sent in &all {
        assert_eq!(sent.bytes.len(), sent.input_len.min(256), "line {}", sent.line);
    }
    all
}

fn layout(name: &str) -> &'static Layout {
    let found = prm::all_layouts().find(|layout| layout.name == name);
    found.unwrap_or_else(|| panic!("no layout {name}"))
}

/// The layout of a command's input.
fn input_layout(op: Op) -> &'static Layout {
    layout(&match op {
        Op::ToErrQp => "qp_2err_in".to_owned(),
        Op::ToRstQp => "qp_2rst_in".to_owned(),
        Op::SqdRtsQp => "sqd2rts_qp_in".to_owned(),
        Op::AccessReg => "access_register_in".to_owned(),
        Op::AllocPd | Op::AllocUar => format!("{}_in", op.name().to_lowercase()),
        other => format!("{}_in", other.name().to_lowercase()),
    })
}

/// The layout that a field nests, if it nests one.
fn nested(outer: &str, field: &str, input: &[u8]) -> Option<&'static Layout> {
    let register = || prm::get(input, access_register_in::REGISTER_ID);
    let name = match (outer, field) {
        ("create_umem_in", "UMEM") => "umem",
        ("umem", "MTT") => "mtt",
        ("create_mkey_in", "MEMORY_KEY_MKEY_ENTRY") => "mkc",
        ("create_cq_in", "CQ_CONTEXT") => "cqc",
        ("create_eq_in", "EQ_CONTEXT_ENTRY") => "eqc",
        (_, "QPC") => "qpc",
        ("qpc", "PRIMARY_ADDRESS_PATH" | "SECONDARY_ADDRESS_PATH") => "ads",
        ("set_hca_cap_in", "CAPABILITY") => "cmd_hca_cap",
        ("access_register_in", "REGISTER_DATA") if register() == 0x5006 => "paos_reg",
        ("mad_ifc_in", "MAD") => "mad",
        _ => return None,
    };
    Some(layout(name))
}

/// Fields that are the first element of a list, which goes on to the end of the mailbox.
const LISTS: [&str; 5] = ["pas", "klm_pas_mtt", "mtt", "event_bitmask", "register_data"];

/// Reads each named field out of one buffer and writes it into another, nested ones included.
struct Walk<'a> {
    input: &'a [u8],
    rebuilt: Vec<u8>,
    read: BTreeSet<(&'static str, &'static str)>,
}

impl Walk<'_> {
    fn layout(&mut self, layout: &'static Layout, base: u32) {
        for &(name, field) in layout.fields {
            let at = Field::new(base + field.bit_off(), field.width());
            if let Some(inner) = nested(layout.name, name, self.input) {
                self.layout(inner, at.bit_off());
                continue;
            }
            let is_list = LISTS.contains(&name.to_lowercase().as_str());
            let count = if is_list { u32::MAX } else { 1 };
            for idx in 0..count {
                if !self.copy(at.element(idx)) {
                    break;
                }
                self.read.insert((layout.name, name));
            }
        }
    }

    /// Copies a field; `false` if it lies beyond what the file shows.
    fn copy(&mut self, field: Field) -> bool {
        let shown = field.width() <= 64 && field.bytes().end <= self.input.len();
        if shown {
            prm::set(&mut self.rebuilt, field, prm::get(self.input, field));
        }
        shown
    }
}

#[test]
fn every_mailbox_is_explained_by_named_fields_to_its_last_bit() {
    let all = read();
    assert_eq!(all.len(), 52);
    for sent in &all {
        let op = Op::from_code(u16::try_from(sent.op).unwrap()).unwrap();
        assert_eq!(prm::op_of(&sent.bytes), Ok(op), "line {}", sent.line);
        assert_eq!(prm::get(&sent.bytes, cmd_in::OP_MOD), sent.op_mod, "line {}", sent.line);
        assert!(sent.input_len >= op.input_len_min(), "{op} at line {}", sent.line);
        assert!(sent.output_len >= op.output_len_min(), "{op} at line {}", sent.line);

        let rebuilt = vec![0; sent.bytes.len()];
        let mut walk = Walk { input: &sent.bytes, rebuilt, read: BTreeSet::new() };
        walk.layout(input_layout(op), 0);
        let differs = (0..sent.bytes.len()).find(|&at| walk.rebuilt[at] != sent.bytes[at]);
        if let Some(at) = differs {
            let byte = sent.bytes[at];
            panic!("{op} at line {}: no field explains byte {at:#x} = {byte:#04x}", sent.line);
        }
        assert!(walk.read.len() >= 2, "{op} at line {}", sent.line);
    }
}

/// The words of a remark that are `key=value` or `key value`, in order.
fn numbers_in(remark: &str) -> Vec<u64> {
    let words = remark.split([' ', '=']).filter(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    words.map(number).collect()
}

/// What our fields say about a mailbox, in the words of the remark below it.
fn reading(op: Op, input: &[u8], remark: &str) -> Vec<u64> {
    let at = |field: Field, outer: Field| prm::get(input, field.within(outer));
    // The first number is the object that the device made, or the one the command names.
    let object = numbers_in(remark)[0];
    match op {
        Op::CreateMkey => {
            let context = create_mkey_in::MEMORY_KEY_MKEY_ENTRY;
            let variant = at(mkc::MKEY_7_0, context);
            let index = MkeyIndex::of_key(u32::try_from(object).unwrap());
            let key = index.key(u8::try_from(variant).unwrap());
            let fields = [mkc::START_ADDR, mkc::REGION_LEN, mkc::LOG_PAGE_SIZE];
            [vec![u64::from(key)], fields.map(|field| at(field, context)).to_vec()].concat()
        }
        Op::CreateUmem => {
            let fields = [umem::LOG_PAGE_SIZE, umem::NUM_OF_MTT, umem::PAGE_OFFSET];
            [vec![object], fields.map(|field| at(field, create_umem_in::UMEM)).to_vec()].concat()
        }
        Op::CreateCq => {
            let fields = [cqc::LOG_CQ_SIZE, cqc::CC, cqc::CQE_SZ];
            let read = fields.map(|field| at(field, create_cq_in::CQ_CONTEXT));
            [vec![object], read.to_vec()].concat()
        }
        Op::CreateQp => {
            let context = create_qp_in::QPC;
            let stride = 16 << at(qpc::LOG_RQ_STRIDE, context);
            let (log_sq, log_rq) = (at(qpc::LOG_SQ_SIZE, context), at(qpc::LOG_RQ_SIZE, context));
            let cq = at(qpc::CQN_SND, context);
            assert_eq!(cq, at(qpc::CQN_RCV, context), "one completion queue for both");
            vec![object, log_sq, log_rq, stride, cq]
        }
        Op::Rst2InitQp | Op::Init2RtrQp | Op::Rtr2RtsQp => {
            let qpn = prm::get(input, rst2init_qp_in::QPN);
            let before = match op {
                Op::Rst2InitQp => QpState::Reset,
                Op::Init2RtrQp => QpState::Init,
                _ => QpState::Rtr,
            };
            let after = before.after(op.transition().unwrap()).unwrap();
            // Only INIT2RTR carries the remote end; the device keeps it from there.
            let remote = match op {
                Op::Init2RtrQp => at(qpc::REMOTE_QPN, rst2init_qp_in::QPC),
                _ => *numbers_in(remark).last().unwrap(),
            };
            vec![qpn, u64::from(after.code()), remote]
        }
        other => panic!("no reading for a remark on {other}: {remark:?}"),
    }
}

#[test]
fn our_fields_say_what_the_device_that_answered_read() {
    let mut checked = 0;
    for sent in read() {
        for remark in &sent.remarks {
            let op = prm::op_of(&sent.bytes).unwrap();
            assert_eq!(reading(op, &sent.bytes, remark), numbers_in(remark), "{remark}");
            checked += 1;
        }
    }
    assert_eq!(checked, 20);
}

#[test]
fn a_connected_queue_pair_says_what_libmlx5_was_asked_for() {
    let all = read();
    let find = |op: Op| all.iter().find(|sent| sent.op == u64::from(op.code())).unwrap();
    let context = |op: Op| prm::part(&find(op).bytes, Field::new(0xc0, 0x740));
    let init = context(Op::Rst2InitQp);
    let path = |qpc_bytes, field: Field| prm::get(qpc_bytes, field.within(qpc::PRIMARY_ADDRESS_PATH));
    assert_eq!((prm::get(init, qpc::RRE), prm::get(init, qpc::RWE)), (1, 1));
    assert_eq!(path(init, prm::ads::VHCA_PORT_NUM), 1);
    let rtr = context(Op::Init2RtrQp);
    assert_eq!((prm::get(rtr, qpc::MTU), prm::get(rtr, qpc::LOG_MSG_MAX)), (3, 20));
    assert_eq!((prm::get(rtr, qpc::MIN_RNR_NAK), prm::get(rtr, qpc::NEXT_RCV_PSN)), (12, 0x1c_5522));
    assert_eq!(path(rtr, prm::ads::RLID), 5);
    let rts = context(Op::Rtr2RtsQp);
    assert_eq!((prm::get(rts, qpc::RETRY_COUNT), prm::get(rts, qpc::RNR_RETRY)), (7, 7));
    assert_eq!((prm::get(rts, qpc::LOG_SRA_MAX), path(rts, prm::ads::ACK_TIMEOUT)), (4, 14));
    assert_eq!(prm::get(rts, qpc::NEXT_SEND_PSN), 0x82_9d34);
}
