// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The user-mode stack with the network stack of Linux as its guest: a network namespace whose
//! only way out is a tap interface, with all offloads between the two.

mod netns;
mod wire;

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use netns::{ip, own_network, running};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmsg_net::tap::{Tap, TapConfig};
use vmsg_net::user::{Counters, User, UserConfig};
use vmsg_net::{Backend, Offloads};
use wire::{PATIENCE, receive, send};

const MIB: usize = 1 << 20;

/// Byte `i` of what is sent.
const fn pattern(i: usize) -> u8 {
    i.wrapping_mul(0x9e37_79b9).to_le_bytes()[2]
}

/// Reads all that comes and sends as much back.
fn echo(mut socket: TcpStream) {
    let mut bytes = Vec::new();
    socket.read_to_end(&mut bytes).expect("read");
    socket.write_all(&bytes).expect("write");
}

/// Hands frames to and fro until `stop`.
fn connect(mut user: User, mut tap: Tap, offloads: Offloads, stop: &AtomicBool) -> Counters {
    user.set_guest(&running(offloads));
    tap.set_guest(&running(offloads));
    let mut waiting = VecDeque::new();
    while !stop.load(Ordering::Acquire) {
        let now = Instant::now();
        tap.poll(now);
        user.poll(now);
        let from_guest = receive(&mut tap, 66_000);
        let idle = from_guest.is_empty();
        for frame in from_guest {
            assert!(send(&mut user, 0, frame.header, &frame.frame));
        }
        waiting.extend(receive(&mut user, 66_000));
        while let Some(frame) = waiting.front() {
            if !send(&mut tap, 0, frame.header, &frame.frame) {
                break;
            }
            waiting.pop_front();
        }
        if idle && waiting.is_empty() {
            let timeout = Timespec {
                tv_sec: 0,
                tv_nsec: 5_000_000,
            };
            let fds = [&user as &dyn Backend, &tap]
                .map(|backend| backend.event_fd().expect("a descriptor"));
            let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            poll(&mut fds, Some(&timeout)).expect("poll");
        }
    }
    user.counters()
}

/// What the guest does, in a namespace of its own; `None` if there can be none.
fn with_guest(
    mtu: u16,
    offloads: Offloads,
    guest: impl FnOnce() + Send + 'static,
) -> Option<Counters> {
    let user = User::new(UserConfig {
        mtu,
        ..UserConfig::default()
    })
    .expect("a stack");
    let (sender, receiver) = std::sync::mpsc::channel();
    let stop = Arc::new(AtomicBool::new(false));
    let linux = thread::spawn({
        let stop = stop.clone();
        move || {
            /// However it ends.
            struct Stop(Arc<AtomicBool>);
            impl Drop for Stop {
                fn drop(&mut self) {
                    self.0.store(true, Ordering::Release);
                }
            }
            let _stop = Stop(stop);
            if !own_network() {
                return;
            }
            let tap = Tap::open(&TapConfig {
                ifname: "t0".to_owned(),
                addresses: vec![(IpAddr::from([10, 0, 2, 15]), 24)],
                mtu: Some(mtu),
                ..TapConfig::default()
            })
            .expect("an interface");
            sender.send(tap).expect("the other thread waits");
            let start = Instant::now();
            loop {
                let text = ip("-6 addr show dev t0 scope global");
                if text.contains("fd00:10:0:2:") && !text.contains("tentative") {
                    break;
                }
                assert!(start.elapsed() < PATIENCE, "no address: {text}");
            }
            guest();
        }
    });
    let counters = receiver
        .recv()
        .ok()
        .map(|tap| connect(user, tap, offloads, &stop));
    linux.join().expect("the guest");
    counters
}

/// Servers of the host, which outlive the test.
fn servers() -> [SocketAddr; 2] {
    ["127.0.0.1:0", "[::1]:0"].map(|addr| {
        let listener = TcpListener::bind(addr).expect("listen");
        let addr = listener.local_addr().expect("address");
        thread::spawn(move || {
            for socket in listener.incoming() {
                let socket = socket.expect("accept");
                thread::spawn(move || echo(socket));
            }
        });
        let socket = UdpSocket::bind(addr).expect("the same port");
        thread::spawn(move || {
            let mut buffer = vec![0; 70_000];
            loop {
                let (n, from) = socket.recv_from(&mut buffer).expect("receive");
                socket.send_to(&buffer[..n], from).expect("send");
            }
        });
        addr
    })
}

/// The same server as the guest sees it.
fn seen(server: SocketAddr) -> SocketAddr {
    let gateway: IpAddr = match server {
        SocketAddr::V4(_) => [10, 0, 2, 2].into(),
        SocketAddr::V6(_) => "fd00:10:0:2::2".parse().expect("address"),
    };
    SocketAddr::new(gateway, server.port())
}

fn tcp(to: SocketAddr, len: usize) {
    let mut socket = TcpStream::connect(to).expect("connect");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    let bytes: Vec<u8> = (0..len).map(pattern).collect();
    socket.write_all(&bytes).expect("write");
    socket.shutdown(Shutdown::Write).expect("shutdown");
    let mut back = Vec::new();
    socket.read_to_end(&mut back).expect("read");
    assert!(back == bytes, "{} of {len} bytes", back.len());
}

fn udp(to: SocketAddr, lengths: &[usize]) {
    let any = match to {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(any).expect("bind");
    socket.set_read_timeout(Some(PATIENCE)).expect("timeout");
    socket.connect(to).expect("connect");
    let mut buffer = vec![0; 70_000];
    for len in lengths {
        let bytes: Vec<u8> = (0..*len).map(pattern).collect();
        socket.send(&bytes).expect("send");
        let n = socket.recv(&mut buffer).expect("receive");
        assert!(buffer[..n] == bytes, "{n} of {len} bytes");
    }
    // As one frame, if the kernel has it so.
    let size: libc::c_int = 1000;
    // SAFETY: the kernel reads one int of the given size from `size`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_UDP,
            libc::UDP_SEGMENT,
            (&raw const size).cast(),
            4,
        )
    };
    assert_eq!(result, 0, "UDP_SEGMENT");
    let bytes: Vec<u8> = (0..9_500).map(pattern).collect();
    socket.send(&bytes).expect("send");
    for part in bytes.chunks(1000) {
        let n = socket.recv(&mut buffer).expect("receive");
        assert!(buffer[..n] == *part);
    }
}

#[test]
fn linux_makes_an_address_and_talks_with_all_offloads() {
    let servers = servers();
    let offloads = Offloads {
        mtu: 1500,
        ..Offloads::ALL
    };
    let counters = with_guest(1500, offloads, move || {
        let routes = ip("-6 route show default");
        assert!(routes.contains("via fe80::5055:aff:fe00:202"), "{routes}");
        for server in servers {
            tcp(seen(server), 8 * MIB);
            udp(seen(server), &[0, 1, 1452, 1472, 3000, 30_000, 65_000]);
        }
        // The gateway's address is taken.
        ip("-6 addr add fd00:10:0:2::2/64 dev t0");
        let start = Instant::now();
        while !ip("-6 addr show dev t0").contains("dadfailed") {
            assert!(start.elapsed() < PATIENCE);
        }
    });
    let Some(counters) = counters else { return };
    assert_eq!(
        (counters.malformed, counters.limited),
        (0, 0),
        "{counters:?}"
    );
    // 16 MiB each way would be 12,000 frames.
    assert!(counters.frames_from_guest < 8000, "{counters:?}");
    assert!(counters.frames_to_guest < 8000, "{counters:?}");
}

#[test]
fn linux_talks_in_plain_frames_of_9000_bytes() {
    let servers = servers();
    let offloads = Offloads {
        mtu: 9000,
        ..Offloads::NONE
    };
    let counters = with_guest(9000, offloads, move || {
        for server in servers {
            tcp(seen(server), 2 * MIB);
            udp(seen(server), &[0, 8952, 9000, 20_000]);
        }
    });
    let Some(counters) = counters else { return };
    assert_eq!(counters.malformed, 0, "{counters:?}");
}
