# SPDX-License-Identifier: Apache-2.0 OR MIT
"""The bus `linux-user`: two queue files, a doorbell socket and the guest's memory in a file.

Written from the byte formats alone. Atomicity: indices are aligned 32-bit words that are stored
through a memoryview, which on x86 is one store, and x86 keeps stores in order; a slot is written
before its head is.
"""

import errno
import mmap
import os
import select
import socket
import time

QUEUE_BYTES = 262_272
SLOT = 64
FIRST_SLOT = 0x80
CAPACITY = (QUEUE_BYTES - FIRST_SLOT) // SLOT
HEAD, TAIL = 0x00 // 4, 0x40 // 4  # positions of the 32-bit words
BELL = b"\xed"


class Hangup(Exception):
    """The other side closed the doorbell socket or died."""


class Broken(AssertionError):
    """The other side did what no peer may do."""


class Queue:
    """One queue file, of which we are the producer or the consumer.

    Our own index is kept here and compared with the file at each use: nobody else may write it.
    """

    def __init__(self, path, producer):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < QUEUE_BYTES:
                os.ftruncate(fd, QUEUE_BYTES)
            self.bytes = mmap.mmap(fd, QUEUE_BYTES)
        finally:
            os.close(fd)
        self.words = memoryview(self.bytes).cast("I")
        self.path = path
        self.mine, self.theirs = (HEAD, TAIL) if producer else (TAIL, HEAD)
        self.index = self._load(self.mine)

    def _load(self, word):
        value = self.words[word]
        if value >= CAPACITY:
            raise Broken(f"{self.path}: index {value} of {CAPACITY}")
        return value

    def _own(self):
        if self.words[self.mine] != self.index:
            raise Broken(f"{self.path}: our index {self.index} became {self.words[self.mine]}")
        return self.index

    def resume(self):
        """Goes on where the file says, after somebody else was in our place."""
        self.index = self._load(self.mine)

    def used(self):
        """Messages that are in the queue."""
        head, tail = self._load(HEAD), self._load(TAIL)
        return (head - tail) % CAPACITY

    def push(self, message):
        """Puts a message in; False if the queue is full."""
        head = self._own()
        following = (head + 1) % CAPACITY
        if following == self._load(self.theirs):
            return False
        at = FIRST_SLOT + head * SLOT
        self.bytes[at : at + len(message)] = message
        self.index = following
        self.words[self.mine] = following
        return True

    def pop(self):
        """Takes the 64 bytes of a slot out; None if the queue is empty."""
        tail = self._own()
        if tail == self._load(self.theirs):
            return None
        at = FIRST_SLOT + tail * SLOT
        slot = bytes(self.bytes[at : at + SLOT])
        self.index = (tail + 1) % CAPACITY
        self.words[self.mine] = self.index
        return slot


class Bus:
    """One end of a bus; `side` is "driver" or "device"."""

    def __init__(self, folder, side, listen, name="linux-user", sock="linux-user.socket"):
        to_device = os.path.join(folder, f"queue-{name}-driver")
        to_driver = os.path.join(folder, f"queue-{name}-device")
        driver = side == "driver"
        self.tx = Queue(to_device if driver else to_driver, True)
        self.rx = Queue(to_driver if driver else to_device, False)
        self.path = os.path.join(folder, sock)
        self.listener = None
        self.sock = None
        # As QEMU: a doorbell that nobody reads stops us for good. Here it is an error after so many seconds.
        self.stuck_after = None
        if listen:
            self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.listener.bind(self.path)

    def start_listening(self):
        """Lets peers connect. Separate from binding, as there may be any time between the two."""
        self.listener.listen(1)

    def join(self, timeout=60.0):
        """Waits for the other side, and takes away what was left for somebody before us."""
        deadline = time.monotonic() + timeout
        if self.listener is not None:
            self.listener.settimeout(timeout)
            self.sock = self.listener.accept()[0]
        else:
            while True:
                self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                try:
                    self.sock.connect(self.path)
                    break
                except OSError as error:
                    self.sock.close()
                    known = (errno.ENOENT, errno.ECONNREFUSED)
                    if error.errno not in known or time.monotonic() > deadline:
                        raise
                # The standard library has no inotify.
                time.sleep(0.02)
        self.sock.setblocking(False)
        return self

    def discard(self):
        """Throws away what somebody before us did not read."""
        while self.rx.pop() is not None:
            pass

    def leave(self):
        """Closes the doorbell socket."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None

    def ring(self):
        """Rings once, as each message must.

        A full socket is as good as a ring, unless we are to act as QEMU.
        """
        while True:
            try:
                self.sock.send(BELL)
                return
            except BlockingIOError:
                if self.stuck_after is None:
                    return
                if not select.select([], [self.sock], [], self.stuck_after)[1]:
                    raise Broken("the doorbell is not read: QEMU would be stuck for good") from None
            except (BrokenPipeError, ConnectionResetError):
                raise Hangup from None

    def try_send(self, message):
        """Sends a message; False if the queue is full."""
        if not self.tx.push(message):
            return False
        self.ring()
        return True

    def send(self, message, timeout=60.0):
        """Sends a message, waiting for room. Nobody tells of room, so this looks again and again."""
        deadline = time.monotonic() + timeout
        while not self.try_send(message):
            if time.monotonic() > deadline:
                raise Broken("no room in the queue")
            self.wait(0.002)

    def wait(self, timeout):
        """Waits for a doorbell and takes all rings there are."""
        if not select.select([self.sock], [], [], max(timeout, 0))[0]:
            return False
        try:
            if self.sock.recv(65_536) == b"":
                raise Hangup
        except ConnectionResetError:
            raise Hangup from None
        except BlockingIOError:
            return False
        return True

    def recv(self, timeout):
        """The next slot; None if there is none in time."""
        deadline = time.monotonic() + timeout
        while True:
            slot = self.rx.pop()
            if slot is not None:
                return slot
            rest = deadline - time.monotonic()
            if rest <= 0:
                return None
            try:
                self.wait(rest)
            except Hangup:
                slot = self.rx.pop()
                if slot is None:
                    raise
                return slot


class Ram:
    """The guest's memory: a shared file, whose first `low` bytes lie at `base` and the rest behind a hole."""

    def __init__(self, path, size=16 << 20, base=0x4000_0000, low=None, hole=0):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            if os.fstat(fd).st_size < size:
                os.ftruncate(fd, size)
            self.bytes = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        view = memoryview(self.bytes)
        self.halves = view.cast("H")
        self.words = view.cast("I")
        self.size = size
        self.base = base
        self.low = size if low is None else low
        self.hole = hole
        # Where the next buffer is taken from, in each part.
        self.next = [0x10_000, self.low + 0x10_000]

    def offset(self, address, length=1):
        """Where in the file `length` bytes at a bus address are."""
        at = address - self.base
        if 0 <= at <= at + length <= self.low:
            return at
        at -= self.hole
        if self.low <= at <= at + length <= self.size:
            return at
        raise Broken(f"no memory at {address:#x}, {length} bytes")

    def alloc(self, length, align=4096, high=False):
        """Takes zeroed memory that is never given back; gives its bus address."""
        part = 1 if high and self.low < self.size else 0
        at = -(-self.next[part] // align) * align
        if at + length > (self.size if part else self.low):
            raise MemoryError("the guest's memory is used up")
        self.next[part] = at + length
        self.bytes[at : at + length] = bytes(length)
        return self.base + at + (self.hole if part else 0)

    def read(self, address, length):
        at = self.offset(address, length)
        return bytes(self.bytes[at : at + length])

    def write(self, address, data):
        at = self.offset(address, len(data))
        self.bytes[at : at + len(data)] = data

    def load16(self, address):
        return self.halves[self.offset(address, 2) // 2]

    def store16(self, address, value):
        self.halves[self.offset(address, 2) // 2] = value & 0xFFFF


def add_arguments(parser):
    """The arguments that all programs here share."""
    parser.add_argument("--dir", required=True, help="where queue files and socket are")
    parser.add_argument("--listen", action="store_true", help="listen for the peer; else connect")
    parser.add_argument("--revision", choices=["1", "r1"], default="1")
    parser.add_argument("--ram", default="ram", help="file in the folder")
    parser.add_argument("--ram-size", type=lambda text: int(text, 0), default=16 << 20)
    parser.add_argument("--low", type=lambda text: int(text, 0), default=None)
    parser.add_argument("--hole", type=lambda text: int(text, 0), default=0)
    parser.add_argument("--base", type=lambda text: int(text, 0), default=0x4000_0000)
    import ivshmem

    ivshmem.add_arguments(parser)


def open_bus(args, side, linux_user=Bus):
    """The bus that the arguments name; `linux_user` is the class of the one with a socket as doorbell."""
    if args.ivshmem:
        import ivshmem

        return ivshmem.open_bus(args, side)
    return linux_user(args.dir, side, args.listen)


def open_ram(args):
    path = os.path.join(args.dir, args.ram)
    return Ram(path, size=args.ram_size, base=args.base, low=args.low, hole=args.hole)
