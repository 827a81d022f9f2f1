//! Other people's clients: ModelExpress's own, Mooncake's own engine, and Python's gRPC, which knows nothing
//! of us but what reflection says. And what views of the same records must keep to, from outside.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use ibex_metadata::clock::Clock;
use ibex_metadata::error::StoreError;
use ibex_metadata::grpc::{RemoteStore, Secret, ServerConfig, TlsFiles};
use ibex_metadata::ids::{BufferId, InstanceId, Revision, Version};
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::record::{
    Buffer, BufferState, Identity, Nixl, NixlReach, PeerRecord, RecordState, SourceIdentity, TransferEngine,
    Way,
};
use ibex_metadata::store::{Change, Claim, Filter, Store};

#[expect(dead_code, reason = "shared with other tests")]
mod served;
use served::{Running, http, loopback, memory, runtime, scratch, tcp};

/// Where `.ci/run tools` puts the peers' packages.
const VENV: &str = concat!(env!("CARGO_TARGET_TMPDIR"), "/peers");
/// What they are, and the libraries that Mooncake's engine loads.
const PACKAGES: &str = "apt-get install libibverbs1 libnuma1 libcurl4, and .ci/run tools (pip packages)";

/// A script of `tests/peers`, running, by the first Python that there is.
fn script(name: &str, args: &[&str]) -> Option<Child> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/peers").join(name);
    let pythons = [Path::new(VENV).join("bin/python3"), PathBuf::from("python3")];
    pythons.iter().find_map(|python| {
        // Generous: the machine may be busy; a client that hangs must not hold it for hours.
        let mut command = Command::new("timeout");
        command.arg("500").arg(python).arg(&script).args(args);
        if !python.exists() && python.is_absolute() {
            return None;
        }
        command.stdout(Stdio::piped()).spawn().ok()
    })
}

/// What a script printed to its end; `None`, and said so, where what it needs is missing.
fn ended(child: Option<Child>) -> Option<String> {
    let output = child.map(|child| child.wait_with_output().unwrap());
    match output.as_ref().and_then(|output| output.status.code()) {
        Some(0) => Some(String::from_utf8(output.unwrap().stdout).unwrap()),
        None | Some(3 | 127) => {
            let said = output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned());
            // Around the test harness, which keeps what a passing test says to itself.
            let _ = writeln!(
                std::io::stderr(),
                "SKIPPED: the peers' clients ({}): {PACKAGES}",
                said.unwrap_or_default()
            );
            None
        }
        code => panic!("it ended with {code:?}: {}", String::from_utf8_lossy(&output.unwrap().stdout)),
    }
}

fn claim(name: &str) -> Claim {
    Claim {
        name: RecordName::parse(name).unwrap(),
        instance: InstanceId::new(1).unwrap(),
        ttl: Duration::from_secs(3600),
        takeover: false,
    }
}

/// Publishes a record that no view made.
async fn publish(store: &RemoteStore, name: &str, fill: impl FnOnce(&mut PeerRecord)) {
    let hold = store.claim(&claim(name)).await.unwrap();
    let mut record = PeerRecord::empty(&hold.name, Identity::Instance(hold.instance));
    record.state = RecordState::Ready;
    fill(&mut record);
    store.publish(&hold, Version(0), &record).await.unwrap();
}

fn client(address: SocketAddr) -> RemoteStore {
    RemoteStore::new(&tcp(address), Clock::system()).unwrap()
}

fn redb() -> Running {
    let store = LocalStore::redb(&scratch(".redb"), Clock::system()).unwrap();
    Running::start(ServerConfig { listen: loopback(), ..ServerConfig::default() }, store, Clock::system())
}

#[test]
fn the_real_model_express_client_works_unchanged() {
    let server = redb();
    let address = server.address.unwrap();
    runtime().block_on(async {
        let store = client(address);
        let source = SourceIdentity { model: "native".into(), ..SourceIdentity::default() };
        let reach = Some(NixlReach::Blob(b"native".to_vec()));
        let nixl = Nixl { agent: "agent-5".into(), reach, ..Nixl::default() };
        publish(&store, "prod/moe/rank-5", |record| {
            record.rank = Some(5);
            record.source = Some(source);
            record.transports = vec![Way::Nixl(nixl).into()];
        })
        .await;
        // No source, or no transport of ModelExpress's: not listed there.
        publish(&store, "prod/moe/rank-6", |_| {}).await;
        let Some(said) = ended(script("workers.py", &[&address.to_string()])) else { return };
        assert_eq!(said.lines().next(), Some("native prod/moe/rank-5"), "{said}");
        let source_id = said.trim().lines().last().unwrap().strip_prefix("source ").unwrap().to_owned();
        // The same workers, as anybody reads records.
        let filter = Filter::under(Prefix::parse(&format!("modelexpress/{source_id}")).unwrap());
        let page = store.list(&filter).await.unwrap();
        let names: Vec<_> = page.entries.iter().map(|entry| entry.snapshot.name.parts().2).collect();
        assert_eq!(
            names,
            [
                "artifact.r0",
                "empty-nixl.r0",
                "engine.r1",
                "large.r4",
                "nixl.r3",
                "none.r2",
                "shared.r1",
                "shared.r12",
                "shared.r6"
            ]
        );
        for entry in &page.entries {
            let record = &entry.snapshot.record;
            assert_eq!(record.source.as_ref().unwrap().source_id(), source_id);
            assert_eq!(record.identity, Identity::Legacy, "no process id is made up");
            assert!(entry.remaining.is_some_and(|left| left <= Duration::from_secs(90)));
        }
        let large = &page.entries[3].snapshot.record;
        assert!(large.manifests[0].bytes > 1 << 20 && large.rank == Some(4));
        let Way::Nixl(empty) = &page.entries[1].snapshot.record.transports[0].way else { panic!() };
        assert_eq!(empty.reach, Some(NixlReach::Blob(Vec::new())), "an empty blob is a blob");
    });
    server.kill();
}

#[test]
fn the_real_mooncake_engine_registers_finds_transfers_and_unregisters() {
    let server = memory(ServerConfig { listen: loopback(), ..ServerConfig::default() });
    let address = server.address.unwrap();
    runtime().block_on(async {
        let store = client(address);
        let url = format!("http://{address}/metadata");
        let Some(said) = ended(script("engines.py", &[&url])) else { return };
        assert!(said.contains("moved 2097152") && said.contains("gone 127.0.0.1:"), "{said}");
        // The same segments, as anybody watches records: empty, with a buffer, empty again, given back.
        let mut watch = store.watch(&Prefix::parse("mooncake/segments").unwrap(), Revision(0)).await.unwrap();
        let mut seen = Vec::new();
        while seen.iter().filter(|seen| **seen == "released").count() < 2 {
            match watch.next().await.unwrap().change {
                Change::Put(snapshot) if snapshot.stamp.version == Version(0) => {}
                Change::Put(snapshot) => {
                    assert!(matches!(&snapshot.record.transports[0].way, Way::TransferEngine(engine)
                        if engine.data_port != 0 && engine.protocol_version == 2));
                    seen.push(if snapshot.record.buffers.is_empty() { "empty" } else { "buffer" });
                }
                Change::Released { .. } => seen.push("released"),
                other => panic!("{other:?}"),
            }
        }
        for wanted in [("empty", 4), ("buffer", 2), ("released", 2)] {
            let count = seen.iter().filter(|seen| **seen == wanted.0).count();
            assert_eq!((wanted.0, count), wanted, "{seen:?}");
        }
    });
    server.kill();
}

#[test]
fn an_outsider_finds_its_way_by_reflection_and_sees_an_orderly_end() {
    let made = rcgen::generate_simple_self_signed(vec!["store.example".into()]).unwrap();
    let ca = scratch(".pem");
    std::fs::write(&ca, made.cert.pem()).unwrap();
    let tls = TlsFiles {
        cert_pem: made.cert.pem().into_bytes(),
        key_pem: made.signing_key.serialize_pem().into_bytes(),
    };
    let token = Some(Secret::new("correct-horse").unwrap());
    let (listen, metrics) = (loopback(), loopback());
    let server = memory(ServerConfig { listen, metrics, tls: Some(tls), token, unix: None });
    let (address, metrics) = (server.address.unwrap().to_string(), server.metrics.unwrap().to_string());
    let child = script("outsider.py", &[&address, &metrics, ca.to_str().unwrap(), "correct-horse"]);
    let Some(mut child) = child else {
        ended(None);
        return server.kill();
    };
    let mut output = BufReader::new(child.stdout.take().unwrap());
    let mut said = String::new();
    output.read_line(&mut said).unwrap();
    if said.trim() == "watching" {
        server.stop.send(()).unwrap();
        assert!(runtime().block_on(server.ended).unwrap(), "the server ends without an error");
    }
    output.read_to_string(&mut said).unwrap();
    // The output is read already; what is left is how it ended.
    if ended(Some(child)).is_some() {
        assert_eq!(said.lines().collect::<Vec<_>>(), ["watching", "ended"]);
    }
}

#[test]
fn a_crashed_mooncake_engine_registers_again_and_a_live_one_keeps_its_name() {
    let server = memory(ServerConfig { listen: loopback(), ..ServerConfig::default() });
    let address = server.address.unwrap();
    runtime().block_on(async {
        let store = client(address);
        let url = format!("http://{address}/metadata");
        let Some(said) = ended(script("crash.py", &[&url])) else { return };
        let mut said = said.lines();
        let name = said.next().unwrap().strip_prefix("again ").unwrap().replace(':', "_3a");
        assert_eq!(said.next(), Some("refused while it lives"));
        // What the dead process had was given back, and nothing of it came back.
        let name = RecordName::parse(&format!("mooncake/segments/{name}")).unwrap();
        let mut watch = store.watch(&Prefix::from(&name), Revision(0)).await.unwrap();
        let (mut fences, mut lens) = (Vec::new(), Vec::new());
        loop {
            match watch.next().await.unwrap().change {
                Change::Put(snapshot) if snapshot.stamp.version > Version(0) => {
                    let addresses = snapshot.record.buffers.iter().map(|buffer| buffer.len);
                    lens.push(addresses.collect::<Vec<_>>());
                    fences.push(snapshot.stamp.fence);
                }
                Change::Put(_) => {}
                Change::Released { fence, .. } if Some(&fence) == fences.first() => {
                    lens.push(vec![0]);
                }
                Change::Released { .. } => break,
                other => panic!("{other:?}"),
            }
        }
        fences.dedup();
        assert_eq!(fences.len(), 2, "another fence for another process");
        assert_eq!(lens, [vec![], vec![1 << 20], vec![0], vec![], vec![2 << 20], vec![]]);
    });
    server.kill();
}

/// Status and body of an answer.
fn parts(reply: &str) -> (u16, &str) {
    let (head, body) = reply.split_once("\r\n\r\n").unwrap_or_else(|| panic!("{reply:?}"));
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body)
}

#[test]
fn mooncakes_keys_answer_as_its_own_servers_do_and_refuse_by_name() {
    let server = redb();
    let address = server.address.unwrap();
    let descriptor =
        r#"{"name":"10.0.0.1:1","buffers":[{"addr":1,"length":2,"name":"cpu:0"}],"tcp_data_port":7}"#;
    let large = format!(r#"{{"name":"10.0.0.1:1","filler":"{}"}}"#, "x".repeat(200_000));
    let huge = vec![b' '; 5 << 20];
    let meta = "/metadata?key=mooncake%2Frpc_meta%2Fm";
    let gone = "/metadata?key=mooncake%2Frpc_meta%2Fb";
    let alive = format!(r#"{{"ip_or_host_name":"127.0.0.1","rpc_port":{}}}"#, address.port());
    let ram = "/metadata?key=mooncake%2Fram%2Fa";
    let cases: &[(&str, &str, &[u8], u16, &str)] = &[
        ("GET", ram, b"", 404, "metadata not found"),
        ("DELETE", ram, b"", 404, "metadata not found"),
        ("PUT", ram, descriptor.as_bytes(), 200, "metadata updated"),
        ("GET", ram, b"", 200, descriptor),
        ("PUT", ram, large.as_bytes(), 200, "metadata updated"),
        ("GET", ram, b"", 200, &large),
        ("PUT", ram, descriptor.as_bytes(), 200, "metadata updated"),
        ("GET", ram, b"", 200, descriptor),
        ("PUT", ram, b"[1]", 400, "a JSON object"),
        ("PUT", ram, br#"{"tcp_data_port":70000}"#, 400, "ports below 65536"),
        ("PUT", ram, b"\xff\xfe", 400, "a JSON object"),
        ("PUT", ram, &huge, 413, ""),
        ("GET", ram, b"", 200, descriptor),
        ("DELETE", ram, b"", 200, "metadata deleted"),
        ("GET", ram, b"", 404, "metadata not found"),
        ("DELETE", ram, b"", 404, "metadata not found"),
        ("PUT", ram, descriptor.as_bytes(), 200, "metadata updated"),
        ("GET", ram, b"", 200, descriptor),
        ("GET", meta, b"", 404, "metadata not found"),
        ("PUT", meta, b"first", 200, "metadata updated"),
        ("PUT", meta, b"first", 200, "metadata unchanged"),
        ("PUT", meta, b"second", 400, "rpc_meta"),
        ("GET", meta, b"", 200, "first"),
        ("DELETE", meta, b"", 200, "metadata deleted"),
        ("GET", meta, b"", 404, "metadata not found"),
        ("PUT", meta, b"second", 200, "metadata updated"),
        // Nobody listens at a port that is as good as never given out; a name that says nothing is kept.
        ("PUT", gone, br#"{"ip_or_host_name":"127.0.0.1","rpc_port":1}"#, 200, "metadata updated"),
        ("PUT", gone, br#"{"ip_or_host_name":"127.0.0.1","rpc_port":2}"#, 200, "metadata updated"),
        ("PUT", gone, alive.as_bytes(), 200, "metadata updated"),
        ("PUT", gone, br#"{"ip_or_host_name":"127.0.0.1","rpc_port":3}"#, 400, "no longer answered"),
        ("GET", gone, b"", 200, &alive),
        ("PUT", "/metadata?key=anything", b"", 200, "metadata updated"),
        ("GET", "/metadata?key=anything", b"", 200, ""),
        ("PUT", "/metadata?key=anything", &huge[..70_000], 413, "a cell of 70000 is too large"),
        ("POST", ram, b"{}", 405, "method not allowed"),
        ("GET", "/metadata", b"", 400, "key"),
        ("GET", "/metadata?key=%zz", b"", 400, "percent-encoded"),
    ];
    runtime().block_on(async {
        for (method, path, body, status, wanted) in cases {
            let reply = http(address, method, path, "", body).await;
            let (got, text) = parts(&reply);
            assert_eq!(got, *status, "{method} {path}: {text}");
            assert!(text.contains(wanted), "{method} {path}: {text}");
        }
        let store = client(address);
        let name = RecordName::parse("mooncake/segments/a").unwrap();
        let found = store.get(&name).await.unwrap();
        assert_eq!(found.unchecked().record.buffers[0].location, "cpu:0", "the same record");
    });
    server.kill();
}

#[test]
fn mooncake_finds_a_peer_that_it_did_not_put() {
    let server = memory(ServerConfig { listen: loopback(), ..ServerConfig::default() });
    let address = server.address.unwrap();
    runtime().block_on(async {
        let store = client(address);
        publish(&store, "prod/moe/rank-0", |record| {
            let session = "10.0.0.9:12345".to_owned();
            let (host, data_port) = ("10.0.0.9".to_owned(), 7001);
            let engine =
                TransferEngine { session, host, data_port, protocol_version: 2, ..Default::default() };
            record.transports = vec![Way::TransferEngine(engine).into()];
            let buffer = |id, addr, state| Buffer {
                buffer_id: BufferId(id),
                addr,
                len: 4096,
                state,
                ..Buffer::default()
            };
            record.buffers =
                vec![buffer(1, 1 << 40, BufferState::Ready), buffer(2, 8192, BufferState::Draining)];
        })
        .await;
        let get = async |key: &str| http(address, "GET", &format!("/metadata?key={key}"), "", b"").await;
        let reply = get("mooncake/ram/10.0.0.9:12345").await;
        let (status, body) = parts(&reply);
        assert_eq!(status, 200, "{body}");
        for wanted in
            ["\"tcp_data_port\":7001", "\"addr\":1099511627776,\"length\":4096", "\"tcp_proto_version\":2"]
        {
            assert!(body.contains(wanted), "{wanted} in {body}");
        }
        assert!(!body.contains("8192"), "a buffer that drains is not offered: {body}");
        let reply = get("mooncake/rpc_meta/10.0.0.9:12345").await;
        assert_eq!(parts(&reply), (200, r#"{"ip_or_host_name":"10.0.0.9","rpc_port":12345}"#));
        for other in ["mooncake/ram/10.0.0.9:1", "mooncake/c1/ram/10.0.0.9:12345"] {
            assert_eq!(parts(&get(other).await).0, 404, "{other}");
        }
    });
    server.kill();
}

#[test]
fn views_want_the_token_too() {
    let token = Secret::new("correct-horse").unwrap();
    let config = ServerConfig { listen: loopback(), token: Some(token), ..ServerConfig::default() };
    let server = memory(config);
    let address = server.address.unwrap();
    let path = "/metadata?key=mooncake/ram/a";
    runtime().block_on(async {
        for headers in ["", "Authorization: Bearer wrong-horse\r\n", "Authorization: correct-horse\r\n"] {
            for (method, body) in [("PUT", "{}"), ("GET", ""), ("DELETE", "")] {
                let reply = http(address, method, path, headers, body.as_bytes()).await;
                assert_eq!(parts(&reply), (401, "the store refused the token"), "{method} {headers}");
            }
        }
        let good = "Authorization: Bearer correct-horse\r\n";
        assert_eq!(parts(&http(address, "GET", path, good, b"").await).0, 404, "nothing got in before");
        assert_eq!(parts(&http(address, "PUT", path, good, b"{}").await).0, 200);
    });
    server.kill();
}

#[test]
fn a_view_of_a_store_that_is_away_says_so() {
    // The store behind the server is another server, which nobody runs.
    let nowhere = tcp("127.0.0.1:1".parse().unwrap());
    let running = runtime();
    let server = running.block_on(async {
        let store = Arc::new(RemoteStore::new(&nowhere, Clock::system()).unwrap());
        let config = ServerConfig { listen: loopback(), ..ServerConfig::default() };
        ibex_metadata::grpc::Server::bind(config, store, Clock::system()).await.unwrap()
    });
    let address = server.address().unwrap();
    running.spawn(server.serve(std::future::pending()));
    runtime().block_on(async {
        let reply = http(address, "GET", "/metadata?key=mooncake/ram/a", "", b"").await;
        let (status, body) = parts(&reply);
        assert!(status == 503 && body.contains("unavailable"), "{status} {body}: not a 404");
        let error = client(address).health().await.unwrap_err();
        assert!(matches!(error, StoreError::Unavailable { .. }), "{error:?}");
    });
}
