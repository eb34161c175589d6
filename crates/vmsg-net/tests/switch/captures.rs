// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a port records.

use vmsg_net::switch::{Mirror, PortConfig, SwitchError};

use crate::net::{DOT1Q, Net, access, all, open, plain, trunk};
use crate::switching::{EVERYBODY, frame, mac};

#[test]
fn frames_are_recorded_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p1.pcap");
    let mut net = Net::new(open(), vec![access(0, 5), trunk(1, "all", None)]);
    let mirror = Mirror::new(&path);
    net.bench
        .ask(|control| control.capture("p1", Some(mirror)))
        .unwrap();
    assert!(net.report(1).capture.is_some());
    net.send(0, &[all(0, 1)]);
    let back = frame(mac(0), mac(1), &[(DOT1Q, 5)], 2, 100);
    net.send(1, std::slice::from_ref(&back));
    let file = std::fs::read(&path).unwrap();
    let mut records = Vec::new();
    let mut rest = &file[24..];
    while !rest.is_empty() {
        let len = u32::from_ne_bytes(rest[8..12].try_into().unwrap()) as usize;
        records.push(rest[16..16 + len].to_vec());
        rest = &rest[16 + len..];
    }
    let there = frame(EVERYBODY, mac(0), &[(DOT1Q, 5)], 1, 68);
    assert_eq!(records, [there, back]);
    net.bench
        .ask(|control| control.capture("p1", None))
        .unwrap();
    net.send(0, &[all(0, 3)]);
    assert_eq!(std::fs::read(&path).unwrap(), file);
}

#[test]
fn a_capture_that_fails_ends_and_nothing_else_does() {
    let mut net = Net::open(2);
    let full = Mirror::new("/dev/full");
    // The header cannot be written: it is refused at once.
    let refused = net.bench.ask(|control| control.capture("p1", Some(full)));
    assert!(matches!(refused, Err(SwitchError::Capture { .. })));
    // A pipe that nobody empties.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pipe");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        0,
    )
    .unwrap();
    let _reader = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&path)
        .unwrap();
    let mirror = Mirror::new(&path);
    net.bench
        .ask(|control| control.capture("p1", Some(mirror)))
        .unwrap();
    for n in 0..200 {
        net.send(0, &[frame(mac(1), mac(0), &[], n, 1500)]);
    }
    assert_eq!(net.got(1).len(), 200);
    assert_eq!(net.report(1).capture, None);
}

#[test]
fn a_capture_goes_on_in_a_file_that_is_one_and_leaves_others_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("p1.pcap");
    let on = |path: &std::path::Path| Mirror {
        append: true,
        ..Mirror::new(path)
    };
    let with = |path: &std::path::Path| {
        let captured = PortConfig {
            capture: Some(on(path)),
            ..plain(1)
        };
        Net::new(open(), vec![plain(0), captured])
    };
    let mut lengths = Vec::new();
    for n in 0..3 {
        with(&path).send(0, &[all(0, n)]);
        lengths.push(std::fs::metadata(&path).unwrap().len());
    }
    let record = lengths[0] - 24;
    assert_eq!(lengths, [24 + record, 24 + 2 * record, 24 + 3 * record]);

    let other = dir.path().join("other");
    std::fs::write(&other, "something else altogether").unwrap();
    let mut net = with(&other);
    assert_eq!(net.report(1).capture, None);
    net.send(0, &[all(0, 4)]);
    assert_eq!(net.got(1).len(), 1);
    let refused = net
        .bench
        .ask(|control| control.capture("p1", Some(on(&other))));
    assert!(matches!(refused, Err(SwitchError::Capture { .. })));
    assert_eq!(std::fs::read(&other).unwrap(), b"something else altogether");
}
