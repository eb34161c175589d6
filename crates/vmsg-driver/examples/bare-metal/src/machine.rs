// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMU's arm64 machine `virt`: first instructions, page table, console, clock, power.
//!
//! Addresses: QEMU's hw/arm/virt.c. Registers: Arm Architecture Reference Manual for A-profile, PL011 TRM.

use core::arch::{asm, global_asm};
use core::fmt;
use core::panic::PanicInfo;

use virtio_msg::Instant;

// Everything below 1 GiB is devices, the gigabyte after it memory, at the addresses that they have. Without a page table all memory would be
// Device memory, which bears neither unaligned accesses nor atomic instructions.
global_asm!(
    r#"
.section .text.start
.globl _start
_start:
    // One processor is enough.
    mrs     x0, mpidr_el1
    and     x0, x0, #0xff
    cbnz    x0, 3f
    // Instructions of the floating-point unit, which copies use.
    mov     x0, #(3 << 20)
    msr     cpacr_el1, x0
    // Kinds of memory: 0 is Device-nGnRE, 1 is Normal, cacheable.
    mov     x0, #0xff04
    msr     mair_el1, x0
    // 39 bits of virtual address, granules of 4 KiB, cacheable walks, one table.
    ldr     x0, =0x200803519
    msr     tcr_el1, x0
    adrp    x0, page_table
    msr     ttbr0_el1, x0
    dsb     sy
    tlbi    vmalle1
    dsb     nsh
    isb
    mrs     x0, sctlr_el1
    mov     x1, #0x1005
    orr     x0, x0, x1
    msr     sctlr_el1, x0
    isb
    adrp    x0, __bss_start
    adrp    x1, __bss_end
1:  cmp     x0, x1
    b.hs    2f
    stp     xzr, xzr, [x0], #16
    b       1b
2:  adrp    x0, __stack_end
    mov     sp, x0
    bl      rust_main
3:  wfe
    b       3b

.section .data.page_table, "aw"
.balign 4096
page_table:
    // A block each: valid, accessed; devices are never executed.
    .quad   0x0060000000000401
    .quad   0x0000000040000705
    .fill   510, 8, 0
"#
);

/// The data register of the first PL011.
const UART: *mut u32 = 0x0900_0000 as *mut u32;

/// The first serial port. QEMU takes what it is given at once.
pub struct Console;

impl fmt::Write for Console {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            // SAFETY: the register is there, mapped as Device memory, and a store to it does nothing but send.
            unsafe { UART.write_volatile(byte.into()) };
        }
        Ok(())
    }
}

/// The time since some moment, by the generic timer.
pub fn now() -> Instant {
    let (ticks, frequency): (u64, u64);
    // SAFETY: reading these registers changes nothing.
    unsafe {
        asm!("isb", "mrs {}, cntvct_el0", out(reg) ticks, options(nomem, nostack));
        asm!("mrs {}, cntfrq_el0", out(reg) frequency, options(nomem, nostack));
    }
    let nanos = u128::from(ticks) * 1_000_000_000 / u128::from(frequency.max(1));
    Instant(u64::try_from(nanos).unwrap_or(u64::MAX))
}

/// Ends the machine: SYSTEM_OFF of PSCI, which QEMU has at HVC.
pub fn power_off() -> ! {
    loop {
        // SAFETY: the call does not return; if nobody took it there is nothing else to do.
        unsafe { asm!("hvc #0", in("x0") 0x8400_0008_u64, options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let _ = fmt::Write::write_fmt(&mut Console, format_args!("{info}\n"));
    power_off()
}
