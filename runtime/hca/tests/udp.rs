//! The udp fabric: who it admits, what paths it offers, what its exits do to packets, what it leaves behind.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::io::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::PathMtu;
use ibex_abi::wqe::CtrlFlags;
use ibex_hca::emulated::switch::{Fault, FaultCounts, FaultPlan, FaultRule, PlanLimit};
use ibex_hca::emulated::{
    AdvertError, Capture, Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig, UdpConfig,
};
use ibex_hca::host_qp::ConnectSpec;
use ibex_hca::{Hca, HcaError, LinkLayer, Nanos};
use rig::{End, Setup, connect, device, gather, write};

fn config() -> UdpConfig {
    let bind: SocketAddr = "127.0.0.1:0".parse().unwrap();
    UdpConfig { bind, ..UdpConfig::new(bind.ip()) }
}

fn port(config: UdpConfig) -> Arc<EmulatedHca> {
    device(&Fabric::udp(config).unwrap(), Doorbells::Strict)
}

fn advert(device: &EmulatedHca) -> Vec<u8> {
    device.fabric().advert(device.port_id()).unwrap()
}

fn introduce(devices: &[Arc<EmulatedHca>; 2]) {
    devices[0].fabric().admit(&advert(&devices[1])).unwrap();
    devices[1].fabric().admit(&advert(&devices[0])).unwrap();
}

#[test]
fn a_path_has_the_smallest_mtu_of_both_ports_and_the_route() {
    let devices = [port(config()), port(UdpConfig { mtu: PathMtu::B1024, ..config() })];
    let far = devices[1].port().address();
    assert!(matches!(devices[0].resolve(&far), Err(HcaError::Unreachable { .. })), "not admitted yet");
    introduce(&devices);
    assert_eq!(devices[0].resolve(&far).unwrap().mtu, PathMtu::B1024);
    assert_eq!(devices[1].resolve(&devices[0].port().address()).unwrap().mtu, PathMtu::B1024);
    assert_eq!(devices[0].resolve(&devices[0].port().address()).unwrap().mtu, PathMtu::B4096, "to itself");
}

#[test]
fn adverts_that_are_none_are_refused_and_change_nothing() {
    let device = port(config());
    let other = port(config());
    let good = advert(&other);
    let refused = |bytes: &[u8]| match device.fabric().admit(bytes) {
        Err(HcaError::Advert(error)) => error,
        outcome => panic!("{outcome:?}"),
    };
    for len in 0..good.len() {
        assert!(matches!(refused(&good[..len]), AdvertError::Malformed { .. }), "{len} bytes");
    }
    let changed = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        refused(&bytes)
    };
    assert!(matches!(changed(4, 99), AdvertError::Version { found: 99, .. }));
    assert!(matches!(changed(5, 1), AdvertError::Kind { found: 1, wanted: 2 }));
    assert!(matches!(changed(6, 0), AdvertError::Malformed { .. }), "an InfiniBand port");
    assert!(matches!(refused(&advert(&device)), AdvertError::AddressTaken { port: 0 }));
    device.fabric().admit(&good).unwrap();
    assert!(matches!(refused(&good), AdvertError::AddressTaken { port: 1 }));
    match Fabric::udp(UdpConfig { bind: "[::1]:0".parse().unwrap(), ..config() }) {
        Ok(fabric) => {
            let six = advert(&self::device(&fabric, Doorbells::Strict));
            assert!(matches!(device.fabric().admit(&six), Err(HcaError::Unreachable { .. })));
        }
        // Straight to stderr: the runner hides what a passing test prints.
        Err(error) => _ = writeln!(std::io::stderr(), "SKIPPED: no socket on ::1: {error}"),
    }
    let inproc = Fabric::inproc(FabricConfig::default());
    assert!(matches!(inproc.admit(&good), Err(HcaError::Advert(AdvertError::Local))));
}

#[test]
fn what_a_socket_cannot_be_is_refused_before_anything_is_made() {
    let fabric = Fabric::udp(config()).unwrap();
    let ib = EmulatedConfig { link: LinkLayer::Ib, ..EmulatedConfig::default() };
    assert!(matches!(EmulatedHca::new(Arc::clone(&fabric), ib), Err(HcaError::Unreachable { .. })));
    let fabric = Fabric::udp(config()).unwrap();
    let _one = device(&fabric, Doorbells::Strict);
    let another = EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default());
    assert!(matches!(another, Err(HcaError::Exhausted { limit: 1, .. })));
    let (taken, offloads) = fabric.socket().unwrap();
    println!("{offloads:?}");
    let again = Fabric::udp(UdpConfig { bind: taken, ..config() });
    assert!(matches!(again, Err(HcaError::Os { call: "bind", errno: libc::EADDRINUSE })));
    let rules = vec![FaultRule::always(Fault::Drop { ppm: 1_000_001 })];
    let faults = Some(FaultPlan { seed: 1, rules });
    let limit = Fabric::udp(UdpConfig { faults, ..config() }).map(|_| ());
    assert!(matches!(limit, Err(HcaError::Plan(PlanLimit::OutOfRange { field: "ppm", .. }))));
}

#[test]
fn faults_at_the_exits_delay_work_and_lose_none() {
    let plan = |seed| {
        let ppm = 100_000;
        let rules = [
            Fault::Drop { ppm },
            Fault::Duplicate { ppm },
            Fault::Corrupt { ppm },
            Fault::Reorder { ppm, overtake_max: 3, hold_us: 200 },
            Fault::Delay { ppm, min_us: 1, max_us: 100 },
        ];
        Some(FaultPlan { seed, rules: rules.map(FaultRule::always).to_vec() })
    };
    let devices = [0, 1].map(|node| port(UdpConfig { node, faults: plan(u64::from(node)), ..config() }));
    introduce(&devices);
    let spec = ConnectSpec { ack_timeout: 9, mtu: PathMtu::B1024, ..ConnectSpec::default() };
    let mut ends = connect(&devices, Setup { connect: spec, ..Setup::default() });
    let [near, far] = &mut ends;
    let mut now = 0;
    for nth in 0..200_u64 {
        // CAST: the low byte tells neighbours apart.
        near.put(0, &[nth as u8; 7168]);
        near.qp.post(CtrlFlags::SIGNALED, write(far.remote(8192), gather(&[near.data(0, 7168)]))).unwrap();
        let completion = loop {
            assert!(now < 600_000_000_000, "message {nth} never completes");
            devices.iter().for_each(|device| _ = device.step(Nanos(now)));
            if let Some(completion) = near.qp.poll() {
                break completion;
            }
            now += 20_000;
        };
        assert_eq!(completion.syndrome(), None, "message {nth}");
        assert_eq!(far.get(8192, 7168), [nth as u8; 7168], "message {nth}");
    }
    let counts = devices[0].fabric().fault_counts().unwrap();
    println!("{counts:#?}");
    let happened = [counts.dropped, counts.duplicated, counts.corrupted, counts.reordered, counts.delayed];
    assert!(happened.iter().all(|count| *count >= 20), "{counts:?}");
    let arrived = devices[1].counters().packets;
    // A damaged packet may be duplicated.
    assert!((10..=2 * counts.corrupted).contains(&arrived.bad_icrc), "{arrived:?}");
}

const MILLI: u64 = 1_000_000;

/// Two devices under one plan, a connection between them, and the clock of both.
struct Pair {
    devices: [Arc<EmulatedHca>; 2],
    ends: [End; 2],
    now: u64,
}

impl Pair {
    /// `ack_timeout` is 4.096 us * 2^this; there are eight tries.
    fn under(rule: FaultRule, ack_timeout: u8) -> Self {
        let plan = FaultPlan { seed: 1, rules: vec![rule] };
        let devices = [0, 1].map(|node| port(UdpConfig { node, faults: Some(plan.clone()), ..config() }));
        introduce(&devices);
        Self::of(devices, ack_timeout)
    }

    fn of(devices: [Arc<EmulatedHca>; 2], ack_timeout: u8) -> Self {
        let spec = ConnectSpec { ack_timeout, retry_count: 7, mtu: PathMtu::B1024, ..ConnectSpec::default() };
        let ends = connect(&devices, Setup { connect: spec, ..Setup::default() });
        Self { devices, ends, now: 0 }
    }

    /// Lets a millisecond pass; what is on its way in the kernel gets the time it needs.
    fn tick(&mut self) {
        for device in &self.devices {
            device.step(Nanos(self.now));
            device.fabric().wait_for_arrivals(20_000);
        }
        self.now += MILLI;
    }

    fn pass_until(&mut self, at: u64) {
        while self.now < at {
            self.tick();
        }
    }

    /// Posts a WRITE of `byte` from the front of one end's buffer behind it in the other's.
    fn post(&mut self, end: usize, byte: u8) {
        self.ends[end].put(0, &[byte; 7168]);
        let request = write(self.ends[1 - end].remote(8192), gather(&[self.ends[end].data(0, 7168)]));
        self.ends[end].qp.post(CtrlFlags::SIGNALED, request).unwrap();
    }

    /// Whether the other end has got a WRITE of `byte`.
    fn arrived(&self, end: usize, byte: u8) -> bool {
        self.ends[1 - end].get(8192, 7168) == [byte; 7168]
    }

    fn finish(&mut self, end: usize) {
        let give_up = self.now + 10_000 * MILLI;
        let completion = loop {
            if let Some(completion) = self.ends[end].qp.poll() {
                break completion;
            }
            assert!(self.now < give_up, "a WRITE of end {end} never completes");
            self.tick();
        };
        assert_eq!(completion.syndrome(), None);
    }

    fn counts(&self, end: usize) -> FaultCounts {
        self.devices[end].fabric().fault_counts().unwrap()
    }
}

#[test]
fn a_partition_of_one_direction_stops_that_direction_while_it_lasts() {
    let rule = FaultRule {
        src: Some(0),
        dst: Some(1),
        from_us: 100_000,
        to_us: Some(300_000),
        ..FaultRule::always(Fault::Partition)
    };
    // A try every 34 ms.
    let mut pair = Pair::under(rule, 13);
    pair.post(0, 1);
    pair.finish(0);
    assert!(pair.now < 100 * MILLI && pair.arrived(0, 1), "nothing is wrong yet");
    pair.pass_until(150 * MILLI);
    pair.post(0, 2);
    pair.post(1, 3);
    pair.pass_until(290 * MILLI);
    assert!(pair.arrived(1, 3), "the other direction carries requests");
    assert!(pair.arrived(0, 1), "this one does not");
    assert!((0..2).all(|end| pair.ends[end].qp.poll().is_none()), "nor does it carry answers");
    (0..2).for_each(|end| pair.finish(end));
    assert!(pair.now >= 300 * MILLI && pair.arrived(0, 2));
    let lost = [0, 1].map(|end| pair.counts(end).partitioned);
    assert!(lost[0] > 7 && lost[1] == 0, "{lost:?}");
}

/// A partition of one direction, and traffic in both.
const ONE_PLAN: &str = r#"{ "seed": 3, "rules": [
    { "src": 0, "dst": 1, "from_us": 100000, "to_us": 300000, "fault": "partition" } ] }"#;

#[test]
fn one_plan_means_the_same_between_sockets_and_in_a_simulated_switch() {
    let plan = FaultPlan::from_json(ONE_PLAN).unwrap();
    let sockets = [0, 1].map(|node| port(UdpConfig { node, faults: Some(plan.clone()), ..config() }));
    introduce(&sockets);
    let switched = Fabric::switched(FabricConfig::default(), plan).unwrap();
    let simulated = [0, 1].map(|_| device(&switched, Doorbells::Strict));
    for mut pair in [sockets, simulated].map(|devices| Pair::of(devices, 13)) {
        pair.pass_until(150 * MILLI);
        pair.post(0, 2);
        pair.post(1, 3);
        pair.pass_until(290 * MILLI);
        assert!(pair.arrived(1, 3) && !pair.arrived(0, 2), "one direction is cut");
        assert!(pair.counts(0).partitioned > 7);
        (0..2).for_each(|end| pair.finish(end));
        assert!(pair.arrived(0, 2));
    }
}

/// A rank's next process may sit elsewhere, and the one after it where the first one sat: plans know one node.
#[test]
fn packets_that_pass_a_switch_reach_the_port_that_is_meant_of_several_of_a_node() {
    let near = port(UdpConfig { node: 0, faults: Some(FaultPlan::default()), ..config() });
    let others = [0, 1, 2, 3].map(|_| port(UdpConfig { node: 1, ..config() }));
    others.iter().for_each(|far| introduce(&[Arc::clone(&near), Arc::clone(far)]));
    for far in others {
        let mut pair = Pair::of([Arc::clone(&near), far], 13);
        pair.post(0, 1);
        pair.finish(0);
        assert!(pair.arrived(0, 1));
    }
}

/// As a process does that is killed there: the far end has the first part of a message and never the rest.
#[test]
fn a_port_can_end_within_a_message() {
    let devices = [0, 1].map(|node| port(UdpConfig { node, ..config() }));
    introduce(&devices);
    let mut pair = Pair::of(devices, 8);
    pair.post(0, 1);
    pair.finish(0);
    pair.devices[0].fabric().end_within_message().unwrap();
    assert!(!pair.devices[0].fabric().has_ended(), "no message has begun");
    pair.post(0, 2);
    pair.pass_until(pair.now + 1000 * MILLI);
    assert!(pair.devices[0].fabric().has_ended());
    let far = pair.ends[1].get(8192, 7168);
    assert!(far[..1024] == [2; 1024] && far[1024..] == [1; 6144], "a packet of seven has arrived");
    assert_eq!(pair.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::TRANSPORT_RETRY_EXC));
    pair.post(1, 3);
    pair.pass_until(pair.now + 1000 * MILLI);
    assert_eq!(pair.ends[1].qp.poll().unwrap().syndrome(), Some(Syndrome::TRANSPORT_RETRY_EXC), "no answer");
    let refused = Fabric::inproc(FabricConfig::default()).end_within_message();
    assert!(matches!(refused, Err(HcaError::Unreachable { .. })));
}

#[test]
fn a_path_that_is_cut_gets_every_packet_of_every_try() {
    let mut pair = Pair::under(FaultRule::always(Fault::Partition), 8);
    pair.post(0, 1);
    pair.post(0, 2);
    pair.pass_until(1000 * MILLI);
    let outcomes = [0, 1].map(|_| pair.ends[0].qp.poll().unwrap().syndrome());
    assert_eq!(outcomes, [Some(Syndrome::TRANSPORT_RETRY_EXC), Some(Syndrome::WR_FLUSH)]);
    // One try and seven more, of two messages of seven packets.
    assert_eq!(pair.devices[0].counters().packets.sent, 8 * 14);
}

#[test]
fn a_link_that_flaps_loses_packets_and_no_work() {
    let rule = FaultRule::always(Fault::Flap { up_us: 20_000, down_us: 20_000 });
    // A try every 17 ms: never all of them while the link is down.
    let mut pair = Pair::under(rule, 12);
    for nth in 0..100 {
        pair.post(0, nth);
        pair.finish(0);
        assert!(pair.arrived(0, nth), "message {nth}");
    }
    let lost = pair.counts(0).flapped + pair.counts(1).flapped;
    assert!(lost >= 5, "{lost} packets lost in {} ms", pair.now / MILLI);
}

#[test]
fn a_path_of_a_limited_rate_takes_its_time() {
    let rule = FaultRule {
        src: Some(0),
        ..FaultRule::always(Fault::RateLimit { bytes_per_s: 10_000_000, queue_bytes: 200_000 })
    };
    let mut pair = Pair::under(rule, 16);
    (0..16).for_each(|nth| pair.post(0, nth));
    (0..16).for_each(|_| pair.finish(0));
    assert!(pair.now >= 16 * 7168 * 100, "{} ms", pair.now / MILLI);
    let counts = pair.counts(0);
    assert!(counts.paced >= 100 && counts.overflowed == 0, "{counts:?}");
}

#[test]
fn nothing_stays_open_when_a_fabric_is_gone() {
    let open = || std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    let path = std::env::temp_dir().join(format!("ibex-udp-{}.pcapng", std::process::id()));
    // Other tests of this process come and go: a leak shows as growth that repeats.
    let mut left = Vec::new();
    for _ in 0..4 {
        let before = open();
        for _ in 0..64 {
            let devices = [port(config()), port(config())];
            introduce(&devices);
            let capture = Arc::new(Capture::create(&path, Nanos(0)).unwrap());
            devices[0].fabric().capture_to(&capture);
            let _ends = connect(&devices, Setup::default());
        }
        left.push(open().saturating_sub(before));
    }
    std::fs::remove_file(&path).unwrap();
    assert!(left.iter().any(|grown| *grown < 64), "{left:?} descriptors stayed open");
}
