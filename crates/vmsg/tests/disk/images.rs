// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Images that come and go, are wanted twice, or look like something else.

use vmsg_driver::blk::{Failure, Request};

use super::stand::{Driver, PATIENCE, Stand, pool, text, tool};

const MIB: u64 = 1 << 20;
/// How a qcow2 image begins.
const MAGIC: [u8; 4] = *b"QFI\xfb";
/// What is said before somebody else's end is waited for.
const WAITS: &str = "waiting for its holder";

fn write_sector(driver: &mut Driver<'_>, sector: u64, first: [u8; 4]) -> Result<(), Failure> {
    let mut data = [0x5a; 512];
    data[..4].copy_from_slice(&first);
    let buffer = driver.pool().alloc(512).expect("room");
    buffer.ram().write(0, &data);
    let from = [(buffer.addr(), 512)];
    let request = Request::Write {
        sector,
        from: &from,
    };
    driver.run(request, PATIENCE).expect("asked").result
}

#[test]
fn a_disk_taken_away_has_given_its_image_back_when_that_is_answered() {
    let stand = Stand::new();
    let _host = stand.serve(&["rng".to_owned()]);
    let raw = stand.image("raw", MIB);
    let qcow2 = stand.path("image.qcow2");
    let create = ["create", "-q", "-f", "qcow2", text(&qcow2), "1M"];
    let mut devices: Vec<String> = ["uring", "threads", "inline"]
        .map(|engine| format!("path={},format=raw,engine={engine}", raw.display()))
        .into();
    if tool("qemu-img", &create).is_some_and(|output| output.status.success()) {
        devices.push(format!("path={},format=qcow2", qcow2.display()));
    }
    let mut number = 1;
    for device in devices {
        for round in 0..4u8 {
            let added = stand.ctl(&["add-device", &format!("blk,id=d,{device}")]);
            assert!(
                added.status.success(),
                "round {round} of {device}: {added:?}"
            );
            let pool = pool();
            let mut driver = stand.driver(number, &pool);
            number += 1;
            // Of a qcow2 image, tables are left to be written.
            for sector in 0..64 {
                let data = [round + 1; 4096];
                driver.write(sector * 8, &data, PATIENCE).expect("written");
            }
            let removed = stand.ctl(&["remove-device", "d"]);
            assert!(removed.status.success(), "{device}: {removed:?}");
            // Who takes it now needs no patience.
            let format = if device.ends_with("qcow2") {
                "qcow2"
            } else {
                "raw"
            };
            let path = if format == "raw" { &raw } else { &qcow2 };
            let command = format!("read -P {} 0 128k", round + 1);
            let read = [
                "-f",
                format,
                "-c",
                &command,
                "-c",
                "write 256k 4k",
                text(path),
            ];
            if let Some(output) = tool("qemu-io", &read) {
                let said = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(output.status.success(), "{device}: {output:?}");
                assert!(!said.contains("failed"), "{device}: {said}");
            }
        }
    }
}

#[test]
fn one_image_for_two_disks_of_a_process_is_named_at_once() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let link = stand.path("link");
    std::fs::hard_link(&image, &link).expect("a link");
    for (first, second) in [("", ""), ("", ",ro"), (",ro", "")] {
        let devices = [
            format!("blk,path={}{first}", image.display()),
            format!("blk,path={}{second}", link.display()),
        ];
        let (code, why) = stand.refused(&devices);
        assert_eq!(code, 1, "{why}");
        assert!(
            why.contains("this process uses it already, for `blk0`"),
            "{why}"
        );
        assert!(!why.contains(WAITS), "{why}");
    }
    // The same of one that is added.
    let devices = [format!("blk,path={}", image.display())];
    let host = stand.serve_after("export VMSG_LOG=info", &devices);
    let added = stand.ctl(&["add-device", &format!("blk,path={}", link.display())]);
    assert!(!added.status.success());
    let why = String::from_utf8_lossy(&added.stderr).into_owned();
    assert!(
        why.contains("this process uses it already, for `blk0`"),
        "{why}"
    );
    let log = host.kill();
    assert!(!log.contains(WAITS), "{log}");
}

/// A guest chooses what is in its disk, and must not choose whether its device host comes up the next time.
#[test]
fn a_guest_cannot_make_its_disk_look_like_an_image_unless_format_raw_is_said() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let guessed = format!("blk,id=d,path={}", image.display());
    let said = format!("{guessed},format=raw");
    let host = stand.serve_after(":", std::slice::from_ref(&guessed));
    let pools = [pool(), pool()];
    let mut driver = stand.driver(0, &pools[0]);
    assert_eq!(write_sector(&mut driver, 0, *b"boot"), Ok(()));
    for _ in 0..3 {
        assert_eq!(write_sector(&mut driver, 0, MAGIC), Err(Failure::IoErr));
    }
    assert_eq!(write_sector(&mut driver, 1, MAGIC), Ok(()));
    let mut back = [0; 512];
    driver.read(0, &mut back, PATIENCE).expect("read");
    assert_eq!(back[..4], *b"boot");
    assert_eq!(stand.counter("d", "errors"), 3);
    drop(driver);
    let log = host.kill();
    let told: Vec<_> = log
        .lines()
        .filter(|line| line.contains("the disk failed"))
        .collect();
    assert_eq!(told.len(), 1, "{log}");
    assert!(told[0].contains("format=raw"), "{log}");
    drop(stand.serve(std::slice::from_ref(&guessed)));
    // Where it is said, all of the disk is the guest's, and that it comes up again the operator's.
    let host = stand.serve(std::slice::from_ref(&said));
    let mut driver = stand.driver(0, &pools[1]);
    assert_eq!(write_sector(&mut driver, 0, MAGIC), Ok(()));
    driver.read(0, &mut back, PATIENCE).expect("read");
    assert_eq!(back[..4], MAGIC);
    drop(driver);
    drop(host);
    drop(stand.serve(&[said]));
    let (code, _) = stand.refused(&[guessed]);
    assert_eq!(code, 2);
}

#[test]
fn how_a_disk_is_used_is_listed() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let path = image.display();
    for (device, expected) in [
        (
            format!("blk,id=d,path={path},engine=threads"),
            &[
                ("engine", "threads"),
                ("lock", "exclusive"),
                ("format", "raw"),
            ][..],
        ),
        (
            format!("blk,id=d,path={path},ro,engine=inline"),
            &[("engine", "inline"), ("lock", "shared with other readers")],
        ),
    ] {
        let _host = stand.serve(&[device]);
        let list = stand.ctl(&["list", "--json"]);
        let list: serde_json::Value = serde_json::from_slice(&list.stdout).expect("JSON");
        let details = &list[0]["details"];
        assert_eq!(details["path"], text(&image));
        for (name, value) in expected {
            assert_eq!(details[name], *value, "{details}");
        }
    }
    // Whoever chooses, it is said what was chosen; where io_uring is not to be had, also why.
    let _host = stand.serve(&[format!("blk,id=d,path={path}")]);
    let list = stand.ctl(&["list", "--json"]);
    let list: serde_json::Value = serde_json::from_slice(&list.stdout).expect("JSON");
    let details = &list[0]["details"];
    let engine = details["engine"].as_str().expect("told");
    assert!(["uring", "threads", "inline"].contains(&engine));
    assert_eq!(
        details["engine-why"].is_string(),
        engine != "uring",
        "{details}"
    );
}
