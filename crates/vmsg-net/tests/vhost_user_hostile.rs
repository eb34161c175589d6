// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Back ends of the vhost-user port that want it no good.

mod back_end;
#[path = "back_end/story.rs"]
mod story;
mod wire;

use std::os::unix::net::UnixStream;

use back_end::*;
use proptest::prelude::*;
use tempfile::TempDir;
use vmsg_net::vhost_user::{VhostUser, VhostUserConfig};
use vmsg_net::{Backend, Guest, Offloads, VnetHeader};
use wire::until;

const ALL: u64 = CSUM | GUEST_CSUM | MRG_RXBUF | EVENT_IDX | PROTOCOL | VERSION_1;

#[test]
fn many_bad_frames_in_a_row_do_not_hide_the_good_one_behind_them() {
    let folder = TempDir::new().expect("a folder");
    let path = folder.path().join("s");
    let mut port = VhostUser::open(&VhostUserConfig::new(path.clone(), true)).expect("a port");
    port.set_guest(&Guest {
        offloads: Offloads::ALL,
        running: true,
        ..Guest::NONE
    });
    let mut back = BackEnd::new(UnixStream::connect(&path).expect("a listener"), ALL);
    until(&mut port, "the link is up", |port| {
        back.step();
        port.link_is_up()
    });
    let bad = VnetHeader {
        gso_type: 77,
        ..VnetHeader::default()
    };
    for _ in 0..600 {
        assert!(back.give(&bad, &[2; 60]));
    }
    assert!(back.give(&VnetHeader::default(), &[4; 60]));
    // As a device does it: as long as frames were taken, it looks for more; if there were none, it waits to be told.
    let memory = wire::memory(66_000);
    let mut sink = wire::Sink::new(&memory, 66_000, 1000);
    let now = std::time::Instant::now();
    port.poll(now);
    let mut turns = 0;
    while port.has_frames() && port.receive(now, &mut sink) > 0 {
        turns += 1;
        assert!(turns < 100);
    }
    assert_eq!(sink.arrived.len(), 1, "{:?}", port.counters());
    assert_eq!(port.counters().received_bad, 600);
    assert!(!port.has_frames());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn no_back_end_gets_further_than_its_own_connection(
        bytes in proptest::collection::vec(any::<u8>(), 0..400),
    ) {
        story::one(&bytes);
    }
}
