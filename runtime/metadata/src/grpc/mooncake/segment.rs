//! A Mooncake segment as a record, and a record as a Mooncake segment.

use serde_json::{Map, Value, json};

use super::key::What;
use crate::error::{InputError, Result};
use crate::ids::BufferId;
use crate::limits::BUFFERS_MAX;
use crate::name::RecordName;
use crate::record::{
    Access, Buffer, BufferState, Identity, Manifest, PeerRecord, RecordState, TransferEngine, Transport, Way,
};
use crate::store::Snapshot;

/// The kind of transport that holds a descriptor's bytes.
const KIND: &str = "mooncake-segment";
/// The kind of manifest behind which the bytes of a large descriptor lie.
pub(super) const PARCEL: &str = "mooncake-segment";
/// Bytes of a descriptor that a record holds itself.
const INLINE_LEN_MAX: usize = 16 << 10;

/// Buffer ids per version: more than a record has buffers.
const FRESH_IDS: u64 = 1 << 16;

/// What a descriptor says that records have a field for.
#[derive(Debug)]
pub(super) struct Segment {
    engine: TransferEngine,
    /// Address, length, location.
    buffers: Vec<(u64, u64, String)>,
}

impl Segment {
    /// Reads a descriptor. Fields that are missing or unknown are the engines' affair.
    pub(super) fn parse(value: &[u8]) -> Result<Self, InputError> {
        let refusal = |limit| InputError::new("segment", &String::from_utf8_lossy(value), limit);
        let object: Map<String, Value> =
            serde_json::from_slice(value).map_err(|_| refusal("a JSON object"))?;
        let text = |key: &str| object.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        let number = |key: &str| object.get(key).and_then(Value::as_u64).unwrap_or_default();
        let session = text("name");
        let host = match text("tcp_data_host") {
            host if host.is_empty() => session.rsplit_once(':').map_or("", |(host, _)| host).to_owned(),
            host => host,
        };
        let engine = TransferEngine {
            session,
            host,
            data_port: u16::try_from(number("tcp_data_port"))
                .map_err(|_| refusal("with ports below 65536"))?,
            protocol_version: u32::try_from(number("tcp_proto_version")).unwrap_or(u32::MAX),
            ..TransferEngine::default()
        };
        let buffers = object.get("buffers").and_then(Value::as_array);
        let buffer = |buffer: &Value| {
            let location = buffer.get("name").and_then(Value::as_str).unwrap_or_default();
            Some((buffer.get("addr")?.as_u64()?, buffer.get("length")?.as_u64()?, location.to_owned()))
        };
        let buffers = buffers.into_iter().flatten().filter_map(buffer).collect();
        Ok(Self { engine, buffers })
    }

    /// What of the descriptor's bytes must lie elsewhere.
    #[expect(clippy::unused_self, reason = "a question about this segment")]
    pub(super) fn bulk<'v>(&self, value: &'v [u8]) -> &'v [u8] {
        if value.len() > INLINE_LEN_MAX { value } else { &[] }
    }

    /// The record under `name`, after the one that was there.
    pub(super) fn record(
        &self,
        name: &RecordName,
        before: Option<&Snapshot>,
        value: &[u8],
        manifest: Option<Manifest>,
    ) -> Result<PeerRecord> {
        let raw = if manifest.is_some() { Vec::new() } else { value.to_vec() };
        let kept = Way::Unknown { kind: KIND.to_owned(), raw };
        let mut record = PeerRecord {
            state: RecordState::Ready,
            transports: vec![Way::TransferEngine(self.engine.clone()).into(), kept.into()],
            manifests: manifest.into_iter().collect(),
            ..PeerRecord::empty(name, Identity::Legacy)
        };
        record.buffers = self.buffers(before);
        if record.check().is_err() {
            // Overlapping or empty ranges are legal to the engines and not to a record: they stay in the
            // descriptor alone.
            record.buffers.clear();
        }
        Ok(record)
    }

    /// The buffers, each under the id that it had: an id names a registration, not a place in the list. New
    /// ids are made from the version that will show them first, so that none is given twice.
    fn buffers(&self, before: Option<&Snapshot>) -> Vec<Buffer> {
        if self.buffers.len() > BUFFERS_MAX {
            return Vec::new();
        }
        let old = before.map_or(&[][..], |before| &before.record.buffers);
        let version = before.map_or(0, |before| before.stamp.version.0);
        let mut fresh = version.saturating_add(1).saturating_mul(FRESH_IDS);
        let same = |buffer: &&Buffer, place: &(u64, u64, String)| {
            (buffer.addr, buffer.len, &buffer.location) == (place.0, place.1, &place.2)
        };
        let buffer = |place: &(u64, u64, String)| {
            let known = old.iter().find(|buffer| same(buffer, place)).map(|buffer| buffer.buffer_id);
            let buffer_id = known.unwrap_or(BufferId(fresh));
            fresh = fresh.saturating_add(1);
            Buffer {
                buffer_id,
                addr: place.0,
                len: place.1,
                location: place.2.clone(),
                access: Access::REMOTE_READ.and(Access::REMOTE_WRITE),
                state: BufferState::Ready,
                ..Buffer::default()
            }
        };
        self.buffers.iter().map(buffer).collect()
    }
}

/// The manifest of a large descriptor.
pub(super) fn manifest(record: &PeerRecord) -> Option<&Manifest> {
    record.manifests.iter().find(|manifest| manifest.kind == PARCEL)
}

/// The bytes of a descriptor that lies in the record.
pub(super) fn inline(record: &PeerRecord) -> Option<&[u8]> {
    record.transports.iter().find_map(|transport| match &transport.way {
        Way::Unknown { kind, raw } if kind == KIND => Some(raw.as_slice()),
        _ => None,
    })
}

/// What Mooncake would have put for a record that offers a transfer engine under this session; `None` for
/// any other record, and for those that Mooncake put.
pub(super) fn synthesised(record: &PeerRecord, session: &str, what: What) -> Option<Vec<u8>> {
    if inline(record).is_some() {
        return None;
    }
    let engine = record.transports.iter().find_map(|Transport { way, .. }| match way {
        Way::TransferEngine(engine) if engine.session == session && engine.data_port != 0 => Some(engine),
        _ => None,
    })?;
    let value = match what {
        What::RpcMeta => {
            let (host, port) = session.rsplit_once(':')?;
            json!({ "ip_or_host_name": host, "rpc_port": port.parse::<u16>().ok()? })
        }
        What::Segment => {
            let ready = record.buffers.iter().filter(|buffer| buffer.state == BufferState::Ready);
            let buffer = |buffer: &Buffer| {
                let (addr, length, name) = (buffer.addr, buffer.len, &buffer.location);
                json!({ "addr": addr, "length": length, "name": name })
            };
            json!({
                "name": session,
                "protocol": "tcp",
                "rdma_server_name": "",
                "tcp_data_host": engine.host,
                "tcp_data_port": engine.data_port,
                "tcp_proto_version": engine.protocol_version,
                "timestamp": "",
                "buffers": ready.map(buffer).collect::<Vec<_>>(),
            })
        }
    };
    Some(value.to_string().into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Fence, Stamp, Version};

    const DESCRIPTOR: &str = r#"{"buffers":[{"addr":4096,"length":1099511627776,"name":"cpu:0"}],
        "name":"10.0.0.1:7000","protocol":"tcp","tcp_data_host":"","tcp_data_port":7001,
        "tcp_proto_version":2,"later":[null]}"#;

    fn record(descriptor: &str, before: Option<&Snapshot>) -> PeerRecord {
        let name = RecordName::parse("mooncake/segments/x").unwrap();
        let segment = Segment::parse(descriptor.as_bytes()).unwrap();
        segment.record(&name, before, descriptor.as_bytes(), None).unwrap()
    }

    fn snapshot(version: u64, record: PeerRecord) -> Snapshot {
        let name = record.key().unwrap();
        let stamp = Stamp::new(Fence(1), Version(version));
        Snapshot { name, stamp, identity: Identity::Legacy, record, encoded: Vec::new() }
    }

    #[test]
    fn a_descriptor_is_read_and_kept_as_it_was() {
        let record = record(DESCRIPTOR, None);
        assert_eq!(inline(&record), Some(DESCRIPTOR.as_bytes()));
        let Way::TransferEngine(engine) = &record.transports[0].way else { panic!("{record:?}") };
        assert_eq!((engine.host.as_str(), engine.data_port, engine.protocol_version), ("10.0.0.1", 7001, 2));
        assert_eq!((record.buffers[0].addr, record.buffers[0].len), (4096, 1 << 40));
        assert_eq!(synthesised(&record, "10.0.0.1:7000", What::Segment), None, "Mooncake's own");
    }

    #[test]
    fn a_buffer_keeps_its_id_and_a_new_one_takes_none_that_is_known() {
        let list = |addrs: &[u64]| {
            let buffers: Vec<_> = addrs.iter().map(|addr| json!({ "addr": addr, "length": 8 })).collect();
            json!({ "name": "a:1", "buffers": buffers }).to_string()
        };
        let ids = |record: &PeerRecord| -> Vec<_> {
            record.buffers.iter().map(|buffer| buffer.buffer_id.0 - FRESH_IDS).collect()
        };
        let first = record(&list(&[0, 64]), None);
        assert_eq!(ids(&first), [0, 1]);
        let none = record(&list(&[]), Some(&snapshot(1, first.clone())));
        let second = record(&list(&[64, 128]), Some(&snapshot(1, first)));
        assert_eq!(ids(&second), [1, FRESH_IDS + 1], "one was there, one is new");
        let third = record(&list(&[0]), Some(&snapshot(2, none)));
        assert_eq!(ids(&third), [2 * FRESH_IDS], "registered again: another buffer");
        assert!(record(&list(&[0, 4]), None).buffers.is_empty(), "ranges that a record refuses");
    }

    #[test]
    fn what_is_no_descriptor_is_refused() {
        for bad in ["", "[]", "17", "{", "{\"tcp_data_port\":65536}"] {
            assert_eq!(Segment::parse(bad.as_bytes()).unwrap_err().field, "segment", "{bad}");
        }
    }
}
