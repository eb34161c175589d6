// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers that begin again, or die, while others talk.

use vmsg_net::switch::{PortConfig, Reason, Rule, SwitchConfig};

use crate::frames::{self, BROADCAST};
use crate::random::Random;
use crate::stand::{Stand, Station};

#[test]
fn drivers_that_reset_or_die_in_mid_traffic_disturb_nobody() {
    let mut config = SwitchConfig::new("s0");
    config.rules = vec![Rule::allow_all()];
    let stand = Stand::new(config);
    let mut plug = |id: u16| stand.plug(PortConfig::new(format!("p{id}")), id);
    let (mut one, mut two) = (plug(0), plug(1));
    let mut weak: Vec<Station> = (2..8).map(&mut plug).collect();
    let mut random = Random::new(7);
    for round in 0..120 {
        // Frames for those that may not be there, from those that are, and from those that will not be.
        let count = weak.len();
        let victim = random.below(count);
        let to: Vec<[u8; 6]> = (0..12)
            .map(|_| match random.below(4) {
                0 => BROADCAST,
                _ => frames::mac(2 + u16::try_from(random.below(count)).expect("few")),
            })
            .collect();
        let burst: Vec<Vec<u8>> = to.iter().map(|to| one.frame(*to)).collect();
        let station = &mut weak[victim];
        if station.net.is_some() {
            let frames: Vec<Vec<u8>> = (0..16).map(|_| station.frame(BROADCAST)).collect();
            station.send(&frames);
        }
        one.send(&burst);
        match random.below(3) {
            // With all that was sent still in its queues.
            0 if station.net.is_some() => station.die(),
            // A reset, and a new driver.
            1 => station.start(&stand),
            _ if station.net.is_none() => station.start(&stand),
            _ => {}
        }
        two.drain();
        one.exchange(&mut two, 16);
        one.drain();
        two.exchange(&mut one, 16);
        if round % 10 == 9 {
            for station in weak.iter_mut().filter(|station| station.net.is_some()) {
                station.drain();
            }
        }
    }
    for station in &mut weak {
        if station.net.is_none() {
            station.start(&stand);
        }
        station.drain();
        one.exchange(station, 16);
        one.drain();
        station.exchange(&mut one, 16);
    }
    for port in stand.ports().values() {
        let of = |reason| port.dropped_out.get(reason);
        // Nobody was broken, whatever was in the air.
        assert_eq!(of(Reason::Broken), 0, "{}", port.name);
        let known = of(Reason::NoBuffers) + of(Reason::NoDriver);
        assert_eq!(port.dropped_out.total(), known, "{:?}", port.dropped_out);
    }
}
