//! The part of NCCL that Ibex uses, loaded at run time: a communicator to bootstrap in, and the operations of an
//! all-to-all to compare with.
//!
//! [`Nccl`] opens `libnccl.so.2`, the only name that NCCL's packages install, when somebody wants it; nothing here is
//! needed to build or to run without it. A [`Comm`] is a communicator of this process, made here or lent by a caller
//! who has one already.
//!
//! *Who owns what.* A [`Nccl`] owns the handle of the library; a [`Comm`] keeps it. A communicator that was made here
//! is aborted when it is dropped, a lent one is left to its owner. Device memory and streams are the caller's, under
//! NCCL's rules: operations are queued, and their buffers are in use until the stream has passed them.
//!
//! INVARIANT: a [`Nccl`] that exists has every function it names, so no function pointer outlives its code.
#![expect(unsafe_code, reason = "calls into a C library that is loaded at run time")]

use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::fmt;
use std::sync::Arc;

use libloading::Library;

mod functions;

use functions::Functions;

/// Name of the shared object.
pub const LIBRARY_NAME: &str = "libnccl.so.2";
/// Oldest version with point-to-point operations that do not block each other.
pub const VERSION_MIN: Version = Version { major: 2, minor: 7, patch: 0 };

/// Why NCCL could not be used, or what it answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NcclError {
    /// The shared object, or one that it needs, is not there.
    #[error("{name} cannot be opened (apt-get install libnccl2, or pip install nvidia-nccl-cu13): {source}")]
    NotFound {
        /// What was looked for.
        name: String,
        /// What the dynamic linker said.
        source: libloading::Error,
    },
    /// The shared object lacks a function: it is another library, or too old.
    #[error("{name} lacks a function of NCCL {VERSION_MIN}: {source}")]
    Function {
        /// What was looked for.
        name: String,
        /// What the dynamic linker said; it names the function.
        source: libloading::Error,
    },
    /// The library is older than what is needed.
    #[error("NCCL {found} is too old, {VERSION_MIN} or later is needed")]
    TooOld {
        /// Its version.
        found: Version,
    },
    /// A rank, a count or a size that makes no sense; nothing was called.
    #[error("{field} is {value}, it must be at most {max}")]
    OutOfRange {
        /// Which value.
        field: &'static str,
        /// What it was.
        value: u64,
        /// Largest valid value.
        max: u64,
    },
    /// A call failed.
    #[error("{call} failed: {text} ({code:?})")]
    Call {
        /// Name of the function.
        call: &'static str,
        /// NCCL's answer.
        code: ResultCode,
        /// NCCL's words for it.
        text: String,
    },
}

/// What NCCL answers.
///
/// SPEC: nccl.h `ncclResult_t`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ResultCode {
    /// It worked.
    Success,
    /// A call of CUDA failed.
    UnhandledCuda,
    /// A call of the system failed.
    System,
    /// NCCL's own state is broken.
    Internal,
    /// An argument makes no sense.
    InvalidArgument,
    /// The library is used wrongly.
    InvalidUsage,
    /// Another rank failed, or cannot be reached.
    Remote,
    /// Under way, of a communicator that does not block.
    InProgress,
    /// A number that this crate does not know.
    Unknown(i32),
}

impl ResultCode {
    const fn of(code: c_int) -> Self {
        match code {
            0 => Self::Success,
            1 => Self::UnhandledCuda,
            2 => Self::System,
            3 => Self::Internal,
            4 => Self::InvalidArgument,
            5 => Self::InvalidUsage,
            6 => Self::Remote,
            7 => Self::InProgress,
            code => Self::Unknown(code),
        }
    }
}

/// A version of NCCL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// First number.
    pub major: u32,
    /// Second number.
    pub minor: u32,
    /// Third number.
    pub patch: u32,
}

impl Version {
    /// The version behind `NCCL_VERSION_CODE`, whose digits changed with 2.9.
    const fn of(code: u32) -> Self {
        let digits = if code < 10_000 { 1_000 } else { 10_000 };
        Self { major: code / digits, minor: code % digits / 100, patch: code % 100 }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What names a communicator among all: rank 0 draws it, and tells the others.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId {
    bytes: [u8; Self::LEN],
}

impl UniqueId {
    /// Its length in bytes.
    pub const LEN: usize = 128;

    /// From the bytes that another rank was told.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; Self::LEN]) -> Self {
        Self { bytes }
    }

    /// The bytes to tell the other ranks.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; Self::LEN] {
        self.bytes
    }
}

impl fmt::Debug for UniqueId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It holds the address of rank 0, which is nobody's business in a log.
        f.write_str("UniqueId(..)")
    }
}

/// The loaded library.
#[derive(Debug)]
pub struct Nccl {
    functions: Functions,
    version: Version,
    // After the functions: it is their code.
    _library: Library,
}

impl Nccl {
    /// Opens [`LIBRARY_NAME`] and looks up every function.
    ///
    /// # Errors
    /// [`NcclError`]: it is missing, lacks a function, or is too old.
    pub fn load() -> Result<Arc<Self>, NcclError> {
        Self::load_from(LIBRARY_NAME.as_ref())
    }

    /// Opens a shared object by name or path.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_from(name: &OsStr) -> Result<Arc<Self>, NcclError> {
        let named = || name.to_string_lossy().into_owned();
        // SAFETY: opening runs the library's constructors, which prepare its own state; for another name the caller
        // chose code to run, as with any linker.
        let library =
            unsafe { Library::new(name) }.map_err(|source| NcclError::NotFound { name: named(), source })?;
        let functions =
            Functions::of(&library).map_err(|source| NcclError::Function { name: named(), source })?;
        let mut code = 0;
        // SAFETY: the pointer is to a writable integer.
        check(&functions, "ncclGetVersion", unsafe { (functions.get_version)(&mut code) })?;
        let version = Version::of(code.unsigned_abs());
        if version < VERSION_MIN {
            return Err(NcclError::TooOld { found: version });
        }
        Ok(Arc::new(Self { functions, version, _library: library }))
    }

    /// Its version.
    #[must_use]
    pub const fn version(&self) -> Version {
        self.version
    }

    /// Draws the name of a new communicator; one rank does.
    ///
    /// # Errors
    /// NCCL's answer.
    pub fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = UniqueId { bytes: [0; UniqueId::LEN] };
        // SAFETY: the pointer is to writable bytes of the right number.
        check(&self.functions, "ncclGetUniqueId", unsafe { (self.functions.get_unique_id)(&mut id) })?;
        Ok(id)
    }

    /// Runs `calls` as one group: their operations wait for each other only at its end.
    ///
    /// # Errors
    /// What the calls, or the end of the group, answered.
    pub fn group<E: From<NcclError>>(&self, calls: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        // SAFETY: takes nothing; every start has its end below.
        check(&self.functions, "ncclGroupStart", unsafe { (self.functions.group_start)() })?;
        let answer = calls();
        // SAFETY: as above. The end comes also after a failed call, or later groups would never end.
        let end = check(&self.functions, "ncclGroupEnd", unsafe { (self.functions.group_end)() });
        answer?;
        Ok(end?)
    }
}

/// A communicator, as NCCL's C interface passes it.
pub type RawComm = *mut c_void;
/// A CUDA stream, as CUDA's C interface passes it.
pub type RawStream = *mut c_void;

/// A communicator of this process and GPU.
#[derive(Debug)]
pub struct Comm {
    nccl: Arc<Nccl>,
    raw: RawComm,
    is_ours: bool,
}

// SAFETY: NCCL lets any thread call on a communicator, one at a time; methods that queue take `&mut`.
unsafe impl Send for Comm {}

impl Comm {
    /// Joins the communicator that `id` names, on the calling thread's current device; every rank does.
    ///
    /// # Errors
    /// A rank that is not below the number of ranks; NCCL's answer.
    pub fn join(nccl: &Arc<Nccl>, num_ranks: u32, rank: u32, id: UniqueId) -> Result<Self, NcclError> {
        let max = u64::from(num_ranks).saturating_sub(1);
        let (Ok(count), Ok(place)) = (c_int::try_from(num_ranks), c_int::try_from(rank)) else {
            return Err(NcclError::OutOfRange {
                field: "num_ranks",
                value: num_ranks.into(),
                max: i32::MAX as u64,
            });
        };
        if rank >= num_ranks {
            return Err(NcclError::OutOfRange { field: "rank", value: rank.into(), max });
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: the pointer is to a writable handle; the others are plain values.
        let code = unsafe { (nccl.functions.comm_init_rank)(&mut raw, count, id, place) };
        check(&nccl.functions, "ncclCommInitRank", code)?;
        Ok(Self { nccl: Arc::clone(nccl), raw, is_ours: true })
    }

    /// Uses a communicator that the caller has already.
    ///
    /// # Safety
    /// `raw` is a live communicator of the library that `nccl` loaded, and stays so until this is dropped; nobody else
    /// calls on it meanwhile.
    #[must_use]
    pub unsafe fn lent(nccl: &Arc<Nccl>, raw: RawComm) -> Self {
        Self { nccl: Arc::clone(nccl), raw, is_ours: false }
    }

    /// NCCL's own handle, valid while this lives.
    #[must_use]
    pub const fn raw(&self) -> RawComm {
        self.raw
    }

    /// Its members.
    ///
    /// # Errors
    /// NCCL's answer.
    pub fn num_ranks(&self) -> Result<u32, NcclError> {
        let mut count = 0;
        // SAFETY: a live communicator, and a writable integer.
        let code = unsafe { (self.nccl.functions.comm_count)(self.raw, &mut count) };
        self.check("ncclCommCount", code)?;
        Ok(count.unsigned_abs())
    }

    /// This process's place among them.
    ///
    /// # Errors
    /// NCCL's answer.
    pub fn rank(&self) -> Result<u32, NcclError> {
        let mut rank = 0;
        // SAFETY: a live communicator, and a writable integer.
        let code = unsafe { (self.nccl.functions.comm_user_rank)(self.raw, &mut rank) };
        self.check("ncclCommUserRank", code)?;
        Ok(rank.unsigned_abs())
    }

    /// What has gone wrong since, in operations that were queued.
    ///
    /// # Errors
    /// The failure, or NCCL's answer to the question.
    pub fn health(&self) -> Result<(), NcclError> {
        let mut state = 0;
        // SAFETY: a live communicator, and a writable integer.
        let code = unsafe { (self.nccl.functions.comm_get_async_error)(self.raw, &mut state) };
        self.check("ncclCommGetAsyncError", code)?;
        self.check("a queued operation", state)
    }

    /// Queues a copy of every rank's `len` bytes to every rank: how ranks tell each other where they are.
    ///
    /// # Errors
    /// NCCL's answer.
    ///
    /// # Safety
    /// `send` is device memory of `len` bytes and `receive` of `len` times the number of ranks; both stay valid, and
    /// nobody else writes them, until `stream` has passed the operation. `stream` belongs to the communicator's device.
    pub unsafe fn all_gather(
        &mut self,
        send: *const c_void,
        receive: *mut c_void,
        len: usize,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let call = self.nccl.functions.all_gather;
        // SAFETY: the caller's contract.
        let code = unsafe { call(send, receive, len, BYTES, self.raw, stream) };
        self.check("ncclAllGather", code)
    }

    /// Queues a copy of `root`'s `len` bytes to every rank.
    ///
    /// # Errors
    /// A root that is no member; NCCL's answer.
    ///
    /// # Safety
    /// As for [`all_gather`](Self::all_gather), with `len` bytes at both; only `root` reads `send`.
    pub unsafe fn broadcast(
        &mut self,
        send: *const c_void,
        receive: *mut c_void,
        len: usize,
        root: u32,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let (call, root) = (self.nccl.functions.broadcast, self.peer(root)?);
        // SAFETY: the caller's contract.
        let code = unsafe { call(send, receive, len, BYTES, root, self.raw, stream) };
        self.check("ncclBroadcast", code)
    }

    /// Queues a send of `len` bytes to a rank.
    ///
    /// # Errors
    /// NCCL's answer.
    ///
    /// # Safety
    /// As for [`all_gather`](Self::all_gather), with `len` bytes at `from`.
    pub unsafe fn send(
        &mut self,
        from: *const c_void,
        len: usize,
        peer: u32,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let (call, peer) = (self.nccl.functions.send, self.peer(peer)?);
        // SAFETY: the caller's contract.
        let code = unsafe { call(from, len, BYTES, peer, self.raw, stream) };
        self.check("ncclSend", code)
    }

    /// Queues a receive of `len` bytes from a rank.
    ///
    /// # Errors
    /// NCCL's answer.
    ///
    /// # Safety
    /// As for [`all_gather`](Self::all_gather), with `len` bytes at `into`.
    pub unsafe fn receive(
        &mut self,
        into: *mut c_void,
        len: usize,
        peer: u32,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let (call, peer) = (self.nccl.functions.recv, self.peer(peer)?);
        // SAFETY: the caller's contract.
        let code = unsafe { call(into, len, BYTES, peer, self.raw, stream) };
        self.check("ncclRecv", code)
    }

    /// Queues what an all-to-all is: `len` bytes to and from every rank, as one group.
    ///
    /// # Errors
    /// NCCL's answer.
    ///
    /// # Safety
    /// As for [`all_gather`](Self::all_gather), with `len` times the number of ranks bytes at both.
    pub unsafe fn all_to_all(
        &mut self,
        send: *const c_void,
        receive: *mut c_void,
        len: usize,
        stream: RawStream,
    ) -> Result<(), NcclError> {
        let (nccl, num_ranks) = (Arc::clone(&self.nccl), self.num_ranks()?);
        nccl.group(|| {
            for peer in 0..num_ranks {
                // CAST: u32 to usize on a 64-bit host.
                let offset = len * peer as usize;
                // SAFETY: the caller's contract; the offset stays inside both.
                unsafe {
                    self.send(send.byte_add(offset), len, peer, stream)?;
                    self.receive(receive.byte_add(offset), len, peer, stream)?;
                }
            }
            Ok(())
        })
    }

    fn peer(&self, peer: u32) -> Result<c_int, NcclError> {
        let max = u64::from(self.num_ranks()?).saturating_sub(1);
        match c_int::try_from(peer) {
            Ok(place) if u64::from(peer) <= max => Ok(place),
            _ => Err(NcclError::OutOfRange { field: "peer", value: peer.into(), max }),
        }
    }

    fn check(&self, call: &'static str, code: c_int) -> Result<(), NcclError> {
        check(&self.nccl.functions, call, code)
    }
}

impl Drop for Comm {
    /// Aborts a communicator that was made here: that neither waits for peers nor for what is queued.
    fn drop(&mut self) {
        if self.is_ours {
            // SAFETY: made once, and nobody uses it any more; what it answers changes nothing.
            let _ = unsafe { (self.nccl.functions.comm_abort)(self.raw) };
        }
    }
}

/// Data type of plain bytes (nccl.h `ncclUint8`).
const BYTES: c_int = 1;

fn check(functions: &Functions, call: &'static str, code: c_int) -> Result<(), NcclError> {
    if code == 0 {
        return Ok(());
    }
    // SAFETY: takes any number, and gives a constant text.
    let text = unsafe { (functions.get_error_string)(code) };
    Err(NcclError::Call { call, code: ResultCode::of(code), text: text_of(text) })
}

fn text_of(text: *const c_char) -> String {
    if text.is_null() {
        return String::new();
    }
    // SAFETY: a constant text that ends in zero.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_missing_library_is_a_typed_error_that_says_what_to_install() {
        let error = Nccl::load_from("libibex-is-not-there.so.2".as_ref()).unwrap_err();
        assert!(matches!(&error, NcclError::NotFound { name, .. } if name.contains("not-there")));
        assert!(error.to_string().contains("libnccl2"), "{error}");
    }

    #[test]
    fn another_library_is_a_typed_error_that_names_the_function() {
        let error = Nccl::load_from("libc.so.6".as_ref()).unwrap_err();
        assert!(matches!(error, NcclError::Function { .. }), "{error}");
        assert!(error.to_string().contains("nccl"), "{error}");
    }

    #[test]
    fn versions_are_read_by_both_conventions() {
        assert_eq!(Version::of(2_708).to_string(), "2.7.8");
        assert_eq!(Version::of(22_707).to_string(), "2.27.7");
        assert!(Version::of(2_408) < VERSION_MIN && Version::of(22_707) > VERSION_MIN);
    }

    #[test]
    fn the_library_of_this_machine_answers_without_a_gpu() {
        let nccl = match Nccl::load() {
            Ok(nccl) => nccl,
            Err(error @ NcclError::NotFound { .. }) => {
                // Straight to stderr: the runner hides what a passing test prints.
                let _ = writeln!(std::io::stderr(), "SKIPPED: {error}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(nccl.version() >= VERSION_MIN);
        let refused = Comm::join(&nccl, 2, 2, UniqueId::from_bytes([0; UniqueId::LEN])).unwrap_err();
        assert!(matches!(refused, NcclError::OutOfRange { field: "rank", value: 2, max: 1 }), "{refused}");
    }

    #[test]
    fn an_id_travels_as_bytes_and_says_nothing_in_logs() {
        let id = UniqueId::from_bytes([7; UniqueId::LEN]);
        assert_eq!(id.to_bytes(), [7; UniqueId::LEN]);
        assert_eq!((size_of::<UniqueId>(), format!("{id:?}")), (UniqueId::LEN, "UniqueId(..)".into()));
    }
}
