//! Which processes of peers have ended, through descriptors that name them for good.
//!
//! A process number may be given again; a descriptor never means another process. One that was opened too late means
//! a stranger or nobody: the peer's lease and signs of life tell then.

use std::os::fd::OwnedFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::ids::Rank;
use crate::membership::Instance;

/// Peers whose processes are watched.
#[derive(Default)]
pub(super) struct Exits {
    watched: Vec<(Rank, Instance, OwnedFd)>,
}

impl Exits {
    /// Watches the process of a peer's incarnation, in place of its earlier one.
    pub(super) fn watch(&mut self, peer: Rank, instance: Instance, process: u32) {
        self.watched.retain(|(rank, ..)| *rank != peer);
        let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
        // A kernel without them, or a process that is gone: other evidence is slower, and comes.
        if let Some(descriptor) = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()) {
            self.watched.push((peer, instance, descriptor));
        }
    }

    /// Those that have ended since this was last asked. Never waits.
    pub(super) fn ended(&mut self) -> Vec<(Rank, Instance)> {
        let ended: Vec<bool> = {
            let mut polled: Vec<PollFd<'_>> =
                self.watched.iter().map(|(.., fd)| PollFd::new(fd, PollFlags::IN)).collect();
            let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
            if polled.is_empty() || !poll(&mut polled, Some(&at_once)).is_ok_and(|ready| ready > 0) {
                return Vec::new();
            }
            polled.iter().map(|fd| !fd.revents().is_empty()).collect()
        };
        let mut ended = ended.into_iter();
        let mut gone = Vec::new();
        self.watched.retain(|(rank, instance, _)| {
            let has_ended = ended.next().unwrap_or(false);
            if has_ended {
                gone.push((*rank, *instance));
            }
            !has_ended
        });
        gone
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_end_of_a_process_is_told_once() {
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let mut exits = Exits::default();
        exits.watch(Rank(3), Instance(7), child.id());
        assert_eq!(exits.ended(), []);
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!(exits.ended(), [(Rank(3), Instance(7))]);
        assert_eq!(exits.ended(), []);
    }
}
