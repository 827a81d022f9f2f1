//! The contract suite over every provider there is: the emulated device on both link layers, strict and
//! by record, and the same behind a fault injector that injects nothing.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

use std::io::Write;
use std::sync::Arc;

use ibex_hca::contract::{CASES, World};
use ibex_hca::emulated::switch::FaultPlan;
use ibex_hca::emulated::{
    Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig, Placement, ShmConfig, UdpConfig,
};
use ibex_hca::{Hca, LinkLayer, Nanos};

struct Emulated {
    hcas: [Arc<EmulatedHca>; 2],
    now: Nanos,
}

impl Emulated {
    fn new(link: LinkLayer, doorbells: Doorbells) -> Self {
        Self::on(FabricConfig::default(), link, doorbells)
    }

    fn on(fabric: FabricConfig, link: LinkLayer, doorbells: Doorbells) -> Self {
        let fabric = Fabric::inproc(fabric);
        let config = EmulatedConfig { link, doorbells, ..EmulatedConfig::default() };
        let hcas = [0, 1].map(|_| EmulatedHca::new(Arc::clone(&fabric), config).unwrap());
        Self { hcas, now: Nanos(0) }
    }

    /// Each device on a fabric of its own, as in two processes.
    fn shared_memory(link: LinkLayer, doorbells: Doorbells) -> Self {
        let fabric = |first_port| Fabric::shm(ShmConfig { first_port, ..ShmConfig::default() }).unwrap();
        let config = EmulatedConfig { link, doorbells, ..EmulatedConfig::default() };
        let hcas = [0, 1].map(|nth| EmulatedHca::new(fabric(nth), config).unwrap());
        for end in [0, 1] {
            let other = &hcas[1 - end];
            hcas[end].fabric().admit(&other.fabric().advert(other.port_id()).unwrap()).unwrap();
        }
        Self { hcas, now: Nanos(0) }
    }
}

impl World for Emulated {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        Arc::clone(&self.hcas[end]) as Arc<dyn Hca>
    }

    fn settle(&mut self, nanos: u64) {
        let end = self.now.plus(nanos);
        loop {
            let steps = [0, 1].map(|device: usize| self.hcas[device].step(self.now));
            if steps.iter().any(|step| step.did_work) {
                continue;
            }
            match steps.iter().filter_map(|step| step.next_deadline).min() {
                Some(at) if at <= end => self.now = at,
                _ => break,
            }
        }
    }
}

#[test]
fn an_ethernet_device_with_strict_doorbells_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Emulated::new(LinkLayer::Roce, Doorbells::Strict));
    }
}

#[test]
fn an_infiniband_device_driven_by_records_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Emulated::new(LinkLayer::Ib, Doorbells::Record));
    }
}

#[test]
fn devices_on_shared_memory_keep_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Emulated::shared_memory(LinkLayer::Roce, Doorbells::Strict));
        case(&mut Emulated::shared_memory(LinkLayer::Ib, Doorbells::Record));
    }
}

/// The same devices, stepped one small piece at a time in an order that a seed chooses.
struct Seeded {
    devices: Emulated,
    state: u64,
}

impl Seeded {
    /// A number below `n`. SplitMix64.
    fn draw(state: &mut u64, n: u32) -> u32 {
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = *state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // CAST: the remainder is below `n`.
        ((z ^ (z >> 31)) % u64::from(n)) as u32
    }
}

impl World for Seeded {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        self.devices.hca(end)
    }

    fn settle(&mut self, nanos: u64) {
        let end = self.devices.now.plus(nanos);
        let mut idle = [false; 2];
        let mut deadlines = [None; 2];
        loop {
            let device = Self::draw(&mut self.state, 2) as usize;
            let state = &mut self.state;
            let now = self.devices.now;
            let step = self.devices.hcas[device].step_seeded(now, &mut |n| Self::draw(state, n));
            idle = if step.did_work { [false; 2] } else { idle };
            idle[device] = !step.did_work;
            deadlines[device] = step.next_deadline;
            if idle != [true; 2] {
                continue;
            }
            match deadlines.iter().flatten().min() {
                Some(at) if *at <= end => (self.devices.now, idle) = (*at, [false; 2]),
                _ => break,
            }
        }
    }
}

fn seeded_suite(placement: Placement, seeds: std::ops::Range<u64>) {
    for seed in seeds {
        println!("seed {seed}");
        for (name, case) in CASES {
            println!("{name}");
            let config = FabricConfig { placement, ..FabricConfig::default() };
            let devices = Emulated::on(config, LinkLayer::Roce, Doorbells::Strict);
            case(&mut Seeded { devices, state: seed });
        }
    }
}

#[test]
fn a_device_stepped_in_pieces_keeps_the_contract() {
    seeded_suite(Placement::InOrder, 1..4);
}

#[test]
fn a_device_that_places_writes_in_any_order_keeps_the_contract() {
    seeded_suite(Placement::WritesAnyOrder, 10..13);
}

/// Two devices that exchange packets, on one virtual clock.
struct Packets {
    devices: Emulated,
    /// Packets may be on their way for a moment of real time.
    real: bool,
}

impl Packets {
    fn switched() -> Self {
        let fabric = Fabric::switched(FabricConfig::default(), FaultPlan::default()).unwrap();
        Self::of([Arc::clone(&fabric), fabric], false)
    }

    /// Two sockets, or none where the machine lacks the address.
    fn udp(ip: &str) -> Option<Self> {
        let bind = std::net::SocketAddr::new(ip.parse().unwrap(), 0);
        let fabric = || Fabric::udp(UdpConfig { bind, ..UdpConfig::new(bind.ip()) });
        match (fabric(), fabric()) {
            (Ok(near), Ok(far)) => {
                let made = Self::of([near, far], true);
                let [near, far] = &made.devices.hcas;
                far.fabric().admit(&near.fabric().advert(near.port_id()).unwrap()).unwrap();
                near.fabric().admit(&far.fabric().advert(far.port_id()).unwrap()).unwrap();
                Some(made)
            }
            (Err(error), _) | (_, Err(error)) => {
                // Straight to stderr: the runner hides what a passing test prints.
                let advice = "give the loopback interface that address";
                let _ = writeln!(std::io::stderr(), "SKIPPED: no socket on {ip}: {error}; {advice}");
                None
            }
        }
    }

    fn of(fabrics: [Arc<Fabric>; 2], real: bool) -> Self {
        let hcas = fabrics.map(|fabric| EmulatedHca::new(fabric, EmulatedConfig::default()).unwrap());
        Self { devices: Emulated { hcas, now: Nanos(0) }, real }
    }
}

impl World for Packets {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        self.devices.hca(end)
    }

    fn settle(&mut self, nanos: u64) {
        let end = self.devices.now.plus(nanos);
        loop {
            let steps = [0, 1].map(|device: usize| self.devices.hcas[device].step(self.devices.now));
            let arrives = |hca: &Arc<EmulatedHca>| self.real && hca.fabric().wait_for_arrivals(20_000);
            if steps.iter().any(|step| step.did_work) || self.devices.hcas.iter().any(arrives) {
                continue;
            }
            match steps.iter().filter_map(|step| step.next_deadline).min() {
                Some(at) if at <= end => self.devices.now = at,
                _ => break,
            }
        }
    }

    fn has_masked_atomics(&self) -> bool {
        false
    }
}

#[test]
fn a_device_that_sends_frames_through_a_switch_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Packets::switched());
    }
}

#[test]
fn a_device_that_sends_packets_through_sockets_keeps_the_contract() {
    for ip in ["127.0.0.1", "::1"] {
        for (name, case) in CASES {
            println!("{ip} {name}");
            let Some(mut world) = Packets::udp(ip) else { break };
            case(&mut world);
        }
    }
}
