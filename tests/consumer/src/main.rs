//! Links Ibex from outside and uses nothing but its public surface: one rank of a group of processes.
//!
//! `ibex launch --ranks 2 -- ibex-consumer` starts the group, as torchrun, srun and mpirun do: every process finds its
//! rank and where to meet in the environment. Without a launcher it is a group of one.

use ibex::bootstrap::Place;
use ibex::{
    CombineSource, Config, DispatchCall, Error, Halves, Lane, Member, MemberOptions, Session, Tokens,
};

const NUM_TOKENS: usize = 4;
const HIDDEN: u32 = 256;
const NUM_TOPK: u32 = 2;
/// Two experts per token; a masked pick takes part in nothing.
const TOPK_IDX: [i32; 8] = [0, 7, 1, 6, 2, -1, 3, 4];

/// Dispatch, expert, combine; which picks of each token were not summed.
fn step(session: &Session) -> Result<Vec<u32>, Error> {
    let (tensors, stream) = (session.tensors()?, session.stream());
    let x = vec![0x3f80; NUM_TOKENS * HIDDEN as usize]; // 1.0 in bf16
    let tokens = Tokens { x: &x, topk_idx: &TOPK_IDX, topk_weights: &[0.5; 8] };
    let num_tokens = session.load(&tensors, NUM_TOPK, &tokens)?;
    let handle = session.dispatch(Lane(0), &stream, &tensors, &DispatchCall::new(NUM_TOPK))?;
    session.run_expert(&stream, &tensors)?;
    session.combine(&handle, &stream, &tensors, CombineSource::ZeroCopy, Halves::Both)?;
    let combined = session.finish(&stream, &tensors, num_tokens)?;
    assert!(combined.out.iter().any(|value| *value != 0), "experts answered");
    Ok(combined.lost_topk)
}

fn main() -> Result<(), Error> {
    let place = Place::from_env()?.unwrap_or_else(Place::alone);
    let config = Config {
        num_ranks: place.num_ranks,
        max_tokens: NUM_TOKENS as u32,
        hidden: HIDDEN,
        num_experts: 8,
        max_topk: NUM_TOPK,
        detect_ms: 20_000, // a busy machine is no dead peer
        ..Config::default()
    };
    let member = Member::join(&config, &place, &MemberOptions::default())?;
    for number in 0..5 {
        let lost = step(member.session())?;
        println!("rank {} of {}, step {number}: lost picks {lost:?}", place.rank, place.num_ranks);
        assert!(lost.iter().all(|bits| *bits == 0), "nothing was injected, so nothing may be lost");
    }
    member.leave()
}
