// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the answers to the steps of a script mean. Each is checked against its request before anything of it is believed.

use super::machine::{ConfigRead, Failure, Job, MAX_CONFIG, Session};
use super::script::Step;
use super::types::{ResetReason, ResumeAt, SharedRegion, Target};
use super::windows::size;
use std::os::fd::AsFd;
use std::sync::Arc;
use virtio_msg::{DeviceStatus, FeatureSet, Message, QueueIndex, QueueSize};
use vmsg_bus::control::{Response, Status};

/// Devices looked at by name, at most.
const MAX_CANDIDATES: usize = 4096;

/// Names for people.
fn what(step: &Step) -> &'static str {
    match step {
        Step::WindowAdd { .. } => "WINDOW_ADD",
        Step::WindowRemove { .. } => "WINDOW_REMOVE",
        Step::BackingAdd(_) => "BACKING_ADD",
        Step::BackingRemove(_) => "BACKING_REMOVE",
        Step::ViewAdd { .. } | Step::CommonView { .. } => "VIEW_ADD",
        Step::Vectors { .. } => "QUEUE_VECTORS",
        Step::Region(_) => "SHARED_MEMORY",
        Step::Notify { .. } => "QUEUE_NOTIFY",
        Step::Resume { .. } => "QUEUE_RESUME",
        Step::Claim { .. } => "CLAIM",
        Step::NameOf(_) => "DEVICE_NAME",
        _ => "request",
    }
}

impl Session {
    /// `message` came in answer to `step`, and is the response with that id.
    pub(super) fn answer(&mut self, step: Step, message: Message<'_>) -> Result<(), Failure> {
        match (step, message) {
            (Step::ListDevices { offset }, Message::Devices(devices)) => {
                if devices.offset != offset {
                    return Err(Failure::Bad("GET_DEVICES answered for another range"));
                }
                let room = MAX_CANDIDATES.saturating_sub(self.candidates.len());
                self.candidates.extend(devices.iter().take(room));
                // Some devices never say 0 for "no more".
                if devices.count != 0 && devices.next > offset && room != 0 {
                    self.script.push_front(Step::ListDevices {
                        offset: devices.next,
                    });
                } else {
                    self.try_next_candidate()?;
                }
            }
            (Step::Info, Message::DeviceInfo(info)) => {
                if !info.is_present() {
                    return Err(Failure::Absent);
                }
                self.found.info = info;
                self.script.push_back(Step::Features);
                let queues = info.max_queues.min(self.options.max_queues);
                self.script.extend((0..queues).map(Step::QueueInfo));
                let size = info.config_size.min(MAX_CONFIG);
                self.record
                    .config
                    .resize(usize::try_from(size).unwrap_or(0), 0);
                if size != 0 {
                    self.config_read = Some(ConfigRead::new(0, size));
                    self.script.push_back(Step::ConfigPiece);
                }
            }
            (Step::Features, Message::DeviceFeatures(blocks)) => {
                if blocks.first != 0 {
                    return Err(Failure::Bad(
                        "GET_DEVICE_FEATURES answered for other blocks",
                    ));
                }
                let mut offered = FeatureSet::EMPTY;
                blocks.store(&mut offered);
                self.found.offered = offered;
            }
            (Step::QueueInfo(queue), Message::Vqueue(info)) => {
                if info.index != QueueIndex(queue) {
                    return Err(Failure::Bad("GET_VQUEUE answered for another queue"));
                }
                match info.max_size.to_u16() {
                    Some(size) => self.found.queue_sizes.push(size),
                    None if info.max_size == QueueSize(0) => {
                        // No such queue: there are none behind it either.
                        self.script
                            .retain(|step| !matches!(step, Step::QueueInfo(_)));
                    }
                    None => {
                        return Err(Failure::Bad("GET_VQUEUE answered with an impossible size"));
                    }
                }
            }
            (Step::CheckQueue { queue, setup }, Message::Vqueue(info)) => {
                if info.index != QueueIndex(queue) {
                    return Err(Failure::Bad("GET_VQUEUE answered for another queue"));
                }
                let there = (info.size, info.descriptor, info.driver, info.device);
                let wanted = (
                    QueueSize(setup.size.into()),
                    setup.descriptor,
                    setup.driver,
                    setup.device,
                );
                // Foreign device hosts need not say where the queue is.
                let says = self.caps.runtime_windows || (self.is_ours() && self.caps.enumerates);
                let mute = !says && (info.descriptor, info.driver, info.device) == (0, 0, 0);
                if there != wanted && !mute && setup.resume != ResumeAt::Start {
                    return Err(Failure::Reset(ResetReason::CannotResume { queue }));
                }
                if there != wanted && !mute {
                    return Err(Failure::Refused {
                        what: "SET_VQUEUE",
                        code: 0,
                    });
                }
            }
            (Step::ConfigPiece, Message::Config(data)) => {
                self.config_piece(data.generation.0, data.offset, data.data)?
            }
            (Step::Generation, Message::Config(data)) => self.record.generation = data.generation.0,
            (
                Step::WriteConfig {
                    offset,
                    data,
                    tries,
                },
                Message::ConfigSet(answer),
            ) => {
                self.record.generation = answer.generation.0;
                if answer.len == 0 && !data.is_empty() {
                    // Rejected: what the driver knew was old.
                    if tries == 0 {
                        return Err(Failure::Refused {
                            what: "SET_CONFIG",
                            code: 0,
                        });
                    }
                    self.script.push_front(Step::WriteConfig {
                        offset,
                        data,
                        tries: tries - 1,
                    });
                    self.script.push_front(Step::Generation);
                } else {
                    let now_there = if answer.data.len() == data.len() {
                        answer.data
                    } else {
                        &data
                    };
                    if let Some(byte) = self.write_cache_in(offset, &data) {
                        self.record.write_cache = Some(byte);
                    }
                    self.patch_config(offset, now_there);
                }
            }
            (Step::Status(asked), Message::DeviceStatusSet(status)) => {
                self.status_set(asked, status)?
            }
            (Step::DriverFeatures(_), Message::DriverFeaturesSet)
            | (Step::SetQueue { .. }, Message::VqueueSet)
            | (Step::ResetQueue(_), Message::VqueueReset) => {}
            (step, Message::BusSpecific { id, payload, .. }) => {
                let response = Response::decode(id, payload)
                    .map_err(|_| Failure::Bad("a bus message answered wrongly"))?;
                let subject = step
                    .control(self.found.number)
                    .map(|request| request.subject());
                // Some hosts echo only what CLAIM and DEVICE_NAME say is echoed; the upper half is free there.
                let lower_half =
                    matches!(step, Step::Claim { .. } | Step::NameOf(_) | Step::Region(_));
                let mask = if lower_half { 0xffff } else { u32::MAX };
                if subject.is_none_or(|subject| (subject ^ response.subject) & mask != 0) {
                    return Err(Failure::Bad("a bus message answered for something else"));
                }
                self.control_answer(step, &response)?;
            }
            _ => return Err(Failure::Bad("a request answered with something else")),
        }
        Ok(())
    }

    fn control_answer(&mut self, step: Step, response: &Response<'_>) -> Result<(), Failure> {
        match (&step, response.status) {
            (Step::Region(_), Status::OK) => self.region_answer(response)?,
            (Step::Region(_), Status::NOT_FOUND | Status::UNSUPPORTED) => self.region = None,
            (Step::BackingAdd(backing), Status::OK) => {
                self.record.windows.backing_added(backing.clone());
            }
            (Step::BackingRemove(id), Status::OK) => self.record.windows.backing_removed(*id),
            (Step::NameOf(dev), status) => {
                let wanted = matches!(&self.target, Target::Name(name) if status.is_ok() && name == response.name);
                if wanted {
                    self.found.number = *dev;
                    self.script.push_front(Step::Info);
                } else {
                    self.try_next_candidate()?;
                }
            }
            (Step::Inflight { .. }, status) => self.inflight_answered(status),
            (Step::Vectors { queue, vectors }, Status::OK) => {
                self.record.set_vectors(*queue, *vectors);
            }
            // Messages do as well.
            (Step::Vectors { .. }, _) => {}
            (Step::Claim { release: false }, Status::OK) => self.has_let_go(),
            (_, Status::OK) => {}
            (Step::Claim { release: true }, _) => {}
            (Step::Claim { .. }, Status::HELD) => {
                let holder = response.name.chars().filter(|c| !c.is_control()).collect();
                return Err(Failure::Held(holder));
            }
            (_, Status(code)) => {
                return Err(Failure::Refused {
                    what: what(&step),
                    code,
                });
            }
        }
        Ok(())
    }

    /// A region came with its file.
    fn region_answer(&mut self, response: &Response<'_>) -> Result<(), Failure> {
        let (Some(memory), Some(fd), true) = (response.memory, self.fds.pop(), self.fds.is_empty())
        else {
            return Err(Failure::Bad("a region without its file"));
        };
        let end = memory.file_offset.checked_add(memory.len);
        let Some(end) = end.filter(|_| memory.len != 0) else {
            return Err(Failure::Bad("a region of no or too many bytes"));
        };
        // Whoever maps it, which is not this process, is killed by a page that is not there.
        let is_safe = vmsg_mem::check_backing(fd.as_fd()).is_ok()
            && vmsg_mem::check_seals(fd.as_fd()).is_ok_and(|sealed| sealed)
            && size(&fd).is_some_and(|size| size >= end);
        if !is_safe {
            tracing::warn!(target = %self.target, "the device's shared memory is not used: its file is too short, can shrink, or is none");
        }
        self.region = is_safe.then(|| SharedRegion {
            len: memory.len,
            file_offset: memory.file_offset,
            fd: Arc::new(fd),
        });
        Ok(())
    }

    fn try_next_candidate(&mut self) -> Result<(), Failure> {
        let next = self.candidates.pop_front().ok_or(Failure::Absent)?;
        self.script.push_front(Step::NameOf(next));
        Ok(())
    }

    fn config_piece(&mut self, generation: u32, offset: u32, data: &[u8]) -> Result<(), Failure> {
        let max = self.max_data();
        let read = self
            .config_read
            .as_mut()
            .expect("a piece is asked for only while a read is under way");
        let (want_offset, want_len) = read.piece(max);
        if offset != want_offset || u32::try_from(data.len()) != Ok(want_len) {
            return Err(Failure::Bad("GET_CONFIG answered for another range"));
        }
        if read.generation.is_some_and(|first| first != generation) && read.tries > 0 {
            // It changed in between: from the start.
            read.tries -= 1;
            read.generation = None;
            read.data.clear();
            self.script.push_front(Step::ConfigPiece);
            return Ok(());
        }
        read.generation = Some(generation);
        read.data.extend_from_slice(data);
        if !read.is_whole() {
            self.script.push_front(Step::ConfigPiece);
            return Ok(());
        }
        let (offset, data) = (read.offset, read.data.clone());
        self.record.generation = generation;
        self.patch_config(offset, &data);
        if !matches!(self.job, Some(Job::Op { .. })) {
            self.config_read = None;
        }
        Ok(())
    }

    /// What a write of configuration says about the write cache, if this is a disk whose guest may choose.
    fn write_cache_in(&self, offset: u32, data: &[u8]) -> Option<u8> {
        const BLOCK: u32 = 2;
        const CONFIG_WCE: u32 = 11;
        let facts = self.facts.as_ref()?;
        if facts.info.device_id != BLOCK || !self.record.features.bit(CONFIG_WCE) {
            return None;
        }
        let at = super::script::WRITE_CACHE.checked_sub(offset)?;
        data.get(usize::try_from(at).ok()?).copied()
    }

    fn patch_config(&mut self, offset: u32, data: &[u8]) {
        let at = usize::try_from(offset).unwrap_or(usize::MAX);
        let place = at
            .checked_add(data.len())
            .and_then(|end| self.record.config.get_mut(at..end));
        if let Some(place) = place {
            place.copy_from_slice(data);
        }
    }

    fn status_set(&mut self, asked: DeviceStatus, status: DeviceStatus) -> Result<(), Failure> {
        if asked.is_empty() && !status.is_empty() {
            return Err(Failure::Bad("a reset was answered before it was complete"));
        }
        if asked.is_empty() {
            self.note_reset();
        }
        match &mut self.job {
            Some(Job::Op { status: result, .. }) => *result = status,
            _ => {
                if asked.contains(DeviceStatus::FEATURES_OK)
                    && !status.contains(DeviceStatus::FEATURES_OK)
                {
                    return Err(Failure::Reset(ResetReason::FeaturesRefused));
                }
                if status.contains(DeviceStatus::NEEDS_RESET) {
                    return Err(Failure::Reset(ResetReason::DeviceReported));
                }
                if status != asked && !asked.is_empty() && !status.contains(asked) {
                    // Somebody else holds the device, or it is out of order.
                    return Err(Failure::Refused {
                        what: "SET_DEVICE_STATUS",
                        code: status.bits(),
                    });
                }
            }
        }
        Ok(())
    }
}
