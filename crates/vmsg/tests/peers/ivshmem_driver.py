# SPDX-License-Identifier: Apache-2.0 OR MIT
"""What only happens on the bus `ivshmem`: `ivshmem_driver.py --dir FOLDER --ivshmem SOCKET SCENARIO…`.

`amp_…` is for the layout that describes itself, as Linux's driver of 2026 uses it; `spsc_…` for the
two pages, as Linux's driver of 2025 does.
"""

import struct
import time

import driver as plain
import rev1
from bus import Broken
from driver import ENTROPY, Entropy, check, check_random, say
from ivshmem import HEAD, INIT, MAGIC, READY, RUN, SHUTDOWN, STATUS, TAIL
from linux_driver import Old, as_driver, run_entropy
from rev1 import BUS, RESPONSE

CANARY = 0xA5
# A side that is not rung has to look by itself; nobody's guest bears more.
LOOK = 20.0


def again(setting):
    """A new driver on the same memory, without any word of the last one's end. No module is loaded faster: a doorbell that
    is on its way is for nobody.
    """
    time.sleep(0.05)
    setting.bus.probe()
    return setting.begin()


def wild(bus, word, value):
    """Puts a value into our own queue head, behind our own back."""
    bus.halves[bus._heads()[0] // 2 + word] = value


def works(setting, before=()):
    """An entropy device from the beginning on, and nothing that was not asked for, or only by one of the drivers `before`."""
    check_random(Entropy(setting).fetch(4096))
    strays = [m for m in setting.driver.strays if not any(driver.has_asked(m) for driver in before)]
    check(not strays, strays[:3])


def amp_layout(setting):
    """What Linux's driver checks in the layout, and that ours sees no notification bits change."""
    bus = setting.bus
    layout = bus.layout
    check(layout.size >= 64 and layout.elements >= 2, vars(layout))
    check(bus.peer_state in (READY, RUN), f"the device's state is {bus.peer_state}")
    works(setting)
    check(bus.peer_state == RUN, f"the device's state is {bus.peer_state}")
    if layout.num_notif:
        for at in (layout.dev_notif, layout.drv_notif):
            at += bus.offset
            data = bus.client.memory[at : at + 16 * layout.num_notif]
            check(not any(data), "notification bits:", data.hex())
    say("amp_layout:", layout.elements, "elements of", layout.size)


def amp_shutdown(setting):
    """SHUTDOWN without a doorbell is a reset of all devices; the next driver can begin at any time."""
    bus, ram = setting.bus, setting.ram
    for pause in (0.0, 0.05, 1.5):
        entropy = Entropy(setting)
        check_random(entropy.fetch(4096))
        bus.state = SHUTDOWN
        # The driver's memory is its own from the moment that this is seen.
        bus.until(lambda: bus.peer_state != RUN, LOOK, "the device to see SHUTDOWN")
        check(bus.peer_state in (INIT, READY), f"state {bus.peer_state}: a probe would fail for good")
        area = entropy.ring.used, 6 + 8 * entropy.ring.size
        ram.write(area[0], bytes([CANARY]) * area[1])
        time.sleep(pause)
        check(ram.read(*area) == bytes([CANARY]) * area[1], "written after the shutdown")
        again(setting)
        dev = setting.find(ENTROPY)
        check(setting.driver.status(dev) == 0, "not reset")
        works(setting)
    say("amp_shutdown")


def amp_shutdown_at_once(setting):
    """The next driver is there before anybody can have seen SHUTDOWN."""
    for _ in range(20):
        works(setting)
        setting.bus.state = SHUTDOWN
        again(setting)
    works(setting)
    say("amp_shutdown_at_once")


def amp_reset(setting):
    """A guest that is reset says nothing: INIT, READY and RUN follow each other at once, at any position of the queues.

    No answer to the guest before is taken for one to this one.
    """
    bus = setting.bus
    count = bus.layout.elements
    for position in (0, 1, 2, 3, 7, count - 2, count - 1, count, count + 1, 2 * count + 5):
        for n in range(position):
            setting.driver.ping(n)
        again(setting)
        # Each request has an answer of its own.
        for n in range(3):
            setting.driver.ping(0x1000 + n)
        works(setting)
        check(bus.peer_state == RUN, bus.peer_state)
    say("amp_reset")


def amp_reset_in_mid_request(setting):
    """The guest is reset while its requests are on the way, and while answers wait for it."""
    bus = setting.bus
    count = bus.layout.elements
    for waiting in (1, 3, count // 2, count - 1):
        works(setting)
        for n in range(waiting):
            message = rev1.encode(BUS, rev1.BUS_PING, 0, 0x5000 + n, struct.pack("<I", n))
            check(bus.tx.push(message), "full")
        if waiting % 2:
            bus.ring()
        # No guest boots faster, and the doorbells of the answers are for nobody.
        time.sleep(0.6)
        again(setting)
        setting.driver.ping(0xBEEF)
        old = [stray for stray in setting.driver.strays if 0x5000 <= stray.token < 0x5000 + waiting]
        check(not old, "answers to the guest before:", old[:3])
        setting.driver.strays.clear()
        works(setting)
    say("amp_reset_in_mid_request")


def amp_slow_beginning(setting):
    """A driver that stays in INIT, and one that has gone as far as READY: the device waits, and takes no message."""
    bus = setting.bus
    works(setting)
    bus.state = INIT
    bus.until(lambda: bus.peer_state != RUN, LOOK, "the device to see INIT")
    check(bus.peer_state in (INIT, READY), bus.peer_state)
    again(setting)
    works(setting)
    say("amp_slow_beginning")


def amp_wild(setting):
    """Indices, states and magic numbers that cannot be: the device lives, and serves the next driver."""
    bus = setting.bus
    count = bus.layout.elements
    cases = [(TAIL, count), (TAIL, 0xFFFF), (HEAD, count), (HEAD, 0x7FFF)]
    cases += [(STATUS, 0x1F), (STATUS, 5), (MAGIC, 0), (MAGIC, 0xFFFF)]
    for word, value in cases:
        works(setting)
        wild(bus, word, value)
        for _ in range(5):
            bus.ring()
            bus.wait(0.05)
        again(setting)
        works(setting)
    say("amp_wild:", len(cases))


def amp_layout_written(setting):
    """The layout is the device's; a driver that writes into it harms itself alone."""
    bus = setting.bus
    layout = bytes(bus.client.memory[bus.offset : bus.offset + 64])
    for data in (b"\xff" * 64, bytes(64)):
        works(setting)
        bus.client.memory[bus.offset : bus.offset + 64] = data
        for _ in range(5):
            bus.ring()
            bus.wait(0.05)
        bus.client.memory[bus.offset : bus.offset + 64] = layout
        again(setting)
        works(setting)
    say("amp_layout_written")


def lost_doorbells(setting):
    """Doorbells get lost: what was sent is found with the next one, or by looking from time to time."""
    bus, driver = setting.bus, setting.driver
    dev = setting.find(ENTROPY)
    for n in range(3):
        token = driver.new_token()
        check(bus.tx.push(rev1.encode(BUS, rev1.BUS_PING, 0, token, struct.pack("<I", n))), "full")
        begin = time.monotonic()
        driver.answer(rev1.BUS_PING, 0, token, bus=True)
        took = time.monotonic() - begin
        check(took < LOOK, f"{took} s")
    bus.lose = 3
    tokens = [driver.start(rev1.GET_DEVICE_STATUS, dev) for _ in range(6)]
    for token in tokens:
        driver.answer(rev1.GET_DEVICE_STATUS, dev, token)
    bus.lose = 1
    works(setting)
    say("lost_doorbells")


def doorbells_for_nothing(setting):
    """Thousands of doorbells with nothing behind them, on every vector."""
    bus = setting.bus
    for _ in range(5000):
        bus.ring()
    for peer, bells in bus.client.peers.items():
        for vector in range(len(bells)):
            bus.client.ring(peer, vector)
    works(setting)
    say("doorbells_for_nothing")


def left(setting):
    """The driver's machine leaves the server, in the middle of everything, and another one comes.

    The device side may have been ringing for the one that left, and its state and slots stand there until it has seen
    that: whoever is rung so reads the answers of another once more, and knows them by their tokens.
    """
    before = []
    for _ in range(3):
        before.append(setting.driver)
        entropy = Entropy(setting)
        check_random(entropy.fetch(4096))
        entropy.offer(0)
        entropy.ring.publish()
        setting.driver.notify(entropy.dev, 0)
        setting.bus.client.close()
        setting.bus = plain.open_bus(setting.args, "driver")
        setting.connect()
    works(setting, before)
    say("left")


@as_driver(Old)
def pings(setting):
    """PING each second, answers answered with answers, a device in use between them: as long as Linux's driver of 2025
    would find out whether the bus is stale.
    """
    driver, bus = setting.driver, setting.bus
    for beat in range(3):
        end = time.monotonic() + 1
        token = driver.start(rev1.BUS_PING, 0, struct.pack("<I", 1), bus=True)
        driver.answer(rev1.BUS_PING, 0, token, bus=True)
        bus.send(rev1.encode(BUS | RESPONSE, rev1.BUS_PING, 0, token, struct.pack("<I", 1)))
        run_entropy(setting, bits=rev1.VERSION_1)
        while (rest := end - time.monotonic()) > 0:
            message = driver.receive(rest)
            if message is not None:
                check(driver.is_used(message, message.dev, 0), "unasked for:", message)
    check(not driver.strays, "a response was answered:", driver.strays[:3])
    say("pings")


def spsc_as_it_stands(setting):
    """A driver that takes the indices as they stand and zeroes nothing, at any position of the queues."""
    bus = setting.bus
    capacity = bus.tx.CAPACITY
    for position in (0, 1, 2, capacity - 1, capacity, 3):
        for n in range(position):
            setting.driver.ping(n)
        for queue in (bus.tx, bus.rx):
            queue.resume()
        setting.begin()
        works(setting)
    say("spsc_as_it_stands")


def spsc_reset_in_mid_request(setting):
    """A guest that is reset with requests on the way: answers to them come, and are not what the next driver asked for."""
    bus = setting.bus
    for waiting in (1, 5, 60):
        works(setting)
        for n in range(waiting):
            message = rev1.encode(BUS, rev1.BUS_PING, 0, 0x5000 + n, struct.pack("<I", n))
            check(bus.tx.push(message), "full")
        bus.ring()
        for queue in (bus.tx, bus.rx):
            queue.resume()
        setting.begin()
        setting.driver.ping(0xBEEF)
        strange = [stray for stray in setting.driver.strays if not 0x5000 <= stray.token < 0x5000 + waiting]
        check(not strange, strange[:3])
        setting.driver.strays.clear()
        works(setting)
    say("spsc_reset_in_mid_request")


def spsc_wild(setting):
    """Indices that cannot be: the device lives, and serves on once they can be again."""
    bus = setting.bus
    for value in (bus.tx.CAPACITY, 0x7FFF_FFFF, 0xFFFF_FFFF):
        works(setting)
        good = bus.words[bus.tx.mine]
        bus.words[bus.tx.mine] = value
        for _ in range(5):
            bus.ring()
            bus.wait(0.05)
        # Whoever writes such an index begins with empty queues.
        bus.words[bus.tx.mine] = good
        bus.until(lambda: answers(setting), 20.0, "the device to serve on")
        works(setting)
    say("spsc_wild")


def answers(setting):
    """Whether a PING is answered."""
    bus = setting.bus
    for queue in (bus.tx, bus.rx):
        queue.resume()
    try:
        setting.begin()
        setting.driver.timeout = 0.5
        setting.driver.ping(7)
    except Broken:
        return False
    finally:
        setting.driver.timeout = 60.0
    return True


plain.HERE += [amp_layout, amp_shutdown, amp_shutdown_at_once, amp_reset, amp_reset_in_mid_request]
plain.HERE += [amp_slow_beginning, amp_wild, amp_layout_written, lost_doorbells, doorbells_for_nothing]
plain.HERE += [left, spsc_as_it_stands, spsc_reset_in_mid_request, spsc_wild]

if __name__ == "__main__":
    plain.main()
