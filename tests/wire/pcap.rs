//! Frames in files: what tools read.

use std::fs;
use std::path::Path;
use std::process::Command;

/// Microsecond stamps, this machine's byte order.
const MAGIC: u32 = 0xa1b2_c3d4;
/// Nanosecond stamps.
const MAGIC_NANOS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
const FILE_HEADER_LEN: usize = 24;
const RECORD_HEADER_LEN: usize = 16;

/// Writes Ethernet frames to a classic capture file, one microsecond apart.
pub(crate) fn write(path: &Path, frames: &[Vec<u8>]) {
    let mut bytes = Vec::new();
    // Version 2.4, no time zone, no accuracy, no limit on length.
    for word in [MAGIC, 4 << 16 | 2, 0, 0, 1 << 16, ETHERNET] {
        bytes.extend(word.to_ne_bytes());
    }
    for (at, frame) in (0_u32..).zip(frames) {
        let len = u32::try_from(frame.len()).unwrap();
        for word in [0, at, len, len] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(frame);
    }
    fs::write(path, bytes).unwrap();
}

/// Reads the Ethernet frames of any capture file that tshark understands.
pub(crate) fn read(path: &Path) -> Vec<Vec<u8>> {
    let classic = path.with_extension("classic");
    let output = Command::new("tshark").arg("-r").arg(path).args(["-F", "pcap", "-w"]).arg(&classic).output();
    let output = output.unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = fs::read(&classic).unwrap();
    fs::remove_file(&classic).unwrap();
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    assert!([MAGIC, MAGIC_NANOS].contains(&word(0)) && word(20) == ETHERNET, "not a capture of Ethernet");
    let (mut frames, mut at) = (Vec::new(), FILE_HEADER_LEN);
    while at < bytes.len() {
        let len = word(at + 8) as usize;
        assert_eq!(len, word(at + 12) as usize, "frames are whole");
        at += RECORD_HEADER_LEN + len;
        frames.push(bytes[at - len..at].to_vec());
    }
    frames
}
