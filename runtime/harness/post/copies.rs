//! The messages of a [`PostCase`](super::PostCase), copied by hand: what a device is measured against.
//!
//! A [`Copies`] owns both sides. Each round writes them anew before its clock starts, because a round of the rig finds
//! its source and its target in the same state: whoever writes last before the measurement has them in its caches.

use super::PostCase;
use crate::time::now_ns;

/// See the module documentation.
pub struct Copies {
    piece_len: usize,
    from: Vec<u8>,
    to: Vec<u8>,
    round: u8,
}

impl Copies {
    /// As many messages, as long and from and to as many places as in `case`.
    #[must_use]
    pub fn new(case: &PostCase) -> Self {
        let piece_len = case.bytes as usize;
        let from = vec![0; piece_len * case.slots as usize];
        let to = vec![0; from.len() * case.num_qps as usize];
        Self { piece_len, from, to, round: 0 }
    }

    /// Copies every message to every queue's slots, on this thread; how long that took.
    pub fn round_ns(&mut self) -> u64 {
        self.round = self.round.wrapping_add(1);
        self.from.fill(self.round | 1);
        self.to.fill(0);
        let start = now_ns();
        for part in self.to.chunks_exact_mut(self.from.len()) {
            let pieces = part.chunks_exact_mut(self.piece_len).zip(self.from.chunks_exact(self.piece_len));
            for (to, from) in pieces {
                to.copy_from_slice(from);
            }
        }
        now_ns() - start
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_of_every_queue_is_copied_and_wiped_before() {
        let case = PostCase { bytes: 7, inline: false, num_qps: 3, slots: 5, batch: 1, sq_depth_log: 0 };
        let mut copies = Copies::new(&case);
        for _ in 0..2 {
            copies.round_ns();
            assert_eq!(copies.to, vec![copies.round | 1; 7 * 3 * 5]);
        }
    }
}
