//! Bindings of libibverbs and of libmlx5's direct verbs, loaded at run time.
//!
//! [`bindings`] is generated from the C headers and committed; [`Library`] opens the shared objects
//! when a real device is wanted, so that nothing here is needed to build or to run without one. The
//! crate owns the handle of the loaded library and nothing else: every pointer that a function
//! takes or gives belongs to the caller under the rules of its manual page.
//!
//! Invariants: a [`Library`] that exists has every function it names (but those of [`DevxEvents`]); the shared
//! objects stay loaded for as long as it lives, so no function pointer outlives its code.
//!
//! # Regenerating
//!
//! ```text
//! apt-get install libibverbs-dev libclang-19-dev
//! cargo install bindgen-cli --version 0.72.1
//! ffi/mlx5dv-sys/regenerate.sh
//! ```
//!
//! The generated file asserts the size, alignment and field offsets of every structure at compile
//! time. Enumerations are constants with the C names. `ibv_query_port` is the exported function: it
//! fills the fields of `ibv_port_attr` up to `link_layer`.

#![expect(unsafe_code, reason = "calls into C libraries that are loaded at run time")]

use std::ffi::OsStr;
use std::ops::Deref;

#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unreachable_pub,
    unsafe_code,
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    reason = "generated from C headers, spelled as they spell it"
)]
#[rustfmt::skip]
pub mod bindings;
mod ctrl_seg;
mod devx_events;

pub use bindings::*;
pub use ctrl_seg::mlx5_wqe_ctrl_seg;
pub use devx_events::{
    DevxEvents, MLX5DV_DEVX_EVENT_CHANNEL_OMIT_DATA, mlx5dv_devx_async_event_hdr, mlx5dv_devx_event_channel,
};

/// Name of the shared object that has the direct verbs; it brings libibverbs with it.
pub const LIBRARY_NAME: &str = "libmlx5.so.1";

/// Why the libraries could not be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The shared object, or one that it needs, is not there.
    #[error("{name} cannot be opened (apt-get install ibverbs-providers): {source}")]
    NotFound {
        /// Name that was asked for.
        name: String,
        /// What the dynamic linker said.
        source: libloading::Error,
    },
    /// The shared object lacks a function: it is another library, or too old.
    #[error("{name} lacks a function of rdma-core 44: {source}")]
    Function {
        /// Name that was asked for.
        name: String,
        /// What the dynamic linker said; it names the function.
        source: libloading::Error,
    },
}

/// The loaded libraries; its methods are the C functions.
pub struct Library {
    functions: Functions,
    devx_events: Option<DevxEvents>,
}

impl Library {
    /// Opens [`LIBRARY_NAME`] and looks up every function.
    ///
    /// # Errors
    /// [`LoadError`] if the library is missing or lacks a function.
    pub fn load() -> Result<Self, LoadError> {
        Self::load_from(LIBRARY_NAME)
    }

    /// Opens a shared object by name or path and looks up every function in it and in what it
    /// needs.
    ///
    /// # Errors
    /// [`LoadError`] if the library is missing or lacks a function.
    pub fn load_from(name: impl AsRef<OsStr>) -> Result<Self, LoadError> {
        let name = name.as_ref();
        let shown = || name.to_string_lossy().into_owned();
        // SAFETY: opening runs the library's constructors. Those of libmlx5 and libibverbs only
        // register providers; for another name the caller chose code to run, as with any linker.
        let opened = unsafe { libloading::Library::new(name) };
        let library = opened.map_err(|source| LoadError::NotFound { name: shown(), source })?;
        let devx_events = DevxEvents::of(&library);
        // SAFETY: the generated signatures are those of the headers these names come from, and
        // rdma-core keeps them: a change of signature gets a new symbol version.
        let functions = unsafe { Functions::from_library(library) };
        let functions = functions.map_err(|source| LoadError::Function { name: shown(), source })?;
        Ok(Self { functions, devx_events })
    }

    /// Events of DevX objects, where the library has them.
    pub fn devx_events(&self) -> Option<&DevxEvents> {
        self.devx_events.as_ref()
    }
}

impl Deref for Library {
    type Target = Functions;

    fn deref(&self) -> &Functions {
        &self.functions
    }
}

impl std::fmt::Debug for Library {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Library").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_missing_library_is_a_typed_error_that_says_what_to_install() {
        let error = Library::load_from("libibex-is-not-there.so.1").unwrap_err();
        assert!(matches!(&error, LoadError::NotFound { name, .. } if name.contains("not-there")));
        assert!(error.to_string().contains("apt-get install ibverbs-providers"));
    }

    #[test]
    fn a_library_without_the_functions_is_a_typed_error_that_names_one() {
        let error = Library::load_from("libc.so.6").unwrap_err();
        assert!(matches!(&error, LoadError::Function { .. }), "{error}");
        assert!(error.to_string().contains("ibv_"), "{error}");
    }

    #[test]
    fn the_library_of_this_machine_has_every_function() {
        let library = match Library::load() {
            Ok(library) => library,
            Err(LoadError::NotFound { source, .. }) => {
                // Straight to stderr: the runner hides what a passing test prints.
                let why = format!("{LIBRARY_NAME} not found ({source}); apt-get install ibverbs-providers");
                let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
                return;
            }
            Err(error) => panic!("{error}"),
        };
        assert!(library.devx_events().is_some());
        let mut num_devices = -1;
        // SAFETY: the count is writable, and the list is freed below.
        let list = unsafe { library.ibv_get_device_list(&mut num_devices) };
        // Without the kernel's RDMA support there is no list at all.
        if !list.is_null() {
            assert!(num_devices >= 0);
            // SAFETY: the list came from ibv_get_device_list and is not used again.
            unsafe { library.ibv_free_device_list(list) };
        }
    }
}
