# SPDX-License-Identifier: Apache-2.0 OR MIT
"""The bus `ivshmem`: a client and a server of QEMU's protocol, and the two ways in which queues lie in
the memory.

Written from the byte formats alone. `AmpBus` and `SpscBus` have what `bus.Bus` has, so that drivers and
devices work over them unchanged. Atomicity is as in bus.py: aligned stores of 16 and 32 bits.
"""

import array
import mmap
import os
import select
import socket
import struct
import threading
import time

import rev1
from bus import Broken, Hangup

VERSION = 0
NUMBER = struct.Struct("<q")

LAYOUT = struct.Struct("<HHHHBBHHH6Q")
LAYOUT_MAGIC, QUEUE_MAGIC = 0x4C4F, 0x514F
INIT, READY, RUN, SHUTDOWN, PEER_DEAD = range(5)
STATE = 0x1F
# Positions of the 16-bit words of a queue head.
MAGIC, STATUS, TAIL, HEAD = range(4)
SLOT = 64


def send_number(sock, number, fd=None):
    """One message of the server's."""
    ancillary = []
    if fd is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([NUMBER.pack(number)], ancillary)


def tell(sock, number, fd=None):
    """The same, to somebody who may have gone."""
    try:
        send_number(sock, number, fd)
    except OSError:
        pass


def receive_number(sock):
    """One message of the server's: a number, and a descriptor or None. `None` when the server is gone."""
    data, ancillary, _, _ = sock.recvmsg(NUMBER.size, socket.CMSG_SPACE(4))
    if not data:
        return None
    fds = array.array("i")
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // 4 * 4])
    if len(data) != NUMBER.size or len(fds) > 1:
        raise Broken(f"a message of {len(data)} bytes with {len(fds)} descriptors")
    return NUMBER.unpack(data)[0], fds[0] if fds else None


class Client:
    """A client of a server: the memory, our vectors, and those of the others."""

    def __init__(self, path, timeout=60.0):
        deadline = time.monotonic() + timeout
        while True:
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self.sock.connect(path)
                break
            except (FileNotFoundError, ConnectionRefusedError):
                self.sock.close()
                if time.monotonic() > deadline:
                    raise
            # The standard library has no inotify.
            time.sleep(0.02)
        self.sock.settimeout(timeout)
        version, fd = self._number()
        if (version, fd) != (VERSION, None):
            raise Broken(f"version {version}, descriptor {fd}")
        self.id, fd = self._number()
        if fd is not None or not 0 <= self.id <= 0xFFFF:
            raise Broken(f"our id is {self.id}, descriptor {fd}")
        minus_one, fd = self._number()
        if minus_one != -1 or fd is None:
            raise Broken(f"{minus_one} instead of the memory, descriptor {fd}")
        self.size = os.fstat(fd).st_size
        self.memory = mmap.mmap(fd, self.size)
        os.close(fd)
        self.vectors, self.peers, self.left = [], {}, []
        # Our own vectors come last; how many there will be is not said.
        while not self.vectors:
            self._take(*self._number())
        self.sock.setblocking(False)
        self.poll()

    def _number(self):
        found = receive_number(self.sock)
        if found is None:
            raise Hangup
        return found

    def _take(self, number, fd):
        if fd is None:
            if number not in self.peers:
                raise Broken(f"peer {number} left, who was not there")
            for bell in self.peers.pop(number):
                os.close(bell)
            self.left.append(number)
        elif number == self.id:
            os.set_blocking(fd, False)
            self.vectors.append(fd)
        else:
            self.peers.setdefault(number, []).append(fd)

    def poll(self):
        """Takes what the server tells; False when it is gone, which changes nothing else."""
        while self.sock is not None:
            try:
                found = receive_number(self.sock)
            except BlockingIOError:
                return True
            except ConnectionResetError:
                found = None
            if found is None:
                self.sock.close()
                self.sock = None
                break
            self._take(*found)
        return False

    def ring(self, peer, vector=0):
        """Rings; False for somebody who is not there."""
        self.poll()
        bells = self.peers.get(peer)
        if bells is None or vector >= len(bells):
            return False
        try:
            os.write(bells[vector], struct.pack("=Q", 1))
        except BlockingIOError:
            pass
        return True

    def wait(self, timeout):
        """Waits for any vector or news, and takes both; whether a vector was rung."""
        files = list(self.vectors) + ([self.sock] if self.sock is not None else [])
        ready = select.select(files, [], [], max(timeout, 0))[0]
        if self.sock in ready:
            self.poll()
        rung = False
        for fd in ready:
            if fd in self.vectors:
                try:
                    os.read(fd, 8)
                    rung = True
                except BlockingIOError:
                    pass
        return rung

    def close(self):
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Server:
    """A server as QEMU's: ids only grow. Its owner is a peer, too, by `connect`."""

    def __init__(self, path, size=1 << 20, vectors=1):
        self.path, self.count, self.next = path, vectors, 0
        self.memory = os.memfd_create("ivshmem", os.MFD_CLOEXEC)
        os.ftruncate(self.memory, size)
        self.clients = {}
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.listener.bind(path)
        self.listener.listen(8)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self):
        while True:
            socks = {sock: id for id, (sock, _) in self.clients.items()}
            for sock in select.select([self.listener, *socks], [], [])[0]:
                if sock is self.listener:
                    self._welcome(sock.accept()[0])
                else:
                    self._gone(socks[sock])

    def _welcome(self, sock):
        id, self.next = self.next, self.next + 1
        bells = [os.eventfd(0, os.EFD_CLOEXEC) for _ in range(self.count)]
        try:
            send_number(sock, VERSION)
            send_number(sock, id)
            send_number(sock, -1, self.memory)
            for other, (old, theirs) in self.clients.items():
                for bell in bells:
                    tell(old, id, bell)
                for bell in theirs:
                    send_number(sock, other, bell)
            for bell in bells:
                send_number(sock, id, bell)
        except OSError:
            sock.close()
            return
        self.clients[id] = (sock, bells)

    def _gone(self, id):
        sock, bells = self.clients.pop(id)
        sock.close()
        for bell in bells:
            os.close(bell)
        for other, _ in self.clients.values():
            tell(other, id)


class IvshmemBus:
    """What both layouts have: doorbells. One ring for each message, to whoever is the peer."""

    def __init__(self, client, offset, peer):
        self.client, self.offset, self.peer = client, offset, peer
        self.halves = memoryview(client.memory).cast("H")
        self.words = memoryview(client.memory).cast("I")
        self.listener = None
        # Doorbells that are lost on purpose: the first of so many in a row is rung.
        self.lose = 1
        self.sent = 0
        # As an interrupt handler: the queue is looked at only when the doorbell was rung, and then until it is empty.
        self.only_rung, self.rung = False, True
        # How often a waiting side looks by itself; Linux's driver takes 1 to 2 s.
        self.look = 0.01

    def ring(self):
        self.sent += 1
        if self.sent % self.lose:
            return
        if self.peer is not None:
            self.client.ring(self.peer)
            return
        self.client.poll()
        for other in list(self.client.peers):
            self.client.ring(other)

    def try_send(self, message):
        """Sends a message; False if the queue is full."""
        if not self.tx.push(message):
            return False
        self.ring()
        return True

    def send(self, message, timeout=60.0):
        """Sends a message, waiting for room."""
        deadline = time.monotonic() + timeout
        while True:
            # Nobody's answer is for the driver that comes next.
            self.check_peer()
            if self.try_send(message):
                return
            if time.monotonic() > deadline:
                raise Broken("no room in the queue")
            self.wait(0.002)

    def wait(self, timeout):
        """Waits for a doorbell; it may have been rung for nothing."""
        rung = self.client.wait(timeout)
        self.rung |= rung
        return rung

    def recv(self, timeout):
        """The next slot; None if there is none in time."""
        deadline = time.monotonic() + timeout
        while True:
            self.check_peer()
            slot = self.rx.pop() if self.can_read() else None
            if slot is not None:
                return slot
            self.rung = False
            rest = deadline - time.monotonic()
            if rest <= 0:
                return None
            self.wait(min(rest, 0.2))

    def discard(self):
        """Throws away what somebody before us did not read; where there is a beginning, that does it."""
        while not self.only_rung and self.rx.pop() is not None:
            pass

    def check_peer(self):
        """Raises Hangup if the other side has begun anew."""

    def can_read(self):
        """Whether the queue is to be looked at."""
        return self.rung or not self.only_rung

    def start_listening(self):
        pass

    def until(self, what, timeout, *words):
        """Looks again and again, as nobody rings for what stands in a queue head."""
        deadline = time.monotonic() + timeout
        while not what():
            if time.monotonic() > deadline:
                raise Broken("waited in vain for", *words)
            self.client.wait(self.look)


class SpscQueue:
    """A page of the memory: index of the producer, of the consumer, 62 slots."""

    CAPACITY = (4096 - 0x80) // SLOT

    def __init__(self, bus, at, producer):
        self.bytes, self.words, self.at = bus.client.memory, bus.words, at
        self.mine, self.theirs = at // 4, (at + 0x40) // 4
        if not producer:
            self.mine, self.theirs = self.theirs, self.mine
        self.resume()

    def _load(self, word):
        value = self.words[word]
        if value >= self.CAPACITY:
            raise Broken(f"index {value} of {self.CAPACITY}")
        return value

    def resume(self):
        """As Linux's driver begins: with the index that stands there."""
        self.index = self._load(self.mine)

    def _own(self):
        if self.words[self.mine] != self.index:
            raise Broken(f"our index {self.index} became {self.words[self.mine]}")

    def used(self):
        head, tail = self._load(self.at // 4), self._load((self.at + 0x40) // 4)
        return (head - tail) % self.CAPACITY

    def push(self, message):
        self._own()
        following = (self.index + 1) % self.CAPACITY
        if following == self._load(self.theirs):
            return False
        at = self.at + 0x80 + self.index * SLOT
        self.bytes[at : at + len(message)] = message
        self.words[self.mine] = self.index = following
        return True

    def pop(self):
        self._own()
        if self.index == self._load(self.theirs):
            return None
        at = self.at + 0x80 + self.index * SLOT
        slot = bytes(self.bytes[at : at + SLOT])
        self.words[self.mine] = self.index = (self.index + 1) % self.CAPACITY
        return slot


class SpscBus(IvshmemBus):
    """Two pages: the driver's queue and the device's. There is no beginning and no end."""

    def __init__(self, client, side, offset=0, peer=None):
        super().__init__(client, offset, peer)
        driver = side == "driver"
        pages = [SpscQueue(self, offset, driver), SpscQueue(self, offset + 4096, not driver)]
        self.tx, self.rx = pages if driver else pages[::-1]

    def join(self, timeout=60.0):
        return self

    def leave(self):
        self.client.close()


class Layout:
    """What the 64 bytes say. Sizes and positions in bytes, from the layout."""

    FIELDS = "magic length version features num_notif vq_notif elements size zero"
    FIELDS += " dev_notif dev_head dev_slots drv_notif drv_head drv_slots"

    def __init__(self, **values):
        for name in self.FIELDS.split():
            setattr(self, name, values[name])

    @classmethod
    def sample(cls, elements=60, size=64):
        """A layout that Linux accepts: positions as in the sample that was seen, for any number of elements."""
        slots = 0x100 + elements * size
        fixed = dict(magic=LAYOUT_MAGIC, length=64, version=1, features=0, zero=0)
        notif = dict(num_notif=0, vq_notif=0, dev_notif=0, drv_notif=0)
        heads = dict(dev_head=0x40, drv_head=0x80)
        return cls(
            **fixed, **notif, **heads, elements=elements, size=size, dev_slots=0x100, drv_slots=-(-slots // 64) * 64
        )

    @classmethod
    def decode(cls, data):
        return cls(**dict(zip(cls.FIELDS.split(), LAYOUT.unpack(data))))

    def encode(self):
        return LAYOUT.pack(*(getattr(self, name) for name in self.FIELDS.split()))

    def check(self, room):
        """All that Linux's driver looks at; `room` is what the memory has from the layout on."""
        if (self.length, self.version, self.zero) != (64, 1, 0) or self.features & ~1:
            raise Broken(f"layout: {vars(self)}")
        if self.num_notif > 64 or self.num_notif and self.vq_notif not in (1, 2, 4, 8, 16):
            raise Broken(f"notifications: {vars(self)}")
        if self.elements < 2 or self.size < 64:
            raise Broken(f"elements: {vars(self)}")
        slots = self.elements * self.size
        regions = [(self.dev_head, 8, 2), (self.drv_head, 8, 2), (self.dev_slots, slots, 1), (self.drv_slots, slots, 1)]
        if self.num_notif:
            bits = self.num_notif * 8 * (3 if self.features & 1 else 2)
            regions += [(self.dev_notif, bits, 8), (self.drv_notif, bits, 8)]
        for at, length, align in regions:
            if at == 0 or at % align or at + length > room:
                raise Broken(f"region {at:#x}+{length:#x}: {vars(self)}")
        regions = sorted([(0, 64, 1)] + regions)
        for (at, length, _), (following, _, _) in zip(regions, regions[1:]):
            if at + length > following:
                raise Broken(f"regions overlap at {following:#x}: {vars(self)}")


class AmpQueue:
    """One direction, from either end. The indices of both directions stand in the heads of their owners."""

    def __init__(self, bus, mine, theirs, slots, producer):
        self.bytes, self.halves = bus.client.memory, bus.halves
        self.slots, self.count, self.size = slots, bus.layout.elements, bus.layout.size
        # The producer has its tail and looks at the other's head.
        self.mine = mine // 2 + (TAIL if producer else HEAD)
        self.theirs = theirs // 2 + (HEAD if producer else TAIL)
        self.resume()

    def _load(self, word):
        value = self.halves[word]
        if value >= self.count:
            raise Broken(f"index {value} of {self.count}")
        return value

    def resume(self):
        self.index = self._load(self.mine)

    def restart(self):
        """Index 0."""
        self.halves[self.mine] = self.index = 0

    def _own(self):
        if self.halves[self.mine] != self.index:
            raise Broken(f"our index {self.index} became {self.halves[self.mine]}")

    def used(self):
        return abs(self._load(self.mine) - self._load(self.theirs)) % self.count

    def push(self, message):
        self._own()
        following = (self.index + 1) % self.count
        if following == self._load(self.theirs):
            return False
        at = self.slots + self.index * self.size
        self.bytes[at : at + len(message)] = message
        self.halves[self.mine] = self.index = following
        return True

    def peek(self):
        """The next slot, which stays."""
        self._own()
        if self.index == self._load(self.theirs):
            return None
        at = self.slots + self.index * self.size
        return bytes(self.bytes[at : at + self.size])

    def pop(self):
        slot = self.peek()
        if slot is None:
            return None
        self.halves[self.mine] = self.index = (self.index + 1) % self.count
        return slot


class AmpBus(IvshmemBus):
    """The layout that describes itself, and its states."""

    def __init__(self, client, side, offset=4096, peer=None, elements=60):
        super().__init__(client, offset, peer)
        self.driver, self.elements = side == "driver", elements
        self.layout = None
        self.seen = None

    def _heads(self):
        heads = self.offset + self.layout.drv_head, self.offset + self.layout.dev_head
        return heads if self.driver else heads[::-1]

    def _slots(self):
        slots = self.offset + self.layout.drv_slots, self.offset + self.layout.dev_slots
        return slots if self.driver else slots[::-1]

    @property
    def state(self):
        return self.halves[self._heads()[0] // 2 + STATUS] & STATE

    @state.setter
    def state(self, state):
        self.halves[self._heads()[0] // 2 + STATUS] = state

    @property
    def peer_state(self):
        return self.halves[self._heads()[1] // 2 + STATUS] & STATE

    @property
    def peer_head(self):
        return self.halves[self._heads()[1] // 2 + HEAD]

    def _queues(self):
        (mine, theirs), (out, into) = self._heads(), self._slots()
        self.tx = AmpQueue(self, mine, theirs, out, True)
        self.rx = AmpQueue(self, mine, theirs, into, False)

    def join(self, timeout=60.0):
        if self.driver:
            self.probe(timeout)
        else:
            self.publish()
        return self

    def find_layout(self, timeout=60.0):
        """Waits for the layout and checks it as Linux's driver does."""
        self.until(lambda: self.halves[self.offset // 2] == LAYOUT_MAGIC, timeout, "the layout")
        self.layout = Layout.decode(self.client.memory[self.offset : self.offset + LAYOUT.size])
        self.layout.check(self.client.size - self.offset)

    def probe(self, timeout=60.0):
        """As Linux's driver of 2026: no doorbell, and what it does not like is the end."""
        self.find_layout(timeout)
        (mine, theirs), (out, _) = self._heads(), self._slots()
        self.only_rung, self.rung = True, False
        length = self.layout.elements * self.layout.size
        self.client.memory[out : out + length] = bytes(length)
        self.state = INIT
        self.halves[mine // 2 + MAGIC] = QUEUE_MAGIC
        self.until(lambda: self.halves[theirs // 2 + MAGIC] == QUEUE_MAGIC, timeout, "the device's queue head")
        if self.peer_state > RUN:
            self.state = SHUTDOWN
            raise Broken(f"the probe fails for good: the device's state is {self.peer_state}")
        for word in (HEAD, TAIL):
            self.halves[mine // 2 + word] = 0
        self.state = READY
        self.until(lambda: self.peer_state != INIT, timeout, "the device to be ready")
        if self.peer_state > RUN:
            self.state = SHUTDOWN
            raise Broken(f"the probe fails for good: the device's state is {self.peer_state}")
        self.state = RUN
        self._queues()
        # What was rung before belonged to somebody else.
        self.client.wait(0)

    def publish(self):
        """As a device that is there first: ready before anybody has come. Then it waits for nobody."""
        if self.layout is None:
            self.layout = Layout.sample(self.elements)
            data = self.layout.encode()
            self.client.memory[self.offset + 2 : self.offset + LAYOUT.size] = data[2:]
            self._queues()
            self._begin()
            self.halves[self.offset // 2] = LAYOUT_MAGIC
        else:
            self._begin()

    def _begin(self):
        mine = self._heads()[0] // 2
        self.state = INIT
        self.tx.restart()
        self.rx.restart()
        self.halves[mine + MAGIC] = QUEUE_MAGIC
        self.state = READY
        self.seen = 0

    def check_peer(self):
        """The device's side: a driver that begins anew has read nothing yet, or says so."""
        if self.driver:
            return
        now = self.peer_head
        unread = (self.tx.index - self.seen) % self.layout.elements
        over = self.peer_state in (INIT, SHUTDOWN)
        if over and self.state == READY:
            return
        # Linux's driver zeroes its slots when it begins.
        zeroed = self.rx.peek() is not None and not any(self.rx.peek())
        if (now - self.seen) % self.layout.elements > unread or over or zeroed:
            self._begin()
            raise Hangup
        self.seen = now
        if self.peer_state == RUN and self.state == READY:
            self.state = RUN

    def can_read(self):
        """The device's side: what stands there before the driver says that it is ready is not for us."""
        return super().can_read() and (self.driver or self.peer_state in (READY, RUN))

    def leave(self):
        """Linux at removal: SHUTDOWN, and no doorbell."""
        if self.layout is not None and self.driver:
            self.state = SHUTDOWN
        if self.driver:
            self.client.close()


def add_arguments(parser):
    parser.add_argument("--ivshmem", help="socket of a server in the folder: the bus is ivshmem")
    parser.add_argument("--serve", action="store_true", help="be the server, too")
    parser.add_argument("--vectors", type=int, default=1)
    parser.add_argument("--layout", choices=["amp", "spsc"], default="amp")
    parser.add_argument("--offset", type=lambda text: int(text, 0), default=None)
    parser.add_argument("--peer", type=int, default=None, help="whom to ring; all others if it is not said")


def open_bus(args, side):
    path = os.path.join(args.dir, args.ivshmem)
    if args.serve:
        Server(path, vectors=args.vectors)
    client = Client(path)
    offset = args.offset
    if args.layout == "amp":
        rev1.MAX = SLOT
        return AmpBus(client, side, 4096 if offset is None else offset, args.peer)
    return SpscBus(client, side, offset or 0, args.peer)
