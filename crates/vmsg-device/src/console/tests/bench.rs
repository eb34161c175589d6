// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A console device in a worker, its driver, and a client, all in one thread.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tempfile::TempDir;

use crate::console::{Console, Handle, Hub, HubConfig, Settings};
use crate::device::Device;
use crate::stand::{Driver, Stand, is_also, start};
use crate::worker::{Command, QueueStart, Resume};

const SIZE: u16 = 64;

pub(super) struct Bench {
    stand: Stand,
    driver: Driver,
    pub(super) sizes: Vec<u16>,
    pub(super) handles: Vec<Handle>,
    folder: TempDir,
}

is_also!(Bench, stand: Stand);

/// A device with these ports after its console, its hubs in `folder`.
pub(super) fn device(folder: &TempDir, settings: &Settings) -> Console {
    let hubs = (0..=settings.ports.len())
        .map(|port| {
            let config = HubConfig {
                name: format!("con:{port}"),
                socket: Some(folder.path().join(format!("{port}"))),
                ..HubConfig::default()
            };
            Hub::open(&config).expect("a hub")
        })
        .collect();
    Console::new(settings, hubs).expect("a device")
}

impl Bench {
    pub(super) fn new(ports: &[&str]) -> Self {
        Self::with(&Settings {
            ports: ports.iter().map(|name| (*name).to_owned()).collect(),
            ..Settings::default()
        })
    }

    pub(super) fn with(settings: &Settings) -> Self {
        let folder = TempDir::new().expect("a folder");
        let device = device(&folder, settings);
        let sizes = device.queue_sizes();
        let handles = device.handles();
        let driver = Driver::new(sizes.len(), SIZE, true);
        let mut stand = Stand::new(Box::new(device));
        let table = Arc::clone(&driver.table);
        stand.tell(Command::SetMemory(table)).expect("memory");
        Self {
            stand,
            driver,
            sizes,
            handles,
            folder,
        }
    }

    /// The driver negotiates `features`, sets up `queues` and says DRIVER_OK.
    pub(super) fn bring_up(&mut self, features: &[u32], queues: &[usize]) {
        self.negotiate(features).expect("features");
        for queue in queues {
            let start = start(*queue, self.driver.set_up(*queue));
            self.tell(Command::StartQueue(start)).expect("a queue");
        }
        self.driver_ok();
    }

    /// Another device takes the place of this one, whose driver notices nothing.
    pub(super) fn killed_and_resumed(&mut self, settings: &Settings) {
        self.tell(Command::Remove).expect("removed");
        let device = device(&self.folder, settings);
        self.handles = device.handles();
        self.add_device(Box::new(device));
        let table = Arc::clone(&self.driver.table);
        self.tell(Command::SetMemory(table)).expect("memory");
        for (index, config) in self.driver.configs() {
            self.tell(Command::StartQueue(QueueStart {
                resume: Some(Resume::FromUsedRing),
                ..start(index, config)
            }))
            .expect("a queue");
        }
        self.driver_ok();
    }

    /// Adds a chain of one buffer to read, or to write.
    pub(super) fn add(&mut self, queue: usize, readable: &[u8], writable: usize) {
        self.driver.add(queue, readable, writable);
    }

    pub(super) fn give(&mut self, queue: usize, count: usize, len: usize) {
        for _ in 0..count {
            self.add(queue, &[], len);
        }
        self.kick(queue);
    }

    /// Chains of one buffer that can still be added.
    pub(super) fn room(&self, queue: usize) -> usize {
        usize::from(SIZE - self.driver.outstanding(queue))
    }

    /// What was written to the next used chain.
    pub(super) fn pop(&mut self, queue: usize) -> Option<Vec<u8>> {
        self.driver.pop(queue)
    }

    pub(super) fn send(&mut self, queue: usize, bytes: &[u8]) {
        self.add(queue, bytes, 0);
        self.kick(queue);
        assert_eq!(self.pop(queue), Some(Vec::new()), "output is taken at once");
    }

    /// All that has come in a receive queue.
    pub(super) fn received(&mut self, queue: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while let Some(more) = self.pop(queue) {
            bytes.extend(more);
        }
        bytes
    }

    /// A control message of the driver.
    pub(super) fn say(&mut self, id: u32, event: u16, value: u16) {
        let mut message = id.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.send(3, &message);
    }

    /// What the device has told: port, event, value, and what follows.
    pub(super) fn told(&mut self) -> Vec<(u32, u16, u16, Vec<u8>)> {
        let mut told = Vec::new();
        while let Some(message) = self.pop(2) {
            self.add(2, &[], 128);
            let (id, rest) = message.split_first_chunk().expect("a number");
            let (event, rest) = rest.split_first_chunk().expect("an event");
            let (value, rest) = rest.split_first_chunk().expect("a value");
            told.push((
                u32::from_le_bytes(*id),
                u16::from_le_bytes(*event),
                u16::from_le_bytes(*value),
                rest.to_vec(),
            ));
        }
        told
    }

    /// A client of the port.
    pub(super) fn client(&mut self, port: usize) -> UnixStream {
        let path = self.folder.path().join(port.to_string());
        let client = UnixStream::connect(path).expect("connected");
        client.set_nonblocking(true).expect("a socket");
        self.poll();
        client
    }

    pub(super) fn type_on(&mut self, client: &mut UnixStream, text: &[u8]) {
        client.write_all(text).expect("room");
        self.poll();
    }
}

/// What the client sees now.
pub(super) fn seen(client: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match client.read(&mut chunk) {
            Ok(0) => return bytes,
            Ok(count) => bytes.extend(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return bytes,
            Err(error) => panic!("{error}"),
        }
    }
}
