//! Which process an offer comes from, and which host that process can share memory on.
//!
//! Owns nothing. Two processes share a host, in the sense that one may map the other's memory, if kernel, network and
//! process namespace are the same: behind another network namespace is another host's traffic, and behind another
//! process namespace a process number means somebody else.

use core::fmt;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::sync::OnceLock;

use rustix::rand::{GetRandomFlags, getrandom};

use crate::membership::Instance;

/// A kernel, a network and a process namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostId {
    /// Drawn by the kernel when it started.
    pub boot: u128,
    /// The network namespace.
    pub network: u64,
    /// The process namespace.
    pub processes: u64,
}

impl HostId {
    /// The host that this process runs on. Where the system does not say, one that no other process runs on.
    #[must_use]
    pub fn current() -> Self {
        static CURRENT: OnceLock<HostId> = OnceLock::new();
        *CURRENT
            .get_or_init(|| Self::read().unwrap_or_else(|| Self { boot: random(), network: 0, processes: 0 }))
    }

    /// The bytes that [`HostId::from_bytes`] reads.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..16].copy_from_slice(&self.boot.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.network.to_le_bytes());
        bytes[24..].copy_from_slice(&self.processes.to_le_bytes());
        bytes
    }

    /// The host that a peer says it runs on.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; 32]) -> Self {
        let word =
            |at: usize| bytes[at..at + 8].iter().rev().fold(0, |word, &byte| word << 8 | u64::from(byte));
        let boot = u128::from(word(8)) << 64 | u128::from(word(0));
        Self { boot, network: word(16), processes: word(24) }
    }

    fn read() -> Option<Self> {
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let namespace = |name: &str| Some(fs::metadata(format!("/proc/self/ns/{name}")).ok()?.ino());
        Some(Self {
            boot: u128::from_str_radix(&boot.trim().replace('-', ""), 16).ok()?,
            network: namespace("net")?,
            processes: namespace("pid")?,
        })
    }
}

impl fmt::Display for HostId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The first digits tell hosts of one group apart.
        write!(f, "{:08x}/net:{}/pid:{}", self.boot >> 96, self.network, self.processes)
    }
}

/// Tells this process from every other one, on any host.
pub(crate) fn process_id() -> u64 {
    static CURRENT: OnceLock<u64> = OnceLock::new();
    // CAST: half of the drawn bits.
    *CURRENT.get_or_init(|| random() as u64)
}

/// An incarnation that no other process draws.
pub(crate) fn draw_instance() -> Instance {
    // 0 is nobody.
    Instance(random() | 1)
}

/// Bits that no other process draws. Without a source of randomness the process number and an address have to do.
fn random() -> u128 {
    let mut bytes = [0; 16];
    match getrandom(&mut bytes, GetRandomFlags::empty()) {
        Ok(len) if len == bytes.len() => u128::from_ne_bytes(bytes),
        _ => u128::from(std::process::id()) << 64 | (&raw const bytes).addr() as u128,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_on_one_host() {
        assert_eq!(HostId::current(), HostId::current());
        assert_eq!(HostId::read(), HostId::read());
        assert_ne!(HostId::current().network, 0);
        assert_eq!(process_id(), process_id());
    }

    #[test]
    fn a_host_survives_its_bytes() {
        let host = HostId { boot: u128::MAX - 5, network: 0x0102_0304, processes: 1 << 63 };
        assert_eq!(HostId::from_bytes(&host.to_bytes()), host);
    }
}
