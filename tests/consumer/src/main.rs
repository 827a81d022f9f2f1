//! Links Ibex from outside and uses nothing but its public surface.

use std::sync::Arc;

use ibex::gpu::pool::{Pool, PoolConfig};
use ibex::gpu::{Gpu, HostGpu};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = ibex::config::Config::default();
    let valid = config.validate()?;
    let gpu = HostGpu::new(Arc::new(Pool::new(PoolConfig::real_time(1))?), 0);
    let memory = gpu.alloc(8, 8)?;
    gpu.store_u64(memory.addr(), valid.max_local_experts().into())?;
    println!("{} experts per rank", gpu.load_u64(memory.addr())?);
    Ok(())
}
