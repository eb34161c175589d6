# SPDX-License-Identifier: Apache-2.0 OR MIT
"""A device side in the role of a test: an entropy device and a disk on the bus `linux-user`, with
the habits of QEMU on request.

`device.py --dir FOLDER [--quirk NAME]…`; prints "ready" once a driver can connect. Requests are
written to `--log FILE`, one a line.
"""

import argparse
import os
import struct
import sys

import r1
import rev1
from bus import Broken, Bus, Hangup, add_arguments, open_bus, open_ram
from rev1 import ACCESS_PLATFORM, BUS, DRIVER_OK, FEATURES_OK, RESPONSE, VERSION_1
from ring import EVENT_IDX, INDIRECT_DESC, DeviceRing, gather, scatter

VENDOR = int.from_bytes(b"QEMU", "little")
QUIRKS = {
    "silent": "absent devices do not answer either",
    "no-shm": "GET_SHM is never answered",
    "get-devices": "GET_DEVICES is answered with token 0, and the next offset is never 0",
    "same-offset": "GET_DEVICES always names the offset that was asked for as the next one",
    "last-number": "the entropy device is number 31",
    "platform": "ACCESS_PLATFORM is offered, and must be accepted",
    "size-max": "GET_VQUEUE shows the largest size as the current one before set-up",
    "echo": "SET_CONFIG ignores the generation and echoes the request",
    "reset-crash": "RESET_VQUEUE with a huge index crashes",
}
ABORTED = 77  # FEATURES_OK without ACCESS_PLATFORM
CRASHED = 78  # RESET_VQUEUE
SECTORS = 2048


class Device:
    """What all devices have."""

    kind = 0
    sizes = ()
    initial = b""

    def __init__(self, ram, platform):
        self.ram = ram
        self.offered = VERSION_1 | INDIRECT_DESC | EVENT_IDX | (ACCESS_PLATFORM if platform else 0)
        self.config = bytearray(self.initial)
        self.generation = 0
        self.reset()

    def reset(self):
        self.status = 0
        self.accepted = 0
        self.queues = {}
        self.rings = {}

    def set_status(self, status):
        if status == 0:
            self.reset()
            return
        if status & FEATURES_OK and not self.status & FEATURES_OK:
            if self.offered & ~self.accepted & ACCESS_PLATFORM:
                print("aborted: ACCESS_PLATFORM was not accepted", file=sys.stderr, flush=True)
                os._exit(ABORTED)
            if self.accepted & ~self.offered:
                status &= ~FEATURES_OK
        self.status = status

    def set_queue(self, index, size, desc, driver, device):
        if index < len(self.sizes) and 0 < size <= self.sizes[index]:
            self.queues[index] = (size, desc, driver, device)
            self.rings[index] = DeviceRing(self.ram, size, desc, driver, device, self.accepted)

    def work(self, index):
        """Serves a queue; how often the driver must be told."""
        if not self.status & DRIVER_OK or index not in self.rings:
            return 0
        ring, told = self.rings[index], 0
        while (chain := ring.pop()) is not None:
            head, readable, writable = chain
            ring.push(head, self.serve(readable, writable))
            told += ring.must_tell()
        return told


class Entropy(Device):
    kind, sizes = 4, (8,)

    def serve(self, readable, writable):
        return scatter(self.ram, writable, os.urandom(sum(length for _, length in writable)))


class Disk(Device):
    """Sector n holds the number n, 64 times. Its configuration has 60 bytes; byte 32 can be written."""

    kind, sizes = 2, (256,)
    initial = struct.pack("<QIIHBBI", SECTORS, 0, 254, 0, 0, 0, 512).ljust(60, b"\0")

    def serve(self, readable, writable):
        what, _, sector = struct.unpack("<IIQ", gather(self.ram, readable)[:16])
        room = sum(length for _, length in writable) - 1
        if what != 0 or sector + room // 512 > SECTORS:
            data = bytes(room) + b"\2"
        else:
            data = b"".join(struct.pack("<Q", sector + n) * 64 for n in range(room // 512)) + b"\0"
        return scatter(self.ram, writable, data)


class Net(Device):
    """A network device with a MAC and a link, to which nothing is connected: it takes frames and has none."""

    kind, sizes = 1, (256, 256)
    initial = bytes.fromhex("525400123456") + b"\1\0"

    def __init__(self, ram, platform):
        super().__init__(ram, platform)
        self.offered |= 1 << 5 | 1 << 16

    def work(self, index):
        return super().work(index) if index == 1 else 0

    def serve(self, readable, writable):
        return 0


class Host:
    """Devices by number, and the answers to revision-1 messages."""

    def __init__(self, args):
        ram = open_ram(args)
        self.quirks = set(args.quirk)
        platform = "platform" in self.quirks
        entropy, disk = Entropy(ram, platform), Disk(ram, platform)
        if args.revision == "r1":
            self.devices = {args.number: disk if args.only_disk else entropy}
        else:
            self.devices = {31 if "last-number" in self.quirks else 0: entropy, 5: disk}
        if args.net:
            self.devices[1] = Net(ram, platform)
        self.bus = open_bus(args, "device", Bus)
        self.log = open(args.log, "w", buffering=1) if args.log else None

    def note(self, what):
        if self.log is not None:
            print(what, file=self.log)

    def reset(self):
        """The driver is gone."""
        for device in self.devices.values():
            device.reset()

    def run(self, once):
        if self.bus.listener is not None:
            self.bus.start_listening()
        print("ready", flush=True)
        while True:
            self.bus.join(600)
            try:
                while True:
                    slot = self.bus.recv(600)
                    if slot is not None:
                        self.handle(slot)
            except Hangup:
                self.bus.leave()
                self.reset()
                self.note("hangup")
                if once:
                    return

    def handle(self, slot):
        message = rev1.decode(slot)
        if message is None:
            self.note(f"malformed {slot.hex()}")
            return
        space = "bus" if message.bus else "dev"
        self.note(f"{space} {message.id:#04x} {message.dev} {message.payload.hex()}")
        if message.response:
            return
        if not message.bus and message.id == rev1.EVENT_AVAIL:
            self.avail(message)
            return
        try:
            answer = self.bus_answer(message) if message.bus else self.answer(message)
        except struct.error:
            return
        if answer is not None:
            token = message.token
            if message.bus and message.id == rev1.BUS_GET_DEVICES and "get-devices" in self.quirks:
                token = 0
            kind = message.kind | RESPONSE
            self.bus.send(rev1.encode(kind, message.id, message.dev, token, answer))

    def avail(self, message):
        device = self.devices.get(message.dev)
        if device is None or len(message.payload) != 8:
            return
        index = message.u32()
        for _ in range(device.work(index)):
            self.bus.send(rev1.encode(0, rev1.EVENT_USED, message.dev, 0, struct.pack("<I", index)))

    def bus_answer(self, message):
        """The payload of the answer; None for no answer."""
        if message.id == rev1.BUS_PING and len(message.payload) == 4:
            return message.payload
        if message.id != rev1.BUS_GET_DEVICES or len(message.payload) != 4:
            return None
        offset, count = struct.unpack("<HH", message.payload)
        count = min(count, 32)
        if "get-devices" in self.quirks:
            count = count if offset < 32 else 0
            following = (offset + 32) & 0xFFFF or 32
        elif "same-offset" in self.quirks:
            following = offset
        else:
            following = offset + count if any(n >= offset + count for n in self.devices) else 0
        bits = sum(1 << n - offset for n in self.devices if offset <= n < offset + count)
        return struct.pack("<HHH", offset, count, following) + bits.to_bytes(count // 8, "little")

    def answer(self, message):
        device, payload = self.devices.get(message.dev), message.payload
        if device is None:
            absent = message.id == rev1.GET_DEVICE_INFO and "silent" not in self.quirks
            return bytes(24) if absent else None
        match message.id:
            case rev1.GET_DEVICE_INFO:
                counts = (len(device.config), len(device.sizes), 0, 0)
                return struct.pack("<IIIIIHH", device.kind, VENDOR, 64, *counts)
            case rev1.GET_DEVICE_FEATURES:
                first, count = struct.unpack("<II", payload)
                if count > 8:
                    return None
                bits = (device.offered >> 32 * first) & (1 << 32 * count) - 1 if first < 2 else 0
                return payload + bits.to_bytes(4 * count, "little")
            case rev1.SET_DRIVER_FEATURES:
                first, count = struct.unpack_from("<II", payload)
                if len(payload) != 8 + 4 * count or first > 1 or count > 2:
                    return None
                mask = ((1 << 32 * count) - 1) << 32 * first
                bits = int.from_bytes(payload[8:], "little") << 32 * first
                device.accepted = device.accepted & ~mask | bits & mask
                return b""
            case rev1.GET_CONFIG:
                offset, length = struct.unpack("<II", payload)
                if length > rev1.MAX - 20 or offset + length > len(device.config):
                    return None
                data = bytes(device.config[offset : offset + length])
                return struct.pack("<III", device.generation, offset, length) + data
            case rev1.SET_CONFIG:
                return self.set_config(device, payload)
            case rev1.GET_DEVICE_STATUS:
                return struct.pack("<I", device.status)
            case rev1.SET_DEVICE_STATUS:
                device.set_status(*struct.unpack("<I", payload))
                return struct.pack("<I", device.status)
            case rev1.GET_VQUEUE:
                return self.get_queue(device, *struct.unpack("<I", payload))
            case rev1.SET_VQUEUE:
                index, _, size, _, desc, driver, area = rev1.QUEUE.unpack(payload)
                device.set_queue(index, size, desc, driver, area)
                return b""
            case rev1.RESET_VQUEUE:
                (index,) = struct.unpack("<I", payload)
                if index >= len(device.sizes):
                    if "reset-crash" in self.quirks:
                        print(f"crashed: RESET_VQUEUE {index}", file=sys.stderr, flush=True)
                        os._exit(CRASHED)
                    return None
                device.queues.pop(index, None)
                device.rings.pop(index, None)
                return b""
            case rev1.GET_SHM:
                if "no-shm" in self.quirks or len(payload) != 4:
                    return None
                return payload + bytes(8)
        return None

    def set_config(self, device, payload):
        generation, offset, length = struct.unpack_from("<III", payload)
        if len(payload) != 12 + length or offset + length > len(device.config):
            return None
        if "echo" not in self.quirks and generation != device.generation:
            return struct.pack("<III", device.generation, offset, 0)
        for at, byte in enumerate(payload[12:], offset):
            if at == 32:
                device.config[at] = byte
        if "echo" in self.quirks:
            return payload
        device.generation += 1
        now = bytes(device.config[offset : offset + length])
        return struct.pack("<III", device.generation, offset, length) + now

    def get_queue(self, device, index):
        if index >= len(device.sizes):
            return rev1.QUEUE.pack(index, 0, 0, 0, 0, 0, 0)
        most = device.sizes[index]
        unset = (most if "size-max" in self.quirks else 0, 0, 0, 0)
        size, *addresses = device.queues.get(index, unset)
        return rev1.QUEUE.pack(index, most, size, 0, *addresses)


class OldHost(Host):
    """The answers to 40-byte messages. Requests to devices that are not there are dropped."""

    def handle(self, slot):
        message = r1.Message(slot)
        self.note(f"old {message.id:#04x} {message.dev} {message.payload.hex()}")
        device = self.devices.get(message.dev)
        if device is None or message.response:
            return
        if message.id == r1.EVENT_AVAIL:
            index = message.u32()
            for _ in range(device.work(index)):
                self.bus.send(r1.encode(0, r1.EVENT_USED, message.dev, struct.pack("<I", index)))
            return
        answer = self.answer(message, device)
        if answer is not None:
            self.bus.send(r1.encode(RESPONSE, message.id, message.dev, answer))

    def answer(self, message, device):
        payload = message.payload
        match message.id:
            case r1.DEVICE_INFO:
                return struct.pack("<III", 1, device.kind, VENDOR)
            case r1.GET_FEATURES:
                index = message.u32()
                return struct.pack("<IQ", index, 0 if index else device.offered)
            case r1.SET_FEATURES:
                index, bits = struct.unpack_from("<IQ", payload)
                if index == 0:
                    device.accepted = bits
                return payload
            case r1.GET_CONFIG:
                offset, size = int.from_bytes(payload[:3], "little"), payload[3]
                if size not in (1, 2, 4) or offset + size > len(device.config):
                    return None
                return payload[:4] + bytes(device.config[offset : offset + size])
            case r1.GET_CONFIG_GEN:
                return struct.pack("<I", device.generation)
            case r1.GET_DEVICE_STATUS:
                return struct.pack("<I", device.status)
            case r1.SET_DEVICE_STATUS:
                device.set_status(message.u32())
            case r1.GET_VQUEUE:
                index = message.u32()
                most = device.sizes[index] if index < len(device.sizes) else 0
                return struct.pack("<II", index, most)
            case r1.SET_VQUEUE:
                device.set_queue(*struct.unpack_from("<IIQQQ", payload))
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("--quirk", action="append", default=[], choices=sorted(QUIRKS))
    parser.add_argument("--log")
    parser.add_argument("--once", action="store_true", help="end when the driver has gone")
    parser.add_argument("--net", action="store_true", help="a network device as number 1")
    parser.add_argument("--only-disk", action="store_true", help="r1 has one device; make it the disk")
    parser.add_argument("--number", type=int, default=0, help="its number")
    args = parser.parse_args()
    host = (OldHost if args.revision == "r1" else Host)(args)
    try:
        host.run(args.once)
    except Broken as error:
        print(f"the driver broke the rules: {error}", file=sys.stderr, flush=True)
        raise


if __name__ == "__main__":
    main()
