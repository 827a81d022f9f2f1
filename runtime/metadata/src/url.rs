//! Which store a URL names. The only place that knows schemes; pure, reads no file.
//!
//! | URL | store |
//! |---|---|
//! | `memory:` | in this process, gone with it |
//! | `redb:PATH` | in a file; one process has it at a time |
//! | `ibex://HOST:PORT` | `ibex store serve` on TCP |
//! | `ibex+unix:PATH` | the same on a Unix socket |
//! | `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]` | Redis |
//! | `layered+URL` | any of these behind a cache |
//! | `etcd://…`, `k8s://…` | known by name, not built yet |
//!
//! `ibex://` and `ibex+unix:` take options after `?`: `token-file=PATH`, `timeout-ms=N`, and over TCP
//! `ca=PATH` (which turns TLS on) and `domain=NAME`.

use core::time::Duration;
use std::path::PathBuf;

use crate::error::{Feature, InputError, Result, StoreError};

/// How long an operation on a remote store may take, unless the URL says otherwise.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// The range of `timeout-ms`.
const TIMEOUT_MS: std::ops::RangeInclusive<u64> = 1..=600_000;
const SCHEMES: &str =
    "memory:, redb:PATH, ibex://HOST:PORT, ibex+unix:PATH, redis://HOST:PORT, or layered+ and one of these";

/// A store, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// In this process.
    Memory,
    /// In a file.
    Redb(PathBuf),
    /// On another process.
    Ibex(IbexUrl),
    /// In Redis: the URL, which Redis' own client reads.
    Redis(String),
    /// Another store behind a cache.
    Layered(Box<StoreUrl>),
}

/// How to reach `ibex store serve`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IbexUrl {
    /// Where it is.
    pub address: Address,
    /// The file with the certificate that clients trust; its presence turns TLS on.
    pub ca: Option<PathBuf>,
    /// The name in the server's certificate, if it is not the host.
    pub domain: Option<String>,
    /// The file with the token.
    pub token_file: Option<PathBuf>,
    /// How long an operation may take.
    pub timeout: Duration,
}

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// `host:port`.
    Tcp(String),
    /// A Unix socket.
    Unix(PathBuf),
}

impl StoreUrl {
    /// Reads a URL.
    ///
    /// # Errors
    /// [`StoreError::Input`] for an unknown scheme or a malformed rest; [`StoreError::Unsupported`] for a
    /// backend that exists but not in this build.
    pub fn parse(text: &str) -> Result<Self> {
        let Some((scheme, rest)) = text.split_once(':') else {
            return Err(InputError::new("store", text, SCHEMES).into());
        };
        if let Some(behind) = text.strip_prefix("layered+") {
            let behind = Self::parse(behind)?;
            let refusal = || InputError::new("store", text, "layered once");
            return match behind {
                Self::Layered(_) => Err(refusal().into()),
                behind => available(cfg!(feature = "layered"), Self::Layered(Box::new(behind))),
            };
        }
        match scheme {
            "memory" if rest.is_empty() => Ok(Self::Memory),
            "memory" => Err(InputError::new("store", text, "memory: and nothing more").into()),
            "redb" if rest.is_empty() => Err(InputError::new("store", text, "redb:PATH").into()),
            "redb" => available(cfg!(feature = "redb"), Self::Redb(rest.into())),
            "ibex" | "ibex+unix" => available(cfg!(feature = "grpc"), Self::Ibex(IbexUrl::parse(text)?)),
            "redis" if rest.starts_with("//") && rest.len() > 2 => {
                available(cfg!(feature = "redis"), Self::Redis(text.to_owned()))
            }
            "redis" => Err(InputError::new("store", text, "redis://HOST:PORT").into()),
            "rediss" | "etcd" | "k8s" => Err(StoreError::Unsupported(Feature::Backend)),
            _ => Err(InputError::new("store", text, SCHEMES).into()),
        }
    }
}

fn available(is_built: bool, url: StoreUrl) -> Result<StoreUrl> {
    if is_built { Ok(url) } else { Err(StoreError::Unsupported(Feature::Backend)) }
}

impl IbexUrl {
    /// A plain connection to this address, with the usual timeout.
    #[must_use]
    pub fn plain(address: Address) -> Self {
        Self { address, ca: None, domain: None, token_file: None, timeout: TIMEOUT_DEFAULT }
    }

    fn parse(text: &str) -> Result<Self> {
        let (place, options) = text.split_once('?').unwrap_or((text, ""));
        let mut url = Self::plain(address(text, place)?);
        for option in options.split('&').filter(|option| !option.is_empty()) {
            url.set(text, option)?;
        }
        if url.domain.is_some() && url.ca.is_none() {
            return Err(InputError::new("store", text, "with ca=PATH wherever there is a domain").into());
        }
        Ok(url)
    }

    fn set(&mut self, text: &str, option: &str) -> Result<()> {
        let refusal = |limit| InputError::new("store", text, limit);
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        if value.is_empty() {
            return Err(refusal("made of options of the form name=value").into());
        }
        let is_tcp = matches!(self.address, Address::Tcp(_));
        match key {
            "token-file" => self.token_file = Some(value.into()),
            "ca" if is_tcp => self.ca = Some(value.into()),
            "domain" if is_tcp => self.domain = Some(value.into()),
            "timeout-ms" => {
                let ms = value.parse().ok().filter(|ms| TIMEOUT_MS.contains(ms));
                let ms = ms.ok_or_else(|| refusal("with timeout-ms in 1..=600000"))?;
                self.timeout = Duration::from_millis(ms);
            }
            _ => return Err(refusal("without options other than token-file, timeout-ms, ca, domain").into()),
        }
        Ok(())
    }
}

fn address(text: &str, place: &str) -> Result<Address> {
    if let Some(path) = place.strip_prefix("ibex+unix:") {
        let refusal = || InputError::new("store", text, "ibex+unix:PATH");
        return if path.is_empty() { Err(refusal().into()) } else { Ok(Address::Unix(path.into())) };
    }
    let refusal = || InputError::new("store", text, "ibex://HOST:PORT");
    let authority = place.strip_prefix("ibex://").ok_or_else(refusal)?;
    let authority = authority.strip_suffix('/').unwrap_or(authority);
    let (host, port) = authority.rsplit_once(':').ok_or_else(refusal)?;
    let is_bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let is_host_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_host = !host.is_empty() && host.chars().all(is_host_char);
    let is_ip6 = is_bracketed && host[1..host.len() - 1].parse::<std::net::Ipv6Addr>().is_ok();
    let is_port = port.parse::<u16>().is_ok_and(|port| port != 0);
    if (is_host || is_ip6) && is_port {
        Ok(Address::Tcp(authority.to_owned()))
    } else {
        Err(refusal().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ibex(address: Address) -> IbexUrl {
        IbexUrl::plain(address)
    }

    #[test]
    fn every_scheme_is_read() {
        let tcp = |text: &str| Address::Tcp(text.into());
        let full = IbexUrl {
            ca: Some("ca.pem".into()),
            domain: Some("store".into()),
            token_file: Some("t".into()),
            timeout: Duration::from_millis(250),
            ..ibex(tcp("h:1"))
        };
        let unix = Address::Unix("dir/s.sock".into());
        let cases = [
            ("memory:", StoreUrl::Memory),
            ("redb:state/ibex.redb", StoreUrl::Redb("state/ibex.redb".into())),
            ("ibex://127.0.0.1:7400", StoreUrl::Ibex(ibex(tcp("127.0.0.1:7400")))),
            ("ibex://[::1]:7400/", StoreUrl::Ibex(ibex(tcp("[::1]:7400")))),
            ("ibex+unix:dir/s.sock", StoreUrl::Ibex(ibex(unix.clone()))),
            ("redis://h:1/2", StoreUrl::Redis("redis://h:1/2".into())),
            ("layered+memory:", StoreUrl::Layered(Box::new(StoreUrl::Memory))),
            ("ibex://h:1?ca=ca.pem&domain=store&token-file=t&timeout-ms=250", StoreUrl::Ibex(full)),
        ];
        for (text, url) in cases {
            assert_eq!(StoreUrl::parse(text), Ok(url), "{text}");
        }
        let with_token = StoreUrl::parse("ibex+unix:dir/s.sock?token-file=t").unwrap();
        let token_file = Some("t".into());
        assert_eq!(with_token, StoreUrl::Ibex(IbexUrl { token_file, ..ibex(unix) }));
    }

    #[test]
    fn what_is_wrong_is_refused_with_what_is_right() {
        for (text, right) in [
            ("", "ibex://HOST:PORT"),
            ("memory", "memory:"),
            ("memory:x", "nothing more"),
            ("redb:", "redb:PATH"),
            ("mysql://x", "redb:PATH"),
            ("ibex:", "ibex://HOST:PORT"),
            ("ibex://", "ibex://HOST:PORT"),
            ("ibex://host", "ibex://HOST:PORT"),
            ("ibex://host:0", "ibex://HOST:PORT"),
            ("ibex://host:70000", "ibex://HOST:PORT"),
            ("ibex://ho st:1", "ibex://HOST:PORT"),
            ("ibex://[::g]:1", "ibex://HOST:PORT"),
            ("ibex://user@host:1", "ibex://HOST:PORT"),
            ("ibex+unix:", "ibex+unix:PATH"),
            ("redis:", "redis://HOST:PORT"),
            ("redis://", "redis://HOST:PORT"),
            ("layered+", "layered+"),
            ("layered+layered+memory:", "once"),
            ("ibex://h:1?x=1", "token-file"),
            ("ibex://h:1?ca", "name=value"),
            ("ibex://h:1?domain=d", "ca=PATH"),
            ("ibex://h:1?timeout-ms=0", "1..=600000"),
            ("ibex://h:1?timeout-ms=-1", "1..=600000"),
            ("ibex+unix:s?ca=x", "token-file"),
        ] {
            let Err(StoreError::Input(error)) = StoreUrl::parse(text) else {
                panic!("{text} is not refused as input");
            };
            assert!(error.limit.contains(right), "{text}: {error}");
        }
    }

    #[test]
    fn known_backends_that_are_not_built_are_unsupported() {
        for text in ["rediss://h:1", "etcd://h:1", "k8s://ns", "layered+etcd://h:1"] {
            assert_eq!(StoreUrl::parse(text), Err(StoreError::Unsupported(Feature::Backend)), "{text}");
        }
    }
}
