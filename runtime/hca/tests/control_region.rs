//! Where a control region lies: the best place that the device takes, with the reasons against better ones.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

use std::sync::Arc;

use ibex_abi::prm::{Op, Status};
use ibex_hca::control_region::{Candidate, Choice, ControlError, ControlRegion, RegionPlace};
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig};
use ibex_hca::fault::{Fault, FaultHca};
use ibex_hca::host_memory::HostMemory;
use ibex_hca::{Hca, HcaError, MemoryKind, MemoryRegion};

const LEN: u64 = 1 << 16;

fn device() -> Arc<FaultHca<EmulatedHca>> {
    let fabric = Fabric::inproc(FabricConfig::default());
    FaultHca::new(EmulatedHca::new(fabric, EmulatedConfig::default()).unwrap())
}

/// Chooses among a dma-buf that is none, memory that stands for a GPU's, and memory of the host.
fn choose(
    device: &Arc<FaultHca<EmulatedHca>>,
    gpu: &HostMemory,
) -> Result<(ControlRegion, Choice), ControlError> {
    let hca = Arc::clone(device) as Arc<dyn Hca>;
    let buffer = MemoryRegion { addr: 0, len: LEN, kind: MemoryKind::DmaBuf { fd: -1, offset: 0 } };
    let candidates = [
        Candidate::given(RegionPlace::GpuDmaBuf, buffer, None),
        Candidate::given(RegionPlace::GpuAddress, gpu.region(), None),
        Candidate::host(LEN),
    ];
    #[expect(unsafe_code, reason = "registering memory is unsafe by contract")]
    // SAFETY: every caller drops the region before `gpu`.
    unsafe {
        ControlRegion::first_of(&hca, &candidates)
    }
}

#[test]
fn the_first_place_that_the_device_takes_is_taken_and_the_others_reasons_are_kept() {
    let (device, gpu) = (device(), HostMemory::new(LEN).unwrap());
    let (region, choice) = choose(&device, &gpu).unwrap();
    assert_eq!(choice.place, RegionPlace::GpuAddress);
    assert!(matches!(
        choice.refused[..],
        [(RegionPlace::GpuDmaBuf, ControlError::Hca(HcaError::Os { call: "mmap", errno: libc::EBADF }))]
    ));
    let said = choice.to_string();
    assert!(
        said.starts_with("control region in gpu memory by address; not in gpu memory by dma-buf: "),
        "{said}"
    );
    assert_eq!(region.base(), gpu.region().addr);
    drop(region);

    device.inject(Fault::refuse(Op::CreateUmem, Status::BadParam));
    device.inject(Fault::refuse(Op::CreateUmem, Status::BadParam));
    let (region, choice) = choose(&device, &gpu).unwrap();
    assert_eq!((choice.place, choice.refused.len()), (RegionPlace::HostMapped, 2));
    assert!(region.carve_record().unwrap().view().is_some(), "the host sees its own memory");
}

#[test]
fn if_no_place_is_taken_the_last_reason_is_told_and_nothing_is_left() {
    let (device, gpu) = (device(), HostMemory::new(LEN).unwrap());
    for _ in 0..3 {
        device.inject(Fault::refuse(Op::CreateUmem, Status::Lim));
    }
    let error = choose(&device, &gpu).unwrap_err();
    assert!(matches!(error, ControlError::Hca(HcaError::Command(refusal)) if refusal.status == Status::Lim));
    let umems = device.inner().trace().iter().filter(|command| command.op == Some(Op::CreateUmem)).count();
    assert_eq!(umems, 0, "a refused command does not reach the device");
}
