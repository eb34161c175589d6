// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::os::fd::OwnedFd;

use virtio_msg::{DevNum, DeviceStatus, Frame, Message, QueueIndex};
use vmsg_bus::control::{self, BackingAdd, COMMON_BACKING, ViewAdd};
use vmsg_mem::{Access, BusAddr, WindowTable};

use super::super::connection::Peer;
use super::super::stand::{self, NOW};
use super::super::windows::MAX_VIEWS;
use super::*;
use crate::rng::Rng;
use crate::worker::Slot;

const LEN: u64 = 16 << 20;
const PIECE: u64 = 2 << 20;

struct Bench {
    core: Core,
    conn: ConnId,
    memory: Arc<Mapping>,
    /// The driver's end of the vectors.
    driver: Arc<Vectors>,
    tables: Vec<Arc<WindowTable>>,
    notify: Vec<(usize, Option<Doorbell>, Option<Doorbell>)>,
}

/// A doorbell, and the eventfd that it rings.
fn bell() -> (Doorbell, OwnedFd) {
    let bell = Doorbell::new().expect("an eventfd");
    let fd = bell.try_clone().expect("a descriptor").into();
    (bell, fd)
}

/// Whether an eventfd was rung since the last time.
fn is_rung(vectors: &Vectors, vector: u16) -> bool {
    let fd = vectors.own_fd(vector).expect("a vector");
    let fd = fd.try_clone_to_owned().expect("a descriptor");
    let bell = Doorbell::from_fd(fd).expect("an eventfd");
    bell.drain().expect("ours alone") != 0
}

impl Bench {
    fn new() -> Self {
        let mut core = Core::new(48, 0);
        for num in 0..2 {
            let slot = Slot(u32::from(num));
            core.add_device(
                &format!("rng{num}"),
                Some(num),
                0,
                slot,
                Box::new(Rng::new()),
            )
            .expect("another number");
        }
        let (memory, _) = Mapping::memfd("common", LEN, true).expect("memory");
        let memory = Arc::new(memory);
        let ((device_bell, device_fd), (driver_bell, driver_fd)) = (bell(), bell());
        let device = Vectors::new(vec![(1, device_fd)], vec![(2, driver_bell)]);
        let driver = Vectors::new(vec![(2, driver_fd)], vec![(1, device_bell)]);
        let conn = core.connect(Peer::default(), 48);
        core.set_common(conn, Some(Arc::clone(&memory)), Some(Arc::new(device)));
        let mut bench = Self {
            core,
            conn,
            memory,
            driver: Arc::new(driver),
            tables: Vec::new(),
            notify: Vec::new(),
        };
        bench.work();
        bench
    }

    /// Takes hold of a device.
    fn claim(&mut self, num: u16) {
        let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        let frame = Frame::new(
            DevNum(num),
            virtio_msg::Token(1),
            Message::SetDeviceStatus(status),
        );
        self.send(&frame);
        while stand::take(&mut self.core, self.conn).is_some() {}
    }

    fn send(&mut self, frame: &Frame<'_>) {
        stand::say(&mut self.core, self.conn, frame, Vec::new());
        self.work();
    }

    fn ask(&mut self, request: Request) -> Status {
        stand::ask(&mut self.core, self.conn, request, Vec::new());
        self.work();
        let answer = stand::take(&mut self.core, self.conn).expect("an answer");
        let response = stand::response(&answer);
        assert_eq!(response.subject, request.subject());
        response.status
    }

    fn work(&mut self) {
        let Self { tables, notify, .. } = self;
        stand::agree(&mut self.core, |command| match command {
            Command::SetMemory(table) => tables.push(table),
            Command::SetNotify { queue, kick, call } => notify.push((queue, kick, call)),
            _ => {}
        });
    }

    fn seen(&self, base: u64, len: u64) -> bool {
        let Some(table) = self.tables.last() else {
            return false;
        };
        let len = usize::try_from(len).expect("small");
        let found = table.space().get(BusAddr(base), len, Access::ReadWrite);
        found.is_some()
    }
}

fn view(id: u32, base: u64, offset: u64, len: u64) -> Request {
    Request::ViewAdd(ViewAdd {
        id,
        writable: true,
        backing: COMMON_BACKING,
        base: BusAddr(base),
        len,
        offset,
        more: false,
    })
}

fn vectors(dev: u16, kick: Option<u16>, call: Option<u16>) -> Request {
    Request::QueueVectors(QueueVectors {
        dev: DevNum(dev),
        queue: QueueIndex(0),
        kick,
        call,
    })
}

#[test]
fn scattered_pieces_of_the_common_memory_are_the_drivers_memory() {
    let mut bench = Bench::new();
    bench.claim(0);
    // The guest's first piece is the third, its second one the first.
    assert_eq!(bench.ask(view(1, 0, 2 * PIECE, PIECE)), Status::OK);
    assert_eq!(bench.ask(view(2, PIECE, 0, PIECE)), Status::OK);
    let table = bench.tables.last().expect("a table");
    for (base, offset) in [(0, 2 * PIECE), (PIECE, 0)] {
        let slice = table.space().slice(BusAddr(base), 8, Access::ReadWrite);
        slice.expect("a window").write(0, &base.to_le_bytes());
        let mut found = [0; 8];
        let at = usize::try_from(offset).expect("small");
        bench
            .memory
            .ram()
            .get(at, 8)
            .expect("there")
            .read(0, &mut found);
        assert_eq!(found, base.to_le_bytes());
    }
    assert_eq!(
        bench.ask(Request::WindowRemove { id: 1, more: false }),
        Status::OK
    );
    assert!(!bench.seen(0, 8) && bench.seen(PIECE, 8));
}

#[test]
fn what_is_outside_overlaps_or_is_not_a_view_is_refused() {
    let mut bench = Bench::new();
    bench.claim(0);
    assert_eq!(bench.ask(view(1, 0, 0, PIECE)), Status::OK);
    for (request, status) in [
        (view(2, LEN, 0, LEN + 1), Status::MALFORMED),
        (view(2, LEN, LEN, 1), Status::MALFORMED),
        (view(2, LEN, 1, LEN), Status::MALFORMED),
        (view(2, LEN, u64::MAX, 2), Status::MALFORMED),
        (view(2, LEN, 0, 0), Status::MALFORMED),
        (view(2, u64::MAX, 0, 2), Status::EXISTS),
        (view(2, PIECE - 1, 0, 2), Status::EXISTS),
        (view(1, LEN, 0, PIECE), Status::EXISTS),
        (
            Request::BackingRemove { id: COMMON_BACKING },
            Status::DENIED,
        ),
        (
            Request::WindowRemove { id: 9, more: false },
            Status::NOT_FOUND,
        ),
        // Nothing can be lent without a descriptor.
        (
            Request::BackingAdd(BackingAdd {
                id: COMMON_BACKING,
                writable: true,
                len: PIECE,
                file_offset: 0,
            }),
            Status::BAD_FD,
        ),
    ] {
        assert_eq!(bench.ask(request), status, "{request}");
    }
    assert!(bench.seen(0, PIECE));
}

#[test]
fn thousands_of_views_are_admitted_and_no_more() {
    let mut bench = Bench::new();
    bench.claim(0);
    let max = u32::try_from(MAX_VIEWS).expect("few");
    // Staged: a table is made once.
    for id in 0..max {
        let Request::ViewAdd(mut add) = view(id, u64::from(id) << 12, 0, 4096) else {
            unreachable!("as just made");
        };
        add.more = id != max - 1;
        assert_eq!(bench.ask(Request::ViewAdd(add)), Status::OK, "{id}");
    }
    let one_more = view(max, u64::from(max) << 12, 0, 4096);
    assert_eq!(bench.ask(one_more), Status::TOO_MANY);
    assert!(bench.seen(0, 4096) && bench.seen(u64::from(max - 1) << 12, 4096));
}

#[test]
fn without_memory_in_common_views_of_it_are_refused_by_name() {
    let mut bench = Bench::new();
    bench.conn = bench.core.connect(Peer::default(), 48);
    bench.core.set_common(bench.conn, None, None);
    bench.claim(0);
    assert_eq!(bench.ask(view(1, 0, 0, PIECE)), Status::UNSUPPORTED);
    assert_eq!(bench.ask(vectors(0, Some(1), Some(2))), Status::UNSUPPORTED);
}

#[test]
fn queues_get_vectors_that_ring_at_the_other_end_and_can_share_them() {
    let mut bench = Bench::new();
    bench.claim(0);
    bench.claim(1);
    assert_eq!(bench.ask(vectors(0, Some(1), Some(2))), Status::OK);
    assert_eq!(bench.ask(vectors(1, Some(1), Some(2))), Status::OK);
    bench.driver.bell(1).expect("theirs").ring().expect("rung");
    for (queue, kick, call) in &bench.notify {
        assert_eq!(*queue, 0);
        // Both have what was rung; nobody reads it.
        let kick = kick.as_ref().expect("a kick");
        let mut fds = [rustix::event::PollFd::new(
            kick,
            rustix::event::PollFlags::IN,
        )];
        let now = rustix::event::Timespec::default();
        assert_eq!(rustix::event::poll(&mut fds, Some(&now)), Ok(1));
        assert!(!is_rung(&bench.driver, 2));
        call.as_ref().expect("a call").ring().expect("rung");
        assert!(is_rung(&bench.driver, 2));
    }
    assert_eq!(bench.notify.len(), 2);
}

#[test]
fn vectors_that_are_not_there_or_of_devices_of_others_are_refused() {
    let mut bench = Bench::new();
    assert_eq!(bench.ask(vectors(0, Some(1), None)), Status::DENIED);
    bench.claim(0);
    for (request, status) in [
        (vectors(0, Some(0), None), Status::NOT_FOUND),
        (vectors(0, Some(2), None), Status::NOT_FOUND),
        (vectors(0, None, Some(1)), Status::NOT_FOUND),
        (vectors(0, Some(0xfffe), Some(0xfffe)), Status::NOT_FOUND),
        (vectors(9, Some(1), Some(2)), Status::NOT_FOUND),
        (
            Request::QueueVectors(QueueVectors {
                dev: DevNum(0),
                queue: QueueIndex(1),
                kick: None,
                call: None,
            }),
            Status::NOT_FOUND,
        ),
    ] {
        assert_eq!(bench.ask(request), status, "{request}");
    }
    assert!(bench.notify.is_empty());
    // None at all is what takes them away.
    assert_eq!(bench.ask(vectors(0, None, None)), Status::OK);
    assert!(matches!(bench.notify[..], [(0, None, None)]));
}

#[test]
fn each_device_has_windows_and_changes_of_its_own() {
    let mut bench = Bench::new();
    bench.claim(0);
    bench.claim(1);
    let of = |device: u16, offset, more| {
        let id = control::window_of_device(DevNum(device), 1);
        let Request::ViewAdd(view) = view(id, 0, offset, PIECE) else {
            unreachable!("as just made");
        };
        Request::ViewAdd(ViewAdd { more, ..view })
    };
    // Two guests have other memory at the same addresses, and lend it at the same time.
    assert_eq!(bench.ask(of(0, 0, true)), Status::OK);
    assert_eq!(bench.ask(of(1, PIECE, false)), Status::OK);
    assert_eq!(
        bench.core.connections[&bench.conn]
            .table_for(0)
            .mappings()
            .len(),
        0
    );
    let other = Request::WindowRemove { id: 2, more: false };
    assert_eq!(
        bench.ask(other),
        Status::NOT_FOUND,
        "and what was staged is gone"
    );
    assert_eq!(bench.ask(of(0, 0, false)), Status::OK);
    for (device, offset) in [(0, 0), (1, PIECE)] {
        let table = bench.core.connections[&bench.conn].table_for(device);
        let slice = table.space().slice(BusAddr(0), 1, Access::ReadWrite);
        slice
            .expect("a window")
            .write(0, &(device + 1).to_le_bytes()[..1]);
        let mut found = [0];
        let at = usize::try_from(offset).expect("small");
        bench
            .memory
            .ram()
            .get(at, 1)
            .expect("there")
            .read(0, &mut found);
        assert_eq!(u16::from(found[0]), device + 1);
    }
    assert_eq!(bench.ask(of(7, 0, false)), Status::NOT_FOUND);
}

#[test]
fn a_driver_that_is_gone_leaves_nothing_mapped() {
    let mut bench = Bench::new();
    bench.claim(0);
    assert_eq!(bench.ask(view(1, 0, 0, LEN)), Status::OK);
    assert!(Arc::strong_count(&bench.memory) > 1);
    bench.core.disconnect(NOW, bench.conn);
    bench.work();
    assert!(!bench.seen(0, 8));
    bench.tables.clear();
    assert_eq!(Arc::strong_count(&bench.memory), 1);
    // The next one is served.
    bench.conn = bench.core.connect(Peer::default(), 48);
    let memory = Some(Arc::clone(&bench.memory));
    bench.core.set_common(bench.conn, memory, None);
    bench.claim(0);
    assert_eq!(bench.ask(view(1, 0, 0, LEN)), Status::OK);
    assert!(bench.seen(0, LEN));
}
