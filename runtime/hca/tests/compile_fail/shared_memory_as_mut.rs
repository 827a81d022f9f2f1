//! Memory that a device may write is never exclusively ours.

use ibex_hca::host_memory::Registered;

fn write(buffer: &mut Registered) {
    *buffer.view().word64(0).get_mut() = 1;
}

fn main() {}
