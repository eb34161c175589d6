// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Either side is killed while the other lives, and started again.

use super::party::{Listens, Party, Place, Revision, python, text};

const ALL: [(Revision, Listens); 4] = [
    (Revision::One, Listens::Ours),
    (Revision::One, Listens::Theirs),
    (Revision::R1, Listens::Ours),
    (Revision::R1, Listens::Theirs),
];

/// `serve` and a driver, who have found each other; `None` without Python.
fn pair(revision: Revision, listens: Listens, rest: &[&str]) -> Option<(Place, Party, Party)> {
    if !python() {
        return None;
    }
    let place = Place::new(revision);
    let serve = place.serve(listens, "backend=none");
    let driver = place.python("driver.py", listens, rest);
    Some((place, serve, driver))
}

/// Killed under traffic, so messages are in both queues and chains in the ring.
#[test]
fn a_killed_serve_is_replaced_under_a_living_driver() {
    for (revision, listens) in ALL {
        let rest = ["--rounds", "4", "restart"];
        let Some((place, mut serve, mut driver)) = pair(revision, listens, &rest) else {
            return;
        };
        for round in 1..4 {
            driver.expect(&format!("up {round}"));
            serve.kill();
            driver.expect("hangup");
            serve = place.serve(listens, "backend=none");
        }
        driver.expect("up 4");
        driver.succeed();
        serve.end();
    }
}

#[test]
fn a_killed_driver_is_replaced_under_a_living_serve() {
    for (revision, listens) in ALL {
        let rest = ["restart"];
        let Some((place, mut serve, mut driver)) = pair(revision, listens, &rest) else {
            return;
        };
        for _ in 0..3 {
            driver.expect("up 1");
            driver.kill();
            if listens == Listens::Theirs {
                // The dead driver's socket file is still there; QEMU removes it, too.
                std::fs::remove_file(place.file("linux-user.socket")).expect("a socket");
            }
            driver = place.python("driver.py", listens, &rest);
        }
        driver.expect("up 1");
        driver.kill();
        if listens == Listens::Theirs {
            std::fs::remove_file(place.file("linux-user.socket")).expect("a socket");
        }
        place.python("driver.py", listens, &["last"]).succeed();
        serve.end();
    }
}

/// Files of two dead processes: the indices in them are worth nothing, and the two new ones start at the same place.
#[test]
fn queue_files_of_dead_processes_are_begun_anew() {
    for revision in [Revision::One, Revision::R1] {
        let Some((place, mut serve, mut driver)) = pair(revision, Listens::Ours, &["restart"])
        else {
            return;
        };
        driver.expect("up 1");
        driver.kill();
        serve.kill();
        for queue in ["queue-linux-user-driver", "queue-linux-user-device"] {
            let mut bytes = std::fs::read(place.file(queue)).expect("a queue");
            assert_eq!(bytes.len(), 262_272, "{queue}");
            // Worse than stale.
            bytes[..4].copy_from_slice(&0x1234_5678_u32.to_le_bytes());
            std::fs::write(place.file(queue), bytes).expect("written");
        }
        let mut serve = place.serve(Listens::Ours, "backend=none");
        place
            .python("driver.py", Listens::Ours, &["last"])
            .succeed();
        serve.end();
    }
}

/// Two drivers without locks: nobody can keep the second one from the queues, but it is not served, and the first one is not harmed.
#[test]
fn a_second_driver_is_not_served_while_the_first_lives() {
    for revision in [Revision::One, Revision::R1] {
        let Some((place, mut serve, mut first)) = pair(revision, Listens::Ours, &["hold"]) else {
            return;
        };
        first.expect("up");
        let mut second = place.python("driver.py", Listens::Ours, &["second"]);
        second.expect("connected");
        first.tell("go on");
        first.expect("hold");
        first.succeed();
        second.tell("your turn");
        second.expect("second");
        second.succeed();
        serve.end();
    }
}

/// Ours send nothing while somebody else uses the queues, and do not wait for ever.
#[test]
fn ls_gives_up_on_a_bus_that_has_another_driver() {
    for revision in [Revision::One, Revision::R1] {
        let Some((place, mut serve, mut driver)) = pair(revision, Listens::Ours, &["hold"]) else {
            return;
        };
        driver.expect("up");
        let listed = place.vmsg("ls", &["--timeout", "500"]);
        let said = text(&listed.stderr);
        assert!(!listed.status.success(), "{said}");
        assert!(said.contains("linux-user.socket"), "{said}");
        driver.tell("go on");
        driver.expect("hold");
        driver.succeed();
        // Now it is free.
        let listed = place.vmsg("ls", &[]);
        assert!(listed.status.success(), "{}", text(&listed.stderr));
        serve.end();
    }
}
