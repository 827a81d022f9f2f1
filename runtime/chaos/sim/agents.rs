//! What turns while kernels wait: every device of the group, piece by piece, and the signs of life.
//!
//! [`Agents`] knows devices and sessions of processes that exist now; it owns neither. A process that stands still has
//! no host that turns; its device may go on, as a NIC does, or stand still with it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use ibex_hca::Nanos;
use ibex_hca::emulated::EmulatedHca;
use parking_lot::{Mutex, RwLock};

use crate::chaos::draws::Draws;
use crate::gpu::pool::{Pool, Progress, Progressed};
use crate::session::Session;

/// One process, as far as it turns by itself.
struct Agent {
    id: u32,
    device: Arc<EmulatedHca>,
    session: Weak<Session>,
    next_beat_ns: AtomicU64,
    host_runs: bool,
    device_runs: bool,
}

/// See the module documentation.
pub(super) struct Agents {
    agents: RwLock<Vec<Agent>>,
    beat_every_ns: u64,
    /// When the rig wants to be asked again.
    next_due_ns: AtomicU64,
    /// Whether hosts speak at all; a guard that a test may take away.
    beats: bool,
    /// Whose kernels these are.
    pool: OnceLock<Weak<Pool>>,
    /// When everything was idle for the last time.
    idle: Mutex<Option<Idle>>,
}

/// Nothing had anything to do: until kernels change memory, a host acts, or this instant comes, nothing will.
#[derive(Clone, Copy)]
struct Idle {
    /// [`PoolStats::events`](crate::gpu::pool::PoolStats::events) then.
    events: u64,
    due_ns: u64,
}

impl Agents {
    pub(super) fn new(beat_every_ns: u64, beats: bool) -> Self {
        Self {
            agents: RwLock::default(),
            beat_every_ns,
            next_due_ns: AtomicU64::new(u64::MAX),
            beats,
            pool: OnceLock::new(),
            idle: Mutex::default(),
        }
    }

    /// Says whose kernels these are: without it every device is asked every time.
    pub(super) fn set_pool(&self, pool: &Arc<Pool>) {
        // There is one pool, which is told once.
        let _ = self.pool.set(Arc::downgrade(pool));
    }

    /// A host may have acted: devices are asked again.
    pub(super) fn stir(&self) {
        *self.idle.lock() = None;
    }

    fn events(&self) -> Option<u64> {
        Some(self.pool.get()?.upgrade()?.stats().events)
    }

    /// What is known without asking a device: that still nothing has anything to do, and until when.
    fn still_idle(&self, now_ns: u64) -> Option<u64> {
        let idle = (*self.idle.lock())?;
        (now_ns < idle.due_ns && self.events() == Some(idle.events)).then_some(idle.due_ns)
    }

    pub(super) fn add(&self, id: u32, device: &Arc<EmulatedHca>, session: &Arc<Session>, first_beat_ns: u64) {
        self.agents.write().push(Agent {
            id,
            device: Arc::clone(device),
            session: Arc::downgrade(session),
            next_beat_ns: AtomicU64::new(first_beat_ns),
            host_runs: true,
            device_runs: true,
        });
    }

    pub(super) fn remove(&self, id: u32) {
        self.agents.write().retain(|agent| agent.id != id);
    }

    pub(super) fn set_running(&self, id: u32, host_runs: bool, device_runs: bool) {
        for agent in self.agents.write().iter_mut().filter(|agent| agent.id == id) {
            (agent.host_runs, agent.device_runs) = (host_runs, device_runs);
        }
    }

    pub(super) fn set_next_due(&self, due_ns: u64) {
        self.next_due_ns.store(due_ns, Ordering::Relaxed);
    }

    /// Lets every host whose beat is due speak; when the next one is due.
    fn beat(&self, agents: &[Agent], now_ns: u64) -> (bool, u64) {
        let (mut spoke, mut next) = (false, u64::MAX);
        for agent in agents.iter().filter(|agent| agent.host_runs && self.beats) {
            let mut due = agent.next_beat_ns.load(Ordering::Relaxed);
            if now_ns >= due {
                due = now_ns + self.beat_every_ns;
                agent.next_beat_ns.store(due, Ordering::Relaxed);
                // A host that cannot speak is silent; its peers' clocks say so.
                spoke |= agent.session.upgrade().is_some_and(|session| session.send_sign_of_life().is_ok());
            }
            next = next.min(due);
        }
        (spoke, next)
    }
}

impl Progress for Agents {
    fn progress(&self, _worker: u32, now_ns: u64, random: u64) -> Progressed {
        if let Some(due) = self.still_idle(now_ns) {
            return Progressed::Idle { next_deadline_ns: (due != u64::MAX).then_some(due) };
        }
        let agents = self.agents.read();
        let (spoke, next_beat) = self.beat(&agents, now_ns);
        let mut due = self.next_due_ns.load(Ordering::Relaxed).min(next_beat);
        let mut draws = Draws::new(random, 0);
        let count = agents.len();
        // CAST: a handful of processes; the chooser's numbers are small.
        let first = draws.below(count as u64) as usize;
        for agent in (0..count).map(|i| &agents[(first + i) % count]).filter(|agent| agent.device_runs) {
            let step = agent.device.step_seeded(Nanos(now_ns), &mut |n| draws.below(n.into()) as u32);
            if step.did_work {
                return Progressed::Worked;
            }
            due = due.min(step.next_deadline.map_or(u64::MAX, |deadline| deadline.0));
        }
        if spoke {
            return Progressed::Worked;
        }
        *self.idle.lock() = self.events().map(|events| Idle { events, due_ns: due });
        Progressed::Idle { next_deadline_ns: (due != u64::MAX).then_some(due) }
    }
}
