//! Two processes on the fabric of shared memory: they talk, one is killed, one is stopped and wakes up.
//!
//! The far process is this test binary again, running `far_process` alone. It is told what to do, and
//! tells what it has, by lines of text: the advert, the queue pair and the buffer, in hexadecimal.
#![allow(clippy::unwrap_used, reason = "in a test a failed expectation is the message")]

mod rig;

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ibex_abi::cqe::Syndrome;
use ibex_abi::types::{Gid, Iova, Lid, Mac, Psn, QpNum, Rkey};
use ibex_abi::wqe::{AtomicOp, CtrlFlags, DataSeg, Remote, Request};
use ibex_hca::control_region::ControlRegion;
use ibex_hca::emulated::EmulatedHca;
use ibex_hca::host_memory::Registered;
use ibex_hca::host_qp::{ConnectSpec, CqShape, Endpoint, HostQp, HostQpSpec, Reset, Rts};
use ibex_hca::{Access, Hca, LinkLayer, Nanos, PortAddress};
use parking_lot::Mutex;
use rig::{Setup, as_hca, device, gather, inline, shm_fabric, write};

/// Far longer than anything here takes, even on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);
const BUFFER: u64 = 64 << 10;
/// Says in the environment that this is the far process, and what it does.
const FAR: &str = "IBEX_TEST_FAR_PROCESS";
/// Descriptors are counted, so one test at a time.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A device with a queue pair and a buffer that is not connected yet.
struct Fresh {
    qp: HostQp<Reset>,
    buffer: Registered,
    region: ControlRegion,
    device: Arc<EmulatedHca>,
}

/// What one process tells the other.
struct Told {
    advert: Vec<u8>,
    end: Endpoint,
    remote: Remote,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn fresh(first_port: u16) -> Fresh {
    let fabric = shm_fabric(first_port);
    let device = device(&fabric, Setup::default().doorbells);
    let hca = as_hca(&device);
    let pd = hca.alloc_pd().unwrap();
    let region = ControlRegion::host(&hca, 1 << 20).unwrap();
    let buffer = Registered::new(&hca, pd, BUFFER, Access::ALL).unwrap();
    let send_cq = CqShape::Ring { log_size: 8, overrun_ignore: false };
    let qp = HostQp::create(&region, pd, HostQpSpec { send_cq, ..HostQpSpec::default() }).unwrap();
    Fresh { qp, buffer, region, device }
}

impl Fresh {
    /// What the other process must know, as a line.
    fn tell(&self) -> String {
        let advert = self.device.fabric().advert(self.device.port_id()).unwrap();
        let port = self.device.port();
        let numbers = [self.qp.qpn().get().into(), self.buffer.iova(0), self.buffer.key().rkey.0.into()];
        let numbers = numbers.map(u64::to_be_bytes).map(|bytes| hex(&bytes)).join(" ");
        [hex(&advert), hex(&port.gid.0), hex(&port.mac.0), numbers].join(" ")
    }

    fn connect(self, told: &Told) -> Connected {
        self.device.fabric().admit(&told.advert).unwrap();
        let spec = ConnectSpec { ack_timeout: 14, retry_count: 3, ..ConnectSpec::default() };
        let qp = self.qp.connect(&told.end, &spec).unwrap();
        Connected { qp, buffer: self.buffer, region: self.region, device: self.device }
    }
}

/// A device whose queue pair is connected.
struct Connected {
    qp: HostQp<Rts>,
    buffer: Registered,
    region: ControlRegion,
    device: Arc<EmulatedHca>,
}

fn hear(line: &str) -> Told {
    let words: Vec<Vec<u8>> = line.split_whitespace().map(unhex).collect();
    let [advert, gid, mac, qpn, addr, rkey] = &words[..] else { panic!("not what is told: {line:?}") };
    let number = |bytes: &Vec<u8>| u64::from_be_bytes(bytes.as_slice().try_into().unwrap());
    let (gid, mac) = (Gid(gid.as_slice().try_into().unwrap()), Mac(mac.as_slice().try_into().unwrap()));
    let address = PortAddress { link: LinkLayer::Roce, lid: Lid(0), gid, mac };
    let end = Endpoint { address, qpn: QpNum::new(number(qpn) as u32), psn: Psn::new(0) };
    let remote = Remote { addr: Iova(number(addr)), rkey: Rkey(number(rkey) as u32) };
    Told { advert: advert.clone(), end, remote }
}

fn now(start: Instant) -> Nanos {
    Nanos(start.elapsed().as_nanos() as u64)
}

/// Steps once; naps if there was nothing to do.
fn work(device: &EmulatedHca, start: Instant) {
    if !device.step(now(start)).did_work {
        device.fabric().wait_for_arrivals(200_000);
    }
}

/// The far process. Without the environment variable it is no test.
#[test]
fn far_process() {
    let Ok(task) = std::env::var(FAR) else { return };
    let mut lines = std::io::stdin().lock().lines();
    let fresh = fresh(1);
    // The test harness may have begun a line of its own.
    println!("\ntold {}", fresh.tell());
    let told = hear(&lines.next().unwrap().unwrap());
    let Connected { mut qp, buffer, region: _region, device } = fresh.connect(&told);
    println!("connected");
    let start = Instant::now();
    let mut posted = 0_u64;
    while start.elapsed() < PATIENCE {
        work(&device, start);
        let done = qp.poll();
        if task == "serve" {
            continue;
        }
        // Writes one page after another, over and over, from memory that changes.
        if let Some(syndrome) = done.and_then(|completion| completion.syndrome()) {
            println!("failed {}", syndrome.0);
            return;
        }
        if done.is_some() || posted < 32 {
            posted += 1;
            buffer.view().write(0, &[posted.to_le_bytes()[0] | 1; 4096]);
            let remote = Remote { addr: Iova(told.remote.addr.0 + posted % 15 * 4096), ..told.remote };
            let data = DataSeg::new(4096, buffer.key().lkey.get(), buffer.iova(0));
            qp.post(CtrlFlags::SIGNALED, write(remote, gather(&[data]))).unwrap();
        }
    }
}

/// The far process, seen from here; killed when a test is over.
struct Far {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

impl Far {
    fn start(task: &str) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "far_process", "--nocapture", "--test-threads=1"])
            .env(FAR, task)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdin, stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        Self { child, stdin, stdout: BufReader::new(stdout) }
    }

    /// The rest of the next line that begins with `word`.
    fn expect(&mut self, word: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.stdout.read_line(&mut line).unwrap(), 0, "the far process ended before {word:?}");
            if let Some(rest) = line.trim().strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    /// Whether a line can be read without waiting.
    fn has_said_something(&mut self) -> bool {
        let fd = std::os::fd::AsRawFd::as_raw_fd(self.stdout.get_ref());
        let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        #[expect(unsafe_code, reason = "the standard library cannot ask a pipe")]
        // SAFETY: one entry, which is ours.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        !self.stdout.buffer().is_empty() || ready > 0
    }

    fn signal(&self, signal: i32) {
        #[expect(unsafe_code, reason = "the standard library only kills")]
        // SAFETY: a system call about a child that was not waited for.
        let sent = unsafe { libc::kill(self.child.id().cast_signed(), signal) };
        assert_eq!(sent, 0);
    }
}

impl Drop for Far {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

/// This process's end, connected to a far process that does `task`.
struct Near {
    qp: HostQp<Rts>,
    buffer: Registered,
    _region: ControlRegion,
    device: Arc<EmulatedHca>,
    remote: Remote,
    start: Instant,
}

fn near(far: &mut Far) -> Near {
    let fresh = fresh(0);
    let told = hear(&far.expect("told"));
    writeln!(far.stdin, "{}", fresh.tell()).unwrap();
    let Connected { qp, buffer, region, device } = fresh.connect(&told);
    far.expect("connected");
    Near { qp, buffer, _region: region, device, remote: told.remote, start: Instant::now() }
}

impl Near {
    fn at(&self, offset: u64) -> Remote {
        Remote { addr: Iova(self.remote.addr.0 + offset), ..self.remote }
    }

    fn data(&self, offset: u64, len: u32) -> DataSeg {
        DataSeg::new(len, self.buffer.key().lkey.get(), self.buffer.iova(offset))
    }

    fn run(&mut self, request: Request) -> Option<Syndrome> {
        self.qp.post(CtrlFlags::SIGNALED, request).unwrap();
        loop {
            work(&self.device, self.start);
            if let Some(completion) = self.qp.poll() {
                return completion.syndrome();
            }
            assert!(self.start.elapsed() < PATIENCE, "no completion");
        }
    }
}

fn descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn two_processes_write_read_and_add() {
    let _one = ONE_AT_A_TIME.lock();
    let mut far = Far::start("serve");
    let mut near = near(&mut far);
    for round in 0..300_u32 {
        let bytes = round.to_le_bytes();
        near.buffer.view().write(0, &bytes.repeat(1792));
        let payload = gather(&[near.data(0, 7168)]);
        assert_eq!(near.run(write(near.at(64), payload)), None);
        near.buffer.view().fill(0);
        let read = Request::Read { remote: near.at(64), scatter: vec![near.data(8192, 7168)] };
        assert_eq!(near.run(read), None);
        assert_eq!(near.buffer.view().to_vec(8192, 7168), bytes.repeat(1792));
        let (op, result) = (AtomicOp::FetchAdd { add: 3 }, near.data(0, 8));
        assert_eq!(near.run(Request::Atomic { remote: near.at(0), op, result }), None);
        assert_eq!(near.buffer.view().to_vec(0, 8), u64::from(3 * round).to_le_bytes());
    }
}

#[test]
fn a_killed_process_is_silent_and_leaves_nothing() {
    let _one = ONE_AT_A_TIME.lock();
    let before = descriptors();
    let mut far = Far::start("serve");
    let mut near = near(&mut far);
    assert_eq!(near.run(write(near.at(0), inline(&[1; 8]))), None);
    far.signal(libc::SIGKILL);
    far.child.wait().unwrap();
    let late = near.run(write(near.at(0), inline(&[2; 8])));
    assert_eq!(late, Some(Syndrome::TRANSPORT_RETRY_EXC));
    drop((near, far));
    assert_eq!(descriptors(), before, "descriptors");
    let shared = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let ours = shared.filter(|entry| entry.file_name().to_string_lossy().contains("ibex"));
    assert_eq!(ours.count(), 0, "files in /dev/shm");
}

#[test]
fn a_stopped_process_that_wakes_up_can_write_nothing() {
    let _one = ONE_AT_A_TIME.lock();
    let mut far = Far::start("flood");
    let near = near(&mut far);
    // It is in the middle of writing when it stops.
    while near.buffer.view().to_vec(14 * 4096, 1) == [0] {
        work(&near.device, near.start);
        assert!(near.start.elapsed() < PATIENCE, "nothing arrives");
    }
    far.signal(libc::SIGSTOP);
    // It is given up, as a member is that missed its deadline: the queue pair is gone, the memory serves on.
    let Near { qp, buffer, _region, device, start, .. } = near;
    drop(qp);
    buffer.view().fill(0);
    let queued = device.counters().dropped_requests;
    far.signal(libc::SIGCONT);
    while !far.has_said_something() {
        work(&device, start);
        assert!(start.elapsed() < PATIENCE, "the far process does not notice");
    }
    // It sent again and again, in vain, and says so.
    assert_eq!(far.expect("failed"), Syndrome::TRANSPORT_RETRY_EXC.0.to_string());
    assert!(device.counters().dropped_requests > queued, "its requests arrived and were dropped");
    assert_eq!(buffer.view().to_vec(0, BUFFER), vec![0; BUFFER as usize]);
}
