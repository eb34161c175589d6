// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A frame goes from the sender's buffers to the receiver's in one copy: every byte that is moved is counted.
#![cfg(debug_assertions)]

mod switching;

use switching::{Bench, EVERYBODY, everything, frame, mac, segment};
use vmsg_net::switch::{Port, PortConfig, Rule, Switch, SwitchConfig, Vlans};
use vmsg_net::{Guest, VnetHeader};

/// A frame's addresses and tag are read to find its receivers, and the headers of a large segment to look at them.
const HEAD: u64 = 18 + 128;

fn bench(ports: Vec<PortConfig>, guest: &Guest) -> (Bench, Vec<Port>, Vec<u64>) {
    let config = SwitchConfig {
        rules: vec![Rule::allow_all()],
        ..SwitchConfig::new("s0")
    };
    let mut bench = Bench::new(Switch::new(config).unwrap(), 3);
    let mut keys = Vec::new();
    let mut all = Vec::new();
    for config in ports {
        let mut port = bench.switch.add_port(config).unwrap();
        keys.push(bench.bring_up(&mut port, guest));
        all.push(port);
    }
    bench.pump();
    (bench, all, keys)
}

fn plain(ports: usize) -> Vec<PortConfig> {
    (0..ports)
        .map(|port| PortConfig::new(format!("p{port}")))
        .collect()
}

/// Sends frames from the first port; they must reach `receivers` others with a copy for each, and little besides.
fn one_copy(
    bench: &mut Bench,
    ports: &mut [Port],
    keys: &[u64],
    frames: &[(VnetHeader, Vec<u8>)],
    receivers: usize,
) {
    let before = vmsg_mem::copied();
    assert_eq!(bench.send_with(&mut ports[0], frames), frames.len());
    let moved = vmsg_mem::copied() - before;
    let got: Vec<Vec<u8>> = keys.iter().flat_map(|key| bench.got(*key)).collect();
    assert_eq!(got.len(), frames.len() * receivers);
    let delivered: u64 = got.iter().map(|frame| frame.len() as u64).sum();
    // These tests put the frames into the sender's memory, and take them out of the receivers'.
    let put: u64 = frames.iter().map(|(_, bytes)| bytes.len() as u64).sum();
    let own = put + delivered;
    let copies = moved - own;
    assert!(copies >= delivered, "{copies} of {delivered} bytes");
    let heads = HEAD * frames.len() as u64;
    assert!(
        copies <= delivered + heads,
        "{copies} bytes were moved to deliver {delivered}"
    );
}

fn ordinary(to: [u8; 6], count: u32, len: usize) -> Vec<(VnetHeader, Vec<u8>)> {
    (0..count)
        .map(|number| {
            let bytes = frame(to, mac(0), &[], number, len);
            (VnetHeader::default(), bytes)
        })
        .collect()
}

#[test]
fn a_frame_to_one_is_copied_once() {
    let (mut bench, mut ports, keys) = bench(plain(2), &everything());
    for len in [64, 1514, 9000, 65000] {
        let frames = ordinary(mac(1), 8, len);
        one_copy(&mut bench, &mut ports, &keys, &frames, 1);
    }
}

#[test]
fn a_frame_to_all_is_copied_once_for_each() {
    let (mut bench, mut ports, keys) = bench(plain(9), &everything());
    let frames = ordinary(EVERYBODY, 4, 1514);
    one_copy(&mut bench, &mut ports, &keys, &frames, 8);
}

#[test]
fn a_tag_is_put_in_and_taken_out_on_the_way() {
    let mut configs = plain(3);
    configs[0].vlan = Vlans::Access(7);
    configs[1].vlan = Vlans::Access(7);
    configs[2].vlan = Vlans::Trunk {
        allowed: "7".parse().unwrap(),
        native: None,
    };
    let (mut bench, mut ports, keys) = bench(configs, &everything());
    let frames = ordinary(EVERYBODY, 4, 1514);
    one_copy(&mut bench, &mut ports, &keys, &frames, 2);
}

#[test]
fn a_large_segment_crosses_whole_in_one_copy() {
    let (mut bench, mut ports, keys) = bench(plain(2), &everything());
    let (header, bytes) = segment(mac(1), 60_000, 1448);
    one_copy(&mut bench, &mut ports, &keys, &[(header, bytes)], 1);
}
