//! One `RDMA_VERBS_IOCTL`: a method of an object, and its attributes.
//!
//! ```text
//!  00 length:16 object_id:16 method_id:16 num_attrs:16   08 reserved:64   10 driver_id:32 reserved:32
//!  18 + 10 n: attr_id:16 len:16 flags:16 reserved:16, data:64
//! ```
//!
//! `data` is a handle, a descriptor, up to 8 bytes of input, or the address of input or of room for output.
//! SPEC: rdma_user_ioctl_cmds.h `ib_uverbs_ioctl_hdr`, `ib_uverbs_attr`.
//!
//! *Who owns what.* Header and attributes are the program's; the call borrows them for as long as the ioctl takes.

use std::os::fd::RawFd;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::errno::Errno;
use crate::user;

/// Attributes of one call at most.
const ATTRS_MAX: u16 = 128;
/// The attribute is an output that was written.
const VALID_OUTPUT: u16 = 1 << 1;
/// Input of the driver, and room for its output.
pub(crate) const UHW_IN: u16 = 0x1000;
pub(crate) const UHW_OUT: u16 = 0x1001;

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    length: u16,
    object_id: u16,
    method_id: u16,
    num_attrs: u16,
    reserved1: u64,
    driver_id: u32,
    reserved2: u32,
}

#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Attr {
    attr_id: u16,
    len: u16,
    flags: u16,
    reserved: u16,
    data: u64,
}

const _: () = assert!(size_of::<Header>() == 24 && size_of::<Attr>() == 16);

/// A call being answered.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) object: u16,
    pub(crate) method: u16,
    /// Address of the first attribute.
    base: u64,
    attrs: Vec<Attr>,
}

impl Call {
    /// Reads header and attributes.
    ///
    /// # Safety
    /// `addr` is the argument of an `RDMA_VERBS_IOCTL`; the program vouches for all that it leads to, until the ioctl
    /// returns.
    pub(crate) unsafe fn read(addr: u64) -> Result<Self, Errno> {
        // SAFETY: the caller's contract.
        let header = unsafe { user::read(addr, size_of::<Header>()) }?;
        let header = Header::read_from_bytes(&header).map_err(|_| Errno::INVAL)?;
        let len = size_of::<Header>() + usize::from(header.num_attrs) * size_of::<Attr>();
        if header.num_attrs > ATTRS_MAX || usize::from(header.length) != len {
            return Err(Errno::INVAL);
        }
        let base = addr + size_of::<Header>() as u64;
        // SAFETY: as above; the length is the one that the program gave.
        let bytes = unsafe { user::read(base, len - size_of::<Header>()) }?;
        let attrs = bytes.chunks_exact(size_of::<Attr>()).map(Attr::read_from_bytes);
        let attrs = attrs.collect::<Result<_, _>>().map_err(|_| Errno::INVAL)?;
        Ok(Self { object: header.object_id, method: header.method_id, base, attrs })
    }

    fn find(&self, id: u16) -> Option<(usize, &Attr)> {
        self.attrs.iter().enumerate().find(|(_, attr)| attr.attr_id == id)
    }

    /// Whether the call has this attribute.
    pub(crate) fn has(&self, id: u16) -> bool {
        self.find(id).is_some()
    }

    /// A number, handle or constant.
    pub(crate) fn number(&self, id: u16) -> Result<u64, Errno> {
        self.find(id).map(|(_, attr)| attr.data).ok_or(Errno::INVAL)
    }

    /// A number of at most 32 bits; what stands above them is not looked at.
    pub(crate) fn number32(&self, id: u16) -> Result<u32, Errno> {
        // CAST: the low half is meant.
        self.number(id).map(|number| number as u32)
    }

    /// A descriptor.
    pub(crate) fn fd(&self, id: u16) -> Result<RawFd, Errno> {
        RawFd::try_from(self.number(id)?.cast_signed()).map_err(|_| Errno(libc::EBADF))
    }

    /// Input bytes; none if the attribute is not there.
    pub(crate) fn input(&self, id: u16) -> Result<Vec<u8>, Errno> {
        let Some((_, attr)) = self.find(id) else { return Ok(Vec::new()) };
        let len = usize::from(attr.len);
        if len <= size_of::<u64>() {
            return Ok(attr.data.as_bytes()[..len].to_vec());
        }
        // SAFETY: the contract of `read`: the program vouches for its attributes.
        unsafe { user::read(attr.data, len) }
    }

    /// Input as a structure; fields that an older caller does not know are zero.
    pub(crate) fn input_as<T: FromBytes + IntoBytes + KnownLayout>(&self, id: u16) -> Result<T, Errno> {
        let bytes = self.input(id)?;
        let mut value = T::new_zeroed();
        let room = value.as_mut_bytes();
        let len = room.len().min(bytes.len());
        room[..len].copy_from_slice(&bytes[..len]);
        Ok(value)
    }

    /// Bytes of room that an output has; none if it is not wanted.
    pub(crate) fn room(&self, id: u16) -> usize {
        self.find(id).map_or(0, |(_, attr)| usize::from(attr.len))
    }

    /// Answers with as many bytes as there is room for, and zeros in the rest of it. An output that is not wanted is
    /// left out.
    pub(crate) fn set_output(&self, id: u16, bytes: &[u8]) -> Result<(), Errno> {
        let Some((idx, attr)) = self.find(id) else { return Ok(()) };
        let mut answer = vec![0; usize::from(attr.len)];
        let len = answer.len().min(bytes.len());
        answer[..len].copy_from_slice(&bytes[..len]);
        // SAFETY: the contract of `read`.
        unsafe { user::write(attr.data, &answer) }?;
        self.write_attr(idx, Attr { flags: attr.flags | VALID_OUTPUT, ..*attr })
    }

    /// Answers with a handle or a descriptor.
    pub(crate) fn set_number(&self, id: u16, number: u64) -> Result<(), Errno> {
        let (idx, attr) = self.find(id).ok_or(Errno::INVAL)?;
        self.write_attr(idx, Attr { data: number, ..*attr })
    }

    fn write_attr(&self, idx: usize, attr: Attr) -> Result<(), Errno> {
        let addr = self.base + (idx * size_of::<Attr>()) as u64;
        // SAFETY: the contract of `read`: the attribute that was read from there.
        unsafe { user::write(addr, attr.as_bytes()) }
    }
}
