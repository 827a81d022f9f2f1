//! Calls to etcd: who we are, what an answer means, and when to log in again.

use core::time::Duration;

use parking_lot::Mutex;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status, Streaming};

use super::generated as pb;
use super::generated::auth_client::AuthClient;
use super::generated::kv_client::KvClient;
use super::generated::lease_client::LeaseClient;
use super::generated::watch_client::WatchClient;
use super::rows::CORRUPT;
use crate::channel::{self, RETRY};
use crate::error::{Bounded, Feature, Result, StoreError};
use crate::limits::MESSAGE_LEN_MAX;

/// The name of etcd's own token in a request.
const TOKEN: &str = "token";
/// What etcd says, as an invalid argument, to who has not said who it is.
const WHO_ARE_YOU: [&str; 3] = ["user name is empty", "authentication failed", "auth store is old"];

/// A user of etcd. The password is never shown: not in errors, not in debug output.
#[derive(Clone)]
pub struct Login {
    /// The user.
    pub user: String,
    /// Its password.
    pub password: String,
}

impl std::fmt::Debug for Login {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Login").field("user", &self.user).finish_non_exhaustive()
    }
}

/// How to reach an etcd.
#[derive(Debug, Clone)]
pub struct EtcdConnect {
    /// `host:port`.
    pub authority: String,
    /// For TLS, the certificate (PEM) that must have signed the server's; without, the connection is
    /// plain.
    pub ca_pem: Option<Vec<u8>>,
    /// The name in the server's certificate, if it is not the host.
    pub domain: Option<String>,
    /// Who to log in as, where etcd asks for it.
    pub login: Option<Login>,
    /// How long an operation may take.
    pub budget: Duration,
}

/// The connection that all operations share.
pub(super) struct Link {
    channel: Channel,
    login: Option<Login>,
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

/// A request of one call, to be signed before it goes.
pub(super) type Signed<T> = Result<Response<T>, Status>;

impl Link {
    pub(super) fn new(connect: &EtcdConnect) -> Result<Self> {
        let scheme = if connect.ca_pem.is_some() { "https" } else { "http" };
        let uri = format!("{scheme}://{}", connect.authority);
        let tls = connect.ca_pem.as_deref();
        let tls = tls.map(|ca_pem| channel::Tls { ca_pem, domain: connect.domain.as_deref() });
        let channel = channel::lazy(&uri, "host:port", tls, connect.budget)?;
        Ok(Self { channel, login: connect.login.clone(), token: Mutex::default() })
    }

    /// Makes a call; once more, with a new token, if etcd does not know the old one any more.
    async fn call<T, F>(&self, call: impl Fn(Channel, Sign) -> F) -> Result<T>
    where
        F: Future<Output = Signed<T>>,
    {
        let sign = self.sign().await?;
        let mut reply = call(self.channel.clone(), sign).await;
        let is_refused = |status: &Status| status.code() == Code::Unauthenticated;
        if self.login.is_some() && reply.as_ref().is_err_and(is_refused) {
            *self.token.lock() = None;
            reply = call(self.channel.clone(), self.sign().await?).await;
        }
        reply.map(Response::into_inner).map_err(|status| failed(&status))
    }

    /// The token, after a login if there is none yet.
    async fn sign(&self) -> Result<Sign> {
        let Some(login) = &self.login else { return Ok(Sign(None)) };
        if let Some(token) = self.token.lock().clone() {
            return Ok(Sign(Some(token)));
        }
        let request = pb::AuthenticateRequest { name: login.user.clone(), password: login.password.clone() };
        let reply = AuthClient::new(self.channel.clone()).authenticate(request).await;
        let token = reply.map_err(|status| failed(&status))?.into_inner().token;
        let mut token: MetadataValue<Ascii> = token.parse().map_err(|_| CORRUPT)?;
        token.set_sensitive(true);
        *self.token.lock() = Some(token.clone());
        Ok(Sign(Some(token)))
    }

    /// Runs a transaction.
    pub(super) async fn txn(&self, txn: &pb::TxnRequest) -> Result<Answered> {
        let call = |channel, sign: Sign| {
            let request = sign.request(txn.clone());
            async move {
                let client = KvClient::new(channel).max_decoding_message_size(MESSAGE_LEN_MAX);
                client.max_encoding_message_size(MESSAGE_LEN_MAX).txn(request).await
            }
        };
        let reply = self.call(call).await?;
        let revision = reply.header.ok_or(CORRUPT)?.revision;
        let ranges = reply.responses.into_iter().filter_map(|op| match op.response {
            Some(pb::response_op::Response::Range(range)) => Some(range),
            _ => None,
        });
        Ok(Answered { succeeded: reply.succeeded, revision, ranges: ranges.collect() })
    }

    /// A new lease of at least so many seconds: its id, and what was granted.
    pub(super) async fn grant(&self, seconds: i64) -> Result<(i64, i64)> {
        let call = |channel, sign: Sign| {
            let request = sign.request(pb::LeaseGrantRequest { ttl: seconds, id: 0 });
            async move { LeaseClient::new(channel).lease_grant(request).await }
        };
        self.call(call).await.map(|reply| (reply.id, reply.ttl))
    }

    /// Ends a lease that nobody needs. Best effort: left alone, it runs out.
    pub(super) async fn revoke(&self, id: i64) {
        let call = |channel, sign: Sign| {
            let request = sign.request(pb::LeaseRevokeRequest { id });
            async move { LeaseClient::new(channel).lease_revoke(request).await }
        };
        let _ = self.call(call).await;
    }

    /// Grants a lease anew, for its whole length, which is the answer; `None` if it is gone.
    pub(super) async fn keep_alive(&self, id: i64) -> Result<Option<i64>> {
        let call = |channel, sign: Sign| {
            let request = sign.request(tokio_stream::once(pb::LeaseKeepAliveRequest { id }));
            async move { LeaseClient::new(channel).lease_keep_alive(request).await }
        };
        let mut replies = self.call(call).await?;
        let reply = replies.message().await.map_err(|status| failed(&status))?;
        let outage = StoreError::Unavailable { retry_after: RETRY };
        let reply = reply.ok_or(outage)?;
        Ok((reply.ttl > 0).then_some(reply.ttl))
    }

    /// The whole seconds that remain of a lease, and its length; `None` if it is gone.
    pub(super) async fn time_to_live(&self, id: i64) -> Result<Option<(i64, i64)>> {
        let call = |channel, sign: Sign| {
            let request = sign.request(pb::LeaseTimeToLiveRequest { id });
            async move { LeaseClient::new(channel).lease_time_to_live(request).await }
        };
        let reply = self.call(call).await?;
        Ok((reply.ttl >= 0).then_some((reply.ttl, reply.granted_ttl)))
    }

    /// Begins a watch. The stream of requests stays open as long as the answers are read.
    pub(super) async fn watch(&self, create: pb::WatchCreateRequest) -> Result<Streaming<pb::WatchResponse>> {
        let call = |channel, sign: Sign| {
            let create = pb::watch_request::Request::Create(create.clone());
            let first = tokio_stream::once(pb::WatchRequest { request: Some(create) });
            let request = sign.request(tokio_stream::StreamExt::chain(first, tokio_stream::pending()));
            async move {
                let client = WatchClient::new(channel).max_decoding_message_size(MESSAGE_LEN_MAX);
                { client }.watch(request).await
            }
        };
        self.call(call).await
    }
}

/// What a transaction came to.
#[derive(Debug)]
pub(super) struct Answered {
    /// Whether the comparisons held.
    pub(super) succeeded: bool,
    /// The newest revision of the whole store.
    pub(super) revision: i64,
    /// The answers of the ranges that were asked for, in order.
    pub(super) ranges: Vec<pb::RangeResponse>,
}

/// Puts the token into a request.
struct Sign(Option<MetadataValue<Ascii>>);

impl Sign {
    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &self.0 {
            request.metadata_mut().insert(TOKEN, token.clone());
        }
        request
    }
}

/// What etcd's refusals mean here.
pub(super) fn failed(status: &Status) -> StoreError {
    let says = |words: &str| status.message().contains(words);
    match status.code() {
        Code::Unauthenticated | Code::PermissionDenied => StoreError::Unauthenticated,
        Code::InvalidArgument if WHO_ARE_YOU.into_iter().any(says) => StoreError::Unauthenticated,
        Code::InvalidArgument if says("too large") => too_large(),
        Code::OutOfRange => too_large(),
        Code::Unimplemented | Code::InvalidArgument => StoreError::Unsupported(Feature::Operation),
        _ => StoreError::Unavailable { retry_after: RETRY },
    }
}

fn too_large() -> StoreError {
    let limit = MESSAGE_LEN_MAX as u64;
    StoreError::TooLarge { what: Bounded::Message, len: limit + 1, limit }
}
