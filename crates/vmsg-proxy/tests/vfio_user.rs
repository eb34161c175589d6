// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The vfio-user front before a real device host: guests whose drivers find their devices on the PCI bus.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod vfio;

use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use vfio::client::Client;
use vfio::place::{MAC, Place};
use vfio::{
    BUFFERS, DRIVER_OK, FEATURES_OK, Guest, NEEDS_RESET, OFFSET, RAM, RAM_AT, Ram, Vmm, rung_within,
};

/// What no test waits for in vain.
const SHORT: Duration = Duration::from_millis(300);

fn is_random(bytes: &[u8], len: usize) {
    assert_eq!(bytes.len(), len);
    assert!(bytes.iter().any(|byte| *byte != 0));
}

fn ask_and_get(guest: &mut Guest<impl Vmm>, times: usize) {
    for _ in 0..times {
        guest.ask(0, 64);
        is_random(&guest.answer(0), 64);
    }
}

/// Until the device reads as needing a reset, of which an interrupt tells.
#[track_caller]
fn until_broken(guest: &mut Guest<Client>) {
    assert!(rung_within(&guest.config_call, vfio::client::PATIENCE));
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
}

#[test]
fn an_entropy_device_works_over_each_way_to_the_guests_memory() {
    for (keys, ram) in [
        ("", Ram::shared()),
        (",isolate=on,segment=4M", Ram::shared()),
        ("", Ram::by_messages()),
        (",isolate=on", Ram::by_messages()),
    ] {
        let place = Place::new("rng0", keys);
        let by_messages = ram.messages.clone();
        let mut guest = Guest::new(&place.socket(), ram);
        assert_eq!(guest.layout.device_id, 0x1044);
        guest.start(1);
        ask_and_get(&mut guest, 300);
        // The driver is bound again.
        guest.start(1);
        ask_and_get(&mut guest, 10);
        let transfers = by_messages.map_or(0, |memory| memory.transfers.load(Ordering::SeqCst));
        assert!(place.stats().refused == 0, "{keys}");
        if keys.is_empty() {
            assert_eq!(transfers > 0, guest.ram.messages.is_some());
        }
    }
}

#[test]
fn the_client_of_other_people_is_served() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let ram = Ram::shared();
        let mut client = vfio_user::Client::new(&place.socket()).unwrap();
        let fd = ram.file.as_fd();
        client.lend(RAM_AT, RAM, OFFSET, Some(fd));
        let mut guest = Guest::over(client, ram);
        guest.start(1);
        ask_and_get(&mut guest, 20);
        guest.vmm.reset().unwrap();
        assert_eq!(guest.status(), 0);
        guest.queues.clear();
        guest.start(1);
        ask_and_get(&mut guest, 20);
        guest.vmm.dma_unmap(RAM_AT, RAM).unwrap();
    }
}

#[test]
fn a_network_device_takes_frames_and_tells_of_its_link() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("net0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        assert_eq!(guest.layout.device_id, 0x1041);
        // MAC and STATUS.
        guest.negotiate(1 << 5 | 1 << 16);
        guest.lay_out_queue();
        guest.lay_out_queue();
        guest.use_msix(2);
        guest.enable_queues();
        guest.set_status(0xf);
        assert_eq!(guest.read_config::<6>(0), MAC);
        assert_eq!(guest.read_config::<2>(6), [1, 0], "the link is up");
        guest.ask(0, 2048);
        for _ in 0..100 {
            guest.tell(1, &[0; 12 + 60]);
            assert!(guest.answer(1).is_empty());
        }
        let [before] = guest.common::<1>(0x15);
        place.host.as_ref().unwrap().set_link(false);
        assert!(rung_within(&guest.config_call, vfio::client::PATIENCE));
        assert_eq!(guest.read_config::<2>(6), [0, 0]);
        assert_ne!(guest.common::<1>(0x15), [before]);
        assert_eq!(guest.status(), 0xf);
    }
}

#[test]
fn a_driver_without_msix_uses_the_interrupt_line() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.use_intx();
        guest.start(1);
        ask_and_get(&mut guest, 50);
    }
}

#[test]
fn the_line_is_unmasked_by_an_eventfd_as_kvm_does_it() {
    let place = Place::new("rng0", "");
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.use_intx();
    let handled = vfio::new_eventfd();
    guest.vmm.set_unmask_eventfd(handled.as_fd());
    guest.start(1);
    let ring = || rustix::io::write(&handled, &1u64.to_ne_bytes()).unwrap();
    for _ in 0..10 {
        guest.ask(0, 16);
        let line = guest.intx.as_ref().unwrap();
        assert!(rung_within(line, vfio::client::PATIENCE));
        // Still raised: the driver has not read the ISR.
        ring();
        assert!(rung_within(line, vfio::client::PATIENCE));
        let (bar, at) = guest.layout.isr;
        let mut isr = [0];
        guest.vmm.read(bar, at, &mut isr);
        assert_eq!(isr, [1]);
        ring();
        is_random(&guest.answer_within(0, SHORT).unwrap(), 16);
        assert!(!guest.queues[0].queue.enable_notifications().unwrap());
    }
}

#[test]
fn a_driver_is_not_interrupted_before_it_has_asked_for_anything() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.negotiate(0);
        guest.lay_out_queue();
        guest.use_msix(1);
        guest.enable_queues();
        // An access behind all of that.
        assert_eq!(guest.status() & DRIVER_OK, 0);
        assert!(!rung_within(
            &guest.queues[0].call,
            Duration::from_millis(20)
        ));
    }
}

#[test]
fn no_interrupt_is_lost_while_vectors_are_masked_and_change() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.start(1);
        let table = |guest: &mut Guest<Client>, masked: u32| {
            // Entry 1, vector control.
            guest.vmm.write(1, 16 + 12, &masked.to_le_bytes());
        };
        for _ in 0..20 {
            ask_and_get(&mut guest, 2);
            table(&mut guest, 1);
            // One too many does no harm, such as one that was on its way.
            rung_within(&guest.queues[0].call, Duration::from_millis(5));
            guest.ask(0, 32);
            assert!(!rung_within(
                &guest.queues[0].call,
                Duration::from_millis(5)
            ));
            table(&mut guest, 0);
            is_random(&guest.answer(0), 32);
            // Another eventfd, while a request is under way.
            guest.ask(0, 16);
            let call = vfio::new_eventfd();
            guest.vmm.eventfds(vfio::MSIX, 1, &[call.as_fd()]);
            guest.queues[0].call = call;
            is_random(&guest.answer(0), 16);
        }
    }
}

#[test]
fn requests_outlive_the_device_host() {
    for keys in ["", ",isolate=on"] {
        let mut place = Place::new("rng0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.start(1);
        let mut quickest = Duration::MAX;
        for _ in 0..5 {
            ask_and_get(&mut guest, 20);
            place.kill_host();
            guest.ask(0, 48);
            guest.ask(0, 48);
            let begun = Instant::now();
            assert_eq!(guest.status() & !NEEDS_RESET, 0xf);
            quickest = quickest.min(begun.elapsed());
            place.start_host();
            is_random(&guest.answer(0), 48);
            is_random(&guest.answer(0), 48);
        }
        assert!(quickest < Duration::from_secs(1), "the device is not asked");
        assert_eq!(guest.status(), 0xf);
    }
}

#[test]
fn a_client_comes_while_the_device_host_is_away() {
    let mut place = Place::new("rng0", "");
    // Until it was seen.
    drop(Guest::new(&place.socket(), Ram::shared()));
    place.kill_host();
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.start(1);
    guest.ask(0, 64);
    assert!(guest.answer_within(0, SHORT).is_none());
    place.start_host();
    is_random(&guest.answer(0), 64);
}

#[test]
fn a_device_that_was_never_there_is_waited_for_and_then_refused_with_a_reason() {
    let mut place = Place::without_host("rng0", "");
    // Before QEMU gives up, which it does after 5 s; with a second look where something else held this up.
    let in_time = (0..3).any(|_| {
        let begun = Instant::now();
        let (_client, answer) = Client::connect(&place.socket(), None);
        let took = begun.elapsed();
        assert_eq!(answer, Err(19), "ENODEV");
        assert!(took > Duration::from_secs(3), "{took:?}");
        took < Duration::from_millis(4800)
    });
    assert!(in_time);
    // One that comes in time is served.
    let socket = place.socket();
    let waits = std::thread::spawn(move || Guest::new(&socket, Ram::shared()));
    std::thread::sleep(SHORT);
    place.start_host();
    let mut guest = waits.join().unwrap();
    guest.start(1);
    ask_and_get(&mut guest, 3);
}

#[test]
fn one_client_after_another_is_served_and_the_next_waits() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let socket = place.socket();
        let mut first = Guest::new(&socket, Ram::shared());
        first.start(1);
        ask_and_get(&mut first, 5);
        let waits = std::thread::spawn(move || Guest::new(&socket, Ram::shared()));
        ask_and_get(&mut first, 5);
        assert!(!waits.is_finished());
        // In the middle of a request.
        first.ask(0, 64);
        drop(first);
        let mut second = waits.join().unwrap();
        assert_eq!(second.status(), 0, "nothing of the first is left");
        second.start(1);
        ask_and_get(&mut second, 5);
    }
}

#[test]
fn an_address_that_is_not_open_is_refused_visibly_and_a_reset_heals() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.start(1);
        ask_and_get(&mut guest, 3);
        // What the client takes back is gone when it has its answer.
        let half = RAM_AT + BUFFERS as u64;
        guest.vmm.unmap(RAM_AT, RAM).unwrap();
        let file = guest.ram.file.try_clone().unwrap();
        let fd = file.as_fd();
        guest
            .vmm
            .map(RAM_AT, BUFFERS as u64, OFFSET, Some(fd))
            .unwrap();
        guest.ask(0, 64);
        until_broken(&mut guest);
        guest
            .vmm
            .map(
                half,
                RAM - BUFFERS as u64,
                OFFSET + BUFFERS as u64,
                Some(fd),
            )
            .unwrap();
        guest.start(1);
        assert_eq!(guest.status(), 0xf);
        ask_and_get(&mut guest, 10);
    }
}

#[test]
fn memory_that_comes_and_goes_with_each_request_is_there_when_it_is_needed() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.vmm.unmap_all().unwrap();
        let file = guest.ram.file.try_clone().unwrap();
        let fd = file.as_fd();
        let rings = 0x10_0000;
        guest.vmm.map(RAM_AT, rings, OFFSET, Some(fd)).unwrap();
        // Behind an IOMMU a ring need not be in one piece, unless it is copied.
        guest.reset();
        let size = u16::from_le_bytes(guest.common(0x18));
        assert_eq!(size > 256, !keys.is_empty(), "{size}");
        guest.start(1);
        for round in 0..200u64 {
            let at = BUFFERS as u64 + round % 64 * 0x1000;
            guest
                .vmm
                .map(RAM_AT + at, 0x1000, OFFSET + at, Some(fd))
                .unwrap();
            guest.ask(0, 64);
            is_random(&guest.answer(0), 64);
            assert_eq!(guest.vmm.unmap(RAM_AT + at, 0x1000), Ok(0x1000));
        }
        assert_eq!(guest.status(), 0xf);
    }
}

#[test]
fn bad_memory_is_refused_and_nothing_is_lost() {
    let place = Place::new("rng0", "");
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.start(1);
    let file = guest.ram.file.try_clone().unwrap();
    let fd = file.as_fd();
    let (eexist, einval) = (Err(17), Err(22));
    assert_eq!(guest.vmm.map(RAM_AT + 0x1000, 0x1000, 0, Some(fd)), eexist);
    assert_eq!(guest.vmm.map(0, RAM_AT + 1, 0, None), eexist);
    assert_eq!(
        guest.vmm.map(0x1000, 0x1000, OFFSET + RAM, Some(fd)),
        einval
    );
    let kernel = std::fs::File::open("/proc/self/status").unwrap();
    assert_eq!(guest.vmm.map(0x1000, 0x10, 0, Some(kernel.as_fd())), einval);
    assert_eq!(guest.vmm.unmap(RAM_AT + 0x1000, 0x1000), Err(22));
    assert_eq!(guest.vmm.unmap(0, 0x1000), Ok(0), "nothing there");
    ask_and_get(&mut guest, 5);
    assert_eq!(guest.vmm.unmap_all(), Ok(RAM));
    assert_eq!(guest.vmm.unmap_all(), Ok(0));
}

#[test]
fn a_reset_by_the_vmm_stops_all_queues() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("net0", keys);
        let mut guest = Guest::new(&place.socket(), Ram::shared());
        guest.start(2);
        guest.ask(0, 2048);
        guest.vmm.reset();
        assert_eq!(guest.status(), 0);
        for queue in 0..2u16 {
            guest.set_common(0x16, &queue.to_le_bytes());
            assert_eq!(guest.common::<2>(0x1c), [0, 0], "enabled");
        }
        guest.queues.clear();
        guest.start(2);
        guest.tell(1, &[0; 72]);
        assert!(guest.answer(1).is_empty());
    }
}

#[test]
fn a_vmm_that_does_not_answer_for_its_memory_can_still_reset_its_device() {
    let place = Place::new("rng0", "");
    let ram = Ram::by_messages();
    let memory = ram.messages.clone().unwrap();
    let mut guest = Guest::new(&place.socket(), ram);
    guest.start(1);
    ask_and_get(&mut guest, 3);
    memory.silent.store(true, Ordering::SeqCst);
    guest.ask(0, 64);
    std::thread::sleep(Duration::from_millis(50));
    let begun = Instant::now();
    guest.reset();
    // Transfers are waited for 3 s.
    assert!(begun.elapsed() < Duration::from_millis(2500));
    memory.silent.store(false, Ordering::SeqCst);
    guest.start(1);
    ask_and_get(&mut guest, 3);
}

#[test]
fn a_segment_that_is_too_small_for_the_device_is_named_before_the_guest_starts() {
    let place = Place::new("net1", ",isolate=on,segment=1M");
    let (_client, answer) = Client::connect(&place.socket(), None);
    assert_eq!(answer, Err(22), "EINVAL");
}

#[test]
fn a_client_that_is_turned_away_and_goes_on_talking_holds_nobody_up() {
    use std::io::{Read, Write};
    let mut place = Place::new("net1", ",isolate=on,segment=1M");
    let mut stream = std::os::unix::net::UnixStream::connect(place.socket()).unwrap();
    let mut version = [0; 20];
    // VERSION with version 0.1, which is refused.
    (version[2], version[4], version[18]) = (1, 20, 1);
    stream.write_all(&version).unwrap();
    let mut answer = [0; 16];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[8] & 0x20, 0x20, "an error");
    // A command that there is not, which asks for no answer.
    let mut command = [0; 16];
    (command[2], command[4], command[8]) = (99, 16, 0x10);
    // So many that the front never gets to the end of them. Linux takes as much as this in one piece, whoever else writes.
    let many = command.repeat(4096);
    let floods = [(); 4].map(|()| {
        let (mut stream, many) = (stream.try_clone().unwrap(), many.clone());
        std::thread::spawn(move || while stream.write_all(&many).is_ok() {})
    });
    let begun = Instant::now();
    while place.stats().requests < 10_000 {
        assert!(begun.elapsed() < vfio::client::PATIENCE);
        std::thread::yield_now();
    }
    // The next one does not wait for ever,
    let (_client, answer) = Client::connect(&place.socket(), None);
    assert!(answer.is_err());
    // and the front ends when it is to.
    let proxy = place.proxy.take();
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(proxy);
        done.send(()).unwrap();
    });
    ended.recv_timeout(vfio::client::PATIENCE).expect("the end");
    for flood in floods {
        flood.join().unwrap();
    }
}

#[test]
fn a_status_that_the_device_does_not_reach_is_not_shown() {
    let place = Place::new("rng0", "");
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.reset();
    guest.set_status(3);
    // VERSION_1 is not accepted.
    guest.set_status(3 | FEATURES_OK);
    assert_eq!(guest.status() & FEATURES_OK, 0);
    guest.set_status(3 | FEATURES_OK | DRIVER_OK);
    assert_eq!(guest.status() & DRIVER_OK, 0);
}

#[test]
fn a_bus_that_has_the_memory_in_common_works_with_that_memory_and_no_other() {
    let mut place = Place::linux_user("rng0");
    let mut guest = Guest::new(&place.socket(), Ram::in_file(&place.dir.path().join("ram")));
    guest.start(1);
    ask_and_get(&mut guest, 50);
    place.kill_host();
    guest.ask(0, 64);
    place.start_host();
    is_random(&guest.answer(0), 64);
    drop(guest);
    // A guest in other memory finds a device that says so.
    let mut guest = Guest::new(&place.socket(), Ram::shared());
    guest.start(1);
    assert_eq!(guest.status() & NEEDS_RESET, NEEDS_RESET);
}
