// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;

/// NOTIFY_ON_EMPTY, LOG_ALL, INDIRECT, EVENT_IDX, PROTOCOL_FEATURES, VERSION_1: what daemons of any type may offer.
const ANY: u64 = 1 << 24 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30 | 1 << 32;

fn of(bits: &[u32]) -> u64 {
    bits.iter().fold(ANY, |all, bit| all | 1 << bit)
}

fn offer(features: u64, queues: Option<u64>, config: &[u8]) -> Offer {
    Offer {
        features,
        queues,
        config: Some(config.to_vec()).filter(|config| !config.is_empty()),
        ..Offer::default()
    }
}

fn doubt_of(id: u32, offer: &Offer) -> Option<String> {
    doubt(&Settings::new("s", id), &Kind::of(id), offer)
}

/// A disk's, as qemu-storage-daemon and SPDK have them; a network's, as Open vSwitch and passt.
fn disk() -> u64 {
    of(&[1, 2, 6, 9, 10, 11, 12, 13, 14])
}

fn switch() -> u64 {
    of(&[
        0, 1, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 17, 18, 21, 22, 33, 34, 35,
    ])
}

#[test]
fn nothing_is_said_of_daemons_of_the_type() {
    let mut tag = [0; 40];
    tag[..5].copy_from_slice(b"share");
    for (id, offer) in [
        (2, offer(disk(), Some(128), &[0; 60])),
        (2, offer(of(&[2, 5, 6, 9, 12, 15, 16, 17]), None, &[0; 96])),
        (1, offer(switch(), Some(2), &[])),
        // Open vSwitch without segmentation; passt.
        (1, offer(switch() & !(1 | 1 << 11 | 1 << 12), None, &[])),
        (1, offer(of(&[15]), Some(2), &[])),
        (26, offer(ANY, Some(2), &tag)),
        (26, offer(ANY, None, &[])),
        (19, offer(of(&[1]), Some(3), &[52, 0, 0, 0, 0, 0, 0, 0])),
        (4, offer(ANY, Some(1), &[])),
        (8, offer(of(&[1, 2]), Some(8), &[0; 36])),
        (25, offer(of(&[0]), Some(4), &[0; 12])),
        (41, offer(of(&[0]), Some(2), &[0; 8])),
        // Nothing is known of these.
        (36, offer(of(&[0, 1, 2, 3]), Some(3), &[])),
        (99, offer(disk(), Some(77), &[1])),
    ] {
        assert_eq!(doubt_of(id, &offer), None, "{id}");
    }
}

#[test]
fn features_of_another_type_are_named_with_it() {
    for (id, features, words) in [
        (2, switch(), "as devices of type net may have"),
        (1, disk(), "(bits 9), as devices of type blk may have"),
        (26, disk(), "as devices of type blk may have"),
        (4, of(&[15]), "(bits 15), as devices of type net and blk"),
        (19, switch(), "net"),
    ] {
        let doubt = doubt_of(id, &offer(features, None, &[])).expect(words);
        assert!(doubt.contains(words), "{id}: {doubt}");
    }
}

#[test]
fn queues_and_configurations_of_another_type_are_named() {
    let words = doubt_of(4, &offer(ANY, Some(128), &[])).expect("too many");
    assert!(words.contains("128 queues"), "{words}");
    let words = doubt_of(26, &offer(ANY, None, &[0; 40])).expect("no tag");
    assert!(words.contains("tag="), "{words}");
    let words = doubt_of(19, &offer(ANY, None, &[2, 0, 0, 0, 0, 0, 0, 0])).expect("the host's");
    assert!(words.contains("the address 2"), "{words}");
    // What was said on our side is no doubt of the daemon.
    let mut settings = Settings::new("s", 26);
    settings.config = Some(vec![1; 40]);
    let offer = offer(ANY, None, &[0; 40]);
    assert_eq!(doubt(&settings, &Kind::of(26), &offer), None);
}
