//! Whether the process of a peer has ended: the only proof that what it has mapped it can write no more.
//!
//! A process number may be given again; a descriptor never means another process. One that was opened too late means a
//! stranger: then the end of the peer is never confirmed, which is the safe side.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::neighbours::SimulatedHosts;

/// A process that may have our memory mapped.
#[derive(Debug)]
pub(super) enum ProcessWatch {
    /// It was there when this was made.
    Watched(OwnedFd),
    /// It was gone already.
    Ended,
    /// This system does not tell.
    Unknown,
    /// A simulation plays it.
    Simulated { hosts: Arc<SimulatedHosts>, pid: u32 },
}

impl ProcessWatch {
    /// Watches a process of this host.
    pub(super) fn of(pid: u32) -> Self {
        let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Self::Unknown };
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(descriptor) => Self::Watched(descriptor),
            Err(Errno::SRCH) => Self::Ended,
            Err(_) => Self::Unknown,
        }
    }

    /// Has it ended, all its threads and their memory gone? Never waits.
    pub(super) fn has_ended(&self) -> bool {
        let descriptor = match self {
            Self::Watched(descriptor) => descriptor,
            Self::Ended => return true,
            Self::Unknown => return false,
            Self::Simulated { hosts, pid } => return hosts.has_ended(*pid),
        };
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let mut polled = [PollFd::new(descriptor, PollFlags::IN)];
        poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn only_the_end_of_a_process_is_its_end() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let watch = ProcessWatch::of(child.id());
        assert!(!watch.has_ended());
        let signal = |name: &str| {
            let id = child.id().to_string();
            assert!(Command::new("kill").args([name, &id]).status().unwrap().success());
        };
        signal("-STOP");
        assert!(!watch.has_ended());
        signal("-CONT");
        assert!(!watch.has_ended());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(watch.has_ended());
        assert!(ProcessWatch::of(child.id()).has_ended());
        assert!(!ProcessWatch::of(0).has_ended());
    }
}
