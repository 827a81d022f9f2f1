//! What a refusal means, in sentences: for people who must mend what a device said no to.
//!
//! Pure: nothing is owned. A command's status says which check failed, its syndrome is a number of the firmware that
//! nobody outside documents; so the sentences follow from the command and the status, and the syndrome is passed on as
//! it is. The causes are those that public reports of such failures end with.
//!
//! INVARIANT: every sentence ends with what to look at or to do.

use ibex_abi::cqe::{Syndrome, VendorSyndrome};
use ibex_abi::prm::{Op, Status};

/// What a command's status means for this command.
#[must_use]
pub const fn command(op: Op, status: Status) -> &'static str {
    match (op, status) {
        (_, Status::Ok) => "the command was carried out",
        (Op::Init2RtrQp, Status::BadParam) => {
            "INIT->RTR: the device refuses the way to the peer. Look at, in this order: the local GID \
             index (on Ethernet it must be a RoCE v2 entry that is not zero: `ibex doctor` lists them), \
             the peer's GID or LID, its MAC (zero where the neighbour did not answer: `ip neigh`), the \
             path MTU (not above the port's active MTU), log_rra_max (not above the device's), the port \
             number"
        }
        (Op::Init2RtrQp, Status::BadQpState) => {
            "INIT->RTR: the queue pair is not in INIT. RST2INIT failed or was left out, or the queue pair \
             went to ERR meanwhile: move it through 2RST and start again"
        }
        (Op::Init2RtrQp, Status::BadRes) => {
            "INIT->RTR: something that the context names does not exist: the queue pair, its protection \
             domain or its completion queue; it was destroyed before, or belongs to another process"
        }
        (Op::Init2RtrQp, Status::Ix) => {
            "INIT->RTR: the GID index or the port number is beyond the port's table: `ibex doctor` lists \
             the entries"
        }
        (Op::Rst2InitQp, Status::BadParam) => {
            "RST->INIT: the port number, the P_Key index or the access rights are refused. Look at the \
             port (1 on single-port functions), at the P_Key table, and at whether the device offers \
             atomics"
        }
        (Op::Rtr2RtsQp, Status::BadParam) => {
            "RTR->RTS: a timer or depth is refused: ack timeout (5 bits), retry counts (3 bits), \
             log_sra_max (not above the device's)"
        }
        (Op::Rtr2RtsQp | Op::Rst2InitQp, Status::BadQpState) => {
            "the transition does not start in the queue pair's state: an earlier step failed, or the \
             peer's packets moved it to ERR; move it through 2RST and start again"
        }
        (Op::CreateQp, Status::BadParam) => {
            "CREATE_QP: queue sizes, doorbell page or the place in the umem are refused. Look at \
             log_sq_size (the device's log_max_qp_sz), at the alignment of ring and record, and at whether \
             both lie inside the umem"
        }
        (Op::CreateCq, Status::BadParam) => {
            "CREATE_CQ: size, event queue, doorbell page or the place in the umem are refused. Look at \
             log_cq_size, at the number of the event queue, and at whether ring and record lie inside the \
             umem"
        }
        (Op::CreateMkey, Status::BadParam) => {
            "CREATE_MKEY: range, access mode or page size are refused. Look at the length, at whether \
             address and iova have the same offset in a page, and at whether local write stands where \
             remote write or atomics do"
        }
        (Op::CreateUmem, Status::BadParam | Status::IntErr) => {
            "CREATE_UMEM: the memory cannot be used for queues. Memory of a GPU needs dma-buf or \
             nvidia-peermem; memory of the host needs room under `ulimit -l`"
        }
        (Op::QueryHcaCap, Status::BadParam) => {
            "QUERY_HCA_CAP: the device does not know this group of capabilities: its firmware is older \
             than the feature"
        }
        (Op::AllocUar, Status::Lim | Status::NoRes) => {
            "ALLOC_UAR: no doorbell page is left: other processes hold them; end some of them, or use \
             fewer lanes"
        }
        (_, status) => general(status),
    }
}

/// What a status means whatever the command was.
const fn general(status: Status) -> &'static str {
    match status {
        Status::Ok => "the command was carried out",
        Status::IntErr => {
            "the firmware failed inside: `dmesg | grep mlx5_core` has its health report; a reset of the \
             function may help"
        }
        Status::BadOp => {
            "the command, or this variant of it, is unknown or not for this process: older firmware, or a \
             kernel driver that keeps it to itself; update the firmware, or do without"
        }
        Status::BadParam => {
            "a value in the mailbox is out of range for this device: compare it with QUERY_HCA_CAP (`ibex \
             doctor` prints the limits that matter)"
        }
        Status::BadSysState => {
            "the function is not in a state for commands: it resets or shuts down; see `dmesg | grep \
             mlx5_core`"
        }
        Status::BadRes => {
            "the command names an object that does not exist or is of another kind: it was destroyed, or \
             belongs to another process"
        }
        Status::ResBusy => {
            "the object is in use by another: destroy queue pairs before their completion queues, queues \
             before their umem, keys before their protection domain"
        }
        Status::Lim => {
            "a limit of the device is reached: end other users of it, or ask for fewer queues or keys"
        }
        Status::BadResState => {
            "the object is in a state that does not allow this: query it, and take the steps in order"
        }
        Status::Ix => {
            "an index is beyond its table: port, GID, P_Key or counter; compare with the port's table sizes"
        }
        Status::NoRes => {
            "the device has no more of it: end other users of it, or ask for fewer queues or keys"
        }
        Status::BadQpState => {
            "the transition does not start in the queue pair's state: query it, and move it through 2RST \
             if in doubt"
        }
        Status::BadPkt => {
            "a management packet is malformed: the subnet manager and the driver do not fit; update both"
        }
        Status::BadSizeOutsCqes => {
            "a completion queue cannot shrink below what it holds: poll it empty first"
        }
        Status::BadInpLen | Status::BadOutpLen => {
            "a mailbox is shorter than this firmware expects: driver and firmware do not fit; update the \
             older one"
        }
    }
}

/// What an error completion means.
#[must_use]
pub const fn completion(syndrome: Syndrome, vendor: VendorSyndrome) -> &'static str {
    match (syndrome, vendor) {
        (Syndrome::LOCAL_QP_OP, VendorSyndrome::WQE_INDEX) => {
            "the device fetched an entry with another index than it expected: producer index and doorbell \
             record do not agree, or two posters share the queue"
        }
        (Syndrome::LOCAL_LENGTH, _) => {
            "the length of a request or receive is wrong: longer than the receive that it met, or than the \
             path allows"
        }
        (Syndrome::LOCAL_QP_OP, _) => {
            "the queue entry itself is wrong: opcode, size in 16-byte units, or queue pair number; dump it \
             and compare with tests/golden"
        }
        (Syndrome::LOCAL_PROT, _) => {
            "a local key does not cover the bytes, lacks the right, or belongs to another protection \
             domain: look at the lkey and the range of the entry"
        }
        (Syndrome::WR_FLUSH, _) => {
            "the work was not carried out, because the queue pair was in error already: an earlier \
             completion has the cause (a collapsed completion queue overwrites it: see the device's or the \
             peer's log)"
        }
        (Syndrome::MW_BIND, _) => {
            "a key could not be bound or invalidated: the request names a key that is in use"
        }
        (Syndrome::BAD_RESP, _) => {
            "the peer answered something else than was asked: restart the connection on both ends"
        }
        (Syndrome::LOCAL_ACCESS, _) => {
            "a response could not be written into local memory: the local key of a READ or atomic lacks \
             local write"
        }
        (Syndrome::REMOTE_INVAL_REQ, _) => {
            "the peer's queue pair does not take this kind of request: its access flags at RST->INIT, its \
             depth of READs, or the alignment of an atomic"
        }
        (Syndrome::REMOTE_ACCESS, _) => {
            "the peer's key does not exist, does not cover the range or lacks the right: the key was \
             renewed or revoked, or address and key come from different incarnations of the peer"
        }
        (Syndrome::REMOTE_OP, _) => {
            "the peer could not carry it out: look at the peer's own completions and its dmesg"
        }
        (Syndrome::TRANSPORT_RETRY_EXC, _) => {
            "no acknowledgement within all retries: the peer is gone, its queue pair is not in RTR or RTS, \
             the cable or the route is broken, a firewall drops UDP 4791, or the path MTU does not fit on \
             the way"
        }
        (Syndrome::RNR_RETRY_EXC, _) => {
            "the peer had no receive posted within all retries: it is slow, or posts too few"
        }
        (Syndrome::REMOTE_ABORTED, VendorSyndrome::PAGE_FAULT) => {
            "a page fault on paged memory could not be resolved at the peer: pin the memory instead"
        }
        (Syndrome::REMOTE_ABORTED, _) => "the peer aborted the operation: look at its dmesg",
        _ => {
            "the syndrome is not one that is documented: see the device's log, and the firmware's release \
             notes"
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_refusal_has_a_sentence_and_what_to_do() {
        for &op in Op::ALL {
            for &status in Status::ALL {
                let said = command(op, status);
                assert!(said.len() > 20 && !said.contains("  "), "{op} {status}: {said}");
            }
        }
        for code in 0..=u8::MAX {
            let said = completion(Syndrome(code), VendorSyndrome::NONE);
            assert!(said.len() > 20 && !said.contains("  "), "{code:#x}: {said}");
        }
    }

    #[test]
    fn the_steps_of_bring_up_have_sentences_of_their_own() {
        let general = command(Op::ManagePages, Status::BadParam);
        for op in [Op::Rst2InitQp, Op::Init2RtrQp, Op::Rtr2RtsQp, Op::CreateQp, Op::CreateCq, Op::CreateMkey]
        {
            assert_ne!(command(op, Status::BadParam), general, "{op}");
        }
        assert!(command(Op::Init2RtrQp, Status::BadParam).contains("GID"));
        let index = completion(Syndrome::LOCAL_QP_OP, VendorSyndrome::WQE_INDEX);
        assert_ne!(index, completion(Syndrome::LOCAL_QP_OP, VendorSyndrome::NONE));
    }
}
