//! What plain memcpy takes to move the bytes that a step must move.
//!
//! A [`Floor`] owns one set of buffers per thread. It runs in the same process and between the same steps
//! as what it is compared with, on as many threads as the machine has cores; device threads count among
//! them, so neither side has more hands than the other.
//!
//! A step is a chain of stages: inputs -> staged rows -> wire -> outputs. Each stage reads what the one
//! before it wrote, piece by piece, so footprints and cache misses are those of the real thing.

use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::thread;

use ibex::time::now_ns;

/// Copies of equal length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage {
    /// Bytes of one copy.
    pub(super) piece_len: usize,
    /// Number of copies.
    pub(super) num_pieces: usize,
}

impl Stage {
    pub(super) fn bytes(self) -> usize {
        self.piece_len * self.num_pieces
    }
}

/// One thread's buffers: `[0]` is the input of the first stage, `[i + 1]` the output of stage i.
#[derive(Default)]
struct Buffers(Vec<Vec<u8>>);

impl Buffers {
    /// Makes room for a chain; memory is written, so that no page fault falls into the measurement.
    fn prepare(&mut self, stages: &[Stage]) {
        self.0.resize_with(stages.len() + 1, Vec::new);
        let input_len = stages.first().map_or(0, |stage| stage.bytes());
        let lens = [input_len].into_iter().chain(stages.iter().map(|stage| stage.bytes()));
        for (buffer, len) in self.0.iter_mut().zip(lens) {
            if buffer.len() < len {
                buffer.resize(len, 0x5a);
            }
        }
    }

    fn run(&mut self, stages: &[Stage]) {
        let mut from_len = stages.first().map_or(0, |stage| stage.bytes());
        for (index, stage) in stages.iter().enumerate() {
            let (before, after) = self.0.split_at_mut(index + 1);
            copy_pieces(&before[index][..from_len], &mut after[0][..stage.bytes()], stage.piece_len);
            from_len = stage.bytes();
        }
    }
}

/// Fills `to` in pieces read from `from`, starting over where it ends.
fn copy_pieces(from: &[u8], to: &mut [u8], piece_len: usize) {
    if from.len() < piece_len || piece_len == 0 {
        to.fill(0x5a);
        return;
    }
    let starts = (0..=from.len() - piece_len).step_by(piece_len).cycle();
    for (piece, start) in to.chunks_exact_mut(piece_len).zip(starts) {
        piece.copy_from_slice(&from[start..start + piece_len]);
    }
}

/// Measures chains of copies on all cores.
pub(super) struct Floor {
    threads: Vec<Buffers>,
}

impl Floor {
    /// How the time is taken, for reports.
    pub(super) const METHOD: &'static str = "memcpy on all cores";

    /// One set of buffers per core.
    pub(super) fn new() -> Self {
        let cores = thread::available_parallelism().map_or(1, NonZeroUsize::get);
        Self { threads: (0..cores).map(|_| Buffers::default()).collect() }
    }

    /// Microseconds from the common start to the last thread's end.
    pub(super) fn measure_us(&mut self, stages: &[Stage]) -> f64 {
        let num_threads = self.threads.len();
        let barrier = Barrier::new(num_threads);
        let shares: Vec<Vec<Stage>> = (0..num_threads).map(|t| share(stages, t, num_threads)).collect();
        let spans: Vec<(u64, u64)> = thread::scope(|scope| {
            let run = |buffers: &mut Buffers, stages: &[Stage]| {
                buffers.prepare(stages);
                barrier.wait();
                let start = now_ns();
                buffers.run(stages);
                (start, now_ns())
            };
            let workers: Vec<_> = self
                .threads
                .iter_mut()
                .zip(&shares)
                .map(|(buffers, stages)| scope.spawn(move || run(buffers, stages)))
                .collect();
            // PANIC: a copy does not panic; if it does, the measurement has no meaning.
            workers.into_iter().map(|worker| worker.join().expect("a copy does not panic")).collect()
        });
        let start = spans.iter().map(|span| span.0).min().unwrap_or(0);
        let end = spans.iter().map(|span| span.1).max().unwrap_or(0);
        end.saturating_sub(start) as f64 / 1e3
    }
}

/// The part of a chain that thread `index` of `count` copies.
fn share(stages: &[Stage], index: usize, count: usize) -> Vec<Stage> {
    let part = |stage: &Stage| {
        let num_pieces = stage.num_pieces / count + usize::from(index < stage.num_pieces % count);
        Stage { num_pieces, ..*stage }
    };
    stages.iter().map(part).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_add_up() {
        let stages = [Stage { piece_len: 3, num_pieces: 10 }, Stage { piece_len: 7, num_pieces: 1 }];
        for count in 1..5 {
            for (which, stage) in stages.iter().enumerate() {
                let sum: usize = (0..count).map(|i| share(&stages, i, count)[which].num_pieces).sum();
                assert_eq!(sum, stage.num_pieces);
            }
        }
    }

    #[test]
    fn every_byte_of_every_stage_is_written() {
        let stages = [Stage { piece_len: 4, num_pieces: 3 }, Stage { piece_len: 2, num_pieces: 9 }];
        let mut buffers = Buffers::default();
        buffers.prepare(&stages);
        for (i, byte) in buffers.0[0].iter_mut().enumerate() {
            *byte = i as u8;
        }
        buffers.run(&stages);
        assert_eq!(buffers.0[1][..12], [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]);
        assert_eq!(buffers.0[2][10..18], [10, 11, 0, 1, 2, 3, 4, 5], "the source starts over");
    }

    #[test]
    fn more_bytes_take_longer_and_none_take_no_time() {
        let mut floor = Floor::new();
        let chain = |num_pieces| [Stage { piece_len: 7168, num_pieces }; 2];
        // The best of several: a busy machine makes any single one slow.
        let mut best_of = |num_pieces| {
            let times = (0..20).map(|_| floor.measure_us(&chain(num_pieces)));
            times.fold(f64::INFINITY, f64::min)
        };
        let (few, many) = (best_of(40), best_of(4000));
        assert!(many > few, "{few} {many}");
        assert!(floor.measure_us(&[]) < 1e5);
    }
}
