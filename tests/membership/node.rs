//! A session as far as membership sees it: links that take time, steps behind a gate, tables.

use super::*;

impl World {
    pub(super) fn carry_out(&mut self, rank: Rank, action: Action) {
        let delay = 1 + self.below(self.delay_max_ns);
        let now = self.now;
        let Some(node) = self.nodes.get_mut(&rank) else { return };
        let instance = node.instance.0;
        match action {
            Action::PutRow(row) => {
                node.row = Some(row);
                self.happens_in(delay, Happens::Write(rank, instance, Wish::Row));
            }
            Action::CasView { expect, view } => {
                node.changes.push((expect, view));
                let number = node.changes.len() as u64 - 1;
                self.happens_in(delay, Happens::Write(rank, instance, Wish::View(number)));
            }
            Action::Connect { peer, instance } => {
                let known = node.links.insert(peer, (instance, Stage::Offered));
                assert_eq!(known, None, "connected before it was fenced");
            }
            Action::Fence { peer, instance } => {
                let until_ns = now + delay;
                let known = node.links.insert(peer, (instance, Stage::Fencing { until_ns }));
                assert!(known.is_some_and(|(held, _)| held == instance));
            }
            Action::Remove { ranks, .. } => node.alive = node.alive.difference(&ranks),
            Action::CloseGate(plan) => {
                assert!(node.gate.is_none() && node.table.is_some());
                node.gate = Some(node.step);
                node.gate_closed_ns = Some(now);
                node.acking = Some(plan.id);
                let step = node.step;
                node.machine.handle_ack(now, plan.id, step, None);
            }
            Action::OpenGate => {
                node.gate = None;
                node.acking = None;
            }
            Action::Commit(start) => {
                node.acking = None;
                if node.table.is_some() {
                    let gate = node.gate.as_mut().expect("a commit follows an acknowledgement");
                    assert!(*gate <= start.from_step);
                    *gate = start.from_step;
                }
                node.switching = Some(start);
            }
            Action::Stop(stop) => {
                self.count(match stop {
                    Stop::Fenced { .. } => "fenced",
                    Stop::NoQuorum { .. } => "no quorum",
                    Stop::Left { .. } => "stopped: left",
                    Stop::StoreUnavailable { .. } => "store away",
                    _ => panic!("seed {}: {stop:?}\n{}", self.seed, self.picture()),
                });
                self.stops.insert(rank, stop);
                self.license(rank);
                self.nodes.remove(&rank);
                // What ends gives its name back, if it still can.
                if let Some(name) = self.store.names.get_mut(&rank).filter(|n| n.claim.instance.0 == instance)
                {
                    name.is_alive = false;
                    self.announce(Note::Claim(rank));
                }
                if self.restarts {
                    self.happens_in(5 * delay, Happens::Restart(rank));
                }
            }
        }
    }

    /// A millisecond of one rank: its clock, its links, its steps, its lease.
    pub(super) fn tick(&mut self, rank: Rank) {
        self.renew_leases(rank);
        let now = self.now;
        if self.nodes[&rank].machine.poll_timeout().is_some_and(|at| at <= now) {
            self.on(rank, Membership::handle_timeout);
        }
        self.work_links(rank);
        self.work_steps(rank);
        if let Some(instance) = self.nodes.get(&rank).map(|node| node.instance.0) {
            self.happens_in(self.detect_ns / 20, Happens::Tick(rank, instance));
        }
    }

    pub(super) fn work_links(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get(&rank) else { return };
        let (instance, links) = (node.instance, node.links.clone());
        for (peer, (held, stage)) in links {
            match stage {
                Stage::Offered => {
                    let is_offered = self.nodes.get(&peer).is_some_and(|other| {
                        other.instance == held
                            && matches!(
                                other.links.get(&rank),
                                Some((to, Stage::Offered | Stage::Connected)) if *to == instance
                            )
                    });
                    let is_deaf =
                        self.deaf.contains_key(&(rank, peer)) || self.deaf.contains_key(&(peer, rank));
                    if is_offered && !is_deaf && self.below(3) == 0 {
                        self.set_link(rank, peer, Some((held, Stage::Connected)));
                        self.on(rank, |machine, now| machine.handle_connected(now, peer, held));
                    }
                }
                Stage::Fencing { until_ns } if until_ns <= self.now => {
                    self.set_link(rank, peer, None);
                    self.on(rank, |machine, now| machine.handle_fenced(now, peer, held));
                }
                _ => {}
            }
        }
    }

    pub(super) fn set_link(&mut self, rank: Rank, peer: Rank, link: Option<(Instance, Stage)>) {
        if let Some(node) = self.nodes.get_mut(&rank) {
            match link {
                Some(link) => drop(node.links.insert(peer, link)),
                None => drop(node.links.remove(&peer)),
            }
        }
    }

    pub(super) fn work_steps(&mut self, rank: Rank) {
        self.say_counters(rank);
        self.switch(rank);
        let Some(node) = self.nodes.get(&rank) else { return };
        if node.machine.standing() == Standing::Joining {
            self.on(rank, |machine, now| machine.handle_ready(now, 7));
            return;
        }
        if node.table.is_none() || self.is_idle && node.gate.is_none() {
            return;
        }
        self.detect(rank);
        for _ in 0..1 + self.below(3) {
            self.launch(rank);
        }
    }

    /// The counters at a closed gate are known a little later than the step.
    pub(super) fn say_counters(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get_mut(&rank) else { return };
        if let Some(plan) = node.acking.take() {
            let step = node.step;
            self.on(rank, |machine, now| machine.handle_ack(now, plan, step, Some(vec![[step + 1; 2]])));
        }
    }

    pub(super) fn switch(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get_mut(&rank) else { return };
        let Some(start) = node.switching.clone() else { return };
        if node.table.is_some() && node.step != start.from_step {
            return;
        }
        let members = node.machine.view().members();
        assert_eq!(start.from_seq, [[start.from_step + 1; 2]], "seed {}", self.seed);
        if members.contains(rank) {
            for peer in members.iter().filter(|peer| *peer != rank) {
                let link = node.links.get(&peer);
                assert!(
                    matches!(link, Some((_, Stage::Connected))),
                    "seed {}: {rank} switches without {peer}: {link:?}",
                    self.seed
                );
            }
            node.alive = members;
            node.lost = RankSet::EMPTY;
            node.step = start.from_step;
            node.gate = None;
            node.table = Some(start.epoch);
        }
        node.switching = None;
        let plan = start.plan.id;
        self.on(rank, |machine, now| machine.handle_committed(now, plan));
    }

    /// Whoever waits for a peer that is gone gives up on it after a while.
    pub(super) fn detect(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get(&rank) else { return };
        let lost: Vec<(Rank, Instance)> = node
            .alive
            .iter()
            .filter(|peer| *peer != rank && !node.lost.contains(*peer))
            .filter_map(|peer| Some((peer, node.links.get(&peer)?.0)))
            .filter(|(peer, held)| self.nodes.get(peer).is_none_or(|other| other.instance != *held))
            .collect();
        for (peer, held) in lost {
            if self.below(20) < 2 {
                if let Some(node) = self.nodes.get_mut(&rank) {
                    node.lost.insert(peer);
                }
                let silent = Evidence::Silent { waited_ns: self.detect_ns };
                self.on(rank, |machine, now| {
                    machine.handle_suspicion(now, peer, held, silent);
                });
            }
        }
        self.hear(rank);
    }

    /// Signs of life carry suspicions, whatever the store does.
    pub(super) fn hear(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get(&rank) else { return };
        let peers: Vec<Rank> = node.alive.iter().filter(|peer| *peer != rank).collect();
        for peer in peers {
            if self.deaf.contains_key(&(rank, peer)) {
                continue;
            }
            let Some(other) = self.nodes.get(&peer).filter(|other| !other.is_frozen) else { continue };
            let suspects = other.machine.suspects();
            if suspects.is_empty() && self.below(20) != 0 {
                continue;
            }
            self.on(rank, |machine, now| machine.handle_peer_suspicions(now, peer, suspects));
        }
    }

    /// Launches a step if the gate is open for it, and nobody it waits for is two steps behind.
    pub(super) fn launch(&mut self, rank: Rank) {
        let Some(node) = self.nodes.get(&rank) else { return };
        let (step, suspects) = (node.step, node.machine.suspects().union(&node.lost));
        let waits_for = |peer: &Rank| *peer != rank && !suspects.contains(*peer);
        let is_behind = |peer: Rank| {
            let held = node.links.get(&peer).map(|(instance, _)| *instance);
            let other = self.nodes.get(&peer).filter(|other| Some(other.instance) == held);
            other.is_none_or(|other| other.step + 1 < step)
        };
        let is_blocked = node.alive.iter().filter(waits_for).any(is_behind);
        if is_blocked || node.gate.is_some_and(|gate| step >= gate) {
            return;
        }
        let is_member = self.store.view().slot(rank).state == SlotState::Member
            && self.store.view().holder(rank) == Some(node.instance);
        let table = node.table.expect("only members launch");
        if is_member {
            let instance = node.instance;
            self.check_table(step, rank, instance, table);
        }
        if let Some(node) = self.nodes.get_mut(&rank) {
            node.step += 1;
        }
    }

    /// Members run one step under one table; what the evicted have done does not count.
    pub(super) fn check_table(&mut self, step: u64, rank: Rank, instance: Instance, table: Epoch) {
        let view = self.store.view();
        let others = self.tables.entry(step).or_default();
        for (other, held, known) in
            others.iter().filter(|(other, held, _)| view.holder(*other) == Some(*held))
        {
            assert_eq!(
                *known, table,
                "seed {}: {other} {held} and {rank} run step {step} under different tables",
                self.seed
            );
        }
        others.push((rank, instance, table));
        while self.tables.len() > 64 {
            self.tables.pop_first();
        }
    }
}
