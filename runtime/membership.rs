//! Who is in the group: what ranks say about each other, and how a change of the group is agreed.
//!
//! Pure: time comes in with every call, cells of a store come and go as bytes; nothing here names a clock, socket,
//! thread or file. The same code runs in simulation and between processes.

mod rank_set;

pub use rank_set::RankSet;
