// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scripts: the requests that an operation or a replay consists of, in order.

use super::inflight::Place;
use super::record::{Notify, QueueVectors, Record};
use super::types::{Op, Outgoing, QueueSetup, ResumeAt, Target};
use super::windows::{Backing, Change, CommonView, LentWindow};
use std::collections::VecDeque;
use virtio_msg::{
    ConfigData, DevNum, DeviceStatus, FeatureBlocks, FeatureSet, Frame, Generation, MAX_BLOCKS,
    Message, QueueIndex, QueueSize, Token, U32, VqueueConfig, feature,
};
use vmsg_bus::Capabilities;
use vmsg_bus::control::{
    self, BackingAdd, COMMON_BACKING, MAX_PAYLOAD, QueueInflight, QueueNotify, Request, Resume,
    ViewAdd, WindowAdd, window_of_device,
};
use vmsg_mem::BusAddr;

/// Where the byte `writeback` of a disk's configuration is (virtio 1.3, 5.2.4).
pub(super) const WRITE_CACHE: u32 = 32;

/// How often configuration is written again that was written just when the device had changed it.
const CONFIG_TRIES: u8 = 4;

/// How many device numbers are asked for with one GET_DEVICES.
pub(super) const DEVICES_AT_ONCE: u16 = 256;

/// One request of a script, or one event to send.
#[derive(Clone, Debug)]
pub(super) enum Step {
    ListDevices {
        offset: u16,
    },
    NameOf(DevNum),
    Info,
    Features,
    QueueInfo(u32),
    /// The next piece of the configuration read that is under way.
    ConfigPiece,
    /// Only the generation.
    Generation,
    WriteConfig {
        offset: u32,
        data: Vec<u8>,
        tries: u8,
    },
    Claim {
        release: bool,
    },
    WindowAdd {
        window: LentWindow,
        more: bool,
    },
    WindowRemove {
        id: u32,
        more: bool,
        /// Of this device only.
        own: bool,
    },
    BackingAdd(Backing),
    BackingRemove(u32),
    ViewAdd {
        window: LentWindow,
        backing: u32,
        more: bool,
    },
    /// A part of the common memory becomes a window, or a part of one.
    CommonView {
        view: CommonView,
        more: bool,
    },
    Vectors {
        queue: u32,
        vectors: QueueVectors,
    },
    Region(u8),
    Status(DeviceStatus),
    DriverFeatures(FeatureSet),
    Notify {
        queue: u32,
        notify: Notify,
    },
    Resume {
        queue: u32,
        at: ResumeAt,
    },
    Inflight {
        queue: u32,
        place: Place,
    },
    SetQueue {
        queue: u32,
        setup: QueueSetup,
    },
    /// SET_VQUEUE is answered the same whether or not it was done: only looking tells.
    CheckQueue {
        queue: u32,
        setup: QueueSetup,
    },
    ResetQueue(u32),
    /// Nothing is sent: the queues are begun anew on this side.
    Renew,
    /// An event: no answer comes.
    Kick(u32),
}

impl Step {
    pub(super) fn wants_answer(&self) -> bool {
        !matches!(self, Step::Kick(_))
    }

    /// The bus message of our own that the step is, if it is one.
    pub(super) fn control(&self, device: DevNum) -> Option<Request> {
        Some(match self {
            Step::NameOf(dev) => Request::DeviceName(*dev),
            Step::Claim { release } => Request::Claim {
                dev: device,
                release: *release,
            },
            Step::WindowAdd { window, more } => Request::WindowAdd(WindowAdd {
                id: window.id,
                writable: window.window.writable,
                base: BusAddr(window.window.base),
                len: window.window.len,
                file_offset: window.window.file_offset,
                more: *more,
            }),
            Step::WindowRemove { id, more, own } => Request::WindowRemove {
                id: if *own {
                    window_of_device(device, *id)
                } else {
                    *id
                },
                more: *more,
            },
            Step::BackingAdd(backing) => Request::BackingAdd(BackingAdd {
                id: backing.id,
                writable: backing.writable,
                len: backing.len,
                file_offset: 0,
            }),
            Step::BackingRemove(id) => Request::BackingRemove { id: *id },
            Step::ViewAdd {
                window,
                backing,
                more,
            } => Request::ViewAdd(ViewAdd {
                id: window.id,
                writable: window.window.writable,
                backing: *backing,
                base: BusAddr(window.window.base),
                len: window.window.len,
                // Backings are whole files.
                offset: window.window.file_offset,
                more: *more,
            }),
            Step::CommonView { view, more } => Request::ViewAdd(ViewAdd {
                id: window_of_device(device, view.id),
                writable: view.writable,
                backing: COMMON_BACKING,
                base: BusAddr(view.base),
                len: view.len,
                offset: view.offset,
                more: *more,
            }),
            Step::Vectors { queue, vectors } => Request::QueueVectors(control::QueueVectors {
                dev: device,
                queue: QueueIndex(*queue),
                kick: vectors.kick,
                call: vectors.call,
            }),
            Step::Region(id) => Request::SharedMemory {
                dev: device,
                id: u32::from(*id),
            },
            Step::Notify { queue, notify } => Request::QueueNotify(QueueNotify {
                dev: device,
                queue: QueueIndex(*queue),
                kick: notify.kick.is_some(),
                call: notify.call.is_some(),
            }),
            Step::Resume { queue, at } => Request::QueueResume {
                dev: device,
                queue: QueueIndex(*queue),
                from: match at {
                    ResumeAt::Start => Resume::At {
                        avail_idx: 0,
                        used_idx: 0,
                    },
                    ResumeAt::UsedIndex => Resume::UsedInRing,
                    ResumeAt::Explicit { avail, used } => Resume::At {
                        avail_idx: *avail,
                        used_idx: *used,
                    },
                },
            },
            Step::Inflight { queue, place } => Request::QueueInflight(QueueInflight {
                dev: device,
                queue: QueueIndex(*queue),
                resume: place.resume,
                offset: place.offset,
                len: place.len,
            }),
            _ => return None,
        })
    }

    /// The message, with its descriptors.
    pub(super) fn encode(&self, env: &Env) -> Outgoing {
        let mut words = [U32::new(0); MAX_BLOCKS];
        let mut payload = [0; MAX_PAYLOAD];
        let message = if let Some(request) = self.control(env.device) {
            let len = request.encode(&mut payload).expect("enough for all");
            Message::BusSpecific {
                id: request.id(),
                response: false,
                payload: &payload[..len],
            }
        } else {
            self.message(env, &mut words)
        };
        let fds = match self {
            Step::WindowAdd { window, .. } => vec![window.window.fd.clone()],
            Step::BackingAdd(backing) => vec![backing.fd.clone()],
            Step::Inflight { place, .. } => vec![place.file.clone()],
            Step::Notify { notify, .. } => [&notify.kick, &notify.call]
                .into_iter()
                .flatten()
                .cloned()
                .collect(),
            _ => Vec::new(),
        };
        let token = if self.wants_answer() {
            env.token
        } else {
            Token(0)
        };
        let dev_num = if message.is_bus() {
            DevNum(0)
        } else {
            env.device
        };
        let mut bytes = vec![0; env.max_message_size];
        let len = Frame::new(dev_num, token, message)
            .encode(&mut bytes)
            .expect("requests fit the smallest message size");
        bytes.truncate(len);
        Outgoing { bytes, fds }
    }

    /// The standard message that the step is.
    fn message<'a>(&'a self, env: &Env, words: &'a mut [U32; MAX_BLOCKS]) -> Message<'a> {
        match self {
            Step::ListDevices { offset } => Message::GetDevices {
                offset: *offset,
                count: DEVICES_AT_ONCE.min(env.devices_per_message()),
            },
            Step::Info => Message::GetDeviceInfo,
            Step::Features => Message::GetDeviceFeatures {
                first: 0,
                count: env.feature_blocks,
            },
            Step::QueueInfo(queue) | Step::CheckQueue { queue, .. } => {
                Message::GetVqueue(QueueIndex(*queue))
            }
            Step::ConfigPiece => Message::GetConfig {
                offset: env.config_piece.0,
                len: env.config_piece.1,
            },
            Step::Generation => Message::GetConfig { offset: 0, len: 0 },
            Step::WriteConfig { offset, data, .. } => Message::SetConfig(ConfigData {
                generation: Generation(env.generation),
                offset: *offset,
                len: u32::try_from(data.len()).unwrap_or(u32::MAX),
                data,
            }),
            Step::Status(status) => Message::SetDeviceStatus(*status),
            Step::DriverFeatures(features) => {
                let mut features = *features;
                if env.access_platform {
                    features.insert(feature::ACCESS_PLATFORM);
                }
                for (i, word) in (0..).zip(words.iter_mut()) {
                    word.set(features.block(i));
                }
                let count = usize::try_from(env.feature_blocks)
                    .unwrap_or(MAX_BLOCKS)
                    .min(MAX_BLOCKS);
                Message::SetDriverFeatures(FeatureBlocks {
                    first: 0,
                    count: env.feature_blocks,
                    words: &words[..count],
                })
            }
            Step::SetQueue { queue, setup } => Message::SetVqueue(VqueueConfig {
                index: QueueIndex(*queue),
                size: QueueSize(setup.size.into()),
                descriptor: setup.descriptor,
                driver: setup.driver,
                device: setup.device,
            }),
            Step::ResetQueue(queue) => Message::ResetVqueue(QueueIndex(*queue)),
            Step::Kick(queue) => Message::EventAvail {
                queue: QueueIndex(*queue),
                next: 0,
            },
            Step::Renew
            | Step::NameOf(_)
            | Step::Claim { .. }
            | Step::WindowAdd { .. }
            | Step::WindowRemove { .. }
            | Step::BackingAdd(_)
            | Step::BackingRemove(_)
            | Step::ViewAdd { .. }
            | Step::CommonView { .. }
            | Step::Vectors { .. }
            | Step::Region(_)
            | Step::Notify { .. }
            | Step::Inflight { .. }
            | Step::Resume { .. } => unreachable!("those are bus messages of our own, or none"),
        }
    }
}

/// Configuration data that fit one message: header 8, generation, offset and length 12.
pub(super) fn data_per_message(max_message_size: usize) -> usize {
    max_message_size - 20
}

/// What steps need to become messages.
pub(super) struct Env {
    pub(super) device: DevNum,
    pub(super) token: Token,
    pub(super) feature_blocks: u32,
    /// Bus addresses are what ACCESS_PLATFORM is about: it is accepted whenever it is offered, whatever the guest knows of it. QEMU's
    /// devices insist on it.
    pub(super) access_platform: bool,
    pub(super) generation: u32,
    /// Offset and length.
    pub(super) config_piece: (u32, u32),
    pub(super) max_message_size: usize,
}

impl Env {
    /// The bitmap of the answer to GET_DEVICES follows 14 bytes; counts are multiples of 8.
    fn devices_per_message(&self) -> u16 {
        u16::try_from(self.max_message_size.saturating_sub(14).saturating_mul(8)).unwrap_or(!7)
    }
}

/// How to find out what the device is.
pub(super) fn probe(target: &Target) -> VecDeque<Step> {
    match target {
        Target::Number(_) => VecDeque::from([Step::Info]),
        Target::Name(_) => VecDeque::from([Step::ListDevices { offset: 0 }]),
    }
}

/// Brings a device, freshly found, to where the guest believes it is.
pub(super) fn replay(record: &Record, caps: &Capabilities, renew: bool) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    if record.is_blank() {
        return steps;
    }
    if caps.claims && record.claimed {
        steps.push_back(Step::Claim { release: false });
    }
    steps.extend(change_windows(record.windows.replay(), caps));
    if !record.is_negotiated() {
        return steps;
    }
    let status = record.status & !DeviceStatus::NEEDS_RESET;
    steps.push_back(Step::Status(DeviceStatus::RESET));
    for bit in [
        DeviceStatus::ACKNOWLEDGE,
        DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER,
    ] {
        if status.contains(bit) {
            steps.push_back(Step::Status(bit));
        }
    }
    if status.contains(DeviceStatus::FEATURES_OK) || !record.features.is_empty() {
        steps.push_back(Step::DriverFeatures(record.features));
    }
    if status.contains(DeviceStatus::FEATURES_OK) {
        steps.push_back(Step::Status(status & !DeviceStatus::DRIVER_OK));
    }
    if let Some(byte) = record.write_cache {
        steps.push_back(Step::WriteConfig {
            offset: WRITE_CACHE,
            data: vec![byte],
            tries: CONFIG_TRIES,
        });
    }
    if renew {
        steps.push_back(Step::Renew);
    }
    for (&queue, setup) in &record.queues {
        steps.extend(set_queue(queue, setup, record, caps));
    }
    if record.is_live() {
        steps.push_back(Step::Status(status));
        steps.extend(record.queues.keys().map(|&queue| Step::Kick(queue)));
    }
    steps
}

/// Notification descriptors, where to begin, and the queue itself.
pub(super) fn set_queue(
    queue: u32,
    setup: &QueueSetup,
    record: &Record,
    caps: &Capabilities,
) -> impl Iterator<Item = Step> + use<> {
    let notify = record
        .notify()
        .get(&queue)
        .filter(|_| caps.out_of_band_notify && caps.passes_fds);
    let notify = notify.map(|notify| Step::Notify {
        queue,
        notify: notify.clone(),
    });
    let vectors = record
        .next_vectors(queue)
        .filter(|_| caps.queue_vectors)
        .map(|vectors| Step::Vectors { queue, vectors });
    // Elsewhere the device begins at the used index that stands in the ring, or it is not asked to (`Session::can_resume`).
    let resume =
        (setup.resume != ResumeAt::Start && caps.runtime_windows).then_some(Step::Resume {
            queue,
            at: setup.resume,
        });
    let inflight = record.inflight.place(queue, setup, caps);
    let inflight = inflight.map(|place| Step::Inflight { queue, place });
    let before = notify.into_iter().chain(vectors);
    before.chain(resume).chain(inflight).chain([
        Step::SetQueue {
            queue,
            setup: *setup,
        },
        Step::CheckQueue {
            queue,
            setup: *setup,
        },
    ])
}

/// A change of the windows, to be applied as one. Nothing where memory is in common and not lent.
pub(super) fn change_windows(change: Change, caps: &Capabilities) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    if !caps.runtime_windows {
        return steps;
    }
    if caps.views {
        steps.extend(change.backings.into_iter().map(Step::BackingAdd));
    }
    let more = true;
    let gone = change.remove.iter().flat_map(LentWindow::ids);
    let own = caps.has_common_views();
    steps.extend(gone.map(|&id| Step::WindowRemove { id, more, own }));
    for window in change.add {
        if let Some(views) = &window.views {
            let views = views.of(&window.window);
            steps.extend(views.map(|view| Step::CommonView { view, more }));
            continue;
        }
        steps.push_back(match window.backing.filter(|_| caps.views) {
            Some(backing) => Step::ViewAdd {
                window,
                backing,
                more,
            },
            None => Step::WindowAdd { window, more },
        });
    }
    if let Some(
        Step::WindowRemove { more, .. }
        | Step::WindowAdd { more, .. }
        | Step::ViewAdd { more, .. }
        | Step::CommonView { more, .. },
    ) = steps.back_mut()
    {
        *more = false;
    }
    steps
}

/// The script of an operation; for windows `planned` has the table. Reads of the configuration are set up by the caller.
pub(super) fn of_op(
    op: &Op,
    planned: &Change,
    record: &Record,
    caps: &Capabilities,
) -> VecDeque<Step> {
    let mut steps = VecDeque::new();
    match op {
        Op::Describe | Op::KeepInflight(_) | Op::SetRenewal(_) => {}
        Op::Claim => {
            if caps.claims && !record.claimed {
                steps.push_back(Step::Claim { release: false });
            }
        }
        Op::SetWindows(_) | Op::ChangeWindows { .. } => {
            steps = change_windows(planned.clone(), caps);
        }
        Op::SharedMemory(id) => {
            if caps.shared_memory && caps.passes_fds {
                steps.push_back(Step::Region(*id));
            }
        }
        Op::SetFeatures(features) => steps.push_back(Step::DriverFeatures(*features)),
        Op::SetStatus(status) => {
            steps.push_back(Step::Status(*status));
            if status.contains(DeviceStatus::DRIVER_OK) && !record.is_live() {
                steps.extend(record.queues.keys().map(|&queue| Step::Kick(queue)));
            }
        }
        Op::SetQueue(queue, setup) => {
            steps.extend(set_queue(queue.0, setup, record, caps));
            if record.is_live() {
                steps.push_back(Step::Kick(queue.0));
            }
        }
        Op::StopQueue(queue) => {
            if record.queues.contains_key(&queue.0) {
                steps.push_back(Step::ResetQueue(queue.0));
            }
        }
        Op::SetNotify { queue, kick, call } => {
            if record.queues.contains_key(&queue.0) && caps.out_of_band_notify && caps.passes_fds {
                steps.push_back(Step::Notify {
                    queue: queue.0,
                    notify: Notify {
                        kick: kick.clone(),
                        call: call.clone(),
                    },
                });
            }
        }
        Op::ReadConfig { .. } => steps.push_back(Step::ConfigPiece),
        Op::WriteConfig { offset, data } => {
            let piece = data_per_message(caps.max_message_size);
            let pieces = (0u32..).zip(data.chunks(piece));
            steps.extend(pieces.map(|(i, data)| Step::WriteConfig {
                // Within configuration space, as was checked.
                offset: *offset + i * u32::try_from(piece).unwrap_or(u32::MAX),
                data: data.to_vec(),
                tries: CONFIG_TRIES,
            }));
        }
        Op::Release => {
            if record.is_negotiated() {
                steps.push_back(Step::Status(DeviceStatus::RESET));
            }
            steps.extend(change_windows(record.windows.takeback(), caps));
            if caps.views {
                let backings = record.windows.backings();
                steps.extend(backings.map(|backing| Step::BackingRemove(backing.id)));
            }
            if caps.claims && record.claimed {
                steps.push_back(Step::Claim { release: true });
            }
        }
    }
    steps
}
