//! Operation codes of reliable connections, and what each of them means.

/// Which part of its message a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Part {
    /// The first of several packets.
    First,
    /// Neither first nor last.
    Middle,
    /// The last of several packets.
    Last,
    /// The only packet.
    Only,
}

impl Part {
    /// The part that a packet is which starts and ends its message like this.
    #[must_use]
    pub const fn new(starts: bool, ends: bool) -> Self {
        match (starts, ends) {
            (true, true) => Self::Only,
            (true, false) => Self::First,
            (false, false) => Self::Middle,
            (false, true) => Self::Last,
        }
    }

    /// Whether a message starts here.
    #[must_use]
    pub const fn starts(self) -> bool {
        matches!(self, Self::First | Self::Only)
    }

    /// Whether a message ends here.
    #[must_use]
    pub const fn ends(self) -> bool {
        matches!(self, Self::Last | Self::Only)
    }
}

/// What a packet asks for, or answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// SEND: payload for the next receive.
    Send(Part),
    /// RDMA WRITE: payload for an address.
    Write(Part),
    /// RDMA READ request.
    Read,
    /// FETCH_ADD or CMP_SWAP.
    Atomic,
    /// Data of a READ.
    ReadResponse(Part),
    /// Acknowledgement, positive or negative.
    Ack,
    /// The answer to an atomic.
    AtomicAck,
}

impl Class {
    /// Whether it is a request, for a responder; everything else is for a requester.
    #[must_use]
    pub const fn is_request(self) -> bool {
        matches!(self, Self::Send(_) | Self::Write(_) | Self::Read | Self::Atomic)
    }
}

/// Operation code of a packet.
///
/// SPEC: IBTA vol. 1 §9.2.1 table 38, reliable connection (the upper three bits are 0).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "named as the table names them")]
pub enum Opcode {
    SendFirst = 0x00,
    SendMiddle = 0x01,
    SendLast = 0x02,
    SendLastImm = 0x03,
    SendOnly = 0x04,
    SendOnlyImm = 0x05,
    WriteFirst = 0x06,
    WriteMiddle = 0x07,
    WriteLast = 0x08,
    WriteLastImm = 0x09,
    WriteOnly = 0x0a,
    WriteOnlyImm = 0x0b,
    ReadRequest = 0x0c,
    ReadResponseFirst = 0x0d,
    ReadResponseMiddle = 0x0e,
    ReadResponseLast = 0x0f,
    ReadResponseOnly = 0x10,
    Ack = 0x11,
    AtomicAck = 0x12,
    CmpSwap = 0x13,
    FetchAdd = 0x14,
}

impl Opcode {
    /// Every opcode, by its byte.
    pub const ALL: [Self; 21] = [
        Self::SendFirst,
        Self::SendMiddle,
        Self::SendLast,
        Self::SendLastImm,
        Self::SendOnly,
        Self::SendOnlyImm,
        Self::WriteFirst,
        Self::WriteMiddle,
        Self::WriteLast,
        Self::WriteLastImm,
        Self::WriteOnly,
        Self::WriteOnlyImm,
        Self::ReadRequest,
        Self::ReadResponseFirst,
        Self::ReadResponseMiddle,
        Self::ReadResponseLast,
        Self::ReadResponseOnly,
        Self::Ack,
        Self::AtomicAck,
        Self::CmpSwap,
        Self::FetchAdd,
    ];

    /// Its byte on the wire.
    #[must_use]
    pub const fn byte(self) -> u8 {
        // CAST: a discriminant of this enum.
        self as u8
    }

    /// The opcode with this byte.
    #[must_use]
    pub const fn from_byte(byte: u8) -> Option<Self> {
        // CAST: widening in a const fn.
        if (byte as usize) < Self::ALL.len() { Some(Self::ALL[byte as usize]) } else { None }
    }

    /// A SEND packet; immediate data goes with the end of a message only.
    #[must_use]
    pub const fn send(part: Part, has_imm: bool) -> Self {
        match (part, has_imm) {
            (Part::First, _) => Self::SendFirst,
            (Part::Middle, _) => Self::SendMiddle,
            (Part::Last, false) => Self::SendLast,
            (Part::Last, true) => Self::SendLastImm,
            (Part::Only, false) => Self::SendOnly,
            (Part::Only, true) => Self::SendOnlyImm,
        }
    }

    /// A WRITE packet; immediate data goes with the end of a message only.
    #[must_use]
    pub const fn write(part: Part, has_imm: bool) -> Self {
        match (part, has_imm) {
            (Part::First, _) => Self::WriteFirst,
            (Part::Middle, _) => Self::WriteMiddle,
            (Part::Last, false) => Self::WriteLast,
            (Part::Last, true) => Self::WriteLastImm,
            (Part::Only, false) => Self::WriteOnly,
            (Part::Only, true) => Self::WriteOnlyImm,
        }
    }

    /// A packet of READ data.
    #[must_use]
    pub const fn read_response(part: Part) -> Self {
        match part {
            Part::First => Self::ReadResponseFirst,
            Part::Middle => Self::ReadResponseMiddle,
            Part::Last => Self::ReadResponseLast,
            Part::Only => Self::ReadResponseOnly,
        }
    }

    /// What it asks for or answers.
    #[must_use]
    pub const fn class(self) -> Class {
        match self {
            Self::SendFirst => Class::Send(Part::First),
            Self::SendMiddle => Class::Send(Part::Middle),
            Self::SendLast | Self::SendLastImm => Class::Send(Part::Last),
            Self::SendOnly | Self::SendOnlyImm => Class::Send(Part::Only),
            Self::WriteFirst => Class::Write(Part::First),
            Self::WriteMiddle => Class::Write(Part::Middle),
            Self::WriteLast | Self::WriteLastImm => Class::Write(Part::Last),
            Self::WriteOnly | Self::WriteOnlyImm => Class::Write(Part::Only),
            Self::ReadRequest => Class::Read,
            Self::ReadResponseFirst => Class::ReadResponse(Part::First),
            Self::ReadResponseMiddle => Class::ReadResponse(Part::Middle),
            Self::ReadResponseLast => Class::ReadResponse(Part::Last),
            Self::ReadResponseOnly => Class::ReadResponse(Part::Only),
            Self::Ack => Class::Ack,
            Self::AtomicAck => Class::AtomicAck,
            Self::CmpSwap | Self::FetchAdd => Class::Atomic,
        }
    }

    /// Whether immediate data follows.
    #[must_use]
    pub const fn has_imm(self) -> bool {
        matches!(self, Self::SendLastImm | Self::SendOnlyImm | Self::WriteLastImm | Self::WriteOnlyImm)
    }

    /// Whether it is a request, for a responder; everything else is for a requester.
    #[must_use]
    pub const fn is_request(self) -> bool {
        self.class().is_request()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opcodes_and_bytes_are_one() {
        for byte in 0..=u8::MAX {
            let opcode = Opcode::from_byte(byte);
            assert_eq!(opcode.is_some(), byte <= 0x14);
            assert!(opcode.is_none_or(|opcode| opcode.byte() == byte));
        }
    }

    #[test]
    fn class_and_constructor_agree() {
        for opcode in Opcode::ALL {
            let again = match opcode.class() {
                Class::Send(part) => Opcode::send(part, opcode.has_imm()),
                Class::Write(part) => Opcode::write(part, opcode.has_imm()),
                Class::ReadResponse(part) => Opcode::read_response(part),
                _ => opcode,
            };
            assert_eq!(again, opcode);
            let is_answer = (0x0d..=0x12).contains(&opcode.byte());
            assert_eq!(opcode.is_request(), !is_answer);
        }
        for part in [Part::First, Part::Middle, Part::Last, Part::Only] {
            assert_eq!(Part::new(part.starts(), part.ends()), part);
        }
    }
}
