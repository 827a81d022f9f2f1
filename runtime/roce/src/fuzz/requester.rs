//! A requester against arbitrary answers.

use std::collections::VecDeque;

use super::{PAYLOAD, STEPS_MAX, Script};
use crate::requester::{
    Event, LocalFault, MessageId, Operation, Payload, Phase, Requester, RequesterConfig, ResponseSink,
    Verdict,
};
use crate::responder::{Host, NoReceive, Received, Refusal, Responder, ResponderConfig};
use crate::types::{AckTimeout, AtomicOp, Mtu, Nanos, Psn, QpNum, RemoteAddr, RemoteRange};
use crate::wire::{ICRC_LEN, Packet};

/// Messages outstanding at most.
const MESSAGES_MAX: usize = 8;

/// Runs requesters through a script of messages, answers and times; how many messages completed.
pub fn requester(bytes: &[u8]) -> u64 {
    let script = &mut Script(bytes);
    let mut run = Run::new(script);
    let mut completed = 0;
    for _ in 0..STEPS_MAX {
        if script.is_over() {
            break;
        }
        run.step(script);
        run.check();
        if run.requester.phase() == Phase::Failed {
            completed += run.end();
            run = Run::new(script);
        }
    }
    completed + run.end()
}

struct Run {
    requester: Requester,
    local: Local,
    /// An honest peer.
    peer: Responder,
    now: Nanos,
    mtu: Mtu,
    num_posted: u64,
    num_told: u64,
    num_completed: u64,
    has_failed: bool,
    out: Vec<u8>,
}

impl Run {
    fn new(script: &mut Script<'_>) -> Self {
        let mtu = script.mtu();
        let first_psn = Psn::new(script.word());
        let config = RequesterConfig {
            retry_count: script.byte() % 8,
            rnr_retry: script.byte() % 8,
            ack_timeout: AckTimeout::new(script.byte()),
            first_timeout: Some(script.byte()).filter(|byte| *byte < 128).map(|byte| Nanos(byte.into())),
            max_reads: script.byte() % 4,
            window_packets: u32::from(script.byte()) % 20,
            ack_every: u32::from(script.byte()) % 10,
            max_messages: MESSAGES_MAX,
            ..RequesterConfig::new(QpNum::new(1), mtu, first_psn)
        };
        Self {
            requester: Requester::new(config),
            local: Local::default(),
            peer: Responder::new(ResponderConfig::new(QpNum::new(1), mtu, first_psn)),
            now: Nanos(0),
            mtu,
            num_posted: 0,
            num_told: 0,
            num_completed: 0,
            has_failed: false,
            out: vec![0; mtu.packet_len_max()],
        }
    }

    fn step(&mut self, script: &mut Script<'_>) {
        match script.byte() % 16 {
            0 => {
                if let Ok(packet) = Packet::parse(script.raw()) {
                    self.take(&packet);
                }
            }
            1..=3 => self.post(script.operation(self.mtu)),
            4..=8 => self.transmit(script),
            9 => {
                let due = self.requester.poll_timeout();
                self.now = self.now.max(due.unwrap_or_default());
                self.requester.handle_timeout(self.now);
            }
            10 => {
                self.now = self.now.plus(script.byte().into());
                self.requester.handle_timeout(self.now);
            }
            11 if script.byte() == 0 => self.requester.abort(),
            11 => self.local.fails = script.byte().is_multiple_of(32),
            12 => {
                let (headers, len) = script.packet(self.mtu, self.requester.unacked_psn());
                self.take(&Packet::new(headers, &PAYLOAD[..len]));
            }
            _ => self.answer(script),
        }
    }

    fn post(&mut self, op: Operation) {
        if self.requester.post(MessageId(self.num_posted), op).is_ok() {
            self.local.reading.push_back((self.num_posted, op, 0));
            self.num_posted += 1;
        }
    }

    /// Sends a packet, which may be lost.
    fn transmit(&mut self, script: &mut Script<'_>) {
        let sent = self.requester.poll_transmit(self.now, &mut self.local, &mut self.out);
        let Some(sent) = sent else { return };
        let packet = Packet::parse(&self.out[..sent.len - ICRC_LEN]).expect("a packet");
        assert!(packet.bth().opcode.is_request());
        if script.byte() >= 16 {
            self.peer.handle_packet(&packet, &mut Willing);
        }
    }

    /// Takes the peer's next answer, which may be damaged.
    fn answer(&mut self, script: &mut Script<'_>) {
        let mut out = std::mem::take(&mut self.out);
        if let Some(sent) = self.peer.poll_transmit(&mut Willing, &mut out) {
            let bytes = &mut out[..sent.len - ICRC_LEN];
            script.damage(bytes);
            if let Ok(packet) = Packet::parse(bytes) {
                self.take(&packet);
            }
        }
        self.out = out;
    }

    fn take(&mut self, packet: &Packet<'_>) {
        let unacked = self.requester.unacked_psn();
        let verdict = self.requester.handle_packet(self.now, packet, &mut self.local);
        if matches!(verdict, Verdict::Stale | Verdict::Dropped(_)) {
            assert_eq!(self.requester.unacked_psn(), unacked, "what says nothing changes nothing");
        }
    }

    fn check(&mut self) {
        while let Some(event) = self.requester.poll_event() {
            let id = match event {
                Event::Completed { id } => {
                    assert!(!self.has_failed, "nothing completes after a failure");
                    self.num_completed += 1;
                    id
                }
                Event::Failed { id, .. } => {
                    assert!(!std::mem::replace(&mut self.has_failed, true), "one message fails");
                    id
                }
                Event::Flushed { id } => id,
            };
            assert_eq!(id.0, self.num_told, "each message has one event, in order");
            self.num_told += 1;
            let (_, op, placed) = self.local.reading.pop_front().expect("it was posted");
            if let (Event::Completed { .. }, Operation::Read { from }) = (event, op) {
                assert_eq!(placed, from.len, "a READ completes with all its bytes");
            }
        }
        let outstanding = self.num_posted - self.num_told;
        assert_eq!(self.requester.outstanding() as u64, outstanding);
        let is_idle = matches!(self.requester.phase(), Phase::Idle | Phase::Failed);
        assert!(is_idle == (outstanding == 0) || self.requester.phase() == Phase::Failed);
        if is_idle {
            assert_eq!(self.requester.poll_timeout(), None, "nothing is awaited");
        }
    }

    fn end(mut self) -> u64 {
        self.requester.abort();
        self.check();
        assert_eq!(self.num_told, self.num_posted);
        self.num_completed
    }
}

/// Local memory that checks what it is asked for.
#[derive(Default)]
struct Local {
    fails: bool,
    /// Outstanding messages, and how many bytes of each were placed.
    reading: VecDeque<(u64, Operation, u32)>,
}

impl Local {
    fn find(&mut self, id: MessageId) -> &mut (u64, Operation, u32) {
        let found = self.reading.iter_mut().find(|(known, ..)| *known == id.0);
        found.expect("only outstanding messages are touched")
    }
}

impl Payload for Local {
    fn read(&mut self, id: MessageId, offset: u32, into: &mut [u8]) -> Result<(), LocalFault> {
        let (_, op, _) = self.find(id);
        assert!(!op.has_response());
        assert!(u64::from(offset) + into.len() as u64 <= op.len().into(), "inside the message");
        into.fill(0x22);
        if self.fails { Err(LocalFault) } else { Ok(()) }
    }
}

impl ResponseSink for Local {
    fn place(&mut self, id: MessageId, offset: u32, bytes: &[u8]) -> Result<(), LocalFault> {
        let fails = self.fails;
        let (_, op, placed) = self.find(id);
        assert!(matches!(op, Operation::Read { .. }));
        assert_eq!(*placed, offset, "each byte once, in order");
        // CAST: a payload is shorter than a datagram.
        *placed += bytes.len() as u32;
        assert!(*placed <= op.len(), "inside the message");
        if fails { Err(LocalFault) } else { Ok(()) }
    }

    fn original(&mut self, id: MessageId, _word: u64) -> Result<(), LocalFault> {
        let fails = self.fails;
        let (_, op, placed) = self.find(id);
        assert!(matches!(op, Operation::Atomic { .. }));
        assert_eq!(std::mem::replace(placed, 8), 0, "once");
        if fails { Err(LocalFault) } else { Ok(()) }
    }
}

/// A host that takes everything.
struct Willing;

impl Host for Willing {
    fn write(&mut self, _range: RemoteRange, _offset: u32, _bytes: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn check_read(&mut self, _range: RemoteRange) -> Result<(), Refusal> {
        Ok(())
    }

    fn read(&mut self, _range: RemoteRange, _offset: u32, into: &mut [u8]) -> Result<(), Refusal> {
        into.fill(0x44);
        Ok(())
    }

    fn atomic(&mut self, _on: RemoteAddr, _op: AtomicOp) -> Result<u64, Refusal> {
        Ok(1)
    }

    fn open_receive(&mut self) -> Result<(), NoReceive> {
        Ok(())
    }

    fn fill_receive(&mut self, _offset: u32, _bytes: &[u8]) -> Result<(), Refusal> {
        Ok(())
    }

    fn complete_receive(&mut self, _received: Received) -> Result<(), Refusal> {
        Ok(())
    }
}
