// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks as they can be described, and used.

use std::os::unix::fs::{FileExt as _, MetadataExt as _};

use vmsg_driver::blk::{BlkOptions, Failure, Request};

use super::stand::{Driver, PATIENCE, Stand, nbd_server, pool, text, tool};

const MIB: u64 = 1 << 20;

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0u32..)
        .flat_map(|word| (word.wrapping_mul(2_654_435_761) ^ u32::from(seed)).to_le_bytes())
        .take(len)
        .collect()
}

/// Writes, reads, flushes, zeroes.
fn exercise(driver: &mut Driver<'_>) {
    let data = pattern(300_000 / 512 * 512, 1);
    driver.write(7, &data, PATIENCE).expect("written");
    driver.flush(PATIENCE).expect("flushed");
    let mut back = vec![0; data.len()];
    driver.read(7, &mut back, PATIENCE).expect("read");
    assert!(back == data);
    if driver.config().max_write_zeroes_sectors > 0 {
        let zeroes = Request::WriteZeroes {
            sector: 9,
            sectors: 3,
            unmap: false,
        };
        let done = driver.run(zeroes, PATIENCE).expect("asked");
        assert_eq!(done.result, Ok(()));
        let mut back = vec![1; 5 * 512];
        driver.read(8, &mut back, PATIENCE).expect("read");
        assert_eq!(back[..512], data[512..1024]);
        assert!(back[512..2048].iter().all(|byte| *byte == 0));
        assert_eq!(back[2048..], data[2560..3072]);
    }
}

#[test]
fn a_raw_image_is_read_and_written_by_each_engine() {
    for engine in ["auto", "uring", "inline", "threads"] {
        let stand = Stand::new();
        let image = stand.image("disk", 16 * MIB);
        let device = format!(
            "blk,id=root,path={},engine={engine},queues=3",
            image.display()
        );
        let host = stand.serve(&[device]);
        let pool = pool();
        let options = BlkOptions {
            queues: 8,
            ..BlkOptions::default()
        };
        let mut driver = stand.driver_with(0, &pool, &options);
        assert_eq!(driver.queues(), 3);
        let config = *driver.config();
        assert_eq!(config.bytes(), 16 * MIB);
        assert!(config.write_back && config.flush && !config.read_only);
        assert_eq!(&driver.id(PATIENCE).expect("told")[..5], b"root\0");
        exercise(&mut driver);
        // It is in the file.
        let file = std::fs::File::open(&image).expect("there");
        let mut bytes = vec![0; 512];
        file.read_exact_at(&mut bytes, 7 * 512).expect("read");
        assert_eq!(bytes, pattern(512, 1), "{engine}");
        // Space is given back.
        if config.max_discard_sectors > 0 {
            driver
                .write(0, &pattern(4 << 20, 2), PATIENCE)
                .expect("written");
            driver.flush(PATIENCE).expect("flushed");
            let before = file.metadata().expect("there").blocks();
            let discard = Request::Discard {
                sector: 0,
                sectors: 8192,
            };
            let done = driver.run(discard, PATIENCE).expect("asked");
            assert_eq!(done.result, Ok(()), "{engine}");
            let after = file.metadata().expect("there").blocks();
            assert!(after + 8000 <= before, "{engine}: {before} to {after}");
        }
        assert!(stand.counter("root", "writes") > 0);
        assert_eq!(stand.counter("root", "errors"), 0);
        drop(driver);
        drop(host);
    }
}

#[test]
fn settings_reach_the_driver() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let path = image.display();
    let _host = stand.serve(&[
        format!("blk,path={path},ro,serial=A-1,block-size=4096,discard=off"),
        format!("blk,path={path},ro,cache=writethrough"),
    ]);
    let (one, two) = (pool(), pool());
    let mut driver = stand.driver(0, &one);
    let config = *driver.config();
    assert!(config.read_only);
    assert_eq!((config.block_size, config.max_discard_sectors), (4096, 0));
    assert_eq!(&driver.id(PATIENCE).expect("told")[..4], b"A-1\0");
    let options = BlkOptions {
        unchecked: true,
        ..BlkOptions::default()
    };
    drop(driver);
    let mut driver = stand.driver_with(0, &one, &options);
    let buffer = one.alloc(4096).expect("room");
    let from = [(buffer.addr(), 4096)];
    let done = driver.run(
        Request::Write {
            sector: 0,
            from: &from,
        },
        PATIENCE,
    );
    assert_eq!(done.expect("asked").result, Err(Failure::IoErr));
    let mut second = stand.driver(1, &two);
    assert!(!second.config().write_back);
    assert_eq!(&second.id(PATIENCE).expect("told")[..5], b"blk1\0");
    second.set_write_back(true).expect("a choice");
    assert!(second.config().write_back);
}

#[test]
fn a_disk_is_added_and_taken_away_while_it_runs() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let _host = stand.serve(&["rng".to_owned()]);
    let device = format!("blk,id=d,path={}", image.display());
    let added = stand.ctl(&["add-device", &device]);
    assert!(added.status.success(), "{added:?}");
    let pool = pool();
    let mut driver = stand.driver(1, &pool);
    exercise(&mut driver);
    // It has the image, whoever asks.
    let again = format!("blk,id=e,path={}", image.display());
    let refused = stand.ctl(&["add-device", &again]);
    assert!(!refused.status.success());
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(why.contains("in use"), "{why}");
    let removed = stand.ctl(&["remove-device", "d"]);
    assert!(removed.status.success(), "{removed:?}");
    drop(driver);
    // Free again.
    let again = stand.ctl(&["add-device", &again]);
    assert!(again.status.success(), "{again:?}");
}

#[test]
fn a_qcow2_image_is_read_and_written_and_its_format_is_never_guessed() {
    let stand = Stand::new();
    let image = stand.path("disk.qcow2");
    let Some(made) = tool("qemu-img", &["create", "-f", "qcow2", text(&image), "16M"]) else {
        return;
    };
    assert!(made.status.success(), "{made:?}");
    let (code, why) = stand.refused(&[format!("blk,path={}", image.display())]);
    assert_eq!(code, 2, "{why}");
    assert!(why.contains("format="), "{why}");
    let raw = stand.image("raw", MIB);
    let (code, why) = stand.refused(&[format!("blk,path={},format=qcow2", raw.display())]);
    assert_eq!(code, 2, "{why}");
    assert!(why.contains("format=qcow2"), "{why}");

    let device = format!("blk,path={},format=qcow2", image.display());
    let host = stand.serve(std::slice::from_ref(&device));
    let pool = pool();
    let mut driver = stand.driver(0, &pool);
    assert_eq!(driver.config().bytes(), 16 * MIB);
    exercise(&mut driver);
    let other = stand.path("other");
    let twice = Stand::new();
    let (code, why) = twice.refused(&[device]);
    assert_eq!(code, 1, "{why}");
    assert!(why.contains("in use"), "{why}");
    drop(driver);
    host.kill();
    let check = tool("qemu-img", &["check", "-f", "qcow2", text(&image)]).expect("there");
    assert!(check.status.success(), "{check:?}");
    let convert = [
        "convert",
        "-f",
        "qcow2",
        "-O",
        "raw",
        text(&image),
        text(&other),
    ];
    let converted = tool("qemu-img", &convert).expect("there");
    assert!(converted.status.success(), "{converted:?}");
    let mut bytes = vec![0; 512];
    let file = std::fs::File::open(&other).expect("there");
    file.read_exact_at(&mut bytes, 7 * 512).expect("read");
    assert_eq!(bytes, pattern(512, 1));
}

#[test]
fn an_export_of_an_nbd_server_is_a_disk() {
    let stand = Stand::new();
    let image = stand.image("exported", 4 * MIB);
    let socket = stand.path("nbd");
    let Some(server) = nbd_server(&image, &socket) else {
        return;
    };
    let device = format!("blk,path=nbd+unix:///?socket={}", socket.display());
    let host = stand.serve(&[device]);
    let pool = pool();
    let mut driver = stand.driver(0, &pool);
    assert_eq!(driver.config().bytes(), 4 * MIB);
    exercise(&mut driver);
    let file = std::fs::File::open(&image).expect("there");
    let mut bytes = vec![0; 512];
    file.read_exact_at(&mut bytes, 7 * 512).expect("read");
    assert_eq!(bytes, pattern(512, 1));
    drop(driver);
    drop(host);
    drop(server);
}

#[test]
fn what_cannot_be_names_the_key() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let path = image.display();
    let small = stand.image("small", 100);
    for (device, words) in [
        ("blk".to_owned(), &["path"][..]),
        (
            format!("blk,path={path},cache=fast"),
            &["cache", "writeback"],
        ),
        (format!("blk,path={path},format=vmdk"), &["format", "qcow2"]),
        (format!("blk,path={path},queues=0"), &["queues", "256"]),
        (
            format!("blk,path={path},serial=123456789012345678901"),
            &["serial", "20"],
        ),
        (format!("blk,path={path},block-size=1000"), &["block-size"]),
        (format!("blk,path={path},backing"), &["backing", "qcow2"]),
        (format!("blk,path={path},readonly"), &["readonly", "ro"]),
        (
            format!("blk,path={path},format=qcow2,engine=uring"),
            &["engine"],
        ),
        ("blk,path=nbd://h/x,cache=none".to_owned(), &["cache"]),
        ("blk,path=nbd://h/x,format=raw".to_owned(), &["format"]),
        ("blk,path=nbd://".to_owned(), &["path"]),
        (
            format!("blk,path={}", stand.path("").display()),
            &["path", "neither"],
        ),
        ("blk,path=/dev/null".to_owned(), &["path", "neither"]),
    ] {
        let (code, why) = stand.refused(std::slice::from_ref(&device));
        assert_eq!(code, 2, "{device}: {why}");
        for word in words {
            assert!(why.contains(word), "{device}: {why}");
        }
    }
    for (device, words) in [
        (format!("blk,path={}", stand.path("none").display()), "none"),
        (format!("blk,path={}", small.display()), "small"),
    ] {
        let (code, why) = stand.refused(&[device]);
        assert_eq!(code, 1, "{why}");
        assert!(why.contains(words), "{why}");
    }
}
