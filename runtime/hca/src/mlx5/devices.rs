//! The mlx5 devices of this machine: found, opened, described.
//!
//! A [`DeviceList`] owns libibverbs' list, an [`Opened`] a device context. A context needs no list once it is open.

use std::ffi::{CStr, c_char};
use std::io;
use std::mem::MaybeUninit;
use std::sync::Arc;

use ibex_abi::types::{Lid, PathMtu};
use ibex_mlx5dv_sys::{self as sys, Library, LoadError};

use crate::LinkLayer;

/// A device is opened for commands of our own (`MLX5DV_CONTEXT_FLAGS_DEVX` of mlx5dv.h).
const FLAGS_DEVX: u32 = 1;
/// Most ports of a device.
const PORTS_MAX: u8 = 2;

/// What a device says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Its name, "mlx5_0".
    pub name: String,
    /// It can be opened with DevX; otherwise the error number of the attempt.
    pub devx: Result<(), i32>,
    /// Firmware version.
    pub firmware: String,
    /// Exponent of its own part of an acknowledgement's delay: 4.096 us x 2^t.
    pub ack_delay: u8,
    /// Its ports, from number 1.
    pub ports: Vec<PortReport>,
}

/// What a device says of one of its ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct PortReport {
    /// From 1.
    pub number: u8,
    /// State.
    pub state: PortState,
    /// Link layer.
    pub link: LinkLayer,
    /// Path MTU in force.
    pub active_mtu: PathMtu,
    /// Local identifier; zero on Ethernet.
    pub lid: Lid,
    /// Entries of its GID table.
    pub num_gids: u16,
}

/// State of a port.
///
/// SPEC: verbs.h `ibv_port_state`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PortState {
    /// No link.
    Down,
    /// A link, and no subnet manager yet.
    Init,
    /// The subnet manager is at work.
    Armed,
    /// It carries packets.
    Active,
    /// Anything else.
    Other,
}

/// Describes every mlx5 device that this process can see.
///
/// # Errors
/// The libraries cannot be loaded. A machine without the kernel's RDMA support has no devices.
pub fn devices() -> Result<Vec<DeviceInfo>, LoadError> {
    let library = Arc::new(Library::load()?);
    let list = DeviceList::read(&library);
    let mut found: Vec<DeviceInfo> = list.mlx5().map(|device| describe(&library, device)).collect();
    found.sort_by(|one, other| by_number(&one.name).cmp(&by_number(&other.name)));
    Ok(found)
}

/// How names are ordered: `mlx5_2` before `mlx5_10`. The library lists devices as the kernel's directory does, which
/// is in no order at all.
pub(super) fn by_number(name: &str) -> (&str, u64) {
    let stem = name.trim_end_matches(|last: char| last.is_ascii_digit());
    (stem, name[stem.len()..].parse().unwrap_or(0))
}

fn describe(library: &Arc<Library>, device: *mut sys::ibv_device) -> DeviceInfo {
    let name = name_of(library, device);
    let mut info =
        DeviceInfo { name, devx: Ok(()), firmware: String::new(), ack_delay: 0, ports: Vec::new() };
    let opened = match Opened::open(library, device) {
        Ok(opened) => opened,
        Err(error) => return DeviceInfo { devx: Err(errno(&error)), ..info },
    };
    if let Ok(attr) = opened.query_device() {
        info.firmware = text(&attr.fw_ver);
        info.ack_delay = attr.local_ca_ack_delay;
        let numbers = 1..=attr.phys_port_cnt.min(PORTS_MAX);
        info.ports = numbers.filter_map(|number| opened.query_port(number).ok()).collect();
    }
    info
}

/// The list of RDMA devices, as libibverbs gives it.
pub(super) struct DeviceList {
    library: Arc<Library>,
    list: *mut *mut sys::ibv_device,
    len: usize,
}

impl DeviceList {
    /// Reads the list; it is empty where the kernel has no RDMA support.
    pub(super) fn read(library: &Arc<Library>) -> Self {
        let mut len = 0;
        // SAFETY: the pointer is to a writable integer; the list is freed on drop.
        let list = unsafe { library.ibv_get_device_list(&mut len) };
        let len = if list.is_null() { 0 } else { usize::try_from(len).unwrap_or(0) };
        Self { library: Arc::clone(library), list, len }
    }

    /// The devices that libmlx5 drives.
    pub(super) fn mlx5(&self) -> impl Iterator<Item = *mut sys::ibv_device> + '_ {
        let all = (0..self.len).map(|idx| {
            // SAFETY: the list holds `len` devices for as long as it lives.
            unsafe { *self.list.add(idx) }
        });
        // SAFETY: a device of the live list.
        all.filter(|&device| unsafe { self.library.mlx5dv_is_supported(device) })
    }
}

impl Drop for DeviceList {
    fn drop(&mut self) {
        if !self.list.is_null() {
            // SAFETY: came from ibv_get_device_list; no device of it is used after this.
            unsafe { self.library.ibv_free_device_list(self.list) };
        }
    }
}

/// The name of a device of a live list.
pub(super) fn name_of(library: &Library, device: *mut sys::ibv_device) -> String {
    // SAFETY: the device belongs to a live list, which keeps the name.
    let name = unsafe { library.ibv_get_device_name(device) };
    if name.is_null() {
        return String::new();
    }
    // SAFETY: a text that ends in zero.
    unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned()
}

/// A device that is open for commands of our own.
#[derive(Debug)]
pub(super) struct Opened {
    library: Arc<Library>,
    context: *mut sys::ibv_context,
}

// SAFETY: libibverbs allows calls on one context from any thread; the pointer is closed once, on drop.
unsafe impl Send for Opened {}
// SAFETY: as above.
unsafe impl Sync for Opened {}

impl Opened {
    /// Opens a device of a live list.
    pub(super) fn open(library: &Arc<Library>, device: *mut sys::ibv_device) -> Result<Self, io::Error> {
        let mut attr = sys::mlx5dv_context_attr { flags: FLAGS_DEVX, comp_mask: 0 };
        // SAFETY: a device of a live list, and attributes that are read during the call.
        let context = unsafe { library.mlx5dv_open_device(device, &mut attr) };
        match context.is_null() {
            true => Err(io::Error::last_os_error()),
            false => Ok(Self { library: Arc::clone(library), context }),
        }
    }

    pub(super) fn library(&self) -> &Arc<Library> {
        &self.library
    }

    pub(super) const fn context(&self) -> *mut sys::ibv_context {
        self.context
    }

    /// The descriptor of verbs' events.
    pub(super) fn async_fd(&self) -> i32 {
        // SAFETY: an open context, whose descriptor does not change.
        unsafe { (*self.context).async_fd }
    }

    /// Completion vectors of the device.
    pub(super) fn num_vectors(&self) -> u32 {
        // SAFETY: an open context, whose number of vectors does not change.
        u32::try_from(unsafe { (*self.context).num_comp_vectors }).unwrap_or(0)
    }

    pub(super) fn query_device(&self) -> Result<sys::ibv_device_attr, io::Error> {
        let mut attr = MaybeUninit::zeroed();
        // SAFETY: an open context, and room for the attributes.
        let code = unsafe { self.library.ibv_query_device(self.context, attr.as_mut_ptr()) };
        answered(code)?;
        // SAFETY: plain numbers, all of them valid when zero, and filled by a call that succeeded.
        Ok(unsafe { attr.assume_init() })
    }

    pub(super) fn query_port(&self, number: u8) -> Result<PortReport, io::Error> {
        let mut attr = MaybeUninit::<sys::ibv_port_attr>::zeroed();
        // SAFETY: an open context, and room for the attributes; the older caller's structure ends at `link_layer`.
        let code = unsafe { self.library.ibv_query_port(self.context, number, attr.as_mut_ptr().cast()) };
        answered(code)?;
        // SAFETY: plain numbers, all of them valid when zero, and filled by a call that succeeded.
        let attr = unsafe { attr.assume_init() };
        Ok(PortReport {
            number,
            state: match attr.state {
                sys::IBV_PORT_DOWN => PortState::Down,
                sys::IBV_PORT_INIT => PortState::Init,
                sys::IBV_PORT_ARMED => PortState::Armed,
                sys::IBV_PORT_ACTIVE => PortState::Active,
                _ => PortState::Other,
            },
            link: match u32::from(attr.link_layer) {
                sys::IBV_LINK_LAYER_ETHERNET => LinkLayer::Roce,
                _ => LinkLayer::Ib,
            },
            active_mtu: PathMtu::from_code(attr.active_mtu.into()).unwrap_or(PathMtu::B256),
            lid: Lid(attr.lid),
            num_gids: u16::try_from(attr.gid_tbl_len).unwrap_or(0),
        })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once; whatever was made in it holds a reference to this guard.
        unsafe { self.library.ibv_close_device(self.context) };
    }
}

/// The answer of a call that gives 0 or an error number.
pub(super) fn answered(code: i32) -> Result<(), io::Error> {
    match code {
        0 => Ok(()),
        code if code > 0 => Err(io::Error::from_raw_os_error(code)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The error number of a failed call; EIO where it left none.
pub(super) fn errno(error: &io::Error) -> i32 {
    error.raw_os_error().filter(|&code| code != 0).unwrap_or(libc::EIO)
}

/// The text before the first zero byte.
fn text(bytes: &[c_char]) -> String {
    // CAST: the same bits; characters are bytes.
    let bytes: Vec<u8> = bytes.iter().map(|&byte| byte as u8).take_while(|&byte| byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_devices_has_an_empty_list_or_says_what_to_install() {
        match devices() {
            Ok(devices) => assert!(devices.iter().all(|device| !device.name.is_empty())),
            Err(error) => assert!(error.to_string().contains("ibverbs-providers"), "{error}"),
        }
    }

    #[test]
    fn devices_are_ordered_by_their_number() {
        let mut names = ["mlx5_10", "rocep1", "mlx5_bond_0", "mlx5_2", "mlx5", "mlx5_0"];
        names.sort_by(|one, other| by_number(one).cmp(&by_number(other)));
        assert_eq!(names, ["mlx5", "mlx5_0", "mlx5_2", "mlx5_10", "mlx5_bond_0", "rocep1"]);
    }

    #[test]
    fn answers_of_both_conventions_are_errors() {
        assert!(answered(0).is_ok());
        assert_eq!(errno(&answered(22).unwrap_err()), 22);
        assert!(answered(-1).is_err());
        assert_eq!(text(&[109, 53, 0, 7]), "m5");
    }
}
