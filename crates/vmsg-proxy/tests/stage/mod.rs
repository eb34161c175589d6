// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A front with a scripted device host behind it and a VMM before it.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses another part"
)]

use crate::common::{Host, MAX};
use std::collections::BTreeMap;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_msg::{Channel, ChannelError, DevNum, Frame, Message, Token};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;
use vmsg_bus::{Capabilities, DeviceBus, loopback};
use vmsg_mem::Mapping;
use vmsg_proxy::front::vhost_user::{VhostUserFront, VhostUserOptions};
use vmsg_proxy::link::{Link, Source};
use vmsg_proxy::session::{CommonMemory, FileId, Options, Session, Target};

pub const PROTOCOL_FEATURES: u64 = 1 << 30;
pub const FEATURES: u64 = 1 << 32 | 1 << 29;
pub const RAM: u64 = 0x4_0000;
/// Where the front end pretends to have mapped the memory.
pub const USER: u64 = 0x7f00_0000_0000;
pub const GUEST: u64 = 0x4000_0000;
/// Memory does not begin at the beginning of its file.
pub const OFFSET: u64 = 0x3000;
pub const LIVE: u32 = 0xf;
/// Nothing takes so long unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(60);

pub struct Shared {
    pub host: Mutex<Host>,
    pub changed: Condvar,
    /// Sent to the driver by the host's thread.
    pub events: Mutex<Vec<Vec<u8>>>,
    pub stop: AtomicBool,
}

/// A front with all that belongs to it.
pub struct Stage {
    // In this order: a thread that waits for the link ends when it is gone.
    pub link: Option<Link>,
    pub front: Option<VhostUserFront>,
    pub shared: Arc<Shared>,
    pub thread: Option<std::thread::JoinHandle<()>>,
    pub dir: tempfile::TempDir,
}

/// Until the driver's end is gone, which may be in the middle of an answer, or it is told to stop.
pub fn serve(shared: &Shared, mut bus: DeviceBus) {
    let mut buf = vec![0; 512];
    let mut fds = Vec::new();
    let is_there = |result: Result<(), ChannelError>| match result {
        Ok(()) => true,
        Err(ChannelError::Closed) => false,
        Err(error) => panic!("{error}"),
    };
    while !shared.stop.load(Ordering::SeqCst) {
        for event in std::mem::take(&mut *shared.events.lock().unwrap()) {
            if !is_there(bus.try_send(&event)) {
                return;
            }
        }
        match bus.try_recv_with_fds(&mut buf, &mut fds) {
            Ok(Some(len)) => {
                let answer = shared
                    .host
                    .lock()
                    .unwrap()
                    .handle(&buf[..len], std::mem::take(&mut fds));
                if let Some(answer) = answer
                    && !is_there(bus.try_send(&answer))
                {
                    return;
                }
                shared.changed.notify_all();
            }
            Ok(None) => {
                if !is_there(bus.flush()) {
                    return;
                }
                bus.wait(Some(Duration::from_millis(20))).unwrap();
            }
            Err(_) => return,
        }
    }
}

/// How a stage is to be.
pub struct Setting {
    pub options: loopback::Options,
    /// What the bus has in common, if it lends nothing.
    pub common: Vec<CommonMemory>,
    /// Of the front.
    pub config: Option<bool>,
    /// The same.
    pub stop_patience: Option<Duration>,
}

impl Default for Setting {
    fn default() -> Setting {
        Setting {
            options: loopback::Options {
                capabilities: Capabilities::all(MAX),
                ..loopback::Options::default()
            },
            common: Vec::new(),
            config: None,
            stop_patience: None,
        }
    }
}

impl Setting {
    /// A bus of messages of 48 bytes and nothing else, that has the guest's memory in common.
    pub fn bare(memory: &OwnedFd) -> Setting {
        let stat = rustix::fs::fstat(memory).unwrap();
        Setting {
            options: loopback::Options {
                capabilities: Capabilities::from_bits(0, 48),
                ..loopback::Options::default()
            },
            common: vec![CommonMemory {
                base: GUEST,
                len: RAM,
                file_offset: OFFSET,
                file: FileId {
                    device: stat.st_dev,
                    inode: stat.st_ino,
                },
                path: "/dev/shm/guest".into(),
            }],
            config: None,
            stop_patience: None,
        }
    }
}

impl Stage {
    pub fn new(host: Host) -> Stage {
        Stage::with(host, Setting::default())
    }

    pub fn with(host: Host, setting: Setting) -> Stage {
        let number = host.number;
        let shared = Arc::new(Shared {
            host: Mutex::new(host),
            changed: Condvar::new(),
            events: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let (driver, device) = loopback::pair(&setting.options).unwrap();
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || serve(&shared, device)
        });
        let session = Session::new(Target::Number(number), Options::default());
        let link = Link::start(
            "test",
            session,
            Source::GivenWith(Box::new(driver), setting.common),
        )
        .unwrap();
        let dir = tempfile::tempdir().unwrap();
        let mut options = VhostUserOptions::new(dir.path().join("vu.sock"));
        options.config = setting.config;
        options.stop_patience = setting.stop_patience.unwrap_or(options.stop_patience);
        let front = VhostUserFront::start("test", link.handle(), options).unwrap();
        Stage {
            link: Some(link),
            front: Some(front),
            shared,
            thread: Some(thread),
            dir,
        }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("vu.sock")
    }

    pub fn host(&self) -> MutexGuard<'_, Host> {
        self.shared.host.lock().unwrap()
    }

    /// The host says something that it was not asked.
    pub fn tell(&self, device: DevNum, message: Message<'_>) {
        let mut bytes = vec![0; 64];
        let len = Frame::new(device, Token(0), message)
            .encode(&mut bytes)
            .unwrap();
        bytes.truncate(len);
        self.shared.events.lock().unwrap().push(bytes);
    }

    /// Waits until the host is so.
    #[track_caller]
    pub fn until(&self, what: &str, so: impl Fn(&Host) -> bool) {
        let (host, timeout) = self
            .shared
            .changed
            .wait_timeout_while(self.host(), PATIENCE, |host| !so(host))
            .unwrap();
        assert!(!timeout.timed_out(), "{what}: {host:?}");
    }

    pub fn front(&self) -> &VhostUserFront {
        self.front.as_ref().unwrap()
    }

    #[track_caller]
    pub fn until_front(
        &self,
        what: &str,
        so: impl Fn(&vmsg_proxy::front::vhost_user::FrontStats) -> bool,
    ) {
        let end = Instant::now() + PATIENCE;
        while !so(&self.front().stats()) {
            assert!(Instant::now() < end, "{what}: {:?}", self.front().stats());
            std::thread::yield_now();
        }
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.link.take();
        self.front.take();
        self.shared.stop.store(true, Ordering::SeqCst);
        let result = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            result.unwrap();
        }
    }
}

/// A VMM as QEMU is one.
pub struct Vmm {
    pub front: Frontend,
    /// The same socket.
    pub socket: UnixStream,
    pub ram: Mapping,
    pub file: OwnedFd,
    pub kicks: BTreeMap<usize, EventFd>,
    pub calls: BTreeMap<usize, EventFd>,
}

pub fn ring_at(index: usize) -> u64 {
    0x1_0000 * index as u64 + 0x800
}

impl Vmm {
    pub fn connect(stage: &Stage) -> Vmm {
        Vmm::over(UnixStream::connect(stage.socket()).unwrap())
    }

    /// In place of another one.
    pub fn connect_after(before: Vmm, stage: &Stage) -> Vmm {
        drop(before);
        Vmm::connect(stage)
    }

    /// Over a connection there is.
    pub fn over(socket: UnixStream) -> Vmm {
        let (ram, file) = Vmm::memory();
        Vmm::of(socket, ram, file)
    }

    pub fn memory() -> (Mapping, OwnedFd) {
        Mapping::memfd("guest", OFFSET + RAM, false).unwrap()
    }

    /// With memory there is.
    pub fn of(socket: UnixStream, ram: Mapping, file: OwnedFd) -> Vmm {
        Vmm {
            front: Frontend::from_stream(socket.try_clone().unwrap(), 8),
            socket,
            ram,
            file,
            kicks: BTreeMap::new(),
            calls: BTreeMap::new(),
        }
    }

    /// Up to where QEMU waits for the guest's driver.
    pub fn init(&mut self) -> u64 {
        let features = self.front.get_features().unwrap();
        assert_ne!(features & PROTOCOL_FEATURES, 0);
        let protocol = self.front.get_protocol_features().unwrap();
        assert!(protocol.contains(
            VhostUserProtocolFeatures::MQ | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        ));
        self.front.set_protocol_features(protocol).unwrap();
        self.front.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        self.front.set_owner().unwrap();
        features
    }

    pub fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST,
            memory_size: RAM,
            userspace_addr: USER,
            mmap_offset: OFFSET,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub fn features_and_memory(&mut self) {
        self.front
            .set_features(FEATURES | PROTOCOL_FEATURES)
            .unwrap();
        self.front.set_mem_table(&[self.region()]).unwrap();
    }

    pub fn set_ring(&mut self, index: usize, base: u16) {
        self.front.set_vring_num(index, 64).unwrap();
        self.front.set_vring_base(index, base).unwrap();
        let at = USER + ring_at(index);
        let addresses = VringConfigData {
            queue_max_size: 256,
            queue_size: 64,
            flags: 0,
            desc_table_addr: at,
            avail_ring_addr: at + 0x1000,
            used_ring_addr: at + 0x2000,
            log_addr: None,
        };
        self.front.set_vring_addr(index, &addresses).unwrap();
        let kick = EventFd::new(0).unwrap();
        let call = EventFd::new(0).unwrap();
        self.front.set_vring_kick(index, &kick).unwrap();
        self.front.set_vring_call(index, &call).unwrap();
        self.kicks.insert(index, kick);
        self.calls.insert(index, call);
    }

    pub fn set_used_index(&self, index: usize, used: u16) {
        self.ram.ram().write(
            (OFFSET + ring_at(index) + 0x2002) as usize,
            &used.to_le_bytes(),
        );
    }

    pub fn start(stage: &Stage, rings: usize) -> Vmm {
        Vmm::connect(stage).started(stage, rings)
    }

    pub fn started(self, stage: &Stage, rings: usize) -> Vmm {
        let mut vmm = self;
        vmm.init();
        vmm.features_and_memory();
        for index in 0..rings {
            vmm.set_ring(index, 0);
            vmm.front.set_vring_enable(index, true).unwrap();
        }
        stage.until("the device is live", |host| {
            host.status.bits() == LIVE && host.queues.len() == rings
        });
        vmm
    }
}

/// Waits until the eventfd is rung; gives what was in it.
#[track_caller]
pub fn rung(fd: &EventFd) -> u64 {
    let epoll = Epoll::new().unwrap();
    let readable = EpollEvent::new(EventSet::IN, 0);
    epoll
        .ctl(ControlOperation::Add, fd.as_raw_fd(), readable)
        .unwrap();
    let ready = epoll.wait(60_000, &mut [EpollEvent::default()]).unwrap();
    assert_eq!(ready, 1, "not rung in time");
    fd.read().unwrap()
}

pub fn request(id: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [id, 1, payload.len() as u32] {
        bytes.extend_from_slice(&field.to_ne_bytes());
    }
    bytes.extend_from_slice(payload);
    bytes
}

/// True if the other side has closed.
pub fn is_closed(socket: &mut UnixStream) -> bool {
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut buf = [0; 4096];
    loop {
        match socket.read(&mut buf) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
