//! How ranks are started: by `ibex launch`, and by whatever else sets the variables of a launcher.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Output, Stdio};
use std::thread;
use std::time::Duration;

use crate::cleanup::{Running, kill};
use crate::group::{command, free_port, ibex, text};
use crate::shape;

#[test]
fn every_line_has_its_rank_and_every_rank_its_place() {
    let script = "echo rank $RANK of $WORLD_SIZE, local $LOCAL_RANK of $LOCAL_WORLD_SIZE at $MASTER_ADDR; \
                  test -n \"$IBEX_TOKEN\" && test -n \"$MASTER_PORT\"";
    let output = ibex(&["launch", "--ranks", "3", "--", "sh", "-c", script]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    let mut lines: Vec<String> = text(&output.stdout).lines().map(str::to_string).collect();
    lines.sort();
    let expected = |r: u32| format!("[rank {r}] rank {r} of 3, local {r} of 3 at 127.0.0.1");
    assert_eq!(lines, (0..3).map(expected).collect::<Vec<_>>());
}

#[test]
fn the_first_failure_is_told_and_gives_the_exit_code() {
    let script = "[ $RANK = 1 ] || exec sleep 1000; echo the reason >&2; exit 7";
    let output = ibex(&["launch", "--ranks", "3", "--", "sh", "-c", script]);
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(7), "{said}");
    assert!(said.contains("[rank 1] the reason"), "{said}");
    assert!(said.contains("ibex: rank 1 failed first") && said.ends_with("the reason\n"), "{said}");
}

#[test]
fn a_rank_that_a_signal_killed_gives_128_and_its_number() {
    let output =
        ibex(&["launch", "--ranks", "2", "--", "sh", "-c", "[ $RANK = 0 ] || kill -9 $$; sleep 1000"]);
    assert_eq!(output.status.code(), Some(137), "{}", text(&output.stderr));
}

#[test]
fn a_signal_to_the_launcher_reaches_every_rank() {
    for (signal, number) in [("HUP", 1), ("INT", 2), ("TERM", 15)] {
        let script =
            format!("trap 'echo got {signal}; exit 0' {signal}; echo ready; while :; do sleep 0.1; done");
        let mut command = command(&["launch", "--ranks", "2", "--", "sh", "-c", &script]);
        let mut group = Running(command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap());
        let mut lines = BufReader::new(group.0.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut next_two = || {
            let mut two: Vec<String> = lines.by_ref().take(2).collect();
            two.sort();
            two
        };
        assert_eq!(next_two(), ["[rank 0] ready", "[rank 1] ready"]);
        kill(group.id(), &format!("-{signal}"));
        assert_eq!(next_two(), [0, 1].map(|rank| format!("[rank {rank}] got {signal}")));
        assert_eq!(group.wait().code(), Some(128 + number), "SIG{signal}");
    }
}

/// Starts one rank of a bench with these variables.
fn rank(vars: &[(&str, &str)], flags: &[&str]) -> Child {
    let mut command =
        command(&[&["bench", "ep", "--check", "--detect-ms", "20000"], flags, &shape()].concat());
    command.envs(vars.iter().copied());
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn ends(children: Vec<Child>) -> Vec<Output> {
    children.into_iter().map(|child| child.wait_with_output().unwrap()).collect()
}

#[test]
fn variables_of_any_launcher_make_a_group() {
    // Rank, ranks, and what else this launcher sets.
    let launchers = [
        ("RANK", "WORLD_SIZE", "X"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_JOB_ID"),
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "PMIX_NAMESPACE"),
        ("PMI_RANK", "PMI_SIZE", "PMI_ID"),
    ];
    for (rank_name, size_name, other) in launchers {
        let port = free_port();
        let start = |number: &str| {
            let here = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &port), (other, "17")];
            rank(&[&here[..], &[(rank_name, number), (size_name, "2")]].concat(), &[])
        };
        let outputs = ends(vec![start("1"), start("0")]);
        for output in &outputs {
            assert_eq!(output.status.code(), Some(0), "{rank_name}: {}", text(&output.stderr));
        }
        assert!(outputs[0].stdout.is_empty(), "rank 0 speaks for the group");
        assert!(text(&outputs[1].stdout).contains("0 wrong, 0 picks lost"));
    }
}

#[test]
fn strangers_are_refused_and_the_group_does_not_notice() {
    let port = free_port();
    let start = |number: &str, size: &str, token: &str| {
        let here = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port.as_str()), ("IBEX_TOKEN", token)];
        rank(&[&here[..], &[("RANK", number), ("WORLD_SIZE", size)]].concat(), &[])
    };
    let mut first = start("0", "2", "ours");
    // Another rank 0 that came before the first would hold the port, and wait there for a rank 1.
    while TcpStream::connect(("127.0.0.1", port.parse().unwrap())).is_err() {
        assert_eq!(first.try_wait().unwrap(), None, "rank 0 ended before it listened");
        thread::sleep(Duration::from_millis(10));
    }
    let refused = [
        (start("1", "2", "theirs"), "token"),
        (start("1", "3", "ours"), "the group has 2 ranks"),
        (start("0", "2", "ours"), "cannot listen"),
    ];
    for (child, reason) in refused {
        let output = child.wait_with_output().unwrap();
        let said = text(&output.stderr);
        assert!(output.status.code() == Some(1) && said.contains(reason), "{reason}: {said}");
    }
    let mut stranger = TcpStream::connect(("127.0.0.1", port.parse().unwrap())).unwrap();
    stranger.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
    for output in ends(vec![first, start("1", "2", "ours")]) {
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
    }
}

#[test]
fn ranks_that_differ_or_cannot_be_reached_say_so() {
    let port = free_port();
    let start = |number: &str, flags: &[&str]| {
        let here = [("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", port.as_str()), ("WORLD_SIZE", "2")];
        rank(&[&here[..], &[("RANK", number)]].concat(), flags)
    };
    let outputs = ends(vec![start("0", &["--ring", "2"]), start("1", &["--ring", "3"])]);
    let said: String = outputs.iter().map(|output| text(&output.stderr)).collect();
    assert!(outputs.iter().all(|output| output.status.code() == Some(1)), "{said}");
    assert!(said.contains("runs another version or configuration"), "{said}");

    let nowhere = ["--fabric", "udp", "--advertise", "no.such.host.invalid"];
    let output = rank(
        &[("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", &free_port()), ("RANK", "0"), ("WORLD_SIZE", "1")],
        &nowhere,
    );
    let output = output.wait_with_output().unwrap();
    let said = text(&output.stderr);
    assert!(said.contains("--advertise = \"no.such.host.invalid\" cannot be resolved"), "{said}");

    let output = rank(&[("RANK", "0"), ("WORLD_SIZE", "2")], &[]).wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("RANK is set, but MASTER_ADDR is not"));
}
