// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

#[test]
fn memory_is_made_where_its_size_is_given_and_found_where_not() {
    let dir = tempfile::tempdir().unwrap();
    let file = Plain::File(dir.path().join("memory"));
    assert!(matches!(open(&file, None), Err(PlainError::Missing(_))));
    assert!(matches!(open(&file, Some(0)), Err(PlainError::Missing(_))));
    let one = open(&file, Some(8192)).unwrap();
    let other = open(&file, None).unwrap();
    assert_eq!((one.len(), other.len()), (8192, 8192));
    assert!(one.region().write_u32(4096, 7));
    assert_eq!(other.region().read_u32(4096), Some(7));
    assert!(other.ram().is_some());
    assert_eq!(open(&file, Some(4096)).unwrap().len(), 4096);
    assert!(matches!(
        open(&file, Some(8193)),
        Err(PlainError::Short {
            have: 8192,
            want: 8193,
            ..
        })
    ));
}

#[test]
fn what_cannot_be_mapped_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let pipe = dir.path().join("pipe");
    rustix::fs::mkfifoat(rustix::fs::CWD, &pipe, Mode::RUSR | Mode::WUSR).unwrap();
    assert!(matches!(
        open(&Plain::File(pipe), Some(4096)),
        Err(PlainError::NoFile(_))
    ));
    assert!(matches!(
        open(&Plain::File(dir.path().into()), Some(4096)),
        Err(PlainError::Open { .. })
    ));
    let empty = dir.path().join("empty");
    std::fs::write(&empty, b"").unwrap();
    assert!(matches!(
        open(&Plain::File(empty), None),
        Err(PlainError::NoSize(_))
    ));
}

#[test]
fn shared_memory_goes_by_its_name() {
    let name = format!("vmsg-ivshmem-test-{}", std::process::id());
    let shm = Plain::Shm(name.clone());
    let memory = open(&shm, Some(4096));
    let path = Path::new("/dev/shm").join(&name);
    let there = path.exists();
    std::fs::remove_file(path).unwrap();
    assert!(there);
    assert_eq!(memory.unwrap().len(), 4096);
    assert_eq!(shm.to_string(), format!("shared memory {name}"));
}
