//! `ibex info`: what this build and this machine offer, and what a configuration costs in memory.
//!
//! Owns nothing; reads the machine once.

use std::num::NonZeroUsize;
use std::thread;

use ibex::gpu::cuda::Driver;
use ibex::gpu::image;
use ibex::ids::Rank;
use ibex::layout::Plan;
use ibex::session::buffer_bytes;

use super::flags::Shape;
use super::table;
use super::{CliError, Outcome};

/// Flags of `info`: the shape whose memory is reported.
#[derive(clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    shape: Shape,
}

/// What `--gpu cuda` would find.
fn cuda() -> String {
    match Driver::load().and_then(|driver| driver.devices()) {
        Ok(devices) if devices.is_empty() => "there is no gpu".into(),
        Ok(devices) => devices.into_iter().map(|info| info.name).collect::<Vec<_>>().join(", "),
        Err(error) => error.to_string(),
    }
}

/// Prints the report; nothing is allocated.
pub(super) fn run(args: &Args) -> Result<Outcome, CliError> {
    let config = args.shape.config()?.validate()?;
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    println!("ibex {}", env!("CARGO_PKG_VERSION"));
    println!("providers   emulated; mlx5 within one process (`ibex doctor` looks for devices)");
    println!("gpus        host on {cores} cores; cuda within one process ({})", cuda());
    println!("fabrics     inproc, sim; between processes shm, udp");
    println!("cuda image  {}", image::note());
    let ranks = (0..config.num_ranks).map(|rank| {
        // CAST: at most 512 ranks.
        Rank(rank as u16)
    });
    let buffers = ranks.clone().map(|rank| buffer_bytes(&config, rank)).max().unwrap_or(0);
    let tensors = ranks.map(|rank| Plan::new(&config, rank).tensors().total()).max().unwrap_or(0);
    println!();
    println!(
        "shape       {} ranks x {} tokens x hidden {}, top-{} of {} experts, {}, combine {}",
        config.num_ranks,
        config.max_tokens,
        config.hidden,
        config.max_topk,
        config.num_experts,
        config.dtype,
        config.combine
    );
    println!(
        "queues      {} lanes x {} peers x {} channels, {} owner warps of {}",
        config.lanes,
        config.num_ranks,
        config.num_channels(),
        config.num_owner_warps(),
        config.num_warps()
    );
    let timers = config.rc_timers();
    println!("timers      detect {} ms, stall {} ms", config.detect_ms, config.stall_ms());
    println!(
        "            transport {} attempts of 2^{} x 4.096 us, which end after {} ms",
        timers.retry_count + 1,
        timers.ack_timeout,
        timers.total_ns() / 1_000_000
    );
    println!(
        "            lease {} ms, without a store or a quorum {} ms",
        config.lease_ttl_ms(),
        config.store_grace_ms
    );
    println!("buffers     {} per rank, ring {}", table::bytes(buffers), config.ring);
    println!("tensors     {} per rank", table::bytes(tensors));
    Ok(Outcome::Good)
}
