// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bridge of Linux between two tap interfaces, in a network namespace of this process: one system call for each frame.

use std::fs;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use vmsg_net::tap::{Tap, TapConfig};
use vmsg_net::{Backend, Guest, Offloads};

use crate::frames::Shape;
use crate::measure::{Plan, pace};
use crate::two_sides::{Places, beside};

const PATIENCE: Duration = Duration::from_secs(20);
/// Frames written before they are read.
const BATCH: usize = 32;

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip(8)");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

struct End {
    fd: OwnedFd,
    /// Sees to offloads and the carrier.
    _tap: Tap,
}

impl End {
    fn new(name: &str) -> Self {
        ip(&format!("tuntap add dev {name} mode tap vnet_hdr"));
        ip(&format!("link set {name} master br0"));
        ip(&format!("link set {name} up"));
        let config = TapConfig {
            ifname: name.to_owned(),
            ..TapConfig::default()
        };
        let fd = config.join().expect("an interface").remove(0);
        let mut tap = Tap::open(&TapConfig {
            fds: vec![fd.as_raw_fd()],
            ..TapConfig::default()
        })
        .expect("the same interface");
        tap.set_guest(&Guest {
            offloads: Offloads::ALL,
            running: true,
            ..Guest::NONE
        });
        let start = Instant::now();
        while !ip(&format!("link show {name}")).contains("state UP") {
            assert!(start.elapsed() < PATIENCE, "no carrier");
        }
        Self { fd, _tap: tap }
    }

    fn write(&self, frame: &[u8]) {
        match rustix::io::write(&self.fd, frame) {
            // Full: lost.
            Ok(_) | Err(Errno::AGAIN) => {}
            Err(error) => panic!("{error}"),
        }
    }

    fn read(&self, room: &mut [u8]) -> Option<usize> {
        match rustix::io::read(&self.fd, room) {
            Ok(len) => Some(len),
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
        }
    }

    fn wait(&self, timeout: Duration) {
        let timeout = Timespec::try_from(timeout).expect("short");
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        poll(&mut fds, Some(&timeout)).expect("poll");
    }
}

/// Two taps on a bridge.
pub(crate) struct Bridge {
    ends: [End; 2],
    room: Vec<u8>,
}

impl Bridge {
    /// Makes all of it in the present namespace, which is to have nothing else.
    pub(crate) fn new() -> Self {
        // Nobody but us is to send anything.
        for which in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
            let _ = fs::write(path, "1");
        }
        ip("link add br0 type bridge forward_delay 0 mcast_snooping 0");
        ip("link set br0 up");
        Self {
            ends: [End::new("a0"), End::new("b0")],
            room: vec![0; 80 << 10],
        }
    }

    /// Lets the bridge know who is where, and makes sure that frames come whole.
    pub(crate) fn introduce(&mut self, shape: &Shape) {
        let [a, b] = &self.ends;
        b.write(&shape.bytes(1, 0));
        let start = Instant::now();
        let mut whole = false;
        while !whole {
            assert!(start.elapsed() < PATIENCE, "nothing came over the bridge");
            a.write(&shape.bytes(0, 1));
            b.wait(Duration::from_millis(10));
            while let Some(len) = b.read(&mut self.room) {
                whole |= len == shape.bytes(0, 1).len();
            }
        }
        while a.read(&mut self.room).is_some() {}
    }

    /// Writes some frames here and reads them there; how many.
    pub(crate) fn batch(&mut self, frame: &[u8]) -> usize {
        let [a, b] = &self.ends;
        for _ in 0..BATCH {
            a.write(frame);
        }
        let mut count = 0;
        while b.read(&mut self.room).is_some() {
            count += 1;
        }
        count
    }

    /// Nanoseconds for each frame that is read there, as fast as they are written here.
    pub(crate) fn across(&mut self, plan: &Plan, places: &Places, frame: &[u8]) -> f64 {
        let [a, b] = &self.ends;
        let room = &mut self.room;
        let (stop, count) = (AtomicBool::new(false), AtomicUsize::new(0));
        let other = || {
            while !stop.load(Ordering::Relaxed) {
                match b.read(room) {
                    Some(_) => {
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    None => b.wait(Duration::from_millis(5)),
                }
            }
        };
        let mut seen = 0;
        let result = beside(places, other, || {
            let result = pace(plan, || {
                for _ in 0..BATCH {
                    a.write(frame);
                }
                let all = count.load(Ordering::Relaxed);
                let new = all - seen;
                seen = all;
                new
            });
            stop.store(true, Ordering::Relaxed);
            result
        });
        while b.read(&mut self.room).is_some() {}
        result
    }
}
