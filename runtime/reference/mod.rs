//! What dispatch and combine must compute, in plain Rust that is meant to be obviously right.
//!
//! Owns only the vectors it returns. Nothing here is shared with the kernels: the arithmetic is written
//! a second time, from its definition, so that an error must be made twice to stay hidden.
//!
//! - [`numerics`]: bf16, e4m3, the three kinds of scales, rows.
//! - [`inputs`]: what each rank is given, a pure function of (seed, iteration, rank): every rank can
//!   recompute what every other was given, so no test data crosses the network under test.
//! - [`routing`]: how tokens choose experts.
//! - [`check`]: compares what a device left in memory with what it must be, and counts.
//!
//! INVARIANT: no clock, thread, file or environment; equal arguments give equal bytes on any machine.

pub mod check;
pub mod inputs;
pub mod numerics;
pub mod rng;
pub mod routing;
