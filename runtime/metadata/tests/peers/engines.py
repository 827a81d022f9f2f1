"""Two of Mooncake's own engines, which find each other by our HTTP keys: engines.py http://HOST:PORT/metadata.
Exits with 3 where the engine is missing or cannot be loaded; a failed assertion is the message."""

import ctypes
import json
import socket
import sys
import urllib.error
import urllib.parse
import urllib.request

try:
    from mooncake.engine import TransferEngine
except ImportError as error:
    print(error)
    sys.exit(3)

url = sys.argv[1]
SIZE = 1 << 20


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def get(key):
    try:
        with urllib.request.urlopen(f"{url}?key={urllib.parse.quote(key, safe='')}", timeout=60) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return None


names = [f"127.0.0.1:{free_port()}" for _ in range(2)]
engines = [TransferEngine() for _ in names]
buffers = [(ctypes.c_char * SIZE)() for _ in names]
addresses = [ctypes.addressof(buffer) for buffer in buffers]
for engine, name in zip(engines, names):
    assert engine.initialize(name, url, "tcp", "") == 0, "the engine could not register its name"
    assert get(f"mooncake/rpc_meta/{name}") is not None
for engine, name, address in zip(engines, names, addresses):
    assert engine.register_memory(address, SIZE) == 0
    descriptor = json.loads(get(f"mooncake/ram/{name}"))
    assert [b["addr"] for b in descriptor["buffers"]] == [address], descriptor

# Each finds the other's descriptor by its key, and moves bytes over the engines' own TCP.
ctypes.memset(addresses[0], 0x5A, SIZE)
assert engines[0].transfer_sync_write(names[1], addresses[0], addresses[1], SIZE) == 0, "write"
assert buffers[1].raw == b"\x5a" * SIZE
ctypes.memset(addresses[0], 0xA5, SIZE)
assert engines[1].transfer_sync_read(names[0], addresses[1], addresses[0], SIZE) == 0, "read"
assert buffers[1].raw == b"\xa5" * SIZE

for engine, name, address in zip(engines, names, addresses):
    assert engine.unregister_memory(address) == 0
    assert json.loads(get(f"mooncake/ram/{name}"))["buffers"] == []
print("moved", 2 * SIZE, flush=True)
# The engines' destructors delete their keys.
engine = None
del engines
for name in names:
    assert get(f"mooncake/ram/{name}") is None and get(f"mooncake/rpc_meta/{name}") is None, name
print("gone", *names)
