//! Ranks that are processes: on one host over shared memory and UDP, on several that are network namespaces, through
//! faults, and what is left of them when they end, well or badly.
//!
//! Asserts only what must hold without determinism. The kernels' limits are far above what a busy machine needs.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

#[path = "multi_node/cleanup.rs"]
mod cleanup;
#[path = "multi_node/group.rs"]
mod group;
#[path = "multi_node/launching.rs"]
mod launching;

use group::{BAD_NETWORKS, Machine, Scratch, bench, report_of, text};

/// A shape that a busy machine moves in milliseconds.
const SMALL: [&str; 10] =
    ["--tokens", "12", "--hidden", "512", "--experts", "32", "--topk", "4", "--iters", "2"];

/// The small shape; the published one with `IBEX_FULL=1`.
fn shape() -> Vec<&'static str> {
    match std::env::var_os("IBEX_FULL") {
        Some(_) => vec!["--iters", "3"],
        None => SMALL.to_vec(),
    }
}

/// Runs `bench ep --procs --check` and expects that nothing is wrong and nothing lost; its report.
fn checked(name: &str, flags: &[&str]) -> serde_json::Value {
    checked_at(&shape(), name, flags)
}

/// The same at a shape of its own.
fn checked_at(shape: &[&str], name: &str, flags: &[&str]) -> serde_json::Value {
    let file = Scratch::new(name, "json");
    let mut args = vec!["--procs", "--check", "--warmup", "1", "--json", file.path()];
    args.extend(shape);
    if !flags.contains(&"--detect-ms") {
        args.extend(["--detect-ms", "20000"]);
    }
    args.extend(flags);
    let output = bench(&args);
    let said = format!("{name} {flags:?}: {}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}");
    let report = report_of(&file);
    let found = ["wrong", "lost", "unrung_wqes"].map(|key| report[key].as_u64().unwrap());
    assert_eq!(found, [0; 3], "{said}");
    report
}

#[test]
fn eight_processes_over_shared_memory() {
    for seed in 1..=10 {
        let seed = seed.to_string();
        let report = checked("shm", &["--fabric", "shm", "--route", "ibgda", "--seed", &seed]);
        assert!(report["bytes"]["rdma"].as_u64().unwrap() > 0 && report["bytes"]["peer"] == 0);
        assert_eq!(report["fabric"], "shm");
    }
}

#[test]
fn eight_processes_over_udp() {
    for seed in 1..=10 {
        let seed = seed.to_string();
        let report = checked("udp", &["--fabric", "udp", "--route", "ibgda", "--seed", &seed]);
        assert!(report["bytes"]["rdma"].as_u64().unwrap() > 0 && report["bytes"]["peer"] == 0);
        assert_eq!(report["fabric"], "udp");
    }
}

#[test]
fn processes_of_one_host_map_each_other() {
    for flags in [&[][..], &["--graph", "--hooks", "--lanes", "2"], &["--combine", "reduced", "--link", "ib"]]
    {
        let report = checked("mapped", flags);
        let bytes = &report["bytes"];
        assert!(bytes["peer"].as_u64().unwrap() > 0 && bytes["rdma"] == 0, "{flags:?}: {bytes}");
    }
}

#[test]
fn four_hosts_of_two_ranks_over_udp() {
    if Machine::lacks_namespaces() {
        return;
    }
    for seed in 1..=10 {
        let seed = seed.to_string();
        let report = checked("netns", &["--hosts", "netns", "--num-hosts", "4", "--seed", &seed]);
        // Two ranks share a host and map each other; the other six are reached through the network.
        let bytes = ["peer", "rdma"].map(|route| report["bytes"][route].as_u64().unwrap());
        assert!(bytes.iter().all(|bytes| *bytes > 0), "{bytes:?}");
        assert_eq!(report["fabric"], "udp");
    }
}

/// Limits under faults. A lost last packet or acknowledgement costs an early retry, and several may follow each other,
/// each later than the one before; what all peers lose in one half adds up. 5 s are too few at the published shape.
fn under_faults() -> [&'static str; 6] {
    let limit = if std::env::var_os("IBEX_FULL").is_some() { "17000" } else { "4250" };
    ["--route", "ibgda", "--detect-ms", limit, "--stall-ms", limit]
}

#[test]
fn four_hosts_with_a_faulty_network() {
    if Machine::lacks_namespaces() {
        return;
    }
    let num_seeds = if std::env::var_os("IBEX_FULL").is_some() { 3 } else { 10 };
    for network in BAD_NETWORKS {
        for seed in 1..=num_seeds {
            let plan = Scratch::new(network.name, "plan");
            plan.write(&format!("{{\"seed\": {seed}, \"rules\": [{}]}}", network.rules));
            let hosts = ["--hosts", "netns", "--num-hosts", "4", "--faults-plan", plan.path()];
            let seed = seed.to_string();
            let flags = [&hosts[..], &["--seed", &seed], &under_faults()].concat();
            let report = checked(network.name, &flags);
            // What the plan says did happen, and was repaired.
            let (faults, packets) = (&report["fault_counts"], &report["packets"]);
            for kind in network.counts {
                assert!(faults[kind].as_u64().unwrap() > 0, "{}: no packet {kind}: {faults}", network.name);
            }
            assert!(packets["sent_again"].as_u64().unwrap() > 0, "{}: {packets}", network.name);
            // A report says under what it came about.
            let config = &report["config"];
            assert_eq!((&config["procs"], &config["num_hosts"]), (&true.into(), &4.into()));
            assert!(!config["faults_plan"]["rules"].as_array().unwrap().is_empty(), "{config}");
        }
    }
}

#[test]
fn four_hosts_where_the_kernel_drops_one_packet_in_a_hundred() {
    if Machine::lacks_namespaces() || Machine::lacks_nft() {
        return;
    }
    let file = Scratch::new("nft", "json");
    // Once per namespace, before that namespace's ranks have met.
    let rules = "add table inet loss; add chain inet loss in { type filter hook input priority 0; }; \
                 add rule inet loss in udp dport 4791 numgen random mod 100 < 1 counter drop";
    let script = format!(
        "[ $LOCAL_RANK != 0 ] || nft '{rules}' || exit 9; \"$@\" --fabric udp --json {} || exit; \
         [ $LOCAL_RANK != 0 ] || nft list table inet loss",
        file.path()
    );
    let bench = [&["bench", "ep", "--check", "--warmup", "1"], &under_faults()[..], &shape()].concat();
    let ibex = env!("CARGO_BIN_EXE_ibex");
    let launch =
        ["launch", "--ranks", "8", "--hosts", "netns", "--num-hosts", "4", "--", "sh", "-c", &script];
    let output = group::ibex(&[&launch[..], &["sh", ibex], &bench].concat());
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let report = report_of(&file);
    assert_eq!(["wrong", "lost"].map(|key| report[key].as_u64().unwrap()), [0; 2]);
    assert!(report["packets"]["sent_again"].as_u64().unwrap() > 0, "{}", report["packets"]);
    // Each host's kernel counted what it dropped.
    let said = text(&output.stdout);
    let dropped = said.lines().filter_map(|line| line.split_once("counter packets ")?.1.split(' ').next());
    let dropped: Vec<u64> = dropped.map(|number| number.parse().unwrap()).collect();
    assert!(dropped.len() == 4 && dropped.iter().sum::<u64>() > 0, "{dropped:?}: {said}");
}

#[test]
fn two_hosts_over_ipv6() {
    if Machine::lacks_namespaces() || Machine::lacks_ipv6() {
        return;
    }
    let file = Scratch::new("ipv6", "json");
    // A host's number is that of its ranks, halved.
    let script = "exec \"$@\" --advertise fd77::$((RANK / 2)):$((LOCAL_RANK + 1))";
    let launch =
        ["launch", "--ranks", "4", "--hosts", "netns", "--num-hosts", "2", "--", "sh", "-c", script, "sh"];
    let bench = [env!("CARGO_BIN_EXE_ibex"), "bench", "ep", "--check", "--fabric", "udp", "--route", "ibgda"];
    let flags = ["--detect-ms", "20000", "--json", file.path()];
    let output = group::ibex(&[&launch[..], &bench, &flags, &shape()].concat());
    let said = format!("{}{}", text(&output.stdout), text(&output.stderr));
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert!(said.contains("rank 0 advertises fd77::1 (from --advertise)"), "{said}");
    let report = report_of(&file);
    assert_eq!(["wrong", "lost"].map(|key| report[key].as_u64().unwrap()), [0; 2], "{said}");
}

/// One of the ranks has RoCEv2's port, the other one that is free.
#[test]
fn two_ranks_behind_one_address() {
    if Machine::lacks_namespaces() {
        return;
    }
    let file = Scratch::new("one-address", "json");
    let launch = ["launch", "--ranks", "2", "--hosts", "netns", "--num-hosts", "1", "--"];
    let bench = [env!("CARGO_BIN_EXE_ibex"), "bench", "ep", "--check", "--fabric", "udp", "--route", "ibgda"];
    let flags = ["--advertise", "10.77.0.1", "--detect-ms", "20000", "--json", file.path()];
    let output = group::ibex(&[&launch[..], &bench, &flags, &shape()].concat());
    assert_eq!(output.status.code(), Some(0), "{}{}", text(&output.stdout), text(&output.stderr));
    let report = report_of(&file);
    assert_eq!(["wrong", "lost"].map(|key| report[key].as_u64().unwrap()), [0; 2]);
    assert!(report["bytes"]["rdma"].as_u64().unwrap() > 0);
}

#[test]
fn shared_memory_ends_at_the_host() {
    if Machine::lacks_namespaces() {
        return;
    }
    let ibex = env!("CARGO_BIN_EXE_ibex");
    let launch = ["launch", "--ranks", "2", "--hosts", "netns", "--", ibex, "bench", "ep", "--fabric", "shm"];
    let output = group::ibex(&[&launch[..], &shape()].concat());
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is on another host") && said.contains("udp does"), "{said}");
}
