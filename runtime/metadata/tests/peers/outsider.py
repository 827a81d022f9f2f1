"""A client that knows nothing of Ibex but its address: what it learns, it learns by reflection.

outsider.py ADDRESS METRICS CA-FILE TOKEN. Exits with 3 where a package is missing; a failed assertion is the
message. Prints `watching` when it follows a watch, which the server is then expected to end in order."""

import sys
import time
import urllib.request

try:
    import grpc
    from google.protobuf import descriptor_pool, message_factory
    from grpc_health.v1 import health_pb2, health_pb2_grpc
    from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
    from prometheus_client.parser import text_string_to_metric_families
except ImportError as error:
    print(error)
    sys.exit(3)

address, metrics, ca_file, token = sys.argv[1:]
ca = open(ca_file, "rb").read()
good = [("authorization", f"Bearer {token}")]


def channel(root):
    options = [("grpc.ssl_target_name_override", "store.example"), ("grpc.enable_retries", 0)]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(root), options)


secure = channel(ca)

# Health, as orchestrators ask for it: the server as a whole, the service, and one that is not there.
health = health_pb2_grpc.HealthStub(secure)
serving = health_pb2.HealthCheckResponse.SERVING
for service in ["", "ibex.store.v1.Store"]:
    deadline = time.monotonic() + 60
    while True:
        try:
            status = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=60).status
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND, error
            status = None
        if status == serving:
            break
        assert time.monotonic() < deadline, f"{service!r} is {status}"
        time.sleep(0.05)
try:
    health.Check(health_pb2.HealthCheckRequest(service="none"), timeout=60)
    raise SystemExit("a service that is not there is healthy")
except grpc.RpcError as error:
    assert error.code() == grpc.StatusCode.NOT_FOUND, error

# Reflection: services and the classes of their messages.
database = ProtoReflectionDescriptorDatabase(secure)
services = set(database.get_services())
wanted = {"ibex.store.v1.Store", "model_express.p2p.P2pService", "grpc.health.v1.Health"}
assert wanted <= services, services
pool = descriptor_pool.DescriptorPool(database)
store = pool.FindServiceByName("ibex.store.v1.Store")


def call(name, request=None, on=secure, metadata=good, raw=None):
    method = store.methods_by_name[name]
    request_class = message_factory.GetMessageClass(method.input_type)
    reply_class = message_factory.GetMessageClass(method.output_type)
    serialize = (lambda _: raw) if raw is not None else request_class.SerializeToString
    make = on.unary_stream if name == "Watch" else on.unary_unary
    stub = make(f"/ibex.store.v1.Store/{name}", serialize, reply_class.FromString)
    return stub(request_class(**(request or {})), metadata=metadata, timeout=120)


def refused(code, *args, **kwargs):
    try:
        call(*args, **kwargs)
    except grpc.RpcError as error:
        assert error.code() == code, f"{error.code()} instead of {code}: {error.details()}"
        return error
    raise SystemExit(f"{args} was not refused")


code = grpc.StatusCode
assert pool.FindMessageTypeByName("ibex.store.v1.Hold").fields_by_name["fence"].number == 3
hold = call("Claim", {"name": "c/g/n", "instance_id": b"\x01" * 16, "ttl_ms": 600_000})
assert hold.fence > 0

# Tokens and certificates.
for metadata in [[], [("authorization", "Bearer wrong-horse")], [("authorization", token)]]:
    refused(code.UNAUTHENTICATED, "Health", metadata=metadata)
refused(code.UNAVAILABLE, "Health", on=grpc.insecure_channel(address))
refused(code.UNAVAILABLE, "Health", on=grpc.secure_channel(address, grpc.ssl_channel_credentials(ca)))

# What is no message, too large a message, and messages that break rules: refused, and nothing is lost.
assert refused(code.INTERNAL, "Publish", raw=b"\xff\xff\xff").code()
refused(code.OUT_OF_RANGE, "Publish", raw=b"\x1a\x80\x80\x80\x28" + bytes(80 << 20))
refused(code.INVALID_ARGUMENT, "Claim", {"name": "no/name", "instance_id": b"\x01" * 16, "ttl_ms": 1000})
refused(code.INVALID_ARGUMENT, "Claim", {"name": "c/g/m", "instance_id": b"\x01", "ttl_ms": 1000})
refused(code.INVALID_ARGUMENT, "Claim", {"name": "c/g/m", "instance_id": b"\x01" * 16, "ttl_ms": 1})
refused(code.DATA_LOSS, "Publish", {"hold": hold, "record": b"\xff\xff\xff"})
refused(code.RESOURCE_EXHAUSTED, "BatchGet", {"names": ["c/g/n"] * 10_000})
call("Renew", {f: getattr(hold, f) for f in ("name", "instance_id", "fence", "lease", "ttl_ms")})
assert call("Health").num_names == 1

# Prometheus' own parser reads every line, and the histograms are histograms.
page = urllib.request.urlopen(f"http://{metrics}/metrics", timeout=60)
assert page.headers["Content-Type"].startswith("text/plain")
families = {family.name: family for family in text_string_to_metric_families(page.read().decode())}
assert families["ibex_store_up"].samples[0].value == 1
assert families["ibex_store_refused_tokens"].type == "counter"
assert families["ibex_store_refused_tokens"].samples[0].value == 3
claims = {s.labels["outcome"]: s.value for s in families["ibex_store_calls"].samples if s.labels["op"] == "claim"}
assert claims == {"ok": 1, "input": 3}, claims
histogram = families["ibex_store_call_seconds"]
assert histogram.type == "histogram"
for op in {sample.labels["op"] for sample in histogram.samples}:
    samples = [s for s in histogram.samples if s.labels["op"] == op]
    buckets = [s for s in samples if s.name.endswith("_bucket")]
    bounds = [float(s.labels["le"]) for s in buckets]
    counts = [s.value for s in buckets]
    total = next(s.value for s in samples if s.name.endswith("_count"))
    assert bounds == sorted(bounds) and bounds[-1] == float("inf"), bounds
    assert counts == sorted(counts) and counts[-1] == total, counts

# An orderly end: the watch is told that the store is unavailable, and nobody answers any more.
watch = call("Watch", {"prefix": "c"})
first = next(watch)
print("watching", flush=True)
try:
    next(watch)
    raise SystemExit("the watch saw something after the last change")
except grpc.RpcError as error:
    assert error.code() == code.UNAVAILABLE, error
print("ended")
