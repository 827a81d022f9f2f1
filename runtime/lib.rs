//! Ibex.

pub mod config;
pub mod error;
pub mod gpu;
pub mod ids;
pub mod reference;
pub mod time;
