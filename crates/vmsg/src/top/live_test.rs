// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::super::view::tests::{DAEMON, disk, port, rates};
use super::*;

fn screen() -> Screen {
    Screen {
        path: "ctl.sock".to_owned(),
        rates: rates(),
        trouble: None,
        view: View::default(),
        top: 0,
    }
}

#[test]
fn a_frame_fits_any_screen() {
    let mut screen = screen();
    screen.rates.ports = (0..300).map(|n| port(&format!("p{n}"), 1.0, 0.0)).collect();
    for (columns, rows) in [(80, 24), (1, 1), (0, 0), (3, 2), (500, 1000)] {
        let frame = screen.frame(columns, rows);
        let ended = frame.matches("\r\n").count();
        assert!(ended <= rows.max(1), "{columns}x{rows}: {ended}");
    }
    let frame = screen.frame(80, 24);
    assert!(frame.contains("p20 ") && !frame.contains("p30 "));
    screen.press(Key::Page(1), 24);
    assert!(screen.frame(80, 24).contains("p30 "));
    screen.press(Key::Page(1000), 24);
    assert!(screen.frame(80, 24).contains("p299 "));
    screen.press(Key::Home, 24);
    assert!(screen.frame(80, 24).contains("p0 "));
}

#[test]
fn a_small_screen_shows_rates_and_how_to_end() {
    let mut screen = screen();
    screen.rates.devices = vec![disk(None), disk(Some(DAEMON))];
    let frame = screen.frame(40, 10);
    let shown: Vec<&str> = frame.split("\r\n").collect();
    assert_eq!(shown.len(), 10, "{frame:?}");
    assert!(shown[1].contains("PORT") && shown[1].contains("IN bit/s"));
    assert!(shown[9].contains("q ends"), "{frame:?}");
    // The rest is found further down.
    assert!(!frame.contains("DAEMON"));
    screen.press(Key::Page(1), 10);
    assert!(screen.frame(40, 10).contains("DAEMON"));
}

#[test]
fn only_the_frame_s_own_sequences_reach_the_terminal() {
    let mut screen = screen();
    screen.trouble = Some("gone \u{1b}]0;title\u{7}".to_owned());
    let frame = screen.frame(200, 24);
    let mut rest = frame.replace("\r\n", "");
    for own in [
        "\x1b[H",
        "\x1b[K",
        "\x1b[J",
        "\x1b[7m",
        "\x1b[0m",
        "\x1b[24;1H",
    ] {
        rest = rest.replace(own, "");
    }
    assert!(!rest.contains(char::is_control), "{rest:?}");
    assert!(rest.contains("trying again"));
}
