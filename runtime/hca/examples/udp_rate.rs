//! What the udp fabric moves beside a bare loop over the same socket calls, on the same path in the same run.
//!
//! ```text
//! cargo run --release -p ibex-hca --example udp_rate [-- <address> <rounds> <message bytes> ...]
//! ```
//!
//! Each round measures both for a while, one after the other, in two ways.
//!
//! - *By processor time*: one thread sends and receives in turns, and its processor time counts, so that other
//!   load on the machine does not.
//! - *By the clock*: one thread sends and one receives, as two processes would, and what arrives in a second
//!   counts. Other load counts too: the middle of many rounds is meant.
//!
//! The bare loop sends datagrams as long as the fabric's packets from one hot buffer, checks nothing, repeats
//! nothing, and what arrives it forgets. The fabric moves RDMA WRITEs from registered memory into registered
//! memory.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use ibex_abi::types::{Iova, Psn};
use ibex_abi::wqe::{CtrlFlags, DataSeg, Remote, Request, SegmentBuf};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::{BareSocket, EmulatedConfig, EmulatedHca, Fabric, UdpConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, HostQp, HostQpSpec, Rts};
use ibex_hca::{Access, Hca, Nanos};

/// Seconds of one measurement.
const SPELL: f64 = 0.5;
/// The part of what the bare loop moves that the fabric should move.
const WANTED: f64 = 0.6;
/// Bytes of registered memory, at each end.
const MEMORY: u64 = 1 << 20;
/// Bytes around the payload of a WRITE's packet; RETH only in the first.
const BTH: usize = 12;
const RETH: usize = 16;
const ICRC: usize = 4;

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

fn main() -> Outcome<()> {
    let mut args = std::env::args().skip(1);
    let ip: IpAddr = args.next().map_or(Ok(IpAddr::from([127, 0, 0, 1])), |arg| arg.parse())?;
    let rounds: usize = args.next().map_or(Ok(5), |arg| arg.parse())?;
    let named: Vec<u32> = args.map(|arg| arg.parse()).collect::<Result<_, _>>()?;
    let lens = if named.is_empty() { vec![7168, 64 << 10, 1 << 20] } else { named };
    for len in lens {
        let mut pair = Pair::connect(ip, len)?;
        let own = datagrams(len as usize, pair.mtu as usize);
        let socket = pair.devices[0].fabric().socket();
        println!("messages of {len} bytes, path MTU {}, {socket:?}", pair.mtu);
        let (mut by_processor, mut by_clock) = (Vec::new(), Vec::new());
        for _ in 0..rounds {
            let bare = bare_rate(ip, &own, len)?;
            let equal = bare_rate(ip, &[own[own.len() / 2]], len)?;
            let (fabric, again) = pair.rate();
            by_processor.push(fabric / bare);
            println!(
                "  processor time: bare {:.2} GB/s (all datagrams equal: {:.2})  fabric {:.2} GB/s  \
                 ratio {:.2}  sent again {again}",
                bare / 1e9,
                equal / 1e9,
                fabric / 1e9,
                fabric / bare,
            );
            let bare = bare_moves(ip, &own, len)?;
            let (fabric, again) = pair.moves();
            by_clock.push(fabric / bare);
            println!(
                "  clock:          bare {:.2} GB/s  fabric {:.2} GB/s  ratio {:.2}  sent again {again}",
                bare / 1e9,
                fabric / 1e9,
                fabric / bare,
            );
        }
        for (what, mut ratios) in [("processor time", by_processor), ("clock", by_clock)] {
            ratios.sort_by(f64::total_cmp);
            println!("  ratio by {what}, middle of {rounds}: {:.2} (wanted: {WANTED})", ratios[rounds / 2]);
        }
    }
    Ok(())
}

/// Lengths of the datagrams of one WRITE.
fn datagrams(len: usize, mtu: usize) -> Vec<usize> {
    let packets = len.div_ceil(mtu);
    let payload = |nth: usize| (len - nth * mtu).min(mtu);
    (0..packets).map(|nth| payload(nth) + BTH + ICRC + if nth == 0 { RETH } else { 0 }).collect()
}

/// Processor time of this thread, in seconds.
#[expect(unsafe_code, reason = "the standard library has no clock of processor time")]
fn cpu_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: writes one timespec that is ours.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

/// Bytes per second that arrive when datagrams of these lengths are only sent and received.
fn bare_rate(ip: IpAddr, lens: &[usize], message: u32) -> Outcome<f64> {
    let mut near = BareSocket::bind(SocketAddr::new(ip, 0))?;
    let mut far = BareSocket::bind(SocketAddr::new(ip, 0))?;
    let (to, start, mut arrived) = (far.local(), cpu_seconds(), 0);
    while cpu_seconds() - start < SPELL {
        let (sent, _) = near.send(to, lens);
        let mut left = sent;
        while left != 0 {
            let (count, bytes) = far.receive();
            if count == 0 {
                break;
            }
            (left, arrived) = (left.saturating_sub(count), arrived + bytes);
        }
    }
    Ok(arrived as f64 * payload_share(lens, message) / (cpu_seconds() - start))
}

/// Payload only: what stands around it is not what anybody wants to move.
fn payload_share(lens: &[usize], message: u32) -> f64 {
    let around = lens.iter().sum::<usize>() as f64;
    if lens.len() == 1 { 1.0 } else { f64::from(message) / around }
}

/// Bytes per second that arrive when one thread only sends such datagrams and another only receives.
fn bare_moves(ip: IpAddr, lens: &[usize], message: u32) -> Outcome<f64> {
    let mut near = BareSocket::bind(SocketAddr::new(ip, 0))?;
    let mut far = BareSocket::bind(SocketAddr::new(ip, 0))?;
    let (to, stop, start) = (far.local(), AtomicBool::new(false), Instant::now());
    let arrived = thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut arrived = 0;
            while !stop.load(Ordering::Relaxed) {
                arrived += far.receive_or_wait().1;
            }
            arrived
        });
        while start.elapsed().as_secs_f64() < SPELL {
            near.send(to, lens);
        }
        stop.store(true, Ordering::Relaxed);
        receiver.join()
    });
    let arrived = arrived.map_err(|_| "the receiving thread failed")?;
    Ok(arrived as f64 * payload_share(lens, message) / start.elapsed().as_secs_f64())
}

/// Steps a device, which leaves the processor to the other end when there is nothing to do.
fn step_or_wait(device: &EmulatedHca, now: Nanos) {
    const NAP_NS: u64 = 1_000_000;
    if !device.step(now).did_work {
        device.fabric().wait_for_arrivals(NAP_NS);
    }
}

struct Pair {
    qp: HostQp<Rts>,
    _far_qp: HostQp<Rts>,
    memory: [Registered; 2],
    _regions: [ControlRegion; 2],
    devices: [Arc<EmulatedHca>; 2],
    mtu: u32,
    len: u32,
}

impl Pair {
    fn connect(ip: IpAddr, len: u32) -> Outcome<Self> {
        let device = || {
            let fabric = Fabric::udp(UdpConfig { bind: SocketAddr::new(ip, 0), ..UdpConfig::new(ip) })?;
            EmulatedHca::new(fabric, EmulatedConfig::default())
        };
        let devices = [device()?, device()?];
        let [near, far] = &devices;
        near.fabric().admit(&far.fabric().advert(far.port_id())?)?;
        far.fabric().admit(&near.fabric().advert(near.port_id())?)?;
        let mtu = near.resolve(&far.port().address())?.mtu.bytes();
        let bring_up = |device: &Arc<EmulatedHca>| -> Outcome<_> {
            let hca = Arc::clone(device) as Arc<dyn Hca>;
            let pd = hca.alloc_pd()?;
            let region = ControlRegion::host(&hca, 1 << 20)?;
            let memory = Registered::new(&hca, pd, MEMORY, Access::ALL)?;
            let qp = HostQp::create(&region, pd, HostQpSpec { log_sq_size: 8, ..HostQpSpec::default() })?;
            Ok((qp, memory, region))
        };
        let (one, near_memory, near_region) = bring_up(near)?;
        let (other, far_memory, far_region) = bring_up(far)?;
        let (here, there) = (one.endpoint(Psn::new(0)), other.endpoint(Psn::new(0)));
        let qp = one.connect(&there, &ConnectSpec::default())?;
        let far_qp = other.connect(&here, &ConnectSpec::default())?;
        let (memory, regions) = ([near_memory, far_memory], [near_region, far_region]);
        Ok(Self { qp, _far_qp: far_qp, memory, _regions: regions, devices, mtu, len })
    }

    /// Payload bytes per second that complete, and packets sent again.
    fn rate(&mut self) -> (f64, u64) {
        let [near, far] = [0, 1].map(|end: usize| Arc::clone(&self.devices[end]));
        let again = near.counters().packets.sent_again;
        let (clock, start, mut done) = (Instant::now(), cpu_seconds(), 0);
        while cpu_seconds() - start < SPELL {
            done += self.post();
            let now = Nanos(clock.elapsed().as_nanos() as u64);
            near.step(now);
            far.step(now);
        }
        let rate = (done * u64::from(self.len)) as f64 / (cpu_seconds() - start);
        (rate, near.counters().packets.sent_again - again)
    }

    /// The same by the clock, when one thread works for each device.
    fn moves(&mut self) -> (f64, u64) {
        let [near, far] = [0, 1].map(|end: usize| Arc::clone(&self.devices[end]));
        let again = near.counters().packets.sent_again;
        let clock = Instant::now();
        let now = || Nanos(clock.elapsed().as_nanos() as u64);
        let (stop, mut done) = (AtomicBool::new(false), 0);
        thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    step_or_wait(&far, now());
                }
            });
            while clock.elapsed().as_secs_f64() < SPELL {
                done += self.post();
                step_or_wait(&near, now());
            }
            stop.store(true, Ordering::Relaxed);
        });
        let rate = (done * u64::from(self.len)) as f64 / clock.elapsed().as_secs_f64();
        (rate, near.counters().packets.sent_again - again)
    }

    /// Fills the send queue; how many WQEs completed since.
    fn post(&mut self) -> u64 {
        let before = self.qp.free_blocks();
        while self.qp.poll().is_some() {}
        let after = self.qp.free_blocks();
        let slots = MEMORY / u64::from(self.len);
        let first = u64::from(self.qp.head());
        let mut batch = self.qp.batch();
        for (nth, left) in (first..).zip((1..=after.saturating_sub(1)).rev()) {
            let at = nth % slots * u64::from(self.len);
            let [near, far] = &self.memory;
            let source = DataSeg::new(self.len, near.key().lkey.get(), near.iova(at));
            let remote = Remote { addr: Iova(far.iova(at)), rkey: far.key().rkey };
            let flags = if left % 16 == 0 { CtrlFlags::SIGNALED } else { CtrlFlags::UNSIGNALED };
            let request = Request::Write { remote, payload: vec![SegmentBuf::Data(source)] };
            if batch.push(flags, request).is_err() {
                break;
            }
        }
        batch.commit().ring();
        u64::from(after - before)
    }
}
