// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::places;
use std::os::fd::AsFd;

fn of(text: &str) -> Option<String> {
    let spec: IvshmemSpec = vmsg_bus::keyval::from_str(text).unwrap();
    of_bus(&spec).map(|places| format!("{places:?}"))
}

#[test]
fn what_the_bus_is_told_says_how_memory_is_found() {
    for text in [
        "",
        "memory=known",
        "memory=bounce,ram=bar",
        "pci=auto,memory=segment,ram=bar",
    ] {
        assert_eq!(of(text), None, "{text}");
    }
    for (text, found) in [
        ("memory=segment,node=1", "Node(1)"),
        ("memory=whole,node=1", "Node(1)"),
        ("memory=whole", "Whole"),
        (
            "memory=segment,window=0x100000000+1G",
            "Window { base: 4294967296, size: 1073741824 }",
        ),
        (
            "memory=segment,ram=/dev/shm/win",
            "NamedFile { path: \"/dev/shm/win\"",
        ),
        (
            "pci=0000:00:04.0,memory=segment,ram=bar",
            "0000:00:04.0/resource2_wc",
        ),
        ("shm=win,memory=segment,ram=bar", "/dev/shm/win"),
        (
            "memory=segment,ram=pci:0000:00:05.0",
            "0000:00:05.0/resource2_wc",
        ),
    ] {
        let places = of(text).unwrap();
        assert!(places.contains(found), "{text}: {places}");
    }
}

#[test]
fn a_bar_is_the_same_by_both_of_its_names_and_a_file_is_the_one_there_is_now() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("resource2_wc");
    let named = NamedFile {
        path: path.clone(),
        offset: 0x1000,
        len: None,
    };
    let make = |name: &str| {
        let file = fs::File::create(dir.path().join(name)).unwrap();
        file.set_len(0x4000).unwrap();
        file
    };
    let find = |file: &fs::File| {
        let metadata = file.metadata().unwrap();
        let id = FileId {
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        let found = named.places(file.as_fd(), id, 0x2000, 0x2000)?;
        Ok::<_, PlaceError>(found.places)
    };
    let place = places::Place {
        offset_in_common: 0x1000,
        len: 0x2000,
    };
    let plain = make("resource2");
    assert!(matches!(find(&plain), Err(PlaceError::NoWindow(_))));
    let first = make("resource2_wc");
    assert_eq!(
        (find(&plain), find(&first)),
        (Ok(vec![place]), Ok(vec![place]))
    );
    fs::remove_file(&path).unwrap();
    let second = make("resource2_wc");
    assert_eq!(find(&second), Ok(vec![place]));
    assert!(matches!(find(&first), Err(PlaceError::OtherFile { .. })));
}
