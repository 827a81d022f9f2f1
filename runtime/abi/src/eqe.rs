//! Event queue entries, and the doorbells that ask for them.
//!
//! Entries lie in memory that the driver owns and the HCA writes; the driver tells by the owner bit what is new. The
//! driver fills a fresh queue with [`EQE_OWNER_INIT`] owners; in its first pass the HCA writes 0, then 1, and so on.
//!
//! Invariant: the HCA writes the owner byte of an entry last.

use std::mem::{offset_of, size_of};

use zerocopy::byteorder::big_endian::U32;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::{CqNum, Eqn, QpNum};

/// Size of an event queue entry.
pub const EQE: usize = 64;
/// Owner byte of entries that the HCA has not written yet.
pub const EQE_OWNER_INIT: u8 = 1;
/// Offset of the word in an entry whose last byte is the owner.
pub const EQE_OWNER_WORD_OFFSET: usize = 0x3c;
/// Offset in a UAR page of the register that arms a completion queue.
pub const UAR_CQ_ARM_OFFSET: usize = 0x20;
/// Offset in a UAR page of the register that moves an event queue's consumer index and arms it.
pub const UAR_EQ_ARM_OFFSET: usize = 0x40;
/// Offset in a UAR page of the register that moves an event queue's consumer index.
pub const UAR_EQ_UPDATE_OFFSET: usize = 0x48;

/// The owner bit of the entry at `counter`, which counts all entries ever written.
#[must_use]
pub const fn eqe_owner(counter: u32, log_size: u8) -> bool {
    counter >> log_size & 1 == 1
}

/// What an event is about.
///
/// SPEC: Linux include/linux/mlx5/device.h `enum mlx5_event`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum EventType {
    /// A completion that was asked for.
    Completion = 0x00,
    /// A completion queue failed.
    CqError = 0x04,
    /// A queue pair failed locally.
    QpFatal = 0x05,
    /// The remote end asked for something malformed.
    QpRequestError = 0x10,
    /// The remote end violated access rights.
    QpAccessError = 0x11,
    /// A port went up or down.
    PortChange = 0x09,
    /// Commands in the command queue ended.
    CommandsDone = 0x0a,
}

impl EventType {
    /// Every type that this crate knows.
    pub const ALL: [Self; 7] = [
        Self::Completion,
        Self::CqError,
        Self::QpFatal,
        Self::QpRequestError,
        Self::QpAccessError,
        Self::PortChange,
        Self::CommandsDone,
    ];

    /// Its bit in the first word of `create_eq_in::EVENT_BITMASK`.
    #[must_use]
    pub const fn bit(self) -> u64 {
        // CAST: a fieldless enum of representation u8, below 64.
        1 << self as u8
    }
}

/// An event queue entry.
///
/// ```text
///  00 rsvd  01 type  02 rsvd  03 sub_type  04 rsvd
///  20 data: completion {38 cqn}, queue pair {34 kind, 38 qpn}, CQ error {20 cqn, 2b syndrome},
///     port {28 number:4}, commands {20 slots}
///  3c rsvd  3e signature  3f owner
/// ```
///
/// SPEC: Linux include/linux/mlx5/device.h `struct mlx5_eqe`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Eqe {
    /// Reserved.
    pub rsvd0: u8,
    /// [`EventType`].
    pub event_type: u8,
    /// Reserved.
    pub rsvd1: u8,
    /// Detail of the type.
    pub sub_type: u8,
    /// Reserved.
    pub rsvd2: [U32; 7],
    /// What happened to what, by type.
    pub data: [U32; 7],
    /// Reserved.
    pub rsvd3: [u8; 2],
    /// Not used.
    pub signature: u8,
    /// Bit 0 says who owns the entry.
    pub owner: u8,
}

const _: () = {
    assert!(size_of::<Eqe>() == EQE);
    assert!(offset_of!(Eqe, event_type) == 0x01);
    assert!(offset_of!(Eqe, sub_type) == 0x03);
    assert!(offset_of!(Eqe, data) == 0x20);
    assert!(offset_of!(Eqe, signature) == 0x3e);
    assert!(offset_of!(Eqe, owner) == 0x3f);
    assert!(EQE_OWNER_WORD_OFFSET == 0x3c);
};

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Event {
    /// The queue has a completion that was asked for.
    Completion(CqNum),
    /// The queue takes no more completions; the syndrome is 1 for an overrun.
    CqError(CqNum, u8),
    /// The queue pair failed locally.
    QpFatal(QpNum),
    /// The remote end asked for something malformed.
    QpRequestError(QpNum),
    /// The remote end violated access rights.
    QpAccessError(QpNum),
    /// Something about a port changed.
    PortChange {
        /// Which, from 1.
        port: u8,
        /// What.
        change: PortChange,
    },
    /// Commands in the command queue ended: a bit for each slot.
    CommandsDone {
        /// Which.
        slots: u32,
    },
}

/// Details of [`EventType::PortChange`] that this crate knows.
///
/// SPEC: Linux include/linux/mlx5/device.h `MLX5_PORT_CHANGE_SUBTYPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum PortChange {
    /// It carries packets no more.
    Down = 1,
    /// It carries packets.
    Active = 4,
    /// The subnet manager gave it another LID.
    Lid = 6,
    /// Its GUIDs, and so its GIDs, changed.
    Guid = 8,
}

impl PortChange {
    /// Every one.
    pub const ALL: [Self; 4] = [Self::Down, Self::Active, Self::Lid, Self::Guid];
}

/// Syndrome of [`Event::CqError`]: the ring was full.
pub const CQ_OVERRUN: u8 = 1;

/// An event type, or a detail of a port's event, that this crate does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("event type {0:#04x} is unknown")]
pub struct UnknownEvent(pub u8);

impl Event {
    /// Its type.
    #[must_use]
    pub const fn event_type(self) -> EventType {
        match self {
            Self::Completion(_) => EventType::Completion,
            Self::CqError(..) => EventType::CqError,
            Self::QpFatal(_) => EventType::QpFatal,
            Self::QpRequestError(_) => EventType::QpRequestError,
            Self::QpAccessError(_) => EventType::QpAccessError,
            Self::PortChange { .. } => EventType::PortChange,
            Self::CommandsDone { .. } => EventType::CommandsDone,
        }
    }
}

impl Eqe {
    /// The entry that says `event`; its owner byte is 0.
    #[must_use]
    pub fn new(event: Event) -> Self {
        let mut eqe = Self::new_zeroed();
        // CAST: a fieldless enum of representation u8.
        eqe.event_type = event.event_type() as u8;
        match event {
            Event::Completion(cqn) => eqe.data[6] = U32::new(cqn.get()),
            Event::CqError(cqn, syndrome) => {
                eqe.data[0] = U32::new(cqn.get());
                eqe.data[2] = U32::new(syndrome.into());
            }
            // The kind of the queue pair, in data[5], is 0: a queue pair and no other work queue.
            Event::QpFatal(qpn) | Event::QpRequestError(qpn) | Event::QpAccessError(qpn) => {
                eqe.data[6] = U32::new(qpn.get());
            }
            Event::PortChange { port, change } => {
                // CAST: a fieldless enum of representation u8.
                eqe.sub_type = change as u8;
                eqe.data[2] = U32::from_bytes([port << 4, 0, 0, 0]);
            }
            Event::CommandsDone { slots } => eqe.data[0] = U32::new(slots),
        }
        eqe
    }

    /// What the entry says; the caller has checked the owner bit.
    ///
    /// # Errors
    /// The type, if it or the detail that it needs is unknown.
    pub fn event(&self) -> Result<Event, UnknownEvent> {
        let number = |word: U32| word.get() & 0xff_ffff;
        let (cqn, qpn) = (CqNum::new(number(self.data[6])), QpNum::new(number(self.data[6])));
        let known = EventType::ALL.into_iter().find(|known| *known as u8 == self.event_type);
        Ok(match known.ok_or(UnknownEvent(self.event_type))? {
            EventType::Completion => Event::Completion(cqn),
            EventType::CqError => {
                let [.., syndrome] = self.data[2].to_bytes();
                Event::CqError(CqNum::new(number(self.data[0])), syndrome)
            }
            EventType::QpFatal => Event::QpFatal(qpn),
            EventType::QpRequestError => Event::QpRequestError(qpn),
            EventType::QpAccessError => Event::QpAccessError(qpn),
            EventType::PortChange => {
                let [port, ..] = self.data[2].to_bytes();
                let change = PortChange::ALL.into_iter().find(|change| *change as u8 == self.sub_type);
                Event::PortChange { port: port >> 4, change: change.ok_or(UnknownEvent(self.event_type))? }
            }
            EventType::CommandsDone => Event::CommandsDone { slots: self.data[0].get() },
        })
    }

    /// The owner bit.
    #[must_use]
    pub const fn is_owned_by(&self, owner: bool) -> bool {
        (self.owner & 1 == 1) == owner
    }
}

/// What is stored to arm a completion queue: one event for the next completion behind a consumer index.
///
/// ```text
///  00 {rsvd:2 | sn:2 | rsvd:3 | solicited only:1 | ci:24}      the arm word of the CQ's doorbell record, too
///  04 {rsvd:8 | cqn:24}
/// ```
///
/// `sn` counts the events that the driver has taken: a request that the HCA has answered already has an old one.
///
/// SPEC: rdma-core providers/mlx5 `MLX5_CQ_DOORBELL`, `MLX5_CQ_DB_REQ_NOT_SOL`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct CqArm {
    /// Which queue.
    pub cqn: CqNum,
    /// Low 2 bits of the number of events taken.
    pub sn: u8,
    /// Only a solicited or failed completion counts.
    pub solicited_only: bool,
    /// Consumer index, low 24 bits.
    pub ci: u32,
}

impl CqArm {
    /// The arm word of the doorbell record.
    #[must_use]
    pub const fn record_word(self) -> u32 {
        (self.sn as u32 & 3) << 28 | (self.solicited_only as u32) << 24 | self.ci & 0xff_ffff
    }

    /// The request that a record of queue `cqn` holds.
    #[must_use]
    pub const fn from_record_word(cqn: CqNum, word: u32) -> Self {
        // CAST: two bits.
        let sn = (word >> 28 & 3) as u8;
        Self { cqn, sn, solicited_only: word >> 24 & 1 == 1, ci: word & 0xff_ffff }
    }

    /// The bytes for the register, in memory order.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 8] {
        ((self.record_word() as u64) << 32 | self.cqn.get() as u64).to_be_bytes()
    }

    /// The request with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 8]) -> Self {
        let value = u64::from_be_bytes(bytes);
        // CAST: the two halves; the mask leaves 24 bits.
        Self::from_record_word(CqNum::new(value as u32 & 0xff_ffff), (value >> 32) as u32)
    }
}

/// What is stored to an event queue's register.
///
/// ```text
/// | eqn:8 | consumer index:24 |   big-endian
/// ```
///
/// SPEC: Linux drivers/net/ethernet/mellanox/mlx5/core/eq.c `mlx5_eq_update_ci`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EqDoorbell {
    /// Which queue.
    pub eqn: Eqn,
    /// Consumer index, low 24 bits.
    pub ci: u32,
}

impl EqDoorbell {
    /// The bytes for the register, in memory order.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 4] {
        (self.eqn.get() << 24 | self.ci & 0xff_ffff).to_be_bytes()
    }

    /// The doorbell with these bytes.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 4]) -> Self {
        let value = u32::from_be_bytes(bytes);
        Self { eqn: Eqn::new(value >> 24), ci: value & 0xff_ffff }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_bytes_that_the_linux_driver_reads() {
        let bytes = |event| -> [u8; EQE] { zerocopy::transmute!(Eqe::new(event)) };
        let completion = bytes(Event::Completion(CqNum::new(0x12_3456)));
        assert_eq!((completion[1], &completion[0x38..0x3c]), (0, &[0, 0x12, 0x34, 0x56][..]));
        let fatal = bytes(Event::QpFatal(QpNum::new(0x100)));
        assert_eq!((fatal[1], fatal[0x34], &fatal[0x38..0x3c]), (5, 0, &[0, 0, 1, 0][..]));
        let error = bytes(Event::CqError(CqNum::new(7), CQ_OVERRUN));
        assert_eq!((error[1], &error[0x20..0x24], error[0x2b]), (4, &[0, 0, 0, 7][..], 1));
        assert_eq!(bytes(Event::QpRequestError(QpNum::new(1)))[1], 0x10);
        assert_eq!(bytes(Event::QpAccessError(QpNum::new(1)))[1], 0x11);
        let details = PortChange::ALL.map(|change| {
            let port = bytes(Event::PortChange { port: 1, change });
            assert_eq!((port[1], port[0x28]), (9, 0x10));
            port[3]
        });
        assert_eq!(details, [1, 4, 6, 8]);
        let commands = bytes(Event::CommandsDone { slots: 1 });
        assert_eq!((commands[1], &commands[0x20..0x24]), (0x0a, &[0, 0, 0, 1][..]));
    }

    #[test]
    fn events_round_trip_and_others_are_unknown() {
        let (cqn, qpn) = (CqNum::new(0xff_ffff), QpNum::new(0xab_cdef));
        for event in [
            Event::Completion(cqn),
            Event::CqError(cqn, 9),
            Event::QpFatal(qpn),
            Event::QpRequestError(qpn),
            Event::QpAccessError(qpn),
            Event::PortChange { port: 1, change: PortChange::Active },
            Event::PortChange { port: 2, change: PortChange::Guid },
            Event::CommandsDone { slots: 0x8000_0001 },
        ] {
            assert_eq!(Eqe::new(event).event(), Ok(event));
        }
        let page_request = Eqe { event_type: 0x0b, ..Eqe::new(Event::QpFatal(qpn)) };
        assert_eq!(page_request.event(), Err(UnknownEvent(0x0b)));
        let up = Eqe::new(Event::PortChange { port: 1, change: PortChange::Active });
        let reregister = Eqe { sub_type: 9, ..up };
        assert_eq!(reregister.event(), Err(UnknownEvent(9)), "of no concern to us");
    }

    #[test]
    fn a_fresh_queue_belongs_to_nobody_until_it_is_written() {
        let fresh = Eqe { owner: EQE_OWNER_INIT, ..Eqe::new_zeroed() };
        assert!(!fresh.is_owned_by(eqe_owner(0, 2)), "the first pass writes 0");
        assert_eq!([0, 3, 4, 7, 8].map(|at| eqe_owner(at, 2)), [false, false, true, true, false]);
        assert!(!eqe_owner(u32::MAX.wrapping_add(1), 4));
    }

    #[test]
    fn doorbells_have_the_bytes_of_the_drivers() {
        let arm = CqArm { cqn: CqNum::new(0x51), sn: 3, solicited_only: true, ci: 0x100_0002 };
        assert_eq!(arm.to_bytes(), [0x31, 0, 0, 2, 0, 0, 0, 0x51]);
        assert_eq!(CqArm::from_bytes(arm.to_bytes()), CqArm { ci: 2, ..arm });
        let doorbell = EqDoorbell { eqn: Eqn::new(0x14), ci: 0x100_0001 };
        assert_eq!(doorbell.to_bytes(), [0x14, 0, 0, 1]);
        assert_eq!(EqDoorbell::from_bytes(doorbell.to_bytes()), EqDoorbell { ci: 1, ..doorbell });
    }
}
