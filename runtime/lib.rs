//! Ibex.

pub mod config;
pub mod error;
pub mod gpu;
pub mod ids;
pub mod time;
