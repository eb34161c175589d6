# SPDX-License-Identifier: Apache-2.0 OR MIT
"""Scenarios of driver.py in which the driver breaks the rules or their spirit. After each the
device side works as before.
"""

import struct
import time

import r1
import rev1
from bus import CAPACITY, Broken, Hangup
from driver import ENTROPY, Entropy, check, check_random, say
from rev1 import BUS, RESPONSE


def raw(kind, id, dev, token, size, payload=b""):
    """A message whose size field is whatever we say."""
    return (rev1.HEADER.pack(kind, id, dev, token, size) + payload)[:64]


def bad_messages(dev):
    """(what it is, bytes) of messages that nobody may answer."""

    def whole(what, kind, id, number, payload=b"", token=0x7001):
        return what, raw(kind, id, number, token, 8 + len(payload), payload)

    yield "size 0", raw(0, rev1.GET_DEVICE_INFO, dev, 0x7000, 0)
    yield "size 7", raw(0, rev1.GET_DEVICE_INFO, dev, 0x7000, 7)
    for size in (49, 56, 64, 65, 0xFFFF):
        yield f"size {size}", raw(0, rev1.GET_DEVICE_STATUS, dev, 0x7000, size, bytes(56))
    yield "all ones", b"\xff" * 64
    for id in (0x00, 0x01, 0x0D, 0x20, 0x3F, 0x43, 0x7F, 0x80, 0xC0, 0xFF):
        yield whole(f"unknown message {id:#x}", 0, id, dev)
        yield whole(f"unknown message {id:#x} with payload", 0, id, dev, bytes(range(40)))
    for id in (0x00, 0x01, 0x04, 0x3F, 0x41, 0x7F, 0xC5, 0xFF):
        yield whole(f"unknown bus message {id:#x}", BUS, id, 0, bytes(12))
    for id in (rev1.GET_DEVICE_INFO, rev1.GET_DEVICE_STATUS, rev1.SET_DEVICE_STATUS, rev1.SET_VQUEUE):
        yield whole(f"a response {id:#x} that nobody asked for", RESPONSE, id, dev, bytes(40))
    yield whole("a response to PING", BUS | RESPONSE, rev1.BUS_PING, 0, b"\1\0\0\0")
    yield whole("a response to an event", RESPONSE, rev1.EVENT_AVAIL, dev)
    for id in (rev1.EVENT_CONFIG, rev1.EVENT_USED):
        yield whole(f"event {id:#x} of the other direction", 0, id, dev, bytes(16), token=0)
    yield whole("EVENT_DEVICE of the other direction", BUS, rev1.BUS_EVENT_DEVICE, 0, bytes(4), token=0)
    # Too little payload.
    words = {
        rev1.GET_DEVICE_FEATURES: 7,
        rev1.SET_DRIVER_FEATURES: 8,
        rev1.GET_CONFIG: 7,
        rev1.SET_CONFIG: 11,
        rev1.SET_DEVICE_STATUS: 3,
        rev1.GET_VQUEUE: 3,
        rev1.SET_VQUEUE: 39,
        rev1.RESET_VQUEUE: 2,
        rev1.GET_SHM: 0,
        rev1.EVENT_AVAIL: 7,
    }
    for id, length in words.items():
        token = 0 if id == rev1.EVENT_AVAIL else 0x7002
        yield whole(f"{length} bytes for {id:#x}", 0, id, dev, b"\1" * length, token)
    yield whole("two blocks said, one there", 0, rev1.SET_DRIVER_FEATURES, dev, struct.pack("<III", 0, 2, 1))
    yield whole("2^32 blocks said", 0, rev1.SET_DRIVER_FEATURES, dev, struct.pack("<III", 0, 0xFFFF_FFFF, 1))
    yield whole("more answer than fits", 0, rev1.GET_DEVICE_FEATURES, dev, struct.pack("<II", 0, 9))
    yield whole("2^32 blocks wanted", 0, rev1.GET_DEVICE_FEATURES, dev, struct.pack("<II", 0, 0xFFFF_FFFF))
    yield whole("more data said than there", 0, rev1.SET_CONFIG, dev, struct.pack("<IIII", 0, 0, 8, 1))
    yield whole("2^32 bytes said", 0, rev1.SET_CONFIG, dev, struct.pack("<IIII", 0, 0, 0xFFFF_FFFF, 1))
    yield whole("half a PING", BUS, rev1.BUS_PING, 0, b"\1\2")
    yield whole("half a GET_DEVICES", BUS, rev1.BUS_GET_DEVICES, 0, b"\0\0")
    # To devices that are not there, which only tell that they are not.
    for id, payload in (
        (rev1.GET_DEVICE_STATUS, b""),
        (rev1.SET_DEVICE_STATUS, bytes(4)),
        (rev1.GET_VQUEUE, bytes(4)),
        (rev1.GET_CONFIG, bytes(8)),
    ):
        for number in (17, 32, 0xFFFF):
            yield whole(f"{id:#x} to device {number}", 0, id, number, payload)


def bad_old_messages(dev):
    """The same for 40-byte messages."""
    for id in (0x00, 0x01, 0x0E, 0x13, 0x3F, 0x7F, 0xFF):
        yield f"unknown message {id:#x}", r1.encode(0, id, dev, bytes(range(36)))
    for id in (r1.DEVICE_INFO, r1.GET_DEVICE_STATUS, r1.GET_VQUEUE):
        yield f"a response {id:#x} that nobody asked for", r1.encode(1, id, dev)
    for id in (r1.EVENT_CONFIG, r1.EVENT_USED):
        yield f"event {id:#x} of the other direction", r1.encode(0, id, dev)
    yield "all ones", b"\xff" * 40


def malformed(setting):
    """Bad messages are dropped without an answer, and the good request behind each is answered."""
    driver, dev = setting.driver, setting.find(ENTROPY)
    check(driver.set_status(dev, 0) == 0)
    wrong = []
    messages = list(bad_messages(dev) if setting.revision1 else bad_old_messages(dev))
    for what, message in messages:
        setting.bus.send(message)
        check(driver.status(dev) == 0, what)
        if setting.revision1:
            driver.ping(0xABCD)
        wrong += [(what, stray) for stray in driver.strays]
        driver.strays.clear()
    check(not wrong, "answered:", *wrong)
    if setting.revision1:
        # The reserved bits of the type are ignored, though.
        token = driver.new_token()
        setting.bus.send(raw(0xFC, rev1.GET_DEVICE_STATUS, dev, token, 8))
        driver.answer(rev1.GET_DEVICE_STATUS, dev, token)
    check_random(Entropy(setting).fetch(4096))
    check(not driver.strays, driver.strays)
    say("malformed:", len(messages))


def bad_queues(setting):
    """Queues that cannot be: the device side lives, and works once it is set up rightly."""
    driver, dev = setting.driver, setting.find(ENTROPY)
    base = setting.ram.base
    most = driver.queue(dev, 0).max
    cases = [
        (0, 3, base, base + 4096, base + 8192),
        (0, 0xFFFF_FFFF, base, base + 4096, base + 8192),
        (0, 2 * most, base, base + 4096, base + 8192),
        (0, 8, base + 1, base + 4096, base + 8192),
        (0, 8, 0, 0, 0),
        (0, 8, base + setting.ram.size + setting.ram.hole, base + 4096, base + 8192),
        (0, 8, (1 << 64) - 16, (1 << 64) - 2, (1 << 64) - 4),
        (77, 8, base, base + 4096, base + 8192),
        (0xFFFF_FFFF, 8, base, base + 4096, base + 8192),
    ]
    for index, size, desc, avail, used in cases:
        check(driver.set_status(dev, 0) == 0)
        for status in (1, 3):
            driver.set_status(dev, status)
        driver.set_features(dev, rev1.VERSION_1)
        driver.set_status(dev, 0x0B)
        if setting.revision1:
            fields = (index, 0, size, 0, desc, avail, used)
            driver.start(rev1.SET_VQUEUE, dev, rev1.QUEUE.pack(*fields))
        else:
            driver.start(r1.SET_VQUEUE, dev, struct.pack("<IIQQQ", index, size, desc, avail, used))
        driver.set_status(dev, 0x0F)
        driver.notify(dev, index)
        driver.status(dev)
    driver.strays.clear()
    check_random(Entropy(setting).fetch(4096))
    say("bad_queues:", len(cases))


def full_queue(setting):
    """Requests until nothing moves any more, all answers after that.

    None is lost, and those of each device are in order.
    """
    driver, bus = setting.driver, setting.bus
    devices = driver.present()
    requests = [
        (rev1.GET_DEVICE_STATUS, b""),
        (rev1.GET_VQUEUE, bytes(4)),
        (rev1.GET_CONFIG, bytes(8)),
        (rev1.GET_DEVICE_INFO, b""),
        (rev1.GET_DEVICE_FEATURES, struct.pack("<II", 0, 2)),
    ]
    total = 12_000
    sent = {dev: [] for dev in devices}
    driver.token = 0

    def one_more():
        count = sum(map(len, sent.values()))
        dev = devices[count % len(devices)]
        id, payload = requests[count % len(requests)]
        token = driver.new_token()
        if not bus.try_send(rev1.encode(0, id, dev, token, payload)):
            driver.token -= 1
            return False
        sent[dev].append((id, token))
        return True

    deadline = time.monotonic() + 120
    while bus.rx.used() < CAPACITY - 1 or bus.tx.used() < CAPACITY - 1:
        if sum(map(len, sent.values())) >= total or time.monotonic() > deadline:
            break
        if not one_more():
            bus.wait(0.002)
    filled = sum(map(len, sent.values()))
    check(filled >= 2 * (CAPACITY - 1), f"stuck after {filled}; {bus.tx.used()} and {bus.rx.used()} wait")
    answers = {dev: [] for dev in devices}
    count = 0
    while count < total:
        while sum(map(len, sent.values())) < total and one_more():
            pass
        message = driver.receive()
        check(message is not None, f"{count} answers to {total} requests")
        check(message.response and message.dev in answers, message)
        answers[message.dev].append((message.id, message.token))
        count += 1
    check(answers == sent, "answers out of order")
    check(bus.rx.pop() is None, "one answer too many")
    driver.ping(5)
    say("full_queue:", filled, "before the first answer was read")


def unread_events(setting):
    """We look into the ring alone and leave all events unread, until no more fit.

    The device works on, and tells us again once there is room.
    """
    entropy = Entropy(setting)
    driver, bus, dev = setting.driver, setting.bus, entropy.dev
    served, deadline = 0, time.monotonic() + 120
    while bus.rx.used() < CAPACITY - 1 or served < CAPACITY + 500:
        check(time.monotonic() < deadline, f"stuck after {served}; {bus.rx.used()} events wait")
        check(entropy.offer(4), "full")
        entropy.ring.publish()
        driver.notify(dev, 0)
        while (done := entropy.ring.pop()) is None:
            check(time.monotonic() < deadline, f"the device stands still after {served}")
            # Only to take the rings away.
            bus.wait(0.001)
        entropy.take(done)
        served += 1
        if served > 4 * CAPACITY:
            # Events may be merged, so perhaps the queue is never full.
            break
    waiting = bus.rx.used()
    while bus.rx.used():
        driver.wait_event()
    check(driver.used_events(dev, 0) >= min(waiting, 1), "no event at all")
    check_random(entropy.fetch(8192))
    check(not driver.strays, driver.strays[:3])
    say("unread_events:", served, "served,", waiting, "events were left")


def unread_doorbell(setting):
    """We never read the doorbell socket and only look at the queue: the device side must not get stuck."""
    driver, bus = setting.driver, setting.bus
    dev = setting.find(ENTROPY)
    bus.stuck_after = 10.0
    wait, bus.wait = bus.wait, lambda timeout: time.sleep(0)
    try:
        for _ in range(3000):
            driver.status(dev)
    finally:
        bus.wait = wait
    check_random(Entropy(setting).fetch(4096))
    say("unread_doorbell")


def strange_doorbells(setting):
    """Any number of bytes of any value ring as well as one 0xED."""
    driver, bus = setting.driver, setting.bus
    dev = setting.find(ENTROPY)
    for burst in (b"\0", b"\xff" * 1000, bytes(range(256)), b"\xed" * 278):
        bus.sock.send(burst)
        driver.status(dev)
    for _ in range(100):
        # One ring for two messages.
        if setting.revision1:
            first, second = driver.new_token(), driver.new_token()
            for token in (first, second):
                check(bus.tx.push(rev1.encode(0, rev1.GET_DEVICE_STATUS, dev, token)), "full")
            bus.ring()
            for token in (first, second):
                driver.answer(rev1.GET_DEVICE_STATUS, dev, token)
        else:
            check(bus.tx.push(r1.encode(0, r1.SET_DEVICE_STATUS, dev, bytes(4))), "full")
            check(bus.tx.push(r1.encode(0, r1.GET_DEVICE_STATUS, dev)), "full")
            bus.ring()
            check(driver.answer(r1.GET_DEVICE_STATUS, dev).u32() == 0)
    say("strange_doorbells")


def wild_index(setting):
    """Our head jumps out of the queue: the device side hangs up and lives.

    It serves us once we are sane again.
    """
    bus = setting.bus
    check_random(Entropy(setting).fetch(4096))
    for index in (CAPACITY, 0x7FFF_FFFF, 0xFFFF_FFFF):
        bus.tx.words[0] = index
        try:
            bus.ring()
            while bus.wait(10):
                pass
            raise Broken(f"index {index} is nothing special to the device side")
        except Hangup:
            bus.leave()
        bus.tx.words[0] = bus.tx.index
        setting.connect()
        check_random(Entropy(setting).fetch(4096))
    say("wild_index")


HERE = [malformed, bad_queues, full_queue, unread_events, unread_doorbell, strange_doorbells, wild_index]
