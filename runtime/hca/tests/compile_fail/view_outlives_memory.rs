//! A view does not outlive the memory it looks at.

use ibex_hca::host_memory::{HostMemory, View};

fn view() -> View<'static> {
    let memory = HostMemory::new(4096).unwrap();
    memory.view()
}

fn main() {}
