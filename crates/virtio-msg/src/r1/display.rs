// SPDX-License-Identifier: Apache-2.0 OR MIT
//! r1 messages as lines of a trace.

use super::{Frame, Message};
use crate::message::Kind;
use core::fmt;

/// The name, `response` for a response, and the fields: `GET_CONFIG response: offset 6, size 2: 0x1`.
impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        if self.kind() == Kind::Response {
            f.write_str(" response")?;
        }
        match self {
            Message::GetDeviceInfo | Message::GetConfigGen | Message::GetDeviceStatus => Ok(()),
            Message::DeviceInfo {
                version,
                device_id,
                vendor_id,
            } => write!(
                f,
                ": version {version}, device id {device_id}, vendor {vendor_id:#010x}"
            ),
            Message::GetFeatures { index } => write!(f, ": index {index}"),
            Message::Features { index, features }
            | Message::SetFeatures { index, features }
            | Message::FeaturesSet { index, features } => {
                write!(f, ": index {index}, {features:#018x}")
            }
            Message::GetConfig { offset, size } => write!(f, ": offset {offset}, size {size}"),
            Message::Config { offset, size, data }
            | Message::SetConfig { offset, size, data }
            | Message::ConfigSet { offset, size, data } => {
                write!(f, ": offset {offset}, size {size}: {data:#x}")
            }
            Message::ConfigGen(generation) => write!(f, ": generation {generation}"),
            Message::DeviceStatus(status) | Message::SetDeviceStatus(status) => {
                write!(f, ": {status}")
            }
            Message::GetVqueue(queue)
            | Message::ResetVqueue(queue)
            | Message::EventUsed { queue } => write!(f, ": queue {queue}"),
            Message::Vqueue { index, max_size } if max_size.0 == 0 => {
                write!(f, ": queue {index}, no such queue")
            }
            Message::Vqueue { index, max_size } => {
                write!(f, ": queue {index}, at most {max_size}")
            }
            Message::SetVqueue(q) => write!(
                f,
                ": queue {}, size {}, descriptor {:#x}, driver {:#x}, device {:#x}",
                q.index, q.size, q.descriptor, q.driver, q.device
            ),
            Message::EventConfig {
                status,
                offset,
                size,
                value,
            } => {
                write!(f, ": status {status}, offset {offset}, size {size}")?;
                for (i, byte) in value.iter().take(usize::from(*size)).enumerate() {
                    f.write_str(if i == 0 { ": " } else { "" })?;
                    write!(f, "{byte:02x}")?;
                }
                Ok(())
            }
            Message::EventAvail {
                queue,
                next_offset: 0,
                next_wrap: 0,
            } => write!(f, ": queue {queue}"),
            Message::EventAvail {
                queue,
                next_offset,
                next_wrap,
            } => write!(f, ": queue {queue}, next {next_offset}, wrap {next_wrap}"),
            Message::IommuEnable(on) => f.write_str(if *on { ": on" } else { ": off" }),
            Message::IommuTranslate { va, prot } => write!(f, ": page {va:#x}, {}", Prot(*prot)),
            Message::IommuTranslated { va, pa, prot } => {
                write!(f, ": page {va:#x} at {pa:#x}, {}", Prot(*prot))
            }
        }
    }
}

/// `rw`, `r-`, `-w` or `--`.
struct Prot(u8);

impl fmt::Display for Prot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let bit = |bit, on| if self.0 & bit != 0 { on } else { "-" };
        f.write_str(bit(super::PROT_READ, "r"))?;
        f.write_str(bit(super::PROT_WRITE, "w"))
    }
}

/// `r1 dev 0 GET_VQUEUE: queue 1`.
impl fmt::Display for Frame {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "r1 dev {} {}", self.dev_num, self.message)
    }
}
