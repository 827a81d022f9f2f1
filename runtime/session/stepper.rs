//! The thread that steps emulated devices while kernels run on a GPU, which cannot do it.
//!
//! A [`Stepper`] owns the thread and a share of what it steps; the thread ends when the stepper is dropped.

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use crate::error::{Error, OsError};
use crate::gpu::pool::{Progress, Progressed};
use crate::time::{now_ns, sleep};

/// Looks without work after which the thread sleeps between looks. Chosen: some milliseconds.
const IDLE_SPINS: u32 = 20_000;
/// How long it sleeps then: less than a step's latency matters to, as no step runs.
const IDLE_SLEEP: Duration = Duration::from_micros(50);

/// See the module documentation.
pub(crate) struct Stepper {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stepper {
    /// Starts stepping `devices`.
    pub(crate) fn start(devices: Arc<dyn Progress>) -> Result<Self, Error> {
        let is_over = Arc::new(AtomicBool::new(false));
        let over = Arc::clone(&is_over);
        let run = move || {
            let mut idle: u32 = 0;
            while !over.load(Ordering::Relaxed) {
                match devices.progress(0, now_ns(), 0) {
                    Progressed::Worked => idle = 0,
                    Progressed::Idle { .. } => idle = idle.saturating_add(1),
                }
                if idle > IDLE_SPINS {
                    sleep(IDLE_SLEEP);
                }
            }
        };
        let spawned = std::thread::Builder::new().name("ibex-devices".into()).spawn(run);
        let thread = spawned.map_err(|error| OsError::from_io("pthread_create", &error))?;
        Ok(Self { is_over, thread: Some(thread) })
    }
}

impl Drop for Stepper {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It has panicked already where it could, and said so.
            let _ = thread.join();
        }
    }
}
