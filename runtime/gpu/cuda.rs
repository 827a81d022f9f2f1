//! GPUs by the CUDA driver, which is loaded at run time: what it offers, and [`CudaGpu`], which runs kernels on it.
//!
//! A [`Driver`] owns the handle of `libcuda.so.1` and nothing of any GPU: it makes no context and allocates nothing, so
//! asking disturbs nobody. Where there is no driver, or one that lacks a function, the answer is a typed error.
//!
//! ```text
//!  CudaGpu (gpu.rs) ---- streams, events, graphs, launches ----+
//!     |  memory.rs  what is allocated, copies, ways of NICs    |
//!     |  registered.rs  pages of devices that kernels reach    |
//!     |  copies.rs, gate.rs  plain copies, timed; a common start|
//!     |  vmm.rs     pages and addresses, apart                 |
//!     |  peer.rs    handles between processes, dma-buf         v
//!     +----------------------------------------------> context.rs ---> calls.rs ---> libcuda.so.1
//!                                                      owners of handles   one checked method per call
//! ```
//!
//! INVARIANT: a [`Driver`] that exists was initialised (`cuInit` succeeded) and has every function it names.
#![expect(unsafe_code, reason = "calls into the driver's library, which is loaded at run time")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_uint};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use libloading::Library;

use super::image;
use calls::{Calls, RawDevice, check};

mod calls;
mod context;
mod copies;
mod gate;
mod gpu;
mod memory;
mod peer;
mod registered;
mod vmm;

pub use calls::CallError;
pub use copies::DeviceCopies;
pub use gate::Gate;
pub use gpu::{CudaGpu, CudaMemory, CudaOptions, CudaSharing};

/// Name of the driver's library, as every driver installs it.
pub const LIBRARY_NAME: &str = "libcuda.so.1";
/// Name of NCCL's library, as its packages install it.
pub const NCCL_LIBRARY_NAME: &str = "libnccl.so.2";
/// Longest device name that is read.
const NAME_LEN: usize = 256;

/// Why the driver cannot be asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CudaError {
    /// The library, or one that it needs, is not there.
    #[error("{name} cannot be opened: {source}")]
    NotFound {
        /// What was looked for.
        name: String,
        /// What the dynamic linker said.
        source: libloading::Error,
    },
    /// The library lacks a function: it is older than what we need.
    #[error("{name} lacks a function: {source}")]
    TooOld {
        /// What was looked for.
        name: String,
        /// What the dynamic linker said; it names the function.
        source: libloading::Error,
    },
    /// The driver has every function, and still is too old for the kernels.
    #[error(
        "the driver supports CUDA {}.{}, kernels need {}.{} or later",
        .found.0, .found.1, DRIVER_VERSION_MIN.0, DRIVER_VERSION_MIN.1
    )]
    TooOldDriver {
        /// What it supports, as (major, minor).
        found: (u32, u32),
    },
    /// The driver knows no device, or not the one that was asked for.
    #[error("{}, the driver has {found}", missing(.wanted.as_ref()))]
    NoDevice {
        /// Which one was asked for; `None` for any.
        wanted: Option<[u8; 16]>,
        /// How many devices the driver has.
        found: usize,
    },
    /// The device cannot do what kernels rely on.
    #[error("{device} has {what} {value}, at least {min} is needed")]
    Unfit {
        /// Its name.
        device: String,
        /// What of it.
        what: &'static str,
        /// What it has.
        value: u32,
        /// Least that is needed.
        min: u32,
    },
    /// There are no kernels for GPUs in this build.
    #[error("this build has no kernels for GPUs, the image is {}", image::note())]
    NoImage,
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
}

/// Oldest CUDA version of a driver that has every call and feature that is used.
pub const DRIVER_VERSION_MIN: (u32, u32) = (12, 0);

fn missing(wanted: Option<&[u8; 16]>) -> String {
    wanted.map_or_else(|| "there is no gpu".into(), |uuid| format!("there is no gpu {}", Uuid(*uuid)))
}

/// The identity of a device, as NVIDIA's tools print it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Uuid(pub [u8; 16]);

impl FromStr for Uuid {
    type Err = UuidError;

    fn from_str(text: &str) -> Result<Self, UuidError> {
        let digits: Vec<u8> = text.trim_start_matches("GPU-").bytes().filter(|byte| *byte != b'-').collect();
        let mut bytes = [0; 16];
        if digits.len() != 2 * bytes.len() {
            return Err(UuidError);
        }
        for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = str::from_utf8(pair).map_err(|_| UuidError)?;
            *byte = u8::from_str_radix(pair, 16).map_err(|_| UuidError)?;
        }
        Ok(Self(bytes))
    }
}

/// Text that is no UUID of a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a GPU's UUID has 32 hexadecimal digits, as in GPU-9bc0b3a6-3bd4-8b2a-5c53-c8c2e3f7a4d1")]
pub struct UuidError;

impl fmt::Display for Uuid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU")?;
        for (at, byte) in self.0.iter().enumerate() {
            let dash = if matches!(at, 0 | 4 | 6 | 8 | 10) { "-" } else { "" };
            write!(f, "{dash}{byte:02x}")?;
        }
        Ok(())
    }
}

/// Error numbers that say something about the machine rather than about the call.
///
/// SPEC: cuda.h `CUresult`.
fn meaning(code: i32) -> &'static str {
    match code {
        3 => " (the driver is not initialised)",
        34 => " (a stub library was found instead of the driver's)",
        2 => " (out of memory)",
        46 => " (the device is used exclusively by another process)",
        100 => " (no CUDA device)",
        201 => " (no context of this device)",
        209 => " (no kernel of the image fits this device)",
        218 | 222 => " (the image is for a newer driver)",
        304 => " (the operating system refused; for registers of a NIC: PeerMappingOverride=1 is not set)",
        700 | 719 => " (a kernel used memory that it must not; the device is of no more use to this process)",
        720 => " (more blocks than fit the device at once)",
        801 => " (this device or driver cannot do it)",
        802 => " (the system is not ready: the fabric manager is not running)",
        803 => " (the driver's library does not fit its kernel module)",
        804 => " (forward compatibility was tried on a GPU that lacks it)",
        999 => " (unknown: the kernel module may not be loaded)",
        _ => "",
    }
}

/// What the driver says of one device.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DeviceInfo {
    /// Name.
    pub name: String,
    /// Identity that stays the same whatever the order of devices.
    pub uuid: [u8; 16],
    /// Address on the PCI bus, "0000:19:00.0".
    pub pci: String,
    /// Major and minor compute capability.
    pub capability: (u32, u32),
    /// Multiprocessors.
    pub sms: u32,
    /// Bytes of device memory.
    pub memory: u64,
    /// Its memory can be exported as a dma-buf; `None` where the driver does not know the question.
    pub has_dma_buf: Option<bool>,
    /// It supports GPUDirect RDMA.
    pub has_gpudirect: Option<bool>,
    /// Up to whom remote writes are visible in order: 0 nobody, 100 this device, 200 all devices.
    pub write_ordering: Option<u32>,
}

/// Attributes that are asked for.
///
/// SPEC: cuda.h `CUdevice_attribute`.
#[derive(Debug, Clone, Copy)]
#[repr(i32)]
enum Attribute {
    MultiprocessorCount = 16,
    CanMapHostMemory = 19,
    UnifiedAddressing = 41,
    CapabilityMajor = 75,
    CapabilityMinor = 76,
    CooperativeLaunch = 95,
    VirtualMemoryManagement = 102,
    PosixDescriptors = 103,
    RdmaOfVirtualMemory = 110,
    GpuDirectRdma = 116,
    GpuDirectWritesOrdering = 118,
    DmaBuf = 124,
}

/// Declares the driver's functions: fields of a table, looked up by name.
macro_rules! functions {
    ($($field:ident = $symbol:literal : fn($($arg:ty),*);)*) => {
        #[derive(Debug, Clone, Copy)]
        struct Functions {
            $($field: unsafe extern "C" fn($($arg),*) -> c_int,)*
        }

        impl Functions {
            fn of(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: the signature is the one that cuda.h declares for this symbol; its versions
                        // (`_v2`) keep it for ever.
                        $field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?,
                    )*
                })
            }
        }
    };
}

functions! {
    init = "cuInit": fn(c_uint);
    driver_get_version = "cuDriverGetVersion": fn(*mut c_int);
    device_get_count = "cuDeviceGetCount": fn(*mut c_int);
    device_get = "cuDeviceGet": fn(*mut c_int, c_int);
    device_get_name = "cuDeviceGetName": fn(*mut c_char, c_int, c_int);
    device_get_uuid = "cuDeviceGetUuid": fn(*mut [u8; 16], c_int);
    device_get_pci = "cuDeviceGetPCIBusId": fn(*mut c_char, c_int, c_int);
    device_total_mem = "cuDeviceTotalMem_v2": fn(*mut usize, c_int);
    device_get_attribute = "cuDeviceGetAttribute": fn(*mut c_int, c_int, c_int);
}

/// The loaded driver.
#[derive(Debug)]
pub struct Driver {
    functions: Functions,
    name: String,
    // After the functions: they are its code.
    library: Arc<Library>,
}

impl Driver {
    /// Loads and initialises the driver.
    ///
    /// # Errors
    /// [`CudaError`]: no driver, one without these functions, or one that cannot be initialised.
    pub fn load() -> Result<Self, CudaError> {
        Self::load_from(LIBRARY_NAME.as_ref())
    }

    /// Loads a driver by name or path.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_from(name: &OsStr) -> Result<Self, CudaError> {
        let library = open(name)?;
        let name = name.to_string_lossy().into_owned();
        let functions =
            Functions::of(&library).map_err(|source| CudaError::TooOld { name: name.clone(), source })?;
        let driver = Self { functions, name, library: Arc::new(library) };
        // SAFETY: takes flags, which must be 0.
        check("cuInit", unsafe { (driver.functions.init)(0) })?;
        Ok(driver)
    }

    /// The calls that a GPU needs.
    fn calls(&self) -> Result<Calls, CudaError> {
        Calls::of(&self.library).map_err(|source| CudaError::TooOld { name: self.name.clone(), source })
    }

    /// Newest CUDA version that the driver supports, as (major, minor).
    ///
    /// # Errors
    /// The call's.
    pub fn version(&self) -> Result<(u32, u32), CudaError> {
        let mut version = 0;
        // SAFETY: the pointer is to a writable integer.
        check("cuDriverGetVersion", unsafe { (self.functions.driver_get_version)(&mut version) })?;
        let version = version.unsigned_abs();
        Ok((version / 1000, version % 1000 / 10))
    }

    /// Every device that this process may use, by ordinal.
    ///
    /// # Errors
    /// The first call that failed.
    pub fn devices(&self) -> Result<Vec<DeviceInfo>, CudaError> {
        Ok(self.all_devices()?.into_iter().map(|(info, _)| info).collect())
    }

    /// The same, with the driver's handles.
    fn all_devices(&self) -> Result<Vec<(DeviceInfo, RawDevice)>, CudaError> {
        let mut count = 0;
        // SAFETY: the pointer is to a writable integer.
        check("cuDeviceGetCount", unsafe { (self.functions.device_get_count)(&mut count) })?;
        (0..count).map(|ordinal| self.device(ordinal)).collect()
    }

    fn device(&self, ordinal: c_int) -> Result<(DeviceInfo, RawDevice), CudaError> {
        let call = &self.functions;
        let (mut device, mut memory, mut uuid) = (0, 0, [0; 16]);
        let (mut name, mut pci) = ([0; NAME_LEN], [0; NAME_LEN]);
        // CAST: a small constant.
        let len = NAME_LEN as c_int;
        // SAFETY: every pointer is to a writable value of the size that the function fills; text is bounded by `len`,
        // and `device` is what the driver gave for a valid ordinal.
        unsafe {
            check("cuDeviceGet", (call.device_get)(&mut device, ordinal))?;
            check("cuDeviceGetName", (call.device_get_name)(name.as_mut_ptr(), len, device))?;
            check("cuDeviceGetPCIBusId", (call.device_get_pci)(pci.as_mut_ptr(), len, device))?;
            check("cuDeviceGetUuid", (call.device_get_uuid)(&mut uuid, device))?;
            check("cuDeviceTotalMem_v2", (call.device_total_mem)(&mut memory, device))?;
        }
        let known = |attribute| self.attribute(device, attribute).ok();
        let is_set = |attribute| known(attribute).map(|value| value != 0);
        let info = DeviceInfo {
            name: text(&name),
            uuid,
            pci: text(&pci).to_lowercase(),
            capability: (
                self.attribute(device, Attribute::CapabilityMajor)?,
                self.attribute(device, Attribute::CapabilityMinor)?,
            ),
            sms: self.attribute(device, Attribute::MultiprocessorCount)?,
            memory: memory as u64,
            has_dma_buf: is_set(Attribute::DmaBuf),
            has_gpudirect: is_set(Attribute::GpuDirectRdma),
            write_ordering: known(Attribute::GpuDirectWritesOrdering),
        };
        Ok((info, device))
    }

    fn attribute(&self, device: RawDevice, attribute: Attribute) -> Result<u32, CudaError> {
        let mut value = 0;
        // CAST: a fieldless enum of representation i32.
        // SAFETY: the pointer is to a writable integer; an attribute that the driver does not know is an error.
        let code = unsafe { (self.functions.device_get_attribute)(&mut value, attribute as c_int, device) };
        check("cuDeviceGetAttribute", code)?;
        Ok(value.unsigned_abs())
    }
}

/// NCCL's version, as (major, minor, patch).
///
/// # Errors
/// [`CudaError`]: it is not there, or is no NCCL.
pub fn nccl_version() -> Result<(u32, u32, u32), CudaError> {
    type GetVersion = unsafe extern "C" fn(*mut c_int) -> c_int;
    let name = NCCL_LIBRARY_NAME.to_owned();
    let library = open(name.as_ref())?;
    // SAFETY: the signature is the one that nccl.h declares.
    let get: Result<libloading::Symbol<'_, GetVersion>, _> = unsafe { library.get(b"ncclGetVersion\0") };
    let get = get.map_err(|source| CudaError::TooOld { name, source })?;
    let mut version = 0;
    // SAFETY: the pointer is to a writable integer.
    check("ncclGetVersion", unsafe { get(&mut version) })?;
    let version = version.unsigned_abs();
    Ok((version / 10_000, version / 100 % 100, version % 100))
}

fn open(name: &OsStr) -> Result<Library, CudaError> {
    // SAFETY: opening runs the library's constructors; those of NVIDIA's libraries only prepare its own state. For
    // another name the caller chose code to run, as with any linker.
    let opened = unsafe { Library::new(name) };
    opened.map_err(|source| CudaError::NotFound { name: name.to_string_lossy().into_owned(), source })
}

/// The text before the first zero byte.
fn text(bytes: &[c_char; NAME_LEN]) -> String {
    // CAST: the same bits; characters are bytes.
    let bytes = bytes.map(|byte| byte as u8);
    CStr::from_bytes_until_nul(&bytes).map(|text| text.to_string_lossy().into_owned()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_driver_gets_a_typed_error() {
        match Driver::load() {
            Ok(driver) => assert!(driver.version().unwrap().0 >= 11),
            Err(error @ (CudaError::NotFound { .. } | CudaError::TooOld { .. })) => {
                assert!(error.to_string().contains(LIBRARY_NAME), "{error}");
            }
            Err(error) => assert!(error.to_string().contains("cuInit"), "{error}"),
        }
    }

    #[test]
    fn a_uuid_is_read_as_it_is_printed() {
        let text = "GPU-00010203-0405-0607-0809-0a0b0c0d0eff";
        assert_eq!(text.parse::<Uuid>().map(|uuid| uuid.to_string()), Ok(text.into()));
        for wrong in
            ["", "GPU-0", "GPU-00010203-0405-0607-0809-0a0b0c0d0eff0", "0x010203040506070809000102030405"]
        {
            assert_eq!(wrong.parse::<Uuid>(), Err(UuidError), "{wrong}");
        }
    }

    #[test]
    fn error_numbers_that_speak_of_the_machine_are_spelled_out() {
        let error = CudaError::Call(CallError { call: "cuInit", code: 100 });
        assert_eq!(error.to_string(), "cuInit failed with CUDA error 100 (no CUDA device)");
        assert_eq!(check("cuInit", 0).ok(), Some(()));
    }
}
