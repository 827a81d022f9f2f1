//! The resource that Kubernetes keeps, field by field.
//!
//! An API server drops every field that its schema does not list, without a word. So each structure of a
//! record has a mirror here, from which the schema is made; and each mirror names all fields of what it
//! mirrors, or does not compile. JSON cannot carry all numbers and no bytes: numbers of 64 bits are decimal
//! strings ([`Dec`]), bytes are base64 ([`Base64`]).

use std::borrow::Cow;

use k8s_openapi::ByteString;
use kube::CustomResource;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::{Corruption, Result, StoreError};
use crate::ids::{BufferId, InstanceId, Version};
use crate::record::{
    self, Access, Buffer, Device, EpIbgda, Identity, Manifest, Nixl, NixlReach, PeerRecord, PortAddress,
    RingGeometry, SourceIdentity, Tcp, TransferEngine, Transport, Way,
};
use crate::wire::UnknownFields;

pub(super) const CORRUPT: StoreError = StoreError::Corrupt(Corruption::Row);

/// A number of 64 bits, as a decimal string.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Dec(pub u64);

impl Serialize for Dec {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Dec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map(Self).map_err(|_| serde::de::Error::custom("not a decimal number of 64 bits"))
    }
}

impl JsonSchema for Dec {
    fn schema_name() -> Cow<'static, str> {
        "Dec".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "pattern": "^[0-9]{1,20}$"})
    }

    fn inline_schema() -> bool {
        true
    }
}

/// Bytes, as base64.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Base64(pub Vec<u8>);

impl Serialize for Base64 {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        ByteString(self.0.clone()).serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        ByteString::deserialize(deserializer).map(|bytes| Self(bytes.0))
    }
}

impl JsonSchema for Base64 {
    fn schema_name() -> Cow<'static, str> {
        "Base64".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({"type": "string", "format": "byte"})
    }

    fn inline_schema() -> bool {
        true
    }
}

/// What stands for a value of a record in the resource.
pub(super) trait Mirror<T>: Sized {
    /// The value as the resource shows it.
    fn show(value: &T) -> Self;

    /// The value that is shown.
    fn read(self) -> Result<T>;
}

macro_rules! copied {
    ($($shown:ty),*) => {$(
        impl Mirror<$shown> for $shown {
            fn show(value: &$shown) -> Self {
                value.to_owned()
            }

            fn read(self) -> Result<$shown> {
                Ok(self)
            }
        }
    )*};
}
copied!(String, u32, u16, u8);

macro_rules! converted {
    ($($value:ty as $shown:ty: $show:expr, $read:expr;)*) => {$(
        impl Mirror<$value> for $shown {
            fn show(value: &$value) -> Self {
                let show: fn(&$value) -> $shown = $show;
                show(value)
            }

            fn read(self) -> Result<$value> {
                let read: fn($shown) -> Result<$value> = $read;
                read(self)
            }
        }
    )*};
}

converted! {
    u64 as Dec: |value| Dec(*value), |shown| Ok(shown.0);
    BufferId as Dec: |value| Dec(value.0), |shown| Ok(BufferId(shown.0));
    Version as Dec: |value| Dec(value.0), |shown| Ok(Version(shown.0));
    Access as u32: |value| value.0, |shown| Ok(Access(shown));
    record::RecordState as u32: |value| value.code(), |shown| Ok(record::RecordState::from_code(shown));
    record::LinkLayer as u32: |value| value.code(), |shown| Ok(record::LinkLayer::from_code(shown));
    record::BufferKind as u32: |value| value.code(), |shown| Ok(record::BufferKind::from_code(shown));
    record::BufferState as u32: |value| value.code(), |shown| Ok(record::BufferState::from_code(shown));
    Vec<u8> as Base64: |value| Base64(value.clone()), |shown| Ok(shown.0);
    [u8; 16] as Base64: |value| Base64(value.to_vec()), |shown| shown.0.try_into().map_err(|_| CORRUPT);
    UnknownFields as Base64: |value| Base64(value.as_bytes().to_vec()),
        |shown| UnknownFields::from_bytes(shown.0).map_err(Into::into);
    [String; 6] as Vec<String>: |value| value.to_vec(), |shown| shown.try_into().map_err(|_| CORRUPT);
    (String, String) as ExtraSpec:
        |(key, value)| ExtraSpec { key: key.clone(), value: value.clone() },
        |shown| Ok((shown.key, shown.value));
    Identity as InstanceSpec: show_identity, read_identity;
    PortAddress as PortSpec: show_port, read_port;
    NixlReach as ReachSpec: show_reach, read_reach;
    Way as WaySpec: show_way, read_way;
}

impl<T, M: Mirror<T>> Mirror<Option<T>> for Option<M> {
    fn show(value: &Option<T>) -> Self {
        value.as_ref().map(M::show)
    }

    fn read(self) -> Result<Option<T>> {
        self.map(M::read).transpose()
    }
}

/// Lists, element by element; bytes are not a list here, see [`Base64`].
impl<T: NotAByte, M: Mirror<T>> Mirror<Vec<T>> for Vec<M> {
    fn show(value: &Vec<T>) -> Self {
        value.iter().map(M::show).collect()
    }

    fn read(self) -> Result<Vec<T>> {
        self.into_iter().map(M::read).collect()
    }
}

/// What lists of a record are made of.
pub(super) trait NotAByte {}
impl NotAByte for u32 {}
impl NotAByte for (String, String) {}
impl NotAByte for Device {}
impl NotAByte for Transport {}
impl NotAByte for Buffer {}
impl NotAByte for Manifest {}

/// A structure with the fields of another, each mirrored. Reading names them all: one that is forgotten
/// here does not compile.
macro_rules! mirrored {
    ($($(#[$doc:meta])* $name:ident of $of:ident { $($(#[$fdoc:meta])* $field:ident: $shown:ty,)* })*) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name { $($(#[$fdoc])* pub $field: $shown,)* }

        impl Mirror<$of> for $name {
            fn show(value: &$of) -> Self {
                Self { $($field: Mirror::show(&value.$field),)* }
            }

            fn read(self) -> Result<$of> {
                Ok($of { $($field: self.$field.read()?,)* })
            }
        }
    )*};
}

mirrored! {
    /// What a peer publishes about itself.
    RecordSpec of PeerRecord {
        /// The writer's schema.
        schema: u32,
        /// The oldest reader that understands the record; 0: any.
        readable_from: u32,
        /// First part of the name.
        cluster: String,
        /// Second part of the name.
        group: String,
        /// Third part of the name.
        name: String,
        /// Which process; none for a legacy peer.
        identity: InstanceSpec,
        /// 1 joining, 2 ready, 3 draining, 4 left.
        state: u32,
        /// The peer's rank.
        rank: Option<u32>,
        /// How many peers there are, as far as this one knows.
        world_hint: u32,
        /// What the weights are.
        source: Option<SourceSpec>,
        /// Network devices.
        devices: Vec<DeviceSpec>,
        /// Ways to reach the peer.
        transports: Vec<TransportSpec>,
        /// Registered memory.
        buffers: Vec<BufferSpec>,
        /// What is too large for a record, by digest.
        manifests: Vec<ManifestSpec>,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// What the weights are.
    SourceSpec of SourceIdentity {
        /// Version of the program that wrote this.
        producer_version: String,
        /// Kind of source.
        source_type: u32,
        /// The model.
        model: String,
        /// The framework.
        framework: u32,
        /// Tensor-parallel size.
        tensor_parallel: u32,
        /// Pipeline-parallel size.
        pipeline_parallel: u32,
        /// Expert-parallel size.
        expert_parallel: u32,
        /// Element type.
        dtype: String,
        /// Quantisation.
        quantization: String,
        /// Further parameters, in order.
        extra: Vec<ExtraSpec>,
        /// The model's revision.
        revision: String,
        /// Versions that must agree, in the order of the protobuf fields.
        compatibility: Vec<String>,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// A network device.
    DeviceSpec of Device {
        /// Its name.
        name: String,
        /// 1 InfiniBand, 2 Ethernet.
        link_layer: u32,
        /// Local id.
        lid: u16,
        /// Global id, 16 bytes.
        gid: Base64,
        /// Endpoint id.
        eid: Base64,
        /// The port.
        port: u8,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// One way to reach the peer.
    TransportSpec of Transport {
        /// Which way.
        way: WaySpec,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// Queue pairs of GPU-initiated exchange.
    EpIbgdaSpec of EpIbgda {
        /// Remote address.
        raddr: Dec,
        /// Remote key.
        rkey: u32,
        /// Queue-pair numbers, one per peer slot.
        qpns: Vec<u32>,
        /// Where the port is.
        port: Option<PortSpec>,
        /// Handle of memory that processes of one host share.
        ipc_handle: Option<Base64>,
        /// The ring's shape.
        ring: RingSpec,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// The shape of a ring.
    RingSpec of RingGeometry {
        /// Slots.
        slots: u32,
        /// Entries per slot.
        depth: u32,
        /// Bytes per slot.
        slot_bytes: Dec,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// A transfer engine.
    TransferEngineSpec of TransferEngine {
        /// ip:port of the session.
        session: String,
        /// Host of the data plane.
        host: String,
        /// Port of the data plane.
        data_port: u16,
        /// Version of its protocol.
        protocol_version: u32,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// Plain TCP.
    TcpSpec of Tcp {
        /// Host.
        host: String,
        /// Port.
        port: u16,
        /// Version of its protocol.
        protocol_version: u32,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// A NIXL agent.
    NixlSpec of Nixl {
        /// The agent's name.
        agent: String,
        /// How to reach it.
        reach: Option<ReachSpec>,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// Registered memory.
    BufferSpec of Buffer {
        /// Its identity.
        buffer_id: Dec,
        /// First address.
        addr: Dec,
        /// Bytes.
        len: Dec,
        /// Where it lies.
        location: String,
        /// 1 kv, 2 weights, 3 ep, 4 scratch.
        kind: u32,
        /// Rights, as bits: 1 read, 2 write, 4 atomic.
        access: u32,
        /// 1 registering, 2 ready, 3 draining, 4 retired, 5 freed.
        state: u32,
        /// One key per device.
        keys: Vec<u32>,
        /// The version that brought it.
        since_version: Dec,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
    /// A list behind a digest.
    ManifestSpec of Manifest {
        /// Of what.
        kind: String,
        /// Its digest.
        digest: Base64,
        /// Entries.
        count: Dec,
        /// Bytes.
        bytes: Dec,
        /// Where to get it.
        endpoint: String,
        /// Fields of newer writers, as protobuf.
        unknown: Base64,
    }
}

/// A parameter and its value.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ExtraSpec {
    /// The parameter.
    pub key: String,
    /// Its value.
    pub value: String,
}

/// Which process.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct InstanceSpec {
    /// 16 bytes; none for a legacy peer.
    pub instance_id: Option<Base64>,
}

/// Where a port is: one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct PortSpec {
    /// Local id.
    pub lid: Option<u16>,
    /// Global id, 16 bytes.
    pub gid: Option<Base64>,
}

/// How to reach an agent: one of the two.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct ReachSpec {
    /// The agent's own metadata.
    pub blob: Option<Base64>,
    /// Where to ask for it.
    pub endpoint: Option<String>,
}

/// A tagged transport: the tag, and the one member that belongs to it.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct WaySpec {
    /// The tag. It decides which member counts.
    pub kind: String,
    /// Queue pairs of GPU-initiated exchange.
    pub ep_ibgda: Option<EpIbgdaSpec>,
    /// A transfer engine.
    pub transfer_engine: Option<TransferEngineSpec>,
    /// Plain TCP.
    pub tcp: Option<TcpSpec>,
    /// A NIXL agent.
    pub nixl: Option<NixlSpec>,
    /// What a tag that is not listed here came with, verbatim.
    pub raw: Option<Base64>,
}

fn show_identity(identity: &Identity) -> InstanceSpec {
    let instance_id = match identity {
        Identity::Instance(id) => Some(Base64(id.to_bytes().to_vec())),
        Identity::Legacy => None,
    };
    InstanceSpec { instance_id }
}

fn read_identity(shown: InstanceSpec) -> Result<Identity> {
    let Some(bytes) = shown.instance_id else { return Ok(Identity::Legacy) };
    instance(bytes).map(Identity::Instance)
}

/// The process that these bytes name.
pub(super) fn instance(bytes: Base64) -> Result<InstanceId> {
    let bytes = bytes.0.try_into().map_err(|_| CORRUPT)?;
    InstanceId::from_bytes(bytes).ok_or(CORRUPT)
}

fn show_port(port: &PortAddress) -> PortSpec {
    match port {
        PortAddress::Lid(lid) => PortSpec { lid: Some(*lid), gid: None },
        PortAddress::Gid(gid) => PortSpec { lid: None, gid: Some(Base64(gid.to_vec())) },
    }
}

fn read_port(shown: PortSpec) -> Result<PortAddress> {
    match (shown.lid, shown.gid) {
        (Some(lid), None) => Ok(PortAddress::Lid(lid)),
        (None, Some(gid)) => Ok(PortAddress::Gid(gid.read()?)),
        _ => Err(CORRUPT),
    }
}

fn show_reach(reach: &NixlReach) -> ReachSpec {
    match reach {
        NixlReach::Blob(blob) => ReachSpec { blob: Some(Base64(blob.clone())), endpoint: None },
        NixlReach::Endpoint(endpoint) => ReachSpec { blob: None, endpoint: Some(endpoint.clone()) },
    }
}

fn read_reach(shown: ReachSpec) -> Result<NixlReach> {
    match (shown.blob, shown.endpoint) {
        (Some(blob), None) => Ok(NixlReach::Blob(blob.0)),
        (None, Some(endpoint)) => Ok(NixlReach::Endpoint(endpoint)),
        _ => Err(CORRUPT),
    }
}

fn show_way(way: &Way) -> WaySpec {
    let mut shown = WaySpec { kind: way.kind().to_owned(), ..WaySpec::default() };
    match way {
        Way::EpIbgda(body) => shown.ep_ibgda = Some(Mirror::show(body)),
        Way::TransferEngine(body) => shown.transfer_engine = Some(Mirror::show(body)),
        Way::Tcp(body) => shown.tcp = Some(Mirror::show(body)),
        Way::Nixl(body) => shown.nixl = Some(Mirror::show(body)),
        Way::Unknown { raw, .. } => shown.raw = Some(Base64(raw.clone())),
    }
    shown
}

fn read_way(shown: WaySpec) -> Result<Way> {
    let way = match shown {
        WaySpec { ep_ibgda: Some(body), .. } => Way::EpIbgda(body.read()?),
        WaySpec { transfer_engine: Some(body), .. } => Way::TransferEngine(body.read()?),
        WaySpec { tcp: Some(body), .. } => Way::Tcp(body.read()?),
        WaySpec { nixl: Some(body), .. } => Way::Nixl(body.read()?),
        WaySpec { kind, raw, .. } => return read_unknown(kind, raw),
    };
    // The tag decides; a member that belongs to another tag is damage, not a hint.
    if way.kind() == shown.kind { Ok(way) } else { Err(CORRUPT) }
}

fn read_unknown(kind: String, raw: Option<Base64>) -> Result<Way> {
    let way = Way::Unknown { kind, raw: raw.ok_or(CORRUPT)?.0 };
    // One of our own tags without its member is damage, too.
    if ["ep-ibgda", "transfer-engine", "tcp", "nixl"].contains(&way.kind()) { Err(CORRUPT) } else { Ok(way) }
}

/// Whether a name is owned, and by whose fault not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub enum Life {
    /// Somebody owns it; whether that process is alive, its lease says.
    #[default]
    Held,
    /// The owner's lease ran out, and somebody noticed.
    Expired,
    /// The owner gave it back.
    Released,
}

/// A name, its owner, and what the owner published.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct RowSpec {
    /// Under which fence.
    pub fence: Dec,
    /// Which version; 0: claimed, nothing published yet.
    pub version: Dec,
    /// Who owns it: 16 bytes.
    pub instance: Base64,
    /// Whether it is owned.
    pub life: Life,
    /// What was published.
    pub record: Option<RecordSpec>,
}

/// A value that a group shares.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default)]
pub struct CellSpec {
    /// From 1.
    pub version: Dec,
    /// Opaque.
    pub value: Base64,
}

/// A row of the store, or a cell: one of the two.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "ibex.dev",
    version = "v1alpha1",
    kind = "IbexEntry",
    plural = "ibexentries",
    namespaced,
    doc = "What Ibex keeps under one name."
)]
#[serde(default)]
pub struct EntrySpec {
    /// cluster/group/name.
    pub name: String,
    /// A record and who owns it.
    pub row: Option<RowSpec>,
    /// A shared value.
    pub cell: Option<CellSpec>,
}
