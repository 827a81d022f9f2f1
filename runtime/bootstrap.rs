//! How ranks that are processes find each other: plain byte blobs through a rendezvous.
//!
//! A [`Bootstrap`] gathers one blob of each rank under a key and gives every rank all of them; it knows nothing of
//! what they mean. [`TcpBootstrap`] needs nothing: rank 0 listens, everybody connects to it, rank 0 included.
//! [`NcclBootstrap`] is for ranks that have a communicator already.
//! [`Place`] is a rank's place in its group as launchers say it, [`advertise`] chooses the address that peers are
//! told.
//!
//! Who owns what: rank 0's [`TcpBootstrap`] owns the listening socket and the one thread that serves it; every rank
//! owns its connection. Dropping the bootstrap closes them, after answers that are under way were sent.
//!
//! Invariants:
//! - Every wait has a deadline, and an error that comes of it names the ranks that are missing.
//! - Bytes of a stranger cost a bounded amount of memory and time, and never a panic.
//! - The token keeps other jobs out. It travels in the clear: whoever can read the network can read it.
//!
//! ```text
//!  rank 0            rank 1            rank 2
//!    | hello{token}    |                 |          a stranger until the token was compared
//!    v                 v                 v
//!  [ hub: one thread in rank 0's process  ]         wire: formats; hub: decisions, sans-IO; tcp: sockets
//!    | gather(key, blob of each)         |
//!    +<------- all blobs, by rank ------>+
//! ```

use core::fmt;
use core::time::Duration;
use std::io;
use std::net::SocketAddr;

use crate::ids::Rank;
use crate::recovery::{HostId, OfferError};

pub mod advertise;
mod hub;
mod nccl;
mod place;
mod tcp;
mod wire;

pub use advertise::{AddressSource, Advertised};
pub(crate) use hub::rendezvous_script;
pub use hub::{HubCounters, STRANGERS_MAX};
/// The binding under [`NcclBootstrap`].
pub use ibex_nccl;
pub use nccl::NcclBootstrap;
pub use place::{DEFAULT_PORT, Launcher, Place, TOKEN_LEN_MAX, Token, cuda_connections};
pub use tcp::TcpBootstrap;
pub use wire::{BLOB_LEN_MAX, KEY_LEN_MAX};

/// A meeting place of all ranks of a group.
///
/// Calls are collective: every rank makes the same calls in the same order.
pub trait Bootstrap: Send + Sync {
    /// This rank.
    fn rank(&self) -> Rank;

    /// Ranks of the group.
    fn num_ranks(&self) -> u32;

    /// Gives `blob` to every rank and returns the blobs of all ranks, in their order.
    ///
    /// `key` names the exchange; it may be used again once the exchange has ended.
    ///
    /// # Errors
    /// `TooLarge` before anything is sent; `Missing` with the ranks that did not come within `timeout`; `Left` if one
    /// of them is gone; `Lost` if the rendezvous itself is.
    fn all_gather(&self, key: &str, blob: &[u8], timeout: Duration) -> Result<Vec<Vec<u8>>, BootstrapError>;

    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// As [`Bootstrap::all_gather`].
    fn barrier(&self, key: &str, timeout: Duration) -> Result<(), BootstrapError> {
        self.all_gather(key, &[], timeout).map(|_| ())
    }
}

/// Ranks in the order of their numbers, for messages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RankList(pub Vec<Rank>);

impl fmt::Display for RankList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// A message names this many; a person looks at the first ones.
        const SHOWN_MAX: usize = 16;
        let (word, shown) = (if self.0.len() == 1 { "rank" } else { "ranks" }, self.0.len().min(SHOWN_MAX));
        write!(f, "{word} ")?;
        for (index, rank) in self.0[..shown].iter().enumerate() {
            let before = match index {
                0 => "",
                _ if index + 1 == self.0.len() => " and ",
                _ => ", ",
            };
            write!(f, "{before}{rank}")?;
        }
        match self.0.len() - shown {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

/// Why rank 0 turned a connection away.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The two sides speak different versions of the rendezvous.
    #[error("it speaks version {theirs} of the rendezvous, this process version {ours}")]
    Version {
        /// Rank 0's version.
        theirs: u32,
        /// This process's version.
        ours: u32,
    },
    /// The token is another job's.
    #[error("the token is not the group's (IBEX_TOKEN must be equal on all ranks)")]
    Token,
    /// The group has another size.
    #[error("the group has {expected} ranks (WORLD_SIZE must be equal on all ranks)")]
    WorldSize {
        /// Rank 0's number of ranks.
        expected: u32,
    },
    /// The rank is not one of the group.
    #[error("the rank must be below {num_ranks}")]
    RankRange {
        /// Ranks of the group.
        num_ranks: u32,
    },
    /// Another process has or had this rank.
    #[error("another process is or was this rank")]
    RankTaken,
    /// What was sent is no greeting.
    #[error("it did not understand the greeting")]
    Malformed,
    /// A reason that this version does not know.
    #[error("for reason {code}, which this version does not know")]
    Unknown {
        /// The reason's number.
        code: u16,
    },
}

/// Why ranks did not find each other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// A variable of the launcher holds something else than it should.
    #[error("{name}={value:?} is refused: it must be {expected}")]
    Variable {
        /// The variable.
        name: &'static str,
        /// What it holds.
        value: String,
        /// What it must hold.
        expected: &'static str,
    },
    /// Some variables of a launcher are set, but not all that are needed.
    #[error("{found} is set, but {missing} is not")]
    Incomplete {
        /// A variable that is set.
        found: &'static str,
        /// The variable, or variables, of which one is needed too.
        missing: &'static str,
    },
    /// A name or an address that leads nowhere.
    #[error("{origin} = {name:?} cannot be resolved to an address")]
    Unresolvable {
        /// Where the name comes from.
        origin: &'static str,
        /// The name.
        name: String,
    },
    /// Rank 0 cannot listen.
    #[error("rank 0 cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// Nobody answers at the rendezvous.
    #[error("no rendezvous at {address} within {} ms ({source}): is rank 0 running there?", .waited.as_millis())]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// How long this rank tried.
        waited: Duration,
        /// The last attempt's failure.
        source: io::Error,
    },
    /// Rank 0 turned this process away.
    #[error("rank 0 refuses {rank}: {refusal}")]
    Refused {
        /// The rank that this process claimed.
        rank: Rank,
        /// Why.
        refusal: Refusal,
    },
    /// Some ranks did not come in time.
    #[error("{ranks} did not come to {key:?} within {} ms", .waited.as_millis())]
    Missing {
        /// The exchange.
        key: String,
        /// Who is missing.
        ranks: RankList,
        /// How long this rank waited.
        waited: Duration,
    },
    /// Somebody did not come in time, and the communicator does not say who.
    #[error("not every rank came to {key:?} within {} ms; NCCL does not say who is missing", .waited.as_millis())]
    Late {
        /// The exchange.
        key: String,
        /// How long this rank waited.
        waited: Duration,
    },
    /// The communicator refused or failed.
    #[error(transparent)]
    Nccl(#[from] ibex_nccl::NcclError),
    /// The GPU under the communicator refused or failed.
    #[error(transparent)]
    Gpu(#[from] crate::gpu::GpuError),
    /// A rank is gone for good.
    #[error("rank {rank} left before {key:?}")]
    Left {
        /// Who.
        rank: Rank,
        /// The exchange.
        key: String,
    },
    /// The connection to the rendezvous broke.
    #[error("lost the rendezvous during {key:?}: {source}")]
    Lost {
        /// The exchange.
        key: String,
        /// What the system said.
        source: io::Error,
    },
    /// A key or a blob that is too long.
    #[error("{what} of {len} bytes is refused: at most {max}")]
    TooLarge {
        /// What.
        what: &'static str,
        /// Its length.
        len: usize,
        /// The limit.
        max: usize,
    },
    /// The rendezvous sent what it never sends.
    #[error("the rendezvous at {address} is none of this version: {what}")]
    Malformed {
        /// Its address.
        address: SocketAddr,
        /// What was wrong.
        what: &'static str,
    },
    /// A rank that runs something else.
    #[error("rank {from} runs another {what} than this rank")]
    Differs {
        /// Who.
        from: Rank,
        /// What differs.
        what: &'static str,
    },
    /// A rank that shared memory does not reach.
    #[error(
        "rank {from} is on another host ({theirs}, this one is {ours}): shared memory does not reach it, udp does"
    )]
    OtherHost {
        /// Who.
        from: Rank,
        /// Its host.
        theirs: HostId,
        /// This rank's host.
        ours: HostId,
    },
    /// A rank's offer of queue pairs cannot be read.
    #[error("rank {from}: {reason}")]
    Offer {
        /// Who.
        from: Rank,
        /// What is wrong with it.
        reason: OfferError,
    },
    /// A peer's blob is not what it should be.
    #[error("rank {from} sent {what} of another version or with broken fields")]
    Blob {
        /// Who.
        from: Rank,
        /// What it should have been.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_read_like_sentences() {
        let list = |ranks: &[u16]| RankList(ranks.iter().copied().map(Rank).collect()).to_string();
        assert_eq!(list(&[3]), "rank 3");
        assert_eq!(list(&[3, 5]), "ranks 3 and 5");
        assert_eq!(list(&[3, 5, 6]), "ranks 3, 5 and 6");
        let many: Vec<u16> = (0..20).collect();
        assert!(list(&many).ends_with("14, 15 and 4 more"));
    }

    #[test]
    fn a_missing_rank_is_named() {
        let ranks = RankList(vec![Rank(1), Rank(6)]);
        let error = BootstrapError::Missing { key: "join".into(), ranks, waited: Duration::from_secs(2) };
        assert_eq!(error.to_string(), "ranks 1 and 6 did not come to \"join\" within 2000 ms");
    }
}
