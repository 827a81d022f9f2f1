//! Making and taking down what stands between this rank and its peers, one bounded piece at a time.
//!
//! A pair connects by *attempts*: both sides offer queue pairs of one attempt and connect to what the other offers of
//! the same. The lower rank counts them. If either side fails, the attempt is void for both: each fences what it has,
//! the lower rank counts on, and both offer anew. After [`ATTEMPTS_MAX`] the peer is given up.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::cells::{OffersCell, PeerOffer};
use super::derived::Derived;
use super::{Happening, Introduce, KeeperOptions, Session};
use crate::error::{Error, Violation};
use crate::ids::Rank;
use crate::membership::{Instance, Stop, View};
use crate::recovery::Offer;

/// Attempts to connect one incarnation of a peer.
const ATTEMPTS_MAX: u32 = 8;
/// Times that one thing may be refused before the rank stops.
const REFUSALS_MAX: u32 = 64;
/// The first pause after a refusal is this part of `detect_ms`; it doubles up to `detect_ms` itself.
const FIRST_PAUSE_PER_DETECT: u64 = 64;

/// When to try again, and how often.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Retry {
    attempts: u32,
    at_ns: u64,
}

impl Retry {
    pub(super) fn is_due(self, now_ns: u64) -> bool {
        now_ns >= self.at_ns
    }

    pub(super) fn attempts(self) -> u32 {
        self.attempts
    }

    /// Nothing is tried before `at_ns`.
    fn not_before(&mut self, at_ns: u64) {
        self.at_ns = at_ns;
    }

    /// Something came of it.
    fn succeeded(&mut self) {
        self.attempts = 0;
    }

    /// After a refusal: how often by now; none if that was the last time.
    pub(super) fn again(&mut self, now_ns: u64, detect_ns: u64) -> Option<u32> {
        let pause = (detect_ns / FIRST_PAUSE_PER_DETECT + 1) << self.attempts.min(6);
        self.attempts += 1;
        self.at_ns = now_ns + pause.min(detect_ns);
        (self.attempts < REFUSALS_MAX).then_some(self.attempts)
    }
}

/// What has come of the work on one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Done {
    Connected(Rank, Instance),
    /// The pair has to be connected anew.
    Disconnected(Rank, Instance),
    Fenced(Rank, Instance),
    /// It could not be connected.
    GivenUp(Rank, Instance),
}

/// What is to be done next for one link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    /// Queue pairs are to be made.
    Offer,
    /// This attempt has failed here; the counting side begins the next.
    Wait,
    /// Queue pairs exist and are offered; the peer's offer is awaited.
    Await,
    Connected,
    /// To be taken down, once no half of an older step needs it.
    Drain,
    /// To be taken down.
    Fail,
    /// Halves that may still use it are to leave.
    Grace,
    /// It could not be connected; nothing is tried any more.
    GivenUp,
}

/// The link to one incarnation of a peer.
#[derive(Debug)]
struct LinkWork {
    instance: Instance,
    stage: Stage,
    attempt: u32,
    /// After the fence: gone for good, or to be connected anew.
    is_for_good: bool,
    /// This side could not connect.
    has_failed: bool,
    retry: Retry,
}

impl LinkWork {
    fn new(instance: Instance, stage: Stage) -> Self {
        Self { instance, stage, attempt: 1, is_for_good: false, has_failed: false, retry: Retry::default() }
    }
}

/// All links of one rank.
pub(super) struct Links {
    introduce: Option<Box<Introduce>>,
    me: Rank,
    detect_ns: u64,
    work: BTreeMap<Rank, LinkWork>,
    /// What peers offer.
    theirs: BTreeMap<Rank, OffersCell>,
    /// What this rank offers.
    ours: OffersCell,
    has_changed: bool,
    now_ns: u64,
    /// Peers that kernels wait for.
    serving: BTreeMap<Rank, Instance>,
    /// What was made of peers' records.
    pub(super) derived: Derived,
}

impl Links {
    pub(super) fn new(options: KeeperOptions, instance: Instance, session: &Session, detect_ns: u64) -> Self {
        let (me, num_ranks) = (session.rank(), session.config().num_ranks);
        Self {
            derived: Derived::new(options.records, me, num_ranks, session.hca.port()),
            introduce: options.introduce,
            me,
            detect_ns,
            work: BTreeMap::new(),
            theirs: BTreeMap::new(),
            ours: OffersCell { instance, advert: options.advert, to: BTreeMap::new() },
            has_changed: true,
            now_ns: 0,
            serving: BTreeMap::new(),
        }
    }

    pub(super) fn take_offers(&mut self, from: Rank, offers: OffersCell) {
        self.theirs.insert(from, offers);
    }

    /// The cell of this rank's offers, if it says something new.
    pub(super) fn changed_offers(&mut self) -> Option<Vec<u8>> {
        core::mem::take(&mut self.has_changed).then(|| self.ours.to_bytes())
    }

    pub(super) fn serving(&self) -> Vec<(Rank, Instance)> {
        self.serving.iter().map(|(rank, instance)| (*rank, *instance)).collect()
    }

    pub(super) fn is_serving(&self, peer: Rank) -> bool {
        self.serving.contains_key(&peer)
    }

    pub(super) fn serve(&mut self, peer: Rank, instance: Instance) {
        self.serving.insert(peer, instance);
    }

    pub(super) fn stop_serving(&mut self, peer: Rank) {
        self.serving.remove(&peer);
    }

    /// The incarnation that this side is connected with.
    pub(super) fn connected(&self, peer: Rank) -> Option<Instance> {
        let link = self.work.get(&peer).filter(|link| link.stage == Stage::Connected)?;
        self.derived.stands(peer).then_some(link.instance)
    }

    /// Looks at peers' records; who serves by queue pairs that the peer's record does not offer any more.
    pub(super) fn look(&mut self) -> Vec<(Rank, Instance)> {
        let retired = self.derived.look();
        let serves = |peer: &Rank| {
            // One that is on its way out serves until nothing needs it.
            let link = self.work.get(peer).filter(|link| link.stage == Stage::Connected)?;
            self.is_serving(*peer).then_some((*peer, link.instance))
        };
        retired.iter().filter_map(serves).collect()
    }

    pub(super) fn connect(&mut self, peer: Rank, instance: Instance) {
        self.work.insert(peer, LinkWork::new(instance, Stage::Offer));
    }

    /// Takes a link down for good; one of a peer that left on purpose only when nothing needs it any more.
    pub(super) fn fence(&mut self, peer: Rank, instance: Instance, has_left: bool) {
        if !has_left {
            self.stop_serving(peer);
        }
        self.withdraw(peer);
        let link = self.work.entry(peer).or_insert(LinkWork::new(instance, Stage::Fail));
        // A fence that has begun for another attempt goes on.
        if link.stage != Stage::Grace {
            link.stage = if has_left { Stage::Drain } else { Stage::Fail };
        }
        (link.is_for_good, link.retry) = (true, Retry::default());
    }

    fn withdraw(&mut self, peer: Rank) {
        self.has_changed |= self.ours.to.remove(&peer).is_some();
    }

    /// Does the next piece of every link.
    pub(super) fn work(
        &mut self,
        now_ns: u64,
        session: &Arc<Session>,
        view: &View,
        notes: &mut Vec<Happening>,
    ) -> Result<Vec<Done>, Stop> {
        self.now_ns = now_ns;
        let mut done = Vec::new();
        for peer in self.work.keys().copied().collect::<Vec<_>>() {
            let Some(mut link) = self.work.remove(&peer) else { continue };
            if !link.retry.is_due(now_ns) {
                self.work.insert(peer, link);
                continue;
            }
            let (stage, instance) = (link.stage, link.instance);
            match self.piece(session, view, peer, &mut link) {
                Ok(outcome) => {
                    if link.stage != stage {
                        link.retry.succeeded();
                        notes.extend(self.noteworthy(peer, &link, stage));
                    }
                    done.extend(outcome);
                }
                Err(refused) => self.refused(now_ns, peer, &mut link, refused, notes)?,
            }
            if !matches!(done.last(), Some(Done::Fenced(gone, _)) if *gone == peer && link.is_for_good) {
                self.work.insert(peer, link);
            } else {
                notes.push(Happening::Fenced { peer, instance });
            }
        }
        Ok(done)
    }

    fn noteworthy(&self, peer: Rank, link: &LinkWork, before: Stage) -> Option<Happening> {
        match (before, link.stage) {
            (Stage::Offer, Stage::Await) => Some(Happening::Offered { peer }),
            (_, Stage::Connected) => Some(Happening::Connected { peer, instance: link.instance }),
            _ => None,
        }
    }

    fn refused(
        &mut self,
        now_ns: u64,
        peer: Rank,
        link: &mut LinkWork,
        doing: &'static str,
        notes: &mut Vec<Happening>,
    ) -> Result<(), Stop> {
        match link.retry.again(now_ns, self.detect_ns) {
            Some(attempts) => {
                notes.push(Happening::Refused { doing, peer, attempts });
                Ok(())
            }
            None => Err(Stop::Failed { doing, attempts: link.retry.attempts() }),
        }
    }

    /// One piece of work on one link; what was refused otherwise.
    fn piece(
        &mut self,
        session: &Arc<Session>,
        view: &View,
        peer: Rank,
        link: &mut LinkWork,
    ) -> Result<Option<Done>, &'static str> {
        match link.stage {
            Stage::Offer => self.offer(session, peer, link).map(|()| None),
            Stage::Await => Ok(self.connect_if_offered(session, view, peer, link)),
            Stage::Connected => Ok(self.follow_attempts(peer, link)),
            Stage::Wait => {
                if let Some((theirs, _)) =
                    self.offered_by(peer, link).filter(|(o, _)| o.attempt > link.attempt)
                {
                    (link.attempt, link.stage) = (theirs.attempt, Stage::Offer);
                }
                Ok(None)
            }
            Stage::GivenUp => Ok(None),
            Stage::Drain => {
                if session.is_old_table_free().map_err(|_| "read the streams")? {
                    self.stop_serving(peer);
                    link.stage = Stage::Fail;
                }
                Ok(None)
            }
            Stage::Fail => {
                session.begin_fence(peer).map_err(|_| "begin a fence")?;
                link.stage = Stage::Grace;
                Ok(None)
            }
            Stage::Grace => match session.poll_fence(peer) {
                Ok(false) => Ok(None),
                Ok(true) => Ok(self.after_fence(peer, link)),
                Err(_) => Err("finish a fence"),
            },
        }
    }

    fn offer(&mut self, session: &Arc<Session>, peer: Rank, link: &mut LinkWork) -> Result<(), &'static str> {
        let offer = session.offer(peer, None).map_err(|_| "make queue pairs")?;
        self.derived.offered(peer, Some(&offer));
        self.say(peer, link, offer.to_bytes());
        link.stage = Stage::Await;
        Ok(())
    }

    fn say(&mut self, peer: Rank, link: &LinkWork, offer: Vec<u8>) {
        let offer = PeerOffer { to: link.instance, attempt: link.attempt, offer };
        self.ours.to.insert(peer, offer);
        self.has_changed = true;
    }

    /// What this incarnation of the peer offers to this incarnation of us.
    fn offered_by(&self, peer: Rank, link: &LinkWork) -> Option<(&PeerOffer, &[u8])> {
        let cell = self.theirs.get(&peer).filter(|cell| cell.instance == link.instance)?;
        let offer = cell.to.get(&self.me).filter(|offer| offer.to == self.ours.instance)?;
        Some((offer, &cell.advert))
    }

    fn counts_attempts(&self, peer: Rank) -> bool {
        self.me < peer
    }

    fn connect_if_offered(
        &mut self,
        session: &Arc<Session>,
        view: &View,
        peer: Rank,
        link: &mut LinkWork,
    ) -> Option<Done> {
        if let Some(done) = self.follow_attempts(peer, link) {
            return Some(done);
        }
        let (offer, advert) = self.offered_by(peer, link).filter(|_| link.stage == Stage::Await)?;
        if offer.attempt != link.attempt || view.holder(peer) != Some(link.instance) {
            return None;
        }
        let advert = advert.to_vec();
        let Ok(offer) = Offer::from_bytes(&offer.offer) else {
            self.fail_attempt(peer, link);
            return None;
        };
        // The record may come later than the offer; both must say the same.
        if !self.derived.agrees(peer, link.instance, &offer) {
            return None;
        }
        let is_joined = self.join(session, peer, &offer, &advert).is_ok();
        if !is_joined || !self.derived.connected(session, peer, &offer) {
            self.fail_attempt(peer, link);
            return None;
        }
        link.stage = Stage::Connected;
        Some(Done::Connected(peer, link.instance))
    }

    fn join(&mut self, session: &Session, peer: Rank, offer: &Offer, advert: &[u8]) -> Result<(), Error> {
        if offer.from != peer {
            let check = "offer.from";
            return Err(Error::Protocol(Violation { from: peer, check, found: 0, expected: 1 }));
        }
        if let Some(introduce) = &mut self.introduce {
            introduce(peer, advert)?;
        }
        // The switch that admits the peer says which sequence number is the first of the pair.
        session.connect(offer, &vec![[1; 2]; offer.lanes.len()])
    }

    /// This side could not connect: the attempt is void for both.
    fn fail_attempt(&mut self, peer: Rank, link: &mut LinkWork) {
        self.say(peer, link, Vec::new());
        link.has_failed = true;
        if self.counts_attempts(peer) {
            link.attempt += 1;
        }
        link.retry.not_before(self.now_ns + self.detect_ns / FIRST_PAUSE_PER_DETECT);
        link.stage = Stage::Fail;
    }

    /// Takes up what the peer says of the attempt: the counting side that it failed, the other that there is a new one.
    fn follow_attempts(&mut self, peer: Rank, link: &mut LinkWork) -> Option<Done> {
        let (offer, _) = self.offered_by(peer, link)?;
        let (theirs, has_failed) = (offer.attempt, offer.offer.is_empty());
        let next = if self.counts_attempts(peer) {
            (theirs == link.attempt && has_failed).then_some(link.attempt + 1)
        } else {
            (theirs > link.attempt).then_some(theirs)
        };
        link.attempt = next?;
        link.stage = Stage::Fail;
        Some(Done::Disconnected(peer, link.instance))
    }

    fn after_fence(&mut self, peer: Rank, link: &mut LinkWork) -> Option<Done> {
        self.derived.offered(peer, None);
        if link.is_for_good {
            return Some(Done::Fenced(peer, link.instance));
        }
        if link.attempt > ATTEMPTS_MAX {
            link.stage = Stage::GivenUp;
            return Some(Done::GivenUp(peer, link.instance));
        }
        let waits = core::mem::take(&mut link.has_failed) && !self.counts_attempts(peer);
        link.stage = if waits { Stage::Wait } else { Stage::Offer };
        None
    }
}
