//! A preloaded library that shows the emulated device to programs as the kernel would show a ConnectX.
//!
//! ```text
//!   program (python3-pyverbs, ibv_devinfo, hca::mlx5)
//!      libibverbs, libmlx5: unmodified, from the distribution
//!   ---- open, ioctl, mmap, close ...        interpose/   C functions that take the place of libc's
//!      vfio/        a function with registers, command queue and interrupts, as VFIO hands it out
//!      uverbs/      objects and handles of an open device, as the kernel's ib_uverbs and mlx5_ib keep them
//!      world        the devices of this process, the thread that steps them, the thread that reads events
//!   ---- trait Hca: PRM mailboxes, doorbell pages
//!      ibex_hca::emulated
//! ```
//!
//! It converts and never decides: a verb becomes mailboxes, a refusal of the device becomes the errno that Linux makes
//! of it. What the device cannot do is `EOPNOTSUPP`, which libibverbs' callers know how to take.
//!
//! *Who owns what.* Memory that a program names belongs to the program, which promises, as it promises the kernel, to
//! leave it mapped until it destroys the object. Descriptors belong to the program; a context lives as long as the
//! descriptor that `open` gave, and its objects are destroyed with it. Doorbell pages are the device's and are never
//! unmapped, so that `munmap` of one does nothing.
//!
//! How a program is run under it stands in `settings.rs`.
#![expect(
    unsafe_code,
    reason = "stands in for the kernel: every argument is an address that the program vouches for"
)]

mod errno;
mod faults;
mod interpose;
mod mailbox;
mod report;
mod settings;
mod sysfs;
mod user;
mod uverbs;
mod vfio;
mod world;
