// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Accesses to registers, of any width at any offset.

use crate::stage::{ISOLATED, LENT, NET, Stage};
use crate::vmm::{
    BAR, CONFIG, GUEST, NO_REPLY, Numbers, RAM, REGION_READ, REGION_WRITE, RESET, Ram, Vmm, access,
};
use std::time::{Duration, Instant};

#[test]
fn accesses_of_any_width_anywhere_end() {
    let stage = Stage::start();
    let end = Instant::now() + Duration::from_millis(2500);
    let mut numbers = Numbers(1);
    let mut longest = Duration::ZERO;
    while Instant::now() < end {
        for front in [LENT, ISOLATED, NET] {
            let mut vmm = Vmm::new(&stage.socket(front));
            let ram = Ram::new();
            vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
            if numbers.below(2) == 0 {
                vmm.start(u64::MAX, 64, GUEST);
            }
            for _ in 0..300 {
                let region =
                    numbers.pick(&[BAR, BAR, BAR, CONFIG, CONFIG, 0, 1, 1, 2, 5, 8, 9, u32::MAX]);
                let sizes = [1, 2, 4, 8, 3, 16, 100, 4096, 0x4000, 0x10_0000, 0, u32::MAX];
                let count = numbers.pick(&sizes);
                let offsets = [
                    0,
                    4,
                    0x14,
                    0x16,
                    0x1000,
                    0x2000,
                    0x3000,
                    0x3fff,
                    0x4000,
                    u64::MAX,
                    1 << 63,
                ];
                let near = numbers
                    .pick(&offsets)
                    .wrapping_add(numbers.below(64))
                    .wrapping_sub(8);
                let offset = numbers.pick(&[near, near & 0xff, numbers.0 % 0x4000]);
                let mut payload = access(region, offset, count);
                if numbers.below(2) == 0 {
                    vmm.ask(REGION_READ, &payload, &[]).ok();
                    continue;
                }
                let len = if numbers.below(8) == 0 {
                    numbers.below(64) as usize
                } else {
                    count.min(0x4000) as usize
                };
                let value = if numbers.below(2) == 0 {
                    vec![0; len]
                } else {
                    numbers.bytes(len)
                };
                payload.extend(value);
                if numbers.below(2) == 0 {
                    vmm.tell(REGION_WRITE, &payload, &[], NO_REPLY);
                } else {
                    vmm.ask(REGION_WRITE, &payload, &[]).ok();
                }
                if numbers.below(100) == 0 {
                    vmm.ask(RESET, &[], &[]).unwrap();
                }
            }
            longest = longest.max(vmm.longest);
        }
    }
    eprintln!("longest {longest:?}");
    stage.finish();
}

#[test]
fn a_flood_of_resets_that_nobody_waits_for_does_not_hold_up_others() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        for _ in 0..20 {
            vmm.start(0, 64, GUEST);
            for _ in 0..50 {
                vmm.post(BAR, 0x14, &[0]);
            }
            vmm.kick(0);
        }
        assert_eq!(vmm.status(), 0);
        eprintln!("{front}: longest {:?}", vmm.longest);
    }
    stage.finish();
}

#[test]
fn registers_behind_the_window_in_configuration_space_are_the_same_and_no_more() {
    let stage = Stage::start();
    let mut vmm = Vmm::new(&stage.socket(LENT));
    let config = vmm.read(CONFIG, 0, 256);
    // The capability of type 5, whose data stands behind it.
    let mut at = usize::from(config[0x34]);
    while (config[at], config[at + 3]) != (9, 5) {
        at = usize::from(config[at + 1]);
        assert_ne!(at, 0, "no window");
    }
    let at = at as u64;
    let mut numbers = Numbers(3);
    for _ in 0..2000 {
        vmm.write(CONFIG, at + 4, &[numbers.next() as u8 % 8]);
        let offset = numbers.pick(&[0x14, 0x3000, 0x3fff, u32::MAX, 0x1fff]);
        vmm.write(CONFIG, at + 8, &offset.to_le_bytes());
        let length = numbers.pick(&[0, 1, 2, 3, 4, 5, u32::MAX]);
        vmm.write(CONFIG, at + 12, &length.to_le_bytes());
        if numbers.below(2) == 0 {
            vmm.read(CONFIG, at + 16, 4);
        } else {
            let value = numbers.bytes(4);
            vmm.write(CONFIG, at + 16, &value);
        }
    }
    drop(vmm);
    stage.finish();
}
