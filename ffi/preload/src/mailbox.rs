//! What the kernel, or VFIO's user-space driver, must know of a mailbox that it passes on.

use ibex_abi::prm::{self, Op};

/// The mailbox that destroys what `input` created; none if it created nothing.
pub(crate) fn destroyer(input: &[u8], output: &[u8]) -> Option<[u8; 16]> {
    let op = match prm::op_of(input).ok()? {
        Op::AllocPd => Op::DeallocPd,
        Op::AllocUar => Op::DeallocUar,
        Op::CreateUmem => Op::DestroyUmem,
        Op::CreateMkey => Op::DestroyMkey,
        Op::CreateEq => Op::DestroyEq,
        Op::CreateCq => Op::DestroyCq,
        Op::CreateQp => Op::DestroyQp,
        _ => return None,
    };
    // Every reply that names a new object names it here, and so does the command that destroys it; an event queue's 8
    // bits are the last of them.
    let number = prm::try_get(output, prm::create_qp_out::QPN)?;
    let mut mailbox = [0; 16];
    prm::set(&mut mailbox, prm::cmd_in::OPCODE, op.code().into());
    prm::set(&mut mailbox, prm::destroy_qp_in::QPN, number);
    Some(mailbox)
}

/// Whether `input` is the command `destroy`, whatever user it names.
pub(crate) fn is_same_destroy(input: &[u8], destroy: &[u8; 16]) -> bool {
    let fields = [prm::cmd_in::OPCODE, prm::destroy_qp_in::QPN];
    fields.into_iter().all(|field| prm::try_get(input, field) == prm::try_get(destroy, field))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_creates_an_object_has_a_command_that_destroys_it() {
        let (mut input, mut output) = ([0; 272], [0; 16]);
        prm::set(&mut input, prm::cmd_in::OPCODE, Op::CreateCq.code().into());
        prm::set(&mut output, prm::create_cq_out::CQN, 0x12_3456);
        let destroy = destroyer(&input, &output).unwrap();
        assert_eq!(prm::op_of(&destroy), Ok(Op::DestroyCq));
        assert_eq!(prm::get(&destroy, prm::destroy_cq_in::CQN), 0x12_3456);
        assert!(is_same_destroy(&destroy, &destroy));
        assert!(!is_same_destroy(&[0; 16], &destroy));
        prm::set(&mut input, prm::cmd_in::OPCODE, Op::QueryQp.code().into());
        assert_eq!(destroyer(&input, &output), None);
    }
}
