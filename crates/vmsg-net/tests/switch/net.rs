// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A switch with some ports, and frames for it.

use vmsg_net::switch::{
    Port, PortChange, PortConfig, PortReport, Reason, Rule, Switch, SwitchConfig, SwitchError,
    Vlans,
};

use crate::switching::{Bench, EVERYBODY, everything, frame, mac, number};

/// Some ports, each with a device, and the keys of these.
pub(crate) struct Net {
    pub(crate) bench: Bench,
    pub(crate) ports: Vec<Port>,
    pub(crate) keys: Vec<u64>,
}

impl Net {
    pub(crate) fn new(config: SwitchConfig, ports: Vec<PortConfig>) -> Self {
        let mut bench = Bench::new(Switch::new(config).unwrap(), 7);
        let mut keys = Vec::new();
        let mut all = Vec::new();
        for config in ports {
            let mut port = bench.switch.add_port(config).unwrap();
            keys.push(bench.bring_up(&mut port, &everything()));
            all.push(port);
        }
        bench.pump();
        Self {
            bench,
            ports: all,
            keys,
        }
    }

    /// Plain ports that may all send to each other.
    pub(crate) fn open(ports: usize) -> Self {
        Self::new(open(), (0..ports).map(plain).collect())
    }

    pub(crate) fn send(&mut self, port: usize, frames: &[Vec<u8>]) {
        let taken = self.bench.send(&mut self.ports[port], frames);
        assert_eq!(taken, frames.len());
    }

    pub(crate) fn got(&mut self, port: usize) -> Vec<Vec<u8>> {
        self.bench.got(self.keys[port])
    }

    /// The numbers of the frames that each port has got.
    pub(crate) fn numbers(&mut self) -> Vec<Vec<u32>> {
        (0..self.ports.len())
            .map(|port| self.got(port).iter().map(|frame| number(frame)).collect())
            .collect()
    }

    pub(crate) fn report(&self, port: usize) -> PortReport {
        let name = self.ports[port].name();
        let report = self.bench.control.report();
        report
            .ports
            .into_iter()
            .find(|port| port.name == name)
            .unwrap()
    }

    pub(crate) fn dropped_in(&self, port: usize, reason: Reason) -> u64 {
        self.report(port).dropped_in.get(reason)
    }

    pub(crate) fn dropped_out(&self, port: usize, reason: Reason) -> u64 {
        self.report(port).dropped_out.get(reason)
    }

    pub(crate) fn set(&mut self, port: usize, change: PortChange) -> Result<(), SwitchError> {
        let name = self.ports[port].name().to_owned();
        self.bench
            .ask(move |control| control.set_port(&name, change))
    }
}

pub(crate) fn open() -> SwitchConfig {
    SwitchConfig {
        rules: vec![Rule::allow_all()],
        ..SwitchConfig::new("s0")
    }
}

pub(crate) fn plain(port: usize) -> PortConfig {
    PortConfig::new(format!("p{port}"))
}

pub(crate) fn access(port: usize, vlan: u16) -> PortConfig {
    PortConfig {
        vlan: Vlans::Access(vlan),
        ..plain(port)
    }
}

pub(crate) fn trunk(port: usize, allowed: &str, native: Option<u16>) -> PortConfig {
    PortConfig {
        vlan: Vlans::Trunk {
            allowed: allowed.parse().unwrap(),
            native,
        },
        ..plain(port)
    }
}

pub(crate) fn to(to: usize, from: usize, number: u32) -> Vec<u8> {
    frame(mac(to), mac(from), &[], number, 64)
}

pub(crate) fn all(from: usize, number: u32) -> Vec<u8> {
    frame(EVERYBODY, mac(from), &[], number, 64)
}

pub(crate) const DOT1Q: u16 = 0x8100;
