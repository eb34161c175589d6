# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Messages of the 40-byte generation: header of 4 bytes, no token, no size, one request in flight."""

import struct

from bus import Broken
from rev1 import Info, QueueInfo

SIZE = 40
HEADER = struct.Struct("<BBH")
RESPONSE = 1

DEVICE_INFO, GET_FEATURES, SET_FEATURES = 0x03, 0x04, 0x05
GET_CONFIG, SET_CONFIG, GET_CONFIG_GEN = 0x06, 0x07, 0x08
GET_DEVICE_STATUS, SET_DEVICE_STATUS = 0x09, 0x0A
GET_VQUEUE, SET_VQUEUE, RESET_VQUEUE = 0x0B, 0x0C, 0x0D
EVENT_CONFIG, EVENT_AVAIL, EVENT_USED = 0x10, 0x11, 0x12
IOMMU_ENABLE, IOMMU_TRANSLATE = 0x20, 0x21
EVENTS = (EVENT_CONFIG, EVENT_AVAIL, EVENT_USED)
# Requests that nobody answers.
SILENT = (SET_DEVICE_STATUS, SET_VQUEUE)


class Message:
    def __init__(self, slot):
        self.kind, self.id, self.dev = HEADER.unpack_from(slot)
        self.payload = slot[HEADER.size : SIZE]

    @property
    def response(self):
        return bool(self.kind & RESPONSE)

    def u32(self, at=0):
        return struct.unpack_from("<I", self.payload, at)[0]

    def __repr__(self):
        name = "response" if self.response else "message"
        return f"{name} {self.id:#x} dev {self.dev} {self.payload.hex()}"


def encode(kind, id, dev, payload=b""):
    message = HEADER.pack(kind, id, dev) + payload
    if len(message) > SIZE:
        raise ValueError(f"message of {len(message)} bytes")
    return message.ljust(SIZE, b"\0")


def config_head(offset, size):
    return offset.to_bytes(3, "little") + bytes([size])


class Driver:
    """The same calls as those of revision 1, as far as the older generation has them."""

    revision = "r1"

    def __init__(self, bus, timeout=60.0):
        self.bus = bus
        self.timeout = timeout
        self.events = []
        self.strays = []

    def receive(self, timeout=None):
        slot = self.bus.recv(self.timeout if timeout is None else timeout)
        return None if slot is None else Message(slot)

    def event(self, message):
        """Keeps an event for later; a page that is asked for lies where it seems to lie."""
        if not message.response and message.id in EVENTS:
            self.events.append(message)
        elif not message.response and message.id == IOMMU_TRANSLATE:
            address, wanted = struct.unpack_from("<QB", message.payload)
            answer = struct.pack("<QQB", address, address & ~0xFFF, wanted)
            self.bus.send(encode(RESPONSE, IOMMU_TRANSLATE, message.dev, answer))
        else:
            self.strays.append(message)

    def start(self, id, dev=0, payload=b""):
        self.bus.send(encode(0, id, dev, payload))

    def answer(self, id, dev, matches=None):
        """Waits for the answer to the request in flight."""
        while True:
            message = self.receive()
            if message is None:
                raise Broken(f"no answer to message {id:#x} for device {dev}")
            if (message.response, message.id, message.dev) == (True, id, dev):
                if matches is None or message.payload.startswith(matches):
                    return message
            self.event(message)

    def call(self, id, dev=0, payload=b"", matches=None):
        self.start(id, dev, payload)
        return self.answer(id, dev, matches)

    def info(self, dev):
        answer = self.call(DEVICE_INFO, dev)
        version, device, vendor = struct.unpack_from("<III", answer.payload)
        if version != 1:
            raise Broken(f"version {version}: {answer}")
        return Info(device, vendor, 64, 0, 0)

    def features(self, dev):
        answer = self.call(GET_FEATURES, dev, struct.pack("<I", 0), struct.pack("<I", 0))
        return struct.unpack_from("<Q", answer.payload, 4)[0]

    def set_features(self, dev, bits):
        for part in (bits & 0xFFFF_FFFF, bits):
            self.call(SET_FEATURES, dev, struct.pack("<IQ", 0, part), struct.pack("<I", 0))

    def status(self, dev):
        return self.call(GET_DEVICE_STATUS, dev).u32()

    def set_status(self, dev, status):
        """Nobody answers this one; a status read follows, as proxies do it."""
        self.start(SET_DEVICE_STATUS, dev, struct.pack("<I", status))
        return self.status(dev)

    def config(self, dev, offset, length):
        """1, 2 or 4 bytes at a time; other lengths in pieces."""
        data = b""
        while len(data) < length:
            at, rest = offset + len(data), length - len(data)
            size = next(n for n in (4, 2, 1) if n <= rest)
            head = config_head(at, size)
            answer = self.call(GET_CONFIG, dev, head, head)
            if any(answer.payload[4 + size : 12]):
                raise Broken(f"more than {size} bytes: {answer}")
            data += answer.payload[4 : 4 + size]
        return data

    def config_generation(self, dev):
        return self.call(GET_CONFIG_GEN, dev).u32()

    def queue(self, dev, index):
        answer = self.call(GET_VQUEUE, dev, struct.pack("<I", index), struct.pack("<I", index))
        return QueueInfo(index, answer.u32(4), 0, 0, 0, 0)

    def set_queue(self, dev, index, ring):
        fields = (index, ring.size, ring.desc, ring.avail, ring.used)
        self.start(SET_VQUEUE, dev, struct.pack("<IIQQQ", *fields))

    def notify(self, dev, queue):
        self.start(EVENT_AVAIL, dev, struct.pack("<IQQ", queue, 0, 0))

    def used_events(self, dev, queue):
        def wanted(event):
            return (event.id, event.dev, event.u32()) == (EVENT_USED, dev, queue)

        count = sum(map(wanted, self.events))
        self.events = [event for event in self.events if not wanted(event)]
        return count

    def wait_event(self, timeout=None):
        message = self.receive(timeout)
        if message is None:
            return False
        self.event(message)
        return True

    def is_absent(self, dev):
        """No answer counts as "absent", too: the older generation does not say. Who is only slow has all the time of an answer."""
        self.start(DEVICE_INFO, dev)
        while (message := self.receive(10.0)) is not None:
            if (message.response, message.id, message.dev) == (True, DEVICE_INFO, dev):
                return message.u32(4) == 0
            self.event(message)
        return True
