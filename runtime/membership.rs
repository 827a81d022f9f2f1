//! Who is in the group: what ranks say about each other, and how a change of the group is agreed.
//!
//! Pure: time comes in with every call, cells of a store come and go as bytes; nothing here names a clock, socket,
//! thread or file. The same code runs in simulation and between processes.
//!
//! Every rank has one [`Membership`], which owns what that rank knows: the newest [`View`] and the newest [`Row`] of
//! everybody. It publishes one row, and now and then replaces the view by compare-and-set. A [`Board`] stands between
//! it and a store. A keeper (`session::keeper`) carries its actions out on a session.
//!
//! ```text
//!  suspicion -> row, a new round -> everybody answers with a row -> propose(rows), quorum -> view, epoch + 1
//!  claim -> view: Joining -> offers, connected both ways, ready -> view: plan -> gates close, acks -> view, epoch + 1
//! ```
//!
//! Invariants:
//! - Only compare-and-set changes the view, and an epoch has one set of members.
//! - A set of members is replaced only by more than half of it, or by exactly half with its lowest rank; nobody is
//!   evicted whom nobody suspects and who answers.
//! - A rank is admitted again only when nobody holds anything of its last incarnation.
//! - No store, no change of the epoch.

mod board;
mod codec;
mod config;
mod machine;
mod propose;
mod rank_set;
mod view;

pub use board::{Board, BoardEvent};
pub use codec::CellError;
pub use config::{MembershipConfig, MembershipGuard};
pub use machine::{Action, Claimed, Membership, Standing, Stop};
pub use propose::{is_quorum, propose};
pub use rank_set::RankSet;
pub use view::{Instance, Link, Plan, Row, RowAck, Slot, SlotState, Start, View};
