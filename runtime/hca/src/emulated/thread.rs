//! A thread that steps devices: the one place in this crate that asks what time it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{EmulatedHca, Step};
use crate::Nanos;

/// How a device thread waits when there is nothing to do: spin, then yield, then sleep ever longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// Idle passes that spin.
    pub spins: u32,
    /// Idle passes after those that yield the processor.
    pub yields: u32,
    /// Longest sleep after those.
    pub sleep_max: Duration,
}

impl Default for Backoff {
    /// Reacts within a microsecond to steady work and within 100 us to work after a pause.
    fn default() -> Self {
        Self { spins: 64, yields: 256, sleep_max: Duration::from_micros(100) }
    }
}

/// A thread that steps a set of devices until it is dropped.
#[derive(Debug)]
pub struct DeviceThread {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts stepping `devices` in turn.
    ///
    /// # Errors
    /// The operating system's refusal to start a thread.
    pub fn spawn(devices: Vec<Arc<EmulatedHca>>, backoff: Backoff) -> std::io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let run = move || run(&devices, backoff, &stopped);
        let thread = std::thread::Builder::new().name("ibex-hca".into()).spawn(run)?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            // PANIC: the device met a broken invariant of ours; its message was printed there.
            panic!("the device thread panicked");
        }
    }
}

fn run(devices: &[Arc<EmulatedHca>], backoff: Backoff, stop: &AtomicBool) {
    let start = Instant::now();
    let mut idle = 0_u32;
    while !stop.load(Ordering::Acquire) {
        // CAST: 2^64 ns are five centuries.
        let now = Nanos(start.elapsed().as_nanos() as u64);
        let steps = devices.iter().map(|device| device.step(now));
        let all = steps.fold(Step::default(), |all, step| Step {
            did_work: all.did_work | step.did_work,
            next_deadline: [all.next_deadline, step.next_deadline].into_iter().flatten().min(),
        });
        if all.did_work {
            idle = 0;
        } else {
            idle = idle.saturating_add(1);
            pause(devices, backoff, idle, all.next_deadline, now);
        }
    }
}

fn pause(devices: &[Arc<EmulatedHca>], backoff: Backoff, idle: u32, deadline: Option<Nanos>, now: Nanos) {
    if idle <= backoff.spins {
        std::hint::spin_loop();
    } else if idle <= backoff.spins + backoff.yields {
        std::thread::yield_now();
    } else {
        let doublings = (idle - backoff.spins - backoff.yields).min(16);
        let nap = Duration::from_micros(1 << doublings).min(backoff.sleep_max);
        let due = deadline.map(|at| Duration::from_nanos(at.0.saturating_sub(now.0)));
        let nap = due.map_or(nap, |due| due.min(nap));
        match devices {
            [device, ..] if device.fabric().spans_processes() => {
                // CAST: a nap is short.
                device.fabric().wait_for_arrivals(nap.as_nanos() as u64);
            }
            _ => std::thread::sleep(nap),
        }
    }
}

/// Sleeps for a modelled latency.
pub(super) fn sleep(latency: Nanos) {
    if latency != Nanos(0) {
        std::thread::sleep(Duration::from_nanos(latency.0));
    }
}
