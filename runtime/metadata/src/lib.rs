//! Versioned, leased, batched records about peers, and the stores that keep them.
//!
//! # Rooms
//!
//! Pure, without clock, socket, thread, file or environment: [`ids`], [`name`], [`limits`], [`error`],
//! [`record`], [`lease`], and the rules of a store as a state machine (`table`).
//! Shell: [`clock`] (the only file that reads one), [`local`] (`memory:` and `redb:`), `grpc`
//! (`ibex://`, client and server).
//!
//! # Who owns what
//!
//! A store owns rows; [`store::Snapshot`]s are immutable and shared. Nothing here owns memory that a
//! device reads; what is *derived* from records is the runtime's.
#![forbid(unsafe_code)]

pub mod clock;
pub mod contract;
pub mod error;
#[cfg(feature = "grpc")]
pub mod grpc;
pub mod ids;
#[cfg(feature = "redb")]
mod journal;
pub mod lease;
pub mod limits;
pub mod local;
pub mod name;
pub mod record;
pub mod store;
mod table;
mod wire;
