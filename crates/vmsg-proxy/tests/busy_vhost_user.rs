// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front end of vhost-user stops a device whose requests do not end.
#![allow(missing_docs)]

mod stuck;
#[path = "vhost/mod.rs"]
mod vhost_guest;

use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use stuck::{Medium, Stuck};
use vhost_guest::{Guest, Ram};
use vmsg_bus::{BusSpec, UnixSpec};
use vmsg_device::host::{Host, Stop};
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{Options, Session, Target};

const PATIENCE: Duration = Duration::from_secs(60);

struct Place {
    // In this order.
    link: Option<Link>,
    front: Option<VhostUserFront>,
    stop: Stop,
    host: Option<JoinHandle<()>>,
    dir: tempfile::TempDir,
}

impl Place {
    fn new(medium: &Medium, queues: usize, set: impl FnOnce(&mut VhostUserOptions)) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let bus = BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")));
        let listener = bus.listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let index = host
            .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener))
            .unwrap();
        host.add_device(
            index,
            "disk",
            None,
            None,
            Box::new(Stuck::new(medium, queues)),
        )
        .unwrap();
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().unwrap());
        let session = Session::new(Target::Name("disk".into()), Options::default());
        let source = Source::Bus(bus.connector("test"));
        let link = Link::start("test", session, source).unwrap();
        let mut options = VhostUserOptions::new(dir.path().join("vu.sock"));
        set(&mut options);
        let front = VhostUserFront::start("test", link.handle(), options).unwrap();
        Place {
            link: Some(link),
            front: Some(front),
            stop,
            host: Some(thread),
            dir,
        }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("vu.sock")
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.link = None;
        self.front = None;
        self.stop.stop();
        self.host.take().unwrap().join().unwrap();
    }
}

/// A guest with a request under way in each of so many queues.
fn hung(place: &Place, medium: &Medium, queues: usize) -> Guest {
    let mut guest = Guest::start(&place.socket(), Ram::new(), queues);
    for queue in 0..queues {
        guest.ask(queue, &[1], 16);
    }
    let end = Instant::now() + PATIENCE;
    while medium.taken() < queues {
        assert!(Instant::now() < end, "the device has the requests");
        std::thread::sleep(Duration::from_millis(1));
    }
    guest
}

#[track_caller]
fn until_there(path: &Path, there: bool) {
    let end = Instant::now() + PATIENCE;
    while path.exists() != there {
        assert!(Instant::now() < end, "{}: {there}", path.display());
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_front_end_is_told_that_rings_have_stopped_when_they_have() {
    for queues in [1, 2] {
        let medium = Medium::new();
        let place = Place::new(&medium, queues, |_| {});
        let mut guest = hung(&place, &medium, queues);
        // Longer than any operation of a session.
        let time = Duration::from_millis(3200);
        let releasing = std::thread::spawn({
            let medium = medium.clone();
            move || {
                std::thread::sleep(time);
                medium.release();
            }
        });
        let began = Instant::now();
        let bases = guest.stop();
        assert!(began.elapsed() >= time, "{:?}", began.elapsed());
        releasing.join().unwrap();
        // What was under way was finished before.
        assert_eq!(bases, vec![1; queues]);
        guest.set_up(queues);
        for queue in 0..queues {
            guest.ask(queue, &[1], 16);
            guest.answer(queue);
        }
    }
}

#[test]
fn a_front_end_is_not_kept_for_ever_and_the_device_not_given_to_the_next_driver_too_early() {
    let medium = Medium::new();
    let place = Place::new(&medium, 1, |options| {
        options.stop_patience = Duration::from_millis(2500);
    });
    let mut guest = hung(&place, &medium, 1);
    let began = Instant::now();
    assert_eq!(guest.stop(), [0]);
    let took = began.elapsed();
    assert!(
        took >= Duration::from_millis(2500) && took < Duration::from_secs(20),
        "{took:?}"
    );
    // The next driver of the guest is not let at a device that has requests under way: its front end is sent away.
    // And nobody else for a while, or it would come again and again.
    assert!(guest.front_end_starts().is_err());
    until_there(&place.socket(), false);
    drop(guest);
    medium.release();
    until_there(&place.socket(), true);
    let mut guest = Guest::start(&place.socket(), Ram::new(), 1);
    guest.ask(0, &[1], 16);
    guest.answer(0);
}

#[test]
fn copies_are_let_go_of_at_once() {
    let medium = Medium::new();
    let place = Place::new(&medium, 1, |options| {
        options.isolate = true;
        options.stop_patience = 2 * PATIENCE;
    });
    let mut guest = hung(&place, &medium, 1);
    let began = Instant::now();
    // The request was not done; the device has nothing of the guest's memory.
    assert_eq!(guest.stop(), [0]);
    assert!(began.elapsed() < PATIENCE);
    drop(guest);
    medium.release();
    let mut guest = Guest::start(&place.socket(), Ram::new(), 1);
    guest.ask(0, &[1], 16);
    guest.answer(0);
}
