// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The server of ivshmem with stock QEMU of two releases as clients, and our own client beside them.
//!
//! The machines have no guest: their `ivshmem-doorbell` is used from outside (`qtest`). An interrupt is a write to
//! memory: the message of MSI-X is made to lie in the machine's own RAM, where it is found.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ivshmem::client::Limits;
use ivshmem::{Client, PeerId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;

use super::{STEP, Stage};
use crate::kit::Qemu;
use crate::machine::Machine;
use crate::qtest::{Function, Qtest};
use crate::report::Report;
use crate::scene::{Id, Scene, Stream};

/// Where the function is, and where its BARs are put.
const SLOT: Function = Function(0x10);
const REGISTERS: u64 = 0x3000_0000;
const MSIX: u64 = 0x3000_1000;
const MEMORY: u64 = 0x3800_0000;
/// Registers (QEMU's docs/specs/ivshmem-spec.rst, "PCI device registers").
const POSITION: u64 = REGISTERS + 8;
const DOORBELL: u64 = REGISTERS + 12;
/// Where in the machine's memory the message of a vector is written, and what.
const MESSAGES: u64 = 0x10_0000;
const MESSAGE: u32 = 0x5a00;
/// Size of the shared memory and vectors of each client.
const SIZE: u64 = 1 << 20;
const VECTORS: u16 = 2;
/// The id that has a socket of its own.
const SEAT: PeerId = PeerId(9);

const SOCKET: &str = "iv.sock";
const SEAT_SOCKET: &str = "seat.sock";
const FILE: &str = "memory";

/// Two QEMUs and two clients of ours: memory, doorbells in all directions, clients that come and go, a server that is
/// killed and started anew.
pub(super) fn stock_qemu(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let server = serve(stage, "server")?;
    let new_qemu = stage.kit.with_new_qemu()?.qemu;
    let kind = stage.kit.machine;
    let old_qemu = stage.kit.qemu.clone();
    let mut old = machine(&mut stage.scene, "old", (kind, &old_qemu), SOCKET)?;
    let mut new = machine(&mut stage.scene, "new", (kind, &new_qemu), SOCKET)?;
    let mut own = client(&stage.scene, SOCKET)?;
    check(report, "ids are counted up", || {
        ensure!(old.read(POSITION)? == 0 && new.read(POSITION)? == 1);
        ensure!(own.id() == PeerId(2) && own.vectors() == VECTORS);
        ensure!(own.memory_size() == SIZE);
        let there: Vec<_> = own.peers().collect();
        let all = [PeerId(0), PeerId(1), SEAT].map(|id| (id, VECTORS));
        ensure!(there == all, "{there:?}");
        Ok(())
    });
    check(report, "memory is shared", || {
        let end = MEMORY + SIZE - 4;
        old.write(MEMORY, 0x1234_5678)?;
        old.write(end, 0x8765_4321)?;
        ensure!(new.read(MEMORY)? == 0x1234_5678 && new.read(end)? == 0x8765_4321);
        let mut bytes = [0; 4];
        rustix::io::pread(own.memory_fd(), &mut bytes, 0)?;
        ensure!(u32::from_le_bytes(bytes) == 0x1234_5678);
        rustix::io::pwrite(own.memory_fd(), &7u32.to_le_bytes(), 4096)?;
        ensure!(new.read(MEMORY + 4096)? == 7);
        Ok(())
    });
    check(report, "everybody rings everybody", || {
        everybody(&mut old, &mut new, &mut own)
    });
    check(report, "a seat is kept", || {
        for _ in 0..3 {
            // Rung while nobody is there.
            ring(&mut old, SEAT.0, 1)?;
            ring(&mut new, SEAT.0, 0)?;
            let mut seat = client(&stage.scene, SEAT_SOCKET)?;
            ensure!(seat.id() == SEAT);
            ensure!(rings(&seat, 0)? == 1 && rings(&seat, 1)? == 1);
            seat.ring(PeerId(0), 0)?;
            rung(&mut old, 0)?;
            seat.ring(PeerId(1), 1)?;
            rung(&mut new, 1)?;
            while seat.poll().is_some() {}
        }
        Ok(())
    });
    check(report, "clients come and go", || {
        for _ in 0..20 {
            drop(client(&stage.scene, SOCKET)?);
        }
        // The id of the seat is not given to others.
        own = client(&stage.scene, SOCKET)?;
        ensure!(own.id() == PeerId(24));
        everybody(&mut old, &mut new, &mut own)
    });
    stage.scene.may_end(server);
    stage.scene.kill(server, Signal::KILL)?;
    check(report, "doorbells go on when the server is killed", || {
        everybody(&mut old, &mut new, &mut own)
    });
    let server = serve(stage, "server-2")?;
    check(
        report,
        "a new server gives other ids for the same memory",
        || {
            let next = client(&stage.scene, SOCKET)?;
            ensure!(next.id() == PeerId(25), "{}", next.id());
            let mut bytes = [0; 4];
            rustix::io::pread(next.memory_fd(), &mut bytes, 0)?;
            ensure!(u32::from_le_bytes(bytes) == 0x1234_5678);
            everybody(&mut old, &mut new, &mut own)
        },
    );
    check(report, "a QEMU can have a seat", || {
        let mut seat = machine(&mut stage.scene, "seat", (kind, &new_qemu), SEAT_SOCKET)?;
        ensure!(seat.read(POSITION)? == u32::from(SEAT.0));
        let other = client(&stage.scene, SOCKET)?;
        other.ring(SEAT, 1)?;
        rung(&mut seat, 1)?;
        ring(&mut seat, other.id().0, 0)?;
        wait(&other, 0)
    });
    check(report, "no QEMU had anything to complain about", || {
        for (name, id) in [("old", old.id()), ("new", new.id())] {
            let lines = stage.scene.lines(id, Stream::Err);
            ensure!(lines.is_empty(), "{name}: {}", lines[0].text);
        }
        Ok(())
    });
    stage.scene.signal(server, Signal::TERM)?;
    // With its last words.
    stage.scene.wait_end(server, STEP)?;
    let stats = stage.scene.lines(server, Stream::Out);
    let last = stats.last().map_or("", |line| &line.text).to_owned();
    report.check(
        "the server says at its end what it did",
        last.starts_with("stats clients="),
        || format!("it says: {last}"),
    );
    let left = stage.scene.dir().join(SOCKET).exists();
    report.check("the socket is removed", !left, || "it is there".to_owned());
    Ok(fs::remove_file(stage.scene.dir().join(FILE))?)
}

fn check(report: &mut Report, name: &str, play: impl FnOnce() -> Result<()>) {
    report.result(name, play());
}

fn serve(stage: &mut Stage, name: &str) -> Result<Id> {
    let seat = format!("{SEAT_SOCKET},id={SEAT}");
    let options = [
        ("server", "--size=1M"),
        ("--vectors", "2"),
        ("--socket", SOCKET),
        ("--socket", &seat),
        ("--file", FILE),
    ];
    stage
        .vmsg()?
        .run(&mut stage.scene, name, "ivshmem", &options, 2)
}

/// A QEMU whose function is ready to be used, with a message for each vector.
fn machine(scene: &mut Scene, name: &str, qemu: (Machine, &Qemu), socket: &str) -> Result<Qtest> {
    let chardev = format!("socket,path={socket},id=iv");
    let device = format!(
        "ivshmem-doorbell,vectors={VECTORS},chardev=iv,addr={:#x}",
        SLOT.0
    );
    let mut qtest = Qtest::start(
        scene,
        name,
        qemu,
        &["-chardev", &chardev, "-device", &device],
    )?;
    ensure!(
        qtest.config(SLOT, 0)? == 0x1110_1af4,
        "there is another device"
    );
    for (bar, address) in [(0x10, REGISTERS), (0x14, MSIX), (0x18, MEMORY), (0x1c, 0)] {
        qtest.set_config(SLOT, bar, u32::try_from(address)?)?;
    }
    // Memory and bus master.
    qtest.set_config(SLOT, 4, 6)?;
    let msix = qtest.capability(SLOT, 0x11)?;
    let control = qtest.config(SLOT, msix)?;
    qtest.set_config(SLOT, msix, control | 1 << 31)?;
    for vector in 0..VECTORS {
        let entry = MSIX + 16 * u64::from(vector);
        qtest.write(entry, u32::try_from(message(&qtest, vector))?)?;
        qtest.write(entry + 4, 0)?;
        qtest.write(entry + 8, MESSAGE + u32::from(vector))?;
        qtest.write(entry + 12, 0)?;
    }
    Ok(qtest)
}

fn message(qtest: &Qtest, vector: u16) -> u64 {
    qtest.ram() + MESSAGES + 16 * u64::from(vector)
}

/// Rings a peer from a machine.
fn ring(qtest: &mut Qtest, peer: u16, vector: u16) -> Result<()> {
    qtest.write(DOORBELL, u32::from(peer) << 16 | u32::from(vector))
}

/// Waits until a vector of a machine was rung.
fn rung(qtest: &mut Qtest, vector: u16) -> Result<()> {
    let (at, value) = (message(qtest, vector), MESSAGE + u32::from(vector));
    qtest.becomes(at, value).context("no interrupt")?;
    qtest.write(at, 0)
}

fn client(scene: &Scene, socket: &str) -> Result<Client> {
    let folder = File::open(scene.dir())?;
    let path = format!("/proc/self/fd/{}/{socket}", folder.as_raw_fd());
    let limits = Limits {
        vectors: Some(VECTORS),
        ..Limits::default()
    };
    Ok(Client::connect_with(path, limits, STEP)?)
}

/// Waits until a vector of a client was rung.
fn wait(client: &Client, vector: u16) -> Result<()> {
    let fd = client.vector_fd(vector).context("no such vector")?;
    let timeout = Timespec::try_from(STEP)?;
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    ensure!(
        poll(&mut fds, Some(&timeout))? > 0,
        "vector {vector} is not rung"
    );
    rings(client, vector).map(drop)
}

/// How often a vector was rung since the last look.
fn rings(client: &Client, vector: u16) -> Result<u64> {
    let fd = client.vector_fd(vector).context("no such vector")?;
    let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    if poll(&mut fds, Some(&Timespec::try_from(Duration::ZERO)?))? == 0 {
        return Ok(0);
    }
    let mut count = [0; 8];
    rustix::io::read(fd, &mut count)?;
    Ok(u64::from_ne_bytes(count))
}

/// Each vector of each of the three from each other one.
fn everybody(old: &mut Qtest, new: &mut Qtest, own: &mut Client) -> Result<()> {
    while own.poll().is_some() {}
    for vector in 0..VECTORS {
        ring(old, 1, vector)?;
        rung(new, vector)?;
        ring(new, 0, vector)?;
        rung(old, vector)?;
        for (machine, id) in [(&mut *old, PeerId(0)), (&mut *new, PeerId(1))] {
            // A machine may not have been told yet that this client is there: QEMU ignores such a ring.
            until_heard(machine, own, vector)?;
            own.ring(id, vector)?;
            rung(machine, vector)?;
        }
    }
    Ok(())
}

/// Rings `own` from a machine until it is heard.
fn until_heard(machine: &mut Qtest, own: &Client, vector: u16) -> Result<()> {
    let until = std::time::Instant::now() + STEP;
    loop {
        ring(machine, own.id().0, vector)?;
        if rings(own, vector)? > 0 {
            return Ok(());
        }
        ensure!(
            std::time::Instant::now() < until,
            "vector {vector} is not rung"
        );
    }
}
