//! A thread that steps devices: the one place in this crate that asks what time it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
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

/// What the thread tells of itself.
#[derive(Debug, Default)]
struct Told {
    stop: AtomicBool,
    /// Passes over all devices so far.
    passes: AtomicU64,
    /// The last of them in which a device did something.
    last_busy: AtomicU64,
    /// When a timer runs out next, on the thread's clock; the largest number if none runs.
    next_deadline: AtomicU64,
}

/// A thread that steps a set of devices until it is dropped.
#[derive(Debug)]
pub struct DeviceThread {
    told: Arc<Told>,
    started: Instant,
    thread: Option<JoinHandle<()>>,
}

impl DeviceThread {
    /// Starts stepping `devices` in turn.
    ///
    /// # Errors
    /// The operating system's refusal to start a thread.
    pub fn spawn(devices: Vec<Arc<EmulatedHca>>, backoff: Backoff) -> std::io::Result<Self> {
        let (told, started) = (Arc::<Told>::default(), Instant::now());
        let telling = Arc::clone(&told);
        let run = move || run(&devices, backoff, &telling, started);
        let thread = std::thread::Builder::new().name("ibex-hca".into()).spawn(run)?;
        Ok(Self { told, started, thread: Some(thread) })
    }

    /// Waits until the devices have nothing left to do and no timer of theirs runs out within `nanos` from now.
    pub fn settle(&self, nanos: u64) {
        let end = elapsed(self.started).plus(nanos).0;
        loop {
            // Two more passes: one may have begun before what the caller just did.
            let seen = self.told.passes.load(Ordering::Acquire);
            while self.told.passes.load(Ordering::Acquire) < seen.saturating_add(3) {
                std::thread::sleep(Duration::from_micros(20));
            }
            let was_busy = self.told.last_busy.load(Ordering::Acquire) > seen;
            let timer_runs = self.told.next_deadline.load(Ordering::Acquire) <= end;
            let waits = timer_runs && elapsed(self.started).0 < end;
            if !was_busy && !waits {
                return;
            }
        }
    }
}

impl Drop for DeviceThread {
    fn drop(&mut self) {
        self.told.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            // PANIC: the device met a broken invariant of ours; its message was printed there.
            panic!("the device thread panicked");
        }
    }
}

/// Time of a thread's clock.
fn elapsed(started: Instant) -> Nanos {
    // CAST: 2^64 ns are five centuries.
    Nanos(started.elapsed().as_nanos() as u64)
}

fn run(devices: &[Arc<EmulatedHca>], backoff: Backoff, told: &Told, started: Instant) {
    let mut idle = 0_u32;
    let mut pass = 0_u64;
    while !told.stop.load(Ordering::Acquire) {
        let now = elapsed(started);
        let steps = devices.iter().map(|device| device.step(now));
        let all = steps.fold(Step::default(), |all, step| Step {
            did_work: all.did_work | step.did_work,
            next_deadline: [all.next_deadline, step.next_deadline].into_iter().flatten().min(),
        });
        pass += 1;
        told.next_deadline.store(all.next_deadline.map_or(u64::MAX, |at| at.0), Ordering::Relaxed);
        if all.did_work {
            told.last_busy.store(pass, Ordering::Relaxed);
        }
        // After the others: who sees this pass sees what it told.
        told.passes.store(pass, Ordering::Release);
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
