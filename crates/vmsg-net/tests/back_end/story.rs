// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A back end that says and does anything, in any order.

use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::vhost_user::{VhostUser, VhostUserConfig};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

use crate::back_end::{
    BackEnd, CSUM, EVENT_IDX, GUEST_CSUM, GUEST_TSO4, HOST_TSO4, MRG_RXBUF, PROTOCOL, VERSION_1,
};

const ALL: u64 =
    CSUM | GUEST_CSUM | GUEST_TSO4 | HOST_TSO4 | MRG_RXBUF | EVENT_IDX | PROTOCOL | VERSION_1;
/// Steps of a story.
const STEPS: usize = 48;

/// Where frames come to, and what they are.
struct Sink<'a> {
    room: [RamSlice<'a>; 1],
    arrived: Vec<(VnetHeader, usize)>,
}

impl RxSink for Sink<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        (len <= self.room[0].len()).then(|| Pieces::new(&self.room).take(len))
    }
    fn commit(&mut self, header: &VnetHeader, len: usize) {
        self.arrived.push((*header, len));
    }
}

fn memory(bytes: usize) -> Vec<AtomicU64> {
    (0..bytes.div_ceil(8)).map(|_| AtomicU64::new(0)).collect()
}

fn send(port: &mut VhostUser, now: Instant, header: VnetHeader, frame: &[u8]) {
    let memory = memory(frame.len());
    let (whole, _) = RamSlice::from_atomics(&memory).split_at(frame.len());
    whole.write(0, frame);
    let pieces = [whole];
    let payload = Pieces::new(&pieces);
    port.transmit(now, 0, &[TxFrame { header, payload }]);
}

/// Any story.
pub(crate) fn one(mut bytes: &[u8]) {
    let folder = tempfile::TempDir::new().expect("a folder");
    let path = folder.path().join("s");
    let mut config = VhostUserConfig::new(path.clone(), true);
    config.reconnect = Duration::from_millis(50);
    let mut port = VhostUser::open(&config).expect("a port");
    let mut offloads = Offloads::ALL;
    let mut next = || {
        let (first, rest) = bytes.split_first()?;
        bytes = rest;
        Some(*first)
    };
    let setup = next().unwrap_or(0);
    if setup & 1 != 0 {
        offloads = Offloads::NONE;
    }
    port.set_guest(&Guest {
        offloads,
        running: true,
        heads: setup & 2 != 0,
        ..Guest::NONE
    });
    let address = SocketAddrUnix::new(&path).expect("a path");
    // One may wait at the door; who comes then has to come again.
    let call = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
        let socket = socket.expect("a socket");
        connect(&socket, &address)
            .ok()
            .map(|()| UnixStream::from(socket))
    };
    let features = match setup >> 2 & 3 {
        0 => ALL & !MRG_RXBUF,
        1 => ALL & !EVENT_IDX,
        _ => ALL,
    };
    let mut back = BackEnd::new(call().expect("a listener"), features);
    // An hour, a step at a time: pauses and patience are over at once.
    let mut now = Instant::now();
    let room = memory(70_000);
    for _ in 0..STEPS {
        let Some(what) = next() else { break };
        let before = port.counters();
        match what % 8 {
            0 => {
                let count = next().unwrap_or(0) % 32;
                let said: Vec<u8> = (0..count).filter_map(|_| next()).collect();
                back.say(&said);
            }
            // As it should be.
            1 | 2 => {
                for _ in 0..64 {
                    back.step();
                    port.poll(now);
                    if port.link_is_up() {
                        break;
                    }
                }
            }
            3 if back.runs() && port.link_is_up() => {
                let ring = usize::from(next().unwrap_or(0) & 1);
                let most = if ring == 0 { 4 + 8 * 1024 } else { 4 + 8 * 256 };
                let at = match next().unwrap_or(0) {
                    near @ 0..=127 => usize::from(near),
                    far => usize::from(far) * 31 % most,
                };
                let count = 1 + next().unwrap_or(0) % 8;
                let words: Vec<u8> = (0..count).filter_map(|_| next()).collect();
                back.used(ring).write(at, &words);
                back.ring(ring);
            }
            4 if back.runs() && port.link_is_up() => {
                let header: Vec<u8> = (0..10).filter_map(|_| next()).collect();
                let header = header.try_into().unwrap_or([0; 10]);
                let len = usize::from(next().unwrap_or(0)) * 260;
                let mut frame: Vec<u8> = (0..60).filter_map(|_| next()).collect();
                frame.resize(len.max(frame.len()), 1);
                back.give(&VnetHeader::from_bytes(&header), &frame);
            }
            5 => {
                let header: Vec<u8> = (0..10).filter_map(|_| next()).collect();
                let header = header.try_into().unwrap_or([0; 10]);
                let frame = vec![next().unwrap_or(0); 14 + 200 * usize::from(next().unwrap_or(0))];
                send(&mut port, now, VnetHeader::from_bytes(&header), &frame);
            }
            6 => {
                if let Some(socket) = call() {
                    back = BackEnd::new(socket, features);
                }
                now += Duration::from_secs(60);
            }
            _ => {}
        }
        port.poll(now);
        let mut sink = Sink {
            room: [RamSlice::from_atomics(&room)],
            arrived: Vec::new(),
        };
        let mut turns = 0;
        while port.has_frames() && port.receive(now, &mut sink) > 0 {
            turns += 1;
            assert!(turns < 10_000, "frames without end");
        }
        for (header, len) in sink.arrived {
            assert!(len >= 14, "a frame without a header");
            assert!(offloads.guest_csum || !header.needs_csum(), "{header:?}");
        }
        let faults = port.counters().faults - before.faults;
        assert!(faults <= 2, "{faults} faults of one step");
    }
    port.shutdown();
    assert!(!port.link_is_up());
}
