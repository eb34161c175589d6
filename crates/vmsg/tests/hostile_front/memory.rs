// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that is not what it seems.

use crate::stage::{ISOLATED, LENT, Stage};
use crate::vmm::{
    Came, DMA_MAP, GUEST, Numbers, RAM, Ram, Vmm, descriptor, header, memfd, u64_at, words,
};
use rustix::fs::{SealFlags, fcntl_add_seals, ftruncate};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const FOREIGN: [&str; 4] = ["/dev/zero", "/proc/self/status", "/", "/dev/null"];

#[test]
fn what_is_no_memory_is_refused() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let (pipe, _other) = std::io::pipe().unwrap();
        let mut files: Vec<OwnedFd> = FOREIGN
            .iter()
            .map(|path| File::open(path).unwrap().into())
            .collect();
        files.push(pipe.into());
        files.push(vmm.socket.try_clone().unwrap().into());
        files.push(crate::vmm::new_eventfd());
        for _ in 0..20 {
            for file in &files {
                assert_eq!(vmm.map(GUEST, 0x1000, 0, Some(file)), Err(22));
            }
        }
        let file = memfd(0x1000);
        for (address, size, offset) in [
            (GUEST, 0, 0),
            (GUEST, 0x1001, 0),
            (GUEST, 0x1000, 1),
            (GUEST, 0x1000, u64::MAX),
            (GUEST, u64::MAX, 0),
            (u64::MAX, 2, 0),
            (u64::MAX - 0xfff, 0x1000, 0),
        ] {
            assert_eq!(vmm.map(address, size, offset, Some(&file)), Err(22));
        }
        // Two descriptors, unknown flags, a structure cut off.
        let good = Vmm::map_payload(3, 0, GUEST, 0x1000);
        let two = [file.as_fd(), file.as_fd()];
        assert_eq!(vmm.ask(DMA_MAP, &good, &two), Err(22));
        let flags = Vmm::map_payload(0xff, 0, GUEST, 0x1000);
        assert_eq!(vmm.ask(DMA_MAP, &flags, &[file.as_fd()]), Err(22));
        assert_eq!(vmm.ask(DMA_MAP, &good[..31], &[file.as_fd()]), Err(22));
        assert_eq!(
            vmm.ask(DMA_MAP, &words(&[u32::MAX; 8]), &[file.as_fd()]),
            Err(22)
        );
        assert_eq!(vmm.unmap_all().map(|answer| u64_at(&answer, 16)), Ok(0));
    }
    stage.finish();
}

/// Works a queue in `file`, whatever becomes of it.
fn work(vmm: &mut Vmm, file: &OwnedFd, mut meanwhile: impl FnMut(&mut Vmm, usize)) {
    vmm.unmap_all().unwrap();
    if vmm.map(GUEST, RAM, 0, Some(file)).is_err() {
        return;
    }
    vmm.start(0, 16, GUEST);
    for n in 0..30 {
        // Written by others: this process has not mapped it.
        let _ = rustix::io::pwrite(file, &descriptor(GUEST + 0x1_0000, 0x1_0000, 2, 0), 0);
        let _ = rustix::io::pwrite(file, &(n as u16 + 1).to_le_bytes(), 0x1002);
        vmm.kick(0);
        meanwhile(vmm, n);
        vmm.status();
    }
}

#[test]
fn files_of_all_kinds_hold_up_nobody() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        // Nothing but holes, then cut off, then longer again.
        let file = memfd(RAM);
        work(&mut vmm, &file, |_, n| {
            if n == 10 || n == 20 {
                ftruncate(&file, 0x1000 * (n as u64 - 10)).unwrap();
            } else if n == 15 {
                ftruncate(&file, RAM).unwrap();
            }
        });
        // Nobody may write.
        let file = memfd(RAM);
        fcntl_add_seals(&file, SealFlags::WRITE).unwrap();
        work(&mut vmm, &file, |_, _| {});
        // Only who has mapped it before may write.
        let file = memfd(RAM);
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        work(&mut vmm, &file, |_, _| {});
        // Nobody may cut it.
        let file = memfd(RAM);
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL).unwrap();
        work(&mut vmm, &file, |_, _| {});
        // Opened for reading only, and for nothing at all.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let file: OwnedFd = File::open(&path).unwrap().into();
        work(&mut vmm, &file, |_, _| {});
        let flags = rustix::fs::OFlags::PATH | rustix::fs::OFlags::CLOEXEC;
        let file = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).unwrap();
        work(&mut vmm, &file, |_, _| {});
        // As long as files can be.
        let file = memfd(i64::MAX as u64);
        work(&mut vmm, &file, |_, _| {});
        // Holes are made while it is used, and it is taken away and given again.
        let file = memfd(RAM);
        work(&mut vmm, &file, |vmm, n| {
            let flags =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&file, flags, 0, RAM).unwrap();
            if n % 10 == 5 {
                vmm.unmap(GUEST, RAM).unwrap();
                vmm.map(GUEST, RAM, 0, Some(&file)).unwrap();
            }
        });
        eprintln!("{front}: longest {:?}", vmm.longest);
    }
    stage.finish();
}

#[test]
fn files_that_are_cut_while_they_are_used_cost_only_their_own_device() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let file = memfd(RAM);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut numbers = Numbers(5);
                while !stop.load(Ordering::Relaxed) {
                    ftruncate(&file, numbers.below(RAM)).unwrap();
                    ftruncate(&file, RAM).unwrap();
                }
            });
            let end = Instant::now() + Duration::from_millis(1200);
            while Instant::now() < end {
                work(&mut vmm, &file, |_, _| {});
            }
            stop.store(true, Ordering::Relaxed);
        });
        eprintln!("{front}: longest {:?}", vmm.longest);
    }
    stage.finish();
}

#[test]
fn many_files_leave_room_for_others() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        vmm.start(0, 16, GUEST);
        let mut taken = 0u64;
        for n in 0..1500u64 {
            let file = memfd(1 << 40);
            let at = (1 << 40) + (n << 20);
            taken += u64::from(vmm.map(at, 0x1000, 0, Some(&file)).is_ok());
        }
        // One file that grows and grows.
        let file = memfd(0x1000);
        for n in 0..1500u64 {
            ftruncate(&file, 0x1000 * (n + 1)).unwrap();
            let at = (1 << 41) + (n << 20);
            taken += u64::from(vmm.map(at, 0x1000, 0x1000 * n, Some(&file)).is_ok());
        }
        let (proxy, host) = (stage.proxy(), stage.host());
        eprintln!(
            "{front}: {taken} taken, proxy {proxy:?}, host {host:?}, longest {:?}",
            vmm.longest
        );
        assert!(proxy.fds < stage.before().fds + 600, "{proxy:?}");
        assert!(proxy.mappings < stage.before().mappings + 100, "{proxy:?}");
        // Both are there for somebody else.
        stage.use_front(crate::stage::NET);
        vmm.unmap_all().unwrap();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        ram.mapping.ram().get(0, 0x4000).unwrap().fill(0);
        vmm.start(0, 16, GUEST);
        assert_eq!(vmm.status(), 0xf, "{front} works again");
    }
    stage.finish();
}

#[test]
fn thousands_of_ranges_come_and_go_while_a_queue_runs() {
    let stage = Stage::start();
    for front in [LENT, ISOLATED] {
        let mut vmm = Vmm::new(&stage.socket(front));
        let ram = Ram::new();
        vmm.map(GUEST, RAM, 0, Some(&ram.file)).unwrap();
        vmm.start(0, 16, GUEST);
        let begin = Instant::now();
        let mut taken = 0u64;
        while begin.elapsed() < Duration::from_millis(1500) && taken < 17_000 {
            let at = (1 << 40) + taken * 0x2000;
            let answer = vmm.map(at, 0x1000, taken * 0x1000 % RAM, Some(&ram.file));
            assert!(answer.is_ok() || taken > 16_000, "{answer:?}");
            vmm.kick(0);
            taken += 1;
        }
        vmm.unmap((1 << 40) + 0x2000 * (taken / 2), 1 << 40)
            .unwrap();
        let gone = vmm.unmap_all().unwrap();
        assert!(u64_at(&gone, 16) >= RAM);
        eprintln!("{front}: {taken} taken, longest {:?}", vmm.longest);
    }
    stage.finish();
}

/// What becomes of a question about memory.
#[derive(Clone, Copy, Debug)]
enum Reply {
    Never,
    Error(u32),
    Short,
    Long,
    OtherId,
    OtherCommand,
    OtherAddress,
    OtherCount,
    Twice,
    Late,
}

#[test]
fn answers_about_memory_that_are_wrong_late_or_missing_hold_up_nobody() {
    let stage = Stage::start();
    let kinds = [
        Reply::Never,
        Reply::Error(14),
        Reply::Error(0),
        Reply::Error(u32::MAX),
        Reply::Short,
        Reply::Long,
        Reply::OtherId,
        Reply::OtherCommand,
        Reply::OtherAddress,
        Reply::OtherCount,
        Reply::Twice,
        Reply::Late,
    ];
    for front in [LENT, ISOLATED] {
        let mut longest = Duration::ZERO;
        for kind in kinds {
            for patience in [0, 3] {
                let mut vmm = Vmm::new(&stage.socket(front));
                vmm.map(GUEST, RAM, 0, None).unwrap();
                vmm.start(0, 16, GUEST);
                let ram = Ram::new();
                ram.write(0, &descriptor(GUEST + 0x1_0000, 0x100, 2, 0));
                ram.write(0x1002, &1u16.to_le_bytes());
                vmm.kick(0);
                let first = answer_some(&mut vmm, &ram, patience);
                lie(&mut vmm, kind, first);
                for _ in 0..3 {
                    vmm.status();
                    vmm.kick(0);
                }
                vmm.reset();
                if let Some((id, command, payload)) = vmm_question(&mut vmm, kind) {
                    lie(&mut vmm, Reply::Twice, Some((id, command, payload)));
                }
                assert_eq!(vmm.status(), 0, "{kind:?}");
                longest = longest.max(vmm.longest);
            }
        }
        eprintln!("{front}: longest {longest:?}");
    }
    stage.finish();
}

/// For [`Reply::Late`], something that was asked before.
fn vmm_question(_vmm: &mut Vmm, kind: Reply) -> Option<(u16, u16, Vec<u8>)> {
    matches!(kind, Reply::Late).then(|| (0, crate::vmm::DMA_READ, vec![0; 16]))
}

fn reply(vmm: &mut Vmm, id: u16, command: u16, payload: &[u8], data: &[u8]) {
    let mut answer = header(id, command, payload.len().min(16) + data.len(), 1, 0);
    answer.extend(&payload[..payload.len().min(16)]);
    answer.extend(data);
    vmm.send(&answer, &[]);
}

/// Answers so many questions well, and gives the next one, if there is one.
fn answer_some(vmm: &mut Vmm, ram: &Ram, count: usize) -> Option<(u16, u16, Vec<u8>)> {
    let patient = vmm.socket.read_timeout().unwrap();
    vmm.socket
        .set_read_timeout(Some(Duration::from_millis(100)))
        .unwrap();
    let last = answer_each(vmm, ram, count);
    vmm.socket.set_read_timeout(patient).unwrap();
    last
}

fn answer_each(vmm: &mut Vmm, ram: &Ram, count: usize) -> Option<(u16, u16, Vec<u8>)> {
    for n in 0..=count {
        let (id, command, payload) = match vmm.come() {
            Came::Question(id, command, payload) => (id, command, payload),
            Came::Answer(..) => continue,
            Came::End => return None,
        };
        if n == count {
            return Some((id, command, payload));
        }
        let (at, len) = (u64_at(&payload, 0) - GUEST, u64_at(&payload, 8));
        if len > RAM {
            vmm.send(&header(id, command, 0, 0x21, 22), &[]);
        } else if command == crate::vmm::DMA_READ {
            let data = ram.read(at as usize, len as usize);
            reply(vmm, id, command, &payload, &data);
        } else {
            reply(vmm, id, command, &payload, &[]);
        }
    }
    None
}

fn lie(vmm: &mut Vmm, kind: Reply, question: Option<(u16, u16, Vec<u8>)>) {
    let Some((id, command, payload)) = question else {
        return;
    };
    let len = (u64_at(&payload, 8) as u32).min(0x1000) as usize;
    let data = vec![0xff; len];
    let mut other = payload.clone();
    match kind {
        Reply::Never | Reply::Late => {}
        Reply::Error(errno) => {
            vmm.send(&header(id, command, 0, 0x21, errno), &[]);
        }
        Reply::Short => reply(vmm, id, command, &payload[..8], &[]),
        Reply::Long => reply(vmm, id, command, &payload, &vec![0xff; len + 0x8000]),
        Reply::OtherId => reply(vmm, id.wrapping_add(77), command, &payload, &data),
        Reply::OtherCommand => reply(vmm, id, command ^ 7, &payload, &data),
        Reply::OtherAddress => {
            other[0] ^= 1;
            reply(vmm, id, command, &other, &data);
        }
        Reply::OtherCount => {
            other[8] ^= 1;
            reply(vmm, id, command, &other, &data);
        }
        Reply::Twice => {
            reply(vmm, id, command, &payload, &data);
            reply(vmm, id, command, &payload, &data);
        }
    }
}

#[test]
fn interrupts_that_change_without_end_while_memory_does_not_answer_take_no_room() {
    let stage = Stage::start();
    let mut vmm = Vmm::new(&stage.socket(ISOLATED));
    let calls = [crate::vmm::new_eventfd(), crate::vmm::new_eventfd()];
    vmm.map(GUEST, RAM, 0, None).unwrap();
    vmm.set_irqs(4 | 32, 2, 0, 2, &[calls[0].as_fd(), calls[1].as_fd()])
        .unwrap();
    vmm.negotiate(0);
    for at in (0x40..0x100).step_by(4) {
        if vmm.read(crate::vmm::CONFIG, at, 1)[0] == 0x11 {
            vmm.write(crate::vmm::CONFIG, at + 2, &0x8000u16.to_le_bytes());
        }
    }
    vmm.write(crate::vmm::BAR, 0x1a, &1u16.to_le_bytes());
    vmm.queue(0, 16, crate::vmm::rings(GUEST));
    vmm.set_status(0xf);
    vmm.kick(0);
    let begin = Instant::now();
    let mut most = 0;
    let mut n = 0u32;
    while begin.elapsed() < Duration::from_millis(1500) {
        for _ in 0..50 {
            vmm.post(1, 16 + 12, &(n % 2).to_le_bytes());
            n += 1;
        }
        vmm.status();
        most = most.max(stage.proxy().fds);
    }
    eprintln!("{n} changes, {most} descriptors");
    assert!(most < stage.before().fds + 30, "{most}");
    drop(vmm);
    stage.finish();
}
