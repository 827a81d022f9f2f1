//! The whole product on our mlx5 provider, on the distribution's unmodified libibverbs and libmlx5, on the emulated
//! device that `ffi/preload` presents to them: what runs on a ConnectX, but for the card.
//!
//! The provider by itself, under the contract suite: `runtime/hca/tests/mlx5.rs`.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CStr;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::Arc;

use ibex::config::{Config, RoutePolicy};
use ibex::error::Error;
use ibex::harness::{Rig, StepPlan};
use ibex::ids::Rank;
use ibex::reference::inputs::{InputKey, RankInput};
use ibex::reference::routing::Routing;
use ibex::session::{DeviceWrapper, Replacement, WorldOptions};
use ibex_hca::mlx5::{self, LiveObjects, LoadError, Mlx5Config, Mlx5Hca};
use ibex_hca::{AsyncEvent, Hca};
use serde_json::Value;

#[expect(unsafe_code, reason = "loads the double of a driver, and hands kernels to it")]
#[path = "cuda/double.rs"]
mod double;
#[path = "mlx5/gpu.rs"]
mod gpu;
#[path = "cuda/group.rs"]
mod group;

/// Set in the process with the shim.
const INSIDE: &str = "IBEX_TEST_INSIDE_SHIM";

/// A shape that takes milliseconds, all of it through queue pairs.
fn config() -> Config {
    Config {
        num_ranks: 3,
        max_tokens: 9,
        hidden: 272,
        num_experts: 8,
        max_topk: 3,
        // Other tests share the cores.
        detect_ms: 20_000,
        route: RoutePolicy::Ibgda,
        ..Config::default()
    }
}

/// The shim's library, which is built beside this program; none, loudly, if something is missing.
fn shim() -> Option<PathBuf> {
    let skip = |why: &str| {
        // Straight to stderr: the runner hides what a passing test prints.
        let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
        None
    };
    if let Err(error @ LoadError::NotFound { .. }) = mlx5::devices() {
        return skip(&error.to_string());
    }
    let library = std::env::current_exe().unwrap().parent().unwrap().join("libibex_preload.so");
    match library.exists() {
        true => Some(library),
        false => skip("libibex_preload.so was not built: cargo build --release -p ibex-preload"),
    }
}

/// A program with this many devices on one fabric.
fn with_devices(program: &str, shim: &PathBuf, devices: usize, link: &str, report: &PathBuf) -> Command {
    let mut command = Command::new(program);
    command
        .env("LD_PRELOAD", shim)
        .env("IBEX_PRELOAD_DEVICES", devices.to_string())
        .env("IBEX_PRELOAD_LINK", link)
        .env("IBEX_PRELOAD_DOORBELLS", "strict")
        .env("IBEX_PRELOAD_DIR", env!("CARGO_TARGET_TMPDIR"))
        .env("IBEX_PRELOAD_REPORT", report);
    command
}

fn said(output: &Output) -> String {
    [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat()
}

/// One counter of every device, from the shim's report.
fn counters(report: &PathBuf, key: &str) -> Vec<u64> {
    let text = std::fs::read_to_string(report).unwrap();
    let counter = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        (words.len() == 3 && words[1] == key).then(|| words[2].parse().unwrap())
    };
    text.lines().filter_map(counter).collect()
}

/// What the kernels can be asked for: each is another set of WQEs.
const MODES: [&str; 6] = [
    "--dtype fp8 --combine exact",
    "--dtype bf16 --combine reduced",
    "--dtype fp8 --combine reduced --graph",
    "--dtype bf16 --combine exact --graph --hooks --lanes 2",
    "--dtype bf16 --combine exact --signal fetch-add",
    "--dtype fp8 --combine reduced --assist-doorbells",
];

/// Runs `bench ep` on eight ranks and this many devices; everything is right, and every WQE was rung.
fn bench(shim: &PathBuf, link: &str, devices: usize, mode: &str) {
    let run = format!("{link}, {devices} devices, {mode}");
    let scratch = |name: &str| PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("mlx5-{name}"));
    let (report, json) = (scratch("report.txt"), scratch("bench.json"));
    let mut command = with_devices(env!("CARGO_BIN_EXE_ibex"), shim, devices, link, &report);
    let flags = "bench ep --provider mlx5 --check --route ibgda --ranks 8 --tokens 9 --hidden 272 --experts 16 \
                 --topk 3 --iters 3 --warmup 1 --detect-ms 20000 --link";
    let flags = flags.split_whitespace().chain([link]).chain(mode.split_whitespace());
    let output = command.args(flags).arg("--json").arg(&json).output().unwrap();
    let said = said(&output);
    assert!(output.status.success(), "{run}: {said}");
    for rank in 0..8 {
        let chosen = format!("rank {rank}    mlx5_{} port 1, GID", rank % devices);
        assert!(said.contains(&chosen), "{run}: what was chosen is printed: {said}");
    }
    let value: Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!((&value["wrong"], &value["lost"]), (&0.into(), &0.into()), "{run}");
    assert_eq!((value["provider"].as_str(), &value["unrung_wqes"]), (Some("mlx5"), &Value::Null), "{run}");
    assert!(value["bytes"]["rdma"].as_u64().unwrap() > 0, "{run}: rows travelled through queue pairs");
    // The device's word, which a real one would not give.
    assert_eq!(counters(&report, "unrung_wqes"), vec![0; devices], "{run}");
    assert!(counters(&report, "wqes").iter().all(|wqes| *wqes > 0), "{run}");
}

#[test]
fn bench_ep_is_right_on_eight_devices_of_either_link_and_every_wqe_is_rung() {
    let Some(shim) = shim() else { return };
    for link in ["roce", "ib"] {
        MODES.iter().for_each(|mode| bench(&shim, link, 8, mode));
    }
    // Ranks that share devices share doorbell pages too, and have registers of their own on them.
    [1, 3].into_iter().for_each(|devices| bench(&shim, "roce", devices, MODES[0]));
}

/// The inputs of one step.
fn inputs(rig: &Rig, iteration: u64) -> Vec<RankInput> {
    let config = rig.config();
    (0..config.num_ranks)
        .map(|rank| {
            let key = InputKey { seed: 5, iteration, rank: Rank(rank as u16) };
            RankInput::generate(config, Routing::Uniform, key, config.max_tokens)
        })
        .collect()
}

fn check_step(rig: &Rig, iteration: u64) {
    let verdict = rig.step(&inputs(rig, iteration), &StepPlan::default()).unwrap();
    assert!(verdict.checked > 0);
    assert_eq!((verdict.wrong, verdict.lost), (0, 0), "step {iteration}");
}

/// What the devices were told since the last call: command, kind of object, number.
fn take_trace(device: u32) -> Vec<(String, String, String)> {
    let found = of_the_shim(c"ibex_preload_take_trace");
    #[expect(unsafe_code, reason = "calls a function of the preloaded library, found by name")]
    let text = {
        // SAFETY: the signature that ffi/preload/src/report.rs declares.
        let take: unsafe extern "C" fn(u32, *mut u8, usize) -> usize = unsafe { std::mem::transmute(found) };
        let mut bytes = vec![0; 1 << 22];
        // SAFETY: room for as many bytes as are announced.
        let len = unsafe { take(device, bytes.as_mut_ptr(), bytes.len()) };
        assert!(len <= bytes.len());
        bytes.truncate(len);
        String::from_utf8(bytes).unwrap()
    };
    let record = |line: &str| {
        let words: Vec<&str> = line.split(' ').collect();
        assert_eq!((words.len(), words[5]), (6, "OK"), "{line}");
        (words[2].to_owned(), words[3].to_owned(), words[4].to_owned())
    };
    text.lines().map(record).collect()
}

/// The trace of one device while pairs were replaced names old and new objects of those pairs, and no other.
fn assert_touches_only(trace: &[(String, String, String)], num_pairs: usize, num_channels: usize) {
    let of = |prefix: &str| -> BTreeSet<(String, String)> {
        let those = trace.iter().filter(|(op, ..)| op.starts_with(prefix));
        those.map(|(_, kind, number)| (kind.clone(), number.clone())).collect()
    };
    let (made, gone) = (of("CREATE_"), of("DESTROY_"));
    for (op, kind, number) in trace.iter().filter(|(_, _, number)| number != "-") {
        // Asking the way to a peer makes a domain and gives it back.
        let is_own = [&made, &gone].iter().any(|objects| objects.contains(&(kind.clone(), number.clone())));
        assert!(is_own || kind == "Pd", "{op} {kind} {number} is no object of the replaced pairs");
    }
    for objects in [&made, &gone] {
        let mut counts = BTreeMap::<&str, usize>::new();
        objects.iter().for_each(|(kind, _)| *counts.entry(kind).or_default() += 1);
        // One control queue pair and, per channel, one that kernels drive; two keys: region and combine slab.
        let queues = num_pairs * (num_channels + 1);
        assert_eq!(counts, BTreeMap::from([("Cq", queues), ("Mkey", num_pairs * 2), ("Qp", queues)]));
    }
}

/// In the process with the shim: three ranks on three devices, one of them replaced between two checked steps.
fn replace() {
    let rig = Rig::new(&config(), &given(&[open(0), open(1), open(2)])).unwrap();
    for iteration in 0..3 {
        check_step(&rig, iteration);
    }
    let channels = rig.config().num_channels() as usize;
    for (round, replaced) in [Rank(1), Rank(0), Rank(2)].into_iter().enumerate() {
        let healthy = [0, 1, 2].map(Rank).into_iter().filter(|rank| *rank != replaced).collect::<Vec<_>>();
        let numbers = || rig.world().session(healthy[0]).queue_pairs(healthy[1]);
        let before = numbers();
        (0..3).for_each(|idx| drop(take_trace(idx)));
        rig.world().replace_peer(replaced, Replacement::default()).unwrap();
        assert_eq!(before, numbers(), "the healthy pair keeps its queue pairs");
        for rank in [0, 1, 2].map(Rank) {
            let num_pairs = if rank == replaced { 2 } else { 1 };
            assert_touches_only(&take_trace(rank.0.into()), num_pairs, channels);
        }
        check_step(&rig, 3 + round as u64);
    }
}

/// Runs `test` of this program again in a process with three devices, and there calls `body`. Gives the devices'
/// report to the outer process.
fn under_the_shim(test: &str, body: impl FnOnce()) -> Option<PathBuf> {
    if std::env::var_os(INSIDE).is_some() {
        body();
        return None;
    }
    let shim = shim()?;
    let report = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("mlx5-{test}.txt"));
    let program = std::env::current_exe().unwrap();
    let mut command = with_devices(program.to_str().unwrap(), &shim, 3, "roce", &report);
    let output = command.args(["--exact", test, "--nocapture"]).env(INSIDE, "1").output().unwrap();
    assert!(output.status.success(), "{}", said(&output));
    assert!(said(&output).contains("1 passed"), "{}", said(&output));
    Some(report)
}

#[test]
fn a_replaced_peer_touches_its_own_objects_only() {
    if let Some(report) = under_the_shim("a_replaced_peer_touches_its_own_objects_only", replace) {
        assert_eq!(counters(&report, "unrung_wqes"), [0; 3]);
    }
}

fn open(idx: usize) -> Arc<Mlx5Hca> {
    let config = Mlx5Config { device: Some(format!("mlx5_{idx}")), ..Mlx5Config::default() };
    Mlx5Hca::open(&config).unwrap()
}

fn given(devices: &[Arc<Mlx5Hca>]) -> WorldOptions {
    let devices = devices.iter().map(|device| Arc::clone(device) as Arc<dyn Hca>).collect();
    WorldOptions { devices: DeviceWrapper::given(devices), ..WorldOptions::default() }
}

/// Looks a function of the shim up.
fn of_the_shim(name: &CStr) -> *mut libc::c_void {
    #[expect(unsafe_code, reason = "a lookup by name among the loaded libraries")]
    // SAFETY: a lookup by name.
    let found = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    assert!(!found.is_null(), "{name:?}: this process runs under the shim");
    found
}

/// Has the call behind the next `skip` ones of the libraries to the kernel fail; 0 takes that back. Whether a failure
/// was waiting.
fn fail_call(skip: u32, errno: i32) -> bool {
    let found = of_the_shim(c"ibex_preload_fail_call");
    #[expect(unsafe_code, reason = "calls a function of the preloaded library")]
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let fail: extern "C" fn(u32, i32) -> bool = unsafe { std::mem::transmute(found) };
    fail(skip, errno)
}

fn remove(device: u32) {
    let found = of_the_shim(c"ibex_preload_remove");
    #[expect(unsafe_code, reason = "calls a function of the preloaded library")]
    // SAFETY: the signature that ffi/preload/src/faults.rs declares.
    let remove: extern "C" fn(u32) = unsafe { std::mem::transmute(found) };
    remove(device);
}

/// Fails one call of the libraries to the kernel after the other while a world is made and a step is run, until none
/// fails.
fn fail_every_call() {
    let devices = [open(0), open(1)];
    let config = Config { num_ranks: 2, channels: Some(1), max_tokens: 4, ..config() };
    let mut refused = 0;
    for skip in 0.. {
        fail_call(skip, libc::EPERM);
        let made = Rig::new(&config, &given(&devices)).map(|rig| (!fail_call(0, 0), rig));
        fail_call(0, 0);
        match made {
            Ok((has_struck, rig)) => {
                // A call that can be done without: a neighbour that the kernel does not know is known to its peer.
                check_step(&rig, 0);
                if !has_struck {
                    break;
                }
            }
            Err(Error::Command(_) | Error::Os(_)) => refused += 1,
            Err(error) => panic!("call {skip}: {error:?}"),
        }
        for device in &devices {
            assert_eq!(device.live(), LiveObjects::default(), "call {skip}: nothing is left");
        }
    }
    assert!(refused >= 40, "{refused} calls were refused");
}

#[test]
fn every_call_to_the_kernel_may_fail_while_a_group_comes_up_and_nothing_is_left() {
    let test = "every_call_to_the_kernel_may_fail_while_a_group_comes_up_and_nothing_is_left";
    under_the_shim(test, fail_every_call);
}

/// One of three ranks loses its device between two steps.
fn lose_a_device() {
    const GONE: Rank = Rank(2);
    let devices = [open(0), open(1), open(2)];
    let rig = Rig::new(&config(), &given(&devices)).unwrap();
    check_step(&rig, 0);
    remove(GONE.0.into());
    let session = rig.world().session(GONE);
    let told = session.take_device_events().unwrap();
    assert_eq!(told.iter().map(|told| told.event).collect::<Vec<_>>(), [AsyncEvent::DeviceRemoved]);
    assert_eq!(session.suspected().unwrap(), [Rank(0), Rank(1)]);
    assert_eq!(session.telemetry().unwrap().device_events.removals, 1);
    // A step that meets it; the others' hosts stop their side, as their keepers would.
    let (inputs, plan) = (inputs(&rig, 1), StepPlan::default());
    rig.load(&inputs, &plan).unwrap();
    rig.launch(rig.config().max_topk, &plan).unwrap();
    for rank in [Rank(0), Rank(1)] {
        rig.world().session(rank).begin_fence(GONE).unwrap();
    }
    rig.synchronize().unwrap();
    let verdict = rig.check(&inputs).unwrap();
    assert_eq!(verdict.wrong, 0, "what is missing is said to be: {verdict:?}");
    assert!(verdict.lost > 0);
    let error = rig.world().replace_peer(GONE, Replacement::default()).unwrap_err();
    assert!(matches!(error, Error::Command(_) | Error::Os(_)), "{error:?}");
    drop(rig);
    for device in &devices {
        assert_eq!(device.live(), LiveObjects::default(), "{}: nothing is left", device.name());
    }
}

#[test]
fn a_rank_whose_device_is_removed_is_lost_honestly_and_lets_go_of_everything() {
    let test = "a_rank_whose_device_is_removed_is_lost_honestly_and_lets_go_of_everything";
    under_the_shim(test, lose_a_device);
}
