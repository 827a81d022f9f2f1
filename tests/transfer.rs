//! Host-driven transfers over records that change: which key is posted, what is retired, what waits for whom.
//!
//! Devices are stepped by the tests, so that "posted and not yet executed" is a state and not a race.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

#[path = "transfer/rig.rs"]
mod rig;

#[path = "transfer/changes.rs"]
mod changes;
#[path = "transfer/leases.rs"]
mod leases;
#[path = "transfer/schedules.rs"]
mod schedules;
#[path = "transfer/taking_back.rs"]
mod taking_back;
