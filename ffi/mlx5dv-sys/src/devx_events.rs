//! Events of DevX objects: four functions that a library may lack, looked up apart from the others.
//!
//! Written by hand after mlx5dv.h, where one structure ends in an array without a length.

use std::ffi::{c_int, c_uint};

use crate::bindings::{ibv_context, mlx5dv_devx_obj};

/// SPEC: mlx5dv.h `mlx5dv_devx_event_channel`.
#[repr(C)]
#[derive(Debug)]
#[allow(non_camel_case_types, reason = "spelled as the header spells it")]
pub struct mlx5dv_devx_event_channel {
    /// Readable while an event waits.
    pub fd: c_int,
}

/// SPEC: mlx5dv.h `mlx5dv_devx_async_event_hdr`, without the data that may follow.
#[repr(C)]
#[derive(Debug, Default, Clone, Copy)]
#[allow(non_camel_case_types, reason = "spelled as the header spells it")]
pub struct mlx5dv_devx_async_event_hdr {
    /// As given when the event was subscribed.
    pub cookie: u64,
}

/// The channel carries cookies only.
///
/// SPEC: mlx5dv.h `MLX5DV_DEVX_CREATE_EVENT_CHANNEL_FLAGS_OMIT_EV_DATA`.
pub const MLX5DV_DEVX_EVENT_CHANNEL_OMIT_DATA: c_uint = 1;

/// The functions. Whoever holds a copy keeps the library that it came from.
#[derive(Debug, Clone, Copy)]
pub struct DevxEvents {
    /// `mlx5dv_devx_create_event_channel`.
    pub create_channel: unsafe extern "C" fn(*mut ibv_context, c_uint) -> *mut mlx5dv_devx_event_channel,
    /// `mlx5dv_devx_destroy_event_channel`.
    pub destroy_channel: unsafe extern "C" fn(*mut mlx5dv_devx_event_channel),
    /// `mlx5dv_devx_subscribe_devx_event`.
    pub subscribe: unsafe extern "C" fn(
        *mut mlx5dv_devx_event_channel,
        *mut mlx5dv_devx_obj,
        u16,
        *mut u16,
        u64,
    ) -> c_int,
    /// `mlx5dv_devx_get_event`.
    pub get: unsafe extern "C" fn(
        *mut mlx5dv_devx_event_channel,
        *mut mlx5dv_devx_async_event_hdr,
        usize,
    ) -> isize,
}

impl DevxEvents {
    /// Looks the functions up; `None` if the library lacks one.
    pub(crate) fn of(library: &libloading::Library) -> Option<Self> {
        // SAFETY: the signatures are those of mlx5dv.h, and rdma-core keeps them: a change gets a new symbol version.
        unsafe {
            Some(Self {
                create_channel: *library.get(b"mlx5dv_devx_create_event_channel\0").ok()?,
                destroy_channel: *library.get(b"mlx5dv_devx_destroy_event_channel\0").ok()?,
                subscribe: *library.get(b"mlx5dv_devx_subscribe_devx_event\0").ok()?,
                get: *library.get(b"mlx5dv_devx_get_event\0").ok()?,
            })
        }
    }
}
