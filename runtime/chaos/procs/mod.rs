//! A campaign of one seed between processes: every rank, and the store, is a process that really ends.
//!
//! A supervisor (the command `ibex chaos --fabric shm|udp`) starts ranks, breaks them and replaces them. What is here
//! knows neither terminals nor how processes are started:
//!
//! ```text
//!  supervisor                              rank: worker
//!   inject    orders, signals  -- stdin -->  ElasticMember, App: one step after the other, each judged
//!   observer  <-------------- stdout ------  words: steps, losses, suspicions, gates, what is held
//!      ^                                            weights: those of its experts, read from a survivor
//!      +---- the view's cell, from the store itself: nobody's word for who is a member
//! ```
//!
//! *Who owns what.* A [`Worker`] owns its member and what it computes; an [`Observer`] the ledger, the report and the
//! timeline.
//!
//! INVARIANT: a fault is in the ledger before it strikes, so a loss is never judged before its reason is known.

mod commands;
mod line;
mod observer;
mod weights;
mod worker;

pub use line::{Between, Lost, Moment, Order, Role, Said, Shape, StepWord, Way, Why, Word};
pub use observer::{FaultEntry, Observer, Seen};
pub use worker::{Worker, WorkerEnd};
