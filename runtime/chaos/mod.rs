//! Campaigns: members of a group are killed, stopped, cut off and misled, and everything they compute is checked.
//!
//! For the command `ibex chaos` and for tests; nothing that links Ibex needs it. Below the line it is pure and the same
//! for simulated ranks and for processes:
//!
//! ```text
//!   sim        one seed in virtual time: every process, the store and the network on one thread
//!   campaign   many seeds of it, on all cores
//!   procs      one rank that is a process, and the observer of a group of such
//!   app        what a rank computes, step after step, each judged: inputs, and tables of who serves what
//!   -------------------------------------------------------------------------------------------
//!   fault      kinds of faults by name        plan      which strikes when, drawn from a seed
//!   oracle     one finished step, judged      ledger    what was injected, and so may be lost
//!   report     what was found, and times      timeline, html   what happened when, to be looked at
//! ```

mod app;
pub mod campaign;
pub mod draws;
pub mod fault;
pub mod html;
mod inputs;
pub mod ledger;
pub mod oracle;
pub mod plan;
pub mod procs;
pub mod report;
pub mod sim;
mod tables;
pub mod timeline;

pub use fault::{ALL_KINDS, Fault, FaultKind};
pub use plan::{Ask, Plan};
pub use report::Report;
