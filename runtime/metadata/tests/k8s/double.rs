//! What an API server does to objects, as far as `k8s://` depends on it: revisions and conflicts, pruning by
//! the committed definition, pages, watches, `410 Gone`, its own time in every answer.
//!
//! It owns all objects, in memory, under one lock; its clock is the test's.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::Response;
use ibex_metadata::clock::Clock;
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::sync::watch;

use crate::pruning::{check, prune};

/// Changes that are remembered for watches.
const HISTORY_LEN: usize = 512;
/// 2026-01-01, when the manual clock starts.
const EPOCH_S: u64 = 1_767_225_600;

/// An API server with one namespace.
pub(crate) struct Double {
    pub(crate) address: SocketAddr,
    shared: Arc<Shared>,
}

struct Shared {
    clock: Clock,
    start: u64,
    state: Mutex<Objects>,
    changed: watch::Sender<u64>,
    /// The schema of our own resource; `None`: the definition was never applied.
    schema: Option<Value>,
}

#[derive(Default)]
struct Objects {
    revision: u64,
    /// By plural and name.
    all: BTreeMap<(String, String), Value>,
    history: VecDeque<(u64, String, &'static str, Value)>,
    /// Changes up to here are forgotten.
    compacted: u64,
    /// How many writes of which objects fail from now on.
    refusals: BTreeMap<String, u32>,
}

type Answer = Result<Value, (StatusCode, Value)>;

impl Double {
    /// Starts a server on loopback.
    pub(crate) async fn start(clock: Clock, schema: Option<Value>) -> Self {
        let shared = Arc::new(Shared {
            start: clock.now().0,
            clock,
            // A cluster that has seen other things before; 0 is no revision.
            state: Mutex::new(Objects { revision: 1000, ..Objects::default() }),
            changed: watch::Sender::new(1000),
            schema,
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(serve).with_state(Arc::clone(&shared));
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { address, shared }
    }

    /// Forgets all changes.
    pub(crate) fn compact(&self) {
        let mut objects = self.shared.state.lock();
        objects.compacted = objects.revision;
        objects.history.clear();
        // Whoever follows is told.
        drop(objects);
        self.shared.changed.send_modify(|revision| *revision += 1);
    }

    /// Lets the next writes of these objects fail.
    pub(crate) fn refuse_writes(&self, plural: &str, count: u32) {
        self.shared.state.lock().refusals.insert(plural.to_owned(), count);
    }

    /// Every object as it is stored.
    pub(crate) fn objects(&self, plural: &str) -> Vec<Value> {
        let objects = self.shared.state.lock();
        objects.all.iter().filter(|((of, _), _)| of == plural).map(|(_, object)| object.clone()).collect()
    }
}

/// One request, taken apart.
struct Asked {
    plural: String,
    name: Option<String>,
    query: BTreeMap<String, String>,
}

impl Asked {
    fn parse(uri: &Uri) -> Option<Self> {
        let parts: Vec<&str> = uri.path().trim_start_matches('/').split('/').collect();
        let (plural, name) = match parts.as_slice() {
            ["apis", group, version, "namespaces", "default", plural, rest @ ..] if rest.len() <= 1 => {
                let is_known = matches!(
                    (*group, *version, *plural),
                    ("ibex.dev", "v1alpha1", "ibexentries") | ("coordination.k8s.io", "v1", "leases")
                );
                (is_known.then_some(*plural)?, rest.first())
            }
            _ => return None,
        };
        let pairs = uri.query().unwrap_or_default().split('&').filter_map(|pair| pair.split_once('='));
        let query = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).collect();
        Some(Self { plural: plural.to_owned(), name: name.map(|name| (*name).to_owned()), query })
    }

    fn option(&self, key: &str) -> &str {
        self.query.get(key).map_or("", String::as_str)
    }

    fn selects(&self, object: &Value) -> bool {
        let wanted = self.option("labelSelector").split(',').filter_map(|term| term.split_once('='));
        wanted.into_iter().all(|(key, value)| object["metadata"]["labels"][key] == value)
    }
}

fn status(code: StatusCode, reason: &str, name: Option<&str>) -> (StatusCode, Value) {
    let details = name.map(|name| json!({"name": name}));
    let code_number = code.as_u16();
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                        "reason": reason, "details": details, "code": code_number});
    (code, status)
}

fn revision_of(object: &Value) -> u64 {
    object["metadata"]["resourceVersion"].as_str().unwrap_or("0").parse().unwrap()
}

impl Shared {
    fn now_s(&self) -> u64 {
        EPOCH_S + (self.clock.now().0 - self.start) / 1_000_000_000
    }

    /// Whether a write falls among those that are to fail.
    fn refuses(&self, plural: &str) -> bool {
        let mut objects = self.state.lock();
        let Some(left) = objects.refusals.get_mut(plural).filter(|left| **left > 0) else { return false };
        *left -= 1;
        true
    }

    /// Takes what a client sent: drops what the schema does not list, refuses what it forbids.
    fn admit(&self, plural: &str, body: &[u8]) -> Answer {
        let bad = || status(StatusCode::BAD_REQUEST, "BadRequest", None);
        let mut object: Value = serde_json::from_slice(body).map_err(|_| bad())?;
        if plural == "ibexentries" {
            let schema = self.schema.as_ref().expect("the kind is known");
            prune(schema, &mut object);
            let invalid = |_| status(StatusCode::UNPROCESSABLE_ENTITY, "Invalid", None);
            check(schema, &object, "").map_err(invalid)?;
        }
        Ok(object)
    }

    /// Stores an object under a new revision, and says who wrote it when.
    fn store(&self, asked: &Asked, mut object: Value, name: String, kind: &'static str) -> Value {
        let mut objects = self.state.lock();
        objects.revision += 1;
        let revision = objects.revision;
        let before = objects.all.get(&(asked.plural.clone(), name.clone())).cloned();
        let mut managed = before.map_or(json!([]), |before| before["metadata"]["managedFields"].clone());
        let manager = asked.option("fieldManager").to_owned();
        let time = rfc3339(self.now_s());
        if let Some(list) = managed.as_array_mut() {
            list.retain(|entry| entry["manager"] != manager.as_str());
            list.push(json!({"manager": manager, "operation": "Update", "time": time}));
        }
        object["metadata"]["managedFields"] = managed;
        object["metadata"]["resourceVersion"] = revision.to_string().into();
        object["metadata"]["namespace"] = "default".into();
        objects.all.insert((asked.plural.clone(), name), object.clone());
        objects.remember(revision, &asked.plural, kind, object.clone());
        drop(objects);
        self.changed.send_replace(revision);
        object
    }

    fn create(&self, asked: &Asked, body: &[u8]) -> Answer {
        let object = self.admit(&asked.plural, body)?;
        let name = object["metadata"]["name"].as_str().unwrap_or_default().to_owned();
        let key = (asked.plural.clone(), name.clone());
        if self.state.lock().all.contains_key(&key) {
            return Err(status(StatusCode::CONFLICT, "AlreadyExists", Some(&name)));
        }
        Ok(self.store(asked, object, name, "ADDED"))
    }

    fn replace(&self, asked: &Asked, name: &str, body: &[u8]) -> Answer {
        let object = self.admit(&asked.plural, body)?;
        let stored = self.read(asked, name)?;
        if revision_of(&object) != revision_of(&stored) {
            return Err(status(StatusCode::CONFLICT, "Conflict", Some(name)));
        }
        // What changes nothing is not written, and nobody's time is noted.
        if object["spec"] == stored["spec"]
            && object["metadata"]["annotations"] == stored["metadata"]["annotations"]
        {
            return Ok(stored);
        }
        Ok(self.store(asked, object, name.to_owned(), "MODIFIED"))
    }

    fn delete(&self, asked: &Asked, name: &str, body: &[u8]) -> Answer {
        let stored = self.read(asked, name)?;
        let options: Value = serde_json::from_slice(body).unwrap_or_default();
        let wanted = options["preconditions"]["resourceVersion"].as_str();
        if wanted.is_some_and(|wanted| wanted != revision_of(&stored).to_string()) {
            return Err(status(StatusCode::CONFLICT, "Conflict", Some(name)));
        }
        let mut objects = self.state.lock();
        objects.revision += 1;
        let revision = objects.revision;
        objects.all.remove(&(asked.plural.clone(), name.to_owned()));
        objects.remember(revision, &asked.plural, "DELETED", stored);
        drop(objects);
        self.changed.send_replace(revision);
        Ok(json!({"kind": "Status", "status": "Success"}))
    }

    fn read(&self, asked: &Asked, name: &str) -> Answer {
        let objects = self.state.lock();
        let found = objects.all.get(&(asked.plural.clone(), name.to_owned()));
        found.cloned().ok_or_else(|| status(StatusCode::NOT_FOUND, "NotFound", Some(name)))
    }

    fn list(&self, asked: &Asked) -> Answer {
        let objects = self.state.lock();
        let limit = asked.option("limit").parse().unwrap_or(usize::MAX);
        let after = asked.option("continue");
        let mut items: Vec<(&String, &Value)> = objects
            .all
            .iter()
            .filter(|((plural, name), object)| {
                *plural == asked.plural
                    && asked.selects(object)
                    && (after.is_empty() || name.as_str() > after)
            })
            .map(|((_, name), object)| (name, object))
            .collect();
        let has_more = items.len() > limit;
        items.truncate(limit);
        let next = items.last().filter(|_| has_more).map_or("", |(name, _)| name.as_str());
        let metadata = json!({"resourceVersion": objects.revision.to_string(), "continue": next});
        let items: Vec<&Value> = items.into_iter().map(|(_, object)| object).collect();
        Ok(json!({"apiVersion": "v1", "kind": "List", "metadata": metadata, "items": items}))
    }

    /// The lines that a watch has not seen yet, and where it stands after them.
    fn lines(&self, asked: &Asked, from: u64) -> (String, Option<u64>) {
        let objects = self.state.lock();
        if from < objects.compacted {
            let (_, gone) = status(StatusCode::GONE, "Expired", None);
            return (format!("{}\n", json!({"type": "ERROR", "object": gone})), None);
        }
        let mut lines = String::new();
        for (revision, plural, kind, object) in &objects.history {
            if *revision > from && *plural == asked.plural && asked.selects(object) {
                lines += &format!("{}\n", json!({"type": kind, "object": object}));
            }
        }
        (lines, Some(objects.revision))
    }
}

impl Objects {
    fn remember(&mut self, revision: u64, plural: &str, kind: &'static str, mut object: Value) {
        object["metadata"]["resourceVersion"] = revision.to_string().into();
        self.history.push_back((revision, plural.to_owned(), kind, object));
        if self.history.len() > HISTORY_LEN
            && let Some((forgotten, ..)) = self.history.pop_front()
        {
            self.compacted = forgotten;
        }
    }
}

async fn serve(State(shared): State<Arc<Shared>>, method: Method, uri: Uri, body: Bytes) -> Response {
    let date = http_date(shared.now_s());
    let response = Response::builder().header("date", date).header("content-type", "application/json");
    let asked = Asked::parse(&uri).filter(|asked| asked.plural == "leases" || shared.schema.is_some());
    let Some(asked) = asked else {
        return response.status(404).body(Body::from("404 page not found\n")).unwrap();
    };
    if asked.option("watch") == "1" {
        return response.body(follow(shared, asked)).unwrap();
    }
    let is_refused = method != Method::GET && shared.refuses(&asked.plural);
    let answer = match (&method, &asked.name) {
        // Not one of the codes after which kube tries again by itself.
        _ if is_refused => Err(status(StatusCode::INTERNAL_SERVER_ERROR, "InternalError", None)),
        (&Method::GET, None) => shared.list(&asked),
        (&Method::GET, Some(name)) => shared.read(&asked, name),
        (&Method::POST, None) => shared.create(&asked, &body),
        (&Method::PUT, Some(name)) => shared.replace(&asked, name, &body),
        (&Method::DELETE, Some(name)) => shared.delete(&asked, name, &body),
        _ => Err(status(StatusCode::METHOD_NOT_ALLOWED, "MethodNotAllowed", None)),
    };
    let (code, value) = match answer {
        Ok(value) => (StatusCode::OK, value),
        Err(refusal) => refusal,
    };
    response.status(code).body(Body::from(value.to_string())).unwrap()
}

/// The endless body of a watch.
fn follow(shared: Arc<Shared>, asked: Asked) -> Body {
    let from: u64 = asked.option("resourceVersion").parse().unwrap_or(0);
    let changed = shared.changed.subscribe();
    let start = (shared, asked, Some(from), changed);
    let lines = lines_from(start);
    Body::from_stream(lines)
}

type Following = (Arc<Shared>, Asked, Option<u64>, watch::Receiver<u64>);

fn lines_from(start: Following) -> impl tokio_stream::Stream<Item = Result<String, Infallible>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(async move {
        let (shared, asked, mut from, mut changed) = start;
        while let Some(at) = from {
            changed.borrow_and_update();
            let (lines, next) = shared.lines(&asked, at);
            from = next;
            if !lines.is_empty() && sender.send(Ok(lines)).await.is_err() {
                return;
            }
            if from.is_some() && changed.changed().await.is_err() {
                return;
            }
        }
    });
    tokio_stream::wrappers::ReceiverStream::new(receiver)
}

fn timestamp(seconds: u64) -> k8s_openapi::jiff::Timestamp {
    k8s_openapi::jiff::Timestamp::from_second(seconds.cast_signed()).unwrap()
}

fn rfc3339(seconds: u64) -> String {
    timestamp(seconds).to_string()
}

fn http_date(seconds: u64) -> String {
    timestamp(seconds).strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()
}
