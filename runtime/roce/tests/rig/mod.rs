//! Two ends, a channel between them that loses, doubles, delays and damages packets, one virtual clock.
//!
//! Each end has a requester, a responder and memory that writes down every effect in order; packets travel as
//! sealed datagrams, so everything that a socket would carry is parsed and checked.

#![allow(dead_code, reason = "each test uses its part of the rig")]

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr};

use ibex_roce::requester::{
    Event, LocalFault, MessageId, Operation, Payload, Requester, RequesterConfig, ResponseSink,
};
use ibex_roce::responder::{Host, NoReceive, Received, Refusal, Responder, ResponderConfig};
use ibex_roce::wire::{Flow, Packet};
use ibex_roce::{AckTimeout, AtomicOp, Mtu, Nanos, Psn, QpNum, RemoteAddr, RemoteRange};

/// Key of the only registered range.
pub(crate) const RKEY: u32 = 0x1234_5678;
/// Where that range starts.
pub(crate) const BASE: u64 = 0x7f00_0000_1000;
/// Bytes that nobody writes, for READs.
pub(crate) const READ_ONLY: u32 = 8192;
/// Bytes of words for atomics, after those.
pub(crate) const WORDS: u32 = 64;
/// Bytes for WRITEs, after those.
pub(crate) const WRITABLE: u32 = 8192;
/// Length of the range.
pub(crate) const LEN: u32 = READ_ONLY + WORDS + WRITABLE;
/// Where WRITEs go.
pub(crate) const WRITE_BASE: u64 = BASE + (READ_ONLY + WORDS) as u64;
/// Where atomics go.
pub(crate) const WORD_BASE: u64 = BASE + READ_ONLY as u64;

/// A range of the registered memory.
pub(crate) const fn range(va: u64, len: u32) -> RemoteRange {
    RemoteRange { addr: RemoteAddr { va, rkey: RKEY }, len }
}

/// A small generator of numbers from a seed.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub u64);

impl Rng {
    /// SplitMix64 by Steele, Lea and Flood.
    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.draw() % limit.max(1)
    }

    pub(crate) fn chance(&mut self, ppm: u32) -> bool {
        self.below(1_000_000) < ppm.into()
    }
}

/// What the channel does to packets, in parts per million.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Faults {
    pub(crate) drop: u32,
    pub(crate) double: u32,
    pub(crate) delay: u32,
    pub(crate) corrupt: u32,
    /// Nothing passes between these times.
    pub(crate) cut: Option<(u64, u64)>,
}

/// What a request did at the responder's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    Write { va: u64, bytes: Vec<u8> },
    Open,
    Fill { offset: u32, bytes: Vec<u8> },
    Received(Received),
    Atomic { va: u64, op: AtomicOp, original: u64 },
}

/// Memory of one end, as its responder reaches it.
#[derive(Debug, Clone)]
pub(crate) struct Memory {
    pub(crate) bytes: Vec<u8>,
    pub(crate) effects: Vec<Effect>,
    /// Receives that are posted.
    pub(crate) receives: u32,
    pub(crate) refuse_reads: Option<Refusal>,
}

impl Memory {
    pub(crate) fn new(receives: u32) -> Self {
        let bytes = (0..LEN).map(|i| if i < READ_ONLY { pattern(u64::from(i), 0) } else { 0 }).collect();
        Self { bytes, effects: Vec::new(), receives, refuse_reads: None }
    }

    fn reach(&mut self, range: RemoteRange, offset: u32, len: usize) -> Result<&mut [u8], Refusal> {
        assert!(offset as usize + len <= range.len as usize, "an access outside its own range");
        let start = range.addr.va.checked_sub(BASE).ok_or(Refusal::RemoteAccess)?;
        let inside = start.checked_add(range.len.into()).is_some_and(|end| end <= LEN.into());
        if range.addr.rkey != RKEY || !inside {
            return Err(Refusal::RemoteAccess);
        }
        Ok(&mut self.bytes[start as usize + offset as usize..][..len])
    }
}

impl Host for Memory {
    fn write(&mut self, range: RemoteRange, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        self.reach(range, offset, bytes.len())?.copy_from_slice(bytes);
        let va = range.addr.va + u64::from(offset);
        self.effects.push(Effect::Write { va, bytes: bytes.to_vec() });
        Ok(())
    }

    fn check_read(&mut self, range: RemoteRange) -> Result<(), Refusal> {
        self.reach(range, 0, 0).map(|_| ())
    }

    fn read(&mut self, range: RemoteRange, offset: u32, into: &mut [u8]) -> Result<(), Refusal> {
        if let Some(refusal) = self.refuse_reads {
            return Err(refusal);
        }
        into.copy_from_slice(self.reach(range, offset, into.len())?);
        Ok(())
    }

    fn atomic(&mut self, on: RemoteAddr, op: AtomicOp) -> Result<u64, Refusal> {
        let word = self.reach(RemoteRange { addr: on, len: 8 }, 0, 8)?;
        let original = u64::from_le_bytes(word.try_into().expect("eight bytes"));
        word.copy_from_slice(&op.apply(original).to_le_bytes());
        self.effects.push(Effect::Atomic { va: on.va, op, original });
        Ok(original)
    }

    fn open_receive(&mut self) -> Result<(), NoReceive> {
        self.receives = self.receives.checked_sub(1).ok_or(NoReceive)?;
        self.effects.push(Effect::Open);
        Ok(())
    }

    fn fill_receive(&mut self, offset: u32, bytes: &[u8]) -> Result<(), Refusal> {
        self.effects.push(Effect::Fill { offset, bytes: bytes.to_vec() });
        Ok(())
    }

    fn complete_receive(&mut self, received: Received) -> Result<(), Refusal> {
        self.effects.push(Effect::Received(received));
        Ok(())
    }
}

/// Byte `at` of the payload of message `salt`.
pub(crate) fn pattern(at: u64, salt: u64) -> u8 {
    (at.wrapping_mul(31).wrapping_add(salt.wrapping_mul(151)) >> 1) as u8
}

/// Payload of messages, and what READs and atomics brought.
#[derive(Debug, Default, Clone)]
pub(crate) struct Local {
    pub(crate) placed: BTreeMap<u64, Vec<u8>>,
    pub(crate) originals: BTreeMap<u64, u64>,
    /// Messages whose local memory refuses.
    pub(crate) faulty: Vec<u64>,
}

impl Payload for Local {
    fn read(&mut self, id: MessageId, offset: u32, into: &mut [u8]) -> Result<(), LocalFault> {
        if self.faulty.contains(&id.0) {
            return Err(LocalFault);
        }
        for (i, byte) in into.iter_mut().enumerate() {
            *byte = pattern(u64::from(offset) + i as u64, id.0);
        }
        Ok(())
    }
}

impl ResponseSink for Local {
    fn place(&mut self, id: MessageId, offset: u32, bytes: &[u8]) -> Result<(), LocalFault> {
        if self.faulty.contains(&id.0) {
            return Err(LocalFault);
        }
        let placed = self.placed.entry(id.0).or_default();
        assert_eq!(placed.len(), offset as usize, "READ data comes in order, each byte once");
        placed.extend_from_slice(bytes);
        Ok(())
    }

    fn original(&mut self, id: MessageId, word: u64) -> Result<(), LocalFault> {
        if self.faulty.contains(&id.0) {
            return Err(LocalFault);
        }
        let before = self.originals.insert(id.0, word);
        assert_eq!(before, None, "an atomic completes once");
        Ok(())
    }
}

/// One end of the connection.
#[derive(Debug)]
pub(crate) struct End {
    pub(crate) requester: Requester,
    pub(crate) responder: Responder,
    pub(crate) memory: Memory,
    pub(crate) local: Local,
    /// Messages to be posted.
    pub(crate) to_post: VecDeque<Operation>,
    posted: u64,
    pub(crate) events: Vec<Event>,
}

/// Both ends and the channel.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) ends: [End; 2],
    pub(crate) now: Nanos,
    faults: Faults,
    rng: Rng,
    /// Packets on their way: when they arrive, in which order they were sent, to which end.
    flying: BTreeMap<(Nanos, u64), (usize, Vec<u8>)>,
    num_sent: u64,
    /// Time between two posted receives.
    receive_every: u64,
    next_receive: Nanos,
    mtu: Mtu,
    pub(crate) num_damaged: u64,
}

/// What both ends of a pair agree on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) mtu: Mtu,
    pub(crate) first_psn: u32,
    pub(crate) window: u32,
    pub(crate) ack_every: u32,
    pub(crate) max_reads: u8,
    pub(crate) retry_count: u8,
    pub(crate) first_timeout: Option<Nanos>,
    pub(crate) rnr_retry: u8,
    pub(crate) receive_every: u64,
}

impl Default for Shape {
    fn default() -> Self {
        Self {
            mtu: Mtu::B256,
            first_psn: 0xff_fff0,
            window: 32,
            ack_every: 8,
            max_reads: 2,
            // More than the wire allows, so that patience never runs out where a test is not about that.
            retry_count: u8::MAX,
            first_timeout: None,
            rnr_retry: RequesterConfig::RNR_RETRY_FOREVER,
            receive_every: 20_000,
        }
    }
}

impl Shape {
    pub(crate) fn requester(&self) -> RequesterConfig {
        RequesterConfig {
            window_packets: self.window,
            ack_every: self.ack_every,
            max_reads: self.max_reads,
            retry_count: self.retry_count,
            first_timeout: self.first_timeout,
            rnr_retry: self.rnr_retry,
            ack_timeout: AckTimeout::new(6),
            ..RequesterConfig::new(QpNum::new(7), self.mtu, Psn::new(self.first_psn))
        }
    }

    pub(crate) fn responder(&self) -> ResponderConfig {
        ResponderConfig {
            max_reads: self.max_reads,
            min_rnr_timer: ibex_roce::RnrTimer::new(1),
            ..ResponderConfig::new(QpNum::new(7), self.mtu, Psn::new(self.first_psn))
        }
    }
}

const FLOWS: [Flow; 2] = [flow(1, 2), flow(2, 1)];

const fn flow(src: u8, dst: u8) -> Flow {
    match Flow::new(addr(src), addr(dst), 0xc000) {
        Some(flow) => flow,
        None => panic!("both addresses are IPv4"),
    }
}

const fn addr(last: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, last))
}

impl Pair {
    pub(crate) fn new(shape: Shape, faults: Faults, seed: u64, messages: [Vec<Operation>; 2]) -> Self {
        let ends = messages.map(|messages| End {
            requester: Requester::new(shape.requester()),
            responder: Responder::new(shape.responder()),
            memory: Memory::new(1),
            local: Local::default(),
            to_post: messages.into(),
            posted: 0,
            events: Vec::new(),
        });
        Self {
            ends,
            now: Nanos(0),
            faults,
            rng: Rng(seed),
            flying: BTreeMap::new(),
            num_sent: 0,
            receive_every: shape.receive_every,
            next_receive: Nanos(shape.receive_every),
            mtu: shape.mtu,
            num_damaged: 0,
        }
    }

    /// Runs until every message has its event, and nothing is on its way.
    pub(crate) fn run(&mut self) {
        for _ in 0..1_000_000 {
            self.act();
            if self.is_over() {
                return;
            }
            self.wait();
        }
        panic!("no end in sight at {:?}", self.now);
    }

    fn is_over(&self) -> bool {
        let done = |end: &End| end.to_post.is_empty() && end.requester.outstanding() == 0;
        self.ends.iter().all(done) && self.flying.is_empty()
    }

    /// Everything that can be done now.
    fn act(&mut self) {
        for at in 0..2 {
            let end = &mut self.ends[at];
            end.requester.handle_timeout(self.now);
            while let Some(op) = end.to_post.front() {
                match end.requester.post(MessageId(end.posted), *op) {
                    Ok(()) => {
                        end.to_post.pop_front();
                        end.posted += 1;
                    }
                    Err(ibex_roce::requester::PostError::Full { .. }) => break,
                    Err(_) => end.to_post.clear(),
                }
            }
            self.transmit(at);
        }
    }

    fn transmit(&mut self, at: usize) {
        let mut out = vec![0xa5; self.mtu.packet_len_max()];
        loop {
            let end = &mut self.ends[at];
            // Answers first, or packet by packet in turn; both are legal.
            let mut len = end.responder.poll_transmit(&mut end.memory, &mut out).map(|sent| sent.len);
            if len.is_none() {
                let sent = end.requester.poll_transmit(self.now, &mut end.local, &mut out);
                len = sent.map(|sent| sent.len);
            }
            while let Some(event) = end.requester.poll_event() {
                end.events.push(event);
            }
            let Some(len) = len else { return };
            FLOWS[at].seal(&mut out[..len]).expect("a packet");
            self.launch(1 - at, &out[..len]);
        }
    }

    /// Gives a datagram to the channel.
    fn launch(&mut self, to: usize, datagram: &[u8]) {
        let copies = 1 + u64::from(self.rng.chance(self.faults.double));
        let cut = self.faults.cut.is_some_and(|(from, until)| (from..until).contains(&self.now.0));
        for _ in 0..copies {
            if cut || self.rng.chance(self.faults.drop) {
                continue;
            }
            let mut datagram = datagram.to_vec();
            if self.rng.chance(self.faults.corrupt) {
                let bit = self.rng.below(8 * datagram.len() as u64) as usize;
                datagram[bit / 8] ^= 1 << (bit % 8);
            }
            let mut delay = 1_000 + self.num_sent % 7;
            if self.rng.chance(self.faults.delay) {
                delay += self.rng.below(30_000);
            }
            self.num_sent += 1;
            self.flying.insert((self.now.plus(delay), self.num_sent), (to, datagram));
        }
    }

    /// Goes to the next time at which anything happens.
    fn wait(&mut self) {
        let timeouts = self.ends.iter().filter_map(|end| end.requester.poll_timeout());
        let arrival = self.flying.keys().next().map(|(at, _)| *at);
        let next = timeouts.chain(arrival).chain([self.next_receive]).min().expect("receives come for ever");
        self.now = self.now.max(next);
        if self.next_receive <= self.now {
            self.next_receive = self.now.plus(self.receive_every);
            self.ends.iter_mut().for_each(|end| end.memory.receives += 1);
        }
        while let Some(entry) = self.flying.first_entry()
            && entry.key().0 <= self.now
        {
            let (to, datagram) = entry.remove();
            self.deliver(to, &datagram);
        }
    }

    fn deliver(&mut self, to: usize, datagram: &[u8]) {
        let Ok(bytes) = FLOWS[1 - to].open(datagram) else {
            self.num_damaged += 1;
            return;
        };
        let packet = Packet::parse(bytes).expect("a packet whose check sum holds");
        let end = &mut self.ends[to];
        if packet.bth().opcode.is_request() {
            end.responder.handle_packet(&packet, &mut end.memory);
        } else {
            end.requester.handle_packet(self.now, &packet, &mut end.local);
        }
    }
}

/// The effects that messages have if each is carried out once, in order.
pub(crate) fn effects_of(messages: &[Operation], mtu: Mtu) -> Vec<Vec<Effect>> {
    let mut words = BTreeMap::new();
    let of = |(id, op): (usize, &Operation)| effects_of_one(id as u64, op, mtu, &mut words);
    messages.iter().enumerate().map(of).collect()
}

fn effects_of_one(id: u64, op: &Operation, mtu: Mtu, words: &mut BTreeMap<u64, u64>) -> Vec<Effect> {
    let bytes: Vec<u8> = (0..u64::from(op.len())).map(|at| pattern(at, id)).collect();
    let chunks = bytes.chunks(mtu.bytes() as usize).enumerate();
    let mut effects = Vec::new();
    match *op {
        Operation::Write { to, imm, solicited } => {
            let at = |i: usize| to.addr.va + i as u64 * u64::from(mtu.bytes());
            effects.extend(chunks.map(|(i, chunk)| Effect::Write { va: at(i), bytes: chunk.to_vec() }));
            if imm.is_some() {
                let last = effects.len().saturating_sub(1);
                effects.insert(last, Effect::Open);
                let received = Received { len: to.len, imm, solicited, is_write: true };
                effects.push(Effect::Received(received));
            }
        }
        Operation::Send { len, imm, solicited } => {
            effects.push(Effect::Open);
            let at = |i: usize| i as u32 * mtu.bytes();
            effects.extend(chunks.map(|(i, chunk)| Effect::Fill { offset: at(i), bytes: chunk.to_vec() }));
            effects.push(Effect::Received(Received { len, imm, solicited, is_write: false }));
        }
        Operation::Read { .. } => {}
        Operation::Atomic { on, op } => {
            let word = words.entry(on.va).or_insert(0);
            effects.push(Effect::Atomic { va: on.va, op, original: *word });
            *word = op.apply(*word);
        }
    }
    effects
}
