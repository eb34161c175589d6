// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages as lines of a trace.

use crate::message::{ConfigData, DeviceState, FeatureBlocks, Frame, Kind, Message};
use core::fmt;

/// Bytes in hexadecimal, in groups of four; no more than the first 64.
struct Hex<'a>(&'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 64;
        for (i, byte) in self.0.iter().take(SHOWN).enumerate() {
            if i > 0 && i % 4 == 0 {
                f.write_str(" ")?;
            }
            write!(f, "{byte:02x}")?;
        }
        if self.0.len() > SHOWN {
            write!(f, " … ({} bytes)", self.0.len())?;
        }
        Ok(())
    }
}

impl fmt::Display for FeatureBlocks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "blocks {}+{}", self.first, self.count)?;
        let mut sep = ": ";
        for word in self.words.iter().take(8) {
            write!(f, "{sep}{:#010x}", word.get())?;
            sep = " ";
        }
        if self.words.len() > 8 {
            f.write_str(" …")?;
        }
        Ok(())
    }
}

impl fmt::Display for ConfigData<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "generation {}, offset {}, length {}",
            self.generation, self.offset, self.len
        )?;
        if !self.data.is_empty() {
            write!(f, ": {}", Hex(self.data))?;
        }
        Ok(())
    }
}

impl fmt::Display for DeviceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceState::Ready => f.write_str("ready"),
            DeviceState::Removed => f.write_str("removed"),
            DeviceState::Other(state) => write!(f, "state {state:#06x}"),
        }
    }
}

impl Message<'_> {
    /// The name in the specification, the same for request and response.
    pub fn name(&self) -> &'static str {
        match self {
            Message::GetDeviceInfo | Message::DeviceInfo(_) => "GET_DEVICE_INFO",
            Message::GetDeviceFeatures { .. } | Message::DeviceFeatures(_) => "GET_DEVICE_FEATURES",
            Message::SetDriverFeatures(_) | Message::DriverFeaturesSet => "SET_DRIVER_FEATURES",
            Message::GetConfig { .. } | Message::Config(_) => "GET_CONFIG",
            Message::SetConfig(_) | Message::ConfigSet(_) => "SET_CONFIG",
            Message::GetDeviceStatus | Message::DeviceStatus(_) => "GET_DEVICE_STATUS",
            Message::SetDeviceStatus(_) | Message::DeviceStatusSet(_) => "SET_DEVICE_STATUS",
            Message::GetVqueue(_) | Message::Vqueue(_) => "GET_VQUEUE",
            Message::SetVqueue(_) | Message::VqueueSet => "SET_VQUEUE",
            Message::ResetVqueue(_) | Message::VqueueReset => "RESET_VQUEUE",
            Message::GetShm { .. } | Message::Shm(_) => "GET_SHM",
            Message::EventConfig(_) => "EVENT_CONFIG",
            Message::EventAvail { .. } => "EVENT_AVAIL",
            Message::EventUsed { .. } => "EVENT_USED",
            Message::GetDevices { .. } | Message::Devices(_) => "GET_DEVICES",
            Message::Ping { .. } | Message::Pong { .. } => "PING",
            Message::EventDevice { .. } => "EVENT_DEVICE",
            Message::BusSpecific { .. } => "BUS_SPECIFIC",
        }
    }
}

/// The name, `response` for a response, and the fields: `GET_CONFIG response: generation 0, offset 6, length 2: 0100`.
impl fmt::Display for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if self.kind() == Kind::Response {
            f.write_str(" response")?;
        }
        match self {
            Message::GetDeviceInfo
            | Message::DriverFeaturesSet
            | Message::GetDeviceStatus
            | Message::VqueueSet
            | Message::VqueueReset => Ok(()),
            Message::DeviceInfo(i) if !i.is_present() => f.write_str(": no device"),
            Message::DeviceInfo(i) => {
                write!(
                    f,
                    ": device id {}, vendor {:#010x}, {} feature bits, {} config bytes, {} queues",
                    i.device_id, i.vendor_id, i.feature_bits, i.config_size, i.max_queues
                )?;
                if i.admin_count != 0 {
                    write!(f, ", {} admin queues from {}", i.admin_count, i.admin_first)?;
                }
                Ok(())
            }
            Message::GetDeviceFeatures { first, count } => write!(f, ": blocks {first}+{count}"),
            Message::DeviceFeatures(b) | Message::SetDriverFeatures(b) => write!(f, ": {b}"),
            Message::GetConfig { offset, len } => write!(f, ": offset {offset}, length {len}"),
            Message::ConfigSet(d) if d.len == 0 => {
                write!(
                    f,
                    ": rejected, generation {}, offset {}",
                    d.generation, d.offset
                )
            }
            Message::Config(d) | Message::SetConfig(d) | Message::ConfigSet(d) => {
                write!(f, ": {d}")
            }
            Message::DeviceStatus(s)
            | Message::SetDeviceStatus(s)
            | Message::DeviceStatusSet(s) => write!(f, ": {s}"),
            Message::GetVqueue(q) | Message::ResetVqueue(q) => write!(f, ": queue {q}"),
            Message::Vqueue(q) if q.max_size.0 == 0 => {
                write!(f, ": queue {}, no such queue", q.index)
            }
            Message::Vqueue(q) => {
                write!(f, ": queue {}, size {} of {}", q.index, q.size, q.max_size)?;
                areas(f, q.descriptor, q.driver, q.device)
            }
            Message::SetVqueue(q) => {
                write!(f, ": queue {}, size {}", q.index, q.size)?;
                areas(f, q.descriptor, q.driver, q.device)
            }
            Message::GetShm { index } => write!(f, ": region {index}"),
            Message::Shm(s) if s.len == 0 => write!(f, ": region {}, no such region", s.index),
            Message::Shm(s) => write!(
                f,
                ": region {}, length {}, address {:#x}",
                s.index, s.len, s.address
            ),
            Message::EventConfig(e) => {
                write!(
                    f,
                    ": status {}, generation {}, offset {}, length {}",
                    e.status, e.generation, e.offset, e.len
                )?;
                if !e.data.is_empty() {
                    write!(f, ": {}", Hex(e.data))?;
                }
                Ok(())
            }
            Message::EventAvail { queue, next: 0 } => write!(f, ": queue {queue}"),
            Message::EventAvail { queue, next } => {
                write!(
                    f,
                    ": queue {queue}, next {}, wrap {}",
                    next & 0x7fff_ffff,
                    next >> 31
                )
            }
            Message::EventUsed { queue } => write!(f, ": queue {queue}"),
            Message::GetDevices { offset, count } => write!(f, ": devices {offset}+{count}"),
            Message::Devices(d) => {
                write!(
                    f,
                    ": devices {}+{}, next {}, present",
                    d.offset, d.count, d.next
                )?;
                let mut shown = 0;
                for dev in d.iter().take(32) {
                    write!(f, " {dev}")?;
                    shown += 1;
                }
                match d.iter().count() {
                    0 => f.write_str(" none"),
                    n if n > shown => write!(f, " … ({n})"),
                    _ => Ok(()),
                }
            }
            Message::Ping { data } | Message::Pong { data } => write!(f, ": data {data:#010x}"),
            Message::EventDevice { device, state } => write!(f, ": device {device} {state}"),
            Message::BusSpecific { id, payload, .. } => {
                write!(f, ": id {id:#04x}")?;
                if !payload.is_empty() {
                    write!(f, ": {}", Hex(payload))?;
                }
                Ok(())
            }
        }
    }
}

fn areas(f: &mut fmt::Formatter<'_>, descriptor: u64, driver: u64, device: u64) -> fmt::Result {
    if descriptor == 0 && driver == 0 && device == 0 {
        return Ok(());
    }
    write!(
        f,
        ", descriptor {descriptor:#x}, driver {driver:#x}, device {device:#x}"
    )
}

/// `dev 3 #17 GET_CONFIG: offset 6, length 2`, `bus #0 PING: data 0x12345678`, and without a token `dev 3 EVENT_USED: queue 1`.
impl fmt::Display for Frame<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.message.is_bus() && self.dev_num.0 == 0 {
            f.write_str("bus ")?;
        } else if self.message.is_bus() {
            write!(f, "bus (dev {}) ", self.dev_num)?;
        } else {
            write!(f, "dev {} ", self.dev_num)?;
        }
        if self.message.kind() != Kind::Event || self.token.0 != 0 {
            write!(f, "#{} ", self.token)?;
        }
        self.message.fmt(f)
    }
}
