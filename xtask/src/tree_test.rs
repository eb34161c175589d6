// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::{Cpio, Files};

#[test]
fn folders_of_files_come_once_and_before_them() {
    let files = Files {
        names: ["lib/x/a".to_owned(), "lib/b".to_owned()].into(),
        files: vec![
            ("lib/x/a".to_owned(), vec![1]),
            ("lib/b".to_owned(), vec![2]),
        ],
    };
    let mut cpio = Cpio::default();
    files.write(&mut cpio, &["bin"]);
    let archive = cpio.finish();
    let at = |name: &[u8]| {
        let found: Vec<usize> = archive
            .windows(name.len())
            .enumerate()
            .filter_map(|(at, w)| (w == name).then_some(at))
            .collect();
        assert_eq!(found.len(), 1, "{}", String::from_utf8_lossy(name));
        found[0]
    };
    assert!(at(b"lib\0") < at(b"lib/x\0"));
    assert!(at(b"lib/x\0") < at(b"lib/x/a\0"));
    assert!(at(b"lib/x\0") < at(b"lib/b\0"));
}
