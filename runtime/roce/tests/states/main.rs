//! Every event in every state of both halves, as tables.
//!
//! `requester.txt` and `responder.txt` hold one line for each pair; a line that changes is a change of behaviour
//! and is reviewed as such. To write them anew after such a change: `IBEX_BLESS=1 cargo test -p ibex-roce`.
//! *stale* and *repeated* are legal and change nothing; *dropped* should not have come; *refused* and *failed* end
//! the connection.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message of a test")]

#[path = "../rig/mod.rs"]
mod rig;

mod requester;
mod responder;

use std::fmt::Write as _;
use std::path::Path;

/// A packet that is built from its headers and parsed again, as it would arrive.
struct Datagram(Vec<u8>);

impl Datagram {
    fn new(headers: ibex_roce::wire::Headers, payload: &[u8]) -> Self {
        let packet = ibex_roce::wire::Packet::new(headers, payload);
        let mut bytes = vec![0xa5; packet.len()];
        packet.emit(&mut bytes).unwrap();
        Self(bytes)
    }

    fn packet(&self) -> ibex_roce::wire::Packet<'_> {
        ibex_roce::wire::Packet::parse(&self.0).unwrap()
    }
}

/// The table of all pairs, one line each.
fn table<S: Copy, E: Copy>(
    states: &[(&str, S)],
    events: &[(&str, E)],
    outcome: impl Fn(S, E) -> String,
) -> String {
    let mut table = String::new();
    for (state_name, state) in states {
        writeln!(table, "{state_name}").unwrap();
        for (event_name, event) in events {
            writeln!(table, "  {event_name:<28} {}", outcome(*state, *event)).unwrap();
        }
    }
    table
}

fn compare(name: &str, table: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/states").join(name);
    if std::env::var_os("IBEX_BLESS").is_some() {
        std::fs::write(&path, table).unwrap();
    }
    let kept = std::fs::read_to_string(&path).unwrap_or_default();
    let changed: Vec<String> = kept
        .lines()
        .zip(table.lines())
        .filter(|(kept, now)| kept != now)
        .map(|(kept, now)| format!("- {kept}\n+ {now}"))
        .collect();
    assert!(changed.is_empty(), "{name}:\n{}", changed.join("\n"));
    assert_eq!(kept.lines().count(), table.lines().count(), "{name} has other lines");
}
