//! Captures: frames in a file that Wireshark and its kin read (pcapng, nanosecond stamps).
//!
//! A file has two interfaces: `wire`, for frames that were sent as they stand there, and `synthesised`,
//! for frames that nobody sent, made up from what a fabric within one machine did instead.
//!
//! *Who owns what.* A [`Capture`] owns its file; whoever taps a fabric shares the capture. What was written
//! is complete up to the last frame once the capture was dropped or [flushed](Capture::flush).
//!
//! ```text
//!  section header | interface 0: wire | interface 1: synthesised | packet | packet | ...
//!  each block:  type:32  total length:32  body, padded to words  total length:32   (this machine's order)
//! ```
//!
//! SPEC: pcapng, draft-ietf-opsawg-pcapng §4.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use parking_lot::Mutex;

use crate::{HcaError, Nanos};

const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const BYTE_ORDER: u32 = 0x1a2b_3c4d;
/// Link type of every interface: frames begin with an Ethernet header.
const ETHERNET: u16 = 1;
const OPTION_NAME: u16 = 2;
const OPTION_DESCRIPTION: u16 = 3;
const OPTION_RESOLUTION: u16 = 9;
/// Stamps count 10^-9 seconds.
const NANOSECONDS: u8 = 9;

/// Where a captured frame comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// It was sent as it stands in the file.
    Wire,
    /// It was made up from what happened without frames.
    Synthesised,
}

impl Origin {
    const fn interface(self) -> u32 {
        match self {
            Self::Wire => 0,
            Self::Synthesised => 1,
        }
    }
}

#[derive(Debug)]
struct Inner {
    file: BufWriter<File>,
    frames: u64,
    failed: Option<i32>,
}

/// A capture file that is being written.
#[derive(Debug)]
pub struct Capture {
    inner: Mutex<Inner>,
    epoch: Nanos,
}

impl Capture {
    /// Creates the file, or empties it; stamps count from `epoch`, the time of the devices' instant 0.
    ///
    /// # Errors
    /// [`HcaError::Os`] if the file cannot be written.
    pub fn create(path: &Path, epoch: Nanos) -> Result<Self, HcaError> {
        let file = File::create(path).map_err(|error| os("open", &error))?;
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let mut header = Vec::new();
        section_header(&mut header);
        interface(&mut header, "wire", "frames as they were sent");
        interface(&mut header, "synthesised", "made up from messages that crossed no wire");
        file.write_all(&header).map_err(|error| os("write", &error))?;
        Ok(Self { inner: Mutex::new(Inner { file, frames: 0, failed: None }), epoch })
    }

    /// Adds a frame, its Ethernet header first.
    ///
    /// A write that fails ends the capture; [`flush`](Self::flush) tells.
    pub fn frame(&self, now: Nanos, origin: Origin, bytes: &[u8]) {
        let mut inner = self.inner.lock();
        if inner.failed.is_some() {
            return;
        }
        match write_packet(&mut inner.file, self.epoch.plus(now.0), origin, bytes) {
            Ok(()) => inner.frames += 1,
            Err(error) => inner.failed = Some(error.raw_os_error().unwrap_or(libc::EIO)),
        }
    }

    /// Writes everything out; how many frames there are.
    ///
    /// # Errors
    /// [`HcaError::Os`] if this or an earlier write failed.
    pub fn flush(&self) -> Result<u64, HcaError> {
        let mut inner = self.inner.lock();
        if let Some(errno) = inner.failed {
            return Err(HcaError::Os { call: "write", errno });
        }
        inner.file.flush().map_err(|error| os("write", &error))?;
        Ok(inner.frames)
    }
}

fn os(call: &'static str, error: &io::Error) -> HcaError {
    HcaError::Os { call, errno: error.raw_os_error().unwrap_or(libc::EIO) }
}

/// Length of a block's or an option's body with its padding.
const fn padded(len: usize) -> usize {
    len.next_multiple_of(4)
}

fn put_block(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    // CAST: headers and options of known, short length.
    let total = (12 + padded(body.len())) as u32;
    out.extend(kind.to_ne_bytes());
    out.extend(total.to_ne_bytes());
    out.extend(body);
    out.resize(out.len() + padded(body.len()) - body.len(), 0);
    out.extend(total.to_ne_bytes());
}

fn section_header(out: &mut Vec<u8>) {
    let mut body = Vec::from(BYTE_ORDER.to_ne_bytes());
    // Version 1.0; the section's length is not known.
    body.extend(1_u16.to_ne_bytes());
    body.extend(0_u16.to_ne_bytes());
    body.extend((-1_i64).to_ne_bytes());
    put_block(out, SECTION_HEADER, &body);
}

fn interface(out: &mut Vec<u8>, name: &str, description: &str) {
    let mut body = Vec::from(ETHERNET.to_ne_bytes());
    // Reserved, and no limit on the length of frames.
    body.extend([0; 2 + 4]);
    for (option, value) in [
        (OPTION_NAME, name.as_bytes()),
        (OPTION_DESCRIPTION, description.as_bytes()),
        (OPTION_RESOLUTION, &[NANOSECONDS]),
    ] {
        body.extend(option.to_ne_bytes());
        // CAST: short texts of our own.
        body.extend((value.len() as u16).to_ne_bytes());
        body.extend(value);
        body.resize(padded(body.len()), 0);
    }
    // The end of the options.
    body.extend([0; 4]);
    put_block(out, INTERFACE, &body);
}

fn write_packet(out: &mut impl Write, at: Nanos, origin: Origin, bytes: &[u8]) -> io::Result<()> {
    let too_long = || io::Error::from_raw_os_error(libc::EMSGSIZE);
    let len = u32::try_from(bytes.len()).map_err(|_| too_long())?;
    let total = 32 + len.next_multiple_of(4);
    // CAST: the high and the low half of the stamp.
    let (high, low) = ((at.0 >> 32) as u32, at.0 as u32);
    for word in [ENHANCED_PACKET, total, origin.interface(), high, low, len, len] {
        out.write_all(&word.to_ne_bytes())?;
    }
    out.write_all(bytes)?;
    out.write_all(&[0; 3][..padded(bytes.len()) - bytes.len()])?;
    out.write_all(&total.to_ne_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks of a file: kind and body.
    fn blocks(mut bytes: &[u8]) -> Vec<(u32, Vec<u8>)> {
        let word = |bytes: &[u8], at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let (kind, total) = (word(bytes, 0), word(bytes, 4) as usize);
            assert_eq!((total % 4, word(bytes, total - 4) as usize), (0, total), "both lengths agree");
            all.push((kind, bytes[8..total - 4].to_vec()));
            bytes = &bytes[total..];
        }
        all
    }

    #[test]
    fn a_file_has_a_section_two_interfaces_and_every_frame() {
        let path = std::env::temp_dir().join(format!("ibex-capture-{}.pcapng", std::process::id()));
        let capture = Capture::create(&path, Nanos(1 << 40)).unwrap();
        capture.frame(Nanos(5), Origin::Wire, &[1, 2, 3]);
        capture.frame(Nanos(9), Origin::Synthesised, &[7; 60]);
        assert_eq!(capture.flush(), Ok(2));
        capture.frame(Nanos(10), Origin::Wire, &[]);
        drop(capture);
        let bytes = std::fs::read(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let blocks = blocks(&bytes);
        let kinds: Vec<u32> = blocks.iter().map(|(kind, _)| *kind).collect();
        assert_eq!(kinds, [SECTION_HEADER, INTERFACE, INTERFACE, 6, 6, 6]);
        assert!(blocks[2].1.windows(11).any(|name| name == b"synthesised"));
        let words = |nth: usize, count: usize| -> Vec<u32> {
            let (parts, _) = blocks[nth].1.as_chunks::<4>();
            parts[..count].iter().map(|part| u32::from_ne_bytes(*part)).collect()
        };
        assert_eq!(words(3, 5), [0, 256, 5, 3, 3]);
        assert_eq!(blocks[3].1[20..], [1, 2, 3, 0]);
        assert_eq!(words(4, 5), [1, 256, 9, 60, 60]);
        assert_eq!(blocks[5].1.len(), 20);
    }

    #[test]
    fn a_file_that_cannot_be_written_is_an_error() {
        let nowhere = Capture::create(Path::new("/nonexistent/capture"), Nanos(0));
        assert!(matches!(nowhere, Err(HcaError::Os { call: "open", errno: libc::ENOENT })));
        let Ok(full) = Capture::create(Path::new("/dev/full"), Nanos(0)) else {
            // Straight to stderr: the runner hides what a passing test prints.
            let _ = writeln!(std::io::stderr(), "SKIPPED: no /dev/full on this machine");
            return;
        };
        full.frame(Nanos(0), Origin::Wire, &[0; 64]);
        assert!(matches!(full.flush(), Err(HcaError::Os { call: "write", errno: libc::ENOSPC })));
    }
}
