//! The same with kernels on a GPU: its driver is the double of `tests/cuda`, whose device memory is a file, so that a
//! dma-buf of it is a buffer that the emulated device maps, and whose kernels run on the CPU.
//!
//! It judges how GPU and NIC are joined: memory, queues, doorbells, and every step back where one of them refuses.

use std::sync::Arc;

use ibex::error::Error;
use ibex::gpu::pool::{Pool, PoolConfig};
use ibex::gpu::{CudaGpu, CudaMemory, Gpu, GpuError, HostGpu};
use ibex::harness::Rig;
use ibex::session::{DeviceWrapper, Gpus, WorldOptions, reaches_doorbells};
use ibex_abi::prm::{Op, Status};
use ibex_hca::Hca;
use ibex_hca::assisted::AssistedHca;
use ibex_hca::control_region::RegionPlace;
use ibex_hca::fault::{Fault, FaultHca};
use ibex_hca::mlx5::{LiveObjects, Mlx5Hca};

use super::double::Double;
use super::{counters, group, open, under_the_shim};

const RANKS: u32 = 3;

/// A driver whose kernels run here, and its GPU as each rank opens it.
fn gpus(name: &str) -> (Double, Vec<Arc<dyn Gpu>>) {
    let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
    let double = Double::new(name).run_kernels(HostGpu::new(pool, 0));
    let options = double.options(CudaMemory::Device, RANKS);
    let gpus = (0..RANKS).map(|_| Arc::new(CudaGpu::open(&options).unwrap()) as Arc<dyn Gpu>).collect();
    (double, gpus)
}

fn world(gpus: &[Arc<dyn Gpu>], devices: Vec<Arc<dyn Hca>>) -> WorldOptions {
    let (gpus, devices) = (Gpus::Given(gpus.to_vec()), DeviceWrapper::given(devices));
    WorldOptions { gpus, devices, ..WorldOptions::default() }
}

fn as_given(devices: &[Arc<Mlx5Hca>]) -> Vec<Arc<dyn Hca>> {
    devices.iter().map(|device| Arc::clone(device) as Arc<dyn Hca>).collect()
}

fn nothing_is_left(double: &Double, devices: &[Arc<Mlx5Hca>], what: &str) {
    for device in devices {
        assert_eq!(device.live(), LiveObjects::default(), "{what}: {}", device.name());
    }
    assert_eq!(double.live(), 0, "{what}: the GPU holds nothing");
}

/// Where each rank's queues and payload lie.
fn places(rig: &Rig) -> Vec<(RegionPlace, RegionPlace)> {
    let sessions = rig.world().sessions().iter().map(|session| session.places());
    sessions.map(|places| (places.queues.place, places.payload.place)).collect()
}

/// Everything on the GPU, by dma-buf; in every mode, with graphs and a replaced peer.
fn everything_on_the_gpu() {
    let devices = [open(0), open(1), open(2)];
    for config in group::modes(&group::config(RANKS)) {
        let (double, gpus) = gpus("mlx5");
        let rig = Rig::new(&config, &world(&gpus, as_given(&devices))).unwrap();
        assert_eq!(places(&rig), [(RegionPlace::GpuDmaBuf, RegionPlace::GpuDmaBuf); RANKS as usize]);
        group::run(&rig);
        drop((rig, gpus));
        nothing_is_left(&double, &devices, &format!("{config:?}"));
    }
}

#[test]
fn kernels_on_a_gpu_post_to_devices_that_reach_its_memory_by_dma_buf() {
    let test = "gpu::kernels_on_a_gpu_post_to_devices_that_reach_its_memory_by_dma_buf";
    if let Some(report) = under_the_shim(test, everything_on_the_gpu) {
        assert_eq!(counters(&report, "unrung_wqes"), [0; RANKS as usize]);
        assert!(counters(&report, "wqes").iter().all(|wqes| *wqes > 0));
    }
}

/// One step back after the other: no dma-bufs, no queues on the GPU, no doorbells from the GPU.
fn fall_back() {
    let devices = [open(0), open(1), open(2)];
    let config = group::modes(&group::config(RANKS)).remove(0);

    let (double, opened) = gpus("no-dma-buf");
    double.machine(13_000, 2, 9, 124);
    let rig = Rig::new(&config, &world(&opened, as_given(&devices))).unwrap();
    assert_eq!(places(&rig), [(RegionPlace::GpuAddress, RegionPlace::GpuAddress); RANKS as usize]);
    let said = rig.world().sessions()[0].places().queues.to_string();
    assert!(said.starts_with("gpu memory by address; not gpu memory by dma-buf: cuMemGetHandle"), "{said}");
    group::run_eager(&rig);
    drop((rig, opened));
    nothing_is_left(&double, &devices, "no dma-bufs");

    let (double, opened) = gpus("no-queues");
    let stubborn = devices.each_ref().map(|device| {
        let device = FaultHca::new(Arc::clone(device));
        // The dma-buf, then the address; host memory is taken.
        for _ in 0..2 {
            assert!(device.inject(Fault::refuse(Op::CreateUmem, Status::BadParam)));
        }
        device as Arc<dyn Hca>
    });
    let rig = Rig::new(&config, &world(&opened, stubborn.to_vec())).unwrap();
    assert_eq!(places(&rig), [(RegionPlace::HostMapped, RegionPlace::GpuDmaBuf); RANKS as usize]);
    assert_eq!(rig.world().sessions()[0].places().queues.refused.len(), 2);
    group::run_eager(&rig);
    drop((rig, opened, stubborn));
    nothing_is_left(&double, &devices, "no queues on the GPU");

    let (double, opened) = gpus("nowhere");
    let stubborn = devices.each_ref().map(|device| {
        let device = FaultHca::new(Arc::clone(device));
        for _ in 0..3 {
            assert!(device.inject(Fault::refuse(Op::CreateUmem, Status::Lim)));
        }
        device as Arc<dyn Hca>
    });
    let refused = Rig::new(&config, &world(&opened, stubborn.to_vec())).map(drop).unwrap_err();
    assert!(matches!(refused, Error::Command(refusal) if refusal.status == Status::Lim), "{refused:?}");
    drop((opened, stubborn));
    nothing_is_left(&double, &devices, "nowhere");

    let (double, opened) = gpus("no-doorbells");
    double.refuse_registers(true);
    let refused = reaches_doorbells(&*opened[0], &*devices[0]).unwrap_err();
    assert!(refused.to_string().contains("PeerMappingOverride=1 is not set"), "{refused}");
    let refused = Rig::new(&config, &world(&opened, as_given(&devices))).map(drop).unwrap_err();
    assert!(matches!(refused, Error::Gpu(GpuError::Cuda(_))), "{refused}");
    let assisted = devices.each_ref().map(|device| AssistedHca::new(Arc::clone(device), 64).unwrap());
    let forwarders = assisted.each_ref().map(|device| device.spawn().unwrap());
    let given = assisted.each_ref().map(|device| Arc::clone(device) as Arc<dyn Hca>);
    reaches_doorbells(&*opened[0], &*given[0]).unwrap();
    let rig = Rig::new(&config, &world(&opened, given.to_vec())).unwrap();
    group::run_eager(&rig);
    drop((rig, opened, given));
    drop(forwarders);
    drop(assisted);
    nothing_is_left(&double, &devices, "no doorbells from the GPU");
}

#[test]
fn what_gpu_or_device_refuses_is_stepped_back_from_in_order_and_said() {
    let test = "gpu::what_gpu_or_device_refuses_is_stepped_back_from_in_order_and_said";
    if let Some(report) = under_the_shim(test, fall_back) {
        assert_eq!(counters(&report, "unrung_wqes"), [0; RANKS as usize]);
    }
}

/// A GPU that does not say that it orders what NICs write.
fn unordered() {
    let devices = [open(0), open(1), open(2)];
    let config = group::modes(&group::config(RANKS)).remove(0);
    let pool = Arc::new(Pool::new(PoolConfig::real_time(1)).unwrap());
    let double = Double::new("unordered").run_kernels(HostGpu::new(pool, 0));
    double.machine(13_000, 2, 9, 118);
    let options = double.options(CudaMemory::Device, RANKS);
    let opened: Vec<_> =
        (0..RANKS).map(|_| Arc::new(CudaGpu::open(&options).unwrap()) as Arc<dyn Gpu>).collect();
    let refused = Rig::new(&config, &world(&opened, as_given(&devices))).map(drop).unwrap_err();
    assert!(matches!(refused, Error::Gpu(GpuError::UnorderedWrites { found: Some(0), .. })), "{refused}");
    assert!(refused.to_string().contains("orders what NICs write for scope 0"), "{refused}");
    drop(opened);
    nothing_is_left(&double, &devices, "unordered");
}

#[test]
fn a_gpu_that_does_not_order_what_nics_write_has_no_queue_pairs_into_its_memory() {
    let test = "gpu::a_gpu_that_does_not_order_what_nics_write_has_no_queue_pairs_into_its_memory";
    under_the_shim(test, unordered);
}
