// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A session on a bus that passes no descriptors: windows are views of the memory in common, queues have vectors; against a scripted device host.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod world;

use common::Host;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use virtio_msg::{DevNum, DeviceStatus, FeatureSet, QueueIndex};
use vmsg_bus::Capabilities;
use vmsg_bus::control::{COMMON_BACKING, Resume, Status};
use vmsg_proxy::places::{Found, Place, PlaceError, Places};
use vmsg_proxy::session::{
    Event, FileId, Op, OpError, OtherMemory, Outcome, QueueVectors, ResetReason, Target, Window,
};
use world::{LIVE, Mishap, World, setup, window};

const HUGE: u64 = 2 << 20;
const GIB: u64 = 1 << 30;
/// The bus's messages in the layout of AMP.
const SIZE: usize = 64;

/// Pages of 2 MiB, each somewhere else.
#[derive(Debug)]
struct Scattered {
    /// Times it was asked.
    asked: AtomicU64,
    error: Mutex<Option<PlaceError>>,
    /// Files that are not in common.
    others: Vec<u64>,
}

/// Where the page with this number is: far from its neighbours, no two at one place.
fn place_of(page: u64) -> u64 {
    (page * 7 + 3) % 512 * HUGE
}

impl Places for Scattered {
    fn places(
        &self,
        _: BorrowedFd<'_>,
        id: FileId,
        file_offset: u64,
        len: u64,
    ) -> Result<Found, PlaceError> {
        self.asked.fetch_add(1, Ordering::Relaxed);
        if let Some(error) = self.error.lock().unwrap().clone() {
            return Err(error);
        }
        if self.others.contains(&id.inode) {
            let page_size = 4096;
            return Err(PlaceError::Movable { page_size });
        }
        let mut places = Vec::new();
        let mut at = file_offset;
        while at < file_offset + len {
            let skip = at % HUGE;
            let piece = (HUGE - skip).min(file_offset + len - at);
            places.push(Place {
                offset_in_common: place_of(at / HUGE) + skip,
                len: piece,
            });
            at += piece;
        }
        Ok(Found { places, hold: None })
    }
}

fn scattered() -> Arc<Scattered> {
    Arc::new(Scattered {
        asked: AtomicU64::new(0),
        error: Mutex::default(),
        others: vec![66],
    })
}

fn host() -> Host {
    let mut host = Host::net();
    host.common = Some(GIB);
    host
}

/// Vectors for two queues.
fn plan() -> Vec<QueueVectors> {
    let of = |kick, call| QueueVectors {
        kick: Some(kick),
        call: Some(call),
    };
    vec![of(5, 1), of(6, 2)]
}

fn world_with(places: Arc<Scattered>) -> World {
    let mut world = World::new(Target::Number(DevNum(3)), host());
    world.caps = Capabilities::common(SIZE);
    world.session.set_places(places);
    world.session.set_vectors(plan());
    world.connect();
    world
}

fn world() -> World {
    world_with(scattered())
}

fn ops(windows: Vec<Window>) -> Vec<Op> {
    vec![
        Op::Claim,
        Op::SetWindows(windows),
        Op::SetStatus(DeviceStatus::RESET),
        Op::SetStatus(DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER),
        Op::SetFeatures(FeatureSet::from_bits(&[29, 32])),
        Op::SetStatus(LIVE & !DeviceStatus::DRIVER_OK),
        Op::SetQueue(QueueIndex(0), setup(0x1000)),
        Op::SetQueue(QueueIndex(1), setup(0x8000)),
        Op::SetQueue(QueueIndex(2), setup(0x10000)),
        Op::SetStatus(LIVE),
    ]
}

fn bring_up(world: &mut World) {
    for op in ops(vec![window(0, 4 * HUGE, 1)]) {
        world
            .op(op.clone())
            .unwrap_or_else(|error| panic!("{op:?}: {error}"));
    }
}

/// What the host has: bus address, length, offset in the common memory.
fn views(world: &World) -> Vec<(u64, u64, u64)> {
    let views = world.host.views.values();
    let mut views: Vec<_> = views
        .map(|view| {
            assert_eq!(view.backing, COMMON_BACKING);
            (view.base.0, view.len, view.offset)
        })
        .collect();
    views.sort_unstable();
    views
}

fn page(number: u64) -> (u64, u64, u64) {
    (number * HUGE, HUGE, place_of(number))
}

#[test]
fn a_window_is_as_many_views_as_it_has_places() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    world
        .op(Op::SetWindows(vec![window(0, 3 * HUGE, 1)]))
        .unwrap();
    assert_eq!(views(&world), [page(0), page(1), page(2)]);
    assert_eq!(world.host.table_changes, 1, "all at once");
    assert!(world.host.windows.is_empty() && world.host.backings.is_empty());
    assert!(!world.host.claimed, "there is one driver");
    // Another table: what stays stays.
    let sent = world.sent;
    let two = vec![window(0, 3 * HUGE, 1), window(GIB, HUGE, 1)];
    world.op(Op::SetWindows(two)).unwrap();
    assert_eq!(world.sent, sent + 1);
    assert_eq!(world.host.views.len(), 4);
    world.op(Op::SetWindows(vec![])).unwrap();
    assert!(world.host.views.is_empty());
}

#[test]
fn a_gibibyte_in_scattered_pages_is_512_views_in_a_few_turns() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    let sent = world.sent;
    world.op(Op::SetWindows(vec![window(0, GIB, 1)])).unwrap();
    let all: Vec<_> = (0..512).map(page).collect();
    assert_eq!(views(&world), all);
    assert_eq!(world.sent, sent + 512);
    assert_eq!(world.host.table_changes, 1);
    // All of them are taken back, and their ids are free again.
    world.op(Op::Release).unwrap();
    assert!(world.host.views.is_empty());
    world.op(Op::SetWindows(vec![window(0, GIB, 1)])).unwrap();
    assert_eq!(views(&world), all);
    assert!(
        world
            .host
            .views
            .keys()
            .all(|id| id >> 16 == 3 && id & 0xffff <= 512)
    );
}

#[test]
fn requests_for_views_do_not_wait_for_each_other_but_the_last_waits_for_all() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    let id = world
        .session
        .submit(world.now, Op::SetWindows(vec![window(0, 40 * HUGE, 1)]));
    let mut turns = Vec::new();
    loop {
        let mut answers = Vec::new();
        while let Some(out) = world.session.poll_transmit() {
            assert!(out.fds.is_empty());
            answers.push(world.host.handle(&out.bytes, Vec::new()).unwrap());
        }
        if answers.is_empty() {
            break;
        }
        turns.push(answers.len());
        for answer in answers {
            world.session.handle_message(world.now, &answer);
        }
    }
    assert_eq!(turns, [16, 16, 7, 1]);
    world.run();
    assert_eq!(world.result(id), Some(Ok(Outcome::Done)));
    assert_eq!(world.host.views.len(), 40);
    assert_eq!(world.session.counters().late, 0);
}

#[test]
fn windows_that_come_and_go_are_views_of_parts_of_pages() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    let part = |base: u64, offset: u64, len: u64| Window {
        file_offset: offset,
        ..window(base, len, 1)
    };
    let change = |remove: &[u64], add: Vec<Window>| Op::ChangeWindows {
        remove: remove.to_vec(),
        add,
    };
    // The second one reaches from one page into the next.
    let add = vec![
        part(0x10_0000, 0x3000, 0x1000),
        part(0x20_0000, HUGE - 0x1000, 0x2000),
    ];
    world.op(change(&[], add)).unwrap();
    let reaching = [
        (0x20_0000, 0x1000, place_of(0) + HUGE - 0x1000),
        (0x20_1000, 0x1000, place_of(1)),
    ];
    let first = (0x10_0000, 0x1000, place_of(0) + 0x3000);
    assert_eq!(views(&world), [&[first], &reaching[..]].concat());
    world.op(change(&[0x10_0000], vec![])).unwrap();
    assert_eq!(views(&world), reaching);
    let add = vec![part(0x20_0000, 0, 0x1000)];
    world.op(change(&[0x20_0000], add)).unwrap();
    assert_eq!(views(&world), [(0x20_0000, 0x1000, place_of(0))]);
    assert_eq!(world.host.table_changes, 3);
}

#[test]
fn a_new_device_host_is_shown_the_same_places() {
    let places = scattered();
    let mut world = world_with(places.clone());
    bring_up(&mut world);
    let before = views(&world);
    let asked = places.asked.load(Ordering::Relaxed);
    let new = world.host.restarted();
    world.replace(new);
    assert!(world.session.is_ready());
    assert_eq!(views(&world), before);
    assert_eq!(world.host.status, LIVE);
    assert_eq!(world.host.resume.len(), 3);
    assert!(
        world
            .host
            .resume
            .values()
            .all(|at| *at == Resume::UsedInRing)
    );
    assert_eq!(
        places.asked.load(Ordering::Relaxed),
        asked,
        "it is known where"
    );
}

#[test]
fn what_is_asked_for_while_nobody_is_there_is_shown_to_who_comes() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    world.disconnect();
    world
        .op(Op::SetWindows(vec![window(0, 2 * HUGE, 1)]))
        .unwrap();
    world.connect();
    assert_eq!(views(&world), [page(0), page(1)]);
}

#[test]
fn a_rom_is_left_out_and_memory_that_is_elsewhere_is_refused_with_the_remedy() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    let rom = window(0xfffc_0000, 0x4_0000, 66);
    world
        .op(Op::SetWindows(vec![window(0, HUGE, 1), rom.clone()]))
        .unwrap();
    assert_eq!(views(&world), [page(0)]);
    let left_out = Event::LeftOut {
        base: 0xfffc_0000,
        len: 0x4_0000,
    };
    assert!(world.events.contains(&left_out));
    // A table that lacks it is another one; nothing has to be said for that.
    let sent = world.sent;
    world.op(Op::SetWindows(vec![window(0, HUGE, 1)])).unwrap();
    assert_eq!(world.sent, sent);
    // Not a ROM, and nothing but one.
    for table in [
        vec![window(0, HUGE, 1), window(GIB, 1 << 20, 66)],
        vec![rom],
    ] {
        let refused = world.op(Op::SetWindows(table)).unwrap_err();
        let OpError::OtherMemory(OtherMemory::NoPlace { why, .. }) = &refused else {
            panic!("{refused}");
        };
        assert!(matches!(why, PlaceError::Movable { .. }));
        let text = refused.to_string();
        assert!(text.contains("hugetlbfs"), "{text}");
    }
    assert_eq!(views(&world), [page(0)], "what was there is there");
}

#[test]
fn who_may_not_know_where_pages_are_is_told_so_whatever_the_window() {
    let places = scattered();
    let mut world = world_with(places.clone());
    world.op(Op::Claim).unwrap();
    *places.error.lock().unwrap() = Some(PlaceError::NotPermitted);
    let table = vec![window(0, 0x1000, 1)];
    let refused = world.op(Op::SetWindows(table)).unwrap_err();
    assert!(refused.to_string().contains("CAP_SYS_ADMIN"), "{refused}");
    // Once it is put right the VMM is served.
    *places.error.lock().unwrap() = None;
    bring_up(&mut world);
    assert_eq!(world.host.views.len(), 4);
}

#[test]
fn what_a_copying_front_has_in_the_common_memory_needs_no_places() {
    let mut world = World::new(Target::Number(DevNum(3)), host());
    world.caps = Capabilities::common(SIZE);
    world.connect();
    world.op(Op::Claim).unwrap();
    let part = Window {
        file_offset: 5 * HUGE,
        file: FileId::COMMON,
        ..window(1 << 20, HUGE, 0)
    };
    world.op(Op::SetWindows(vec![part])).unwrap();
    assert_eq!(views(&world), [(1 << 20, HUGE, 5 * HUGE)]);
    // Anything else cannot be lent there.
    let refused = world.op(Op::SetWindows(vec![window(0, HUGE, 1)]));
    assert_eq!(refused, Err(OpError::BusCannot("lend memory")));
}

#[test]
fn memory_in_too_many_pieces_is_refused() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    let table = vec![window(0, 16_385 * HUGE, 1)];
    let refused = world.op(Op::SetWindows(table));
    assert!(matches!(refused, Err(OpError::Invalid(_))), "{refused:?}");
}

#[test]
fn a_device_host_without_the_memory_is_named_and_nothing_is_half_done() {
    let mut world = world();
    world.op(Op::Claim).unwrap();
    world.host.refuse_views = Some(Status::UNSUPPORTED);
    let refused = world.op(Op::SetWindows(vec![window(0, 20 * HUGE, 1)]));
    let expected = OpError::Refused {
        what: "VIEW_ADD",
        code: Status::UNSUPPORTED.0,
    };
    assert_eq!(refused, Err(expected));
    // Some of the others were staged there: the connection is of no use any more.
    assert!(
        world
            .events
            .iter()
            .any(|e| matches!(e, Event::LinkFault(_)))
    );
    let new = world.host.restarted();
    world.replace(new);
    world
        .op(Op::SetWindows(vec![window(0, 20 * HUGE, 1)]))
        .unwrap();
    assert_eq!(world.host.views.len(), 20);
}

#[test]
fn a_bus_that_turns_out_to_have_no_views_is_refused() {
    let mut world = world();
    bring_up(&mut world);
    world.disconnect();
    world.caps = Capabilities::from_bits(0, SIZE);
    world.host = world.host.restarted();
    world.connect();
    let reason = world.events.iter().rev().find_map(|event| match event {
        Event::NeedsReset(reason) => Some(reason.clone()),
        _ => None,
    });
    assert_eq!(reason, Some(ResetReason::BusCannot("lend memory")));
}

#[test]
fn queues_get_vectors_again_on_each_connection_and_share_them_if_they_must() {
    let mut world = world();
    bring_up(&mut world);
    let told = |world: &World, queue: u32| {
        let vectors = world.host.vectors.get(&queue)?;
        Some((vectors.kick?, vectors.call?))
    };
    for (queue, vectors) in [(0, (5, 1)), (1, (6, 2)), (2, (5, 1))] {
        assert_eq!(told(&world, queue), Some(vectors));
    }
    let bells: Vec<_> = world
        .session
        .bells()
        .map(|bell| (bell.queue.0, bell.vectors))
        .collect();
    let plan = plan();
    assert_eq!(bells, [(0, plan[0]), (1, plan[1]), (2, plan[0])]);
    let version = world.session.bells_version();
    world.disconnect();
    assert_ne!(world.session.bells_version(), version);
    assert_eq!(world.session.bells().count(), 0);
    world.host = world.host.restarted();
    world.epoch += 1;
    // The next one has fewer.
    world.session.set_vectors(plan[..1].to_vec());
    world.connect();
    assert_eq!(
        (told(&world, 0), told(&world, 1)),
        (Some((5, 1)), Some((5, 1)))
    );
    world.op(Op::SetStatus(DeviceStatus::RESET)).unwrap();
    assert_eq!(world.session.bells().count(), 0, "a reset takes them away");
}

#[test]
fn a_host_that_refuses_vectors_gets_messages() {
    let mut world = world();
    world.host.refuse_vectors = Some(Status::UNSUPPORTED);
    bring_up(&mut world);
    assert!(world.host.vectors.is_empty());
    assert_eq!(world.session.bells().count(), 0);
    world.host.kicks.clear();
    world.session.kick(QueueIndex(1));
    world.run();
    assert_eq!(world.host.kicks, [1]);
}

#[test]
fn whatever_happens_to_one_message_the_host_ends_up_with_the_same() {
    let count = {
        let mut world = world();
        bring_up(&mut world);
        world.sent
    };
    for mishap in [
        Mishap::Never,
        Mishap::OtherAnswer,
        Mishap::Garbage,
        Mishap::LinkLost,
        Mishap::LinkLostAfter,
    ] {
        for at in 1..=count {
            let mut world = World::new(Target::Number(DevNum(3)), host());
            world.caps = Capabilities::common(SIZE);
            world.session.set_places(scattered());
            world.session.set_vectors(plan());
            world.mishap = Some((at, mishap));
            world.connect();
            let mut turns = 0;
            let mut done = 0;
            let mut op = None;
            let all = ops(vec![window(0, 4 * HUGE, 1)]);
            while done < all.len() || !world.session.is_ready() {
                turns += 1;
                assert!(turns < 1000, "{mishap:?} at {at}: {:?}", world.events);
                let faults = world.events.iter();
                let is_down = faults.filter(|e| matches!(e, Event::LinkFault(_))).count();
                if is_down != 0 || !world.session.is_ready() {
                    world.events.retain(|e| !matches!(e, Event::LinkFault(_)));
                    world.disconnect();
                    world.connect();
                }
                let id = *op.get_or_insert_with(|| world.submit(all[done].clone()));
                match world.result(id) {
                    Some(Ok(_)) => {
                        done += 1;
                        op = (done < all.len()).then(|| world.submit(all[done].clone()));
                    }
                    // A VMM would set the device up again: so does this one.
                    Some(Err(_)) => op = None,
                    None => {
                        world.tick();
                    }
                }
                if done == all.len() && !world.session.is_ready() {
                    world.tick();
                }
            }
            assert_eq!(
                views(&world),
                [page(0), page(1), page(2), page(3)],
                "{mishap:?} at {at}"
            );
            assert_eq!(world.host.status, LIVE, "{mishap:?} at {at}");
        }
    }
}
