// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Messages of any kind in any order.

use crate::stage::{ISOLATED, LENT, NET, Stage};
use crate::vmm::{GUEST, Numbers, RAM, Ram, Vmm, header, new_eventfd};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

#[test]
fn messages_at_random_are_answered_or_end_the_connection() {
    let stage = Stage::start();
    let mut numbers = Numbers(7);
    let end = Instant::now() + Duration::from_millis(2500);
    let (eventfd, ram) = (new_eventfd(), Ram::new());
    let (pipe, _other) = std::io::pipe().unwrap();
    while Instant::now() < end {
        for front in [LENT, ISOLATED, NET] {
            let mut vmm = Vmm::new(&stage.socket(front));
            vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
            vmm.start(0, 64, GUEST);
            let own = vmm.socket.try_clone().unwrap();
            let kinds: [BorrowedFd<'_>; 4] =
                [eventfd.as_fd(), ram.file.as_fd(), pipe.as_fd(), own.as_fd()];
            let reader = vmm.socket.try_clone().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(move || {
                    let mut reader = reader;
                    let _ = std::io::copy(&mut reader, &mut std::io::sink());
                });
                for id in 0..400u16 {
                    let command = numbers.below(17) as u16;
                    let len = numbers.pick(&[0, 4, 16, 20, 32, 36, 100]);
                    let mut payload = numbers.bytes(len);
                    // Fields that make sense, more often than not.
                    for word in payload.chunks_exact_mut(4) {
                        if numbers.below(3) != 0 {
                            let sense = [
                                0,
                                1,
                                2,
                                3,
                                4,
                                7,
                                20,
                                32,
                                0x24,
                                0x4000_0000,
                                0x1000,
                                u32::MAX,
                            ];
                            word.copy_from_slice(&numbers.pick(&sense).to_le_bytes());
                        }
                    }
                    let flags = numbers.pick(&[0, 0, 0, 1, 0x10, 0x21, 2, 0x8000_0000]);
                    let mut message = header(id, command, len, flags, numbers.next() as u32);
                    message.extend(payload);
                    let fds = numbers.pick(&[0, 0, 1, 1, 2, 15]);
                    let fds: Vec<_> = (0..fds).map(|_| numbers.pick(&kinds)).collect();
                    if numbers.below(300) == 0 {
                        message.truncate(numbers.below(message.len() as u64) as usize + 1);
                    }
                    if !vmm.send(&message, &fds) {
                        break;
                    }
                }
                let _ = vmm.socket.shutdown(std::net::Shutdown::Both);
            });
        }
    }
    stage.finish();
}
