// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vhost-user front with `isolate=on`: all that it does without, and what the device host gets to see.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod hostile;
#[path = "../late/mod.rs"]
#[allow(dead_code, reason = "each test program uses another part")]
mod late;
mod place;
#[path = "../vhost/mod.rs"]
mod vhost_guest;

use place::Place;
use std::os::fd::AsRawFd;
use std::time::Duration;
use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_guest::{GUEST, Guest, RAM, Ram};
use vmsg_mem::{BusAddr, Mapping};

fn inverted(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| !byte).collect()
}

/// So many requests, a few at a time.
fn traffic(guest: &mut Guest, requests: usize) {
    let mut asked = std::collections::VecDeque::new();
    for n in 0..requests {
        let bytes: Vec<u8> = (0..1 + n * 37 % 5000).map(|b| (b + n) as u8).collect();
        guest.ask(0, &bytes, bytes.len());
        asked.push_back(inverted(&bytes));
        while asked.len() > n % 7 {
            assert_eq!(guest.answer(0), asked.pop_front().unwrap(), "request {n}");
        }
    }
    for answer in asked {
        assert_eq!(guest.answer(0), answer);
    }
}

#[test]
fn requests_go_there_and_back_over_resets_of_the_driver_and_restarts_of_the_device_host() {
    for given in [false, true] {
        let mut place = Place::new(&["late"], given);
        let ram = Ram::new();
        let mut guest = Guest::start(&place.fronts[0].socket, ram, 1);
        traffic(&mut guest, 300);
        for _ in 0..3 {
            assert_eq!(guest.stop().len(), 1);
            guest.set_up(1);
            traffic(&mut guest, 50);
            place.end_host();
            guest.ask(0, &[1; 600], 600);
            place.start_host();
            assert_eq!(guest.answer(0), [!1; 600]);
            traffic(&mut guest, 50);
        }
        drop(guest);
        // The next one.
        let mut guest = Guest::start(&place.fronts[0].socket, Ram::new(), 1);
        traffic(&mut guest, 50);
    }
}

#[test]
fn a_kick_before_enable_is_not_lost() {
    for given in [false, true] {
        let place = Place::new(&["late"], given);
        let mut guest = Guest::connect(&place.fronts[0].socket, Ram::new());
        guest.new_queues(1);
        guest.features_and_memory();
        guest.set_ring(0, 0);
        guest.ask(0, &[3; 10], 10);
        assert_eq!(guest.answer_within(0, Duration::from_millis(100)), None);
        guest.enable(0);
        assert_eq!(guest.answer(0), [!3; 10]);
        traffic(&mut guest, 20);
    }
}

#[test]
fn a_ring_rests_and_goes_on_where_it_was() {
    let place = Place::new(&["late"], true);
    let mut guest = Guest::start(&place.fronts[0].socket, Ram::new(), 1);
    traffic(&mut guest, 130);
    let base = guest.stop()[0];
    assert_eq!(base, 130);
    guest.ask(0, &[9; 100], 100);
    assert_eq!(guest.answer_within(0, Duration::from_millis(100)), None);
    guest.features_and_memory();
    guest.set_ring(0, base);
    guest.enable(0);
    assert_eq!(guest.answer(0), [!9; 100]);
    traffic(&mut guest, 100);
    // Disabled and enabled, as a pair of rings that is not in use.
    guest.front.set_vring_enable(0, false).unwrap();
    guest.ask(0, &[8; 100], 100);
    guest.enable(0);
    assert_eq!(guest.answer(0), [!8; 100]);
    traffic(&mut guest, 100);
}

/// How often files of this name are mapped in this process.
fn mapped(name: &str) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    maps.lines().filter(|line| line.contains(name)).count()
}

#[test]
fn the_memory_table_changes_under_live_rings_and_nothing_of_what_is_gone_stays_mapped() {
    let place = Place::new(&["late"], true);
    let mut guest = Guest::start(&place.fronts[0].socket, Ram::new(), 1);
    let (dimm, file) = Mapping::memfd("plugged-dimm", 0x1_0000, false).unwrap();
    let at = 0x1_0000_0000;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: at,
        memory_size: 0x1_0000,
        userspace_addr: 0x7000_0000,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    for round in 0..20u8 {
        let there = |guest: &mut Guest| {
            dimm.ram().get(0, 64).unwrap().fill(round);
            let queue = &mut guest.queues[0].driver;
            let (from, to) = (BusAddr(at), BusAddr(at + 0x1000));
            queue.add(&[(from, 64)], &[(to, 64)]).unwrap();
            guest.publish(0);
        };
        if round % 2 == 0 {
            guest.front.add_mem_region(&region).unwrap();
        } else {
            let regions = [guest.region(), region];
            guest.front.set_mem_table(&regions).unwrap();
        }
        assert_eq!(mapped("plugged-dimm"), 2);
        there(&mut guest);
        guest.until_used(0);
        let mut bytes = [0; 64];
        dimm.ram().read(0x1000, &mut bytes);
        assert_eq!(bytes, [!round; 64]);
        traffic(&mut guest, 5);
        if round % 2 == 0 {
            guest.front.remove_mem_region(&region).unwrap();
        } else {
            let regions = [guest.region()];
            guest.front.set_mem_table(&regions).unwrap();
        }
        assert_eq!(mapped("plugged-dimm"), 1, "only this test's");
        traffic(&mut guest, 5);
        if round % 5 == 4 {
            // A driver that uses it all the same gets nothing, until it starts anew.
            there(&mut guest);
            assert!(guest.is_broken_within(0, vhost_guest::PATIENCE));
            guest.stop();
            guest.set_up(1);
            traffic(&mut guest, 5);
        }
    }
    // Memory in which a ring lies cannot go.
    let other = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST + RAM,
        ..guest.region()
    };
    assert!(guest.front.set_mem_table(&[other]).is_err());
}

#[test]
fn pairs_of_rings_carry_frames_from_one_guest_to_another() {
    for given in [false, true] {
        let place = Place::new(&["wide", "other"], given);
        let mut guests: Vec<Guest> = place
            .fronts
            .iter()
            .map(|front| Guest::start(&front.socket, Ram::new(), 4))
            .collect();
        const HEADER: usize = 12;
        for guest in &mut guests {
            for queue in [0, 2] {
                for _ in 0..32 {
                    guest.ask(queue, &[], 1600);
                }
            }
        }
        for n in 0..400usize {
            let (from, to) = (n % 2, 1 - n % 2);
            let mut frame = vec![0; HEADER];
            frame.extend([0xff; 6]);
            frame.extend([0x52, 0x54, 0, 1, 2, from as u8, 0x88, 0xb5]);
            frame.extend((0..46 + n * 7 % 1400).map(|b| (b ^ n) as u8));
            let out = if n % 3 == 0 { 3 } else { 1 };
            guests[from].ask(out, &frame, 0);
            assert!(guests[from].answer(out).is_empty());
            // On whichever pair.
            let (queue, arrived) = guests[to].next_of([0, 2]);
            assert_eq!(arrived[HEADER..], frame[HEADER..], "frame {n}");
            guests[to].ask(queue, &[], 1600);
        }
    }
}

#[test]
fn nothing_stays_in_memory_that_is_given_however_it_ends() {
    let mut place = Place::new(&["late", "wide"], true);
    place.until_empty();
    let mut guest = Guest::start(&place.fronts[0].socket, Ram::new(), 1);
    let mut net = Guest::start(&place.fronts[1].socket, Ram::new(), 4);
    let sent = *b"\x95sent\x96to\x97device";
    let holds = |place: &Place| {
        let bytes = place.bytes();
        // What is sent begins in a page and fills at least half of it.
        let mut pages = bytes.chunks(0x1000).filter(|page| **page != [0; 0x1000]);
        pages.any(|page| page.windows(sent.len()).any(|w| w == sent))
    };
    let bytes: Vec<u8> = sent.iter().copied().cycle().take(4000).collect();
    net.ask(0, &[], 1600);
    for _ in 0..100 {
        guest.ask(0, &bytes, 4000);
        assert_eq!(guest.answer(0), inverted(&bytes));
        // Before the guest hears of it.
        assert!(!holds(&place));
    }
    // With the device host away in the middle of a request, which is there until the driver gives up.
    place.end_host();
    guest.ask(0, &bytes, 4000);
    while !holds(&place) {
        std::thread::yield_now();
    }
    guest.stop();
    assert!(!holds(&place));
    net.stop();
    place.until_empty();
    place.start_host();
    // The VMM is killed in the middle of requests.
    for _ in 0..10 {
        guest.set_up(1);
        for _ in 0..20 {
            guest.ask(0, &bytes, 4000);
        }
        drop(guest);
        guest = Guest::connect(&place.fronts[0].socket, Ram::new());
    }
    drop(guest);
    place.until_empty();
}

#[test]
fn a_front_without_memory_for_copies_ends_the_connection_and_lends_nothing() {
    let place = Place::new(&["late"; 1], false);
    let parts = std::sync::Arc::new(vmsg_proxy::shadow::Parts::new(vec![None]));
    let front = place.another_front("late", parts.clone());
    let ram = Ram::new();
    let mut guest = Guest::connect(&front.socket, ram);
    guest.new_queues(1);
    assert!(guest.front.set_mem_table(&[guest.region()]).is_err());
    // Once it is known.
    drop(guest);
    place.provide(&parts);
    let mut guest = Guest::start(&front.socket, ram, 1);
    traffic(&mut guest, 20);
}
