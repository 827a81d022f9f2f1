//! The `ibex` command from outside: exit codes, refusals, reports.
//!
//! Runs are small: what they measure is not the point here, that they are honest is.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::path::PathBuf;
use std::process::{Command, Output};

use serde_json::Value;

/// A shape that takes milliseconds.
const SMALL: [&str; 16] = [
    "--ranks",
    "2",
    "--tokens",
    "9",
    "--hidden",
    "272",
    "--experts",
    "8",
    "--topk",
    "3",
    "--iters",
    "3",
    "--warmup",
    "1",
    "--seed",
    "5",
];

fn ibex(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_ibex")).args(args).output().unwrap()
}

fn exit_code(output: &Output) -> i32 {
    output.status.code().expect("the command exits by itself")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A path in cargo's directory for this test.
fn scratch(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(name)
}

/// The small shape with some of its flags replaced and others added.
fn small_with(flags: &[&'static str]) -> Vec<&'static str> {
    let mut args: Vec<&str> = [&["bench", "ep"], &SMALL[..]].concat();
    let starts = (0..flags.len()).filter(|&i| flags[i].starts_with("--"));
    for start in starts {
        if let Some(place) = args.iter().position(|&arg| arg == flags[start]) {
            args.drain(place..place + 2);
        }
    }
    args.extend(flags);
    args
}

/// Runs `bench ep` on the small shape, expects success, and returns its report.
fn bench_ep(name: &str, flags: &[&'static str]) -> Value {
    let file = scratch(&format!("{name}.json"));
    let mut args = small_with(flags);
    args.extend(["--json", file.to_str().unwrap()]);
    let output = ibex(&args);
    assert_eq!(exit_code(&output), 0, "{name}: {}{}", text(&output.stdout), text(&output.stderr));
    serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap()
}

fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<&str> = value.as_object().unwrap().keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

/// The command must refuse with exit code 2 and one line that contains every one of `words`.
fn refused(args: &[&str], words: &[&str]) {
    let output = ibex(args);
    let complaint = text(&output.stderr);
    assert_eq!(exit_code(&output), 2, "{args:?}: {complaint}");
    assert_eq!(complaint.lines().count(), 1, "{args:?}: {complaint}");
    for word in words {
        assert!(complaint.contains(word), "{args:?}: {complaint:?} lacks {word:?}");
    }
    assert!(output.stdout.is_empty(), "{args:?}: a refused run prints nothing");
}

#[test]
fn shapes_that_do_not_exist_are_refused() {
    let ep = |flags: &[&'static str]| [&["bench", "ep"], flags].concat();
    refused(&ep(&["--topk", "33"]), &["max_topk", "33", "1..=32"]);
    refused(&ep(&["--topk", "9", "--experts", "8"]), &["max_topk", "9", "num_experts = 8"]);
    refused(&ep(&["--routing", "group-limited", "--experts", "252"]), &["num_experts", "252", "8"]);
    refused(&ep(&["--routing", "group-limited", "--experts", "8", "--topk", "5"]), &["max_topk", "5", "4"]);
    refused(&ep(&["--ranks", "0"]), &["num_ranks", "1..=512"]);
    refused(&ep(&["--ranks", "513"]), &["num_ranks", "513"]);
    refused(&ep(&["--tokens", "65536"]), &["max_tokens", "65536"]);
    refused(&ep(&["--hidden", "7176"]), &["hidden", "7176", "multiple of 16"]);
    refused(&ep(&["--experts", "0"]), &["num_experts"]);
    refused(&ep(&["--ring", "9"]), &["ring", "9", "1..=8"]);
    refused(&ep(&["--lanes", "0"]), &["lanes"]);
    refused(&ep(&["--channels", "17"]), &["channels", "17"]);
    refused(&ep(&["--detect-ms", "0"]), &["detect_ms"]);
    refused(&ep(&["--stall-ms", "5"]), &["stall_ms", "detect_ms = 100"]);
    refused(&ep(&["--dtype", "bf16", "--scales", "pow2"]), &["--scales", "bf16"]);
}

#[test]
fn words_that_do_not_exist_are_refused() {
    refused(&["bench", "ep", "--dtype", "fp4"], &["fp4", "bf16, fp8"]);
    refused(&["bench", "ep", "--tokens", "many"], &["many", "--tokens"]);
    refused(&["bench", "ep", "--tokens", "-3"], &["-3"]);
    refused(&["bench", "ep", "--iters", "0"], &["--iters", "0"]);
    refused(&["bench", "ep", "--frobnicate"], &["--frobnicate"]);
    refused(&["launch"], &["--ranks"]);
    refused(&["bench", "post", "--tokens", "3"], &["--tokens"]);
}

#[test]
fn a_device_that_is_not_there_is_refused_with_a_sentence() {
    let output = ibex(&["bench", "ep", "--provider", "mlx5", "--nics", "mlx5_ibex_none"]);
    let said = text(&output.stderr);
    assert_eq!((exit_code(&output), said.lines().count()), (2, 1), "{said}");
    // Without the libraries it says what to install, without the device which ones there are.
    assert!(said.contains("ibverbs-providers") || said.contains("mlx5_ibex_none"), "{said}");
    refused(&["bench", "ep", "--nics", "mlx5_0"], &["--nics", "--provider emulated"]);
    refused(&["bench", "ep", "--provider", "mlx5", "--fabric", "sim"], &["--fabric", "of their own"]);
}

#[test]
fn a_gpu_that_is_not_there_is_refused_with_a_sentence() {
    if ibex::gpu::cuda::Driver::load().is_err() {
        for bench in ["ep", "post"] {
            refused(&["bench", bench, "--gpu", "cuda"], &["libcuda.so.1"]);
        }
        refused(&["bench", "ep", "--gpu", "cuda", "--baseline", "nccl"], &["libcuda.so.1"]);
        refused(&["bench", "ep", "--gpu", "cuda", "--procs", "--ranks", "2"], &["libcuda.so.1"]);
        refused(&["bench", "ep", "--gpu", "cuda", "--provider", "mlx5"], &["libcuda.so.1"]);
    }
    refused(&["bench", "ep", "--baseline", "nccl"], &["--baseline nccl", "--gpu host"]);
    let several = ["bench", "ep", "--gpu", "cuda", "--baseline", "nccl", "--procs"];
    refused(&several, &["--baseline nccl", "several processes"]);
    refused(&["bench", "ep", "--gpu", "cuda", "--fabric", "sim"], &["--fabric sim", "simulation"]);
    refused(&["bench", "ep", "--gpu-uuid", "7"], &["--gpu-uuid", "32 hexadecimal digits"]);
    let uuid = "GPU-00000000-0000-0000-0000-000000000000";
    refused(&["bench", "ep", "--gpu-uuid", uuid], &["--gpu-uuid", "--gpu host"]);
}

#[test]
fn what_is_not_built_yet_is_refused_and_says_what_is() {
    let refuses = |bench: &'static str, flags: &[&'static str], built: &str| {
        refused(&[&["bench", bench], flags].concat(), &[flags[0], "not built yet", built]);
    };
    refuses("post", &["--provider", "mlx5"], "emulated");
    refuses("ep", &["--provider", "mlx5", "--procs"], "one process");
    for bench in ["ep", "post"] {
        refuses(bench, &["--store", "tcp://127.0.0.1:7"], "store");
    }
    refuses("post", &["--fabric", "shm"], "inproc");
    refuses("post", &["--fabric", "udp"], "inproc");
    refuses("post", &["--procs"], "one process");
    refuses("post", &["--hosts", "netns"], "one process");
    refused(&["bench", "post", "--fabric", "sim"], &["--fabric sim"]);
}

#[test]
fn fabrics_and_processes_that_do_not_fit_are_refused() {
    for fabric in ["shm", "udp"] {
        refused(&["bench", "ep", "--fabric", fabric], &["one process", "--procs"]);
    }
    refused(&["bench", "ep", "--procs", "--fabric", "sim"], &["--fabric sim", "several processes"]);
    refused(&["bench", "ep", "--procs", "--hosts", "netns", "--fabric", "shm"], &["hosts share no memory"]);
    refused(
        &["bench", "ep", "--procs", "--hosts", "netns", "--ranks", "8", "--num-hosts", "3"],
        &["--num-hosts"],
    );
    let nowhere = scratch("no-such-plan.json");
    refused(
        &["bench", "ep", "--procs", "--fabric", "udp", "--faults-plan", nowhere.to_str().unwrap()],
        &["cannot read", "no-such-plan.json"],
    );
    refused(&["launch", "--ranks", "2", "--num-hosts", "2", "true"], &["--num-hosts", "--hosts local"]);
    refused(
        &["launch", "--ranks", "2", "--", "no-such-command-anywhere"],
        &["cannot start", "no-such-command"],
    );
}

#[test]
fn a_report_that_cannot_be_written_is_refused_before_the_run() {
    let nowhere = scratch("no-such-directory/report.json");
    let nowhere = nowhere.to_str().unwrap();
    for bench in ["ep", "post"] {
        refused(&["bench", bench, "--json", nowhere], &["cannot write", "report.json"]);
    }
    refused(&["bench", "ep", "--plot", nowhere], &["cannot write"]);
}

#[test]
fn help_and_version_are_no_errors() {
    for args in [&["--help"][..], &["--version"], &["bench", "ep", "--help"], &["bench", "post", "--help"]] {
        let output = ibex(args);
        assert_eq!(exit_code(&output), 0);
        assert!(!output.stdout.is_empty() && output.stderr.is_empty());
    }
}

/// One wrong byte a step, in a run that is right otherwise.
#[test]
fn a_wrong_byte_ends_a_checked_run_with_exit_code_1() {
    let file = scratch("corrupt.json");
    let mut args = small_with(&["--check", "--route", "ibgda", "--corrupt"]);
    args.extend(["--json", file.to_str().unwrap()]);
    let output = ibex(&args);
    assert_eq!(exit_code(&output), 1, "{}{}", text(&output.stdout), text(&output.stderr));
    assert!(text(&output.stdout).contains("4 wrong"), "{}", text(&output.stdout));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(
        (&report["wrong"], &report["lost"], &report["unrung_wqes"]),
        (&4.into(), &0.into(), &0.into())
    );
    refused(&small_with(&["--corrupt"]), &["--check"]);
}

#[test]
fn a_checked_run_reports_every_key() {
    let report = bench_ep("keys", &["--check", "--route", "ibgda"]);
    let expected = [
        "baseline",
        "baseline_us",
        "buffer_bytes",
        "bytes",
        "combine_us",
        "commit",
        "config",
        "copy_bytes",
        "copy_method",
        "copy_ratio",
        "copy_ratio_min",
        "copy_us",
        "cqes",
        "dispatch_us",
        "doorbells",
        "fabric",
        "fault_counts",
        "floor_ratio",
        "gpu",
        "lost",
        "memcpy_floor_us",
        "packets",
        "provider",
        "seed",
        "tensor_bytes",
        "unrung_wqes",
        "wqes",
        "wrong",
    ];
    assert_eq!(keys(&report), expected);
    for operation in ["dispatch_us", "combine_us"] {
        assert_eq!(keys(&report[operation]), ["p50", "p90", "p99", "p999"]);
        let (p50, p999) = (report[operation]["p50"].as_f64(), report[operation]["p999"].as_f64());
        assert!(p50.unwrap() > 0.0 && p50 <= p999);
    }
    for pair in ["memcpy_floor_us", "floor_ratio", "copy_us", "copy_bytes", "copy_ratio"] {
        assert_eq!(keys(&report[pair]), ["combine", "dispatch"]);
        assert!(report[pair]["dispatch"].as_f64().unwrap() > 0.0);
    }
    // On the host both are memcpy, told as times the floor and as part of the kernels' time.
    assert_eq!(report["copy_us"], report["memcpy_floor_us"]);
    let product = ["floor_ratio", "copy_ratio"].map(|key| report[key]["combine"].as_f64().unwrap());
    assert!((product[0] * product[1] - 1.0).abs() < 1e-9, "{product:?}");
    assert!(report["copy_ratio_min"].is_null() && report["baseline"].is_null());
    assert_eq!(keys(&report["bytes"]), ["local", "peer", "rdma"]);
    for number in ["wrong", "lost", "unrung_wqes"] {
        assert_eq!(report[number], 0, "{number}");
    }
    for number in ["wqes", "doorbells", "cqes", "buffer_bytes", "tensor_bytes"] {
        assert!(report[number].as_u64().unwrap() > 0, "{number}");
    }
    assert!(report["bytes"]["rdma"].as_u64().unwrap() > 0);
    let config = &report["config"];
    assert_eq!((&config["ranks"], &config["tokens"], &config["check"]), (&2.into(), &9.into(), &true.into()));
    assert_eq!((&config["procs"], &config["hosts"]), (&false.into(), &"local".into()));
    assert!(config["num_hosts"].is_null() && config["faults_plan"].is_null());
    let names = ["provider", "gpu", "fabric"].map(|key| report[key].as_str().unwrap());
    assert_eq!(names, ["emulated", "host", "inproc"]);
    assert_eq!(report["seed"], 5);
}

#[test]
fn every_mode_runs_and_is_right() {
    let cases: [(&str, &[&'static str]); 11] = [
        ("bf16", &["--dtype", "bf16"]),
        ("pow2", &["--scales", "pow2", "--routing", "zipf"]),
        ("ue8m0", &["--scales", "ue8m0", "--routing", "khot"]),
        ("reduced", &["--combine", "reduced", "--routing", "group-limited"]),
        ("fetch-add", &["--signal", "fetch-add", "--link", "ib"]),
        ("graph", &["--graph"]),
        ("hooks", &["--hooks", "--ring", "1"]),
        ("graph-hooks", &["--graph", "--hooks", "--lanes", "2"]),
        ("ibgda", &["--route", "ibgda", "--channels", "3"]),
        ("one-rank", &["--ranks", "1"]),
        ("simulated", &["--fabric", "sim"]),
    ];
    for (name, flags) in cases {
        let report = bench_ep(name, &[flags, &["--check"]].concat());
        let found = ["wrong", "lost", "unrung_wqes"].map(|key| report[key].as_u64().unwrap());
        assert_eq!(found, [0; 3], "{name}");
    }
}

#[test]
fn no_tokens_is_a_valid_run_without_a_ratio() {
    let report = bench_ep("no-tokens", &["--tokens", "0", "--check"]);
    for ratio in ["floor_ratio", "copy_ratio"] {
        assert!(report[ratio]["dispatch"].is_null() && report[ratio]["combine"].is_null(), "{ratio}");
    }
}

#[test]
fn a_histogram_is_one_complete_svg() {
    let file = scratch("latency.svg");
    let mut args = small_with(&[]);
    args.extend(["--plot", file.to_str().unwrap()]);
    let output = ibex(&args);
    assert_eq!(exit_code(&output), 0);
    let svg = std::fs::read_to_string(file).unwrap();
    assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    assert!(svg.contains("dispatch") && svg.contains("combine") && svg.contains("p50"));
}

#[test]
fn info_reports_memory_without_a_run() {
    let output = ibex(&["info"]);
    assert_eq!(exit_code(&output), 0);
    let report = text(&output.stdout);
    for word in ["providers", "cuda image", "buffers", "tensors", "timers"] {
        assert!(report.contains(word), "{word} is missing:\n{report}");
    }
}

/// What would change nothing is refused: `info` runs nothing.
#[test]
fn info_takes_shapes_alone() {
    let buffers = |flags: &[&str]| {
        let output = ibex(&[&["info"], flags].concat());
        assert_eq!(exit_code(&output), 0, "{}", text(&output.stderr));
        text(&output.stdout).lines().find(|line| line.starts_with("buffers")).unwrap().to_owned()
    };
    assert_ne!(buffers(&["--ring", "4"]), buffers(&[]));
    for flag in [
        &["--iters", "3"][..],
        &["--warmup", "1"],
        &["--seed", "2"],
        &["--check"],
        &["--graph"],
        &["--hooks"],
        &["--procs"],
        &["--fabric", "sim"],
        &["--route", "ibgda"],
        &["--routing", "zipf"],
    ] {
        refused(&[&["info"], flag].concat(), &[flag[0]]);
    }
    refused(&["info", "--topk", "33"], &["max_topk", "33", "1..=32"]);
    // What counts is said, not what was asked for: retries outlast a stall, a lease three limits of silence.
    let said = text(&ibex(&["info", "--detect-ms", "100"]).stdout);
    for timer in
        ["detect 100 ms, stall 2000 ms", "8 attempts of 2^16 x 4.096 us", "after 2147 ms", "lease 300 ms"]
    {
        assert!(said.contains(timer), "no '{timer}' in {said}");
    }
}

/// All defaults but for the number of steps and the route; `detect_ms` too.
#[test]
fn the_published_setting_over_queue_pairs_loses_nothing() {
    let file = scratch("published.json");
    let output = ibex(&[
        "bench",
        "ep",
        "--route",
        "ibgda",
        "--check",
        "--iters",
        "2",
        "--warmup",
        "1",
        "--json",
        file.to_str().unwrap(),
    ]);
    assert_eq!(exit_code(&output), 0, "{}{}", text(&output.stdout), text(&output.stderr));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let found = ["wrong", "lost", "unrung_wqes"].map(|key| report[key].as_u64().unwrap());
    assert_eq!(found, [0; 3]);
    let config = &report["config"];
    let shape = ["ranks", "tokens", "hidden", "experts", "topk", "detect_ms"];
    assert_eq!(shape.map(|key| config[key].as_u64().unwrap()), [8, 128, 7168, 256, 8, 100]);
    assert!(report["bytes"]["rdma"].as_u64().unwrap() > 0 && report["bytes"]["peer"] == 0);
}

#[test]
fn posted_wqes_are_all_checked_and_reported() {
    let file = scratch("post.json");
    let json = file.to_str().unwrap();
    let output = ibex(&["bench", "post", "--iters", "1", "--warmup", "0", "--seed", "9", "--json", json]);
    assert_eq!(exit_code(&output), 0, "{}{}", text(&output.stdout), text(&output.stderr));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let expected =
        ["bytes", "bytes_per_s", "inline", "latency_us", "memcpy_bytes_per_s", "qps", "ratio", "wqe_per_s"];
    assert!(rows.iter().all(|row| keys(row) == expected));
    let has = |bytes: u64, inline: bool| rows.iter().any(|r| r["bytes"] == bytes && r["inline"] == inline);
    assert!(has(7168, false) && has(28, true));
    assert_eq!(report["seed"], 9);
    assert_eq!((&report["wrong"], &report["unrung_wqes"]), (&0.into(), &0.into()));
}

#[test]
fn stores_are_measured_beside_what_the_same_bytes_cost() {
    let file = scratch("bench-store.json");
    let json = file.to_str().unwrap();
    let output = ibex(&["bench", "store", "--iters", "1", "--warmup", "0", "--json", json]);
    assert_eq!(exit_code(&output), 0, "{}{}", text(&output.stdout), text(&output.stderr));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!(report["wrong"], 0);
    let rows = report["rows"].as_array().unwrap();
    let expected = ["keys", "limit", "limit_us", "operation", "ratio", "store", "target_us", "us"];
    assert!(rows.iter().all(|row| keys(row) == expected), "{rows:?}");
    for store in ["memory:", "ibex://, loopback"] {
        let of_it = rows.iter().filter(|row| row["store"] == store);
        let operations: Vec<_> = of_it.map(|row| row["operation"].as_str().unwrap()).collect();
        let wanted =
            ["batch_get", "batch_get", "batch_get", "publish", "cached resolve", "publish to invalidation"];
        assert_eq!(operations, wanted, "{store}");
    }
    assert!(text(&output.stdout).contains("0 outcomes wrong"));
    refused(&["bench", "store", "--store", "mysql://x"], &["mysql"]);
    refused(&["bench", "store", "--iters", "0"], &["--iters"]);
}

#[test]
fn a_replaced_rank_is_measured_in_all_that_it_costs() {
    let file = scratch("rejoin.json");
    let json = file.to_str().unwrap();
    let flags = ["--ranks", "3", "--qps-per-peer", "2", "--command-us", "1", "--iters", "2", "--json", json];
    let output = ibex(&[&["bench", "rejoin"], &flags[..]].concat());
    assert_eq!(exit_code(&output), 0, "{}{}", text(&output.stdout), text(&output.stderr));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    assert_eq!((&report["wrong"], &report["command_us"]), (&0.into(), &1.into()));
    let row = &report["rows"][0];
    let times = ["agree_ms", "gate_ms", "pause_ms", "recreate_all_ms", "recreate_ms", "rejoin_ms"];
    let counts =
        ["control_bytes", "qps_created", "qps_created_all", "qps_destroyed", "qps_per_peer", "ranks"];
    let mut expected = [times, counts].concat();
    expected.sort_unstable();
    assert_eq!(keys(row), expected);
    for time in times {
        let at = |share: &str| row[time][share].as_f64().unwrap();
        assert!(at("p50") > 0.0 && at("p50") <= at("p99"), "{time}: {row}");
    }
    // Two that kernels drive, and one for signs of life; of one peer, and of two.
    let qps = ["qps_created", "qps_destroyed", "qps_created_all"].map(|key| row[key].as_u64().unwrap());
    assert_eq!(qps, [3, 3, 6]);
    refused(&["bench", "rejoin", "--ranks", "1"], &["--ranks"]);
}

/// How long it takes is for a quiet machine to say; here each kind must be noticed for what it is.
#[test]
fn each_kind_of_loss_is_noticed_by_the_evidence_that_it_is_about() {
    let file = scratch("detect.json");
    let json = file.to_str().unwrap();
    // A lease that a busy machine renews in time.
    let output = ibex(&["bench", "detect", "--trials", "1", "--detect-ms", "3000", "--json", json]);
    assert!(exit_code(&output) <= 1, "{}{}", text(&output.stdout), text(&output.stderr));
    let report: Value = serde_json::from_str(&std::fs::read_to_string(file).unwrap()).unwrap();
    let rows = report["rows"].as_array().unwrap();
    let expected = ["evidence", "is_within", "limit_ms", "max_ms", "p50_ms", "p99_ms", "trials", "wrong"];
    assert!(rows.iter().all(|row| keys(row) == expected && row["trials"] == 1), "{rows:?}");
    let wrong = |row: &Value| (row["evidence"].as_str().unwrap().to_owned(), row["wrong"].as_u64().unwrap());
    let found: Vec<_> = rows.iter().map(wrong).collect();
    assert_eq!(found, ["deadline", "completion", "exit", "lease"].map(|kind| (kind.to_owned(), 0)));
    assert_eq!(report["wrong"], 0);
    // What runs out cannot do so sooner: kernels count from their first look, leases from their last renewal.
    let least_ms = |row: usize| rows[row]["p50_ms"].as_f64().unwrap();
    assert!(
        least_ms(0) >= 900.0 && least_ms(3) >= report["lease_ttl_ms"].as_f64().unwrap() / 3.0,
        "{rows:?}"
    );
    refused(&["bench", "detect", "--trials", "0"], &["--trials"]);
}

#[test]
fn a_run_in_one_process_can_be_captured() {
    let file = scratch("one-process.pcapng");
    let path = file.to_str().unwrap().to_owned().leak();
    let output = ibex(&small_with(&["--route", "ibgda", "--pcap", path]));
    assert_eq!(exit_code(&output), 0, "{}", text(&output.stderr));
    let said = text(&output.stderr);
    let packets: u64 = said.split("captured ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap();
    let bytes = std::fs::read(&file).unwrap();
    // A section header begins the file; each packet has at least a block, an Ethernet and an IP header.
    assert_eq!(bytes[..4], 0x0a0d_0d0a_u32.to_ne_bytes());
    assert!(packets > 100 && bytes.len() as u64 > packets * 80, "{packets} packets in {} bytes", bytes.len());
    let unwritable = ibex(&small_with(&["--pcap", "/nonexistent/x.pcapng"]));
    assert_eq!(exit_code(&unwritable), 2);
    assert!(text(&unwritable.stderr).contains("/nonexistent/x.pcapng"));
}
