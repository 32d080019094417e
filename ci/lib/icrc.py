"""The ICRC by scapy, for ci/tshark.

icrc.py verdicts FILE        prints number and verdict of each RoCEv2 packet
icrc.py damage FILE COPY     copies a capture with one bit flipped in each packet, after the pad count
"""

import random
import sys
import zlib

from scapy.contrib.roce import BTH
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.packet import Raw
from scapy.utils import PcapReader, PcapWriter

FIRST_FLIPPED = 2  # opcode, flags and pad count stay: with others it would be another packet


def icrc_v6(packet):
    """What scapy does not do: the annex's masks over IPv6."""
    ip = bytearray(bytes(packet[IPv6])[:40])
    ip[0] |= 0x0F
    ip[1:4] = b"\xff" * 3
    ip[7] = 0xFF
    udp = bytearray(bytes(packet[UDP]))
    udp[6:8] = b"\xff" * 2
    udp[12] = 0xFF
    covered = b"\xff" * 8 + bytes(ip) + bytes(udp[:-4])
    return zlib.crc32(covered).to_bytes(4, "little")


def verdicts(path):
    for number, packet in enumerate(PcapReader(path), 1):
        if BTH not in packet:
            continue
        sent = packet[BTH].icrc.to_bytes(4, "big")
        if IP in packet:
            # Built from the bytes as they are, not from scapy's idea of the headers that follow.
            body = bytes(packet[UDP].payload)
            bare = packet[IP].copy()
            bare[UDP].remove_payload()
            bare = bare / BTH(body[:12]) / Raw(body[12:-4])
            expected = bare[BTH].compute_icrc(b"")
        else:
            expected = icrc_v6(packet)
        print(number, "right" if sent == expected else "wrong")


def damage(path, copy):
    rng = random.Random(path.rsplit("/", 1)[-1])
    reader = PcapReader(path)
    writer = PcapWriter(copy, linktype=reader.linktype)
    writer.write_header(None)
    for packet in reader:
        raw = bytearray(bytes(packet))
        start = len(raw) - len(bytes(packet[UDP].payload)) + FIRST_FLIPPED
        at = rng.randrange(start, len(raw))
        raw[at] ^= 1 << rng.randrange(8)
        writer.write_packet(bytes(raw))
    writer.close()


if __name__ == "__main__":
    {"verdicts": verdicts, "damage": damage}[sys.argv[1]](*sys.argv[2:])
