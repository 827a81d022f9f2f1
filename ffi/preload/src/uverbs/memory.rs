//! Protection domains, memory regions and address handles.

use std::os::fd::RawFd;

use ibex_abi::types::{Gid, Iova, Mac};
use ibex_hca::{Access, LinkLayer, MemoryKind, MemoryRegion};
use zerocopy::IntoBytes;

use super::abi::{CreateAh, CreateAhAnswer, RegMr, RegMrAnswer};
use super::attrs::{Call, UHW_OUT};
use super::write::{CORE_IN, CORE_OUT};
use super::{Context, Done, Object};
use crate::errno::Errno;
use crate::{user, world};

/// Access flags. SPEC: `enum ib_uverbs_access_flags`.
mod access {
    pub(super) const LOCAL_WRITE: u32 = 1 << 0;
    pub(super) const REMOTE_WRITE: u32 = 1 << 1;
    pub(super) const REMOTE_READ: u32 = 1 << 2;
    pub(super) const REMOTE_ATOMIC: u32 = 1 << 3;
    /// Relaxed ordering and the other rights that may be ignored.
    pub(super) const OPTIONAL: u32 = 0x3ff << 20;
    /// What the device offers.
    pub(super) const OFFERED: u32 = LOCAL_WRITE | REMOTE_WRITE | REMOTE_READ | REMOTE_ATOMIC | OPTIONAL;
}

/// The rights that `flags` name; remote writing includes local writing, as the kernel demands.
fn rights(flags: u32) -> Result<Access, Errno> {
    if flags & !access::OFFERED != 0 {
        return Err(Errno::NOTSUPP);
    }
    let has = |flag| flags & flag != 0;
    if has(access::REMOTE_WRITE | access::REMOTE_ATOMIC) && !has(access::LOCAL_WRITE) {
        return Err(Errno::INVAL);
    }
    Ok(Access {
        local_write: has(access::LOCAL_WRITE),
        remote_write: has(access::REMOTE_WRITE),
        remote_read: has(access::REMOTE_READ),
        remote_atomic: has(access::REMOTE_ATOMIC),
    })
}

impl Context {
    pub(super) fn pd_method(&self, call: &Call) -> Done {
        const DESTROY: u16 = 0;
        const HANDLE: u16 = 0;
        if call.method != DESTROY {
            return Err(Errno::NO_METHOD);
        }
        self.remove(call.number32(HANDLE)?, |object| matches!(object, Object::Pd(_))).map(drop)
    }

    pub(super) fn mr_method(&self, call: &Call) -> Done {
        const DESTROY: u16 = 1;
        const REG_DMABUF: u16 = 4;
        const HANDLE: u16 = 0;
        match call.method {
            DESTROY => {
                self.remove(call.number32(HANDLE)?, |object| matches!(object, Object::Mr(_))).map(drop)
            }
            REG_DMABUF => self.reg_dmabuf_mr(call),
            _ => Err(Errno::NO_METHOD),
        }
    }

    pub(super) fn ah_method(&self, call: &Call) -> Done {
        const DESTROY: u16 = 0;
        const HANDLE: u16 = 0;
        match call.method {
            DESTROY => self.remove(call.number32(HANDLE)?, |object| matches!(object, Object::Ah)).map(drop),
            _ => Err(Errno::NO_METHOD),
        }
    }

    /// An address handle serves to find the Ethernet address behind a GID, as the kernel's neighbour table would.
    pub(super) fn create_ah(&self, call: &Call) -> Done {
        let wanted: CreateAh = call.input_as(CORE_IN)?;
        self.pd(wanted.pd_handle)?;
        let Mac(dmac) = match self.device.port().link {
            LinkLayer::Ib => Mac::default(),
            LinkLayer::Roce if wanted.is_global == 0 => return Err(Errno::INVAL),
            LinkLayer::Roce => {
                let mac = world::existing().and_then(|world| world.mac_of(Gid(wanted.dgid)));
                mac.ok_or(Errno(libc::EHOSTUNREACH))?
            }
        };
        let response_length = size_of::<CreateAhAnswer>() as u32; // CAST: 16.
        call.set_output(UHW_OUT, CreateAhAnswer { response_length, dmac, reserved: [0; 6] }.as_bytes())?;
        call.set_output(CORE_OUT, self.add(Object::Ah).as_bytes())
    }

    pub(super) fn reg_mr(&self, call: &Call) -> Done {
        let wanted: RegMr = call.input_as(CORE_IN)?;
        let rights = rights(wanted.access_flags)?;
        user::check_mapped(wanted.start, wanted.length, rights.local_write)?;
        let memory = MemoryRegion { addr: wanted.start, len: wanted.length, kind: MemoryKind::HostPtr };
        let (handle, key) = self.register(wanted.pd_handle, memory, wanted.hca_va, rights)?;
        call.set_output(CORE_OUT, RegMrAnswer { mr_handle: handle, lkey: key, rkey: key }.as_bytes())
    }

    fn reg_dmabuf_mr(&self, call: &Call) -> Done {
        const HANDLE: u16 = 0;
        const PD: u16 = 1;
        const OFFSET: u16 = 2;
        const LENGTH: u16 = 3;
        const IOVA: u16 = 4;
        const FD: u16 = 5;
        const ACCESS: u16 = 6;
        const LKEY: u16 = 7;
        const RKEY: u16 = 8;
        let rights = rights(call.number32(ACCESS)?)?;
        let fd = RawFd::try_from(call.number32(FD)?).map_err(|_| Errno(libc::EBADF))?;
        let (offset, len) = (call.number(OFFSET)?, call.number(LENGTH)?);
        let memory = MemoryRegion { addr: 0, len, kind: MemoryKind::DmaBuf { fd, offset } };
        let (handle, key) = self.register(call.number32(PD)?, memory, call.number(IOVA)?, rights)?;
        call.set_output(LKEY, key.as_bytes())?;
        call.set_output(RKEY, key.as_bytes())?;
        call.set_number(HANDLE, handle.into())
    }

    /// Registers memory; gives the handle and the key.
    fn register(
        &self,
        pd: u32,
        memory: MemoryRegion,
        iova: u64,
        rights: Access,
    ) -> Result<(u32, u32), Errno> {
        let pd = self.pd(pd)?;
        // SAFETY: the program promises, as it promises the kernel, that the memory stays mapped until the region is
        // destroyed, and that the device may access it until then.
        let key = unsafe { self.hca().register(pd, memory, Iova(iova), rights) }?;
        Ok((self.add(Object::Mr(key)), key.lkey.0))
    }
}
