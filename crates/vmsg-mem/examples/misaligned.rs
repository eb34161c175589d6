// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What memory bears: `misaligned FILE` maps a page of a file, touches it as [`DeviceMapping`] does, at every offset, and
//! then once, on purpose, with a load that is not aligned. Memory of a device on arm64 ends the program there, with
//! SIGBUS, in spite of the handler for truncated files. In the end-to-end tests this runs in guests.

use std::arch::asm;
use std::fs::OpenOptions;
use std::os::fd::AsFd;

use vmsg_mem::{Access, DeviceMapping, Mapping, fault};

const PAGE: u64 = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args().nth(1).ok_or("usage: misaligned FILE")?;
    fault::install()?;
    let file = OpenOptions::new().read(true).write(true).open(&path)?;
    let device = DeviceMapping::of_fd(file.as_fd(), 0, PAGE)?;
    let pattern: Vec<u8> = (0..64).map(|n| 0xa0 ^ n).collect();
    for offset in 0..64 {
        for len in 0..=64 {
            let mut back = vec![0; len];
            assert_eq!(device.region().write(offset, &pattern[..len]), len);
            assert_eq!(device.region().read(offset, &mut back), len);
            assert_eq!(back, pattern[..len], "{len} bytes at {offset}");
        }
    }
    println!("aligned accesses are borne");
    let memory = Mapping::of_fd(file.as_fd(), 0, PAGE, Access::ReadWrite)?;
    memory.device_region().write(0, &pattern);
    let address = memory.ram().as_ptr().wrapping_add(1);
    let value: u64;
    // SAFETY: 8 bytes inside the mapping, which anybody may change. In assembly, as no Rust access is as wrong as this.
    unsafe {
        #[cfg(target_arch = "aarch64")]
        asm!("ldr {}, [{}]", out(reg) value, in(reg) address, options(nostack, readonly));
        #[cfg(target_arch = "x86_64")]
        asm!("mov {}, [{}]", out(reg) value, in(reg) address, options(nostack, readonly));
    }
    assert_eq!(value.to_le_bytes(), pattern[1..9]);
    println!("misaligned accesses are borne");
    Ok(())
}
