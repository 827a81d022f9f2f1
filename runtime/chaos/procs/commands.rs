//! What one device was told to do: objects that exist, and commands on queue pairs that nobody should have touched.
//!
//! Owns nothing of the device; it reads the trace of commands that the device keeps.

use std::collections::BTreeMap;

use ibex_abi::prm::{Op, Status};
use ibex_hca::emulated::{CommandRecord, EmulatedHca};

use crate::ids::Rank;
use crate::membership::Instance;
use crate::session::{MembershipView, Session};

/// See the module documentation.
#[derive(Default)]
pub(super) struct Commands {
    /// Made and not destroyed, by kind.
    objects: BTreeMap<&'static str, i64>,
    /// Where queue pairs lead that were once between two members.
    peers: BTreeMap<u32, (Rank, Instance)>,
}

/// What kind of object a command makes or destroys.
fn change_of(op: Option<Op>) -> Option<(&'static str, i64)> {
    Some(match op? {
        Op::CreateCq => ("cq", 1),
        Op::CreateQp => ("qp", 1),
        Op::CreateMkey => ("mkey", 1),
        Op::AllocUar => ("uar", 1),
        Op::DestroyCq => ("cq", -1),
        Op::DestroyQp => ("qp", -1),
        Op::DestroyMkey => ("mkey", -1),
        Op::DeallocUar => ("uar", -1),
        _ => return None,
    })
}

impl Commands {
    /// Takes in what the device was told since the last call; commands on queue pairs whose both ends are members.
    pub(super) fn look(
        &mut self,
        device: &EmulatedHca,
        session: &Session,
        me: (Rank, Instance),
        view: &MembershipView,
    ) -> Vec<String> {
        let members: Vec<(Rank, Instance)> =
            view.members.iter().map(|rank| (rank, view.slots[rank.index()].instance)).collect();
        let mut touched = Vec::new();
        for record in device.take_trace() {
            if let Some(peer) = self.count(&record)
                && harms(record.op)
                && members.contains(&peer)
                && members.contains(&me)
            {
                touched.push(format!("{:?} on a queue pair to healthy rank {}", record.op, peer.0));
            }
        }
        for (peer, instance) in members.into_iter().filter(|member| *member != me) {
            for qpn in session.queue_pairs(peer) {
                self.peers.entry(qpn.get()).or_insert((peer, instance));
            }
        }
        touched
    }

    /// Takes in what is left of the trace once everything is taken down; objects that still exist.
    pub(super) fn left(&mut self, device: &EmulatedHca) -> u64 {
        for record in device.take_trace() {
            self.count(&record);
        }
        // Pages of doorbells belong to the device, which goes with the process.
        let counts = self.objects.iter().filter(|(kind, _)| **kind != "uar").map(|(_, count)| count);
        counts.map(|count| (*count).max(0).unsigned_abs()).sum()
    }

    /// Objects that exist, by kind.
    pub(super) fn objects(&self) -> &BTreeMap<&'static str, i64> {
        &self.objects
    }

    /// Counts one command; where its queue pair leads.
    fn count(&mut self, record: &CommandRecord) -> Option<(Rank, Instance)> {
        if record.status == Status::Ok
            && let Some((kind, change)) = change_of(record.op)
        {
            *self.objects.entry(kind).or_default() += change;
        }
        let qpn = record.qpn?.get();
        if record.op == Some(Op::DestroyQp) { self.peers.remove(&qpn) } else { self.peers.get(&qpn).copied() }
    }
}

/// Whether a command takes a queue pair out of use.
fn harms(op: Option<Op>) -> bool {
    let harmful = [Op::ToErrQp, Op::ToRstQp, Op::DestroyQp, Op::Rst2InitQp, Op::Init2RtrQp];
    op.is_some_and(|op| harmful.contains(&op))
}
