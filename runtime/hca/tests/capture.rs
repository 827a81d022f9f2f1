//! What a capture of a fabric holds: real frames where there are some, made-up ones elsewhere.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::path::PathBuf;
use std::sync::Arc;

use ibex_abi::wqe::{AtomicOp, CtrlFlags, Request};
use ibex_hca::Nanos;
use ibex_hca::emulated::switch::FaultPlan;
use ibex_hca::emulated::{Capture, Doorbells, EmulatedHca, Fabric, FabricConfig, UdpConfig};
use ibex_roce::wire::{Class, Frame, Opcode, Packet};
use rig::{End, Setup, connect, device, gather, shm_rig, write};

/// A file that goes away.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("ibex-{name}-{}.pcapng", std::process::id())))
    }

    /// The frames: interface, stamp, bytes.
    fn frames(&self) -> Vec<(u32, u64, Vec<u8>)> {
        let bytes = std::fs::read(&self.0).unwrap();
        let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let (mut at, mut frames) = (0, Vec::new());
        while at < bytes.len() {
            let total = word(at + 4) as usize;
            if word(at) == 6 {
                let stamp = u64::from(word(at + 12)) << 32 | u64::from(word(at + 16));
                frames.push((word(at + 8), stamp, bytes[at + 28..at + 28 + word(at + 20) as usize].to_vec()));
            }
            at += total;
        }
        frames
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Opcodes of all frames, each checked down to its ICRC.
fn opcodes(frames: &[(u32, u64, Vec<u8>)]) -> Vec<Opcode> {
    let opcode = |(_, _, bytes): &(u32, u64, Vec<u8>)| {
        let (frame, datagram) = Frame::parse_ethernet(bytes).unwrap();
        Packet::parse(frame.flow.open(datagram).unwrap()).unwrap().bth().opcode
    };
    frames.iter().map(opcode).collect()
}

/// A WRITE of two packets, a READ of two packets, an atomic, a SEND that finds no receive.
fn work(ends: &mut [End; 2], mut settle: impl FnMut()) {
    let [near, far] = ends;
    near.put(0, &[7; 7168]);
    near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), gather(&[near.data(0, 7168)]))).unwrap();
    settle();
    let scatter = vec![near.data(8192, 5000)];
    near.qp.post(CtrlFlags::SIGNALED, Request::Read { remote: far.remote(0), scatter }).unwrap();
    settle();
    let (op, result) = (AtomicOp::FetchAdd { add: 1 }, near.data(16384, 8));
    near.qp.post(CtrlFlags::SIGNALED, Request::Atomic { remote: far.remote(0), op, result }).unwrap();
    settle();
    for _ in 0..3 {
        assert_eq!(near.qp.poll().unwrap().syndrome(), None);
    }
    near.qp.post(CtrlFlags::SIGNALED, Request::Send { payload: gather(&[near.data(0, 10)]) }).unwrap();
    settle();
}

const EXPECTED: [u8; 9] = [0x06, 0x08, 0x11, 0x0c, 0x0d, 0x0f, 0x14, 0x12, 0x04];

fn check(scratch: &Scratch, interface: u32) {
    let frames = scratch.frames();
    let seen: Vec<u8> = opcodes(&frames).iter().map(|opcode| opcode.byte()).collect();
    assert_eq!(seen[..9], EXPECTED);
    assert_eq!(seen[9], 0x11, "the answer that nobody is ready");
    assert!(frames.iter().all(|(on, stamp, _)| *on == interface && *stamp >= 1_000));
}

#[test]
fn messages_within_a_process_are_made_up_as_frames() {
    let scratch = Scratch::new("inproc");
    let capture = Arc::new(Capture::create(&scratch.0, Nanos(1_000)).unwrap());
    let fabric = Fabric::inproc(FabricConfig::default());
    let devices = [0, 1].map(|_| device(&fabric, Doorbells::Strict));
    fabric.capture_to(&capture);
    let mut ends = connect(&devices, Setup::default());
    work(&mut ends, || while devices.iter().any(|device| device.step(Nanos(5)).did_work) {});
    assert_eq!(capture.flush().unwrap() as usize, scratch.frames().len());
    check(&scratch, 1);
}

#[test]
fn messages_through_shared_memory_are_made_up_as_frames() {
    let scratch = Scratch::new("shm");
    let capture = Arc::new(Capture::create(&scratch.0, Nanos(1_000)).unwrap());
    let mut rig = shm_rig(Setup::default());
    // One end sees both directions.
    rig.fabric.capture_to(&capture);
    let devices = rig.ends.each_ref().map(|end| Arc::clone(&end.device));
    work(&mut rig.ends, || while devices.iter().any(|device| device.step(Nanos(5)).did_work) {});
    capture.flush().unwrap();
    check(&scratch, 1);
}

#[test]
fn frames_through_a_switch_are_captured_as_they_are_sent() {
    let scratch = Scratch::new("switched");
    let capture = Arc::new(Capture::create(&scratch.0, Nanos(1_000)).unwrap());
    let fabric = Fabric::switched(FabricConfig::default(), FaultPlan::default()).unwrap();
    let devices = [0, 1].map(|_| device(&fabric, Doorbells::Strict));
    fabric.capture_to(&capture);
    let mut ends = connect(&devices, Setup::default());
    let mut now = 0;
    work(&mut ends, || {
        for _ in 0..8 {
            devices.iter().for_each(|device| _ = device.step(Nanos(now)));
            now += 1_000;
        }
    });
    capture.flush().unwrap();
    check(&scratch, 0);
}

#[test]
fn packets_through_sockets_are_captured_with_the_headers_of_the_wire() {
    let scratch = Scratch::new("udp");
    let capture = Arc::new(Capture::create(&scratch.0, Nanos(1_000)).unwrap());
    let devices: [Arc<EmulatedHca>; 2] = [0, 1].map(|_| {
        let bind = "127.0.0.1:0".parse().unwrap();
        let fabric = Fabric::udp(UdpConfig { bind, ..UdpConfig::new(bind.ip()) }).unwrap();
        device(&fabric, Doorbells::Strict)
    });
    let adverts = [0, 1].map(|end: usize| devices[end].fabric().advert(devices[end].port_id()).unwrap());
    devices[0].fabric().admit(&adverts[1]).unwrap();
    devices[1].fabric().admit(&adverts[0]).unwrap();
    // One end sees both directions.
    devices[0].fabric().capture_to(&capture);
    let mut ends = connect(&devices, Setup::default());
    work(&mut ends, || {
        for _ in 0..100 {
            devices.iter().for_each(|device| {
                device.fabric().wait_for_arrivals(10_000);
                device.step(Nanos(5));
            });
        }
    });
    capture.flush().unwrap();
    check(&scratch, 0);
    let answers = opcodes(&scratch.frames()).iter().filter(|op| op.class() == Class::Ack).count();
    assert!(answers >= 2);
}
