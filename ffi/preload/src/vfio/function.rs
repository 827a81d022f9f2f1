//! A device function in the hands of a program: its registers, its commands, its interrupts.
//!
//! A thread of its own plays the part of the hardware below the program's stores: it executes commands when their
//! doorbell rings, carries doorbells of queues to the emulated device's pages, and raises an interrupt for each entry
//! of an event queue.
//!
//! *Who owns what.* The thread owns what commands made, and destroys it when the function is closed; the youngest
//! first, as a reset would.

use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::thread::JoinHandle;

use ibex_abi::eqe::{UAR_CQ_ARM_OFFSET, UAR_EQ_ARM_OFFSET, UAR_EQ_UPDATE_OFFSET};
use ibex_abi::prm::{self, Op, Status};
use ibex_abi::types::Eqn;
use ibex_hca::emulated::EmulatedHca;
use ibex_hca::{DoorbellPage, Hca};
use parking_lot::Mutex;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::bar::{BAR_LEN, Bar, CONFIG_LEN, CONFIG_OFFSET, FIRST_UAR, LOG_SLOTS, LOG_STRIDE};
use super::commands::{Slot, Undelivered, translate};
use super::{Container, give, request, take};
use crate::errno::Errno;
use crate::user::PAGE;
use crate::world::Device;
use crate::{mailbox, world};

/// Interrupt vectors of the function.
const NUM_VECTORS: u32 = 8;
/// Kinds of interrupts and regions. SPEC: linux/vfio.h.
const MSIX_IRQ_INDEX: u32 = 2;
const BAR0_REGION_INDEX: u32 = 0;
const CONFIG_REGION_INDEX: u32 = 7;
/// Registers of a doorbell page that are carried over, 8 bytes each; the event queue's are 4 bytes with 4 unused.
const REGISTERS: [u64; 7] = [
    UAR_CQ_ARM_OFFSET as u64,
    UAR_EQ_ARM_OFFSET as u64,
    UAR_EQ_UPDATE_OFFSET as u64,
    0x800,
    0x900,
    0xa00,
    0xb00,
];

/// `vfio_region_info`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

/// `vfio_irq_info`.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IrqInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    count: u32,
}

/// `vfio_irq_set`; descriptors follow.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
}

/// What the program's descriptor and the function's thread share.
#[derive(Debug)]
struct Shared {
    device: &'static Device,
    container: Arc<Container>,
    bar: Bar,
    /// Where each vector's interrupt is raised; -1: nowhere.
    vectors: Mutex<[RawFd; NUM_VECTORS as usize]>,
    stop: AtomicBool,
}

/// An open function.
#[derive(Debug)]
pub(crate) struct Function {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Function {
    /// Opens a function; gives the descriptor for the program too.
    pub(super) fn open(
        device: &'static Device,
        container: Arc<Container>,
    ) -> Result<(RawFd, Arc<Self>), Errno> {
        let (vectors, stop) = (Mutex::new([-1; NUM_VECTORS as usize]), AtomicBool::new(false));
        let shared = Arc::new(Shared { device, container, bar: Bar::new()?, vectors, stop });
        let fd = shared.bar.descriptor()?;
        let hardware = Hardware::new(Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("ibex-vfio".into()).spawn(move || hardware.run());
        let thread = Mutex::new(Some(thread.map_err(|_| Errno::NOMEM)?));
        Ok((fd, Arc::new(Self { shared, thread })))
    }

    /// Answers an ioctl of the function's descriptor.
    ///
    /// # Safety
    /// The program vouches for the argument.
    pub(crate) unsafe fn ioctl(&self, request: u64, argument: u64) -> Result<i32, Errno> {
        match request {
            request::DEVICE_GET_REGION_INFO => {
                // SAFETY: the caller's contract.
                let asked: RegionInfo = unsafe { take(argument) }?;
                // SAFETY: as above.
                unsafe { give(argument, &region(asked)?) }?;
            }
            request::DEVICE_GET_IRQ_INFO => {
                const EVENTFD: u32 = 1;
                // SAFETY: the caller's contract.
                let asked: IrqInfo = unsafe { take(argument) }?;
                if asked.index != MSIX_IRQ_INDEX {
                    return Err(Errno::INVAL);
                }
                // SAFETY: as above.
                unsafe { give(argument, &IrqInfo { flags: EVENTFD, count: NUM_VECTORS, ..asked }) }?;
            }
            request::DEVICE_SET_IRQS => {
                // SAFETY: the caller's contract.
                let set: IrqSet = unsafe { take(argument) }?;
                let fits = set.start.checked_add(set.count).is_some_and(|end| end <= NUM_VECTORS);
                if set.index != MSIX_IRQ_INDEX || !fits {
                    return Err(Errno::INVAL);
                }
                let mut vectors = self.shared.vectors.lock();
                for idx in 0..set.count {
                    let at = argument + size_of::<IrqSet>() as u64 + u64::from(idx) * 4;
                    // SAFETY: the caller's contract: `count` descriptors follow.
                    let fd: RawFd = unsafe { take(at) }?;
                    // CAST: below NUM_VECTORS.
                    vectors[(set.start + idx) as usize] = fd;
                }
            }
            _ => return Err(Errno::INVAL),
        }
        Ok(0)
    }

    /// Stops the function and ends what its commands made.
    pub(crate) fn close(&self) {
        self.shared.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.lock().take() {
            // A thread that panicked has said so.
            let _ = thread.join();
        }
    }
}

fn region(asked: RegionInfo) -> Result<RegionInfo, Errno> {
    const READ_WRITE_MMAP: u32 = 7;
    let (size, offset) = match asked.index {
        BAR0_REGION_INDEX => (BAR_LEN, 0),
        CONFIG_REGION_INDEX => (CONFIG_LEN, CONFIG_OFFSET),
        _ => return Err(Errno::INVAL),
    };
    Ok(RegionInfo { flags: READ_WRITE_MMAP, cap_offset: 0, size, offset, ..asked })
}

/// A doorbell page of the program, and what its registers held when they were last carried over.
#[derive(Debug)]
struct Uar {
    page: DoorbellPage,
    carried: [u64; REGISTERS.len()],
}

/// An event queue of the program, and how many of its entries have raised interrupts.
#[derive(Debug)]
struct WatchedEq {
    eqn: Eqn,
    vector: usize,
    raised: u32,
}

/// The thread's own state.
struct Hardware {
    shared: Arc<Shared>,
    uars: Vec<Uar>,
    /// Pages whose place in the registers is taken by something else.
    unused: Vec<DoorbellPage>,
    eqs: Vec<WatchedEq>,
    /// Commands that destroy what was made, in the order in which it was.
    made: Vec<[u8; 16]>,
}

impl Hardware {
    fn new(shared: Arc<Shared>) -> Self {
        Self { shared, uars: Vec::new(), unused: Vec::new(), eqs: Vec::new(), made: Vec::new() }
    }

    fn hca(&self) -> &'static EmulatedHca {
        self.shared.device.hca()
    }

    fn run(mut self) {
        while !self.shared.stop.load(Ordering::Acquire) {
            let mut slots = 0;
            if self.shared.bar.take_command_doorbell() {
                slots = self.execute_slots();
            }
            self.carry_doorbells();
            if slots != 0 {
                self.hca().tell_commands_done(slots);
            }
            self.raise_interrupts();
            self.shared.bar.beat();
            if slots == 0 {
                world::nap();
            }
        }
        self.reset();
    }

    /// Ends everything that commands made.
    fn reset(&mut self) {
        for destroy in std::mem::take(&mut self.made).iter().rev() {
            // What is refused is still in use by what could not be destroyed before it.
            let _ = self.shared.device.exec(destroy, &mut [0; 16]);
        }
        for page in std::mem::take(&mut self.unused) {
            let _ = self.hca().free_doorbell(page);
        }
    }

    /// Executes the commands in all slots that are the device's; a bit for each.
    fn execute_slots(&mut self) -> u32 {
        let stride = 1_u64 << LOG_STRIDE;
        let queue = self.shared.bar.command_queue();
        let Some(base) = self.shared.container.find(queue, stride << LOG_SLOTS) else { return 0 };
        let mut done = 0;
        for idx in 0..1_u32 << LOG_SLOTS {
            // SAFETY: inside memory that the program mapped for the device, as just found.
            if let Some(slot) = unsafe { Slot::take(base + u64::from(idx) * stride) } {
                let delivered = self.execute(&slot);
                slot.give_back(delivered);
                done |= 1 << idx;
            }
        }
        done
    }

    fn execute(&mut self, slot: &Slot) -> Result<(), Undelivered> {
        let mut command = slot.command(&self.shared.container)?;
        let mut reply = vec![0; slot.reply_len()?];
        translate(&mut command, &self.shared.container);
        match prm::op_of(&command) {
            Ok(Op::AllocUar) => self.alloc_uar(&mut reply),
            // A refusal stands in the reply.
            _ => drop(self.shared.device.exec(&command, &mut reply)),
        }
        if matches!(prm::status_of(&reply), Ok((Status::Ok, _))) {
            self.note(&command, &reply);
        }
        slot.reply(&self.shared.container, &reply)
    }

    /// Allocates a doorbell page, which appears among the registers by its number.
    fn alloc_uar(&mut self, reply: &mut [u8]) {
        let in_bar = |page: &DoorbellPage| u64::from(page.uar.get() + 1) * PAGE <= BAR_LEN;
        while let Ok(page) = self.hca().alloc_doorbell() {
            if page.uar.get() < FIRST_UAR {
                self.unused.push(page);
                continue;
            }
            if !in_bar(&page) || reply.len() < prm::alloc_uar_out::LEN {
                self.unused.push(page);
                break;
            }
            prm::set(reply, prm::alloc_uar_out::UAR, page.uar.into());
            self.uars.push(Uar { page, carried: [0; REGISTERS.len()] });
            return;
        }
        if reply.len() >= prm::cmd_out::LEN {
            prm::set(reply, prm::cmd_out::STATUS, Status::NoRes.code().into());
        }
    }

    /// Takes note of what a command made or ended.
    fn note(&mut self, command: &[u8], reply: &[u8]) {
        if let Some(destroy) = mailbox::destroyer(command, reply) {
            self.made.push(destroy);
        } else {
            self.made.retain(|destroy| !mailbox::is_same_destroy(command, destroy));
        }
        match prm::op_of(command) {
            Ok(Op::CreateEq) => {
                use prm::{create_eq_in as cmd, create_eq_out as out, eqc};
                // CAST: fields of at most 8 bits.
                let vector = prm::get(prm::part(command, cmd::EQ_CONTEXT_ENTRY), eqc::INTR) as usize;
                let eqn = Eqn::new(prm::get(reply, out::EQ_NUMBER) as u32);
                self.eqs.push(WatchedEq { eqn, vector, raised: 0 });
            }
            Ok(Op::DestroyEq) => {
                let eqn = prm::get(command, prm::destroy_eq_in::EQ_NUMBER);
                self.eqs.retain(|eq| u64::from(eq.eqn) != eqn);
            }
            Ok(Op::DeallocUar) => {
                let idx = prm::get(command, prm::dealloc_uar_in::UAR);
                self.uars.retain(|uar| u64::from(uar.page.uar) != idx);
            }
            _ => {}
        }
    }

    /// Carries stores to the program's doorbell pages over to the device's.
    fn carry_doorbells(&mut self) {
        for uar in &mut self.uars {
            let at = u64::from(uar.page.uar.get()) * PAGE;
            let page = uar.page.register - REGISTERS[3];
            for (offset, carried) in REGISTERS.into_iter().zip(&mut uar.carried) {
                let value = self.shared.bar.load64(at + offset);
                if *carried != value {
                    *carried = value;
                    carry(page + offset, value, offset < REGISTERS[3] && offset != REGISTERS[0]);
                }
            }
        }
    }

    /// Raises an interrupt for every event queue that has new entries.
    fn raise_interrupts(&mut self) {
        let hca = self.hca();
        for eq in &mut self.eqs {
            let written = hca.events_written(eq.eqn).unwrap_or(eq.raised);
            let is_new = std::mem::replace(&mut eq.raised, written) != written;
            let vectors = self.shared.vectors.lock();
            if let Some(fd) = vectors.get(eq.vector).filter(|fd| is_new && **fd >= 0) {
                let one = 1_u64.to_ne_bytes();
                // SAFETY: 8 readable bytes; a descriptor that the program has closed is an error, and nothing happens.
                unsafe { libc::write(*fd, one.as_ptr().cast(), one.len()) };
            }
        }
    }
}

/// Stores to a register of the device's own page.
fn carry(addr: u64, value: u64, is_half: bool) {
    // CAST: an address of this process.
    let register = std::ptr::with_exposed_provenance_mut::<u64>(addr as usize);
    if is_half {
        // CAST: the half that stands first in memory.
        // SAFETY: a register of a page that the device allocated for this function, aligned; it is never unmapped.
        unsafe { AtomicU32::from_ptr(register.cast()) }.store(value as u32, Ordering::Release);
    } else {
        // SAFETY: as above.
        unsafe { AtomicU64::from_ptr(register) }.store(value, Ordering::Release);
    }
}
