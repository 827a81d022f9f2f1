//! Work of the rig itself (drawing inputs, checking outputs) on all cores. Owns nothing beyond a call.

use std::num::NonZeroUsize;
use std::thread;

/// Applies `work` to `0..count` on as many threads as there are cores; results in order.
///
/// # Panics
/// PANIC: a panic of `work` goes on in the caller.
pub fn on_all_cores<T: Send>(count: usize, work: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let share = count.div_ceil(cores).max(1);
    let work = &work;
    thread::scope(|scope| {
        let part = |from: usize| {
            let until = (from + share).min(count);
            scope.spawn(move || (from..until).map(work).collect::<Vec<T>>())
        };
        let workers: Vec<_> = (0..count).step_by(share).map(part).collect();
        // PANIC: a panic of the reference is a broken invariant of ours and goes on.
        workers.into_iter().flat_map(|worker| worker.join().expect("the reference does not panic")).collect()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_on_all_cores_keeps_its_order() {
        for count in [0, 1, 7, 64] {
            let squares: Vec<usize> = on_all_cores(count, |i| i * i);
            assert_eq!(squares, (0..count).map(|i| i * i).collect::<Vec<_>>());
        }
    }
}
