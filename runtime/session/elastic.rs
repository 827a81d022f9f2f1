//! One rank, in a process of its own, of a group that outlives its members.
//!
//! An [`ElasticMember`] owns its [`Node`] and a thread, the *keeper's*, that steps a [`Keeper`] over a [`StoreBoard`].
//! Ranks find each other through a metadata store and nothing else: the first ranks of a group, replacements and ranks
//! by which it grows come in by the same path.
//!
//! ```text
//!  join          node -> claim the name -> keeper runs                      Outside, then Joining
//!  wait_linked   every pair that this rank is half of is connected          time to fetch what it needs
//!  ready         what it fetched is in place                                the group closes its gate, switches
//!  wait_open     a member, between two steps, with an open gate             launch a step
//!  leave         drains at a gate; drop: gone, as if killed
//! ```
//!
//! Peers on the same host are watched through process descriptors: the end of a process is known in a millisecond.
//!
//! INVARIANT: the keeper goes before the session: whatever it has begun, nobody else ends.

use core::time::Duration;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use ibex_hca::HcaError;
use ibex_hca::emulated::{AdvertError, EmulatedHca, Fabric, PortId};
use ibex_metadata::blocking::Blocking;
use ibex_metadata::derived::{Provenance, RegistryCounters};
use ibex_metadata::ids::Stamp;
use ibex_metadata::publisher::Publisher;
use ibex_metadata::record::PeerRecord;
use parking_lot::{Condvar, Mutex};

use super::attendant::Lateness;
use super::keeper::{Keeper, KeeperEvent, KeeperOptions, MembershipView};
use super::node::{Node, check_host, parts};
use super::store_board::{Bell, BoardClaim, GroupName, StoreBoard};
use super::{MemberFabric, MemberOptions, Session};
use crate::bootstrap::{Advertised, BootstrapError, advertise};
use crate::config::{Config, ValidConfig};
use crate::error::{Error, OsError};
use crate::gpu::pool::Pool;
use crate::ids::Rank;
use crate::membership::{Instance, Membership, MembershipConfig, RankSet};
use crate::placement::Placement;
use crate::recovery::{HostId, draw_instance};

mod exits;

use exits::Exits;

/// Longest time between two steps of the keeper while nothing is due.
const NAP: Duration = Duration::from_millis(2);
/// The same while the gate is closed: steps wait for it.
const NAP_AT_GATE: Duration = Duration::from_micros(200);

/// Where an [`ElasticMember`] belongs, and how it runs.
#[derive(Clone, Debug)]
pub struct ElasticOptions {
    /// Where the group keeps what it agrees on.
    pub group: GroupName,
    /// The rank to be.
    pub rank: Rank,
    /// Who forms the first epoch; the rest of the configured ranks is room to grow.
    pub initial: RankSet,
    /// Take the name from a process whose lease still runs: for launchers that know that it is dead. Otherwise the
    /// claim is refused until the lease has run out.
    pub takeover: bool,
    /// A rank that is evicted sooner than this after it had come is flapping, and from the fourth time on held down;
    /// 100 x `detect_ms` unless said otherwise.
    pub flap_window: Option<Duration>,
    /// Device, fabric, workers; `first_seq` is the group's to say.
    pub node: MemberOptions,
}

/// What the keeper's thread and callers share.
struct Shared {
    keeper: Mutex<Keeper>,
    stepped: Condvar,
    is_over: Mutex<bool>,
}

/// One rank of a group that outlives its members. See the module documentation.
pub struct ElasticMember {
    // In this order: the keeper's thread ends first, then the session goes.
    thread: Option<JoinHandle<()>>,
    shared: Arc<Shared>,
    bell: Bell,
    node: Node,
    ports: Ports,
    advertised: Option<Advertised>,
    instance: Instance,
    store: Blocking,
    publisher: Arc<Publisher>,
}

/// By rank, the ports that its incarnations have had on this rank's end of the fabric, that of the newest last.
type Ports = Arc<Mutex<BTreeMap<Rank, Vec<PortId>>>>;

impl ElasticMember {
    /// Claims the rank's name and starts to join; returns before anybody has answered.
    ///
    /// # Errors
    /// `Config` for a field outside its limit, before anything is created; `Store` if the store does not answer or
    /// another process holds the name; else what a part refused. Nothing stays behind.
    pub fn join(config: &Config, store: &Blocking, options: &ElasticOptions) -> Result<Self, Error> {
        let config = config.validate()?;
        let rank = options.rank;
        let instance = draw_instance();
        let advertised = advertised(options)?;
        let mut advert = Vec::new();
        let meet = |fabric: &Fabric, device: &EmulatedHca| {
            advert = hello(&config, fabric, device, instance)?;
            Ok(())
        };
        let node = Node::new(&config, rank, &options.node, advertised, meet)?;
        let mut limits = MembershipConfig::new(&config, options.initial);
        if let Some(window) = options.flap_window {
            // CAST: 584 years.
            limits.flap_window_ns = window.as_nanos() as u64;
        }
        let board = StoreBoard::claim(
            store,
            &BoardClaim {
                group: options.group.clone(),
                rank,
                num_ranks: config.num_ranks,
                instance,
                lease_ttl: Duration::from_nanos(limits.lease_ttl_ns),
                takeover: options.takeover,
                grace: Duration::from_nanos(limits.store_grace_ns),
            },
        )?;
        let (bell, publisher) = (board.bell(), board.publisher());
        let membership = Membership::new(limits, board.claimed(), node.pool().now_ns());
        let exits = Arc::new(Mutex::new(Exits::default()));
        let ports = Ports::default();
        let introduce = Introducer {
            config: config.clone(),
            fabric: Arc::clone(node.fabric()),
            needs_one_host: options.node.fabric == MemberFabric::Shm,
            exits: Arc::clone(&exits),
            ports: Arc::clone(&ports),
        };
        let keeper = KeeperOptions {
            advert,
            introduce: Some(Box::new(move |from, bytes: &[u8]| introduce.introduce(from, bytes))),
            records: Some(Box::new(board.records())),
        };
        let keeper = Keeper::new(Arc::clone(node.session()), membership, Box::new(board), keeper)?;
        let shared = Arc::new(Shared {
            keeper: Mutex::new(keeper),
            stepped: Condvar::new(),
            is_over: Mutex::new(false),
        });
        let thread = start(&shared, node.pool(), &bell, exits)?;
        let store = store.clone();
        Ok(Self { thread: Some(thread), shared, bell, node, ports, advertised, instance, store, publisher })
    }

    /// This rank's session.
    #[must_use]
    pub fn session(&self) -> &Arc<Session> {
        self.node.session()
    }

    /// The emulated device.
    #[must_use]
    pub fn device(&self) -> &Arc<EmulatedHca> {
        self.node.device()
    }

    /// The local end of what lies between devices.
    #[must_use]
    pub fn fabric(&self) -> &Arc<Fabric> {
        self.node.fabric()
    }

    /// The pool that runs this rank's kernels; its clock is the one of [`KeeperEvent::at_ns`].
    #[must_use]
    pub fn pool(&self) -> &Arc<Pool> {
        self.node.pool()
    }

    /// The address that peers are told; none on fabric `Shm`.
    #[must_use]
    pub fn advertised(&self) -> Option<Advertised> {
        self.advertised
    }

    /// The port of a peer's newest known incarnation, as this rank's end of the fabric numbers it.
    #[must_use]
    pub fn port_of(&self, peer: Rank) -> Option<PortId> {
        self.ports.lock().get(&peer).and_then(|ports| ports.last().copied())
    }

    /// Which process this is, to the group.
    #[must_use]
    pub fn instance(&self) -> Instance {
        self.instance
    }

    /// What this rank knows of its group.
    #[must_use]
    pub fn view(&self) -> MembershipView {
        self.shared.keeper.lock().view()
    }

    /// What has happened since this was last asked.
    #[must_use]
    pub fn take_events(&self) -> Vec<KeeperEvent> {
        self.shared.keeper.lock().take_events()
    }

    /// What was made of a peer's record, and stands.
    #[must_use]
    pub fn derived(&self, peer: Rank) -> Vec<Provenance> {
        self.shared.keeper.lock().derived(peer)
    }

    /// What was retired because records changed, or queue pairs went.
    #[must_use]
    pub fn derived_counters(&self) -> RegistryCounters {
        self.shared.keeper.lock().derived_counters()
    }

    /// Changes this rank's record: buffers, manifests, whatever it offers besides. How the group reaches it is the
    /// keeper's to say. Waits for the store.
    ///
    /// # Errors
    /// `Store`, as [`Publisher::update`].
    pub fn publish(&self, change: impl FnOnce(&mut PeerRecord) + Send) -> Result<Stamp, Error> {
        Ok(self.store.update(&self.publisher, change)?)
    }

    /// Says that this rank has what it needs; `digest` is told to the group, which then switches to it.
    pub fn ready(&self, digest: u128) {
        self.session().ready(digest);
        self.bell.ring();
    }

    /// Asks for another placement; the group switches to it at its next gate.
    pub fn propose_placement(&self, placement: Placement) {
        self.shared.keeper.lock().propose_placement(self.pool().now_ns(), placement);
        self.bell.ring();
    }

    /// Waits until this rank is admitted and connected with every member; whether it is.
    ///
    /// # Errors
    /// `Membership` once the group is lost to this rank.
    pub fn wait_linked(&self, patience: Duration) -> Result<bool, Error> {
        self.wait(patience, Keeper::is_linked)
    }

    /// Waits until a step may begin; whether one may. That is also so while a gate is closed further on: whoever is
    /// behind must run up to it, or the group waits for it.
    ///
    /// # Errors
    /// `Membership` once the group is lost to this rank.
    pub fn wait_open(&self, patience: Duration) -> Result<bool, Error> {
        self.wait(patience, |keeper| keeper.is_serving() && keeper.session().may_begin_step())
    }

    fn wait(&self, patience: Duration, is_so: impl Fn(&Keeper) -> bool) -> Result<bool, Error> {
        // CAST: 584 years.
        let until_ns = self.pool().now_ns().saturating_add(patience.as_nanos() as u64);
        let mut keeper = self.shared.keeper.lock();
        loop {
            if let Some(stop) = keeper.stopped() {
                return Err(Error::Membership(stop));
            }
            if is_so(&keeper) {
                return Ok(true);
            }
            let left_ns = until_ns.saturating_sub(self.pool().now_ns());
            if left_ns == 0 {
                return Ok(false);
            }
            // The thread tells after every step of the keeper.
            self.shared.stepped.wait_for(&mut keeper, Duration::from_nanos(left_ns));
        }
    }

    /// Leaves on purpose: at the next gate the group goes on without this rank, which loses nothing by it. The caller
    /// goes on launching steps until [`ElasticMember::wait_open`] says `Left`.
    pub fn begin_leave(&self) {
        self.shared.keeper.lock().leave(self.pool().now_ns());
        self.bell.ring();
    }

    /// How late this process itself was since this was last asked: a peer that gave it up within `detect_ms` was
    /// right to if it was silent for longer.
    #[must_use]
    pub fn take_lateness(&self) -> Lateness {
        self.node.take_lateness()
    }

    /// Stops or resumes the signs of life, as if this host were stopped.
    pub fn set_silent(&self, silent: bool) {
        self.node.set_silent(silent);
    }

    /// Completes the capture so far; how many packets it has. None if none was asked for.
    ///
    /// # Errors
    /// `Os` if writing failed, now or earlier.
    pub fn flush_capture(&self) -> Result<Option<u64>, Error> {
        self.node.flush_capture()
    }
}

impl Drop for ElasticMember {
    fn drop(&mut self) {
        *self.shared.is_over.lock() = true;
        self.bell.ring();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !thread::panicking()
        {
            // PANIC: membership met a broken invariant of ours; its message was printed there.
            panic!("the keeper panicked");
        }
    }
}

fn advertised(options: &ElasticOptions) -> Result<Option<Advertised>, Error> {
    match options.node.fabric {
        MemberFabric::Shm => Ok(None),
        MemberFabric::Udp => {
            let (flag, named) = (options.node.advertise_flag.as_deref(), options.node.advertise.as_deref());
            // Nobody listens anywhere: without a word about it, the group is on this machine.
            let here = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0);
            let chosen = advertise::choose(flag, named, here)?;
            Ok(Some(chosen.for_local_rank(options.rank.0.into())))
        }
    }
}

/// What peers must know before they connect: version and configuration, the port, the host, the process.
fn hello(
    config: &ValidConfig,
    fabric: &Fabric,
    device: &EmulatedHca,
    instance: Instance,
) -> Result<Vec<u8>, Error> {
    Ok(parts::join(&[
        meaning(config),
        fabric.advert(device.port_id())?,
        HostId::current().to_bytes().to_vec(),
        std::process::id().to_le_bytes().to_vec(),
        instance.0.to_le_bytes().to_vec(),
    ]))
}

/// What must be the same on every rank.
fn meaning(config: &ValidConfig) -> Vec<u8> {
    format!("{} {:?}", env!("CARGO_PKG_VERSION"), **config).into_bytes()
}

/// Takes in the hellos of peers.
struct Introducer {
    config: ValidConfig,
    fabric: Arc<Fabric>,
    /// Only ranks of this host can be reached.
    needs_one_host: bool,
    exits: Arc<Mutex<Exits>>,
    ports: Ports,
}

impl Introducer {
    fn introduce(&self, from: Rank, bytes: &[u8]) -> Result<(), Error> {
        let blob = BootstrapError::Blob { from, what: "a hello" };
        let parts = parts::split(bytes).ok_or(blob)?;
        let [theirs, advert, host, process, instance] = &parts[..] else {
            return Err(BootstrapError::Blob { from, what: "a hello" }.into());
        };
        if *theirs != meaning(&self.config) {
            return Err(BootstrapError::Differs { from, what: "version or configuration" }.into());
        }
        if self.needs_one_host {
            check_host(from, host)?;
        }
        self.admit(from, advert)?;
        let (Ok(process), Ok(instance)) = (process[..].try_into(), instance[..].try_into()) else {
            return Err(BootstrapError::Blob { from, what: "a process" }.into());
        };
        let is_here = host[..].try_into().is_ok_and(|host| HostId::from_bytes(host) == HostId::current());
        if is_here {
            let instance = Instance(u128::from_le_bytes(instance));
            self.exits.lock().watch(from, instance, u32::from_le_bytes(process));
        }
        Ok(())
    }

    /// A replacement may sit behind the socket of the process that it replaces, or of an earlier one: the port is
    /// known then, and numbers of queue pairs and packets tell them apart.
    fn admit(&self, from: Rank, advert: &[u8]) -> Result<(), HcaError> {
        let mut ports = self.ports.lock();
        let known = ports.entry(from).or_default();
        let port = match self.fabric.admit(advert) {
            Err(HcaError::Advert(AdvertError::AddressTaken { port })) if known.contains(&PortId(port)) => {
                PortId(port)
            }
            admitted => admitted?,
        };
        known.retain(|other| *other != port);
        known.push(port);
        Ok(())
    }
}

/// Starts the keeper's thread. It ends when the member is dropped.
fn start(
    shared: &Arc<Shared>,
    pool: &Arc<Pool>,
    bell: &Bell,
    exits: Arc<Mutex<Exits>>,
) -> Result<JoinHandle<()>, Error> {
    let (shared, pool, bell) = (Arc::clone(shared), Arc::clone(pool), bell.clone());
    let keep = move || {
        while !*shared.is_over.lock() {
            let ended = exits.lock().ended();
            let mut keeper = shared.keeper.lock();
            let now_ns = pool.now_ns();
            for (peer, instance) in ended {
                keeper.handle_process_exit(now_ns, peer, instance);
            }
            let next = keeper.step(now_ns);
            let is_at_gate = keeper.is_serving() && keeper.session().is_gate_closed();
            drop(keeper);
            shared.stepped.notify_all();
            let nap = if is_at_gate { NAP_AT_GATE } else { NAP };
            // A keeper that has stopped has nothing more to do; the thread waits to be dropped.
            let due = next.map_or(NAP, |at| Duration::from_nanos(at.saturating_sub(now_ns)));
            bell.wait(due.min(nap));
        }
    };
    let thread = thread::Builder::new().name("ibex-keeper".into()).spawn(keep);
    Ok(thread.map_err(|error| OsError::from_io("pthread_create", &error))?)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use ibex_hca::emulated::{EmulatedConfig, UdpConfig};

    use super::*;

    /// A device behind a socket at `port`, or at any for 0.
    fn device(port: u16) -> Arc<EmulatedHca> {
        let bind = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
        let fabric = Fabric::udp(UdpConfig { bind, ..UdpConfig::new(bind.ip()) }).unwrap();
        EmulatedHca::new(fabric, EmulatedConfig::default()).unwrap()
    }

    #[test]
    fn a_rank_comes_back_to_an_address_that_it_had_and_nobody_else_does() {
        let own = device(0);
        let introducer = Introducer {
            config: Config::default().validate().unwrap(),
            fabric: Arc::clone(own.fabric()),
            needs_one_host: false,
            exits: Arc::default(),
            ports: Ports::default(),
        };
        let advert = |device: &EmulatedHca| device.fabric().advert(device.port_id()).unwrap();
        let newest = || introducer.ports.lock()[&Rank(1)].last().copied();
        let [first, second] = [device(0), device(0)];
        introducer.admit(Rank(1), &advert(&first)).unwrap();
        let at_first = newest();
        // Its successor sits elsewhere, and the one after that where the first one sat.
        introducer.admit(Rank(1), &advert(&second)).unwrap();
        assert_ne!(newest(), at_first);
        introducer.admit(Rank(1), &advert(&first)).unwrap();
        assert_eq!(newest(), at_first);
        let refused = introducer.admit(Rank(2), &advert(&first));
        assert!(matches!(refused, Err(HcaError::Advert(AdvertError::AddressTaken { .. }))), "{refused:?}");
    }
}
