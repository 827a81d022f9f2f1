//! Linux' soft-RoCE as a peer, in a guest of its own: it judges our packets, and our device judges it.
//!
//! ```text
//!   network namespace of the test                        guest (QEMU, Debian's kernel, image.sh)
//!   +----------------------------------+                 +----------------------------------+
//!   | our device, or single packets    |                 |                                  |
//!   |   10.77.0.1   10.77.0.3          |                 |   10.77.0.2                      |
//!   |   fd77::1     fd77::3     tap0 --|----- link ------|-- fd77::2    eth0 - rxe0         |
//!   | the checks ----------------------|-- serial line --|-- peer (peer.c), Linux' verbs    |
//!   +----------------------------------+                 +----------------------------------+
//! ```
//!
//! The visible test prepares the image and runs this binary again inside fresh namespaces; when that process
//! ends, however it ends, the kernel takes guest, link and namespaces with it. Wants root (or what else may
//! make a network namespace and a tap device), qemu, and what `image.sh` wants; says what is missing.
#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::Write;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

mod guest;
mod link;
mod lossy;
mod ours;
mod packets;
mod raw;
mod requester;
mod responder;

use guest::{GUEST_V4, GUEST_V6, Guest, LINK_MTU};
use link::{Link, QUEUE_LEN};
use ours::Ours;
use raw::Raw;

const TAP: &str = "tap0";
const OURS_V4: &str = "10.77.0.1";
const OURS_V6: &str = "fd77::1";
const RAW_V4: &str = "10.77.0.3";
const RAW_V6: &str = "fd77::3";
/// Addresses with their prefixes.
const OWN: [&str; 4] = ["10.77.0.1/24", "10.77.0.3/24", "fd77::1/64", "fd77::3/64"];
/// Tells the inner run where the image is.
const IMAGE: &str = "IBEX_SOFT_ROCE_IMAGE";

/// Says why a test skipped, straight to stderr: the runner hides what a passing test prints.
fn say_skipped(why: &str) {
    let _ = writeln!(std::io::stderr(), "SKIPPED: soft-RoCE: {why}");
}

#[test]
fn linux_soft_roce_and_we_agree() {
    if let Err(error) = Command::new("qemu-system-x86_64").arg("--version").output() {
        return say_skipped(&format!("no qemu-system-x86_64 ({error}): apt-get install qemu-system-x86"));
    }
    let namespaces = ["--net", "--pid", "--fork", "--kill-child"];
    let probe = "ip tuntap add tap0 mode tap";
    match Command::new("unshare").args(namespaces).args(["sh", "-c", probe]).output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => {
            let why = String::from_utf8_lossy(&output.stderr);
            return say_skipped(&format!(
                "no namespace with a tap device here (root is needed): {}",
                why.trim()
            ));
        }
        Err(error) => return say_skipped(&format!("no unshare ({error}): apt-get install util-linux")),
    }
    let image = match guest::image() {
        Ok(image) => image,
        Err(why) => return say_skipped(&why),
    };
    // Should this process be killed, so is the next, and with its namespace everything in it.
    let output = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "unshare"])
        .args(namespaces)
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "inside_the_namespaces", "--ignored", "--nocapture"])
        .env(IMAGE, image)
        .output()
        .unwrap();
    let log = [output.stdout, output.stderr].concat();
    let log = String::from_utf8_lossy(&log);
    print!("{log}");
    assert!(output.status.success() && log.contains("1 passed"), "see above");
}

/// Everything on the link is ours: two addresses of each family on a tap device.
fn set_up_tap() {
    let ip = |args: &str| {
        let output = Command::new("ip").args(args.split(' ')).output().unwrap();
        assert!(output.status.success(), "ip {args}: {}", String::from_utf8_lossy(&output.stderr));
    };
    ip("link set lo up");
    ip(&format!("tuntap add {TAP} mode tap"));
    ip(&format!("link set {TAP} mtu {LINK_MTU} txqueuelen {QUEUE_LEN} up"));
    for addr in OWN {
        let no_wait = if addr.contains(':') { " nodad" } else { "" };
        ip(&format!("addr add {addr} dev {TAP}{no_wait}"));
    }
}

#[test]
#[ignore = "linux_soft_roce_and_we_agree runs it inside namespaces of its own"]
fn inside_the_namespaces() {
    let Some(image) = std::env::var_os(IMAGE).map(PathBuf::from) else {
        return say_skipped("this part runs inside namespaces that linux_soft_roce_and_we_agree makes");
    };
    set_up_tap();
    let link = Link::up(TAP);
    let mut guest = Guest::boot(&image, &link);
    let mut failed = Vec::new();
    let addr = |text: &str| text.parse::<IpAddr>().unwrap();
    for (own, peer) in [(RAW_V4, GUEST_V4), (RAW_V6, GUEST_V6)] {
        let mut raw = Raw::bind(addr(own), addr(peer));
        for (name, check) in packets::CHECKS {
            run(&format!("{own}: {name}"), &mut failed, || check(&mut guest, &mut raw));
        }
    }
    for (own, peer, mtus) in [(OURS_V4, GUEST_V4, &[256, 1024, 4096][..]), (OURS_V6, GUEST_V6, &[1024])] {
        let ours = Ours::new(addr(own), addr(peer), None);
        for &mtu in mtus {
            for (name, check) in requester::CHECKS.iter().chain(responder::CHECKS) {
                run(&format!("{own}, MTU {mtu}: {name}"), &mut failed, || check(&mut guest, &ours, mtu));
            }
        }
    }
    for (own, peer) in [(OURS_V4, GUEST_V4), (OURS_V6, GUEST_V6)] {
        let ours = Ours::new(addr(own), addr(peer), Some(lossy::plan()));
        let name =
            format!("{own}: our packets are lost, doubled, damaged, late; nothing is lost or done twice");
        run(&name, &mut failed, || lossy::ours_suffer(&mut guest, &ours));
        drop(ours);
        let ours = Ours::new(addr(own), addr(peer), None);
        let name = format!("{own}: Linux' packets are; nothing is lost or done twice");
        run(&name, &mut failed, || lossy::guests_suffer(&mut guest, &ours, &link));
    }
    assert!(failed.is_empty(), "failed: {failed:#?}");
}

/// One check's failure does not hide the others'.
fn run(name: &str, failed: &mut Vec<String>, check: impl FnOnce()) {
    let started = Instant::now();
    let ended = catch_unwind(AssertUnwindSafe(check));
    let verdict = if ended.is_ok() { "ok    " } else { "FAILED" };
    println!("{verdict} {name} ({:.1} s)", started.elapsed().as_secs_f32());
    if ended.is_err() {
        failed.push(name.to_owned());
    }
}
