# SPDX-License-Identifier: Apache-2.0 OR MIT
"""The split virtqueue, driver side and device side, in plain loads and stores on the guest's
memory.
"""

import struct
import threading

from bus import Broken

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
DESCRIPTOR = struct.Struct("<QIHH")
INDIRECT_DESC, EVENT_IDX = 1 << 28, 1 << 29


_LOCK = threading.Lock()


def fence():
    """A locked operation: without it a store and the load behind it could change places."""
    with _LOCK:
        pass


def need_event(event, new, old):
    """Whether the other side wants to be told that an index went from `old` to `new`."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class DriverRing:
    """The side that offers chains of buffers."""

    def __init__(self, ram, size, features=0, high=False, align=4096):
        self.ram, self.size, self.high = ram, size, high
        self.event_idx = bool(features & EVENT_IDX)
        self.indirect = bool(features & INDIRECT_DESC)
        self.desc = ram.alloc(16 * size, align=align, high=high)
        self.avail = ram.alloc(6 + 2 * size, align=align, high=high)
        self.used = ram.alloc(6 + 8 * size, align=align, high=high)
        self.free = list(range(size))
        self.chains = {}
        self.avail_idx = self.told = self.used_idx = 0

    def add(self, readable, writable, indirect=None):
        """Offers a chain of (address, length); gives its head, None without room.

        `publish` makes it visible.
        """
        parts = [(a, n, 0) for a, n in readable] + [(a, n, WRITE) for a, n in writable]
        use_table = self.indirect if indirect is None else indirect
        needed = 1 if use_table else len(parts)
        if len(self.free) < needed:
            return None
        taken = [self.free.pop() for _ in range(needed)]
        if use_table:
            table = self.ram.alloc(16 * len(parts), align=16, high=self.high)
            self._chain(table, range(len(parts)), parts)
            self._put(self.desc, taken[0], (table, 16 * len(parts), INDIRECT, 0))
        else:
            self._chain(self.desc, taken, parts)
        head = taken[0]
        self.chains[head] = taken
        self.ram.store16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        return head

    def _put(self, table, index, fields):
        self.ram.write(table + 16 * index, DESCRIPTOR.pack(*fields))

    def _chain(self, table, indices, parts):
        indices = list(indices)
        for position, (address, length, flags) in enumerate(parts):
            last = position + 1 == len(parts)
            following = 0 if last else indices[position + 1]
            self._put(table, indices[position], (address, length, flags | (0 if last else NEXT), following))

    def publish(self):
        """Shows the device what was added; whether it wants to be told."""
        old, self.told = self.told, self.avail_idx
        self.ram.store16(self.avail + 2, self.avail_idx)
        if old == self.avail_idx:
            return False
        if self.event_idx:
            fence()
            return need_event(self.ram.load16(self.used + 4 + 8 * self.size), self.avail_idx, old)
        return not self.ram.load16(self.used) & NO_NOTIFY

    def pop(self):
        """A chain that the device is done with: (head, bytes written); None if there is none."""
        if self.event_idx:
            self.ram.store16(self.avail + 4 + 2 * self.size, self.used_idx)
            fence()
        done = self.ram.load16(self.used + 2)
        if done == self.used_idx:
            return None
        if (done - self.used_idx) & 0xFFFF > len(self.chains):
            raise Broken(f"used index {done} after {self.used_idx} with {len(self.chains)} chains out")
        at = self.used + 4 + 8 * (self.used_idx % self.size)
        head, written = struct.unpack("<II", self.ram.read(at, 8))
        if head not in self.chains:
            raise Broken(f"the device gave back {head}, which it does not have")
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.free.extend(self.chains.pop(head))
        return head, written


class DeviceRing:
    """The side that takes chains. Everything that the driver wrote is checked."""

    def __init__(self, ram, size, desc, driver, device, features):
        if size == 0 or size & (size - 1) or size > 32_768:
            raise Broken(f"queue of {size} entries")
        if desc % 16 or driver % 2 or device % 4:
            raise Broken("queue that is not aligned")
        self.ram, self.size = ram, size
        self.desc, self.avail, self.used = desc, driver, device
        self.event_idx = bool(features & EVENT_IDX)
        self.indirect = bool(features & INDIRECT_DESC)
        # As the kernel's vhost does: a queue goes on where the used index stands.
        self.avail_idx = self.used_idx = self.told = ram.load16(device + 2)

    def pop(self):
        """The next chain: (head, readable, writable), both lists of (address, length); or None."""
        if self.event_idx:
            self.ram.store16(self.used + 4 + 8 * self.size, self.avail_idx)
            fence()
        offered = self.ram.load16(self.avail + 2)
        if offered == self.avail_idx:
            return None
        if (offered - self.avail_idx) & 0xFFFF > self.size:
            raise Broken(f"available index {offered} after {self.avail_idx}")
        head = self.ram.load16(self.avail + 4 + 2 * (self.avail_idx % self.size))
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        readable, writable = self._walk(head)
        return head, readable, writable

    def _walk(self, head):
        table, entries, index = self.desc, self.size, head
        readable, writable = [], []
        for _ in range(self.size):
            if index >= entries:
                raise Broken(f"descriptor {index} of {entries}")
            at = table + 16 * index
            address, length, flags, following = DESCRIPTOR.unpack(self.ram.read(at, 16))
            if flags & INDIRECT:
                if not self.indirect or table != self.desc or flags & NEXT or length % 16:
                    raise Broken("bad indirect descriptor")
                table, entries, index = address, length // 16, 0
                continue
            self.ram.offset(address, length)
            if flags & WRITE:
                writable.append((address, length))
            elif writable:
                raise Broken("readable descriptor behind a writable one")
            else:
                readable.append((address, length))
            if not flags & NEXT:
                return readable, writable
            index = following
        raise Broken("endless chain")

    def push(self, head, written):
        """Gives a chain back."""
        at = self.used + 4 + 8 * (self.used_idx % self.size)
        self.ram.write(at, struct.pack("<II", head, written))
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.ram.store16(self.used + 2, self.used_idx)

    def must_tell(self):
        """Whether the driver wants to hear of what was pushed since the last call."""
        old, self.told = self.told, self.used_idx
        if old == self.used_idx:
            return False
        if self.event_idx:
            fence()
            return need_event(self.ram.load16(self.avail + 4 + 2 * self.size), self.used_idx, old)
        return not self.ram.load16(self.avail) & NO_INTERRUPT


def scatter(ram, parts, data):
    """Writes `data` into a list of (address, length); gives the bytes written."""
    done = 0
    for address, length in parts:
        piece = data[done : done + length]
        ram.write(address, piece)
        done += len(piece)
    return done


def gather(ram, parts):
    return b"".join(ram.read(address, length) for address, length in parts)
