//! What a campaign may leave behind, counted before its first process starts and after its last one has ended.

use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;

use super::process::count_entries;
use crate::cli::launch::Namespaces;

/// What is there that could be somebody's who forgot it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Present {
    descriptors: u64,
    shared_memory: u64,
    children: u64,
}

impl Present {
    pub(super) fn now() -> Self {
        Self {
            descriptors: count_entries("/proc/self/fd"),
            shared_memory: names("/dev/shm").iter().filter(|name| name.contains("ibex")).count() as u64,
            children: children(),
        }
    }

    /// How much more there is than `before`.
    pub(super) fn beyond(&self, before: &Self) -> u64 {
        self.descriptors.saturating_sub(before.descriptors)
            + self.shared_memory.saturating_sub(before.shared_memory)
            + self.children.saturating_sub(before.children)
    }
}

/// Processes that this one has started and not waited for.
fn children() -> u64 {
    let tasks = names("/proc/self/task");
    let of =
        |task: &String| fs::read_to_string(format!("/proc/self/task/{task}/children")).unwrap_or_default();
    tasks.iter().map(|task| of(task).split_whitespace().count() as u64).sum()
}

fn names(dir: &str) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten();
    entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

/// The numbers of namespaces, by which they are found as long as somebody is in them.
pub(super) fn numbers(namespaces: &Namespaces, hosts: u32) -> Vec<u64> {
    let number = |host| {
        let fd = namespaces.host(host).as_raw_fd();
        fs::metadata(format!("/proc/self/fd/{fd}")).ok().map(|at| at.ino())
    };
    (0..hosts).filter_map(number).collect()
}

/// Processes that are in one of these namespaces.
pub(super) fn inhabitants(namespaces: &[u64]) -> u64 {
    let is_in = |process: &String| {
        let at = fs::metadata(format!("/proc/{process}/ns/net"));
        at.is_ok_and(|at| namespaces.contains(&at.ino()))
    };
    let processes = names("/proc");
    processes.iter().filter(|name| name.parse::<u32>().is_ok() && is_in(name)).count() as u64
}
