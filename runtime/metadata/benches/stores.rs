//! What reading records costs in one process: a batch from memory, and a cached, lease-checked look.

#![expect(missing_docs, reason = "criterion's macros make undocumented functions")]
#![expect(clippy::unwrap_used, reason = "a bench that cannot set itself up has nothing to measure")]

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use ibex_metadata::clock::Clock;
use ibex_metadata::ids::InstanceId;
use ibex_metadata::layered::Layered;
use ibex_metadata::local::LocalStore;
use ibex_metadata::name::RecordName;
use ibex_metadata::store::{Claim, Store};
use tokio::runtime::Builder;

/// Keys of a batch: a large group.
const KEYS: u32 = 1024;

fn reads(c: &mut Criterion) {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let clock = Clock::system();
    let store = Arc::new(LocalStore::memory(clock.clone()));
    let names: Vec<_> = (0..KEYS).map(|i| RecordName::new("c", "g", &format!("n{i}")).unwrap()).collect();
    let layered = runtime.block_on(async {
        for name in &names {
            let (name, instance) = (name.clone(), InstanceId::new(1).unwrap());
            let ttl = Duration::from_secs(3600);
            store.claim(&Claim { name, instance, ttl, takeover: false }).await.unwrap();
        }
        let layered = Layered::new(store.clone(), clock.clone());
        // Its follower starts with an empty cache; what is looked up before that is dropped again.
        while layered.cached(&names[7]).is_none() {
            tokio::time::sleep(Duration::from_millis(1)).await;
            layered.get(&names[7]).await.unwrap();
        }
        layered
    });
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    c.bench_function("batch_get of 1024 keys from memory", |b| {
        b.iter(|| runtime.block_on(store.batch_get(&names)).unwrap());
    });
    c.bench_function("cached look, lease checked", |b| {
        b.iter(|| layered.cached(&names[7]).unwrap().check(clock.now()).is_ok());
    });
}

criterion_group!(benches, reads);
criterion_main!(benches);
