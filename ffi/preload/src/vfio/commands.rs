//! The command queue: slots in the program's memory, and mailboxes that continue what does not fit a slot.
//!
//! ```text
//!  slot     00 type  04 ilen  08 iptr:64  10 in[16]  20 out[16]  30 optr:64  38 olen  3c token  3f status:7 own:1
//!  mailbox  000 data[512]  230 next:64  238 block_num  23c rsvd, token, ctrl_sig, sig
//! ```
//!
//! SPEC: mlx5 `mlx5_cmd_layout`, `mlx5_cmd_prot_block`; all numbers are big-endian.

use ibex_abi::prm::{self, Op};

use super::Container;
use crate::user;

/// Bytes of a slot.
const SLOT_LEN: u64 = 64;
/// Bytes of a command that stand in the slot itself.
const INLINE: usize = 16;
/// Bytes of a command in one mailbox, and where the address of the next one stands.
const BLOCK: usize = 512;
const NEXT: u64 = 0x230;
/// Longest command or reply.
const COMMAND_MAX: usize = 1 << 20;
/// Bits of a translation entry that are no address.
const MTT_FLAGS: u64 = 7;

/// Why a command was not delivered to the device. SPEC: `MLX5_CMD_DELIVERY_STAT_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Undelivered {
    OutPointer = 4,
    InPointer = 5,
    InLength = 7,
    OutLength = 8,
}

/// A slot that the program gave to the device.
#[derive(Debug)]
pub(super) struct Slot {
    /// Address of the slot in the program's memory.
    addr: u64,
    bytes: [u8; SLOT_LEN as usize],
}

impl Slot {
    /// The slot at `addr`, if it is the device's.
    ///
    /// # Safety
    /// The program mapped 64 bytes at `addr` for the device.
    pub(super) unsafe fn take(addr: u64) -> Option<Self> {
        // SAFETY: the caller's contract.
        let bytes = unsafe { user::read(addr, SLOT_LEN as usize) }.ok()?;
        let bytes: [u8; SLOT_LEN as usize] = bytes.try_into().ok()?;
        (bytes[0x3f] & 1 == 1).then_some(Self { addr, bytes })
    }

    fn number(&self, at: usize, len: usize) -> u64 {
        self.bytes[at..at + len].iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
    }

    /// Bytes of room for the reply.
    pub(super) fn reply_len(&self) -> Result<usize, Undelivered> {
        // CAST: 32 bits.
        let len = self.number(0x38, 4) as usize;
        if len > COMMAND_MAX { Err(Undelivered::OutLength) } else { Ok(len) }
    }

    /// The command.
    pub(super) fn command(&self, memory: &Container) -> Result<Vec<u8>, Undelivered> {
        // CAST: 32 bits.
        let len = self.number(0x04, 4) as usize;
        if !(INLINE..=COMMAND_MAX).contains(&len) {
            return Err(Undelivered::InLength);
        }
        let mut command = self.bytes[0x10..0x10 + INLINE].to_vec();
        let mut at = self.number(0x08, 8);
        while command.len() < len {
            let part = BLOCK.min(len - command.len());
            let block = memory.find(at, NEXT + 8).ok_or(Undelivered::InPointer)?;
            // SAFETY: memory that the program mapped for the device, as just found.
            let data = unsafe { user::read(block, part) };
            command.extend(data.map_err(|_| Undelivered::InPointer)?);
            at = next_of(block);
        }
        Ok(command)
    }

    /// Writes the reply where the command wants it.
    pub(super) fn reply(&self, memory: &Container, reply: &[u8]) -> Result<(), Undelivered> {
        let (inline, mut rest) = reply.split_at(INLINE.min(reply.len()));
        put(self.addr + 0x20, inline);
        let mut at = self.number(0x30, 8);
        while !rest.is_empty() {
            let (part, more) = rest.split_at(BLOCK.min(rest.len()));
            let block = memory.find(at, NEXT + 8).ok_or(Undelivered::OutPointer)?;
            put(block, part);
            at = next_of(block);
            rest = more;
        }
        Ok(())
    }

    /// Gives the slot back to the program.
    pub(super) fn give_back(self, delivered: Result<(), Undelivered>) {
        // CAST: a fieldless enum of representation u8.
        let status = delivered.map_or_else(|why| why as u8, |()| 0);
        // The bytes of the reply are written; on this processor stores are seen in their order.
        std::sync::atomic::fence(std::sync::atomic::Ordering::Release);
        put(self.addr + 0x3f, &[status << 1]);
    }
}

/// Writes to memory that the program mapped for the device.
fn put(addr: u64, bytes: &[u8]) {
    // SAFETY: inside a mapping that the program made for the device, as the callers found.
    let written = unsafe { user::write(addr, bytes) };
    debug_assert!(written.is_ok(), "a mapping does not begin at zero");
}

fn next_of(block: u64) -> u64 {
    // SAFETY: inside a mapping that the program made for the device, as the callers found.
    let bytes = unsafe { user::read(block + NEXT, 8) };
    bytes.map_or(0, |bytes| bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

/// Turns the addresses in a command's list of pages from the IOMMU's into the program's.
///
/// One that leads nowhere stays as it is; the device refuses it.
pub(super) fn translate(command: &mut [u8], memory: &Container) {
    let Some((start, page)) = page_list(command) else { return };
    let Some(list) = command.get_mut(start..) else { return };
    let (entries, _) = list.as_chunks_mut::<8>();
    for entry in entries {
        let value = u64::from_be_bytes(*entry);
        if let Some(addr) = memory.page(value & !MTT_FLAGS, page) {
            *entry = (addr | value & MTT_FLAGS).to_be_bytes();
        }
    }
}

/// Where a command's list of pages begins, and the size of each.
fn page_list(command: &[u8]) -> Option<(usize, u64)> {
    let shift = |field| prm::try_get(command, field);
    let (start, log_page) = match prm::op_of(command).ok()? {
        Op::CreateUmem => {
            let field = prm::umem::LOG_PAGE_SIZE.within(prm::create_umem_in::UMEM);
            (prm::create_umem_in::LEN, 12 + shift(field)?)
        }
        Op::CreateMkey => {
            let field = prm::mkc::LOG_PAGE_SIZE.within(prm::create_mkey_in::MEMORY_KEY_MKEY_ENTRY);
            (prm::create_mkey_in::LEN, shift(field)?)
        }
        Op::CreateEq => {
            let field = prm::eqc::LOG_PAGE_SIZE.within(prm::create_eq_in::EQ_CONTEXT_ENTRY);
            (prm::create_eq_in::LEN, 12 + shift(field)?)
        }
        _ => return None,
    };
    // CAST: fields of 5 bits.
    Some((start, 1 << log_page as u32))
}
