//! The rendezvous over TCP: rank 0's thread that serves the hub, and every rank's connection to it.
//!
//! Who owns what: [`Server`] owns the listener, the connections and the [`Hub`]; it runs on one thread, which ends
//! when the [`TcpBootstrap`] of rank 0 is dropped and nothing is owed any more. A [`TcpBootstrap`] owns one
//! connection, used by one call at a time.
//!
//! Invariants:
//! - The server never blocks on one connection: all sockets are non-blocking, and one poll waits for all of them.
//! - A client's every read and write ends at its deadline.

use core::time::Duration;
use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::advertise::resolve;
use super::hub::{Hub, LinkId};
use super::wire::{self, ANSWER_LEN, BLOB_LEN_MAX, Broken, Greeting, Head, KEY_LEN_MAX, Kind, RECORD_LEN};
use super::{Bootstrap, BootstrapError, HubCounters, Place, RankList};
use crate::ids::Rank;
use crate::time::{Deadline, now_ns, sleep};

/// How long a rank waits before it knocks again at a rendezvous that is not there yet.
const KNOCK_AGAIN: Duration = Duration::from_millis(50);
/// How long rank 0 goes on sending answers after it is done itself.
const LINGER: Duration = Duration::from_secs(2);
/// What a client allows an answer to take beyond the deadline that the hub keeps.
const ANSWER_SLACK: Duration = Duration::from_secs(5);
/// Bytes read at once.
const READ_LEN: usize = 64 << 10;

/// One rank's connection to the rendezvous, and at rank 0 the rendezvous itself.
pub struct TcpBootstrap {
    rank: Rank,
    num_ranks: u32,
    address: SocketAddr,
    /// Dropped before the server: its own rank need not be waited for.
    connection: Mutex<TcpStream>,
    server: Option<ServerThread>,
}

impl TcpBootstrap {
    /// Joins the rendezvous that `place` names; rank 0 opens it first.
    ///
    /// # Errors
    /// `Unresolvable` for the master's name; `Listen` at rank 0; `Unreachable` if nobody answers within `timeout`;
    /// `Refused` if rank 0 turns this process away.
    pub fn join(place: &Place, timeout: Duration) -> Result<Self, BootstrapError> {
        let mut address = resolve("MASTER_ADDR", &place.master_host, place.master_port)?;
        let mut server = None;
        if place.rank == Rank(0) {
            let listener = listen(address)?;
            // Where rank 0 has to listen on all addresses, its own connection takes the nearest.
            address = own_address(&listener, address);
            server = Some(ServerThread::start(listener, place)?);
        }
        let deadline = Deadline::after(timeout);
        let mut stream = knock(address, &deadline, timeout)?;
        greet(&mut stream, place, address, &deadline)?;
        let (rank, num_ranks) = (place.rank, place.num_ranks);
        Ok(Self { rank, num_ranks, address, connection: Mutex::new(stream), server })
    }

    /// Where rank 0 listens.
    #[must_use]
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// What the rendezvous saw so far; at rank 0 only.
    #[must_use]
    pub fn hub_counters(&self) -> Option<HubCounters> {
        self.server.as_ref().map(|server| *server.counters.lock())
    }

    fn exchange(&self, key: &str, blob: &[u8], timeout: Duration) -> Result<(Kind, Vec<u8>), Failed> {
        let deadline = Deadline::after(timeout.saturating_add(ANSWER_SLACK));
        let mut stream = self.connection.lock();
        // CAST: a wait of more than 49 days counts as that.
        let budget_ms = u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX);
        let record = wire::encode_record(Kind::Gather, budget_ms, key.as_bytes(), blob);
        write_all(&mut stream, &record, &deadline)?;
        let mut head = [0; RECORD_LEN];
        read_exact(&mut stream, &mut head, &deadline)?;
        let head = Head::parse(&head, wire::gathered_len_max(self.num_ranks))?;
        let mut found_key = vec![0; head.key_len];
        read_exact(&mut stream, &mut found_key, &deadline)?;
        let body = read_len(&mut stream, head.body_len, &deadline)?;
        if found_key != key.as_bytes() {
            return Err(Broken("key of another exchange").into());
        }
        Ok((head.kind, body))
    }
}

impl Bootstrap for TcpBootstrap {
    fn rank(&self) -> Rank {
        self.rank
    }

    fn num_ranks(&self) -> u32 {
        self.num_ranks
    }

    fn all_gather(&self, key: &str, blob: &[u8], timeout: Duration) -> Result<Vec<Vec<u8>>, BootstrapError> {
        for (what, len, max) in [("key", key.len(), KEY_LEN_MAX), ("blob", blob.len(), BLOB_LEN_MAX)] {
            if len > max {
                return Err(BootstrapError::TooLarge { what, len, max });
            }
        }
        let broken = |Broken(what)| BootstrapError::Malformed { address: self.address, what };
        let (kind, body) = self.exchange(key, blob, timeout).map_err(|failed| match failed {
            Failed::Io(source) => BootstrapError::Lost { key: key.into(), source },
            Failed::Broken(what) => broken(what),
        })?;
        match kind {
            Kind::Gathered => wire::split_blobs(&body, self.num_ranks).map_err(broken),
            Kind::Missing => {
                let ranks = RankList(wire::split_ranks(&body).map_err(broken)?);
                Err(BootstrapError::Missing { key: key.into(), ranks, waited: timeout })
            }
            Kind::Left => match wire::split_ranks(&body).map_err(broken)?[..] {
                [rank] => Err(BootstrapError::Left { rank, key: key.into() }),
                _ => Err(broken(Broken("rank list"))),
            },
            Kind::Gather => Err(broken(Broken("record kind"))),
        }
    }
}

impl Drop for TcpBootstrap {
    fn drop(&mut self) {
        // A connection that is gone already needs no end.
        let _ = self.connection.lock().shutdown(Shutdown::Both);
    }
}

/// Why an exchange failed.
enum Failed {
    Io(io::Error),
    Broken(Broken),
}

impl From<io::Error> for Failed {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Broken> for Failed {
    fn from(broken: Broken) -> Self {
        Self::Broken(broken)
    }
}

/// Rank 0 listens where the others look for it; on all addresses where that one is not its own, as with the name of
/// a service that stands for it.
fn listen(address: SocketAddr) -> Result<TcpListener, BootstrapError> {
    let any: IpAddr = match address {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let listener = match TcpListener::bind(address) {
        Err(error) if error.kind() == ErrorKind::AddrNotAvailable => TcpListener::bind((any, address.port())),
        bound => bound,
    };
    listener.map_err(|source| BootstrapError::Listen { address, source })
}

fn own_address(listener: &TcpListener, wanted: SocketAddr) -> SocketAddr {
    match listener.local_addr() {
        Ok(bound) if bound.ip().is_unspecified() => {
            let near: IpAddr = match bound {
                SocketAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                SocketAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            };
            (near, bound.port()).into()
        }
        Ok(bound) => bound,
        Err(_) => wanted,
    }
}

/// Connects, again and again until the deadline: rank 0 may start last.
fn knock(address: SocketAddr, deadline: &Deadline, waited: Duration) -> Result<TcpStream, BootstrapError> {
    loop {
        let remaining = deadline.remaining().max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&address, remaining) {
            Ok(stream) => return Ok(stream),
            Err(source) if deadline.has_passed() => {
                return Err(BootstrapError::Unreachable { address, waited, source });
            }
            Err(_) => sleep(KNOCK_AGAIN.min(deadline.remaining())),
        }
    }
}

fn greet(
    stream: &mut TcpStream,
    place: &Place,
    address: SocketAddr,
    deadline: &Deadline,
) -> Result<(), BootstrapError> {
    let lost = |source| BootstrapError::Lost { key: "greeting".into(), source };
    // Small records that somebody waits for; and a peer that vanished without a word is noticed some day.
    stream.set_nodelay(true).map_err(lost)?;
    let greeting = Greeting {
        version: wire::VERSION,
        rank: place.rank.0.into(),
        num_ranks: place.num_ranks,
        token: place.token.bytes().to_vec(),
    };
    write_all(stream, &greeting.encode(), deadline).map_err(lost)?;
    let mut answer = [0; ANSWER_LEN];
    read_exact(stream, &mut answer, deadline).map_err(lost)?;
    match wire::parse_answer(&answer) {
        Ok(None) => Ok(()),
        Ok(Some(refusal)) => Err(BootstrapError::Refused { rank: place.rank, refusal }),
        Err(Broken(what)) => Err(BootstrapError::Malformed { address, what }),
    }
}

/// A socket takes no timeout of zero.
fn nonzero(remaining: Duration) -> Result<Duration, io::Error> {
    if remaining.is_zero() { Err(ErrorKind::TimedOut.into()) } else { Ok(remaining) }
}

fn write_all(stream: &mut TcpStream, mut bytes: &[u8], deadline: &Deadline) -> Result<(), io::Error> {
    while !bytes.is_empty() {
        stream.set_write_timeout(Some(nonzero(deadline.remaining())?))?;
        match stream.write(bytes) {
            Ok(0) => return Err(ErrorKind::WriteZero.into()),
            Ok(len) => bytes = &bytes[len..],
            Err(error) if is_no_end(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn read_exact(stream: &mut TcpStream, mut into: &mut [u8], deadline: &Deadline) -> Result<(), io::Error> {
    while !into.is_empty() {
        stream.set_read_timeout(Some(nonzero(deadline.remaining())?))?;
        match stream.read(into) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(len) => into = &mut into[len..],
            Err(error) if is_no_end(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Reads `len` bytes; memory grows with what has come, not with what was announced.
fn read_len(stream: &mut TcpStream, len: usize, deadline: &Deadline) -> Result<Vec<u8>, io::Error> {
    let mut body = Vec::new();
    while body.len() < len {
        let from = body.len();
        body.resize(len.min(from + READ_LEN), 0);
        read_exact(stream, &mut body[from..], deadline)?;
    }
    Ok(body)
}

/// A signal, or the socket's own timeout: the deadline decides.
fn is_no_end(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::WouldBlock | ErrorKind::TimedOut)
}

/// The thread that serves the rendezvous.
struct ServerThread {
    thread: Option<JoinHandle<()>>,
    /// Closing it wakes the server and tells it to end.
    wake: Option<UnixStream>,
    counters: Arc<Mutex<HubCounters>>,
}

impl ServerThread {
    fn start(listener: TcpListener, place: &Place) -> Result<Self, BootstrapError> {
        let address = listener.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], place.master_port)));
        let cannot = |source| BootstrapError::Listen { address, source };
        listener.set_nonblocking(true).map_err(cannot)?;
        let (wake, woken) = UnixStream::pair().map_err(cannot)?;
        let counters = Arc::new(Mutex::new(HubCounters::default()));
        let server = Server {
            listener,
            woken,
            hub: Hub::new(place.num_ranks, place.token.clone()),
            streams: BTreeMap::new(),
            counters: Arc::clone(&counters),
        };
        let builder = thread::Builder::new().name("ibex-rendezvous".into());
        let thread = builder.spawn(move || server.run()).map_err(cannot)?;
        Ok(Self { thread: Some(thread), wake: Some(wake), counters })
    }
}

impl Drop for ServerThread {
    fn drop(&mut self) {
        drop(self.wake.take());
        if let Some(thread) = self.thread.take() {
            // A panic there was printed there, and there is nobody left to serve.
            let _ = thread.join();
        }
    }
}

/// Moves bytes between sockets and the hub.
struct Server {
    listener: TcpListener,
    woken: UnixStream,
    hub: Hub,
    streams: BTreeMap<LinkId, TcpStream>,
    counters: Arc<Mutex<HubCounters>>,
}

impl Server {
    fn run(mut self) {
        let mut ending: Option<Deadline> = None;
        loop {
            let ready = self.wait(ending.as_ref());
            if ready.woken && ending.is_none() {
                ending = Some(Deadline::after(LINGER));
            }
            if ready.listener {
                self.accept();
            }
            for id in ready.links {
                self.serve(id);
            }
            self.hub.tick(now_ns());
            self.send_all();
            *self.counters.lock() = self.hub.counters();
            if ending.is_some_and(|ending| ending.has_passed() || !self.hub.owes_answers()) {
                return;
            }
        }
    }

    /// Waits until a socket wants something or a deadline is due.
    fn wait(&self, ending: Option<&Deadline>) -> Ready {
        let until_tick =
            self.hub.next_deadline_ns().map(|at| Duration::from_nanos(at.saturating_sub(now_ns())));
        let until_end = ending.map(Deadline::remaining);
        let timeout = [until_tick, until_end].into_iter().flatten().min();
        // A tick that is nearly due is not met by a wait that rounds down.
        let timeout = timeout.map(|timeout| timeout + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
        let mut fds = Vec::with_capacity(self.streams.len() + 2);
        for (id, stream) in &self.streams {
            let has_more = !self.hub.outgoing(*id).is_empty();
            let wants = if has_more { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            fds.push(PollFd::new(stream, wants));
        }
        // Strangers beyond the limit wait in the listener's queue.
        let accepts = if self.hub.has_room() { PollFlags::IN } else { PollFlags::empty() };
        fds.push(PollFd::new(&self.listener, accepts));
        // Once closed its end stays ready, which would make every later wait return at once.
        if ending.is_none() {
            fds.push(PollFd::new(&self.woken, PollFlags::IN));
        }
        // An interrupted wait finds nothing ready and comes back.
        let found = poll(&mut fds, timeout.as_ref()).unwrap_or(0);
        let is_ready = |fd: &PollFd<'_>| found > 0 && !fd.revents().is_empty();
        let num_links = self.streams.len();
        let links = self.streams.keys().zip(&fds).filter(|(_, fd)| is_ready(fd));
        Ready {
            links: links.map(|(id, _)| *id).collect(),
            listener: is_ready(&fds[num_links]),
            woken: fds.get(num_links + 1).is_some_and(is_ready),
        }
    }

    fn accept(&mut self) {
        while self.hub.has_room() {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if is_no_end(&error) => return,
                // Out of descriptors, most likely: others must close some first.
                Err(_) => return sleep(KNOCK_AGAIN),
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            // Small answers that somebody waits for; without it they only take longer.
            let _ = stream.set_nodelay(true);
            if let Some(id) = self.hub.open(now_ns()) {
                self.streams.insert(id, stream);
            }
        }
    }

    /// Reads what came on one connection.
    fn serve(&mut self, id: LinkId) {
        let Some(stream) = self.streams.get_mut(&id) else { return };
        let mut bytes = [0; READ_LEN];
        match stream.read(&mut bytes) {
            Ok(len) if len > 0 => self.hub.receive(id, &bytes[..len], now_ns()),
            Err(error) if is_no_end(&error) => {}
            Ok(_) | Err(_) => self.close(id),
        }
    }

    fn send_all(&mut self) {
        let ids: Vec<LinkId> = self.streams.keys().copied().collect();
        for id in ids {
            self.send(id);
            if self.hub.is_leaving(id) && self.hub.outgoing(id).is_empty() {
                self.close(id);
            }
        }
    }

    fn send(&mut self, id: LinkId) {
        while let Some(stream) = self.streams.get_mut(&id) {
            let bytes = self.hub.outgoing(id);
            if bytes.is_empty() {
                return;
            }
            match stream.write(bytes) {
                Ok(len) if len > 0 => self.hub.advance(id, len),
                Err(error) if is_no_end(&error) => return,
                Ok(_) | Err(_) => self.close(id),
            }
        }
    }

    fn close(&mut self, id: LinkId) {
        self.hub.hang_up(id);
        self.streams.remove(&id);
    }
}

/// What a wait found.
struct Ready {
    listener: bool,
    woken: bool,
    links: Vec<LinkId>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bootstrap::{Refusal, Token};

    /// Generous: the machine may be busy with other tests.
    const LONG: Duration = Duration::from_secs(60);

    fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn place(rank: u16, num_ranks: u32, port: u16) -> Place {
        Place {
            rank: Rank(rank),
            num_ranks,
            local_rank: rank.into(),
            launcher: super::super::Launcher::Variables,
            master_host: "127.0.0.1".into(),
            master_port: port,
            token: Token::new("secret").unwrap(),
        }
    }

    fn on_threads<T: Send>(num: u16, work: impl Fn(u16) -> T + Sync) -> Vec<T> {
        let work = &work;
        thread::scope(|scope| {
            let threads: Vec<_> = (0..num).map(|rank| scope.spawn(move || work(rank))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        })
    }

    #[test]
    fn blobs_of_all_ranks_reach_all_ranks_and_the_last_answer_is_not_cut() {
        let port = free_port();
        let len = |rank: u16, round: u16| usize::from(rank * 100 + round) * 50;
        on_threads(5, |rank| {
            let group = TcpBootstrap::join(&place(rank, 5, port), LONG).unwrap();
            for round in 0..20 {
                let blobs = group.all_gather("round", &vec![rank as u8; len(rank, round)], LONG).unwrap();
                for (from, blob) in (0..).zip(blobs) {
                    assert_eq!(blob, vec![from as u8; len(from, round)]);
                }
            }
            group.barrier("end", LONG).unwrap();
        });
    }

    #[test]
    fn who_does_not_come_is_named() {
        let port = free_port();
        on_threads(2, |rank| {
            let group = TcpBootstrap::join(&place(rank * 2, 4, port), LONG).unwrap();
            let error = group.barrier("start", Duration::from_millis(200)).unwrap_err();
            let BootstrapError::Missing { ranks, .. } = error else { panic!("{error}") };
            assert_eq!(ranks, RankList(vec![Rank(1), Rank(3)]));
        });
    }

    #[test]
    fn who_leaves_is_named_at_once() {
        let port = free_port();
        // Those who stay are held until the end: their leaving would be told too.
        let _stay = on_threads(3, |rank| {
            let group = TcpBootstrap::join(&place(rank, 3, port), LONG).unwrap();
            group.barrier("start", LONG).unwrap();
            if rank == 2 {
                return None;
            }
            let error = group.barrier("never", LONG).unwrap_err();
            assert!(matches!(error, BootstrapError::Left { rank: Rank(2), .. }), "{error}");
            Some(group)
        });
    }

    #[test]
    fn strangers_and_wrong_tokens_are_refused_and_disturb_nobody() {
        let port = free_port();
        let first = TcpBootstrap::join(&place(0, 2, port), LONG).unwrap();
        // Half-open connections, and one that talks nonsense.
        let silent: Vec<TcpStream> =
            (0..8).map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap()).collect();
        let mut loud = TcpStream::connect(("127.0.0.1", port)).unwrap();
        loud.write_all(&[0xa5; 4096]).unwrap();
        let refused = |place: &Place| match TcpBootstrap::join(place, LONG) {
            Err(BootstrapError::Refused { refusal, .. }) => refusal,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("{place:?} was accepted"),
        };
        let other_job = Place { token: Token::new("other").unwrap(), ..place(1, 2, port) };
        assert_eq!(refused(&other_job), Refusal::Token);
        assert_eq!(refused(&place(1, 3, port)), Refusal::WorldSize { expected: 2 });
        assert_eq!(refused(&place(2, 2, port)), Refusal::RankRange { num_ranks: 2 });
        let second = TcpBootstrap::join(&place(1, 2, port), LONG).unwrap();
        assert_eq!(refused(&place(1, 2, port)), Refusal::RankTaken);
        on_threads(2, |rank| [&first, &second][usize::from(rank)].barrier("start", LONG).unwrap());
        let counters = first.hub_counters().unwrap();
        assert_eq!((counters.members, counters.refused_tokens), (2, 1));
        assert_eq!(counters.refused_others, 4, "nonsense, size, range, taken");
        drop(silent);
    }

    #[test]
    fn a_rank_may_come_before_the_rendezvous_and_gives_up_in_time() {
        let port = free_port();
        let alone = TcpBootstrap::join(&place(1, 2, port), Duration::from_millis(100)).err().unwrap();
        assert!(matches!(alone, BootstrapError::Unreachable { .. }), "{alone}");
        on_threads(2, |thread| {
            if thread == 1 {
                sleep(Duration::from_millis(150));
            }
            let group = TcpBootstrap::join(&place(1 - thread, 2, port), LONG).unwrap();
            group.barrier("start", LONG).unwrap();
        });
    }

    #[test]
    fn a_port_in_use_and_a_name_that_leads_nowhere_are_typed() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let error = TcpBootstrap::join(&place(0, 2, port), LONG).err().unwrap();
        assert!(matches!(error, BootstrapError::Listen { .. }), "{error}");
        let nowhere = Place { master_host: "no.such.host.invalid".into(), ..place(1, 2, port) };
        let error = TcpBootstrap::join(&nowhere, LONG).err().unwrap();
        assert!(matches!(error, BootstrapError::Unresolvable { origin: "MASTER_ADDR", .. }), "{error}");
    }

    #[test]
    fn too_long_keys_and_blobs_are_refused_before_they_are_sent() {
        let group = TcpBootstrap::join(&place(0, 1, free_port()), LONG).unwrap();
        let too_long = |key: &str, len| group.all_gather(key, &vec![0; len], LONG).unwrap_err();
        assert!(matches!(too_long(&"k".repeat(65), 0), BootstrapError::TooLarge { what: "key", .. }));
        let error = too_long("k", BLOB_LEN_MAX + 1);
        assert!(matches!(error, BootstrapError::TooLarge { what: "blob", .. }), "{error}");
        assert_eq!(group.all_gather("k", &vec![7; BLOB_LEN_MAX], LONG).unwrap(), [vec![7; BLOB_LEN_MAX]]);
    }
}
