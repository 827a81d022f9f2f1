//! Random schedules on real queue pairs, over a plain model: records change while requests wait and while they are
//! posted, and each request lands in the memory that the newest record known at that moment named, and nowhere else.

use ibex::transfer::{Batch, Region, Requester, TransferError};
use ibex_hca::Access;
use ibex_metadata::record::BufferState;
use ibex_metadata::scope;
use proptest::collection::vec;
use proptest::prelude::{Just, ProptestConfig, Strategy, prop_oneof, proptest};

use crate::rig::{End, LEN, Over, PATIENCE, Rig, name, open, write};

/// Bytes of one request.
const CHUNK: u64 = 64;

#[derive(Clone, Copy, Debug)]
enum Move {
    /// The near end resolves the record and submits so many requests.
    Submit(u8),
    /// Devices do so much, and requesters take completions and post.
    Run(u8),
    /// The far end moves its buffer: the same identity, other memory, another key.
    Rotate,
    /// The far end's buffer drains, or is offered again.
    Drain(bool),
    /// The far end's port gets another name: everything over it is made anew.
    Rename,
    /// The near end takes in the far end's newest record.
    Look,
}

fn moves() -> impl Strategy<Value = Vec<Move>> {
    let one = prop_oneof![
        4 => (1..6u8).prop_map(Move::Submit),
        4 => (0..8u8).prop_map(Move::Run),
        3 => Just(Move::Rotate),
        1 => proptest::bool::ANY.prop_map(Move::Drain),
        1 => Just(Move::Rename),
        3 => Just(Move::Look),
    ];
    vec(one, 1..40)
}

/// The far end's record, as far as it matters here.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    /// Which memory.
    generation: usize,
    is_draining: bool,
    name: u32,
}

struct Schedule {
    rig: Rig,
    requester: &'static Requester,
    here: &'static Region,
    /// The far end's memory, by generation; none is given back.
    there: Vec<Region>,
    published: Said,
    known: Said,
    batches: Vec<Batch<'static>>,
    submitted: u64,
    /// By order of posting: which memory the newest known record named.
    posted_for: Vec<usize>,
}

/// Until the process ends: a schedule keeps its batches, each of which borrows.
fn kept<T>(value: T) -> &'static T {
    Box::leak(Box::new(value))
}

impl Schedule {
    fn new() -> Self {
        let rig = Rig::new(&open("memory:"), Over::Inproc);
        let there = rig.far.region();
        rig.far.offer(&there);
        rig.near.look("far");
        let (requester, here) = (&**kept(rig.near.requester.clone()), kept(rig.near.region()));
        let bytes: Vec<u8> = (0..LEN).map(|at| 1 + (at / CHUNK % 255) as u8).collect();
        here.view().write(0, &bytes);
        let (published, known) = (Said::default(), Said::default());
        let (batches, posted_for) = (Vec::new(), Vec::new());
        Self { rig, requester, here, there: vec![there], published, known, batches, submitted: 0, posted_for }
    }

    /// What was posted since this was last called was posted under what is known now.
    fn note_posted(&mut self) {
        let posted = self.requester.counters().posted as usize;
        self.posted_for.resize(posted, self.known.generation);
    }

    fn publish(&mut self) {
        let Said { generation, is_draining, name } = self.published;
        let mut buffer = self.there[generation].describe(ibex_metadata::record::BufferKind::Kv);
        buffer.state = if is_draining { BufferState::Draining } else { BufferState::Ready };
        self.rig.far.publish(|record| {
            record.buffers = vec![buffer];
            record.devices[0].name = format!("hca{name}");
        });
    }

    fn look(&mut self) {
        self.note_posted();
        let is_renamed = self.known.name != self.published.name;
        self.known = self.published;
        self.rig.near.look("far");
        if is_renamed {
            // The far end makes its side of the path anew, too, when the near end's record says so.
            let name = self.published.name;
            self.rig.near.publish(|record| record.devices[0].name = format!("hca{name}"));
            self.rig.far.look("near");
        }
        self.note_posted();
    }

    fn submit(&mut self, count: u64) {
        let count = count.min(LEN / CHUNK - self.submitted);
        if count == 0 {
            return;
        }
        self.look();
        let end: &End = &self.rig.near;
        let request = kept(scope::Request::new(end.store.clock().clone()));
        let scope = kept(request.scope(&**kept(end.store.store().clone())));
        let guard = kept(end.store.resolve(scope, &name("far")).unwrap());
        let opened = self.requester.open(guard, self.there[0].id());
        let Ok(segment) = opened else {
            assert!(self.known.is_draining, "{opened:?}");
            return;
        };
        let segment = kept(segment);
        let range = self.submitted..self.submitted + count;
        let work: Vec<_> = range.map(|i| write(self.here, segment, i * CHUNK, CHUNK as u32)).collect();
        self.batches.push(self.requester.submit(guard, &work, PATIENCE).unwrap());
        self.submitted += count;
        self.note_posted();
    }

    fn take(&mut self, step: Move) {
        match step {
            Move::Submit(count) => self.submit(count.into()),
            Move::Run(steps) => {
                for _ in 0..steps {
                    self.rig.step();
                    self.requester.progress();
                    self.rig.far.requester.progress();
                    self.note_posted();
                }
            }
            Move::Rotate => {
                let id = self.there[0].id();
                self.there.push(self.rig.far.requester.register_as(id, LEN, Access::ALL).unwrap());
                self.published.generation = self.there.len() - 1;
                self.publish();
            }
            Move::Drain(is_draining) => {
                self.published.is_draining = is_draining;
                self.publish();
            }
            Move::Rename => {
                self.published.name += 1;
                self.publish();
            }
            Move::Look => self.look(),
        }
    }

    fn finish(mut self) {
        self.look();
        while !self.batches.iter().all(|batch| batch.is_done() && batch.is_quiescent()) {
            self.rig.step();
            self.requester.progress();
            self.rig.far.requester.progress();
            self.note_posted();
        }
        let reports = self.batches.iter().flat_map(Batch::wait);
        let mut posted_for = self.posted_for.iter();
        for (i, report) in (0..).zip(reports) {
            let lands = match report.outcome {
                Ok(_) => Some((*posted_for.next().unwrap(), true)),
                Err(TransferError::PathRetired { .. }) => Some((*posted_for.next().unwrap(), false)),
                Err(TransferError::NotOffered { .. }) => None,
                Err(other) => panic!("request {i}: {other}"),
            };
            for (generation, region) in self.there.iter().enumerate() {
                let found = region.view().to_vec(i * CHUNK, CHUNK);
                let is_there = found == [1 + (i % 255) as u8; CHUNK as usize];
                assert!(is_there || found == [0; CHUNK as usize], "request {i} is torn in {generation}");
                match lands {
                    Some((wanted, true)) => {
                        assert_eq!(is_there, generation == wanted, "request {i}: {generation}, not {wanted}");
                    }
                    // It may have arrived before its connection went; nowhere else.
                    Some((wanted, false)) => assert!(!is_there || generation == wanted, "request {i}"),
                    None => assert!(!is_there, "request {i} was refused, and is in {generation}"),
                }
            }
        }
        assert_eq!(posted_for.next(), None, "each posted request has an outcome");
        assert_eq!(self.rig.refusals(), 0, "no request came with a key that the device did not know");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_land_where_the_newest_known_record_says(moves in moves()) {
        let mut schedule = Schedule::new();
        for step in moves {
            schedule.take(step);
        }
        schedule.finish();
    }
}
