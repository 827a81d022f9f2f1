//! Several threads: stepping, commanding and reading memory at the same time.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use ibex_abi::types::Iova;
use ibex_abi::wqe::{CtrlFlags, Remote};
use ibex_hca::emulated::{Backoff, DeviceThread, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{Completion, HostQp, Rts};
use ibex_hca::{Access, Nanos};
use rig::{End, Setup, as_hca, device, gather, inline, rig, write};

/// Far longer than anything here takes, even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn wait(qp: &mut HostQp<Rts>) -> Completion {
    let start = Instant::now();
    loop {
        if let Some(completion) = qp.poll() {
            return completion;
        }
        assert!(start.elapsed() < PATIENCE, "no completion");
        std::thread::yield_now();
    }
}

/// Steps the devices until told to stop, each on a thread of its own.
fn step_each<'s>(scope: &'s std::thread::Scope<'s, '_>, devices: &[Arc<EmulatedHca>], stop: &'s AtomicBool) {
    for device in devices {
        let device = Arc::clone(device);
        scope.spawn(move || {
            while !stop.load(Ordering::Acquire) {
                if !device.step(Nanos(0)).did_work {
                    std::thread::yield_now();
                }
            }
        });
    }
}

/// Stops the steppers even when a test fails, which would otherwise hang.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[test]
fn two_threads_stepping_two_devices_that_talk_to_each_other_get_on() {
    let fabric = Fabric::inproc(FabricConfig::default());
    let setup = Setup::default();
    let devices = [0, 1].map(|_| device(&fabric, setup.doorbells));
    let mut pairs: Vec<[End; 2]> = (0..4).map(|_| rig::connect(&devices, setup)).collect();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _stop = Stop(&stop);
        // Each device by two threads, so that all four meet everywhere.
        step_each(scope, &devices, &stop);
        step_each(scope, &devices, &stop);
        for round in 0..300_u64 {
            for [one, other] in &mut pairs {
                let word = round.to_le_bytes();
                one.put(1024, &word.repeat(512));
                let payload = gather(&[one.data(1024, 4096)]);
                one.qp.post(CtrlFlags::UNSIGNALED, write(other.remote(8192), payload)).unwrap();
                one.qp.post(CtrlFlags::SIGNALED, write(other.remote(0), inline(&word))).unwrap();
                other.qp.post(CtrlFlags::SIGNALED, write(one.remote(0), inline(&word))).unwrap();
            }
            for [one, other] in &mut pairs {
                assert_eq!(wait(&mut one.qp).syndrome(), None);
                assert_eq!(wait(&mut other.qp).syndrome(), None);
                assert_eq!(other.get(0, 8), round.to_le_bytes());
                assert_eq!(one.get(0, 8), round.to_le_bytes());
                assert_eq!(other.get(8192, 4096), round.to_le_bytes().repeat(512));
            }
        }
    });
}

#[test]
fn a_signal_is_seen_only_after_the_data_before_it() {
    let mut rig = rig(Setup::default());
    let devices = [0, 1].map(|end: usize| Arc::clone(&rig.ends[end].device));
    let _thread = DeviceThread::spawn(devices.to_vec(), Backoff::default()).unwrap();
    let [near, far] = &mut rig.ends;
    for round in 1..2000_u64 {
        near.put(0, &round.to_le_bytes().repeat(64));
        let payload = gather(&[near.data(0, 512)]);
        let mut batch = near.qp.batch();
        batch.push(CtrlFlags::UNSIGNALED, write(far.remote(512), payload)).unwrap();
        batch.push(CtrlFlags::SIGNALED, write(far.remote(0), inline(&round.to_le_bytes()))).unwrap();
        batch.commit().ring();
        let signal = far.buffer.view();
        let start = Instant::now();
        // The acquire load pairs with the device's release store of a naturally aligned word.
        while signal.word64(0).load(Ordering::Acquire) != round {
            assert!(start.elapsed() < PATIENCE, "no signal");
            std::hint::spin_loop();
        }
        assert_eq!(far.get(512, 512), round.to_le_bytes().repeat(64));
        wait(&mut near.qp);
    }
}

#[test]
fn nothing_is_written_through_a_key_once_it_was_given_back() {
    let mut rig = rig(Setup::default());
    let devices = [0, 1].map(|end: usize| Arc::clone(&rig.ends[end].device));
    let _thread = DeviceThread::spawn(devices.to_vec(), Backoff::default()).unwrap();
    for _ in 0..20 {
        let [near, far] = &mut rig.ends;
        let target = ibex_hca::host_memory::HostMemory::new(8192).unwrap();
        let iova = Iova(target.view().addr(0));
        let hca = as_hca(&far.device);
        #[expect(unsafe_code, reason = "keeps the memory past its registration, to look at it")]
        // SAFETY: `target` outlives the key, which is given back below.
        let key = unsafe { hca.register(far.pd, target.region(), iova, Access::ALL) }.unwrap();
        let remote = Remote { addr: key.iova, rkey: key.rkey };
        near.put(0, &[0xee; 8192]);
        for _ in 0..30 {
            let payload = gather(&[near.data(0, 8192)]);
            near.qp.post(CtrlFlags::UNSIGNALED, write(remote, payload)).unwrap();
        }
        hca.deregister(key).unwrap();
        target.view().fill(0x11);
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(target.view().to_vec(0, 8192), [0x11; 8192], "written after deregistration");
        // The connection failed on the revoked key; the next round needs a new one.
        let setup = Setup::default();
        let ends = rig::connect(&devices, setup);
        rig.ends = ends;
    }
}

#[test]
fn reset_returns_only_when_the_rings_are_no_longer_touched() {
    let setup = Setup::default();
    let fabric = Fabric::inproc(FabricConfig::default());
    let devices = [0, 1].map(|_| device(&fabric, setup.doorbells));
    let _thread = DeviceThread::spawn(devices.to_vec(), Backoff::default()).unwrap();
    for _ in 0..50 {
        let [mut near, far] = rig::connect(&devices, setup);
        for _ in 0..60 {
            near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
        }
        let reset = near.qp.reset().unwrap();
        let cq = reset.send_cq().ring().view().unwrap();
        cq.fill(0xff);
        std::thread::yield_now();
        assert!(cq.to_vec(0, cq.len()).iter().all(|byte| *byte == 0xff), "a completion after RST");
        drop(reset);
        drop(Registered::new(&as_hca(&near.device), near.pd, 4096, Access::ALL).unwrap());
    }
}

#[test]
fn a_device_thread_stops_when_it_is_dropped() {
    let fabric = Fabric::inproc(FabricConfig::default());
    let device = device(&fabric, Setup::default().doorbells);
    let thread = DeviceThread::spawn(vec![Arc::clone(&device)], Backoff::default()).unwrap();
    drop(thread);
    assert_eq!(Arc::strong_count(&device), 1, "the thread let go of its device");
}
