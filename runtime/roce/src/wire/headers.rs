//! Transport headers in parsed form: each is read from a view and written to a view.
//!
//! Reserved bits are emitted as zero and ignored on receipt.

use super::views::{AethView, AtomicAckEthView, AtomicEthView, BthView, ImmDtView, RethView, get24, put24};
use super::{Opcode, WireError};
use crate::types::{AtomicOp, Msn, PKey, Psn, QpNum, RemoteAddr, RemoteRange, RnrTimer};

/// Base transport header: the first 12 bytes after UDP in every RoCEv2 packet.
///
/// A `Bth` that exists has a known opcode and transport version 0. The layout is at [`BthView`].
///
/// SPEC: IBTA vol. 1 §9.2; RoCEv2 framing in annex A17.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bth {
    /// What the packet is.
    pub opcode: Opcode,
    /// Ask for an event at the responder.
    pub solicited: bool,
    /// Path migration state; set where paths never migrate.
    pub migrated: bool,
    /// Bytes after the payload that make the length a multiple of four.
    pub pad: u8,
    /// Partition.
    pub pkey: PKey,
    /// Forward congestion notification.
    pub fecn: bool,
    /// Backward congestion notification.
    pub becn: bool,
    /// Queue pair that the packet is for.
    pub dest_qpn: QpNum,
    /// Ask for an acknowledgement.
    pub ack_req: bool,
    /// Sequence number.
    pub psn: Psn,
}

impl Bth {
    const SOLICITED: u8 = 0x80;
    const MIGRATED: u8 = 0x40;
    const FECN: u8 = 0x80;
    const BECN: u8 = 0x40;
    const ACK_REQ: u8 = 0x80;

    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::Opcode`], [`WireError::TransportVersion`].
    pub fn parse(view: &BthView) -> Result<Self, WireError> {
        let version = view.flags & 0x0f;
        if version != 0 {
            return Err(WireError::TransportVersion(version));
        }
        Ok(Self {
            opcode: Opcode::from_byte(view.opcode).ok_or(WireError::Opcode(view.opcode))?,
            solicited: view.flags & Self::SOLICITED != 0,
            migrated: view.flags & Self::MIGRATED != 0,
            pad: view.flags >> 4 & 3,
            pkey: PKey(view.pkey.get()),
            fecn: view.congestion & Self::FECN != 0,
            becn: view.congestion & Self::BECN != 0,
            dest_qpn: QpNum::new(get24(view.dest_qpn)),
            ack_req: view.ack_req & Self::ACK_REQ != 0,
            psn: Psn::new(get24(view.psn)),
        })
    }

    /// Writes the header; of the pad count the low two bits.
    pub fn emit(&self, view: &mut BthView) {
        let bit = |set: bool, mask: u8| if set { mask } else { 0 };
        *view = BthView {
            opcode: self.opcode.byte(),
            flags: bit(self.solicited, Self::SOLICITED)
                | bit(self.migrated, Self::MIGRATED)
                | (self.pad & 3) << 4,
            pkey: self.pkey.0.into(),
            congestion: bit(self.fecn, Self::FECN) | bit(self.becn, Self::BECN),
            dest_qpn: put24(self.dest_qpn.get()),
            ack_req: bit(self.ack_req, Self::ACK_REQ),
            psn: put24(self.psn.get()),
        };
    }
}

/// RDMA extended transport header: where a WRITE goes or a READ comes from, and the message's length.
///
/// The layout is at [`RethView`]. SPEC: IBTA vol. 1 §9.3.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reth(pub RemoteRange);

impl Reth {
    /// Reads a header; every one has a meaning.
    #[must_use]
    pub fn parse(view: &RethView) -> Self {
        let addr = RemoteAddr { va: view.va.get(), rkey: view.rkey.get() };
        Self(RemoteRange { addr, len: view.len.get() })
    }

    /// Writes the header.
    pub fn emit(&self, view: &mut RethView) {
        let RemoteRange { addr: RemoteAddr { va, rkey }, len } = self.0;
        *view = RethView { va: va.into(), rkey: rkey.into(), len: len.into() };
    }
}

/// Why a responder refuses.
///
/// SPEC: IBTA vol. 1 table 46; the numbers are the low five bits of the syndrome.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum NakCode {
    /// A packet before this one is missing.
    PsnSequence = 0,
    /// The request is not a legal one.
    InvalidRequest = 1,
    /// The key does not allow the access.
    RemoteAccess = 2,
    /// The responder could not carry it out.
    RemoteOperation = 3,
    /// The reliable datagram domain is wrong; no reliable connection sends it.
    InvalidRdRequest = 4,
}

impl NakCode {
    /// Every code, by its number.
    pub const ALL: [Self; 5] = [
        Self::PsnSequence,
        Self::InvalidRequest,
        Self::RemoteAccess,
        Self::RemoteOperation,
        Self::InvalidRdRequest,
    ];
}

/// What kind of answer an acknowledgement is.
///
/// SPEC: IBTA vol. 1 table 44: `000ccccc` positive, `001ttttt` receiver not ready, `011ccccc` negative.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Syndrome {
    /// Everything up to this packet is executed.
    Ack {
        /// Credits, 5 bits.
        credits: u8,
    },
    /// No receive is posted: try again after this time.
    Rnr(RnrTimer),
    /// Refused.
    Nak(NakCode),
}

impl Syndrome {
    /// A positive acknowledgement that says nothing about credits.
    pub const ACK: Self = Self::Ack { credits: 0x1f };

    /// The syndrome with this byte, unless it is reserved.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        let low = byte & 0x1f;
        match byte >> 5 {
            0b000 => Some(Self::Ack { credits: low }),
            0b001 => Some(Self::Rnr(RnrTimer::new(low))),
            0b011 => NakCode::ALL.get(usize::from(low)).copied().map(Self::Nak),
            _ => None,
        }
    }

    /// Its byte.
    #[must_use]
    pub const fn byte(self) -> u8 {
        match self {
            Self::Ack { credits } => credits & 0x1f,
            Self::Rnr(timer) => 0b001 << 5 | timer.code(),
            // CAST: a discriminant of this enum.
            Self::Nak(code) => 0b011 << 5 | code as u8,
        }
    }
}

/// Acknowledgement extended transport header.
///
/// The layout is at [`AethView`]. SPEC: IBTA vol. 1 §9.3.5.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aeth {
    /// What kind of answer.
    pub syndrome: Syndrome,
    /// Messages that the responder has completed.
    pub msn: Msn,
}

impl Aeth {
    /// Reads a header.
    ///
    /// # Errors
    /// [`WireError::Syndrome`] if it is a reserved one.
    pub fn parse(view: &AethView) -> Result<Self, WireError> {
        let reserved = WireError::Syndrome(view.syndrome);
        let syndrome = Syndrome::from_byte(view.syndrome).ok_or(reserved)?;
        Ok(Self { syndrome, msn: Msn::new(get24(view.msn)) })
    }

    /// Writes the header.
    pub fn emit(&self, view: &mut AethView) {
        *view = AethView { syndrome: self.syndrome.byte(), msn: put24(self.msn.get()) };
    }
}

/// Atomic extended transport header: the word and the operation's operands.
///
/// The opcode says which operation it is. The layout is at [`AtomicEthView`]. SPEC: IBTA vol. 1 §9.3.4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtomicEth {
    /// The word.
    pub on: RemoteAddr,
    /// New value, or what is added.
    pub swap_add: u64,
    /// Value that the word must have; 0 for FETCH_ADD.
    pub compare: u64,
}

impl AtomicEth {
    /// The header of an operation, and the opcode that goes with it.
    #[must_use]
    pub const fn of(on: RemoteAddr, op: AtomicOp) -> (Opcode, Self) {
        match op {
            AtomicOp::FetchAdd { add } => (Opcode::FetchAdd, Self { on, swap_add: add, compare: 0 }),
            AtomicOp::CmpSwap { swap, compare } => (Opcode::CmpSwap, Self { on, swap_add: swap, compare }),
        }
    }

    /// The operation that `opcode` makes of the operands, if it is an atomic's.
    #[must_use]
    pub const fn op(&self, opcode: Opcode) -> Option<AtomicOp> {
        match opcode {
            Opcode::FetchAdd => Some(AtomicOp::FetchAdd { add: self.swap_add }),
            Opcode::CmpSwap => Some(AtomicOp::CmpSwap { swap: self.swap_add, compare: self.compare }),
            _ => None,
        }
    }

    /// Reads a header; every one has a meaning.
    #[must_use]
    pub fn parse(view: &AtomicEthView) -> Self {
        let on = RemoteAddr { va: view.va.get(), rkey: view.rkey.get() };
        Self { on, swap_add: view.swap_add.get(), compare: view.compare.get() }
    }

    /// Writes the header.
    pub fn emit(&self, view: &mut AtomicEthView) {
        *view = AtomicEthView {
            va: self.on.va.into(),
            rkey: self.on.rkey.into(),
            swap_add: self.swap_add.into(),
            compare: self.compare.into(),
        };
    }
}

/// Atomic acknowledgement extended transport header: what the word was.
///
/// The layout is at [`AtomicAckEthView`]. SPEC: IBTA vol. 1 §9.5.3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AtomicAckEth {
    /// The word before the operation.
    pub original: u64,
}

impl AtomicAckEth {
    /// Reads a header; every one has a meaning.
    #[must_use]
    pub fn parse(view: &AtomicAckEthView) -> Self {
        Self { original: view.original.get() }
    }

    /// Writes the header.
    pub fn emit(&self, view: &mut AtomicAckEthView) {
        view.original = self.original.into();
    }
}

/// Immediate data: four bytes for the receiver's completion.
///
/// The layout is at [`ImmDtView`]. SPEC: IBTA vol. 1 §9.3.6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImmDt(pub u32);

impl ImmDt {
    /// Reads the data; every one has a meaning.
    #[must_use]
    pub fn parse(view: &ImmDtView) -> Self {
        Self(view.imm.get())
    }

    /// Writes the data.
    pub fn emit(&self, view: &mut ImmDtView) {
        view.imm = self.0.into();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_syndrome_byte_is_itself_or_reserved() {
        let mut reserved = 0;
        for byte in 0..=u8::MAX {
            match Syndrome::from_byte(byte) {
                Some(syndrome) => assert_eq!(syndrome.byte(), byte),
                None => reserved += 1,
            }
        }
        // 32 ACKs, 32 RNRs and 5 NAKs have a meaning.
        assert_eq!(reserved, 256 - 69);
        assert_eq!(Syndrome::ACK.byte(), 0x1f);
        assert_eq!(NakCode::ALL.map(|code| Syndrome::Nak(code).byte()), [0x60, 0x61, 0x62, 0x63, 0x64]);
    }

    #[test]
    fn an_atomic_keeps_its_operands() {
        let on = RemoteAddr { va: 8, rkey: 9 };
        for op in [AtomicOp::FetchAdd { add: 7 }, AtomicOp::CmpSwap { swap: 1, compare: 2 }] {
            let (opcode, eth) = AtomicEth::of(on, op);
            assert_eq!((eth.on, eth.op(opcode)), (on, Some(op)));
            assert_eq!(eth.op(Opcode::Ack), None);
        }
    }
}
