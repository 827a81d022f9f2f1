#!/usr/bin/env python3
"""Writes roce.txt: RoCEv2 frames built by scapy (2.8.0), each with what tshark (4.0.17) reads in it.

Needs `pip install scapy` and tshark; run it as `python3 roce.py > roce.txt`. Scapy knows the BTH and the
invariant CRC; the extended headers are packed here and read back by tshark, so that two programs agree on
every field before a frame is written down. The frames of PUBLISHED are bytes that others made known.
"""

import struct
import subprocess
import sys
import tempfile

from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw
from scapy.utils import wrpcap

VA, RKEY = 0x0123456789ABCDEF, 0x89ABCDEF
FIELDS = [
    ("dst_mac", "eth.dst"), ("src_mac", "eth.src"), ("ip4_src", "ip.src"), ("ip4_dst", "ip.dst"),
    ("ip4_id", "ip.id"), ("df", "ip.flags.df"), ("ttl", "ip.ttl"), ("dscp", "ip.dsfield.dscp"),
    ("ecn", "ip.dsfield.ecn"), ("ip6_src", "ipv6.src"), ("ip6_dst", "ipv6.dst"), ("hlim", "ipv6.hlim"),
    ("dscp6", "ipv6.tclass.dscp"), ("ecn6", "ipv6.tclass.ecn"), ("sport", "udp.srcport"),
    ("dport", "udp.dstport"), ("opcode", "infiniband.bth.opcode"), ("se", "infiniband.bth.se"),
    ("m", "infiniband.bth.m"), ("pad", "infiniband.bth.padcnt"), ("pkey", "infiniband.bth.p_key"),
    ("destqp", "infiniband.bth.destqp"), ("a", "infiniband.bth.a"), ("psn", "infiniband.bth.psn"),
    ("va", "infiniband.reth.va"), ("rkey", "infiniband.reth.r_key"), ("dmalen", "infiniband.reth.dmalen"),
    ("swap", "infiniband.atomiceth.swapdt"), ("cmp", "infiniband.atomiceth.cmpdt"),
    ("syndrome", "infiniband.aeth.syndrome"), ("msn", "infiniband.aeth.msn"),
    ("orig", "infiniband.atomicacketh.origremdt"), ("imm", "infiniband.immdt"),
    ("icrc", "infiniband.invariant.crc"),
]


def reth(length, va=VA, rkey=RKEY):
    return struct.pack("!QII", va, rkey, length)


def aeth(syndrome, msn):
    return struct.pack("!I", syndrome << 24 | msn)


def atomic(swap_add, compare):
    return struct.pack("!QIQQ", VA & ~7, RKEY, swap_add, compare)


def imm(value):
    return struct.pack("!I", value)


def payload(length):
    return bytes((7 * i + 3) & 0xFF for i in range(length))


# name, opcode, extended headers, payload length, BTH fields
PACKETS = [
    ("send_first", 0x00, b"", 256, {}),
    ("send_middle", 0x01, b"", 256, {}),
    ("send_last", 0x02, b"", 3, {"ackreq": 1}),
    ("send_last_imm", 0x03, imm(0xA1B2C3D4), 1, {"ackreq": 1, "solicited": 1}),
    ("send_only", 0x04, b"", 0, {"solicited": 1}),
    ("send_only_imm", 0x05, imm(1), 30, {"ackreq": 1}),
    ("write_first", 0x06, reth(1 << 20), 256, {}),
    ("write_middle", 0x07, b"", 256, {"migreq": 0}),
    ("write_last", 0x08, b"", 2, {"ackreq": 1}),
    ("write_last_imm", 0x09, imm(0xFFFFFFFE), 64, {"ackreq": 1}),
    ("write_only", 0x0A, reth(17), 17, {"ackreq": 1, "psn": 0xFFFFFF}),
    ("write_only_empty", 0x0A, reth(0), 0, {"ackreq": 1}),
    ("write_only_imm", 0x0B, reth(8) + imm(7), 8, {"ackreq": 1}),
    ("read_request", 0x0C, reth(4097), 0, {"ackreq": 1}),
    ("read_response_first", 0x0D, aeth(0x1F, 5), 256, {}),
    ("read_response_middle", 0x0E, b"", 256, {}),
    ("read_response_last", 0x0F, aeth(0x1F, 6), 5, {}),
    ("read_response_only", 0x10, aeth(0x00, 0xFFFFFF), 7, {}),
    ("ack", 0x11, aeth(0x1F, 0x123456), 0, {}),
    ("ack_credits", 0x11, aeth(0x0C, 1), 0, {}),
    ("rnr_nak", 0x11, aeth(0x2C, 2), 0, {}),
    ("nak_sequence", 0x11, aeth(0x60, 3), 0, {}),
    ("nak_invalid_request", 0x11, aeth(0x61, 3), 0, {}),
    ("nak_remote_access", 0x11, aeth(0x62, 3), 0, {}),
    ("nak_remote_operation", 0x11, aeth(0x63, 3), 0, {}),
    ("nak_invalid_rd", 0x11, aeth(0x64, 3), 0, {}),
    ("atomic_ack", 0x12, aeth(0x1F, 9) + struct.pack("!Q", 0x1122334455667788), 0, {}),
    ("cmp_swap", 0x13, atomic(0x2222222222222222, 0x1111111111111111), 0, {"ackreq": 1}),
    ("fetch_add", 0x14, atomic(0x0102030405060708, 0), 0, {}),
]

PUBLISHED = [
    # A congestion notification from a ConnectX-4 Lx: not ours to decode, but its invariant CRC is hardware's.
    # Published in scapy's test/contrib/roce.uts.
    ("captured_cnp_connectx4lx",
     "e41d2dab2bc27cfe90643b32080045c2003c718c40004011"
     "91610a0011010a0012010000 12b7002800008100ffff400001180000"
     "00000000000000000000000000000000000082fd002a"),
    # An unreliable-connection packet, same source, with the invariant CRC that the test expects.
    ("published_uc_send_only",
     "248a07a8fa22248a07a8fa2208004501004004784000" "4011b4d5c0a80007c0a80007"
     "c00012b7002caca22460ffff000000d300cf1710" "4630818be28935d90e9a95505401be885e500000" "78f353f3"),
]


def frame(version, index, opcode, ext, length, fields):
    bth = dict(migreq=1, pkey=0xFFFF, dqpn=0x000100 + index, psn=0xFFFFF0 + index)
    bth.update(fields)
    data = payload(length)
    pad = -length % 4
    ether = Ether(dst="02:00:00:00:00:02", src="02:00:00:00:00:01")
    if version == 4:
        ip = IP(src="10.1.2.3", dst="10.3.2.1", id=0x4000 + index, flags="DF" if index % 2 else 0,
                ttl=63, tos=index % 4 | 26 << 2)
    else:
        ip = IPv6(src="fd00::1", dst="fd00::feed:2", hlim=64, tc=0 if index % 2 else 26 << 2 | 2)
    udp = UDP(sport=0xC000 + index, dport=4791, chksum=0)
    body = Raw(ext + data + bytes(pad))
    return bytes(ether / ip / udp / BTH(opcode=opcode, padcount=pad, **bth) / body)


def decode(frames):
    with tempfile.NamedTemporaryFile(suffix=".pcap") as capture:
        wrpcap(capture.name, [Ether(f) for f in frames], linktype=1)
        command = ["tshark", "-r", capture.name, "-T", "fields", "-E", "separator=|", "-E", "occurrence=f"]
        for _, field in FIELDS:
            command += ["-e", field]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [line.split("|") for line in done.stdout.splitlines()]


def show(name, raw, values):
    words = [f"{key}={value}" for (key, _), value in zip(FIELDS, values) if value != ""]
    print(" ".join([f"packet {name}", *words]))
    for at in range(0, len(raw), 32):
        print(f"  {raw[at:at + 32].hex()}")


def main():
    print("# RoCEv2 frames, from Ethernet to invariant CRC: built by scapy 2.8.0, fields as tshark 4.0.17 reads")
    print("# them, both run by roce.py beside this file on 2026-11-21. Payload byte i is (7 i + 3) mod 256.")
    print("# The last two frames were published in scapy's test/contrib/roce.uts; the first of them was captured on a")
    print("# ConnectX-4 Lx.")
    names, frames = [], []
    for version in (4, 6):
        for index, (name, *packet) in enumerate(PACKETS):
            names.append(f"{name}_v{version}")
            frames.append(frame(version, index, *packet))
    for name, raw in PUBLISHED:
        names.append(name)
        frames.append(bytes.fromhex(raw.replace(" ", "")))
    for name, raw, values in zip(names, frames, decode(frames), strict=True):
        show(name, raw, values)


if __name__ == "__main__":
    sys.exit(main())
