//! Output of ranks, line by line, with the rank before each line.
//!
//! A [`Reader`] owns one pipe of a rank and the thread that reads it. Lines of different ranks never mix: each is
//! written whole.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use parking_lot::Mutex;

use super::LaunchError;

/// A longer line is broken here, so that a rank that never ends one costs no memory.
const LINE_LEN_MAX: usize = 64 << 10;

/// Reads one pipe of a rank until its end.
pub(super) struct Reader {
    thread: Option<JoinHandle<()>>,
    last_line: Option<Arc<Mutex<String>>>,
}

impl Reader {
    /// Passes a rank's standard output on.
    pub(super) fn of_stdout(rank: u32, pipe: impl Read + Send + 'static) -> Result<Self, LaunchError> {
        let thread = spawn(move || copy(rank, pipe, &mut |line| io::stdout().lock().write_all(line)))?;
        Ok(Self { thread: Some(thread), last_line: None })
    }

    /// Passes a rank's standard error on, and remembers its last line.
    pub(super) fn of_stderr(rank: u32, pipe: impl Read + Send + 'static) -> Result<Self, LaunchError> {
        let last_line = Arc::new(Mutex::new(String::new()));
        let remembered = Arc::clone(&last_line);
        let prefix_len = prefix(rank).len();
        let write = move |line: &[u8]| {
            let text = String::from_utf8_lossy(&line[prefix_len..]);
            if !text.trim().is_empty() {
                text.trim().clone_into(&mut remembered.lock());
            }
            io::stderr().lock().write_all(line)
        };
        let thread = spawn(move || copy(rank, pipe, &mut { write }))?;
        Ok(Self { thread: Some(thread), last_line: Some(last_line) })
    }

    /// The last line so far, if this reader remembers one.
    pub(super) fn last_line(&self) -> Option<String> {
        Some(self.last_line.as_ref()?.lock().clone()).filter(|line| !line.is_empty())
    }

    /// Whether the pipe is at its end.
    pub(super) fn is_done(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // One that is not done waits for a process that nobody could end; the launcher does not.
        if let Some(thread) = self.thread.take().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, LaunchError> {
    let started = thread::Builder::new().name("ibex-log".into()).spawn(work);
    started.map_err(|source| LaunchError::Os { doing: "start a thread", source })
}

fn prefix(rank: u32) -> String {
    format!("[rank {rank}] ")
}

/// Writes every line with its prefix in one piece. Output that goes nowhere does not stop the rank.
fn copy(rank: u32, pipe: impl Read, write: &mut dyn FnMut(&[u8]) -> io::Result<()>) {
    let prefix = prefix(rank);
    let mut pipe = BufReader::new(pipe);
    loop {
        let mut line = Vec::from(prefix.as_bytes());
        let limit = LINE_LEN_MAX as u64;
        match (&mut pipe).take(limit).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if line.last() != Some(&b'\n') {
            line.push(b'\n');
        }
        let _ = write(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn copied(input: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        copy(3, input, &mut |line| {
            lines.push(String::from_utf8_lossy(line).into_owned());
            Ok(())
        });
        lines
    }

    #[test]
    fn every_line_has_its_rank_and_an_end() {
        assert_eq!(copied(b"a\n\nb"), ["[rank 3] a\n", "[rank 3] \n", "[rank 3] b\n"]);
        assert_eq!(copied(b""), [] as [&str; 0]);
        assert_eq!(copied(b"\xff\n").len(), 1);
    }

    #[test]
    fn a_line_without_end_is_broken() {
        let lines = copied(&vec![b'x'; LINE_LEN_MAX + 5]);
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[1], "[rank 3] xxxxx\n");
    }

    #[test]
    fn last_words_are_remembered() {
        let reader = Reader::of_stderr(1, &b"first\nibex: the reason\n\n"[..]).unwrap();
        while !reader.is_done() {
            ibex::time::sleep(core::time::Duration::from_millis(1));
        }
        assert_eq!(reader.last_line().as_deref(), Some("ibex: the reason"));
    }
}
