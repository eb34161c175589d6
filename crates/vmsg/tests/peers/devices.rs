// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our driver side against a device side with the habits of QEMU's: one test for each of them.

use std::time::{Duration, Instant};

use virtio_msg::{DevNum, DeviceStatus, FeatureSet, QueueIndex, feature};
use vmsg_driver::{BusClient, Error, Fault};

use super::entropy::{assert_random, client, fetch};
use super::party::{Listens, Party, Place, Revision, python, text};

const SHORT: Duration = Duration::from_millis(300);
const LONG: Duration = Duration::from_secs(60);
const ENTROPY: DevNum = DevNum(0);
const DISK: DevNum = DevNum(5);

/// A device side that has some quirks, and its place; `None` without Python.
fn device(revision: Revision, rest: &[&str]) -> Option<(Place, Party)> {
    if !python() {
        return None;
    }
    let place = Place::new(revision);
    let log = place.file("log").display().to_string();
    let mut args = vec!["--once", "--log", &log];
    args.extend(rest);
    let mut device = place.python("device.py", Listens::Theirs, &args);
    device.expect("ready");
    Some((place, device))
}

/// How many requests of a kind the device side has seen, as in `dev 0x05`.
fn count(place: &Place, what: &str) -> usize {
    let log = place.read("log");
    log.lines().filter(|line| line.starts_with(what)).count()
}

/// The device side ended as one that was treated well does, after we have gone.
fn ended_well(client: BusClient, mut device: Party) {
    drop(client);
    device.succeed();
}

/// What `vmsg ls --json` says.
fn listed(place: &Place) -> Vec<serde_json::Value> {
    let listed = place.vmsg("ls", &["--json"]);
    assert!(listed.status.success(), "{}", text(&listed.stderr));
    serde_json::from_slice(&listed.stdout).expect("JSON")
}

#[test]
fn devices_in_python_are_listed() {
    let Some((place, mut device)) = device(Revision::One, &[]) else {
        return;
    };
    let devices = listed(&place);
    assert_eq!(devices.len(), 2, "{devices:?}");
    assert_eq!(devices[0]["number"], 0);
    assert_eq!(devices[0]["device_id"], 4);
    assert_eq!(devices[1]["number"], 5);
    assert_eq!(devices[1]["device_id"], 2);
    let config = devices[1]["config"].as_str().expect("a configuration");
    assert_eq!(config.len(), 2 * 60, "{config}");
    // 2048 sectors, and blocks of 512 bytes.
    assert!(config.starts_with("0008000000000000"), "{config}");
    assert_eq!(&config[40..48], "00020000");
    device.succeed();
}

#[test]
fn one_device_in_python_is_listed_r1() {
    let Some((place, mut device)) = device(Revision::R1, &[]) else {
        return;
    };
    let devices = listed(&place);
    assert_eq!(devices.len(), 1, "{devices:?}");
    assert_eq!(devices[0]["number"], 0);
    assert_eq!(devices[0]["device_id"], 4);
    assert_eq!(devices[0]["queues"][0]["max_size"], 8);
    device.succeed();
}

#[test]
fn a_bus_in_python_can_be_pinged() {
    // The older generation has no PING; there it is the way of another request.
    for revision in [Revision::One, Revision::R1] {
        let Some((place, mut device)) = device(revision, &[]) else {
            return;
        };
        let ping = place.vmsg("ping", &["-c", "3", "-i", "0"]);
        let said = text(&ping.stdout);
        assert!(ping.status.success(), "{}", text(&ping.stderr));
        assert!(
            said.contains("3 messages sent, 3 received, 0% loss"),
            "{said}"
        );
        device.succeed();
    }
}

#[test]
fn our_driver_gets_random_bytes_from_python() {
    for revision in [Revision::One, Revision::R1] {
        let Some((place, device)) = device(revision, &[]) else {
            return;
        };
        let mut client = client(&place, LONG);
        let data = fetch(&place, &mut client, ENTROPY, 65_536).expect("random bytes");
        assert_random(&data);
        ended_well(client, device);
    }
}

#[test]
fn qemu_drops_requests_without_an_answer() {
    let Some((place, device)) = device(Revision::One, &["--quirk", "silent"]) else {
        return;
    };
    let mut client = client(&place, SHORT);
    let begin = Instant::now();
    let missing = client.device_info(DevNum(3));
    assert!(matches!(missing, Err(Error::Timeout { .. })), "{missing:?}");
    assert!(begin.elapsed() >= SHORT, "gave up before its time");
    // One that does not answer is no reason not to talk to the others.
    client.set_timeout(LONG);
    client.status(DISK).expect("an answer");
    client.set_timeout(Duration::from_secs(1));
    let mut found = Vec::new();
    client.scan(|device| found.push(device)).expect("a scan");
    assert_eq!(found, [ENTROPY, DISK]);
    ended_well(client, device);
}

#[test]
fn qemu_never_answers_get_shm() {
    let Some((place, device)) = device(Revision::One, &["--quirk", "no-shm"]) else {
        return;
    };
    let mut client = client(&place, SHORT);
    let answer = client.shared_memory(DISK, 0);
    assert!(matches!(answer, Err(Error::Timeout { .. })), "{answer:?}");
    client.set_timeout(LONG);
    client.status(DISK).expect("an answer");
    assert_random(&fetch(&place, &mut client, ENTROPY, 4096).expect("random bytes"));
    ended_well(client, device);
}

#[test]
fn qemu_lists_devices_with_token_0_and_without_end() {
    for quirk in ["get-devices", "same-offset"] {
        let Some((place, mut device)) = device(Revision::One, &["--quirk", quirk]) else {
            return;
        };
        let devices = listed(&place);
        let numbers: Vec<_> = devices.iter().map(|device| &device["number"]).collect();
        assert_eq!(numbers, [0, 5], "{quirk}");
        device.succeed();
        let asked = count(&place, "bus 0x02");
        assert!((1..=3).contains(&asked), "{quirk}: asked {asked} times");
    }
}

#[test]
fn qemu_has_a_device_at_number_31() {
    let Some((place, mut device)) = device(Revision::One, &["--quirk", "last-number"]) else {
        return;
    };
    let devices = listed(&place);
    assert_eq!(devices.last().expect("devices")["number"], 31);
    assert_eq!(devices.last().expect("devices")["device_id"], 4);
    device.succeed();
}

#[test]
fn qemu_aborts_unless_access_platform_is_accepted() {
    for revision in [Revision::One, Revision::R1] {
        let Some((place, device)) = device(revision, &["--quirk", "platform"]) else {
            return;
        };
        let mut client = client(&place, LONG);
        let data = fetch(&place, &mut client, ENTROPY, 4096).expect("random bytes");
        assert_random(&data);
        // It would exit with 77 otherwise.
        ended_well(client, device);
    }
}

#[test]
fn qemu_shows_the_largest_size_before_set_up() {
    let Some((place, device)) = device(Revision::One, &["--quirk", "size-max"]) else {
        return;
    };
    let mut client = client(&place, LONG);
    let queue = client.queue(ENTROPY, QueueIndex(0)).expect("a queue");
    assert_eq!(queue.size, queue.max_size);
    assert_random(&fetch(&place, &mut client, ENTROPY, 4096).expect("random bytes"));
    // Reset and back to the same display: it goes once more.
    assert_random(&fetch(&place, &mut client, ENTROPY, 4096).expect("random bytes"));
    ended_well(client, device);
}

#[test]
fn qemu_echoes_set_config() {
    for quirks in [&["--quirk", "echo"][..], &[]] {
        let Some((place, device)) = device(Revision::One, quirks) else {
            return;
        };
        let mut client = client(&place, LONG);
        for value in [1, 0, 1] {
            client.write_config(DISK, 32, &[value]).expect("written");
            let mut byte = [0xFF];
            client.read_config(DISK, 32, &mut byte).expect("read");
            assert_eq!(byte, [value], "{quirks:?}");
        }
        ended_well(client, device);
    }
}

#[test]
fn qemu_reads_28_bytes_of_config_at_most() {
    let Some((place, device)) = device(Revision::One, &[]) else {
        return;
    };
    let mut client = client(&place, LONG);
    let mut whole = [0; 60];
    client.read_config(DISK, 0, &mut whole).expect("all of it");
    assert_eq!(whole[..8], 2048_u64.to_le_bytes());
    for (at, expected) in whole.iter().enumerate() {
        let mut byte = [0];
        let offset = u32::try_from(at).expect("small");
        client.read_config(DISK, offset, &mut byte).expect("a byte");
        assert_eq!(byte[0], *expected, "byte {at}");
    }
    ended_well(client, device);
    for line in place.read("log").lines() {
        if let Some(payload) = line.strip_prefix("dev 0x05 5 ") {
            let length = u32::from_str_radix(&payload[8..10], 16).expect("a number");
            assert!(length <= 28 && &payload[10..] == "000000", "{line}");
        }
    }
    assert!(count(&place, "dev 0x05 5") >= 63);
}

#[test]
fn config_of_a_disk_comes_in_words_and_bytes_r1() {
    let Some((place, device)) = device(Revision::R1, &["--only-disk"]) else {
        return;
    };
    let mut client = client(&place, LONG);
    let mut whole = [0; 60];
    client
        .read_config(ENTROPY, 0, &mut whole)
        .expect("all of it");
    assert_eq!(whole[..8], 2048_u64.to_le_bytes());
    assert_eq!(whole[20..24], 512_u32.to_le_bytes());
    let mut part = [0; 3];
    client
        .read_config(ENTROPY, 20, &mut part)
        .expect("three bytes");
    assert_eq!(part, [0, 2, 0]);
    ended_well(client, device);
}

#[test]
fn qemu_crashes_by_a_reset_of_a_huge_queue() {
    let quirk = ["--quirk", "reset-crash"];
    let Some((place, device)) = device(Revision::One, &quirk) else {
        return;
    };
    let mut client = client(&place, LONG);
    for _ in 0..2 {
        assert_random(&fetch(&place, &mut client, ENTROPY, 4096).expect("random bytes"));
    }
    // It would exit with 78 otherwise.
    ended_well(client, device);
    for line in place.read("log").lines() {
        if let Some(payload) = line.strip_prefix("dev 0x0b 0 ") {
            assert_eq!(payload, "00000000", "there is only this queue");
        }
    }
}

/// What the tests above are about is real: who does not heed it loses the device, and hears so.
#[test]
fn qemu_that_is_not_treated_well_is_gone() {
    let Some((place, mut crashed)) = device(Revision::One, &["--quirk", "reset-crash"]) else {
        return;
    };
    let mut crashing = client(&place, LONG);
    let error = crashing
        .reset_queue(ENTROPY, QueueIndex(1000))
        .expect_err("no such queue");
    assert_eq!(error.fault(), Fault::Gone, "{error}");
    assert_eq!(crashed.wait().code(), Some(78));

    let Some((place, mut aborted)) = device(Revision::One, &["--quirk", "platform"]) else {
        return;
    };
    let mut aborting = client(&place, LONG);
    let version_1 = FeatureSet::from_bits(&[feature::VERSION_1]);
    let driver = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    aborting.set_status(ENTROPY, driver).expect("a driver");
    let info = aborting.device_info(ENTROPY).expect("a device");
    aborting
        .set_driver_features(ENTROPY, &info, &version_1)
        .expect("taken");
    let error = aborting
        .set_status(ENTROPY, driver | DeviceStatus::FEATURES_OK)
        .expect_err("ACCESS_PLATFORM is missing");
    assert_eq!(error.fault(), Fault::Gone, "{error}");
    assert_eq!(aborted.wait().code(), Some(77));
}

#[test]
fn qemu_that_dies_is_noticed_at_once() {
    for revision in [Revision::One, Revision::R1] {
        let Some((place, mut device)) = device(revision, &[]) else {
            return;
        };
        let mut client = client(&place, LONG);
        client.status(ENTROPY).expect("an answer");
        device.kill();
        let begin = Instant::now();
        let error = client.status(ENTROPY).expect_err("nobody is there");
        assert_eq!(error.fault(), Fault::Gone, "{error}");
        assert!(begin.elapsed() < LONG, "waited for an answer");
    }
}
