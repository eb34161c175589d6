// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn file(len: u64) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

#[test]
fn a_part_of_a_file_is_mapped_and_known_again() {
    let file = file(0x5000);
    let ram = CommonRam::map(CommonMode::Segment, file.path(), 0x1000, Some(0x3000)).unwrap();
    let metadata = file.as_file().metadata().unwrap();
    let known = CommonFile {
        device: metadata.dev(),
        inode: metadata.ino(),
        offset: 0x1000,
    };
    assert_eq!((ram.len, ram.file), (0x3000, Some(known)));
    let mapping = ram.mapping.unwrap();
    mapping.ram().write(0, b"here");
    let (same, offset) = mapping.file().expect("for others that are to map it");
    assert_eq!(rustix::fs::fstat(same).unwrap().st_ino, metadata.ino());
    assert_eq!(offset, 0x1000);
    let mut found = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(file.as_file(), &mut found, 0x1000).unwrap();
    assert_eq!(&found, b"here");
}

#[test]
fn without_a_length_it_ends_with_the_file() {
    let file = file(0x5000);
    let ram = CommonRam::map(CommonMode::Whole, file.path(), 0x1000, None).unwrap();
    assert_eq!(ram.len, 0x4000);
}

#[test]
fn a_file_that_is_too_short_or_not_there_is_named() {
    let file = file(0x5000);
    let map = |offset, len| CommonRam::map(CommonMode::Whole, file.path(), offset, len);
    for (offset, len) in [
        (0x1000, Some(0x4001)),
        (0x5000, None),
        (0, Some(0)),
        (0x1000, Some(u64::MAX)),
        (u64::MAX, None),
    ] {
        let refused = map(offset, len);
        assert!(
            matches!(refused, Err(CommonRamError::TooShort { have: 0x5000, .. })),
            "{offset:#x} {len:x?}: {refused:?}"
        );
    }
    let missing = CommonRam::map(CommonMode::Whole, Path::new("/nowhere/ram"), 0, None);
    let text = missing.unwrap_err().to_string();
    assert!(text.contains("/nowhere/ram"), "{text}");
}

#[test]
fn vectors_are_found_by_their_numbers() {
    let bell = Doorbell::new().unwrap();
    let own = bell.try_clone().unwrap().into();
    let vectors = Vectors::new(vec![(3, own)], vec![(5, bell)]);
    assert_eq!(vectors.own().collect::<Vec<_>>(), [3]);
    assert_eq!(vectors.theirs().collect::<Vec<_>>(), [5]);
    assert!(vectors.own_fd(3).is_some() && vectors.own_fd(5).is_none());
    assert!(vectors.bell(5).is_some() && vectors.bell(3).is_none());
}
