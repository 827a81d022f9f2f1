//! Mooncake's metadata keys over HTTP: `GET`, `PUT` and `DELETE /metadata?key=KEY`, on the server's own port.
//!
//! A segment (`mooncake/ram/NAME`) is a record under `mooncake/segments`: whoever reads records sees its
//! transfer engine and its buffers, and a watch sees it change; the bytes that were put are kept beside
//! them and come back as they were. Every other key is a cell under `mooncake/keys`. The other way round,
//! a record of anybody's that offers a transfer engine is found under its session. Mooncake gives no signs
//! of life, so a segment is not gone when its lease runs out, only when it is deleted or its engine comes
//! back; `ibex store ls` shows it as expired.
//!
//! An engine that crashed leaves its keys behind, and registers under a new port when it starts again. The
//! original refuses that until somebody deletes them. Here the address that the name has is asked: while
//! something listens there, or nothing can be said, the newcomer is refused; if the host answers that nothing
//! does, the name changes hands (`mooncake/listener.rs`). Whoever gets a name begins with an empty record. An
//! engine that was refused deletes the name's `rpc_meta` as it goes: that is Mooncake's, and nothing in the
//! request tells it from the owner's.
//!
//! | request | answer |
//! |---|---|
//! | `GET` | 200 and the value, or 404 |
//! | `PUT` | 200; 400 if the key holds another value, a live engine's `rpc_meta`, or a segment is no JSON object |
//! | `DELETE` | 200, or 404 |
//! | another method | 405 |
//! | no key | 400 |
//! | any, without the server's token | 401 |
//! | any, while the store is away | 503 |

mod key;
mod listener;
mod segment;

use core::time::Duration;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{Extensions, HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use tonic::metadata::MetadataMap;

use self::key::Key;
use super::gate::Gate;
use super::metrics::Op;
use super::views;
use crate::error::{Bounded, InputError, Result, StoreError};
use crate::ids::Version;
use crate::limits::{CELL_LEN_MAX, HTTP_VALUE_LEN_MAX, TTL_MAX};
use crate::name::RecordName;
use crate::store::{Cell, Store, check_count};

/// Mooncake gives no signs of life between registrations.
const TTL: Duration = TTL_MAX;
/// How often a name is tried to be given because somebody else took it meanwhile.
const ATTEMPTS: usize = 4;
const UPDATED: &str = "metadata updated";
/// What stands before a value in a cell. An empty cell is a key that was deleted.
const PRESENT: u8 = 1;

/// What answers HTTP requests.
#[derive(Debug, Clone)]
pub(super) struct Mooncake {
    pub(super) store: Arc<dyn Store>,
    pub(super) gate: Gate,
}

/// The route of Mooncake's clients.
pub(super) fn router(view: Mooncake) -> Router {
    Router::new()
        .route("/metadata", any(answer))
        .layer(DefaultBodyLimit::max(HTTP_VALUE_LEN_MAX))
        .with_state(Arc::new(view))
}

/// What a good request gets.
#[derive(Debug)]
enum Answer {
    Value(Vec<u8>),
    Done(&'static str),
}

async fn answer(
    State(view): State<Arc<Mooncake>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    extensions: Extensions,
    body: Bytes,
) -> Response {
    let op = match method {
        Method::GET => Op::MooncakeGet,
        Method::PUT => Op::MooncakePut,
        Method::DELETE => Op::MooncakeDelete,
        _ => return (StatusCode::METHOD_NOT_ALLOWED, "method not allowed").into_response(),
    };
    let work = async {
        let key = Key::from_query(uri.query().unwrap_or_default())?;
        match op {
            Op::MooncakeGet => view.get(&key).await.map(Answer::Value),
            Op::MooncakePut => view.put(&key, &body, listener::is_local(&extensions)).await.map(Answer::Done),
            _ => view.delete(&key).await.map(|()| Answer::Done("metadata deleted")),
        }
    };
    let result = view.gate.pass(op, &MetadataMap::from_headers(headers), work).await;
    let json = [(CONTENT_TYPE, "application/json")];
    match result {
        Ok(Answer::Value(value)) => (json, value).into_response(),
        Ok(Answer::Done(text)) => (json, text).into_response(),
        Err(StoreError::NotFound) => (StatusCode::NOT_FOUND, json, "metadata not found").into_response(),
        Err(error) => (status(&error), json, error.to_string()).into_response(),
    }
}

fn status(error: &StoreError) -> StatusCode {
    match error {
        StoreError::NotFound => StatusCode::NOT_FOUND,
        StoreError::Unauthenticated => StatusCode::UNAUTHORIZED,
        StoreError::TooLarge { .. } => StatusCode::PAYLOAD_TOO_LARGE,
        StoreError::Input(_) | StoreError::Corrupt(_) => StatusCode::BAD_REQUEST,
        StoreError::Unavailable { .. } | StoreError::Deadline { .. } => StatusCode::SERVICE_UNAVAILABLE,
        StoreError::Unsupported(_) => StatusCode::NOT_IMPLEMENTED,
        StoreError::Held { .. }
        | StoreError::Fenced { .. }
        | StoreError::Conflict { .. }
        | StoreError::LeaseExpired { .. } => StatusCode::CONFLICT,
    }
}

impl Mooncake {
    async fn get(&self, key: &Key) -> Result<Vec<u8>> {
        let found = match key {
            Key::Segment { name, .. } => self.segment(name).await?,
            Key::Other { name, .. } => self.cell(name).await?,
        };
        match found {
            Some(value) => Ok(value),
            None => self.foreign(key).await?.ok_or(StoreError::NotFound),
        }
    }

    async fn put(&self, key: &Key, value: &[u8], is_local: bool) -> Result<&'static str> {
        match key {
            Key::Segment { name, .. } => self.put_segment(name, value).await?,
            Key::Other { name, text } => {
                check_count(Bounded::Cell, value.len(), CELL_LEN_MAX - 1)?;
                let value = [&[PRESENT], value].concat();
                if text.contains("rpc_meta") {
                    return self.put_meta(key, name, &value, is_local).await;
                }
                views::parcel::write(&*self.store, name, &value).await?;
            }
        }
        Ok(UPDATED)
    }

    /// Gives a name an engine, unless it has another one that lives.
    async fn put_meta(
        &self,
        key: &Key,
        name: &RecordName,
        value: &[u8],
        is_local: bool,
    ) -> Result<&'static str> {
        let mut conflict = StoreError::Conflict { current: Version(0) };
        for _ in 0..ATTEMPTS {
            let present = match self.store.read_cell(name).await {
                Ok(cell) => cell,
                Err(StoreError::NotFound) => Cell { version: Version(0), value: Vec::new() },
                Err(error) => return Err(error),
            };
            if present.value == value {
                return Ok("metadata unchanged");
            }
            let held_by = present.value.strip_prefix(&[PRESENT]);
            if let Some(other) = held_by
                && !listener::is_gone(other, is_local).await
            {
                let limit = "deleted, or no longer answered at its port, before it is changed";
                return Err(InputError::new("rpc_meta", &String::from_utf8_lossy(other), limit).into());
            }
            match self.store.swap_cell(name, present.version, value).await {
                Ok(_) => {
                    // What an earlier process had registered is not this one's.
                    if let Some(segment) = key.segment() {
                        self.forget(&segment).await?;
                    }
                    return Ok(UPDATED);
                }
                // Somebody else took the name meanwhile, and may live.
                Err(error @ StoreError::Conflict { .. }) => conflict = error,
                Err(error) => return Err(error),
            }
        }
        Err(conflict)
    }

    /// Takes a segment out, if it is there.
    async fn forget(&self, name: &RecordName) -> Result<bool> {
        let Some(entry) = views::look(&*self.store, name).await? else { return Ok(false) };
        let hold = views::hold(&*self.store, name, TTL).await?;
        self.store.release(&hold).await?;
        if let Some(manifest) = segment::manifest(&entry.snapshot.record) {
            views::parcel::clear(&*self.store, name, manifest).await?;
        }
        Ok(true)
    }

    async fn delete(&self, key: &Key) -> Result<()> {
        match key {
            Key::Segment { name, .. } if self.forget(name).await? => Ok(()),
            Key::Segment { .. } => Err(StoreError::NotFound),
            Key::Other { name, .. } => {
                self.cell(name).await?.ok_or(StoreError::NotFound)?;
                views::parcel::write(&*self.store, name, &[]).await
            }
        }
    }

    /// The value of a cell; `None` if there is none, or it was deleted.
    async fn cell(&self, name: &RecordName) -> Result<Option<Vec<u8>>> {
        match self.store.read_cell(name).await {
            Ok(cell) => Ok(cell.value.split_first().map(|(_, value)| value.to_vec())),
            Err(StoreError::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn put_segment(&self, name: &RecordName, value: &[u8]) -> Result<()> {
        let segment = segment::Segment::parse(value)?;
        let manifest = views::parcel::put(&*self.store, name, segment::PARCEL, segment.bulk(value)).await?;
        let before = views::change(&*self.store, name, TTL, |before| {
            segment.record(name, before, value, manifest.clone())
        });
        if let Some(before) = before.await?
            && let Some(old) = segment::manifest(&before.record)
            && Some(old) != manifest.as_ref()
        {
            views::parcel::clear(&*self.store, name, old).await?;
        }
        Ok(())
    }

    /// The bytes that were put for a segment.
    async fn segment(&self, name: &RecordName) -> Result<Option<Vec<u8>>> {
        let Some(entry) = views::look(&*self.store, name).await? else { return Ok(None) };
        match segment::manifest(&entry.snapshot.record) {
            Some(manifest) => views::parcel::get(&*self.store, name, manifest).await,
            None => Ok(segment::inline(&entry.snapshot.record).map(<[u8]>::to_vec)),
        }
    }

    /// What a record that Mooncake did not put says under this key.
    async fn foreign(&self, key: &Key) -> Result<Option<Vec<u8>>> {
        let Some((session, what)) = key.session() else { return Ok(None) };
        let mut found = None;
        views::for_each(&*self.store, |entry| {
            if found.is_none() && entry.remaining.is_some() {
                found = segment::synthesised(&entry.snapshot.record, session, what);
            }
        })
        .await?;
        Ok(found)
    }
}
