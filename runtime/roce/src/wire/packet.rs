//! A whole packet: headers, payload, padding.

use super::views::{AethView, AtomicAckEthView, AtomicEthView, BthView, ImmDtView, RethView};
use super::{Aeth, AtomicAckEth, AtomicEth, Bth, Class, ImmDt, Opcode, Part, Reth, WireError};

/// Bytes of the longest headers of one packet: BTH and AtomicETH.
pub const HEADERS_LEN_MAX: usize = BthView::LEN + AtomicEthView::LEN;

/// The extended headers after the BTH; the opcode says which.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extension {
    /// None: most packets of a message.
    None,
    /// The end of a message with immediate data.
    Imm(ImmDt),
    /// The start of a WRITE, and a READ request.
    Reth(Reth),
    /// A WRITE of one packet with immediate data.
    RethImm(Reth, ImmDt),
    /// An acknowledgement, and both ends of READ data.
    Aeth(Aeth),
    /// The answer to an atomic.
    AtomicAck(Aeth, AtomicAckEth),
    /// FETCH_ADD and CMP_SWAP.
    Atomic(AtomicEth),
}

/// Extended headers without their contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Imm,
    Reth,
    RethImm,
    Aeth,
    AtomicAck,
    Atomic,
}

impl Kind {
    /// SPEC: IBTA vol. 1 table 38, column "packet contents following the base transport header".
    const fn of(opcode: Opcode) -> Self {
        match (opcode.class(), opcode.has_imm()) {
            (Class::Write(Part::First | Part::Only), false) | (Class::Read, _) => Self::Reth,
            (Class::Write(Part::First | Part::Only), true) => Self::RethImm,
            (Class::Send(_) | Class::Write(_), true) => Self::Imm,
            (Class::ReadResponse(Part::First | Part::Last | Part::Only) | Class::Ack, _) => Self::Aeth,
            (Class::AtomicAck, _) => Self::AtomicAck,
            (Class::Atomic, _) => Self::Atomic,
            (Class::Send(_) | Class::Write(_) | Class::ReadResponse(Part::Middle), _) => Self::None,
        }
    }
}

impl Extension {
    const fn kind(&self) -> Kind {
        match self {
            Self::None => Kind::None,
            Self::Imm(_) => Kind::Imm,
            Self::Reth(_) => Kind::Reth,
            Self::RethImm(..) => Kind::RethImm,
            Self::Aeth(_) => Kind::Aeth,
            Self::AtomicAck(..) => Kind::AtomicAck,
            Self::Atomic(_) => Kind::Atomic,
        }
    }

    /// The immediate data, if there is any.
    #[must_use]
    pub const fn imm(&self) -> Option<u32> {
        match self {
            Self::Imm(imm) | Self::RethImm(_, imm) => Some(imm.0),
            _ => None,
        }
    }

    /// Bytes of these headers.
    #[must_use]
    pub const fn len(&self) -> usize {
        match self {
            Self::None => 0,
            Self::Imm(_) => ImmDtView::LEN,
            Self::Reth(_) => RethView::LEN,
            Self::RethImm(..) => RethView::LEN + ImmDtView::LEN,
            Self::Aeth(_) => AethView::LEN,
            Self::AtomicAck(..) => AethView::LEN + AtomicAckEthView::LEN,
            Self::Atomic(_) => AtomicEthView::LEN,
        }
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        matches!(self, Self::None)
    }

    fn parse(opcode: Opcode, bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        Ok(match Kind::of(opcode) {
            Kind::None => (Self::None, bytes),
            Kind::Imm => {
                let (imm, rest) = ImmDtView::checked(bytes)?;
                (Self::Imm(ImmDt::parse(imm)), rest)
            }
            Kind::Reth => {
                let (reth, rest) = RethView::checked(bytes)?;
                (Self::Reth(Reth::parse(reth)), rest)
            }
            Kind::RethImm => {
                let (reth, rest) = RethView::checked(bytes)?;
                let (imm, rest) = ImmDtView::checked(rest)?;
                (Self::RethImm(Reth::parse(reth), ImmDt::parse(imm)), rest)
            }
            Kind::Aeth => {
                let (aeth, rest) = AethView::checked(bytes)?;
                (Self::Aeth(Aeth::parse(aeth)?), rest)
            }
            Kind::AtomicAck => {
                let (aeth, rest) = AethView::checked(bytes)?;
                let (ack, rest) = AtomicAckEthView::checked(rest)?;
                (Self::AtomicAck(Aeth::parse(aeth)?, AtomicAckEth::parse(ack)), rest)
            }
            Kind::Atomic => {
                let (eth, rest) = AtomicEthView::checked(bytes)?;
                (Self::Atomic(AtomicEth::parse(eth)), rest)
            }
        })
    }

    fn emit(&self, out: &mut [u8]) -> Result<(), WireError> {
        match self {
            Self::None => {}
            Self::Imm(imm) => imm.emit(ImmDtView::checked_mut(out)?.0),
            Self::Reth(reth) => reth.emit(RethView::checked_mut(out)?.0),
            Self::RethImm(reth, imm) => {
                let (view, rest) = RethView::checked_mut(out)?;
                reth.emit(view);
                imm.emit(ImmDtView::checked_mut(rest)?.0);
            }
            Self::Aeth(aeth) => aeth.emit(AethView::checked_mut(out)?.0),
            Self::AtomicAck(aeth, ack) => {
                let (view, rest) = AethView::checked_mut(out)?;
                aeth.emit(view);
                ack.emit(AtomicAckEthView::checked_mut(rest)?.0);
            }
            Self::Atomic(eth) => eth.emit(AtomicEthView::checked_mut(out)?.0),
        }
        Ok(())
    }
}

/// Everything before a packet's payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Headers {
    /// Base transport header.
    pub bth: Bth,
    /// Extended headers.
    pub ext: Extension,
}

impl Headers {
    /// Bytes of all headers.
    #[must_use]
    pub const fn len(&self) -> usize {
        BthView::LEN + self.ext.len()
    }

    /// Never: there is always a BTH.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Reads the headers at the start of `bytes`; also gives what follows them.
    ///
    /// # Errors
    /// [`WireError`]: what is missing, unknown or reserved.
    pub fn parse(bytes: &[u8]) -> Result<(Self, &[u8]), WireError> {
        let (view, rest) = BthView::checked(bytes)?;
        let bth = Bth::parse(view)?;
        let (ext, rest) = Extension::parse(bth.opcode, rest)?;
        Ok((Self { bth, ext }, rest))
    }

    /// Writes the headers at the start of `out` and says how many bytes they are.
    ///
    /// # Errors
    /// [`WireError::Extension`] if the extended headers are another opcode's, [`WireError::TooShort`].
    pub fn emit(&self, out: &mut [u8]) -> Result<usize, WireError> {
        if self.ext.kind() != Kind::of(self.bth.opcode) {
            return Err(WireError::Extension(self.bth.opcode.byte()));
        }
        let (view, rest) = BthView::checked_mut(out)?;
        self.bth.emit(view);
        self.ext.emit(rest)?;
        Ok(self.len())
    }
}

/// A packet: headers and payload, without the invariant CRC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<'a> {
    /// All headers; the pad count agrees with the payload.
    pub headers: Headers,
    /// Payload without padding.
    pub payload: &'a [u8],
}

impl<'a> Packet<'a> {
    /// A packet with this payload, its pad count set to what the payload needs.
    #[must_use]
    pub const fn new(mut headers: Headers, payload: &'a [u8]) -> Self {
        headers.bth.pad = pad_of(payload.len());
        Self { headers, payload }
    }

    /// Base transport header.
    #[must_use]
    pub const fn bth(&self) -> &Bth {
        &self.headers.bth
    }

    /// Reads a packet: everything from the BTH to the padding, the invariant CRC taken off before.
    ///
    /// # Errors
    /// [`WireError`]: which check failed.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, WireError> {
        let (headers, rest) = Headers::parse(bytes)?;
        let pad = headers.bth.pad;
        let wrong = WireError::Padding { pad, len: rest.len() };
        if rest.len() % 4 != 0 {
            return Err(wrong);
        }
        let len = rest.len().checked_sub(pad.into()).ok_or(wrong)?;
        Ok(Self { headers, payload: &rest[..len] })
    }

    /// Bytes from the BTH to the padding.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.headers.len() + self.payload.len() + pad_of(self.payload.len()) as usize
    }

    /// Never: there is always a BTH.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        false
    }

    /// Writes the packet at the start of `out` and says how many bytes it has.
    ///
    /// # Errors
    /// As [`Headers::emit`], and [`WireError::Padding`] if the pad count is not the payload's.
    pub fn emit(&self, out: &mut [u8]) -> Result<usize, WireError> {
        let (pad, len) = (self.headers.bth.pad, self.len());
        if pad != pad_of(self.payload.len()) {
            return Err(WireError::Padding { pad, len: self.payload.len() });
        }
        let short = WireError::TooShort { what: "packet", len: out.len(), need: len };
        let out = out.get_mut(..len).ok_or(short)?;
        let start = self.headers.emit(out)?;
        let (payload, padding) = out[start..].split_at_mut(self.payload.len());
        payload.copy_from_slice(self.payload);
        padding.fill(0);
        Ok(len)
    }
}

/// Bytes of padding after `len` bytes of payload.
pub(crate) const fn pad_of(len: usize) -> u8 {
    // CAST: below four.
    (len.wrapping_neg() & 3) as u8
}
