//! Any command may fail at any step: nothing is left behind, the others run, a retry works.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::sync::Arc;

use ibex_abi::cqe::Syndrome;
use ibex_abi::prm::{Op, Status};
use ibex_abi::types::{Psn, QpState};
use ibex_abi::wqe::{CtrlFlags, Request};
use ibex_hca::contract::{CASES, World};
use ibex_hca::control_region::{ControlError, ControlRegion};
use ibex_hca::emulated::{CommandSyndrome, EmulatedHca, Fabric, FabricConfig, ObjectKind};
use ibex_hca::fault::{Effect, Fault, FaultHca};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, HostQp, HostQpSpec, Rts};
use ibex_hca::objects::RecvSpec;
use ibex_hca::{Access, Hca, HcaError, MemoryKind, MemoryRegion, Nanos};
use rig::{Setup, as_hca, device, inline, rig, write};

fn faulty() -> (Arc<FaultHca<EmulatedHca>>, Arc<dyn Hca>) {
    let fabric = Fabric::inproc(FabricConfig::default());
    let fault = FaultHca::new(device(&fabric, Setup::default().doorbells));
    (Arc::clone(&fault), fault as Arc<dyn Hca>)
}

/// A queue pair connected to itself, which takes every command of a bring-up.
fn bring_up(region: &ControlRegion, pd: ibex_abi::types::Pd) -> Result<HostQp<Rts>, ControlError> {
    let recv = Some(RecvSpec { log_size: 2, log_segs: 0 });
    let qp = HostQp::create(region, pd, HostQpSpec { recv, ..HostQpSpec::default() })?;
    let itself = qp.endpoint(Psn::new(0));
    Ok(qp.connect(&itself, &ConnectSpec::default())?)
}

#[test]
fn a_bring_up_that_fails_at_any_command_leaves_nothing_and_can_be_retried() {
    let commands = [
        (Op::AllocUar, 1),
        (Op::CreateCq, 2),
        (Op::CreateQp, 1),
        (Op::Rst2InitQp, 1),
        (Op::Init2RtrQp, 1),
        (Op::Rtr2RtsQp, 1),
    ];
    for (op, occurrences) in commands {
        for skip in 0..occurrences {
            let (fault, hca) = faulty();
            let pd = hca.alloc_pd().unwrap();
            let region = ControlRegion::host(&hca, 1 << 20).unwrap();
            let effect = Effect::Refuse(Status::NoRes);
            assert!(fault.inject(Fault { op: Some(op), skip, effect }));
            let error = bring_up(&region, pd).unwrap_err();
            let ControlError::Hca(HcaError::Command(error)) = error else { panic!("{op}: {error}") };
            assert_eq!((error.op(), error.status), (Some(op), Status::NoRes));
            assert_eq!(error.syndrome, CommandSyndrome::Injected.code());
            assert_eq!(fault.pending(), 0);
            assert_eq!(region.storage_report().live_bytes, 0, "{op}: the heap is as before");
            drop(bring_up(&region, pd).expect("a retry works"));
            assert_eq!(region.storage_report().live_bytes, 0);
            drop(region);
            hca.dealloc_pd(pd).expect("no object of the failed attempt is left");
        }
    }
}

#[test]
fn memory_that_the_device_would_not_let_go_of_is_not_reused() {
    let (fault, hca) = faulty();
    let pd = hca.alloc_pd().unwrap();
    let region = ControlRegion::host(&hca, 1 << 20).unwrap();
    let qp = bring_up(&region, pd).unwrap();
    let live = region.storage_report().live_bytes;
    fault.inject(Fault::refuse(Op::DestroyQp, Status::IntErr));
    drop(qp);
    assert_eq!(region.storage_report().live_bytes, live, "all pieces stay in use");
}

#[test]
fn a_lost_reply_fails_a_command_that_was_executed() {
    let (fault, hca) = faulty();
    let effect = Effect::LoseReply(Status::IntErr);
    fault.inject(Fault { op: Some(Op::AllocPd), skip: 0, effect });
    assert!(hca.alloc_pd().is_err());
    let executed = fault.inner().trace();
    assert_eq!(executed.iter().filter(|record| record.op == Some(Op::AllocPd)).count(), 1);
    assert_eq!(executed[0].status, Status::Ok);
    fault.inject(Fault { op: None, skip: 1, effect: Effect::Refuse(Status::Lim) });
    assert!(hca.alloc_pd().is_ok());
    assert!(hca.alloc_pd().is_err(), "any command, after one that passes");
    fault.inject(Fault::refuse(Op::AllocPd, Status::Lim));
    fault.clear();
    assert!(hca.alloc_pd().is_ok());
}

#[test]
fn memory_is_given_back_whatever_fails_in_registering_it() {
    let (fault, hca) = faulty();
    let pd = hca.alloc_pd().unwrap();
    for effect in [Effect::Refuse(Status::NoRes), Effect::LoseReply(Status::IntErr)] {
        fault.inject(Fault { op: Some(Op::CreateMkey), skip: 0, effect });
        assert!(Registered::new(&hca, pd, 4096, Access::ALL).is_err());
        fault.inject(Fault { op: Some(Op::CreateUmem), skip: 0, effect });
        assert!(ControlRegion::host(&hca, 4096).is_err());
    }
    hca.dealloc_pd(pd).expect("no key is left");
}

/// The contract holds behind an injector that injects nothing.
struct Wrapped {
    hcas: [Arc<FaultHca<EmulatedHca>>; 2],
    now: Nanos,
}

impl World for Wrapped {
    fn hca(&self, end: usize) -> Arc<dyn Hca> {
        Arc::clone(&self.hcas[end]) as Arc<dyn Hca>
    }

    fn settle(&mut self, nanos: u64) {
        let end = self.now.plus(nanos);
        loop {
            let steps = [0, 1].map(|idx: usize| self.hcas[idx].inner().step(self.now));
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
fn an_injector_without_a_script_keeps_the_contract() {
    for (name, case) in CASES {
        println!("{name}");
        let fabric = Fabric::inproc(FabricConfig::default());
        let hcas = [0, 1].map(|_| FaultHca::new(device(&fabric, Setup::default().doorbells)));
        case(&mut Wrapped { hcas, now: Nanos(0) });
    }
}

#[test]
fn an_injected_error_is_a_completion_like_any_other() {
    let mut rig = rig(Setup::default());
    rig.requests(ibex_hca::emulated::PathState::Cut);
    let [near, far] = &mut rig.ends;
    near.qp.post(CtrlFlags::SIGNALED, write(far.remote(0), inline(&[1; 8]))).unwrap();
    near.qp.post(CtrlFlags::SIGNALED, Request::Nop { body: Vec::new() }).unwrap();
    rig.settle();
    let (device, qpn) = (Arc::clone(&rig.ends[0].device), rig.ends[0].qp.qpn());
    assert!(device.set_qp_error(qpn, Syndrome::REMOTE_OP, rig.now));
    rig.settle();
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::REMOTE_OP));
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), Some(Syndrome::WR_FLUSH));
    let first = device.first_error(qpn).expect("the device remembers");
    assert_eq!((first.wqe_counter, first.syndrome), (0, Syndrome::REMOTE_OP.0));
    assert!(!device.set_qp_error(ibex_abi::types::QpNum::new(0xfff), Syndrome::REMOTE_OP, rig.now));
}

#[test]
fn the_trace_tells_what_a_recreation_touched() {
    let rig = rig(Setup::default());
    let [near, far] = rig.ends;
    let bystander = HostQp::create(&near.region, near.pd, HostQpSpec::default()).unwrap();
    let _ = near.device.take_trace();
    let old = near.qp.qpn();
    let fresh = near.qp.reset().unwrap().renew().unwrap();
    let new = fresh.qpn();
    let spec = ConnectSpec::default();
    let _qp = fresh.connect(&far.qp.endpoint(spec.psn), &spec).unwrap();
    let trace = near.device.take_trace();
    let ops: Vec<_> = trace.iter().map(|record| (record.op.unwrap(), record.qpn.unwrap())).collect();
    assert_eq!(
        ops,
        [
            (Op::ToErrQp, old),
            (Op::ToRstQp, old),
            (Op::DestroyQp, old),
            (Op::CreateQp, new),
            (Op::Rst2InitQp, new),
            (Op::Init2RtrQp, new),
            (Op::Rtr2RtsQp, new),
        ]
    );
    assert!(trace.iter().all(|record| record.object == ObjectKind::Qp && record.status == Status::Ok));
    assert!(ops.iter().all(|(_, qpn)| *qpn != bystander.qpn()));
    assert!(near.device.trace().is_empty());
}

#[test]
fn memory_behind_a_descriptor_is_reached_like_any_other() {
    let mut rig = rig(Setup::default());
    #[expect(unsafe_code, reason = "plain system calls on a descriptor of this test")]
    // SAFETY: creates and sizes a descriptor that is used below.
    let fd = unsafe {
        let fd = libc::memfd_create(c"ibex-dma-buf".as_ptr(), 0);
        assert_eq!(libc::ftruncate(fd, 1 << 16), 0);
        fd
    };
    let [near, far] = &mut rig.ends;
    let kind = MemoryKind::DmaBuf { fd, offset: 4096 };
    let region = MemoryRegion { addr: 0, len: 8192, kind };
    let hca = as_hca(&far.device);
    let iova = ibex_abi::types::Iova(0x7000_0000);
    #[expect(unsafe_code, reason = "registers memory of a descriptor")]
    // SAFETY: the device maps the descriptor itself.
    let key = unsafe { hca.register(far.pd, region, iova, Access::ALL) }.unwrap();
    let remote = ibex_abi::wqe::Remote { addr: iova, rkey: key.rkey };
    near.qp.post(CtrlFlags::SIGNALED, write(remote, inline(b"into the buffer"))).unwrap();
    rig.settle();
    assert_eq!(rig.ends[0].qp.poll().unwrap().syndrome(), None);
    let mut back = [0_u8; 15];
    #[expect(unsafe_code, reason = "plain system calls on a descriptor of this test")]
    // SAFETY: reads into a buffer of that length, then closes the descriptor once.
    let read = unsafe {
        let read = libc::pread(fd, back.as_mut_ptr().cast(), 15, 4096);
        libc::close(fd);
        read
    };
    assert_eq!((read, &back), (15, b"into the buffer"));
    hca.deregister(key).unwrap();
    assert_eq!(rig.ends[0].qp.query().unwrap().state, QpState::Rts);
}

#[test]
fn bad_regions_are_refused_before_anything_is_granted() {
    let fabric = Fabric::inproc(FabricConfig::default());
    let hca = as_hca(&device(&fabric, Setup::default().doorbells));
    let pd = hca.alloc_pd().unwrap();
    let memory = ibex_hca::host_memory::HostMemory::new(8192).unwrap();
    let good = memory.region();
    let iova = |addr| ibex_abi::types::Iova(addr);
    #[expect(unsafe_code, reason = "the regions are refused")]
    // SAFETY: `memory` outlives every key; refused calls grant nothing.
    let register = |region, at| unsafe { hca.register(pd, region, iova(at), Access::ALL) };
    for len in [0, u64::MAX] {
        let refused = register(MemoryRegion { len, ..good }, good.addr);
        assert!(matches!(refused, Err(HcaError::OutOfRange { field: "region length", .. })));
    }
    assert!(matches!(register(good, good.addr + 8), Err(HcaError::Misaligned { align: 4096, .. })));
    let kind = MemoryKind::DmaBuf { fd: -1, offset: 0 };
    let refused = register(MemoryRegion { kind, ..good }, good.addr);
    assert!(matches!(refused, Err(HcaError::Os { call: "mmap", errno: libc::EBADF })));
    let key = register(good, good.addr + 4096).expect("equal page offsets are enough");
    hca.deregister(key).unwrap();
    hca.dealloc_pd(pd).expect("no key is left");
}
