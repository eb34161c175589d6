// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A QEMU without a guest, whose devices are used from outside: by the text protocol of `-qtest`
//! (QEMU's docs/devel/testing/qtest.rst). The processor stands still (`-S`), devices and doorbells work.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::kit::Qemu;
use crate::machine::Machine;
use crate::scene::{Id, Scene};

/// Longest time for an answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Ports through which the configuration of a PC's PCI functions is reached.
const CONFIG_ADDRESS: u16 = 0xcf8;
const CONFIG_DATA: u16 = 0xcfc;
/// Where it lies in memory on `virt` without memory above 4 GiB.
const ECAM: u64 = 0x3f00_0000;

/// A connection to such a QEMU.
#[derive(Debug)]
pub(crate) struct Qtest {
    id: Id,
    machine: Machine,
    stream: BufReader<UnixStream>,
}

/// A PCI function on bus 0.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Function(pub(crate) u8);

impl Qtest {
    /// Starts a machine with these devices: a PC of the q35 kind, or `virt`.
    pub(crate) fn start(
        scene: &mut Scene,
        name: &str,
        (machine, qemu): (Machine, &Qemu),
        devices: &[&str],
    ) -> Result<Self> {
        let socket = format!("{name}.qtest");
        let mut command: Command = qemu.command()?;
        let board = match machine {
            Machine::X86 => "q35,accel=tcg",
            Machine::Arm64 => "virt,accel=tcg,highmem=off",
        };
        command.args(["-M", board, "-nodefaults", "-display", "none"]);
        command.args(["-m", "64M", "-S", "-qtest-log", "none"]);
        command.args(["-qtest", &format!("unix:{socket},server=on,wait=off")]);
        // Says that it is there: the socket is made before.
        command.args(["-qmp", "stdio"]).args(devices);
        let id = scene.start(name, &command)?;
        scene.expect(
            (id, crate::scene::Stream::Out),
            "its QMP greeting",
            ANSWER,
            |line| line.text.contains("\"QMP\"").then_some(()),
        )?;
        let stream = connect(scene.dir(), &socket)?;
        stream.set_read_timeout(Some(ANSWER))?;
        Ok(Self {
            id,
            machine,
            stream: BufReader::new(stream),
        })
    }

    /// Its process.
    pub(crate) fn id(&self) -> Id {
        self.id
    }

    /// Where its memory begins.
    pub(crate) fn ram(&self) -> u64 {
        match self.machine {
            Machine::X86 => 0,
            Machine::Arm64 => 0x4000_0000,
        }
    }

    /// Asks, and gives what follows `OK`.
    fn ask(&mut self, question: &str) -> Result<String> {
        writeln!(self.stream.get_mut(), "{question}")?;
        loop {
            let mut line = String::new();
            if self
                .stream
                .read_line(&mut line)
                .context(question.to_owned())?
                == 0
            {
                bail!("{question}: QEMU has ended");
            }
            match line.trim_end().split_once(' ') {
                Some(("OK", answer)) => return Ok(answer.to_owned()),
                // What interrupts do meanwhile.
                Some(("IRQ", _)) => {}
                None if line.trim_end() == "OK" => return Ok(String::new()),
                _ => bail!("{question}: {line}"),
            }
        }
    }

    fn number(&mut self, question: &str) -> Result<u64> {
        let answer = self.ask(question)?;
        let digits = answer.trim_start_matches("0x");
        u64::from_str_radix(digits, 16).with_context(|| format!("{question}: {answer}"))
    }

    /// Reads 32 bits of memory or of a device.
    pub(crate) fn read(&mut self, address: u64) -> Result<u32> {
        let value = self.number(&format!("readl {address:#x}"))?;
        Ok(u32::try_from(value)?)
    }

    /// Writes 32 bits.
    pub(crate) fn write(&mut self, address: u64, value: u32) -> Result<()> {
        self.ask(&format!("writel {address:#x} {value:#x}"))
            .map(drop)
    }

    /// Reads until `address` has `value`.
    pub(crate) fn becomes(&mut self, address: u64, value: u32) -> Result<()> {
        let until = Instant::now() + ANSWER;
        loop {
            let found = self.read(address)?;
            if found == value {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("{address:#x} has {found:#x}, and not {value:#x}");
            }
        }
    }

    /// Where a register of the configuration is in memory; on a PC it is led to the data port instead.
    fn select(&mut self, function: Function, register: u8) -> Result<Option<u64>> {
        let register = register & 0xfc;
        if self.machine == Machine::Arm64 {
            return Ok(Some(
                ECAM | u64::from(function.0) << 15 | u64::from(register),
            ));
        }
        let address = 0x8000_0000 | u32::from(function.0) << 11 | u32::from(register);
        self.ask(&format!("outl {CONFIG_ADDRESS:#x} {address:#x}"))?;
        Ok(None)
    }

    /// Reads an aligned register of the configuration.
    pub(crate) fn config(&mut self, function: Function, register: u8) -> Result<u32> {
        if let Some(address) = self.select(function, register)? {
            return self.read(address);
        }
        let value = self.number(&format!("inl {CONFIG_DATA:#x}"))?;
        Ok(u32::try_from(value)?)
    }

    /// Writes an aligned register of the configuration.
    pub(crate) fn set_config(
        &mut self,
        function: Function,
        register: u8,
        value: u32,
    ) -> Result<()> {
        if let Some(address) = self.select(function, register)? {
            return self.write(address, value);
        }
        self.ask(&format!("outl {CONFIG_DATA:#x} {value:#x}"))
            .map(drop)
    }

    /// Where the capability `kind` of a function is.
    pub(crate) fn capability(&mut self, function: Function, kind: u8) -> Result<u8> {
        let mut at = self.config(function, 0x34)?.to_le_bytes()[0];
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let [id, next, ..] = self.config(function, at)?.to_le_bytes();
            if id == kind {
                return Ok(at);
            }
            at = next;
        }
        bail!("the function has no capability {kind:#x}")
    }
}

/// Connects to a socket in the folder of a run, whose path may be too long for an address.
pub(crate) fn connect(dir: &Path, socket: &str) -> Result<UnixStream> {
    let folder = File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{socket}", folder.as_raw_fd());
    UnixStream::connect(path).with_context(|| format!("cannot connect to {socket}"))
}
