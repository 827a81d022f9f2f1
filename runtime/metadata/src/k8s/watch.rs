//! Changes as the API server streams them, resumable by revision.

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use async_trait::async_trait;
use http_body_util::BodyExt;
use kube::client::Body;
use serde::Deserialize;

use super::K8sStore;
use super::api::{ENTRIES, Refusal, outage, revision};
use super::lease::selector;
use super::rows;
use super::schema::{CORRUPT, EntrySpec, IbexEntry, Life};
use crate::clock::Ticker;
use crate::error::{Result, StoreError};
use crate::ids::{Fence, Revision, Version};
use crate::limits::MESSAGE_LEN_MAX;
use crate::name::{Prefix, RecordName};
use crate::store::{Change, Event, WatchSource};

/// How often a watch looks for leases that ran out.
const LOOK_PERIOD: Duration = Duration::from_millis(500);
/// Status code of "too old a revision".
const GONE: i64 = 410;

/// A watch on our resources, which also announces ends of leases.
pub(super) struct K8sWatch {
    store: K8sStore,
    prefix: Prefix,
    at: Revision,
    body: Body,
    /// The beginning of a line whose end did not come yet.
    partial: Vec<u8>,
    ready: VecDeque<Event>,
    looks: Ticker,
}

/// One line of the stream.
#[derive(Deserialize)]
struct Line {
    r#type: String,
    object: serde_json::Value,
}

impl K8sWatch {
    /// A watch from after `from`; from now on, after a gap, if the server was never there. Revision 0 means
    /// "anything" to an API server, not "everything", so it is a gap as well.
    pub(super) async fn begin(store: K8sStore, prefix: Prefix, from: Revision) -> Result<Self, Refusal> {
        let newest = newest(&store).await?;
        let is_gap = from > newest || from.0 == 0;
        let at = if is_gap { newest } else { from };
        let opened = open(&store, &prefix, at).await;
        let (body, partial, ready) = (Body::empty(), Vec::new(), VecDeque::new());
        let mut watch = Self { store, prefix, at, body, partial, ready, looks: Ticker::every(LOOK_PERIOD) };
        match opened {
            Err(Refusal::Gone) => watch.go_on_after_gap().await?,
            body => watch.body = body?,
        }
        if is_gap {
            watch.ready.push_back(Event { revision: newest, change: Change::Gap });
        }
        Ok(watch)
    }

    /// What came after `at` is forgotten: goes on from now.
    async fn go_on_after_gap(&mut self) -> Result<(), Refusal> {
        let newest = newest(&self.store).await?;
        self.body = open(&self.store, &self.prefix, newest).await?;
        self.partial.clear();
        self.at = newest;
        self.ready.push_back(Event { revision: newest, change: Change::Gap });
        Ok(())
    }

    /// Goes on where the stream ended: servers end them regularly.
    async fn resume(&mut self) -> Result<()> {
        self.partial.clear();
        match open(&self.store, &self.prefix, self.at).await {
            Err(Refusal::Gone) => Ok(self.go_on_after_gap().await?),
            body => {
                self.body = body?;
                Ok(())
            }
        }
    }

    /// Takes note of a piece of the stream.
    async fn take(&mut self, data: &[u8]) -> Result<()> {
        self.partial.extend_from_slice(data);
        while let Some(end) = self.partial.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.partial.drain(..=end).collect();
            let line: Line = serde_json::from_slice(&line).map_err(|_| CORRUPT)?;
            if line.r#type == "ERROR" {
                let is_gone = line.object["code"].as_i64() == Some(GONE);
                return if is_gone { Ok(self.go_on_after_gap().await?) } else { Err(outage()) };
            }
            self.note(line)?;
        }
        if self.partial.len() > MESSAGE_LEN_MAX { Err(CORRUPT) } else { Ok(()) }
    }

    fn note(&mut self, line: Line) -> Result<()> {
        let version = line.object["metadata"]["resourceVersion"].as_str();
        let revision = Revision(revision(version)?);
        self.at = revision;
        if line.r#type == "BOOKMARK" {
            return Ok(());
        }
        let entry: IbexEntry = serde_json::from_value(line.object).map_err(|_| CORRUPT)?;
        let change = change(&entry.spec, line.r#type == "DELETED")?;
        if change.name().is_some_and(|name| self.prefix.covers(name)) {
            self.ready.push_back(Event { revision, change });
        }
        Ok(())
    }
}

async fn newest(store: &K8sStore) -> Result<Revision, Refusal> {
    store.api.newest(ENTRIES).await.map(Revision)
}

async fn open(store: &K8sStore, prefix: &Prefix, from: Revision) -> Result<Body, Refusal> {
    store.api.watch(ENTRIES, &selector(prefix, None), from.0).await
}

/// What a change of an entry says.
fn change(spec: &EntrySpec, is_deleted: bool) -> Result<Change> {
    let name = RecordName::parse(&spec.name).map_err(|_| CORRUPT)?;
    if let Some(cell) = &spec.cell {
        return Ok(Change::Cell { name, version: Version(cell.version.0) });
    }
    let row = spec.row.as_ref().ok_or(CORRUPT)?;
    let fence = Fence(row.fence.0);
    Ok(match row.life {
        Life::Released => Change::Released { name, fence },
        // Somebody deleted the resource by hand: as good as given back.
        _ if is_deleted => Change::Released { name, fence },
        Life::Expired => Change::Expired { name, fence },
        Life::Held => Change::Put(Arc::new(rows::snapshot(spec)?)),
    })
}

#[async_trait]
impl WatchSource for K8sWatch {
    async fn next(&mut self) -> Result<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Ok(event);
            }
            let frame = tokio::select! {
                frame = self.body.frame() => frame,
                () = self.looks.tick() => {
                    let swept = self.store.operate(self.store.sweep(&self.prefix)).await;
                    // Who may only read leaves the announcement to others.
                    if let Err(error) = swept && error != StoreError::Unauthenticated {
                        return Err(error);
                    }
                    continue;
                }
            };
            match frame {
                Some(Ok(frame)) => {
                    let data = frame.into_data().unwrap_or_default();
                    self.take(&data).await?;
                }
                Some(Err(_)) => return Err(outage()),
                None => self.resume().await?,
            }
        }
    }
}
