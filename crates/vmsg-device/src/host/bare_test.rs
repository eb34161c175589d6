// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::{self, File};
use std::path::PathBuf;

use virtio_msg::{DevNum, DeviceStatus, Frame, Message, Token};
use vmsg_mem::{Access, BusAddr, WindowTable};

use super::super::connection::Peer;
use super::super::stand::{self, NOW};
use super::*;
use crate::rng::Rng;
use crate::stand::BASE;
use crate::worker::{QueueStart, Slot};

const LEN: usize = 1 << 20;

struct Bench {
    core: Core,
    conn: ConnId,
    path: PathBuf,
    tables: Vec<Arc<WindowTable>>,
    starts: Vec<QueueStart>,
}

impl Bench {
    fn new(test: &str) -> Self {
        let name = format!("vmsg-device-bare-{test}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut core = Core::new(48, 0);
        core.add_device("rng0", Some(0), 0, Slot(0), Box::new(Rng::new()))
            .expect("an empty bus");
        let conn = core.connect(Peer::default(), 48);
        core.set_bare(conn, Some(StaticRam::new(&path, BASE, 0, 0)));
        Self {
            core,
            conn,
            path,
            tables: Vec::new(),
            starts: Vec::new(),
        }
    }

    fn make_ram(&self) {
        File::create(&self.path)
            .and_then(|file| file.set_len(LEN as u64))
            .expect("a file");
    }

    fn send(&mut self, message: Message<'_>) {
        let frame = Frame::new(DevNum(0), Token(1), message);
        stand::say(&mut self.core, self.conn, &frame, Vec::new());
        self.work();
    }

    fn work(&mut self) {
        let Self { tables, starts, .. } = self;
        stand::agree(&mut self.core, |command| match command {
            Command::SetMemory(table) => tables.push(table),
            Command::StartQueue(start) => starts.push(start),
            _ => {}
        });
    }

    /// Up to where queues are set up.
    fn bring_up(&mut self) {
        let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        self.send(Message::SetDeviceStatus(status));
        self.send(Message::SetDeviceStatus(status | DeviceStatus::FEATURES_OK));
    }

    fn set_queue(&mut self) {
        self.send(stand::queue());
    }

    /// What the device sees of its driver's memory, bytes.
    fn seen(&self) -> usize {
        let table = self.tables.last().expect("some memory");
        let found = table.space().get(BusAddr(BASE), LEN, Access::ReadWrite);
        found.map_or(0, |slice| slice.len())
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[test]
fn who_drives_a_device_shows_it_the_memory_without_a_word() {
    let mut bench = Bench::new("claim");
    bench.make_ram();
    bench.bring_up();
    assert_eq!(bench.seen(), LEN);
    bench.set_queue();
    assert_eq!(bench.starts.len(), 1);
    assert_eq!(bench.starts[0].resume, Some(Resume::AsFound));
    bench.core.disconnect(NOW, bench.conn);
    bench.work();
    assert_eq!(bench.seen(), 0);
    let gone = bench.tables.iter().map(Arc::downgrade).collect::<Vec<_>>();
    bench.tables.clear();
    assert!(gone.iter().all(|table| table.upgrade().is_none()));
}

#[test]
fn memory_that_comes_late_is_found_when_a_queue_is_set_up() {
    let mut bench = Bench::new("late");
    bench.bring_up();
    bench.set_queue();
    assert!(
        bench.starts.is_empty(),
        "nothing can be set up without memory"
    );
    bench.make_ram();
    bench.set_queue();
    assert_eq!(bench.starts.len(), 1);
    assert_eq!(bench.seen(), LEN);
}
