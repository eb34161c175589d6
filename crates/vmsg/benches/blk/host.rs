// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Our side: device hosts in processes of their own, and the driver.

use std::path::Path;
use std::process::{Command, Stdio};

use virtio_msg::DevNum;
use vmsg_block::NullDisk;
use vmsg_bus::DriverBus;
use vmsg_bus::unix::{Connector, Listener, ListenerOptions};
use vmsg_device::blk::{Blk, Settings};
use vmsg_device::host::Host;
use vmsg_driver::blk::{BlkDriver, BlkOptions};
use vmsg_driver::{BusClient, Sleep};

use crate::{Buffers, DISK, Driven, Ended, Job, PATIENCE, pool};

/// This program, asked to be a host with a null disk.
pub(crate) const NULL_HOST: &str = "--null-host";

/// Serves a null disk until the process ends.
pub(crate) fn serve_null(socket: &Path) {
    let listener = Listener::bind(socket, ListenerOptions::default()).expect("a socket");
    let mut host = Host::new(1).expect("a host");
    let bus = host
        .add_bus(vmsg_bus::DEFAULT_MESSAGE_SIZE, Some(listener.into()))
        .expect("a bus");
    let disk = Blk::new(&Settings::new("null"), Box::new(NullDisk { size: DISK }));
    host.add_device(bus, "null", Some(0), None, Box::new(disk))
        .expect("a device");
    host.run().expect("served");
}

pub(crate) fn start_null(socket: &Path) -> Ended {
    let program = std::env::current_exe().expect("this program");
    Ended::start(Command::new(program).arg(NULL_HOST).arg(socket))
}

/// `disk`: a block device's keys.
pub(crate) fn start_serve(socket: &Path, disk: &str, program: &str) -> Ended {
    let bus = format!("unix,path={}", socket.display());
    Ended::start(
        Command::new(program)
            .args(["serve", "--bus", &bus])
            .args(["--device", &format!("blk,{disk}")])
            .stderr(Stdio::null()),
    )
}

/// Our disk, and its driver.
pub(crate) struct Ours {
    driver: BlkDriver<'static, DriverBus, Sleep, Vec<u8>>,
    buffers: Buffers,
    _process: Ended,
}

impl Ours {
    pub(crate) fn new(socket: &Path, process: Ended) -> Self {
        let bus = Connector::new(socket, "benchmark")
            .connect()
            .expect("a host");
        let mut client = BusClient::on_bus(bus);
        client.set_timeout(PATIENCE);
        let pool = pool();
        pool.lend(&mut client, 1).expect("lent");
        let options = BlkOptions::default();
        let driver = BlkDriver::new(client, DevNum(0), pool, &options).expect("a disk");
        Self {
            driver,
            buffers: Buffers::new(pool),
            _process: process,
        }
    }
}

impl Driven for Ours {
    fn submit(&mut self, job: Job) {
        let mut room = Default::default();
        let request = self.buffers.request(job, &mut room);
        let taken = self.driver.submit(0, job.buffer as u64, request);
        assert!(taken.expect("a sound queue"), "there is room");
    }

    fn commit(&mut self) {
        self.driver.commit().expect("a live device");
    }

    fn poll(&mut self, done: &mut Vec<usize>) {
        let polled = self.driver.poll(|completion| {
            completion.result.expect("done");
            done.push(usize::try_from(completion.tag).expect("a buffer"));
        });
        polled.expect("a sound queue");
    }
}
