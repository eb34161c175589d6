// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

use vmsg_block::{Completion, Facts, NullDisk, Request, Submitted};
use vmsg_device::blk::Settings;
use vmsg_device::device::Device as _;
use vmsg_mem::WindowTable;

use super::*;

/// Ends when it is let go of.
#[derive(Debug)]
struct Slow(Receiver<()>);

impl Drop for Slow {
    fn drop(&mut self) {
        let _ = self.0.recv();
    }
}

impl Disk for Slow {
    fn facts(&self) -> Facts {
        NullDisk { size: 512 }.facts()
    }

    fn submit(&mut self, _: u32, _: Request<'_>, _: &Arc<WindowTable>) -> Submitted {
        Submitted::Full
    }

    fn completed(&mut self, _: &mut Vec<Completion>) {}

    fn in_flight(&self) -> usize {
        0
    }

    fn set_write_back(&mut self, _: bool) {}

    fn ends_at_once(&self) -> bool {
        false
    }
}

#[test]
fn the_end_of_a_disk_is_waited_for_and_of_what_is_none_it_is_not() {
    let (go, waits) = channel();
    let mut blk = Blk::new(&Settings::new("d"), Box::new(Slow(waits)));
    let disks = Disks::default();
    let spec = BlkSpec {
        bus: Some("b0".to_owned()),
        ..BlkSpec::default()
    };
    disks.note(&spec, "d", blk.end());
    assert!(disks.wait("b0", "net0"));
    assert!(disks.wait("b1", "d"), "another one");
    blk.removed();
    drop(blk);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| disks.wait("b0", "d"));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waiting.is_finished());
        drop(go);
        assert!(waiting.join().expect("no panic"));
    });
    assert!(disks.wait("b0", "d"), "once only");
}
