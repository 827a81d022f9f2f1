//! The link between the test's tap device and the guest's network card, on which the guest's packets may
//! suffer.
//!
//! Frames go from hand to hand: `tap0 <-> this process <-> pair of local sockets <-> QEMU`. Each hand waits for
//! the next, so that none is lost by haste; nothing else happens to them either, unless a fault plan is set:
//! then RoCEv2 packets of the guest pass the seeded switch of `ibex_hca`. (What our own device sends suffers at
//! its own exit.) Threads end with the process.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ibex_hca::Nanos;
use ibex_hca::emulated::switch::{FaultCounts, FaultPlan, Switch};
use ibex_roce::wire::{Frame, ROCE_PORT};

/// Numbers of the ends in fault plans.
const GUEST: u16 = 1;
const TEST: u16 = 0;
/// How long a frame waits for a look at what the switch holds back.
const GLANCE: Duration = Duration::from_millis(1);
const FRAME_LEN_MAX: usize = 9000;

/// Frames that may wait at the tap device: a long READ's answer comes at once.
pub(crate) const QUEUE_LEN: u32 = 20_000;

/// The link, up as long as the process.
pub(crate) struct Link {
    /// The guest's end, until QEMU has it.
    guests: UnixDatagram,
    switch: Arc<Mutex<Option<Switch>>>,
}

impl Link {
    /// Joins the tap device and the guest.
    pub(crate) fn up(tap: &str) -> Self {
        let tap = open_tap(tap);
        let (ours, guests) = UnixDatagram::pair().expect("two descriptors");
        ours.set_read_timeout(Some(GLANCE)).expect("a positive timeout");
        let switch = Arc::new(Mutex::new(None));
        let (to_guest, from_test) = (ours.try_clone(), tap.try_clone());
        let (to_guest, from_test) = (to_guest.expect("a descriptor"), from_test.expect("a descriptor"));
        std::thread::spawn(move || carry_to_guest(from_test, &to_guest));
        let shared = Arc::clone(&switch);
        std::thread::spawn(move || carry_from_guest(&ours, tap, &shared));
        Self { guests, switch }
    }

    /// The guest's end, as QEMU's `-netdev` spells it; QEMU, started next, inherits the descriptor.
    #[expect(unsafe_code, reason = "std closes every descriptor in a child")]
    pub(crate) fn for_qemu(&self) -> String {
        let fd = self.guests.as_raw_fd();
        // SAFETY: the descriptor is open; only its flag changes.
        let code = unsafe { libc::fcntl(fd, libc::F_SETFD, 0) };
        assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
        format!("dgram,id=net0,local.type=fd,local.str={fd}")
    }

    /// From now on the guest's packets suffer from `plan`.
    pub(crate) fn suffer(&self, plan: FaultPlan) {
        let switch = Switch::new(plan, Nanos(0)).expect("a plan within its limits");
        *self.switch.lock().expect("no thread panics with it") = Some(switch);
    }

    /// From now on nothing happens to them; what happened until now.
    pub(crate) fn heal(&self) -> FaultCounts {
        let switch = self.switch.lock().expect("no thread panics with it").take();
        *switch.expect("it suffered").counts()
    }
}

fn carry_to_guest(mut tap: File, guest: &UnixDatagram) {
    let mut frame = [0; FRAME_LEN_MAX];
    while let Ok(len) = tap.read(&mut frame) {
        if guest.send(&frame[..len]).is_err() {
            // The machine is gone, and soon this process.
            return;
        }
    }
}

fn carry_from_guest(guest: &UnixDatagram, mut tap: File, switch: &Mutex<Option<Switch>>) {
    let (start, mut bytes) = (Instant::now(), [0; FRAME_LEN_MAX]);
    loop {
        let frame = guest.recv(&mut bytes).ok().map(|len| &bytes[..len]);
        let now = Nanos(u64::try_from(start.elapsed().as_nanos()).expect("five centuries"));
        let mut switch = switch.lock().expect("no thread panics with it");
        match (frame, switch.as_mut()) {
            (Some(frame), Some(switch)) if is_roce(frame) => switch.submit(now, GUEST, TEST, frame),
            (Some(frame), _) => put(&mut tap, frame),
            (None, _) => {}
        }
        if let Some(switch) = switch.as_mut() {
            while let Some(delivery) = switch.poll(now, TEST) {
                put(&mut tap, &delivery.frame);
                switch.give_back(delivery.frame);
            }
        }
    }
}

/// Other traffic, such as the search for Ethernet addresses, is left in peace.
fn is_roce(frame: &[u8]) -> bool {
    Frame::parse_ethernet(frame).is_ok_and(|(frame, _)| frame.flow.dst_port == ROCE_PORT)
}

fn put(tap: &mut File, frame: &[u8]) {
    // A damaged frame may be refused; it is lost then.
    let _ = tap.write(frame);
}

#[expect(unsafe_code, reason = "std opens no tap devices")]
fn open_tap(name: &str) -> File {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").expect("the probe opened it");
    // SAFETY: a C structure of integers, for which zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: the descriptor is open, and the request lives across the call.
    let code = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(code, 0, "{}", std::io::Error::last_os_error());
    file
}
