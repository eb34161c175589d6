// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host and a proxy, on a bus of sockets.

use super::RAM_AT;
use std::path::PathBuf;
use std::thread::JoinHandle;
use vmsg_bus::{BusSpec, UnixSpec, keyval};
use vmsg_device::device::{Device, Operation};
use vmsg_device::host::{Handle, Host, Stop};
use vmsg_device::net::{Mac, Net, Settings};
use vmsg_device::rng::Rng;
use vmsg_net::Null;
use vmsg_proxy::{FrontSpec, Proxy};

pub const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

/// Messages on a linux-user bus.
const SMALL: usize = 48;

pub struct DeviceHost {
    stop: Stop,
    handle: Handle,
    thread: Option<JoinHandle<()>>,
}

impl DeviceHost {
    /// With `more` as device 4.
    fn start(bus: &BusSpec, more: Option<Box<dyn Device>>) -> DeviceHost {
        let listener = bus.listen("test host").unwrap();
        let mut host = Host::new(1).unwrap();
        let size = match bus {
            BusSpec::LinuxUser(_) => SMALL,
            _ => vmsg_bus::DEFAULT_MESSAGE_SIZE,
        };
        let index = host.add_bus(size, Some(listener)).unwrap();
        host.add_device(index, "rng0", Some(1), None, Box::new(Rng::new()))
            .unwrap();
        let net = Net::new(&Settings::new(Mac(MAC)), Box::new(Null::default()));
        host.add_device(index, "net0", Some(2), None, Box::new(net))
            .unwrap();
        let mut settings = Settings::new(Mac(MAC));
        settings.queue_pairs = 128;
        let wide = Net::new(&settings, Box::new(Null::default()));
        host.add_device(index, "net1", Some(3), None, Box::new(wide))
            .unwrap();
        if let Some(device) = more {
            host.add_device(index, "more", Some(4), None, device)
                .unwrap();
        }
        let (stop, handle) = (host.stop_handle(), host.handle());
        let thread = std::thread::spawn(move || host.run().unwrap());
        DeviceHost {
            stop,
            handle,
            thread: Some(thread),
        }
    }

    /// Takes a device away.
    pub fn remove(&self, name: &str) {
        self.handle.remove_device(None, name).unwrap();
    }

    /// Puts another device on the bus; its number.
    pub fn add(&self, name: &str, device: Box<dyn Device>) -> u16 {
        let added = self.handle.add_device(0, name, None, None, device);
        added.unwrap().0
    }

    pub fn set_link(&self, up: bool) {
        self.handle
            .operate(None, "net0", Operation::SetLink(up))
            .unwrap();
    }
}

impl Drop for DeviceHost {
    fn drop(&mut self) {
        self.stop.stop();
        self.thread.take().unwrap().join().unwrap();
    }
}

pub struct Place {
    // In this order: the proxy lets go of the device first.
    pub proxy: Option<Proxy>,
    pub host: Option<DeviceHost>,
    bus: BusSpec,
    pub dir: tempfile::TempDir,
}

impl Place {
    /// With a device host, and a front for `dev` with these keys, which begin with a comma.
    pub fn new(dev: &str, keys: &str) -> Place {
        let mut place = Place::without_host(dev, keys);
        place.start_host();
        place
    }

    /// With a device of the test's own.
    pub fn with_device(device: Box<dyn Device>, keys: &str) -> Place {
        let mut place = Place::without_host("more", keys);
        place.host = Some(DeviceHost::start(&place.bus, Some(device)));
        place
    }

    /// On a bus that has the guest's memory, `ram` in the folder, in common.
    pub fn linux_user(dev: &str) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().display();
        let spec = format!("linux-user,dir={at},ram={at}/ram,mem-offset={RAM_AT:#x}");
        let mut place = Place::on(spec.parse().unwrap(), dir, dev, "");
        place.start_host();
        place
    }

    pub fn without_host(dev: &str, keys: &str) -> Place {
        let dir = tempfile::tempdir().unwrap();
        let bus = BusSpec::Unix(UnixSpec::new(dir.path().join("bus.sock")));
        Place::on(bus, dir, dev, keys)
    }

    fn on(bus: BusSpec, dir: tempfile::TempDir, dev: &str, keys: &str) -> Place {
        let mut place = Place {
            proxy: None,
            host: None,
            bus,
            dir,
        };
        let socket = place.socket();
        let socket = keyval::escape(&socket.to_string_lossy()).into_owned();
        let spec: FrontSpec =
            keyval::from_str(&format!("vfio-user,socket={socket},dev={dev}{keys}")).unwrap();
        place.proxy =
            Some(Proxy::start(std::slice::from_ref(&place.bus), &[spec], |_| {}).unwrap());
        place
    }

    pub fn start_host(&mut self) {
        self.host = Some(DeviceHost::start(&self.bus, None));
    }

    /// The same as [`Self::with_device`] has had.
    pub fn start_host_with(&mut self, device: Box<dyn Device>) {
        self.host = Some(DeviceHost::start(&self.bus, Some(device)));
    }

    pub fn kill_host(&mut self) {
        self.host = None;
    }

    pub fn bus(&self) -> BusSpec {
        self.bus.clone()
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("dev.sock")
    }

    pub fn stats(&self) -> vmsg_proxy::front::FrontStats {
        let proxy = self.proxy.as_ref().unwrap();
        proxy.fronts().next().unwrap().2
    }
}
