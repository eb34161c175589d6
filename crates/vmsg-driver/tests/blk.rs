// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The block driver on the device of this workspace.

mod host;

use std::path::{Path, PathBuf};
use std::time::Duration;

use host::{PATIENCE, client, serve_on};
use virtio_msg::{DevNum, FeatureSet, feature};
use vmsg_block::{
    Completion as Done, Disk, Facts, Failure as DiskFailure, Request as DiskRequest, Submitted,
};
use vmsg_bus::unix::Connector;
use vmsg_device::blk::{Blk, Settings};
use vmsg_driver::blk::{BlkDriver, BlkOptions, Completion, Failure, Request, feature_bit, kind};
use vmsg_driver::{BusClient, DmaPool, Error, QueueOptions, Sleep};
use vmsg_mem::BusAddr;

type Driver<'p> = BlkDriver<'p, vmsg_bus::DriverBus, Sleep, Vec<u8>>;

const DISK: DevNum = DevNum(0);
const SIZE: usize = 1 << 20;
const BAD: u64 = 1 << 19;

/// A disk in memory. It keeps what it is asked as long as `holds`, and cannot read or write at [`BAD`].
#[derive(Debug)]
struct Ram {
    bytes: Vec<u8>,
    holds: bool,
    held: Vec<u32>,
    size: u64,
}

impl Ram {
    fn new() -> Self {
        Self {
            bytes: vec![0; SIZE],
            holds: false,
            held: Vec::new(),
            size: SIZE as u64,
        }
    }
    fn part(&mut self, offset: u64, len: usize) -> &mut [u8] {
        let start = usize::try_from(offset).unwrap();
        &mut self.bytes[start..start + len]
    }
}

impl Disk for Ram {
    fn facts(&self) -> Facts {
        Facts {
            size: self.size,
            block_size: 512,
            physical_block_size: 4096,
            alignment_offset: 0,
            optimal_io_size: 0,
            read_only: false,
            discard: true,
            discard_granularity: 512,
            write_zeroes: true,
        }
    }
    fn submit(
        &mut self,
        tag: u32,
        request: DiskRequest<'_>,
        _: &std::sync::Arc<vmsg_mem::WindowTable>,
    ) -> Submitted {
        if self.holds {
            self.held.push(tag);
            return Submitted::Pending;
        }
        let broken = || Submitted::Done(Err(DiskFailure::Io(std::io::Error::other("bad"))));
        match request {
            DiskRequest::Read { offset: BAD, .. } | DiskRequest::Write { offset: BAD, .. } => {
                return broken();
            }
            DiskRequest::Read { offset, to } => {
                to.write(self.part(offset, to.len()));
            }
            DiskRequest::Write { offset, from } => {
                from.read(self.part(offset, from.len()));
            }
            DiskRequest::Flush => {}
            DiskRequest::Discard { offset, len } | DiskRequest::WriteZeroes { offset, len, .. } => {
                self.part(offset, usize::try_from(len).unwrap()).fill(0);
            }
        }
        Submitted::Done(Ok(()))
    }
    fn completed(&mut self, _: &mut Vec<Done>) {}
    fn cancel(&mut self) {
        // Nothing is under way for real.
        self.held.clear();
    }
    fn in_flight(&self) -> usize {
        self.held.len()
    }
    fn set_write_back(&mut self, _: bool) {}
}

fn serve(path: PathBuf, disk: Ram, queues: u16) -> host::Running {
    let settings = Settings {
        queues,
        serial: "number 7".to_owned(),
        ..Settings::new("disk")
    };
    serve_on(
        path,
        "disk",
        DISK,
        Box::new(Blk::new(&settings, Box::new(disk))),
    )
}

fn connect(path: &Path) -> BusClient {
    client(Connector::new(path, "blk").connect().unwrap())
}

fn pool() -> DmaPool {
    DmaPool::new("blk", BusAddr(0x1_0000_0000), 8 << 20).unwrap()
}

fn open<'p>(path: &Path, pool: &'p DmaPool, options: &BlkOptions) -> Driver<'p> {
    let mut client = connect(path);
    pool.lend(&mut client, 1).unwrap();
    BlkDriver::new(client, DISK, pool, options).unwrap()
}

/// Waits for as many completions, in whatever order, and gives them by their tags.
fn take(disk: &mut Driver<'_>, count: usize) -> Vec<Completion> {
    let mut done = Vec::new();
    while done.len() < count {
        disk.poll(|completion| done.push(completion)).unwrap();
        if done.len() < count {
            assert!(disk.wait(PATIENCE).unwrap(), "{} of {count}", done.len());
        }
    }
    done.sort_by_key(|completion| completion.tag);
    done
}

#[test]
fn what_is_written_is_read_again_and_the_disk_says_what_it_is() {
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path().join("bus"), Ram::new(), 1);
    let pool = pool();
    let mut disk = open(&host.path, &pool, &BlkOptions::default());
    let config = *disk.config();
    assert_eq!((config.bytes(), config.block_size), (SIZE as u64, 512));
    assert!(config.flush && !config.read_only && config.write_back);
    assert_eq!(&disk.id(PATIENCE).unwrap()[..9], b"number 7\0");
    let bytes: Vec<u8> = (0..=255).cycle().take(70_000 / 512 * 512).collect();
    disk.write(3, &bytes, PATIENCE).unwrap();
    disk.flush(PATIENCE).unwrap();
    let mut back = vec![0; bytes.len()];
    disk.read(3, &mut back, PATIENCE).unwrap();
    assert_eq!(back, bytes);
    let zeroes = Request::WriteZeroes {
        sector: 3,
        sectors: 1,
        unmap: true,
    };
    assert!(disk.run(zeroes, PATIENCE).unwrap().is_whole());
    disk.read(3, &mut back, PATIENCE).unwrap();
    assert_eq!((&back[..512], &back[512..]), (&[0; 512][..], &bytes[512..]));
    disk.set_write_back(false).unwrap();
    assert!(!disk.config().write_back);
    assert_eq!((disk.counters().failed, disk.counters().short), (0, 0));
}

#[test]
fn many_requests_are_under_way_in_several_queues() {
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path().join("bus"), Ram::new(), 4);
    let pool = pool();
    let options = BlkOptions {
        queues: 4,
        ..BlkOptions::default()
    };
    let mut disk = open(&host.path, &pool, &options);
    assert_eq!(disk.queues(), 4);
    let buffers = pool.alloc(256 * 512).unwrap();
    for round in 0..8_u8 {
        for write in [true, false] {
            for tag in 0..256_u64 {
                let at = usize::try_from(tag).unwrap() * 512;
                let part = buffers.ram().get(at, 512).unwrap();
                part.fill(if write {
                    round ^ tag.to_le_bytes()[0]
                } else {
                    0
                });
                let data = [(BusAddr(buffers.addr().0 + at as u64), 512)];
                let request = match write {
                    true => Request::Write {
                        sector: tag,
                        from: &data,
                    },
                    false => Request::Read {
                        sector: tag,
                        to: &data,
                    },
                };
                let queue = usize::try_from(tag % 4).unwrap();
                assert!(disk.submit(queue, tag, request).unwrap());
            }
            assert_eq!(disk.in_flight(), 256);
            disk.commit().unwrap();
            let done = take(&mut disk, 256);
            for (tag, completion) in (0..).zip(done) {
                assert_eq!(completion.tag, tag);
                assert!(completion.is_whole(), "{completion:?}");
            }
        }
        let mut bytes = vec![0; 256 * 512];
        buffers.ram().read(0, &mut bytes);
        for (tag, sector) in (0..=255_u8).zip(bytes.chunks(512)) {
            assert!(sector.iter().all(|&byte| byte == round ^ tag));
        }
    }
}

#[test]
fn errors_of_the_disk_have_names() {
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path().join("bus"), Ram::new(), 1);
    let pool = pool();
    let mut disk = open(&host.path, &pool, &BlkOptions::default());
    let mut sector = [0; 512];
    let failed = disk.read(BAD / 512, &mut sector, PATIENCE);
    assert!(matches!(failed, Err(Error::Disk(Failure::IoErr))));
    let unknown = Request::Other {
        kind: 77,
        sector: 0,
        readable: &[],
        writable: &[],
    };
    assert_eq!(unknown.kind(), 77);
    let done = disk.run(unknown, PATIENCE).unwrap();
    assert_eq!(done.result, Err(Failure::Unsupp));
    assert_eq!(disk.counters().failed, 2);
    disk.read(0, &mut sector, PATIENCE).unwrap();
}

#[test]
fn what_no_driver_may_ask_is_refused_here_or_sent_if_it_is_told_to() {
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path().join("bus"), Ram::new(), 1);
    let pool = pool();
    let end = (SIZE / 512) as u64;
    let buffer = pool.alloc(4096).unwrap();
    let data = [(buffer.addr(), 512)];
    let odd = [(buffer.addr(), 100)];
    let requests = [
        Request::Read {
            sector: end,
            to: &data,
        },
        Request::Read {
            sector: u64::MAX,
            to: &data,
        },
        Request::Write {
            sector: 0,
            from: &odd,
        },
    ];
    let mut disk = open(&host.path, &pool, &BlkOptions::default());
    for request in requests {
        let refused = disk.submit(0, 1, request);
        assert!(matches!(refused, Err(Error::BadRequest(_))), "{refused:?}");
    }
    drop(disk);
    let options = BlkOptions {
        unchecked: true,
        ..BlkOptions::default()
    };
    let mut disk = open(&host.path, &pool, &options);
    for request in requests {
        let done = disk.run(request, PATIENCE).unwrap();
        assert_eq!(done.result, Err(Failure::IoErr), "{request:?}");
    }
    assert_eq!(kind::IN, 0);
}

#[test]
fn requests_that_were_under_way_are_done_by_the_next_host() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let holding = Ram {
        holds: true,
        ..Ram::new()
    };
    let host = serve(path.clone(), holding, 2);
    let pool = pool();
    let options = BlkOptions {
        queues: 2,
        ..BlkOptions::default()
    };
    let mut disk = open(&path, &pool, &options);
    let buffers = pool.alloc(8 * 512).unwrap();
    for tag in 0..8_u8 {
        let at = usize::from(tag) * 512;
        buffers.ram().get(at, 512).unwrap().fill(tag + 1);
        let from = [(BusAddr(buffers.addr().0 + at as u64), 512)];
        let request = Request::Write {
            sector: tag.into(),
            from: &from,
        };
        let queue = usize::from(tag % 2);
        assert!(disk.submit(queue, tag.into(), request).unwrap());
    }
    disk.commit().unwrap();
    // The device has taken them, which its record says, and will not do them.
    assert!(!disk.wait(Duration::from_millis(100)).unwrap());
    drop(host);
    let lost = disk.wait(PATIENCE);
    assert!(matches!(lost, Err(Error::Channel(_))), "{lost:?}");

    let _host = serve(path.clone(), Ram::new(), 2);
    let mut again = connect(&path);
    pool.lend(&mut again, 1).unwrap();
    disk.resume(again).unwrap();
    let done = take(&mut disk, 8);
    for (tag, completion) in (0..).zip(&done) {
        assert_eq!((completion.tag, completion.result), (tag, Ok(())));
    }
    for tag in 0..8_u8 {
        let mut sector = [0; 512];
        disk.read(tag.into(), &mut sector, PATIENCE).unwrap();
        assert_eq!(sector, [tag + 1; 512]);
    }
}

#[test]
fn another_disk_is_not_gone_on_with() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("bus");
    let host = serve(path.clone(), Ram::new(), 2);
    let pool = pool();
    let mut disk = open(&path, &pool, &BlkOptions::default());
    assert!(disk.device().features().bit(feature_bit::MQ));
    drop(host);
    let host = serve(path.clone(), Ram::new(), 1);
    let mut client = connect(&path);
    pool.lend(&mut client, 1).unwrap();
    let other = disk.resume(client);
    assert!(matches!(other, Err(Error::MissingFeatures(_))), "{other:?}");
    drop(host);
    let _host = serve(path.clone(), Ram::new(), 2);
    let mut client = connect(&path);
    pool.lend(&mut client, 1).unwrap();
    disk.resume(client).unwrap();
    disk.write(0, &[1; 512], PATIENCE).unwrap();
}

#[test]
fn a_driver_does_without_what_it_does_not_want() {
    let dir = tempfile::tempdir().unwrap();
    let host = serve(dir.path().join("bus"), Ram::new(), 1);
    let pool = pool();
    let options = BlkOptions {
        queue: QueueOptions {
            doorbells: false,
            ..QueueOptions::default()
        },
        features: FeatureSet::new(),
        record: false,
        ..BlkOptions::default()
    };
    let mut disk = open(&host.path, &pool, &options);
    assert!(!disk.device().features().bit(feature::RING_EVENT_IDX));
    let wce = disk.set_write_back(false);
    assert!(matches!(wce, Err(Error::Unsupported { .. })));
    let flush = disk.submit(0, 1, Request::Flush);
    assert!(matches!(flush, Err(Error::BadRequest(_))));
    disk.write(5, &[7; 512], PATIENCE).unwrap();
    let mut sector = [0; 512];
    disk.read(5, &mut sector, PATIENCE).unwrap();
    assert_eq!(sector, [7; 512]);
}
