//! The Linux guest: its image, its machine, and the lines that its peer program obeys (`peer.c`).
//!
//! *Who owns what.* A [`Guest`] owns the emulator's process and ends it when dropped; files of the image stay
//! in cargo's temporary directory for the next run.

use std::fmt::Write as _;
use std::io::{BufRead, BufReader, Write as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use super::link::Link;

/// The guest's addresses, as in `init`.
pub(crate) const GUEST_V4: &str = "10.77.0.2";
pub(crate) const GUEST_V6: &str = "fd77::2";
/// Bytes of the largest IP packet on the link: room for the largest RoCE packet.
pub(crate) const LINK_MTU: u32 = 4500;

/// A guest without hardware help boots in some 8 s on an idle machine; others may be building on it.
const BOOT: Duration = Duration::from_secs(240);
/// An answer takes milliseconds.
const ANSWER: Duration = Duration::from_secs(60);

/// Makes the guest's kernel and file system if they are missing or old; says what is lacking.
pub(crate) fn image() -> Result<PathBuf, String> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("soft-roce");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/soft_roce/image.sh");
    let output = Command::new("bash").arg(&script).arg("build").arg(&dir).output();
    let output = output.map_err(|error| format!("no bash: {error}"))?;
    match output.status.code() {
        Some(0) => Ok(dir),
        // What is missing, and how to get it.
        Some(3) => Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
        code => {
            panic!("{} failed ({code:?}):\n{}", script.display(), String::from_utf8_lossy(&output.stderr))
        }
    }
}

/// The running guest.
pub(crate) struct Guest {
    machine: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    console: PathBuf,
}

/// Registered memory of the guest.
#[derive(Clone, Copy)]
pub(crate) struct Region {
    pub(crate) index: u64,
    pub(crate) addr: u64,
    pub(crate) rkey: u32,
}

/// A queue pair of the guest.
#[derive(Clone, Copy)]
pub(crate) struct Qp {
    pub(crate) index: u64,
    pub(crate) qpn: u32,
}

/// How a queue pair of the guest is connected.
#[derive(Clone, Copy)]
pub(crate) struct Connection {
    pub(crate) peer: IpAddr,
    pub(crate) peer_qpn: u32,
    /// First sequence number of the peer.
    pub(crate) peer_psn: u32,
    /// First sequence number of the guest.
    pub(crate) psn: u32,
    pub(crate) mtu: u32,
    /// 4.096 us * 2^timeout.
    pub(crate) timeout: u8,
    pub(crate) retry: u8,
    pub(crate) rnr_retry: u8,
    pub(crate) min_rnr_timer: u8,
}

/// A completion, as `ibv_poll_cq` tells it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Completion {
    pub(crate) wr_id: u64,
    /// `enum ibv_wc_status`.
    pub(crate) status: u64,
    pub(crate) len: u64,
    pub(crate) imm: u64,
}

/// Values of `enum ibv_wc_status`.
pub(crate) mod status {
    pub(crate) const SUCCESS: u64 = 0;
    pub(crate) const FLUSHED: u64 = 5;
    pub(crate) const REMOTE_INVALID_REQUEST: u64 = 9;
    pub(crate) const REMOTE_ACCESS: u64 = 10;
    pub(crate) const RETRY_EXCEEDED: u64 = 12;
    pub(crate) const RNR_RETRY_EXCEEDED: u64 = 13;
}

/// Values of `enum ibv_access_flags`.
pub(crate) mod access {
    pub(crate) const LOCAL_WRITE: u32 = 1;
    pub(crate) const ALL: u32 = 1 | 2 | 4 | 8;
}

impl Guest {
    /// Boots the image at the other end of the link; returns once the peer program is ready.
    pub(crate) fn boot(image: &Path, link: &Link) -> Self {
        let console = image.join("console.log");
        // Without hardware help on purpose: nested virtualisation hangs as often as it works, 8 s are short.
        let mut machine = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", "tcg", "-m", "256", "-smp", "1"])
            .args(["-nodefaults", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(image.join("vmlinuz"))
            .arg("-initrd")
            .arg(image.join("initramfs.gz"))
            .args(["-append", "console=ttyS0 quiet panic=-1"])
            .arg("-serial")
            .arg(format!("file:{}", console.display()))
            .args(["-serial", "stdio", "-netdev"])
            .arg(link.for_qemu())
            .arg("-device")
            .arg(format!("virtio-net-pci,netdev=net0,host_mtu={LINK_MTU}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu starts");
        let stdin = machine.stdin.take().expect("stdin is a pipe");
        let stdout = BufReader::new(machine.stdout.take().expect("stdout is a pipe"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    break;
                }
            }
        });
        let mut guest = Self { machine, stdin, lines, console };
        let ready = guest.answer("boot", BOOT);
        assert_eq!(ready.first().map(String::as_str), Some("ready"), "{ready:?}\n{}", guest.last_words());
        guest
    }

    /// Sends one command and gives the words of its answer; panics on a refusal.
    pub(crate) fn ask(&mut self, command: &str) -> Vec<String> {
        self.ask_for(command, ANSWER)
    }

    fn ask_for(&mut self, command: &str, patience: Duration) -> Vec<String> {
        writeln!(self.stdin, "{command}").expect("the guest listens");
        self.answer(command, patience)
    }

    fn answer(&mut self, command: &str, patience: Duration) -> Vec<String> {
        let shown: String = command.chars().take(80).collect();
        let line = match self.lines.recv_timeout(patience) {
            Ok(line) => line,
            Err(RecvTimeoutError::Timeout) => panic!("no answer to {shown:?}\n{}", self.last_words()),
            Err(RecvTimeoutError::Disconnected) => panic!("the guest is gone\n{}", self.last_words()),
        };
        let mut words = line.split_whitespace().map(str::to_owned);
        assert_eq!(words.next().as_deref(), Some("ok"), "{shown:?} -> {line}\n{}", self.last_words());
        words.collect()
    }

    fn numbers(&mut self, command: &str) -> Vec<u64> {
        let words = self.ask(command);
        words.iter().map(|word| word.parse().expect("a number")).collect()
    }

    /// The end of the guest's console.
    fn last_words(&self) -> String {
        let log = std::fs::read(&self.console).unwrap_or_default();
        let tail = &log[log.len().saturating_sub(3000)..];
        format!("the guest's console ends with:\n{}", String::from_utf8_lossy(tail))
    }

    pub(crate) fn region(&mut self, len: u64, access: u32) -> Region {
        let [index, addr, _lkey, rkey] = self.numbers(&format!("mr {len} {access}"))[..] else {
            panic!("four numbers make a region")
        };
        Region { index, addr, rkey: u32::try_from(rkey).expect("32 bits") }
    }

    pub(crate) fn fill(&mut self, region: Region, offset: u64, len: u64, seed: u64) {
        self.ask(&format!("fill {} {offset} {len} {seed}", region.index));
    }

    /// How many bytes of the range are not what [`pattern`] gives.
    pub(crate) fn differs(&mut self, region: Region, offset: u64, len: u64, seed: u64) -> u64 {
        self.numbers(&format!("differs {} {offset} {len} {seed}", region.index))[0]
    }

    pub(crate) fn poke(&mut self, region: Region, offset: u64, bytes: &[u8]) {
        let mut hex = String::new();
        for byte in bytes {
            let _ = write!(hex, "{byte:02x}");
        }
        self.ask(&format!("poke {} {offset} {hex}", region.index));
    }

    pub(crate) fn peek(&mut self, region: Region, offset: u64, len: u64) -> Vec<u8> {
        let words = self.ask(&format!("peek {} {offset} {len}", region.index));
        let hex = words.first().map_or("", String::as_str);
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
        (0..hex.len()).step_by(2).map(byte).collect()
    }

    /// A queue pair in INIT.
    pub(crate) fn qp(&mut self, access: u32) -> Qp {
        let [index, qpn] = self.numbers(&format!("qp {access}"))[..] else {
            panic!("two numbers make a queue pair")
        };
        Qp { index, qpn: u32::try_from(qpn).expect("24 bits") }
    }

    /// To RTR and RTS.
    pub(crate) fn connect(&mut self, qp: Qp, to: &Connection) {
        let gid = match to.peer {
            IpAddr::V4(addr) => addr.to_ipv6_mapped(),
            IpAddr::V6(addr) => addr,
        };
        let gid = u128::from(gid);
        let Connection { peer_qpn, peer_psn, psn, mtu, timeout, retry, rnr_retry, min_rnr_timer, .. } = to;
        let index = qp.index;
        self.ask(&format!("rtr {index} {peer_qpn} {gid:032x} {mtu} {peer_psn} 8 {min_rnr_timer}"));
        self.ask(&format!("rts {index} {psn} {timeout} {retry} {rnr_retry} 8"));
    }

    /// Waits for the next completion of a queue pair; `None` after this many milliseconds.
    pub(crate) fn poll(&mut self, qp: Qp, millis: u64) -> Option<Completion> {
        let command = format!("poll {} {millis}", qp.index);
        let words = self.ask_for(&command, ANSWER + Duration::from_millis(millis));
        if words == ["none"] {
            return None;
        }
        // The opcode (word 2) is -1 where the request failed; what was posted is known anyway.
        let number = |at: usize| words[at].parse::<u64>().expect("a number");
        Some(Completion { wr_id: number(0), status: number(1), len: number(3), imm: number(4) })
    }

    /// The next completion, which must come.
    pub(crate) fn completion(&mut self, qp: Qp) -> Completion {
        self.poll(qp, 30_000).unwrap_or_else(|| panic!("no completion\n{}", self.last_words()))
    }

    /// A counter of the rxe device.
    pub(crate) fn counter(&mut self, name: &str) -> u64 {
        self.numbers(&format!("counter {name}"))[0]
    }

    pub(crate) fn drop_qp(&mut self, qp: Qp) {
        self.ask(&format!("drop_qp {}", qp.index));
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Nothing in the guest is worth an orderly end.
        let _ = self.machine.kill();
        let _ = self.machine.wait();
    }
}

/// What `fill` writes in the guest.
pub(crate) fn pattern(len: usize, seed: u64) -> Vec<u8> {
    let byte = |i: usize| u8::try_from((i as u64 * 7 + seed) % 251).expect("less than 251");
    (0..len).map(byte).collect()
}
