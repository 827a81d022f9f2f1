//! Versioned, leased, batched records about peers, and the stores that keep them.
//!
//! # Rooms
//!
//! Pure, without clock, socket, thread, file or environment: [`ids`], [`name`], [`limits`], [`error`],
//! [`record`], [`change`], [`derived`], [`lease`], [`backoff`], [`segments`], [`url`], and the rules of a
//! store as a state machine (`table`). Shell: [`clock`] (the only file that reads one), [`local`]
//! (`memory:` and `redb:`), `grpc` (`ibex://`, client and server), `redis` (`redis://`), `etcd` (`etcd://`),
//! `k8s` (`k8s://`), `layered` (`layered+URL`), [`mod@open`], [`blocking`], [`scope`], [`keeper`],
//! [`publisher`], [`refresh`], [`drain`]. [`contract`] is what every backend is held to.
//!
//! # Who owns what
//!
//! A store owns rows; [`store::Snapshot`]s are immutable and shared. Nothing here owns memory that a
//! device reads; what is *derived* from records is the runtime's, and [`change`] says when it must go.
#![forbid(unsafe_code)]

pub mod backoff;
pub mod blocking;
pub mod change;
#[cfg(any(feature = "grpc", feature = "etcd"))]
mod channel;
pub mod clock;
pub mod contract;
pub mod derived;
pub mod drain;
pub mod error;
#[cfg(feature = "etcd")]
pub mod etcd;
#[doc(hidden)]
pub mod fuzz;
#[cfg(feature = "grpc")]
pub mod grpc;
pub mod ids;
#[cfg(feature = "redb")]
mod journal;
#[cfg(feature = "k8s")]
pub mod k8s;
pub mod keeper;
#[cfg(feature = "layered")]
pub mod layered;
pub mod lease;
pub mod limits;
pub mod local;
pub mod name;
pub mod open;
pub mod publisher;
pub mod record;
#[cfg(feature = "redis")]
pub mod redis;
pub mod refresh;
pub mod scope;
pub mod segments;
pub mod store;
mod table;
pub mod url;
mod wire;
