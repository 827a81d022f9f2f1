//! A switch between nodes that loses, delays and damages frames as a seeded plan says.
//!
//! It does no input or output of its own: frames are [`submit`](Switch::submit)ted with the time, and
//! [`poll`](Switch::poll)ed at or after the instant they are due. In simulation one switch stands between
//! all devices and time is virtual; between processes each device has one at its exit, and time is real.
//! The same [`FaultPlan`] means the same in both.
//!
//! *Who owns what.* The switch owns the frames in flight, and buffers that it uses again; a frame that was
//! polled is the caller's, who may [`give_back`](Switch::give_back) its buffer.
//!
//! ```text
//!  submit --> partition, flap --> drop --> corrupt --> rate limit --> delay --> [in flight] --> poll
//!                 (gone)         (gone)                  (or gone)  reorder, duplicate
//! ```
//!
//! INVARIANT: without a `reorder` rule, frames of one ordered pair arrive in the order of their submission.
//! INVARIANT: the same plan, frames and instants give the same result.

mod plan;

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::AddAssign;

pub use plan::{
    Fault, FaultPlan, FaultRule, OVERTAKE_MAX, PPM_MAX, PlanError, PlanLimit, RULES_MAX, TIME_US_MAX,
};

use serde::{Deserialize, Serialize};

use crate::Nanos;

/// Most frames in flight; one more is dropped and counted.
pub const IN_FLIGHT_MAX: usize = 1 << 16;
/// Most buffers kept for later frames.
const SPARE_MAX: usize = 1024;

/// What a switch did, by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FaultCounts {
    /// Frames submitted.
    pub submitted: u64,
    /// Frames polled.
    pub delivered: u64,
    /// Lost by a `drop` rule.
    pub dropped: u64,
    /// Extra copies made.
    pub duplicated: u64,
    /// Delivered late by a `delay` rule.
    pub delayed: u64,
    /// Held back so that others may overtake.
    pub reordered: u64,
    /// Damaged.
    pub corrupted: u64,
    /// Made to wait by a `rate_limit` rule.
    pub paced: u64,
    /// Lost because a rate limit's queue was full.
    pub overflowed: u64,
    /// Lost in a partition.
    pub partitioned: u64,
    /// Lost while a link was down.
    pub flapped: u64,
    /// Lost because [`IN_FLIGHT_MAX`] frames were in flight.
    pub crowded_out: u64,
}

impl AddAssign for FaultCounts {
    fn add_assign(&mut self, other: Self) {
        self.submitted += other.submitted;
        self.delivered += other.delivered;
        self.dropped += other.dropped;
        self.duplicated += other.duplicated;
        self.delayed += other.delayed;
        self.reordered += other.reordered;
        self.corrupted += other.corrupted;
        self.paced += other.paced;
        self.overflowed += other.overflowed;
        self.partitioned += other.partitioned;
        self.flapped += other.flapped;
        self.crowded_out += other.crowded_out;
    }
}

/// A frame that arrived.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivery {
    /// The node that sent it.
    pub src: u16,
    /// What its sender has marked it with.
    pub mark: u16,
    /// Its bytes.
    pub frame: Vec<u8>,
}

/// A frame in flight; ordered by when it is due, then by submission.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    due: Nanos,
    nth: u64,
    src: u16,
    mark: u16,
    frame: Vec<u8>,
}

/// A frame that waits to be overtaken.
#[derive(Debug)]
struct Held {
    flight: Flight,
    /// How many may still overtake it.
    left: u32,
}

/// State of one ordered pair.
#[derive(Debug, Default)]
struct Path {
    /// No frame in order arrives before this.
    last_due: Nanos,
    held: Vec<Held>,
    /// Per rate-limit rule in the plan, when the link is free again.
    free_at: Vec<(usize, Nanos)>,
}

/// What the plan decided about one frame.
#[derive(Debug, Default)]
struct Fate {
    extra_delay: u64,
    hold: Option<(u32, u64)>,
    copies: u32,
}

/// A switch; see the module's documentation.
#[derive(Debug)]
pub struct Switch {
    plan: FaultPlan,
    latency: u64,
    random: Random,
    nth: u64,
    in_flight: usize,
    /// Frames on their way to each node.
    arrivals: BTreeMap<u16, BinaryHeap<Reverse<Flight>>>,
    paths: BTreeMap<(u16, u16), Path>,
    spare: Vec<Vec<u8>>,
    counts: FaultCounts,
}

impl Switch {
    /// A switch under `plan` whose paths take `latency` when nothing is wrong.
    ///
    /// # Errors
    /// [`PlanLimit`] if a value of the plan is out of its range.
    pub fn new(plan: FaultPlan, latency: Nanos) -> Result<Self, PlanLimit> {
        plan.check()?;
        Ok(Self {
            random: Random(plan.seed),
            plan,
            latency: latency.0,
            nth: 0,
            in_flight: 0,
            arrivals: BTreeMap::new(),
            paths: BTreeMap::new(),
            spare: Vec::new(),
            counts: FaultCounts::default(),
        })
    }

    /// What it did so far.
    #[must_use]
    pub const fn counts(&self) -> &FaultCounts {
        &self.counts
    }

    /// The plan it follows.
    #[must_use]
    pub const fn plan(&self) -> &FaultPlan {
        &self.plan
    }

    /// Follows another plan from now on; its generator starts anew. Frames in flight keep their fate.
    ///
    /// # Errors
    /// [`PlanLimit`] if a value of the plan is out of its range; the present plan stays.
    pub fn set_plan(&mut self, plan: FaultPlan) -> Result<(), PlanLimit> {
        plan.check()?;
        self.random = Random(plan.seed);
        self.plan = plan;
        // Rate limits are known by their place in the plan.
        self.paths.values_mut().for_each(|path| path.free_at.clear());
        Ok(())
    }

    /// Takes a frame that `src` sends to `dst`.
    pub fn submit(&mut self, now: Nanos, src: u16, dst: u16, frame: &[u8]) {
        self.submit_marked(now, src, (dst, 0), frame);
    }

    /// The same with a mark that it keeps: which of the places is meant that a node has had, one after the other.
    pub fn submit_marked(&mut self, now: Nanos, src: u16, (dst, mark): (u16, u16), frame: &[u8]) {
        self.counts.submitted += 1;
        if self.in_flight >= IN_FLIGHT_MAX {
            self.counts.crowded_out += 1;
            return;
        }
        let mut bytes = self.spare.pop().unwrap_or_default();
        bytes.clear();
        bytes.extend_from_slice(frame);
        match self.decide(now, src, dst, &mut bytes) {
            Some(fate) => self.launch(now, src, (dst, mark), bytes, &fate),
            None => self.give_back(bytes),
        }
    }

    /// The next frame for `dst` that is due.
    pub fn poll(&mut self, now: Nanos, dst: u16) -> Option<Delivery> {
        self.release_held(now, dst);
        let arrivals = self.arrivals.get_mut(&dst)?;
        if arrivals.peek()?.0.due > now {
            return None;
        }
        let Reverse(flight) = arrivals.pop()?;
        self.in_flight -= 1;
        self.counts.delivered += 1;
        Some(Delivery { src: flight.src, mark: flight.mark, frame: flight.frame })
    }

    /// When the next frame for `dst` is due.
    #[must_use]
    pub fn next_deadline(&self, dst: u16) -> Option<Nanos> {
        let flying = self.arrivals.get(&dst).and_then(|heap| heap.peek()).map(|flight| flight.0.due);
        let held = self.paths.iter().filter(|((_, to), _)| *to == dst).flat_map(|(_, path)| &path.held);
        held.map(|held| held.flight.due).chain(flying).min()
    }

    /// Takes a buffer for later frames.
    pub fn give_back(&mut self, frame: Vec<u8>) {
        if self.spare.len() < SPARE_MAX {
            self.spare.push(frame);
        }
    }

    /// Applies the plan to one frame; `None` if it is lost.
    fn decide(&mut self, now: Nanos, src: u16, dst: u16, frame: &mut [u8]) -> Option<Fate> {
        let us = now.0 / 1000;
        let mut fate = Fate { copies: 1, ..Fate::default() };
        for idx in 0..self.plan.rules.len() {
            let rule = self.plan.rules[idx];
            if !rule.concerns(src, dst, us) {
                continue;
            }
            let counts = &mut self.counts;
            match rule.fault {
                Fault::Partition => {
                    counts.partitioned += 1;
                    return None;
                }
                Fault::Flap { up_us, down_us } if (us - rule.from_us) % (up_us + down_us) >= up_us => {
                    counts.flapped += 1;
                    return None;
                }
                Fault::Flap { .. } => {}
                Fault::Drop { ppm } if self.random.happens(ppm) => {
                    counts.dropped += 1;
                    return None;
                }
                Fault::Corrupt { ppm } if self.random.happens(ppm) && !frame.is_empty() => {
                    counts.corrupted += 1;
                    self.random.flip_bits(frame);
                }
                Fault::Duplicate { ppm } if self.random.happens(ppm) => {
                    counts.duplicated += 1;
                    fate.copies += 1;
                }
                Fault::Delay { ppm, min_us, max_us } if self.random.happens(ppm) => {
                    counts.delayed += 1;
                    fate.extra_delay += 1000 * (min_us + self.random.below(max_us - min_us + 1));
                }
                Fault::Reorder { ppm, overtake_max, hold_us } if self.random.happens(ppm) => {
                    counts.reordered += 1;
                    // CAST: at most OVERTAKE_MAX.
                    let left = 1 + self.random.below(overtake_max.into()) as u32;
                    fate.hold = Some((left, 1000 * hold_us));
                }
                Fault::RateLimit { bytes_per_s, queue_bytes } => {
                    let limit = RateLimit { rule: idx, bytes_per_s, queue_bytes };
                    fate.extra_delay += self.pace(now, (src, dst), limit, frame.len() as u64)?;
                }
                _ => {}
            }
        }
        Some(fate)
    }

    /// How long a frame waits for its link; `None` if the queue before it is full.
    fn pace(&mut self, now: Nanos, pair: (u16, u16), limit: RateLimit, len: u64) -> Option<u64> {
        let free_at = &mut self.paths.entry(pair).or_default().free_at;
        let known = free_at.iter().position(|(rule, _)| *rule == limit.rule);
        let pos = known.unwrap_or_else(|| {
            free_at.push((limit.rule, now));
            free_at.len() - 1
        });
        let busy = free_at[pos].1.max(now);
        let nanos_for = |bytes: u64| {
            let nanos = u128::from(bytes) * 1_000_000_000 / u128::from(limit.bytes_per_s);
            u64::try_from(nanos).unwrap_or(u64::MAX)
        };
        let wait = busy.0 - now.0;
        if wait > nanos_for(limit.queue_bytes) {
            self.counts.overflowed += 1;
            return None;
        }
        let sent = busy.plus(nanos_for(len));
        free_at[pos].1 = sent;
        self.counts.paced += u64::from(wait != 0);
        Some(sent.0 - now.0)
    }

    /// Puts a frame, and its copies, on the way.
    fn launch(&mut self, now: Nanos, src: u16, to: (u16, u16), frame: Vec<u8>, fate: &Fate) {
        let due = now.plus(self.latency).plus(fate.extra_delay);
        for _ in 1..fate.copies {
            let mut copy = self.spare.pop().unwrap_or_default();
            copy.clear();
            copy.extend_from_slice(&frame);
            self.enqueue(src, to, due, copy, fate.hold);
        }
        self.enqueue(src, to, due, frame, fate.hold);
    }

    fn enqueue(
        &mut self,
        src: u16,
        (dst, mark): (u16, u16),
        due: Nanos,
        frame: Vec<u8>,
        hold: Option<(u32, u64)>,
    ) {
        self.in_flight += 1;
        self.nth += 1;
        let path = self.paths.entry((src, dst)).or_default();
        let flight = |due| Flight { due, nth: self.nth, src, mark, frame };
        if let Some((left, hold)) = hold {
            path.held.push(Held { flight: flight(due.plus(hold)), left });
            return;
        }
        path.last_due = due.max(path.last_due);
        let due = path.last_due;
        let arrivals = self.arrivals.entry(dst).or_default();
        arrivals.push(Reverse(flight(due)));
        // Whoever was overtaken often enough follows the one that overtook it last.
        for held in &mut path.held {
            held.left -= 1;
        }
        while let Some(pos) = path.held.iter().position(|held| held.left == 0) {
            let mut flight = path.held.remove(pos).flight;
            self.nth += 1;
            (flight.due, flight.nth) = (due, self.nth);
            arrivals.push(Reverse(flight));
        }
    }

    /// Lets go what nothing overtook in time.
    fn release_held(&mut self, now: Nanos, dst: u16) {
        for ((_, to), path) in &mut self.paths {
            if *to != dst {
                continue;
            }
            while let Some(pos) = path.held.iter().position(|held| held.flight.due <= now) {
                let flight = path.held.remove(pos).flight;
                self.arrivals.entry(dst).or_default().push(Reverse(flight));
            }
        }
    }
}

/// A rate-limit rule and its values.
#[derive(Debug, Clone, Copy)]
struct RateLimit {
    rule: usize,
    bytes_per_s: u64,
    queue_bytes: u64,
}

/// A generator that a seed starts: SplitMix64.
#[derive(Debug, Clone, Copy)]
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn happens(&mut self, ppm: u32) -> bool {
        self.below(PPM_MAX.into()) < ppm.into()
    }

    fn flip_bits(&mut self, frame: &mut [u8]) {
        // Distinct bits, so that no flip undoes another: neighbours of a random one.
        let bits = frame.len() as u64 * 8;
        let (first, count) = (self.below(bits), 1 + self.below(3));
        for nth in 0..count.min(bits) {
            let bit = (first + nth) % bits;
            // CAST: an index into the frame.
            frame[(bit / 8) as usize] ^= 1 << (bit % 8);
        }
    }
}

#[cfg(test)]
mod tests;
