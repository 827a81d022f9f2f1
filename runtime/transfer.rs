//! Transfers that the host drives: registered memory, peers found in their records, READ and WRITE.
//!
//! The ground that bulk transfers stand on. A [`Requester`] is one process's end: it owns a queue pair per peer
//! slot, says in the process's own record how to reach them ([`Requester::advertise`]), and is an [`Observer`] of
//! the others' records: whatever came from a record that changed is taken down before the new record is used.
//!
//! ```text
//!  ResolveScope --> &Guard --> open --> Segment          {name, buffer, slot + generation}
//!                      |                   |
//!                      '---> submit <------'  lease, owner and generation checked, again when it is posted
//!                               |
//!          waiting --post--> posted --CQE--> done        lease checked again
//!             |                 '--deadline--> done, not quiescent until the CQE or the queue pair's end
//!             '--another owner--> PeerReplaced
//! ```
//!
//! *Who owns what.* A [`Region`] owns memory and its key; each request holds a share of it until no device can touch
//! it, so neither a deadline nor a dropped [`Batch`] frees memory that a NIC may still write. Taking a region back
//! from its peers is [`ibex_metadata::drain`]'s business, for which a region is [`Pinned`].
//!
//! INVARIANTS:
//! - a request is posted with the key that the newest known record gives for its buffer, never with an older
//!   one: posting and retiring exclude each other;
//! - nothing here asks the store, or waits for it: only what is known, within its lease, is used;
//! - the outcome of a request and its quiescence are two things, and reported apart.
//!
//! A use cannot outlive the request that looked the record up:
//!
//! ```compile_fail,E0515
//! use core::time::Duration;
//!
//! use ibex::transfer::{Batch, Request, Requester, TransferError};
//! use ibex_metadata::blocking::Blocking;
//! use ibex_metadata::name::RecordName;
//! use ibex_metadata::scope;
//!
//! fn late<'a>(
//!     requester: &'a Requester,
//!     store: &'a Blocking,
//!     request: &'a scope::Request,
//!     name: &RecordName,
//!     work: &[Request<'_>],
//! ) -> Result<Batch<'a>, TransferError> {
//!     let scope = request.scope(&**store.store());
//!     let guard = store.resolve(&scope, name)?;
//!     requester.submit(&guard, work, Duration::from_secs(1)) // refers to `guard`, which ends here
//! }
//! ```
//!
//! [`Observer`]: ibex_metadata::refresh::Observer
//! [`Pinned`]: ibex_metadata::drain::Pinned

mod address;
mod batch;
mod error;
mod requester;
mod seat;
mod work;

pub(crate) use address::describe as describe_port;
pub use batch::{Batch, Report};
pub use error::TransferError;
pub use requester::{Requester, RequesterOptions, Segment, TransferCounters};
pub use work::{Region, Request, Verb};
