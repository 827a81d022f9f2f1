//! Links Ibex from outside and uses nothing but its public surface: dispatch, expert, combine, losses.
//!
//! `WORLD_SIZE` says how many ranks live in this process, `RANK` which of them reports.

use ibex::{
    CombineSource, Config, DispatchCall, Error, GroupMember, Halves, Lane, Rank, Replacement, Tokens, World,
    WorldOptions,
};

const NUM_TOPK: u32 = 2;

fn step(world: &World, tokens: &Tokens<'_>, me: Rank) -> Result<Vec<u32>, Error> {
    let mut running = Vec::new();
    for session in world.sessions() {
        let (tensors, stream) = (session.tensors()?, session.stream());
        let num_tokens = session.load(&tensors, NUM_TOPK, tokens)?;
        let handle = session.dispatch(Lane(0), &stream, &tensors, &DispatchCall::new(NUM_TOPK))?;
        session.run_expert(&stream, &tensors)?;
        session.combine(&handle, &stream, &tensors, CombineSource::ZeroCopy, Halves::Both)?;
        running.push((session, tensors, stream, num_tokens));
    }
    let mut lost = Vec::new();
    for (session, tensors, stream, num_tokens) in &running {
        let combined = session.finish(stream, tensors, *num_tokens)?;
        if session.rank() == me {
            lost = combined.lost_topk;
        }
    }
    Ok(lost)
}

fn main() -> Result<(), Error> {
    let me = GroupMember::from_vars(|name| std::env::var(name).ok(), 4)?;
    let config =
        Config { num_ranks: me.num_ranks, max_tokens: 4, hidden: 256, num_experts: 8, ..Config::default() };
    let world = World::new(&config, &WorldOptions::default())?;
    let x = vec![0x3f80; 4 * 256];
    let tokens = Tokens { x: &x, topk_idx: &[0, 7, 1, 6, 2, -1, 3, 4], topk_weights: &[0.5; 8] };
    println!("rank {} of {}: lost picks {:?}", me.rank, me.num_ranks, step(&world, &tokens, me.rank)?);
    world.replace_peer(Rank(0), Replacement::default())?;
    let lost = step(&world, &tokens, me.rank)?;
    println!("after rank 0's queue pairs were replaced: lost picks {lost:?}");
    assert!(lost.iter().all(|bits| *bits == 0), "nothing was injected, so nothing may be lost");
    Ok(())
}
