//! Commands that are older than the ioctl: their structures travel in a method of the device.
//!
//! libibverbs sends them so because the kernel takes them so. A command that may also come as a method of its own is
//! answered there only.

use zerocopy::IntoBytes;

use super::attrs::{Call, UHW_OUT};
use super::{Context, Done, Object, device};
use crate::errno::Errno;

/// Attributes. SPEC: `enum uverbs_attrs_invoke_write_cmd_attr_ids`.
pub(super) const CORE_IN: u16 = 0;
pub(super) const CORE_OUT: u16 = 1;
const WRITE_CMD: u16 = 2;

/// Commands. SPEC: `enum ib_uverbs_write_cmds`.
mod command {
    pub(super) const QUERY_DEVICE: u64 = 1;
    pub(super) const ALLOC_PD: u64 = 3;
    pub(super) const CREATE_AH: u64 = 5;
    pub(super) const REG_MR: u64 = 9;
    pub(super) const CREATE_COMP_CHANNEL: u64 = 17;
    pub(super) const QUERY_QP: u64 = 25;
    pub(super) const MODIFY_QP: u64 = 26;
    /// The same numbers with this bit are the extended commands.
    pub(super) const EXTENDED: u64 = 1 << 31;
    pub(super) const EX_QUERY_DEVICE: u64 = EXTENDED | QUERY_DEVICE;
    pub(super) const EX_MODIFY_QP: u64 = EXTENDED | MODIFY_QP;
}

impl Context {
    pub(super) fn invoke_write(&self, call: &Call) -> Done {
        // CAST: commands are numbers of 32 bits.
        match u64::from(call.number(WRITE_CMD)? as u32) {
            command::QUERY_DEVICE => {
                call.set_output(CORE_OUT, device::device_attr(self.device, self.hca().caps()).as_bytes())
            }
            command::EX_QUERY_DEVICE => {
                let attr = device::device_attr_ex(self.device, self.hca().caps());
                call.set_output(CORE_OUT, attr.as_bytes())?;
                call.set_output(UHW_OUT, device::driver_device_attr().as_bytes())
            }
            command::ALLOC_PD => self.alloc_pd(call),
            command::CREATE_AH => self.create_ah(call),
            command::REG_MR => self.reg_mr(call),
            command::CREATE_COMP_CHANNEL => call.set_output(CORE_OUT, self.new_file()?.0.reader().as_bytes()),
            command::MODIFY_QP | command::EX_MODIFY_QP => self.modify_qp(call),
            command::QUERY_QP => self.query_qp(call),
            _ => Err(Errno::NOTSUPP),
        }
    }

    fn alloc_pd(&self, call: &Call) -> Done {
        let pd = self.hca().alloc_pd()?;
        let handle = self.add(Object::Pd(pd));
        call.set_output(CORE_OUT, handle.as_bytes())?;
        call.set_output(UHW_OUT, pd.get().as_bytes())
    }
}
