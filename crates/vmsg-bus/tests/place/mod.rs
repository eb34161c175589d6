// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A bus `linux-user` in a folder of its own, and a device host of ours on it.
#![allow(dead_code, reason = "each test program uses another part")]

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use virtio_msg::{Channel, ChannelError};
use vmsg_bus::linux_user::{Listener, QueueName};
use vmsg_bus::{DeviceBus, DriverBus, LinuxUserSpec};

/// Longer than anything here takes; only a failing test waits so long.
pub(crate) const LONG: Duration = Duration::from_secs(60);

pub(crate) fn spec(dir: &Path) -> LinuxUserSpec {
    LinuxUserSpec {
        name: QueueName::new("t").unwrap(),
        dir: dir.to_owned(),
        ..LinuxUserSpec::default()
    }
}

pub(crate) struct Place {
    dir: tempfile::TempDir,
    pub(crate) spec: LinuxUserSpec,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec(dir.path());
        Self { dir, spec }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.path().join("linux-user.socket")
    }

    pub(crate) fn host(&self) -> Listener {
        Listener::bind(&self.spec, "host").unwrap()
    }
}

/// Waits until `fd` is readable or `at` has come.
pub(crate) fn wait(fd: impl AsFd, at: Option<Instant>) {
    let left = at.map_or(LONG, |at| at.saturating_duration_since(Instant::now()));
    let left = Timespec::try_from(left.min(LONG)).unwrap();
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&left)).unwrap();
}

pub(crate) fn accept(listener: &mut Listener) -> DeviceBus {
    let until = Instant::now() + LONG;
    loop {
        // A driver that has the files for a moment may have to wait for a processor meanwhile, which is no reason to give up.
        let result = listener.accept(Instant::now());
        if let Ok(Some(bus)) = result {
            return bus;
        }
        assert!(Instant::now() < until, "nobody connected: {result:?}");
        wait(&*listener, listener.next_deadline());
    }
}

/// A message of 12 bytes with a number.
pub(crate) fn message(n: u32) -> Vec<u8> {
    let mut bytes = vec![0, 2, 0, 0, 0, 0, 12, 0];
    bytes.extend(n.to_le_bytes());
    bytes
}

pub(crate) fn number(message: &[u8]) -> u32 {
    u32::from_le_bytes(message[8..12].try_into().unwrap())
}

/// The next message, or how the connection ends.
pub(crate) fn recv(bus: &mut DeviceBus) -> Result<u32, ChannelError> {
    let mut buf = [0; 48];
    loop {
        if bus.try_recv(&mut buf)?.is_some() {
            return Ok(number(&buf));
        }
        assert!(bus.wait(Some(LONG)).unwrap(), "never woken");
    }
}

pub(crate) fn driver_recv(bus: &mut DriverBus) -> Result<u32, ChannelError> {
    let mut buf = [0; 48];
    loop {
        if bus.try_recv(&mut buf)?.is_some() {
            return Ok(number(&buf));
        }
        assert!(bus.wait(Some(LONG)).unwrap(), "never woken");
    }
}
