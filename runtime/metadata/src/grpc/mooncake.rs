//! Mooncake's metadata keys over HTTP: `GET`, `PUT` and `DELETE /metadata?key=KEY`, on the server's own port.
//!
//! A segment (`mooncake/ram/NAME`) is a record under `mooncake/segments`: whoever reads records sees its
//! transfer engine and its buffers, and a watch sees it change; the bytes that were put are kept beside
//! them and come back as they were. Every other key is a cell under `mooncake/keys`. The other way round,
//! a record of anybody's that offers a transfer engine is found under its session. Mooncake gives no signs
//! of life, so a segment is not gone when its lease runs out, only when it is deleted; `ibex store ls`
//! shows it as expired.
//!
//! | request | answer |
//! |---|---|
//! | `GET` | 200 and the value, or 404 |
//! | `PUT` | 200; 400 if the key holds `rpc_meta` and another value, or a segment is no JSON object |
//! | `DELETE` | 200, or 404 |
//! | another method | 405 |
//! | no key | 400 |
//! | any, without the server's token | 401 |
//! | any, while the store is away | 503 |

mod key;
mod segment;

use core::time::Duration;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use tonic::metadata::MetadataMap;

use self::key::Key;
use super::gate::Gate;
use super::metrics::Op;
use super::views;
use crate::error::{Bounded, InputError, Result, StoreError};
use crate::limits::{CELL_LEN_MAX, HTTP_VALUE_LEN_MAX, TTL_MAX};
use crate::name::RecordName;
use crate::store::{Store, check_count};

/// Mooncake gives no signs of life between registrations.
const TTL: Duration = TTL_MAX;
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
            Op::MooncakePut => view.put(&key, &body).await.map(Answer::Done),
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

    async fn put(&self, key: &Key, value: &[u8]) -> Result<&'static str> {
        match key {
            Key::Segment { name, .. } => self.put_segment(name, value).await?,
            Key::Other { name, text } => {
                // The original's guard against two engines of one name.
                if text.contains("rpc_meta")
                    && let Some(present) = self.cell(name).await?
                {
                    if present == value {
                        return Ok("metadata unchanged");
                    }
                    return Err(InputError::new("rpc_meta", text, "deleted before it is changed").into());
                }
                check_count(Bounded::Cell, value.len(), CELL_LEN_MAX - 1)?;
                views::parcel::write(&*self.store, name, &[&[PRESENT], value].concat()).await?;
            }
        }
        Ok("metadata updated")
    }

    async fn delete(&self, key: &Key) -> Result<()> {
        match key {
            Key::Segment { name, .. } => {
                let entry = views::look(&*self.store, name).await?.ok_or(StoreError::NotFound)?;
                let hold = views::hold(&*self.store, name, TTL).await?;
                self.store.release(&hold).await?;
                if let Some(manifest) = segment::manifest(&entry.snapshot.record) {
                    views::parcel::clear(&*self.store, name, manifest).await?;
                }
                Ok(())
            }
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
