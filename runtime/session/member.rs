//! One rank in a process of its own: what [`World`](super::World) is for all ranks of one process.
//!
//! A [`Member`] owns its device, the fabric's local end, one GPU made of the CPU with its worker, one session, and its
//! place at the rendezvous. Ranks meet through queue pairs and, on one host, through mapped memory.
//!
//! A thread of its own, the *attendant*, sends the signs of life and serves the device while no kernel runs: peers may
//! still be sending. While kernels run their worker steps the device, and the attendant stays out of the way.
//!
//! ```text
//!  join      rendezvous -> fabric, device, session -> everybody's hello -> admit ports
//!            -> everybody's offers -> connect all -> barrier -> activate all -> barrier
//!  leave     barrier -> session (queue pairs, keys, memory) -> attendant -> device -> fabric
//! ```
//!
//! INVARIANT: kernels post to a peer only after that peer's queue pairs are connected too.

use core::time::Duration;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ibex_hca::emulated::switch::FaultPlan;
use ibex_hca::emulated::{Capture, Doorbells, EmulatedConfig, EmulatedHca, Fabric, ShmConfig, UdpConfig};
use ibex_hca::{Hca, HcaError, LinkLayer, Nanos};

use super::Session;
use super::attendant::Attendant;
use crate::bootstrap::{Advertised, Bootstrap, BootstrapError, Place, TcpBootstrap, advertise};
use crate::config::{Config, Link, ValidConfig};
use crate::error::{Error, Violation};
use crate::gpu::pool::{Pool, PoolConfig, Progress};
use crate::gpu::{Gpu, HostGpu};
use crate::ids::Rank;
use crate::recovery::{HostId, Offer};
use crate::time::unix_ns;

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
    /// The address to tell peers, as the command line has it.
    pub advertise_flag: Option<String>,
    /// The address to tell peers, as the configuration has it.
    pub advertise: Option<String>,
    /// What goes wrong with packets that this rank sends; fabric `Udp` only.
    pub faults: Option<FaultPlan>,
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
            advertise_flag: None,
            advertise: None,
            faults: None,
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
    // In this order: queue pairs go while the device runs, the device while its fabric does.
    session: Arc<Session>,
    attendant: Attendant,
    device: Arc<EmulatedHca>,
    fabric: Arc<Fabric>,
    pool: Arc<Pool>,
    capture: Option<Arc<Capture>>,
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
        let fabric = make_fabric(options, rank, config.num_ranks, advertised)?;
        let link = match config.link {
            Link::Ib => LinkLayer::Ib,
            Link::Roce => LinkLayer::Roce,
        };
        let device_config =
            EmulatedConfig { link, doorbells: options.doorbells, ..EmulatedConfig::default() };
        let device = EmulatedHca::new(Arc::clone(&fabric), device_config)?;
        let attendant = Attendant::new(&device, &fabric, config.detect_ms);
        let progress: Arc<dyn Progress> = attendant.progress();
        let pool_config = PoolConfig::real_time(options.workers).with_progress(progress);
        let pool = Arc::new(Pool::new(pool_config).map_err(crate::gpu::GpuError::from)?);
        let capture = options.capture.as_deref().map(|path| capture(path, &fabric, &pool)).transpose()?;
        let group = Group {
            bootstrap: &*bootstrap,
            config,
            timeout: options.timeout,
            needs_one_host: options.fabric == MemberFabric::Shm,
        };
        group.exchange_hellos(&fabric, &device)?;
        let gpu: Arc<dyn Gpu> = Arc::new(HostGpu::shared(Arc::clone(&pool), 0));
        let hca = Arc::clone(&device) as Arc<dyn Hca>;
        let session = Arc::new(Session::new(config, rank, gpu, hca)?);
        let attendant = attendant.start(&session, &pool)?;
        group.connect(&session, options.first_seq)?;
        let timeout = options.timeout;
        Ok(Self { session, attendant, device, fabric, pool, capture, bootstrap, advertised, timeout })
    }

    /// This rank's session.
    pub fn session(&self) -> &Arc<Session> {
        &self.session
    }

    /// The emulated device.
    pub fn device(&self) -> &Arc<EmulatedHca> {
        &self.device
    }

    /// The local end of what lies between devices.
    pub fn fabric(&self) -> &Arc<Fabric> {
        &self.fabric
    }

    /// The pool that runs this rank's kernels.
    pub fn pool(&self) -> &Arc<Pool> {
        &self.pool
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
        Ok(self.capture.as_ref().map(|capture| capture.flush()).transpose()?)
    }

    /// Stops or resumes the signs of life, as if this host were stopped.
    pub fn set_silent(&self, silent: bool) {
        self.attendant.set_silent(silent);
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

impl Drop for Member {
    fn drop(&mut self) {
        // Otherwise a sign of life under way could be the last to hold the session, and drop it in the wrong place.
        self.attendant.forget_session();
    }
}

fn make_fabric(
    options: &MemberOptions,
    rank: Rank,
    num_ranks: u32,
    advertised: Option<Advertised>,
) -> Result<Arc<Fabric>, HcaError> {
    match options.fabric {
        MemberFabric::Shm => {
            // CAST: at most 512 ranks.
            let peers_max = num_ranks as u16;
            Fabric::shm(ShmConfig { first_port: rank.0, peers_max, ..ShmConfig::default() })
        }
        MemberFabric::Udp => {
            let ip = advertised.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |a| a.address);
            let config = UdpConfig { node: rank.0, faults: options.faults.clone(), ..UdpConfig::new(ip) };
            match Fabric::udp(config.clone()) {
                // Another job has RoCEv2's port; peers are told which one it is instead.
                Err(HcaError::Os { errno: libc::EADDRINUSE, .. }) => {
                    Fabric::udp(UdpConfig { bind: SocketAddr::new(ip, 0), ..config })
                }
                made => made,
            }
        }
    }
}

/// Has what the fabric's ports send and receive written to a file, stamped with the time of day.
fn capture(path: &Path, fabric: &Fabric, pool: &Pool) -> Result<Arc<Capture>, HcaError> {
    let epoch = Nanos(unix_ns().saturating_sub(pool.now_ns()));
    let capture = Arc::new(Capture::create(path, epoch)?);
    fabric.capture_to(&capture);
    Ok(capture)
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

/// Refuses a rank whose memory is out of reach.
fn check_host(from: Rank, host: &[u8]) -> Result<(), BootstrapError> {
    let host = host.try_into().map_err(|_| BootstrapError::Blob { from, what: "a host" })?;
    let (theirs, ours) = (HostId::from_bytes(host), HostId::current());
    if theirs == ours { Ok(()) } else { Err(BootstrapError::OtherHost { from, theirs, ours }) }
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

/// Byte strings behind each other, each behind its length.
mod parts {
    /// Joins them.
    pub(super) fn join(parts: &[Vec<u8>]) -> Vec<u8> {
        let mut blob = Vec::new();
        for part in parts {
            // CAST: the rendezvous takes at most a mebibyte in all.
            blob.extend((part.len() as u32).to_le_bytes());
            blob.extend(part);
        }
        blob
    }

    /// Splits what a peer joined; none if it is something else.
    pub(super) fn split(mut blob: &[u8]) -> Option<Vec<Vec<u8>>> {
        let mut parts = Vec::new();
        while !blob.is_empty() {
            let (len, rest) = blob.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
            parts.push(part.to_vec());
            blob = rest;
        }
        Some(parts)
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn parts_survive_and_broken_ones_are_found() {
            let parts = vec![vec![1, 2, 3], vec![], vec![4]];
            let blob = join(&parts);
            assert_eq!(split(&blob), Some(parts));
            assert_eq!(split(&[]), Some(vec![]));
            assert_eq!(split(&blob[..blob.len() - 1]), None);
            assert_eq!(split(&[0xff; 6]), None);
        }
    }
}
