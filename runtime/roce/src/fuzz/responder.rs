//! A responder against arbitrary requests.

use super::{PAYLOAD, REGISTERED, REGISTERED_LEN, RKEY, STEPS_MAX, Script};
use crate::requester::{LocalFault, MessageId, Payload, Requester, RequesterConfig, ResponseSink};
use crate::responder::{Host, NoReceive, Received, Refusal, Responder, ResponderConfig, Rights, Verdict};
use crate::types::{AtomicOp, Mtu, Nanos, Psn, QpNum, RemoteAddr, RemoteRange};
use crate::wire::{ICRC_LEN, Packet};

/// Runs responders through a script of requests; how many messages they carried out.
pub fn responder(bytes: &[u8]) -> u32 {
    let script = &mut Script(bytes);
    let mut run = Run::new(script);
    let mut executed = 0;
    for _ in 0..STEPS_MAX {
        if script.is_over() {
            break;
        }
        run.step(script);
        if run.responder.refused().is_some() && script.byte().is_multiple_of(4) {
            executed += run.end();
            run = Run::new(script);
        }
    }
    executed + run.end()
}

struct Run {
    responder: Responder,
    host: Guard,
    /// An honest peer; its failures are its own.
    peer: Requester,
    mtu: Mtu,
    now: Nanos,
    out: Vec<u8>,
}

impl Run {
    fn new(script: &mut Script<'_>) -> Self {
        let mtu = script.mtu();
        let first_psn = Psn::new(script.word());
        // Mostly all rights.
        let rights = script.byte();
        let config = ResponderConfig {
            rights: Rights { read: rights > 8, write: rights & 15 != 1, atomic: rights & 15 != 2 },
            max_reads: script.byte() % 5,
            ..ResponderConfig::new(QpNum::new(1), mtu, first_psn)
        };
        let peer = RequesterConfig { max_reads: 4, ..RequesterConfig::new(QpNum::new(1), mtu, first_psn) };
        Self {
            responder: Responder::new(config),
            host: Guard { receives: 3, ..Guard::default() },
            peer: Requester::new(peer),
            mtu,
            now: Nanos(0),
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
            1 => self.host.receives = script.byte(),
            2 => self.host.fails = script.byte().is_multiple_of(16),
            3 => {
                let (headers, len) = script.packet(self.mtu, self.responder.expected_psn());
                self.take(&Packet::new(headers, &PAYLOAD[..len]));
            }
            4..=6 => {
                // A full or failed peer takes nothing, which is its business.
                let _ = self.peer.post(MessageId(0), script.operation(self.mtu));
            }
            7..=11 => {
                let mut out = std::mem::take(&mut self.out);
                if let Some(sent) = self.peer.poll_transmit(self.now, &mut Anything, &mut out) {
                    let bytes = &mut out[..sent.len - ICRC_LEN];
                    script.damage(bytes);
                    if let Ok(packet) = Packet::parse(bytes) {
                        self.take(&packet);
                    }
                }
                self.out = out;
            }
            12..=14 => {
                self.answer();
            }
            _ => {
                self.now = self.now.max(self.peer.poll_timeout().unwrap_or_default());
                self.peer.handle_timeout(self.now);
            }
        }
    }

    fn take(&mut self, packet: &Packet<'_>) {
        let (before, psn) = (self.host.effects, self.responder.expected_psn());
        let was_refused = self.responder.refused();
        let verdict = self.responder.handle_packet(packet, &mut self.host);
        match verdict {
            Verdict::Executed => assert_eq!(packet.bth().psn, psn),
            Verdict::Refused(_) => assert!(was_refused.is_none() && self.responder.refused().is_some()),
            Verdict::Repeated | Verdict::OutOfSequence { .. } | Verdict::NotReady | Verdict::Dropped(_) => {
                assert_eq!(self.responder.expected_psn(), psn, "only what is carried out advances");
                assert_eq!(self.host.effects, before, "only what is carried out has effects");
            }
        }
        assert!(was_refused.is_none() || self.host.effects == before, "after a refusal nothing has effects");
    }

    /// Sends one answer to the peer; whether there was one.
    fn answer(&mut self) -> bool {
        let sent = self.responder.poll_transmit(&mut self.host, &mut self.out);
        let Some(sent) = sent else { return false };
        let packet = Packet::parse(&self.out[..sent.len - ICRC_LEN]).expect("a packet");
        assert!(!packet.bth().opcode.is_request());
        self.peer.handle_packet(self.now, &packet, &mut Anything);
        true
    }

    fn end(mut self) -> u32 {
        // A READ of many packets is cut short.
        self.host.fails = true;
        while self.answer() {}
        assert!(!self.responder.has_answers());
        self.responder.msn().get()
    }
}

/// Local memory of the peer.
struct Anything;

impl Payload for Anything {
    fn read(&mut self, _id: MessageId, _offset: u32, into: &mut [u8]) -> Result<(), LocalFault> {
        into.fill(0x33);
        Ok(())
    }
}

impl ResponseSink for Anything {
    fn place(&mut self, _id: MessageId, _offset: u32, _bytes: &[u8]) -> Result<(), LocalFault> {
        Ok(())
    }

    fn original(&mut self, _id: MessageId, _word: u64) -> Result<(), LocalFault> {
        Ok(())
    }
}

/// A host that checks what it is asked for.
#[derive(Default)]
struct Guard {
    receives: u8,
    fails: bool,
    /// Bytes written, words changed, receives used.
    effects: u64,
    /// The WRITE whose packets are coming, and how far it has come.
    writing: Option<(RemoteRange, u32)>,
    /// Bytes in the open receive.
    receiving: Option<u32>,
}

impl Guard {
    fn check(&self, range: RemoteRange, offset: u32, len: usize) -> Result<(), Refusal> {
        let end = u64::from(offset) + len as u64;
        assert!(end <= range.len.into(), "outside the range that the packet named");
        let last = range.addr.va.checked_add(range.len.into()).ok_or(Refusal::RemoteAccess)?;
        let covered = REGISTERED <= range.addr.va && last <= REGISTERED + u64::from(REGISTERED_LEN);
        if covered && range.addr.rkey == RKEY { Ok(()) } else { Err(Refusal::RemoteAccess) }
    }
}

impl Host for Guard {
    fn write(&mut self, range: RemoteRange, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        assert!(!bytes.is_empty());
        self.check(range, offset, bytes.len())?;
        if offset != 0 {
            assert_eq!(self.writing, Some((range, offset)), "packets of one message, in order");
        }
        // CAST: a payload is shorter than a datagram.
        self.writing = Some((range, offset + bytes.len() as u32));
        self.effects += 1;
        Ok(())
    }

    fn check_read(&mut self, range: RemoteRange) -> Result<(), Refusal> {
        self.check(range, 0, 0)
    }

    fn read(&mut self, range: RemoteRange, offset: u32, into: &mut [u8]) -> Result<(), Refusal> {
        assert!(!into.is_empty());
        if self.fails {
            return Err(Refusal::RemoteAccess);
        }
        self.check(range, offset, into.len())?;
        into.fill(0x11);
        Ok(())
    }

    fn atomic(&mut self, on: RemoteAddr, _op: AtomicOp) -> Result<u64, Refusal> {
        assert!(on.va.is_multiple_of(8));
        self.check(RemoteRange { addr: on, len: 8 }, 0, 8)?;
        self.effects += 1;
        Ok(self.effects)
    }

    fn open_receive(&mut self) -> Result<(), NoReceive> {
        self.receives = self.receives.checked_sub(1).ok_or(NoReceive)?;
        assert_eq!(self.receiving.replace(0), None, "one receive is open at a time");
        self.effects += 1;
        Ok(())
    }

    fn fill_receive(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        assert_eq!(self.receiving, Some(offset), "bytes come in order");
        // CAST: a payload is shorter than a datagram.
        self.receiving = Some(offset + bytes.len() as u32);
        self.effects += 1;
        if self.fails { Err(Refusal::RemoteOperation) } else { Ok(()) }
    }

    fn complete_receive(&mut self, received: Received) -> Result<(), Refusal> {
        let filled = self.receiving.take().expect("a receive is open");
        assert_eq!(filled, if received.is_write { 0 } else { received.len });
        self.effects += 1;
        if self.fails { Err(Refusal::RemoteOperation) } else { Ok(()) }
    }
}
