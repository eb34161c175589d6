// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host of few lines, for tests: one device, answers as the protocol says, remembers what it was told.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::cast_possible_truncation,
    reason = "each test program uses another part"
)]

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use virtio_msg::{
    ConfigData, DevNum, DeviceBitmap, DeviceInfo, DeviceStatus, FeatureBlocks, FeatureSet,
    Generation, Message, QueueSize, U32, VqueueConfig, VqueueInfo, decode,
};
use vmsg_bus::control::{
    self, BackingAdd, COMMON_BACKING, QueueInflight, QueueNotify, QueueVectors, Request, Resume,
    SharedMemory, Status, ViewAdd, WindowAdd,
};

pub const MAX: usize = 264;

#[derive(Debug)]
pub struct Host {
    pub number: DevNum,
    pub name: String,
    pub info: DeviceInfo,
    pub offered: FeatureSet,
    pub queue_sizes: Vec<u16>,
    pub config: Vec<u8>,
    pub generation: u32,
    /// Changes the generation at each read of configuration, this many times.
    pub unstable_reads: u32,
    pub status: DeviceStatus,
    pub features: FeatureSet,
    pub refuse_features: bool,
    /// Does not reset.
    pub refuse_reset: bool,
    pub queues: BTreeMap<u32, VqueueConfig>,
    pub resume: BTreeMap<u32, Resume>,
    pub inflight: BTreeMap<u32, QueueInflight>,
    pub inflight_files: BTreeMap<u32, OwnedFd>,
    pub inflight_answer: Status,
    /// Does not answer QUEUE_INFLIGHT at all.
    pub mute_inflight: bool,
    pub notify: BTreeMap<u32, (QueueNotify, Vec<OwnedFd>)>,
    pub windows: BTreeMap<u32, WindowAdd>,
    pub window_files: BTreeMap<u32, OwnedFd>,
    pub views: BTreeMap<u32, ViewAdd>,
    pub backings: BTreeMap<u32, (BackingAdd, OwnedFd)>,
    /// How VIEW_ADD is answered, if not done.
    pub refuse_views: Option<Status>,
    pub refuse_backings: bool,
    /// Bytes of the memory in common.
    pub common: Option<u64>,
    /// What each queue was told, and how that is answered if not done.
    pub vectors: BTreeMap<u32, QueueVectors>,
    pub refuse_vectors: Option<Status>,
    /// What SHARED_MEMORY is answered with, and how many times its file comes along.
    pub region: Option<(SharedMemory, Arc<OwnedFd>, usize)>,
    staged: Vec<Request>,
    staged_files: BTreeMap<u32, OwnedFd>,
    /// How often windows were changed, a staged set counting once.
    pub table_changes: u32,
    pub refuse_windows: bool,
    pub refuse_queues: bool,
    pub claimed: bool,
    pub held_by: Option<&'static str>,
    pub kicks: Vec<u32>,
    /// One line for each message.
    pub log: Vec<String>,
}

impl Host {
    /// An entropy device, or with `queues` = 3 and a configuration something like a network device.
    pub fn new(number: u16, name: &str, device_id: u32, queues: usize, config: &[u8]) -> Host {
        Host {
            number: DevNum(number),
            name: name.into(),
            info: DeviceInfo {
                device_id,
                vendor_id: 0x1af4,
                feature_bits: 64,
                config_size: config.len() as u32,
                max_queues: queues as u32,
                ..DeviceInfo::ABSENT
            },
            offered: FeatureSet::from_bits(&[28, 29, 32]),
            queue_sizes: vec![256; queues],
            config: config.to_vec(),
            generation: 1,
            unstable_reads: 0,
            status: DeviceStatus::RESET,
            features: FeatureSet::EMPTY,
            refuse_features: false,
            refuse_reset: false,
            queues: BTreeMap::new(),
            resume: BTreeMap::new(),
            inflight: BTreeMap::new(),
            inflight_files: BTreeMap::new(),
            inflight_answer: Status::OK,
            mute_inflight: false,
            notify: BTreeMap::new(),
            windows: BTreeMap::new(),
            window_files: BTreeMap::new(),
            views: BTreeMap::new(),
            backings: BTreeMap::new(),
            refuse_views: None,
            refuse_backings: false,
            common: None,
            vectors: BTreeMap::new(),
            refuse_vectors: None,
            region: None,
            staged: Vec::new(),
            staged_files: BTreeMap::new(),
            table_changes: 0,
            refuse_windows: false,
            refuse_queues: false,
            claimed: false,
            held_by: None,
            kicks: Vec::new(),
            log: Vec::new(),
        }
    }

    pub fn net() -> Host {
        Host::new(3, "net0", 1, 3, &[0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0])
    }

    pub fn rng() -> Host {
        Host::new(1, "rng0", 4, 1, &[])
    }

    /// What a restart leaves.
    pub fn restarted(&self) -> Host {
        let mut host = Host::new(
            self.number.0,
            &self.name,
            self.info.device_id,
            self.queue_sizes.len(),
            &self.config,
        );
        host.offered = self.offered;
        host.common = self.common;
        host
    }

    fn reset(&mut self) {
        self.status = DeviceStatus::RESET;
        self.features = FeatureSet::EMPTY;
        self.queues.clear();
        self.resume.clear();
        self.inflight.clear();
        self.inflight_files.clear();
        self.notify.clear();
        self.vectors.clear();
    }

    pub fn end_of_connection(&mut self) {
        self.reset();
        self.windows.clear();
        self.views.clear();
        self.backings.clear();
        self.window_files.clear();
        self.staged.clear();
        self.staged_files.clear();
        self.claimed = false;
    }

    pub fn handle(&mut self, bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Vec<u8>> {
        let frame = decode(bytes, MAX).expect("the session sends whole messages");
        self.log.push(format!("{}", frame.message));
        let mut words = [U32::new(0); 8];
        let mut payload = [0; 64];
        let bitmap;
        let data;
        let message = match frame.message {
            Message::GetDevices { offset, count } => {
                let mut bits = vec![0; usize::from(count / 8)];
                if let Some(at) = self.number.0.checked_sub(offset).filter(|at| *at < count) {
                    bits[usize::from(at / 8)] |= 1 << (at % 8);
                }
                // Another device in front of it, with another name.
                bits[0] |= 1;
                bitmap = bits;
                Message::Devices(DeviceBitmap {
                    offset,
                    count,
                    next: 0,
                    bitmap: &bitmap,
                })
            }
            Message::BusSpecific {
                id,
                payload: request,
                ..
            } => {
                let request = Request::decode(id, request).expect("a good request");
                if self.mute_inflight && matches!(request, Request::QueueInflight(_)) {
                    return None;
                }
                let (status, name) = self.control(request, fds);
                let mut response = request.response(status, &name);
                if let (Request::SharedMemory { .. }, Some((memory, ..))) = (request, &self.region)
                {
                    response.memory = Some(*memory);
                }
                let len = response.encode(&mut payload).unwrap();
                Message::BusSpecific {
                    id,
                    response: true,
                    payload: &payload[..len],
                }
            }
            Message::Ping { data } => Message::Pong { data },
            _ if frame.dev_num != self.number => match frame.message {
                Message::GetDeviceInfo => Message::DeviceInfo(DeviceInfo::ABSENT),
                _ => return None,
            },
            Message::GetDeviceInfo => Message::DeviceInfo(self.info),
            Message::GetDeviceFeatures { first, count } => {
                for i in 0..count {
                    words[i as usize].set(self.offered.block(first + i));
                }
                Message::DeviceFeatures(FeatureBlocks {
                    first,
                    count,
                    words: &words[..count as usize],
                })
            }
            Message::SetDriverFeatures(blocks) => {
                blocks.store(&mut self.features);
                Message::DriverFeaturesSet
            }
            Message::GetConfig { offset, len } => {
                if self.unstable_reads > 0 && len > 0 {
                    self.unstable_reads -= 1;
                    self.generation += 1;
                }
                data = self.config[offset as usize..(offset + len) as usize].to_vec();
                Message::Config(ConfigData {
                    generation: Generation(self.generation),
                    offset,
                    len,
                    data: &data,
                })
            }
            Message::SetConfig(config) => {
                let fresh = config.generation.0 == self.generation;
                if fresh {
                    self.generation += 1;
                    self.config[config.offset as usize..][..config.data.len()]
                        .copy_from_slice(config.data);
                }
                data = if fresh {
                    config.data.to_vec()
                } else {
                    Vec::new()
                };
                Message::ConfigSet(ConfigData {
                    generation: Generation(self.generation),
                    offset: config.offset,
                    len: data.len() as u32,
                    data: &data,
                })
            }
            Message::GetDeviceStatus => Message::DeviceStatus(self.status),
            Message::SetDeviceStatus(status) => {
                if status.is_empty() && self.refuse_reset {
                } else if status.is_empty() {
                    self.reset();
                } else {
                    self.status = status;
                    if self.refuse_features {
                        self.status.remove(DeviceStatus::FEATURES_OK);
                    }
                }
                Message::DeviceStatusSet(self.status)
            }
            Message::GetVqueue(index) => {
                let max = self.queue_sizes.get(index.to_usize()).copied().unwrap_or(0);
                let set = self.queues.get(&index.0).copied().unwrap_or_default();
                Message::Vqueue(VqueueInfo {
                    index,
                    max_size: QueueSize(max.into()),
                    size: set.size,
                    descriptor: set.descriptor,
                    driver: set.driver,
                    device: set.device,
                })
            }
            Message::SetVqueue(queue) => {
                if !self.refuse_queues {
                    self.queues.insert(queue.index.0, queue);
                }
                Message::VqueueSet
            }
            Message::ResetVqueue(index) => {
                self.queues.remove(&index.0);
                Message::VqueueReset
            }
            Message::EventAvail { queue, .. } => {
                self.kicks.push(queue.0);
                return None;
            }
            other => panic!("unexpected {other}"),
        };
        let mut out = vec![0; MAX];
        let len = frame.response(message).encode(&mut out).unwrap();
        out.truncate(len);
        Some(out)
    }

    fn control(&mut self, request: Request, mut fds: Vec<OwnedFd>) -> (Status, String) {
        let none = String::new();
        match request {
            Request::DeviceName(dev) if dev == self.number => (Status::OK, self.name.clone()),
            Request::DeviceName(DevNum(0)) => (Status::OK, "other".into()),
            Request::DeviceName(_) => (Status::NOT_FOUND, none),
            Request::Claim { release, .. } => match self.held_by {
                Some(holder) if !release => (Status::HELD, holder.into()),
                _ => {
                    self.claimed = !release;
                    (Status::OK, none)
                }
            },
            Request::WindowAdd(_) if self.refuse_windows => (Status::BAD_FD, none),
            Request::WindowAdd(add) => {
                if let Some(fd) = fds.pop() {
                    self.staged_files.insert(add.id, fd);
                }
                self.staged.push(request);
                self.change_table(add.more);
                (Status::OK, none)
            }
            Request::WindowRemove { more, .. } => {
                self.staged.push(request);
                self.change_table(more);
                (Status::OK, none)
            }
            Request::BackingAdd(_) if self.refuse_backings => (Status::BAD_FD, none),
            Request::BackingAdd(add) => {
                let old = self.backings.insert(add.id, (add, fds.remove(0)));
                assert!(old.is_none(), "backing id taken");
                (Status::OK, none)
            }
            Request::BackingRemove { id } => {
                assert!(self.views.values().all(|view| view.backing != id), "in use");
                self.backings.remove(&id).expect("the backing was there");
                (Status::OK, none)
            }
            Request::ViewAdd(view) => {
                if let Some(status) = self.refuse_views {
                    self.staged.clear();
                    return (status, none);
                }
                let (len, writable) = match (view.backing, self.common) {
                    (COMMON_BACKING, Some(len)) => (len, true),
                    (id, _) => {
                        let (backing, _) = &self.backings[&id];
                        (backing.len, backing.writable)
                    }
                };
                assert!(view.offset + view.len <= len, "outside of its backing");
                assert!(writable || !view.writable);
                self.staged.push(request);
                self.change_table(view.more);
                (Status::OK, none)
            }
            Request::SharedMemory { .. } => match self.region {
                Some(_) => (Status::OK, none),
                None => (Status::NOT_FOUND, none),
            },
            Request::QueueVectors(vectors) => {
                let status = self.refuse_vectors.unwrap_or(Status::OK);
                if status.is_ok() {
                    self.vectors.insert(vectors.queue.0, vectors);
                }
                (status, none)
            }
            Request::QueueNotify(notify) => {
                assert_eq!(fds.len(), notify.fds(), "descriptors of QUEUE_NOTIFY");
                self.notify.insert(notify.queue.0, (notify, fds));
                (Status::OK, none)
            }
            Request::QueueResume { queue, from, .. } => {
                self.resume.insert(queue.0, from);
                (Status::OK, none)
            }
            Request::QueueInflight(inflight) => {
                if self.inflight_answer.is_ok() {
                    self.inflight.insert(inflight.queue.0, inflight);
                    self.inflight_files.insert(inflight.queue.0, fds.remove(0));
                }
                (self.inflight_answer, none)
            }
            #[allow(unreachable_patterns)]
            other => panic!("unexpected {other:?}"),
        }
    }

    /// The descriptors that go with this answer.
    pub fn region_fds(&self, answer: &[u8]) -> Vec<OwnedFd> {
        match &self.region {
            Some((_, fd, times)) if answer[1] == control::id::SHARED_MEMORY => {
                let copies = (0..*times).map(|_| fd.try_clone().expect("a descriptor"));
                copies.collect()
            }
            _ => Vec::new(),
        }
    }

    fn change_table(&mut self, more: bool) {
        if more {
            return;
        }
        self.table_changes += 1;
        for change in std::mem::take(&mut self.staged) {
            match change {
                Request::WindowAdd(add) => {
                    for old in self.windows.values() {
                        assert!(
                            add.base.0 + add.len <= old.base.0
                                || old.base.0 + old.len <= add.base.0,
                            "windows overlap: {add:?} {old:?}"
                        );
                    }
                    assert!(
                        self.windows.insert(add.id, add).is_none(),
                        "window id taken"
                    );
                    if let Some(file) = self.staged_files.remove(&add.id) {
                        self.window_files.insert(add.id, file);
                    }
                }
                Request::ViewAdd(view) => {
                    // All against all takes its time.
                    for old in self.views.values().take(1000) {
                        assert!(
                            view.base.0 + view.len <= old.base.0
                                || old.base.0 + old.len <= view.base.0,
                            "views overlap: {view:?} {old:?}"
                        );
                    }
                    assert!(!self.windows.contains_key(&view.id), "window id taken");
                    assert!(
                        self.views.insert(view.id, view).is_none(),
                        "window id taken"
                    );
                }
                Request::WindowRemove { id, .. } => {
                    let view = self.views.remove(&id).is_some();
                    let window = self.windows.remove(&id).is_some();
                    assert!(view || window, "the window was there");
                    self.window_files.remove(&id);
                }
                _ => unreachable!(),
            }
        }
    }
}
