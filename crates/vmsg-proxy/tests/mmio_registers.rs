// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a driver sees in a register bank of virtio-mmio, with a scripted device behind it.
#![allow(missing_docs)]

mod scripted;

use scripted::{Call, Scripted};
use std::time::Duration;
use virtio_msg::{FeatureSet, QueueIndex, feature};
use vmsg_proxy::session::OpError;
use vmsg_proxy::transport::Options;
use vmsg_proxy::transport::mmio::{Mmio, SharedAt};

const FEATURES: u32 = 0x10;
const FEATURES_SEL: u32 = 0x14;
const DRIVER_FEATURES: u32 = 0x20;
const DRIVER_FEATURES_SEL: u32 = 0x24;
const QUEUE_SEL: u32 = 0x30;
const QUEUE_MAX: u32 = 0x34;
const QUEUE_SIZE: u32 = 0x38;
const READY: u32 = 0x44;
const NOTIFY: u32 = 0x50;
const INTERRUPT: u32 = 0x60;
const ACK: u32 = 0x64;
const STATUS: u32 = 0x70;
const QUEUE_RESET: u32 = 0xc0;
const GENERATION: u32 = 0xfc;

struct Bank(Mmio<Scripted>);

impl Bank {
    fn of(device: Scripted) -> Bank {
        let options = Options {
            retry: Duration::ZERO,
            ..Options::default()
        };
        let shared = vec![SharedAt {
            id: 3,
            base: 0x1_2345_6000,
            len: 0x2_0000_1000,
        }];
        Bank(Mmio::new(device, options, shared))
    }

    fn net() -> Bank {
        Bank::of(Scripted::net())
    }

    fn get(&mut self, at: u32) -> u32 {
        let mut data = [0; 4];
        self.0.read(at.into(), &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, at: u32, value: u32) {
        self.0.write(at.into(), &value.to_le_bytes());
    }

    fn calls(&mut self) -> Vec<Call> {
        self.0.backend_mut().take_calls()
    }

    /// Accepts these blocks and asks for FEATURES_OK; gives the status then.
    fn negotiate(&mut self, blocks: [u32; 2]) -> u32 {
        self.set(STATUS, 1);
        self.set(STATUS, 3);
        for (select, bits) in (0..).zip(blocks) {
            self.set(DRIVER_FEATURES_SEL, select);
            self.set(DRIVER_FEATURES, bits);
        }
        self.set(STATUS, 0xb);
        self.get(STATUS)
    }

    fn queue(&mut self, index: u32, size: u32) {
        self.set(QUEUE_SEL, index);
        self.set(QUEUE_SIZE, size);
        for (at, value) in [
            (0x80, 0x1000),
            (0x84, 1),
            (0x90, 0x2000),
            (0x94, 2),
            (0xa0, 0x3000),
            (0xa4, 3),
        ] {
            self.set(at, value);
        }
        self.set(READY, 1);
    }

    fn live(&mut self) {
        assert_eq!(self.negotiate([0x3000_0000, 0x101]), 0xb);
        self.queue(0, 64);
        self.set(STATUS, 0xf);
        assert_eq!(self.get(STATUS), 0xf);
        self.calls();
    }
}

#[test]
fn a_fresh_bank_reads_as_the_specification_has_it() {
    let mut bank = Bank::net();
    let table: &[(u32, u32)] = &[
        (0x00, 0x7472_6976),
        (0x04, 2),
        (0x08, 1),
        (0x0c, 0x6773_6d76),
        (FEATURES, 0x3000_0021),
        (QUEUE_MAX, 256),
        (READY, 0),
        (INTERRUPT, 0),
        (STATUS, 0),
        (QUEUE_RESET, 0),
        (GENERATION, 0),
        // Region 0 is not there.
        (0xb0, !0),
        (0xb4, !0),
        (0xb8, !0),
        (0xbc, !0),
        // Only written, reserved, legacy.
        (0x14, 0),
        (0x28, 0),
        (0x3c, 0),
        (0x40, 0),
        (0x80, 0),
        // Configuration, and what is past it.
        (0x100, 0x0403_0201),
        (0x114, 0x1817_1615),
        (0x118, 0),
        (0xffff_fffc, 0),
    ];
    for &(at, expected) in table {
        assert_eq!(bank.get(at), expected, "{at:#x}");
    }
    assert_eq!(bank.0.size(), 0x118);
    assert!(!bank.0.line());
}

#[test]
fn features_are_shown_in_blocks_and_what_cannot_be_passed_is_left_out() {
    let mut bank = Bank::net();
    let ring_reset = 1 << (feature::RING_RESET - 32);
    let own = 1 << (feature::ACCESS_PLATFORM - 32) | 1 << (feature::NOTIFICATION_DATA - 32);
    for (select, expected) in [
        (0, 0x3000_0021),
        (1, 1 | ring_reset | own),
        (2, 0),
        (3, 1 << 31),
        // Bit 128 is past what can be selected.
        (4, 0),
        (!0, 0),
    ] {
        bank.set(FEATURES_SEL, select);
        assert_eq!(bank.get(FEATURES), expected, "block {select}");
    }
}

#[test]
fn the_device_gets_features_without_those_that_are_for_the_registers() {
    let mut bank = Bank::net();
    let own = 1 << 1 | 1 << 6;
    assert_eq!(bank.negotiate([0x21, 1 | own]), 0xb);
    let features = FeatureSet::from_u64(0x1_0000_0021);
    assert_eq!(
        bank.calls(),
        [
            Call::Status(1),
            Call::Status(3),
            Call::Features(features),
            Call::Status(0xb)
        ]
    );
    // Settled now.
    bank.set(DRIVER_FEATURES, 0);
    bank.set(STATUS, 0xb);
    assert_eq!(bank.calls(), []);
}

#[test]
fn features_ok_is_refused_for_what_is_not_offered_or_not_modern_or_not_liked() {
    for blocks in [[0x40, 1], [0, 1 << 5 | 1], [0x21, 0]] {
        let mut bank = Bank::net();
        assert_eq!(bank.negotiate(blocks), 3, "{blocks:x?}");
        assert_eq!(bank.calls(), [Call::Status(1), Call::Status(3)]);
        // It may try again with less.
        assert_eq!(bank.negotiate([0, 1]), 0xb);
    }
    let mut bank = Bank::net();
    bank.0.backend_mut().picky = true;
    assert_eq!(bank.negotiate([0, 1]), 3, "the device says no");
    bank.set(STATUS, 0xf);
    assert_eq!(bank.get(STATUS), 3, "nor can DRIVER_OK be had then");
    let mut bank = Bank::net();
    bank.0.backend_mut().fail = Some(OpError::NotOffered(FeatureSet::from_u64(1)));
    bank.set(DRIVER_FEATURES_SEL, 1);
    bank.set(DRIVER_FEATURES, 1);
    bank.set(STATUS, 8);
    assert_eq!(bank.get(STATUS), 0, "another build of the device");
}

#[test]
fn driver_ok_needs_features_ok() {
    let mut bank = Bank::net();
    bank.set(STATUS, 7);
    assert_eq!(bank.get(STATUS), 3);
    // In one write all of it is possible.
    bank.set(DRIVER_FEATURES_SEL, 1);
    bank.set(DRIVER_FEATURES, 1);
    bank.set(STATUS, 0xf);
    assert_eq!(bank.get(STATUS), 0xf);
}

#[test]
fn status_bits_stay_until_a_reset_and_needs_reset_is_not_the_drivers() {
    let mut bank = Bank::net();
    bank.live();
    bank.set(STATUS, 1);
    assert_eq!(bank.get(STATUS), 0xf);
    bank.set(STATUS, 0x40 | 0x10 | 0x20 | 0xf);
    assert_eq!(bank.get(STATUS), 0xf);
    assert_eq!(bank.calls(), []);
    bank.set(STATUS, 0x80);
    assert_eq!(bank.get(STATUS), 0x8f);
    bank.set(STATUS, 0);
    assert_eq!(bank.get(STATUS), 0);
    assert_eq!(bank.calls(), [Call::Status(0x8f), Call::Status(0)]);
    assert_eq!(bank.get(READY), 0);
}

#[test]
fn a_queue_starts_with_what_was_written_and_not_before() {
    let mut bank = Bank::net();
    bank.queue(1, 32);
    assert_eq!(bank.get(READY), 0, "features come first");
    bank.negotiate([0, 1]);
    bank.calls();
    bank.queue(1, 32);
    assert_eq!(bank.get(READY), 1);
    let areas = [0x1_0000_1000, 0x2_0000_2000, 0x3_0000_3000];
    assert_eq!(bank.calls(), [Call::Start(1, 32, areas)]);
    // While it is ready nothing can be changed.
    bank.set(QUEUE_SIZE, 16);
    bank.set(0x80, 0x10);
    bank.set(READY, 1);
    bank.set(READY, 2);
    assert_eq!(bank.calls(), []);
    bank.set(READY, 0);
    assert_eq!(bank.get(READY), 0);
    assert_eq!(bank.calls(), [Call::Stop(1)]);
    // Its addresses are gone.
    bank.set(READY, 1);
    assert_eq!(bank.get(READY), 0);
    assert_eq!(bank.calls(), []);
}

#[test]
fn queues_that_cannot_be_do_not_start() {
    let good = [0x1000, 0x2000, 0x3000];
    let table: &[(u32, u32, [u32; 3])] = &[
        // Size 0, no power of two, too large, far too large.
        (0, 0, good),
        (0, 48, good),
        (0, 512, good),
        (0, 0x1_0010, good),
        // Addresses that are missing or not aligned.
        (0, 16, [0, 0x2000, 0x3000]),
        (0, 16, [0x1000, 0, 0x3000]),
        (0, 16, [0x1000, 0x2000, 0]),
        (0, 16, [0x1008, 0x2000, 0x3000]),
        (0, 16, [0x1000, 0x2001, 0x3000]),
        (0, 16, [0x1000, 0x2000, 0x3002]),
        // No such queue.
        (3, 16, good),
        (0x1_0000, 16, good),
        (!0, 16, good),
    ];
    for (queue, size, areas) in table {
        let mut bank = Bank::net();
        bank.negotiate([0, 1]);
        bank.calls();
        bank.set(QUEUE_SEL, *queue);
        bank.set(QUEUE_SIZE, *size);
        for (at, value) in [0x80, 0x90, 0xa0].into_iter().zip(areas) {
            bank.set(at, *value);
        }
        bank.set(READY, 1);
        assert_eq!(bank.get(READY), 0, "{queue} {size} {areas:x?}");
        assert_eq!(bank.calls(), []);
        assert_eq!(bank.get(STATUS), 0xb);
    }
    let mut bank = Bank::net();
    bank.set(QUEUE_SEL, 3);
    assert_eq!(bank.get(QUEUE_MAX), 0);
}

#[test]
fn a_queue_is_reset_by_its_register_only_if_that_was_negotiated() {
    for negotiated in [false, true] {
        let mut bank = Bank::net();
        bank.negotiate([0, 1 | u32::from(negotiated) << 8]);
        bank.queue(0, 64);
        bank.set(STATUS, 0xf);
        bank.calls();
        bank.set(QUEUE_RESET, 1);
        assert_eq!(bank.get(QUEUE_RESET), 0);
        assert_eq!(bank.get(READY), u32::from(!negotiated));
        if negotiated {
            assert_eq!(bank.calls(), [Call::Stop(0)]);
            bank.queue(0, 128);
            assert_eq!(bank.get(READY), 1, "it can be used again");
        } else {
            assert_eq!(bank.calls(), []);
        }
    }
}

#[test]
fn notifications_reach_queues_that_are_there() {
    let mut bank = Bank::net();
    bank.live();
    for value in [0, 1, 3, 0xffff, 0x8001_0000] {
        bank.set(NOTIFY, value);
    }
    // The last has where in the queue in its upper half.
    assert_eq!(bank.calls(), [Call::Kick(0), Call::Kick(0)]);
}

#[test]
fn the_line_is_raised_until_everything_is_acknowledged() {
    let mut bank = Bank::net();
    bank.0.queue_used(QueueIndex(0));
    bank.0.config_changed();
    assert!(!bank.0.line(), "nobody may be interrupted before DRIVER_OK");
    bank.live();
    bank.0.queue_used(QueueIndex(1));
    assert!(!bank.0.line(), "that queue is not set up");
    bank.0.queue_used(QueueIndex(0));
    bank.0.config_changed();
    assert_eq!(bank.get(INTERRUPT), 3);
    bank.set(ACK, 1);
    assert!(bank.0.line());
    bank.set(ACK, 2);
    assert!(!bank.0.line());
    bank.0.queue_used(QueueIndex(0));
    bank.set(STATUS, 0);
    assert!(!bank.0.line());
}

#[test]
fn an_operation_that_fails_needs_a_reset_and_that_heals() {
    type Step = fn(&mut Bank);
    let steps: &[(&str, Step)] = &[
        ("status", |bank| bank.set(STATUS, 0x8f)),
        ("queue", |bank| bank.queue(1, 16)),
        ("read", |bank| assert_eq!(bank.get(0x100), 0)),
        ("write", |bank| bank.set(0x100, 1)),
    ];
    for (what, step) in steps {
        let mut bank = Bank::net();
        bank.live();
        bank.get(0x104);
        bank.0.backend_mut().fail = Some(OpError::TimedOut);
        step(&mut bank);
        assert_eq!(bank.get(STATUS) & 0x4f, 0x4f, "{what}");
        assert_eq!(bank.get(INTERRUPT), 2, "{what}");
        bank.calls();
        // The host is back, but its driver knows nothing yet: nothing goes through.
        bank.0.backend_mut().fail = None;
        bank.set(NOTIFY, 0);
        bank.set(0x100, 5);
        bank.set(STATUS, 0x8f);
        bank.queue(2, 16);
        assert_eq!(bank.get(0x104), 0x0807_0605, "as last seen");
        assert_eq!(bank.get(STATUS), 0xcf);
        assert_eq!(bank.calls(), [], "{what}");
        bank.set(STATUS, 0);
        assert_eq!(bank.get(STATUS), 0);
        bank.live();
    }
}

#[test]
fn a_reset_reads_0_only_when_it_is_done() {
    let mut bank = Bank::net();
    bank.live();
    bank.0.backend_mut().fail = Some(OpError::TimedOut);
    bank.set(STATUS, 0);
    for _ in 0..3 {
        assert_eq!(bank.get(STATUS), 0x40);
    }
    bank.set(STATUS, 1);
    bank.queue(0, 16);
    assert_eq!(bank.get(STATUS), 0x40);
    assert!(bank.calls().iter().all(|call| *call == Call::Status(0)));
    assert!(!bank.0.line());
    bank.0.backend_mut().fail = None;
    assert_eq!(bank.get(STATUS), 0, "tried again");
    bank.live();
}

#[test]
fn a_device_of_another_type_is_not_taken_for_the_one_that_was() {
    let mut bank = Bank::net();
    bank.live();
    bank.0.backend_mut().facts.info.device_id = 2;
    bank.set(STATUS, 0);
    assert_eq!(bank.get(STATUS), 0x40);
    assert_eq!(bank.get(0x08), 1);
}

#[test]
fn a_queue_that_cannot_be_stopped_reads_so_until_it_is() {
    let mut bank = Bank::net();
    bank.negotiate([0, 0x101]);
    bank.queue(0, 64);
    bank.set(STATUS, 0xf);
    bank.0.backend_mut().fail = Some(OpError::TimedOut);
    bank.set(QUEUE_RESET, 1);
    assert_eq!(bank.get(QUEUE_RESET), 1);
    assert_eq!(bank.get(READY), 1);
    assert_eq!(bank.get(STATUS), 0x4f);
    bank.0.backend_mut().fail = None;
    assert_eq!(bank.get(QUEUE_RESET), 0);
    assert_eq!(bank.get(READY), 0);
}

#[test]
fn a_device_that_needs_a_reset_says_so() {
    let mut bank = Bank::net();
    bank.0.needs_reset();
    assert_eq!(bank.get(STATUS), 0, "a device that is reset needs none");
    bank.live();
    bank.0.needs_reset();
    assert_eq!(bank.get(STATUS), 0x4f);
    assert_eq!(bank.get(INTERRUPT), 2);
    bank.set(STATUS, 0);
    assert_eq!(bank.get(STATUS), 0);
    // In the answer to DRIVER_OK.
    bank.negotiate([0, 1]);
    bank.0.backend_mut().breaks = true;
    bank.set(STATUS, 0xf);
    assert_eq!(bank.get(STATUS), 0x4f);
    assert_eq!(bank.get(INTERRUPT), 2);
}

#[test]
fn the_generation_tells_of_every_change_that_a_driver_can_see() {
    let mut bank = Bank::net();
    let first = bank.get(GENERATION);
    bank.get(0x100);
    assert_eq!(bank.get(GENERATION), first);
    bank.0.backend_mut().config[0] = 99;
    assert_eq!(
        bank.get(GENERATION),
        first + 1,
        "what was read is not true any more"
    );
    assert_eq!(bank.get(0x100), 0x0403_0263);
    assert_eq!(bank.get(GENERATION), first + 1);
    bank.0.backend_mut().config[1] = 98;
    assert_eq!(bank.get(0x100), 0x0403_6263);
    assert_eq!(bank.get(GENERATION), first + 2);
    bank.0.backend_mut().config[20] = 97;
    assert_eq!(bank.get(GENERATION), first + 2, "nobody has seen that byte");
    bank.set(0x100, 7);
    assert_eq!(bank.get(0x100), 7);
    assert_eq!(bank.get(GENERATION), first + 2, "the driver's own change");
    bank.0.config_changed();
    assert_eq!(bank.get(GENERATION), first + 3);
}

#[test]
fn shared_memory_is_where_the_bank_says() {
    let mut bank = Bank::net();
    bank.set(0xac, 3);
    let regions = [0xb0, 0xb4, 0xb8, 0xbc].map(|at| bank.get(at));
    assert_eq!(regions, [0x1000, 2, 0x2345_6000, 1]);
    bank.set(0xac, 4);
    assert_eq!(bank.get(0xb0), !0);
}

#[test]
fn accesses_of_other_widths_are_defined() {
    let mut bank = Bank::net();
    let mut bytes = [0; 3];
    bank.0.read(1, &mut bytes);
    assert_eq!(&bytes, b"irt");
    // Across the end of the registers.
    let mut bytes = [0; 8];
    bank.0.read(0xfe, &mut bytes);
    assert_eq!(bytes, [0, 0, 1, 2, 3, 4, 5, 6]);
    // Parts of a register are not written, several are.
    bank.set(FEATURES_SEL, 1);
    bank.0.write(FEATURES_SEL.into(), &[0, 0]);
    assert_eq!(bank.get(FEATURES) & 1, 1);
    bank.set(DRIVER_FEATURES_SEL, 1);
    bank.set(DRIVER_FEATURES, 1);
    bank.set(STATUS, 0xb);
    bank.0.write(0x80, &0x4_0000_1000u64.to_le_bytes());
    bank.0.write(0x90, &0x5_0000_2000u64.to_le_bytes());
    bank.0.write(0xa0, &0x6_0000_3000u64.to_le_bytes());
    bank.calls();
    bank.set(READY, 1);
    let areas = [0x4_0000_1000, 0x5_0000_2000, 0x6_0000_3000];
    assert_eq!(bank.calls(), [Call::Start(0, 256, areas)]);
    let mut nothing = [];
    bank.0.read(0, &mut nothing);
    bank.0.write(0, &nothing);
    let mut far = [1; 16];
    bank.0.read(u64::MAX - 4, &mut far);
    assert_eq!(far, [0; 16]);
    bank.0.write(u64::MAX - 4, &far);
}
