//! Random programs of launches, records and waits against a naive model of what must come before
//! what, run as they are queued and as a captured graph.

use std::collections::BTreeSet;

use super::super::Gpu;
use super::tests::{Script, gpu, launch};
use super::*;

const NUM_STREAMS: usize = 4;
const NUM_EVENTS: usize = 3;
const NUM_STEPS: usize = 60;
const NUM_PROGRAMS: u64 = 300;

#[derive(Debug, Clone, Copy)]
enum Step {
    Launch(usize),
    Record { event: usize, stream: usize },
    Wait { event: usize, stream: usize },
}

/// SplitMix64: enough for a test, and the same everywhere.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as usize % limit
    }

    fn program(&mut self) -> Vec<Step> {
        let mut step = |_| {
            let (stream, event) = (self.below(NUM_STREAMS), self.below(NUM_EVENTS));
            match self.below(4) {
                0 => Step::Record { event, stream },
                1 => Step::Wait { event, stream },
                _ => Step::Launch(stream),
            }
        };
        (0..NUM_STEPS).map(&mut step).collect()
    }
}

/// Per launch, in program order: the launches that must have finished before it starts.
fn predecessors(program: &[Step]) -> Vec<BTreeSet<u8>> {
    let mut before = vec![BTreeSet::new(); NUM_STREAMS];
    let mut marks = vec![BTreeSet::new(); NUM_EVENTS];
    let mut all = Vec::new();
    for &step in program {
        match step {
            Step::Launch(stream) => {
                let tag = all.len() as u8;
                all.push(before[stream].clone());
                before[stream].insert(tag);
            }
            Step::Record { event, stream } => marks[event] = before[stream].clone(),
            Step::Wait { event, stream } => before[stream].extend(&marks[event]),
        }
    }
    all
}

/// Finishes launches in random order and checks that none runs before its time.
struct Checker<'a> {
    script: &'a Script,
    predecessors: &'a [BTreeSet<u8>],
    finished: BTreeSet<u8>,
    issued: usize,
}

impl Checker<'_> {
    /// Of the first `issued` launches, those whose predecessors have finished run, and no others.
    fn check(&self) {
        let running = self.script.running();
        for tag in (0..).take(self.issued) {
            let before = &self.predecessors[usize::from(tag)];
            let may_run = before.is_subset(&self.finished) && !self.finished.contains(&tag);
            let runs = running.contains(&tag);
            assert_eq!(runs, may_run, "launch {tag} after {:?}", self.finished);
        }
    }

    fn finish_one(&mut self, random: &mut Random) -> bool {
        let running = self.script.running();
        if running.is_empty() {
            return false;
        }
        let tag = running[random.below(running.len())];
        self.script.finish(tag);
        assert!(self.finished.insert(tag), "{tag} ran twice");
        self.check();
        true
    }

    fn finish_all(mut self, random: &mut Random) {
        self.issued = self.predecessors.len();
        self.check();
        while self.finish_one(random) {}
        assert_eq!(self.finished.len(), self.predecessors.len(), "some launches never ran");
    }
}

fn issue(gpu: &HostGpu, step: Step, streams: &[Stream], events: &[Event], tag: &mut u8) {
    match step {
        Step::Launch(stream) => {
            launch(gpu, &streams[stream], *tag);
            *tag += 1;
        }
        Step::Record { event, stream } => gpu.record(&events[event], &streams[stream]).unwrap(),
        Step::Wait { event, stream } => gpu.wait(&events[event], &streams[stream]).unwrap(),
    }
}

#[test]
fn queued_programs_keep_exactly_the_order_of_streams_and_events() {
    for seed in 0..NUM_PROGRAMS {
        println!("seed {seed}");
        let mut random = Random(seed);
        let program = random.program();
        let predecessors = predecessors(&program);
        let (script, gpu) = gpu();
        let streams: Vec<Stream> = (0..NUM_STREAMS).map(|_| gpu.stream()).collect();
        let events: Vec<Event> = (0..NUM_EVENTS).map(|_| gpu.event()).collect();
        let mut checker =
            Checker { script: &script, predecessors: &predecessors, finished: BTreeSet::new(), issued: 0 };
        let mut tag = 0;
        for &step in &program {
            issue(&gpu, step, &streams, &events, &mut tag);
            checker.issued = usize::from(tag);
            checker.check();
            if random.below(3) == 0 {
                checker.finish_one(&mut random);
            }
        }
        checker.finish_all(&mut random);
    }
}

#[test]
fn replayed_programs_keep_the_same_order_every_time() {
    for seed in 0..NUM_PROGRAMS {
        println!("seed {seed}");
        let mut random = Random(seed);
        let program = random.program();
        let predecessors = predecessors(&program);
        let (script, gpu) = gpu();
        let streams: Vec<Stream> = (0..NUM_STREAMS).map(|_| gpu.stream()).collect();
        let graph = capture(&gpu, &program, &streams);
        for _ in 0..2 {
            gpu.replay(&graph, &streams[0]).unwrap();
            let checker = Checker {
                script: &script,
                predecessors: &predecessors,
                finished: BTreeSet::new(),
                issued: 0,
            };
            checker.finish_all(&mut random);
            gpu.synchronize(&streams[0]).unwrap();
        }
    }
}

/// All streams join at the start and are joined back at the end.
fn capture(gpu: &HostGpu, program: &[Step], streams: &[Stream]) -> Graph {
    let events: Vec<Event> = (0..NUM_EVENTS).map(|_| gpu.event()).collect();
    let (main, fork) = (&streams[0], gpu.event());
    gpu.begin_capture(main).unwrap();
    gpu.record(&fork, main).unwrap();
    for side in &streams[1..] {
        gpu.wait(&fork, side).unwrap();
    }
    let mut tag = 0;
    for &step in program {
        issue(gpu, step, streams, &events, &mut tag);
    }
    for side in &streams[1..] {
        let join = gpu.event();
        gpu.record(&join, side).unwrap();
        gpu.wait(&join, main).unwrap();
    }
    gpu.end_capture(main).unwrap()
}
