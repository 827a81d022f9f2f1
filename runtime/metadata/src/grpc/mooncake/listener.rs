//! Whether the engine behind an `rpc_meta` is gone.
//!
//! Every engine listens at the address that it registers, for as long as it lives. So a host which answers
//! that nothing listens there says that the process has ended. Anything else says nothing: silence may be a
//! network that is cut, and a loopback address means another machine to every client that is not on this one.

use core::time::Duration;
use std::io::ErrorKind;
use std::net::SocketAddr;

use axum::http::Extensions;
use serde_json::Value;
use tokio::net::{TcpStream, lookup_host};
use tonic::transport::server::TcpConnectInfo;

use crate::clock::at_most;

/// A host that is up refuses at once.
const PATIENCE: Duration = Duration::from_secs(2);

/// Whether a request came from a process of this machine.
pub(super) fn is_local(extensions: &Extensions) -> bool {
    let info = extensions.get::<TcpConnectInfo>();
    info.and_then(TcpConnectInfo::remote_addr).is_some_and(|from| from.ip().is_loopback())
}

/// Whether nothing listens any more where this value says. `is_local`: who asks is on this machine.
pub(super) async fn is_gone(rpc_meta: &[u8], is_local: bool) -> bool {
    let Some((host, port)) = address(rpc_meta) else { return false };
    let mut is_gone = false;
    at_most(PATIENCE, async {
        let Ok(found) = lookup_host((host.as_str(), port)).await else { return };
        let addresses: Vec<SocketAddr> = found.collect();
        for address in &addresses {
            if address.ip().is_loopback() && !is_local {
                return;
            }
            let refused = TcpStream::connect(address).await.err().map(|error| error.kind());
            if refused != Some(ErrorKind::ConnectionRefused) {
                return;
            }
        }
        is_gone = !addresses.is_empty();
    })
    .await;
    is_gone
}

fn address(rpc_meta: &[u8]) -> Option<(String, u16)> {
    let value: Value = serde_json::from_slice(rpc_meta).ok()?;
    let host = value.get("ip_or_host_name")?.as_str()?;
    let port = u16::try_from(value.get("rpc_port")?.as_u64()?).ok().filter(|port| *port != 0)?;
    Some((host.trim_matches(['[', ']']).to_owned(), port))
}

#[cfg(test)]
mod tests {
    use tokio::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn only_a_refusal_is_evidence() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let meta = |host: &str, port: u16| format!(r#"{{"ip_or_host_name":"{host}","rpc_port":{port}}}"#);
        assert!(!is_gone(meta("127.0.0.1", port).as_bytes(), true).await, "it listens");
        drop(listener);
        assert!(is_gone(meta("127.0.0.1", port).as_bytes(), true).await);
        assert!(!is_gone(meta("127.0.0.1", port).as_bytes(), false).await, "another machine's loopback");
        for nothing in ["", "{}", "first", r#"{"ip_or_host_name":"127.0.0.1"}"#, &meta("127.0.0.1", 0)] {
            assert!(!is_gone(nothing.as_bytes(), true).await, "{nothing}");
        }
        assert!(!is_gone(meta("no.such.host.invalid", port).as_bytes(), true).await, "no such host");
    }
}
