// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ports that send more than others want, and ports that take nothing.

use std::time::Instant;

use vmsg_net::switch::{PortConfig, Reason, Rule, SwitchConfig};

use crate::frames::{self, BROADCAST};
use crate::stand::{BUFFERS, PATIENCE, Stand, Station, counter};

fn open() -> SwitchConfig {
    let mut config = SwitchConfig::new("s0");
    config.rules = vec![Rule::allow_all()];
    config
}

#[test]
fn a_storm_is_cut_and_disturbs_nobody() {
    const LIMIT: u32 = 200;
    const FRAMES: u32 = 6000;
    let stand = Stand::new(open());
    let port = PortConfig {
        storm: Some(LIMIT),
        ..PortConfig::new("loud")
    };
    let mut loud = stand.plug(port, 0);
    let mut others: Vec<Station> = (1..16)
        .map(|id| stand.plug(PortConfig::new(format!("p{id}")), id))
        .collect();
    let begun = Instant::now();
    let mut heard = 0;
    for _ in 0..FRAMES / 20 {
        let storm: Vec<Vec<u8>> = (0..20).map(|_| loud.frame(BROADCAST)).collect();
        loud.send(&storm);
        // Meanwhile pairs of the others talk, and lose nothing.
        let [one, two, ..] = &mut *others else {
            unreachable!("there are more")
        };
        heard += two.drain().iter().filter(|seen| seen.from == 0).count();
        one.drain();
        one.exchange(two, 8);
        others.rotate_left(1);
    }
    loud.settle();
    let most = u64::from(LIMIT) * (begun.elapsed().as_secs() + 2);
    let ports = stand.ports();
    let cut = ports["loud"].dropped_in.get(Reason::Storm);
    assert_eq!(ports["loud"].input.broadcast.frames, u64::from(FRAMES));
    let passed = u64::from(FRAMES) - cut;
    assert!((1..=most).contains(&passed), "{passed} of at most {most}");
    assert!(heard > 0);
    assert_eq!(ports["loud"].copies, passed * 15);
}

#[test]
fn a_driver_that_never_refills_loses_its_own_frames_only() {
    const ROUNDS: u32 = 100;
    let stand = Stand::new(open());
    let mut sender = stand.plug(PortConfig::new("sender"), 0);
    let mut deaf = stand.plug(PortConfig::new("deaf"), 1);
    let mut others: Vec<Station> = (2..10)
        .map(|id| stand.plug(PortConfig::new(format!("p{id}")), id))
        .collect();
    let begun = Instant::now();
    for round in 0..ROUNDS {
        let mut frames: Vec<Vec<u8>> = (0..8).map(|_| sender.frame(BROADCAST)).collect();
        frames.push(sender.frame(frames::mac(deaf.id)));
        let first = sender.sequence - 8;
        sender.send(&frames);
        sender.settle();
        for other in &mut others {
            let seen: Vec<u32> = other.drain().iter().map(|seen| seen.sequence).collect();
            let wanted: Vec<u32> = (first..first + 8).collect();
            assert_eq!(seen, wanted, "{round}");
        }
    }
    // Nothing waits for it, not even for a moment each time.
    assert!(begun.elapsed() < PATIENCE, "{:?}", begun.elapsed());
    let got = u64::from(BUFFERS);
    let all = u64::from(ROUNDS) * 9;
    let ports = stand.ports();
    assert_eq!(ports["deaf"].dropped_out.get(Reason::NoBuffers), all - got);
    assert_eq!(ports["deaf"].output.total().frames, got);
    let devices = stand.devices();
    assert_eq!(counter(&devices["deaf"].pairs[0], "rx_frames"), got);
    // It can still come back.
    assert_eq!(deaf.drain().len() as u64, got);
    sender.exchange(&mut deaf, 16);
}
