//! How fast the emulated device executes what is posted: rates of one stepping thread, and latency.
//!
//! `cargo run --release -p ibex-hca --example rate`
//!
//! Posting is not timed: a full send queue is written first, then one doorbell is rung and the device is
//! stepped until the last request completed. Over shared memory the thread steps both devices in turn, so that
//! the cost of both processes counts. The floor is plain `memcpy` of the same bytes between the
//! same buffers in the same order, on the same thread. Rates are per second of this thread's processor
//! time, so that other load on the machine does not count.

use std::error::Error;
use std::sync::Arc;
use std::time::Instant;

use ibex_abi::types::{Iova, Pd, Psn};
use ibex_abi::wqe::{CtrlFlags, DataSeg, Remote, Request, SegmentBuf};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{
    Backoff, DeviceThread, Doorbells, EmulatedConfig, EmulatedHca, Fabric, FabricConfig, ShmConfig,
};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, HostQp, HostQpSpec, Rts};
use ibex_hca::shared_memory::SharedRegion;
use ibex_hca::{Access, Hca, Mkey, Nanos};

/// Bytes of each buffer: far more than a last-level cache slice holds.
const BUFFER: u64 = 64 << 20;
const LOG_SQ: u8 = 15;
const ROUNDS: usize = 9;
/// Bytes of a request, and whether they stand in the WQE.
const SHAPES: [(u64, bool); 6] =
    [(7168, false), (1024, false), (64, false), (8, true), (28, true), (256, true)];

/// Processor time of this thread, in nanoseconds.
#[expect(unsafe_code, reason = "the standard library has no clock of processor time")]
fn cpu_nanos() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 * 1e9 + time.tv_nsec as f64
}

/// Memory that other processes may map, and its key; the key goes first.
struct Source {
    hca: Arc<dyn Hca>,
    key: Mkey,
    region: SharedRegion,
}

impl Source {
    #[expect(unsafe_code, reason = "registering memory is unsafe by contract")]
    fn new(hca: &Arc<dyn Hca>, pd: Pd) -> Result<Self, Box<dyn Error>> {
        let region = SharedRegion::new(BUFFER, 4096)?;
        let iova = Iova(region.as_ptr().expose_provenance() as u64);
        // SAFETY: accessed by copies and devices only; lives until the key is given back.
        let key = unsafe { hca.register(pd, region.region(), iova, Access::ALL) }?;
        region.view().fill(1);
        Ok(Self { hca: Arc::clone(hca), key, region })
    }

    fn addr(&self, offset: u64) -> u64 {
        self.key.iova.0 + offset
    }
}

impl Drop for Source {
    fn drop(&mut self) {
        if self.hca.deregister(self.key).is_err() {
            eprintln!("the device keeps {} bytes", self.region.len());
        }
    }
}

/// What lies between the two devices.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Between {
    Nothing,
    SharedMemory,
}

struct Bench {
    devices: [Arc<EmulatedHca>; 2],
    /// How many of the devices must be stepped.
    stepped: usize,
    near: Source,
    far: Registered,
    qp: HostQp<Rts>,
    _peer: HostQp<Rts>,
    _regions: [ControlRegion; 2],
}

fn devices(between: Between, doorbells: Doorbells) -> Result<[Arc<EmulatedHca>; 2], Box<dyn Error>> {
    let config = EmulatedConfig { doorbells, ..EmulatedConfig::default() };
    if between == Between::Nothing {
        let fabric = Fabric::inproc(FabricConfig::default());
        return Ok([EmulatedHca::new(Arc::clone(&fabric), config)?, EmulatedHca::new(fabric, config)?]);
    }
    let fabric = |first_port| Fabric::shm(ShmConfig { first_port, ..ShmConfig::default() });
    let devices = [EmulatedHca::new(fabric(0)?, config)?, EmulatedHca::new(fabric(1)?, config)?];
    for (one, other) in [(0, 1), (1, 0)] {
        let advert = devices[other].fabric().advert(devices[other].port_id())?;
        devices[one].fabric().admit(&advert)?;
    }
    Ok(devices)
}

fn bench(between: Between, doorbells: Doorbells) -> Result<Bench, Box<dyn Error>> {
    let devices = devices(between, doorbells)?;
    let mut made = Vec::new();
    for device in &devices {
        let hca = Arc::clone(device) as Arc<dyn Hca>;
        let pd = hca.alloc_pd()?;
        let region = ControlRegion::host(&hca, 8 << 20)?;
        let buffer = Registered::new(&hca, pd, BUFFER, Access::ALL)?;
        buffer.view().fill(1);
        let source = Source::new(&hca, pd)?;
        let spec = HostQpSpec { log_sq_size: LOG_SQ, ..HostQpSpec::default() };
        let qp = HostQp::create(&region, pd, spec)?;
        made.push((region, source, buffer, qp));
    }
    let (Some((far_region, _, far, peer)), Some((near_region, near, _, qp))) = (made.pop(), made.pop())
    else {
        return Err("two ends were made".into());
    };
    let connect = ConnectSpec::default();
    let ends = [qp.endpoint(Psn::new(0)), peer.endpoint(Psn::new(0))];
    let qp = qp.connect(&ends[1], &connect)?;
    let peer = peer.connect(&ends[0], &connect)?;
    let stepped = if between == Between::Nothing { 1 } else { 2 };
    Ok(Bench { devices, stepped, near, far, qp, _peer: peer, _regions: [near_region, far_region] })
}

impl Bench {
    fn request(&self, nth: u64, bytes: u64, inline: bool) -> Request {
        let slots = BUFFER / bytes;
        let at = (nth % slots) * bytes;
        let at = if inline { at & !7 } else { at };
        let remote = Remote { addr: Iova(self.far.iova(at)), rkey: self.far.key().rkey };
        let payload = match inline {
            true => vec![SegmentBuf::Inline(vec![0x5a; bytes as usize])],
            false => {
                let lkey = self.near.key.lkey.get();
                vec![SegmentBuf::Data(DataSeg::new(bytes as u32, lkey, self.near.addr(at)))]
            }
        };
        Request::Write { remote, payload }
    }

    /// Nanoseconds to execute `count` requests of `bytes`.
    fn execute(&mut self, count: u64, bytes: u64, inline: bool) -> Result<f64, Box<dyn Error>> {
        let requests: Vec<_> = (0..count).map(|nth| self.request(nth, bytes, inline)).collect();
        let mut batch = self.qp.batch();
        let mut last = 0;
        for (nth, request) in requests.into_iter().enumerate() {
            let end = nth as u64 + 1 == count;
            // One in 32 is signalled, as the kernels post them.
            let flags = if end || nth % 32 == 31 { CtrlFlags::SIGNALED } else { CtrlFlags::UNSIGNALED };
            last = batch.push(flags, request)?;
        }
        batch.commit().ring();
        let start = cpu_nanos();
        loop {
            for device in &self.devices[..self.stepped] {
                device.step(Nanos(0));
            }
            if self.qp.poll().is_some_and(|completion| completion.wqe_counter == last) {
                return Ok(cpu_nanos() - start);
            }
        }
    }

    /// Nanoseconds that `memcpy` takes for the same copies.
    #[expect(unsafe_code, reason = "the floor is a plain copy between the same buffers")]
    fn floor(&self, count: u64, bytes: u64) -> f64 {
        let slots = BUFFER / bytes;
        let start = cpu_nanos();
        for nth in 0..count {
            let at = (nth % slots) * bytes;
            let from = self.near.addr(at) as *const u8;
            let to = self.far.iova(at) as *mut u8;
            // SAFETY: both buffers are live and hold `bytes` from `at`; nothing else runs.
            unsafe { std::ptr::copy_nonoverlapping(from, to, bytes as usize) };
        }
        cpu_nanos() - start
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn rates(between: Between, doorbells: Doorbells) -> Result<(), Box<dyn Error>> {
    println!("{doorbells:?} doorbells, between the devices: {between:?}");
    println!(
        "{:>8} {:>7} {:>12} {:>10} {:>10} {:>7}",
        "bytes", "inline", "M WQE/s", "GB/s", "memcpy", "ratio"
    );
    // A size on the command line measures that one only.
    let only = std::env::args().nth(1).and_then(|size| size.parse().ok());
    for (bytes, inline) in SHAPES {
        if only.is_some_and(|only: u64| only != bytes) {
            continue;
        }
        let mut bench = bench(between, doorbells)?;
        let blocks = if inline { (32 + 4 + bytes).div_ceil(64) } else { 1 };
        let count = ((1_u64 << LOG_SQ) / blocks).min(4 * BUFFER / bytes);
        bench.execute(count, bytes, inline)?;
        bench.floor(count, bytes);
        let (mut ours, mut floors) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            floors.push(bench.floor(count, bytes));
            ours.push(bench.execute(count, bytes, inline)?);
        }
        let (ours, floor) = (median(ours), median(floors));
        let total = (count * bytes) as f64;
        println!(
            "{bytes:>8} {inline:>7} {:>12.2} {:>10.2} {:>10.2} {:>7.2}",
            count as f64 / ours * 1e3,
            total / ours,
            total / floor,
            floor / ours
        );
    }
    Ok(())
}

/// Post to completion, with a device thread on another core.
fn latency() -> Result<(), Box<dyn Error>> {
    let mut bench = bench(Between::Nothing, Doorbells::Strict)?;
    let _thread = DeviceThread::spawn(bench.devices.to_vec(), Backoff::default())?;
    let mut nanos = Vec::new();
    for nth in 0..20_000 {
        let request = bench.request(nth, 8, true);
        let start = Instant::now();
        bench.qp.post(CtrlFlags::SIGNALED, request)?;
        while bench.qp.poll().is_none() {
            std::hint::spin_loop();
        }
        nanos.push(start.elapsed().as_nanos() as f64);
    }
    nanos.sort_by(f64::total_cmp);
    let at = |share: f64| nanos[(nanos.len() as f64 * share) as usize];
    println!("latency of 8 B inline, post to completion: p50 {} ns, p99 {} ns", at(0.5), at(0.99));
    Ok(())
}

/// A step of a device whose queue pairs have nothing to do, per queue pair.
fn idle() -> Result<(), Box<dyn Error>> {
    const QPS: u32 = 28;
    let fabric = Fabric::inproc(FabricConfig::default());
    let device = EmulatedHca::new(fabric, EmulatedConfig::default())?;
    let hca = Arc::clone(&device) as Arc<dyn Hca>;
    let (pd, region) = (hca.alloc_pd()?, ControlRegion::host(&hca, 8 << 20)?);
    let mut qps = Vec::new();
    for _ in 0..QPS {
        let qp = HostQp::create(&region, pd, HostQpSpec::default())?;
        let itself = qp.endpoint(Psn::new(0));
        qps.push(qp.connect(&itself, &ConnectSpec::default())?);
    }
    let (steps, start) = (100_000, cpu_nanos());
    for _ in 0..steps {
        device.step(Nanos(0));
    }
    let nanos = (cpu_nanos() - start) / f64::from(steps);
    println!("idle step of {QPS} queue pairs: {nanos:.0} ns");
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    rates(Between::Nothing, Doorbells::Strict)?;
    rates(Between::Nothing, Doorbells::Record)?;
    rates(Between::SharedMemory, Doorbells::Strict)?;
    // A size on the command line measures that rate only.
    if std::env::args().len() > 1 {
        return Ok(());
    }
    idle()?;
    latency()
}
