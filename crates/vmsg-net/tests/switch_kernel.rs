// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the switch makes of frames beside what Linux makes of the same frames between two tap interfaces on a bridge.

mod copying;
mod netns;
mod wire;

use std::time::{Duration, Instant};

use copying::{Built, Choices, build};
use netns::{ip, own_network, running};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{Delivered, TagChange, deliver};
use vmsg_net::tap::{Tap, TapConfig};
use vmsg_net::{Backend, Offloads, Target, TxFrame, VnetHeader};
use wire::{Arrived, Sink, memory, receive, send, wait};

fn tap(name: &str) -> Tap {
    let config = TapConfig {
        ifname: name.to_owned(),
        mtu: Some(9000),
        ..TapConfig::default()
    };
    let tap = Tap::open(&config).expect("an interface");
    ip(&format!("link set {name} master br0"));
    tap
}

/// What the switch hands to a receiver who has settled on `to`.
fn ours(header: VnetHeader, frame: &[u8], to: &Offloads) -> Vec<Arrived> {
    let source = memory(frame.len());
    let source = [RamSlice::from_atomics(&source)];
    let payload = Pieces::new(&source).take(frame.len());
    payload.write(frame);
    let room = memory(70_000);
    let mut sink = Sink::new(&room, 66_000, 10_000);
    let frame = TxFrame { header, payload };
    let mut head = [0; Target::HEAD];
    let len = payload.read(&mut head);
    let told = deliver(&frame, &head[..len], TagChange::Keep, to, &mut sink);
    assert!(
        matches!(told, Delivered::Frame(_) | Delivered::Frames { .. }),
        "{told:?}"
    );
    sink.arrived
}

/// What Linux hands to the interface `to`, until there are as many frames as there should be.
fn theirs(to: &mut Tap, count: usize) -> Vec<Arrived> {
    let end = Instant::now() + wire::PATIENCE;
    let mut all = Vec::new();
    while all.len() < count && Instant::now() < end {
        let frames = receive(to, 66_000);
        // Linux speaks of its own on new interfaces.
        all.extend(
            frames
                .into_iter()
                .filter(|one| one.frame.starts_with(&copying::ADDRESSES)),
        );
        if all.len() < count {
            wait(to, Duration::from_millis(50));
        }
    }
    all
}

/// What counts of a header: as the length of the headers Linux gives what happens to lie in its first buffer.
const fn essence(header: &VnetHeader) -> VnetHeader {
    VnetHeader {
        flags: header.flags & VnetHeader::NEEDS_CSUM,
        hdr_len: 0,
        ..*header
    }
}

/// A large segment or a frame with a partial checksum, and its header.
fn story(seed: u64) -> (VnetHeader, Built) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let bytes: Vec<u8> = (0..200)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32 & 0xff) as u8
        })
        .collect();
    let large = !seed.is_multiple_of(4);
    let size = 8 + usize::from(bytes[0]) * 5;
    let most = if large { 60 * size } else { 2000 };
    let payload = 1 + (usize::from(bytes[1]) * 256 + usize::from(bytes[2])) % most;
    let mut built = build(&mut Choices::new(&bytes[3..]), payload);
    built.finish(true);
    let short = |n: usize| u16::try_from(n).expect("short");
    let mut header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        hdr_len: short(built.payload),
        csum_start: short(built.transport),
        csum_offset: short(built.checksum_offset()),
        ..VnetHeader::default()
    };
    // Linux drops what it is told to cut and need not.
    if large && payload > size {
        header.gso_size = short(size);
        header.gso_type = match (built.udp, built.v6) {
            (true, _) => VnetHeader::GSO_UDP_L4,
            (false, true) => VnetHeader::GSO_TCPV6,
            (false, false) => VnetHeader::GSO_TCPV4,
        };
        if !built.udp && built.bytes[built.transport + 13] & 0x80 != 0 {
            header.gso_type |= VnetHeader::GSO_ECN;
        }
    }
    (header, built)
}

#[test]
fn pieces_and_checksums_are_those_that_linux_makes() {
    if !own_network() {
        return;
    }
    ip("link add br0 type bridge mcast_snooping 0");
    ip("link set br0 mtu 9000 up");
    let (mut from, mut to) = (tap("t0"), tap("t1"));
    let all = from.offloads();
    from.set_guest(&running(all));
    let large = Offloads {
        guest_ecn: false,
        ..all
    };
    let partial = Offloads {
        guest_csum: true,
        ..Offloads::NONE
    };
    let mut pieces = 0;
    for (name, offloads) in [
        ("nothing", Offloads::NONE),
        ("partial checksums", partial),
        ("no marks", large),
        ("all", all),
    ] {
        let offloads = Offloads {
            mtu: 9000,
            ..offloads
        };
        to.set_guest(&running(offloads));
        forwarding();
        receive(&mut to, 66_000);
        for seed in 0..500 {
            let (header, built) = story(seed);
            let ours = ours(header, &built.bytes, &offloads);
            assert!(send(&mut from, 0, header, &built.bytes), "{name} {seed}");
            let theirs = theirs(&mut to, ours.len());
            let tale = || {
                format!(
                    "{name}, story {seed}: {header:?}, {} bytes",
                    built.bytes.len()
                )
            };
            assert_eq!(ours.len(), theirs.len(), "{}", tale());
            for (index, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                same(ours, theirs, &format!("{}, piece {index}", tale()));
            }
            pieces += ours.len();
        }
    }
    println!("{pieces} frames are the same");
    assert!(pieces > 10_000);
}

/// Both ports forward.
fn forwarding() {
    let end = Instant::now() + wire::PATIENCE;
    while ip("-d link show type tun")
        .matches("state forwarding")
        .count()
        < 2
    {
        assert!(Instant::now() < end, "the bridge's ports are up");
        std::thread::yield_now();
    }
}

fn same(ours: &Arrived, theirs: &Arrived, what: &str) {
    assert_eq!(essence(&ours.header), essence(&theirs.header), "{what}");
    assert_eq!(ours.frame.len(), theirs.frame.len(), "{what}");
    let differ = ours
        .frame
        .iter()
        .zip(&theirs.frame)
        .position(|(a, b)| a != b);
    if let Some(at) = differ {
        let end = ours.frame.len().min(at + 16);
        panic!(
            "{what}: byte {at}: ours {:02x?}, theirs {:02x?}",
            &ours.frame[at..end],
            &theirs.frame[at..end]
        );
    }
}
