//! Frames of other people's programs, read field by field and written back byte by byte.
//!
//! `tests/golden/roce.txt` says who built them and who read them. Every frame and every field of it is
//! used: a key that no test understands fails.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message of a test")]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use ibex_roce::wire::{
    Aeth, AtomicAckEth, AtomicEth, Bth, Class, Ecn, Extension, Flow, Frame, Headers, ICRC_LEN, ImmDt, Ips,
    Link, Opcode, Packet, Part, Reth, Syndrome, WireError,
};
use ibex_roce::{Msn, PKey, Psn, QpNum, RemoteAddr, RemoteRange};

/// What a buffer holds before something is emitted into it.
const FILL: u8 = 0xa5;

/// A frame and what another program reads in it.
struct Golden {
    name: String,
    fields: BTreeMap<String, String>,
    bytes: Vec<u8>,
}

fn golden() -> Vec<Golden> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/roce.txt");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut frames: Vec<Golden> = Vec::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        if let Some(words) = line.strip_prefix("packet ") {
            let (name, words) = words.split_once(' ').unwrap();
            let pair = |word: &str| {
                let (key, value) = word.split_once('=').unwrap();
                (key.to_owned(), value.to_owned())
            };
            let fields = words.split(' ').map(pair).collect();
            frames.push(Golden { name: name.to_owned(), fields, bytes: Vec::new() });
        } else {
            let digits: Vec<u8> = line.trim().chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
            let bytes = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]);
            frames.last_mut().unwrap().bytes.extend(bytes);
        }
    }
    assert_eq!(frames.len(), 60);
    frames
}

impl Golden {
    fn text(&mut self, key: &str) -> Option<String> {
        self.fields.remove(key)
    }

    fn number(&mut self, key: &str) -> Option<u64> {
        let text = self.text(key)?;
        Some(match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).unwrap(),
            None => text.parse().unwrap(),
        })
    }

    fn small<T: TryFrom<u64>>(&mut self, key: &str) -> T {
        let number = self.number(key).unwrap_or_else(|| panic!("{}: no {key}", self.name));
        T::try_from(number).unwrap_or_else(|_| panic!("{}: {key} is {number}", self.name))
    }

    fn flag(&mut self, key: &str) -> bool {
        self.small::<u8>(key) != 0
    }

    fn mac(&mut self, key: &str) -> [u8; 6] {
        let text = self.text(key).unwrap();
        let bytes: Vec<u8> = text.split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
        bytes.try_into().unwrap()
    }

    /// The frame that the fields describe.
    fn frame(&mut self) -> Frame {
        let link = Some(Link { dst: self.mac("dst_mac"), src: self.mac("src_mac") });
        let is_v4 = self.fields.contains_key("ip4_src");
        let ip = |text: Option<String>| text.unwrap().parse::<IpAddr>().unwrap();
        let (src, dst) = match is_v4 {
            true => (ip(self.text("ip4_src")), ip(self.text("ip4_dst"))),
            false => (ip(self.text("ip6_src")), ip(self.text("ip6_dst"))),
        };
        let mut flow = Flow::new(src, dst, self.small("sport")).unwrap();
        assert_eq!(flow.dst_port, self.small::<u16>("dport"));
        if is_v4 {
            flow = flow.with_id(self.small("ip4_id"));
            let df = self.flag("df");
            if let Ips::V4 { dont_fragment, .. } = &mut flow.ips {
                *dont_fragment = df;
            }
        }
        let [dscp, ecn, hops] =
            if is_v4 { ["dscp", "ecn", "ttl"] } else { ["dscp6", "ecn6", "hlim"] }.map(|key| self.small(key));
        let ecn = [Ecn::NotCapable, Ecn::Capable1, Ecn::Capable0, Ecn::Congested][usize::from(ecn)];
        Frame { dscp, ecn, hop_limit: hops, ..Frame::new(link, flow) }
    }

    /// The headers that the fields describe.
    fn headers(&mut self, opcode: Opcode) -> Headers {
        let bth = Bth {
            opcode,
            solicited: self.flag("se"),
            migrated: self.flag("m"),
            pad: self.small("pad"),
            pkey: PKey(self.small("pkey")),
            fecn: false,
            becn: false,
            dest_qpn: QpNum::new(self.small("destqp")),
            ack_req: self.flag("a"),
            psn: Psn::new(self.small("psn")),
        };
        Headers { bth, ext: self.extension(opcode) }
    }

    fn extension(&mut self, opcode: Opcode) -> Extension {
        let addr = self.number("va").map(|va| RemoteAddr { va, rkey: self.small("rkey") });
        let imm = self.text("imm").map(|text| ImmDt(u32::from_str_radix(&text, 16).unwrap()));
        let aeth = self.number("syndrome").map(|byte| Aeth {
            syndrome: Syndrome::from_byte(byte.try_into().unwrap()).unwrap(),
            msn: Msn::new(self.small("msn")),
        });
        match (opcode.class(), addr, imm, aeth) {
            (Class::Atomic, Some(on), ..) => {
                let (swap_add, compare) = (self.small("swap"), self.small("cmp"));
                Extension::Atomic(AtomicEth { on, swap_add, compare })
            }
            (Class::AtomicAck, _, _, Some(aeth)) => {
                Extension::AtomicAck(aeth, AtomicAckEth { original: self.small("orig") })
            }
            (Class::Write(_) | Class::Read, Some(addr), imm, None) => {
                let reth = Reth(RemoteRange { addr, len: self.small("dmalen") });
                imm.map_or(Extension::Reth(reth), |imm| Extension::RethImm(reth, imm))
            }
            (Class::Write(_) | Class::Send(_), None, Some(imm), None) => Extension::Imm(imm),
            (Class::Ack | Class::ReadResponse(_), None, None, Some(aeth)) => Extension::Aeth(aeth),
            (_, None, None, None) => Extension::None,
            other => panic!("{}: {other:?}", self.name),
        }
    }
}

fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|i| (7 * i + 3) as u8).collect()
}

#[test]
fn frames_are_read_as_tshark_reads_them_and_written_as_scapy_writes_them() {
    for mut golden in golden() {
        let name = golden.name.clone();
        let bytes = std::mem::take(&mut golden.bytes);
        let (frame, datagram) = Frame::parse_ethernet(&bytes).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(frame, golden.frame(), "{name}");
        let ip_packet = &bytes[ibex_roce::wire::ETHERNET_LEN..];
        let bare = Frame { link: None, ..frame };
        assert_eq!(Frame::parse_ip(ip_packet).unwrap(), (bare, datagram), "{name}");

        let packet = frame.flow.open(datagram).unwrap_or_else(|e| panic!("{name}: {e}"));
        if let Some(icrc) = golden.number("icrc") {
            assert_eq!(u64::from(frame.flow.icrc(packet).swap_bytes()), icrc, "{name}");
        }
        let opcode_byte = golden.small("opcode");
        let Some(opcode) = Opcode::from_byte(opcode_byte) else {
            assert_eq!(Packet::parse(packet), Err(WireError::Opcode(opcode_byte)), "{name}");
            continue;
        };
        let headers = golden.headers(opcode);
        assert!(golden.fields.is_empty(), "{name}: unread {:?}", golden.fields);
        let parsed = Packet::parse(packet).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(parsed.headers, headers, "{name}");
        assert_eq!(parsed.payload, payload(parsed.payload.len()), "{name}");
        emits(&name, &frame, headers, parsed.payload.len(), &bytes);
    }
}

/// Writes a frame from its description and compares it with the golden bytes.
fn emits(name: &str, frame: &Frame, headers: Headers, payload_len: usize, golden: &[u8]) {
    let payload = payload(payload_len);
    let packet = Packet { headers, payload: &payload };
    let datagram_len = packet.len() + ICRC_LEN;
    let mut out = vec![FILL; golden.len() + 64];
    let start = frame.emit_headers(datagram_len, &mut out).unwrap();
    assert_eq!((start, start + datagram_len), (frame.headers_len(), golden.len()), "{name}");
    assert_eq!(packet.emit(&mut out[start..]), Ok(packet.len()), "{name}");
    frame.flow.seal(&mut out[start..golden.len()]).unwrap();
    assert_eq!(out[..golden.len()], *golden, "{name}");
    assert_eq!(out[golden.len()..], [FILL; 64], "{name}: written past the end");
}

#[test]
fn the_invariant_crc_covers_every_bit_but_the_congestion_bits() {
    for golden in golden().iter().filter(|golden| golden.bytes.len() < 120) {
        let (frame, datagram) = Frame::parse_ethernet(&golden.bytes).unwrap();
        let mut changed = datagram.to_vec();
        for bit in 0..8 * changed.len() {
            changed[bit / 8] ^= 1 << (bit % 8);
            let is_mutable = bit / 8 == 4;
            assert_eq!(frame.flow.open(&changed).is_ok(), is_mutable, "{}: bit {bit}", golden.name);
            changed[bit / 8] ^= 1 << (bit % 8);
        }
    }
}

#[test]
fn the_invariant_crc_covers_addresses_ports_identification_and_length() {
    for golden in golden() {
        let (frame, datagram) = Frame::parse_ethernet(&golden.bytes).unwrap();
        let flow = frame.flow;
        let mut others = vec![Flow { src_port: flow.src_port ^ 1, ..flow }, Flow { dst_port: 4792, ..flow }];
        match flow.ips {
            Ips::V4 { src, dst, id, dont_fragment } => others.extend(
                [
                    Ips::V4 { src: dst, dst: src, id, dont_fragment },
                    Ips::V4 { src, dst, id: id ^ 0x100, dont_fragment },
                    Ips::V4 { src, dst, id, dont_fragment: !dont_fragment },
                ]
                .map(|ips| Flow { ips, ..flow }),
            ),
            Ips::V6 { src, dst } => others.push(Flow { ips: Ips::V6 { src: dst, dst: src }, ..flow }),
        }
        // One of the published packets goes from an address to itself.
        for other in others.into_iter().filter(|other| *other != flow) {
            assert!(matches!(other.open(datagram), Err(WireError::Icrc { .. })), "{}", golden.name);
        }
        let len = datagram.len();
        assert!(flow.open(&datagram[..len - 4]).is_err(), "{}", golden.name);
        assert_eq!(
            flow.open(&datagram[..15]),
            Err(WireError::TooShort { what: "datagram", len: 15, need: 16 })
        );
    }
}

#[test]
fn a_cut_packet_is_refused_wherever_it_is_cut() {
    for golden in golden() {
        let (_, datagram) = Frame::parse_ethernet(&golden.bytes).unwrap();
        let packet = &datagram[..datagram.len() - ICRC_LEN];
        let Ok((headers, _)) = Headers::parse(packet) else { continue };
        for len in 0..headers.len() {
            let cut = Packet::parse(&packet[..len]);
            assert!(matches!(cut, Err(WireError::TooShort { .. })), "{}: {len}", golden.name);
        }
        for len in headers.len()..packet.len() {
            let cut = Packet::parse(&packet[..len]);
            let rest = len - headers.len();
            let is_legal = rest % 4 == 0 && rest >= usize::from(headers.bth.pad);
            assert_eq!(cut.is_ok(), is_legal, "{}: {len}", golden.name);
        }
        for len in 0..golden.bytes.len() {
            assert!(Frame::parse_ethernet(&golden.bytes[..len]).is_err(), "{}: {len}", golden.name);
        }
    }
}

#[test]
fn each_check_of_a_frame_has_its_error() {
    let all = golden();
    let find = |name: &str| all.iter().find(|golden| golden.name == name).unwrap().bytes.clone();
    let error = |name: &str, at: usize, value: u8| {
        let mut bytes = find(name);
        bytes[at] = value;
        Frame::parse_ethernet(&bytes).err()
    };
    let v4 = |at, value| error("ack_v4", at, value);
    let v6 = |at, value| error("ack_v6", at, value);
    assert_eq!(v4(12, 0x81), Some(WireError::EtherType(0x8100)));
    assert_eq!(v4(14, 0x65), Some(WireError::IpVersion(6)));
    assert_eq!(v4(14, 0x46), Some(WireError::IpOptions(24)));
    assert_eq!(v4(15, 0xff), Some(WireError::IpChecksum));
    assert_eq!(v6(14, 0x40), Some(WireError::IpVersion(4)));
    assert_eq!(v6(20, 6), Some(WireError::Protocol(6)));
    assert_eq!(v6(19, 200), Some(WireError::Length { what: "ipv6", field: 200, len: 28 }));
    assert_eq!(v6(59, 20), Some(WireError::Length { what: "udp", field: 20, len: 28 }));
    assert_eq!(Frame::parse_ip(&[0x10; 40]).err(), Some(WireError::IpVersion(1)));
    assert_eq!(Frame::parse_ip(&[]).err(), Some(WireError::TooShort { what: "ip header", len: 0, need: 1 }));

    // Fragments and other protocols, with a right checksum.
    let resummed = |at: usize, value: u8| {
        let mut bytes = find("ack_v4");
        let old = u16::from_be_bytes([bytes[at & !1], bytes[at | 1]]);
        bytes[at] = value;
        let new = u16::from_be_bytes([bytes[at & !1], bytes[at | 1]]);
        let sum = u16::from_be_bytes([bytes[24], bytes[25]]);
        // RFC 1624: the new sum is ~(~sum + ~old + new).
        let wide = u32::from(!sum) + u32::from(!old) + u32::from(new);
        let wide = (wide & 0xffff) + (wide >> 16);
        let folded = !(((wide & 0xffff) + (wide >> 16)) as u16);
        bytes[24..26].copy_from_slice(&folded.to_be_bytes());
        Frame::parse_ethernet(&bytes).err()
    };
    assert_eq!(resummed(20, 0x20), Some(WireError::Fragment));
    assert_eq!(resummed(21, 0x01), Some(WireError::Fragment));
    assert_eq!(resummed(23, 1), Some(WireError::Protocol(1)));
    assert_eq!(resummed(17, 19), Some(WireError::Length { what: "ipv4", field: 19, len: 48 }));
}

#[test]
fn each_check_of_a_packet_has_its_error() {
    let all = golden();
    let find = |name: &str| all.iter().find(|golden| golden.name == name).unwrap();
    let packet = |name: &str| {
        let (_, datagram) = Frame::parse_ethernet(&find(name).bytes).unwrap();
        datagram[..datagram.len() - ICRC_LEN].to_vec()
    };
    let error = |name: &str, at: usize, value: u8| {
        let mut bytes = packet(name);
        bytes[at] = value;
        Packet::parse(&bytes).err()
    };
    assert_eq!(error("ack_v4", 0, 0x15), Some(WireError::Opcode(0x15)));
    assert_eq!(error("ack_v4", 0, 0x31), Some(WireError::Opcode(0x31)));
    assert_eq!(error("ack_v4", 1, 0x01), Some(WireError::TransportVersion(1)));
    assert_eq!(error("ack_v4", 1, 0x10), Some(WireError::Padding { pad: 1, len: 0 }));
    assert_eq!(error("ack_v4", 12, 0x40), Some(WireError::Syndrome(0x40)));
    assert_eq!(error("ack_v4", 12, 0x65), Some(WireError::Syndrome(0x65)));
    assert_eq!(error("read_response_only_v4", 12, 0xff), Some(WireError::Syndrome(0xff)));
    // Reserved bits are ignored on receipt and zero when written.
    let mut bytes = packet("ack_v4");
    bytes[4] |= 0x3f;
    bytes[8] |= 0x7f;
    assert_eq!(Packet::parse(&bytes).unwrap().headers, Packet::parse(&packet("ack_v4")).unwrap().headers);

    let headers = Packet::parse(&packet("ack_v4")).unwrap().headers;
    let mut out = [FILL; 64];
    let wrong = Headers { ext: Extension::None, ..headers };
    assert_eq!(wrong.emit(&mut out), Err(WireError::Extension(0x11)));
    let padded = Headers { bth: Bth { pad: 2, ..headers.bth }, ..headers };
    let packet = Packet { headers: padded, payload: &[] };
    assert_eq!(packet.emit(&mut out), Err(WireError::Padding { pad: 2, len: 0 }));
    let packet = Packet::new(padded, &[]);
    let short = WireError::TooShort { what: "packet", len: 15, need: 16 };
    assert_eq!(packet.emit(&mut out[..15]), Err(short));
    assert_eq!(out, [FILL; 64], "a refused packet writes nothing");
    let frame = Frame::parse_ethernet(&find("ack_v4").bytes).unwrap().0;
    let long = WireError::Length { what: "udp", field: 65508, len: 65507 };
    assert_eq!(frame.emit_headers(65508, &mut out), Err(long));
}

#[test]
fn parts_have_their_headers() {
    assert!(matches!(Opcode::WriteOnlyImm.class(), Class::Write(Part::Only)));
    for golden in golden() {
        let (frame, datagram) = Frame::parse_ethernet(&golden.bytes).unwrap();
        let Ok(packet) = Packet::parse(frame.flow.open(datagram).unwrap()) else { continue };
        assert_eq!(packet.headers.ext.imm().is_some(), packet.bth().opcode.has_imm(), "{}", golden.name);
    }
}
