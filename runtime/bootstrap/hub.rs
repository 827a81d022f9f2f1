//! What rank 0 decides at the rendezvous, without a socket or a clock: bytes and times in, bytes out.
//!
//! A [`Hub`] owns what each connection has sent and not yet been sent, and the rounds that are open. A connection is a
//! *stranger* until its greeting was accepted; strangers are few, short-lived and may send one greeting, nothing more.
//!
//! Invariants:
//! - A rank has at most one connection, ever, and at most one blob in an open round.
//! - A stranger holds at most one greeting's bytes; a member at most one record's.
//! - A round ends once: with all blobs, with the ranks that are missing at its earliest deadline, or with the rank
//!   that left.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use super::wire::{self, BLOB_LEN_MAX, Greeting, Head, Kind, RECORD_LEN, VERSION};
use super::{Refusal, Token};
use crate::ids::Rank;

/// Most connections whose greeting was not accepted yet; more wait in the listener's queue until one is decided.
pub const STRANGERS_MAX: usize = 64;
/// How long a stranger may take to greet.
const GREETING_NS: u64 = 5_000_000_000;
/// Longest wait that a round accepts; a longer one counts as this.
const BUDGET_MS_MAX: u64 = 24 * 3600 * 1000;

/// What the rendezvous saw.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HubCounters {
    /// Connections that became members.
    pub members: u64,
    /// Greetings with another token.
    pub refused_tokens: u64,
    /// Greetings refused for any other reason, malformed ones included.
    pub refused_others: u64,
    /// Strangers that did not greet in time.
    pub expired: u64,
    /// Members cut off because their bytes were no record.
    pub broken: u64,
}

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct LinkId(pub(super) u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Stranger {
        until_ns: u64,
    },
    Member(Rank),
    /// Refused or broken: closes when what it is told was sent.
    Leaving,
}

struct Link {
    role: Role,
    inbox: Vec<u8>,
    outbox: VecDeque<Arc<[u8]>>,
    /// Bytes of the first entry that are out already.
    sent: usize,
}

/// One exchange that not all ranks have come to.
struct Round {
    blobs: Vec<Option<Vec<u8>>>,
    until_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attendance {
    Awaited,
    Here(LinkId),
    Gone,
}

/// Rank 0's side of the rendezvous. See the module documentation.
pub(super) struct Hub {
    token: Token,
    members: Vec<Attendance>,
    links: BTreeMap<LinkId, Link>,
    rounds: BTreeMap<Vec<u8>, Round>,
    next_link: u64,
    counters: HubCounters,
}

impl Hub {
    pub(super) fn new(num_ranks: u32, token: Token) -> Self {
        Self {
            token,
            members: vec![Attendance::Awaited; num_ranks as usize],
            links: BTreeMap::new(),
            rounds: BTreeMap::new(),
            next_link: 0,
            counters: HubCounters::default(),
        }
    }

    pub(super) fn counters(&self) -> HubCounters {
        self.counters
    }

    fn num_ranks(&self) -> u32 {
        // CAST: made from a u32.
        self.members.len() as u32
    }

    /// Whether one more stranger may come.
    pub(super) fn has_room(&self) -> bool {
        let is_stranger = |link: &&Link| !matches!(link.role, Role::Member(_));
        self.links.values().filter(is_stranger).count() < STRANGERS_MAX
    }

    /// Takes note of a new connection; none if too many strangers are there already.
    pub(super) fn open(&mut self, now_ns: u64) -> Option<LinkId> {
        if !self.has_room() {
            return None;
        }
        let id = LinkId(self.next_link);
        self.next_link += 1;
        let role = Role::Stranger { until_ns: now_ns.saturating_add(GREETING_NS) };
        self.links.insert(id, Link { role, inbox: Vec::new(), outbox: VecDeque::new(), sent: 0 });
        Some(id)
    }

    /// Takes bytes that came on a connection.
    pub(super) fn receive(&mut self, id: LinkId, bytes: &[u8], now_ns: u64) {
        let Some(link) = self.links.get_mut(&id) else { return };
        if link.role == Role::Leaving {
            return;
        }
        link.inbox.extend_from_slice(bytes);
        if matches!(link.role, Role::Stranger { .. }) {
            self.greet(id);
        }
        while self.take_record(id, now_ns) {}
    }

    /// A connection is gone: what was to be sent there is dropped, and a member is missed from now on.
    pub(super) fn hang_up(&mut self, id: LinkId) {
        let Some(link) = self.links.remove(&id) else { return };
        if let Role::Member(rank) = link.role {
            self.leave(rank);
        }
    }

    /// The next bytes to send on a connection, empty if there are none.
    pub(super) fn outgoing(&self, id: LinkId) -> &[u8] {
        let first = self.links.get(&id).and_then(|link| Some(&link.outbox.front()?[link.sent..]));
        first.unwrap_or_default()
    }

    /// Takes note that the first `len` bytes of [`Hub::outgoing`] are out.
    pub(super) fn advance(&mut self, id: LinkId, len: usize) {
        let Some(link) = self.links.get_mut(&id) else { return };
        link.sent += len;
        if link.outbox.front().is_some_and(|first| link.sent >= first.len()) {
            link.outbox.pop_front();
            link.sent = 0;
        }
    }

    /// Whether the connection is to be closed once nothing is left to send.
    pub(super) fn is_leaving(&self, id: LinkId) -> bool {
        self.links.get(&id).is_none_or(|link| link.role == Role::Leaving)
    }

    /// Whether anything waits to be sent to a member.
    pub(super) fn owes_answers(&self) -> bool {
        self.links.values().any(|link| matches!(link.role, Role::Member(_)) && !link.outbox.is_empty())
    }

    /// Ends what is too late.
    pub(super) fn tick(&mut self, now_ns: u64) {
        for link in self.links.values_mut() {
            if matches!(link.role, Role::Stranger { until_ns } if until_ns <= now_ns) {
                link.role = Role::Leaving;
                self.counters.expired += 1;
            }
        }
        let is_late = |round: &Round| round.until_ns <= now_ns;
        let late: Vec<Vec<u8>> =
            self.rounds.iter().filter(|(_, round)| is_late(round)).map(|(key, _)| key.clone()).collect();
        for key in late {
            let Some(round) = self.rounds.remove(&key) else { continue };
            let missing: Vec<Rank> = ranks(&round.blobs).filter(|(_, came)| !came).map(|(r, _)| r).collect();
            self.answer(&key, &round, Kind::Missing, &wire::join_ranks(&missing));
        }
    }

    /// When [`Hub::tick`] is due next.
    pub(super) fn next_deadline_ns(&self) -> Option<u64> {
        let strangers = self.links.values().filter_map(|link| match link.role {
            Role::Stranger { until_ns } => Some(until_ns),
            _ => None,
        });
        self.rounds.values().map(|round| round.until_ns).chain(strangers).min()
    }

    /// Decides on a stranger whose greeting is complete.
    fn greet(&mut self, id: LinkId) {
        let Some(link) = self.links.get_mut(&id) else { return };
        let (greeting, len) = match Greeting::parse(&link.inbox) {
            Ok(None) => return,
            Ok(Some(parsed)) => parsed,
            Err(_) => return self.refuse(id, Refusal::Malformed),
        };
        link.inbox.drain(..len);
        match self.judge(&greeting) {
            Ok(rank) => {
                self.members[rank.index()] = Attendance::Here(id);
                self.counters.members += 1;
                if let Some(link) = self.links.get_mut(&id) {
                    link.role = Role::Member(rank);
                    link.outbox.push_back(wire::encode_answer(None).into());
                }
            }
            Err(refusal) => self.refuse(id, refusal),
        }
    }

    /// The token is looked at first: whoever does not have it learns nothing else about the group.
    fn judge(&self, greeting: &Greeting) -> Result<Rank, Refusal> {
        if greeting.version != VERSION {
            let (theirs, ours) = (VERSION.into(), greeting.version.into());
            return Err(Refusal::Version { theirs, ours });
        }
        if !self.token.is(&greeting.token) {
            return Err(Refusal::Token);
        }
        if greeting.num_ranks != self.num_ranks() {
            return Err(Refusal::WorldSize { expected: self.num_ranks() });
        }
        match self.members.get(greeting.rank as usize) {
            None => Err(Refusal::RankRange { num_ranks: self.num_ranks() }),
            // CAST: an index of `members`, which are at most 512.
            Some(Attendance::Awaited) => Ok(Rank(greeting.rank as u16)),
            Some(Attendance::Here(_) | Attendance::Gone) => Err(Refusal::RankTaken),
        }
    }

    fn refuse(&mut self, id: LinkId, refusal: Refusal) {
        match refusal {
            Refusal::Token => self.counters.refused_tokens += 1,
            _ => self.counters.refused_others += 1,
        }
        if let Some(link) = self.links.get_mut(&id) {
            link.role = Role::Leaving;
            link.inbox = Vec::new();
            link.outbox.push_back(wire::encode_answer(Some(refusal)).into());
        }
    }

    /// Takes one complete record of a member; false if there is none.
    fn take_record(&mut self, id: LinkId, now_ns: u64) -> bool {
        let Some(link) = self.links.get_mut(&id) else { return false };
        let Role::Member(rank) = link.role else { return false };
        let Some(head) = link.inbox.first_chunk::<RECORD_LEN>() else { return false };
        let head = match Head::parse(head, BLOB_LEN_MAX) {
            Ok(head) if head.kind == Kind::Gather => head,
            _ => return self.cut_off(id),
        };
        if link.inbox.len() < head.total() {
            return false;
        }
        let record: Vec<u8> = link.inbox.drain(..head.total()).collect();
        let (key, blob) = record[RECORD_LEN..].split_at(head.key_len);
        self.gather(id, rank, key, blob, now_ns, head.budget_ms)
    }

    fn gather(
        &mut self,
        id: LinkId,
        rank: Rank,
        key: &[u8],
        blob: &[u8],
        now_ns: u64,
        budget_ms: u32,
    ) -> bool {
        // A rank that waits in one round sends nothing more; so there are at most as many rounds as ranks.
        if self.rounds.values().any(|round| round.blobs[rank.index()].is_some()) {
            return self.cut_off(id);
        }
        let num_ranks = self.members.len();
        let new = || Round { blobs: vec![None; num_ranks], until_ns: u64::MAX };
        let round = self.rounds.entry(key.to_vec()).or_insert_with(new);
        round.blobs[rank.index()] = Some(blob.to_vec());
        let budget_ns = u64::from(budget_ms).min(BUDGET_MS_MAX) * 1_000_000;
        round.until_ns = round.until_ns.min(now_ns.saturating_add(budget_ns));
        let gone = self.members.iter().position(|member| *member == Attendance::Gone);
        if round.blobs.iter().all(Option::is_some) {
            self.end_round(key, |round| {
                (Kind::Gathered, wire::join_blobs(round.blobs.iter().flatten().map(Vec::as_slice)))
            });
        } else if let Some(gone) = gone {
            // CAST: an index of `members`.
            self.end_round(key, |_| (Kind::Left, wire::join_ranks(&[Rank(gone as u16)])));
        }
        true
    }

    fn end_round(&mut self, key: &[u8], body: impl FnOnce(&Round) -> (Kind, Vec<u8>)) {
        if let Some(round) = self.rounds.remove(key) {
            let (kind, body) = body(&round);
            self.answer(key, &round, kind, &body);
        }
    }

    /// Tells everybody who came to a round how it ended.
    fn answer(&mut self, key: &[u8], round: &Round, kind: Kind, body: &[u8]) {
        let record: Arc<[u8]> = wire::encode_record(kind, 0, key, body).into();
        for (rank, _) in ranks(&round.blobs).filter(|(_, came)| *came) {
            let Attendance::Here(id) = self.members[rank.index()] else { continue };
            if let Some(link) = self.links.get_mut(&id) {
                link.outbox.push_back(Arc::clone(&record));
            }
        }
    }

    /// A member that speaks nonsense is cut off; answers "no more records".
    fn cut_off(&mut self, id: LinkId) -> bool {
        self.counters.broken += 1;
        if let Some(link) = self.links.get_mut(&id) {
            let Role::Member(rank) = core::mem::replace(&mut link.role, Role::Leaving) else { return false };
            link.inbox = Vec::new();
            self.leave(rank);
        }
        false
    }

    /// Everybody who waits for a rank that is gone is told.
    fn leave(&mut self, rank: Rank) {
        self.members[rank.index()] = Attendance::Gone;
        let keys: Vec<Vec<u8>> = self.rounds.keys().cloned().collect();
        for key in keys {
            let is_empty = self.rounds.get_mut(&key).is_none_or(|round| {
                // Whoever is gone is not answered, and its blob does not complete the round.
                round.blobs[rank.index()] = None;
                round.blobs.iter().all(Option::is_none)
            });
            match is_empty {
                true => drop(self.rounds.remove(&key)),
                false => self.end_round(&key, |_| (Kind::Left, wire::join_ranks(&[rank]))),
            }
        }
    }
}

/// The body of a fuzz target: a hub of two ranks under a script, in which each step names a connection and the bytes
/// that come on it. The first two connections have been accepted; the others are strangers.
///
/// # Panics
/// PANIC: more is kept of a connection than its limit, or strangers were accepted as ranks that are taken.
pub(crate) fn rendezvous_script(mut script: &[u8]) {
    const STEP_NS: u64 = 1_000_000;
    let mut hub = Hub::new(2, Token::default());
    let mut now_ns = 0;
    let links: Vec<LinkId> = (0..4).filter_map(|_| hub.open(now_ns)).collect();
    for (rank, link) in (0..2).zip(&links) {
        let greeting = Greeting { version: VERSION, rank, num_ranks: 2, token: Vec::new() };
        hub.receive(*link, &greeting.encode(), now_ns);
    }
    while let [step, len, rest @ ..] = script {
        let (bytes, rest) = rest.split_at(rest.len().min(usize::from(*len)));
        script = rest;
        now_ns += STEP_NS * u64::from(step >> 4);
        let link = links[usize::from(step & 3)];
        match step >> 2 & 3 {
            0 => hub.tick(now_ns),
            1 => hub.hang_up(link),
            _ => hub.receive(link, bytes, now_ns),
        }
        let taken = hub.outgoing(link).len();
        hub.advance(link, taken);
        let kept_max = RECORD_LEN + wire::KEY_LEN_MAX + BLOB_LEN_MAX;
        assert!(hub.links.values().all(|link| link.inbox.len() <= kept_max), "a connection keeps one record");
        assert!(hub.rounds.len() <= 2, "a rank waits in one round");
    }
    assert_eq!(hub.counters().members, 2, "a rank that is taken is nobody else's");
}

/// Ranks of a round, and whether each has come.
fn ranks(blobs: &[Option<Vec<u8>>]) -> impl Iterator<Item = (Rank, bool)> {
    // CAST: at most 512 ranks.
    blobs.iter().enumerate().map(|(index, blob)| (Rank(index as u16), blob.is_some()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: u64 = 1_000_000_000;

    fn hub(num_ranks: u32) -> Hub {
        Hub::new(num_ranks, Token::new("secret").unwrap())
    }

    fn greeting(rank: u32, num_ranks: u32, token: &str) -> Vec<u8> {
        let token = token.as_bytes().to_vec();
        Greeting { version: VERSION, rank, num_ranks, token }.encode()
    }

    fn gather(key: &str, blob: &[u8], budget_ms: u32) -> Vec<u8> {
        wire::encode_record(Kind::Gather, budget_ms, key.as_bytes(), blob)
    }

    /// Everything that waits to be sent on a connection.
    fn drain(hub: &mut Hub, id: LinkId) -> Vec<u8> {
        let mut all = Vec::new();
        while !hub.outgoing(id).is_empty() {
            // In small bites, as sockets take them.
            let bite = hub.outgoing(id)[..hub.outgoing(id).len().min(7)].to_vec();
            hub.advance(id, bite.len());
            all.extend(bite);
        }
        all
    }

    fn answer(hub: &mut Hub, id: LinkId) -> Option<Refusal> {
        let bytes: [u8; wire::ANSWER_LEN] = drain(hub, id).try_into().unwrap();
        wire::parse_answer(&bytes).unwrap()
    }

    fn join(hub: &mut Hub, rank: u32) -> LinkId {
        let id = hub.open(0).unwrap();
        let num_ranks = hub.num_ranks();
        hub.receive(id, &greeting(rank, num_ranks, "secret"), 0);
        assert_eq!(answer(hub, id), None);
        id
    }

    fn record(hub: &mut Hub, id: LinkId) -> (Kind, Vec<u8>) {
        let bytes = drain(hub, id);
        let head = Head::parse(bytes.first_chunk().expect("a record"), 1 << 20).unwrap();
        assert_eq!(bytes.len(), head.total());
        (head.kind, bytes[RECORD_LEN + head.key_len..].to_vec())
    }

    #[test]
    fn greetings_are_judged() {
        let mut hub = hub(4);
        let _first = join(&mut hub, 1);
        let cases = [
            (greeting(2, 4, "wrong!"), Refusal::Token),
            (greeting(2, 4, "secre"), Refusal::Token),
            (greeting(2, 4, ""), Refusal::Token),
            (greeting(2, 5, "secret"), Refusal::WorldSize { expected: 4 }),
            (greeting(4, 4, "secret"), Refusal::RankRange { num_ranks: 4 }),
            (greeting(u32::MAX, 4, "secret"), Refusal::RankRange { num_ranks: 4 }),
            (greeting(1, 4, "secret"), Refusal::RankTaken),
            (b"GET / HTTP/1.0\r\n\r\n".to_vec(), Refusal::Malformed),
        ];
        for (bytes, refusal) in cases {
            let id = hub.open(0).unwrap();
            hub.receive(id, &bytes, 0);
            assert_eq!(answer(&mut hub, id), Some(refusal));
            assert!(hub.is_leaving(id));
            hub.hang_up(id);
        }
        let mut other = Greeting { version: 9, rank: 2, num_ranks: 4, token: Vec::new() };
        let id = hub.open(0).unwrap();
        hub.receive(id, &other.encode(), 0);
        assert!(matches!(answer(&mut hub, id), Some(Refusal::Version { theirs: 1, .. })));
        other.version = VERSION;
        let counters = hub.counters();
        assert_eq!((counters.members, counters.refused_tokens, counters.refused_others), (1, 3, 6));
    }

    #[test]
    fn a_round_gives_everybody_all_blobs_by_rank() {
        let mut hub = hub(3);
        let links = [2, 0, 1].map(|rank| (rank, join(&mut hub, rank)));
        for (rank, id) in links {
            assert!(hub.outgoing(id).is_empty());
            // Byte by byte: a record ends where it ends, not where a read does.
            for byte in gather("k", &vec![rank as u8; rank as usize], 1000) {
                hub.receive(id, &[byte], 0);
            }
        }
        assert!(hub.owes_answers());
        for (_, id) in links {
            let (kind, body) = record(&mut hub, id);
            assert_eq!(kind, Kind::Gathered);
            assert_eq!(wire::split_blobs(&body, 3).unwrap(), [vec![], vec![1], vec![2, 2]]);
        }
        assert!(!hub.owes_answers() && hub.next_deadline_ns().is_none());
    }

    #[test]
    fn a_fast_rank_may_be_a_round_ahead() {
        let mut hub = hub(2);
        let (a, b) = (join(&mut hub, 0), join(&mut hub, 1));
        hub.receive(a, &gather("one", b"a", 1000), 0);
        hub.receive(b, &gather("one", b"b", 1000), 0);
        hub.receive(a, &gather("two", b"c", 1000), 0);
        assert_eq!(record(&mut hub, b).0, Kind::Gathered);
        hub.receive(b, &gather("two", b"d", 1000), 0);
        assert_eq!(wire::split_blobs(&record(&mut hub, b).1, 2).unwrap(), [b"c", b"d"]);
    }

    #[test]
    fn the_earliest_deadline_names_who_is_missing() {
        let mut hub = hub(4);
        let (a, b) = (join(&mut hub, 0), join(&mut hub, 2));
        hub.receive(a, &gather("k", b"", 5000), 0);
        hub.receive(b, &gather("k", b"", 2000), SECOND);
        assert_eq!(hub.next_deadline_ns(), Some(3 * SECOND));
        hub.tick(3 * SECOND - 1);
        assert!(!hub.owes_answers());
        hub.tick(3 * SECOND);
        for id in [a, b] {
            let (kind, body) = record(&mut hub, id);
            assert_eq!((kind, wire::split_ranks(&body).unwrap()), (Kind::Missing, vec![Rank(1), Rank(3)]));
        }
    }

    #[test]
    fn a_rank_that_leaves_is_missed_at_once_and_for_good() {
        let mut hub = hub(3);
        let (a, b) = (join(&mut hub, 0), join(&mut hub, 1));
        hub.receive(a, &gather("k", b"", 1000), 0);
        hub.receive(b, &gather("k", b"", 1000), 0);
        hub.hang_up(b);
        assert_eq!(record(&mut hub, a), (Kind::Left, wire::join_ranks(&[Rank(1)])));
        hub.receive(a, &gather("again", b"", 1000), 0);
        assert_eq!(record(&mut hub, a), (Kind::Left, wire::join_ranks(&[Rank(1)])));
        let back = hub.open(0).unwrap();
        hub.receive(back, &greeting(1, 3, "secret"), 0);
        assert_eq!(answer(&mut hub, back), Some(Refusal::RankTaken));
    }

    #[test]
    fn a_member_that_speaks_nonsense_is_cut_off_and_missed() {
        for bytes in [
            vec![0xff; 40],
            wire::encode_record(Kind::Gathered, 0, b"k", b""),
            // A blob longer than any; its bytes need not come.
            [&[1, 0, 0, 0, 0, 0, 0, 0][..], &(BLOB_LEN_MAX as u32 + 1).to_le_bytes()].concat(),
            // A second blob for a round that is still open.
            [gather("k", b"", 9), gather("k", b"", 9)].concat(),
            [gather("k", b"", 9), gather("other", b"", 9)].concat(),
        ] {
            let mut hub = hub(2);
            let (a, b) = (join(&mut hub, 0), join(&mut hub, 1));
            hub.receive(a, &bytes, 0);
            assert!(hub.is_leaving(a));
            assert_eq!(hub.counters().broken, 1);
            hub.receive(b, &gather("k", b"", 1000), 0);
            assert_eq!(record(&mut hub, b), (Kind::Left, wire::join_ranks(&[Rank(0)])));
        }
    }

    #[test]
    fn strangers_are_few_and_leave_in_time() {
        let mut hub = hub(2);
        let strangers: Vec<LinkId> = (0..STRANGERS_MAX).map(|_| hub.open(0).unwrap()).collect();
        assert_eq!(hub.open(0), None);
        hub.receive(strangers[0], &greeting(0, 2, "secret"), 0);
        assert!(hub.open(0).is_some(), "a member is no stranger");
        hub.tick(GREETING_NS);
        assert!(hub.is_leaving(strangers[1]) && !hub.is_leaving(strangers[0]));
        assert_eq!(hub.counters().expired, STRANGERS_MAX as u64);
    }

    proptest! {
        /// Whatever strangers and a member send, the others' round is not disturbed.
        #[test]
        fn arbitrary_bytes_hurt_nobody_else(
            chunks in prop::collection::vec((0_usize..3, prop::collection::vec(any::<u8>(), 0..200)), 0..40),
        ) {
            let mut hub = hub(2);
            let strangers = [0; 3].map(|_| hub.open(0).unwrap());
            let (a, b) = (join(&mut hub, 0), join(&mut hub, 1));
            hub.receive(a, &gather("k", b"x", 1000), 0);
            for (who, bytes) in chunks {
                hub.receive(strangers[who], &bytes, 0);
            }
            hub.receive(b, &gather("k", b"y", 1000), 0);
            prop_assert_eq!(record(&mut hub, a).0, Kind::Gathered);
        }

        #[test]
        fn a_members_arbitrary_bytes_end_in_silence_or_its_end(
            bytes in prop::collection::vec(any::<u8>(), 0..400), kind in 0_u8..6,
        ) {
            let mut hub = hub(2);
            let (a, b) = (join(&mut hub, 0), join(&mut hub, 1));
            hub.receive(a, &[&[kind][..], &bytes].concat(), 0);
            hub.receive(b, &gather("k", b"", 10), 0);
            hub.tick(SECOND);
            hub.hang_up(a);
            prop_assert!(matches!(record(&mut hub, b).0, Kind::Missing | Kind::Left));
        }
    }
}
