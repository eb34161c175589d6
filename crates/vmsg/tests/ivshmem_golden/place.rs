// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus, the device host on it and the memory of the guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

use tempfile::TempDir;
use virtio_msg::DevNum;
use vmsg_bus::BusSpec;
use vmsg_device::device::Device;
use vmsg_device::host::{Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;

use super::device::{Echo, NET, Recorded, Shown};
use super::guest::Guest;
use super::wire::{Layout, Wire};

/// Bytes of the memory of the messages.
const SIZE: u64 = 1 << 20;

/// What the driver talks to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Devices {
    /// Devices that show what the recorded ones showed.
    Recorded,
    /// Those of `vmsg serve`.
    Ours,
}

/// A server, a device host and a guest's memory.
pub(crate) struct Place {
    folder: TempDir,
    layout: Layout,
    server: Option<Child>,
    stop: Stop,
    thread: Option<JoinHandle<()>>,
    pub(crate) guest: Guest,
}

impl Place {
    pub(crate) fn new(
        layout: Layout,
        devices: Devices,
        shown: &BTreeMap<DevNum, Shown>,
        base: u64,
    ) -> Self {
        let folder = TempDir::new().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        let ram = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path("ram"))
            .expect("a file");
        let guest = Guest::new(ram, base);
        let (server, place) = if layout == Layout::AmpPci {
            let memory = File::create(path("memory")).expect("a file");
            memory.set_len(SIZE).expect("room for it");
            (None, format!("file={}", path("memory").display()))
        } else {
            let server = start_server(&path("socket"));
            (Some(server), format!("socket={}", path("socket").display()))
        };
        let name = match layout {
            Layout::Amp => "amp",
            Layout::Spsc => "spsc",
            Layout::AmpPci => "amp-pci",
        };
        let spec = format!(
            "ivshmem,{place},layout={name},memory=known,ram={},mem-offset={base:#x}",
            path("ram").display()
        );
        let spec: BusSpec = spec.parse().expect("a specification");
        let listener = spec.listen("recorded").expect("a bus");
        let mut host = Host::new(1).expect("a host");
        let bus = host.add_bus(64, Some(listener)).expect("a bus");
        for (&number, shown) in shown {
            let device = device(devices, shown);
            host.add_device(
                bus,
                &format!("dev{}", number.0),
                Some(number.0),
                None,
                device,
            )
            .expect("a free number");
        }
        let stop = host.stop_handle();
        let thread = std::thread::spawn(move || host.run().expect("it runs until it is stopped"));
        Self {
            folder,
            layout,
            server,
            stop,
            thread: Some(thread),
            guest,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The driver's end.
    pub(crate) fn wire(&self) -> Wire {
        match self.layout {
            Layout::AmpPci => Wire::file(&self.path("memory"), self.layout),
            Layout::Amp | Layout::Spsc => Wire::client(&self.path("socket"), self.layout),
        }
    }

    /// Ends the device host, which must not have panicked.
    pub(crate) fn end(mut self) {
        self.stop.stop();
        let ended = self.thread.take().expect("joined once").join();
        assert!(ended.is_ok(), "the device host panicked");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(server) = &mut self.server {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

fn device(devices: Devices, shown: &Shown) -> Box<dyn Device> {
    let kind = shown.info.map(|info| info.device_id);
    match (devices, kind) {
        (Devices::Recorded, _) => Box::new(Recorded::new(shown.clone())),
        (Devices::Ours, Some(NET)) => {
            let settings = Settings::new(Mac([0x52, 0x54, 0, 1, 2, 3]));
            Box::new(Net::new(&settings, Box::new(Echo::default())))
        }
        (Devices::Ours, _) => Box::new(Rng::new()),
    }
}

/// An ivshmem server in a process of its own, ready.
fn start_server(socket: &std::path::Path) -> Child {
    let mut server = Command::new(env!("CARGO_BIN_EXE_vmsg"))
        .args([
            "ivshmem",
            "server",
            "--size",
            "1M",
            "--vectors",
            "1",
            "--socket",
        ])
        .arg(socket)
        .stdout(Stdio::piped())
        .spawn()
        .expect("vmsg");
    let stdout = server.stdout.take().expect("piped");
    let mut line = String::new();
    BufReader::new(stdout)
        .read_line(&mut line)
        .expect("it says when it is ready");
    assert!(line.starts_with("ready"), "{line}");
    server
}
