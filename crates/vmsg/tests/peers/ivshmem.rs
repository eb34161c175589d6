// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The bus `ivshmem`: `vmsg serve`, which is the server as well, against drivers in Python that share nothing with ours, with the habits of Linux's; and
//! our driver side against a device side in Python, which is the server then.

use super::party::{MAC, Party, Place, Revision, python, text};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Amp,
    Spsc,
}

impl Layout {
    const fn name(self) -> &'static str {
        match self {
            Self::Amp => "amp",
            Self::Spsc => "spsc",
        }
    }
}

/// Starts `vmsg serve`, which listens as an ivshmem server.
fn serve(place: &Place, layout: Layout, net: &str) -> Party {
    let folder = place.path().display();
    let name = layout.name();
    let bus = format!(
        "ivshmem,listen={folder}/iv.sock,layout={name},size=1M,vectors=2,memory=known,{}",
        place.memory()
    );
    let net = format!("net,id=net0,mac={MAC},{net}");
    let args = ["serve", "--bus", &bus, "--device", &net, "--device", "rng"];
    let mut serve = Party::start("serve", place.program().args(args));
    serve.expect("ready ");
    serve
}

/// Starts one of the programs in Python as a client of the server. Our device host's number is 0, which is the only one that Linux's drivers
/// know.
fn driver(place: &Place, layout: Layout, program: &str, rest: &[&str]) -> Party {
    let mut args = vec![
        "--ivshmem",
        "iv.sock",
        "--peer",
        "0",
        "--layout",
        layout.name(),
    ];
    args.extend(rest);
    place.python(program, super::Listens::Ours, &args)
}

/// A driver in Python against `vmsg serve`.
fn against_serve(layout: Layout, program: &str, net: &str, scenario: &str) {
    if !python() {
        return;
    }
    let place = Place::new(Revision::One);
    let mut serve = serve(&place, layout, net);
    driver(&place, layout, program, &[scenario]).succeed();
    serve.end();
}

/// One test for each line: name, layout, program, network back end, scenario.
macro_rules! scenarios {
    ($($name:ident: $layout:ident $program:literal $net:literal $scenario:literal;)*) => {$(
        #[test]
        fn $name() {
            against_serve(Layout::$layout, $program, $net, $scenario);
        }
    )*};
}

scenarios! {
    random_bytes_over_two_pages: Spsc "driver.py" "backend=none" "rng";
    random_bytes_over_the_amp_layout: Amp "driver.py" "backend=none" "rng";
    an_address_is_offered_over_two_pages: Spsc "driver.py" "backend=user" "dhcp_offer";
    an_address_is_offered_over_the_amp_layout: Amp "driver.py" "backend=user" "dhcp_offer";
    resets_are_done_when_they_are_answered: Amp "driver.py" "backend=none" "resets";
    nothing_is_touched_after_a_reset: Amp "driver.py" "backend=none" "silent_after_reset";
    devices_are_listed_over_the_amp_layout: Amp "driver.py" "backend=none" "bus_messages";
    queues_that_cannot_be: Amp "driver.py" "backend=none" "bad_queues";
    thousands_of_notifications_over_the_amp_layout: Amp "driver.py" "backend=none" "avail_flood";
    thousands_of_notifications_over_two_pages: Spsc "driver.py" "backend=none" "avail_flood";

    linux_2025_in_its_sequence: Spsc "linux_driver.py" "backend=none" "old_sequence";
    linux_2025_and_its_brackets: Spsc "linux_driver.py" "backend=none" "old_config_in_brackets";
    linux_2025_resets_its_queues: Spsc "linux_driver.py" "backend=none" "old_reset_of_queues";
    linux_2025_answers_answers_to_ping: Spsc "linux_driver.py" "backend=none" "old_pings";
    linux_2025_pings_each_second: Spsc "ivshmem_driver.py" "backend=none" "pings";
    linux_2025_takes_the_indices_as_they_stand: Spsc "ivshmem_driver.py" "backend=none" "spsc_as_it_stands";
    linux_2025_is_reset_in_mid_request: Spsc "ivshmem_driver.py" "backend=none" "spsc_reset_in_mid_request";

    linux_2026_and_the_layout: Amp "ivshmem_driver.py" "backend=none" "amp_layout";
    linux_2026_is_strict: Amp "linux_driver.py" "backend=none" "new_strict";
    linux_2026_wants_its_queues_echoed: Amp "linux_driver.py" "backend=none" "new_queue_echo";
    linux_2026_and_its_config_events: Amp "linux_driver.py" "backend=none" "new_config_events";
    linux_2026_pings: Amp "ivshmem_driver.py" "backend=none" "pings";
    linux_2026_shuts_down: Amp "ivshmem_driver.py" "backend=none" "amp_shutdown";
    linux_2026_is_reset: Amp "ivshmem_driver.py" "backend=none" "amp_reset";
    linux_2026_is_there_again_at_once: Amp "ivshmem_driver.py" "backend=none" "amp_shutdown_at_once";
    linux_2026_is_reset_in_mid_request: Amp "ivshmem_driver.py" "backend=none" "amp_reset_in_mid_request";
    linux_2026_begins_slowly: Amp "ivshmem_driver.py" "backend=none" "amp_slow_beginning";

    a_queue_head_that_cannot_be: Amp "ivshmem_driver.py" "backend=none" "amp_wild";
    a_layout_that_is_written_over: Amp "ivshmem_driver.py" "backend=none" "amp_layout_written";
    pages_with_indices_that_cannot_be: Spsc "ivshmem_driver.py" "backend=none" "spsc_wild";
    doorbells_that_get_lost: Amp "ivshmem_driver.py" "backend=none" "lost_doorbells";
    doorbells_that_get_lost_over_two_pages: Spsc "ivshmem_driver.py" "backend=none" "lost_doorbells";
    doorbells_for_nothing: Amp "ivshmem_driver.py" "backend=none" "doorbells_for_nothing";
    a_machine_that_leaves_the_server: Amp "ivshmem_driver.py" "backend=none" "left";
    a_machine_that_leaves_the_server_over_two_pages: Spsc "ivshmem_driver.py" "backend=none" "left";
}

/// Both ends in Python: the formats were understood in the same way twice, and the scenarios are no test of one program alone.
#[test]
fn the_python_ends_understand_each_other_over_ivshmem() {
    if !python() {
        return;
    }
    let cases: [(Layout, &[&str]); 2] = [
        (
            Layout::Amp,
            &[
                "amp_layout",
                "amp_shutdown",
                "amp_shutdown_at_once",
                "amp_reset",
                "amp_reset_in_mid_request",
                "amp_slow_beginning",
                "lost_doorbells",
            ],
        ),
        (
            Layout::Spsc,
            &["spsc_as_it_stands", "spsc_reset_in_mid_request"],
        ),
    ];
    for (layout, scenarios) in cases {
        let place = Place::new(Revision::One);
        let mut device = device(&place, layout, &["--net"]);
        driver(&place, layout, "ivshmem_driver.py", scenarios).succeed();
        assert!(device.is_running(), "the device ended");
    }
}

/// A device side in Python that is the server, too.
fn device(place: &Place, layout: Layout, rest: &[&str]) -> Party {
    let mut args = vec!["--ivshmem", "iv.sock", "--serve", "--layout", layout.name()];
    args.extend(rest);
    let mut device = place.python("device.py", super::Listens::Theirs, &args);
    device.expect("ready");
    device
}

/// What `vmsg ls` sees of devices that are not ours, in either layout; twice, so that the first one has gone in order.
#[test]
fn devices_in_python_are_listed_over_ivshmem() {
    if !python() {
        return;
    }
    for (layout, more) in [(Layout::Amp, ""), (Layout::Spsc, ",peer=0")] {
        let place = Place::new(Revision::One);
        let mut device = device(&place, layout, &[]);
        let bus = format!(
            "ivshmem,socket={}/iv.sock,layout={}{more},memory=known,{}",
            place.path().display(),
            layout.name(),
            place.memory()
        );
        for _ in 0..2 {
            let listed = place.vmsg_on(&bus, "ls", &["--json"]);
            assert!(
                listed.status.success(),
                "{layout:?}: {}",
                text(&listed.stderr)
            );
            let devices: Vec<serde_json::Value> =
                serde_json::from_slice(&listed.stdout).expect("JSON");
            assert_eq!(devices.len(), 2, "{layout:?}: {devices:?}");
            assert_eq!(devices[0]["device_id"], 4);
            assert_eq!(devices[1]["device_id"], 2);
            let config = devices[1]["config"].as_str().expect("a configuration");
            assert!(config.starts_with("0008000000000000"), "{config}");
        }
        assert!(device.is_running(), "the device ended");
    }
}
