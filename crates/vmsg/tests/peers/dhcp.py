# SPDX-License-Identifier: Apache-2.0 OR MIT
"""As much of Ethernet, IPv4, UDP and DHCP as it takes to ask for an address."""

import struct

MAGIC = b"\x63\x82\x53\x63"


def checksum(data):
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def discover(mac, xid):
    """A DHCPDISCOVER in an Ethernet frame."""
    bootp = struct.pack(">BBBBIHH16s16s", 1, 1, 6, 0, xid, 0, 0x8000, bytes(16), mac.ljust(16, b"\0"))
    bootp += bytes(192) + MAGIC + bytes([53, 1, 1, 55, 3, 1, 3, 6, 255])
    udp = struct.pack(">HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 1, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    head = head[:10] + struct.pack(">H", checksum(head)) + head[12:]
    return b"\xff" * 6 + mac + b"\x08\x00" + head + udp


def offer(frame, xid):
    """The address that a DHCPOFFER gives, as text; None if the frame is anything else."""
    if len(frame) < 42 or frame[12:14] != b"\x08\x00" or frame[23] != 17:
        return None
    ip = frame[14:]
    length = 4 * (ip[0] & 15)
    if checksum(ip[:length]):
        raise AssertionError(f"checksum of the IPv4 header: {ip[:length].hex()}")
    source, target = struct.unpack_from(">HH", ip, length)
    bootp = ip[length + 8 :]
    if (source, target) != (67, 68) or bootp[236:240] != MAGIC:
        return None
    options, found = bootp[240:], None
    while options and options[0] != 255:
        if options[0] == 0:
            options = options[1:]
            continue
        if options[0] == 53:
            found = options[2]
        options = options[2 + options[1] :]
    if found != 2 or struct.unpack_from(">I", bootp, 4)[0] != xid:
        return None
    return ".".join(map(str, bootp[16:20]))
