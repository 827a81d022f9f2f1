//! Watching a group until it has ended: who fails first, signals on their way, and the end of those who stay.
//!
//! A [`Group`] owns the ranks' processes and ends them when it is dropped.
//!
//! ```text
//!  all run --- a rank fails, or a signal ---> ending: SIGTERM to every group --- grace ---> SIGKILL
//! ```

use core::time::Duration;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use ibex::time::{Deadline, sleep};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::spawn::RankProcess;
use super::{Ending, Failure, LaunchError};

/// How often ranks are asked whether they live.
const ASK_EVERY: Duration = Duration::from_millis(2);
/// How much later than the first failure a rank that was killed may be seen to have ended.
const SECOND_LOOK: Duration = Duration::from_millis(50);
/// How long ranks may take to end when they are told to.
const GRACE: Duration = Duration::from_secs(5);
/// How long output may take to come out of a rank that has ended.
const DRAIN: Duration = Duration::from_secs(2);
/// Signals that are passed on.
const PASSED_ON: [i32; 3] =
    [signal_hook::consts::SIGINT, signal_hook::consts::SIGTERM, signal_hook::consts::SIGHUP];

/// The signals that came and were not passed on yet; each word holds its signal, or 0.
pub(super) struct Signals([Arc<AtomicUsize>; 3]);

impl Signals {
    /// Catches what would end the launcher, from here to the end of the process.
    pub(super) fn catch() -> Result<Self, LaunchError> {
        let signals = Self(Default::default());
        for (signal, seen) in PASSED_ON.into_iter().zip(&signals.0) {
            // CAST: signals are small and positive.
            signal_hook::flag::register_usize(signal, Arc::clone(seen), signal as usize)
                .map_err(|source| LaunchError::Os { doing: "catch signals", source })?;
        }
        Ok(signals)
    }

    /// A signal that came since the last call.
    fn take(&self) -> Option<Signal> {
        let taken = self.0.iter().map(|seen| seen.swap(0, Ordering::Relaxed)).find(|signal| *signal != 0)?;
        // CAST: it is one of PASSED_ON.
        Signal::from_named_raw(taken as i32)
    }
}

/// Ranks that were started, and those of them that have ended.
#[derive(Default)]
pub(super) struct Group {
    ranks: Vec<RankProcess>,
    ended: Vec<Option<ExitStatus>>,
}

impl Group {
    pub(super) fn add(&mut self, rank: RankProcess) {
        self.ranks.push(rank);
        self.ended.push(None);
    }

    /// Waits until every rank has ended, passing signals on.
    pub(super) fn wait(&mut self, signals: &Signals) -> Ending {
        let mut ending = Ending::Good;
        let mut patience: Option<Deadline> = None;
        while !self.all_ended() {
            if let Some(signal) = signals.take() {
                // Told twice, it means it.
                let again = matches!(ending, Ending::Interrupted { .. });
                self.tell_all(if again { Signal::KILL } else { signal });
                if ending == Ending::Good {
                    ending = Ending::Interrupted { signal: signal.as_raw() };
                }
                patience.get_or_insert_with(|| Deadline::after(GRACE));
            }
            if let Some(failure) = self.look_for_failure()
                && ending == Ending::Good
            {
                ending = Ending::Failed(failure);
                self.tell_all(Signal::TERM);
                patience.get_or_insert_with(|| Deadline::after(GRACE));
            }
            if patience.is_some_and(|patience| patience.has_passed()) {
                self.tell_all(Signal::KILL);
            }
            sleep(ASK_EVERY);
        }
        self.drain();
        if let Ending::Failed(failure) = &mut ending {
            // The reason may have come out after the rank was seen to have ended.
            failure.last_words = self.last_words(failure.rank);
        }
        ending
    }

    fn all_ended(&self) -> bool {
        self.ended.iter().all(Option::is_some)
    }

    /// Looks again after a failure: a rank that a signal killed closes its sockets before it is seen to have ended, so
    /// that one that failed for want of it may be seen first.
    fn look_for_failure(&mut self) -> Option<Failure> {
        let failure = self.look_for_ended()?;
        if failure.status.code().is_none() {
            return Some(failure);
        }
        sleep(SECOND_LOOK);
        let killed = self.look_for_ended().filter(|later| later.status.code().is_none());
        Some(killed.unwrap_or(failure))
    }

    /// Takes note of ranks that have ended; the first failure among them. One that a signal killed comes before those
    /// that failed for want of it.
    fn look_for_ended(&mut self) -> Option<Failure> {
        let mut first: Option<Failure> = None;
        for (rank, ended) in self.ranks.iter_mut().zip(&mut self.ended) {
            if ended.is_some() {
                continue;
            }
            if !has_ended(rank) {
                continue;
            }
            // Whatever it started ends with it. Before the rank is reaped: until then its number is nobody else's.
            signal_group(rank, Signal::KILL);
            // A child that cannot be waited for is gone.
            let status = rank.child.wait().unwrap_or_default();
            *ended = Some(status);
            let is_first =
                first.as_ref().is_none_or(|f| f.status.code().is_some() && status.code().is_none());
            if !status.success() && is_first {
                first = Some(Failure { rank: rank.rank, status, last_words: None });
            }
        }
        first
    }

    fn tell_all(&self, signal: Signal) {
        for (rank, ended) in self.ranks.iter().zip(&self.ended) {
            if ended.is_none() {
                signal_group(rank, signal);
            }
        }
    }

    /// Lets the last lines come out.
    fn drain(&self) {
        let deadline = Deadline::after(DRAIN);
        let readers = || self.ranks.iter().flat_map(|rank| &rank.readers);
        while !deadline.has_passed() && !readers().all(super::log::Reader::is_done) {
            sleep(ASK_EVERY);
        }
    }

    fn last_words(&self, rank: u32) -> Option<String> {
        let rank = self.ranks.iter().find(|other| other.rank == rank)?;
        rank.readers.iter().find_map(super::log::Reader::last_line)
    }
}

impl Drop for Group {
    /// Nobody outlives the launcher, also where starting the next rank failed.
    fn drop(&mut self) {
        self.tell_all(Signal::KILL);
        for (rank, ended) in self.ranks.iter_mut().zip(&self.ended) {
            if ended.is_none() {
                // Killed above; a child that cannot be waited for was waited for before.
                let _ = rank.child.wait();
            }
        }
    }
}

/// Whether a rank has ended; it stays to be reaped.
fn has_ended(rank: &RankProcess) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    // CAST: process numbers are positive and fit.
    let Some(pid) = Pid::from_raw(rank.child.id() as i32) else { return true };
    !matches!(waitid(WaitId::Pid(pid), options), Ok(None))
}

/// Every rank leads a process group of its own number; a group that is gone needs no signal.
fn signal_group(rank: &RankProcess, signal: Signal) {
    // CAST: process numbers are positive and fit.
    if let Some(group) = Pid::from_raw(rank.child.id() as i32) {
        let _ = kill_process_group(group, signal);
    }
}
