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
use ibex_hca::{Access, Hca, HcaError, LinkLayer};

#[path = "mlx5/shim.rs"]
mod shim;

use shim::{settle, under_the_shim};

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

    fn tells_of_failures(&self) -> bool {
        // They come by a thread of the shim's, some time after the devices have settled.
        false
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
        self.hca.dealloc_pd(self.pd).expect("nothing is left that uses the domain");
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
