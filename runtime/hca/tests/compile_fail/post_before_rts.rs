//! Only a queue pair in RTS posts.

use ibex_hca::host_qp::{HostQp, Rtr};

fn post(qp: &mut HostQp<Rtr>) {
    qp.batch().commit().ring();
}

fn main() {}
