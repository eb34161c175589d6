# SPDX-License-Identifier: Apache-2.0 OR MIT
"""A driver with the habits of QEMU's proxy: `proxy_driver.py --dir FOLDER SCENARIO…`.

It has no event thread. After a request it polls the queue; events that it meets there wait until
the doorbell rings the next time.
"""

import struct
import time

import driver as plain
import r1
import rev1
from bus import Broken, Bus
from driver import NET, Entropy, check, check_random, read_mac, say
from rev1 import ACCESS_PLATFORM, VERSION_1
from ring import EVENT_IDX, INDIRECT_DESC, DriverRing

MOST_QUEUES = 1024
# What the driver of a guest's network device would take, as recorded.
NET_WANTED = 0x30AF_8024 | VERSION_1 | ACCESS_PLATFORM


class PollingBus(Bus):
    """While an answer is awaited the socket is not looked at."""

    polling = False

    def ring(self):
        self.stuck_after = 10.0
        super().ring()

    def wait(self, timeout):
        if self.polling:
            time.sleep(0)
            return True
        return super().wait(timeout)


def polling(kind):
    """A class of drivers that poll for answers, by way of one that waits."""

    class Polling(kind):
        def answer(self, *args, **keys):
            self.bus.polling = True
            try:
                return super().answer(*args, **keys)
            finally:
                self.bus.polling = False

    return Polling


plain.Bus = PollingBus
rev1.Driver = polling(rev1.Driver)
r1.Driver = polling(r1.Driver)


def send_features(driver, dev, bits):
    """One SET_DRIVER_FEATURES, answered."""
    if driver.revision == "1":
        driver.call(rev1.SET_DRIVER_FEATURES, dev, struct.pack("<IIQ", 0, 2, bits), size=0)
    else:
        driver.call(r1.SET_FEATURES, dev, struct.pack("<IQ", 0, bits), bytes(4))


def write_status(driver, dev, status):
    """The old generation has no answer to this; its proxy reads the status after each write."""
    check(driver.set_status(dev, status) == status, f"status {status:#x}")


def probe_queues(driver, dev):
    """GET_VQUEUE 0, 1, 2, … until there is none."""
    found = []
    while len(found) < MOST_QUEUES:
        queue = driver.queue(dev, len(found))
        if queue.max == 0:
            if driver.revision == "1":
                check((queue.size, queue.desc, queue.driver, queue.device) == (0, 0, 0, 0), queue)
            return found
        found.append(queue)
    raise Broken("no end of queues")


def recorded(setting):
    """The whole probe of a network device in the order recorded from QEMU's proxy."""
    driver = setting.driver
    if setting.revision1:
        check(driver.present(), "GET_DEVICES comes first")
    dev = setting.find(NET)
    driver.info(dev)
    offered = driver.features(dev)
    before = probe_queues(driver, dev)
    check(len(before) >= 2, before)
    send_features(driver, dev, 0)
    for _ in range(8):
        write_status(driver, dev, 0)
    send_features(driver, dev, 0)
    write_status(driver, dev, 1)
    write_status(driver, dev, 3)
    accepted = offered & NET_WANTED
    send_features(driver, dev, accepted & 0xFFFF_FFFF)
    send_features(driver, dev, accepted)
    check(probe_queues(driver, dev) == before, "queues before FEATURES_OK")
    write_status(driver, dev, 0x0B)
    mac = read_mac(driver, dev)
    check(mac.hex(":") == setting.args.mac, mac.hex(":"))
    rings = [DriverRing(setting.ram, min(64, queue.max), accepted) for queue in before]
    for index, ring in enumerate(rings):
        driver.set_queue(dev, index, ring)
    after = probe_queues(driver, dev)
    check([queue.max for queue in after] == [queue.max for queue in before], "queues after SET_VQUEUE")
    if setting.revision1:
        for queue, ring in zip(after, rings):
            shown = (queue.size, queue.desc, queue.driver, queue.device)
            check(shown == (ring.size, ring.desc, ring.avail, ring.used), queue)
    write_status(driver, dev, 0x0F)
    for index in (2, 1, 0):
        driver.notify(dev, index)
    check(driver.status(dev) == 0x0F, "status in operation")
    for _ in range(8):
        write_status(driver, dev, 0)
    say("recorded:", len(before), "queues")


def features_in_halves(setting):
    """The half without VERSION_1 harms nobody: what counts is what stands there at FEATURES_OK."""
    driver = setting.driver
    for kind in (NET, plain.ENTROPY):
        dev = setting.find(kind)
        for halves in (1, 2, 3):
            write_status(driver, dev, 0)
            write_status(driver, dev, 1)
            write_status(driver, dev, 3)
            bits = driver.features(dev) & (VERSION_1 | ACCESS_PLATFORM | EVENT_IDX | INDIRECT_DESC)
            parts = {
                1: [bits],
                2: [bits & 0xFFFF_FFFF, bits],
                3: [0, bits & ~0xFFFF_FFFF, bits & 0xFFFF_FFFF, bits],
            }
            for part in parts[halves]:
                send_features(driver, dev, part)
            write_status(driver, dev, 0x0B)
        # The last half is what is refused if it is wrong.
        write_status(driver, dev, 0)
        write_status(driver, dev, 3)
        missing = next(bit for bit in range(24) if not driver.features(dev) >> bit & 1)
        send_features(driver, dev, bits | 1 << missing)
        status = driver.set_status(dev, 0x0B)
        check(not status & 8, f"feature {missing} was not offered, and taken: {status:#x}")
        write_status(driver, dev, 0)
    check_random(Entropy(setting, EVENT_IDX).fetch(4096))
    say("features_in_halves")


def resets_in_a_row(setting):
    """Eight SET_DEVICE_STATUS(0), of a device that runs and of one that does not."""
    driver = setting.driver
    for _ in range(4):
        entropy = Entropy(setting)
        check_random(entropy.fetch(4096))
        for _ in range(8):
            write_status(driver, entropy.dev, 0)
    dev = setting.find(NET)
    for _ in range(16):
        write_status(driver, dev, 0)
    say("resets_in_a_row")


def config_byte_by_byte(setting):
    """A MAC is six GET_CONFIG; the status behind it one of two bytes."""
    driver, dev = setting.driver, setting.find(NET)
    for status in (0, 1, 3):
        write_status(driver, dev, status)
        check(read_mac(driver, dev).hex(":") == setting.args.mac, "MAC at status", status)
    if driver.features(dev) >> 16 & 1:
        link = driver.config(dev, 6, 2)
        check(link == b"\1\0", "link", link.hex())
    say("config_byte_by_byte")


def queues_until_none(setting):
    """Queues are probed by their largest size, before and at FEATURES_OK."""
    driver = setting.driver
    for kind, least in ((NET, 2), (plain.ENTROPY, 1)):
        dev = setting.find(kind)
        write_status(driver, dev, 0)
        before = probe_queues(driver, dev)
        check(len(before) >= least, before)
        plain.negotiate(driver, dev)
        check(len(probe_queues(driver, dev)) == len(before), "as many at FEATURES_OK")
        for index in (len(before) + 1, 1023, 0xFFFF, 0xFFFF_FFFF):
            check(driver.queue(dev, index).max == 0, f"queue {index}")
        write_status(driver, dev, 0)
    say("queues_until_none")


def events_wait(setting):
    """EVENT_USED that come while an answer is polled for: none is lost, none taken for an answer."""
    entropy = Entropy(setting)
    driver, dev = setting.driver, entropy.dev
    for _ in range(200):
        check(entropy.offer(0), "full")
        if entropy.ring.publish():
            driver.notify(dev, 0)
        for _ in range(3):
            check(driver.status(dev) == 0x0F)
        while driver.used_events(dev, 0) == 0:
            check(driver.wait_event(), "no EVENT_USED")
        done = entropy.ring.pop()
        check(done is not None, "told before it was there")
        entropy.take(done)
    check(not driver.strays, driver.strays)
    say("events_wait")


plain.HERE += [
    recorded,
    features_in_halves,
    resets_in_a_row,
    config_byte_by_byte,
    queues_until_none,
    events_wait,
]

if __name__ == "__main__":
    plain.main()
