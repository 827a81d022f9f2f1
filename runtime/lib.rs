//! Ibex: GPU-initiated expert-parallel communication for mixture-of-experts models.
//!
//! Kernels build work requests and post them to mlx5 queue pairs themselves; this crate owns what they stand on. All
//! of it also runs on the CPU with an emulated device, as here: one rank of a group whose ranks are processes.
//!
//! ```
//! use ibex::bootstrap::Place;
//! use ibex::{CombineSource, Config, DispatchCall, Error, Halves, Lane, Member, MemberOptions, Tokens};
//!
//! fn main() -> Result<(), Error> {
//!     // RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, as `ibex launch`, torchrun, srun and mpirun set them.
//!     let place = Place::from_env()?.unwrap_or_else(Place::alone);
//!     let config = Config {
//!         num_ranks: place.num_ranks,
//!         max_tokens: 4,
//!         hidden: 256,
//!         num_experts: 8,
//!         max_topk: 2,
//!         detect_ms: 20_000, // a busy machine is no dead peer
//!         ..Config::default()
//!     };
//!     let member = Member::join(&config, &place, &MemberOptions::default())?;
//!     let session = member.session();
//!
//!     let (t, stream) = (session.tensors()?, session.stream());
//!     let x = vec![0x3f80_u16; 4 * 256]; // 1.0 in bf16
//!     let tokens = Tokens { x: &x, topk_idx: &[0, 7, 1, 6, 2, -1, 3, 4], topk_weights: &[0.5; 8] };
//!     let num_tokens = session.load(&t, 2, &tokens)?; // x, topk_idx, topk_weights
//!     let handle = session.dispatch(Lane(0), &stream, &t, &DispatchCall::new(2))?; // packed_x, layout_ranges
//!     session.run_expert(&stream, &t)?; // yours goes here; it fills expert_out
//!     session.combine(&handle, &stream, &t, CombineSource::ZeroCopy, Halves::Both)?;
//!
//!     let combined = session.finish(&stream, &t, num_tokens)?;
//!     println!("rank {}: {:#06x}, lost {:?}", place.rank, combined.out[0], combined.lost_topk);
//!     assert_eq!(combined.lost_topk, [0; 4], "bit k of a token: its pick k was not summed");
//!     drop((handle, t));
//!     member.leave()
//! }
//! ```
//!
//! [`World`] has all ranks in one process, and replaces a peer between two steps.
//! [`Session`] has each part by itself: send and receive halves, streams, lanes, captured graphs.

/// The README's example, so that it is compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub mod bootstrap;
pub mod buffer;
pub mod chaos;
pub mod config;
pub mod error;
pub mod gpu;
pub mod harness;
pub mod ids;
pub mod layout;
pub mod membership;
pub mod placement;
pub mod recovery;
pub mod reference;
pub mod session;
pub mod telemetry;
pub mod time;
pub mod transfer;

pub use config::Config;
pub use error::Error;
pub use ids::{Lane, Rank};
pub use session::{
    CombineSource, DispatchCall, Halves, Member, MemberFabric, MemberOptions, Replacement, Session, Tensors,
    Tokens, World, WorldOptions,
};
