//! Many names at once, and who reads them.

use super::{Case, LONG, instance};
use crate::error::{Bounded, StoreError};
use crate::ids::{Fence, Stamp, Version};
use crate::limits::{BATCH_LEN_MAX, PAGE_LEN_MAX};
use crate::name::Prefix;
use crate::store::{Ack, Filter};

pub(super) async fn outcomes_keep_order_and_length(case: &Case<'_>) {
    let ttl = case.subject.short_ttl();
    let expired = case.claim_as(&case.name("expired"), 1, ttl).await;
    case.let_expire(ttl).await;
    let (one, two) = (case.published("one").await, case.claimed("two").await);
    let missing = case.name("missing");
    let names = [&two.name, &missing, &one.name, &expired.name, &two.name, &missing].map(Clone::clone);
    let outcomes = case.store.batch_get(&names).await.expect("the batch is good");
    let stamps: Vec<_> = outcomes.into_iter().map(|outcome| outcome.map(|guard| guard.stamp())).collect();
    let second = Ok(Stamp::new(two.fence, Version(0)));
    assert_eq!(
        stamps,
        [
            second.clone(),
            Err(StoreError::NotFound),
            Ok(Stamp::new(one.fence, Version(1))),
            Err(StoreError::LeaseExpired { fence: expired.fence }),
            second,
            Err(StoreError::NotFound),
        ]
    );
    assert_eq!(case.store.batch_get(&[]).await, Ok(vec![]));
}

pub(super) async fn batches_are_bounded(case: &Case<'_>) {
    let hold = case.claimed("a").await;
    let names = vec![hold.name.clone(); BATCH_LEN_MAX];
    let outcomes = case.store.batch_get(&names).await.expect("the largest batch is good");
    assert_eq!(outcomes.len(), BATCH_LEN_MAX);
    assert!(outcomes.iter().all(|outcome| outcome.as_ref().is_ok_and(|g| g.stamp().fence == hold.fence)));
    let refused = case.store.batch_get(&vec![hold.name; BATCH_LEN_MAX + 1]).await;
    let (len, limit) = (BATCH_LEN_MAX as u64 + 1, BATCH_LEN_MAX as u64);
    assert_eq!(refused, Err(StoreError::TooLarge { what: Bounded::Batch, len, limit }));
}

pub(super) async fn pages_show_each_name_once_in_order(case: &Case<'_>) {
    let mut names: Vec<_> = (0..23).map(|i| case.name(&format!("n{i:02}"))).collect();
    for name in names.iter().rev() {
        case.claim_as(name, 1, LONG).await;
    }
    let group = Prefix::parse(&format!("{}/group", names[0].parts().0)).expect("a good prefix");
    let mut filter = Filter { prefix: group, after: None, limit: 5 };
    let mut seen = Vec::new();
    loop {
        let page = case.store.list(&filter).await.expect("listing works");
        assert!(page.entries.len() <= 5);
        seen.extend(page.entries.into_iter().map(|entry| entry.snapshot.name.clone()));
        filter.after = page.next;
        if filter.after.is_none() {
            break;
        }
    }
    names.sort();
    assert_eq!(seen, names);
    for (limit, good) in [(0, false), (PAGE_LEN_MAX, true), (PAGE_LEN_MAX + 1, false)] {
        let page = case.store.list(&Filter { limit, ..Filter::default() }).await;
        assert_eq!(page.is_ok(), good, "{limit}: {page:?}");
    }
}

pub(super) async fn prefixes_compare_whole_parts(case: &Case<'_>) {
    let (short, long) = (case.claimed("rank-1").await, case.claimed("rank-10").await);
    let cluster = short.name.parts().0.to_owned();
    let count = async |prefix: &str| {
        let filter = Filter::under(Prefix::parse(prefix).expect("a good prefix"));
        case.store.list(&filter).await.expect("listing works").entries.len()
    };
    assert_eq!(count(short.name.as_str()).await, 1);
    assert_eq!(count(long.name.as_str()).await, 1);
    assert_eq!(count(&format!("{cluster}/group")).await, 2);
    assert_eq!(count(&format!("{cluster}/grou")).await, 0);
    assert_eq!(count(&cluster).await, 2);
}

pub(super) async fn readers_are_registered_until_they_fall_silent(case: &Case<'_>) {
    let (hold, ttl) = (case.published("a").await, case.subject.short_ttl());
    let stamp = Stamp::new(hold.fence, Version(1));
    let ack = |reader, ttl| Ack { name: hold.name.clone(), reader: instance(reader), stamp, ttl };
    assert_eq!(case.store.readers(&hold.name).await, Ok(vec![]));
    assert_eq!(case.store.ack(&ack(7, ttl)).await, Ok(()));
    assert_eq!(case.store.ack(&ack(8, LONG)).await, Ok(()));
    let mut readers = case.store.readers(&hold.name).await.expect("the name exists");
    readers.sort_by_key(|reader| reader.reader);
    let seen: Vec<_> = readers.iter().map(|reader| (reader.reader, reader.stamp)).collect();
    assert_eq!(seen, [(instance(7), stamp), (instance(8), stamp)]);
    assert!(readers[0].remaining <= ttl);
    case.let_expire(ttl).await;
    let readers = case.store.readers(&hold.name).await.expect("the name exists");
    assert_eq!(readers.iter().map(|reader| reader.reader).collect::<Vec<_>>(), [instance(8)]);
}

pub(super) async fn a_readers_stamp_never_goes_back(case: &Case<'_>) {
    let hold = case.published("a").await;
    let ack = |fence, version| Ack {
        name: hold.name.clone(),
        reader: instance(7),
        stamp: Stamp::new(Fence(fence), Version(version)),
        ttl: LONG,
    };
    let fence = hold.fence.0;
    assert_eq!(case.store.ack(&ack(fence, 1)).await, Ok(()));
    assert_eq!(case.store.ack(&ack(fence, 0)).await, Ok(()));
    let readers = case.store.readers(&hold.name).await.expect("the name exists");
    assert_eq!(readers[0].stamp, Stamp::new(hold.fence, Version(1)));
    for ahead in [ack(fence, 2), ack(fence + 1, 0), ack(u64::MAX, u64::MAX)] {
        let refused = case.store.ack(&ahead).await;
        assert_eq!(refused, Err(StoreError::Conflict { current: Version(1) }), "{}", ahead.stamp);
    }
    let nobody = Ack { name: case.name("nobody"), ..ack(1, 0) };
    assert_eq!(case.store.ack(&nobody).await, Err(StoreError::NotFound));
}
