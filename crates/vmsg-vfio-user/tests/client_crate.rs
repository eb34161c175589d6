// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The crate `vfio_user`, which cloud-hypervisor uses, as the client.

mod support;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::thread;
use support::*;
use vfio_user::Client;
use vmsg_vfio_user::{Connection, End, Options};

/// Serves one client after another, with one device.
fn serve(listener: &UnixListener, clients: usize) -> (Recorder, Vec<End>) {
    let mut device = Recorder::new();
    let mut ends = Vec::new();
    for _ in 0..clients {
        let (socket, _) = listener.accept().expect("a client");
        let mut connection = Connection::new(socket, Options::default()).expect("a connection");
        ends.push(loop {
            match connection.turn(&mut device, 3) {
                Err(end) => break end,
                Ok(turn) if turn.more => {}
                Ok(_) => {
                    let interest = connection.interest();
                    let mut flags = PollFlags::empty();
                    flags.set(PollFlags::IN, interest.read);
                    flags.set(PollFlags::OUT, interest.write);
                    poll(&mut [PollFd::new(&connection, flags)], None).expect("poll");
                }
            }
        });
    }
    (device, ends)
}

#[test]
fn clients_one_after_another_find_the_device_as_it_is() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("socket");
    let listener = UnixListener::bind(&path).expect("a socket");
    let server = thread::spawn(move || serve(&listener, 3));
    let memory = file(0x10_0000);
    for round in 1..=3u8 {
        let mut client = Client::new(&path).expect("connects");
        let ram = client.region(RAM).expect("is there");
        assert_eq!((ram.size, ram.flags), (4096, 3));
        let mapped = client.region(MAPPED).expect("is there");
        assert_eq!((mapped.size, mapped.flags), (0x4000, 0xf));
        let areas: Vec<_> = mapped
            .sparse_areas
            .iter()
            .map(|area| (area.offset, area.size))
            .collect();
        assert_eq!(areas, [(0, 0x1000), (0x2000, 0x1000)]);
        assert_eq!(mapped.file_offset.as_ref().expect("a file").start(), 0x8000);

        let mut before = [0xff];
        client.region_read(RAM, 40, &mut before).expect("reads");
        assert_eq!(before, [round - 1]);
        client.region_write(RAM, 40, &[round]).expect("writes");
        client
            .dma_map(0x1000, 0x8000_0000, 0x2000, memory.as_raw_fd())
            .expect("maps");
        client.dma_unmap(0x8000_0000, 0x2000).expect("unmaps");
        let msix = client.get_irq_info(MSIX).expect("tells");
        assert_eq!((msix.count, msix.flags), (20, 0b1001));
        let eventfds = [(); 2].map(|()| eventfd(0, EventfdFlags::empty()).expect("an eventfd"));
        let fds = eventfds.each_ref().map(AsRawFd::as_raw_fd);
        client.set_irqs(MSIX, 4 | 32, 5, 2, &fds).expect("sets");
        client.set_irqs(MSIX, 1 | 32, 0, 0, &[]).expect("sets");
        client.reset().expect("resets");
        client.shutdown().expect("ends");
    }
    let (device, ends) = server.join().expect("no panic");
    assert!(
        ends.iter().all(|end| matches!(end, End::Closed)),
        "{ends:?}"
    );
    let round = [
        "map 0x80000000+0x2000 rw fd@0x1000",
        "DmaUnmap { address: 2147483648, size: 8192, all: false }",
        "irqs 2: 5+2 Trigger 2 eventfds",
        "irqs 2: 0+0 Trigger none",
        "reset",
    ];
    assert_eq!(device.calls, [round, round, round].concat());
}
