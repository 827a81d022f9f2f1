//! `ibex://`: a store that several processes share, over gRPC.
//!
//! [`RemoteStore`] is the client, [`Server`] what `ibex store serve` runs. The server owns its sockets and
//! shares a [`crate::store::Store`]; whatever that store is, its outcomes and errors reach the client
//! unchanged. Records pass through as bytes. Leases travel as remaining time, and the client counts them
//! from before it asked.
//!
//! Beside it, on the same sockets, the server speaks to the clients of two other systems: `express` and
//! `mooncake` are views of the same records, and keep nothing of their own.

mod client;
mod convert;
mod express;
mod gate;
#[rustfmt::skip]
#[expect(unreachable_pub, reason = "made from proto/store.proto")]
mod generated;
mod host;
mod metrics;
mod mooncake;
mod secret;
mod server;
mod service;
mod views;

pub use self::client::{Connect, RemoteStore, Target};
pub use self::host::{HostError, host};
pub use self::metrics::Metrics;
pub use self::secret::Secret;
pub use self::server::{Server, ServerConfig, ServerError, TlsFiles};

/// The schema of the service and of records, as reflection shows it.
const DESCRIPTORS: &[u8] = include_bytes!("grpc/descriptors.bin");
