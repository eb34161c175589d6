// SPDX-License-Identifier: Apache-2.0 OR MIT

use std::cell::RefCell;
use std::os::unix::net::UnixStream;

use super::*;

#[test]
fn who_comes_after_one_that_was_of_no_use_waits_for_a_moment() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("daemon");
    let mut settings = Settings::new(&path, 2);
    settings.listener = Some(Listener::bind(&path).expect("bound"));
    let end = Doorbell::new().expect("an eventfd");
    let faults = RefCell::new(Vec::new());
    std::thread::scope(|scope| {
        // Comes and goes as fast as it can, as long as somebody listens.
        scope.spawn(|| while UnixStream::connect(&path).is_ok() {});
        let waited = wait(&settings, &end, |error| {
            if let ConnectError::Fault { .. } = error {
                let mut faults = faults.borrow_mut();
                faults.push(Instant::now());
                if faults.len() == 4 {
                    end.ring().expect("rung");
                }
            }
        });
        assert!(waited.is_none());
        drop(settings);
    });
    let faults = faults.into_inner();
    // Pauses of 100, 200 and 400 ms.
    let took = faults[3] - faults[0];
    assert!(took >= Duration::from_millis(700), "{took:?}");
}
