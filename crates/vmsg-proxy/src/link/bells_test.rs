// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

fn bell() -> Arc<OwnedFd> {
    Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap())
}

fn ring(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

fn kicked(bells: &Bells) -> Vec<u32> {
    let mut queues = Vec::new();
    let taken = bells.take(|rung| match rung {
        Rung::Kick(queue) => queues.push(queue.0),
        Rung::Used(queue) => panic!("queue {queue} was used"),
    });
    taken.unwrap();
    queues.sort_unstable();
    queues
}

fn of<'a>(
    queue: u32,
    kick: Option<&'a Arc<OwnedFd>>,
    call: Option<&'a Arc<OwnedFd>>,
) -> session::Bell<'a> {
    session::Bell {
        queue: QueueIndex(queue),
        kick,
        call,
        vectors: QueueVectors::default(),
    }
}

#[test]
fn each_kick_is_told_once_though_nobody_reads_it() {
    let mut bells = Bells::new().unwrap();
    let (a, b) = (bell(), bell());
    ring(&a);
    let wanted = [of(0, Some(&a), None), of(7, Some(&b), None)];
    assert!(bells.sync(wanted.into_iter()).is_empty());
    assert_eq!(kicked(&bells), [0], "a kick of before counts");
    assert!(kicked(&bells).is_empty());
    ring(&a);
    ring(&a);
    ring(&b);
    assert_eq!(kicked(&bells), [0, 7]);
    assert!(kicked(&bells).is_empty());
    // Still as the driver left it.
    let mut count = [0; 8];
    rustix::io::read(&*a, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 3);
    ring(&a);
    assert_eq!(kicked(&bells), [0]);
}

#[test]
fn what_the_session_no_longer_has_is_not_heard_though_the_driver_keeps_it() {
    let mut bells = Bells::new().unwrap();
    let (a, b) = (bell(), bell());
    let theirs = a.try_clone().unwrap();
    bells.sync([of(0, Some(&a), None)].into_iter());
    bells.sync([of(0, Some(&b), None)].into_iter());
    drop(a);
    ring(&theirs);
    assert!(kicked(&bells).is_empty());
    ring(&b);
    assert_eq!(kicked(&bells), [0]);
    bells.sync(std::iter::empty());
    ring(&b);
    assert!(kicked(&bells).is_empty());
}

#[test]
fn a_call_is_rung_when_it_is_new_and_when_it_is_meant() {
    let mut bells = Bells::new().unwrap();
    let (a, b) = (bell(), bell());
    let count = |fd: &OwnedFd| {
        let mut fds = [PollFd::new(fd, PollFlags::IN)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if poll(&mut fds, Some(&now)).unwrap() == 0 {
            return 0;
        }
        let mut count = [0; 8];
        rustix::io::read(fd, &mut count).unwrap();
        u64::from_ne_bytes(count)
    };
    let wanted = || [of(3, None, Some(&a)), of(4, None, Some(&b))].into_iter();
    bells.sync(wanted());
    assert_eq!((count(&a), count(&b)), (1, 1));
    bells.sync(wanted());
    assert!(bells.ring(QueueIndex(4)));
    assert!(!bells.ring(QueueIndex(5)));
    assert_eq!((count(&a), count(&b)), (0, 1));
    bells.ring_all();
    assert_eq!((count(&a), count(&b)), (1, 1));
}

#[test]
fn what_is_no_eventfd_is_told_and_left_alone() {
    let mut bells = Bells::new().unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    let file = Arc::new(OwnedFd::from(reader));
    let deaf = bells.sync([of(2, Some(&file), Some(&file))].into_iter());
    assert_eq!(deaf, [QueueIndex(2)]);
    assert!(bells.ring(QueueIndex(2)), "it goes without");
    assert!(
        bells
            .sync([of(2, Some(&file), None)].into_iter())
            .is_empty(),
        "told once"
    );
    assert!(kicked(&bells).is_empty());
}

#[test]
fn a_full_and_blocking_eventfd_holds_nobody_up() {
    let mut bells = Bells::new().unwrap();
    let call = bell();
    bells.sync([of(0, None, Some(&call))].into_iter());
    let flags = rustix::fs::fcntl_getfl(&call).unwrap();
    rustix::fs::fcntl_setfl(&call, flags - rustix::fs::OFlags::NONBLOCK).unwrap();
    rustix::io::write(&*call, &(u64::MAX - 2).to_ne_bytes()).unwrap();
    let begin = std::time::Instant::now();
    for _ in 0..100 {
        bells.ring(QueueIndex(0));
    }
    assert!(begin.elapsed() < std::time::Duration::from_secs(5));
}

/// The vectors of a driver's end and of a device's end: 1 and 2 each.
fn vectors() -> [Arc<Vectors>; 2] {
    let options = vmsg_bus::loopback::Options::default();
    let common = vmsg_bus::loopback::Common {
        vectors: 2,
        ..Default::default()
    };
    let (driver, device) = vmsg_bus::loopback::pair_with(&options, &common).unwrap();
    [
        driver.vectors().unwrap().clone(),
        device.vectors().unwrap().clone(),
    ]
}

fn with(bell: session::Bell<'_>, kick: Option<u16>, call: Option<u16>) -> session::Bell<'_> {
    session::Bell {
        vectors: QueueVectors { kick, call },
        ..bell
    }
}

/// How often an eventfd was rung since the last time.
fn rung(fd: BorrowedFd<'_>) -> u64 {
    let bell = Doorbell::from_fd(fd.try_clone_to_owned().unwrap()).unwrap();
    bell.drain().unwrap()
}

#[test]
fn kicks_ring_the_device_where_it_has_a_doorbell_for_the_queue() {
    let mut bells = Bells::new().unwrap();
    let [driver, device] = vectors();
    bells.set_vectors(Some(driver));
    let a = bell();
    assert!(!bells.kick(QueueIndex(0)), "nothing was agreed on");
    bells.sync([with(of(0, Some(&a), None), Some(2), None)].into_iter());
    assert!(bells.kick(QueueIndex(0)) && !bells.kick(QueueIndex(1)));
    assert_eq!(rung(device.own_fd(2).unwrap()), 1);
    assert_eq!(rung(device.own_fd(1).unwrap()), 0);
    // Without the connection a message has to do.
    bells.set_vectors(None);
    assert!(!bells.kick(QueueIndex(0)));
    ring(&a);
    assert_eq!(kicked(&bells), [0]);
}

#[test]
fn a_call_by_a_doorbell_rings_all_queues_that_share_it() {
    let mut bells = Bells::new().unwrap();
    let [driver, device] = vectors();
    bells.set_vectors(Some(driver));
    let (a, b, c) = (bell(), bell(), bell());
    let wanted = || {
        [
            with(of(0, None, Some(&a)), None, Some(1)),
            with(of(1, None, Some(&b)), Some(1), Some(1)),
            with(of(2, None, Some(&c)), None, Some(2)),
            with(of(3, None, None), None, Some(1)),
        ]
    };
    bells.sync(wanted().into_iter());
    for call in [&a, &b, &c] {
        rung(call.as_fd());
    }
    let take = |bells: &Bells| {
        let mut used = Vec::new();
        bells.take(|rung| used.push(rung)).unwrap();
        used
    };
    device.bell(1).unwrap().ring().unwrap();
    assert_eq!(
        take(&bells),
        [Rung::Used(QueueIndex(3))],
        "it has no eventfd"
    );
    assert_eq!(
        (rung(a.as_fd()), rung(b.as_fd()), rung(c.as_fd())),
        (1, 1, 0)
    );
    assert!(
        take(&bells).is_empty(),
        "told once though nobody has read it"
    );
    device.bell(2).unwrap().ring().unwrap();
    assert!(take(&bells).is_empty());
    assert_eq!((rung(a.as_fd()), rung(c.as_fd())), (0, 1));
    // A queue that is stopped is not rung any more, nor is anybody by vectors of a connection that is gone.
    bells.sync(wanted().into_iter().skip(1));
    device.bell(1).unwrap().ring().unwrap();
    take(&bells);
    assert_eq!((rung(a.as_fd()), rung(b.as_fd())), (0, 1));
    bells.set_vectors(None);
    device.bell(1).unwrap().ring().unwrap();
    assert!(take(&bells).is_empty());
    assert_eq!(rung(b.as_fd()), 0);
}

#[test]
fn a_call_that_came_before_anybody_listened_counts() {
    let mut bells = Bells::new().unwrap();
    let [driver, device] = vectors();
    bells.set_vectors(Some(driver));
    device.bell(1).unwrap().ring().unwrap();
    let a = bell();
    bells.sync([with(of(0, None, Some(&a)), None, Some(1))].into_iter());
    rung(a.as_fd());
    bells.take(|_| {}).unwrap();
    assert_eq!(rung(a.as_fd()), 1);
}
