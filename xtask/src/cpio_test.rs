// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::Cpio;

/// Reads an archive back: (path, mode, data).
fn read(bytes: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
    let mut at = 0;
    let mut entries = Vec::new();
    loop {
        assert_eq!(&bytes[at..at + 6], b"070701");
        let field = |n: usize| {
            let start = at + 6 + 8 * n;
            u32::from_str_radix(std::str::from_utf8(&bytes[start..start + 8]).unwrap(), 16).unwrap()
        };
        let (mode, size, name) = (field(1), field(6) as usize, field(11) as usize);
        let path = std::str::from_utf8(&bytes[at + 110..at + 110 + name - 1])
            .unwrap()
            .to_owned();
        assert_eq!(bytes[at + 110 + name - 1], 0);
        let data = (at + 110 + name).next_multiple_of(4);
        if path == "TRAILER!!!" {
            assert_eq!(data + size, bytes.len());
            return entries;
        }
        entries.push((path, mode, bytes[data..data + size].to_vec()));
        at = (data + size).next_multiple_of(4);
    }
}

#[test]
fn entries_of_every_kind_read_back_with_any_length() {
    for length in 0..9 {
        let mut cpio = Cpio::default();
        cpio.directory("bin");
        cpio.file("bin/tool", 0o755, &vec![7; length]);
        cpio.symlink("bin/sh", "tool");
        cpio.char_device("console", 0o600, 5, 1);
        let entries = read(&cpio.finish());
        assert_eq!(
            entries,
            [
                ("bin".to_owned(), 0o040_755, vec![]),
                ("bin/tool".to_owned(), 0o100_755, vec![7; length]),
                ("bin/sh".to_owned(), 0o120_777, b"tool".to_vec()),
                ("console".to_owned(), 0o020_600, vec![]),
            ]
        );
    }
}
