//! Our end of a connection: an emulated device behind a UDP socket, driven by work requests.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::{Iova, PathMtu, Pd, Psn, QpNum};
use ibex_abi::wqe::{CtrlFlags, DataSeg, Remote, Request, SegmentBuf};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::switch::FaultPlan;
use ibex_hca::emulated::{Backoff, DeviceThread, EmulatedConfig, EmulatedHca, Fabric, UdpConfig};
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{Completion, ConnectSpec, CqShape, Endpoint, HostQp, HostQpSpec, Rts};
use ibex_hca::objects::RecvSpec;
use ibex_hca::{Access, Hca, PortAddress};

use super::guest::{Connection, Guest, Qp, Region, access, pattern};

/// Bytes of each end's memory: the longest message and something behind it.
pub(crate) const MEMORY_LEN: u64 = (1 << 20) + 4096;
/// First sequence numbers, so that every connection passes the end of the circle.
const OUR_PSN: u32 = 0xff_fff0;
const GUEST_PSN: u32 = 0xff_fffa;
/// Code of a second: both ends share a machine with whatever else is building there.
const PATIENT: u8 = 18;
/// A completion takes milliseconds, or all retries.
const PATIENCE: Duration = Duration::from_secs(60);
/// A queue pair number that neither end has.
const NOBODY: u32 = 0x00ff_0000;

/// A device with the guest as its only peer.
pub(crate) struct Ours {
    own: IpAddr,
    peer: PortAddress,
    // Fields drop in this order: everything that needs the device, its thread, the device.
    region: ControlRegion,
    pd: Pd,
    _thread: DeviceThread,
    pub(crate) device: Arc<EmulatedHca>,
}

/// What is special about a connection.
#[derive(Clone, Copy)]
pub(crate) struct Spec {
    pub(crate) mtu: u32,
    /// Of both ends: 4.096 us * 2^this.
    pub(crate) timeout: u8,
    /// Of both ends.
    pub(crate) retry: u8,
    pub(crate) rnr_retry: u8,
    /// Both ends' answers go to queue pairs that do not exist.
    pub(crate) to_nobody: bool,
    /// What the guest's queue pair lets us do.
    pub(crate) guest_access: u32,
    /// The guest begins this many sequence numbers after the one that we expect.
    pub(crate) guest_skips: u32,
}

impl Spec {
    pub(crate) const fn new(mtu: u32) -> Self {
        let (timeout, guest_access) = (PATIENT, access::ALL);
        Self { mtu, timeout, retry: 7, rnr_retry: 7, to_nobody: false, guest_access, guest_skips: 0 }
    }

    /// Ends that soon send again what is not answered.
    pub(crate) const fn impatient(mtu: u32, timeout: u8, retry: u8) -> Self {
        Self { timeout, retry, ..Self::new(mtu) }
    }
}

/// A connection and the memory of both ends.
pub(crate) struct Pair {
    pub(crate) qp: HostQp<Rts>,
    pub(crate) memory: Registered,
    pub(crate) guest_qp: Qp,
    pub(crate) guest_memory: Region,
}

impl Ours {
    /// Binds the RoCE port of `own`; what this end sends suffers from `faults`.
    pub(crate) fn new(own: IpAddr, peer: IpAddr, faults: Option<FaultPlan>) -> Self {
        let fabric = Fabric::udp(UdpConfig { faults, ..UdpConfig::new(own) }).expect("the address is ours");
        let device = EmulatedHca::new(Arc::clone(&fabric), EmulatedConfig::default()).expect("a device");
        let peer = fabric.admit_foreign(peer, 1).expect("an address of the same family");
        let thread = DeviceThread::spawn(vec![Arc::clone(&device)], Backoff::default()).expect("a thread");
        let hca = Arc::clone(&device) as Arc<dyn Hca>;
        let pd = hca.alloc_pd().expect("a protection domain");
        let region = ControlRegion::host(&hca, 4 << 20).expect("a control region");
        Self { own, peer, region, pd, _thread: thread, device }
    }

    fn hca(&self) -> Arc<dyn Hca> {
        Arc::clone(&self.device) as Arc<dyn Hca>
    }

    /// Connects a fresh queue pair of each end.
    pub(crate) fn connect(&self, guest: &mut Guest, spec: Spec) -> Pair {
        let memory = Registered::new(&self.hca(), self.pd, MEMORY_LEN, Access::ALL).expect("memory");
        let cq = CqShape::Ring { log_size: 8, overrun_ignore: false };
        let recv = Some(RecvSpec { log_size: 4, log_segs: 0 });
        let shape = HostQpSpec { recv, send_cq: cq, recv_cq: cq, ..HostQpSpec::default() };
        let qp = HostQp::create(&self.region, self.pd, shape).expect("a queue pair");
        let guest_memory = guest.region(MEMORY_LEN, access::ALL);
        let guest_qp = guest.qp(spec.guest_access);
        let connection = Connection {
            peer: self.own,
            peer_qpn: if spec.to_nobody { NOBODY } else { qp.qpn().get() },
            peer_psn: OUR_PSN,
            psn: GUEST_PSN + spec.guest_skips,
            mtu: spec.mtu,
            timeout: spec.timeout,
            retry: spec.retry,
            rnr_retry: spec.rnr_retry,
            min_rnr_timer: 12,
        };
        guest.connect(guest_qp, &connection);
        let remote = Endpoint {
            address: self.peer,
            qpn: QpNum::new(if spec.to_nobody { NOBODY } else { guest_qp.qpn }),
            psn: Psn::new(GUEST_PSN),
        };
        let connect = ConnectSpec {
            psn: Psn::new(OUR_PSN),
            mtu: mtu(spec.mtu),
            ack_timeout: spec.timeout,
            retry_count: spec.retry,
            rnr_retry: spec.rnr_retry,
            log_reads: 3,
            ..ConnectSpec::default()
        };
        let qp = qp.connect(&remote, &connect).expect("a connection");
        Pair { qp, memory, guest_qp, guest_memory }
    }
}

/// The device's name for a number of bytes.
fn mtu(bytes: u32) -> PathMtu {
    let named = [
        (256, PathMtu::B256),
        (512, PathMtu::B512),
        (1024, PathMtu::B1024),
        (2048, PathMtu::B2048),
        (4096, PathMtu::B4096),
    ];
    named.iter().find(|(len, _)| *len == bytes).expect("one of the five").1
}

impl Pair {
    pub(crate) fn fill(&self, offset: u64, len: usize, seed: u64) {
        self.memory.view().write(offset, &pattern(len, seed));
    }

    pub(crate) fn get(&self, offset: u64, len: usize) -> Vec<u8> {
        self.memory.view().to_vec(offset, len as u64)
    }

    pub(crate) fn word(&self, offset: u64) -> u64 {
        u64::from_ne_bytes(self.get(offset, 8).try_into().expect("eight bytes"))
    }

    pub(crate) fn data(&self, offset: u64, len: usize) -> DataSeg {
        let len = u32::try_from(len).expect("a short message");
        DataSeg::new(len, self.memory.key().lkey.get(), self.memory.iova(offset))
    }

    /// Our memory as a payload.
    pub(crate) fn payload(&self, offset: u64, len: usize) -> Vec<SegmentBuf> {
        vec![SegmentBuf::Data(self.data(offset, len))]
    }

    /// The guest's memory as our requests name it.
    pub(crate) fn remote(&self, offset: u64) -> Remote {
        let Region { addr, rkey, .. } = self.guest_memory;
        Remote { addr: Iova(addr + offset), rkey: ibex_abi::types::Rkey(rkey) }
    }

    /// Our memory as the guest's requests name it: address and key.
    pub(crate) fn target(&self, offset: u64) -> String {
        format!("{} {}", self.memory.iova(offset), self.memory.key().rkey.get())
    }

    pub(crate) fn post(&mut self, request: Request) {
        self.qp.post(CtrlFlags::SIGNALED, request).expect("room in the queue");
    }

    /// Has the guest post: `VERB QP MR` and the rest.
    pub(crate) fn guest_posts(&self, guest: &mut Guest, verb: &str, rest: &str) {
        guest.ask(&format!("{verb} {} {} {rest}", self.guest_qp.index, self.guest_memory.index));
    }

    /// The next completion of a request of ours.
    pub(crate) fn completion(&mut self) -> Completion {
        wait_for(|| self.qp.poll())
    }

    /// The next completion of a receive of ours.
    pub(crate) fn received(&mut self) -> Completion {
        wait_for(|| self.qp.poll_recv())
    }

    pub(crate) fn expect_good(&mut self) {
        let done = self.completion();
        assert_eq!(done.syndrome(), None, "{done:?}");
    }

    pub(crate) fn expect_error(&mut self, syndrome: Syndrome) {
        let done = self.completion();
        assert_eq!(done.syndrome(), Some(syndrome), "{done:?}");
    }

    /// The guest's request ended so.
    pub(crate) fn expect_status(&self, guest: &mut Guest, status: u64) {
        let done = guest.completion(self.guest_qp);
        assert_eq!(done.status, status, "{done:?}");
    }
}

fn wait_for<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if let Some(done) = poll() {
            return done;
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    panic!("no completion within {PATIENCE:?}");
}
