// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitStatus};
use std::sync::Arc;

use super::*;
use crate::{Access, Mapping};

const PAGE: usize = 4096;
/// Names what a child process of a test is to do.
const CHILD: &str = "VMSG_MEM_FAULT_TEST";

fn byte(mapping: &Mapping, offset: usize) -> u8 {
    let mut byte = [0xff];
    assert_eq!(mapping.ram().read(offset, &mut byte), 1);
    byte[0]
}

fn pages(count: usize) -> (Mapping, File) {
    let (mapping, fd) = Mapping::memfd("test", (count * PAGE) as u64, false).unwrap();
    mapping.ram().fill(7);
    (mapping, File::from(fd))
}

#[test]
fn a_truncated_file_reads_zero_and_marks_the_mapping_lost() {
    install().unwrap();
    let (mapping, file) = pages(4);
    let (other, _keep) = pages(4);
    file.set_len(PAGE as u64).unwrap();
    assert_eq!(byte(&mapping, 0), 7);
    assert!(!mapping.is_lost(), "nobody has touched what is gone");
    assert_eq!(byte(&mapping, 2 * PAGE + 5), 0);
    assert!(mapping.is_lost());
    mapping.ram().write(PAGE, b"kept");
    assert_eq!(byte(&mapping, PAGE), b'k');
    assert_eq!(byte(&mapping, 0), 7, "what is left of the file stays");
    assert!(!other.is_lost());
}

#[test]
fn a_mapping_for_reading_is_guarded_too_and_records_are_used_again() {
    install().unwrap();
    for _ in 0..100 {
        let (_, fd) = Mapping::memfd("test", 2 * PAGE as u64, false).unwrap();
        let mapping = Mapping::of_fd(fd.as_fd(), 0, 2 * PAGE as u64, Access::Read).unwrap();
        assert!(!mapping.is_lost());
        File::from(fd).set_len(0).unwrap();
        assert_eq!(byte(&mapping, PAGE + 1), 0);
        assert!(mapping.is_lost());
    }
    assert!(
        RANGES.iter().count() < 90,
        "records of dropped mappings are free"
    );
}

#[test]
fn pages_touched_backwards_need_few_mappings() {
    install().unwrap();
    let count = 2000;
    let (mapping, file) = pages(count);
    file.set_len(0).unwrap();
    for page in (0..count).rev() {
        assert_eq!(byte(&mapping, page * PAGE), 0);
        mapping.ram().write(page * PAGE, &[1]);
    }
    let (from, to) = (mapping.ram().as_ptr().addr(), mapping.len());
    let inside = std::fs::read_to_string("/proc/self/maps")
        .unwrap()
        .lines()
        .filter_map(|line| usize::from_str_radix(line.split('-').next()?, 16).ok())
        .filter(|start| (from..from + to).contains(start))
        .count();
    assert!(inside <= 3, "{inside}");
}

#[test]
fn many_threads_may_fault_at_once() {
    install().unwrap();
    let (mapping, file) = pages(64);
    let mapping = Arc::new(mapping);
    file.set_len(0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let mapping = &mapping;
            scope.spawn(move || {
                for page in 0..64 {
                    assert_eq!(byte(mapping, (page * 7 + thread) % 64 * PAGE), 0);
                }
            });
        }
    });
    assert!(mapping.is_lost());
}

#[test]
fn system_calls_fail_with_efault() {
    install().unwrap();
    let (mapping, file) = pages(2);
    file.set_len(0).unwrap();
    let (_reader, writer) = std::io::pipe().unwrap();
    // SAFETY: the range is mapped; that its pages are gone is the point.
    let wrote = unsafe { libc::write(writer.as_raw_fd(), mapping.ram().as_ptr().cast(), 10) };
    assert_eq!(wrote, -1);
    assert_eq!(
        io::Error::last_os_error().raw_os_error(),
        Some(libc::EFAULT)
    );
}

/// Runs this test program again for one test, in the role `role`.
fn child(test: &str, role: &str) -> ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--test-threads=1"])
        .env(CHILD, role)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap()
}

/// Touches a page that is gone, of memory that is not ours.
fn touch_foreign_memory() {
    let (_, fd) = Mapping::memfd("test", PAGE as u64, false).unwrap();
    // SAFETY: a new mapping where the kernel finds room.
    let page = unsafe {
        libc::mmap(
            ptr::null_mut(),
            PAGE,
            libc::PROT_READ,
            libc::MAP_SHARED,
            fd.as_raw_fd(),
            0,
        )
    };
    assert_ne!(page, libc::MAP_FAILED);
    File::from(fd).set_len(0).unwrap();
    // SAFETY: mapped, and meant to fault.
    let value = unsafe { page.cast::<u8>().read_volatile() };
    std::process::exit(i32::from(value));
}

#[test]
fn faults_elsewhere_and_sent_signals_still_kill() {
    match std::env::var(CHILD).as_deref() {
        Ok("touch") => {
            install().unwrap();
            touch_foreign_memory();
        }
        Ok(_) => {
            // Without the standard library's own handler, which swallows the first one.
            // SAFETY: the default action, and raise has no preconditions.
            unsafe {
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
                install().unwrap();
                libc::raise(libc::SIGBUS);
            }
            std::process::exit(0);
        }
        Err(_) => {
            let name = "fault::tests::faults_elsewhere_and_sent_signals_still_kill";
            assert_eq!(child(name, "touch").signal(), Some(libc::SIGBUS));
            assert_eq!(child(name, "raise").signal(), Some(libc::SIGBUS));
        }
    }
}

#[test]
fn an_earlier_handler_gets_what_is_not_ours() {
    extern "C" fn earlier(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        // SAFETY: called with the siginfo of a SIGBUS.
        let ok = unsafe { (*info).si_signo == libc::SIGBUS };
        // SAFETY: ends the process without running anything else.
        unsafe { libc::_exit(if ok { 42 } else { 1 }) }
    }
    if std::env::var_os(CHILD).is_none() {
        let status = child(
            "fault::tests::an_earlier_handler_gets_what_is_not_ours",
            "touch",
        );
        assert_eq!(status.code(), Some(42));
        return;
    }
    // SAFETY: zeros are valid; the handler ends the process at once.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = earlier as extern "C" fn(_, _, _) as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(libc::sigaction(libc::SIGBUS, &action, ptr::null_mut()), 0);
    }
    install().unwrap();
    let (mapping, file) = pages(2);
    file.set_len(0).unwrap();
    assert_eq!(
        byte(&mapping, 0),
        0,
        "ours does not reach the earlier handler"
    );
    touch_foreign_memory();
}

/// Sends this thread a SIGBUS as the kernel does for a fault at `address`.
fn fake_fault(address: *const u8, code: libc::c_int) {
    // SAFETY: zeros are a valid siginfo.
    let mut info: libc::siginfo_t = unsafe { MaybeUninit::zeroed().assume_init() };
    info.si_signo = libc::SIGBUS;
    info.si_code = code;
    // SAFETY: si_addr is the first field after the three words and their padding (asm-generic/siginfo.h),
    // and siginfo has 128 bytes.
    unsafe {
        ptr::from_mut(&mut info)
            .cast::<usize>()
            .add(2)
            .write(address as usize)
    };
    // SAFETY: `info` is a complete siginfo; a process may send itself any code.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_rt_tgsigqueueinfo,
            libc::getpid(),
            libc::gettid(),
            libc::SIGBUS,
            ptr::from_ref(&info),
        )
    };
    assert_eq!(sent, 0);
}

#[test]
fn a_misaligned_access_is_not_taken_for_a_truncated_file() {
    let name = "fault::tests::a_misaligned_access_is_not_taken_for_a_truncated_file";
    let Ok(code) = std::env::var(CHILD) else {
        for code in [libc::BUS_ADRALN, libc::BUS_OBJERR] {
            let ended = child(name, &code.to_string());
            assert_eq!(ended.signal(), Some(libc::SIGBUS), "code {code}");
        }
        let ended = child(name, &libc::BUS_ADRERR.to_string());
        assert_eq!(ended.code(), Some(17), "the same fault, of a missing page");
        return;
    };
    // Without the standard library's own handler, which swallows the first one.
    // SAFETY: sets the default action.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
    install().unwrap();
    let (mapping, _file) = pages(2);
    fake_fault(mapping.ram().as_ptr(), code.parse().unwrap());
    std::process::exit(if mapping.is_lost() { 17 } else { 0 });
}
