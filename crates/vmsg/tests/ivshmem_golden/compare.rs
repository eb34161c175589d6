// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where an answer may differ from the recorded one.

use virtio_msg::{Frame, Message, decode};

use super::place::Devices;

/// A field that may differ.
pub(crate) struct Allowed {
    /// Recordings whose names begin so.
    recording: &'static str,
    /// Only against these devices.
    devices: Option<Devices>,
    /// Answers of this kind.
    of: fn(&Message<'_>) -> bool,
    /// What is different, and why.
    why: &'static str,
    /// Makes the recorded answer equal to ours in that field, if ours is as it must be.
    adopt: fn(&mut Vec<u8>, &[u8]) -> Result<(), String>,
}

/// Takes bytes of ours over.
fn take(recorded: &mut [u8], ours: &[u8], at: std::ops::Range<usize>) -> Result<(), String> {
    match (recorded.get_mut(at.clone()), ours.get(at)) {
        (Some(to), Some(from)) => {
            to.copy_from_slice(from);
            Ok(())
        }
        _ => Err("shorter than the field".into()),
    }
}

fn word(bytes: &[u8], at: usize) -> Result<u32, String> {
    bytes
        .get(at..at + 4)
        .and_then(|bytes| bytes.try_into().ok())
        .map(u32::from_le_bytes)
        .ok_or_else(|| "shorter than the field".into())
}

/// Takes a 32-bit field over in which ours may be larger, not smaller.
fn take_larger(recorded: &mut [u8], ours: &[u8], at: usize) -> Result<(), String> {
    let (least, is) = (word(recorded, at)?, word(ours, at)?);
    if is < least {
        return Err(format!("{is} where {least} was recorded"));
    }
    take(recorded, ours, at..at + 4)
}

/// All differences that are allowed, apart from two of the whole conversation: an event may come before or after an answer that was recorded
/// next to it, and the responses to EVENT_AVAIL that `/dev/virtio-msg-N` wants (`linux/g15-*`, `linux/g2-*`) do not exist on a bus.
pub(crate) const ALLOWED: &[Allowed] = &[
    Allowed {
        recording: "",
        devices: Some(Devices::Ours),
        of: |message| matches!(message, Message::DeviceInfo(_)),
        why: "our vendor id, the length of our configuration, and our control queue",
        adopt: |recorded, ours| {
            take(recorded, ours, 12..16)?;
            take_larger(recorded, ours, 20)?;
            take_larger(recorded, ours, 24)
        },
    },
    Allowed {
        recording: "",
        devices: Some(Devices::Ours),
        of: |message| matches!(message, Message::DeviceFeatures(_)),
        why: "ours offer more: none that was recorded is missing",
        adopt: |recorded, ours| {
            for at in [16, 20] {
                let (had, have) = (word(recorded, at)?, word(ours, at)?);
                if had & !have != 0 {
                    return Err(format!("features {:#x} are missing", had & !have));
                }
            }
            take(recorded, ours, 16..24)
        },
    },
    Allowed {
        recording: "",
        devices: Some(Devices::Ours),
        of: |message| matches!(message, Message::Vqueue(_)),
        why: "our queues may be longer",
        adopt: |recorded, ours| take_larger(recorded, ours, 12),
    },
    Allowed {
        recording: "",
        devices: Some(Devices::Ours),
        of: |message| matches!(message, Message::Config(_)),
        why: "the MAC is ours",
        adopt: |recorded, ours| {
            let all = recorded.len();
            take(recorded, ours, all.min(20)..all)
        },
    },
    Allowed {
        recording: "qemu/",
        devices: None,
        of: |message| matches!(message, Message::Devices(_)),
        why: "QEMU answers for 32 numbers where more were asked for; ours for all of them",
        adopt: |recorded, ours| {
            // Offset, next offset and the first 32 numbers are the same, the other ones do not exist.
            let same = recorded[8..10] == ours[8..10] && ours.get(14..18) == recorded.get(14..18);
            let none = ours
                .get(18..)
                .is_some_and(|rest| rest.iter().all(|&byte| byte == 0));
            if !same || !none {
                return Err("other devices".into());
            }
            *recorded = ours.to_vec();
            Ok(())
        },
    },
];

/// Compares an answer with the recorded one; panics where they differ and may not.
pub(crate) fn compare(name: &str, devices: Devices, recorded: &[u8], ours: &[u8]) {
    let frame = |bytes| -> Frame<'_> {
        decode(bytes, 274).unwrap_or_else(|error| panic!("{name}: {error}: {bytes:02x?}"))
    };
    let message = frame(recorded).message;
    let mut wanted = recorded.to_vec();
    for allowed in ALLOWED {
        let applies = name.starts_with(allowed.recording)
            && allowed.devices.is_none_or(|only| only == devices)
            && (allowed.of)(&message);
        if applies && let Err(error) = (allowed.adopt)(&mut wanted, ours) {
            panic!(
                "{name}: ({}) {error}:\n {}\n {}",
                allowed.why,
                frame(recorded),
                frame(ours)
            );
        }
    }
    assert!(
        wanted == ours,
        "{name}: recorded and ours:\n {}\n {}\n {recorded:02x?}\n {ours:02x?}",
        frame(recorded),
        frame(ours)
    );
}
