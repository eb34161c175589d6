// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our programs against drivers and devices that share no code with them: those in `peers/`, in Python, are written from the byte
//! formats alone and have the habits of the peers that are found in the field. All of it over the bus `linux-user`.

#[path = "peers/devices.rs"]
mod devices;
#[path = "peers/entropy.rs"]
mod entropy;
#[path = "peers/ivshmem.rs"]
mod ivshmem;
#[path = "peers/party.rs"]
mod party;
#[path = "peers/restart.rs"]
mod restart;

use party::{Listens, Place, Revision, python};

/// A program in Python against its counterpart in Python: the formats were understood in the same way twice.
fn python_alone(revision: Revision, device: &[&str], program: &str, scenarios: &[&str]) {
    if !python() {
        return;
    }
    let place = Place::new(revision);
    let mut device = place.python("device.py", Listens::Theirs, device);
    device.expect("ready");
    place.python(program, Listens::Ours, scenarios).succeed();
    assert!(device.is_running(), "the device ended");
}

/// A driver in Python against `vmsg serve`.
fn against_serve(revision: Revision, listens: Listens, program: &str, net: &str, rest: &[&str]) {
    if !python() {
        return;
    }
    let place = Place::new(revision);
    let mut driver;
    let mut serve;
    match listens {
        Listens::Ours => {
            serve = place.serve(listens, net);
            driver = place.python(program, listens, rest);
        }
        Listens::Theirs => {
            driver = place.python(program, listens, rest);
            driver.expect("listening");
            serve = place.serve(listens, net);
        }
    }
    driver.succeed();
    serve.end();
}

#[test]
fn the_python_driver_and_device_understand_each_other() {
    let scenarios = [
        "rng",
        "resets",
        "bus_messages",
        "scan",
        "disk",
        "malformed",
        "full_queue",
        "avail_flood",
    ];
    python_alone(Revision::One, &[], "driver.py", &scenarios);
    let quirks = [
        "--quirk",
        "last-number",
        "--quirk",
        "get-devices",
        "--quirk",
        "platform",
    ];
    python_alone(Revision::One, &quirks, "driver.py", &["rng", "scan"]);
    let older = ["rng", "resets", "malformed", "avail_flood"];
    python_alone(Revision::R1, &[], "driver.py", &older);
    let proxy = [
        "recorded",
        "features_in_halves",
        "queues_until_none",
        "events_wait",
    ];
    python_alone(Revision::One, &["--net"], "proxy_driver.py", &proxy);
    python_alone(Revision::R1, &["--net"], "proxy_driver.py", &proxy);
    let linux = ["old_sequence", "old_pings", "new_strict", "new_queue_echo"];
    python_alone(Revision::One, &["--net"], "linux_driver.py", &linux);
}

/// One test for each line: name, revision, who listens, program, network back end, scenario.
macro_rules! scenarios {
    ($($name:ident: $revision:ident $listens:ident $program:literal $net:literal $scenario:literal;)*) => {$(
        #[test]
        fn $name() {
            against_serve(Revision::$revision, Listens::$listens, $program, $net, &[$scenario]);
        }
    )*};
}

scenarios! {
    random_bytes_in_chains_of_all_shapes: One Ours "driver.py" "backend=none" "rng";
    random_bytes_in_chains_of_all_shapes_r1: R1 Ours "driver.py" "backend=none" "rng";
    random_bytes_for_a_driver_that_listens: One Theirs "driver.py" "backend=none" "rng";
    random_bytes_for_a_driver_that_listens_r1: R1 Theirs "driver.py" "backend=none" "rng";
    a_mac_byte_by_byte_and_config_out_of_range: One Ours "driver.py" "backend=none" "net_config";
    a_mac_byte_by_byte_and_config_out_of_range_r1: R1 Ours "driver.py" "backend=none" "net_config";
    eight_resets_in_a_row: One Ours "driver.py" "backend=none" "resets";
    eight_resets_in_a_row_r1: R1 Ours "driver.py" "backend=none" "resets";
    nothing_is_touched_after_a_reset_is_answered: One Ours "driver.py" "backend=none" "silent_after_reset";
    nothing_is_touched_after_a_reset_is_answered_r1: R1 Ours "driver.py" "backend=none" "silent_after_reset";
    devices_are_listed_and_pings_answered: One Ours "driver.py" "backend=none" "bus_messages";
    all_device_numbers_can_be_scanned: One Ours "driver.py" "backend=none" "scan";
    all_device_numbers_can_be_scanned_r1: R1 Ours "driver.py" "backend=none" "scan";
    an_address_is_offered_by_dhcp: One Ours "driver.py" "backend=user" "dhcp_offer";
    an_address_is_offered_by_dhcp_r1: R1 Ours "driver.py" "backend=user" "dhcp_offer";
    bad_messages_are_dropped_without_an_answer: One Ours "driver.py" "backend=none" "malformed";
    bad_messages_are_dropped_without_an_answer_r1: R1 Ours "driver.py" "backend=none" "malformed";
    queues_that_cannot_be_harm_nobody: One Ours "driver.py" "backend=none" "bad_queues";
    queues_that_cannot_be_harm_nobody_r1: R1 Ours "driver.py" "backend=none" "bad_queues";
    thousands_of_notifications_harm_nobody: One Ours "driver.py" "backend=none" "avail_flood";
    thousands_of_notifications_harm_nobody_r1: R1 Ours "driver.py" "backend=none" "avail_flood";
    full_queues_lose_nothing_and_keep_the_order: One Ours "driver.py" "backend=none" "full_queue";
    a_driver_that_reads_no_events_is_served: One Ours "driver.py" "backend=none" "unread_events";
    a_driver_that_reads_no_events_is_served_r1: R1 Ours "driver.py" "backend=none" "unread_events";
    a_driver_that_reads_no_doorbell_is_served: One Ours "driver.py" "backend=none" "unread_doorbell";
    a_driver_that_reads_no_doorbell_is_served_r1: R1 Ours "driver.py" "backend=none" "unread_doorbell";
    a_driver_with_an_iommu_is_served_r1: R1 Ours "driver.py" "backend=none" "iommu";
    any_byte_rings_the_doorbell: One Ours "driver.py" "backend=none" "strange_doorbells";
    any_byte_rings_the_doorbell_r1: R1 Ours "driver.py" "backend=none" "strange_doorbells";
    an_index_out_of_the_queue_ends_the_connection: One Ours "driver.py" "backend=none" "wild_index";

    qemu_proxy_probes_in_its_recorded_order: One Ours "proxy_driver.py" "backend=none" "recorded";
    qemu_proxy_probes_in_its_recorded_order_r1: R1 Ours "proxy_driver.py" "backend=none" "recorded";
    qemu_proxy_writes_features_in_halves: One Ours "proxy_driver.py" "backend=none" "features_in_halves";
    qemu_proxy_writes_features_in_halves_r1: R1 Ours "proxy_driver.py" "backend=none" "features_in_halves";
    qemu_proxy_resets_eight_times: One Ours "proxy_driver.py" "backend=none" "resets_in_a_row";
    qemu_proxy_resets_eight_times_r1: R1 Ours "proxy_driver.py" "backend=none" "resets_in_a_row";
    qemu_proxy_reads_config_byte_by_byte: One Ours "proxy_driver.py" "backend=none" "config_byte_by_byte";
    qemu_proxy_reads_config_byte_by_byte_r1: R1 Ours "proxy_driver.py" "backend=none" "config_byte_by_byte";
    qemu_proxy_probes_queues_until_there_is_none: One Ours "proxy_driver.py" "backend=none" "queues_until_none";
    qemu_proxy_probes_queues_until_there_is_none_r1: R1 Ours "proxy_driver.py" "backend=none" "queues_until_none";
    qemu_proxy_leaves_events_for_the_next_doorbell: One Ours "proxy_driver.py" "backend=none" "events_wait";
    qemu_proxy_leaves_events_for_the_next_doorbell_r1: R1 Ours "proxy_driver.py" "backend=none" "events_wait";

    linux_2025_has_one_token_for_all: One Ours "linux_driver.py" "backend=none" "old_sequence";
    linux_2025_reads_config_in_brackets: One Ours "linux_driver.py" "backend=none" "old_config_in_brackets";
    linux_2025_needs_64_feature_bits: One Ours "linux_driver.py" "backend=none" "old_feature_bits";
    linux_2025_resets_queues_without_the_feature: One Ours "linux_driver.py" "backend=none" "old_reset_of_queues";
    linux_2025_answers_responses_to_ping: One Ours "linux_driver.py" "backend=none" "old_pings";
    linux_amp_wants_32_numbers_at_once: One Ours "linux_driver.py" "backend=none" "old_get_devices";
    linux_2026_checks_each_answer: One Ours "linux_driver.py" "backend=none" "new_strict";
    linux_2026_wants_its_queues_back_as_set: One Ours "linux_driver.py" "backend=none" "new_queue_echo";
    linux_2026_wants_used_events_of_12_bytes: One Ours "linux_driver.py" "backend=none" "new_used_events";
    linux_2026_wants_generations_that_never_go_back: One Ours "linux_driver.py" "backend=none" "new_config_events";
    linux_2026_sets_bits_that_were_not_offered: One Ours "linux_driver.py" "backend=none" "new_bits_not_offered";
    linux_2026_takes_all_transport_bits: One Ours "linux_driver.py" "backend=none" "new_all_transport_bits";
}

/// A change at run time: an event each time, and never a generation twice.
#[test]
fn a_link_that_goes_down_and_up_reaches_the_driver() {
    for revision in [Revision::One, Revision::R1] {
        if !python() {
            return;
        }
        let place = Place::new(revision);
        let control = ["--control", "ctl"];
        let mut serve = place.serve_with(Listens::Ours, "backend=none", &control);
        let mut driver = place.python("driver.py", Listens::Ours, &["link"]);
        for _ in 0..3 {
            driver.expect("want down");
            place.set_link("down");
            driver.expect("want up");
            place.set_link("up");
        }
        driver.expect("link");
        driver.succeed();
        serve.end();
    }
}

/// As QEMU does it: the memory's file is made some time after the device host is ready.
#[test]
fn memory_that_is_made_later_is_found() {
    for revision in [Revision::One, Revision::R1] {
        for listens in [Listens::Ours, Listens::Theirs] {
            if !python() {
                return;
            }
            let place = Place::without_memory(revision);
            let mut serve = place.serve(listens, "backend=none");
            let rest = ["rng", "resets"];
            place.python("driver.py", listens, &rest).succeed();
            serve.end();
        }
    }
}

/// The socket exists for a while before anybody can connect, and no event tells of the change.
#[test]
fn a_peer_that_binds_first_and_listens_later_is_found() {
    for revision in [Revision::One, Revision::R1] {
        if !python() {
            return;
        }
        let place = Place::new(revision);
        let mut serve = place.serve(Listens::Theirs, "backend=none");
        place
            .python("driver.py", Listens::Theirs, &["--late", "rng"])
            .succeed();
        serve.end();
    }
}
