// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests on one network: who reaches whom, how long that takes, and whether what is sent arrives as it was.

use std::fmt;
use std::net::Ipv4Addr;

use anyhow::{Context, Result, ensure};

use crate::disk;
use crate::initrd::{self, Content};
use crate::kit::Kit;
use crate::pcap::Mac;
use crate::scene::Scene;
use crate::shell::{self, Shell};

/// What a guest of a description runs.
const SCRIPT: &str = include_str!("guest/described.sh");
/// Bytes of a transfer.
const TRANSFER: usize = 16 << 20;

/// A guest of the network.
#[derive(Debug)]
pub(crate) struct Host {
    /// What it is told.
    pub(crate) shell: Shell,
    /// Its address.
    pub(crate) address: Ipv4Addr,
}

/// Pings that were sent.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Pings {
    sent: u32,
    /// Round trips in ms, the shortest first.
    times: Vec<f64>,
}

/// The file system of guests that are told what to do; without `obeys`, of guests with a shell for somebody who looks.
pub(crate) fn initrd(kit: &Kit, obeys: bool) -> Result<Vec<u8>> {
    make(kit, SCRIPT, obeys)
}

/// The same for guests whose root file system is a disk.
pub(crate) fn disk_initrd(kit: &Kit, obeys: bool) -> Result<Vec<u8>> {
    let kit = kit.with_modules(&["virtio_blk"]);
    make(&kit, &disk::script(SCRIPT), obeys)
}

fn make(kit: &Kit, script: &str, obeys: bool) -> Result<Vec<u8>> {
    let content = Content {
        script,
        settings: &[
            ("OBEYS", if obeys { "1" } else { "" }.to_owned()),
            ("ROOT", disk::ROOT_SERIAL.to_owned()),
        ],
        more: Some(&mut |cpio| {
            cpio.file("obey", 0o644, shell::SCRIPT.as_bytes());
            Ok(())
        }),
    };
    // Devices that are plugged in later are on PCI whatever the machine.
    initrd::make(&kit.with_modules(&["virtio_pci"]), content)
}

impl Pings {
    /// What `ping` of busybox has said.
    fn parse(lines: &[String]) -> Option<Self> {
        let counts = lines.iter().find(|l| l.contains("packets transmitted"))?;
        let sent = counts.split_whitespace().next()?.parse().ok()?;
        let mut times: Vec<f64> = lines
            .iter()
            .filter(|l| !l.contains("DUP"))
            .filter_map(|l| {
                l.split_once(" time=")?
                    .1
                    .split_whitespace()
                    .next()?
                    .parse()
                    .ok()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        Some(Self { sent, times })
    }

    /// All were answered.
    pub(crate) fn all(&self) -> bool {
        self.times.len() == self.sent as usize
    }

    /// None was answered.
    pub(crate) fn none(&self) -> bool {
        self.times.is_empty()
    }

    /// The mean in ms; 0 of none.
    pub(crate) fn mean(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "some hundreds at most")]
        let count = self.times.len().max(1) as f64;
        self.times.iter().sum::<f64>() / count
    }

    /// The median in ms; 0 of none.
    pub(crate) fn median(&self) -> f64 {
        self.times.get(self.times.len() / 2).copied().unwrap_or(0.0)
    }
}

impl fmt::Display for Pings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |time: Option<&f64>| time.copied().unwrap_or(0.0);
        write!(
            f,
            "min {:.3}, median {:.3}, avg {:.3}, max {:.3} ms ({} of {} answered)",
            at(self.times.first()),
            self.median(),
            self.mean(),
            at(self.times.last()),
            self.times.len(),
            self.sent
        )
    }
}

impl Host {
    /// Pings `to`, `count` times, `pause` seconds apart.
    pub(crate) fn ping(
        &mut self,
        scene: &mut Scene,
        to: Ipv4Addr,
        count: u32,
        pause: &str,
    ) -> Result<Pings> {
        let command = format!("ping -c {count} -i {pause} -W 1 {to}; true");
        let lines = self.shell.run(scene, &command)?;
        Pings::parse(&lines)
            .with_context(|| format!("{}: ping {to} says {}", self.shell.name(), lines.join("\n")))
    }

    /// The address of its network card.
    pub(crate) fn mac(&mut self, scene: &mut Scene) -> Result<Mac> {
        let text = self.shell.run(scene, "cat /sys/class/net/eth0/address")?;
        Mac::parse(&text.concat()).with_context(|| format!("no address of a card: {text:?}"))
    }
}

/// All ping all others; `may` says of two numbers whether the first reaches the second.
pub(crate) fn reach(
    scene: &mut Scene,
    hosts: &mut [Host],
    may: impl Fn(usize, usize) -> bool,
) -> Result<()> {
    let addresses: Vec<Ipv4Addr> = hosts.iter().map(|h| h.address).collect();
    for (from, host) in hosts.iter_mut().enumerate() {
        for (to, &address) in addresses.iter().enumerate().filter(|(to, _)| *to != from) {
            let pings = host.ping(scene, address, 3, "0.1")?;
            let name = host.shell.name();
            if may(from, to) {
                ensure!(pings.all(), "{name} does not reach {address}: {pings}");
            } else {
                ensure!(
                    pings.none(),
                    "{name} reaches {address}, which it must not: {pings}"
                );
            }
        }
    }
    Ok(())
}

/// `to` fetches a file of random bytes from `from`, over TCP, and has what `from` has. Gives bytes and seconds.
pub(crate) fn transfer(scene: &mut Scene, from: &mut Host, to: &mut Host) -> Result<(usize, f64)> {
    let blocks = TRANSFER >> 16;
    let sum = from.shell.run(
        scene,
        &format!(
            "mkdir -p /tmp/www && dd if=/dev/urandom of=/tmp/www/file bs=64k count={blocks} 2> /dev/null && \
             sha256sum < /tmp/www/file && {{ pidof httpd > /dev/null || httpd -p 80 -h /tmp/www; }}"
        ),
    )?;
    let command = format!(
        "cut -d ' ' -f 1 /proc/uptime && wget -q -O /tmp/got http://{}/file && cut -d ' ' -f 1 /proc/uptime && \
         sha256sum < /tmp/got && wc -c < /tmp/got && rm /tmp/got",
        from.address
    );
    let said = to.shell.run(scene, &command)?;
    let [begun, ended, got, size] = said.as_slice() else {
        anyhow::bail!("{}: a transfer says {}", to.shell.name(), said.join("\n"));
    };
    ensure!(
        Some(got) == sum.first() && size.trim() == TRANSFER.to_string(),
        "{} has {got} ({size} bytes) and not {}",
        to.shell.name(),
        sum.concat()
    );
    Ok((
        TRANSFER,
        ended.trim().parse::<f64>()? - begun.trim().parse::<f64>()?,
    ))
}

#[cfg(test)]
#[path = "lan_test.rs"]
mod tests;
