// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host as QEMU is one, on a bus of 48-byte messages.

use std::collections::BTreeMap;
use virtio_msg::{
    ConfigData, DevNum, DeviceBitmap, DeviceInfo, DeviceStatus, FeatureBlocks, FeatureSet,
    Generation, Message, QueueSize, Token, U32, VqueueConfig, VqueueInfo, decode,
};
use vmsg_bus::control::{Request, Status};

pub(crate) const SIZE: usize = 48;
pub(crate) const PLATFORM: u32 = 33;
const QEMU: u32 = u32::from_le_bytes(*b"QEMU");

/// A device as QEMU's message core has it.
pub(crate) struct Qemu {
    pub(crate) number: DevNum,
    pub(crate) vendor: u32,
    /// Answers DEVICE_NAME, which QEMU itself does not.
    pub(crate) name: Option<&'static str>,
    pub(crate) offered: FeatureSet,
    pub(crate) max_sizes: Vec<u32>,
    pub(crate) config: Vec<u8>,
    pub(crate) status: DeviceStatus,
    pub(crate) features: FeatureSet,
    pub(crate) queues: BTreeMap<u32, VqueueConfig>,
    pub(crate) echoes_addresses: bool,
    pub(crate) is_silent: bool,
    /// Requests left without an answer.
    pub(crate) dropped: Vec<String>,
    pub(crate) kicks: Vec<u32>,
    pub(crate) log: Vec<String>,
}

impl Qemu {
    pub(crate) fn net() -> Qemu {
        Qemu {
            number: DevNum(0),
            vendor: QEMU,
            name: None,
            offered: FeatureSet::from_bits(&[5, 16, 28, 29, 32, PLATFORM]),
            max_sizes: vec![256, 256, 64],
            config: vec![0x52, 0x54, 0, 0x12, 0x34, 0x56, 1, 0],
            status: DeviceStatus::RESET,
            features: FeatureSet::EMPTY,
            queues: BTreeMap::new(),
            echoes_addresses: true,
            is_silent: false,
            dropped: Vec::new(),
            kicks: Vec::new(),
            log: Vec::new(),
        }
    }

    pub(crate) fn handle(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let frame = decode(bytes, SIZE).expect("whole messages of at most 48 bytes");
        self.log.push(frame.message.to_string());
        if self.is_silent {
            return None;
        }
        let mut words = [U32::new(0); 2];
        let mut payload = [0; 40];
        let mut bits = [0; 4];
        let data;
        let mut frame = frame;
        let message = match frame.message {
            Message::GetDevices { offset, .. } => {
                // Whatever was asked for and with which token.
                frame.token = Token(0);
                if let Some(at) = self.number.0.checked_sub(offset).filter(|at| *at < 32) {
                    bits[usize::from(at / 8)] = 1 << (at % 8);
                }
                Message::Devices(DeviceBitmap {
                    offset,
                    count: 32,
                    next: offset.wrapping_add(32),
                    bitmap: &bits,
                })
            }
            Message::BusSpecific {
                id,
                payload: request,
                ..
            } => match (Request::decode(id, request), self.name) {
                (Ok(request @ Request::DeviceName(dev)), Some(name)) => {
                    let (status, name) = if dev == self.number {
                        (Status::OK, name)
                    } else {
                        (Status::NOT_FOUND, "")
                    };
                    let len = request.response(status, name).encode(&mut payload).unwrap();
                    Message::BusSpecific {
                        id,
                        response: true,
                        payload: &payload[..len],
                    }
                }
                _ => {
                    self.dropped.push(frame.message.to_string());
                    return None;
                }
            },
            Message::GetDeviceInfo if frame.dev_num != self.number => {
                Message::DeviceInfo(DeviceInfo::ABSENT)
            }
            Message::GetDeviceInfo => Message::DeviceInfo(DeviceInfo {
                device_id: 1,
                vendor_id: self.vendor,
                feature_bits: 64,
                config_size: self.config.len() as u32,
                max_queues: self.max_sizes.len() as u32,
                ..DeviceInfo::ABSENT
            }),
            Message::GetDeviceFeatures { first: 0, count: 2 } => {
                for (i, word) in (0..).zip(&mut words) {
                    word.set(self.offered.block(i));
                }
                Message::DeviceFeatures(FeatureBlocks {
                    first: 0,
                    count: 2,
                    words: &words,
                })
            }
            Message::SetDriverFeatures(blocks) => {
                blocks.store(&mut self.features);
                Message::DriverFeaturesSet
            }
            Message::GetConfig { offset, len } if len <= 28 => {
                data = self.config[offset as usize..][..len as usize].to_vec();
                Message::Config(ConfigData {
                    generation: Generation(0),
                    offset,
                    len,
                    data: &data,
                })
            }
            Message::SetConfig(config) => {
                self.config[config.offset as usize..][..config.data.len()]
                    .copy_from_slice(config.data);
                Message::ConfigSet(config)
            }
            Message::SetDeviceStatus(status) => {
                let becomes_ok = status.contains(DeviceStatus::FEATURES_OK)
                    && !self.status.contains(DeviceStatus::FEATURES_OK);
                assert!(
                    !becomes_ok || !self.offered.bit(PLATFORM) || self.features.bit(PLATFORM),
                    "abort: iommu_platform=true is not supported by the driver"
                );
                self.status = status;
                if status.is_empty() {
                    self.queues.clear();
                    self.features = FeatureSet::EMPTY;
                }
                Message::DeviceStatusSet(status)
            }
            Message::GetVqueue(index) => {
                let max = self.max_sizes.get(index.to_usize()).copied().unwrap_or(0);
                let set = self.queues.get(&index.0).copied();
                let shown = set.filter(|_| self.echoes_addresses).unwrap_or_default();
                Message::Vqueue(VqueueInfo {
                    index,
                    max_size: QueueSize(max),
                    size: set.map_or(QueueSize(max), |set| set.size),
                    descriptor: shown.descriptor,
                    driver: shown.driver,
                    device: shown.device,
                })
            }
            Message::SetVqueue(queue) => {
                self.queues.insert(queue.index.0, queue);
                Message::VqueueSet
            }
            Message::ResetVqueue(index) => {
                assert!(index.to_usize() < self.max_sizes.len(), "crash");
                self.queues.remove(&index.0);
                Message::VqueueReset
            }
            Message::EventAvail { queue, .. } => {
                self.kicks.push(queue.0);
                return None;
            }
            other => {
                self.dropped.push(other.to_string());
                return None;
            }
        };
        let mut out = vec![0; SIZE];
        let len = frame.response(message).encode(&mut out).unwrap();
        out.truncate(len);
        Some(out)
    }
}
