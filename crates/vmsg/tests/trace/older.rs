// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Samples of the layouts before revision 1.

use virtio_msg::{DevNum, DeviceStatus, Generation, QueueIndex, QueueSize, VqueueConfig, r1};

use crate::samples::{Field, Sample};

/// Every message of r1.
pub(crate) fn r1() -> Vec<Sample> {
    use r1::Message as R1;
    let config = [
        ("virtio_msg.offset", 0x01_0203),
        ("virtio_msg.length", 2),
        ("virtio_msg.value", 0xdc05),
    ];
    let features: [Field; 2] = [
        ("virtio_msg.features.first", 0),
        ("virtio_msg.features.word", 0x1_0000_0020),
    ];
    let (index, queue) = (QueueIndex(1), ("virtio_msg.queue", 1));
    let (offset, size, data) = (0x01_0203, 2, 0xdc05);
    let status = DeviceStatus::DRIVER_OK;
    let driver_ok = [
        ("virtio_msg.status", 4),
        ("virtio_msg.status.driver_ok", 1),
        ("virtio_msg.status.failed", 0),
    ];
    let word = 0x1_0000_0020;
    let all: [(bool, R1, &str, &[Field]); 26] = [
        (true, R1::GetDeviceInfo, "DEVICE_INFO", &[]),
        (
            false,
            R1::DeviceInfo {
                version: 1,
                device_id: 4,
                vendor_id: 0x1af4,
            },
            "DEVICE_INFO",
            &[
                ("virtio_msg.version", 1),
                ("virtio_msg.device_id", 4),
                ("virtio_msg.vendor_id", 0x1af4),
            ],
        ),
        (
            true,
            R1::GetFeatures { index: 0 },
            "GET_FEATURES",
            &features[..1],
        ),
        (
            false,
            R1::Features {
                index: 0,
                features: word,
            },
            "GET_FEATURES",
            &features,
        ),
        (
            true,
            R1::SetFeatures {
                index: 0,
                features: word,
            },
            "SET_FEATURES",
            &features,
        ),
        (
            false,
            R1::FeaturesSet {
                index: 0,
                features: word,
            },
            "SET_FEATURES",
            &features,
        ),
        (
            true,
            R1::GetConfig { offset, size },
            "GET_CONFIG",
            &config[..2],
        ),
        (
            false,
            R1::Config { offset, size, data },
            "GET_CONFIG",
            &config,
        ),
        (
            true,
            R1::SetConfig { offset, size, data },
            "SET_CONFIG",
            &config,
        ),
        (
            false,
            R1::ConfigSet { offset, size, data },
            "SET_CONFIG",
            &config,
        ),
        (true, R1::GetConfigGen, "GET_CONFIG_GEN", &[]),
        (
            false,
            R1::ConfigGen(Generation(9)),
            "GET_CONFIG_GEN",
            &[("virtio_msg.generation", 9)],
        ),
        (true, R1::GetDeviceStatus, "GET_DEVICE_STATUS", &[]),
        (
            false,
            R1::DeviceStatus(status),
            "GET_DEVICE_STATUS",
            &driver_ok,
        ),
        (
            true,
            R1::SetDeviceStatus(status),
            "SET_DEVICE_STATUS",
            &driver_ok,
        ),
        (true, R1::GetVqueue(index), "GET_VQUEUE", &[queue]),
        (
            false,
            R1::Vqueue {
                index,
                max_size: QueueSize(256),
            },
            "GET_VQUEUE",
            &[queue, ("virtio_msg.queue.max_size", 256)],
        ),
        (
            true,
            R1::SetVqueue(VqueueConfig {
                index,
                size: QueueSize(64),
                descriptor: 0x1000,
                driver: 0x2000,
                device: 0x1_0000_0000,
            }),
            "SET_VQUEUE",
            &[
                queue,
                ("virtio_msg.queue.size", 64),
                ("virtio_msg.queue.descriptor", 0x1000),
                ("virtio_msg.queue.driver", 0x2000),
                ("virtio_msg.queue.device", 0x1_0000_0000),
            ],
        ),
        (true, R1::ResetVqueue(index), "RESET_VQUEUE", &[queue]),
        (
            false,
            R1::EventConfig {
                status,
                offset,
                size: 2,
                value: [1; 16],
            },
            "EVENT_CONFIG",
            &[driver_ok[0], config[0], config[1]],
        ),
        (
            true,
            R1::EventAvail {
                queue: index,
                next_offset: 5,
                next_wrap: 1,
            },
            "EVENT_AVAIL",
            &[
                queue,
                ("virtio_msg.next_offset", 5),
                ("virtio_msg.next_wrap", 1),
            ],
        ),
        (
            false,
            R1::EventUsed { queue: index },
            "EVENT_USED",
            &[queue],
        ),
        (
            true,
            R1::IommuEnable(true),
            "IOMMU_ENABLE",
            &[("virtio_msg.iommu.enable", 1)],
        ),
        (
            false,
            R1::IommuTranslate {
                va: 0x7000,
                prot: 3,
            },
            "IOMMU_TRANSLATE",
            &[
                ("virtio_msg.iommu.va", 0x7000),
                ("virtio_msg.iommu.prot", 3),
            ],
        ),
        (
            true,
            R1::IommuTranslated {
                va: 0x7000,
                pa: 0x4000_7000,
                prot: 1,
            },
            "IOMMU_TRANSLATE",
            &[
                ("virtio_msg.iommu.va", 0x7000),
                ("virtio_msg.iommu.pa", 0x4000_7000),
                ("virtio_msg.iommu.prot", 1),
            ],
        ),
        (
            true,
            R1::SetDeviceStatus(DeviceStatus::RESET),
            "SET_DEVICE_STATUS",
            &[("virtio_msg.status", 0)],
        ),
    ];
    all.into_iter()
        .map(|(to_device, message, name, fields)| Sample {
            to_device,
            bytes: r1::Frame::new(DevNum(0), message).to_bytes().to_vec(),
            fds: 0,
            name,
            fields: fields.to_vec(),
            texts: Vec::new(),
        })
        .collect()
}

/// Type, id, name, payload, and what is shown.
type Bytes<'a> = (u8, u8, &'static str, &'a [u8], &'a [Field]);

/// Messages of the short layout, byte by byte: those that differ from revision 1, and a few that do not. Each with zeros up to 44 bytes.
pub(crate) fn short() -> Vec<Sample> {
    let queue: &[Field] = &[
        ("virtio_msg.queue", 1),
        ("virtio_msg.queue.max_size", 256),
        ("virtio_msg.queue.size", 128),
        ("virtio_msg.queue.descriptor", 0x1_4000_0000),
        ("virtio_msg.queue.driver", 0x1_4000_1000),
        ("virtio_msg.queue.device", 0x1_4000_2000),
    ];
    let areas = [
        &[1, 0, 0, 0, 0, 1, 0, 0, 128, 0, 0, 0][..],
        &0x1_4000_0000u64.to_le_bytes(),
        &0x1_4000_1000u64.to_le_bytes(),
        &0x1_4000_2000u64.to_le_bytes(),
    ]
    .concat();
    let index: &[Field] = &[("virtio_msg.queue", 1)];
    let words: &[u8] = &[0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0, 0, 1, 0, 0, 0];
    let first: &[Field] = &[("virtio_msg.features.first", 0)];
    let config: &[u8] = &[7, 0, 0, 0, 4, 0, 0, 0, 2, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0];
    let piece: &[Field] = &[
        ("virtio_msg.generation", 7),
        ("virtio_msg.offset", 4),
        ("virtio_msg.length", 2),
    ];
    let range: &[u8] = &[4, 0, 0, 0, 2, 0, 0, 0];
    let ping: &[Field] = &[("virtio_msg.ping.data", 9)];
    let all: [Bytes<'_>; 14] = [
        (0, 0x03, "GET_DEVICE_FEATURES", &words[..8], first),
        (1, 0x03, "GET_DEVICE_FEATURES", words, first),
        (0, 0x04, "SET_DRIVER_FEATURES", words, first),
        (1, 0x04, "SET_DRIVER_FEATURES", words, &[]),
        (0, 0x05, "GET_CONFIG", range, &piece[1..]),
        (1, 0x05, "GET_CONFIG", config, piece),
        (0, 0x06, "SET_CONFIG", config, piece),
        (1, 0x06, "SET_CONFIG", config, piece),
        (0, 0x09, "GET_VQUEUE", &[1, 0, 0, 0], index),
        (1, 0x09, "GET_VQUEUE", &areas, queue),
        (0, 0x0a, "SET_VQUEUE", &areas, queue),
        (1, 0x0a, "SET_VQUEUE", &[], &[]),
        (2, 0x03, "PING", &[9, 0, 0, 0], ping),
        (3, 0x03, "PING", &[9, 0, 0, 0], ping),
    ];
    all.into_iter()
        .map(|(kind, id, name, payload, fields)| {
            let size = u8::try_from(6 + payload.len()).expect("short");
            let mut bytes = [&[kind, id, 0, 0, size, 0][..], payload].concat();
            bytes.resize(44, 0);
            Sample {
                to_device: kind & 1 == 0,
                bytes,
                fds: 0,
                name,
                fields: fields.to_vec(),
                texts: Vec::new(),
            }
        })
        .collect()
}
