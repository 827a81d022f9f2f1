//! Packets on the wire, read by other people's tools: tshark agrees on every field, scapy on every CRC.
//!
//! The samples hold every opcode and every kind of acknowledgement, over IPv4 and IPv6. Both tools are asked
//! once more with one wrong byte, which they must notice: else their agreement would mean nothing. Then they
//! read what two processes sent each other in a dispatch and a combine.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use ibex_roce::wire::Opcode;

mod pcap;
mod samples;
mod tshark;

use tshark::Decoded;

/// Says why a test skipped, straight to stderr: the runner hides what a passing test prints.
fn say_skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

fn have_tshark() -> bool {
    let found = Command::new("tshark").arg("--version").output().is_ok_and(|output| output.status.success());
    if !found {
        say_skipped("no tshark: apt-get install tshark");
    }
    found
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join(name)
}

fn decode(frames: &[Vec<u8>]) -> Vec<Decoded> {
    frames.iter().map(|frame| Decoded::new(frame).unwrap()).collect()
}

/// What scapy says of a capture.
#[derive(Debug, PartialEq, Eq)]
struct Verdict {
    v4: usize,
    v6: usize,
    wrong: Vec<usize>,
}

/// Asks scapy; `None`, and said so, where there is no scapy that knows both IPs.
fn scapy(capture: &Path) -> Option<Verdict> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/wire/icrc.py");
    // Where .ci/run puts one, then whatever the machine has.
    for python in [file("scapy/bin/python3"), PathBuf::from("python3")] {
        let Ok(output) = Command::new(&python).arg(&script).arg(capture).output() else { continue };
        match output.status.code() {
            Some(0) => return Some(parse_verdict(&String::from_utf8(output.stdout).unwrap())),
            Some(3) => {}
            code => panic!("{}: {code:?}\n{}", python.display(), String::from_utf8_lossy(&output.stderr)),
        }
    }
    let venv = file("scapy");
    let venv = venv.display();
    say_skipped(&format!("no scapy: python3 -m venv {venv} && {venv}/bin/pip install scapy==2.8.0"));
    None
}

fn parse_verdict(line: &str) -> Verdict {
    let words: Vec<&str> = line.split(' ').map(str::trim).collect();
    let ["v4", v4, "v6", v6, "wrong", wrong] = words[..] else { panic!("{line}") };
    let wrong = wrong.split(',').filter(|at| !at.is_empty()).map(|at| at.parse().unwrap()).collect();
    Verdict { v4: v4.parse().unwrap(), v6: v6.parse().unwrap(), wrong }
}

#[test]
fn tshark_reads_every_opcode_as_we_do() {
    if !have_tshark() {
        return;
    }
    let (path, frames) = (file("wire-samples.pcap"), samples::frames());
    pcap::write(&path, &frames);
    assert_eq!(pcap::read(&path), frames);
    let decoded = decode(&frames);
    for opcode in Opcode::ALL {
        for is_v4 in [true, false] {
            let is_it = |d: &&Decoded| d.packet().bth().opcode == opcode && d.is_v4() == is_v4;
            assert!(decoded.iter().any(|d| is_it(&d)), "no sample of {opcode:?}");
        }
    }
    assert_eq!(tshark::differences(&path, &decoded), []);
}

#[test]
fn a_field_that_differs_is_noticed() {
    if !have_tshark() {
        return;
    }
    let path = file("wire-changed.pcap");
    let frames = samples::frames();
    // The last byte of the BTH of an IPv4 packet: the sequence number.
    let mut changed = frames.clone();
    changed[0][14 + 20 + 8 + 11] ^= 1;
    pcap::write(&path, &changed);
    let found = tshark::differences(&path, &decode(&frames));
    let named: Vec<_> = found.iter().map(|(at, name, ..)| (*at, *name)).collect();
    assert_eq!(named, [(0, "infiniband.bth.psn")]);
}

#[test]
fn scapy_computes_the_same_crc() {
    let (path, mut frames) = (file("wire-crc.pcap"), samples::frames());
    pcap::write(&path, &frames);
    let half = frames.len() / 2;
    let Some(verdict) = scapy(&path) else { return };
    assert_eq!(verdict, Verdict { v4: half, v6: half, wrong: vec![] });
    // One byte of payload, one of a key, one of the CRC itself.
    for (at, from_end) in [(0, 10), (6, 80), (half + 3, 1)] {
        let end = frames[at].len();
        frames[at][end - from_end] ^= 1;
    }
    pcap::write(&path, &frames);
    assert_eq!(scapy(&path).unwrap(), Verdict { v4: half, v6: half, wrong: vec![0, 6, half + 3] });
}

/// Two processes dispatch and combine over `addr`; what the first of them sent and received.
fn capture_of_a_run(addr: &str, name: &str) -> Option<PathBuf> {
    if let Err(error) = std::net::UdpSocket::bind((addr, 0)) {
        say_skipped(&format!("no socket on {addr}: {error}; give the loopback interface that address"));
        return None;
    }
    // Rows of two packets, and signals by FETCH_ADD: more than one opcode.
    let output = Command::new(env!("CARGO_BIN_EXE_ibex"))
        .args(["bench", "ep", "--check", "--procs", "--fabric", "udp", "--route", "ibgda"])
        .args(["--ranks", "2", "--tokens", "4", "--experts", "4", "--topk", "2", "--hidden", "4352"])
        .args(["--dtype", "bf16", "--signal", "fetch-add", "--iters", "2", "--warmup", "0"])
        .args(["--advertise", addr, "--pcap"])
        .arg(file(&format!("{name}.pcapng")))
        .output()
        .unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{log}", String::from_utf8_lossy(&output.stdout));
    Some(file(&format!("{name}.0.pcapng")))
}

#[test]
fn a_dispatch_and_a_combine_are_read_alike_by_everyone() {
    for (addr, name) in [("127.0.0.1", "wire-v4"), ("::1", "wire-v6")] {
        let Some(capture) = capture_of_a_run(addr, name) else { continue };
        if !have_tshark() {
            continue;
        }
        let frames = pcap::read(&capture);
        let decoded = decode(&frames);
        let count = |opcode| decoded.iter().filter(|d| d.packet().bth().opcode == opcode).count();
        // Rows, counts, signals and what answers them.
        for opcode in [Opcode::WriteFirst, Opcode::WriteLast, Opcode::WriteOnly, Opcode::FetchAdd] {
            assert!(count(opcode) > 0, "{name}: no {opcode:?}");
        }
        assert!(count(Opcode::Ack) > 0 && count(Opcode::AtomicAck) > 0, "{name}: no answers");
        assert_eq!(tshark::differences(&capture, &decoded), [], "{name}");
        let Some(verdict) = scapy(&capture) else { continue };
        let (v4, v6) = if addr.contains(':') { (0, frames.len()) } else { (frames.len(), 0) };
        assert_eq!(verdict, Verdict { v4, v6, wrong: vec![] }, "{name}");
    }
}
