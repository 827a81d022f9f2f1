"""Computes with scapy the invariant CRC of every UDP packet of a capture, and says which packets differ.

Prints one line: "v4 COUNT v6 COUNT wrong FRAME,FRAME,..." (frames count from 0). Exit status 3: no scapy, or one
before 2.8, which knows no CRC over IPv6.
"""

import sys

try:
    import scapy
    from scapy.contrib.roce import BTH
    from scapy.layers.inet import IP, UDP
    from scapy.layers.inet6 import IPv6
    from scapy.packet import bind_layers
    from scapy.utils import PcapReader
except ImportError as error:
    print(error)
    sys.exit(3)

if tuple(int(part) for part in scapy.VERSION.split(".")[:2]) < (2, 8):
    print(f"scapy {scapy.VERSION}")
    sys.exit(3)

# Processes that share one address have ports of their own, so the port tells nothing here.
bind_layers(UDP, BTH)
count = {IP: 0, IPv6: 0}
wrong = []
for at, frame in enumerate(PcapReader(sys.argv[1])):
    if BTH not in frame:
        continue
    count[IP if IP in frame else IPv6] += 1
    # The last four bytes as they stand in the packet, not as scapy would fill them in.
    found = bytes(frame[BTH].icrc.to_bytes(4, "big"))
    if found != frame[BTH].compute_icrc(None):
        wrong.append(str(at))
print(f"v4 {count[IP]} v6 {count[IPv6]} wrong {','.join(wrong)}")
