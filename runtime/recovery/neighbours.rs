//! The processes around a session: which one it counts as itself, and how it learns that another one has ended.
//!
//! Usually the system says both. In a simulation all ranks live in one process and only play processes of one or more
//! hosts: a [`SimulatedHosts`] knows them by number, and a [`SimulatedProcess`] lives until it is dropped. Nobody owns
//! memory here; what a process has mapped outlives the process that offered it, as between real ones.

use std::collections::BTreeSet;
use std::sync::Arc;

use parking_lot::Mutex;

use super::identity::{HostId, process_id};
use super::watch::ProcessWatch;

/// What an offer says of the process that makes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Home {
    /// Tells the process from every other one.
    pub(crate) process: u64,
    /// Its number on its host.
    pub(crate) pid: u32,
    pub(crate) host: HostId,
}

/// Who a session's neighbours are.
#[derive(Clone, Debug, Default)]
pub(crate) enum Neighbours {
    /// Processes of the system.
    #[default]
    Real,
    /// Processes that a simulation plays.
    Simulated { hosts: Arc<SimulatedHosts>, home: Home },
}

impl Neighbours {
    /// The process that the session lives in.
    pub(crate) fn home(&self) -> Home {
        match self {
            Self::Real => Home { process: process_id(), pid: std::process::id(), host: HostId::current() },
            Self::Simulated { home, .. } => *home,
        }
    }

    /// Watches another process of the same host.
    pub(super) fn watch(&self, pid: u32) -> ProcessWatch {
        match self {
            Self::Real => ProcessWatch::of(pid),
            Self::Simulated { hosts, .. } => ProcessWatch::Simulated { hosts: Arc::clone(hosts), pid },
        }
    }
}

/// The processes that a simulation plays.
#[doc(hidden)]
#[derive(Debug, Default)]
pub struct SimulatedHosts {
    living: Mutex<Living>,
}

#[derive(Debug, Default)]
struct Living {
    pids: BTreeSet<u32>,
    /// The newest of them; none is ever given again.
    newest: u32,
}

impl SimulatedHosts {
    /// Starts a process on the host of this number.
    pub fn start(self: &Arc<Self>, host: u64) -> SimulatedProcess {
        let mut living = self.living.lock();
        living.newest += 1;
        let pid = living.newest;
        living.pids.insert(pid);
        let host = HostId { network: host, ..HostId::current() };
        SimulatedProcess { hosts: Arc::clone(self), home: Home { process: pid.into(), pid, host } }
    }

    pub(super) fn has_ended(&self, pid: u32) -> bool {
        !self.living.lock().pids.contains(&pid)
    }
}

/// A process that a simulation plays: it has ended once this is dropped.
#[doc(hidden)]
#[derive(Debug)]
pub struct SimulatedProcess {
    hosts: Arc<SimulatedHosts>,
    home: Home,
}

impl SimulatedProcess {
    /// What a session in this process sees around it.
    pub(crate) fn neighbours(&self) -> Neighbours {
        Neighbours::Simulated { hosts: Arc::clone(&self.hosts), home: self.home }
    }
}

impl Drop for SimulatedProcess {
    fn drop(&mut self) {
        self.hosts.living.lock().pids.remove(&self.home.pid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_simulated_process_has_ended_once_it_is_dropped() {
        let hosts = Arc::new(SimulatedHosts::default());
        let [one, other] = [hosts.start(1), hosts.start(2)];
        let (here, there) = (one.neighbours().home(), other.neighbours().home());
        assert!(here.process != there.process && here.host != there.host);
        let watch = one.neighbours().watch(there.pid);
        assert!(!watch.has_ended());
        drop(other);
        assert!(watch.has_ended());
        assert_ne!(hosts.start(2).neighbours().home().pid, there.pid);
    }
}
