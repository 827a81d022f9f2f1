//! The bytes that the HCA, the kernels and the host agree on.
//!
//! Work queue entries, completions, doorbells and command mailboxes of an mlx5 device, each with
//! one reader and one writer used by both the driver and the emulated device. This crate owns no
//! memory: it looks at slices that callers hold and copies values out of them.
//!
//! Invariants of the whole crate:
//! - Device structures are `#[repr(C)]` with big-endian integer types, so an unconverted number
//!   does not compile; sizes and offsets are asserted at compile time.
//! - A parser given arbitrary bytes returns an error or a value; it never panics.
//! - Reserved bits are emitted as zero and ignored on receipt.
//!
//! | module | what it describes | who writes it | who reads it |
//! |---|---|---|---|
//! | [`wqe`] | work queue entries | kernels, driver | HCA |
//! | [`doorbell`] | doorbell records and the doorbell register | kernels, driver | HCA |
//! | [`cqe`] | completion queue entries | HCA | kernels, driver |
//! | [`device_ctx`] | contexts, tables and arguments of kernels | host | kernels |
//! | [`prm`] | command mailboxes | driver, HCA | HCA, driver |
//! | [`types`] | numbers with a meaning, QP states | everyone | everyone |

#![forbid(unsafe_code)]

pub mod cqe;
pub mod device_ctx;
pub mod doorbell;
pub mod eqe;
pub mod prm;
pub mod types;
pub mod wqe;
