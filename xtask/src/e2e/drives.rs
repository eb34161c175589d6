// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks of a guest, from the image to the argument of QEMU: what the device host serves, what the proxy shows, what is
//! plugged in.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{STEP, Stage, vfio_user};
use crate::disk::{self, Root};
use crate::guest::Guest;
use crate::http;
use crate::kit::Kit;
use crate::machine::Machine;
use crate::qemu::{self, Backend, Board, Hardware};
use crate::scene::{Id, Stream};
use crate::secret;
use crate::vmsg::{self, BUS, NET_SOCKET, RNG_SOCKET};

/// By which way devices reach a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Via {
    /// vhost-user, in the QEMU that is installed.
    VhostUser,
    /// vfio-user, in QEMU 11.1.
    VfioUser,
}

/// A disk.
#[derive(Clone, Debug)]
pub(super) struct Drive {
    /// Its name, and its serial number.
    pub(super) name: &'static str,
    /// Its image in the run's folder, or the address of its server.
    pub(super) source: String,
    /// How the image is written.
    pub(super) format: &'static str,
    /// Nothing may be written.
    pub(super) read_only: bool,
    /// Queues.
    pub(super) queues: u32,
    /// Bytes of a block, if not the usual ones.
    pub(super) block_size: Option<u32>,
    /// A vhost-user daemon that listens on this socket has the image.
    pub(super) daemon: Option<&'static str>,
}

impl Drive {
    /// A raw image that can be written.
    pub(super) fn raw(name: &'static str, source: &str) -> Self {
        Self {
            name,
            source: source.to_owned(),
            format: "raw",
            read_only: false,
            queues: 1,
            block_size: None,
            daemon: None,
        }
    }

    /// The disk that guests boot from.
    pub(super) fn root() -> Self {
        Self::raw(disk::ROOT_SERIAL, "root.img")
    }

    /// As the device host is told of it.
    pub(super) fn device(&self) -> String {
        let Self {
            name,
            source,
            format,
            queues,
            ..
        } = self;
        if let Some(socket) = self.daemon {
            return format!("vhost-user,id={name},type=blk,socket={socket}");
        }
        let mut text = format!("blk,id={name},serial={name},path={source},queues={queues}");
        if !source.starts_with("nbd") {
            text.push_str(&format!(",format={format}"));
        }
        if self.read_only {
            text.push_str(",ro");
        }
        if let Some(size) = self.block_size {
            text.push_str(&format!(",block-size={size}"));
        }
        text
    }

    fn front(&self, via: Via) -> String {
        let kind = match via {
            Via::VhostUser => "vhost-user",
            Via::VfioUser => "vfio-user",
        };
        format!("{kind},socket={0}.sock,dev={0}", self.name)
    }

    /// As QEMU is told of it; `own`: QEMU's own device.
    fn arguments(&self, via: Via, machine: Machine, own: bool) -> Vec<String> {
        let Self {
            name,
            source,
            format,
            queues,
            ..
        } = self;
        if own {
            let device = match (machine, via) {
                (Machine::Arm64, Via::VhostUser) => "virtio-blk-device",
                _ => "virtio-blk-pci",
            };
            let read_only = if self.read_only { "on" } else { "off" };
            let sectors = self.block_size.map_or(String::new(), |size| {
                format!(",logical_block_size={size},physical_block_size={size}")
            });
            return [
                "-drive",
                &format!("if=none,id={name},file={source},format={format},readonly={read_only},discard=unmap"),
                "-device",
                &format!("{device},drive={name},serial={name},num-queues={queues}{sectors}"),
            ]
            .map(str::to_owned)
            .into();
        }
        match via {
            Via::VhostUser => {
                let device = match machine {
                    Machine::X86 => "vhost-user-blk-pci",
                    Machine::Arm64 => "vhost-user-blk",
                };
                [
                    "-chardev",
                    &format!("socket,id={name},path={name}.sock"),
                    "-device",
                    &format!("{device},chardev={name},num-queues={queues}"),
                ]
                .map(str::to_owned)
                .into()
            }
            Via::VfioUser => vec![
                "-device".to_owned(),
                qemu::vfio_user(&format!("{name}.sock")),
            ],
        }
    }
}

/// A guest's hardware and those who provide it.
#[derive(Debug)]
pub(super) struct Drives {
    via: Via,
    drives: Vec<Drive>,
    /// The device host; none with QEMU's own devices.
    pub(super) serve: Option<Id>,
    /// The proxy; none with QEMU's own devices.
    proxy: Option<Id>,
    /// What it is started with.
    devices: Vec<String>,
    starts: usize,
    /// What a shell does before, in a mount namespace of its own.
    before: Option<String>,
    /// Modules of the guest beside those for the usual devices.
    pub(super) modules: Vec<&'static str>,
}

/// Where `vmsg ctl` reaches the device host.
pub(super) const CONTROL: &str = "control.sock";

impl Drives {
    /// Starts a device host with a network device, an entropy device, these disks and these other devices, and a proxy
    /// with a front for each; `fronts` are those of the other devices.
    pub(super) fn start(
        stage: &mut Stage,
        via: Via,
        drives: Vec<Drive>,
        more: &[String],
        fronts: &[String],
    ) -> Result<Self> {
        Self::start_with(stage, via, drives, (more, fronts), None)
    }

    /// The same without other devices, where a shell does something before, in a mount namespace of the device host.
    pub(super) fn start_after(
        stage: &mut Stage,
        via: Via,
        drives: Vec<Drive>,
        before: &str,
    ) -> Result<Self> {
        Self::start_with(stage, via, drives, (&[], &[]), Some(before.to_owned()))
    }

    fn start_with(
        stage: &mut Stage,
        via: Via,
        drives: Vec<Drive>,
        (more, fronts): (&[String], &[String]),
        before: Option<String>,
    ) -> Result<Self> {
        let mut this = Self {
            before,
            modules: vec!["virtio_blk"],
            via,
            drives,
            serve: None,
            proxy: None,
            devices: Vec::new(),
            starts: 0,
        };
        let Some(vmsg) = stage.vmsg.cloned() else {
            return Ok(this);
        };
        this.devices = match via {
            Via::VhostUser => vec![vmsg::NET.to_owned(), "rng".to_owned()],
            Via::VfioUser => vec![vfio_user::net_device(), "rng".to_owned()],
        };
        this.devices.extend(this.drives.iter().map(Drive::device));
        this.devices.extend_from_slice(more);
        this.serve_again(stage)?;
        let mut all = match via {
            Via::VhostUser => vec![
                format!("vhost-user,socket={NET_SOCKET},dev=net0"),
                format!("vhost-user,socket={RNG_SOCKET},dev=1"),
            ],
            Via::VfioUser => vfio_user::fronts(false).to_vec(),
        };
        all.extend(this.drives.iter().map(|d| d.front(via)));
        all.extend_from_slice(fronts);
        let all: Vec<&str> = all.iter().map(String::as_str).collect();
        this.proxy = Some(vmsg.proxy_on(&mut stage.scene, BUS, &all)?);
        Ok(this)
    }

    /// Starts a device host as the first one was.
    pub(super) fn serve_again(&mut self, stage: &mut Stage) -> Result<()> {
        let vmsg = stage.vmsg()?;
        let name = match self.starts {
            0 => "serve".to_owned(),
            n => format!("serve-{n}"),
        };
        self.starts += 1;
        let mut options = vec![("--bus", BUS), ("--control", CONTROL)];
        options.extend(self.devices.iter().map(|d| ("--device", d.as_str())));
        self.serve = Some(match &self.before {
            None => vmsg.run(&mut stage.scene, &name, "serve", &options, 1)?,
            Some(before) => vmsg.run_after(&mut stage.scene, &name, "serve", &options, before)?,
        });
        Ok(())
    }

    /// Waits until the proxy has said of `device` what begins with `text`, after `since`.
    pub(super) fn proxy_says(
        &self,
        stage: &mut Stage,
        device: &str,
        text: &str,
        since: Duration,
    ) -> Result<()> {
        let proxy = self.proxy.context("there is no proxy")?;
        let link = format!("link=\"{device}\"");
        stage
            .scene
            .expect((proxy, Stream::Err), text, STEP, |line| {
                let fits = line.at > since && line.text.contains(text) && line.text.contains(&link);
                fits.then_some(())
            })
    }

    /// The guest's hardware.
    pub(super) fn board(&self, stage: &Stage) -> Board {
        let (net, rng) = match (self.via, stage.vmsg.is_some()) {
            (Via::VhostUser, true) => (
                Backend::VhostUser(NET_SOCKET.to_owned()),
                Backend::VhostUser(RNG_SOCKET.to_owned()),
            ),
            (Via::VfioUser, true) => vfio_user::backends(),
            (Via::VhostUser, false) => (Backend::Qemu, Backend::Qemu),
            (Via::VfioUser, false) => (Backend::Pci, Backend::Pci),
        };
        let mut board = Board::new(net, rng);
        board.cpus = 2;
        let own = stage.vmsg.is_none();
        let arguments = self
            .drives
            .iter()
            .map(|drive| drive.arguments(self.via, stage.kit.machine, own));
        let mut arguments: Vec<_> = arguments.collect();
        if (stage.kit.machine, self.via) == (Machine::Arm64, Via::VhostUser) {
            // The kernel finds virtio-mmio devices in the opposite order.
            arguments.reverse();
        }
        board.more.extend(arguments.into_iter().flatten());
        board
    }

    /// QEMU, kernel and drivers of the guest.
    fn kit(&self, stage: &Stage) -> Result<Kit> {
        let kit = match self.via {
            Via::VhostUser => stage.kit.clone(),
            Via::VfioUser => vfio_user::kit(stage.kit, false, false)?,
        };
        Ok(kit.with_modules(&self.modules))
    }

    /// Starts a guest that boots from the disk and runs `script` there, with `more` variables.
    pub(super) fn guest(
        &self,
        stage: &mut Stage,
        name: &str,
        board: &Board,
        script: &str,
        more: Vec<(&'static str, String)>,
    ) -> Result<Guest> {
        let kit = self.kit(stage)?;
        let mut settings = self.settings(stage)?;
        settings.extend(more);
        let guest = Guest::start(
            &mut stage.scene,
            name,
            &kit,
            Hardware::Board(board),
            &disk::script(script),
            &settings,
        )?;
        guest.booted(&mut stage.scene)?;
        Ok(guest)
    }

    /// The variables of the guest's script.
    fn settings(&self, stage: &Stage) -> Result<Vec<(&'static str, String)>> {
        let mut settings = stage.settings(qemu::TEST_MAC)?.to_vec();
        if self.via == Via::VfioUser {
            settings.retain(|(name, _)| *name != "TRANSPORT");
            settings.push(("TRANSPORT", "/pci".to_owned()));
        }
        settings.push(("ROOT", disk::ROOT_SERIAL.to_owned()));
        Ok(settings)
    }
}

/// Makes the root disk in the run's folder.
pub(super) fn make_root(stage: &Stage, root: Root) -> Result<()> {
    disk::write_root(stage.kit, root, &stage.scene.dir().join("root.img"))
}

/// Makes an image with random contents, and gives their SHA-256.
pub(super) fn write_random(image: &Path, mebibytes: usize) -> Result<String> {
    let seed = secret::random()?;
    let mut state = u64::from_le_bytes(seed[..8].try_into().expect("eight of them")) | 1;
    let mut bytes = Vec::with_capacity(mebibytes << 20);
    while bytes.len() < mebibytes << 20 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    fs::write(image, &bytes).with_context(|| format!("cannot write {}", image.display()))?;
    Ok(http::sum_of(bytes.as_slice())?)
}

/// The SHA-256 of a file.
pub(super) fn sum_of(image: &Path) -> Result<String> {
    let file = fs::File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    Ok(http::sum_of(file)?)
}

/// Bytes that a file takes up.
pub(super) fn allocated(image: &Path) -> Result<u64> {
    Ok(fs::metadata(image)?.blocks() * 512)
}

/// The contents of a qcow2 image, checked, as a raw image beside it.
pub(super) fn raw_of(dir: &Path, image: &str) -> Result<String> {
    disk::qemu_img(dir, ["check", "-q", "-f", "qcow2", image])
        .with_context(|| format!("{image} is not as it should be"))?;
    let raw = format!("{image}.raw");
    disk::qemu_img(dir, ["convert", "-f", "qcow2", "-O", "raw", image, &raw])?;
    ensure!(dir.join(&raw).is_file(), "qemu-img has written no {raw}");
    Ok(raw)
}
