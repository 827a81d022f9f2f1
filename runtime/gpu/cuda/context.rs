//! A context on one device, and what lives in it: each a value that gives back what it holds.
//!
//! A [`Context`] owns a reference to the device's primary context, or borrows a caller's; modules, streams, events and
//! graphs own one handle each and keep the context they live in. Calls that need a current context get one for as long
//! as an [`Entered`] lives, and the thread has its own back afterwards: other libraries of the process see nothing.
//!
//! What the driver refuses to take back is left to it: that happens when the device is gone or a kernel has faulted,
//! and then the driver drops everything itself when the process ends.

use std::ffi::{CString, c_int};
use std::marker::PhantomData;
use std::ptr::null_mut;
use std::sync::Arc;

use super::calls::{CallError, Calls, RawDevice, RawHandle};

/// Streams that do not wait for the default stream, which other libraries use.
///
/// SPEC: cuda.h `CU_STREAM_NON_BLOCKING`.
const NON_BLOCKING: u32 = 1;
/// Nothing that this process does on other threads disturbs a capture, and nothing of a capture forbids it anything.
///
/// SPEC: cuda.h `CU_STREAM_CAPTURE_MODE_RELAXED`.
const CAPTURE_RELAXED: c_int = 2;

/// A context of the driver.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) calls: Calls,
    pub(super) device: RawDevice,
    raw: RawHandle,
    is_ours: bool,
}

// SAFETY: the driver lets any thread use a context; the handle is not dereferenced here.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// Keeps the primary context of `device`.
    pub(super) fn primary(calls: Calls, device: RawDevice) -> Result<Arc<Self>, CallError> {
        let mut raw = null_mut();
        // SAFETY: a writable handle, and a device that the driver named.
        unsafe { calls.primary_ctx_retain(&mut raw, device) }?;
        Ok(Arc::new(Self { calls, device, raw, is_ours: true }))
    }

    /// Uses a caller's context.
    ///
    /// # Safety
    /// `raw` is a live context, and stays so until the last handle and allocation made with it is gone.
    pub(super) unsafe fn lent(calls: Calls, raw: RawHandle) -> Result<Arc<Self>, CallError> {
        let mut context = Self { calls, device: 0, raw, is_ours: false };
        let mut device = 0;
        {
            let _entered = context.enter()?;
            // SAFETY: a writable integer, and a current context.
            unsafe { context.calls.ctx_get_device(&mut device) }?;
        }
        context.device = device;
        Ok(Arc::new(context))
    }

    /// Makes this the thread's current context until the result is dropped.
    pub(super) fn enter(&self) -> Result<Entered<'_>, CallError> {
        // SAFETY: live, by the invariant of both ways to make one.
        unsafe { self.calls.ctx_push(self.raw) }?;
        Ok(Entered { calls: &self.calls, _this_thread: PhantomData })
    }

    /// Runs `release`, in the context if it can still be entered: much can be released without.
    pub(super) fn release(&self, release: impl FnOnce(&Calls) -> Result<(), CallError>) {
        let _entered = self.enter();
        // See the module documentation.
        let _ = release(&self.calls);
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        if self.is_ours {
            // SAFETY: retained once. A refusal leaves it to the process's end.
            let _ = unsafe { self.calls.primary_ctx_release(self.device) };
        }
    }
}

/// While it lives, this thread's current context is ours.
pub(super) struct Entered<'a> {
    calls: &'a Calls,
    // Not Send: what was pushed here is popped here.
    _this_thread: PhantomData<*mut ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut popped = null_mut();
        // SAFETY: a writable handle; pushed by this thread, and every push within has been popped.
        let _ = unsafe { self.calls.ctx_pop(&mut popped) };
    }
}

/// Declares an owner of one handle.
macro_rules! owner {
    ($(#[$doc:meta])* $name:ident, $release:ident) => {
        $(#[$doc])*
        #[derive(Debug)]
        pub(super) struct $name {
            pub(super) raw: RawHandle,
            context: Arc<Context>,
        }

        // SAFETY: the driver takes its handles from any thread; none is dereferenced here.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: ours, released once.
                self.context.release(|calls| unsafe { calls.$release(self.raw) });
            }
        }
    };
}

owner!(
    /// A loaded image.
    Module,
    module_unload
);
owner!(
    /// A stream that was made here.
    OwnedStream,
    stream_destroy
);
owner!(
    /// An event.
    OwnedEvent,
    event_destroy
);
owner!(
    /// A captured graph, as it was recorded.
    Recorded,
    graph_destroy
);
owner!(
    /// A graph that can be launched.
    OwnedGraph,
    graph_exec_destroy
);

impl Module {
    /// Loads the part of `image` that fits the device.
    pub(super) fn load(context: &Arc<Context>, image: &'static [u8]) -> Result<Self, CallError> {
        let _entered = context.enter()?;
        let mut raw = null_mut();
        // SAFETY: a writable handle, and a fat binary, which says its own length.
        unsafe { context.calls.module_load_data(&mut raw, image.as_ptr().cast()) }?;
        Ok(Self { raw, context: Arc::clone(context) })
    }

    /// Finds a kernel, and makes the driver load it now: left to the first launch, loading could wait for kernels that
    /// wait for that launch.
    pub(super) fn function(&self, name: &str) -> Result<RawHandle, CallError> {
        /// SPEC: cuda.h `CU_FUNC_ATTRIBUTE_NUM_REGS`.
        const NUM_REGS: c_int = 4;
        let calls = &self.context.calls;
        let _entered = self.context.enter()?;
        let name = CString::new(name).expect("names of kernels hold no zero byte");
        let (mut function, mut registers) = (null_mut(), 0);
        // SAFETY: writable values, a live module, and text that ends in zero.
        unsafe {
            calls.module_get_function(&mut function, self.raw, name.as_ptr())?;
            calls.func_get_attribute(&mut registers, NUM_REGS, function)?;
        }
        Ok(function)
    }
}

impl OwnedStream {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CallError> {
        let _entered = context.enter()?;
        let mut raw = null_mut();
        // SAFETY: a writable handle.
        unsafe { context.calls.stream_create(&mut raw, NON_BLOCKING) }?;
        Ok(Self { raw, context: Arc::clone(context) })
    }
}

impl OwnedEvent {
    pub(super) fn new(context: &Arc<Context>) -> Result<Self, CallError> {
        let _entered = context.enter()?;
        let mut raw = null_mut();
        // SAFETY: a writable handle; no flags: it keeps the time.
        unsafe { context.calls.event_create(&mut raw, 0) }?;
        Ok(Self { raw, context: Arc::clone(context) })
    }
}

/// Starts a capture of `stream`.
///
/// # Safety
/// `stream` is a live stream of `context`.
pub(super) unsafe fn begin_capture(context: &Context, stream: RawHandle) -> Result<(), CallError> {
    let _entered = context.enter()?;
    // SAFETY: the caller's contract.
    unsafe { context.calls.stream_begin_capture(stream, CAPTURE_RELAXED) }
}

/// Ends the capture that began on `stream`; whatever the answer, the stream captures no more.
///
/// # Safety
/// `stream` is a live stream of `context`.
pub(super) unsafe fn end_capture(context: &Arc<Context>, stream: RawHandle) -> Result<Recorded, CallError> {
    let _entered = context.enter()?;
    let mut raw = null_mut();
    // SAFETY: the caller's contract, and a writable handle.
    unsafe { context.calls.stream_end_capture(stream, &mut raw) }?;
    Ok(Recorded { raw, context: Arc::clone(context) })
}

impl Recorded {
    /// Makes it one that can be launched.
    pub(super) fn instantiate(&self) -> Result<OwnedGraph, CallError> {
        let _entered = self.context.enter()?;
        let mut raw = null_mut();
        // SAFETY: a writable handle, and a live graph.
        unsafe { self.context.calls.graph_instantiate(&mut raw, self.raw, 0) }?;
        Ok(OwnedGraph { raw, context: Arc::clone(&self.context) })
    }
}
