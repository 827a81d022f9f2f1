//! Command mailboxes: how the driver asks the device for objects, and how the device answers.
//!
//! A mailbox is a slice that the caller of a command owns. A [`Field`] names bits in it, counted
//! from the most significant bit of byte 0, as the programmer's reference manual counts. Each
//! mailbox and each structure nested in one is a module of constants, for example
//! [`create_qp_in::OPCODE`] and [`qpc::MTU`]; the fields of a nested structure count from its own
//! start, see [`Field::within`].
//!
//! Invariants: [`set`] changes the bits of its field and no others; [`get`] after [`set`] gives
//! the value back; every layout's fields lie inside it or in the list that follows it.
//!
//! ```
//! use ibex_abi::prm::{self, create_qp_in, qpc, Op};
//!
//! let mut input = [0; create_qp_in::LEN];
//! prm::set(&mut input, create_qp_in::OPCODE, Op::CreateQp.code().into());
//! prm::set(&mut input, qpc::PD.within(create_qp_in::QPC), 2);
//! assert_eq!(prm::get(prm::part(&input, create_qp_in::QPC), qpc::PD), 2);
//! ```

use std::ops::Range;

mod device;
mod memory;
mod op;
mod qp;
mod queues;

pub use device::*;
pub use memory::*;
pub use op::{Op, Status, UnknownOp, UnknownStatus, op_of, status_of};
pub use qp::*;
pub use queues::*;

/// Bits of a mailbox: where they begin and how many there are.
///
/// Fields wider than 64 bits are nested structures, reached with [`part`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Field {
    bit_off: u32,
    width: u32,
}

impl Field {
    /// The field of `width` bits that begins `bit_off` bits after the start of byte 0.
    #[must_use]
    pub const fn new(bit_off: u32, width: u32) -> Self {
        assert!(width > 0, "a field has at least one bit");
        Self { bit_off, width }
    }

    /// First bit, counted from the most significant bit of byte 0.
    #[must_use]
    pub const fn bit_off(self) -> u32 {
        self.bit_off
    }

    /// Number of bits.
    #[must_use]
    pub const fn width(self) -> u32 {
        self.width
    }

    /// The same field, counted from the start of the structure that `outer` nests.
    #[must_use]
    pub const fn within(self, outer: Self) -> Self {
        assert!(self.bit_off + self.width <= outer.width, "a nested field lies inside its structure");
        Self { bit_off: self.bit_off + outer.bit_off, width: self.width }
    }

    /// The `idx`-th of a list whose first element is this field.
    #[must_use]
    pub const fn element(self, idx: u32) -> Self {
        Self { bit_off: self.bit_off + idx * self.width, width: self.width }
    }

    /// The largest value that fits, of a field of at most 64 bits.
    #[must_use]
    pub const fn value_max(self) -> u64 {
        assert!(self.width <= 64, "a field wider than 64 bits is a structure");
        u64::MAX >> (64 - self.width)
    }

    /// The bytes that the field touches.
    #[must_use]
    pub const fn bytes(self) -> Range<usize> {
        // CAST: widening on the 64-bit targets this crate supports.
        let (start, end) = (self.bit_off / 8, (self.bit_off + self.width).div_ceil(8));
        start as usize..end as usize
    }

    /// How far the field's last bit is from the end of its last byte.
    const fn tail_bits(self) -> u32 {
        (8 - (self.bit_off + self.width) % 8) % 8
    }
}

/// Reads a field of at most 64 bits.
///
/// # Panics
/// PANIC: if `bytes` ends before the field does; use [`try_get`] where the length is not checked.
#[must_use]
pub fn get(bytes: &[u8], field: Field) -> u64 {
    let window = &bytes[field.bytes()];
    let wide = window.iter().fold(0u128, |value, &byte| value << 8 | u128::from(byte));
    // CAST: the mask keeps at most 64 bits.
    (wide >> field.tail_bits()) as u64 & field.value_max()
}

/// Reads a field of at most 64 bits, or `None` if `bytes` ends before it does.
#[must_use]
pub fn try_get(bytes: &[u8], field: Field) -> Option<u64> {
    (field.bytes().end <= bytes.len()).then(|| get(bytes, field))
}

/// Writes a field of at most 64 bits; leaves all other bits alone.
///
/// # Panics
/// PANIC: if the value does not fit the field, or `bytes` ends before the field does.
pub fn set(bytes: &mut [u8], field: Field, value: u64) {
    assert!(value <= field.value_max(), "value {value:#x} does not fit {field:?}");
    let window = &mut bytes[field.bytes()];
    let shift = field.tail_bits();
    let (mut value, mut mask) = (u128::from(value) << shift, u128::from(field.value_max()) << shift);
    for byte in window.iter_mut().rev() {
        // CAST: the low byte of each, one after the other.
        let (value_byte, mask_byte) = (value as u8, mask as u8);
        *byte = *byte & !mask_byte | value_byte;
        (value, mask) = (value >> 8, mask >> 8);
    }
}

/// The bytes of a nested structure.
///
/// # Panics
/// PANIC: if `bytes` ends before the structure does.
#[must_use]
pub fn part(bytes: &[u8], field: Field) -> &[u8] {
    &bytes[field.bytes()]
}

/// The bytes of a nested structure, for writing.
///
/// # Panics
/// PANIC: if `bytes` ends before the structure does.
#[must_use]
pub fn part_mut(bytes: &mut [u8], field: Field) -> &mut [u8] {
    &mut bytes[field.bytes()]
}

/// Reads `N` bytes from where `first`, a list of bytes, begins: a GID for example.
///
/// # Panics
/// PANIC: if `bytes` ends before the list does, or `first` is not one whole byte.
#[must_use]
pub fn get_bytes<const N: usize>(bytes: &[u8], first: Field) -> [u8; N] {
    let start = list_start(first);
    let mut list = [0; N];
    list.copy_from_slice(&bytes[start..start + N]);
    list
}

/// Writes bytes from where `first`, a list of bytes, begins.
///
/// # Panics
/// PANIC: if `bytes` ends before the list does, or `first` is not one whole byte.
pub fn set_bytes(bytes: &mut [u8], first: Field, list: &[u8]) {
    let start = list_start(first);
    bytes[start..start + list.len()].copy_from_slice(list);
}

fn list_start(first: Field) -> usize {
    assert!(first.width == 8 && first.bit_off.is_multiple_of(8), "{first:?} is not a list of bytes");
    first.bytes().start
}

/// Everything that a mailbox's or nested structure's module holds, for code that walks layouts.
#[derive(Debug, Clone, Copy)]
pub struct Layout {
    /// Name of the module.
    pub name: &'static str,
    /// Size in bytes, lists that follow excluded.
    pub len: usize,
    /// Names and places of all fields, in the order of the manual.
    pub fields: &'static [(&'static str, Field)],
}

/// Every layout this crate knows.
pub fn all_layouts() -> impl Iterator<Item = &'static Layout> {
    [device::LAYOUTS, memory::LAYOUTS, queues::LAYOUTS, qp::LAYOUTS].into_iter().flatten()
}

/// Declares one module per layout, and the list `LAYOUTS` of all of them.
macro_rules! layouts {
    ($(
        $(#[$doc:meta])*
        $name:ident, $len:literal { $($field:ident @ $off:literal : $width:literal,)* }
    )*) => {
        $(
            $(#[$doc])*
            pub mod $name {
                use crate::prm::Field;

                /// Size in bytes, lists that follow excluded.
                pub const LEN: usize = $len;
                $(
                    #[doc = concat!("Bit ", stringify!($off), ", ", $width, " wide.")]
                    pub const $field: Field = Field::new($off, $width);
                )*
                /// All fields with their names.
                pub const FIELDS: &[(&str, Field)] = &[$((stringify!($field), $field)),*];
            }
        )*

        /// The layouts of this module.
        pub(super) const LAYOUTS: &[Layout] =
            &[$(Layout { name: stringify!($name), len: $name::LEN, fields: $name::FIELDS }),*];
    };
}
use layouts;
