// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Whether a daemon can be one of the type that it is said to be. Nothing in the protocol says what it is, so this is for a line in the log
//! only: a new version of a type may have what is not known here.

use virtio_msg::feature::device_name;
use vmsg_vhost_user::Offer;

use super::Settings;
use super::kind::{Kind, OF_TYPES};

/// More types than so many are no help.
const MOST_NAMES: usize = 2;

/// The features that a type has itself (virtio 1.3, 5, with those of before 1.0), as far as that is known.
const FEATURES: &[(u32, u64)] = &[
    // Network: all but 4 and 58.
    (1, OF_TYPES & !(1 << 4 | 1 << 58)),
    // Block: BARRIER, SIZE_MAX, SEG_MAX, GEOMETRY, RO, BLK_SIZE, SCSI; from FLUSH on all but 8.
    (2, 0x0003_feff & !(1 << 3)),
    // Console, entropy, SCSI, 9P.
    (3, 0b111),
    (4, 0),
    (8, 0b1111),
    (9, 1),
    // GPU, with what is in preparation; socket, crypto.
    (16, 0xff),
    (19, 0b111),
    (20, 0b11_1111),
    // Sound, file system, SCMI, I2C, GPIO.
    (25, 1),
    (26, 1),
    (32, 0b11),
    (34, 1),
    (41, 1),
];

/// Types that have no more queues than so many.
const QUEUES: &[(u32, u64)] = &[(4, 1), (19, 3), (25, 4), (32, 2), (34, 1), (41, 2)];

/// Of these features, those that no device of the type has; `None` for a type of which that is not known.
fn strange(id: u32, features: u64) -> Option<u64> {
    let (_, own) = FEATURES.iter().find(|(kind, _)| *kind == id)?;
    let strange = features & OF_TYPES & !own;
    // VIRTIO_NET_F_GUEST_ECN goes with segments that are received (5.1.3.1). Of a disk, it is FLUSH.
    let ecn = id == 1 && features & 1 << 9 != 0 && features & (1 << 7 | 1 << 8) == 0;
    Some(strange | u64::from(ecn) << 9)
}

/// The types that have all of these features, if there are not many.
fn who_has(features: u64) -> String {
    let fits = |id: &u32| features & OF_TYPES != 0 && strange(*id, features) == Some(0);
    let ids = FEATURES.iter().map(|(id, _)| *id);
    let names: Vec<_> = ids.filter(fits).filter_map(device_name).collect();
    match names.len() {
        1..=MOST_NAMES => format!(", as devices of type {} may have", names.join(" and ")),
        _ => String::new(),
    }
}

fn bits(mut features: u64) -> String {
    let mut names = Vec::new();
    while features != 0 {
        names.push(features.trailing_zeros().to_string());
        features &= features - 1;
    }
    names.join(", ")
}

/// What of a daemon does not go with the type, in words that follow "the daemon".
pub(super) fn doubt(settings: &Settings, kind: &Kind, offer: &Offer) -> Option<String> {
    if let Some(strange) = strange(kind.id, offer.features).filter(|bits| *bits != 0) {
        return Some(format!(
            "offers features that no such device has (bits {}){}",
            bits(strange),
            who_has(offer.features)
        ));
    }
    let most = QUEUES.iter().find(|(id, _)| *id == kind.id);
    if let (Some((_, most)), Some(has)) = (most, offer.queues)
        && has > *most
        && settings.queues.is_none()
    {
        return Some(format!(
            "says that it has {has} queues, and such a device has {most}"
        ));
    }
    let config = match settings.config {
        Some(_) => None,
        None => offer.config.as_deref(),
    };
    match (kind.id, config) {
        (26, Some([0, ..])) => Some(
            "tells a configuration without a tag, which nobody could mount (tag= sets one)"
                .to_owned(),
        ),
        (19, Some(told)) => {
            let cid = told.first_chunk().map(|bytes| u64::from_le_bytes(*bytes))?;
            let fits = (3..u64::from(u32::MAX)).contains(&cid);
            (!fits).then(|| {
                format!("tells the address {cid}, which no guest can have (cid= sets one)")
            })
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "fit_test.rs"]
mod tests;
