// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests and uplinks that want the others on a switch no good.

#[path = "switching/story.rs"]
mod story;
mod switching;

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use proptest::prelude::*;
use switching::{Bench, EVERYBODY, Memory, everything, frame, mac};
use vmsg_mem::{Pieces, RamSlice};
use vmsg_net::switch::{PortConfig, Reason, Rule, Switch, SwitchConfig, Vlans};
use vmsg_net::{Backend, Closed, Offloads, Outlets, RxSink, Target, TxFrame, VnetHeader};

fn open() -> SwitchConfig {
    let mut config = SwitchConfig::new("s0");
    config.rules = vec![Rule::allow_all()];
    config
}

fn plain(port: usize) -> PortConfig {
    PortConfig::new(format!("p{port}"))
}

/// A frame of one piece, with these hints.
fn send_one(
    port: &mut dyn Backend,
    bench_now: std::time::Instant,
    header: VnetHeader,
    bytes: &[u8],
    others: &mut dyn Outlets,
) {
    let memory = Memory::holding(bytes);
    let pieces = [memory.ram().get(0, bytes.len()).expect("inside")];
    let frame = TxFrame {
        header,
        payload: Pieces::new(&pieces),
    };
    assert_eq!(port.transmit_to(bench_now, 0, &[frame], others), 1);
}

/// Devices that panic while they are lent.
struct Panics;

impl Outlets for Panics {
    fn fill(&mut self, _: u64, _: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        panic!("on purpose");
    }
}

#[test]
fn a_panic_in_the_middle_leaves_a_switch_that_is_whole() {
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut ports = Vec::new();
    let mut keys = Vec::new();
    for n in 0..4 {
        let mut port = bench.switch.add_port(plain(n)).unwrap();
        keys.push(bench.bring_up(&mut port, &everything()));
        ports.push(port);
    }
    bench.pump();
    let flood: Vec<Vec<u8>> = (0..9)
        .map(|n| frame(EVERYBODY, mac(0), &[], n, 60))
        .collect();
    let now = bench.now;
    let panicked = catch_unwind(AssertUnwindSafe(|| {
        send_one(
            &mut ports[0],
            now,
            VnetHeader::default(),
            &flood[0],
            &mut Panics,
        );
    }));
    assert!(panicked.is_err());
    // Everybody reaches everybody, the one whose turn it was as well.
    for (from, port) in ports.iter_mut().enumerate() {
        let sent: Vec<Vec<u8>> = (0..9)
            .map(|n| frame(EVERYBODY, mac(from), &[], n, 60))
            .collect();
        assert_eq!(bench.send(port, &sent), 9);
        for to in (0..4).filter(|to| *to != from) {
            assert_eq!(bench.got(keys[to]), sent, "{from} to {to}");
        }
    }
}

/// Receivers that count what is asked of them, and have so many buffers each time.
struct Counting<'m> {
    memory: &'m Memory,
    offers: Cell<usize>,
    fills: usize,
    turn: usize,
}

struct CountingSink<'a> {
    room: [RamSlice<'a>; 1],
    offers: &'a Cell<usize>,
    left: usize,
}

impl RxSink for CountingSink<'_> {
    fn offer(&mut self, _: Target<'_>, len: usize) -> Option<Pieces<'_>> {
        self.offers.set(self.offers.get() + 1);
        (self.left > 0).then(|| Pieces::new(&self.room).take(len))
    }
    fn commit(&mut self, _: &VnetHeader, _: usize) {
        self.left -= 1;
    }
}

impl Outlets for Counting<'_> {
    fn fill(&mut self, _: u64, fill: &mut dyn FnMut(&mut dyn RxSink)) -> Result<(), Closed> {
        self.fills += 1;
        fill(&mut CountingSink {
            room: [self.memory.ram()],
            offers: &self.offers,
            left: self.turn,
        });
        Ok(())
    }
}

#[test]
fn one_frame_costs_no_more_than_the_buffers_of_a_turn_for_each_receiver() {
    const RECEIVERS: usize = 255;
    const TURN: usize = 96;
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut sender = bench.switch.add_port(plain(0)).unwrap();
    bench.bring_up(&mut sender, &everything());
    let mut others = Vec::new();
    for n in 1..=RECEIVERS {
        let mut port = bench.switch.add_port(plain(n)).unwrap();
        let mut guest = everything();
        guest.offloads = Offloads::NONE;
        bench.bring_up(&mut port, &guest);
        others.push(port);
    }
    bench.pump();
    // The most that can be asked for: 64 KiB for everybody, to be cut into pieces of 8 bytes.
    let mut bytes = frame(EVERYBODY, mac(0), &[], 0, 14 + 65_535);
    bytes[12..14].copy_from_slice(&[8, 0]);
    bytes[14..34].copy_from_slice(&[
        0x45, 0, 0xff, 0xff, 0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2,
    ]);
    bytes[34 + 12] = 0x50;
    let header = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        gso_type: VnetHeader::GSO_TCPV4,
        hdr_len: 54,
        gso_size: 8,
        csum_start: 34,
        csum_offset: 16,
    };
    let memory = Memory::new(70_000);
    let mut world = Counting {
        memory: &memory,
        offers: Cell::new(0),
        fills: 0,
        turn: TURN,
    };
    send_one(&mut sender, bench.now, header, &bytes, &mut world);
    assert!(world.fills <= 2 * RECEIVERS, "{}", world.fills);
    let offers = world.offers.get();
    assert!(offers > RECEIVERS * TURN / 2, "it was to be cut: {offers}");
    assert!(offers <= RECEIVERS * (TURN + 1), "{offers}");
}

#[test]
fn addresses_in_all_vlans_do_not_push_out_anybody() {
    let mut config = open();
    config.table = 1024;
    let mut bench = Bench::new(Switch::new(config).unwrap(), 1);
    let vlans = [
        Vlans::Trunk {
            allowed: "all".parse().unwrap(),
            native: None,
        },
        Vlans::Access(7),
        Vlans::Access(7),
    ];
    let mut ports = Vec::new();
    let mut keys = Vec::new();
    for (n, vlan) in vlans.into_iter().enumerate() {
        let mut config = plain(n);
        config.vlan = vlan;
        config.macs = 256;
        let mut port = bench.switch.add_port(config).unwrap();
        keys.push(bench.bring_up(&mut port, &everything()));
        ports.push(port);
    }
    bench.pump();
    bench.send(&mut ports[1], &[frame(EVERYBODY, mac(1), &[], 0, 60)]);
    bench.send(&mut ports[2], &[frame(EVERYBODY, mac(2), &[], 0, 60)]);
    for vlan in 1..=4094 {
        let frames: Vec<Vec<u8>> = (0..4)
            .map(|n| {
                let from = mac(1000 + usize::from(vlan) * 4 + n);
                frame(mac(9), from, &[(0x8100, vlan)], 0, 60)
            })
            .collect();
        bench.send(&mut ports[0], &frames);
    }
    for key in &keys {
        bench.got(*key);
    }
    // Both are known still: nobody else gets what they say to each other.
    bench.send(&mut ports[1], &[frame(mac(2), mac(1), &[], 5, 60)]);
    assert_eq!(bench.got(keys[2]).len(), 1);
    assert_eq!(bench.got(keys[0]).len(), 0);
    let report = bench.control.report();
    let trunk = &report.ports[0];
    assert_eq!(trunk.macs, 256);
    assert!(trunk.not_learned > 16_000, "{}", trunk.not_learned);
    assert!(report.macs <= 258);
}

#[test]
fn tags_within_tags_lead_into_no_other_vlan() {
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut ports = Vec::new();
    let mut keys = Vec::new();
    let trunk = |native| Vlans::Trunk {
        allowed: "1-4094".parse().unwrap(),
        native,
    };
    let all = [
        Vlans::Access(10),
        Vlans::Access(20),
        trunk(Some(10)),
        trunk(None),
        Vlans::Plain,
    ];
    for (n, vlan) in all.into_iter().enumerate() {
        let mut config = plain(n);
        config.vlan = vlan;
        let mut port = bench.switch.add_port(config).unwrap();
        keys.push(bench.bring_up(&mut port, &everything()));
        ports.push(port);
    }
    bench.pump();
    for outer in [0u16, 10, 20, 0x2000, 0xe014, 4095] {
        for (kind, inner) in [(0x8100, 20u16), (0x88a8, 20), (0x9100, 20), (0x9200, 20)] {
            let tags = [(0x8100, outer), (kind, inner)];
            for tags in [&tags[..], &tags[1..]] {
                bench.send(&mut ports[0], &[frame(EVERYBODY, mac(0), tags, 1, 80)]);
            }
        }
    }
    assert_eq!(bench.got(keys[1]).len(), 0, "from VLAN 10 into VLAN 20");
    assert_eq!(bench.got(keys[4]).len(), 0, "out of all VLANs");
    for frame in bench.got(keys[2]) {
        // Without a tag it is in VLAN 10, and then the first tag must not be another one.
        assert_ne!(
            frame[12..14],
            [0x81, 0],
            "into another VLAN by the native one"
        );
    }
    for frame in bench.got(keys[3]) {
        assert_eq!(frame[12..14], [0x81, 0]);
        assert_eq!([frame[14] & 0x0f, frame[15]], [0, 10], "in its own VLAN");
    }
    let report = bench.control.report();
    assert!(report.ports[0].dropped_in.get(Reason::Vlan) > 0);
}

#[test]
fn who_is_pinned_does_not_come_in_by_the_uplink() {
    let mut bench = Bench::new(Switch::new(open()).unwrap(), 1);
    let mut keys = Vec::new();
    let mut ports = Vec::new();
    for n in 0..3 {
        let mut config = plain(n);
        if n == 0 {
            config.pin = vec![vmsg_net::Mac(mac(0))];
        }
        let mut port = bench.switch.add_port(config).unwrap();
        keys.push(bench.bring_up(&mut port, &everything()));
        ports.push(port);
    }
    bench.pump();
    // Port 2 plays a bridge that sends everything back.
    bench.send(&mut ports[0], &[frame(EVERYBODY, mac(0), &[], 1, 60)]);
    for frame in bench.got(keys[2]) {
        bench.send(&mut ports[2], &[frame]);
    }
    bench.got(keys[1]);
    bench.send(&mut ports[1], &[frame(mac(0), mac(1), &[], 2, 60)]);
    assert_eq!(bench.got(keys[0]).len(), 1, "it is where it was");
    let report = bench.control.report();
    assert_eq!(report.ports[2].dropped_in.get(Reason::Pin), 1);
    bench.pass(Duration::from_secs(1));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, ..ProptestConfig::default() })]

    #[test]
    fn nothing_gets_where_it_must_not_whatever_is_sent(
        bytes in proptest::collection::vec(any::<u8>(), 0..1500),
    ) {
        story::one(&bytes);
    }
}
