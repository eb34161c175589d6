// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A driver of a console that writes anything into its rings and buffers, and clients of all kinds.

use std::io::{Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Instant;

use tempfile::TempDir;
use virtio_msg::FeatureSet;
use vmsg_device::console::{Console, Hub, HubConfig, MAX_INPUT, Settings, SizeOrder, bits};
use vmsg_device::device::Device;
use vmsg_device::worker::{Command, Core, Fds, Notice, QueueStart, Reply, Slot};
use vmsg_mem::{Access, BusAddr, Mapping, TableEntry, WindowTable};
use vmsg_queue::QueueConfig;

const BASE: u64 = 0x10_0000;
/// Bytes of each queue's part of the memory.
const PART: usize = 1 << 13;
const SIZE: u16 = 16;
/// Where rings and buffers are in a part.
const AVAIL: usize = 0x400;
const USED: usize = 0x600;
const BUFFERS: usize = 0x800;
const SLOT: Slot = Slot(0);
/// Steps of a story.
const STEPS: usize = 64;
/// Turns of queues after a kick: whoever is busy for longer is so for ever.
const TURNS: usize = 20_000;

struct NoFds;

impl Fds for NoFds {
    fn add_kick(&mut self, _slot: Slot, _queue: usize, _fd: BorrowedFd<'_>) {}
    fn add_device(&mut self, _slot: Slot, _fd: BorrowedFd<'_>) {}
    fn remove(&mut self, _fd: BorrowedFd<'_>) {}
}

struct Story<'a> {
    bytes: &'a [u8],
    core: Core,
    memory: Arc<Mapping>,
    queues: usize,
    multiport: bool,
    available: Vec<u16>,
    tickets: u64,
    broken: bool,
}

impl Story<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.bytes.split_first() else {
            return 0;
        };
        self.bytes = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn tell(&mut self, command: Command) {
        self.tickets += 1;
        self.core.command(SLOT, self.tickets, command, &mut NoFds);
        self.take_replies();
    }

    fn take_replies(&mut self) {
        for reply in self.core.take_replies() {
            if let Reply::Notice(_, Notice::Broken { why, .. }) = reply {
                assert!(!why.contains("panicked"), "{why}");
                self.broken = true;
            }
        }
    }

    fn run(&mut self) {
        for _ in 0..TURNS {
            if !self.core.step(Instant::now()) {
                break;
            }
        }
        assert!(!self.core.has_work(), "the device is busy for ever");
        self.take_replies();
    }

    fn bring_up(&mut self) {
        self.tell(Command::Reset);
        self.broken = false;
        self.memory.ram().fill(0);
        self.available.fill(0);
        for queue in 0..self.queues {
            let at = |offset: usize| BusAddr(BASE + (queue * PART + offset) as u64);
            self.tell(Command::StartQueue(QueueStart {
                queue,
                config: QueueConfig {
                    size: SIZE,
                    desc: at(0),
                    driver: at(AVAIL),
                    device: at(USED),
                },
                features: FeatureSet::EMPTY,
                resume: None,
                record: None,
            }));
        }
        let features: &[u32] = if self.multiport {
            &[bits::SIZE, bits::MULTIPORT]
        } else {
            &[bits::SIZE]
        };
        self.tell(Command::DriverOk(FeatureSet::from_bits(features)));
        self.run();
    }

    /// A chain of sound descriptors, with any of their fields made unsound now and then.
    fn chain(&mut self, queue: usize, writable: bool, payload: &[u8]) {
        let part = queue * PART;
        let pieces = 1 + self.below(6);
        let first = self.below(usize::from(SIZE));
        let place = part + BUFFERS + 256 * self.below(16);
        self.memory.ram().write(place, payload);
        for piece in 0..pieces {
            let index = (first + piece) % usize::from(SIZE);
            let at = part + 16 * index;
            let spoil = self.byte();
            let len = match spoil & 0x1f {
                0 => 0,
                1 => u32::MAX,
                2 => 1,
                _ => u32::try_from(payload.len().max(8)).expect("short"),
            };
            let addr = match spoil >> 5 {
                0 => u64::from(self.byte()) << 56,
                _ => BASE + place as u64,
            };
            let mut flags = u16::from(writable) << 1;
            let mut next = u16::try_from((index + 1) % usize::from(SIZE)).expect("small");
            if piece + 1 < pieces {
                flags |= 1;
            }
            if spoil == 3 {
                (flags, next) = (u16::from(self.byte()), u16::from(self.byte()));
            }
            let ram = self.memory.ram();
            ram.write(at, &addr.to_le_bytes());
            ram.write(at + 8, &len.to_le_bytes());
            ram.write(at + 12, &flags.to_le_bytes());
            ram.write(at + 14, &next.to_le_bytes());
        }
        let ram = self.memory.ram();
        let place = usize::from(self.available[queue] % SIZE);
        let head = u16::try_from(first).expect("small");
        ram.write(part + AVAIL + 4 + 2 * place, &head.to_le_bytes());
        self.available[queue] = self.available[queue].wrapping_add(1);
        let index = self.available[queue].to_le_bytes();
        ram.write(part + AVAIL + 2, &index);
    }
}

/// Any story.
pub(crate) fn one(bytes: &[u8]) {
    let folder = TempDir::new().expect("a folder");
    let setup = bytes.first().copied().unwrap_or(0);
    let ports = if setup & 1 == 0 {
        vec!["one".to_owned(), "two".to_owned()]
    } else {
        Vec::new()
    };
    let sockets: Vec<_> = (0..=ports.len())
        .map(|port| folder.path().join(port.to_string()))
        .collect();
    let hubs: Vec<Hub> = sockets
        .iter()
        .map(|socket| {
            let config = HubConfig {
                name: "con".to_owned(),
                socket: Some(socket.clone()),
                log: (setup & 2 != 0).then(|| "/dev/full".into()),
                ..HubConfig::default()
            };
            Hub::open(&config).expect("a hub")
        })
        .collect();
    let settings = Settings {
        ports,
        multiport: setup & 4 != 0,
        size_order: if setup & 8 == 0 {
            SizeOrder::ColsFirst
        } else {
            SizeOrder::RowsFirst
        },
    };
    let device = Console::new(&settings, hubs).expect("a device");
    let handles = device.handles();
    let queues = device.queue_sizes().len();
    let len = queues * PART;
    let (memory, _fd) = Mapping::memfd("test", len as u64, true).expect("memfd");
    let memory = Arc::new(memory);
    let entry = TableEntry {
        base: BusAddr(BASE),
        mapping: Arc::clone(&memory),
        offset: 0,
        len,
        access: Access::ReadWrite,
    };
    let table = Arc::new(WindowTable::new(vec![entry]).expect("a window"));
    let mut story = Story {
        bytes: bytes.get(1..).unwrap_or(&[]),
        core: Core::new(),
        memory,
        queues,
        multiport: queues > 2 && setup & 16 == 0,
        available: vec![0; queues],
        tickets: 0,
        broken: false,
    };
    story.tell(Command::Add(Box::new(device)));
    story.tell(Command::SetMemory(table));
    story.bring_up();
    let mut clients: Vec<UnixStream> = Vec::new();
    for _ in 0..STEPS {
        if story.bytes.is_empty() {
            break;
        }
        let queue = story.below(queues);
        match story.below(9) {
            // A control message that may make sense.
            0 | 1 if queues > 3 => {
                let id = [0, 1, 2, 3, u32::MAX][story.below(5)];
                let (event, value) = (story.below(9), story.below(3));
                let mut message = id.to_le_bytes().to_vec();
                for word in [event, value] {
                    message.extend(u16::try_from(word).expect("small").to_le_bytes());
                }
                story.chain(3, false, &message);
                story.core.kick(SLOT, 3);
            }
            2 => {
                story.chain(queue, queue.is_multiple_of(2), &[0; 64]);
                story.core.kick(SLOT, queue);
            }
            3 => {
                let text: Vec<u8> = (0..story.below(40)).map(|_| 0).collect();
                let text: Vec<u8> = text.iter().map(|_| story.byte()).collect();
                story.chain(queue, false, &text);
                story.core.kick(SLOT, queue);
            }
            // Any word anywhere.
            4 => {
                let at = queue * PART + story.below(256) * 8;
                let words: Vec<u8> = (0..8).map(|_| story.byte()).collect();
                story.memory.ram().write(at, &words);
                story.core.kick(SLOT, queue);
            }
            5 => {
                let port = story.below(sockets.len());
                if clients.len() < 40 {
                    let client = UnixStream::connect(&sockets[port]).expect("a listener");
                    client.set_nonblocking(true).expect("a socket");
                    clients.push(client);
                }
            }
            6 if !clients.is_empty() => {
                let at = story.below(clients.len());
                match story.below(4) {
                    0 => drop(clients.swap_remove(at)),
                    1 => {
                        let mut rest = [0; 4096];
                        while clients[at].read(&mut rest).is_ok_and(|n| n > 0) {}
                    }
                    // As much as goes.
                    _ => while clients[at].write(&[b'x'; 1000]).is_ok() {},
                }
            }
            7 => {
                let size = vmsg_device::console::Size {
                    cols: u16::from(story.byte()),
                    rows: u16::from(story.byte()),
                };
                let port = story.below(handles.len());
                handles[port].set_size(size);
            }
            8 => {
                let offset = story.below(16);
                let data = vec![story.byte(); story.below(6)];
                story.tell(Command::WriteConfig { offset, data });
            }
            _ => {}
        }
        story.core.poll_device(SLOT, Instant::now());
        story.run();
        if story.broken && story.byte() & 1 == 0 {
            story.bring_up();
        }
    }
    // A driver that begins again has a device that works.
    story.bring_up();
    let before = handles[0].report().output;
    story.bytes = &[0x45; 64];
    story.chain(1, false, b"still here");
    story.core.kick(SLOT, 1);
    story.run();
    assert!(!story.broken);
    assert!(handles[0].report().output > before);
    for handle in &handles {
        let report = handle.report();
        assert!(report.clients <= vmsg_device::console::MAX_CLIENTS);
        assert!(report.input <= before + (STEPS * 64 * MAX_INPUT) as u64);
    }
}
