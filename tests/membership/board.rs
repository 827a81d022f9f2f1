//! Between machines and the store: delays, repetitions, cuts, outages, leases; and what a change of the view may be.

use super::*;

impl World {
    /// Tells a board's owner, after a delay; now and then twice.
    pub(super) fn tell(&mut self, rank: Rank, note: Note) {
        let Some(instance) = self.nodes.get(&rank).map(|node| node.instance.0) else { return };
        let times = if self.below(16) == 0 { 2 } else { 1 };
        for _ in 0..times {
            let delay = 1 + self.below(self.delay_max_ns);
            self.happens_in(delay, Happens::Deliver(rank, instance, note.clone()));
        }
    }

    pub(super) fn announce(&mut self, note: Note) {
        for rank in self.nodes.keys().copied().collect::<Vec<_>>() {
            self.tell(rank, note.clone());
        }
    }

    pub(super) fn is_reachable(&self, rank: Rank) -> bool {
        self.store.is_up && self.nodes.get(&rank).is_some_and(|node| !node.is_cut)
    }

    /// Contents are those of the time at which they are told; across a cut nothing is.
    pub(super) fn deliver(&mut self, rank: Rank, note: Note) {
        let is_reachable = self.is_reachable(rank);
        match note {
            Note::Unavailable => {
                if !is_reachable {
                    self.on(rank, Membership::handle_store_away);
                }
            }
            _ if !is_reachable => {}
            Note::Available => self.deliver_all(rank),
            // What was pushed before the connection came back is part of the listing.
            _ if !self.nodes[&rank].machine.is_store_up() => {}
            Note::View => {
                let (version, view) = (self.store.version, self.store.view().clone());
                self.on(rank, |machine, now| machine.handle_view(now, version, view));
            }
            Note::Row(from) => {
                if let Some(row) = self.store.rows.get(&from).cloned() {
                    self.on(rank, |machine, now| machine.handle_row(now, from, row));
                }
            }
            Note::Claim(of) => {
                if let Some(name) = self.store.names.get(&of).copied() {
                    self.on(rank, |machine, now| machine.handle_claim(now, name.claim, name.is_alive));
                }
            }
            Note::Cas(expect) => self.on(rank, |machine, now| machine.handle_cas(now, expect)),
        }
    }

    pub(super) fn deliver_all(&mut self, rank: Rank) {
        let up_for_ns = self.now - self.store.up_since_ns;
        let node = self.nodes.get_mut(&rank).expect("it was looked up");
        let instance = node.instance.0;
        if let Some(name) = self.store.names.get_mut(&rank).filter(|name| name.claim.instance.0 == instance) {
            // The board has renewed its lease, or claimed the name again for the same process.
            name.is_alive = true;
            name.expires_ns = self.now + self.config.lease_ttl_ns;
        }
        if let Some(row) = self.nodes[&rank].row.clone() {
            self.store.rows.insert(rank, row);
            self.announce(Note::Row(rank));
        }
        self.announce(Note::Claim(rank));
        self.on(rank, |machine, now| machine.handle_store_up(now, up_for_ns));
        for name in self.store.names.values().copied().collect::<Vec<_>>() {
            self.on(rank, |machine, now| machine.handle_claim(now, name.claim, name.is_alive));
        }
        for (from, row) in self.store.rows.clone() {
            self.on(rank, |machine, now| machine.handle_row(now, from, row));
        }
        let placement = self.store.placement_version;
        self.on(rank, |machine, now| machine.handle_placement(now, placement));
        let (version, view) = (self.store.version, self.store.view().clone());
        self.on(rank, |machine, now| machine.handle_view(now, version, view));
    }

    /// A wish reaches the store.
    pub(super) fn write(&mut self, rank: Rank, instance: u128, wish: Wish) {
        // The dead write no more; what is on its way arrives.
        let is_current = self.nodes.get(&rank).is_some_and(|node| node.instance.0 == instance);
        if !is_current || !self.is_reachable(rank) {
            return;
        }
        match wish {
            Wish::Row => {
                if let Some(row) = self.nodes[&rank].row.clone() {
                    self.store.rows.insert(rank, row);
                    self.announce(Note::Row(rank));
                }
            }
            Wish::View(number) => {
                let (expect, view) = self.nodes[&rank].changes[number as usize].clone();
                if let Some(before) = self.store.cas(expect, view, self.is_anything_allowed) {
                    self.check_change(&before);
                    self.announce(Note::View);
                }
                self.tell(rank, Note::Cas(expect));
            }
        }
    }

    /// Nobody is evicted to whom nothing has happened.
    pub(super) fn check_change(&mut self, before: &View) {
        let after = self.store.view().clone();
        if self.prints {
            println!("{:9} us: {} {} {:?}", self.now / 1000, after.epoch, after.members(), after.plan);
        }
        if before.plan.is_some() && after.plan.is_none() && after.epoch == before.epoch.next() {
            let is_commit = after.start != before.start;
            self.count(if is_commit { "committed" } else { "aborted" });
        }
        let planned = after.start.as_ref().filter(|start| start.epoch == after.epoch).map(|start| start.plan);
        let dissolved = after.members().is_empty();
        if dissolved && after.epoch != before.epoch {
            self.count("dissolved");
            // A group that begins anew counts its steps anew.
            self.tables.clear();
        }
        for rank in before.members().difference(&after.members()).iter() {
            if planned.is_some_and(|plan| plan.leave.contains(rank)) {
                self.count("left");
            } else {
                self.count("evicted");
                let is_licensed = self.is_fair(rank, before) || dissolved || self.is_anything_allowed;
                assert!(
                    is_licensed,
                    "seed {}: {rank} was evicted for nothing\n{}",
                    self.seed,
                    self.picture()
                );
            }
        }
        if let Some(plan) = planned {
            *self.counts.entry("joined").or_default() += plan.join.len() as u64;
        }
        for index in 0..after.slots.len() as u16 {
            let (old, new) = (before.slot(Rank(index)), after.slot(Rank(index)));
            let is_admission = new.state == SlotState::Joining && old.state == SlotState::Vacant;
            if is_admission {
                self.check_admission(Rank(index), old.instance);
            }
        }
    }

    /// Something has happened to it, or stands between it and one to whom something has happened.
    pub(super) fn is_fair(&self, rank: Rank, before: &View) -> bool {
        let is_licensed = |rank: Rank| self.licensed.contains(&(rank, before.slot(rank).instance));
        let suspects =
            |by: Rank, of: Rank| self.nodes.get(&by).is_some_and(|node| node.machine.suspects().contains(of));
        let is_between = |other: Rank| is_licensed(other) && (suspects(rank, other) || suspects(other, rank));
        is_licensed(rank) || before.members().iter().any(is_between)
    }

    /// Nobody holds anything of the incarnation before.
    pub(super) fn check_admission(&self, rank: Rank, old: Instance) {
        let view = self.store.view();
        for (by, node) in self.nodes.iter().filter(|(by, node)| view.holder(**by) == Some(node.instance)) {
            let held = node.links.get(&rank).map(|(instance, _)| *instance);
            assert_ne!(held, Some(old), "seed {}: {by} holds the old {rank}", self.seed);
        }
    }

    pub(super) fn renew_leases(&mut self, rank: Rank) {
        let (now, ttl) = (self.now, self.config.lease_ttl_ns);
        let instance = self.nodes[&rank].instance;
        if self.is_reachable(rank)
            && let Some(name) = self.store.names.get_mut(&rank).filter(|n| n.claim.instance == instance)
            && name.is_alive
        {
            name.expires_ns = now + ttl;
        }
        if !self.store.is_up {
            return;
        }
        let expired: Vec<Rank> = self
            .store
            .names
            .iter()
            .filter(|(_, n)| n.is_alive && n.expires_ns < now)
            .map(|(r, _)| *r)
            .collect();
        for rank in expired {
            self.store.names.get_mut(&rank).expect("it was listed").is_alive = false;
            self.announce(Note::Claim(rank));
        }
    }
}
