//! What atomic operations do to a word: pure functions from old to new.
//!
//! Words are in this machine's byte order, as mlx5 drivers configure the device [verify]; operands are
//! numbers. A masked fetch-and-add treats each field, whose top bit is set in `field_boundary`, as a
//! number of its own: no carry leaves it.

use ibex_abi::wqe::AtomicOp;

use super::memory::Span;

/// Executes `op` on the aligned word at the start of `word` and returns what the word was.
pub(super) fn execute(op: AtomicOp, word: Span) -> u64 {
    match op {
        AtomicOp::FetchAdd { add } => word.update64(0, |old| old.wrapping_add(add)),
        AtomicOp::CmpSwap { swap, compare } => {
            word.update64(0, |old| if old == compare { swap } else { old })
        }
        AtomicOp::MaskedFetchAdd64 { add, field_boundary } => {
            word.update64(0, |old| add_fields(old, add, field_boundary))
        }
        AtomicOp::MaskedCmpSwap64 { swap, compare, swap_mask, compare_mask } => {
            word.update64(0, |old| swap_masked(old, swap, compare, swap_mask, compare_mask))
        }
        AtomicOp::MaskedFetchAdd32 { add, field_boundary } => {
            let change = |old: u32| low(add_fields(old.into(), add.into(), field_boundary.into()));
            word.update32(0, change).into()
        }
        AtomicOp::MaskedCmpSwap32 { swap, compare, swap_mask, compare_mask } => {
            let [swap, compare] = [u64::from(swap), u64::from(compare)];
            let masks = [u64::from(swap_mask), u64::from(compare_mask)];
            let change = |old: u32| low(swap_masked(old.into(), swap, compare, masks[0], masks[1]));
            word.update32(0, change).into()
        }
    }
}

/// The low 32 bits.
const fn low(value: u64) -> u32 {
    // CAST: the 32-bit operation is done in the low half; its carry out is dropped.
    value as u32
}

/// Adds field by field: the sum without carries across a boundary.
const fn add_fields(old: u64, add: u64, boundary: u64) -> u64 {
    // Below the top bit of each field carries may run; the top bits add without carry.
    let sum = (old & !boundary).wrapping_add(add & !boundary);
    sum ^ ((old ^ add) & boundary)
}

const fn swap_masked(old: u64, swap: u64, compare: u64, swap_mask: u64, compare_mask: u64) -> u64 {
    if (old ^ compare) & compare_mask == 0 { (old & !swap_mask) | (swap & swap_mask) } else { old }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Field by field with plain arithmetic, the slow way.
    fn add_fields_naive(old: u64, add: u64, boundary: u64) -> u64 {
        let (mut out, mut carry) = (0, 0);
        for bit in 0..64 {
            let sum = (old >> bit & 1) + (add >> bit & 1) + carry;
            out |= (sum & 1) << bit;
            carry = if boundary >> bit & 1 == 1 { 0 } else { sum >> 1 };
        }
        out
    }

    #[test]
    fn no_carry_leaves_a_field() {
        assert_eq!(add_fields(0x00ff_00ff, 0x0001_0001, 0x8000_8000_8000_8000), 0x0100_0100);
        assert_eq!(add_fields(0xffff_ffff, 1, 0x8000_0000), 0);
        assert_eq!(add_fields(0xffff_ffff, 1, 0), 0x1_0000_0000);
        assert_eq!(add_fields(u64::MAX, 1, 1 << 63), 0);
        assert_eq!(add_fields(0b1111, 0b0101, u64::MAX), 0b1010);
    }

    proptest::proptest! {
        #[test]
        fn fields_add_as_the_slow_way_says(old: u64, add: u64, boundary: u64) {
            assert_eq!(add_fields(old, add, boundary), add_fields_naive(old, add, boundary));
        }
    }

    #[test]
    fn a_masked_swap_compares_and_stores_only_masked_bits() {
        assert_eq!(swap_masked(0x1234, 0xabcd, 0x0034, 0xff00, 0x00ff), 0xab34);
        assert_eq!(swap_masked(0x1235, 0xabcd, 0x0034, 0xff00, 0x00ff), 0x1235);
        assert_eq!(swap_masked(7, 9, 0, u64::MAX, 0), 9);
    }
}
