//! The contract of stores on Kubernetes' API, as far as a double enforces it. No cluster was used.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use ibex_metadata::clock::Clock;
use ibex_metadata::contract::samples::{every_variant, legacy};
use ibex_metadata::contract::{self, Cached, Subject};
use ibex_metadata::error::StoreError;
use ibex_metadata::ids::{InstanceId, Version};
use ibex_metadata::k8s::{self, K8sConnect, K8sStore, RecordSpec};
use ibex_metadata::name::{Prefix, RecordName};
use ibex_metadata::open::open;
use ibex_metadata::record::PeerRecord;
use ibex_metadata::store::{Change, Claim, Filter, Store};
use ibex_metadata::url::StoreUrl;
use serde_json::Value;

use self::double::Double;
use self::pruning::{fields, prune_value, without};

mod double;
mod pruning;

/// Generous: the machine may be busy with other things.
const BUDGET: Duration = Duration::from_secs(60);

/// The committed definition, as an API server reads it.
fn definition() -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("crd/ibexentries.yaml");
    serde_saphyr::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn schema() -> Value {
    definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"].clone()
}

/// A namespace on the double, driven by a clock that only the test moves.
struct Cluster {
    clock: Clock,
    double: Double,
}

impl Cluster {
    async fn new() -> Self {
        Self::with_schema(Some(schema())).await
    }

    async fn with_schema(schema: Option<Value>) -> Self {
        let clock = Clock::manual();
        Self { double: Double::start(clock.clone(), schema).await, clock }
    }

    fn store(&self, clock: Clock) -> K8sStore {
        let server = Some(format!("http://{}", self.double.address));
        K8sStore::new(&K8sConnect { namespace: "default".into(), server, budget: BUDGET }, clock).unwrap()
    }
}

#[async_trait]
impl Subject for Cluster {
    async fn client(&self, skew_ns: i64) -> Arc<dyn Store> {
        Arc::new(self.store(self.clock(skew_ns)))
    }

    fn clock(&self, skew_ns: i64) -> Clock {
        self.clock.skewed(skew_ns)
    }

    fn short_ttl(&self) -> Duration {
        Duration::from_secs(24)
    }

    async fn pass(&self, duration: Duration) {
        self.clock.advance(duration);
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

#[test]
fn a_namespace_keeps_the_contract() {
    let starting = |name: &str| println!("case {name}");
    runtime().block_on(contract::run("", starting, Cluster::new));
}

#[test]
fn a_cache_in_front_of_a_namespace_keeps_the_contract() {
    let starting = |name: &str| println!("case {name}");
    runtime().block_on(contract::run("", starting, async || Cached(Cluster::new().await)));
}

#[test]
fn the_committed_definition_is_made_from_the_types() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("crd/ibexentries.yaml");
    let hint = "run `cargo run -p ibex-metadata --features k8s --example crd`";
    let committed = std::fs::read_to_string(path).unwrap();
    assert!(committed == k8s::crd_yaml().unwrap(), "crd/ibexentries.yaml is not current: {hint}");
    let made = serde_json::to_value(k8s::crd()).unwrap();
    assert_eq!(definition(), made, "the YAML says what the types say");
    assert_eq!(made["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["type"], "object");
}

/// Every record of the contract.
fn records() -> Vec<(&'static str, PeerRecord)> {
    let legacy = legacy().into_iter().map(|(what, bytes)| (what, PeerRecord::decode(&bytes).unwrap()));
    every_variant().into_iter().chain(legacy).collect()
}

/// A record after a trip through a server with this schema of records.
fn through(schema: &Value, record: &PeerRecord) -> Option<PeerRecord> {
    let mut object = serde_json::to_value(k8s::show(record)).unwrap();
    prune_value(schema, &mut object);
    let shown: RecordSpec = serde_json::from_value(object).ok()?;
    k8s::read(shown).ok()
}

#[test]
fn the_schema_lists_every_field_of_a_record_and_each_is_needed() {
    let schema = schema()["properties"]["spec"]["properties"]["row"]["properties"]["record"].clone();
    for (what, record) in records() {
        let back = through(&schema, &record).unwrap_or_else(|| panic!("{what} is not a record any more"));
        assert_eq!(back, record, "{what}");
        assert_eq!(back.encode().unwrap(), record.encode().unwrap(), "{what}");
    }
    let all = fields(&schema);
    assert!(all.len() > 70, "{} fields", all.len());
    // Dropped from the schema, each field is missed by a record of the contract.
    for path in all {
        let poorer = without(&schema, &path);
        let is_missed = records().iter().any(|(_, record)| through(&poorer, record).as_ref() != Some(record));
        assert!(is_missed, "no record of the contract has {path:?}");
    }
}

#[test]
fn a_server_that_prunes_a_field_loses_it_and_the_contract_notices() {
    let path = ["spec", "row", "record", "buffers", "addr"].map(String::from);
    let poorer = without(&schema(), &path);
    let outcome = std::panic::catch_unwind(|| {
        let fresh = || Cluster::with_schema(Some(poorer.clone()));
        runtime().block_on(contract::run("every_variant", |_| (), fresh));
    });
    assert!(outcome.is_err(), "the double prunes nothing");
}

fn claim(name: &str, owner: u128) -> Claim {
    let (name, instance) = (RecordName::parse(name).unwrap(), InstanceId::new(owner).unwrap());
    Claim { name, instance, ttl: Duration::from_secs(30), takeover: false }
}

#[test]
fn a_cluster_without_our_definition_is_a_configuration_error_not_an_empty_store() {
    runtime().block_on(async {
        let cluster = Cluster::with_schema(None).await;
        let store = cluster.store(cluster.clock.clone());
        let is_told = |error: StoreError| match error {
            StoreError::Input(error) => error.limit.contains("crd/ibexentries.yaml"),
            _ => false,
        };
        let claim = claim("a/b/c", 1);
        assert!(store.get(&claim.name).await.is_err_and(is_told));
        assert!(store.list(&Filter::under(Prefix::all())).await.is_err_and(is_told));
        assert!(store.claim(&claim).await.is_err_and(is_told));
    });
}

#[test]
fn what_the_server_forgot_is_a_gap() {
    runtime().block_on(async {
        let cluster = Cluster::new().await;
        let store = cluster.store(cluster.clock.clone());
        let start = store.health().await.unwrap().revision;
        let hold = store.claim(&claim("a/b/c", 1)).await.unwrap();
        cluster.double.compact();
        let mut late = store.watch(&Prefix::all(), start).await.unwrap();
        let gap = late.next().await.unwrap();
        assert_eq!(gap.change, Change::Gap);
        store.swap_cell(&hold.name, Version(0), b"x").await.unwrap();
        let next = late.next().await.unwrap();
        assert!(matches!(next.change, Change::Cell { version: Version(1), .. }), "{next:?}");
        assert!(next.revision > gap.revision);
    });
}

#[test]
fn a_claim_that_broke_off_between_its_two_writes_is_finished_or_waited_for() {
    runtime().block_on(async {
        let cluster = Cluster::new().await;
        let store = cluster.store(cluster.clock.clone());
        // The lease is written; the row is refused.
        let (first, second) = (claim("a/b/c", 1), claim("a/b/c", 2));
        cluster.double.refuse_writes("ibexentries", 1);
        let error = store.claim(&first).await.unwrap_err();
        assert!(error.is_transient(), "{error:?}");
        assert_eq!(store.get(&first.name).await, Err(StoreError::NotFound));
        let held = store.claim(&second).await;
        assert!(matches!(held, Err(StoreError::Held { .. })), "{held:?}");
        let hold = store.claim(&first).await.unwrap();
        assert_eq!(store.get(&first.name).await.unwrap().stamp().fence, hold.fence);
    });
}

#[test]
fn a_url_names_a_namespace() {
    runtime().block_on(async {
        let cluster = Cluster::new().await;
        let url = format!("layered+k8s://default?server=http://{}&timeout-ms=60000", cluster.double.address);
        let store = open(&StoreUrl::parse(&url).unwrap(), cluster.clock.clone()).unwrap();
        let hold = store.claim(&claim("a/b/c", 1)).await.unwrap();
        assert_eq!(store.get(&hold.name).await.unwrap().stamp().fence, hold.fence);
        // A heartbeat touches the lease alone.
        let before = cluster.double.objects("ibexentries");
        store.renew(&hold).await.unwrap();
        assert_eq!(cluster.double.objects("ibexentries"), before);
        assert_eq!(cluster.double.objects("leases")[0]["spec"]["leaseDurationSeconds"], 30);
    });
}
