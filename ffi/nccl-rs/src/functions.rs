//! The C functions, as nccl.h declares them.

use std::ffi::{c_char, c_int, c_void};

use libloading::Library;

use crate::{RawComm, RawStream, UniqueId};

/// Declares a table of functions that are looked up by name.
macro_rules! functions {
    ($($field:ident = $symbol:literal : fn($($arg:ty),*) -> $answer:ty;)*) => {
        #[derive(Debug, Clone, Copy)]
        pub(crate) struct Functions {
            $(pub(crate) $field: unsafe extern "C" fn($($arg),*) -> $answer,)*
        }

        impl Functions {
            /// Looks all of them up.
            pub(crate) fn of(library: &Library) -> Result<Self, libloading::Error> {
                Ok(Self {
                    $(
                        // SAFETY: the signature is the one that nccl.h declares, and NCCL keeps it within version 2.
                        $field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }?,
                    )*
                })
            }
        }
    };
}

functions! {
    get_version = "ncclGetVersion": fn(*mut c_int) -> c_int;
    get_error_string = "ncclGetErrorString": fn(c_int) -> *const c_char;
    get_unique_id = "ncclGetUniqueId": fn(*mut UniqueId) -> c_int;
    comm_init_rank = "ncclCommInitRank": fn(*mut RawComm, c_int, UniqueId, c_int) -> c_int;
    comm_abort = "ncclCommAbort": fn(RawComm) -> c_int;
    comm_count = "ncclCommCount": fn(RawComm, *mut c_int) -> c_int;
    comm_user_rank = "ncclCommUserRank": fn(RawComm, *mut c_int) -> c_int;
    comm_get_async_error = "ncclCommGetAsyncError": fn(RawComm, *mut c_int) -> c_int;
    group_start = "ncclGroupStart": fn() -> c_int;
    group_end = "ncclGroupEnd": fn() -> c_int;
    all_gather = "ncclAllGather":
        fn(*const c_void, *mut c_void, usize, c_int, RawComm, RawStream) -> c_int;
    broadcast = "ncclBroadcast":
        fn(*const c_void, *mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    send = "ncclSend": fn(*const c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
    recv = "ncclRecv": fn(*mut c_void, usize, c_int, c_int, RawComm, RawStream) -> c_int;
}
