// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A console while its process is out of descriptors. Alone in its program: the limit is for all of it.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vmsg_device::console::{Hub, HubConfig};

fn has_work(hub: &Hub) -> bool {
    let mut fds = [PollFd::from_borrowed_fd(hub.event_fd(), PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).expect("it can be watched") > 0
}

#[test]
fn who_came_when_there_was_no_descriptor_is_let_in_with_the_next_one() {
    let folder = tempfile::TempDir::new().expect("a folder");
    let path = folder.path().join("s");
    let config = HubConfig {
        name: "con".to_owned(),
        socket: Some(path.clone()),
        ..HubConfig::default()
    };
    let mut hub = Hub::open(&config).expect("a hub");
    hub.output(b"hello");
    let address = SocketAddrUnix::new(&path).expect("a path");
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let clients: Vec<OwnedFd> = (0..2)
        .map(|_| {
            socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).expect("a socket")
        })
        .collect();
    let limit = getrlimit(Resource::Nofile);
    let used = clients[1].as_fd();
    let used = u64::try_from(std::os::fd::AsRawFd::as_raw_fd(&used)).expect("positive");
    let current = |current| Rlimit {
        current: Some(current),
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, current(used + 1)).expect("a limit");
    connect(&clients[0], &address).expect("a listener");
    // It is not asked again and again to do what it cannot.
    for _ in 0..3 {
        hub.poll();
    }
    assert!(!has_work(&hub));
    assert_eq!(hub.handle().report().clients, 0);
    setrlimit(Resource::Nofile, current(used + 100)).expect("a limit");
    connect(&clients[1], &address).expect("a listener");
    assert!(has_work(&hub));
    hub.poll();
    assert_eq!(hub.handle().report().clients, 2);
    let mut bytes = [0; 16];
    for client in &clients {
        assert_eq!(rustix::io::read(client, &mut bytes), Ok(5));
    }
    hub.poll();
    assert!(!has_work(&hub));
}
