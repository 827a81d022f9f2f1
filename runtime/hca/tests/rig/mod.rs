//! Two emulated devices, one connection, and a clock that the test turns.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses a part of it")]

use std::sync::Arc;

use ibex_abi::types::{Iova, Pd, Psn};
use ibex_abi::wqe::{DataSeg, Remote, Request, SegmentBuf};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{
    Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig, PathState, Placement, PortId, ShmConfig,
};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, CqShape, HostQp, HostQpSpec, Rts};
use ibex_hca::{Access, Hca, Nanos};

pub const BUFFER: u64 = 64 << 10;

pub struct End {
    pub qp: HostQp<Rts>,
    pub buffer: Registered,
    pub region: ControlRegion,
    pub pd: Pd,
    pub device: Arc<EmulatedHca>,
}

pub struct Rig {
    pub ends: [End; 2],
    /// The fabric of end 0, and both ports as it numbers them.
    pub fabric: Arc<Fabric>,
    pub ports: [PortId; 2],
    pub now: Nanos,
}

#[derive(Clone, Copy)]
pub struct Setup {
    pub doorbells: Doorbells,
    pub placement: Placement,
    pub qp: HostQpSpec,
    pub connect: ConnectSpec,
}

impl Default for Setup {
    fn default() -> Self {
        let cq = CqShape::Ring { log_size: 8, overrun_ignore: false };
        Self {
            doorbells: Doorbells::Strict,
            placement: Placement::InOrder,
            qp: HostQpSpec { send_cq: cq, recv_cq: cq, ..HostQpSpec::default() },
            // 4.096 us * 2^8 is about 1 ms; three sends in all.
            connect: ConnectSpec { ack_timeout: 8, retry_count: 2, ..ConnectSpec::default() },
        }
    }
}

pub fn device(fabric: &Arc<Fabric>, doorbells: Doorbells) -> Arc<EmulatedHca> {
    let config = EmulatedConfig { doorbells, ..EmulatedConfig::default() };
    EmulatedHca::new(Arc::clone(fabric), config).unwrap()
}

pub fn as_hca(device: &Arc<EmulatedHca>) -> Arc<dyn Hca> {
    Arc::clone(device) as Arc<dyn Hca>
}

pub fn rig(setup: Setup) -> Rig {
    let config = FabricConfig { placement: setup.placement, ..FabricConfig::default() };
    let fabric = Fabric::inproc(config);
    let devices = [0, 1].map(|_| device(&fabric, setup.doorbells));
    let ends = connect(&devices, setup);
    let ports = [0, 1].map(|end: usize| devices[end].port_id());
    Rig { ends, fabric, ports, now: Nanos(0) }
}

/// The same with each device on a fabric of its own, joined by shared memory as two processes are.
pub fn shm_rig(setup: Setup) -> Rig {
    let fabrics = [0, 1].map(shm_fabric);
    let devices = [0, 1].map(|end: usize| device(&fabrics[end], setup.doorbells));
    let far = introduce(&devices);
    let ends = connect(&devices, setup);
    let ports = [devices[0].port_id(), far];
    let [fabric, _] = fabrics;
    Rig { ends, fabric, ports, now: Nanos(0) }
}

pub fn shm_fabric(first_port: u16) -> Arc<Fabric> {
    Fabric::shm(ShmConfig { first_port, peers_max: 4, ..ShmConfig::default() }).unwrap()
}

/// Makes two devices on different fabrics known to each other; the second as the first's fabric calls it.
pub fn introduce(devices: &[Arc<EmulatedHca>; 2]) -> PortId {
    let [near, far] = devices.each_ref().map(|device| {
        let fabric = device.fabric();
        (fabric, fabric.advert(device.port_id()).unwrap())
    });
    far.0.admit(&near.1).unwrap();
    near.0.admit(&far.1).unwrap()
}

/// Runs a test on a fabric within the process and on one of shared memory.
pub fn on_both(setup: Setup, test: fn(Rig)) {
    test(rig(setup));
    println!("and through shared memory");
    test(shm_rig(setup));
}

/// One more connection between two devices.
pub fn connect(devices: &[Arc<EmulatedHca>; 2], setup: Setup) -> [End; 2] {
    let fresh = [0, 1].map(|end: usize| {
        let hca = as_hca(&devices[end]);
        let pd = hca.alloc_pd().unwrap();
        let region = ControlRegion::host(&hca, 1 << 20).unwrap();
        let buffer = Registered::new(&hca, pd, BUFFER, Access::ALL).unwrap();
        let qp = HostQp::create(&region, pd, setup.qp).unwrap();
        (qp, buffer, region, pd, Arc::clone(&devices[end]))
    });
    let ends = [0, 1].map(|end: usize| fresh[end].0.endpoint(Psn::new(0)));
    let mut nth = 0;
    fresh.map(|(qp, buffer, region, pd, device)| {
        nth += 1;
        let qp = qp.connect(&ends[2 - nth], &setup.connect).unwrap();
        End { qp, buffer, region, pd, device }
    })
}

impl End {
    pub fn data(&self, offset: u64, len: u32) -> DataSeg {
        DataSeg::new(len, self.buffer.key().lkey.get(), self.buffer.iova(offset))
    }

    pub fn remote(&self, offset: u64) -> Remote {
        Remote { addr: Iova(self.buffer.iova(offset)), rkey: self.buffer.key().rkey }
    }

    pub fn put(&self, offset: u64, bytes: &[u8]) {
        self.buffer.view().write(offset, bytes);
    }

    pub fn get(&self, offset: u64, len: u64) -> Vec<u8> {
        self.buffer.view().to_vec(offset, len)
    }
}

impl Rig {
    pub fn step(&mut self) -> bool {
        let steps = [0, 1].map(|end: usize| self.ends[end].device.step(self.now));
        steps.iter().any(|step| step.did_work)
    }

    /// Steps without passing time.
    pub fn settle(&mut self) {
        while self.step() {}
    }

    /// Passes time in steps of 10 us.
    pub fn pass(&mut self, nanos: u64) {
        let end = self.now.plus(nanos);
        while self.now < end {
            self.now = Nanos((self.now.0 + 10_000).min(end.0));
            self.settle();
        }
    }

    /// Sets the direction that requests of end 0 take.
    pub fn requests(&self, state: PathState) {
        let [near, far] = self.ports;
        self.fabric.set_path(near, far, state);
    }

    /// Sets the direction that answers to end 0 take.
    pub fn answers(&self, state: PathState) {
        let [near, far] = self.ports;
        self.fabric.set_path(far, near, state);
    }
}

pub fn write(remote: Remote, payload: Vec<SegmentBuf>) -> Request {
    Request::Write { remote, payload }
}

pub fn inline(bytes: &[u8]) -> Vec<SegmentBuf> {
    vec![SegmentBuf::Inline(bytes.to_vec())]
}

pub fn gather(segments: &[DataSeg]) -> Vec<SegmentBuf> {
    segments.iter().copied().map(SegmentBuf::Data).collect()
}

/// A generator that a seed starts: SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, n: u32) -> u32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        // CAST: the remainder is below `n`.
        ((z ^ (z >> 31)) % u64::from(n)) as u32
    }
}
