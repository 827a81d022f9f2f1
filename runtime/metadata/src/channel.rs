//! Connections to gRPC servers, ours and etcd's: made when they are used, and again whenever they must.

use core::time::Duration;

use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint};

use crate::error::{InputError, Result};

/// How often both ends ask an idle connection whether the other end is still there.
pub(crate) const KEEPALIVE_PERIOD: Duration = Duration::from_secs(10);
/// How long the answer may take.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// When a client should ask again after an outage, unless the server said something else.
pub(crate) const RETRY: Duration = Duration::from_millis(200);

/// How to know that a server is the right one.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tls<'a> {
    /// The certificate (PEM) that must have signed the server's.
    pub(crate) ca_pem: &'a [u8],
    /// The name in the server's certificate, if it is not the host.
    pub(crate) domain: Option<&'a str>,
}

/// A channel to `uri`, which `field` calls it in a refusal. Nothing is sent yet; must be called inside
/// tokio.
///
/// # Errors
/// [`InputError`] for an address or a certificate that cannot be used.
pub(crate) fn lazy(
    uri: &str,
    field: &'static str,
    tls: Option<Tls<'_>>,
    budget: Duration,
) -> Result<Channel> {
    let refusal = |limit| InputError::new(field, uri, limit);
    let mut endpoint = Endpoint::from_shared(uri.to_owned()).map_err(|_| refusal("an address"))?;
    if let Some(tls) = tls {
        let mut config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(tls.ca_pem));
        if let Some(domain) = tls.domain {
            config = config.domain_name(domain);
        }
        endpoint = endpoint.tls_config(config).map_err(|_| refusal("reachable with this certificate"))?;
    }
    let endpoint = endpoint
        .connect_timeout(budget)
        .tcp_nodelay(true)
        .tcp_keepalive(Some(KEEPALIVE_PERIOD))
        .http2_keep_alive_interval(KEEPALIVE_PERIOD)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    Ok(endpoint.connect_lazy())
}
