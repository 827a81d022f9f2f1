"""ModelExpress's own client against our server: workers.py HOST:PORT. Exits with 3 where the client is
missing; a failed assertion is the message."""

import importlib.util
import sys
import types

spec = importlib.util.find_spec("modelexpress")
if spec is None or importlib.util.find_spec("grpc") is None:
    sys.exit(3)
# The package's __init__ imports torch for what moves weights; the client itself needs none of it.
package = types.ModuleType("modelexpress")
package.__path__ = list(spec.submodule_search_locations)
sys.modules["modelexpress"] = package

import grpc
from modelexpress import p2p_pb2 as pb
from modelexpress.client import MxClient
from modelexpress.metadata.source_id import compute_mx_source_id

server = sys.argv[1]
client = MxClient(server)
READY, STALE = pb.SOURCE_STATUS_READY, pb.SOURCE_STATUS_STALE
INITIALIZING = pb.SOURCE_STATUS_INITIALIZING


def identity(**more):
    return pb.SourceIdentity(
        mx_version="0.7.0",
        model_name="deepseek-ai/DeepSeek-V3",
        backend_framework=pb.BACKEND_FRAMEWORK_VLLM,
        tensor_parallel_size=8,
        expert_parallel_size=256,
        dtype="bfloat16",
        extra_parameters={"Zeta": "Ä", "alpha": "1", "training_step": "42"},
        **more,
    )


def tensors(count, size=1 << 40):
    return [
        pb.TensorDescriptor(name=f"model.layers.{i}.w", addr=i << 40, size=size, device_id=7, dtype="fp8")
        for i in range(count)
    ]


def same(got, sent):
    """Whether a worker came back as it was sent; status and time are the server's."""
    got, sent = pb.WorkerMetadata.FromString(got.SerializeToString()), sent
    want = pb.WorkerMetadata.FromString(sent.SerializeToString())
    got.updated_at = want.updated_at = 0
    assert got == want, f"{got} != {want}"


# Both variants, an empty NIXL blob, no variant, sizes of 2^40, lists from none to megabytes.
payload = pb.TensorSourceMetadata(tensors=tensors(3))
workers = {
    "nixl": pb.WorkerMetadata(
        worker_rank=3,
        nixl_metadata=bytes(range(256)) * 200,
        tensor_source=payload,
        status=INITIALIZING,
        metadata_endpoint="10.0.0.1:5555",
        agent_name="agent-3",
        worker_grpc_endpoint="10.0.0.1:6555",
        accelerator="cuda",
        topology={"node": "n1", "rack": "r7"},
    ),
    "empty-nixl": pb.WorkerMetadata(worker_rank=0, nixl_metadata=b"", tensors=tensors(1), status=READY),
    "engine": pb.WorkerMetadata(
        worker_rank=1, transfer_engine_session_id="10.0.0.2:12345", tensor_source=payload, status=READY
    ),
    "none": pb.WorkerMetadata(worker_rank=2, tensor_source=pb.TensorSourceMetadata(), status=READY),
    "artifact": pb.WorkerMetadata(
        artifact_source=pb.ArtifactSourceMetadata(artifact_id="ab", total_size=1 << 40, file_count=2)
    ),
    "large": pb.WorkerMetadata(
        worker_rank=4, nixl_metadata=b"\xa5" * (1 << 20), tensor_source=pb.TensorSourceMetadata(
            tensors=tensors(20_000, (1 << 64) - 1)), status=READY
    ),
}
source_id = compute_mx_source_id(identity())
for worker_id, worker in workers.items():
    assert client.publish_metadata(identity(), worker, worker_id) == source_id
for worker_id, worker in workers.items():
    reply = client.get_metadata(source_id, worker_id)
    assert reply.found and reply.mx_source_id == source_id and reply.worker_id == worker_id
    assert reply.identity == identity(), reply.identity
    assert compute_mx_source_id(reply.identity) == source_id
    same(reply.worker, worker)
    kind = reply.worker.WhichOneof("backend_metadata"), reply.worker.WhichOneof("source_payload")
    assert kind == (worker.WhichOneof("backend_metadata"), worker.WhichOneof("source_payload")), kind
assert client.get_metadata(source_id, "empty-nixl").worker.WhichOneof("backend_metadata") == "nixl_metadata"

# Other identities are other sources.
other = identity(revision="r2")
assert client.publish_metadata(other, workers["engine"], "engine") == compute_mx_source_id(other) != source_id

# Listing: by identity, by status, by what else a client may ask for.
def listed(**request):
    return {ref.worker_id: ref for ref in client.stub.ListSources(pb.ListSourcesRequest(**request)).instances}


refs = {ref.worker_id: ref for ref in client.list_sources(identity()).instances}
assert set(refs) == set(workers), set(refs)
ref = refs["nixl"]
assert (ref.mx_source_id, ref.worker_rank, ref.accelerator) == (source_id, 3, "cuda")
assert ref.model_name == "deepseek-ai/DeepSeek-V3" and dict(ref.topology) == {"node": "n1", "rack": "r7"}
assert ref.training_step == 42 and ref.updated_at > 1_600_000_000_000 and not ref.HasField("source_load")
ready = {ref.worker_id for ref in client.list_sources(identity(), READY).instances}
assert ready == {"empty-nixl", "engine", "none", "large"}, ready
assert len(client.list_sources().instances) >= len(workers) + 1
assert not client.list_sources(identity(revision="r3")).instances
assert set(listed(identity=identity(), worker_rank_filter=3)) == {"nixl"}
assert not listed(identity=identity(), min_training_step=43)
assert set(listed(identity=identity(), min_training_step=42)) == set(workers)
assert not listed(model_name_filter="nobody's")
assert not listed(identity=identity(), min_updated_at=1 << 62)
assert len(listed(identity=identity(), limit=2)) == 2

# Status, and the load that a worker measures; nothing else changes.
assert client.update_status(source_id, "nixl", 3, READY, 0.25)
reply = client.get_metadata(source_id, "nixl")
changed = pb.WorkerMetadata.FromString(workers["nixl"].SerializeToString())
changed.status = READY
same(reply.worker, changed)
assert listed(identity=identity())["nixl"].source_load == 0.25
assert client.update_status(source_id, "nixl", 3, READY)
assert not listed(identity=identity())["nixl"].HasField("source_load"), "no reading is not 0"
assert client.update_status(source_id, "nixl", 3, STALE)
assert client.get_metadata(source_id, "nixl").worker.status == STALE

# Ranks that share a worker id: each with its own status, a fetch of the lowest, one line in a listing.
shared = {
    rank: pb.WorkerMetadata(worker_rank=rank, nixl_metadata=bytes([rank]), status=READY) for rank in (6, 12, 1)
}
for rank in (12, 1, 6):
    client.publish_metadata(identity(), shared[rank], "shared")
same(client.get_metadata(source_id, "shared").worker, shared[1])
assert [r.worker_rank for r in client.list_sources(identity()).instances if r.worker_id == "shared"] == [6]
assert client.update_status(source_id, "shared", 12, STALE)
assert client.get_metadata(source_id, "shared").worker.status == READY, "another rank's status"
assert "shared" in {r.worker_id for r in client.list_sources(identity(), STALE).instances}
assert "shared" in {r.worker_id for r in client.list_sources(identity(), READY).instances}
assert not client.update_status(source_id, "shared", 2, READY), "a rank that nobody published"

# Publishing again replaces, also what is large.
smaller = pb.WorkerMetadata(worker_rank=4, nixl_metadata=b"\x01", status=READY)
client.publish_metadata(identity(), smaller, "large")
same(client.get_metadata(source_id, "large").worker, smaller)
client.publish_metadata(identity(), workers["large"], "large")
same(client.get_metadata(source_id, "large").worker, workers["large"])

# What is not there, and what is wrong.
assert not client.get_metadata(source_id, "nobody").found
assert not client.get_metadata("0123456789abcdef", "nixl").found
assert not client.get_metadata("", "").found and not client.get_metadata("../x", "a b").found
assert not client.update_status(source_id, "nobody", 0, READY), "an unknown worker"
assert not client.update_status(source_id, "nixl", 9, READY), "another rank"
reply = client.stub.UpdateStatus(pb.UpdateStatusRequest(mx_source_id=source_id, worker_id="nixl", status=99))
assert not reply.success and "status" in reply.message and "99" in reply.message, reply


def refused(named, **request):
    reply = client.stub.PublishMetadata(pb.PublishMetadataRequest(**request))
    assert not reply.success and named in reply.message and not reply.mx_source_id, reply


refused("identity", worker=workers["none"], worker_id="w")
refused("identity.model_name", identity=pb.SourceIdentity(), worker=workers["none"], worker_id="w")
refused("worker_id", identity=identity(), worker=workers["none"])
refused("worker_id", identity=identity(), worker=workers["none"], worker_id="a/b/c")
refused("worker_id", identity=identity(), worker=workers["none"], worker_id="white space")
refused("worker", identity=identity(), worker_id="w")
refused("too large", identity=identity(), worker_id="w",
        worker=pb.WorkerMetadata(topology={"k": "x" * 70_000}))
try:
    raw = client._channel.unary_unary("/model_express.p2p.P2pService/GetMetadata")
    raw(b"\xff\xff\xff", timeout=30)
    raise SystemExit("garbage was taken for a request")
except grpc.RpcError as error:
    assert error.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT), error
assert client.get_metadata(source_id, "engine").found, "the server lives"

# A record that ModelExpress did not publish, where the caller of this script put one.
for ref in client.list_sources().instances:
    if "/" in ref.worker_id:
        reply = client.get_metadata(ref.mx_source_id, ref.worker_id)
        assert reply.found and reply.worker.worker_rank == ref.worker_rank == 5
        assert reply.worker.nixl_metadata == b"native" and reply.worker.agent_name == "agent-5"
        assert compute_mx_source_id(reply.identity) == ref.mx_source_id
        assert not client.update_status(ref.mx_source_id, ref.worker_id, 5, READY), "not ours to change"
        print("native", ref.worker_id)
client.close()
print("source", source_id)
