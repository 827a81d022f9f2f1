//! What tshark reads in a capture, beside what we read in it.

use std::path::Path;
use std::process::Command;

use ibex_roce::wire::{
    Aeth, AtomicAckEth, AtomicEth, Extension, Frame, ICRC_LEN, Ips, Packet, Reth, WireError,
};

/// A frame as `ibex_roce` understands it.
pub(crate) struct Decoded {
    frame: Frame,
    packet: Vec<u8>,
    icrc: [u8; ICRC_LEN],
}

impl Decoded {
    /// Takes a whole frame apart; its invariant CRC must be right.
    pub(crate) fn new(bytes: &[u8]) -> Result<Self, WireError> {
        let (frame, datagram) = Frame::parse_ethernet(bytes)?;
        let packet = frame.flow.open(datagram)?;
        Packet::parse(packet)?;
        let icrc = *datagram.last_chunk().expect("it was opened");
        Ok(Self { frame, packet: packet.to_vec(), icrc })
    }

    pub(crate) fn packet(&self) -> Packet<'_> {
        Packet::parse(&self.packet).expect("it was parsed before")
    }

    pub(crate) fn is_v4(&self) -> bool {
        matches!(self.frame.flow.ips, Ips::V4 { .. })
    }

    fn reth(&self) -> Option<Reth> {
        match self.packet().headers.ext {
            Extension::Reth(reth) | Extension::RethImm(reth, _) => Some(reth),
            _ => None,
        }
    }

    fn aeth(&self) -> Option<Aeth> {
        match self.packet().headers.ext {
            Extension::Aeth(aeth) | Extension::AtomicAck(aeth, _) => Some(aeth),
            _ => None,
        }
    }

    fn atomic(&self) -> Option<AtomicEth> {
        match self.packet().headers.ext {
            Extension::Atomic(atomic) => Some(atomic),
            _ => None,
        }
    }

    fn atomic_ack(&self) -> Option<AtomicAckEth> {
        match self.packet().headers.ext {
            Extension::AtomicAck(_, ack) => Some(ack),
            _ => None,
        }
    }

    /// Address and key: tshark shows those of atomics under the same names.
    fn remote(&self) -> Option<ibex_roce::RemoteAddr> {
        self.reth().map(|reth| reth.0.addr).or(self.atomic().map(|atomic| atomic.on))
    }

    fn id(&self) -> Option<u16> {
        match self.frame.flow.ips {
            Ips::V4 { id, .. } => Some(id),
            Ips::V6 { .. } => None,
        }
    }

    fn dont_fragment(&self) -> Option<bool> {
        match self.frame.flow.ips {
            Ips::V4 { dont_fragment, .. } => Some(dont_fragment),
            Ips::V6 { .. } => None,
        }
    }

    fn v4<T>(&self, value: T) -> Option<T> {
        self.is_v4().then_some(value)
    }

    fn v6<T>(&self, value: T) -> Option<T> {
        (!self.is_v4()).then_some(value)
    }

    fn class(&self) -> u64 {
        u64::from(self.frame.dscp) << 2 | self.frame.ecn as u64
    }

    fn udp_len(&self) -> u64 {
        (8 + self.packet.len() + ICRC_LEN) as u64
    }

    /// Everything after the headers, padding included.
    fn data(&self) -> Option<&[u8]> {
        let data = &self.packet[self.packet().headers.len()..];
        (!data.is_empty()).then_some(data)
    }
}

/// What a field holds.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Value {
    Number(u64),
    Text(String),
    Bytes(Vec<u8>),
}

/// A field of tshark's, and the same of ours; `None` where the frame has no such field.
type Column = (&'static str, fn(&Decoded) -> Option<Value>);

fn number(value: impl Into<u64>) -> Option<Value> {
    Some(Value::Number(value.into()))
}

fn text(value: &impl ToString) -> Value {
    Value::Text(value.to_string())
}

const COLUMNS: &[Column] = &[
    ("ip.src", |d| d.v4(text(&d.frame.flow.addrs().0))),
    ("ip.dst", |d| d.v4(text(&d.frame.flow.addrs().1))),
    ("ip.len", |d| d.v4(Value::Number(20 + d.udp_len()))),
    ("ip.id", |d| d.id().and_then(number)),
    ("ip.flags.df", |d| d.dont_fragment().and_then(number)),
    ("ip.dsfield", |d| d.v4(Value::Number(d.class()))),
    ("ip.ttl", |d| d.v4(Value::Number(d.frame.hop_limit.into()))),
    ("ipv6.src", |d| d.v6(text(&d.frame.flow.addrs().0))),
    ("ipv6.dst", |d| d.v6(text(&d.frame.flow.addrs().1))),
    ("ipv6.plen", |d| d.v6(Value::Number(d.udp_len()))),
    ("ipv6.tclass", |d| d.v6(Value::Number(d.class()))),
    ("ipv6.hlim", |d| d.v6(Value::Number(d.frame.hop_limit.into()))),
    ("udp.srcport", |d| number(d.frame.flow.src_port)),
    ("udp.dstport", |d| number(d.frame.flow.dst_port)),
    ("udp.length", |d| number(d.udp_len())),
    ("infiniband.bth.opcode", |d| number(d.packet().bth().opcode.byte())),
    ("infiniband.bth.se", |d| number(d.packet().bth().solicited)),
    ("infiniband.bth.m", |d| number(d.packet().bth().migrated)),
    ("infiniband.bth.padcnt", |d| number(d.packet().bth().pad)),
    ("infiniband.bth.tver", |_| number(0_u64)),
    ("infiniband.bth.p_key", |d| number(d.packet().bth().pkey.0)),
    // The congestion bits; tshark has no better name for them.
    ("infiniband.reserved", |d| {
        let bth = d.packet().headers.bth;
        Some(Value::Bytes(vec![u8::from(bth.fecn) << 7 | u8::from(bth.becn) << 6]))
    }),
    ("infiniband.bth.destqp", |d| number(d.packet().bth().dest_qpn.get())),
    ("infiniband.bth.a", |d| number(d.packet().bth().ack_req)),
    ("infiniband.bth.reserved7", |_| number(0_u64)),
    ("infiniband.bth.psn", |d| number(d.packet().bth().psn.get())),
    ("infiniband.reth.va", |d| d.remote().and_then(|addr| number(addr.va))),
    ("infiniband.reth.r_key", |d| d.remote().and_then(|addr| number(addr.rkey))),
    ("infiniband.reth.dmalen", |d| d.reth().and_then(|reth| number(reth.0.len))),
    ("infiniband.aeth.syndrome", |d| d.aeth().and_then(|aeth| number(aeth.syndrome.byte()))),
    ("infiniband.aeth.msn", |d| d.aeth().and_then(|aeth| number(aeth.msn.get()))),
    ("infiniband.atomiceth.swapdt", |d| d.atomic().and_then(|atomic| number(atomic.swap_add))),
    ("infiniband.atomiceth.cmpdt", |d| d.atomic().and_then(|atomic| number(atomic.compare))),
    ("infiniband.atomicacketh.origremdt", |d| d.atomic_ack().and_then(|ack| number(ack.original))),
    ("infiniband.immdt", |d| {
        let imm = d.packet().headers.ext.imm();
        imm.map(|imm| Value::Bytes(imm.to_be_bytes().to_vec()))
    }),
    ("infiniband.invariant.crc", |d| number(u32::from_be_bytes(d.icrc))),
    ("data.data", |d| d.data().map(|data| Value::Bytes(data.to_vec()))),
];

/// Names of the fields where tshark and we differ, per frame: (frame, field, tshark's, ours).
pub(crate) fn differences(capture: &Path, decoded: &[Decoded]) -> Vec<(usize, &'static str, String, String)> {
    let rows = fields(capture);
    assert_eq!(rows.len(), decoded.len(), "frames that tshark read, and that we read");
    let mut found = Vec::new();
    for (at, (row, ours)) in rows.iter().zip(decoded).enumerate() {
        for ((name, ours_of), theirs) in COLUMNS.iter().zip(row) {
            let ours = ours_of(ours);
            if !agree(theirs, ours.as_ref()) {
                found.push((at, *name, theirs.clone(), format!("{ours:x?}")));
            }
        }
    }
    found
}

/// One row of texts per frame, one text per column.
fn fields(capture: &Path) -> Vec<Vec<String>> {
    let mut command = Command::new("tshark");
    command.arg("-r").arg(capture).args(["-n", "-T", "fields", "-E", "separator=|", "-E", "occurrence=f"]);
    for (name, _) in COLUMNS {
        command.args(["-e", name]);
    }
    let output = command.output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().map(|line| line.split('|').map(str::to_owned).collect()).collect()
}

/// Whether tshark's text means our value; an absent field is an empty text.
fn agree(theirs: &str, ours: Option<&Value>) -> bool {
    match ours {
        None => theirs.is_empty(),
        Some(Value::Number(ours)) => parse(theirs) == Some(*ours),
        Some(Value::Text(ours)) => theirs == ours,
        Some(Value::Bytes(ours)) => {
            let hex: String = ours.iter().map(|byte| format!("{byte:02x}")).collect();
            theirs.replace(':', "") == hex
        }
    }
}

fn parse(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
