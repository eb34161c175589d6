// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back ends that are plugged into a switch.

mod switching;

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, eventfd};
use switching::{Bench, EVERYBODY, everything, frame, gso, mac, number, segment, wait};
use vmsg_net::switch::{
    Port, PortChange, PortConfig, PortReport, Reason, Rule, Switch, SwitchConfig, Unknown, Vlans,
};
use vmsg_net::{Backend, Guest, Offloads, RxSink, Target, TxFrame, VnetHeader};

/// What is at the other end of the uplink's cable.
struct Far {
    /// Frames for the switch.
    ready: VecDeque<(VnetHeader, Vec<u8>)>,
    got: Vec<(VnetHeader, Vec<u8>)>,
    /// Frames that it takes.
    room: usize,
    /// It answers each frame at once with this one.
    answer: Option<Vec<u8>>,
    carrier: bool,
    due: Option<Instant>,
    guest: Guest,
    shut: bool,
}

#[derive(Clone)]
struct Cable {
    far: Arc<Mutex<Far>>,
    event: Arc<OwnedFd>,
    offloads: Offloads,
}

impl Cable {
    fn new(offloads: Offloads) -> Self {
        let far = Far {
            ready: VecDeque::new(),
            got: Vec::new(),
            room: usize::MAX,
            answer: None,
            carrier: true,
            due: None,
            guest: Guest::NONE,
            shut: false,
        };
        let event = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        Self {
            far: Arc::new(Mutex::new(far)),
            event: Arc::new(event),
            offloads,
        }
    }

    fn far(&self) -> std::sync::MutexGuard<'_, Far> {
        self.far.lock().unwrap()
    }

    fn say(&self, frames: impl IntoIterator<Item = Vec<u8>>) {
        let frames = frames
            .into_iter()
            .map(|frame| (VnetHeader::default(), frame));
        self.far().ready.extend(frames);
        self.ring();
    }

    fn ring(&self) {
        rustix::io::write(&self.event, &1u64.to_ne_bytes()).unwrap();
    }

    fn numbers(&self) -> Vec<u32> {
        let got = std::mem::take(&mut self.far().got);
        got.iter().map(|(_, frame)| number(frame)).collect()
    }
}

impl Backend for Cable {
    fn offloads(&self) -> Offloads {
        self.offloads
    }

    fn set_guest(&mut self, guest: &Guest) {
        self.far().guest = *guest;
    }

    fn event_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.event.as_fd())
    }

    fn next_timeout(&self) -> Option<Instant> {
        self.far().due
    }

    fn poll(&mut self, now: Instant) {
        let _ = rustix::io::read(&self.event, &mut [0; 8]);
        let mut far = self.far();
        far.due = far.due.filter(|due| *due > now);
    }

    fn link_is_up(&self) -> bool {
        self.far().carrier
    }

    fn transmit(&mut self, _: Instant, _: u16, frames: &[TxFrame<'_>]) -> usize {
        let mut far = self.far();
        let taken = frames.len().min(far.room);
        far.room -= taken;
        for frame in &frames[..taken] {
            let mut bytes = vec![0; frame.payload.len()];
            frame.payload.read(&mut bytes);
            far.got.push((frame.header, bytes));
            if let Some(answer) = far.answer.clone() {
                far.ready.push_back((VnetHeader::default(), answer));
            }
        }
        taken
    }

    fn receive(&mut self, _: Instant, sink: &mut dyn RxSink) -> usize {
        let mut far = self.far();
        let mut count = 0;
        while let Some((header, frame)) = far.ready.front() {
            let head = &frame[..frame.len().min(Target::HEAD)];
            let Some(room) = sink.offer_between(Target::Head(head), frame.len(), 65553) else {
                break;
            };
            room.write(frame);
            sink.commit(header, frame.len());
            far.ready.pop_front();
            count += 1;
        }
        count
    }

    fn has_frames(&self) -> bool {
        !self.far().ready.is_empty()
    }

    fn shutdown(&mut self) {
        self.far().shut = true;
    }
}

/// Two devices and an uplink.
struct Net {
    bench: Bench,
    ports: Vec<Port>,
    keys: Vec<u64>,
    up: Cable,
}

impl Net {
    fn new(config: PortConfig, offloads: Offloads) -> Self {
        let switch = Switch::new(SwitchConfig {
            rules: vec![Rule::allow_all()],
            ..SwitchConfig::new("s0")
        });
        let mut bench = Bench::new(switch.unwrap(), 3);
        let up = Cable::new(offloads);
        let backend = Box::new(up.clone());
        bench.switch.add_uplink(config, backend).unwrap();
        let mut ports = Vec::new();
        let mut keys = Vec::new();
        for port in 0..2 {
            let config = PortConfig::new(format!("p{port}"));
            let mut port = bench.switch.add_port(config).unwrap();
            keys.push(bench.bring_up(&mut port, &everything()));
            ports.push(port);
        }
        bench.pump();
        Self {
            bench,
            ports,
            keys,
            up,
        }
    }

    fn plain() -> Self {
        Self::new(PortConfig::new("up"), Offloads::ALL)
    }

    fn send(&mut self, port: usize, frames: &[Vec<u8>]) {
        let taken = self.bench.send(&mut self.ports[port], frames);
        assert_eq!(taken, frames.len());
    }

    fn numbers(&mut self, port: usize) -> Vec<u32> {
        let got = self.bench.got(self.keys[port]);
        got.iter().map(|frame| number(frame)).collect()
    }

    /// True if the pump has something to do.
    fn is_awake(&self) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let fd = self.bench.pump.event_fd();
        let none = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&none)).unwrap() > 0
    }

    fn report(&self) -> PortReport {
        let report = self.bench.control.report();
        let up = report.ports.into_iter().find(|port| port.name == "up");
        up.unwrap()
    }
}

fn to(to: usize, from: usize, number: u32) -> Vec<u8> {
    frame(mac(to), mac(from), &[], number, 64)
}

#[test]
fn frames_go_out_and_come_in() {
    let mut net = Net::plain();
    assert!(net.up.far().guest.running && net.up.far().guest.offloads.guest_tso4);
    net.send(0, &[to(9, 0, 1)]);
    assert_eq!(net.up.numbers(), [1]);
    net.bench.pump();
    assert!(!net.is_awake());
    net.up
        .say([to(0, 9, 2), frame(EVERYBODY, mac(9), &[], 3, 64)]);
    assert!(net.is_awake());
    net.bench.pump();
    assert_eq!((net.numbers(0), net.numbers(1)), (vec![2, 3], vec![1, 3]));
    assert_eq!(net.up.numbers(), [] as [u32; 0], "nothing comes back");
    net.send(1, &[to(9, 1, 4)]);
    assert_eq!((net.up.numbers(), net.numbers(0)), (vec![4], vec![]));
    let report = net.report();
    assert!(report.uplink && report.running);
    assert_eq!(report.input.total().frames, 2);
    assert_eq!(report.output.total().frames, 2);
}

#[test]
fn what_is_answered_at_once_wakes_the_pump() {
    let mut net = Net::plain();
    net.up.far().answer = Some(to(0, 9, 7));
    net.send(0, &[to(9, 0, 1)]);
    assert!(net.is_awake());
    net.bench.pump();
    assert_eq!(net.numbers(0), [7]);
    net.up.far().answer = None;
    // And so does a timer that a frame has started.
    let due = net.bench.now + Duration::from_secs(1);
    net.up.far().due = Some(due);
    net.send(0, &[to(9, 0, 2)]);
    assert!(net.is_awake());
    net.bench.pump();
    assert_eq!(net.bench.pump.next_timeout(), Some(due));
}

#[test]
fn an_uplink_that_takes_no_more_loses_frames_and_keeps_nothing() {
    let mut net = Net::plain();
    net.up.far().room = 10;
    let frames: Vec<Vec<u8>> = (0..30)
        .map(|n| frame(EVERYBODY, mac(0), &[], n, 64))
        .collect();
    net.send(0, &frames);
    assert_eq!(net.up.numbers(), (0..10).collect::<Vec<u32>>());
    assert_eq!(net.numbers(1).len(), 30);
    assert_eq!(net.report().dropped_out.get(Reason::UplinkFull), 20);
}

#[test]
fn a_flood_from_outside_leaves_others_their_turn() {
    let mut net = Net::plain();
    let frames: Vec<Vec<u8>> = (0..5000).map(|n| to(0, 9, n)).collect();
    net.send(0, &[to(9, 0, 0)]);
    net.up.say(frames);
    net.bench.pump();
    let first = net.numbers(0);
    assert!((1..5000).contains(&first.len()), "{}", first.len());
    assert!(net.is_awake());
    let mut all = first;
    while net.is_awake() {
        net.bench.pump();
        all.extend(net.numbers(0));
    }
    assert_eq!(all, (0..5000).collect::<Vec<u32>>());
}

#[test]
fn tags_are_changed_on_the_way_out() {
    let config = PortConfig {
        vlan: Vlans::Trunk {
            allowed: "all".parse().unwrap(),
            native: None,
        },
        ..PortConfig::new("up")
    };
    let mut net = Net::new(config, Offloads::ALL);
    for (port, vlan) in [("p0", 10), ("p1", 20)] {
        let vlan = Some(Vlans::Access(vlan));
        let change = PortChange {
            vlan,
            ..PortChange::default()
        };
        net.bench
            .ask(move |control| control.set_port(port, change))
            .unwrap();
    }
    let header = gso(1000);
    let plain = frame(mac(9), mac(0), &[], 1, 4000);
    net.bench
        .send_with(&mut net.ports[0], &[(header, plain.clone())]);
    let got = std::mem::take(&mut net.up.far().got);
    let mut tagged = plain[..12].to_vec();
    tagged.extend([0x81, 0, 0, 10]);
    tagged.extend(&plain[12..]);
    assert_eq!(got[0].1, tagged);
    assert_eq!((got[0].0.csum_start, got[0].0.hdr_len), (38, 58));
    net.up.say([
        frame(mac(0), mac(9), &[(0x8100, 10)], 2, 64),
        frame(EVERYBODY, mac(9), &[(0x8100, 20)], 3, 64),
    ]);
    net.bench.pump();
    assert_eq!((net.numbers(0), net.numbers(1)), (vec![2], vec![3]));
}

#[test]
fn what_an_uplink_cannot_take_whole_is_cut() {
    let mut net = Net::new(PortConfig::new("up"), Offloads::NONE);
    let (header, bytes) = segment(EVERYBODY, 4000, 1000);
    net.bench
        .send_with(&mut net.ports[0], &[(header, bytes.clone())]);
    let got = std::mem::take(&mut net.up.far().got);
    assert_eq!(got.len(), 4);
    assert!(
        got.iter()
            .all(|(header, frame)| *header == VnetHeader::default() && frame.len() == 1054)
    );
    net.up.far().room = 3;
    net.bench.send_with(&mut net.ports[0], &[(header, bytes)]);
    let report = net.report();
    assert_eq!(
        (report.segmented, report.segments, report.segments_lost),
        (2, 7, 1)
    );
    assert_eq!(report.output.broadcast.frames, 2);
}

#[test]
fn without_a_carrier_nothing_goes_out() {
    let mut net = Net::plain();
    net.up.say([frame(EVERYBODY, mac(9), &[], 0, 64)]);
    net.bench.pump();
    assert_eq!(net.report().macs, 1);
    net.up.far().carrier = false;
    net.up.ring();
    net.bench.pump();
    assert_eq!(net.report().macs, 0, "what was behind it is sought anew");
    net.numbers(1);
    net.send(0, &[to(9, 0, 1)]);
    assert_eq!(net.report().dropped_out.get(Reason::LinkDown), 1);
    assert!(!net.report().running);
    net.up.far().carrier = true;
    net.up.ring();
    net.bench.pump();
    net.send(0, &[to(9, 0, 2)]);
    assert_eq!(net.up.numbers(), [2]);
}

#[test]
fn what_an_uplink_sends_too_much_waits_behind_it() {
    let config = PortConfig {
        rate_in: Some("8M".parse().unwrap()),
        ..PortConfig::new("up")
    };
    let mut net = Net::new(config, Offloads::ALL);
    net.send(0, &[to(9, 0, 0)]);
    let start = net.bench.now;
    net.up
        .say((0..3000).map(|n| frame(mac(0), mac(9), &[], n, 1000)));
    net.bench.pump();
    while net.bench.now - start < Duration::from_secs(1) {
        if !net.is_awake() {
            net.bench.now = net.bench.pump.next_timeout().expect("it says when");
        }
        net.bench.pump();
    }
    let got = net.numbers(0);
    assert!((1000..1100).contains(&got.len()), "{}", got.len());
    assert_eq!(got, (0..).take(got.len()).collect::<Vec<u32>>());
}

#[test]
fn strangers_go_out_and_an_uplink_can_be_taken_away() {
    let mut net = Net::plain();
    let up = Unknown::Uplink("up".to_owned());
    net.bench.ask(|control| control.set_unknown(up)).unwrap();
    net.send(0, &[to(9, 0, 1)]);
    assert_eq!((net.up.numbers(), net.numbers(1)), (vec![1], vec![]));
    net.up.say([to(8, 9, 2)]);
    net.bench.pump();
    assert_eq!(net.report().dropped_in.get(Reason::Unknown), 1);
    net.bench.ask(|control| control.remove_port("up")).unwrap();
    assert!(net.up.far().shut);
    net.send(0, &[to(9, 0, 3)]);
    assert_eq!(net.up.numbers(), [] as [u32; 0]);
    net.up.say([to(0, 9, 4)]);
    assert!(!net.is_awake());
}

#[test]
fn the_pump_sleeps_when_there_is_nothing_to_do() {
    let mut net = Net::plain();
    for _ in 0..3 {
        net.bench.pump();
    }
    wait(&net.bench.pump, Duration::from_millis(1));
    assert!(!net.is_awake());
    assert_eq!(net.bench.pump.next_timeout(), None);
}
