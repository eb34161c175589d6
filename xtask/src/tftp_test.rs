// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::{BLOCK, FILE_SIZE, answer, content};

#[test]
fn the_file_comes_block_by_block_until_a_short_one() {
    let mut file = Vec::new();
    let mut request = b"\0\x01file\0octet\0".to_vec();
    while let Some(data) = answer(&request) {
        assert_eq!(data[..2], [0, 3]);
        file.extend_from_slice(&data[4..]);
        request = [&[0, 4], &data[2..4]].concat();
        if data.len() < 4 + BLOCK {
            break;
        }
    }
    assert_eq!(file.len(), FILE_SIZE);
    assert_eq!(file, content());
    assert_eq!(answer(&request), None);
}

#[test]
fn other_packets_get_no_answer() {
    for packet in [
        &[][..],
        &[0],
        &[0, 4],
        &[0, 4, 0xff, 0xff],
        &[0, 5, 0, 0],
        &[0, 3, 0, 1, 9],
    ] {
        assert_eq!(answer(packet), None, "{packet:?}");
    }
}
