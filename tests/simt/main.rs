//! The SIMT layer: every collective, barrier and atomic, launches, simulation.
//!
//! Warp fibers run in this process, lane fibers in a C++ process of their own; both must give what the
//! arithmetic in `buffers` says.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]
#![expect(unsafe_code, reason = "kernel arguments are raw pointers; each launch says why they are valid")]

mod buffers;
mod collectives;
mod faults;
mod launches;
#[path = "../rig/mod.rs"]
mod rig;
mod simulation;
