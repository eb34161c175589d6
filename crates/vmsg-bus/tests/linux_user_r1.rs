// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `linux-user` with messages of 40 bytes: QEMU at the other end.
#![cfg(feature = "linux-user")]

mod place;
#[allow(dead_code, reason = "some is for other tests")]
mod qemu;

use place::{LONG, Place, accept};
use qemu::{End, Qemu, Queues};
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::thread;
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::linux_user::{Connector, Revision};

/// A request of 40 bytes: type, id, device 0.
fn r1(id: u8, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, id, 0, 0];
    bytes.extend(payload);
    bytes.resize(40, 0);
    bytes
}

#[test]
fn an_r1_driver_speaks_to_a_host_that_sees_revision_1() {
    let mut place = Place::new();
    place.spec.revision = Revision::R1;
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    assert!(!bus.capabilities().enumerates);
    assert_eq!(bus.capabilities().max_message_size, 48);
    let host = thread::spawn(move || {
        let mut asked = Vec::new();
        let mut buf = [0; 48];
        loop {
            match bus.try_recv(&mut buf) {
                Ok(Some(len)) => {
                    asked.push(buf[1]);
                    // A response: to GET_DEVICE_INFO an rng, to others what they said.
                    let mut answer = buf[..len].to_vec();
                    answer[0] |= 1;
                    if buf[1] == 2 {
                        answer.resize(32, 0);
                        answer[6] = 32;
                        answer[8..12].copy_from_slice(&4u32.to_le_bytes());
                        answer[16..20].copy_from_slice(&64u32.to_le_bytes());
                    }
                    if buf[1] == 7 {
                        answer.extend([11, 0, 0, 0]);
                        answer[6] = 12;
                    }
                    bus.try_send(&answer).unwrap();
                    // QEMU has the answer before it is rung for, and may be gone by then.
                    if bus.flush().is_err() {
                        return asked;
                    }
                }
                Ok(None) => assert!(bus.wait(Some(LONG)).unwrap(), "never woken"),
                Err(_) => return asked,
            }
        }
    });
    // SET_DEVICE_STATUS has no answer; what follows waits behind it.
    qemu.send(&r1(0x0a, &[1, 0, 0, 0]));
    qemu.send(&r1(0x0a, &[3, 0, 0, 0]));
    let status = qemu.ask(&r1(0x09, &[]));
    assert_eq!((status[0], status[1], status[4]), (1, 0x09, 11));
    let info = qemu.ask(&r1(0x03, &[]));
    assert_eq!((info[1], info[8]), (0x03, 4));
    drop(qemu);
    assert_eq!(host.join().unwrap(), [2, 8, 8, 7, 2]);
}

#[test]
fn an_r1_driver_that_asks_without_end_and_dies_is_noticed() {
    let mut place = Place::new();
    place.spec.revision = Revision::R1;
    let mut listener = place.host();
    let mut qemu = Qemu::connect(place.path(), End::Driver);
    let mut bus = accept(&mut listener);
    // Nobody answers, so only the first is asked.
    for _ in 0..200 {
        qemu.send(&r1(0x09, &[]));
        bus.clear_poll_fd().unwrap();
    }
    let mut buf = [0; 48];
    assert!(bus.try_recv(&mut buf).unwrap().is_some());
    let mut attempts = 0;
    loop {
        assert_eq!(bus.try_recv(&mut buf), Ok(None));
        attempts += 1;
        assert!(attempts < 10, "there is nothing to do");
        if bus.arm() {
            break;
        }
    }
    drop(qemu);
    let error = loop {
        if let Err(error) = bus.try_recv(&mut buf) {
            break error;
        }
        assert!(bus.wait(Some(LONG)).unwrap(), "never woken");
    };
    assert_eq!(error, ChannelError::Closed);
}

#[test]
fn a_driver_of_ours_speaks_r1_to_qemu() {
    let mut place = Place::new();
    place.spec.revision = Revision::R1;
    let socket = UnixListener::bind(place.socket()).unwrap();
    let queues = Queues::open(place.path(), End::Device);
    let connector = Connector::new(&place.spec, "driver").timeout(LONG);
    let driver = thread::spawn(move || connector.connect().unwrap());
    let (stream, _) = socket.accept().unwrap();
    let qemu = thread::spawn(move || {
        let mut qemu = Qemu {
            queues,
            socket: stream,
        };
        let mut asked = Vec::new();
        while !asked.contains(&0x09) {
            let mut answers = 0;
            qemu.turn(|queues, request| {
                asked.push(request[1]);
                let mut answer = request;
                answer[0] |= 1;
                if request[1] == 0x09 {
                    answer[4] = 3;
                }
                // SET_DEVICE_STATUS is not answered.
                if request[1] != 0x0a {
                    assert!(queues.push(&answer));
                    answers += 1;
                }
            });
            for _ in 0..answers {
                qemu.socket.write_all(&[0xed]).unwrap();
            }
        }
        asked
    });
    let mut driver = driver.join().unwrap();
    // SET_DEVICE_STATUS 3 with token 9.
    driver
        .try_send(&[0, 8, 0, 0, 9, 0, 12, 0, 3, 0, 0, 0])
        .unwrap();
    driver.flush().unwrap();
    let mut buf = [0; 48];
    let len = loop {
        if let Some(len) = driver.try_recv(&mut buf).unwrap() {
            break len;
        }
        assert!(driver.wait(Some(LONG)).unwrap(), "never woken");
    };
    assert_eq!(buf[..len], [1, 8, 0, 0, 9, 0, 12, 0, 3, 0, 0, 0]);
    assert_eq!(qemu.join().unwrap(), [0x0a, 0x09]);
}
