//! The encoding of records, judged by prost (which knows only the schema), by committed bytes, and by
//! arbitrary input.

#![expect(clippy::unwrap_used, reason = "a failed expectation is the message")]

use std::fmt::Write;

use ibex_metadata::contract::samples;
use ibex_metadata::error::{Bounded, Corruption, Problem, StoreError};
use ibex_metadata::fuzz;
use ibex_metadata::ids::{BufferId, InstanceId, Version};
use ibex_metadata::limits::RECORD_LEN_MAX;
use ibex_metadata::record::{
    Access, Buffer, BufferKind, BufferState, Device, EpIbgda, Identity, LinkLayer, Manifest, Nixl, NixlReach,
    PeerRecord, PortAddress, RecordState, RingGeometry, SCHEMA, SourceIdentity, Tcp, TransferEngine, Way,
};
use proptest::collection::vec;
use proptest::prelude::*;
use prost::Message;

#[rustfmt::skip]
#[expect(unreachable_pub, reason = "made from proto/record.proto")]
#[path = "generated/record.rs"]
mod schema;

const GOLDEN: &str = include_str!("golden/records.txt");

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    text.as_bytes().chunks(2).map(|p| u8::from_str_radix(str::from_utf8(p).unwrap(), 16).unwrap()).collect()
}

/// `name hex` per line, as this build encodes the samples.
fn encoded_samples() -> Vec<(String, Vec<u8>)> {
    let variants = samples::every_variant();
    let sample = |(name, record): &(&str, PeerRecord)| ((*name).to_owned(), record.encode().unwrap());
    variants.iter().map(sample).collect()
}

#[test]
fn samples_are_encoded_as_they_were_committed() {
    let lines: Vec<_> = GOLDEN.lines().filter(|line| !line.starts_with('#')).collect();
    let samples = encoded_samples();
    assert_eq!(lines.len(), samples.len());
    for (line, (name, bytes)) in lines.into_iter().zip(samples) {
        let (golden_name, golden) = line.split_once(' ').unwrap();
        assert_eq!((golden_name, golden), (name.as_str(), hex(&bytes).as_str()));
        let record = PeerRecord::decode(&unhex(golden)).unwrap();
        assert_eq!(record.encode().unwrap(), bytes, "{name}");
    }
}

#[test]
fn prost_reads_what_we_write_and_writes_what_we_write() {
    for (name, bytes) in encoded_samples() {
        let theirs = schema::PeerRecord::decode(bytes.as_slice()).unwrap();
        let ours = PeerRecord::decode(&bytes).unwrap();
        assert_eq!((theirs.schema, &theirs.name), (ours.schema, &ours.name), "{name}");
        assert_eq!(theirs.rank, ours.rank, "{name}");
        assert_eq!(theirs.buffers.len(), ours.buffers.len(), "{name}");
        for (theirs, ours) in theirs.buffers.iter().zip(&ours.buffers) {
            assert_eq!((theirs.addr, theirs.len, &theirs.keys), (ours.addr, ours.len, &ours.keys), "{name}");
        }
        for (theirs, ours) in theirs.transports.iter().zip(&ours.transports) {
            assert_eq!(theirs.kind, ours.way.kind(), "{name}");
            if let Way::EpIbgda(ours) = &ours.way {
                let theirs = schema::EpIbgda::decode(theirs.body.as_slice()).unwrap();
                assert_eq!((theirs.raddr, theirs.rkey, &theirs.qpns), (ours.raddr, ours.rkey, &ours.qpns));
                assert_eq!(theirs.ipc_handle, ours.ipc_handle);
                let lid = matches!(ours.port, Some(PortAddress::Lid(_)));
                assert_eq!((theirs.lid.is_some(), theirs.gid.is_empty()), (lid, lid));
            }
            if let Way::TransferEngine(ours) = &ours.way {
                let theirs = schema::TransferEngine::decode(theirs.body.as_slice()).unwrap();
                assert_eq!((&theirs.session, theirs.data_port), (&ours.session, ours.data_port.into()));
            }
            if let Way::Tcp(ours) = &ours.way {
                let theirs = schema::Tcp::decode(theirs.body.as_slice()).unwrap();
                assert_eq!((&theirs.host, theirs.port), (&ours.host, ours.port.into()));
            }
            if let Way::Nixl(ours) = &ours.way {
                use schema::nixl::Reach;
                let theirs = schema::Nixl::decode(theirs.body.as_slice()).unwrap();
                let reach = theirs.reach.map(|reach| match reach {
                    Reach::Blob(blob) => NixlReach::Blob(blob),
                    Reach::Endpoint(endpoint) => NixlReach::Endpoint(endpoint),
                });
                assert_eq!(reach, ours.reach, "{name}");
            }
        }
        // Prost drops what it does not know, and does not order maps: byte for byte only without those.
        if !["newer", "extremes"].contains(&name.as_str()) {
            assert_eq!(theirs.encode_to_vec(), bytes, "{name}");
        }
    }
}

#[test]
fn schema_1_is_read_into_todays_form() {
    for (name, bytes) in samples::legacy() {
        let record = PeerRecord::decode(&bytes).unwrap();
        assert_eq!((record.identity, record.schema), (Identity::Legacy, SCHEMA), "{name}");
        assert_eq!(record.state, RecordState::Ready, "{name}");
        let kinds: Vec<_> = record.transports.iter().map(|transport| transport.way.kind()).collect();
        let expected: &[&str] = match name {
            "tcp" => &["tcp"],
            "engine" => &["transfer-engine"],
            "nixl" => &["nixl"],
            "unknown" => &["schema-1-backend-77"],
            _ => &[],
        };
        assert_eq!(kinds, expected, "{name}");
        if name == "nixl" {
            let Way::Nixl(nixl) = &record.transports[0].way else { panic!("{name}") };
            assert_eq!(nixl.reach, Some(NixlReach::Blob(vec![])), "an empty blob is a blob");
        }
        let ranges: Vec<_> = record.buffers.iter().map(|buffer| (buffer.addr, buffer.len)).collect();
        let has_ranges = ["tcp", "engine"].contains(&name);
        assert_eq!(ranges, if has_ranges { vec![(4096, 4096), (1 << 40, 1 << 40)] } else { vec![] });
        assert_eq!(PeerRecord::decode(&record.encode().unwrap()).unwrap(), record, "{name}");
        // The same fields in a record that says it is of today's schema are a contradiction.
        let mut wrong = bytes.clone();
        wrong[1] = 2;
        assert_eq!(PeerRecord::decode(&wrong).is_err(), name != "bare", "{name}");
    }
}

/// Found by cargo-fuzz: a range of schema 1 with a field that today's buffers use for something else.
#[test]
fn a_field_that_schema_1_never_had_is_refused_and_not_carried_into_todays_form() {
    let range = |field: &[u8]| {
        let range = [&[0x10, 16, 0x08, 1][..], field].concat();
        let head = [0x08, 1, 0x1a, 1, b'c', 0x22, 1, b'g', 0x2a, 1, b'n', 0xc2, 0x01];
        [&head[..], &[u8::try_from(range.len()).unwrap()], &range].concat()
    };
    for (field, is_good) in [(&[][..], true), (&[0x35, 1, 1, 1, 1], false), (&[0x55, 1, 1, 1, 1], true)] {
        assert_eq!(fuzz::record(&range(field)), is_good, "{field:02x?}");
    }
}

#[test]
fn records_that_only_newer_readers_understand_are_refused() {
    let record = PeerRecord { readable_from: SCHEMA + 1, ..samples::every_variant().remove(0).1 };
    let error = PeerRecord::decode(&record.encode().unwrap()).unwrap_err();
    let StoreError::Corrupt(Corruption::Record(error)) = error else { panic!("{error}") };
    assert_eq!(error.problem, Problem::Schema { needed: 3, known: 2 });
    let newer = PeerRecord { schema: SCHEMA + 1, readable_from: SCHEMA, ..record };
    assert_eq!(PeerRecord::decode(&newer.encode().unwrap()), Ok(newer));
}

#[test]
fn oversize_input_is_refused_before_it_is_read() {
    let len = RECORD_LEN_MAX as u64 + 1;
    let error = PeerRecord::decode(&vec![0xff; RECORD_LEN_MAX + 1]).unwrap_err();
    assert_eq!(error, StoreError::TooLarge { what: Bounded::Record, len, limit: len - 1 });
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![Just(String::new()), "\\PC{0,12}"]
}

fn edge_u64() -> impl Strategy<Value = u64> {
    prop_oneof![Just(0), Just(u64::MAX), Just(1 << 53), any::<u64>()]
}

fn way() -> impl Strategy<Value = Way> {
    let port =
        prop_oneof![any::<u16>().prop_map(PortAddress::Lid), any::<[u8; 16]>().prop_map(PortAddress::Gid)];
    let blob = || vec(any::<u8>(), 0..40);
    let ring = (any::<u32>(), any::<u32>(), edge_u64()).prop_map(|(slots, depth, slot_bytes)| RingGeometry {
        slots,
        depth,
        slot_bytes,
        ..RingGeometry::default()
    });
    let ep = (edge_u64(), any::<u32>(), vec(any::<u32>(), 0..9), port, proptest::option::of(blob()), ring);
    let reach = prop_oneof![
        Just(None),
        blob().prop_map(|blob| Some(NixlReach::Blob(blob))),
        text().prop_map(|text| Some(NixlReach::Endpoint(text))),
    ];
    prop_oneof![
        ep.prop_map(|(raddr, rkey, qpns, port, ipc_handle, ring)| {
            let port = Some(port);
            Way::EpIbgda(EpIbgda { raddr, rkey, qpns, port, ipc_handle, ring, ..EpIbgda::default() })
        }),
        (text(), text(), any::<u16>(), any::<u32>()).prop_map(|(session, host, data_port, version)| {
            let protocol_version = version;
            let unknown = Default::default();
            Way::TransferEngine(TransferEngine { session, host, data_port, protocol_version, unknown })
        }),
        (text(), any::<u16>()).prop_map(|(host, port)| Way::Tcp(Tcp { host, port, ..Tcp::default() })),
        (text(), reach).prop_map(|(agent, reach)| Way::Nixl(Nixl { agent, reach, ..Nixl::default() })),
        ("[a-z]{1,9}-x", blob()).prop_map(|(kind, raw)| Way::Unknown { kind, raw }),
    ]
}

fn buffers(devices: usize) -> impl Strategy<Value = Vec<Buffer>> {
    let keys = prop_oneof![Just(vec![]), vec(any::<u32>(), devices)];
    let one = (0..1u64 << 40, 1..1u64 << 40, text(), any::<(u32, u32, u32)>(), keys, edge_u64());
    vec(one, 0..4).prop_map(|list| {
        let buffer = |(i, (addr, len, location, (kind, access, state), keys, since))| Buffer {
            buffer_id: BufferId(i),
            // Apart from one another, so that no two overlap whatever their state.
            addr: addr + (i << 50),
            len,
            location,
            kind: BufferKind::from_code(kind),
            access: Access(access),
            state: BufferState::from_code(state % 8),
            keys,
            since_version: Version(since),
            ..Buffer::default()
        };
        (0..).zip(list).map(buffer).collect()
    })
}

fn record() -> impl Strategy<Value = PeerRecord> {
    let device = (text(), any::<u32>(), any::<u16>(), any::<[u8; 16]>(), any::<u8>());
    let device = device.prop_map(|(name, layer, lid, gid, port)| Device {
        name,
        link_layer: LinkLayer::from_code(layer),
        lid,
        gid,
        port,
        ..Device::default()
    });
    let source = (text(), any::<[u32; 3]>(), vec((text(), text()), 0..3)).prop_map(|(model, n, extra)| {
        SourceIdentity {
            model,
            tensor_parallel: n[0],
            expert_parallel: n[1],
            source_type: n[2],
            extra,
            ..SourceIdentity::default()
        }
    });
    let manifest = (text(), vec(any::<u8>(), 0..33), edge_u64(), edge_u64());
    let manifest = manifest.prop_map(|(kind, digest, count, bytes)| Manifest {
        kind,
        digest,
        count,
        bytes,
        ..Manifest::default()
    });
    let lists = (vec(device, 0..3), vec(way(), 0..4), vec(manifest, 0..3));
    let head =
        (any::<u128>(), any::<u32>(), any::<Option<u32>>(), any::<u32>(), proptest::option::of(source));
    (lists, head).prop_flat_map(|((devices, ways, manifests), (id, state, rank, world, source))| {
        buffers(devices.len()).prop_map(move |buffers| PeerRecord {
            schema: SCHEMA,
            cluster: "c".into(),
            group: "g".into(),
            name: "n".into(),
            identity: InstanceId::new(id).map_or(Identity::Legacy, Identity::Instance),
            state: RecordState::from_code(state),
            rank,
            world_hint: world,
            source: source.clone(),
            devices: devices.clone(),
            transports: ways.iter().cloned().map(Into::into).collect(),
            buffers,
            manifests: manifests.clone(),
            ..PeerRecord::default()
        })
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn any_record_comes_back_identical(record in record()) {
        let bytes = record.encode().unwrap();
        prop_assert_eq!(PeerRecord::decode(&bytes).unwrap(), record);
        prop_assert!(schema::PeerRecord::decode(bytes.as_slice()).is_ok());
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in vec(any::<u8>(), 0..200)) {
        let _ = fuzz::record(&bytes);
    }

    #[test]
    fn damaged_records_never_panic_and_what_decodes_is_stable(
        record in record(),
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = record.encode().unwrap();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        for bytes in [&bytes[..], &bytes[..cut.index(bytes.len())]] {
            let _ = fuzz::record(bytes);
        }
    }

    #[test]
    fn unknown_fields_at_the_end_are_kept_byte_for_byte(number in 1000u32..(1 << 29), body in vec(any::<u8>(), 0..30)) {
        let mut bytes = samples::every_variant().remove(0).1.encode().unwrap();
        prost::encoding::bytes::encode(number, &body, &mut bytes);
        let record = PeerRecord::decode(&bytes).unwrap();
        prop_assert_eq!(record.encode().unwrap(), bytes);
    }
}
