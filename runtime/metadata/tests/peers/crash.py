"""A Mooncake engine that is killed and started again under its name: crash.py URL. Exits with 3 where the
engine is missing; a failed assertion is the message."""

import ctypes
import json
import os
import signal
import socket
import subprocess
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


def get(key):
    try:
        with urllib.request.urlopen(f"{url}?key={urllib.parse.quote(key, safe='')}", timeout=60) as reply:
            return reply.read()
    except urllib.error.HTTPError as error:
        assert error.code == 404, error
        return None


def register(name, size):
    engine = TransferEngine()
    if engine.initialize(name, url, "tcp", "") != 0:
        return None
    buffer = (ctypes.c_char * size)()
    ctypes.memset(buffer, 0x5A, size)
    assert engine.register_memory(ctypes.addressof(buffer), size) == 0
    return engine, buffer


if len(sys.argv) > 2:
    # A process of its own: says whether it could register, and lives until it is told to end, or is killed.
    held = register(sys.argv[2], int(sys.argv[3]))
    print("refused" if held is None else "registered", flush=True)
    sys.stdin.readline()
    if held is not None:
        assert held[0].unregister_memory(ctypes.addressof(held[1])) == 0
    held = None
    sys.exit(0)


def child(name, size):
    command = [sys.executable, __file__, url, name, str(size)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # The engine logs on the same stream.
    for line in process.stdout:
        if line.strip() in ("registered", "refused"):
            return process, line.strip()
    raise SystemExit("the engine ended without a word")


def segment(name):
    descriptor = get(f"mooncake/ram/{name}")
    return descriptor and json.loads(descriptor)["buffers"]


with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    name = f"127.0.0.1:{probe.getsockname()[1]}"
first, said = child(name, SIZE)
assert said == "registered"
before, meta = segment(name), get(f"mooncake/rpc_meta/{name}")
assert [b["length"] for b in before] == [SIZE]
# Killed, it leaves its keys; started again, it has its name, and nothing of what it had.
os.kill(first.pid, signal.SIGKILL)
first.wait()
assert segment(name) == before, "nobody has cleaned up"
again, said = child(name, 2 * SIZE)
assert said == "registered", said
assert get(f"mooncake/rpc_meta/{name}") != meta
assert [b["length"] for b in segment(name)] == [2 * SIZE]
print("again", name)
# Two engines of one name: the one that lives keeps it. (The other deletes the name's rpc_meta as it goes, with
# which nobody's server can help it.)
second, said = child(name, SIZE)
assert said == "refused", said
second.communicate("end\n")
assert [b["length"] for b in segment(name)] == [2 * SIZE]
print("refused while it lives")
again.communicate("end\n")
assert again.returncode == 0
assert get(f"mooncake/ram/{name}") is None, "an orderly end deletes its keys"
