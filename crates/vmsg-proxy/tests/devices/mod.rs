// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A session with a device of a running host, to which the memory of this program's drivers is lent.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses another part"
)]

use crate::host::{PATIENCE, Running, over_unix_at};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::sync::{Arc, LazyLock};
use std::time::Instant;
use virtio_msg::{DevNum, QueueIndex};
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_driver::DmaPool;
use vmsg_driver::virtio_drivers::StaticPool;
use vmsg_mem::BusAddr;
use vmsg_proxy::link::{Link, SessionHandle, Source};
use vmsg_proxy::session::{Event, FileId, Op, Options, Session, Target, Window};
use vmsg_proxy::transport::Direct;

/// The memory of all drivers of a test program.
pub struct Memory;

impl StaticPool for Memory {
    fn pool() -> &'static DmaPool {
        static POOL: LazyLock<DmaPool> =
            LazyLock::new(|| DmaPool::new("drivers", BusAddr(0x4000_0000), 16 << 20).unwrap());
        &POOL
    }
}

pub struct Seat {
    handle: SessionHandle,
    _link: Link,
    host: Option<Running>,
    dir: tempfile::TempDir,
}

impl Seat {
    pub fn new(device: DevNum) -> Seat {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("b0.sock");
        let host = over_unix_at(path.clone());
        let bus = BusSpec::Unix(UnixSpec::new(path));
        let session = Session::new(Target::Number(device), Options::default());
        let source = Source::Bus(bus.connector("front"));
        let link = Link::start("test", session, source).unwrap();
        let handle = link.handle();
        let pool = Memory::pool();
        let file = pool.fd().expect("memory of its own");
        let stat = rustix::fs::fstat(file).unwrap();
        let window = Window {
            base: pool.base().0,
            len: pool.len() as u64,
            file_offset: 0,
            writable: true,
            fd: Arc::new(pool.fd().unwrap().try_clone_to_owned().unwrap()),
            file: FileId {
                device: stat.st_dev,
                inode: stat.st_ino,
            },
        };
        handle.call(Op::Describe).unwrap();
        handle.call(Op::Claim).unwrap();
        handle.call(Op::SetWindows(vec![window])).unwrap();
        Seat {
            handle,
            _link: link,
            host: Some(host),
            dir,
        }
    }

    pub fn direct(&self) -> Direct {
        Direct::new(self.handle.clone()).unwrap()
    }

    /// The next news that are so.
    #[track_caller]
    pub fn until(&self, so: impl Fn(&Event) -> bool) -> Event {
        let end = Instant::now() + PATIENCE;
        loop {
            self.handle.clear();
            while let Some(event) = self.handle.poll_event() {
                if so(&event) {
                    return event;
                }
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no such news");
            let left = Timespec::try_from(left).unwrap();
            let fd = self.handle.event_fd();
            poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)).unwrap();
        }
    }

    /// The next queue that the device says it has used.
    #[track_caller]
    pub fn used(&self) -> QueueIndex {
        match self.until(|event| matches!(event, Event::QueueUsed(_))) {
            Event::QueueUsed(queue) => queue,
            other => unreachable!("{other:?}"),
        }
    }

    pub fn stop_host(&mut self) {
        self.host.take();
    }

    pub fn start_host(&mut self) {
        self.host = Some(over_unix_at(self.dir.path().join("b0.sock")));
    }
}
