//! Leases of `coordination.k8s.io`, counted by the API server's clock.
//!
//! Kubernetes counts no lease by itself, and a lease's own `renewTime` is the word of a client's clock. The
//! server, however, notes when each writer changed an object last (`managedFields`), and puts its present
//! time into every answer. Both are whole seconds, so an age is known to within a second: a guard is granted
//! for what is certainly left, and a lease counts as over only when it certainly is.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use sha2::{Digest, Sha256};

use super::api::{MANAGER, ServerTime};
use super::schema::CORRUPT;
use crate::error::Result;
use crate::ids::{Fence, InstanceId, Stamp, Version};
use crate::name::{Prefix, RecordName};

/// Annotations: what a lease says beyond Kubernetes' own fields.
const NAME: &str = "ibex.dev/name";
const FENCE: &str = "ibex.dev/fence";
const VERSION: &str = "ibex.dev/version";
const TTL_MS: &str = "ibex.dev/ttl-ms";
/// Labels: hashes, because parts of names may be more than labels may hold.
const CLUSTER: &str = "ibex.dev/cluster";
const GROUP: &str = "ibex.dev/group";
const ROLE: &str = "ibex.dev/role";
const OF: &str = "ibex.dev/of";
/// Seconds by which an age may be wrong.
const BLUR: u64 = 1;

/// What an object is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// A row.
    Row,
    /// A cell.
    Cell,
    /// The lease of an owner.
    Owner,
    /// The lease of a reader.
    Reader,
}

impl Role {
    fn text(self) -> &'static str {
        match self {
            Self::Row => "row",
            Self::Cell => "cell",
            Self::Owner => "owner",
            Self::Reader => "reader",
        }
    }
}

fn hash(parts: &[&str]) -> String {
    let digest = Sha256::digest(parts.join("\n"));
    digest[..16].iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Under which name Kubernetes keeps something: names of records may be more than it takes.
pub(super) fn object_name(role: Role, name: &RecordName, who: Option<InstanceId>) -> String {
    let who = who.map(|who| who.to_string()).unwrap_or_default();
    format!("{}-{}", role.text(), hash(&[name.as_str(), &who]))
}

/// Name and labels of an object.
pub(super) fn metadata(role: Role, name: &RecordName, who: Option<InstanceId>) -> ObjectMeta {
    let (cluster, group, _) = name.parts();
    let labels = [
        (CLUSTER, hash(&[cluster])),
        (GROUP, hash(&[cluster, group])),
        (ROLE, role.text().to_owned()),
        (OF, hash(&[name.as_str()])),
    ];
    ObjectMeta {
        name: Some(object_name(role, name, who)),
        labels: Some(labels.map(|(key, value)| (key.to_owned(), value)).into()),
        ..ObjectMeta::default()
    }
}

/// The selector of everything under a prefix; `role` narrows it.
pub(super) fn selector(prefix: &Prefix, role: Option<Role>) -> String {
    let parts: Vec<&str> = prefix.as_str().split('/').filter(|part| !part.is_empty()).collect();
    let by_name = match parts.as_slice() {
        [] => None,
        [cluster] => Some((CLUSTER, hash(&[cluster]))),
        [cluster, group] => Some((GROUP, hash(&[cluster, group]))),
        _ => Some((OF, hash(&[prefix.as_str()]))),
    };
    let by_role = role.map(|role| (ROLE, role.text().to_owned()));
    let wanted: Vec<String> =
        by_name.into_iter().chain(by_role).map(|(key, value)| format!("{key}={value}")).collect();
    wanted.join(",")
}

/// A lease as the server shows it.
#[derive(Debug, Clone)]
pub(super) struct Grant {
    /// Whose name it is about.
    pub(super) name: RecordName,
    /// Who must renew it.
    pub(super) holder: InstanceId,
    /// An owner's fence; a reader's stamp.
    pub(super) stamp: Stamp,
    /// How long the holder may stay silent.
    pub(super) ttl: Duration,
    renewed_at: ServerTime,
    object: Lease,
}

impl Grant {
    pub(super) fn read(object: Lease) -> Result<Self> {
        let notes = object.metadata.annotations.as_ref().ok_or(CORRUPT)?;
        let note = |key: &str| notes.get(key).ok_or(CORRUPT);
        let number = |key: &str| note(key)?.parse::<u64>().map_err(|_| CORRUPT);
        let holder = object.spec.as_ref().and_then(|spec| spec.holder_identity.as_deref());
        let holder = holder.and_then(|hex| u128::from_str_radix(hex, 16).ok()).and_then(InstanceId::new);
        let managed = object.metadata.managed_fields.iter().flatten();
        let ours = managed.filter(|entry| entry.manager.as_deref() == Some(MANAGER));
        let renewed_at = ours.filter_map(|entry| entry.time.as_ref()).map(|time| time.0.as_second()).max();
        Ok(Self {
            name: RecordName::parse(note(NAME)?).map_err(|_| CORRUPT)?,
            holder: holder.ok_or(CORRUPT)?,
            stamp: Stamp::new(Fence(number(FENCE)?), Version(number(VERSION)?)),
            ttl: Duration::from_millis(number(TTL_MS)?),
            renewed_at: ServerTime(renewed_at.ok_or(CORRUPT)?),
            object,
        })
    }

    /// What is certainly left.
    pub(super) fn remaining(&self, now: ServerTime) -> Duration {
        self.ttl.saturating_sub(Duration::from_secs(self.age(now) + BLUR))
    }

    /// Whether it certainly ran out.
    pub(super) fn is_over(&self, now: ServerTime) -> bool {
        Duration::from_secs(self.age(now).saturating_sub(BLUR)) >= self.ttl
    }

    /// Seconds since the last renewal, give or take one.
    fn age(&self, now: ServerTime) -> u64 {
        u64::try_from(now.0.saturating_sub(self.renewed_at.0)).unwrap_or(0)
    }

    /// The object as it is to be written: renewed, for what it was or for something else.
    pub(super) fn renewed(&self, terms: &Terms<'_>, now: ServerTime) -> Lease {
        let mut lease = terms.lease(now);
        lease.metadata.resource_version.clone_from(&self.object.metadata.resource_version);
        lease
    }

    /// The revision at which it was read.
    pub(super) fn revision(&self) -> &str {
        self.object.metadata.resource_version.as_deref().unwrap_or_default()
    }

    /// Its own name.
    pub(super) fn object_name(&self) -> &str {
        self.object.metadata.name.as_deref().unwrap_or_default()
    }
}

/// What a lease is to say.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms<'a> {
    pub(super) role: Role,
    pub(super) name: &'a RecordName,
    pub(super) holder: InstanceId,
    pub(super) stamp: Stamp,
    pub(super) ttl: Duration,
}

impl Terms<'_> {
    /// Under which name the lease is kept.
    pub(super) fn object_name(&self) -> String {
        object_name(self.role, self.name, self.who())
    }

    fn who(&self) -> Option<InstanceId> {
        (self.role == Role::Reader).then_some(self.holder)
    }

    /// A new lease. The server ignores writes that change nothing, and would not note their time, so no two
    /// renewals carry the same `renewTime`.
    pub(super) fn lease(&self, now: ServerTime) -> Lease {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let micros = NEXT.fetch_add(1, Ordering::Relaxed) % 1_000_000;
        let nanos = i32::try_from(micros * 1000).unwrap_or(0);
        let renew_time = Timestamp::new(now.0, nanos).ok().map(MicroTime);
        let notes = [
            (NAME, self.name.to_string()),
            (FENCE, self.stamp.fence.to_string()),
            (VERSION, self.stamp.version.to_string()),
            (TTL_MS, self.ttl.as_millis().to_string()),
        ];
        let mut metadata = metadata(self.role, self.name, self.who());
        metadata.annotations =
            Some(notes.map(|(key, value)| (key.to_owned(), value)).into_iter().collect::<BTreeMap<_, _>>());
        let seconds = i32::try_from(self.ttl.as_millis().div_ceil(1000)).unwrap_or(i32::MAX);
        let spec = LeaseSpec {
            holder_identity: Some(self.holder.to_string()),
            lease_duration_seconds: Some(seconds),
            renew_time,
            ..LeaseSpec::default()
        };
        Lease { metadata, spec: Some(spec) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ManagedFieldsEntry, Time};

    fn grant(renewed_at: i64) -> Grant {
        let name = RecordName::parse("a/b/c").unwrap();
        let terms = Terms {
            role: Role::Owner,
            name: &name,
            holder: InstanceId::new(7).unwrap(),
            stamp: Stamp::new(Fence(u64::MAX), Version(0)),
            ttl: Duration::from_millis(9500),
        };
        let mut object = terms.lease(ServerTime(0));
        let entry = |manager: &str, at| ManagedFieldsEntry {
            manager: Some(manager.into()),
            time: Some(Time(Timestamp::from_second(at).unwrap())),
            ..ManagedFieldsEntry::default()
        };
        // Somebody else wrote a label later; that is no sign of life of the owner.
        object.metadata.managed_fields = Some(vec![entry(MANAGER, renewed_at), entry("kubectl", 1 << 20)]);
        Grant::read(object).unwrap()
    }

    #[test]
    fn ages_are_known_to_within_a_second_and_doubt_helps_nobody() {
        let grant = grant(100);
        assert_eq!(grant.stamp.fence, Fence(u64::MAX));
        let at =
            |seconds| (grant.remaining(ServerTime(seconds)).as_millis(), grant.is_over(ServerTime(seconds)));
        assert_eq!(at(90), (8500, false), "a server whose clock went back");
        assert_eq!(at(100), (8500, false));
        assert_eq!(at(108), (500, false));
        assert_eq!(at(109), (0, false));
        assert_eq!(at(110), (0, false), "neither usable nor over");
        assert_eq!(at(111), (0, true));
    }

    #[test]
    fn no_two_renewals_are_the_same_object() {
        let (name, grant) = (RecordName::parse("a/b/c").unwrap(), grant(100));
        let (role, holder, stamp, ttl) = (Role::Owner, grant.holder, grant.stamp, grant.ttl);
        let terms = Terms { role, name: &name, holder, stamp, ttl };
        let now = ServerTime(5);
        assert_ne!(grant.renewed(&terms, now).spec, grant.renewed(&terms, now).spec);
    }

    #[test]
    fn labels_and_names_are_what_kubernetes_takes() {
        let name = RecordName::parse(&format!("{0}/_{1}/x-", "A".repeat(63), "b".repeat(60))).unwrap();
        for role in [Role::Row, Role::Cell, Role::Owner, Role::Reader] {
            let metadata = metadata(role, &name, InstanceId::new(1));
            let object = metadata.name.unwrap();
            assert!(
                object.len() <= 63
                    && object.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
            );
            for value in metadata.labels.unwrap().values() {
                assert!(value.len() <= 63 && value.chars().all(|c| c.is_ascii_alphanumeric()), "{value}");
            }
        }
        let under = |prefix: &str| selector(&Prefix::parse(prefix).unwrap(), None);
        assert_eq!(under(""), "");
        let labels = metadata(Role::Row, &name, None).labels.unwrap();
        for (prefix, key) in [(name.parts().0.to_owned(), CLUSTER), (name.to_string(), OF)] {
            assert_eq!(under(&prefix), format!("{key}={}", labels[key]));
        }
    }
}
