// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptors for interrupts that are none, or block.

use crate::stage::{ISOLATED, LENT, Stage};
use crate::vmm::{BAR, CONFIG, GUEST, INTX, MSIX, RAM, Ram, Vmm, descriptor, new_eventfd, rings};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

const EVENTFD: u32 = 4 | 32;

#[test]
fn what_is_no_eventfd_is_refused() {
    let stage = Stage::start();
    let mut vmm = Vmm::new(&stage.socket(LENT));
    let (read, write) = std::io::pipe().unwrap();
    let own = vmm.socket.try_clone().unwrap();
    let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).unwrap();
    let memory = crate::vmm::memfd(4096);
    let null = std::fs::File::open("/dev/null").unwrap();
    let fds = [
        read.as_fd(),
        write.as_fd(),
        own.as_fd(),
        epoll.as_fd(),
        memory.as_fd(),
        null.as_fd(),
    ];
    for _ in 0..50 {
        for fd in fds {
            for index in [INTX, MSIX, 3, 4] {
                assert_eq!(vmm.set_irqs(EVENTFD, index, 0, 1, &[fd]), Err(22));
            }
        }
    }
    // Both: each keeps the connection.
    drop((vmm, own));
    stage.finish();
}

/// Full, and whoever writes it waits.
fn blocking() -> OwnedFd {
    let fd = new_eventfd();
    rustix::io::write(&fd, &(u64::MAX - 1).to_ne_bytes()).unwrap();
    fd
}

fn block(fd: &OwnedFd) {
    let flags = fcntl_getfl(fd).unwrap();
    fcntl_setfl(fd, flags & !OFlags::NONBLOCK).unwrap();
}

#[test]
fn interrupts_that_block_hold_up_nobody() {
    let stage = Stage::start();
    let mut longest = Duration::ZERO;
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        let end = Instant::now() + Duration::from_millis(1500);
        let mut round = 0u16;
        while Instant::now() < end {
            let calls = [blocking(), blocking()];
            vmm.set_irqs(EVENTFD, MSIX, 0, 2, &[calls[0].as_fd(), calls[1].as_fd()])
                .unwrap();
            let msix = round.is_multiple_of(2);
            if !msix {
                vmm.set_irqs(EVENTFD, INTX, 0, 1, &[calls[0].as_fd()])
                    .unwrap();
            }
            vmm.negotiate(0);
            // Where the capability is does not matter: all words of the upper half get it.
            for at in (0x40..0x100).step_by(4) {
                if vmm.read(CONFIG, at, 1)[0] == 0x11 {
                    let control = if msix { 0x8000u16 } else { 0 };
                    vmm.write(CONFIG, at + 2, &control.to_le_bytes());
                }
            }
            vmm.write(BAR, 0x10, &0u16.to_le_bytes());
            vmm.write(BAR, 0x16, &0u16.to_le_bytes());
            vmm.write(BAR, 0x1a, &1u16.to_le_bytes());
            vmm.queue(0, 16, rings(GUEST));
            vmm.set_status(0xf);
            calls.iter().for_each(block);
            for n in 0..16u16 {
                ram.write(0, &descriptor(GUEST + 0x1_0000, 16, 2, 0));
                ram.write(0x1000 + 4 + 2 * usize::from(n), &0u16.to_le_bytes());
                ram.write(0x1002, &(n + 1).to_le_bytes());
                vmm.kick(0);
                // Blocking again, whatever was made of it.
                calls.iter().for_each(block);
                // VFIO_IRQ_SET_DATA_NONE, ACTION_TRIGGER.
                vmm.set_irqs(1 | 32, MSIX, 0, 2, &[]).unwrap();
                // Masks, one after the other.
                vmm.write(1, 16 + 12, &u32::from(n % 2).to_le_bytes());
                vmm.status();
            }
            round += 1;
        }
        longest = longest.max(vmm.longest);
    }
    eprintln!("longest {longest:?}");
    stage.finish();
}
