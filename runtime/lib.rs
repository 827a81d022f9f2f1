//! Ibex: GPU-initiated expert-parallel communication for mixture-of-experts models.
//!
//! Kernels build work requests and post them to mlx5 queue pairs themselves; this crate owns what they stand on. All
//! of it also runs on the CPU with an emulated device, as here: every rank of a group in one process.
//!
//! ```
//! use ibex::{Config, Error, GroupMember, Rank, Replacement, Tokens, World, WorldOptions};
//!
//! fn main() -> Result<(), Error> {
//!     let me = GroupMember::from_vars(|name| std::env::var(name).ok(), 2)?; // RANK and WORLD_SIZE
//!     let config = Config {
//!         num_ranks: me.num_ranks,
//!         max_tokens: 4,
//!         hidden: 256,
//!         num_experts: 8,
//!         max_topk: 2,
//!         ..Config::default()
//!     };
//!     let world = World::new(&config, &WorldOptions::default())?;
//!     let x = vec![0x3f80_u16; 4 * 256]; // 1.0 in bf16
//!     let tokens = Tokens { x: &x, topk_idx: &[0, 7, 1, 6, 2, -1, 3, 4], topk_weights: &[0.5; 8] };
//!
//!     // One closure is one step of the whole group: all ranks launch before one is waited for.
//!     let step = || -> Result<_, Error> {
//!         let mut running = Vec::new();
//!         for session in world.sessions() {
//!             let (tensors, stream) = (session.tensors()?, session.stream());
//!             let num_tokens = session.load(&tensors, 2, &tokens)?;
//!             session.launch_step(&stream, &tensors, 2)?; // dispatch, expert, combine
//!             running.push((session, tensors, stream, num_tokens));
//!         }
//!         let mut outputs = Vec::new();
//!         for (session, tensors, stream, num_tokens) in &running {
//!             outputs.push(session.finish(stream, tensors, *num_tokens)?);
//!         }
//!         Ok(outputs)
//!     };
//!     let before = step()?;
//!     assert!(before.iter().all(|rank| rank.lost_topk == [0; 4]), "nothing is lost");
//!     world.replace_peer(Rank(0), Replacement::default())?; // its queue pairs, in place
//!     let mine = &step()?[me.rank.index()];
//!     assert_eq!(*mine, before[me.rank.index()], "the same sums as before");
//!     println!("rank {}: {:#06x}, lost {:?}", me.rank, mine.out[0], mine.lost_topk);
//!     Ok(())
//! }
//! ```
//!
//! [`Session`] has each part by itself: send and receive halves, streams, lanes, captured graphs.

/// The README's example, so that it is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod bootstrap;
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

pub use config::{Config, GroupMember};
pub use error::Error;
pub use ids::{Lane, Rank};
pub use session::{
    CombineSource, DispatchCall, Halves, Member, MemberFabric, MemberOptions, Replacement, Session, Tensors,
    Tokens, World, WorldOptions,
};
