// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device host that is killed again and again under traffic: what a rule keeps apart stays apart, from the first frame on.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use virtio_msg::DevNum;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::Connector;
use vmsg_driver::net::{NetDriver, NetOptions};
use vmsg_driver::{BusClient, DmaPool, Error, Sleep};
use vmsg_mem::BusAddr;

use crate::bench::{Lab, PATIENCE};

const KILLS: usize = 25;
/// Rules that come before the one that matters: whoever tells them one after another takes his time.
const OTHERS: usize = 100;
/// How long a receiver sleeps before it looks whether it is over.
const LOOK: Duration = Duration::from_millis(20);

const LAB: &str = "
[switch.s0]
allow = [\"* <> *\"]
[bus.b0]
[bus.b1]
[bus.b2]
[device.from]
type = \"net\"
bus = \"b0\"
switch = \"s0\"
mac = \"02:00:00:00:00:0a\"
[device.apart]
type = \"net\"
bus = \"b1\"
switch = \"s0\"
[device.witness]
type = \"net\"
bus = \"b2\"
switch = \"s0\"
";

type Driver = NetDriver<'static, DriverBus, Sleep, Vec<u8>>;

/// A driver that comes again at once when its device host is gone.
struct Station {
    path: PathBuf,
    pool: &'static DmaPool,
    net: Option<Driver>,
}

impl Station {
    fn new(lab: &Lab, bus: &str) -> Self {
        let pool = DmaPool::new("net", BusAddr(0x1_0000_0000), 4 << 20).expect("memory");
        Self {
            path: lab.folder.path().join(format!("run/{bus}.sock")),
            // Rings borrow it, and the process is short.
            pool: Box::leak(Box::new(pool)),
            net: None,
        }
    }

    fn connect(&self) -> Option<Driver> {
        let connection = Connector::new(&self.path, "station").connect().ok()?;
        let mut client = BusClient::on_bus(connection);
        client.set_timeout(PATIENCE);
        self.pool.lend(&mut client, 1).ok()?;
        NetDriver::new(client, DevNum(0), self.pool, &NetOptions::default()).ok()
    }

    /// Does something with the driver; none of it matters if the device host is gone meanwhile.
    fn with(&mut self, act: impl FnOnce(&mut Driver) -> Result<(), Error>) {
        if self.net.is_none() {
            self.net = self.connect();
        }
        match &mut self.net {
            Some(net) => {
                if act(net).is_err() {
                    self.net = None;
                }
            }
            None => std::thread::yield_now(),
        }
    }
}

/// Sends to everybody, as fast as it can.
fn send(mut station: Station, over: &AtomicBool) {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 0x0a, 0x88, 0xb5]);
    frame.resize(200, 0xa5);
    while !over.load(Ordering::Relaxed) {
        station.with(|net| {
            if net.transmit([frame.as_slice()])? == 0 {
                net.wait_sent(LOOK)?;
            }
            Ok(())
        });
    }
}

/// Counts what comes.
fn count(mut station: Station, over: &AtomicBool, each: impl Fn()) {
    while !over.load(Ordering::Relaxed) {
        station.with(|net| {
            if net.receive(256, |_| each())? == 0 {
                net.wait(LOOK)?;
            }
            Ok(())
        });
    }
}

/// Is true once it was dropped: threads end also when the test has failed.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn no_frame_passes_a_rule_of_the_operator_however_often_the_device_host_is_killed() {
    let lab = Lab::new(LAB);
    let up = lab.up();
    for other in 0..OTHERS {
        up.done(&["rule", "allow", &format!("here{other} > there{other}")]);
    }
    up.done(&["rule", "deny", "from <> apart"]);
    let stations = ["b0", "b1", "b2"].map(|bus| Station::new(&lab, bus));
    let [from, apart, witness] = stations;
    let (over, crossed) = (AtomicBool::new(false), AtomicU64::new(0));
    let (seen, more) = (Mutex::new(0_u64), Condvar::new());
    std::thread::scope(|threads| {
        let _ends = Ends(&over);
        threads.spawn(|| send(from, &over));
        threads.spawn(|| {
            count(apart, &over, || {
                crossed.fetch_add(1, Ordering::Relaxed);
            });
        });
        threads.spawn(|| {
            count(witness, &over, || {
                *seen.lock().expect("no panic") += 1;
                more.notify_all();
            });
        });
        // Frames of `from` arrive where they may.
        let flows = || {
            let seen = seen.lock().expect("no panic");
            let before = *seen;
            let (seen, _) = more
                .wait_timeout_while(seen, PATIENCE, |seen| *seen < before + 10)
                .expect("no panic");
            assert!(*seen >= before + 10, "nothing flows");
        };
        for _ in 0..KILLS {
            flows();
            let serve = up.part("serve");
            let pid = serve.pid.and_then(Pid::from_raw).expect("it runs");
            kill_process(pid, Signal::KILL).expect("it is ours");
            while up.part("serve").restarts == serve.restarts {
                // Its pause is cut short; while it is not dead yet there is none.
                let _ = up.ctl(&["start-part", "serve"]);
            }
        }
        flows();
    });
    assert_eq!(crossed.into_inner(), 0, "frames that have crossed");
}
