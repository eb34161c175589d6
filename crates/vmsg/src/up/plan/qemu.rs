// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of a guest's QEMU, and the same of devices that come while it runs.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Map, Value, json};
use vmsg_bus::keyval::escape;
use vmsg_proxy::FrontKind;
use vmsg_proxy::front::qemu::{self, Arch, QemuDevice, device_args, machine_args, vfio_user_args};

use super::super::description::{Guest, Shape, StopBy};
use super::super::read::front_socket;

/// A guest as its QEMU is started.
#[derive(Clone, Debug)]
pub(in super::super) struct Machine {
    guest: Guest,
    runtime: PathBuf,
    /// Its devices, by id.
    pub(super) devices: Vec<(String, Shape)>,
    /// Buses that these are on.
    buses: Vec<String>,
}

/// A device that was added to a running guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct Plugged {
    pub(in super::super) id: String,
    pub(in super::super) shape: Shape,
    /// Which of the root ports it is in, counted from 0.
    pub(in super::super) port: u16,
}

/// Who listens on the sockets of QMP and the serial line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in super::super) enum Sockets {
    /// `up`: nothing that QEMU says is lost, and there is no moment at which they are not there yet.
    Connect,
    /// QEMU, when a person starts it.
    Listen,
}

/// What QMP is told to plug a device in, one command after another.
#[derive(Clone, Debug, PartialEq)]
pub(in super::super) struct Plug {
    pub(in super::super) chardev: Value,
    /// For network devices.
    pub(in super::super) netdev: Option<Value>,
    pub(in super::super) device: Value,
}

impl Machine {
    pub(super) fn new(
        guest: &Guest,
        runtime: &Path,
        devices: Vec<(String, Shape)>,
        buses: Vec<String>,
    ) -> Self {
        Self {
            guest: guest.clone(),
            runtime: runtime.to_owned(),
            devices,
            buses,
        }
    }

    /// Buses that its devices are on, by the description's names.
    pub(in super::super) fn buses(&self) -> &[String] {
        &self.buses
    }

    pub(in super::super) fn hotplug(&self) -> u16 {
        self.guest.hotplug
    }

    pub(in super::super) fn front(&self) -> FrontKind {
        self.guest.front
    }

    pub(in super::super) fn isolate(&self) -> bool {
        self.guest.isolate
    }

    pub(in super::super) fn version(&self) -> (u32, u32) {
        self.guest.version
    }

    pub(in super::super) fn stop(&self) -> (StopBy, Duration) {
        (self.guest.stop, self.guest.stop_timeout)
    }

    pub(in super::super) fn has_serial(&self) -> bool {
        self.guest.serial
    }

    /// Devices that it was described with.
    pub(in super::super) fn devices(&self) -> impl Iterator<Item = &str> {
        self.devices.iter().map(|(id, _)| id.as_str())
    }

    /// The socket of QMP.
    pub(in super::super) fn qmp(&self) -> PathBuf {
        self.runtime.join(format!("{}.qmp", self.guest.name))
    }

    /// The socket of the serial line.
    pub(in super::super) fn serial(&self) -> PathBuf {
        self.runtime.join(format!("{}.serial", self.guest.name))
    }

    fn chardev(&self, id: &str, path: &Path, sockets: Sockets) -> [String; 2] {
        let path = path.to_string_lossy();
        let path = escape(&path);
        let server = match sockets {
            Sockets::Connect => "",
            Sockets::Listen => ",server=on,wait=off",
        };
        [
            "-chardev".to_owned(),
            format!("socket,id={id},path={path}{server}"),
        ]
    }

    /// QEMU's command line, with what was plugged in meanwhile.
    pub(in super::super) fn argv(&self, plugged: &[Plugged], sockets: Sockets) -> Vec<String> {
        let guest = &self.guest;
        let mut argv = vec![guest.qemu.clone()];
        let mut words = |words: &[&str]| argv.extend(words.iter().map(|word| (*word).to_owned()));
        words(&["-name", &guest.name, "-nodefaults", "-no-user-config"]);
        words(&["-display", "none"]);
        if let Some(accel) = &guest.accel {
            words(&["-accel", accel]);
        }
        let emulated = guest
            .accel
            .as_deref()
            .is_some_and(|accel| accel.starts_with("tcg"));
        let cpu = match (&guest.cpu, guest.machine, emulated) {
            (Some(cpu), ..) => cpu.as_str(),
            (None, _, false) => "host",
            (None, Arch::X86, true) => "qemu64,+rdrand",
            // Pointer authentication as the architecture defines it costs more than all else under emulation.
            (None, Arch::Arm64, true) => "max,pauth-impdef=on",
        };
        words(&["-cpu", cpu, "-smp", &guest.cpus.to_string()]);
        argv.extend(machine_args(&self.qemu_machine()));
        let mut words = |words: &[&str]| argv.extend(words.iter().map(|word| (*word).to_owned()));
        if let Some(kernel) = &guest.kernel {
            words(&["-kernel", kernel]);
            if let Some(initrd) = &guest.initrd {
                words(&["-initrd", initrd]);
            }
            let append = guest.append.as_deref().unwrap_or(match guest.machine {
                _ if !guest.serial => "",
                Arch::X86 => "console=ttyS0",
                Arch::Arm64 => "console=ttyAMA0",
            });
            if !append.is_empty() {
                words(&["-append", append]);
            }
        }
        argv.extend(self.chardev("qmp", &self.qmp(), sockets));
        argv.extend(["-mon", "chardev=qmp,mode=control"].map(str::to_owned));
        if guest.serial {
            argv.extend(self.chardev("serial", &self.serial(), sockets));
            argv.extend(["-serial", "chardev:serial"].map(str::to_owned));
        }
        for port in 0..guest.hotplug {
            let number = port + 1;
            argv.extend([
                "-device".to_owned(),
                format!(
                    "pcie-root-port,id={},bus=pcie.0,chassis={number},slot={number}",
                    root_port(port)
                ),
            ]);
        }
        for (id, shape, boot_index) in self.in_order() {
            argv.extend(self.device(id, shape, boot_index));
        }
        for plugged in plugged {
            let mut args = self.plugged_args(plugged);
            if let Some(device) = args.last_mut() {
                device.push_str(&format!(",bus={}", root_port(plugged.port)));
            }
            argv.extend(args);
        }
        argv.extend(guest.args.iter().cloned());
        argv
    }

    fn qemu_machine(&self) -> qemu::Machine {
        qemu::Machine {
            arch: self.guest.machine,
            memory: self.guest.memory.clone(),
            version: self.guest.version,
            backend: self.guest.backend.clone(),
        }
    }

    /// Its devices as QEMU is to have them, each with its place among those that it boots from: disks, where there is no kernel. A guest's
    /// kernel is to find the first disk first: on virtio-mmio Linux takes them from the last one that QEMU was told of.
    fn in_order(&self) -> Vec<(&str, &Shape, Option<u32>)> {
        let mut disks: Vec<(&str, &Shape)> = (self.devices.iter())
            .filter(|(_, shape)| shape.is_disk())
            .map(|(id, shape)| (id.as_str(), shape))
            .collect();
        let boots = self.guest.kernel.is_none();
        let index_of = |wanted: &str| {
            let mut disks = self.devices.iter().filter(|(_, shape)| shape.is_disk());
            let at = disks.position(|(id, _)| id == wanted);
            at.filter(|_| boots).and_then(|at| u32::try_from(at).ok())
        };
        let on_mmio = self.guest.machine == Arch::Arm64 && self.guest.front == FrontKind::VhostUser;
        if !on_mmio {
            disks.reverse();
        }
        let devices = self.devices.iter().map(|(id, shape)| {
            let is_disk = shape.is_disk();
            let mut next = || disks.pop().unwrap_or((id, shape));
            let (id, shape) = if is_disk {
                next()
            } else {
                (id.as_str(), shape)
            };
            (id, shape, index_of(id))
        });
        devices.collect()
    }

    fn device(&self, id: &str, shape: &Shape, boot_index: Option<u32>) -> Vec<String> {
        let socket = front_socket(&self.runtime, &self.guest.name, id);
        if self.guest.front == FrontKind::VfioUser {
            return vfio_user_args(&socket, boot_index);
        }
        self.vhost_user(id, shape, &socket, boot_index, &self.qemu_machine())
    }

    fn vhost_user(
        &self,
        id: &str,
        shape: &Shape,
        socket: &Path,
        boot_index: Option<u32>,
        machine: &qemu::Machine,
    ) -> Vec<String> {
        let mut args = device_args(
            &QemuDevice {
                queues: shape.queues,
                queue_size: shape.queue_size,
                config_size: shape.config_size,
                mac: shape.mac.map(|mac| mac.0),
                pairs: shape.pairs,
                mtu: shape.mtu,
                tag: shape.tag.as_deref().map(Into::into),
                boot_index,
                ..QemuDevice::new(id, socket, shape.device_id)
            },
            machine,
        );
        if let Some(device) = args.last_mut() {
            // No boot ROM where the kernel is given.
            if device.starts_with("virtio-net-pci,") && self.guest.kernel.is_some() {
                device.push_str(",romfile=");
            }
            device.push_str(&format!(",id={}", qdev_id(id)));
        }
        args
    }

    /// The arguments of a device in a root port, which is on PCI whatever the machine.
    fn plugged_args(&self, plugged: &Plugged) -> Vec<String> {
        let machine = qemu::Machine {
            arch: Arch::X86,
            ..self.qemu_machine()
        };
        let socket = front_socket(&self.runtime, &self.guest.name, &plugged.id);
        self.vhost_user(&plugged.id, &plugged.shape, &socket, None, &machine)
    }

    /// What QMP is told to plug a device in.
    pub(in super::super) fn plug(&self, plugged: &Plugged) -> Plug {
        let args = self.plugged_args(plugged);
        let mut plug = Plug {
            chardev: Value::Null,
            netdev: None,
            device: Value::Null,
        };
        for pair in args.chunks(2) {
            let [option, value] = pair else { continue };
            match option.as_str() {
                "-chardev" => {
                    let socket = front_socket(&self.runtime, &self.guest.name, &plugged.id);
                    plug.chardev = chardev_json(value, &socket);
                }
                "-netdev" => plug.netdev = Some(Value::Object(properties(value, "type"))),
                _ => {
                    let mut device = properties(value, "driver");
                    device.insert("bus".to_owned(), json!(root_port(plugged.port)));
                    plug.device = Value::Object(device);
                }
            }
        }
        plug
    }
}

fn root_port(port: u16) -> String {
    format!("hotplug{port}")
}

/// QEMU's name of a device.
pub(in super::super) fn qdev_id(id: &str) -> String {
    format!("dev-{id}")
}

/// `first,key=value,…` of arguments that this program has made, as JSON has it.
fn properties(text: &str, first: &str) -> Map<String, Value> {
    let mut map = Map::new();
    // A comma of a value is doubled.
    let text = text.replace(",,", "\0");
    for (at, item) in text.split(',').enumerate() {
        let (key, value) = match item.split_once('=') {
            Some((key, value)) => (key, value),
            None if at == 0 => (first, item),
            None => (item, "on"),
        };
        let value = match value {
            // The one that anybody may choose.
            tag if key == "tag" => json!(tag.replace('\0', ",")),
            "on" => json!(true),
            "off" => json!(false),
            text => match text.parse::<u64>() {
                Ok(number) => json!(number),
                Err(_) => json!(text.replace('\0', ",")),
            },
        };
        map.insert(key.to_owned(), value);
    }
    map
}

/// The arguments of `chardev-add`.
fn chardev_json(text: &str, socket: &Path) -> Value {
    let mut data = json!({
        "addr": { "type": "unix", "data": { "path": socket.to_string_lossy() } },
        "server": false,
    });
    // The path has commas doubled; what is wanted has none.
    for item in text.split(',') {
        if let Some((key @ ("reconnect" | "reconnect-ms"), value)) = item.split_once('=')
            && let Ok(value) = value.parse::<u64>()
        {
            data[key] = json!(value);
        }
    }
    let id = text.split(',').find_map(|item| item.strip_prefix("id="));
    json!({ "id": id.unwrap_or_default(), "backend": { "type": "socket", "data": data } })
}
