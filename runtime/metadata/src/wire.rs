//! Protobuf fields, read and written one by one, so that what is unknown is kept verbatim.
//!
//! prost drops fields that its schema does not name; a record must outlive a reader older than its
//! writer, so records have this codec of their own. `proto/record.proto` is the schema, and
//! `tests/encoding.rs` holds both codecs to each other.
//!
//! Reading never panics and never allocates more than the input: lengths are checked before use.

use crate::error::{DecodeError, Part, Problem};

/// Largest field number of protobuf.
const FIELD_NUMBER_MAX: u64 = (1 << 29) - 1;
/// Bytes of the longest varint.
const VARINT_LEN_MAX: usize = 10;

/// Fields that this build does not know, in the order in which they came, as they came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnknownFields(Vec<u8>);

impl UnknownFields {
    /// Takes bytes that were kept elsewhere.
    ///
    /// # Errors
    /// Bytes that are not a sequence of whole fields.
    #[cfg(feature = "k8s")]
    pub(crate) fn from_bytes(bytes: Vec<u8>) -> Result<Self, DecodeError> {
        let mut rest = bytes.as_slice();
        while !rest.is_empty() {
            rest = Field::read(Part::Row, rest)?.1;
        }
        Ok(Self(bytes))
    }

    /// The bytes: a sequence of whole protobuf fields.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A structure that is one protobuf message.
pub(crate) trait Message: Default {
    /// As errors name it.
    const PART: Part;

    /// Takes one field; `false` if the number is not known.
    fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError>;

    /// Writes the known fields in ascending order of their numbers.
    fn write(&self, out: &mut Writer);

    /// Where unknown fields are kept.
    fn unknown(&self) -> &UnknownFields;

    /// Where unknown fields are kept.
    fn unknown_mut(&mut self) -> &mut UnknownFields;
}

/// Reads one message; the whole input belongs to it.
pub(crate) fn decode<M: Message>(bytes: &[u8]) -> Result<M, DecodeError> {
    let mut message = M::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        let (field, after) = Field::read(M::PART, rest)?;
        if !message.field(&field)? {
            message.unknown_mut().0.extend_from_slice(field.raw);
        }
        rest = after;
    }
    Ok(message)
}

/// Writes one message: known fields, then the unknown ones.
pub(crate) fn encode<M: Message>(message: &M) -> Vec<u8> {
    let mut out = Writer::default();
    message.write(&mut out);
    out.bytes.extend_from_slice(message.unknown().as_bytes());
    out.bytes
}

#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    Varint(u64),
    Fixed64,
    Bytes(&'a [u8]),
    Fixed32,
}

/// One field of a message.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Field<'a> {
    part: Part,
    pub(crate) number: u32,
    value: Value<'a>,
    /// Key and value as they stand in the message.
    raw: &'a [u8],
}

impl<'a> Field<'a> {
    fn read(part: Part, bytes: &'a [u8]) -> Result<(Self, &'a [u8]), DecodeError> {
        let fail = |field, problem| DecodeError { part, field, problem };
        let (key, rest) = varint(bytes).map_err(|problem| fail(0, problem))?;
        let number = key >> 3;
        if number == 0 || number > FIELD_NUMBER_MAX {
            return Err(fail(0, Problem::FieldNumber));
        }
        // CAST: at most 29 bits, checked above.
        let number = number as u32;
        let (value, rest) = match key & 7 {
            0 => varint(rest).map(|(value, rest)| (Value::Varint(value), rest)),
            1 => take(rest, 8).map(|(_, rest)| (Value::Fixed64, rest)),
            2 => varint(rest)
                .and_then(|(len, rest)| take(rest, len))
                .map(|(bytes, rest)| (Value::Bytes(bytes), rest)),
            5 => take(rest, 4).map(|(_, rest)| (Value::Fixed32, rest)),
            // CAST: three bits.
            other => Err(Problem::WireType { found: other as u32 }),
        }
        .map_err(|problem| fail(number, problem))?;
        let raw = &bytes[..bytes.len() - rest.len()];
        Ok((Self { part, number, value, raw }, rest))
    }

    /// An error about this field.
    pub(crate) fn error(&self, problem: Problem) -> DecodeError {
        DecodeError { part: self.part, field: self.number, problem }
    }

    fn wrong_type(&self) -> DecodeError {
        let found = match self.value {
            Value::Varint(_) => 0,
            Value::Fixed64 => 1,
            Value::Bytes(_) => 2,
            Value::Fixed32 => 5,
        };
        self.error(Problem::WireType { found })
    }

    pub(crate) fn u64(&self) -> Result<u64, DecodeError> {
        match self.value {
            Value::Varint(value) => Ok(value),
            _ => Err(self.wrong_type()),
        }
    }

    /// A number of a smaller type; what does not fit is refused, never cut.
    pub(crate) fn number<N: TryFrom<u64> + Bound>(&self) -> Result<N, DecodeError> {
        let value = self.u64()?;
        N::try_from(value).map_err(|_| self.error(Problem::Range { value, max: N::MAX }))
    }

    pub(crate) fn bytes(&self, len_max: usize) -> Result<&'a [u8], DecodeError> {
        match self.value {
            Value::Bytes(bytes) if bytes.len() <= len_max => Ok(bytes),
            Value::Bytes(bytes) => Err(self.too_many(bytes.len(), len_max)),
            _ => Err(self.wrong_type()),
        }
    }

    pub(crate) fn array<const N: usize>(&self) -> Result<[u8; N], DecodeError> {
        let bytes = self.bytes(usize::MAX)?;
        let problem = Problem::Length { found: bytes.len() as u64, expected: N as u64 };
        bytes.try_into().map_err(|_| self.error(problem))
    }

    pub(crate) fn text(&self, len_max: usize) -> Result<String, DecodeError> {
        let bytes = self.bytes(len_max)?;
        let text = std::str::from_utf8(bytes).map_err(|_| self.error(Problem::Utf8))?;
        Ok(text.to_owned())
    }

    pub(crate) fn message<M: Message>(&self) -> Result<M, DecodeError> {
        decode(self.bytes(usize::MAX)?)
    }

    /// Appends one element, or the packed elements, of a repeated number.
    pub(crate) fn push_u32(&self, list: &mut Vec<u32>, count_max: usize) -> Result<(), DecodeError> {
        let mut push = |value: u64| {
            if list.len() == count_max {
                return Err(self.too_many(count_max + 1, count_max));
            }
            let problem = Problem::Range { value, max: u32::MAX.into() };
            list.push(u32::try_from(value).map_err(|_| self.error(problem))?);
            Ok(())
        };
        let Value::Bytes(mut packed) = self.value else {
            return push(self.u64()?);
        };
        while !packed.is_empty() {
            let (value, rest) = varint(packed).map_err(|problem| self.error(problem))?;
            push(value)?;
            packed = rest;
        }
        Ok(())
    }

    /// Appends one element of a repeated message.
    pub(crate) fn push<M: Message>(&self, list: &mut Vec<M>, count_max: usize) -> Result<(), DecodeError> {
        if list.len() == count_max {
            return Err(self.too_many(count_max + 1, count_max));
        }
        list.push(self.message()?);
        Ok(())
    }

    fn too_many(&self, count: usize, max: usize) -> DecodeError {
        self.error(Problem::TooMany { count: count as u64, max: max as u64 })
    }
}

/// The largest value of a number type, for refusals.
pub(crate) trait Bound {
    const MAX: u64;
}

impl Bound for u8 {
    const MAX: u64 = u8::MAX as u64;
}
impl Bound for u16 {
    const MAX: u64 = u16::MAX as u64;
}
impl Bound for u32 {
    const MAX: u64 = u32::MAX as u64;
}

fn take(bytes: &[u8], len: u64) -> Result<(&[u8], &[u8]), Problem> {
    let len = usize::try_from(len).map_err(|_| Problem::Truncated)?;
    bytes.split_at_checked(len).ok_or(Problem::Truncated)
}

fn varint(bytes: &[u8]) -> Result<(u64, &[u8]), Problem> {
    let mut value = 0u64;
    for (i, &byte) in bytes.iter().take(VARINT_LEN_MAX).enumerate() {
        let bits = u64::from(byte & 0x7f);
        // The tenth byte carries the one bit that is left.
        if i == VARINT_LEN_MAX - 1 && bits > 1 {
            return Err(Problem::Varint);
        }
        value |= bits << (7 * i);
        if byte & 0x80 == 0 {
            return Ok((value, &bytes[i + 1..]));
        }
    }
    Err(if bytes.len() < VARINT_LEN_MAX { Problem::Truncated } else { Problem::Varint })
}

/// Builds one message. Values that protobuf takes as the default are left out, as proto3 says.
#[derive(Debug, Default)]
pub(crate) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            // CAST: seven bits and the continuation bit.
            self.bytes.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        // CAST: below 0x80.
        self.bytes.push(value as u8);
    }

    fn key(&mut self, number: u32, wire_type: u64) {
        self.varint(u64::from(number) << 3 | wire_type);
    }

    /// A number; 0 is left out.
    pub(crate) fn u64(&mut self, number: u32, value: impl Into<u64>) {
        let value = value.into();
        if value != 0 {
            self.optional(number, Some(value));
        }
    }

    /// A number that may be 0 and may be absent.
    pub(crate) fn optional(&mut self, number: u32, value: Option<impl Into<u64>>) {
        if let Some(value) = value {
            self.key(number, 0);
            self.varint(value.into());
        }
    }

    /// Bytes or text; empty is left out.
    pub(crate) fn bytes(&mut self, number: u32, value: impl AsRef<[u8]>) {
        if !value.as_ref().is_empty() {
            self.present(number, value);
        }
    }

    /// Bytes or text, empty too: presence means something.
    pub(crate) fn present(&mut self, number: u32, value: impl AsRef<[u8]>) {
        let value = value.as_ref();
        self.key(number, 2);
        self.varint(value.len() as u64);
        self.bytes.extend_from_slice(value);
    }

    /// What was written.
    pub(crate) fn finish(self) -> Vec<u8> {
        self.bytes
    }

    /// A message inside a message.
    pub(crate) fn message<M: Message>(&mut self, number: u32, message: &M) {
        self.present(number, encode(message));
    }

    /// A list of messages.
    pub(crate) fn messages<M: Message>(&mut self, number: u32, messages: &[M]) {
        for message in messages {
            self.message(number, message);
        }
    }

    /// A packed list of numbers; an empty one is left out.
    pub(crate) fn packed(&mut self, number: u32, values: &[u32]) {
        let mut packed = Self::default();
        for &value in values {
            packed.varint(value.into());
        }
        self.bytes(number, packed.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default, PartialEq)]
    struct Sample {
        number: u64,
        list: Vec<u32>,
        unknown: UnknownFields,
    }

    impl Message for Sample {
        const PART: Part = Part::Row;

        fn field(&mut self, field: &Field<'_>) -> Result<bool, DecodeError> {
            match field.number {
                1 => self.number = field.u64()?,
                2 => field.push_u32(&mut self.list, 3)?,
                _ => return Ok(false),
            }
            Ok(true)
        }

        fn write(&self, out: &mut Writer) {
            out.u64(1, self.number);
            out.packed(2, &self.list);
        }

        fn unknown(&self) -> &UnknownFields {
            &self.unknown
        }

        fn unknown_mut(&mut self) -> &mut UnknownFields {
            &mut self.unknown
        }
    }

    fn problem(bytes: &[u8]) -> Problem {
        decode::<Sample>(bytes).unwrap_err().problem
    }

    #[test]
    fn numbers_of_every_length_come_back() {
        for shift in 0..64 {
            for number in [1u64 << shift, (1u64 << shift) - 1, u64::MAX >> shift] {
                let sample = Sample { number, ..Sample::default() };
                assert_eq!(decode::<Sample>(&encode(&sample)).unwrap(), sample);
            }
        }
    }

    #[test]
    fn packed_and_single_elements_mix() {
        let sample: Sample = decode(&[0x12, 2, 7, 8, 0x10, 9]).unwrap();
        assert_eq!(sample.list, [7, 8, 9]);
        assert_eq!(problem(&[0x12, 4, 1, 1, 1, 1]), Problem::TooMany { count: 4, max: 3 });
    }

    #[test]
    fn unknown_fields_of_every_type_are_kept_verbatim() {
        let unknown: &[u8] = &[
            0x18, 0x81, 0x00, // varint, not in its shortest form
            0x21, 1, 2, 3, 4, 5, 6, 7, 8, // fixed64
            0x2a, 2, 0xff, 0xfe, // bytes
            0x35, 1, 2, 3, 4, // fixed32
        ];
        let bytes = [&[0x08, 5], unknown].concat();
        let sample: Sample = decode(&bytes).unwrap();
        assert_eq!(sample.unknown.as_bytes(), unknown);
        assert_eq!(encode(&sample), bytes);
    }

    #[test]
    fn malformed_bytes_are_typed_errors() {
        assert_eq!(problem(&[0x08]), Problem::Truncated);
        assert_eq!(problem(&[0x08, 0x80]), Problem::Truncated);
        assert_eq!(problem(&[0x12, 5, 1]), Problem::Truncated);
        assert_eq!(problem(&[0x21, 1, 2]), Problem::Truncated);
        assert_eq!(problem(&[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2]), Problem::Varint);
        assert_eq!(problem(&[0x08, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1]), Problem::Varint);
        assert_eq!(problem(&[0x00, 1]), Problem::FieldNumber);
        assert_eq!(problem(&[0x0b]), Problem::WireType { found: 3 });
        assert_eq!(problem(&[0x0a, 0]), Problem::WireType { found: 2 });
        let too_long = [0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1];
        assert_eq!(problem(&too_long), Problem::Truncated);
        assert_eq!(
            problem(&[0x10, 0x80, 0x80, 0x80, 0x80, 0x10]),
            Problem::Range { value: 1 << 32, max: u32::MAX.into() }
        );
    }
}
