# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Messages of revision 1: header of 8 bytes, at most 48 in all on this bus, and a driver's calls on
top.
"""

import os
import struct
from typing import NamedTuple

from bus import Broken

MAX = 48
HEADER = struct.Struct("<BBHHH")
RESPONSE, BUS = 1, 2

GET_DEVICE_INFO, GET_DEVICE_FEATURES, SET_DRIVER_FEATURES = 0x02, 0x03, 0x04
GET_CONFIG, SET_CONFIG, GET_DEVICE_STATUS, SET_DEVICE_STATUS = 0x05, 0x06, 0x07, 0x08
GET_VQUEUE, SET_VQUEUE, RESET_VQUEUE, GET_SHM = 0x09, 0x0A, 0x0B, 0x0C
EVENT_CONFIG, EVENT_AVAIL, EVENT_USED = 0x40, 0x41, 0x42
BUS_GET_DEVICES, BUS_PING, BUS_EVENT_DEVICE = 0x02, 0x03, 0x40

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK = 1, 2, 4, 8
NEEDS_RESET, FAILED = 64, 128
VERSION_1, ACCESS_PLATFORM = 1 << 32, 1 << 33
QUEUE = struct.Struct("<IIIIQQQ")


class Message(NamedTuple):
    kind: int
    id: int
    dev: int
    token: int
    payload: bytes

    @property
    def response(self):
        return bool(self.kind & RESPONSE)

    @property
    def bus(self):
        return bool(self.kind & BUS)

    def u32(self, at=0):
        return struct.unpack_from("<I", self.payload, at)[0]


def encode(kind, id, dev, token, payload=b""):
    size = HEADER.size + len(payload)
    if size > MAX:
        raise ValueError(f"message of {size} bytes")
    return HEADER.pack(kind, id, dev, token, size) + payload


def decode(slot):
    """The message at the start of a slot; None if its size makes no sense."""
    kind, id, dev, token, size = HEADER.unpack_from(slot)
    if not HEADER.size <= size <= MAX:
        return None
    return Message(kind & 3, id, dev, token, slot[HEADER.size : size])


class Info(NamedTuple):
    device: int
    vendor: int
    feature_bits: int
    config_size: int
    max_queues: int


class QueueInfo(NamedTuple):
    index: int
    max: int
    size: int
    desc: int
    driver: int
    device: int


class Driver:
    """A driver's side of the bus: calls that send a request and wait for its answer."""

    revision = "1"

    def __init__(self, bus, timeout=60.0):
        self.bus = bus
        self.timeout = timeout
        # A peer that lived before may still answer somebody who used other tokens.
        self.token = int.from_bytes(os.urandom(2), "little") or 1
        self.asked = set()
        self.events = []
        self.strays = []

    # Sending and receiving.

    def new_token(self):
        """A token that is not 0, which events have."""
        self.token = self.token % 0xFFFF + 1
        self.asked.add(self.token)
        return self.token

    def has_asked(self, message):
        """Whether this is an answer to a request of this driver."""
        return message.response and message.token in self.asked

    def start(self, id, dev=0, payload=b"", bus=False):
        """Sends a request without waiting; gives its token."""
        token = self.new_token()
        self.bus.send(encode(BUS if bus else 0, id, dev, token, payload))
        return token

    def receive(self, timeout=None):
        """The next message of any kind; None if there is none in time."""
        slot = self.bus.recv(self.timeout if timeout is None else timeout)
        if slot is None:
            return None
        message = decode(slot)
        if message is None:
            raise Broken(f"malformed: {slot.hex()}")
        return message

    def event(self, message):
        """Keeps an event for later, answers the other side's PING, collects what nobody asked for."""
        if not message.response and message.id >= 0x40:
            if message.token:
                raise Broken(f"event with a token: {message}")
            self.events.append(message)
        elif not message.response and message.bus and message.id == BUS_PING:
            answer = encode(BUS | RESPONSE, BUS_PING, 0, message.token, message.payload)
            self.bus.send(answer)
        else:
            self.strays.append(message)

    def answer(self, id, dev, token, bus=False):
        """Waits for the answer to one request. What else comes is kept or collected."""
        while True:
            message = self.receive()
            if message is None:
                raise Broken(f"no answer to message {id:#x} for device {dev}")
            if (message.response, message.id, message.token, message.bus) == (True, id, token, bus):
                if message.dev != dev:
                    raise Broken(f"asked device {dev}: {message}")
                return message
            self.event(message)

    def call(self, id, dev=0, payload=b"", bus=False, size=None):
        """One request and its answer, which must have `size` bytes of payload unless that is None."""
        token = self.start(id, dev, payload, bus)
        message = self.answer(id, dev, token, bus)
        if size is not None and len(message.payload) != size:
            raise Broken(f"{size} bytes expected: {message}")
        return message

    # What drivers ask.

    def info(self, dev):
        payload = self.call(GET_DEVICE_INFO, dev, size=24).payload
        return Info(*struct.unpack("<5I", payload[:20]))

    def features(self, dev):
        answer = self.call(GET_DEVICE_FEATURES, dev, struct.pack("<II", 0, 2), size=16)
        first, count, bits = struct.unpack("<IIQ", answer.payload)
        if (first, count) != (0, 2):
            raise Broken(f"blocks {first}+{count}")
        return bits

    def set_features(self, dev, bits):
        """In two halves: first the low 32 bits with the high ones 0, as proxies do it, then all."""
        for part in (bits & 0xFFFF_FFFF, bits):
            self.call(SET_DRIVER_FEATURES, dev, struct.pack("<IIQ", 0, 2, part), size=0)

    def status(self, dev):
        return self.call(GET_DEVICE_STATUS, dev, size=4).u32()

    def set_status(self, dev, status):
        """Gives the status that results."""
        payload = struct.pack("<I", status)
        return self.call(SET_DEVICE_STATUS, dev, payload, size=4).u32()

    def config(self, dev, offset, length):
        return self.config_with_generation(dev, offset, length)[1]

    def config_with_generation(self, dev, offset, length):
        request = struct.pack("<II", offset, length)
        answer = self.call(GET_CONFIG, dev, request, size=12 + length)
        generation, at, got = struct.unpack_from("<III", answer.payload)
        if (at, got) != (offset, length):
            raise Broken(f"asked for {offset}+{length}: {answer}")
        return generation, answer.payload[12:]

    def queue(self, dev, index):
        payload = self.call(GET_VQUEUE, dev, struct.pack("<I", index), size=40).payload
        got, most, size, zero, desc, driver, device = QUEUE.unpack(payload)
        if (got, zero) != (index, 0):
            raise Broken(f"asked for queue {index}: {payload.hex()}")
        return QueueInfo(got, most, size, desc, driver, device)

    def set_queue(self, dev, index, ring):
        fields = (index, 0, ring.size, 0, ring.desc, ring.avail, ring.used)
        self.call(SET_VQUEUE, dev, QUEUE.pack(*fields), size=0)

    def notify(self, dev, queue):
        self.bus.send(encode(0, EVENT_AVAIL, dev, 0, struct.pack("<II", queue, 0)))

    def used_events(self, dev, queue):
        """Takes EVENT_USED of a queue out of what has come; how many there were."""
        mine = [event for event in self.events if self.is_used(event, dev, queue)]
        self.events = [event for event in self.events if event not in mine]
        return len(mine)

    @staticmethod
    def is_used(event, dev, queue):
        found = (event.bus, event.id, event.dev) == (False, EVENT_USED, dev)
        if found and len(event.payload) != 4:
            raise Broken(f"EVENT_USED must have 12 bytes: {event}")
        return found and event.u32() == queue

    def wait_event(self, timeout=None):
        """Waits until anything comes and sorts it; False after the time."""
        message = self.receive(timeout)
        if message is None:
            return False
        self.event(message)
        return True

    def present(self):
        """Device numbers by GET_DEVICES, as far as the other side tells; stops as it must for every peer."""
        found, offset = [], 0
        while offset < 0x1_0000:
            payload = self.call(BUS_GET_DEVICES, 0, struct.pack("<HH", offset, 32), bus=True).payload
            at, count, following = struct.unpack_from("<HHH", payload)
            if at != offset or count > 32 or len(payload) != 6 + (count + 7) // 8:
                raise Broken(f"GET_DEVICES from {offset}: {payload.hex()}")
            bits = int.from_bytes(payload[6:], "little")
            found += [offset + n for n in range(count) if bits >> n & 1]
            if count == 0 or following <= offset:
                break
            offset = following
        return found

    def ping(self, data):
        answer = self.call(BUS_PING, 0, struct.pack("<I", data), bus=True, size=4)
        if answer.u32() != data:
            raise Broken(f"PING {data:#x} came back as {answer}")

    def is_absent(self, dev):
        return not any(self.call(GET_DEVICE_INFO, dev, size=24).payload)
