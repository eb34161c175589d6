// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn a_file_that_is_mapped_without_sharing_is_told_from_others() {
    let file = FileId {
        device: rustix::fs::makedev(0, 1),
        inode: 77,
    };
    let line = |rights: &str, place: &str, inode: u64| {
        format!(
            "7f0000000000-7f0000001000 {rights} 00000000 {place} {inode}   /memfd:mem (deleted)\n"
        )
    };
    let [shared, private] = ["rw-s", "rw-p"].map(|rights| line(rights, "00:01", 77));
    let others = line("rw-p", "00:01", 78) + &line("rw-p", "00:02", 77);
    let odd = "\nffff-ffff rw-p\n7f-80 rw-p 0 x:y z\n";
    assert!(!is_only_private(&format!("{others}{odd}"), file));
    assert!(is_only_private(&format!("{others}{odd}{private}"), file));
    assert!(!is_only_private(&shared, file));
    assert!(!is_only_private(&format!("{private}{shared}"), file));
}

#[test]
fn the_maps_of_this_process_are_understood() {
    let (_mapping, fd) = vmsg_mem::Mapping::memfd("shared", 0x1000, false).unwrap();
    let file = MemoryFile::new(fd, 0x1000).unwrap();
    let me = rustix::process::getpid();
    assert!(!has_private(me, file.id));
    // The program itself is.
    let program = File::open("/proc/self/exe").unwrap();
    let stat = rustix::fs::fstat(&program).unwrap();
    let id = FileId {
        device: stat.st_dev,
        inode: stat.st_ino,
    };
    assert!(has_private(me, id));
}

#[test]
fn of_sysfs_only_the_memory_of_an_ivshmem_function_is_taken() {
    let file = std::fs::File::open("/sys/devices/system/cpu/online").expect("a file of sysfs");
    assert!(!is_of_ivshmem(file.as_fd()));
    let error = MemoryFile::new(file.into(), 0).expect_err("no memory");
    assert!(matches!(error, FileError::Foreign), "{error}");

    let function = tempfile::tempdir().expect("a directory");
    let put = |name: &str, text: &str| {
        std::fs::write(function.path().join(name), text).expect("a file");
    };
    put("vendor", "0x1af4\n");
    put("device", "0x1110\n");
    let at = |name: &str| is_memory_of_ivshmem(&function.path().join(name));
    assert!(at("resource2") && at("resource2_wc"));
    assert!(!at("resource0") && !at("config"));
    put("device", "0x1041\n");
    assert!(!at("resource2"));
    // In place, but of no file system that nobody else can make files in.
    put("device", "0x1110\n");
    put("resource2", "");
    let file = std::fs::File::open(function.path().join("resource2")).expect("a file");
    assert!(!is_of_ivshmem(file.as_fd()));
}
