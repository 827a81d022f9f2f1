//! Changes as etcd reports them, resumable by revision.

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use tonic::Streaming;

use super::generated as pb;
use super::generated::event::Type;
use super::link::{Link, failed};
use super::rows::{self, CORRUPT, Owner, Part, Txn, UP};
use crate::channel::RETRY;
use crate::clock::within;
use crate::error::{Result, StoreError};
use crate::ids::{Fence, Revision, Version};
use crate::name::Prefix;
use crate::store::{Change, Event, Snapshot, WatchSource};

/// A watch on a range of etcd's keys. A dead server is noticed by keepalive.
pub(super) struct EtcdWatch {
    link: Arc<Link>,
    prefix: Prefix,
    /// Everything up to here was reported.
    at: Revision,
    stream: Streaming<pb::WatchResponse>,
    ready: VecDeque<Event>,
    budget: Duration,
}

impl EtcdWatch {
    /// A watch from after `from`; from now on, after a gap, if etcd was never there.
    pub(super) async fn begin(
        link: Arc<Link>,
        prefix: Prefix,
        from: Revision,
        budget: Duration,
    ) -> Result<Self> {
        let newest = newest(&link).await?;
        let mut ready = VecDeque::new();
        let mut at = from;
        if from > newest {
            ready.push_back(Event { revision: newest, change: Change::Gap });
            at = newest;
        }
        let stream = open(&link, &prefix, at).await?;
        Ok(Self { link, prefix, at, stream, ready, budget })
    }

    /// Takes note of one response.
    async fn take(&mut self, response: pb::WatchResponse) -> Result<()> {
        if response.canceled {
            if response.compact_revision == 0 {
                return Err(StoreError::Unavailable { retry_after: RETRY });
            }
            return self.go_on_after_gap().await;
        }
        for event in &response.events {
            let Some(event) = read(event)? else { continue };
            self.at = event.revision;
            self.ready.push_back(event);
        }
        Ok(())
    }

    /// What came after `at` is compacted away: goes on from now.
    async fn go_on_after_gap(&mut self) -> Result<()> {
        let opened = async {
            let newest = newest(&self.link).await?;
            Ok((newest, open(&self.link, &self.prefix, newest).await?))
        };
        let (newest, stream) = within(self.budget, opened).await?;
        (self.at, self.stream) = (newest, stream);
        self.ready.push_back(Event { revision: newest, change: Change::Gap });
        Ok(())
    }
}

/// The newest revision of the whole etcd.
async fn newest(link: &Link) -> Result<Revision> {
    let answered = link.txn(&Txn::read([rows::one(UP)])).await?;
    rows::unsigned(answered.revision).map(Revision)
}

async fn open(link: &Link, prefix: &Prefix, at: Revision) -> Result<Streaming<pb::WatchResponse>> {
    let (key, range_end) = rows::watched(prefix);
    let start_revision = rows::signed(at.0).saturating_add(1);
    link.watch(pb::WatchCreateRequest { key, range_end, start_revision, prev_kv: true, fragment: true }).await
}

/// What a change of a key says; `None` for one that only goes along with another.
fn read(event: &pb::Event) -> Result<Option<Event>> {
    let kv = event.kv.as_ref().ok_or(CORRUPT)?;
    let Some((name, part)) = Part::parse(&kv.key) else { return Ok(None) };
    let is_put = event.r#type() == Type::Put;
    let change = match part {
        Part::Owner if is_put => {
            let owner = Owner::parse(kv)?;
            Change::Put(Arc::new(Snapshot::claimed(&name, owner.fence, owner.instance)))
        }
        Part::Record if is_put => Change::Put(Arc::new(rows::published(&name, kv)?)),
        Part::Life if is_put => match rows::released_fence(&kv.value) {
            Some(fence) => Change::Released { name, fence },
            // Goes along with a claim.
            None => return Ok(None),
        },
        Part::Life => match &event.prev_kv {
            Some(before) => Change::Expired { name, fence: Fence(rows::unsigned(before.mod_revision)?) },
            // Compacted in the meantime: whose lease it was cannot be told.
            None => Change::Gap,
        },
        Part::Cell if is_put => Change::Cell { name, version: Version(rows::unsigned(kv.version)?) },
        Part::Owner | Part::Record | Part::Cell => return Ok(None),
    };
    Ok(Some(Event { revision: Revision(rows::unsigned(kv.mod_revision)?), change }))
}

#[async_trait]
impl WatchSource for EtcdWatch {
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let response = self.stream.message().await.map_err(|status| failed(&status))?;
            let outage = StoreError::Unavailable { retry_after: RETRY };
            self.take(response.ok_or(outage)?).await?;
        }
    }
}
