//! Two processes' ends in one: a store between their records, a fabric between their devices.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ibex::transfer::{Region, Report, Request, Requester, RequesterOptions, Segment, TransferError, Verb};
use ibex_hca::emulated::{EmulatedConfig, EmulatedHca, Fabric, FabricConfig, ShmConfig, UdpConfig};
use ibex_hca::{Access, Hca, Nanos};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::clock::Clock;
use ibex_metadata::error::Result as StoreResult;
use ibex_metadata::ids::{InstanceId, Stamp};
use ibex_metadata::lease::Leased;
use ibex_metadata::name::RecordName;
use ibex_metadata::publisher::Publisher;
use ibex_metadata::record::{BufferKind, PeerRecord, RecordState, Way};
use ibex_metadata::refresh::Observer;
use ibex_metadata::scope;
use ibex_metadata::store::{Claim, Snapshot};
use ibex_metadata::url::StoreUrl;

pub(crate) const TTL: Duration = Duration::from_secs(600);
/// Nothing here takes so long; a busy machine may take a while.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);
pub(crate) const LEN: u64 = 64 << 10;

pub(crate) fn open(url: &str) -> Blocking {
    Blocking::open(&StoreUrl::parse(url).unwrap(), Clock::system(), PATIENCE).unwrap()
}

pub(crate) fn name(text: &str) -> RecordName {
    RecordName::new("c", "g", text).unwrap()
}

/// One process's end.
pub(crate) struct End {
    pub(crate) device: Arc<EmulatedHca>,
    pub(crate) requester: Arc<Requester>,
    pub(crate) publisher: Arc<Publisher>,
    pub(crate) store: Blocking,
}

impl End {
    /// A process on `device` that owns `called`.
    pub(crate) fn new(
        store: &Blocking,
        device: &Arc<EmulatedHca>,
        called: &str,
        instance: u128,
        slot: u32,
    ) -> Self {
        let instance = InstanceId::new(instance).unwrap();
        let claim = Claim { name: name(called), instance, ttl: TTL, takeover: true };
        let hold = store.claim(&claim).unwrap();
        let publisher = Arc::new(Publisher::new(store.store(), hold));
        let options = RequesterOptions { log_sq_size: 2, ..RequesterOptions::new(instance, slot, 4) };
        let hca = Arc::clone(device) as Arc<dyn Hca>;
        let requester = Arc::new(Requester::new(&hca, options, store.clock().clone()).unwrap());
        Self { device: Arc::clone(device), requester, publisher, store: store.clone() }
    }

    pub(crate) fn publish(&self, change: impl FnOnce(&mut PeerRecord)) -> Stamp {
        let update = |record: &mut PeerRecord| {
            record.state = RecordState::Ready;
            self.requester.advertise(record);
            change(record);
        };
        self.store.update(&self.publisher, update).unwrap()
    }

    /// Offers a region, in place of another of the same identity.
    pub(crate) fn offer(&self, region: &Region) -> Stamp {
        self.publish(|record| {
            record.buffers.retain(|buffer| buffer.buffer_id != region.id());
            record.buffers.push(region.describe(BufferKind::Kv));
        })
    }

    /// Reads a name and takes the answer in, as a refresher does.
    pub(crate) fn look(&self, called: &str) -> Leased<Arc<Snapshot>> {
        let leased = self.store.get(&name(called)).unwrap();
        self.requester.seen(leased.unchecked());
        self.requester.granted(&leased);
        leased
    }

    pub(crate) fn region(&self) -> Region {
        self.requester.register(LEN, Access::ALL).unwrap()
    }
}

/// What a fabric test runs on.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Over {
    Inproc,
    Shm,
    Udp,
}

pub(crate) fn devices(over: Over) -> [Arc<EmulatedHca>; 2] {
    let make =
        |fabric: &Arc<Fabric>| EmulatedHca::new(Arc::clone(fabric), EmulatedConfig::default()).unwrap();
    if over == Over::Inproc {
        let fabric = Fabric::inproc(FabricConfig::default());
        return [make(&fabric), make(&fabric)];
    }
    let fabric = |first_port| match over {
        Over::Udp => {
            let any = std::net::Ipv4Addr::LOCALHOST.into();
            let bind = std::net::SocketAddr::new(any, 0);
            Fabric::udp(UdpConfig { bind, ..UdpConfig::new(any) }).unwrap()
        }
        _ => Fabric::shm(ShmConfig { first_port, peers_max: 4, ..ShmConfig::default() }).unwrap(),
    };
    let devices = [0, 1].map(|port| make(&fabric(port)));
    let adverts = devices.each_ref().map(|device| device.fabric().advert(device.port_id()).unwrap());
    devices[0].fabric().admit(&adverts[1]).unwrap();
    devices[1].fabric().admit(&adverts[0]).unwrap();
    devices
}

/// Two ends whose records know each other.
pub(crate) struct Rig {
    pub(crate) near: End,
    pub(crate) far: End,
}

impl Rig {
    pub(crate) fn new(store: &Blocking, over: Over) -> Self {
        let [one, other] = devices(over);
        let (near, far) = (End::new(store, &one, "near", 1, 0), End::new(store, &other, "far", 2, 1));
        near.publish(|_| {});
        far.publish(|_| {});
        let rig = Self { near, far };
        rig.meet();
        rig
    }

    /// Both look at each other's newest record.
    pub(crate) fn meet(&self) {
        self.near.look("far");
        self.far.look("near");
        assert!(self.near.requester.is_linked(&name("far")));
        assert!(self.far.requester.is_linked(&name("near")));
        let greet = || self.near.requester.greet(&name("far")) & self.far.requester.greet(&name("near"));
        while !greet() {
            self.step();
            self.near.requester.progress();
            self.far.requester.progress();
        }
    }

    pub(crate) fn step(&self) -> bool {
        let now = Nanos(ibex::time::now_ns());
        let steps = [&self.near, &self.far].map(|end| end.device.step(now));
        steps.iter().any(|step| step.did_work)
    }

    /// Steps devices and requesters until nothing moves.
    pub(crate) fn settle(&self) {
        let mut idle = 0;
        while idle < 64 {
            let moved = self.step() | (self.near.requester.progress() + self.far.requester.progress() > 0);
            idle = if moved { 0 } else { idle + 1 };
        }
    }

    /// The number that the near end's record gives the far end.
    pub(crate) fn qpn_of_near(&self) -> u32 {
        let snapshot = self.near.store.get(&name("near")).unwrap();
        match &snapshot.unchecked().record.transports[0].way {
            Way::EpIbgda(way) => way.qpns[1],
            other => panic!("{other:?}"),
        }
    }

    /// What the far device refused: requests under a key that it does not, or no longer, have.
    pub(crate) fn refusals(&self) -> u64 {
        self.far.device.counters().refused_requests
    }
}

/// A resolved request under which `run` works.
pub(crate) fn with_guard<T>(end: &End, called: &str, run: impl FnOnce(&scope::Guard<'_>) -> T) -> T {
    let request = scope::Request::new(end.store.clock().clone());
    let scope = request.scope(&**end.store.store());
    let guard: StoreResult<_> = end.store.resolve(&scope, &name(called));
    run(&guard.unwrap())
}

pub(crate) fn write<'a>(local: &'a Region, segment: &'a Segment, at: u64, len: u32) -> Request<'a> {
    Request { verb: Verb::Write, local, local_offset: at, segment, remote_offset: at, len }
}

/// The outcomes alone; all are quiescent.
pub(crate) fn outcomes(reports: Vec<Report>) -> Vec<Result<u32, TransferError>> {
    assert!(reports.iter().all(|report| report.is_quiescent), "{reports:?}");
    reports.into_iter().map(|report| report.outcome).collect()
}

/// `ibex store serve` in a process of its own.
pub(crate) struct Server {
    child: Child,
    pub(crate) url: String,
}

impl Server {
    pub(crate) fn start() -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ibex"));
        command.args(["store", "serve", "--store", "memory:", "--listen", "127.0.0.1:0"]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let url = line.split_whitespace().find(|word| word.starts_with("ibex://")).unwrap();
        Self { child, url: url.trim_end_matches(',').to_owned() }
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
