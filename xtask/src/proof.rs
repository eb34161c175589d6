// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest's script shows of its network, whoever runs the guest.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::demo::tell;
use crate::guest;
use crate::http::{FILE_SIZE, Server};
use crate::scene::{Line, Scene};

/// Where a guest's console is read.
pub(crate) trait Console {
    /// The first line from the last one found on that `pick` takes.
    ///
    /// # Errors
    /// Not `within` that time, or something that is needed has ended.
    fn expect<T>(
        &mut self,
        scene: &mut Scene,
        what: &str,
        within: Duration,
        pick: impl FnMut(&Line) -> Option<T>,
    ) -> Result<T>;

    /// What the mark `name` of the script says, and when.
    ///
    /// # Errors
    /// As [`Self::expect`].
    fn mark(
        &mut self,
        scene: &mut Scene,
        name: &str,
        within: Duration,
    ) -> Result<(String, Duration)> {
        self.expect(
            scene,
            &format!("the mark '{name}' of the guest"),
            within,
            |line| {
                let (mark, detail) = guest::mark(&line.text)?;
                (mark == name).then(|| (detail.to_owned(), line.at))
            },
        )
    }
}

/// eth1 is on the transport that it should be on.
pub(crate) fn nic(
    scene: &mut Scene,
    console: &mut impl Console,
    transport: &str,
    within: Duration,
) -> Result<()> {
    let (nic, _) = console.mark(scene, "nic", within)?;
    ensure!(
        nic.contains("virtio_mmio") == (transport == "virtio-mmio"),
        "eth1 is not a {transport} device: it is {nic}"
    );
    tell(scene, &format!("eth1 is {nic} ({transport})"));
    Ok(())
}

/// The address that DHCP has given.
pub(crate) fn lease(
    scene: &mut Scene,
    console: &mut impl Console,
    within: Duration,
) -> Result<String> {
    let (lease, _) = console.mark(scene, "lease", within)?;
    tell(scene, &format!("DHCP: {lease}"));
    let address = lease.split_whitespace().nth(2);
    Ok(address.unwrap_or_default().to_owned())
}

/// When the first ping was answered.
pub(crate) fn first_ping(
    scene: &mut Scene,
    console: &mut impl Console,
    from: &str,
    within: Duration,
) -> Result<Duration> {
    let answer = format!("bytes from {from}");
    let at = console.expect(scene, "the first answer to a ping", within, |line| {
        line.text.contains(&answer).then_some(line.at)
    })?;
    tell(scene, "first ping answered");
    Ok(at)
}

/// Ping's last two lines: packets sent and received, none lost, and round-trip times.
pub(crate) fn ping_statistics(
    scene: &mut Scene,
    console: &mut impl Console,
    within: Duration,
) -> Result<[String; 2]> {
    let mut line = |what: &str, text: &str| {
        console.expect(scene, what, within, |line| {
            line.text.contains(text).then(|| line.text.clone())
        })
    };
    let counts = line("ping's statistics", "packets transmitted")?;
    ensure!(
        counts.contains(" 0% packet loss"),
        "pings were lost: {counts}"
    );
    let times = line("ping's times", "round-trip")?;
    tell(scene, &counts);
    Ok([counts, times])
}

/// The guest has fetched the server's file, and its checksum is right; `how` it was fetched is for the log. Gives its size in MiB.
pub(crate) fn download(
    scene: &mut Scene,
    console: &mut impl Console,
    server: &Server,
    how: &str,
    [step, download]: [Duration; 2],
) -> Result<usize> {
    let (_, begun) = console.mark(scene, "fetching", step)?;
    let (code, ended) = console.mark(scene, "fetched", download)?;
    ensure!(
        code == "0",
        "the guest's download failed (wget gave {code})"
    );
    let took = (ended - begun).as_secs_f64();
    let mebibytes = FILE_SIZE >> 20;
    tell(
        scene,
        &format!("{mebibytes} MiB fetched {how} in {took:.1} s"),
    );
    let (sum, _) = console.mark(scene, "sum", step)?;
    let sum = sum.split_whitespace().next().unwrap_or_default();
    ensure!(
        sum == server.sha256(),
        "wrong checksum: the guest got {sum}, the file has {}",
        server.sha256()
    );
    tell(scene, &format!("SHA-256 is right: {sum}"));
    Ok(mebibytes)
}

/// The entropy device gives bytes.
pub(crate) fn random(
    scene: &mut Scene,
    console: &mut impl Console,
    within: Duration,
) -> Result<()> {
    let (random, _) = console.mark(scene, "random", within)?;
    ensure!(
        random.starts_with("1024 virtio_rng"),
        "the entropy device does not give random bytes: {random}"
    );
    tell(scene, &format!("entropy device gives bytes: {random}"));
    Ok(())
}
