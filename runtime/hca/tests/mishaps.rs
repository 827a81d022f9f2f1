//! What happens to a device from outside: its link goes and comes, it is removed; and who hears of it.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::sync::Arc;

use ibex_abi::cqe::Syndrome;
use ibex_abi::eqe::{Event, EventType, PortChange};
use ibex_abi::prm::{Op, Status};
use ibex_abi::wqe::{CtrlFlags, Request};
use ibex_hca::control_region::{ControlError, ControlRegion};
use ibex_hca::emulated::{CommandSyndrome, Fabric, FabricConfig, ObjectCounts};
use ibex_hca::fault::FaultHca;
use ibex_hca::host_eq::HostEq;
use ibex_hca::host_qp::{HostQp, HostQpSpec};
use ibex_hca::shared::{SharedHca, WAITING_MAX};
use ibex_hca::{AsyncEvent, Hca, HcaError};
use rig::{Setup, as_hca, device, inline, rig, write};

/// More than all retries of the rig take.
const PATIENCE_NS: u64 = 10_000_000;

#[test]
fn a_link_that_goes_and_comes_is_told_and_what_was_sent_meanwhile_arrives() {
    let mut rig = rig(Setup::default());
    let far = Arc::clone(&rig.ends[1].device);
    let mut eq = HostEq::create(&rig.ends[1].region, 4, &[EventType::PortChange]).unwrap();
    far.set_port_up(false);
    far.set_port_up(false);
    assert!(!far.is_port_up() && rig.ends[0].device.is_port_up());
    assert_eq!(far.poll_async_event(), Some(AsyncEvent::PortDown { port_num: 1 }));
    assert_eq!(far.poll_async_event(), None, "told once");
    assert_eq!(eq.poll(), Ok(Some(Event::PortChange { port: 1, change: PortChange::Down })));
    let remote = rig.ends[1].remote(0);
    rig.ends[0].qp.post(CtrlFlags::SIGNALED, write(remote, inline(&[7; 8]))).unwrap();
    // Not for long: the timers run on.
    while rig.ends[0].device.step(rig.now).did_work {}
    assert!(rig.ends[0].qp.poll().is_none(), "nothing passes");
    far.set_port_up(true);
    assert_eq!(far.poll_async_event(), Some(AsyncEvent::PortUp { port_num: 1 }));
    assert_eq!(eq.poll(), Ok(Some(Event::PortChange { port: 1, change: PortChange::Active })));
    rig.pass(PATIENCE_NS);
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None, "sent again until it arrived");
    far.announce_new_address();
    assert_eq!(far.poll_async_event(), Some(AsyncEvent::AddressChanged { port_num: 1 }));
    assert_eq!(eq.poll(), Ok(Some(Event::PortChange { port: 1, change: PortChange::Guid })));
}

#[test]
fn a_link_that_stays_away_fails_its_queue_pairs() {
    let mut rig = rig(Setup::default());
    rig.ends[0].device.set_port_up(false);
    let remote = rig.ends[1].remote(0);
    rig.ends[0].qp.post(CtrlFlags::SIGNALED, write(remote, inline(&[7; 8]))).unwrap();
    rig.pass(PATIENCE_NS);
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::TRANSPORT_RETRY_EXC));
}

#[test]
fn a_removed_device_makes_nothing_more_and_lets_go_of_everything() {
    let mut rig = rig(Setup::default());
    let near = Arc::clone(&rig.ends[0].device);
    let mut eq = HostEq::create(&rig.ends[0].region, 4, &[EventType::PortChange]).unwrap();
    let remote = rig.ends[1].remote(0);
    near.remove();
    near.remove();
    near.set_port_up(false);
    near.announce_new_address();
    assert_eq!(near.poll_async_event(), Some(AsyncEvent::DeviceRemoved));
    assert_eq!((near.poll_async_event(), eq.poll()), (None, Ok(None)), "told once, and writes nothing");
    rig.ends[0].qp.post(CtrlFlags::SIGNALED, write(remote, inline(&[7; 8]))).unwrap();
    rig.ends[1].qp.post(CtrlFlags::SIGNALED, Request::Nop { body: Vec::new() }).unwrap();
    rig.pass(PATIENCE_NS);
    assert!(rig.ends[0].qp.poll().is_none(), "it does nothing");
    assert!(rig.ends[1].qp.poll().is_some(), "its peer works");
    let hca = as_hca(&near);
    let refused = hca.alloc_pd().unwrap_err();
    let HcaError::Command(refusal) = refused else { panic!("{refused}") };
    assert_eq!((refusal.op(), refusal.status), (Some(Op::AllocPd), Status::BadSysState));
    assert_eq!((refusal.syndrome, refusal.errno), (CommandSyndrome::Removed.code(), libc::EIO));
    let (region, pd) = (&rig.ends[0].region, rig.ends[0].pd);
    let made = HostQp::create(region, pd, HostQpSpec::default()).map(drop);
    assert!(matches!(made, Err(ControlError::Hca(HcaError::Command(_)))), "{made:?}");
    assert!(rig.ends[0].qp.query().is_err(), "nothing is known of what it had");
    eq.destroy().unwrap();
    drop(eq);
    let [gone, _peer] = rig.ends;
    let rig::End { qp, buffer, region, pd, .. } = gone;
    drop((qp, buffer, region));
    hca.dealloc_pd(pd).expect("nothing is left in it");
    assert_eq!(near.object_counts(), ObjectCounts::default());
}

#[test]
fn every_user_of_a_shared_device_hears_every_event() {
    let fabric = Fabric::inproc(FabricConfig::default());
    let fault = FaultHca::new(device(&fabric, Setup::default().doorbells));
    let users = SharedHca::split(&fault, 3);
    fault.inner().set_port_up(false);
    assert!(fault.report(AsyncEvent::DeviceRemoved));
    for user in &users {
        assert_eq!(user.poll_async_event(), Some(AsyncEvent::DeviceRemoved), "as the script says: first");
        assert_eq!(user.poll_async_event(), Some(AsyncEvent::PortDown { port_num: 1 }));
        assert_eq!(user.poll_async_event(), None);
    }
    const LAST: AsyncEvent = AsyncEvent::PortUp { port_num: 1 };
    (1..WAITING_MAX).for_each(|_| assert!(fault.report(AsyncEvent::PortDown { port_num: 1 })));
    while users[0].poll_async_event().is_some() {}
    (0..2).for_each(|_| assert!(fault.report(LAST)));
    while users[0].poll_async_event().is_some() {}
    let kept: Vec<_> = std::iter::from_fn(|| users[2].poll_async_event()).collect();
    assert_eq!(kept.len(), WAITING_MAX, "the oldest is lost");
    assert_eq!(kept[WAITING_MAX - 2..], [LAST, LAST]);
    let pd = users[1].alloc_pd().unwrap();
    users[2].dealloc_pd(pd).expect("it is one device");
    drop(ControlRegion::host(&(Arc::clone(&users[0]) as Arc<dyn Hca>), 4096).unwrap());
}
