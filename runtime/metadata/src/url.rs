//! Which store a URL names. The only place that knows schemes; pure, reads no file.
//!
//! | URL | store |
//! |---|---|
//! | `memory:` | in this process, gone with it |
//! | `redb:PATH` | in a file; one process has it at a time |
//! | `ibex://HOST:PORT` | `ibex store serve` on TCP |
//! | `ibex+unix:PATH` | the same on a Unix socket |
//! | `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]` | Redis; `rediss://`, and it takes `?ca=PATH`: over TLS |
//! | `etcd://HOST:PORT` | etcd |
//! | `k8s://NAMESPACE` | a namespace of a Kubernetes cluster |
//! | `layered+URL` | any of these behind a cache |
//!
//! Options come after `?`, joined by `&`:
//!
//! | option | for | means |
//! |---|---|---|
//! | `timeout-ms=N` | `ibex`, `etcd`, `k8s` | how long an operation may take, 5000 unless said otherwise |
//! | `ca=PATH` | `ibex`, `etcd` over TCP | turns TLS on, with this certificate as the authority |
//! | `domain=NAME` | where there is a `ca` | the name in the server's certificate |
//! | `token-file=PATH` | `ibex` | the token that the server wants |
//! | `user=NAME&password-file=PATH` | `etcd` | who to log in as |
//! | `server=URL` | `k8s` | an API server without credentials (`kubectl proxy`); else as kubectl does |

use core::time::Duration;
use std::path::PathBuf;

use crate::error::{Feature, InputError, Result, StoreError};

/// How long an operation on a remote store may take, unless the URL says otherwise.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(5);
/// The range of `timeout-ms`.
const TIMEOUT_MS: std::ops::RangeInclusive<u64> = 1..=600_000;
const SCHEMES: &str = "memory:, redb:PATH, ibex://HOST:PORT, ibex+unix:PATH, redis://HOST:PORT, \
                       etcd://HOST:PORT, k8s://NAMESPACE, or layered+ and one of these";

/// A store, by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// In this process.
    Memory,
    /// In a file.
    Redb(PathBuf),
    /// On another process.
    Ibex(IbexUrl),
    /// In Redis.
    Redis(RedisUrl),
    /// In etcd.
    Etcd(EtcdUrl),
    /// In a Kubernetes cluster.
    K8s(K8sUrl),
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

/// How to reach a Redis.
#[derive(Clone, PartialEq, Eq)]
pub struct RedisUrl {
    /// What Redis' own client reads. Never shown: it may hold a password.
    pub url: String,
    /// For `rediss://`, the file with the certificate that clients trust; without, the system's are.
    pub ca: Option<PathBuf>,
}

impl std::fmt::Debug for RedisUrl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("RedisUrl").field("ca", &self.ca).finish_non_exhaustive()
    }
}

/// How to reach an etcd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcdUrl {
    /// `host:port`.
    pub authority: String,
    /// The file with the certificate that clients trust; its presence turns TLS on.
    pub ca: Option<PathBuf>,
    /// The name in the server's certificate, if it is not the host.
    pub domain: Option<String>,
    /// Who to log in as, and the file with the password.
    pub login: Option<(String, PathBuf)>,
    /// How long an operation may take.
    pub timeout: Duration,
}

/// How to reach a Kubernetes cluster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct K8sUrl {
    /// The namespace.
    pub namespace: String,
    /// An API server to be used without credentials.
    pub server: Option<String>,
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
                behind => {
                    built(cfg!(feature = "layered"), Feature::Layered)?;
                    Ok(Self::Layered(Box::new(behind)))
                }
            };
        }
        match scheme {
            "memory" if rest.is_empty() => Ok(Self::Memory),
            "memory" => Err(InputError::new("store", text, "memory: and nothing more").into()),
            "redb" if rest.is_empty() => Err(InputError::new("store", text, "redb:PATH").into()),
            "redb" => {
                built(cfg!(feature = "redb"), Feature::Redb)?;
                Ok(Self::Redb(rest.into()))
            }
            "ibex" | "ibex+unix" => {
                built(cfg!(feature = "grpc"), Feature::Grpc)?;
                IbexUrl::parse(text).map(Self::Ibex)
            }
            "redis" | "rediss" => {
                built(cfg!(feature = "redis"), Feature::Redis)?;
                RedisUrl::parse(text).map(Self::Redis)
            }
            "etcd" => {
                built(cfg!(feature = "etcd"), Feature::Etcd)?;
                EtcdUrl::parse(text).map(Self::Etcd)
            }
            "k8s" => {
                built(cfg!(feature = "k8s"), Feature::K8s)?;
                K8sUrl::parse(text).map(Self::K8s)
            }
            _ => Err(InputError::new("store", text, SCHEMES).into()),
        }
    }

    /// How long one operation may take, where the URL has a say in it.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        match self {
            Self::Ibex(url) => url.timeout,
            Self::Etcd(url) => url.timeout,
            Self::K8s(url) => url.timeout,
            Self::Layered(behind) => behind.timeout(),
            Self::Memory | Self::Redb(_) | Self::Redis(_) => TIMEOUT_DEFAULT,
        }
    }
}

/// Refuses a scheme that exists, but not in this build.
fn built(is_built: bool, feature: Feature) -> Result<()> {
    if is_built { Ok(()) } else { Err(StoreError::Unsupported(feature)) }
}

/// The options of a URL: names and values, none of them empty.
fn options(text: &str) -> Result<(&str, Vec<(&str, &str)>)> {
    let (place, options) = text.split_once('?').unwrap_or((text, ""));
    let given = options.split('&').filter(|option| !option.is_empty());
    let split = |option: &'_ str| option.split_once('=').filter(|(_, value)| !value.is_empty()).is_some();
    if !given.clone().all(split) {
        return Err(InputError::new("store", text, "made of options of the form name=value").into());
    }
    Ok((place, given.filter_map(|option| option.split_once('=')).collect()))
}

fn timeout(text: &str, value: &str) -> Result<Duration> {
    let ms = value.parse().ok().filter(|ms| TIMEOUT_MS.contains(ms));
    let refusal = || InputError::new("store", text, "with timeout-ms in 1..=600000");
    Ok(Duration::from_millis(ms.ok_or_else(refusal)?))
}

fn check_domain(text: &str, domain: Option<&String>, ca: Option<&PathBuf>) -> Result<()> {
    if domain.is_some() && ca.is_none() {
        return Err(InputError::new("store", text, "with ca=PATH wherever there is a domain").into());
    }
    Ok(())
}

impl RedisUrl {
    fn parse(text: &str) -> Result<Self> {
        // A refusal repeats what was refused, and this may hold a password.
        let refusal = |limit| InputError::new("store", "redis URL (not shown)", limit);
        let is_tls = text.starts_with("rediss:");
        let rest = text.split_once("://").map(|(_, rest)| rest).filter(|rest| !rest.is_empty());
        rest.ok_or_else(|| refusal("redis://HOST:PORT, or rediss:// and so on"))?;
        let Some((url, options)) = text.split_once("?ca=") else {
            return Ok(Self { url: text.to_owned(), ca: None });
        };
        if !is_tls || options.is_empty() || options.contains('&') {
            return Err(refusal("rediss:// where there is a ca=PATH, and no other option beside it").into());
        }
        Ok(Self { url: url.to_owned(), ca: Some(options.into()) })
    }
}

impl EtcdUrl {
    fn parse(text: &str) -> Result<Self> {
        let refusal = |limit| InputError::new("store", text, limit);
        let (place, options) = options(text)?;
        let authority = place.strip_prefix("etcd://").filter(|place| is_authority(strip_slash(place)));
        let authority = strip_slash(authority.ok_or_else(|| refusal("etcd://HOST:PORT"))?).to_owned();
        let (ca, domain, login, timeout) = (None, None, None, TIMEOUT_DEFAULT);
        let mut url = Self { authority, ca, domain, login, timeout };
        let (mut user, mut password) = (None, None);
        for (key, value) in options {
            match key {
                "ca" => url.ca = Some(value.into()),
                "domain" => url.domain = Some(value.into()),
                "user" => user = Some(value.to_owned()),
                "password-file" => password = Some(value.into()),
                "timeout-ms" => url.timeout = self::timeout(text, value)?,
                _ => {
                    let known = "without options other than ca, domain, user, password-file, timeout-ms";
                    return Err(refusal(known).into());
                }
            }
        }
        url.login = match (user, password) {
            (Some(user), Some(file)) => Some((user, file)),
            (None, None) => None,
            _ => return Err(refusal("with user and password-file together, or neither").into()),
        };
        check_domain(text, url.domain.as_ref(), url.ca.as_ref())?;
        Ok(url)
    }
}

impl K8sUrl {
    fn parse(text: &str) -> Result<Self> {
        let refusal = |limit| InputError::new("store", text, limit);
        let (place, options) = options(text)?;
        let namespace = place.strip_prefix("k8s://").map(strip_slash);
        let is_good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        let namespace = namespace.filter(|name| (1..=63).contains(&name.len()) && name.chars().all(is_good));
        let namespace = namespace.ok_or_else(|| refusal("k8s://NAMESPACE"))?.to_owned();
        let mut url = Self { namespace, server: None, timeout: TIMEOUT_DEFAULT };
        for (key, value) in options {
            match key {
                "server" => url.server = Some(value.into()),
                "timeout-ms" => url.timeout = timeout(text, value)?,
                _ => return Err(refusal("without options other than server, timeout-ms").into()),
            }
        }
        Ok(url)
    }
}

impl IbexUrl {
    /// A plain connection to this address, with the usual timeout.
    #[must_use]
    pub fn plain(address: Address) -> Self {
        Self { address, ca: None, domain: None, token_file: None, timeout: TIMEOUT_DEFAULT }
    }

    fn parse(text: &str) -> Result<Self> {
        let (place, options) = options(text)?;
        let mut url = Self::plain(address(text, place)?);
        for (key, value) in options {
            url.set(text, key, value)?;
        }
        check_domain(text, url.domain.as_ref(), url.ca.as_ref())?;
        Ok(url)
    }

    fn set(&mut self, text: &str, key: &str, value: &str) -> Result<()> {
        let is_tcp = matches!(self.address, Address::Tcp(_));
        match key {
            "token-file" => self.token_file = Some(value.into()),
            "ca" if is_tcp => self.ca = Some(value.into()),
            "domain" if is_tcp => self.domain = Some(value.into()),
            "timeout-ms" => self.timeout = timeout(text, value)?,
            _ => {
                let known = "without options other than token-file, timeout-ms, ca, domain";
                return Err(InputError::new("store", text, known).into());
            }
        }
        Ok(())
    }
}

fn address(text: &str, place: &str) -> Result<Address> {
    if let Some(path) = place.strip_prefix("ibex+unix:") {
        let refusal = || InputError::new("store", text, "ibex+unix:PATH");
        return if path.is_empty() { Err(refusal().into()) } else { Ok(Address::Unix(path.into())) };
    }
    let authority = place.strip_prefix("ibex://").map(strip_slash).filter(|place| is_authority(place));
    let refusal = || InputError::new("store", text, "ibex://HOST:PORT");
    Ok(Address::Tcp(authority.ok_or_else(refusal)?.to_owned()))
}

fn strip_slash(place: &str) -> &str {
    place.strip_suffix('/').unwrap_or(place)
}

/// Whether this is `host:port`, and nothing else.
fn is_authority(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else { return false };
    let is_bracketed = host.starts_with('[') && host.ends_with(']') && host.len() > 2;
    let is_host_char = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    let is_host = !host.is_empty() && host.chars().all(is_host_char);
    let is_ip6 = is_bracketed && host[1..host.len() - 1].parse::<std::net::Ipv6Addr>().is_ok();
    let is_port = port.parse::<u16>().is_ok_and(|port| port != 0);
    (is_host || is_ip6) && is_port
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
        let redis = |url: &str, ca: Option<&str>| {
            StoreUrl::Redis(RedisUrl { url: url.into(), ca: ca.map(Into::into) })
        };
        let (authority, timeout) = ("h:2379".into(), TIMEOUT_DEFAULT);
        let etcd = EtcdUrl { authority, ca: None, domain: None, login: None, timeout };
        let cases = [
            ("memory:", StoreUrl::Memory),
            ("redb:state/ibex.redb", StoreUrl::Redb("state/ibex.redb".into())),
            ("ibex://127.0.0.1:7400", StoreUrl::Ibex(ibex(tcp("127.0.0.1:7400")))),
            ("ibex://[::1]:7400/", StoreUrl::Ibex(ibex(tcp("[::1]:7400")))),
            ("ibex+unix:dir/s.sock", StoreUrl::Ibex(ibex(unix.clone()))),
            ("redis://h:1/2", redis("redis://h:1/2", None)),
            ("rediss://h:1/2", redis("rediss://h:1/2", None)),
            ("rediss://h:1/2?ca=ca.pem", redis("rediss://h:1/2", Some("ca.pem"))),
            ("etcd://h:2379", StoreUrl::Etcd(etcd.clone())),
            (
                "etcd://h:2379/?ca=ca.pem&domain=d&user=u&password-file=p&timeout-ms=250",
                StoreUrl::Etcd(EtcdUrl {
                    ca: Some("ca.pem".into()),
                    domain: Some("d".into()),
                    login: Some(("u".into(), "p".into())),
                    timeout: Duration::from_millis(250),
                    ..etcd
                }),
            ),
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
            ("rediss://", "redis://HOST:PORT"),
            ("redis://h:1?ca=x", "rediss://"),
            ("rediss://h:1?ca=", "ca=PATH"),
            ("etcd:", "etcd://HOST:PORT"),
            ("etcd://h", "etcd://HOST:PORT"),
            ("etcd://u:p@h:1", "etcd://HOST:PORT"),
            ("etcd://h:1?user=u", "together"),
            ("etcd://h:1?domain=d", "ca=PATH"),
            ("etcd://h:1?token-file=t", "password-file"),
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
    fn a_backend_that_is_not_built_says_which_feature_it_wants() {
        let parsed = StoreUrl::parse("k8s://prod");
        let layered = StoreUrl::parse("layered+k8s://prod");
        if cfg!(feature = "k8s") {
            let (namespace, timeout) = ("prod".into(), TIMEOUT_DEFAULT);
            assert_eq!(parsed, Ok(StoreUrl::K8s(K8sUrl { namespace, server: None, timeout })));
            for bad in ["k8s://", "k8s://Prod", "k8s://a/b", "k8s://a?namespace=b"] {
                assert!(matches!(StoreUrl::parse(bad), Err(StoreError::Input(_))), "{bad}");
            }
        } else {
            let refused = Err(StoreError::Unsupported(Feature::K8s));
            assert_eq!((&parsed, &layered), (&refused, &refused));
            assert!(Feature::K8s.to_string().contains("cargo feature k8s"));
        }
    }

    #[test]
    fn passwords_in_urls_are_not_shown() {
        let secret = "redis://user:correct-horse@h:1";
        for url in [secret.to_owned(), format!("layered+{secret}")] {
            assert!(!format!("{:?}", StoreUrl::parse(&url)).contains("horse"));
        }
        let refused = StoreUrl::parse(&format!("{secret}?ca=x")).unwrap_err();
        assert!(!refused.to_string().contains("horse"), "{refused}");
    }
}
