//! Host-assisted doorbells: the contract suite through them, on a strict device, and what happens if nobody carries.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

use std::sync::Arc;

use ibex_abi::types::{Iova, Psn};
use ibex_abi::wqe::{CtrlFlags, Remote, Request, SegmentBuf};
use ibex_hca::assisted::AssistedHca;
use ibex_hca::contract::{CASES, World};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, HostQp, HostQpSpec, Rts};
use ibex_hca::{Access, Hca, HcaError, LinkLayer, Nanos};

/// Pages of each device: the suite holds few at a time.
const PAGES: u32 = 16;

struct Assisted {
    hcas: [Arc<AssistedHca<EmulatedHca>>; 2],
    now: Nanos,
}

impl Assisted {
    fn new(link: LinkLayer) -> Self {
        let fabric = Fabric::inproc(FabricConfig::default());
        let config = EmulatedConfig { link, ..EmulatedConfig::default() };
        let device = |_| EmulatedHca::new(Arc::clone(&fabric), config).unwrap();
        Self { hcas: [0, 1].map(|end| AssistedHca::new(device(end), PAGES).unwrap()), now: Nanos(0) }
    }
}

impl World for Assisted {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        Arc::clone(&self.hcas[end]) as Arc<dyn Hca>
    }

    fn settle(&mut self, nanos: u64) {
        let end = self.now.plus(nanos);
        loop {
            let carried = self.hcas.iter().any(|hca| hca.forward());
            let steps = [0, 1].map(|device: usize| self.hcas[device].inner().step(self.now));
            if carried || steps.iter().any(|step| step.did_work) {
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
fn a_device_behind_assisted_doorbells_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        case(&mut Assisted::new(LinkLayer::Roce));
        case(&mut Assisted::new(LinkLayer::Ib));
    }
}

/// A connected pair on two devices, and the far end's buffer.
fn pair(world: &Assisted) -> (HostQp<Rts>, HostQp<Rts>, Registered) {
    let made = [0, 1].map(|end| {
        let hca = world.hca(end);
        let pd = hca.alloc_pd().unwrap();
        let region = ControlRegion::host(&hca, 1 << 20).unwrap();
        let buffer = Registered::new(&hca, pd, 4096, Access::ALL).unwrap();
        (HostQp::create(&region, pd, HostQpSpec::default()).unwrap(), buffer)
    });
    let [(near, _), (far, buffer)] = made;
    let (here, there) = (near.endpoint(Psn::new(7)), far.endpoint(Psn::new(9)));
    let spec = |psn| ConnectSpec { psn: Psn::new(psn), ..ConnectSpec::default() };
    (near.connect(&there, &spec(7)).unwrap(), far.connect(&here, &spec(9)).unwrap(), buffer)
}

fn post(qp: &mut HostQp<Rts>, buffer: &Registered, byte: u8) {
    let remote = Remote { addr: Iova(buffer.iova(0)), rkey: buffer.key().rkey };
    let payload = vec![SegmentBuf::Inline(vec![byte; 8])];
    qp.post(CtrlFlags::SIGNALED, Request::Write { remote, payload }).unwrap();
}

#[test]
fn nothing_runs_before_somebody_carries_the_doorbell() {
    let world = Assisted::new(LinkLayer::Roce);
    let (mut near, _far, buffer) = pair(&world);
    let device = world.hcas[0].inner();
    post(&mut near, &buffer, 1);
    while device.step(Nanos(0)).did_work {}
    assert_eq!((device.counters().wqes, near.poll()), (0, None));
    assert_eq!(device.check_unrung(), 1, "the strict device saw no doorbell");
    assert!(world.hcas[0].forward());
    assert!(!world.hcas[0].forward(), "nothing is carried twice");
    while device.step(Nanos(0)).did_work {}
    assert_eq!((device.counters().wqes, buffer.view().to_vec(0, 8)), (1, vec![1; 8]));
}

#[test]
fn a_thread_carries_until_it_is_dropped() {
    let world = Assisted::new(LinkLayer::Roce);
    let (mut near, _far, buffer) = pair(&world);
    let forwarder = world.hcas[0].spawn().unwrap();
    for byte in 1..=50 {
        post(&mut near, &buffer, byte);
        while near.poll().is_none() {
            world.hcas[0].inner().step(Nanos(0));
            std::thread::yield_now();
        }
        assert_eq!(buffer.view().to_vec(0, 8), [byte; 8]);
    }
    post(&mut near, &buffer, 51);
    drop(forwarder);
    assert!(!world.hcas[0].forward(), "what was rung before the end was carried");
    assert_eq!(world.hcas[0].unrung_wqes(), Some(0));
}

#[test]
fn pages_are_limited_and_given_back() {
    let world = Assisted::new(LinkLayer::Roce);
    let hca = &world.hcas[0];
    let pages: Vec<_> = (0..PAGES).map(|_| hca.alloc_doorbell().unwrap()).collect();
    let refused = hca.alloc_doorbell();
    let limit = u64::from(PAGES);
    assert_eq!(refused, Err(HcaError::Exhausted { what: "doorbell pages", requested: 1, limit }));
    let memory = hca.memory();
    let inside = memory.addr..memory.addr + memory.len;
    assert!(pages.iter().all(|page| inside.contains(&page.register)));
    for page in pages {
        hca.free_doorbell(page).unwrap();
        assert!(hca.free_doorbell(page).is_err(), "given back once");
    }
    hca.alloc_doorbell().unwrap();
    assert!(AssistedHca::new(Arc::clone(hca.inner()), 0).is_err());
}
