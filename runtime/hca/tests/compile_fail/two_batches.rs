//! Two posters of one queue pair at a time would write the same entries.

use ibex_hca::host_qp::{HostQp, Rts};

fn post(qp: &mut HostQp<Rts>) {
    let one = qp.batch();
    let other = qp.batch();
    one.commit().ring();
    other.commit().ring();
}

fn main() {}
