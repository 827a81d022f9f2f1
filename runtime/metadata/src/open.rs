//! From a URL to a store.

use std::path::Path;
#[cfg(feature = "etcd")]
use std::path::PathBuf;
use std::sync::Arc;

use crate::clock::Clock;
use crate::error::{Feature, InputError, Result, StoreError};
#[cfg(feature = "etcd")]
use crate::etcd::{EtcdConnect, EtcdStore, Login};
#[cfg(feature = "grpc")]
use crate::grpc::{Connect, RemoteStore, Secret, Target};
#[cfg(feature = "k8s")]
use crate::k8s::{K8sConnect, K8sStore};
#[cfg(feature = "layered")]
use crate::layered::Layered;
use crate::local::LocalStore;
#[cfg(feature = "redis")]
use crate::redis::RedisStore;
use crate::store::Store;
#[cfg(feature = "etcd")]
use crate::url::EtcdUrl;
use crate::url::StoreUrl;
#[cfg(feature = "redis")]
use crate::url::TIMEOUT_DEFAULT;
#[cfg(feature = "grpc")]
use crate::url::{Address, IbexUrl};

/// Bytes of a certificate, token or password file.
const FILE_LEN_MAX: u64 = 1 << 20;

/// Opens the store that a URL names. A remote store is not contacted yet. Must be called inside tokio.
///
/// # Errors
/// [`StoreError::Input`] for a file that cannot be read; whatever opening refuses.
pub fn open(url: &StoreUrl, clock: Clock) -> Result<Arc<dyn Store>> {
    if let Some(store) = open_local(url, &clock)? {
        return Ok(Arc::new(store));
    }
    match url {
        #[cfg(feature = "grpc")]
        StoreUrl::Ibex(url) => Ok(Arc::new(RemoteStore::new(&connect(url)?, clock)?)),
        #[cfg(feature = "redis")]
        StoreUrl::Redis(url) => {
            let ca_pem = url.ca.as_deref().map(|path| read_file("ca", path)).transpose()?;
            Ok(Arc::new(RedisStore::new(&url.url, ca_pem, clock, TIMEOUT_DEFAULT)?))
        }
        #[cfg(feature = "etcd")]
        StoreUrl::Etcd(url) => Ok(Arc::new(EtcdStore::new(&etcd(url)?, clock)?)),
        #[cfg(feature = "k8s")]
        StoreUrl::K8s(url) => {
            let (namespace, server) = (url.namespace.clone(), url.server.clone());
            Ok(Arc::new(K8sStore::new(&K8sConnect { namespace, server, budget: url.timeout }, clock)?))
        }
        #[cfg(feature = "layered")]
        StoreUrl::Layered(behind) => Ok(Arc::new(Layered::new(open(behind, clock.clone())?, clock))),
        _ => Err(StoreError::Unsupported(Feature::Backend)),
    }
}

/// Opens a store of this process; `None` if the URL names one elsewhere, or one this build lacks.
///
/// # Errors
/// As [`LocalStore::redb`].
pub fn open_local(url: &StoreUrl, clock: &Clock) -> Result<Option<LocalStore>> {
    match url {
        StoreUrl::Memory => Ok(Some(LocalStore::memory(clock.clone()))),
        #[cfg(feature = "redb")]
        StoreUrl::Redb(path) => Ok(Some(LocalStore::redb(path, clock.clone())?)),
        _ => Ok(None),
    }
}

#[cfg(feature = "etcd")]
fn etcd(url: &EtcdUrl) -> Result<EtcdConnect> {
    let login = |(user, file): &(String, PathBuf)| -> Result<Login> {
        let bytes = read_file("password-file", file)?;
        let refusal = |_| InputError::new("password-file", &file.display().to_string(), "a file of text");
        let password = String::from_utf8(bytes).map_err(refusal)?.trim_end().to_owned();
        Ok(Login { user: user.clone(), password })
    };
    Ok(EtcdConnect {
        authority: url.authority.clone(),
        ca_pem: url.ca.as_deref().map(|path| read_file("ca", path)).transpose()?,
        domain: url.domain.clone(),
        login: url.login.as_ref().map(login).transpose()?,
        budget: url.timeout,
    })
}

#[cfg(feature = "grpc")]
fn connect(url: &IbexUrl) -> Result<Connect> {
    let target = match &url.address {
        Address::Tcp(authority) => Target::Tcp(authority.clone()),
        Address::Unix(path) => Target::Unix(path.clone()),
    };
    let ca_pem = url.ca.as_deref().map(|path| read_file("ca", path)).transpose()?;
    let token = url.token_file.as_deref().map(read_token).transpose()?;
    Ok(Connect { target, ca_pem, domain: url.domain.clone(), token, budget: url.timeout })
}

/// Reads the token of a file.
///
/// # Errors
/// [`InputError`] if the file cannot be read or holds no token.
#[cfg(feature = "grpc")]
pub fn read_token(path: &Path) -> Result<Secret, InputError> {
    let bytes = read_file("token-file", path)?;
    Secret::new(&String::from_utf8_lossy(&bytes))
}

/// Reads a small file that an operator named.
///
/// # Errors
/// [`InputError`] naming the field and the path.
pub fn read_file(field: &'static str, path: &Path) -> Result<Vec<u8>, InputError> {
    let refusal = || InputError::new(field, &path.display().to_string(), "a readable file of at most 1 MiB");
    let len = std::fs::metadata(path).map_err(|_| refusal())?.len();
    if len > FILE_LEN_MAX {
        return Err(refusal());
    }
    std::fs::read(path).map_err(|_| refusal())
}
