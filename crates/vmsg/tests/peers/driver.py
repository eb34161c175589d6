# SPDX-License-Identifier: Apache-2.0 OR MIT
"""A driver in the role of a test: `driver.py --dir FOLDER SCENARIO…` against a device side on the
bus `linux-user`.

Each scenario prints a line when it has passed; the first failure ends the program with a traceback.
"""

import argparse
import os
import struct
import sys
import time
import zlib

import dhcp
import r1
import rev1
from bus import Broken, Bus, Hangup, add_arguments, open_bus, open_ram
from rev1 import ACCESS_PLATFORM, ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, VERSION_1
from ring import EVENT_IDX, INDIRECT_DESC, DriverRing, gather

NET, BLOCK, ENTROPY = 1, 2, 4
NET_F_MAC, NET_F_STATUS = 1 << 5, 1 << 16
CANARY = 0xA5


def check(truth, *what):
    if not truth:
        raise Broken(" ".join(map(str, what)))


def say(*words):
    print(*words, flush=True)


class Setting:
    """What a scenario works with."""

    def __init__(self, args):
        self.args = args
        self.ram = open_ram(args)
        self.bus = open_bus(args, "driver", Bus)
        if args.listen:
            if args.late:
                # Somebody who watches the folder sees the socket now, and cannot connect yet.
                time.sleep(0.3)
            self.bus.start_listening()
            say("listening")
        self.driver = None

    def connect(self):
        """Joins the bus; what somebody before us did not read is thrown away."""
        self.bus.join()
        return self.begin()

    def begin(self):
        """A new driver on a bus that is joined."""
        self.bus.discard()
        self.driver = {"1": rev1.Driver, "r1": r1.Driver}[self.args.revision](self.bus)
        return self

    def find(self, kind):
        """The number of the first device of a kind."""
        for dev in range(32):
            if not self.driver.is_absent(dev) and self.driver.info(dev).device == kind:
                return dev
        raise Broken(f"no device of kind {kind}")

    @property
    def revision1(self):
        return self.args.revision == "1"


def negotiate(driver, dev, wanted=0):
    """From reset to FEATURES_OK; gives the features that both sides want."""
    check(driver.set_status(dev, 0) == 0, "reset is done when it is answered")
    check(driver.set_status(dev, ACKNOWLEDGE) == ACKNOWLEDGE)
    check(driver.set_status(dev, ACKNOWLEDGE | DRIVER) == ACKNOWLEDGE | DRIVER)
    offered = driver.features(dev)
    check(offered & VERSION_1, f"VERSION_1 is missing in {offered:#x}")
    accepted = offered & (VERSION_1 | ACCESS_PLATFORM | wanted)
    driver.set_features(dev, accepted)
    status = ACKNOWLEDGE | DRIVER | FEATURES_OK
    check(driver.set_status(dev, status) == status, "FEATURES_OK refused")
    check(driver.status(dev) == status, "status is not what was answered")
    return accepted


def start(driver, dev):
    status = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
    check(driver.set_status(dev, status) == status, "DRIVER_OK refused")


class Entropy:
    """A driver of an entropy device."""

    def __init__(self, setting, wanted=0, size=64):
        self.driver, self.ram = setting.driver, setting.ram
        self.dev = setting.find(ENTROPY)
        features = negotiate(self.driver, self.dev, wanted)
        check(features & wanted == wanted, f"of {wanted:#x} only {features:#x}")
        queue = self.driver.queue(self.dev, 0)
        check(queue.max >= 8, queue)
        self.ring = DriverRing(self.ram, min(size, queue.max), features, high=True)
        self.driver.set_queue(self.dev, 0, self.ring)
        start(self.driver, self.dev)
        self.chains = {}
        # Buffers are taken once and used again.
        self.shapes = [
            [4096],
            [1000, 1000, 1000],
            [64] * 7,
            [1, 4095],
            [16],
            [2, 30, 4000],
        ]
        self.buffers = [self.place(shape, n % 2 == 1) for n, shape in enumerate(self.shapes)]

    def place(self, shape, high):
        return [(self.ram.alloc(length + 16, align=8, high=high), length) for length in shape]

    def offer(self, number):
        parts = self.buffers[number]
        for address, length in parts:
            self.ram.write(address, bytes([CANARY]) * (length + 16))
        indirect = None if not self.ring.indirect else number % 2 == 0
        head = self.ring.add([], parts, indirect)
        if head is not None:
            self.chains[head] = number
        return head is not None

    def take(self, done):
        """What a chain was filled with; the rest must be as it was."""
        head, written = done
        parts = self.buffers[self.chains.pop(head)]
        room = sum(length for _, length in parts)
        check(0 < written <= room, f"{written} bytes of {room}")
        data, left = b"", written
        for address, length in parts:
            got = self.ram.read(address, length + 16)
            size = min(left, length)
            data, left = data + got[:size], left - size
            check(got[size:] == bytes([CANARY]) * (length + 16 - size), "written past what was said")
        return data

    def fetch(self, total):
        """So many random bytes. Looks into the queue only when told to."""
        data = b""
        while len(data) < total:
            todo = list(range(len(self.shapes)))
            while todo or self.chains:
                while todo and self.offer(todo[0]):
                    todo.pop(0)
                if self.ring.publish():
                    self.driver.notify(self.dev, 0)
                done = self.ring.pop()
                if done is not None:
                    data += self.take(done)
                elif not self.driver.wait_event():
                    raise Broken(f"no EVENT_USED; {len(self.chains)} chains are out")
        return data[:total]


def check_random(data):
    blocks = [data[at : at + 16] for at in range(0, len(data), 16)]
    check(len(set(blocks)) == len(blocks), "the same 16 bytes twice")
    check(bytes(16) not in blocks, "zeros")
    check(len(zlib.compress(data)) > len(data) * 0.98, "not random")


def rng(setting):
    """64 KiB in chains of all shapes, plain, by way of tables, and with EVENT_IDX."""
    kinds = [0, INDIRECT_DESC, EVENT_IDX, INDIRECT_DESC | EVENT_IDX]
    offered = setting.driver.features(setting.find(ENTROPY))
    seen = []
    for wanted in kinds:
        if offered & wanted == wanted:
            data = Entropy(setting, wanted).fetch(65_536)
            check_random(data)
            seen.append(data)
    check(len(set(seen)) == len(seen), "the same bytes twice")
    say("rng:", len(seen), "kinds of queue")


def read_mac(driver, dev):
    return b"".join(driver.config(dev, at, 1) for at in range(6))


def net_config(setting):
    """The MAC byte by byte and at once, length 0, and what lies outside."""
    driver, dev = setting.driver, setting.find(NET)
    mac = bytes.fromhex(setting.args.mac.replace(":", ""))
    check(driver.features(dev) & NET_F_MAC, "no MAC")
    check(read_mac(driver, dev) == mac, "the MAC byte by byte")
    check(driver.config(dev, 0, 6) == mac, "the MAC at once")
    check(driver.config(dev, 2, 2) == mac[2:4], "two bytes of it")
    check(driver.config(dev, 0, 4) == mac[:4], "four bytes of it")
    before = driver.status(dev)
    if setting.revision1:
        size = driver.info(dev).config_size
        check(size >= 6, f"{size} bytes of configuration")
        first, nothing = driver.config_with_generation(dev, 0, 0)
        check(nothing == b"", "length 0 has no data")
        again, _ = driver.config_with_generation(dev, 5, 1)
        check(first == again, "the generation changes by itself")
        outside = [(size, 0), (size, 4), (size - 1, 2), (0xFFFF_FFFF, 1), (0xFFFF_FFF0, 28), (1 << 31, 8)]
        outside += [(0, 29), (0, 256), (0, 0xFFFF_FFFF)]
        for offset, length in outside:
            driver.start(rev1.GET_CONFIG, dev, struct.pack("<II", offset, length))
    else:
        check(driver.config_generation(dev) == driver.config_generation(dev))
        for offset in (0x100, 0xFFFF, 0xFF_FFFF):
            for size in (1, 2, 4):
                driver.start(r1.GET_CONFIG, dev, r1.config_head(offset, size))
    # Nothing above may change or stop anything; what is answered at all has no data in it.
    check(driver.status(dev) == before)
    at = 12 if setting.revision1 else 4
    for stray in driver.strays:
        check(stray.id == r1.GET_CONFIG or stray.id == rev1.GET_CONFIG, stray)
        check(not any(stray.payload[at:]), "data from outside:", stray)
    driver.strays.clear()
    check(read_mac(driver, dev) == mac, "the MAC is what it was")
    say("net_config:", mac.hex(":"))


def resets(setting):
    """Eight resets in a row, answered one by one; then the device works."""
    driver, dev = setting.driver, setting.find(ENTROPY)
    Entropy(setting).fetch(1000)
    if setting.revision1:
        tokens = [driver.start(rev1.SET_DEVICE_STATUS, dev, bytes(4)) for _ in range(8)]
        for token in tokens:
            check(driver.answer(rev1.SET_DEVICE_STATUS, dev, token).u32() == 0)
    else:
        for _ in range(8):
            driver.start(r1.SET_DEVICE_STATUS, dev, bytes(4))
    check(driver.status(dev) == 0, "status after the last one")
    for _ in range(8):
        check(driver.set_status(dev, 0) == 0, "reset is done when it is answered")
    check_random(Entropy(setting).fetch(4096))
    say("resets")


def silent_after_reset(setting):
    """What a reset is answered by is the last that the device does: not a byte of memory changes after it, and no event comes."""
    driver, ram = setting.driver, setting.ram
    # One buffer again and again: together more than is done in a moment. The reset is right behind the kick.
    room = (ram.alloc(65_536), 65_536)
    for _ in range(30):
        entropy = Entropy(setting)
        while entropy.ring.add([], [room], indirect=False) is not None:
            pass
        entropy.ring.publish()
        driver.notify(entropy.dev, 0)
        check(driver.set_status(entropy.dev, 0) == 0, "reset is done when it is answered")
        areas = [room, (entropy.ring.used, 6 + 8 * entropy.ring.size)]
        driver.events.clear()
        # The memory may serve another purpose now.
        for address, length in areas:
            ram.write(address, bytes([CANARY]) * length)
        driver.notify(entropy.dev, 0)
        for _ in range(50):
            check(driver.status(entropy.dev) == 0)
        for address, length in areas:
            now = ram.read(address, length)
            check(now == bytes([CANARY]) * length, f"written after the reset: {length - now.count(CANARY)} bytes")
        check(not driver.events, "an event after the reset:", driver.events[:1])
    check_random(Entropy(setting).fetch(4096))
    say("silent_after_reset")


def bus_messages(setting):
    """GET_DEVICES and PING."""
    driver = setting.driver
    present = driver.present()
    check(len(present) >= 2, present)
    for dev in range(32):
        check(driver.is_absent(dev) == (dev not in present), f"device {dev}: {present}")
    answer = driver.call(rev1.BUS_GET_DEVICES, 0, struct.pack("<HH", 0, 32), bus=True)
    at, count, following = struct.unpack_from("<HHH", answer.payload)
    check((at, count, following, len(answer.payload)) == (0, 32, 0, 10), answer)
    for data in (0, 1, 0x1234_5678, 0xFFFF_FFFF):
        driver.ping(data)
    say("bus_messages:", *present)


def scan(setting):
    """All 32 numbers, by asking each."""
    found = [dev for dev in range(32) if not setting.driver.is_absent(dev)]
    check(len(found) >= 1, found)
    kinds = [setting.driver.info(dev).device for dev in found]
    check(ENTROPY in kinds, kinds)
    say("scan:", *(f"{dev}={kind}" for dev, kind in zip(found, kinds)))


def dhcp_offer(setting):
    """A network device in earnest: DISCOVER out by queue 1, OFFER in by queue 0."""
    driver, ram = setting.driver, setting.ram
    dev = setting.find(NET)
    features = negotiate(driver, dev, NET_F_MAC)
    rings = []
    for index in (0, 1):
        queue = driver.queue(dev, index)
        check(queue.max > 0, queue)
        rings.append(DriverRing(ram, min(32, queue.max), features, high=index == 0))
        driver.set_queue(dev, index, rings[-1])
    start(driver, dev)
    receive, transmit = rings
    buffers = {}
    for n in range(8):
        parts = [(ram.alloc(2048, high=n % 2 == 0), 2048)]
        buffers[receive.add([], parts)] = parts
    if receive.publish():
        driver.notify(dev, 0)
    xid = int.from_bytes(os.urandom(4), "big")
    frame = dhcp.discover(read_mac(driver, dev), xid)
    head = ram.alloc(12)
    body = ram.alloc(len(frame), high=True)
    ram.write(body, frame)
    transmit.add([(head, 12), (body, len(frame))], [])
    if transmit.publish():
        driver.notify(dev, 1)
    while True:
        done = receive.pop()
        if done is None:
            check(driver.wait_event(), "no DHCP offer")
            continue
        received = gather(ram, buffers[done[0]])[: done[1]]
        check(struct.unpack_from("<H", received, 10)[0] in (0, 1), "a frame has one buffer here")
        address = dhcp.offer(received[12:], xid)
        if address is not None:
            break
    while (done := transmit.pop()) is None:
        check(driver.wait_event(), "the frame is never given back")
    check(done[1] == 0, "nothing is written into what is sent")
    check(driver.set_status(dev, 0) == 0)
    say("dhcp_offer:", address)


def avail_flood(setting):
    """Thousands of EVENT_AVAIL for queues that are and that are not; no answer, and no harm."""
    entropy = Entropy(setting)
    driver, dev = setting.driver, entropy.dev
    # As a QEMU peer: a doorbell that is not read stops us.
    setting.bus.stuck_after = 10.0
    for n in range(20_000):
        driver.notify(dev if n % 3 else n % 32, n % 5 if n % 7 else 0xFFFF_FFFF - n)
    check_random(entropy.fetch(8192))
    setting.bus.stuck_after = None
    check(not driver.strays, driver.strays[:3])
    say("avail_flood")


def link(setting):
    """The link goes down and up while the device works: an event each time, and the configuration says so.

    Whoever runs us changes the link when we ask for it.
    """
    driver, dev = setting.driver, setting.find(NET)
    features = negotiate(driver, dev, NET_F_MAC | NET_F_STATUS)
    check(features & NET_F_STATUS, "no link status")
    for index in (0, 1):
        driver.set_queue(dev, index, DriverRing(setting.ram, 16, features))
    start(driver, dev)
    check(driver.config(dev, 6, 2) == b"\1\0", "the link is up at first")
    config_event = rev1.EVENT_CONFIG if setting.revision1 else r1.EVENT_CONFIG
    newest = 0
    for state in (b"\0\0", b"\1\0") * 3:
        say("want", "up" if state[0] else "down")
        while driver.config(dev, 6, 2) != state or not driver.events:
            check(driver.wait_event(), "no event of the change")
        for event in driver.events:
            check((event.id, event.dev) == (config_event, dev), event)
            check(event.u32() == 0x0F, "status in", event)
            if setting.revision1:
                generation, offset, length = struct.unpack_from("<III", event.payload, 4)
                check(len(event.payload) == 16 + length, event)
                check(length == 0 or (offset, length) == (6, 2), event)
                check(length == 0 or event.payload[16:] == state, event)
                check(generation > newest, f"generation {generation} after {newest}")
                newest = generation
        driver.events.clear()
    if setting.revision1:
        check(driver.config_with_generation(dev, 0, 0)[0] == newest, "generation")
    say("link")


def iommu(setting):
    """The driver has an IOMMU whose addresses are the memory's own, and says so first."""
    driver, dev = setting.driver, setting.find(ENTROPY)
    driver.start(r1.IOMMU_ENABLE, dev, b"\1")
    check_random(Entropy(setting).fetch(16_384))
    driver.start(r1.IOMMU_ENABLE, dev, b"\0")
    check_random(Entropy(setting).fetch(16_384))
    say("iommu")


def restart(setting):
    """Fetches until the device side is gone, joins the next one and begins anew, `--rounds` times.

    A device side that dies may take a connection yet, so there can be more hang-ups than rounds.
    """
    done = 0
    while True:
        try:
            entropy = Entropy(setting)
            check_random(entropy.fetch(4096))
            done += 1
            say("up", done)
            if done == setting.args.rounds:
                break
            while True:
                entropy.fetch(4096)
        except Hangup:
            say("hangup")
            setting.connect()
    say("restart")


def hold(setting):
    """Works, then waits for a line or the end of the input, then works on the same queue."""
    entropy = Entropy(setting)
    check_random(entropy.fetch(4096))
    say("up")
    sys.stdin.readline()
    check_random(entropy.fetch(4096))
    say("hold")


def second(setting):
    """We are one too many until we get a line; what we do before is to connect, and that may be refused.

    Once the first driver has gone it is our turn.
    """
    setting.bus.join()
    say("connected")
    sys.stdin.readline()
    for queue in (setting.bus.tx, setting.bus.rx):
        queue.resume()
    try:
        setting.bus.wait(0)
        data = Entropy(setting.begin()).fetch(4096)
    except Hangup:
        say("was refused")
        data = Entropy(setting.connect()).fetch(4096)
    check_random(data)
    say("second")


def disk(setting):
    """60 bytes of configuration in the pieces that go into a message, byte by byte, and one sector."""
    driver, ram, dev = setting.driver, setting.ram, setting.find(BLOCK)
    pieces = driver.config(dev, 0, 28) + driver.config(dev, 28, 28) + driver.config(dev, 56, 4)
    check(pieces == b"".join(driver.config(dev, at, 1) for at in range(60)), "pieces and bytes differ")
    features = negotiate(driver, dev)
    ring = DriverRing(ram, 16, features)
    driver.set_queue(dev, 0, ring)
    start(driver, dev)
    head, sector, status = ram.alloc(16), ram.alloc(512), ram.alloc(1)
    ram.write(head, struct.pack("<IIQ", 0, 0, 5))
    ram.write(status, b"\xff")
    ring.add([(head, 16)], [(sector, 512), (status, 1)])
    if ring.publish():
        driver.notify(dev, 0)
    while (done := ring.pop()) is None:
        check(driver.wait_event(), "no sector")
    check(done[1] == 513 and ram.read(status, 1) == b"\0", done)
    check(ram.read(sector, 512) == struct.pack("<Q", 5) * 64, "not what stands in sector 5")
    say("disk:", struct.unpack_from("<Q", pieces)[0], "sectors")


def last(setting):
    """Another driver was killed; this one finds everything as if it were the first."""
    check_random(Entropy(setting).fetch(16_384))
    say("last")


HERE = [rng, net_config, resets, silent_after_reset, bus_messages, scan, dhcp_offer, avail_flood]
HERE += [link, iommu, restart, hold, second, disk, last]


def main():
    import hostile_driver

    scenarios = {scenario.__name__: scenario for scenario in HERE + hostile_driver.HERE}
    parser = argparse.ArgumentParser(description=__doc__)
    add_arguments(parser)
    parser.add_argument("scenarios", nargs="+", choices=sorted(scenarios))
    parser.add_argument("--mac", default="52:54:00:12:34:56")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--late", action="store_true", help="listen some time after the socket exists")
    args = parser.parse_args()
    setting = Setting(args)
    if args.scenarios != ["second"]:
        setting.connect()
    for name in args.scenarios:
        scenarios[name](setting)
    setting.bus.leave()
    say("passed")


if __name__ == "__main__":
    main()
