// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Disks that fail, grow, shrink, or belong to somebody else.

use std::time::{Duration, Instant};

use vmsg_driver::blk::{BlkOptions, Failure, Request};

use super::stand::{PATIENCE, Stand, nbd_server, pool, text, tool};

const MIB: u64 = 1 << 20;

#[test]
fn an_image_is_opened_for_writing_once() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let path = image.display();
    let device = format!("blk,path={path}");
    let host = stand.serve(std::slice::from_ref(&device));
    for (other, what) in [
        (format!("blk,path={path}"), "for writing"),
        (format!("blk,path={path},ro"), "for reading"),
    ] {
        let (code, why) = Stand::new().refused(&[other]);
        assert_eq!(code, 1, "{what}: {why}");
        assert!(why.contains("in use"), "{what}: {why}");
    }
    let write = ["-f", "raw", "-c", "write 0 512", text(&image)];
    if let Some(output) = tool("qemu-io", &write) {
        let why = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(why.contains("lock"), "QEMU sees it, too: {why}");
    }
    drop(host);
    // In one process, and readers beside each other.
    let (code, why) = stand.refused(&[device.clone(), device]);
    assert_eq!(code, 1, "{why}");
    let reading = format!("blk,path={path},ro");
    let _host = stand.serve(&[reading.clone(), reading]);
}

#[test]
fn who_comes_while_the_one_before_is_ending_waits_for_it() {
    let stand = Stand::new();
    let image = stand.image("disk", MIB);
    let device = format!("blk,path={}", image.display());
    let first = stand.serve(std::slice::from_ref(&device));
    let next = Stand::new();
    std::thread::scope(|scope| {
        let second = scope.spawn(|| next.serve(&[device]));
        // Long enough for it to find the image in use; shorter than it waits.
        std::thread::sleep(Duration::from_millis(500));
        first.kill();
        drop(second.join().expect("it has come up"));
    });
}

#[test]
fn a_disk_grows_and_shrinks_under_its_driver() {
    for how in ["rescan", "by itself"] {
        let stand = Stand::new();
        let image = stand.image("disk", 4 * MIB);
        let _host = stand.serve(&[format!("blk,id=d,path={}", image.display())]);
        let pool = pool();
        let options = BlkOptions {
            unchecked: true,
            ..BlkOptions::default()
        };
        let mut driver = stand.driver_with(0, &pool, &options);
        let data = [7; 512];
        let buffer = pool.alloc(512).expect("room");
        buffer.ram().write(0, &data);
        let from = [(buffer.addr(), 512)];
        let write = |sector| Request::Write {
            sector,
            from: &from,
        };
        let done = driver.run(write(8192), PATIENCE).expect("asked");
        assert_eq!(done.result, Err(Failure::IoErr), "behind the end");
        for size in [6 * MIB, 2 * MIB] {
            let file = std::fs::File::options().write(true).open(&image);
            file.expect("there").set_len(size).expect("resized");
            if how == "rescan" {
                let rescan = stand.ctl(&["rescan", "d"]);
                assert!(rescan.status.success(), "{rescan:?}");
                let list = stand.ctl(&["list", "--json"]);
                let seen = format!("\"size\": {size},");
                let list = String::from_utf8_lossy(&list.stdout);
                assert!(list.contains(&seen), "seen when it is answered: {list}");
            }
            let told = driver.wait_config(PATIENCE).expect("listening");
            assert_eq!(told.expect("told").bytes(), size, "{how}");
            let sectors = size / 512;
            let done = driver.run(write(sectors - 1), PATIENCE).expect("asked");
            assert_eq!(done.result, Ok(()), "{how}");
            let done = driver.run(write(sectors), PATIENCE).expect("asked");
            assert_eq!(done.result, Err(Failure::IoErr), "{how}");
        }
        let other = stand.ctl(&["rescan", "nobody"]);
        assert!(!other.status.success());
    }
}

#[test]
fn what_is_cut_off_and_not_seen_yet_is_an_error_and_no_growth() {
    let stand = Stand::new();
    let image = stand.image("disk", 4 * MIB);
    let _host = stand.serve(&[format!("blk,id=d,path={},ro", image.display())]);
    let pool = pool();
    let mut driver = stand.driver(0, &pool);
    let file = std::fs::File::options().write(true).open(&image);
    file.expect("there").set_len(MIB).expect("cut off");
    let buffer = pool.alloc(4096).expect("room");
    let to = [(buffer.addr(), 4096)];
    let read = Request::Read {
        sector: 4096,
        to: &to,
    };
    let done = driver.run(read, PATIENCE).expect("asked");
    assert_eq!(done.result, Err(Failure::IoErr));
    let mut first = [1; 512];
    driver.read(0, &mut first, PATIENCE).expect("still there");
    assert_eq!(first, [0; 512]);
}

#[test]
fn a_full_medium_is_an_error_for_the_guest_and_one_line_in_the_log() {
    for engine in ["uring", "threads", "inline"] {
        let stand = Stand::new();
        let image = stand.image("disk", 8 * MIB);
        // No file grows beyond 4 MiB, in blocks of 512 bytes: the file is sparse, and so it is as if the medium were full. Whoever
        // writes beyond that gets a signal, too, which ends processes.
        let before = "ulimit -f 8192";
        let device = format!("blk,id=d,path={},engine={engine}", image.display());
        let host = stand.serve_after(before, &[device]);
        let pool = pool();
        let mut driver = stand.driver(0, &pool);
        let data = [7; 4096];
        driver.write(0, &data, PATIENCE).expect("there is room");
        let end = 4 * MIB / 512;
        for sector in [end, end + 8, end + 800] {
            let buffer = pool.alloc(4096).expect("room");
            let from = [(buffer.addr(), 4096)];
            let done = driver.run(
                Request::Write {
                    sector,
                    from: &from,
                },
                PATIENCE,
            );
            assert_eq!(done.expect("asked").result, Err(Failure::IoErr), "{engine}");
        }
        // The rest goes on.
        driver
            .write(end - 8, &data, PATIENCE)
            .expect("there is room");
        driver.flush(PATIENCE).expect("flushed");
        let mut back = [0; 4096];
        driver.read(end, &mut back, PATIENCE).expect("read");
        assert_eq!(back, [0; 4096]);
        assert_eq!(stand.counter("d", "errors"), 3, "{engine}");
        drop(driver);
        let log = host.kill();
        let lines: Vec<&str> = log.lines().filter(|line| line.contains("failed")).collect();
        assert_eq!(lines.len(), 1, "{log}");
        assert!(
            lines[0].contains("write") && lines[0].contains("large"),
            "{log}"
        );
    }
}

#[test]
fn a_server_that_goes_away_and_comes_back_is_waited_for() {
    let stand = Stand::new();
    let image = stand.image("exported", 4 * MIB);
    let socket = stand.path("nbd");
    let start = || nbd_server(&image, &socket);
    let Some(server) = start() else {
        return;
    };
    let _host = stand.serve(&[format!("blk,path=nbd+unix:///?socket={}", socket.display())]);
    let pool = pool();
    let mut driver = stand.driver(0, &pool);
    driver.write(0, &[1; 512], PATIENCE).expect("written");
    drop(server);
    let buffer = pool.alloc(512).expect("room");
    buffer.ram().write(0, &[2; 512]);
    let from = [(buffer.addr(), 512)];
    let write = Request::Write {
        sector: 1,
        from: &from,
    };
    assert!(driver.submit(0, 5, write).expect("room"));
    driver.commit().expect("kicked");
    assert!(!driver.wait(Duration::from_millis(300)).expect("quiet"));
    let server = start().expect("as before");
    let mut done = Vec::new();
    let end = Instant::now() + PATIENCE;
    while done.is_empty() {
        assert!(Instant::now() < end, "it does not come back");
        driver.wait(Duration::from_secs(1)).expect("alive");
        driver
            .poll(|one| done.push((one.tag, one.result)))
            .expect("sane");
    }
    assert_eq!(done, [(5, Ok(()))]);
    let mut back = [0; 1024];
    driver.read(0, &mut back, PATIENCE).expect("read");
    assert_eq!((back[0], back[512]), (1, 2));
    drop(server);
}
