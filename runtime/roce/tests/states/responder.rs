//! The responder's table.

use ibex_roce::responder::{Refusal, Responder, ResponderConfig, Rights, Verdict};
use ibex_roce::wire::{
    Aeth, AtomicEth, Bth, Extension, Headers, ImmDt, Opcode, Packet, Part, Reth, Syndrome,
};
use ibex_roce::{AtomicOp, Msn, Mtu, PKey, Psn, QpNum, RemoteRange};

use super::rig::{BASE, Memory, RKEY, WORD_BASE, WRITE_BASE, range};
use super::{Datagram, compare, table};

/// The circle wraps among the first packets.
const FIRST: u32 = 0xff_ffff;
const MTU: Mtu = Mtu::B256;

#[derive(Clone, Copy)]
enum State {
    Fresh,
    AmidSend,
    AmidWrite,
    Asked,
    NotReady,
    ReadWaiting,
    Full,
    AfterAtomic,
    NoRights,
    NoReceives,
    Refused,
}

const STATES: [(&str, State); 11] = [
    ("fresh", State::Fresh),
    ("amid a send of 600", State::AmidSend),
    ("amid a write of 600", State::AmidWrite),
    ("asked for a missing packet", State::Asked),
    ("was not ready for a send", State::NotReady),
    ("a read of 3 packets not answered yet", State::ReadWaiting),
    ("as many reads unanswered as there may be", State::Full),
    ("after an atomic", State::AfterAtomic),
    ("without rights", State::NoRights),
    ("without receives", State::NoReceives),
    ("refused", State::Refused),
];

/// A request: its place relative to the expected one, and what it is.
#[derive(Clone, Copy)]
enum Input {
    Send(i32, Part, usize),
    SendImm,
    Write(i32, Part, usize),
    WriteTo(RemoteRange, usize),
    WriteImm,
    Read(i32, RemoteRange),
    Atomic(i32, u64, u64),
    Answer,
    OtherPartition,
    Transmit,
}

const WRITE: RemoteRange = range(WRITE_BASE, 600);
const READ: RemoteRange = range(BASE, 600);
const OUTSIDE: RemoteRange = range(WRITE_BASE + 8192 - 4, 8);

fn inputs() -> Vec<(&'static str, Input)> {
    let mut wrong_key = range(WRITE_BASE, 8);
    wrong_key.addr.rkey = RKEY + 1;
    let huge = range(BASE, ibex_roce::MESSAGE_LEN_MAX + 1);
    vec![
        ("send first", Input::Send(0, Part::First, 256)),
        ("send first, short", Input::Send(0, Part::First, 252)),
        ("send middle", Input::Send(0, Part::Middle, 256)),
        ("send last", Input::Send(0, Part::Last, 88)),
        ("send last, empty", Input::Send(0, Part::Last, 0)),
        ("send only", Input::Send(0, Part::Only, 10)),
        ("send only, too long", Input::Send(0, Part::Only, 257)),
        ("send only with imm", Input::SendImm),
        ("write first", Input::Write(0, Part::First, 256)),
        ("write first, short", Input::Write(0, Part::First, 255)),
        ("write middle", Input::Write(0, Part::Middle, 256)),
        ("write last too early", Input::Write(0, Part::Last, 88)),
        ("write last, the rest", Input::Write(0, Part::Last, 344 - 256)),
        ("write only", Input::WriteTo(range(WRITE_BASE, 8), 8)),
        ("write only, empty, no key", Input::WriteTo(range(0, 0), 0)),
        ("write only, wrong length", Input::WriteTo(range(WRITE_BASE, 8), 7)),
        ("write only, wrong key", Input::WriteTo(wrong_key, 8)),
        ("write only, out of range", Input::WriteTo(OUTSIDE, 8)),
        ("write only, address wraps", Input::WriteTo(range(u64::MAX - 3, 8), 8)),
        ("write only with imm", Input::WriteImm),
        ("read", Input::Read(0, READ)),
        ("read, empty, no key", Input::Read(0, range(0, 0))),
        ("read, out of range", Input::Read(0, OUTSIDE)),
        ("read, longer than a message", Input::Read(0, huge)),
        ("fetch add", Input::Atomic(0, WORD_BASE, 1)),
        ("fetch add, not aligned", Input::Atomic(0, WORD_BASE + 4, 1)),
        ("fetch add, out of range", Input::Atomic(0, WRITE_BASE + 8192, 1)),
        ("send from the future", Input::Send(1, Part::Only, 10)),
        ("write from the far future", Input::Write(100, Part::Middle, 256)),
        ("send again", Input::Send(-1, Part::Only, 10)),
        ("write again", Input::Write(-1, Part::Only, 10)),
        ("read again", Input::Read(-1, range(BASE, 9))),
        ("read again, more than it was", Input::Read(-1, range(BASE, 257))),
        ("read again, out of range", Input::Read(-1, OUTSIDE)),
        ("fetch add again", Input::Atomic(-1, WORD_BASE, 1)),
        ("fetch add again, another", Input::Atomic(-1, WORD_BASE, 2)),
        ("an answer", Input::Answer),
        ("send, other partition", Input::OtherPartition),
        ("transmit", Input::Transmit),
    ]
}

struct Run {
    responder: Responder,
    memory: Memory,
}

impl Run {
    fn new(rights: Rights, receives: u32, max_reads: u8) -> Self {
        let config = ResponderConfig {
            rights,
            max_reads,
            ..ResponderConfig::new(QpNum::new(9), MTU, Psn::new(FIRST))
        };
        Self { responder: Responder::new(config), memory: Memory::new(receives) }
    }

    fn in_state(state: State) -> Self {
        let mut run = Self::new(Rights::ALL, 2, 2);
        let executed = match state {
            State::Fresh => Verdict::Executed,
            State::AmidSend => run.take(Input::Send(0, Part::First, 256)),
            State::AmidWrite => run.take(Input::Write(0, Part::First, 256)),
            State::Asked => {
                assert_eq!(run.take(Input::Send(2, Part::Only, 8)), Verdict::OutOfSequence { asked: true });
                assert_eq!(run.transmit(), ["nak PsnSequence 0"]);
                Verdict::Executed
            }
            State::NotReady => {
                run.memory.receives = 0;
                assert_eq!(run.take(Input::Send(0, Part::Only, 8)), Verdict::NotReady);
                run.transmit();
                run.memory.receives = 1;
                Verdict::Executed
            }
            State::ReadWaiting => run.take(Input::Read(0, READ)),
            State::Full => {
                for _ in 0..3 {
                    assert_eq!(run.take(Input::Read(0, range(BASE, 4))), Verdict::Executed);
                }
                run.take(Input::Atomic(0, WORD_BASE, 1))
            }
            State::AfterAtomic => {
                let verdict = run.take(Input::Atomic(0, WORD_BASE, 1));
                run.transmit();
                verdict
            }
            State::NoRights => {
                run = Self::new(Rights::default(), 2, 2);
                Verdict::Executed
            }
            State::NoReceives => {
                run.memory.receives = 0;
                Verdict::Executed
            }
            State::Refused => {
                let refused = run.take(Input::WriteTo(OUTSIDE, 8));
                assert_eq!(refused, Verdict::Refused(Refusal::RemoteAccess));
                run.transmit();
                Verdict::Executed
            }
        };
        assert_eq!(executed, Verdict::Executed);
        run.memory.effects.clear();
        run
    }

    fn take(&mut self, input: Input) -> Verdict {
        let expected = self.responder.expected_psn();
        let at = |place: i32| Psn::new(expected.get().wrapping_add_signed(place));
        let reth = |range| Extension::Reth(Reth(range));
        let imm = ImmDt(77);
        let (psn, opcode, ext, len) = match input {
            Input::Send(place, part, len) => (at(place), Opcode::send(part, false), Extension::None, len),
            Input::SendImm => (at(0), Opcode::SendOnlyImm, Extension::Imm(imm), 10),
            Input::Write(place, part, len) => {
                let ext = if part.starts() { reth(WRITE) } else { Extension::None };
                (at(place), Opcode::write(part, false), ext, len)
            }
            Input::WriteTo(range, len) => (at(0), Opcode::WriteOnly, reth(range), len),
            Input::WriteImm => {
                let ext = Extension::RethImm(Reth(range(WRITE_BASE, 8)), imm);
                (at(0), Opcode::WriteOnlyImm, ext, 8)
            }
            Input::Read(place, range) => (at(place), Opcode::ReadRequest, reth(range), 0),
            Input::Atomic(place, va, add) => {
                let (opcode, eth) = AtomicEth::of(range(va, 8).addr, AtomicOp::FetchAdd { add });
                (at(place), opcode, Extension::Atomic(eth), 0)
            }
            Input::Answer => {
                let aeth = Aeth { syndrome: Syndrome::ACK, msn: Msn::new(0) };
                (at(0), Opcode::Ack, Extension::Aeth(aeth), 0)
            }
            Input::OtherPartition | Input::Transmit => (at(0), Opcode::SendOnly, Extension::None, 10),
        };
        let bth = Bth {
            opcode,
            solicited: true,
            migrated: true,
            pad: 0,
            pkey: if matches!(input, Input::OtherPartition) { PKey(0x8123) } else { PKey::DEFAULT },
            fecn: false,
            becn: false,
            dest_qpn: QpNum::new(1),
            ack_req: true,
            psn,
        };
        let datagram = Datagram::new(Headers { bth, ext }, &vec![0x66; len]);
        self.responder.handle_packet(&datagram.packet(), &mut self.memory)
    }

    /// All answers that wait.
    fn transmit(&mut self) -> Vec<String> {
        let mut out = vec![0xa5; MTU.packet_len_max()];
        let mut sent = Vec::new();
        while let Some(transmit) = self.responder.poll_transmit(&mut self.memory, &mut out) {
            let packet = Packet::parse(&out[..transmit.len - 4]).unwrap();
            let place = packet.bth().psn.distance_from(Psn::new(FIRST));
            let what = match packet.headers.ext {
                Extension::Aeth(Aeth { syndrome, .. }) if packet.bth().opcode == Opcode::Ack => {
                    match syndrome {
                        Syndrome::Ack { .. } => String::from("ack"),
                        Syndrome::Rnr(timer) => format!("rnr {}", timer.code()),
                        Syndrome::Nak(code) => format!("nak {code:?}"),
                    }
                }
                Extension::AtomicAck(_, ack) => format!("original {}", ack.original),
                _ => format!("data {}", packet.payload.len()),
            };
            sent.push(format!("{what} {place}"));
        }
        sent
    }
}

#[test]
fn every_event_in_every_state_of_a_responder_does_what_its_table_says() {
    let seen = table(&STATES, &inputs(), |state, input| {
        let mut run = Run::in_state(state);
        let before = (run.responder.expected_psn(), run.responder.msn());
        let verdict = match input {
            Input::Transmit => String::from("nothing new"),
            input => match run.take(input) {
                Verdict::Dropped(reason) => format!("dropped: {reason:?}"),
                Verdict::Refused(refusal) => format!("refused: {refusal:?}"),
                Verdict::OutOfSequence { asked: true } => String::from("out of sequence, asked"),
                Verdict::OutOfSequence { asked: false } => String::from("out of sequence"),
                verdict => format!("{verdict:?}").to_lowercase(),
            },
        };
        let packets = run.responder.expected_psn().distance_from(before.0);
        let messages = run.responder.msn().get() - before.1.get();
        let effects = run.memory.effects.len();
        let answers = run.transmit().join(", ");
        format!("{verdict} -> packets {packets}, messages {messages}, effects {effects}; sent [{answers}]")
    });
    compare("responder.txt", &seen);
}

#[test]
fn a_read_whose_key_goes_away_is_refused_in_its_midst() {
    let mut run = Run::new(Rights::ALL, 0, 2);
    assert_eq!(run.take(Input::Read(0, READ)), Verdict::Executed);
    assert_eq!(run.take(Input::WriteTo(range(WRITE_BASE, 8), 8)), Verdict::Executed);
    let mut out = vec![0xa5; MTU.packet_len_max()];
    assert!(run.responder.poll_transmit(&mut run.memory, &mut out).is_some());
    run.memory.refuse_reads = Some(Refusal::RemoteAccess);
    assert_eq!(run.transmit(), ["nak RemoteAccess 1"]);
    assert_eq!(run.responder.refused(), Some(Refusal::RemoteAccess));
    assert!(!run.responder.has_answers());
}

#[test]
fn a_repeated_read_whose_key_went_away_fails_nothing() {
    let mut run = Run::new(Rights::ALL, 0, 2);
    assert_eq!(run.take(Input::Read(0, READ)), Verdict::Executed);
    run.transmit();
    assert_eq!(run.take(Input::Read(-3, READ)), Verdict::Repeated);
    assert_eq!(run.take(Input::WriteTo(range(WRITE_BASE, 8), 8)), Verdict::Executed);
    run.memory.refuse_reads = Some(Refusal::RemoteAccess);
    assert_eq!(run.transmit(), ["ack 3"]);
    assert_eq!(run.responder.refused(), None);
    assert_eq!(run.take(Input::Read(0, READ)), Verdict::Executed);
    assert_eq!(run.transmit(), ["nak RemoteAccess 4"], "one that is not repeated does fail");
}

#[test]
fn acknowledgements_are_coalesced_and_keep_their_place_among_responses() {
    let mut run = Run::new(Rights::ALL, 9, 4);
    let write = Input::WriteTo(range(WRITE_BASE, 8), 8);
    for input in [write, write, Input::Read(0, range(BASE, 8)), write, Input::Send(0, Part::Only, 3), write] {
        assert_eq!(run.take(input), Verdict::Executed);
    }
    assert_eq!(run.transmit(), ["ack 1", "data 8 2", "ack 5"]);
    assert_eq!(run.take(Input::Send(1, Part::Only, 3)), Verdict::OutOfSequence { asked: true });
    assert_eq!(run.take(write), Verdict::Executed);
    assert_eq!(run.transmit(), ["ack 6"], "what was missing has come before it was asked for");
}

#[test]
fn the_cache_of_atomics_holds_as_many_as_may_be_in_flight() {
    let mut run = Run::new(Rights::ALL, 0, 2);
    for add in 1..=3 {
        assert_eq!(run.take(Input::Atomic(0, WORD_BASE, add)), Verdict::Executed);
        run.transmit();
    }
    let dropped = Verdict::Dropped(ibex_roce::Dropped::BadRepeat);
    assert_eq!(run.take(Input::Atomic(-3, WORD_BASE, 1)), dropped);
    assert_eq!(run.take(Input::Atomic(-2, WORD_BASE, 2)), Verdict::Repeated);
    assert_eq!(run.take(Input::Atomic(-1, WORD_BASE, 3)), Verdict::Repeated);
    assert_eq!(run.transmit(), ["original 1 1", "original 3 2"]);
    assert_eq!(run.memory.effects.len(), 3, "none was carried out again");
}
