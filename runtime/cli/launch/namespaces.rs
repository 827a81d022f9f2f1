//! Hosts that are network namespaces: one each, joined by a bridge in a namespace of its own.
//!
//! [`Namespaces`] owns a descriptor of every namespace. They have no name and no file, so they vanish, with bridge and
//! links, when the descriptors and the processes in them are gone, however these end.
//!
//! ```text
//!  namespace "bridge": br0 -- v0 ---- eth0 10.77.0.1, 10.77.0.2, ..   host 0, an address per rank
//!                         \-- v1 ---- eth0 10.77.4.1, 10.77.4.2, ..   host 1
//! ```
//!
//! Beside them stand fd77::HOST:1, fd77::HOST:2 and so on (in hexadecimal), where the system has IPv6.
#![expect(unsafe_code, reason = "a thread moves itself into a new namespace")]

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, Write};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};
use std::thread;

use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space, unshare_unsafe};

use super::LaunchError;

/// The hosts of one launch.
pub(in crate::cli) struct Namespaces {
    hosts: Vec<OwnedFd>,
    /// Holds the bridge.
    _bridge: OwnedFd,
}

impl Namespaces {
    /// Makes and joins `num_hosts` namespaces with `num_addresses` addresses each.
    pub(in crate::cli) fn create(num_hosts: u32, num_addresses: u32) -> Result<Self, LaunchError> {
        let hosts = (0..num_hosts).map(|_| fresh()).collect::<Result<Vec<_>, _>>()?;
        let bridge = fresh()?;
        ip(&bridge, "join network namespaces", &bridge_script(&hosts))?;
        for (host, namespace) in (0..).zip(&hosts) {
            ip(namespace, "give a network namespace its addresses", &host_script(host, num_addresses))?;
            // A system without IPv6 has hosts all the same.
            let _ = ip(namespace, "give a network namespace IPv6", &ipv6_script(host, num_addresses));
        }
        Ok(Self { hosts, _bridge: bridge })
    }

    /// The namespace of one host.
    pub(in crate::cli) fn host(&self, host: u32) -> BorrowedFd<'_> {
        self.hosts[host as usize].as_fd()
    }

    /// The address of one rank of a host.
    pub(in crate::cli) fn address(host: u32, local_rank: u32) -> IpAddr {
        // CAST: at most 64 hosts; 512 ranks in all, spread over two bytes.
        let [high, low] = (local_rank as u16 + 1).to_be_bytes();
        IpAddr::from([10, 77, (host as u8) << 2 | high, low])
    }
}

fn bridge_script(hosts: &[OwnedFd]) -> String {
    let mut script = String::from("link set lo up\nlink add br0 type bridge\nlink set br0 up\n");
    let process = std::process::id();
    for (index, host) in hosts.iter().enumerate() {
        // A path of ours works for a namespace that has no name of its own.
        let place = format!("/proc/{process}/fd/{}", host.as_raw_fd());
        let _ = writeln!(script, "link add v{index} type veth peer name eth0 netns {place}");
        let _ = writeln!(script, "link set v{index} master br0 up");
    }
    script
}

fn host_script(host: u32, num_addresses: u32) -> String {
    let mut script = String::from("link set lo up\n");
    for local_rank in 0..num_addresses {
        let _ = writeln!(script, "addr add {}/16 dev eth0", Namespaces::address(host, local_rank));
    }
    script + "link set eth0 up\n"
}

/// Without the search for duplicates, during which an address cannot be used.
fn ipv6_script(host: u32, num_addresses: u32) -> String {
    let add = |local_rank: u32| format!("addr add fd77::{host:x}:{:x}/64 dev eth0 nodad\n", local_rank + 1);
    (0..num_addresses).map(add).collect()
}

/// A new namespace; the thread that makes it ends in it, and no other thread is moved.
fn fresh() -> Result<OwnedFd, LaunchError> {
    let make = || -> io::Result<OwnedFd> {
        // SAFETY: descriptors and memory stay shared; only this short-lived thread changes its network.
        unsafe { unshare_unsafe(UnshareFlags::NEWNET) }?;
        Ok(File::open("/proc/thread-self/ns/net")?.into())
    };
    on_thread(make).map_err(|source| LaunchError::Namespace { source })
}

/// Runs `ip` in a namespace, with its commands on standard input.
fn ip(namespace: &OwnedFd, doing: &'static str, script: &str) -> Result<(), LaunchError> {
    let failed = |said: String| LaunchError::Tool { tool: "ip", doing, said };
    let run = || -> io::Result<std::process::Output> {
        // A process starts in the namespace of the thread that starts it.
        move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
        let pipe = Stdio::piped;
        let mut child = Command::new("ip")
            .args(["-batch", "-"])
            .stdin(pipe())
            .stdout(Stdio::null())
            .stderr(pipe())
            .spawn()?;
        if let Some(mut input) = child.stdin.take() {
            input.write_all(script.as_bytes())?;
        }
        child.wait_with_output()
    };
    match on_thread(run) {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(failed(format!("says: {}", said.lines().next().unwrap_or("nothing"))))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(failed("is not installed (package iproute2)".into()))
        }
        Err(error) => Err(failed(format!("does not run: {error}"))),
    }
}

fn on_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    // PANIC: the closures above only make system calls.
    thread::scope(|scope| scope.spawn(work).join().expect("a system call does not panic"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rank_has_an_address_of_its_own() {
        let all: Vec<IpAddr> =
            (0..64).flat_map(|host| (0..512).map(move |rank| Namespaces::address(host, rank))).collect();
        let mut unique = all.clone();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), all.len());
        assert_eq!(Namespaces::address(2, 0).to_string(), "10.77.8.1");
    }
}
