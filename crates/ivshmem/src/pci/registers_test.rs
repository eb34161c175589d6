// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::os::fd::AsFd;

use vmsg_mem::Mapping;

use super::*;

#[test]
fn registers_are_the_same_mapped_and_in_a_file() {
    let (memory, fd) = Mapping::memfd("bar", 4096, false).unwrap();
    let word = |offset| memory.device_region().read_u32(offset).unwrap();
    let bar = Arc::new(DeviceMapping::of_fd(fd.as_fd(), 0x100, SIZE).unwrap());
    let mapped = Registers::mapped(fd.try_clone().unwrap(), bar);
    let in_file = Registers::in_file(fd, 0x100);
    for registers in [mapped, in_file] {
        assert!(memory.device_region().write_u32(0x108, 5));
        assert_eq!(registers.read(IV_POSITION), Some(5));
        registers.ring(PeerId(3), 1).unwrap();
        assert_eq!(word(0x10c), 0x0003_0001);
        let bell = registers.bell(PeerId(u16::MAX), 2).unwrap();
        assert_eq!(word(0x10c), 0x0003_0001);
        bell.ring().unwrap();
        bell.ring().unwrap();
        assert_eq!(word(0x10c), 0xffff_0002);
        registers.ring(PeerId(0), 0).unwrap();
        assert_eq!(word(0x10c), 0, "a bell does not change what it came from");
    }
}
