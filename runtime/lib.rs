//! Ibex.
