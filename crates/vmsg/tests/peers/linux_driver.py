# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Drivers with the habits of Linux, revision 1: `linux_driver.py --dir FOLDER SCENARIO…`.

`old_…` is the tree of 2025, `new_…` that of 2026.
"""

import struct

import driver as plain
import rev1
from bus import Broken
from driver import ENTROPY, NET, Entropy, check, check_random, say
from rev1 import BUS, FEATURES_OK, RESPONSE
from ring import DriverRing

# Payload of each answer, in bytes; None: depends on the request.
ANSWERS = {
    rev1.GET_DEVICE_INFO: 24,
    rev1.GET_DEVICE_FEATURES: 16,
    rev1.SET_DRIVER_FEATURES: 0,
    rev1.GET_CONFIG: None,
    rev1.SET_CONFIG: None,
    rev1.GET_DEVICE_STATUS: 4,
    rev1.SET_DEVICE_STATUS: 4,
    rev1.GET_VQUEUE: 40,
    rev1.SET_VQUEUE: 0,
    rev1.RESET_VQUEUE: 0,
    rev1.GET_SHM: 12,
}
TRANSPORT_BITS = range(24, 41)
# Those that a split queue as in ring.py can have.
KNOWN_BITS = {28, 29, 32, 33, 35, 40}
RING_RESET = 1 << 40
LONGEST = 28


class Old(rev1.Driver):
    """2025: the token is always 1, so answers are told apart by their order alone."""

    def new_token(self):
        return 1


class New(rev1.Driver):
    """2026: id, device number and size of each answer are checked, and the first bad one is the last."""

    def receive(self, timeout=None):
        message = super().receive(timeout)
        if message is None or message.bus:
            return message
        if message.response:
            size = ANSWERS.get(message.id)
            bad = message.id not in ANSWERS or message.dev not in range(32)
            if bad or size is not None and len(message.payload) != size:
                raise Broken(f"breaks the device for good: {message}")
        elif message.id == rev1.EVENT_CONFIG:
            self.config_event(message)
        return message

    def config_event(self, message):
        if len(message.payload) < 16:
            raise Broken(f"EVENT_CONFIG has at least 24 bytes: {message}")
        status, generation, offset, length = struct.unpack_from("<IIII", message.payload)
        if len(message.payload) != 16 + length:
            raise Broken(f"EVENT_CONFIG must have 24 + {length} bytes: {message}")


def as_driver(kind):
    """Makes a scenario run with another class of drivers."""

    def wrap(scenario):
        def run(setting):
            setting.driver = kind(setting.bus)
            scenario(setting)

        run.__name__ = scenario.__name__
        run.__doc__ = scenario.__doc__
        plain.HERE.append(run)
        return run

    return wrap


def move_status(driver, dev, status):
    """Each status write is preceded by a status read."""
    before = driver.status(dev)
    check(driver.set_status(dev, status) == status, f"status {status:#x} after {before:#x}")
    check(driver.status(dev) == status, "what was answered is what stands there")


def probe(driver, dev, bits=None, extra=0):
    """From INFO to FEATURES_OK; gives the features."""
    info = driver.info(dev)
    check(info.feature_bits == 64, f"needs exactly 64 feature bits: {info}")
    for status in (0, 1, 3):
        move_status(driver, dev, status)
    offered = driver.features(dev)
    accepted = (offered if bits is None else offered & bits) | extra
    driver.call(rev1.SET_DRIVER_FEATURES, dev, struct.pack("<IIQ", 0, 2, accepted), size=0)
    move_status(driver, dev, 0x0B)
    return accepted


def read_config(driver, dev, offset, length):
    """In brackets: the generation before and after must be the same."""
    for _ in range(20):
        first, _ = driver.config_with_generation(dev, 0, 0)
        data, at = b"", offset
        while at < offset + length:
            size = min(LONGEST, offset + length - at)
            data += driver.config(dev, at, size)
            at += size
        last, _ = driver.config_with_generation(dev, 0, 0)
        if first == last:
            return data
    raise Broken("the configuration does not hold still")


def run_entropy(setting, bits=None, extra=0, size=8):
    """An entropy device as Linux brings it up, and 4 KiB from it."""
    driver, dev = setting.driver, setting.find(ENTROPY)
    accepted = probe(driver, dev, bits, extra)
    queue = driver.queue(dev, 0)
    ring = DriverRing(setting.ram, min(size, queue.max), accepted, align=64)
    driver.set_queue(dev, 0, ring)
    move_status(driver, dev, 0x0F)
    buffer = setting.ram.alloc(4096)
    data = b""
    while len(data) < 4096:
        check(ring.add([], [(buffer, 64)]) is not None, "full")
        if ring.publish():
            driver.notify(dev, 0)
        # The first EVENT_AVAIL comes before the last status read.
        check(driver.status(dev) == 0x0F)
        while (done := ring.pop()) is None:
            check(driver.wait_event(), "no EVENT_USED")
        check(0 < done[1] <= 64, done)
        data += setting.ram.read(buffer, done[1])
    check_random(data[: len(data) // 64 * 64])
    return ring


@as_driver(Old)
def old_sequence(setting):
    """The whole sequence with a token that is always 1."""
    run_entropy(setting, bits=rev1.VERSION_1 | rev1.ACCESS_PLATFORM)
    check(not setting.driver.strays, setting.driver.strays)
    say("old_sequence")


@as_driver(Old)
def old_config_in_brackets(setting):
    """GET_CONFIG(0, 0) before and after each read."""
    driver, dev = setting.driver, setting.find(NET)
    probe(driver, dev, bits=rev1.VERSION_1 | 1 << 5)
    info = driver.info(dev)
    whole = read_config(driver, dev, 0, info.config_size)
    check(whole[:6].hex(":") == setting.args.mac, whole.hex())
    for at in range(len(whole)):
        check(read_config(driver, dev, at, 1) == whole[at : at + 1], f"byte {at}")
    move_status(driver, dev, 0)
    say("old_config_in_brackets:", len(whole), "bytes")


@as_driver(Old)
def old_feature_bits(setting):
    """Each device says that it has 64 feature bits, no more and no fewer."""
    kinds = [setting.driver.info(dev) for dev in setting.driver.present()]
    check(all(info.feature_bits == 64 for info in kinds), kinds)
    check(len(kinds) >= 2, kinds)
    say("old_feature_bits")


@as_driver(Old)
def old_reset_of_queues(setting):
    """RESET_VQUEUE at removal although RING_RESET was not negotiated.

    It must be answered, as the driver waits for that.
    """
    for _ in range(3):
        run_entropy(setting, bits=rev1.VERSION_1)
        driver, dev = setting.driver, setting.find(ENTROPY)
        driver.call(rev1.RESET_VQUEUE, dev, bytes(4), size=0)
        move_status(driver, dev, 0)
    say("old_reset_of_queues")


@as_driver(Old)
def old_pings(setting):
    """PING at all times, each answer answered with one more response, which must end there."""
    driver, bus = setting.driver, setting.bus
    payload = struct.pack("<I", 1)
    for count in range(300):
        driver.ping(1)
        bus.send(rev1.encode(BUS | RESPONSE, rev1.BUS_PING, 0, 1, payload))
        if count % 100 == 0:
            run_entropy(setting, bits=rev1.VERSION_1)
    driver.status(setting.find(ENTROPY))
    check(not driver.strays, "a response was answered:", driver.strays[:3])
    say("old_pings")


@as_driver(Old)
def old_get_devices(setting):
    """The answer to (0, 32) has offset 0 and count 32, and so four bytes of devices."""
    driver = setting.driver
    answer = driver.call(rev1.BUS_GET_DEVICES, 0, struct.pack("<HH", 0, 32), bus=True)
    check(len(answer.payload) == 10, answer)
    check(struct.unpack_from("<HH", answer.payload) == (0, 32), answer)
    say("old_get_devices")


@as_driver(New)
def new_strict(setting):
    """Each answer has its id, its device number and exactly its size, on the way from probe to removal."""
    driver = setting.driver
    for dev in range(32):
        driver.is_absent(dev)
    for dev in driver.present():
        info = driver.info(dev)
        read_config(driver, dev, 0, info.config_size)
        for index in range(info.max_queues + 2):
            driver.queue(dev, index)
        shm = driver.call(rev1.GET_SHM, dev, bytes(4), size=12)
        check(shm.u32(0) == 0, shm)
    run_entropy(setting)
    check(not driver.strays, driver.strays)
    about_the_bus = [event for event in driver.events if event.bus]
    check(not about_the_bus, "a device that comes again as the same number breaks it:", about_the_bus)
    say("new_strict")


@as_driver(New)
def new_queue_echo(setting):
    """GET_VQUEUE after SET_VQUEUE shows exactly what was set, for any size and alignment that is allowed."""
    driver = setting.driver
    for kind, queues in ((ENTROPY, 1), (NET, 2)):
        dev = setting.find(kind)
        for size, align in ((8, 16), (4, 64), (2, 4096), (1, 256)):
            accepted = probe(driver, dev, bits=rev1.VERSION_1)
            for index in range(queues):
                ring = DriverRing(setting.ram, size, accepted, align=align, high=size == 4)
                before = driver.queue(dev, index)
                check((before.size, before.desc) == (0, 0), "not set up yet", before)
                driver.set_queue(dev, index, ring)
                queue = driver.queue(dev, index)
                shown = (queue.max, queue.size, queue.desc, queue.driver, queue.device)
                check(shown == (before.max, size, ring.desc, ring.avail, ring.used), queue)
            move_status(driver, dev, 0x0F)
            move_status(driver, dev, 0)
            check(driver.queue(dev, 0).size == 0, "reset has no queues")
    say("new_queue_echo")


@as_driver(New)
def new_used_events(setting):
    """EVENT_USED has exactly 12 bytes, the device's number and a queue that is."""
    entropy = Entropy(setting)
    driver = setting.driver
    for _ in range(50):
        check(entropy.offer(0), "full")
        entropy.ring.publish()
        driver.notify(entropy.dev, 0)
        while (done := entropy.ring.pop()) is None:
            check(driver.wait_event(), "no EVENT_USED")
        entropy.take(done)
    # Only for what is on the way still.
    driver.status(entropy.dev)
    check(driver.events, "no event at all")
    for event in driver.events:
        check(not event.bus and event.id == rev1.EVENT_USED and event.dev == entropy.dev, event)
        check(len(event.payload) == 4 and event.u32() == 0, event)
    say("new_used_events")


@as_driver(New)
def new_config_events(setting):
    """EVENT_CONFIG has exactly 24 + length bytes, and its generation never goes back, not even over resets.

    It is brought about by a queue that we break: the device then needs a reset, and says so.
    """
    driver = setting.driver
    dev, newest, count = setting.find(NET), 0, 0
    for _ in range(5):
        generation, _ = driver.config_with_generation(dev, 0, 0)
        check(generation >= newest, f"generation {generation} after {newest}")
        newest = generation
        accepted = probe(driver, dev, bits=rev1.VERSION_1 | 1 << 5)
        for index in (0, 1):
            ring = DriverRing(setting.ram, 16, accepted)
            driver.set_queue(dev, index, ring)
        move_status(driver, dev, 0x0F)
        setting.ram.store16(ring.avail + 2, 0x8000)
        driver.notify(dev, 1)
        while not any(event.id == rev1.EVENT_CONFIG for event in driver.events):
            check(driver.wait_event(), "no EVENT_CONFIG for a queue that is broken")
        check(driver.status(dev) & rev1.NEEDS_RESET, "status after the event")
        for event in driver.events:
            if event.id == rev1.EVENT_CONFIG:
                status, generation = event.u32(0), event.u32(4)
                check(status & rev1.NEEDS_RESET, event)
                check(generation >= newest, f"generation {generation} after {newest}")
                newest, count = generation, count + 1
        driver.events.clear()
    move_status(driver, dev, 0)
    run_entropy(setting)
    say("new_config_events:", count)


@as_driver(New)
def new_bits_not_offered(setting):
    """VERSION_1 and ACCESS_PLATFORM are set whether or not they were offered, and FEATURES_OK stays."""
    extra = rev1.VERSION_1 | rev1.ACCESS_PLATFORM
    run_entropy(setting, bits=rev1.VERSION_1, extra=extra)
    driver, dev = setting.driver, setting.find(NET)
    probe(driver, dev, bits=rev1.VERSION_1, extra=extra)
    check(driver.status(dev) & FEATURES_OK, "refused")
    move_status(driver, dev, 0)
    say("new_bits_not_offered")


@as_driver(New)
def new_all_transport_bits(setting):
    """The driver takes every transport feature that is offered, so each must work."""
    driver = setting.driver
    for dev in driver.present():
        offered = driver.features(dev)
        bits = {bit for bit in TRANSPORT_BITS if offered >> bit & 1}
        check(bits <= KNOWN_BITS, f"device {dev} offers transport features {sorted(bits - KNOWN_BITS)}")
    ring = run_entropy(setting)
    dev = setting.find(ENTROPY)
    if driver.features(dev) & RING_RESET:
        driver.call(rev1.RESET_VQUEUE, dev, bytes(4), size=0)
        check(driver.queue(dev, 0).size == 0, "a queue that was reset is not set up")
        again = DriverRing(setting.ram, ring.size, driver.features(dev))
        driver.set_queue(dev, 0, again)
        buffer = setting.ram.alloc(64)
        again.add([], [(buffer, 64)])
        again.publish()
        driver.notify(dev, 0)
        while again.pop() is None:
            check(driver.wait_event(), "no EVENT_USED after RESET_VQUEUE")
    say("new_all_transport_bits")


if __name__ == "__main__":
    plain.main()
