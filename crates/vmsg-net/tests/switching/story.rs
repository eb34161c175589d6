// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Senders of any frames on a switch with VLANs, rules, pinned ports and an uplink: nothing may get where it must not, and every
//! frame is accounted for.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vmsg_net::switch::{PortConfig, Rule, Switch, SwitchConfig, Unknown, Vlans};
use vmsg_net::{Backend, Closed, Guest, Mac, Offloads, RxSink, Target, TxFrame, VnetHeader};

use crate::switching::{Bench, Mood, everything, mac};

/// Devices; the uplink is one more.
const PORTS: usize = 6;
/// Steps of a story.
const STEPS: usize = 64;

/// Choices that are read from bytes; zeros when there are no more.
struct Choices<'a>(&'a [u8]);

impl Choices<'_> {
    fn byte(&mut self) -> u8 {
        let Some((first, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *first
    }

    fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    fn short(&mut self) -> u16 {
        u16::from_be_bytes([self.byte(), self.byte()])
    }
}

/// What is on the other side of the uplink.
#[derive(Default)]
struct Outside {
    coming: VecDeque<(VnetHeader, Vec<u8>)>,
    got: Vec<Vec<u8>>,
    full: bool,
}

struct Up(Arc<Mutex<Outside>>, Offloads);

impl Backend for Up {
    fn offloads(&self) -> Offloads {
        self.1
    }
    fn set_guest(&mut self, _: &Guest) {}
    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    fn next_timeout(&self) -> Option<Instant> {
        None
    }
    fn poll(&mut self, _: Instant) {}
    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        let mut outside = self.0.lock().expect("one thread");
        let taken = if outside.full {
            frames.len() / 2
        } else {
            frames.len()
        };
        for frame in &frames[..taken] {
            let header = frame.header;
            let len = frame.payload.len();
            if header.needs_csum() {
                assert!(self.1.csum, "a checksum that it does not complete");
                let start = usize::from(header.csum_start);
                let end = start + usize::from(header.csum_offset) + 2;
                assert!(start >= 14 && end <= len, "{header:?} of {len} bytes");
            }
            if header.gso_type != VnetHeader::GSO_NONE {
                assert!(self.1.tso4 || self.1.tso6 || self.1.uso, "{header:?}");
            }
            let mut bytes = vec![0; len];
            frame.payload.read(&mut bytes);
            outside.got.push(bytes);
        }
        taken
    }
    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut outside = self.0.lock().expect("one thread");
        let mut count = 0;
        while let Some((header, bytes)) = outside.coming.front() {
            let Some(room) = sink.offer(Target::Pair(0), bytes.len()) else {
                break;
            };
            room.write(bytes);
            sink.commit(header, bytes.len());
            outside.coming.pop_front();
            count += 1;
        }
        count
    }
    fn has_frames(&self) -> bool {
        !self.0.lock().expect("one thread").coming.is_empty()
    }
    fn shutdown(&mut self) {}
}

fn some_vlans(choices: &mut Choices<'_>) -> Vlans {
    let vlan = |choices: &mut Choices<'_>| 1 + u16::try_from(choices.below(3)).expect("small");
    match choices.below(4) {
        0 => Vlans::Plain,
        1 | 2 => Vlans::Access(vlan(choices)),
        _ => Vlans::Trunk {
            allowed: ["1-2", "3", "all"][choices.below(3)]
                .parse()
                .expect("VLANs"),
            native: (choices.below(2) == 1).then(|| vlan(choices)),
        },
    }
}

fn some_frame(choices: &mut Choices<'_>) -> (VnetHeader, Vec<u8>) {
    let mut bytes = Vec::new();
    let address = |choices: &mut Choices<'_>, bytes: &mut Vec<u8>| match choices.below(8) {
        7 => bytes.extend((0..6).map(|_| choices.byte())),
        6 => bytes.extend([0xff; 6]),
        n => bytes.extend(mac(n)),
    };
    address(choices, &mut bytes);
    address(choices, &mut bytes);
    for _ in 0..choices.below(4) {
        let kind = [0x8100, 0x8100, 0x88a8, 0x9100][choices.below(4)];
        bytes.extend(u16::to_be_bytes(kind));
        let vlan = choices.byte();
        bytes.extend([vlan & 0xf0, vlan & 0x07]);
    }
    bytes.extend([[8, 0], [0x86, 0xdd], [0x88, 0xb5]][choices.below(3)]);
    let raw = choices.below(64);
    for _ in 0..raw {
        bytes.push(choices.byte());
    }
    let more = match choices.below(8) {
        0 => usize::from(choices.short()),
        1 => 70_000,
        _ => choices.below(100),
    };
    bytes.resize(bytes.len() + more, 7);
    bytes.truncate(bytes.len() - choices.below(8).min(bytes.len()));
    let header = match choices.below(3) {
        0 => VnetHeader::default(),
        _ => VnetHeader {
            flags: choices.byte(),
            gso_type: [0, 1, 3, 4, 5, 0x81, 77][choices.below(7)],
            hdr_len: choices.short(),
            gso_size: choices.short(),
            csum_start: choices.short() % 300,
            csum_offset: choices.short() % 300,
        },
    };
    (header, bytes)
}

/// The VLAN in a frame's first tag.
fn tag(frame: &[u8]) -> Option<u16> {
    (frame.get(12..14) == Some(&[0x81, 0])).then(|| {
        let tci = frame.get(14..16).expect("a whole tag");
        u16::from_be_bytes([tci[0], tci[1]]) & 0xfff
    })
}

/// Whether a frame as it is here may have come from a port like `from` to one like `to`.
fn assert_in_its_vlan(from: &Vlans, to: &Vlans, frame: &[u8], what: &str) {
    let vlan = match to {
        Vlans::Plain => {
            assert_eq!(*from, Vlans::Plain, "{what}: out of a VLAN");
            return;
        }
        Vlans::Access(vlan) => {
            assert_eq!(tag(frame), None, "{what}: a tag");
            *vlan
        }
        Vlans::Trunk { allowed, native } => {
            let vlan = tag(frame).or(*native).expect("a VLAN");
            assert!(allowed.contains(vlan) || *native == Some(vlan), "{what}");
            vlan
        }
    };
    match from {
        Vlans::Plain => panic!("{what}: into a VLAN"),
        Vlans::Access(other) => assert_eq!(*other, vlan, "{what}: into another VLAN"),
        Vlans::Trunk { allowed, native } => {
            assert!(allowed.contains(vlan) || *native == Some(vlan), "{what}");
        }
    }
}

/// Any story.
pub(crate) fn one(bytes: &[u8]) {
    let mut choices = Choices(bytes);
    let mut config = SwitchConfig::new("s0");
    config.table = PORTS + 2 + choices.below(40);
    config.unknown = match choices.below(3) {
        0 => Unknown::Drop,
        1 => Unknown::Uplink("p6".to_owned()),
        _ => Unknown::Flood,
    };
    // Who may send to whom, the uplink included.
    let mut may = [[false; PORTS + 1]; PORTS + 1];
    for (from, row) in may.iter_mut().enumerate() {
        let word = choices.byte();
        for (to, may) in row.iter_mut().enumerate() {
            *may = from != to && word >> to & 1 == 0;
            if *may {
                let rules = Rule::parse(true, &format!("p{from} > p{to}"));
                config.rules.extend(rules.expect("a rule"));
            }
        }
    }
    let seed = u64::from(choices.byte());
    let mut bench = Bench::new(Switch::new(config).expect("a switch"), seed);
    let mut settings = Vec::new();
    for n in 0..=PORTS {
        let mut config = PortConfig::new(format!("p{n}"));
        config.vlan = some_vlans(&mut choices);
        let extra = choices.byte();
        if extra & 3 == 0 {
            config.pin = vec![Mac(mac(n))];
        }
        if extra & 12 == 4 {
            config.storm = Some(2);
        }
        config.macs = 1 + usize::from(extra >> 5);
        settings.push(config);
    }
    let outside = Arc::new(Mutex::new(Outside::default()));
    let mut can = [Offloads::ALL, Offloads::NONE][choices.below(2)];
    can.ufo = false;
    let backend = Box::new(Up(Arc::clone(&outside), can));
    let uplink = bench.switch.add_uplink(settings[PORTS].clone(), backend);
    uplink.expect("an uplink");
    let mut ports = Vec::new();
    let mut keys = Vec::new();
    for config in &settings[..PORTS] {
        let port = bench.switch.add_port(config.clone());
        let mut port = port.expect("a port");
        let mut guest = everything();
        match choices.below(4) {
            0 => guest.offloads = Offloads::NONE,
            1 => guest.heads = true,
            2 => guest.offloads.mtu = 576,
            _ => {}
        }
        keys.push(bench.bring_up(&mut port, &guest));
        ports.push(port);
    }
    bench.pump();
    for _ in 0..STEPS {
        if choices.0.is_empty() {
            break;
        }
        let from = choices.below(PORTS + 1);
        match choices.below(8) {
            0 if from < PORTS => {
                let mood = match choices.below(5) {
                    0 => Mood::Closed(Closed::Broken),
                    1 => Mood::Breaks,
                    2 => Mood::Buffers(choices.below(4)),
                    3 => Mood::Closed(Closed::NoDriver),
                    _ => Mood::Buffers(usize::MAX),
                };
                let receiver = bench.world.receivers.get_mut(&keys[from]);
                receiver.expect("a receiver").mood = mood;
            }
            0 => outside.lock().expect("one thread").full ^= true,
            1 => bench.pass(Duration::from_millis(u64::from(choices.short()) * 10)),
            _ => {
                let frames: Vec<_> = (0..1 + choices.below(4))
                    .map(|_| some_frame(&mut choices))
                    .collect();
                if from == PORTS {
                    // No back end hands on more than there is room for.
                    let frames = frames.into_iter().filter(|(_, bytes)| !bytes.is_empty());
                    let mut outside = outside.lock().expect("one thread");
                    outside.coming.extend(frames);
                } else {
                    let taken = bench.send_with(&mut ports[from], &frames);
                    assert_eq!(taken, frames.len());
                }
                bench.pump();
                let pinned = !settings[from].pin.is_empty();
                for to in 0..=PORTS {
                    let got = if to == PORTS {
                        std::mem::take(&mut outside.lock().expect("one thread").got)
                    } else {
                        bench.got(keys[to])
                    };
                    for frame in got {
                        let what =
                            format!("{from} to {to}: {:02x?}", &frame[..frame.len().min(40)]);
                        assert!(may[from][to], "{what}: against the rules");
                        assert_in_its_vlan(&settings[from].vlan, &settings[to].vlan, &frame, &what);
                        assert!(!pinned || frame[6..12] == mac(from), "{what}: spoofed");
                        let owner = (0..=PORTS).find(|n| frame[6..12] == mac(*n));
                        if let Some(owner) = owner.filter(|owner| *owner != from) {
                            let fixed = &settings[owner];
                            let is_plain = |vlans: &Vlans| *vlans == Vlans::Plain;
                            assert!(
                                fixed.pin.is_empty()
                                    || fixed.vlan != settings[from].vlan
                                    || !is_plain(&fixed.vlan),
                                "{what}: somebody else's address"
                            );
                        }
                    }
                }
            }
        }
    }
    let report = bench.control.report();
    let all =
        |of: fn(&vmsg_net::switch::PortReport) -> u64| report.ports.iter().map(of).sum::<u64>();
    let out = all(|port| port.output.total().frames) + all(|port| port.dropped_out.total());
    assert_eq!(all(|port| port.copies), out, "every copy is accounted for");
}
