//! Ibex: GPU-initiated expert-parallel communication for mixture-of-experts models.

pub mod buffer;
pub mod config;
pub mod error;
pub mod gpu;
pub mod harness;
pub mod ids;
pub mod layout;
pub mod recovery;
pub mod reference;
pub mod session;
pub mod telemetry;
pub mod time;
