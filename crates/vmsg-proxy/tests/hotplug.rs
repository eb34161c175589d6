// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Devices that are taken from their bus under a guest, and others that come in their place.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod common;
mod vfio;
mod vhost;
mod world;

use common::Host;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vfio::place::Place;
use vfio::{NEEDS_RESET, Ram, rung_within};
use virtio_msg::{DevNum, DeviceState, FeatureSet, Frame, Message, Token};
use vmsg_bus::keyval;
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_net::Null;
use vmsg_proxy::session::{Event, Op, OpError, Outcome, ResetReason, Target};
use vmsg_proxy::{FrontSpec, Proxy};
use world::World;

const PATIENCE: Duration = Duration::from_secs(60);

fn net() -> Target {
    Target::Name("net0".into())
}

/// EVENT_DEVICE.
fn say(world: &mut World, number: u16, state: DeviceState) {
    let device = DevNum(number);
    let event = Frame::bus(Token(0), Message::EventDevice { device, state });
    let mut bytes = [0; 64];
    let len = event.encode(&mut bytes).unwrap();
    world.session.handle_message(world.now, &bytes[..len]);
    world.run();
}

/// The device is taken away; afterwards the bus has only another one.
fn remove(world: &mut World) {
    let mut rest = Host::rng();
    rest.number = DevNum(9);
    rest.common = world.host.common;
    world.host = rest;
    world.events.clear();
    say(world, 3, DeviceState::Removed);
}

/// Another of the same name.
fn add(world: &mut World, number: u16, change: impl FnOnce(&mut Host)) {
    let mut host = Host::net();
    host.number = DevNum(number);
    host.common = world.host.common;
    change(&mut host);
    world.host = host;
    world.events.clear();
    say(world, number, DeviceState::Ready);
}

fn lost(world: &World) -> bool {
    let mut events = world.events.iter();
    events.any(|event| matches!(event, Event::LinkFault(_)))
}

#[test]
fn a_guest_hears_that_its_device_was_removed_and_gets_one_of_the_same_name() {
    let mut world = World::up(net(), Host::net());
    world.bring_up();
    remove(&mut world);
    let told = Event::NeedsReset(ResetReason::Removed);
    assert!(world.events.contains(&told), "{:?}", world.events);
    assert!(lost(&world), "the connection goes, with all that was lent");
    world.disconnect();
    world.connect();
    assert!(world.events.contains(&Event::DeviceAbsent));
    assert!(!world.tick(), "nothing is tried again and again");
    // What is recorded is answered, and what only a device can do is refused at once.
    let Ok(Outcome::Device(facts)) = world.op(Op::Describe) else {
        panic!()
    };
    assert_eq!(facts.number, DevNum(3));
    let data = vec![1];
    let write = world.op(Op::WriteConfig { offset: 0, data });
    assert_eq!(write, Err(OpError::NoDevice));
    add(&mut world, 5, |_| {});
    let ready = Event::Ready {
        replayed: true,
        new_host: false,
    };
    assert!(world.events.contains(&ready), "{:?}", world.events);
    world.assert_host_is_live();
    assert_eq!(world.session.device().unwrap().number, DevNum(5));
    // And so on, by the number that it has now.
    say(&mut world, 3, DeviceState::Removed);
    world.assert_host_is_live();
    world.events.clear();
    say(&mut world, 5, DeviceState::Removed);
    assert!(world.events.contains(&told));
}

#[test]
fn a_device_that_differs_from_the_one_that_was_removed_needs_a_reset_first() {
    let mut world = World::up(net(), Host::net());
    world.bring_up();
    remove(&mut world);
    world.disconnect();
    world.connect();
    add(&mut world, 5, |host| host.queue_sizes.push(64));
    world.host.info.max_queues += 1;
    say(&mut world, 5, DeviceState::Removed);
    add(&mut world, 6, |host| host.info.device_id = 2);
    let differs = |event: &Event| {
        matches!(
            event,
            Event::NeedsReset(ResetReason::DeviceIdChanged { was: 1, is: 2 })
        )
    };
    if !world.events.iter().any(differs) {
        world.disconnect();
        world.connect();
    }
    assert!(world.events.iter().any(differs), "{:?}", world.events);
    // One that does not is found although the last did not fit.
    world.events.clear();
    say(&mut world, 6, DeviceState::Removed);
    assert!(lost(&world));
    world.disconnect();
    add(&mut world, 7, |_| {});
    world.connect();
    world.assert_host_is_live();
}

#[test]
fn a_guest_that_starts_over_meanwhile_gets_the_other_device_as_a_new_one() {
    let mut world = World::up(net(), Host::net());
    world.bring_up();
    remove(&mut world);
    world.disconnect();
    world.connect();
    world.op(Op::Release).unwrap();
    world.op(Op::SetWindows(Vec::new())).unwrap();
    add(&mut world, 5, |host| host.info.device_id = 2);
    assert!(world.session.is_ready());
    world.bring_up();
    world.assert_host_is_live();
}

#[test]
fn a_device_that_comes_while_the_list_is_looked_through_is_found() {
    let mut host = Host::net();
    host.name = "other".into();
    let mut world = World::new(net(), host);
    world
        .session
        .handle_link_up(world.now, world.caps, world.epoch);
    // The list is asked for, and answered without the device.
    let ask = world.session.poll_transmit().unwrap();
    let answer = world.host.handle(&ask.bytes, Vec::new()).unwrap();
    let device = DevNum(5);
    let state = DeviceState::Ready;
    let event = Frame::bus(Token(0), Message::EventDevice { device, state });
    let mut bytes = [0; 64];
    let len = event.encode(&mut bytes).unwrap();
    world.session.handle_message(world.now, &bytes[..len]);
    world.session.handle_message(world.now, &answer);
    world.host = Host::net();
    world.host.number = device;
    world.run();
    assert!(world.session.is_ready(), "{:?}", world.events);
    assert_eq!(world.session.device().unwrap().number, device);
}

#[test]
fn where_several_share_a_connection_it_outlives_a_device() {
    let mut world = World::new(net(), Host::net());
    world.caps.passes_fds = false;
    world.caps.out_of_band_notify = false;
    world.connect();
    world.op(Op::Claim).unwrap();
    remove(&mut world);
    assert!(!lost(&world));
    assert!(world.events.contains(&Event::DeviceAbsent));
    add(&mut world, 5, |_| {});
    assert!(world.session.is_ready());
    assert!(world.host.claimed);
}

fn is_random(bytes: &[u8], len: usize) {
    assert_eq!(bytes.len(), len);
    assert!(bytes.iter().any(|byte| *byte != 0));
}

#[test]
fn a_guest_of_vfio_user_sees_that_its_device_needs_a_reset() {
    for keys in ["", ",isolate=on"] {
        let place = Place::new("rng0", keys);
        let host = place.host.as_ref().unwrap();
        let mut guest = vfio::Guest::new(&place.socket(), Ram::shared());
        guest.start(1);
        guest.ask(0, 64);
        is_random(&guest.answer(0), 64);
        host.remove("rng0");
        assert!(rung_within(&guest.config_call, PATIENCE), "{keys}");
        assert_eq!(guest.status(), 0xf | NEEDS_RESET);
        // It takes requests, and nobody hangs.
        guest.ask(0, 48);
        let begun = Instant::now();
        assert_eq!(guest.status(), 0xf | NEEDS_RESET);
        assert!(begun.elapsed() < PATIENCE);
        assert_eq!(host.add("rng0", Box::new(Rng::new())), 0, "another number");
        // A driver that did not care goes on, one that did starts over.
        is_random(&guest.answer(0), 48);
        guest.reset();
        assert_eq!(guest.status(), 0);
        drop(guest);
        let mut guest = vfio::Guest::new(&place.socket(), Ram::shared());
        guest.start(1);
        guest.ask(0, 64);
        is_random(&guest.answer(0), 64);
    }
}

#[test]
fn a_front_end_of_vhost_user_is_sent_away_until_there_is_a_device_again() {
    for keys in ["", ",isolate=on,segment=4M"] {
        // The bus and its devices; the front of this one is not used.
        let place = Place::new("net0", "");
        let host = place.host.as_ref().unwrap();
        let socket = place.dir.path().join("rng.sock");
        let spec: FrontSpec = keyval::from_str(&format!(
            "vhost-user,socket={},dev=rng0{keys}",
            keyval::escape(&socket.to_string_lossy())
        ))
        .unwrap();
        let _proxy = Proxy::start(&[place.bus()], &[spec], |_| {}).unwrap();
        let ram = vhost::Ram::new();
        for (round, number) in [0, 4, 5].into_iter().enumerate() {
            let mut guest = vhost::Guest::start(&socket, ram, 1);
            guest.ask(0, &[], 64);
            is_random(&guest.answer(0), 64);
            host.remove("rng0");
            assert!(is_closed(&mut guest.socket), "{round}");
            assert!(!socket.exists(), "{round}");
            assert_eq!(host.add("rng0", Box::new(Rng::new())), number);
            let end = Instant::now() + PATIENCE;
            while !socket.exists() {
                assert!(Instant::now() < end, "{round}");
                std::thread::yield_now();
            }
        }
        // Others were left alone.
        let net = Net::new(
            &Settings::new(Mac([0x52, 0x54, 0, 0, 0, 9])),
            Box::new(Null::default()),
        );
        host.add("net9", Box::new(net));
        let mut guest = vhost::Guest::start(&socket, ram, 1);
        guest.ask(0, &[], 64);
        is_random(&guest.answer(0), 64);
    }
}

fn is_closed(socket: &mut UnixStream) -> bool {
    use std::io::Read;
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = [0; 64];
    loop {
        match socket.read(&mut bytes) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn features_that_were_told_before_the_status_are_told_to_the_next_device() {
    let mut world = World::up(net(), Host::net());
    let features = FeatureSet::from_bits(&[29, 32]);
    world.op(Op::Claim).unwrap();
    world.op(Op::SetFeatures(features)).unwrap();
    let next = world.host.restarted();
    world.replace(next);
    assert_eq!(world.host.features, features);
}
