//! Requests to an API server, and its own time in every answer.
//!
//! The client, its configuration and its credentials are kube's. Answers are read here, because the time
//! of the server stands in their head, and leases are counted by that time alone.

use core::time::Duration;

use bytes::Bytes;
use http::header::DATE;
use http::{HeaderMap, Method, Request, StatusCode};
use http_body_util::BodyExt;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Status;
use k8s_openapi::jiff::fmt::rfc2822::DateTimeParser;
use kube::client::Body;
use kube::core::ObjectList;
use kube::{Client, Config};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::OnceCell;

use super::schema::CORRUPT;
use crate::error::{Bounded, Feature, InputError, Result, StoreError};
use crate::limits::MESSAGE_LEN_MAX;

/// When to ask again after an outage.
pub(super) const RETRY: Duration = Duration::from_millis(200);
/// Objects per page of a listing.
const PAGE_LEN: usize = 500;
/// Under which name an API server remembers our writes, and when they were.
pub(super) const MANAGER: &str = "ibex";

/// A kind of objects, as paths spell it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Kind {
    group: &'static str,
    plural: &'static str,
}

/// What is kept under names.
pub(super) const ENTRIES: Kind = Kind { group: "ibex.dev/v1alpha1", plural: "ibexentries" };
/// Who is alive.
pub(super) const LEASES: Kind = Kind { group: "coordination.k8s.io/v1", plural: "leases" };

/// A moment of the API server's clock, in whole seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ServerTime(pub(super) i64);

/// Why a request came to nothing.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// The object was not there at that time.
    Absent(ServerTime),
    /// It is there already, or was changed in between.
    Conflict,
    /// The revision is not remembered.
    Gone,
    /// Anything else.
    Store(StoreError),
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

impl From<Refusal> for StoreError {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Absent(_) => Self::NotFound,
            Refusal::Store(error) => error,
            Refusal::Conflict | Refusal::Gone => outage(),
        }
    }
}

pub(super) fn outage() -> StoreError {
    StoreError::Unavailable { retry_after: RETRY }
}

/// An answer, and when the server gave it.
#[derive(Debug)]
pub(super) struct Answer<T> {
    pub(super) value: T,
    pub(super) at: ServerTime,
}

/// A connection to one namespace of a cluster, made when it is first used.
pub(super) struct Api {
    namespace: String,
    server: Option<http::Uri>,
    client: OnceCell<Client>,
}

impl Api {
    /// Nothing is sent yet. Without a server, kube looks for a configuration where kubectl does.
    pub(super) fn new(namespace: &str, server: Option<&str>) -> Result<Self> {
        let server = server.map(|server| {
            let refusal = |_| InputError::new("server", server, "http://HOST:PORT or https://HOST:PORT");
            server.parse::<http::Uri>().map_err(refusal)
        });
        Ok(Self { namespace: namespace.to_owned(), server: server.transpose()?, client: OnceCell::new() })
    }

    pub(super) fn namespace(&self) -> &str {
        &self.namespace
    }

    async fn client(&self) -> Result<&Client> {
        let connect = async {
            let config = match &self.server {
                Some(server) => Config::new(server.clone()),
                None => Config::infer().await.map_err(|_| {
                    InputError::new("store", "k8s://", "used in a cluster, or where kubectl works")
                })?,
            };
            let refusal = |_| InputError::new("store", "k8s://", "used with credentials that can be read");
            Ok(Client::try_from(config).map_err(refusal)?)
        };
        self.client.get_or_try_init(|| connect).await
    }

    fn path(&self, kind: Kind, name: &str, query: &str) -> String {
        let Kind { group, plural } = kind;
        let slash = if name.is_empty() { "" } else { "/" };
        format!("/apis/{group}/namespaces/{}/{plural}{slash}{name}?{query}", self.namespace)
    }

    async fn send(&self, method: Method, path: &str, body: Vec<u8>) -> Result<http::Response<Body>, Refusal> {
        let request = Request::builder().method(method).uri(path);
        let request = request.header(http::header::CONTENT_TYPE, "application/json");
        let request = request.body(Body::from(body)).map_err(|_| CORRUPT)?;
        // Whatever goes wrong below HTTP says nothing about any record.
        let response = self.client().await?.send(request).await.map_err(|_| outage())?;
        if response.status().is_success() {
            return Ok(response);
        }
        let (head, body) = response.into_parts();
        let body = collect(body).await?;
        if head.status == StatusCode::NOT_FOUND && names_an_object(&body) {
            return Err(Refusal::Absent(server_time(&head.headers)?));
        }
        Err(refused(head.status, &body))
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Vec<u8>,
    ) -> Result<Answer<T>, Refusal> {
        let response = self.send(method, path, body).await?;
        let at = server_time(response.headers())?;
        let body = collect(response.into_body()).await?;
        let value = serde_json::from_slice(&body).map_err(|_| CORRUPT)?;
        Ok(Answer { value, at })
    }

    /// Reads one object.
    pub(super) async fn get<T: DeserializeOwned>(
        &self,
        kind: Kind,
        name: &str,
    ) -> Result<Answer<T>, Refusal> {
        self.call(Method::GET, &self.path(kind, name, ""), Vec::new()).await
    }

    /// Creates an object that is not there yet.
    pub(super) async fn create<T: Serialize>(&self, kind: Kind, object: &T) -> Result<(), Refusal> {
        let path = self.path(kind, "", &format!("fieldManager={MANAGER}"));
        self.write(Method::POST, &path, object).await
    }

    /// Replaces an object that is still at the revision that it carries.
    pub(super) async fn replace<T: Serialize>(
        &self,
        kind: Kind,
        name: &str,
        object: &T,
    ) -> Result<(), Refusal> {
        let path = self.path(kind, name, &format!("fieldManager={MANAGER}"));
        self.write(Method::PUT, &path, object).await
    }

    async fn write<T: Serialize>(&self, method: Method, path: &str, object: &T) -> Result<(), Refusal> {
        let object = serde_json::to_value(object).map_err(|_| CORRUPT)?;
        let body = serde_json::to_vec(&without_nulls(object)).map_err(|_| CORRUPT)?;
        self.call::<serde::de::IgnoredAny>(method, path, body).await.map(|_| ())
    }

    /// Deletes an object that is still at this revision.
    pub(super) async fn delete(&self, kind: Kind, name: &str, revision: &str) -> Result<(), Refusal> {
        let options = serde_json::json!({"preconditions": {"resourceVersion": revision}});
        let body = options.to_string().into_bytes();
        let path = self.path(kind, name, "");
        self.call::<serde::de::IgnoredAny>(Method::DELETE, &path, body).await.map(|_| ())
    }

    /// Reads all objects with these labels, page by page. The revision is that of the first page, and of
    /// all others; the time is that of the last.
    pub(super) async fn list<T: DeserializeOwned + Clone>(
        &self,
        kind: Kind,
        labels: &str,
    ) -> Result<Listing<T>, Refusal> {
        let mut items = Vec::new();
        let mut from = String::new();
        loop {
            let query = format!("labelSelector={labels}&limit={PAGE_LEN}&continue={from}");
            let path = self.path(kind, "", &query);
            let answer: Answer<ObjectList<T>> = self.call(Method::GET, &path, Vec::new()).await?;
            let ObjectList { items: page, metadata, .. } = answer.value;
            items.extend(page);
            match metadata.continue_.filter(|next| !next.is_empty()) {
                Some(next) => from = next,
                None => {
                    let revision = revision(metadata.resource_version.as_deref())?;
                    return Ok(Listing { items, revision, at: answer.at });
                }
            }
        }
    }

    /// The newest revision of a kind.
    pub(super) async fn newest(&self, kind: Kind) -> Result<u64, Refusal> {
        let path = self.path(kind, "", "limit=1");
        let answer: Answer<ObjectList<serde_json::Value>> = self.call(Method::GET, &path, Vec::new()).await?;
        Ok(revision(answer.value.metadata.resource_version.as_deref())?)
    }

    /// Follows changes of objects with these labels from after a revision.
    pub(super) async fn watch(&self, kind: Kind, labels: &str, from: u64) -> Result<Body, Refusal> {
        let query = format!("watch=1&allowWatchBookmarks=true&labelSelector={labels}&resourceVersion={from}");
        let path = self.path(kind, "", &query);
        self.send(Method::GET, &path, Vec::new()).await.map(http::Response::into_body)
    }
}

/// Objects, the revision at which they stood, and when the server said so.
#[derive(Debug)]
pub(super) struct Listing<T> {
    pub(super) items: Vec<T>,
    pub(super) revision: u64,
    pub(super) at: ServerTime,
}

/// Revisions are numbers that grow: of etcd, and since Kubernetes 1.35 by promise.
pub(super) fn revision(text: Option<&str>) -> Result<u64> {
    text.and_then(|text| text.parse().ok()).ok_or(CORRUPT)
}

/// The server's clock, from the head of its answer.
fn server_time(headers: &HeaderMap) -> Result<ServerTime> {
    // Behind a proxy that takes it away, leases cannot be counted.
    let unsupported = StoreError::Unsupported(Feature::Operation);
    let date = headers.get(DATE).and_then(|date| date.to_str().ok()).ok_or(unsupported)?;
    let date = DateTimeParser::new().parse_timestamp(date).map_err(|_| CORRUPT)?;
    Ok(ServerTime(date.as_second()))
}

/// Reads a body to its end, within the limit of a message.
async fn collect(mut body: Body) -> Result<Bytes> {
    let mut bytes = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|_| outage())?;
        bytes.extend_from_slice(frame.data_ref().map_or(&[], |data| data));
        if bytes.len() > MESSAGE_LEN_MAX {
            let (len, limit) = (bytes.len() as u64, MESSAGE_LEN_MAX as u64);
            return Err(StoreError::TooLarge { what: Bounded::Message, len, limit });
        }
    }
    Ok(bytes.into())
}

fn refused(status: StatusCode, body: &[u8]) -> Refusal {
    match status {
        StatusCode::NOT_FOUND => no_such_kind().into(),
        StatusCode::CONFLICT => Refusal::Conflict,
        StatusCode::GONE => Refusal::Gone,
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => StoreError::Unauthenticated.into(),
        StatusCode::PAYLOAD_TOO_LARGE => {
            let limit = MESSAGE_LEN_MAX as u64;
            StoreError::TooLarge { what: Bounded::Message, len: limit + 1, limit }.into()
        }
        StatusCode::BAD_REQUEST | StatusCode::UNPROCESSABLE_ENTITY => CORRUPT.into(),
        StatusCode::METHOD_NOT_ALLOWED => StoreError::Unsupported(Feature::Operation).into(),
        _ => retry_later(body).into(),
    }
}

/// Whether a refusal is about one object; else the server does not know the path.
fn names_an_object(body: &[u8]) -> bool {
    let status: Option<Status> = serde_json::from_slice(body).ok();
    status.and_then(|status| status.details?.name).is_some()
}

fn no_such_kind() -> StoreError {
    InputError::new("store", "k8s://", "a namespace of a cluster that knows crd/ibexentries.yaml").into()
}

/// An outage, with the pause that the server asks for if it does.
fn retry_later(body: &[u8]) -> StoreError {
    let status: Option<Status> = serde_json::from_slice(body).ok();
    let seconds = status.and_then(|status| status.details?.retry_after_seconds);
    let seconds = seconds.and_then(|seconds| u64::try_from(seconds).ok()).filter(|seconds| *seconds > 0);
    StoreError::Unavailable { retry_after: seconds.map_or(RETRY, Duration::from_secs) }
}

/// An API server takes no null for a field that may be left out.
pub(super) fn without_nulls(value: serde_json::Value) -> serde_json::Value {
    use serde_json::Value;
    match value {
        Value::Object(fields) => {
            let kept = fields.into_iter().filter(|(_, value)| !value.is_null());
            Value::Object(kept.map(|(key, value)| (key, without_nulls(value))).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(without_nulls).collect()),
        other => other,
    }
}
