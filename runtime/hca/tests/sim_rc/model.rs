//! What memory must look like: the operations of one end, one after the other, on plain bytes.

use super::scenario::{Op, TARGET};

/// A pattern that differs at every offset and for every operation.
pub fn pattern(op: usize, len: u64) -> Vec<u8> {
    // CAST: the low byte of a hash is what is wanted.
    (0..len).map(|at| (at.wrapping_mul(0x9e37) >> 5) as u8 ^ (op as u8).wrapping_mul(0x3b) | 1).collect()
}

/// The memory that one end's operations work on, at the other end.
#[derive(Clone)]
pub struct Target {
    pub bytes: Vec<u8>,
}

impl Target {
    pub fn new() -> Self {
        Self { bytes: vec![0; TARGET as usize] }
    }

    /// Carries out packets `[0, packets)` of an operation, and gives what the requester gets back.
    pub fn execute(&mut self, nth: usize, op: Op, packets: u64, mtu: u64) -> Vec<u8> {
        match op {
            Op::Write { offset, len, .. } => {
                let done = len.min(packets.saturating_mul(mtu)) as usize;
                let at = offset as usize;
                self.bytes[at..at + done].copy_from_slice(&pattern(nth, len)[..done]);
                Vec::new()
            }
            Op::Read { offset, len } => self.bytes[offset as usize..(offset + len) as usize].to_vec(),
            Op::Add(add) => self.word(|old| old.wrapping_add(add)),
            Op::Swap { compare, swap } => self.word(|old| if old == compare { swap } else { old }),
            Op::Send { .. } | Op::Nop | Op::Poison(_) => Vec::new(),
        }
    }

    fn word(&mut self, change: impl FnOnce(u64) -> u64) -> Vec<u8> {
        let old: [u8; 8] = self.bytes[..8].try_into().unwrap();
        let new = change(u64::from_le_bytes(old));
        self.bytes[..8].copy_from_slice(&new.to_le_bytes());
        old.to_vec()
    }
}

/// Whether `found` is what memory may be when the operations up to `done` were carried out, and of those
/// after it any number, the last perhaps in part.
pub fn is_reachable(ops: &[Op], done: usize, mtu: u64, found: &[u8]) -> bool {
    let mut target = Target::new();
    for (nth, op) in ops.iter().enumerate() {
        if nth >= done {
            let packets = if let Op::Write { len, .. } = op { len.div_ceil(mtu) } else { 0 };
            for part in 0..=packets {
                let mut amid = target.clone();
                amid.execute(nth, if part == 0 { Op::Nop } else { *op }, part, mtu);
                if amid.bytes == found {
                    return true;
                }
            }
        }
        target.execute(nth, *op, u64::MAX, mtu);
    }
    target.bytes == found
}
