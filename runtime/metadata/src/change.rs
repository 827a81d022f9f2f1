//! What a new snapshot means for everything that was derived from the old one.
//!
//! Pure. The runtime holds queue pairs, keys and handles that stem from a peer's record; this says which
//! of them a change retires, and, as important, which it must not touch.

use sha2::{Digest, Sha256};

use crate::ids::Stamp;
use crate::record::{Identity, PeerRecord, Transport};
use crate::store::Snapshot;
use crate::wire::{self, Writer};

/// A short digest of one section of a record: equal sections, equal fingerprints.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Fingerprint(pub u64);

/// The fingerprints of a record's sections.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Fingerprints {
    /// Devices and transports: what endpoints and queue pairs are made from.
    pub paths: Fingerprint,
    /// Buffers: what rkeys are taken from.
    pub buffers: Fingerprint,
    /// Everything, for "is it the same content?".
    pub whole: Fingerprint,
}

impl Fingerprints {
    /// The fingerprints of a record.
    #[must_use]
    pub fn of(record: &PeerRecord) -> Self {
        let paths = |out: &mut Writer| {
            out.messages(11, &record.devices);
            record.write_transports(out);
        };
        Self {
            paths: digest(paths),
            buffers: digest(|out| out.messages(13, &record.buffers)),
            whole: Fingerprint(short(&wire::encode(record))),
        }
    }
}

fn digest(write: impl FnOnce(&mut Writer)) -> Fingerprint {
    let mut out = Writer::default();
    write(&mut out);
    Fingerprint(short(&out.finish()))
}

fn short(bytes: &[u8]) -> u64 {
    let digest = Sha256::digest(bytes);
    u64::from_be_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|i| digest[i]))
}

/// What derived state remembers of the snapshot it stems from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Origin {
    /// Which process.
    pub identity: Identity,
    /// Which snapshot.
    pub stamp: Stamp,
    /// Its sections.
    pub fingerprints: Fingerprints,
}

impl From<&Snapshot> for Origin {
    fn from(snapshot: &Snapshot) -> Self {
        Self {
            identity: snapshot.identity,
            stamp: snapshot.stamp,
            fingerprints: Fingerprints::of(&snapshot.record),
        }
    }
}

/// What is to be done about derived state when another snapshot is seen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Verdict {
    /// The same content under the same stamp: nothing.
    Same,
    /// Older than what is known: ignored, and counted as a stale snapshot.
    Stale,
    /// The same stamp with other content: refused, and an alarm. Two publishers believe they own the name.
    ConcurrentPublisher,
    /// Another process: everything is retired.
    Replaced,
    /// The same process published something new.
    Updated {
        /// Endpoints on the changed paths are retired.
        paths: bool,
        /// Cached rkeys are dropped; queue pairs are kept.
        buffers: bool,
    },
}

/// Compares what is known with what was seen. Identity decides, never addresses or keys, which a
/// replacement may well share with the dead process.
#[must_use]
pub fn judge(known: &Origin, seen: &Origin) -> Verdict {
    if seen.stamp < known.stamp {
        return Verdict::Stale;
    }
    let same_owner = seen.identity == known.identity && seen.stamp.fence == known.stamp.fence;
    if seen.stamp == known.stamp {
        let same_content = seen.fingerprints == known.fingerprints && same_owner;
        return if same_content { Verdict::Same } else { Verdict::ConcurrentPublisher };
    }
    if !same_owner {
        return Verdict::Replaced;
    }
    Verdict::Updated {
        paths: seen.fingerprints.paths != known.fingerprints.paths,
        buffers: seen.fingerprints.buffers != known.fingerprints.buffers,
    }
}

/// The transports of `before` that `after` does not offer unchanged: whatever was made over them is
/// retired. All of them if the devices changed, since transports run over devices.
#[must_use]
pub fn retired_transports<'a>(before: &'a PeerRecord, after: &PeerRecord) -> Vec<&'a Transport> {
    let kept =
        |transport: &&Transport| before.devices == after.devices && after.transports.contains(transport);
    before.transports.iter().filter(|transport| !kept(transport)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{BufferId, Fence, InstanceId, Version};
    use crate::name::RecordName;
    use crate::record::{Buffer, Device, Tcp, Way};

    fn record() -> PeerRecord {
        let name = RecordName::parse("a/b/c").unwrap();
        let tcp = |port| Way::Tcp(Tcp { host: "h".into(), port, ..Tcp::default() });
        PeerRecord {
            transports: vec![tcp(1).into(), tcp(2).into()],
            devices: vec![Device::default()],
            buffers: vec![Buffer { len: 8, ..Buffer::default() }],
            ..PeerRecord::empty(&name, Identity::Legacy)
        }
    }

    fn origin(instance: u128, fence: u64, version: u64, record: &PeerRecord) -> Origin {
        Origin {
            identity: InstanceId::new(instance).map_or(Identity::Legacy, Identity::Instance),
            stamp: Stamp::new(Fence(fence), Version(version)),
            fingerprints: Fingerprints::of(record),
        }
    }

    #[test]
    fn another_process_retires_everything_even_with_the_same_content() {
        let record = record();
        let known = origin(1, 5, 9, &record);
        assert_eq!(judge(&known, &origin(2, 6, 0, &record)), Verdict::Replaced);
        assert_eq!(judge(&known, &origin(1, 6, 0, &record)), Verdict::Replaced, "it restarted its record");
        assert_eq!(judge(&known, &origin(0, 5, 10, &record)), Verdict::Replaced, "legacy is nobody's twin");
    }

    #[test]
    fn order_comes_before_content() {
        let record = record();
        let known = origin(1, 5, 9, &record);
        assert_eq!(judge(&known, &known), Verdict::Same);
        assert_eq!(judge(&known, &origin(1, 5, 8, &record)), Verdict::Stale);
        assert_eq!(judge(&known, &origin(2, 4, u64::MAX, &record)), Verdict::Stale);
        let other = PeerRecord { rank: Some(1), ..record };
        assert_eq!(judge(&known, &origin(1, 5, 9, &other)), Verdict::ConcurrentPublisher);
    }

    #[test]
    fn only_what_changed_is_retired() {
        let before = record();
        let known = origin(1, 5, 9, &before);
        let updated = |after: &PeerRecord| judge(&known, &origin(1, 5, 10, after));
        let ranked = PeerRecord { rank: Some(1), ..before.clone() };
        assert_eq!(updated(&ranked), Verdict::Updated { paths: false, buffers: false });
        let mut moved = before.clone();
        moved.buffers[0].buffer_id = BufferId(1);
        assert_eq!(updated(&moved), Verdict::Updated { paths: false, buffers: true });
        let mut rerouted = before.clone();
        rerouted.transports[1] = Way::Tcp(Tcp { host: "g".into(), ..Tcp::default() }).into();
        assert_eq!(updated(&rerouted), Verdict::Updated { paths: true, buffers: false });
        assert_eq!(retired_transports(&before, &rerouted), [&before.transports[1]]);
        let mut rewired = before.clone();
        rewired.devices[0].lid = 3;
        assert_eq!(updated(&rewired), Verdict::Updated { paths: true, buffers: false });
        assert_eq!(retired_transports(&before, &rewired).len(), 2);
        assert_eq!(retired_transports(&before, &before.clone()), [] as [&Transport; 0]);
    }
}
