// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows that come and go, and memory of the device, against a scripted device host.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod world;

use common::{Host, MAX};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use virtio_msg::DevNum;
use vmsg_bus::Capabilities;
use vmsg_bus::control::{SharedMemory, Status};
use vmsg_mem::Mapping;
use vmsg_proxy::session::{
    CommonMemory, Event, FileId, Op, OpError, OtherMemory, Outcome, Target, Window,
};
use world::{Mishap, World};

const PAGE: u64 = 0x1000;

fn memfd(len: u64, sealed: bool) -> Arc<OwnedFd> {
    Arc::new(Mapping::memfd("test", len, sealed).unwrap().1)
}

/// Pages of one file of 64 MiB.
struct Ram(Arc<OwnedFd>);

impl Ram {
    fn new() -> Ram {
        Ram(memfd(64 << 20, true))
    }

    fn page(&self, address: u64) -> Window {
        Window {
            base: address,
            len: PAGE,
            file_offset: address % (64 << 20),
            writable: true,
            fd: Arc::clone(&self.0),
            file: FileId {
                device: 1,
                inode: 77,
            },
        }
    }

    fn map(&self, addresses: impl IntoIterator<Item = u64>) -> Op {
        Op::ChangeWindows {
            remove: vec![],
            add: addresses.into_iter().map(|at| self.page(at)).collect(),
        }
    }
}

fn unmap(addresses: impl IntoIterator<Item = u64>) -> Op {
    Op::ChangeWindows {
        remove: addresses.into_iter().collect(),
        add: vec![],
    }
}

/// The addresses that the host has views at.
fn views(world: &World) -> Vec<u64> {
    let mut bases: Vec<u64> = world.host.views.values().map(|v| v.base.0).collect();
    bases.sort_unstable();
    bases
}

#[test]
fn windows_come_and_go_as_views_of_one_file() {
    let ram = Ram::new();
    let mut world = World::net();
    world.op(Op::Claim).unwrap();
    world.op(ram.map([0x10_0000, 0x20_0000])).unwrap();
    assert_eq!(world.host.backings.len(), 1);
    assert_eq!(views(&world), [0x10_0000, 0x20_0000]);
    assert_eq!(world.host.table_changes, 1);
    assert!(world.host.windows.is_empty());
    let sent = world.sent;
    world
        .op(Op::ChangeWindows {
            remove: vec![0x10_0000],
            add: vec![ram.page(0x30_0000)],
        })
        .unwrap();
    assert_eq!(views(&world), [0x20_0000, 0x30_0000]);
    assert_eq!(world.host.table_changes, 2, "both at once");
    assert_eq!(world.sent, sent + 2);
    world.op(unmap([0x20_0000])).unwrap();
    assert_eq!(world.sent, sent + 3, "one message for one change");
    world.op(Op::Release).unwrap();
    assert!(world.host.views.is_empty() && world.host.backings.is_empty());
    world.op(ram.map([0x10_0000])).unwrap();
    assert_eq!(world.host.backings.len(), 1);
}

#[test]
fn a_table_and_changes_mix() {
    let ram = Ram::new();
    let mut world = World::net();
    world.bring_up();
    world.op(ram.map([0x10_0000_0000])).unwrap();
    assert_eq!((world.host.windows.len(), world.host.views.len()), (2, 1));
    world.op(unmap([0])).unwrap();
    assert_eq!(
        world.host.windows.len(),
        1,
        "a window of the table is removed like any other"
    );
    let keep = ram.page(0x10_0000_0000);
    let sent = world.sent;
    world.op(Op::SetWindows(vec![keep])).unwrap();
    assert_eq!(world.sent, sent + 1, "the view that is there stays");
    assert_eq!((world.host.windows.len(), world.host.views.len()), (0, 1));
}

#[test]
fn a_host_that_knows_no_views_gets_windows() {
    let ram = Ram::new();
    let mut world = World::new(Target::Number(DevNum(3)), Host::net());
    let mut old = Capabilities::all(MAX);
    old.views = false;
    world.session.handle_link_up(world.now, old, 1);
    world.run();
    world.op(ram.map([0x10_0000, 0x20_0000])).unwrap();
    assert_eq!((world.host.windows.len(), world.host.views.len()), (2, 0));
    assert!(world.host.backings.is_empty());
    // The next one does.
    let host = world.host.restarted();
    world.replace(host);
    assert_eq!((world.host.windows.len(), world.host.views.len()), (0, 2));
    assert_eq!(world.host.backings.len(), 1);
}

#[test]
fn three_hundred_views_are_there_again_after_a_restart() {
    let ram = Ram::new();
    let mut world = World::net();
    world.bring_up();
    let pages: Vec<u64> = (0..300).map(|i| 0x10_0000_0000 + i * 2 * PAGE).collect();
    for page in &pages {
        world.op(ram.map([*page])).unwrap();
    }
    world.op(unmap(pages[..10].iter().copied())).unwrap();
    let host = world.host.restarted();
    world.replace(host);
    world.assert_host_is_live();
    assert_eq!(views(&world), pages[10..]);
    assert_eq!(world.host.backings.len(), 1);
    assert_eq!(world.host.table_changes, 1, "all at once");
}

#[test]
fn what_changes_while_the_host_is_away_is_there_when_it_is_back() {
    let ram = Ram::new();
    let mut world = World::net();
    world.bring_up();
    world.op(ram.map([0x10_0000_0000, 0x10_0000_1000])).unwrap();
    world.disconnect();
    let id = world.submit(unmap([0x10_0000_0000]));
    let next = world.submit(ram.map([0x10_0000_0000]));
    assert_eq!(
        world.result(id),
        None,
        "the host may live, and not have heard yet"
    );
    assert_eq!(world.result(next), None, "nothing overtakes it");
    world.host_ended();
    assert_eq!(world.result(id), Some(Ok(Outcome::Done)));
    assert_eq!(world.result(next), Some(Ok(Outcome::Done)));
    world.op(unmap([0x10_0000_0000])).unwrap();
    world.op(ram.map([0x10_0000_5000])).unwrap();
    assert_eq!(world.session.poll_timeout(), None);
    assert!(matches!(
        world.op(unmap([0x10_0000_0000])),
        Err(OpError::Invalid(_))
    ));
    world.connect();
    world.assert_host_is_live();
    assert_eq!(views(&world), [0x10_0000_1000, 0x10_0000_5000]);
}

#[test]
fn what_was_being_taken_back_when_the_connection_ended_is_taken_back_on_the_next() {
    let ram = Ram::new();
    let mut world = World::net();
    world.bring_up();
    world.op(ram.map([0x10_0000_0000, 0x10_0000_1000])).unwrap();
    for mishap in [Mishap::LinkLost, Mishap::LinkLostAfter] {
        let page = views(&world)[0];
        world.mishap = Some((world.sent + 1, mishap));
        let id = world.submit(unmap([page]));
        assert_eq!(world.result(id), None, "{mishap:?}");
        world.connect();
        assert_eq!(world.result(id), Some(Ok(Outcome::Done)));
        assert!(!views(&world).contains(&page));
    }
    assert!(views(&world).is_empty());
}

#[test]
fn what_is_mapped_before_the_device_was_ever_seen_is_noted() {
    let ram = Ram::new();
    let mut world = World::new(Target::Number(DevNum(3)), Host::net());
    world.op(ram.map([PAGE, 2 * PAGE])).unwrap();
    world.op(unmap([PAGE])).unwrap();
    world.connect();
    assert_eq!(views(&world), [2 * PAGE]);
}

#[test]
fn a_refused_change_leaves_all_as_it_was() {
    let ram = Ram::new();
    let mut world = World::net();
    world.bring_up();
    world.op(ram.map([0x10_0000_0000])).unwrap();
    world.host.refuse_views = Some(Status::TOO_MANY);
    let refused = world.op(Op::ChangeWindows {
        remove: vec![0x10_0000_0000],
        add: vec![ram.page(0x20_0000_0000)],
    });
    let expected = OpError::Refused {
        what: "VIEW_ADD",
        code: 4,
    };
    assert_eq!(refused, Err(expected));
    assert!(world.session.is_ready(), "the connection goes on");
    assert_eq!(views(&world), [0x10_0000_0000]);
    world.host.refuse_views = None;
    world.host.refuse_backings = true;
    let other = Ram::new();
    let mut page = other.page(0x20_0000_0000);
    page.file.inode = 78;
    let add = vec![page];
    let remove = vec![0x10_0000_0000];
    let change = Op::ChangeWindows { remove, add };
    assert!(matches!(
        world.op(change.clone()),
        Err(OpError::Refused { code: 6, .. })
    ));
    assert_eq!(views(&world), [0x10_0000_0000]);
    world.host.refuse_backings = false;
    world.op(change).unwrap();
    assert_eq!(views(&world), [0x20_0000_0000]);
}

#[test]
fn impossible_changes_are_not_sent() {
    let ram = Ram::new();
    let mut world = World::net();
    world.op(ram.map([PAGE])).unwrap();
    let sent = world.sent;
    let many: Vec<u64> = (0..16_384).map(|i| 0x10_0000 + i * PAGE).collect();
    for bad in [
        ram.map([PAGE]),
        ram.map([2 * PAGE, 2 * PAGE]),
        unmap([0]),
        unmap([PAGE, PAGE]),
        ram.map(many.clone()),
    ] {
        assert!(matches!(world.op(bad), Err(OpError::Invalid(_))));
    }
    assert_eq!(world.sent, sent);
    world
        .op(ram.map(many[1..].to_vec()))
        .expect("16,384 in all");
    assert_eq!(world.host.views.len(), 16_384);
}

/// Whatever goes wrong at whichever message: the host ends up with what the operations that were done say.
#[test]
fn a_mishap_at_every_step_loses_no_change() {
    let ram = Ram::new();
    let steps = || {
        [
            ram.map([PAGE, 2 * PAGE]),
            unmap([PAGE]),
            ram.map([5 * PAGE]),
            Op::ChangeWindows {
                remove: vec![2 * PAGE],
                add: vec![ram.page(PAGE)],
            },
        ]
    };
    for mishap in [
        Mishap::Never,
        Mishap::OtherAnswer,
        Mishap::Garbage,
        Mishap::LinkLost,
        Mishap::LinkLostAfter,
    ] {
        for at in 0..12 {
            let mut world = World::net();
            world.bring_up();
            // Out of the way of the table.
            world.op(Op::SetWindows(vec![])).unwrap();
            world.mishap = Some((world.sent + at, mishap));
            for step in steps() {
                let id = world.submit(step);
                let mut ended = false;
                while world.result(id).is_none() {
                    if !world.session.is_ready() && !std::mem::replace(&mut ended, true) {
                        world.host_ended();
                        continue;
                    }
                    assert!(world.tick(), "{mishap:?} at {at}: it never ends");
                }
                if !world.session.is_ready() {
                    world.host.end_of_connection();
                    world.connect();
                }
                assert_eq!(
                    world.result(id),
                    Some(Ok(Outcome::Done)),
                    "{mishap:?} at {at}"
                );
            }
            assert_eq!(views(&world), [PAGE, 5 * PAGE], "{mishap:?} at {at}");
        }
    }
}

#[test]
fn a_broken_device_s_windows_can_be_taken_back() {
    let ram = Ram::new();
    let mut world = World::net();
    world.bring_up();
    world.op(ram.map([0x10_0000_0000, 0x10_0000_1000])).unwrap();
    let mut host = world.host.restarted();
    host.refuse_queues = true;
    world.replace(host);
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::NeedsReset(_)))
    );
    world
        .op(unmap([0x10_0000_0000]))
        .expect("a guest unmaps what it has mapped");
    world.host.refuse_queues = false;
    world
        .op(Op::SetStatus(virtio_msg::DeviceStatus::RESET))
        .unwrap();
    world.host.end_of_connection();
    world.connect();
    assert_eq!(views(&world), [0x10_0000_1000]);
}

#[test]
fn files_that_nobody_needs_are_taken_back() {
    let ram = Ram::new();
    let mut world = World::net();
    world.op(ram.map([PAGE])).unwrap();
    world.op(unmap([PAGE])).unwrap();
    assert_eq!(
        world.host.backings.len(),
        1,
        "it may be needed again at once"
    );
    assert!(world.tick());
    assert!(world.host.backings.is_empty());
    assert!(!world.tick(), "nothing else is to be done");
    world.op(ram.map([PAGE])).unwrap();
    assert_eq!(world.host.backings.len(), 1);
}

#[test]
fn memory_in_common_is_checked_piece_by_piece() {
    let mut world = World::new(Target::Number(DevNum(3)), Host::net());
    let ram = Ram::new();
    let file = ram.page(0).file;
    world.session.set_common_memory(Ok(vec![CommonMemory {
        base: 0,
        len: 64 << 20,
        file_offset: 0,
        file,
        path: "ram".into(),
    }]));
    let mut caps = Capabilities::from_bits(0, MAX);
    caps.enumerates = true;
    world.session.handle_link_up(world.now, caps, 1);
    world.run();
    let sent = world.sent;
    let mut rom = ram.page(0xf_0000);
    rom.file.inode = 5;
    let add = |window: &Window| Op::ChangeWindows {
        remove: vec![],
        add: vec![window.clone()],
    };
    world.op(add(&rom)).expect("a ROM may come first");
    assert!(matches!(world.events.pop(), Some(Event::Done { .. })));
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::LeftOut { .. }))
    );
    world.op(ram.map([PAGE])).unwrap();
    let mut moved = ram.page(3 * PAGE);
    moved.file_offset = 0;
    let misplaced = world.op(add(&moved));
    assert!(matches!(
        misplaced,
        Err(OpError::OtherMemory(OtherMemory::Misplaced { .. }))
    ));
    assert_eq!(world.sent, sent, "nothing is lent there");
}

fn region(len: u64, file_offset: u64, fd: &Arc<OwnedFd>, fds: usize) -> Host {
    let mut host = Host::net();
    host.region = Some((SharedMemory { len, file_offset }, Arc::clone(fd), fds));
    host
}

#[test]
fn the_device_s_memory_comes_with_its_file() {
    let fd = memfd(8 * PAGE, true);
    let mut world = World::up(
        Target::Number(DevNum(3)),
        region(4 * PAGE, 2 * PAGE, &fd, 1),
    );
    let Ok(Outcome::SharedMemory(Some(region))) = world.op(Op::SharedMemory(1)) else {
        panic!("a region is there");
    };
    assert_eq!((region.len, region.file_offset), (4 * PAGE, 2 * PAGE));
    let inode = |fd: &OwnedFd| rustix::fs::fstat(fd.as_fd()).unwrap().st_ino;
    assert_eq!(inode(&region.fd), inode(&fd));
    world.host.region = None;
    assert_eq!(
        world.op(Op::SharedMemory(1)),
        Ok(Outcome::SharedMemory(None))
    );
    let mut old = Capabilities::all(MAX);
    old.shared_memory = false;
    world.session.handle_link_up(world.now, old, 1);
    world.run();
    let sent = world.sent;
    assert_eq!(
        world.op(Op::SharedMemory(1)),
        Ok(Outcome::SharedMemory(None))
    );
    assert_eq!(world.sent, sent);
}

#[test]
fn memory_that_would_kill_who_maps_it_is_not_used() {
    let sealed = memfd(8 * PAGE, true);
    let shrinks = memfd(8 * PAGE, false);
    let socket = Arc::new(std::os::unix::net::UnixStream::pair().unwrap().0.into());
    for (len, offset, fd) in [
        (9 * PAGE, 0, &sealed),
        (PAGE, 8 * PAGE, &sealed),
        (PAGE, 0, &shrinks),
        (PAGE, 0, &socket),
    ] {
        let mut world = World::up(Target::Number(DevNum(3)), region(len, offset, fd, 1));
        assert_eq!(
            world.op(Op::SharedMemory(0)),
            Ok(Outcome::SharedMemory(None))
        );
        assert!(world.session.is_ready());
    }
    for (len, offset, fds) in [(0, 0, 1), (u64::MAX, 2, 1), (PAGE, 0, 0), (PAGE, 0, 2)] {
        let mut world = World::up(Target::Number(DevNum(3)), region(len, offset, &sealed, fds));
        let id = world.submit(Op::SharedMemory(0));
        assert!(
            matches!(world.result(id), Some(Err(OpError::BadAnswer(_)))),
            "{len} {fds}"
        );
    }
}
