//! `hca::mlx5` end to end: our provider on the distribution's unmodified libibverbs and libmlx5, on the emulated device
//! that `ffi/preload` presents to them as a uverbs device.
//!
//! Each test runs itself again in a process with the shim preloaded, and there the part below `under_the_shim`.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

use std::sync::Arc;

use ibex_abi::prm::Status;
use ibex_abi::types::{Pd, Psn};
use ibex_hca::contract::{CASES, World};
use ibex_hca::control_region::{ControlError, ControlRegion};
use ibex_hca::fault::{Effect, Fault, FaultHca};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, HostQp, HostQpSpec, Reset, Rts};
use ibex_hca::mlx5::{LiveObjects, Mlx5Config, Mlx5Hca, OpenError, PortState};
use ibex_hca::{Access, AsyncEvent, Hca, HcaError, LinkLayer};

#[path = "mlx5/shim.rs"]
mod shim;

use shim::{announce_new_address, fail_call, objects, remove, set_port_up, settle, under_the_shim};

/// Both devices of the process, opened anew.
struct Real {
    hcas: [Arc<Mlx5Hca>; 2],
}

fn open(name: &str) -> Arc<Mlx5Hca> {
    Mlx5Hca::open(&Mlx5Config { device: Some(name.into()), ..Mlx5Config::default() }).unwrap()
}

impl Real {
    fn new() -> Self {
        Self { hcas: ["mlx5_0", "mlx5_1"].map(open) }
    }
}

impl World for Real {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        Arc::clone(&self.hcas[end]) as Arc<dyn Hca>
    }

    fn settle(&mut self, nanos: u64) {
        settle(nanos);
    }

    fn knows_neighbours(&self) -> bool {
        // The kernel below has no neighbour that the shim's devices could have.
        false
    }
}

/// Every case of the suite; devices hold nothing at its end.
fn contract() {
    for (name, case) in CASES {
        println!("{name}");
        let mut world = Real::new();
        case(&mut world);
        for hca in &world.hcas {
            // Cases leave protection domains and a page or two to the device.
            let left = LiveObjects { pds: 0, pages: 0, ..hca.live() };
            assert_eq!(left, LiveObjects::default(), "{name}: everything was released");
        }
    }
}

#[test]
fn an_ethernet_device_keeps_the_contract() {
    under_the_shim("an_ethernet_device_keeps_the_contract", 2, LinkLayer::Roce, contract);
}

#[test]
fn an_infiniband_device_keeps_the_contract() {
    under_the_shim("an_infiniband_device_keeps_the_contract", 2, LinkLayer::Ib, contract);
}

/// A protection domain that gives itself back.
struct Domain {
    hca: Arc<dyn Hca>,
    pd: Pd,
}

impl Drop for Domain {
    fn drop(&mut self) {
        // Whoever lets a release fail finds what is left in the provider's count.
        let _ = self.hca.dealloc_pd(self.pd);
    }
}

/// One end of a connection, in the order in which its parts go.
struct End<S> {
    qp: HostQp<S>,
    _buffer: Registered,
    _region: ControlRegion,
    _domain: Domain,
}

fn end(hca: &Arc<dyn Hca>) -> Result<End<Reset>, ControlError> {
    let domain = Domain { hca: Arc::clone(hca), pd: hca.alloc_pd()? };
    let region = ControlRegion::host(hca, 1 << 20)?;
    let buffer = Registered::new(hca, domain.pd, 4096, Access::ALL)?;
    let qp = HostQp::create(&region, domain.pd, HostQpSpec::default())?;
    Ok(End { qp, _buffer: buffer, _region: region, _domain: domain })
}

/// Everything that a connection between two devices needs.
fn bring_up(hcas: &[Arc<dyn Hca>; 2]) -> Result<[End<Rts>; 2], ControlError> {
    let (near, far) = (end(&hcas[0])?, end(&hcas[1])?);
    let endpoints = [near.qp.endpoint(Psn::new(1)), far.qp.endpoint(Psn::new(2))];
    let connect = |end: End<Reset>, here: usize| -> Result<End<Rts>, ControlError> {
        // Locals go in reverse: the domain last.
        let End { _domain, _region, _buffer, qp } = end;
        let spec = ConnectSpec { psn: endpoints[here].psn, ..ConnectSpec::default() };
        Ok(End { qp: qp.connect(&endpoints[1 - here], &spec)?, _buffer, _region, _domain })
    };
    Ok([connect(near, 0)?, connect(far, 1)?])
}

/// Refuses one call after the other, of the first device and of the second, until bring-up succeeds.
fn faults() {
    for end in 0..2 {
        let mut refused = 0;
        loop {
            let hcas = ["mlx5_0", "mlx5_1"].map(|name| FaultHca::new(open(name)));
            hcas[end].inject(Fault { op: None, skip: refused, effect: Effect::Refuse(Status::Lim) });
            let made = bring_up(&[0, 1].map(|end: usize| Arc::clone(&hcas[end]) as Arc<dyn Hca>));
            let was_struck = hcas[end].pending() == 0;
            hcas[end].clear();
            match made {
                Ok(ends) => drop(ends),
                Err(ControlError::Hca(HcaError::Command(error))) => assert_eq!(error.status, Status::Lim),
                Err(other) => panic!("call {refused} of device {end}: {other}"),
            }
            for hca in &hcas {
                assert_eq!(
                    hca.inner().live(),
                    LiveObjects::default(),
                    "call {refused} of device {end} refused"
                );
            }
            if !was_struck {
                break;
            }
            refused += 1;
        }
        // A domain, a umem, a key, a page, two queues, three transitions.
        assert_eq!(refused, 9, "device {end}");
    }
}

#[test]
fn every_call_of_bring_up_may_fail_and_nothing_is_left() {
    under_the_shim("every_call_of_bring_up_may_fail_and_nothing_is_left", 2, LinkLayer::Roce, faults);
}

/// Fails one call of libibverbs and libmlx5 to the kernel after the other, from opening both devices to connected
/// queue pairs, until nothing fails.
fn driver_faults() {
    // Some calls ask for what a device may lack: without an answer the provider goes on.
    let (mut done_without, mut refused) = (0, 0);
    let before = [objects(0), objects(1)];
    for skip in 0.. {
        fail_call(skip, libc::EPERM);
        let made = open_both().map_err(|error| error.to_string()).and_then(|hcas| {
            let made = bring_up(&hcas.each_ref().map(|hca| Arc::clone(hca) as Arc<dyn Hca>));
            // A failure that waits still strikes when everything is taken down.
            let is_whole = made.is_ok();
            let made = made.map(drop).map_err(|error| error.to_string());
            let has_struck = !fail_call(0, 0);
            for (hca, (idx, before)) in hcas.iter().zip((0..).zip(&before)) {
                let live = hca.live();
                assert!(is_whole || live == LiveObjects::default(), "call {skip}: {made:?} left {live:?}");
                let mut has = objects(idx);
                has[PAGES] = before[PAGES];
                assert_eq!(known(before, &live), has, "call {skip}: {made:?}");
            }
            made.map(|()| has_struck)
        });
        let has_struck = made.as_ref().copied().unwrap_or(true);
        let is_spent = !fail_call(0, 0);
        assert_eq!([objects(0), objects(1)], before, "call {skip}: a closed device has nothing of ours");
        match made {
            Ok(_) if !has_struck => break,
            Ok(_) => done_without += 1,
            Err(error) => {
                assert!(
                    error.contains("errno") || error.contains("no active port") || error.contains("GID"),
                    "{error}"
                );
                assert!(is_spent, "call {skip}: {error}");
                refused += 1;
            }
        }
    }
    println!("{refused} calls refused, {done_without} done without");
    assert!(refused >= 20, "{refused} calls were refused");
}

/// What a device has that had `before` and on which the provider knows of `live`. Doorbell pages stay with the device,
/// for late doorbells.
fn known(before: &[u64; 7], live: &LiveObjects) -> [u64; 7] {
    let [pds, keys, umems, pages, eqs, cqs, qps] = *before;
    let add = |before: u64, live: usize| before + live as u64;
    [
        add(pds, live.pds),
        add(keys, live.keys),
        add(umems, live.umems),
        pages,
        eqs,
        add(cqs, live.cqs),
        add(qps, live.qps),
    ]
}

/// Where [`objects`] has doorbell pages.
const PAGES: usize = 3;

fn open_both() -> Result<[Arc<Mlx5Hca>; 2], OpenError> {
    let open = |name: &str| Mlx5Hca::open(&Mlx5Config { device: Some(name.into()), ..Mlx5Config::default() });
    Ok([open("mlx5_0")?, open("mlx5_1")?])
}

#[test]
fn every_call_to_the_kernel_may_fail_from_opening_on_and_nothing_is_left() {
    let test = "every_call_to_the_kernel_may_fail_from_opening_on_and_nothing_is_left";
    under_the_shim(test, 2, LinkLayer::Roce, driver_faults);
}

/// What a device reports of itself and of its port.
fn events() {
    let hca = open("mlx5_0");
    let heard = || {
        settle(0);
        hca.poll_async_event()
    };
    assert_eq!(heard(), None);
    set_port_up(0, false);
    assert_eq!(heard(), Some(AsyncEvent::PortDown { port_num: 1 }));
    let refused = Mlx5Hca::open(&Mlx5Config { device: Some("mlx5_0".into()), ..Mlx5Config::default() });
    assert!(matches!(refused, Err(OpenError::NoPort { .. })), "{refused:?}");
    set_port_up(0, true);
    announce_new_address(0);
    assert_eq!(heard(), Some(AsyncEvent::PortUp { port_num: 1 }));
    assert_eq!(heard(), Some(AsyncEvent::AddressChanged { port_num: 1 }));
    assert_eq!(heard(), None);
}

#[test]
fn ports_that_change_are_heard_of_on_ethernet() {
    under_the_shim("ports_that_change_are_heard_of_on_ethernet", 1, LinkLayer::Roce, events);
}

#[test]
fn ports_that_change_are_heard_of_on_infiniband() {
    under_the_shim("ports_that_change_are_heard_of_on_infiniband", 1, LinkLayer::Ib, events);
}

/// A device that is removed while everything stands: refusals are typed, and everything can be released.
fn removal() {
    let hcas = open_both().unwrap();
    let ends = bring_up(&hcas.each_ref().map(|hca| Arc::clone(hca) as Arc<dyn Hca>)).unwrap();
    assert_ne!(hcas[0].live(), LiveObjects::default());
    remove(0);
    let of_ours = objects(0)[4..].iter().sum::<u64>();
    assert_eq!(of_ours, 1, "the kernel has ended all but its own event queue");
    let refused = hcas[0].alloc_pd().unwrap_err();
    assert!(matches!(refused, HcaError::Os { call: "ibv_alloc_pd", errno: libc::EIO }), "{refused}");
    let HcaError::Command(refused) = ends[0].qp.query().unwrap_err() else { panic!("a command") };
    assert_eq!((refused.status, refused.errno), (Status::IntErr, libc::EIO));
    // Nobody has taken the event yet: the provider looks for it before it believes a refusal to release.
    drop(ends);
    for hca in &hcas {
        assert_eq!(hca.live(), LiveObjects::default(), "{}", hca.name());
    }
    assert_eq!(hcas[0].poll_async_event(), Some(AsyncEvent::DeviceRemoved));
    assert_eq!((hcas[0].poll_async_event(), hcas[1].poll_async_event()), (None, None));
    drop(hcas);
    let refused = Mlx5Hca::open(&Mlx5Config { device: Some("mlx5_0".into()), ..Mlx5Config::default() });
    assert!(matches!(refused, Err(OpenError::NotOpened { .. })), "{refused:?}");
}

#[test]
fn a_device_that_is_removed_refuses_by_type_and_lets_go_of_everything() {
    let test = "a_device_that_is_removed_refuses_by_type_and_lets_go_of_everything";
    under_the_shim(test, 2, LinkLayer::Roce, removal);
}

/// What there is, and what is asked for and is not there.
fn opening() {
    let devices = ibex_hca::mlx5::devices().unwrap();
    assert_eq!(devices.iter().map(|device| device.name.as_str()).collect::<Vec<_>>(), ["mlx5_0", "mlx5_1"]);
    for device in &devices {
        assert_eq!((device.devx, device.ports.len()), (Ok(()), 1), "{device:?}");
        assert_eq!((device.ports[0].state, device.ports[0].link), (PortState::Active, LinkLayer::Roce));
        assert!(!device.firmware.is_empty());
    }
    let first = Mlx5Hca::open(&Mlx5Config::default()).unwrap();
    assert_eq!((first.name(), first.port().port_num), ("mlx5_0", 1));
    assert_ne!(first.port().mac, Default::default(), "an Ethernet port has an address");
    assert!(first.caps().atomic && first.caps().log_max_qp_sz > 6);
    let pages: Vec<_> = (0..24).map(|_| first.alloc_doorbell().unwrap()).collect();
    let registers: std::collections::BTreeSet<u64> = pages.iter().map(|page| page.register).collect();
    assert_eq!(registers.len(), pages.len(), "each holder has a register of its own");
    assert_eq!(first.live().pages, pages.len());
    pages.iter().for_each(|page| first.free_doorbell(*page).unwrap());
    assert!(first.free_doorbell(pages[0]).is_err(), "given back once");
    assert!(registers.contains(&first.alloc_doorbell().unwrap().register), "registers are used again");
    let refusal = |config: Mlx5Config| Mlx5Hca::open(&config).unwrap_err();
    let named = |name: &str| Mlx5Config { device: Some(name.into()), ..Mlx5Config::default() };
    assert!(matches!(refusal(named("mlx5_9")), OpenError::NoDevice { found, .. } if found.len() == 2));
    let port = refusal(Mlx5Config { port: Some(2), ..Mlx5Config::default() });
    assert!(matches!(port, OpenError::NoPort { wanted: Some(2), .. }), "{port}");
    let link = refusal(Mlx5Config { link: Some(LinkLayer::Ib), ..Mlx5Config::default() });
    assert!(matches!(link, OpenError::NoPort { .. }), "{link}");
    let gid = refusal(Mlx5Config { gid_index: Some(77), ..Mlx5Config::default() });
    assert!(matches!(gid, OpenError::NoGid { wanted: Some(77), .. }), "{gid}");
}

#[test]
fn devices_are_found_and_what_is_not_there_is_refused() {
    under_the_shim("devices_are_found_and_what_is_not_there_is_refused", 2, LinkLayer::Roce, opening);
}
