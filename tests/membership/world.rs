//! Machines with their boards and sessions, and what happens to them.

use super::store::Store;
use super::*;

mod board;
mod node;

const MS: u64 = 1_000_000;
const DETECT_NS: u64 = 100 * MS;

/// Something that happens at a point of time.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Happens {
    Kill(Rank),
    Restart(Rank),
    /// A process is stopped, or goes on; it is no less alive for it.
    Freeze(Rank),
    Thaw(Rank),
    /// A rank is cut off from the store, or no longer.
    Cut(Rank, bool),
    /// The store is away, or back.
    Outage(bool),
    /// A path between two ranks is lost in one direction for good.
    Suspicion {
        by: Rank,
        of: Rank,
    },
    Leave(Rank),
    Placement(u32),
    /// The machine of an incarnation hears something.
    Deliver(Rank, u128, Note),
    /// A write of an incarnation reaches the store.
    Write(Rank, u128, Wish),
    /// Time for an incarnation to do what it is at.
    Tick(Rank, u128),
}

/// What a board tells: contents are read when it is told.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Note {
    Available,
    Unavailable,
    View,
    Row(Rank),
    Claim(Rank),
    Cas(u64),
}

/// What a board was asked to write.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Wish {
    Row,
    /// The number of the change among those of its incarnation.
    View(u64),
}

/// How far this side of a link is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Offered,
    Connected,
    Fencing { until_ns: u64 },
}

/// One process: a machine, and models of its board and its session.
struct Node {
    machine: Membership,
    instance: Instance,
    is_frozen: bool,
    is_cut: bool,
    is_leaving: bool,
    row: Option<Row>,
    changes: Vec<(u64, View)>,
    /// What this board has told last, so that nothing older follows.
    links: BTreeMap<Rank, (Instance, Stage)>,
    alive: RankSet,
    /// Whom its kernels no longer wait for.
    lost: RankSet,
    step: u64,
    gate: Option<u64>,
    acking: Option<u64>,
    switching: Option<Start>,
    /// The epoch whose switch this rank has done last.
    table: Option<Epoch>,
    gate_closed_ns: Option<u64>,
    /// Postponed while frozen.
    missed: Vec<Happens>,
}

/// Everything. See the module documentation.
pub(super) struct World {
    seed: u64,
    random: u64,
    now: u64,
    order: u64,
    queue: BinaryHeap<Reverse<(u64, u64, Happens)>>,
    pub(super) detect_ns: u64,
    pub(super) config: MembershipConfig,
    pub(super) store: Store,
    nodes: BTreeMap<Rank, Node>,
    stops: BTreeMap<Rank, Stop>,
    last_instance: u128,
    /// One does not hear the other, since this time.
    deaf: BTreeMap<(Rank, Rank), u128>,
    /// Whoever may be evicted, by incarnation.
    licensed: Vec<(Rank, Instance)>,
    /// Which table each step ran under, by whoever was a member then.
    tables: BTreeMap<u64, Vec<(Rank, Instance, Epoch)>>,
    delay_max_ns: u64,
    is_anything_allowed: bool,
    restarts: bool,
    /// Nobody launches anything, so nobody misses anybody.
    pub(super) is_idle: bool,
    pub(super) counts: BTreeMap<&'static str, u64>,
    prints: bool,
}

impl World {
    /// A group whose size, delays and faults come from `seed`.
    pub(super) fn new(seed: u64) -> Self {
        let mut world = Self::empty(seed, 2);
        let num = 2 + world.below(7) as u32;
        world.config.num_ranks = num;
        // Some groups grow to their size.
        let begin = if world.below(4) == 0 { 1 + world.below(num.into()) as u32 } else { num };
        world.config.initial = RankSet::first(begin);
        world.store = Store::new(num);
        world.delay_max_ns = [MS / 10, 2 * MS, 15 * MS][world.below(3) as usize];
        world.start_all();
        world
    }

    /// A group without delays worth mentioning, and without faults.
    pub(super) fn quiet(seed: u64, num_ranks: u32) -> Self {
        let mut world = Self::empty(seed, num_ranks);
        world.restarts = false;
        world.start_all();
        world
    }

    fn empty(seed: u64, num_ranks: u32) -> Self {
        let config = MembershipConfig {
            num_ranks,
            initial: RankSet::first(num_ranks),
            first_step: 0,
            first_seq: vec![[1; 2]],
            detect_ns: DETECT_NS,
            lease_ttl_ns: 3 * DETECT_NS,
            store_grace_ns: 30 * DETECT_NS,
            join_ns: 100 * DETECT_NS,
            flap_window_ns: 100 * DETECT_NS,
            hold_down_ns: DETECT_NS,
            hold_down_max_ns: 32 * DETECT_NS,
            guards_off: Vec::new(),
        };
        Self {
            seed,
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x5bf0_3635,
            now: 1,
            order: 0,
            queue: BinaryHeap::new(),
            detect_ns: DETECT_NS,
            store: Store::new(num_ranks),
            config,
            nodes: BTreeMap::new(),
            stops: BTreeMap::new(),
            last_instance: 0,
            deaf: BTreeMap::new(),
            licensed: Vec::new(),
            tables: BTreeMap::new(),
            delay_max_ns: MS / 10,
            is_anything_allowed: false,
            restarts: true,
            is_idle: false,
            counts: BTreeMap::new(),
            prints: std::env::var_os("MODEL_SEED").is_some(),
        }
    }

    fn start_all(&mut self) {
        for rank in RankSet::first(self.config.num_ranks).iter() {
            let at = self.below(5 * self.delay_max_ns);
            self.happens_in(at, Happens::Restart(rank));
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.random;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n.max(1)
    }

    fn some_rank(&mut self) -> Rank {
        Rank(self.below(self.config.num_ranks.into()) as u16)
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
    }

    pub(super) fn happens_in(&mut self, ns: u64, what: Happens) {
        self.order += 1;
        self.queue.push(Reverse((self.now + ns, self.order, what)));
    }

    pub(super) fn now_happens(&mut self, what: Happens) {
        self.happens_in(0, what);
    }

    pub(super) fn time_ns(&self) -> u64 {
        self.now
    }

    pub(super) fn stop_of(&self, rank: Rank) -> Option<Stop> {
        self.stops.get(&rank).copied()
    }

    pub(super) fn steps_of(&self, rank: Rank) -> u64 {
        self.nodes.get(&rank).map_or(0, |node| node.step)
    }

    pub(super) fn turn_off(&mut self, guard: MembershipGuard) {
        for node in self.nodes.values_mut() {
            node.machine.turn_off(guard);
        }
    }

    /// What the model holds against evictions is not what this test is about.
    pub(super) fn allow_anything(&mut self) {
        self.is_anything_allowed = true;
    }

    /// So many times `detect_ns`.
    pub(super) fn run_for(&mut self, detects: u64) {
        self.run_for_ns(detects * self.detect_ns);
    }

    pub(super) fn run_for_ns(&mut self, ns: u64) {
        let end = self.now + ns;
        while self.queue.peek().is_some_and(|Reverse((at, ..))| *at <= end) {
            self.one();
        }
        self.now = end;
    }

    /// Until every rank is a member that serves, with its gate open.
    pub(super) fn run_until_whole(&mut self) {
        let limit = self.now + 3_000 * self.detect_ns;
        while !self.is_whole() {
            assert!(self.now < limit, "seed {}: not whole\n{}", self.seed, self.picture());
            self.run_for_ns(self.detect_ns / 4);
        }
    }

    fn is_whole(&self) -> bool {
        let view = self.store.view();
        let all = RankSet::first(self.config.num_ranks);
        view.members() == all
            && view.plan.is_none()
            && self.nodes.len() == all.len()
            && self.nodes.values().all(|node| {
                let is_current = node.machine.view().epoch == view.epoch && node.alive == all;
                is_current && node.gate.is_none() && node.machine.applied() == view.epoch
            })
    }

    /// Faults of every kind, at random times.
    pub(super) fn run_faults(&mut self) {
        let count = 1 + self.below(12);
        let mut at = self.below(10 * self.detect_ns);
        for _ in 0..count {
            self.draw_fault(at);
            // Often the next one comes while the group is still busy with this one.
            let spread = [self.delay_max_ns * 4, self.detect_ns, 12 * self.detect_ns];
            let which = self.below(3) as usize;
            at += self.below(spread[which]);
        }
        self.run_for_ns(at + 5 * self.detect_ns);
    }

    fn draw_fault(&mut self, at: u64) {
        let (rank, other) = (self.some_rank(), self.some_rank());
        let short = self.below(2 * self.detect_ns);
        match self.below(9) {
            0 | 1 => {
                let wait = [0, 10 * MS, 5 * self.detect_ns][self.below(3) as usize];
                self.happens_in(at, Happens::Kill(rank));
                self.happens_in(at + wait + 1, Happens::Restart(rank));
            }
            2 => {
                self.happens_in(at, Happens::Cut(rank, true));
                let long = self.below(10 * self.detect_ns);
                self.happens_in(at + long + 1, Happens::Cut(rank, false));
            }
            3 => {
                self.happens_in(at, Happens::Outage(true));
                let long = self.below(12 * self.detect_ns);
                self.happens_in(at + long + 1, Happens::Outage(false));
            }
            4 if rank != other => self.happens_in(at, Happens::Suspicion { by: rank, of: other }),
            5 => {
                self.happens_in(at, Happens::Freeze(rank));
                self.happens_in(at + short + 1, Happens::Thaw(rank));
            }
            6 => {
                self.happens_in(at, Happens::Leave(rank));
                self.happens_in(at + 8 * self.detect_ns, Happens::Restart(rank));
            }
            7 => {
                let version = 2 + self.below(50) as u32;
                self.happens_in(at, Happens::Placement(version));
            }
            _ => {
                self.happens_in(at, Happens::Kill(rank));
                self.happens_in(at + short / 20, Happens::Kill(other));
                self.happens_in(at + short + 1, Happens::Restart(rank));
                self.happens_in(at + short + 2, Happens::Restart(other));
            }
        }
    }

    /// Everything works again: the group must become whole, and go on together.
    pub(super) fn heal_and_converge(&mut self) {
        self.now_happens(Happens::Outage(false));
        for rank in RankSet::first(self.config.num_ranks).iter() {
            self.now_happens(Happens::Cut(rank, false));
            self.now_happens(Happens::Thaw(rank));
            self.now_happens(Happens::Restart(rank));
        }
        self.deaf.clear();
        self.run_for(3);
        // Whoever was told to leave has left by now, or is told that its successor shall not.
        self.run_until_whole();
        let before = self.tables.keys().next_back().copied().unwrap_or(0);
        self.run_for(5);
        let after = self.tables.keys().next_back().copied().unwrap_or(0);
        assert!(after > before + 5, "seed {}: steps do not go on\n{}", self.seed, self.picture());
    }

    fn picture(&self) -> String {
        let mut text = format!("{:#?}\n", self.store.view());
        for (rank, node) in &self.nodes {
            text += &format!(
                "{rank}: {:?} {:?} step {} gate {:?} alive {} links {:?} suspects {} {:?}\n",
                node.instance,
                node.machine.standing(),
                node.step,
                node.gate,
                node.alive,
                node.links,
                node.machine.suspects(),
                node.row,
            );
        }
        text
    }

    fn one(&mut self) {
        let Some(Reverse((at, _, what))) = self.queue.pop() else { return };
        self.now = at;
        if self.prints && !matches!(what, Happens::Deliver(..) | Happens::Write(..) | Happens::Tick(..)) {
            println!("{:9} us: {what:?}", at / 1000);
        }
        match what {
            Happens::Kill(rank) => self.kill(rank),
            Happens::Restart(rank) => self.restart(rank),
            Happens::Freeze(rank) => {
                self.count("slow");
                self.license(rank);
                if let Some(node) = self.nodes.get_mut(&rank) {
                    node.is_frozen = true;
                }
            }
            Happens::Thaw(rank) => self.thaw(rank),
            Happens::Cut(rank, is_cut) => self.cut(rank, is_cut),
            Happens::Outage(is_away) => self.outage(is_away),
            Happens::Suspicion { by, of } => self.deafen(by, of),
            Happens::Leave(rank) => {
                if let Some(node) = self.nodes.get_mut(&rank) {
                    node.is_leaving = true;
                    node.machine.handle_leave(at);
                    self.settle(rank);
                }
            }
            Happens::Placement(version) => {
                self.store.placement_version = self.store.placement_version.max(version);
                for rank in self.nodes.keys().copied().collect::<Vec<_>>() {
                    self.on(rank, |machine, now| machine.handle_placement(now, version));
                }
            }
            Happens::Deliver(rank, instance, note) => {
                if !self.is_postponed(rank, instance, Happens::Deliver(rank, instance, note.clone())) {
                    self.deliver(rank, note);
                }
            }
            Happens::Write(rank, instance, wish) => self.write(rank, instance, wish),
            Happens::Tick(rank, instance) => {
                if !self.is_postponed(rank, instance, Happens::Tick(rank, instance)) {
                    self.tick(rank);
                }
            }
        }
    }

    /// Whether that incarnation is gone, or stopped; then what it misses comes later.
    fn is_postponed(&mut self, rank: Rank, instance: u128, what: Happens) -> bool {
        match self.nodes.get_mut(&rank) {
            Some(node) if node.instance.0 == instance => {
                if node.is_frozen {
                    node.missed.push(what);
                }
                node.is_frozen
            }
            _ => true,
        }
    }

    fn license(&mut self, rank: Rank) {
        if let Some(node) = self.nodes.get(&rank) {
            self.licensed.push((rank, node.instance));
        }
    }

    fn kill(&mut self, rank: Rank) {
        self.license(rank);
        if self.nodes.remove(&rank).is_some() {
            self.count("kill");
        }
    }

    fn restart(&mut self, rank: Rank) {
        if self.nodes.contains_key(&rank) || !self.store.is_up {
            if !self.nodes.contains_key(&rank) {
                self.happens_in(self.detect_ns, Happens::Restart(rank));
            }
            return;
        }
        self.stops.remove(&rank);
        self.last_instance += 1;
        let instance = Instance(self.last_instance);
        let claim = self.store.claim(rank, instance, self.now + self.config.lease_ttl_ns);
        let node = Node {
            machine: Membership::new(self.config.clone(), claim, self.now),
            instance,
            is_frozen: false,
            is_cut: false,
            is_leaving: false,
            row: None,
            changes: Vec::new(),
            links: BTreeMap::new(),
            alive: RankSet::EMPTY,
            lost: RankSet::EMPTY,
            step: 0,
            gate: Some(0),
            acking: None,
            switching: None,
            table: None,
            gate_closed_ns: None,
            missed: Vec::new(),
        };
        self.nodes.insert(rank, node);
        self.announce(Note::Claim(rank));
        self.tell(rank, Note::Available);
        self.happens_in(MS, Happens::Tick(rank, instance.0));
    }

    fn thaw(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get_mut(&rank).filter(|node| node.is_frozen) else { return };
        node.is_frozen = false;
        for what in core::mem::take(&mut node.missed) {
            self.now_happens(what);
        }
    }

    fn cut(&mut self, rank: Rank, is_cut: bool) {
        let Some(node) = self.nodes.get_mut(&rank).filter(|node| node.is_cut != is_cut) else { return };
        node.is_cut = is_cut;
        if is_cut {
            self.count("cut");
            self.license(rank);
        }
        if self.store.is_up {
            self.tell(rank, if is_cut { Note::Unavailable } else { Note::Available });
        }
    }

    fn outage(&mut self, is_away: bool) {
        if self.store.is_up != is_away {
            return;
        }
        self.store.is_up = !is_away;
        self.store.up_since_ns = self.now;
        if is_away {
            self.count("outage");
        } else {
            // Leases run on from where they stood.
            for name in self.store.names.values_mut().filter(|name| name.is_alive) {
                name.expires_ns = self.now + self.config.lease_ttl_ns;
            }
        }
        for (rank, is_cut) in self.nodes.iter().map(|(rank, node)| (*rank, node.is_cut)).collect::<Vec<_>>() {
            if !is_cut {
                self.tell(rank, if is_away { Note::Unavailable } else { Note::Available });
            }
        }
    }

    fn deafen(&mut self, by: Rank, of: Rank) {
        let (Some(one), Some(other)) = (self.nodes.get(&by), self.nodes.get(&of)) else { return };
        let instance = other.instance;
        if one.alive.contains(of) {
            self.count("suspicion");
            self.license(by);
            self.license(of);
            self.deaf.insert((by, of), instance.0);
            let silent = Evidence::Silent { waited_ns: self.detect_ns };
            self.on(by, |machine, now| {
                machine.handle_suspicion(now, of, instance, silent);
            });
        }
    }

    fn on(&mut self, rank: Rank, handle: impl FnOnce(&mut Membership, u64)) {
        if let Some(node) = self.nodes.get_mut(&rank) {
            handle(&mut node.machine, self.now);
            self.settle(rank);
        }
    }

    /// Carries out what a machine wants.
    fn settle(&mut self, rank: Rank) {
        while let Some(action) = self.nodes.get_mut(&rank).and_then(|node| node.machine.poll_action()) {
            if self.prints {
                println!("{:9} us: {rank} {action:?}", self.now / 1000);
            }
            self.carry_out(rank, action);
        }
    }
}
