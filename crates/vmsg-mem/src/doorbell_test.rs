// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::atomic::AtomicUsize;
use std::thread;
use std::time::{Duration, Instant};

use super::*;

/// Much more than the watchdog needs, and much less than for ever.
const SOON: Duration = Duration::from_secs(5);

/// A doorbell whose eventfd another holder has filled, and whose O_NONBLOCK it has cleared.
fn hostile() -> Doorbell {
    let doorbell = Doorbell::new().unwrap();
    let other = doorbell.fd.try_clone().unwrap();
    rustix::io::write(&other, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let flags = rustix::fs::fcntl_getfl(&other).unwrap();
    rustix::fs::fcntl_setfl(&other, flags - OFlags::NONBLOCK).unwrap();
    doorbell
}

#[test]
fn rings_are_counted_until_drained() {
    let doorbell = Doorbell::new().unwrap();
    let clone = doorbell.try_clone().unwrap();
    assert_eq!(clone.drain().unwrap(), 0);
    doorbell.ring().unwrap();
    clone.ring().unwrap();
    assert_eq!(clone.drain().unwrap(), 2);
    assert_eq!(doorbell.drain().unwrap(), 0);
}

#[test]
fn a_full_counter_is_named() {
    let doorbell = Doorbell::new().unwrap();
    rustix::io::write(&doorbell.fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    let error = doorbell.ring().unwrap_err();
    assert!(matches!(error, RingError::Full));
    assert!(error.is_peer_fault());
    assert_eq!(doorbell.drain().unwrap(), u64::MAX - 1);
    doorbell.ring().unwrap();
}

#[test]
fn a_write_that_blocks_is_ended_and_not_tried_again() {
    let doorbell = hostile();
    let start = Instant::now();
    assert!(matches!(doorbell.ring(), Err(RingError::Stuck)));
    assert!(start.elapsed() < SOON);
    // Were it tried again, each would take 10 ms at least.
    let start = Instant::now();
    for _ in 0..1000 {
        assert!(matches!(doorbell.ring(), Err(RingError::Stuck)));
    }
    assert!(start.elapsed() < SOON);
}

#[test]
fn a_clone_knows_what_held_up_another_one() {
    let doorbell = hostile();
    let clone = doorbell.try_clone().unwrap();
    assert!(matches!(
        doorbell.try_clone().unwrap().ring(),
        Err(RingError::Stuck)
    ));
    // Were it tried again, each would take 10 ms at least.
    let start = Instant::now();
    for _ in 0..1000 {
        assert!(matches!(clone.ring(), Err(RingError::Stuck)));
        let another = doorbell.try_clone().unwrap();
        assert!(matches!(another.ring(), Err(RingError::Stuck)));
    }
    assert!(start.elapsed() < SOON);
}

#[test]
fn stuck_rings_delay_no_other_thread() {
    let stuck = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..5 {
                    assert!(matches!(hostile().ring(), Err(RingError::Stuck)));
                    stuck.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let good = Doorbell::new().unwrap();
        let mut longest = Duration::ZERO;
        while stuck.load(Ordering::Relaxed) < 20 {
            let start = Instant::now();
            good.ring().expect("nobody disturbs this one");
            longest = longest.max(start.elapsed());
        }
        assert!(longest < SOON);
    });
}

#[test]
fn the_watchdog_wakes_up_when_it_is_needed() {
    Doorbell::new().unwrap().ring().unwrap();
    let start = Instant::now();
    while !watchdog::is_asleep() {
        assert!(start.elapsed() < 4 * SOON, "it never sleeps");
        thread::yield_now();
    }
    let start = Instant::now();
    assert!(matches!(hostile().ring(), Err(RingError::Stuck)));
    assert!(start.elapsed() < SOON);
}

#[test]
fn short_lived_threads_may_ring() {
    let doorbell = Doorbell::new().unwrap();
    for _ in 0..50 {
        thread::scope(|scope| {
            scope.spawn(|| doorbell.ring().unwrap());
        });
    }
    assert_eq!(doorbell.drain().unwrap(), 50);
}

#[test]
fn an_eventfd_of_others_is_made_nonblocking() {
    let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let theirs = fd.try_clone().unwrap();
    let doorbell = Doorbell::from_fd(fd).unwrap();
    let flags = rustix::fs::fcntl_getfl(&theirs).unwrap();
    assert!(flags.contains(OFlags::NONBLOCK));
    doorbell.ring().unwrap();
    let mut count = [0; 8];
    rustix::io::read(&theirs, &mut count).unwrap();
    assert_eq!(u64::from_ne_bytes(count), 1);
    let fd = OwnedFd::from(doorbell);
    assert!(is_eventfd(fd.as_fd()).unwrap());
}

#[test]
fn other_files_are_no_doorbells() {
    let (reader, writer) = std::io::pipe().unwrap();
    let (socket, _peer) = std::os::unix::net::UnixStream::pair().unwrap();
    let null = std::fs::File::create("/dev/null").unwrap();
    let memory = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let files: [OwnedFd; 6] = [
        reader.into(),
        writer.into(),
        socket.into(),
        null.into(),
        memory,
        epoll,
    ];
    for fd in files {
        let error = Doorbell::from_fd(fd).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
}

/// A file of one page that stands for a device, and the page.
fn device() -> (crate::Mapping, OwnedFd) {
    crate::Mapping::memfd("test", 4096, false).unwrap()
}

fn word(memory: &crate::Mapping, offset: usize) -> u32 {
    memory.device_region().read_u32(offset).unwrap()
}

#[test]
fn a_register_in_mapped_memory_gets_its_value() {
    let (memory, fd) = device();
    let bar = crate::DeviceMapping::of_fd(fd.as_fd(), 0, 256).unwrap();
    let bar = std::sync::Arc::new(bar);
    let part = |offset, len| DeviceSlice::new(bar.clone(), offset, len).unwrap();
    let file = || fd.try_clone().unwrap();
    assert!(Doorbell::register(file(), part(12, 8), 1).is_err());
    assert!(Doorbell::register(file(), part(13, 4), 1).is_err());
    let bell = Doorbell::register(file(), part(12, 4), 0x0003_0001).unwrap();
    let clone = bell.try_clone().unwrap();
    assert_eq!(word(&memory, 12), 0, "nobody has rung yet");
    bell.ring().unwrap();
    assert_eq!(word(&memory, 12), 0x0003_0001);
    assert!(memory.device_region().write_u32(12, 0));
    clone.ring().unwrap();
    assert_eq!(word(&memory, 12), 0x0003_0001);
    assert_eq!((word(&memory, 8), word(&memory, 16)), (0, 0));
    assert!(bell.eventfd().is_none());
    assert!(bell.drain().is_err());
}

#[test]
fn a_register_that_cannot_be_mapped_is_written_through_its_file() {
    let (memory, fd) = device();
    let bell = Doorbell::register_file(fd, 12, 0x0003_0001);
    let clone = bell.try_clone().unwrap();
    drop(bell);
    clone.ring().unwrap();
    assert_eq!(word(&memory, 12), 0x0003_0001);
    assert_eq!(word(&memory, 16), 0);
    assert!(clone.eventfd().is_none());
    assert!(clone.drain().is_err());
}

#[test]
fn a_register_of_a_device_that_is_gone_is_an_error() {
    crate::fault::install().unwrap();
    let (_memory, fd) = device();
    let bar = crate::DeviceMapping::of_fd(fd.as_fd(), 0, 256).unwrap();
    let part = DeviceSlice::new(std::sync::Arc::new(bar), 12, 4).unwrap();
    let file = std::fs::File::from(fd.try_clone().unwrap());
    let bell = Doorbell::register(fd, part, 1).unwrap();
    bell.ring().unwrap();
    file.set_len(0).unwrap();
    assert!(matches!(bell.ring(), Err(RingError::Os(_))));
}
