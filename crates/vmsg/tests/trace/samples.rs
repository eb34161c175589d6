// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One message of every kind, and what a dissector must show of it.

use virtio_msg::{
    ConfigData, ConfigEvent, DevNum, DeviceBitmap, DeviceInfo, DeviceState, DeviceStatus,
    FeatureBlocks, Frame, Generation, Message, QueueIndex, QueueSize, ShmInfo, Token, U32,
    VqueueConfig, VqueueInfo,
};

/// Name and value of a field.
pub(crate) type Field = (&'static str, u64);

pub(crate) struct Sample {
    pub(crate) to_device: bool,
    pub(crate) bytes: Vec<u8>,
    pub(crate) fds: usize,
    pub(crate) name: &'static str,
    pub(crate) fields: Vec<Field>,
    /// Texts: name of the field and its value.
    pub(crate) texts: Vec<(&'static str, &'static str)>,
}

fn sample(
    to_device: bool,
    frame: &Frame<'_>,
    name: &'static str,
    fields: &[Field],
    texts: &[(&'static str, &'static str)],
) -> Sample {
    let mut bytes = vec![0; 320];
    let len = frame.encode(&mut bytes).expect("room");
    bytes.truncate(len);
    Sample {
        to_device,
        bytes,
        fds: 0,
        name,
        fields: fields.to_vec(),
        texts: texts.to_vec(),
    }
}

/// Request, response, their name, and what is shown of each.
type Pair<'a> = (
    Message<'a>,
    Message<'a>,
    &'static str,
    &'a [Field],
    &'a [Field],
);

/// Every message of revision 1. A response follows its request.
pub(crate) fn transport() -> Vec<Sample> {
    let words = [U32::new(0x8000_0001), U32::new(2)];
    let blocks = FeatureBlocks {
        first: 1,
        count: 2,
        words: &words,
    };
    let data = ConfigData {
        generation: Generation(7),
        offset: 4,
        len: 3,
        data: b"\x01\x02\x03",
    };
    let config = [
        ("virtio_msg.generation", 7),
        ("virtio_msg.offset", 4),
        ("virtio_msg.length", 3),
    ];
    let config_data = [("virtio_msg.data", "01:02:03")];
    let queue = |max, size| {
        [
            ("virtio_msg.queue", 1),
            ("virtio_msg.queue.max_size", max),
            ("virtio_msg.queue.size", size),
            ("virtio_msg.queue.descriptor", 0x1_4000_0000),
            ("virtio_msg.queue.driver", 0x1_4000_1000),
            ("virtio_msg.queue.device", 0x1_4000_2000),
        ]
    };
    let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::FEATURES_OK | DeviceStatus::NEEDS_RESET;
    let flags = [
        ("virtio_msg.status", 0x49),
        ("virtio_msg.status.acknowledge", 1),
        ("virtio_msg.status.driver", 0),
        ("virtio_msg.status.driver_ok", 0),
        ("virtio_msg.status.features_ok", 1),
        ("virtio_msg.status.needs_reset", 1),
        ("virtio_msg.status.failed", 0),
    ];
    let blocks_range = [
        ("virtio_msg.features.first", 1),
        ("virtio_msg.features.count", 2),
    ];
    let pairs: [Pair<'_>; 11] = [
        (
            Message::GetDeviceInfo,
            Message::DeviceInfo(DeviceInfo {
                device_id: 1,
                vendor_id: 0x1af4,
                feature_bits: 64,
                config_size: 12,
                max_queues: 3,
                admin_first: 3,
                admin_count: 1,
            }),
            "GET_DEVICE_INFO",
            &[],
            &[
                ("virtio_msg.device_id", 1),
                ("virtio_msg.vendor_id", 0x1af4),
                ("virtio_msg.feature_bits", 64),
                ("virtio_msg.config_size", 12),
                ("virtio_msg.max_queues", 3),
                ("virtio_msg.admin_first", 3),
                ("virtio_msg.admin_count", 1),
            ],
        ),
        (
            Message::GetDeviceFeatures { first: 1, count: 2 },
            Message::DeviceFeatures(blocks),
            "GET_DEVICE_FEATURES",
            &blocks_range,
            &blocks_range,
        ),
        (
            Message::SetDriverFeatures(blocks),
            Message::DriverFeaturesSet,
            "SET_DRIVER_FEATURES",
            &blocks_range,
            &[],
        ),
        (
            Message::GetConfig { offset: 4, len: 3 },
            Message::Config(data),
            "GET_CONFIG",
            &config[1..],
            &config,
        ),
        (
            Message::SetConfig(data),
            Message::ConfigSet(data),
            "SET_CONFIG",
            &config,
            &config,
        ),
        (
            Message::GetDeviceStatus,
            Message::DeviceStatus(status),
            "GET_DEVICE_STATUS",
            &[],
            &flags,
        ),
        (
            Message::SetDeviceStatus(status),
            Message::DeviceStatusSet(status),
            "SET_DEVICE_STATUS",
            &flags,
            &flags,
        ),
        (
            Message::GetVqueue(QueueIndex(1)),
            Message::Vqueue(VqueueInfo {
                index: QueueIndex(1),
                max_size: QueueSize(256),
                size: QueueSize(128),
                descriptor: 0x1_4000_0000,
                driver: 0x1_4000_1000,
                device: 0x1_4000_2000,
            }),
            "GET_VQUEUE",
            &[("virtio_msg.queue", 1)],
            &queue(256, 128),
        ),
        (
            Message::SetVqueue(VqueueConfig {
                index: QueueIndex(1),
                size: QueueSize(128),
                descriptor: 0x1_4000_0000,
                driver: 0x1_4000_1000,
                device: 0x1_4000_2000,
            }),
            Message::VqueueSet,
            "SET_VQUEUE",
            &queue(0, 128)[2..],
            &[],
        ),
        (
            Message::ResetVqueue(QueueIndex(1)),
            Message::VqueueReset,
            "RESET_VQUEUE",
            &[("virtio_msg.queue", 1)],
            &[],
        ),
        (
            Message::GetShm { index: 2 },
            Message::Shm(ShmInfo {
                index: 2,
                len: 0x1000,
                address: 0xf000_0000,
            }),
            "GET_SHM",
            &[("virtio_msg.shm", 2)],
            &[
                ("virtio_msg.shm", 2),
                ("virtio_msg.shm.length", 0x1000),
                ("virtio_msg.shm.address", 0xf000_0000),
            ],
        ),
    ];
    let mut samples = Vec::new();
    for (i, (request, response, name, asked, answered)) in (1..).zip(pairs) {
        let frame = Frame::new(DevNum(5), Token(i), request);
        let texts = |message: &Message<'_>| match message {
            Message::Config(_) | Message::SetConfig(_) | Message::ConfigSet(_) => &config_data[..],
            _ => &[],
        };
        samples.push(sample(true, &frame, name, asked, texts(&request)));
        let answer = frame.response(response);
        samples.push(sample(false, &answer, name, answered, texts(&response)));
    }
    let event = |message| Frame::new(DevNum(5), Token(0), message);
    let config_event = Message::EventConfig(ConfigEvent {
        status,
        generation: Generation(7),
        offset: 4,
        len: 3,
        data: b"\x01\x02\x03",
    });
    let avail = Message::EventAvail {
        queue: QueueIndex(1),
        next: 0x8000_0009,
    };
    let used = Message::EventUsed {
        queue: QueueIndex(1),
    };
    let fields = [&flags[..], &config].concat();
    samples.push(sample(
        false,
        &event(config_event),
        "EVENT_CONFIG",
        &fields,
        &config_data,
    ));
    let fields = [
        ("virtio_msg.queue", 1),
        ("virtio_msg.next.offset", 9),
        ("virtio_msg.next.wrap", 1),
    ];
    samples.push(sample(true, &event(avail), "EVENT_AVAIL", &fields, &[]));
    let fields = [("virtio_msg.queue", 1)];
    samples.push(sample(false, &event(used), "EVENT_USED", &fields, &[]));
    samples
}

/// Every bus message, those of the unix bus included.
pub(crate) fn bus() -> Vec<Sample> {
    let devices = DeviceBitmap {
        offset: 8,
        count: 16,
        next: 24,
        bitmap: &[0x05, 0x80],
    };
    let offset = [
        ("virtio_msg.devices.offset", 8),
        ("virtio_msg.devices.count", 16),
    ];
    let ping = [("virtio_msg.ping.data", 0x1234_5678)];
    let frame = |token, message| Frame::bus(Token(token), message);
    let ask = Message::GetDevices {
        offset: 8,
        count: 16,
    };
    let found = [offset[0], offset[1], ("virtio_msg.devices.next", 24)];
    let data = 0x1234_5678;
    let ready = Message::EventDevice {
        device: DevNum(3),
        state: DeviceState::Ready,
    };
    let event = [("virtio_msg.device", 3), ("virtio_msg.state", 1)];
    let mut samples = vec![
        sample(true, &frame(1, ask), "GET_DEVICES", &offset, &[]),
        sample(
            false,
            &frame(1, Message::Devices(devices)),
            "GET_DEVICES",
            &found,
            &[("virtio_msg.devices.bitmap", "05:80")],
        ),
        sample(true, &frame(2, Message::Ping { data }), "PING", &ping, &[]),
        sample(false, &frame(2, Message::Pong { data }), "PING", &ping, &[]),
        // The device side asks with a number that the driver uses as well.
        sample(false, &frame(2, Message::Ping { data }), "PING", &ping, &[]),
        sample(true, &frame(2, Message::Pong { data }), "PING", &ping, &[]),
        sample(false, &frame(0, ready), "EVENT_DEVICE", &event, &[]),
    ];
    samples.extend(unix_bus());
    samples
}

/// docs/bus-unix.md §5, byte by byte.
fn unix_bus() -> Vec<Sample> {
    let done: &[u8] = &[0, 0, 0, 0];
    type Case = (
        u8,
        usize,
        &'static str,
        Vec<u8>,
        Vec<u8>,
        &'static [Field],
        &'static [Field],
    );
    let window = [
        &[7, 0, 0, 0, 3, 0, 0, 0][..],
        &0x4000_0000u64.to_le_bytes(),
        &0x1000u64.to_le_bytes(),
        &0x2000u64.to_le_bytes(),
    ]
    .concat();
    let inflight = [
        &[3, 0, 1, 0, 1, 0, 0, 0][..],
        &0x1000u64.to_le_bytes(),
        &0x2010u64.to_le_bytes(),
    ]
    .concat();
    let backing = [
        &[8, 0, 0, 0, 1, 0, 0, 0][..],
        &0x4000_0000u64.to_le_bytes(),
        &0x2000u64.to_le_bytes(),
    ]
    .concat();
    let view = [
        &[7, 0, 0, 0, 3, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0][..],
        &0xffff_f000u64.to_le_bytes(),
        &0x1000u64.to_le_bytes(),
        &0x3000u64.to_le_bytes(),
    ]
    .concat();
    let region = [
        &[3, 0, 0, 0, 0, 0, 0, 0][..],
        &0x8000u64.to_le_bytes(),
        &0x1000u64.to_le_bytes(),
    ]
    .concat();
    let cases: [Case; 12] = [
        (
            0x80,
            1,
            "WINDOW_ADD",
            window,
            [&[7, 0, 0, 0], done].concat(),
            &[
                ("virtio_msg.window", 7),
                ("virtio_msg.window.writable", 1),
                ("virtio_msg.window.more", 1),
                ("virtio_msg.window.base", 0x4000_0000),
                ("virtio_msg.window.length", 0x1000),
                ("virtio_msg.window.file_offset", 0x2000),
            ],
            &[("virtio_msg.window", 7), ("virtio_msg.result", 0)],
        ),
        (
            0x81,
            0,
            "WINDOW_REMOVE",
            vec![7, 0, 0, 0, 2, 0, 0, 0],
            vec![7, 0, 0, 0, 2, 0, 0, 0],
            &[("virtio_msg.window", 7), ("virtio_msg.window.more", 1)],
            &[("virtio_msg.window", 7), ("virtio_msg.result", 2)],
        ),
        (
            0x82,
            2,
            "QUEUE_NOTIFY",
            vec![3, 0, 2, 0, 1, 0, 0, 0],
            [&[3, 0, 2, 0], done].concat(),
            &[
                ("virtio_msg.device", 3),
                ("virtio_msg.notify.kick", 0),
                ("virtio_msg.notify.call", 1),
                ("virtio_msg.queue", 1),
            ],
            &[("virtio_msg.device", 3), ("virtio_msg.result", 0)],
        ),
        (
            0x83,
            0,
            "QUEUE_RESUME",
            vec![3, 0, 0, 0, 1, 0, 0, 0, 5, 0, 6, 1],
            [&[3, 0, 0, 0], done].concat(),
            &[
                ("virtio_msg.device", 3),
                ("virtio_msg.resume.mode", 0),
                ("virtio_msg.queue", 1),
                ("virtio_msg.resume.avail_idx", 5),
                ("virtio_msg.resume.used_idx", 262),
            ],
            &[("virtio_msg.device", 3), ("virtio_msg.result", 0)],
        ),
        (
            0x84,
            0,
            "CLAIM",
            vec![3, 0, 1, 0],
            [&[3, 0, 0, 0, 5, 0, 0, 0][..], b"other"].concat(),
            &[("virtio_msg.device", 3), ("virtio_msg.claim.release", 1)],
            &[("virtio_msg.device", 3), ("virtio_msg.result", 5)],
        ),
        (
            0x85,
            0,
            "DEVICE_NAME",
            vec![3, 0, 0, 0],
            [&[3, 0, 0, 0, 0, 0, 0, 0][..], b"net0"].concat(),
            &[("virtio_msg.device", 3)],
            &[("virtio_msg.device", 3), ("virtio_msg.result", 0)],
        ),
        (
            0x86,
            1,
            "QUEUE_INFLIGHT",
            inflight,
            [&[3, 0, 1, 0], done].concat(),
            &[
                ("virtio_msg.device", 3),
                ("virtio_msg.inflight.resume", 1),
                ("virtio_msg.queue", 1),
                ("virtio_msg.inflight.offset", 0x1000),
                ("virtio_msg.inflight.length", 0x2010),
            ],
            &[("virtio_msg.device", 3), ("virtio_msg.result", 0)],
        ),
        (
            0x87,
            1,
            "BACKING_ADD",
            backing,
            [&[8, 0, 0, 0], done].concat(),
            &[
                ("virtio_msg.backing", 8),
                ("virtio_msg.backing.writable", 1),
                ("virtio_msg.backing.length", 0x4000_0000),
                ("virtio_msg.backing.file_offset", 0x2000),
            ],
            &[("virtio_msg.backing", 8), ("virtio_msg.result", 0)],
        ),
        (
            0x88,
            0,
            "BACKING_REMOVE",
            vec![8, 0, 0, 0, 0, 0, 0, 0],
            vec![8, 0, 0, 0, 9, 0, 0, 0],
            &[("virtio_msg.backing", 8)],
            &[("virtio_msg.backing", 8), ("virtio_msg.result", 9)],
        ),
        (
            0x89,
            0,
            "VIEW_ADD",
            view,
            [&[7, 0, 0, 0], done].concat(),
            &[
                ("virtio_msg.window", 7),
                ("virtio_msg.window.writable", 1),
                ("virtio_msg.window.more", 1),
                ("virtio_msg.window.backing", 8),
                ("virtio_msg.window.base", 0xffff_f000),
                ("virtio_msg.window.length", 0x1000),
                ("virtio_msg.window.offset", 0x3000),
            ],
            &[("virtio_msg.window", 7), ("virtio_msg.result", 0)],
        ),
        (
            0x8a,
            0,
            "SHARED_MEMORY",
            vec![3, 0, 0, 0, 1, 0, 0, 0],
            region,
            &[("virtio_msg.device", 3), ("virtio_msg.region", 1)],
            &[
                ("virtio_msg.device", 3),
                ("virtio_msg.result", 0),
                ("virtio_msg.region.length", 0x8000),
                ("virtio_msg.region.file_offset", 0x1000),
            ],
        ),
        (
            0x8b,
            0,
            "QUEUE_VECTORS",
            vec![3, 0, 1, 0, 5, 0, 0xff, 0xff],
            [&[3, 0, 1, 0], done].concat(),
            &[
                ("virtio_msg.device", 3),
                ("virtio_msg.vectors.queue", 1),
                ("virtio_msg.vectors.kick", 5),
                ("virtio_msg.vectors.call", 0xffff),
            ],
            &[
                ("virtio_msg.device", 3),
                ("virtio_msg.vectors.queue", 1),
                ("virtio_msg.result", 0),
            ],
        ),
    ];
    let mut samples = Vec::new();
    for (id, fds, name, request, response, asked, answered) in cases {
        let message = |response, payload| {
            let message = Message::BusSpecific {
                id,
                response,
                payload,
            };
            Frame::bus(Token(u16::from(id)), message)
        };
        let texts: &[_] = match id {
            0x84 => &[("virtio_msg.peer", "other")],
            0x85 => &[("virtio_msg.peer", "net0")],
            _ => &[],
        };
        let mut ask = sample(true, &message(false, &request), name, asked, &[]);
        ask.fds = fds;
        samples.push(ask);
        let mut answer = sample(false, &message(true, &response), name, answered, texts);
        // Memory of the device comes with its file.
        answer.fds = usize::from(id == 0x8a);
        samples.push(answer);
    }
    samples
}
