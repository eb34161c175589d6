// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device behind registers that does what a test says, and remembers what it was asked.
#![allow(
    dead_code,
    unreachable_pub,
    reason = "each test program uses another part"
)]

use std::collections::BTreeMap;
use virtio_msg::{DevNum, DeviceInfo, DeviceStatus, FeatureSet, QueueIndex, feature};
use vmsg_proxy::session::{DeviceFacts, OpError, QueueSetup};
use vmsg_proxy::transport::Backend;

/// What was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Call {
    Features(FeatureSet),
    Status(u32),
    Start(u32, u16, [u64; 3]),
    Stop(u32),
    Kick(u32),
    Read(u32, usize),
    Write(u32, Vec<u8>),
}

pub struct Scripted {
    pub facts: DeviceFacts,
    pub calls: Vec<Call>,
    pub config: Vec<u8>,
    /// What every operation comes to.
    pub fail: Option<OpError>,
    /// FEATURES_OK is not for this device.
    pub picky: bool,
    /// With the next status that is set, the device needs a reset.
    pub breaks: bool,
    pub status: DeviceStatus,
    pub queues: BTreeMap<u32, QueueSetup>,
}

/// What the scripted device offers.
pub const OFFERED: [u32; 9] = [
    0,
    5,
    feature::RING_INDIRECT_DESC,
    feature::RING_EVENT_IDX,
    feature::VERSION_1,
    feature::SR_IOV,
    feature::NOTIF_CONFIG_DATA,
    feature::RING_RESET,
    feature::ADMIN_VQ,
];

impl Scripted {
    /// A device of this type with so many queues and bytes of configuration, which count up from 1.
    pub fn new(device_id: u32, queue_sizes: &[u16], config: usize) -> Scripted {
        let config: Vec<u8> = (1..=255).cycle().take(config).collect();
        Scripted {
            facts: DeviceFacts {
                number: DevNum(1),
                info: DeviceInfo {
                    device_id,
                    vendor_id: 0x6773_6d76,
                    feature_bits: 160,
                    config_size: u32::try_from(config.len()).unwrap(),
                    max_queues: u32::try_from(queue_sizes.len()).unwrap(),
                    admin_first: 0,
                    admin_count: 0,
                },
                // Bits 127 and 128: the last that can be seen, and the first that cannot.
                offered: FeatureSet::from_bits(&OFFERED).with(127).with(128),
                queue_sizes: queue_sizes.to_vec(),
            },
            calls: Vec::new(),
            config,
            fail: None,
            picky: false,
            breaks: false,
            status: DeviceStatus::RESET,
            queues: BTreeMap::new(),
        }
    }

    /// A network device.
    pub fn net() -> Scripted {
        Scripted::new(1, &[256, 128, 64], 24)
    }

    pub fn take_calls(&mut self) -> Vec<Call> {
        std::mem::take(&mut self.calls)
    }

    fn answer(&mut self, call: Call) -> Result<(), OpError> {
        // Random tests make many.
        if self.calls.len() > 10_000 {
            self.calls.clear();
        }
        self.calls.push(call);
        self.fail.clone().map_or(Ok(()), Err)
    }

    /// The bytes of an access, which must be there.
    fn bytes(&mut self, offset: u32, len: usize) -> &mut [u8] {
        let at = usize::try_from(offset).unwrap();
        &mut self.config[at..at + len]
    }
}

impl Backend for Scripted {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn set_features(&mut self, features: FeatureSet) -> Result<(), OpError> {
        assert!(features.is_subset(&self.facts.offered), "{features}");
        self.answer(Call::Features(features))
    }

    fn set_status(&mut self, status: DeviceStatus) -> Result<DeviceStatus, OpError> {
        assert!(!status.contains(DeviceStatus::NEEDS_RESET));
        self.answer(Call::Status(status.bits()))?;
        if status.is_empty() {
            self.queues.clear();
            self.status = status;
            return Ok(status);
        }
        assert!(status.contains(self.status), "bits were taken away");
        self.status = status;
        if self.picky {
            self.status
                .remove(DeviceStatus::FEATURES_OK | DeviceStatus::DRIVER_OK);
        }
        if self.breaks {
            return Ok(self.status | DeviceStatus::NEEDS_RESET);
        }
        Ok(self.status)
    }

    fn start_queue(&mut self, queue: QueueIndex, setup: QueueSetup) -> Result<(), OpError> {
        let max = self.facts.queue_sizes[queue.to_usize()];
        assert!(setup.size.is_power_of_two() && setup.size <= max);
        assert!(self.status.contains(DeviceStatus::FEATURES_OK));
        let areas = [setup.descriptor, setup.driver, setup.device];
        assert!(!areas.contains(&0));
        self.answer(Call::Start(queue.0, setup.size, areas))?;
        assert!(
            self.queues.insert(queue.0, setup).is_none(),
            "started twice"
        );
        Ok(())
    }

    fn stop_queue(&mut self, queue: QueueIndex) -> Result<(), OpError> {
        self.answer(Call::Stop(queue.0))?;
        self.queues.remove(&queue.0).expect("it was started");
        Ok(())
    }

    fn kick(&mut self, queue: QueueIndex) {
        assert!(self.queues.contains_key(&queue.0));
        let _ = self.answer(Call::Kick(queue.0));
    }

    fn read_config(&mut self, offset: u32, data: &mut [u8]) -> Result<(), OpError> {
        assert!(!data.is_empty());
        self.answer(Call::Read(offset, data.len()))?;
        data.copy_from_slice(self.bytes(offset, data.len()));
        Ok(())
    }

    fn write_config(&mut self, offset: u32, data: &[u8]) -> Result<(), OpError> {
        assert!(!data.is_empty());
        self.answer(Call::Write(offset, data.to_vec()))?;
        self.bytes(offset, data.len()).copy_from_slice(data);
        Ok(())
    }
}
