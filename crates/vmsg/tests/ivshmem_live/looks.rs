// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `vmsg ls`, `ping` and `trace`.

use super::program::{output, text};
use super::{Ends, Program};

/// What `trace` says of each message, without times.
fn conversation(file: &str) -> Vec<String> {
    let lines = text(&["trace", file]);
    let messages = lines.lines().filter_map(|line| {
        let from = line.find(['→', '←'])?;
        Some(line[from..].to_owned())
    });
    messages.collect()
}

#[track_caller]
fn pings(bus: &str) {
    let out = text(&["ping", "--bus", bus, "-c", "20", "-i", "0"]);
    assert!(
        out.contains("20 messages sent, 20 received, 0% loss"),
        "{out}"
    );
}

#[test]
fn a_device_host_answers_pings_in_either_layout_wherever_the_memory_is() {
    let dir = tempfile::tempdir().expect("a folder");
    for layout in ["amp", "spsc"] {
        let keys = format!(",layout={layout}");
        let listen = Ends::listen(dir.path(), &keys);
        let socket = Ends::socket(dir.path(), &keys);
        let plain = format!(
            "ivshmem,file={}/memory,size=64K{keys}",
            dir.path().display()
        );
        let plain = Ends {
            host: plain.clone(),
            driver: plain,
            server: None,
        };
        for ends in [listen, socket, plain] {
            let host = ends.serve();
            pings(&ends.driver);
            pings(&ends.driver);
            host.end();
            let nobody = output(&["ping", "--bus", &ends.driver, "-c", "1", "--timeout", "200"]);
            assert!(!nobody.status.success(), "nobody is there");
        }
    }
}

#[test]
fn both_ends_record_the_same_conversation() {
    let dir = tempfile::tempdir().expect("a folder");
    for layout in ["amp", "spsc"] {
        let ends = Ends::socket(dir.path(), &format!(",layout={layout}"));
        let file = |end: &str| format!("{}/{layout}-{end}.pcapng", dir.path().display());
        let host = ends.serve_with(&format!(",trace={}", file("host")));
        let bus = format!("{},trace={}", ends.driver, file("driver"));
        let listed = text(&["ls", "--bus", &bus]);
        assert!(
            listed.contains("rng0") && listed.contains("net0"),
            "{listed}"
        );
        pings(&bus);
        // At an orderly end all is written.
        host.end();
        let said = conversation(&file("driver"));
        assert_eq!(said, conversation(&file("host")));
        let count = |what: &str| said.iter().filter(|line| line.contains(what)).count();
        assert_eq!(count("PING"), 2 * 20, "{said:?}");
        assert_eq!(count("GET_DEVICE_INFO"), 2 * 2, "{said:?}");
        assert_eq!(count(r#"DEVICE_NAME response: device 0, "rng0""#), 1);
    }
}

#[test]
fn the_place_of_a_killed_process_is_had_in_the_time_that_ls_takes_by_itself() {
    let dir = tempfile::tempdir().expect("a folder");
    for layout in ["amp", "spsc"] {
        let bus = format!(
            "ivshmem,file={}/memory,size=64K,layout={layout}",
            dir.path().display()
        );
        let ends = Ends {
            host: bus.clone(),
            driver: bus.clone(),
            server: None,
        };
        let _host = ends.serve();
        // Somebody who drives it, and is killed in the middle.
        let words = ["ping", "--bus", &bus, "-i", "0.01"];
        let driver = Program::saying(&words, "seq=3");
        let second = output(&["ls", "--bus", &bus]);
        let error = String::from_utf8_lossy(&second.stderr);
        assert!(
            !second.status.success() && error.contains("`vmsg`"),
            "{error}"
        );
        driver.kill();
        let listed = text(&["ls", "--bus", &bus]);
        assert!(listed.contains("rng0"), "{listed}");
    }
}
