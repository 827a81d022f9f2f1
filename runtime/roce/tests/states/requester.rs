//! The requester's table.

use ibex_roce::requester::{Event, Failure, MessageId, Operation, Requester, RequesterConfig, Verdict};
use ibex_roce::wire::{
    Aeth, AtomicAckEth, Bth, Extension, Headers, NakCode, Opcode, Packet, Part, Reth, Syndrome,
};
use ibex_roce::{AckTimeout, AtomicOp, Msn, Mtu, Nanos, PKey, Psn, QpNum, RnrTimer};

use super::rig::{BASE, Local, WORD_BASE, range};
use super::{Datagram, compare, table};

/// The circle wraps inside every message.
const FIRST: u32 = 0xff_ffff;
const MTU: Mtu = Mtu::B256;

#[derive(Clone, Copy)]
enum State {
    Idle,
    Unsent,
    Sent,
    PartlyAcked,
    WentBack,
    Resent,
    LastTry,
    Reading,
    HalfRead,
    ReadThenWrite,
    Atomic,
    NotReady,
    Faulty,
    Failed,
}

const STATES: [(&str, State); 14] = [
    ("idle", State::Idle),
    ("write of 3 packets posted", State::Unsent),
    ("write of 3 packets sent", State::Sent),
    ("write sent, first packet acknowledged", State::PartlyAcked),
    ("write sent, gone back to its first packet", State::WentBack),
    ("write sent again after a timeout", State::Resent),
    ("write sent, no retry left", State::LastTry),
    ("read of 3 packets asked for", State::Reading),
    ("read, first packet arrived", State::HalfRead),
    ("read and a write of 1 packet sent", State::ReadThenWrite),
    ("atomic sent", State::Atomic),
    ("send of 3 packets, responder was not ready", State::NotReady),
    ("write sent, next message locally refused", State::Faulty),
    ("failed", State::Failed),
];

#[derive(Clone, Copy)]
enum Input {
    Post,
    Transmit,
    Early,
    Timeout,
    Abort,
    /// An acknowledgement, this many packets after the first.
    Answer(i32, Syndrome),
    /// READ data: which packet after the first, how long, whether the last.
    Data(i32, usize, Part),
    Original(i32),
    Request,
    OtherPartition,
    NegativeData,
}

const NAK: fn(NakCode) -> Syndrome = Syndrome::Nak;

fn inputs() -> Vec<(&'static str, Input)> {
    let rnr = Syndrome::Rnr(RnrTimer::new(1));
    vec![
        ("post", Input::Post),
        ("transmit", Input::Transmit),
        ("time before the deadline", Input::Early),
        ("time of the deadline", Input::Timeout),
        ("abort", Input::Abort),
        ("ack -1", Input::Answer(-1, Syndrome::ACK)),
        ("ack 0", Input::Answer(0, Syndrome::ACK)),
        ("ack 1", Input::Answer(1, Syndrome::ACK)),
        ("ack 2", Input::Answer(2, Syndrome::ACK)),
        ("ack 3", Input::Answer(3, Syndrome::ACK)),
        ("ack 4", Input::Answer(4, Syndrome::ACK)),
        ("nak sequence -1", Input::Answer(-1, NAK(NakCode::PsnSequence))),
        ("nak sequence 0", Input::Answer(0, NAK(NakCode::PsnSequence))),
        ("nak sequence 2", Input::Answer(2, NAK(NakCode::PsnSequence))),
        ("nak sequence 3", Input::Answer(3, NAK(NakCode::PsnSequence))),
        ("rnr 0", Input::Answer(0, rnr)),
        ("rnr 2", Input::Answer(2, rnr)),
        ("nak invalid request 2", Input::Answer(2, NAK(NakCode::InvalidRequest))),
        ("nak remote access 0", Input::Answer(0, NAK(NakCode::RemoteAccess))),
        ("nak remote access 2", Input::Answer(2, NAK(NakCode::RemoteAccess))),
        ("nak remote operation 2", Input::Answer(2, NAK(NakCode::RemoteOperation))),
        ("nak invalid rd 2", Input::Answer(2, NAK(NakCode::InvalidRdRequest))),
        ("nak remote access 3", Input::Answer(3, NAK(NakCode::RemoteAccess))),
        ("data first 0", Input::Data(0, 256, Part::First)),
        ("data middle 1", Input::Data(1, 256, Part::Middle)),
        ("data last 2", Input::Data(2, 88, Part::Last)),
        ("data only 0", Input::Data(0, 88, Part::Only)),
        ("data too short 0", Input::Data(0, 255, Part::First)),
        ("data negative 0", Input::NegativeData),
        ("original 0", Input::Original(0)),
        ("original 1", Input::Original(1)),
        ("a request", Input::Request),
        ("ack 0, other partition", Input::OtherPartition),
    ]
}

/// A requester, what it works on, and the time.
struct Run {
    requester: Requester,
    local: Local,
    now: Nanos,
    num_posted: u64,
}

const WRITE: Operation = Operation::Write { to: range(BASE, 600), imm: None, solicited: false };
const READ: Operation = Operation::Read { from: range(BASE, 600) };

impl Run {
    fn new(retry_count: u8) -> Self {
        let config = RequesterConfig {
            retry_count,
            rnr_retry: 1,
            ack_timeout: AckTimeout::new(1),
            ..RequesterConfig::new(QpNum::new(9), MTU, Psn::new(FIRST))
        };
        Self { requester: Requester::new(config), local: Local::default(), now: Nanos(100), num_posted: 0 }
    }

    fn post(&mut self, op: Operation) -> bool {
        let id = MessageId(self.num_posted);
        self.num_posted += 1;
        self.requester.post(id, op).is_ok()
    }

    fn transmit(&mut self) -> Vec<String> {
        let mut out = vec![0xa5; MTU.packet_len_max()];
        let mut sent = Vec::new();
        while let Some(transmit) = self.requester.poll_transmit(self.now, &mut self.local, &mut out) {
            let packet = Packet::parse(&out[..transmit.len - 4]).unwrap();
            let place = packet.bth().psn.distance_from(Psn::new(FIRST));
            let again = if transmit.again { "again " } else { "" };
            let asks = if packet.bth().ack_req { "!" } else { "" };
            sent.push(format!("{again}{place}{asks}"));
        }
        sent
    }

    fn due(&mut self) {
        self.now = self.requester.poll_timeout().unwrap_or(self.now);
        self.requester.handle_timeout(self.now);
    }

    fn answer(&mut self, place: i32, opcode: Opcode, ext: Extension, payload: &[u8]) -> Verdict {
        let datagram = Datagram::new(headers(place, opcode, ext), payload);
        self.requester.handle_packet(self.now, &datagram.packet(), &mut self.local)
    }

    fn ack(&mut self, place: i32, syndrome: Syndrome) -> Verdict {
        self.answer(place, Opcode::Ack, aeth(syndrome), &[])
    }

    fn with(mut self, ops: &[Operation]) -> Self {
        for op in ops {
            assert!(self.post(*op));
        }
        self.transmit();
        self
    }

    /// The run in the given state.
    fn in_state(state: State) -> Self {
        let mut run = Self::new(2);
        match state {
            State::Idle => {}
            State::Unsent => assert!(run.post(WRITE)),
            State::Sent => run = run.with(&[WRITE]),
            State::PartlyAcked => {
                run = run.with(&[WRITE]);
                assert_eq!(run.ack(0, Syndrome::ACK), Verdict::Progress);
            }
            State::WentBack => {
                run = run.with(&[WRITE]);
                assert_eq!(run.ack(0, NAK(NakCode::PsnSequence)), Verdict::Retry);
            }
            State::Resent => {
                run = run.with(&[WRITE]);
                run.due();
                run.transmit();
            }
            State::LastTry => run = Self::new(0).with(&[WRITE]),
            State::Reading => run = run.with(&[READ]),
            State::HalfRead => {
                run = run.with(&[READ]);
                let verdict = run.answer(0, Opcode::ReadResponseFirst, aeth(Syndrome::ACK), &[1; 256]);
                assert_eq!(verdict, Verdict::Progress);
            }
            State::ReadThenWrite => {
                let short = Operation::Write { to: range(BASE, 8), imm: None, solicited: false };
                run = run.with(&[READ, short]);
            }
            State::Atomic => {
                let op = AtomicOp::FetchAdd { add: 1 };
                run = run.with(&[Operation::Atomic { on: range(WORD_BASE, 8).addr, op }]);
            }
            State::NotReady => {
                run = run.with(&[Operation::Send { len: 600, imm: None, solicited: false }]);
                assert_eq!(run.ack(0, Syndrome::Rnr(RnrTimer::new(1))), Verdict::NotReady);
            }
            State::Faulty => {
                run.local.faulty.push(1);
                run = run.with(&[WRITE, WRITE]);
            }
            State::Failed => {
                run = run.with(&[WRITE, WRITE]);
                assert_eq!(run.ack(0, NAK(NakCode::RemoteAccess)), Verdict::Failed);
                while run.requester.poll_event().is_some() {}
            }
        }
        assert_eq!(run.requester.poll_event(), None);
        run
    }

    fn apply(&mut self, input: Input) -> String {
        match input {
            Input::Post => return format!("taken {}", self.post(WRITE)),
            Input::Transmit => return format!("sent [{}]", self.transmit().join(", ")),
            Input::Early => {
                let due = self.requester.poll_timeout().unwrap_or(Nanos(1));
                self.requester.handle_timeout(Nanos(due.0 - 1));
                return format!("deadline kept {}", self.requester.poll_timeout().is_some());
            }
            Input::Timeout => {
                self.due();
                return String::from("time passed");
            }
            Input::Abort => {
                self.requester.abort();
                return String::from("aborted");
            }
            _ => {}
        }
        let verdict = match input {
            Input::Answer(place, syndrome) => self.ack(place, syndrome),
            Input::Data(place, len, part) => {
                let ext = if part == Part::Middle { Extension::None } else { aeth(Syndrome::ACK) };
                self.answer(place, Opcode::read_response(part), ext, &vec![2; len])
            }
            Input::NegativeData => {
                let ext = aeth(NAK(NakCode::RemoteAccess));
                self.answer(0, Opcode::ReadResponseFirst, ext, &[2; 256])
            }
            Input::Original(place) => {
                let aeth = Aeth { syndrome: Syndrome::ACK, msn: Msn::new(1) };
                let ext = Extension::AtomicAck(aeth, AtomicAckEth { original: 5 });
                self.answer(place, Opcode::AtomicAck, ext, &[])
            }
            Input::Request => {
                let ext = Extension::Reth(Reth(range(BASE, 8)));
                self.answer(0, Opcode::ReadRequest, ext, &[])
            }
            _ => {
                let mut headers = headers(0, Opcode::Ack, aeth(Syndrome::ACK));
                headers.bth.pkey = PKey(0x8123);
                let datagram = Datagram::new(headers, &[]);
                self.requester.handle_packet(self.now, &datagram.packet(), &mut self.local)
            }
        };
        match verdict {
            Verdict::Dropped(reason) => format!("dropped: {reason:?}"),
            verdict => format!("{verdict:?}").to_lowercase(),
        }
    }

    /// What can be seen of it.
    fn seen(&mut self) -> String {
        let unacked = self.requester.unacked_psn().distance_from(Psn::new(FIRST));
        let mut seen = format!("{:?}, unacked {unacked}", self.requester.phase());
        while let Some(event) = self.requester.poll_event() {
            seen += &match event {
                Event::Completed { id } => format!(", completed {}", id.0),
                Event::Failed { id, reason } => format!(", failed {} {reason:?}", id.0),
                Event::Flushed { id } => format!(", flushed {}", id.0),
            };
        }
        seen
    }
}

fn aeth(syndrome: Syndrome) -> Extension {
    Extension::Aeth(Aeth { syndrome, msn: Msn::new(1) })
}

fn headers(place: i32, opcode: Opcode, ext: Extension) -> Headers {
    let psn = Psn::new(FIRST.wrapping_add_signed(place));
    let bth = Bth {
        opcode,
        solicited: false,
        migrated: true,
        pad: 0,
        pkey: PKey::DEFAULT,
        fecn: false,
        becn: false,
        dest_qpn: QpNum::new(1),
        ack_req: false,
        psn,
    };
    Headers { bth, ext }
}

#[test]
fn every_event_in_every_state_of_a_requester_does_what_its_table_says() {
    let seen = table(&STATES, &inputs(), |state, input| {
        let mut run = Run::in_state(state);
        let answer = run.apply(input);
        let seen = run.seen();
        let then = run.transmit();
        let then = if then.is_empty() { String::new() } else { format!("; then sent [{}]", then.join(", ")) };
        format!("{answer} -> {seen}{then}")
    });
    compare("requester.txt", &seen);
}

/// What the table cannot show: how often things may be tried.
#[test]
fn retries_are_counted_and_progress_forgives_them() {
    let mut run = Run::new(2).with(&[WRITE]);
    for _ in 0..2 {
        run.due();
        assert_eq!(run.transmit(), ["again 0", "again 1", "again 2!"]);
    }
    assert_eq!(run.ack(0, Syndrome::ACK), Verdict::Progress);
    for _ in 0..2 {
        run.due();
        assert_eq!(run.transmit(), ["again 1", "again 2!"]);
    }
    run.due();
    assert_eq!(run.seen(), "Failed, unacked 1, failed 0 RetryExceeded");
    assert_eq!(run.requester.counters().timeouts, 5);
}

#[test]
fn a_responder_that_is_not_ready_is_tried_as_often_as_agreed() {
    let send = Operation::Send { len: 8, imm: None, solicited: false };
    let rnr = Syndrome::Rnr(RnrTimer::new(1));
    let mut run = Run::new(2).with(&[send]);
    assert_eq!(run.ack(0, rnr), Verdict::NotReady);
    assert_eq!(run.requester.poll_timeout(), Some(Nanos(100 + 10_000)));
    assert!(run.transmit().is_empty(), "nothing is sent before the responder's time");
    run.due();
    assert_eq!(run.transmit(), ["again 0!"]);
    assert_eq!(run.ack(0, rnr), Verdict::Failed);
    assert_eq!(run.seen(), "Failed, unacked 0, failed 0 RnrRetryExceeded");

    let config = RequesterConfig::new(QpNum::new(9), MTU, Psn::new(FIRST));
    assert_eq!(config.rnr_retry, RequesterConfig::RNR_RETRY_FOREVER);
    let mut run = Run { requester: Requester::new(config), ..Run::new(0) }.with(&[send]);
    for _ in 0..100 {
        assert_eq!(run.ack(0, rnr), Verdict::NotReady);
        run.due();
        assert_eq!(run.transmit(), ["again 0!"]);
    }
}

#[test]
fn without_an_ack_timeout_a_requester_waits_for_ever() {
    let config = RequesterConfig {
        ack_timeout: AckTimeout::new(0),
        ..RequesterConfig::new(QpNum::new(9), MTU, Psn::new(FIRST))
    };
    let run = Run { requester: Requester::new(config), ..Run::new(0) }.with(&[WRITE]);
    assert_eq!(run.requester.poll_timeout(), None);
}

#[test]
fn early_attempts_double_and_leave_the_promised_patience_whole() {
    let patience = AckTimeout::new(10).nanos().unwrap();
    let first = patience / 10;
    let config = RequesterConfig {
        ack_timeout: AckTimeout::new(10),
        first_timeout: Some(Nanos(first)),
        retry_count: 2,
        ..RequesterConfig::new(QpNum::new(9), MTU, Psn::new(FIRST))
    };
    let mut run = Run { requester: Requester::new(config), ..Run::new(0) }.with(&[WRITE]);
    run.transmit();
    let waits = [first, 2 * first, 4 * first, patience, patience];
    for wait in waits {
        assert_eq!(run.requester.poll_timeout(), Some(run.now.plus(wait)));
        run.due();
        assert_eq!(run.transmit().len(), 3, "all of it again");
    }
    // An answer to a part makes the waits short again.
    run.ack(0, Syndrome::ACK);
    for wait in waits.into_iter().chain([patience]) {
        assert_eq!(run.requester.poll_timeout(), Some(run.now.plus(wait)));
        run.due();
        run.transmit();
    }
    let reason = Failure::RetryExceeded;
    assert_eq!(run.requester.poll_event(), Some(Event::Failed { id: MessageId(0), reason }));
}

#[test]
fn the_window_and_the_reads_in_flight_are_limited() {
    let config = RequesterConfig {
        window_packets: 2,
        max_reads: 1,
        ..RequesterConfig::new(QpNum::new(9), MTU, Psn::new(FIRST))
    };
    let mut run = Run { requester: Requester::new(config), ..Run::new(0) };
    assert!(run.post(WRITE));
    assert_eq!(run.transmit(), ["0", "1!"], "a full window asks for an acknowledgement");
    run.ack(1, Syndrome::ACK);
    assert_eq!(run.transmit(), ["2!"]);
    run.ack(2, Syndrome::ACK);

    let short = Operation::Read { from: range(BASE, 8) };
    assert!(run.post(short) && run.post(short));
    assert_eq!(run.transmit(), ["3"]);
    run.answer(3, Opcode::ReadResponseOnly, aeth(Syndrome::ACK), &[0; 8]);
    assert_eq!(run.transmit(), ["4"]);
}

#[test]
fn posting_is_refused_with_a_reason() {
    use ibex_roce::MESSAGE_LEN_MAX;
    use ibex_roce::requester::PostError;
    let config =
        RequesterConfig { max_messages: 3, ..RequesterConfig::new(QpNum::new(9), MTU, Psn::new(FIRST)) };
    let mut requester = Requester::new(config);
    let read = |len| Operation::Read { from: range(BASE, len) };
    let id = MessageId(0);
    let len = MESSAGE_LEN_MAX + 1;
    assert_eq!(requester.post(id, read(len)), Err(PostError::TooLong { len }));
    assert_eq!(requester.post(id, read(MESSAGE_LEN_MAX)), Ok(()));
    // A second one would take more than half the circle of sequence numbers.
    let packets = 1 << 22;
    let full = PostError::Full { messages: 1, packets };
    assert_eq!(requester.post(id, read(MESSAGE_LEN_MAX)), Err(full));
    assert_eq!(requester.post(id, read(MESSAGE_LEN_MAX - 256)), Ok(()));
    assert_eq!(requester.post(id, read(1)), Err(PostError::Full { messages: 2, packets: 1 }));
    requester.abort();
    assert_eq!(requester.post(id, read(1)), Err(PostError::Failed));
    assert_eq!(requester.poll_event(), Some(Event::Flushed { id }));
}

#[test]
fn a_lost_response_is_asked_for_once() {
    let mut run = Run::new(3).with(&[READ, WRITE]);
    assert_eq!(run.answer(1, Opcode::ReadResponseMiddle, Extension::None, &[0; 256]), Verdict::Retry);
    assert_eq!(run.transmit(), ["again 0", "again 3", "again 4", "again 5!"]);
    assert_eq!(run.answer(2, Opcode::ReadResponseLast, aeth(Syndrome::ACK), &[0; 88]), Verdict::Stale);
    assert_eq!(run.ack(5, Syndrome::ACK), Verdict::Stale);
    assert_eq!(run.requester.counters().implied_naks, 1);
    assert!(run.transmit().is_empty());
}

#[test]
fn a_message_that_local_memory_refuses_leaves_the_ones_before_it_to_be_acknowledged() {
    let mut run = Run::new(3);
    run.local.faulty.push(1);
    assert!(run.post(WRITE) && run.post(WRITE));
    // The first counted on the second to ask for an acknowledgement.
    assert_eq!(run.transmit(), ["0", "1", "2", "again 0", "again 1", "again 2!"]);
    assert_eq!(run.ack(2, Syndrome::ACK), Verdict::Failed);
    assert_eq!(run.seen(), "Failed, unacked 3, completed 0, failed 1 LocalProtection");
}

#[test]
fn a_response_that_local_memory_refuses_fails_its_message() {
    let atomic = Operation::Atomic { on: range(WORD_BASE, 8).addr, op: AtomicOp::FetchAdd { add: 1 } };
    for op in [READ, atomic] {
        let mut run = Run::new(3).with(&[op, WRITE]);
        run.local.faulty.push(0);
        let verdict = match op {
            READ => run.answer(0, Opcode::ReadResponseFirst, aeth(Syndrome::ACK), &[0; 256]),
            _ => {
                let aeth = Aeth { syndrome: Syndrome::ACK, msn: Msn::new(1) };
                let ext = Extension::AtomicAck(aeth, AtomicAckEth { original: 5 });
                run.answer(0, Opcode::AtomicAck, ext, &[])
            }
        };
        assert_eq!(verdict, Verdict::Failed);
        assert_eq!(run.seen(), "Failed, unacked 0, failed 0 LocalProtection, flushed 1");
    }
}
