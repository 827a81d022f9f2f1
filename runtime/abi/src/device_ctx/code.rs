//! Numbers of the enumerations that kernels read, spelled as in the C++ twin.

/// Operation indices.
pub const DISPATCH: u32 = 0;
/// See [`DISPATCH`].
pub const COMBINE: u32 = 1;
/// Bits of `halves`: which part of the operation a launch runs.
pub const SEND_HALF: u32 = 1;
/// See [`SEND_HALF`].
pub const RECEIVE_HALF: u32 = 2;
/// Wire dtypes of a dispatch.
pub const WIRE_BF16: u32 = 0;
/// See [`WIRE_BF16`].
pub const WIRE_FP8: u32 = 1;
/// Scale kinds: amax / 448 in fp32, the power of two above it, or that power's exponent in one byte.
pub const SCALE_F32: u32 = 0;
/// See [`SCALE_F32`].
pub const SCALE_POW2: u32 = 1;
/// See [`SCALE_F32`].
pub const SCALE_UE8M0: u32 = 2;
/// Combine modes: one row per pick, or one pre-summed row per token and rank.
pub const COMBINE_EXACT: u32 = 0;
/// See [`COMBINE_EXACT`].
pub const COMBINE_REDUCED: u32 = 1;
/// Signal modes.
pub const SIGNAL_WRITE: u32 = 0;
/// See [`SIGNAL_WRITE`].
pub const SIGNAL_FETCH_ADD: u32 = 1;
/// Routes.
pub const ROUTE_LOCAL: u32 = 0;
/// See [`ROUTE_LOCAL`].
pub const ROUTE_MAPPED: u32 = 1;
/// See [`ROUTE_LOCAL`].
pub const ROUTE_IBGDA: u32 = 2;
/// States of a QP slot as kernels see it; only an active one may be posted to.
pub const QP_MASKED: u32 = 0;
/// See [`QP_MASKED`].
pub const QP_ACTIVE: u32 = 1;
/// See [`QP_MASKED`].
pub const QP_FENCED: u32 = 2;
/// Kinds of a [`super::DeviceFault`]: no sign of life.
pub const FAULT_SILENT: u32 = 1;
/// Alive, past the half we wait for, and still nothing.
pub const FAULT_STALLED: u32 = 2;
/// The hard cap of one half.
pub const FAULT_CAP: u32 = 3;
/// Error CQE.
pub const FAULT_COMPLETION: u32 = 4;
/// The peer said LOST, or skipped the step.
pub const FAULT_REPORTED: u32 = 5;
/// A header or count that contradicts the protocol.
pub const FAULT_VIOLATION: u32 = 6;
/// Source rows could not be reused.
pub const FAULT_SOURCE_ROWS: u32 = 7;
/// Guards of the protocol, by bit of [`super::LaneArgs::guards_off`]: credits.
pub const GUARD_CREDIT: u32 = 1;
/// Completions before rows are used again.
pub const GUARD_SOURCE_ROWS: u32 = 2;
/// Generations are compared.
pub const GUARD_GENERATION: u32 = 4;
/// LOST is said.
pub const GUARD_LOST: u32 = 8;
/// The doorbell is rung.
pub const GUARD_DOORBELL: u32 = 16;
/// Fencing waits for the halves that have entered; the host's guard, not the kernels'.
pub const GUARD_GRACE: u32 = 32;
/// The newer member table applies from its first sequence number on.
pub const GUARD_FROM_SEQ: u32 = 64;
/// A member table is overwritten only when nothing uses it; the host's guard.
pub const GUARD_TABLE: u32 = 128;
/// Masks, suspicions, signs of life and loss bits are looked at.
pub const GUARD_MEMBERSHIP: u32 = 256;
/// A combine slot moves away from rows that may come too late.
pub const GUARD_LATE_ROWS: u32 = 512;
