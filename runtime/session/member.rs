//! One rank in a process of its own: what [`World`](super::World) is for all ranks of one process.
//!
//! A [`Member`] owns its [`Node`], which is device, GPU and session, and its place at the rendezvous. Ranks meet
//! through queue pairs and, on one host, through mapped memory.
//!
//! ```text
//!  join      rendezvous -> fabric, device, session -> everybody's hello -> admit ports
//!            -> everybody's offers -> connect all -> barrier -> activate all -> barrier
//!  leave     barrier -> session (queue pairs, keys, memory) -> attendant -> device -> fabric
//! ```
//!
//! INVARIANT: kernels post to a peer only after that peer's queue pairs are connected too.

use core::time::Duration;
use std::path::PathBuf;
use std::sync::Arc;

use ibex_abi::types::PathMtu;
use ibex_hca::emulated::switch::FaultPlan;
use ibex_hca::emulated::{Doorbells, EmulatedHca, Fabric};

use super::node::{Node, check_host, parts};
use super::{DeviceWrapper, Gpus, Session};
use crate::bootstrap::{Advertised, Bootstrap, BootstrapError, Place, TcpBootstrap, advertise};
use crate::config::{Config, ValidConfig};
use crate::error::{Error, Violation};
use crate::gpu::pool::Pool;
use crate::ids::Rank;
use crate::recovery::{HostId, Offer};

/// What lies between the devices of ranks that are processes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MemberFabric {
    /// Shared memory of one host.
    Shm,
    /// RC over RoCEv2 through UDP sockets.
    Udp,
}

/// How a [`Member`] runs.
#[derive(Clone, Debug)]
pub struct MemberOptions {
    /// What lies between devices.
    pub fabric: MemberFabric,
    /// How the device learns of work.
    pub doorbells: Doorbells,
    /// Threads that run kernels and step the device meanwhile.
    pub workers: u32,
    /// What runs this rank's kernels: the processors of this machine, or the one GPU that is given; then a thread steps
    /// the device.
    pub gpus: Gpus,
    /// The address to tell peers, as the command line has it.
    pub advertise_flag: Option<String>,
    /// The address to tell peers, as the configuration has it.
    pub advertise: Option<String>,
    /// What goes wrong with packets that this rank sends; fabric `Udp` only.
    pub faults: Option<FaultPlan>,
    /// Largest MTU of the rank's port; fabric `Udp` only.
    pub mtu: PathMtu,
    /// What stands between the session and its device; a [`given`](DeviceWrapper::given) device is refused.
    pub devices: DeviceWrapper,
    /// A file for every packet that this rank sends or receives, or on fabric `Shm` would.
    pub capture: Option<PathBuf>,
    /// The first sequence number of every lane and operation, from 1.
    pub first_seq: u64,
    /// How long ranks wait for each other while they join and leave.
    pub timeout: Duration,
}

impl Default for MemberOptions {
    fn default() -> Self {
        Self {
            fabric: MemberFabric::Shm,
            doorbells: Doorbells::Strict,
            workers: 1,
            gpus: Gpus::default(),
            advertise_flag: None,
            advertise: None,
            faults: None,
            mtu: PathMtu::B4096,
            devices: DeviceWrapper::default(),
            capture: None,
            first_seq: 1,
            timeout: Duration::from_secs(60),
        }
    }
}

/// One rank of a group whose ranks are processes. See the module documentation.
///
/// # Examples
///
/// What a process does that a launcher has started; here two threads play two processes.
///
/// ```
/// use ibex::bootstrap::Place;
/// use ibex::{Config, Error, Member, MemberOptions, Tokens};
///
/// fn rank_main(place: &Place) -> Result<(), Error> {
///     let config = Config {
///         num_ranks: place.num_ranks,
///         max_tokens: 1,
///         hidden: 256,
///         num_experts: 2,
///         max_topk: 2,
///         detect_ms: 20_000,
///         ..Config::default()
///     };
///     let member = Member::join(&config, place, &MemberOptions::default())?;
///     let session = member.session();
///     let (tensors, stream) = (session.tensors()?, session.stream());
///     let x = vec![0x3f80_u16; 256]; // 1.0 in bf16
///     let tokens = Tokens { x: &x, topk_idx: &[0, 1], topk_weights: &[0.5, 0.5] };
///     let num_tokens = session.load(&tensors, 2, &tokens)?;
///     session.launch_step(&stream, &tensors, 2)?; // dispatch, expert, combine
///     assert_eq!(session.finish(&stream, &tensors, num_tokens)?.lost_topk, [0]);
///     drop(tensors);
///     member.leave()
/// }
///
/// # fn main() {
/// # let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
/// // A process asks `Place::from_env()`, which finds RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.
/// let place = |rank: &str| {
///     Place::from_vars(|name| match name {
///         "RANK" => Some(rank.to_string()),
///         "WORLD_SIZE" => Some("2".to_string()),
///         "MASTER_ADDR" => Some("127.0.0.1".to_string()),
///         "MASTER_PORT" => Some(port.to_string()),
///         _ => None,
///     })
///     .unwrap()
///     .unwrap()
/// };
/// std::thread::scope(|scope| {
///     let other = scope.spawn(|| rank_main(&place("1")));
///     rank_main(&place("0")).unwrap();
///     other.join().unwrap().unwrap();
/// });
/// # }
/// ```
pub struct Member {
    node: Node,
    bootstrap: Arc<dyn Bootstrap>,
    advertised: Option<Advertised>,
    timeout: Duration,
}

impl Member {
    /// Joins the group that `place` names and connects to every other rank.
    ///
    /// # Errors
    /// `Config` for a field outside its limit, before anything is created; `Bootstrap` if ranks are missing or differ;
    /// else what a part refused. Then this rank is gone from the group, and the others are told.
    pub fn join(config: &Config, place: &Place, options: &MemberOptions) -> Result<Self, Error> {
        let config = config.validate()?;
        let tcp = TcpBootstrap::join(place, options.timeout)?;
        let advertised = match options.fabric {
            MemberFabric::Shm => None,
            MemberFabric::Udp => {
                let (flag, named) = (options.advertise_flag.as_deref(), options.advertise.as_deref());
                Some(advertise::choose(flag, named, tcp.address())?.for_local_rank(place.local_rank))
            }
        };
        Self::join_through(&config, Arc::new(tcp), advertised, options)
    }

    /// The same through any rendezvous; `advertised` is the address of this rank's socket on fabric `Udp`.
    ///
    /// # Errors
    /// As [`Member::join`].
    pub fn join_through(
        config: &ValidConfig,
        bootstrap: Arc<dyn Bootstrap>,
        advertised: Option<Advertised>,
        options: &MemberOptions,
    ) -> Result<Self, Error> {
        let rank = bootstrap.rank();
        let group = Group {
            bootstrap: &*bootstrap,
            config,
            timeout: options.timeout,
            needs_one_host: options.fabric == MemberFabric::Shm,
        };
        let meet = |fabric: &Fabric, device: &EmulatedHca| group.exchange_hellos(fabric, device);
        let node = Node::new(config, rank, options, advertised, meet)?;
        group.connect(node.session(), options.first_seq)?;
        Ok(Self { node, bootstrap, advertised, timeout: options.timeout })
    }

    /// This rank's session.
    pub fn session(&self) -> &Arc<Session> {
        self.node.session()
    }

    /// The emulated device.
    pub fn device(&self) -> &Arc<EmulatedHca> {
        self.node.device()
    }

    /// The local end of what lies between devices.
    pub fn fabric(&self) -> &Arc<Fabric> {
        self.node.fabric()
    }

    /// The pool that runs this rank's kernels.
    pub fn pool(&self) -> &Arc<Pool> {
        self.node.pool()
    }

    /// The rendezvous, for what the caller wants to exchange.
    pub fn bootstrap(&self) -> &Arc<dyn Bootstrap> {
        &self.bootstrap
    }

    /// The address that peers were told, and why that one; none on fabric `Shm`.
    pub fn advertised(&self) -> Option<Advertised> {
        self.advertised
    }

    /// Completes the capture so far; how many packets it has. None if none was asked for.
    ///
    /// # Errors
    /// `Os` if writing failed, now or earlier.
    pub fn flush_capture(&self) -> Result<Option<u64>, Error> {
        self.node.flush_capture()
    }

    /// Stops or resumes the signs of life, as if this host were stopped.
    pub fn set_silent(&self, silent: bool) {
        self.node.set_silent(silent);
    }

    /// Leaves in peace: returns once every rank has said that it is done, so that nobody misses this one.
    ///
    /// Dropping a member leaves at once, and its peers see a rank that went silent.
    ///
    /// # Errors
    /// `Bootstrap` if a rank is missing or gone.
    pub fn leave(self) -> Result<(), Error> {
        Ok(self.bootstrap.barrier("ibex/leave", self.timeout)?)
    }
}

/// A group that comes together.
struct Group<'a> {
    bootstrap: &'a dyn Bootstrap,
    config: &'a ValidConfig,
    timeout: Duration,
    /// Only ranks of this host can be reached.
    needs_one_host: bool,
}

impl Group<'_> {
    fn gather(&self, key: &'static str, parts: &[Vec<u8>]) -> Result<Vec<Vec<Vec<u8>>>, Error> {
        let blobs = self.bootstrap.all_gather(key, &parts::join(parts), self.timeout)?;
        let split = |(from, blob): (u16, Vec<u8>)| {
            parts::split(&blob).ok_or(BootstrapError::Blob { from: Rank(from), what: key })
        };
        Ok((0..).zip(blobs).map(split).collect::<Result<_, _>>()?)
    }

    /// Makes sure that all ranks mean the same, and makes their ports known.
    fn exchange_hellos(&self, fabric: &Fabric, device: &EmulatedHca) -> Result<(), Error> {
        let mine = [
            format!("{} {:?}", env!("CARGO_PKG_VERSION"), **self.config).into_bytes(),
            fabric.advert(device.port_id())?,
            HostId::current().to_bytes().to_vec(),
        ];
        for (from, hello) in (0..).map(Rank).zip(self.gather("ibex/hello", &mine)?) {
            let [config, advert, host] = &hello[..] else {
                return Err(BootstrapError::Blob { from, what: "a hello" }.into());
            };
            if *config != mine[0] {
                return Err(BootstrapError::Differs { from, what: "version or configuration" }.into());
            }
            if self.needs_one_host {
                check_host(from, host)?;
            }
            if from != self.bootstrap.rank() {
                fabric.admit(advert)?;
            }
        }
        Ok(())
    }

    /// Connects to every other rank; returns when all ranks have done so.
    fn connect(&self, session: &Session, first_seq: u64) -> Result<(), Error> {
        let base_seq = vec![[first_seq; 2]; self.config.lanes as usize];
        session.start_at(&base_seq)?;
        let me = self.bootstrap.rank();
        let others = || (0..self.bootstrap.num_ranks() as u16).map(Rank).filter(|peer| *peer != me);
        let mut mine = Vec::new();
        for peer in (0..self.bootstrap.num_ranks() as u16).map(Rank) {
            // Nothing stands where this rank's offer to itself would.
            mine.push(if peer == me { Vec::new() } else { session.offer(peer, None)?.to_bytes() });
        }
        let offers = self.gather("ibex/offers", &mine)?;
        let mut ports = Vec::new();
        for peer in others() {
            let bytes = offers[peer.index()].get(me.index());
            let broken = BootstrapError::Blob { from: peer, what: "an offer" };
            let offer = Offer::from_bytes(bytes.ok_or(broken)?)
                .map_err(|reason| BootstrapError::Offer { from: peer, reason })?;
            check_offer(peer, &offer, &mut ports)?;
            session.connect(&offer, &base_seq)?;
        }
        self.bootstrap.barrier("ibex/connected", self.timeout)?;
        others().try_for_each(|peer| session.activate(peer))?;
        self.bootstrap.barrier("ibex/active", self.timeout)?;
        Ok(())
    }
}

/// An offer is from whom it says, and from a port of its own.
fn check_offer(
    peer: Rank,
    offer: &Offer,
    ports: &mut Vec<(Rank, ibex_hca::PortAddress)>,
) -> Result<(), Error> {
    let violation = |check, found: Rank| {
        Error::Protocol(Violation { from: peer, check, found: found.0.into(), expected: peer.0.into() })
    };
    if offer.from != peer {
        return Err(violation("offer.from", offer.from));
    }
    let address = offer.port.address();
    if let Some((other, _)) = ports.iter().find(|(_, taken)| *taken == address) {
        return Err(violation("rank at its port's address (address and UDP port must differ)", *other));
    }
    ports.push((peer, address));
    Ok(())
}
