//! Records that have gone wrong elsewhere: every variant, extremes, and what older writers left.

use super::instance;
use crate::ids::{BufferId, Version};
use crate::name::RecordName;
use crate::record::{
    Access, Buffer, BufferKind, BufferState, Device, EpIbgda, Identity, LinkLayer, Manifest, Nixl, NixlReach,
    PeerRecord, PortAddress, RecordState, RingGeometry, SourceIdentity, Tcp, TransferEngine, Transport, Way,
};
use crate::store::Hold;

/// A record under the name and for the instance of a hold.
#[must_use]
pub fn for_owner(record: PeerRecord, hold: &Hold) -> PeerRecord {
    let (cluster, group, name) = hold.name.parts();
    PeerRecord {
        cluster: cluster.into(),
        group: group.into(),
        name: name.into(),
        identity: Identity::Instance(hold.instance),
        ..record
    }
}

fn base() -> PeerRecord {
    let name = RecordName::parse("cluster/group/name").expect("a good name");
    PeerRecord::empty(&name, Identity::Instance(instance(1)))
}

fn with(ways: Vec<Way>) -> PeerRecord {
    PeerRecord { transports: ways.into_iter().map(Into::into).collect(), ..base() }
}

/// One record per variant and extreme, with a name that says which.
#[must_use]
pub fn every_variant() -> Vec<(&'static str, PeerRecord)> {
    let ib = EpIbgda {
        raddr: u64::MAX,
        rkey: u32::MAX,
        qpns: vec![0, 1, 0x00ff_ffff],
        port: Some(PortAddress::Lid(0)),
        ipc_handle: Some(vec![]),
        ring: RingGeometry { slots: 2, depth: 128, slot_bytes: u64::MAX, ..RingGeometry::default() },
        ..EpIbgda::default()
    };
    let roce =
        EpIbgda { port: Some(PortAddress::Gid([0; 16])), qpns: vec![], ipc_handle: None, ..ib.clone() };
    let engine = TransferEngine {
        session: "10.0.0.1:17000".into(),
        host: "10.0.0.1".into(),
        data_port: u16::MAX,
        protocol_version: 2,
        ..TransferEngine::default()
    };
    let nixl = |reach| Way::Nixl(Nixl { agent: "agent".into(), reach, ..Nixl::default() });
    let unknown = Way::Unknown { kind: "quantum".into(), raw: vec![0xff, 0, 0x80] };
    vec![
        ("nothing", base()),
        ("ep-ib", with(vec![Way::EpIbgda(ib)])),
        ("ep-roce", with(vec![Way::EpIbgda(roce)])),
        ("engine", with(vec![Way::TransferEngine(engine)])),
        (
            "tcp",
            with(vec![Way::Tcp(Tcp { host: "h".into(), port: 1, protocol_version: 2, ..Tcp::default() })]),
        ),
        ("nixl-empty-blob", with(vec![nixl(Some(NixlReach::Blob(vec![])))])),
        ("nixl-blob", with(vec![nixl(Some(NixlReach::Blob((0..=255).collect())))])),
        ("nixl-empty-endpoint", with(vec![nixl(Some(NixlReach::Endpoint(String::new())))])),
        ("nixl-nothing", with(vec![nixl(None)])),
        ("unknown-kind", with(vec![unknown.clone()])),
        ("unknown-empty", with(vec![Way::Unknown { kind: "x".into(), raw: vec![] }])),
        ("several", with(vec![nixl(None), unknown.clone(), unknown, nixl(None)])),
        ("extremes", extremes()),
        ("newer", newer()),
    ]
}

fn extremes() -> PeerRecord {
    let device = |port| Device {
        name: "mlx5_0".into(),
        link_layer: LinkLayer::Ethernet,
        lid: u16::MAX,
        gid: [0xff; 16],
        eid: vec![0],
        port,
        ..Device::default()
    };
    let buffer = |id, addr, len, keys| Buffer {
        buffer_id: BufferId(id),
        addr,
        len,
        location: "cuda:0".into(),
        kind: BufferKind::Kv,
        access: Access(u32::MAX),
        state: BufferState::Ready,
        keys,
        since_version: Version(u64::MAX),
        ..Buffer::default()
    };
    PeerRecord {
        readable_from: 2,
        state: RecordState::Draining,
        rank: Some(0),
        world_hint: u32::MAX,
        source: Some(SourceIdentity {
            producer_version: "0.3.0".into(),
            source_type: 1,
            model: "Modell-Ü".into(),
            framework: 2,
            tensor_parallel: u32::MAX,
            pipeline_parallel: 3,
            expert_parallel: 4,
            dtype: "bfloat16".into(),
            quantization: "fp8".into(),
            extra: vec![(String::new(), String::new()), ("k".into(), "v".into())],
            revision: "main".into(),
            compatibility: ["1", "2", "3", "4", "5", "6"].map(Into::into),
            ..SourceIdentity::default()
        }),
        devices: vec![device(0), device(u8::MAX)],
        buffers: vec![
            buffer(u64::MAX, u64::MAX, 1, vec![0, u32::MAX]),
            buffer(0, 0, 1 << 40, vec![]),
            buffer(1 << 53 | 1, 1 << 53 | 1, (1 << 53) + 1, vec![1, 2]),
        ],
        manifests: vec![Manifest {
            kind: "experts".into(),
            digest: vec![0; 32],
            count: u64::MAX,
            bytes: u64::MAX,
            endpoint: "10.0.0.1:17001".into(),
            ..Manifest::default()
        }],
        ..base()
    }
}

/// What a newer writer publishes: states, fields and tags that this build does not know, at every level.
fn newer() -> PeerRecord {
    let unknown = [0xfa, 0x3f, 3, 1, 2, 3];
    let nested = |number: u8, body: &[u8]| {
        let body = [body, &unknown].concat();
        // CAST: a handful of bytes.
        [&[number << 3 | 2, body.len() as u8], body.as_slice()].concat()
    };
    // CAST: short texts and short bodies.
    let tagged = |kind: &str, body: &[u8]| {
        [&[0x0a, kind.len() as u8], kind.as_bytes(), &[0x12, body.len() as u8], body].concat()
    };
    // A LID, and a ring.
    let ep = [&[0x20, 1, 0x3a, unknown.len() as u8], unknown.as_slice(), &unknown].concat();
    let mut bytes = base().encode().expect("a good record");
    for part in [
        nested(10, b"\x1a\x01m"),
        nested(11, b"\x0a\x01d\x10\x63"),
        nested(12, &tagged("ep-ibgda", &ep)),
        nested(12, &tagged("transfer-engine", &unknown)),
        nested(12, &tagged("tcp", &unknown)),
        nested(12, &tagged("nixl", &unknown)),
        nested(13, b"\x08\x09\x18\x01\x28\x63\x38\x63"),
        nested(14, b"\x0a\x01k"),
        unknown.to_vec(),
    ] {
        bytes.extend(part);
    }
    let record = PeerRecord::decode(&bytes).expect("newer records decode");
    let kept = |transport: &Transport| !transport.unknown.is_empty();
    assert!(record.transports.iter().all(kept) && !record.unknown.is_empty());
    record
}

/// Records of schema 1, byte by byte as their writers left them.
#[must_use]
pub fn legacy() -> Vec<(&'static str, Vec<u8>)> {
    // schema = 1, cluster, group, name, state = ready.
    let head: &[u8] = b"\x08\x01\x1a\x07cluster\x22\x05group\x2a\x04name\x38\x02";
    // backend, host "10.0.0.2", port 7000.
    let reach =
        |backend: u8| [&[0xa0, 1, backend], b"\xaa\x01\x0810.0.0.2\xb0\x01\xd8\x36".as_slice()].concat();
    // Two ranges: [4096, +4096) and [2^40, +2^40).
    let ranges: &[u8] = b"\xc2\x01\x06\x08\x80\x20\x10\x80\x20\
                          \xc2\x01\x0e\x08\x80\x80\x80\x80\x80\x20\x10\x80\x80\x80\x80\x80\x20";
    // Agent "agent" and an empty blob.
    let nixl: &[u8] = b"\xa0\x01\x03\xaa\x01\x05agent\xba\x01\x00";
    vec![
        ("tcp", [head, &reach(1), ranges].concat()),
        ("engine", [head, &reach(2), ranges].concat()),
        ("nixl", [head, nixl].concat()),
        ("unknown", [head, &reach(77)].concat()),
        ("bare", head.to_vec()),
    ]
}
