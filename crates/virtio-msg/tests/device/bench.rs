// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device machine with its owner, for tests.

use virtio_msg::device::{
    Action, ActionResult, Busy, DeviceMachine, Handled, Identity, Options, QueueSlot,
};
use virtio_msg::{
    ConfigData, DevNum, DeviceStatus, FeatureBlocks, FeatureSet, Frame, Generation, Instant,
    Message, QueueIndex, QueueSize, Token, U32, VqueueConfig, VqueueInfo, decode,
};

pub(crate) type Machine = DeviceMachine<[QueueSlot; 3], [u8; 60]>;

pub(crate) const DEV: DevNum = DevNum(4);

/// A device with its owner, over 48-byte messages.
pub(crate) struct Bench {
    pub(crate) machine: Machine,
    pub(crate) token: u16,
    /// Actions carried out, those of kicks included.
    pub(crate) actions: Vec<Action>,
    pub(crate) refuse: bool,
    pub(crate) events: Vec<String>,
}

impl Bench {
    pub(crate) fn new(offered: &[u32]) -> Bench {
        Bench::with(offered, Options::new(48))
    }

    pub(crate) fn with(offered: &[u32], options: Options) -> Bench {
        let identity = Identity {
            device_id: 2,
            vendor_id: 7,
            ..Identity::default()
        };
        let queues = [QueueSlot::new(64), QueueSlot::new(16), QueueSlot::new(0)];
        let mut config = [0; 60];
        for (byte, n) in config.iter_mut().zip(0..) {
            *byte = n;
        }
        let machine = DeviceMachine::new(
            DEV,
            identity,
            FeatureSet::from_bits(offered),
            queues,
            config,
            options,
        );
        Bench {
            machine,
            token: 0,
            actions: vec![],
            refuse: false,
            events: vec![],
        }
    }

    pub(crate) fn offer(&mut self, message: Message<'_>) -> Result<Handled, Busy> {
        self.token += 1;
        self.machine
            .handle_message(Instant(5), &Frame::new(DEV, Token(self.token), message))
    }

    pub(crate) fn work(&mut self) {
        while let Some(action) = self.machine.poll_action() {
            self.actions.push(action);
            self.machine.complete(if self.refuse {
                ActionResult::Refused
            } else {
                ActionResult::Done
            });
        }
    }

    /// The next message the device sends, as bytes.
    pub(crate) fn sent(&mut self) -> Option<Vec<u8>> {
        let mut out = [0; 65535];
        let size = self.machine.poll_transmit(&mut out)?;
        Some(out[..size].to_vec())
    }

    /// Asks, lets the owner work, and gives the response to `check`.
    pub(crate) fn ask<T>(
        &mut self,
        message: Message<'_>,
        check: impl FnOnce(Message<'_>) -> T,
    ) -> T {
        assert_eq!(self.offer(message), Ok(Handled::Request));
        self.work();
        let bytes = self.sent().expect("a response");
        let frame = decode(&bytes, 65536).expect("own message");
        assert_eq!((frame.dev_num, frame.token), (DEV, Token(self.token)));
        let result = check(frame.message);
        while let Some(event) = self.sent() {
            self.events
                .push(decode(&event, 65536).expect("own message").to_string());
        }
        result
    }

    pub(crate) fn status(&mut self, bits: u32) -> u32 {
        self.ask(
            Message::SetDeviceStatus(DeviceStatus::from_bits_retain(bits)),
            |answer| match answer {
                Message::DeviceStatusSet(status) => status.bits(),
                other => panic!("{other}"),
            },
        )
    }

    pub(crate) fn accept(&mut self, first: u32, words: &[u32]) {
        let words: Vec<U32> = words.iter().map(|&w| w.into()).collect();
        let blocks = FeatureBlocks {
            first,
            count: u32::try_from(words.len()).expect("few"),
            words: &words,
        };
        self.ask(Message::SetDriverFeatures(blocks), |answer| {
            assert_eq!(answer, Message::DriverFeaturesSet)
        });
    }

    pub(crate) fn set_queue(&mut self, config: VqueueConfig) -> bool {
        self.ask(Message::SetVqueue(config), |answer| {
            assert_eq!(answer, Message::VqueueSet)
        });
        self.ask(Message::GetVqueue(config.index), |answer| {
            let Message::Vqueue(VqueueInfo {
                index,
                max_size: _,
                size,
                descriptor,
                driver,
                device,
            }) = answer
            else {
                panic!("{answer}")
            };
            assert_eq!(index, config.index);
            VqueueConfig {
                index,
                size,
                descriptor,
                driver,
                device,
            } == config
        })
    }

    pub(crate) fn write(
        &mut self,
        generation: u32,
        offset: u32,
        data: &[u8],
    ) -> (u32, u32, Vec<u8>) {
        let len = u32::try_from(data.len()).expect("short");
        self.ask(
            Message::SetConfig(ConfigData {
                generation: Generation(generation),
                offset,
                len,
                data,
            }),
            |answer| match answer {
                Message::ConfigSet(d) if d.offset == offset => {
                    (d.generation.0, d.len, d.data.to_vec())
                }
                other => panic!("{other}"),
            },
        )
    }

    pub(crate) fn read(&mut self, offset: u32, len: u32) -> (u32, Vec<u8>) {
        self.ask(Message::GetConfig { offset, len }, |answer| match answer {
            Message::Config(d) if d.offset == offset && d.len == len => {
                (d.generation.0, d.data.to_vec())
            }
            other => panic!("{other}"),
        })
    }

    /// Up to DRIVER_OK with queue 0.
    pub(crate) fn running(mut self) -> Bench {
        self.status(0);
        self.status(3);
        assert_eq!(self.status(0xb), 0xb);
        assert!(self.set_queue(QUEUE));
        assert_eq!(self.status(0xf), 0xf);
        self.actions.clear();
        self
    }
}

pub(crate) const QUEUE: VqueueConfig = VqueueConfig {
    index: QueueIndex(0),
    size: QueueSize(64),
    descriptor: 0x1000,
    driver: 0x2002,
    device: 0x3004,
};

pub(crate) fn kick(queue: u32) -> Message<'static> {
    Message::EventAvail {
        queue: QueueIndex(queue),
        next: 0,
    }
}

impl Bench {
    /// As `running`, with the features that were accepted before.
    pub(crate) fn running_as_is(mut self) -> Bench {
        self.status(0xb);
        assert!(self.set_queue(QUEUE));
        self.status(0xf);
        self
    }
}
