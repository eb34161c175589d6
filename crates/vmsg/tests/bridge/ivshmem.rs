// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A daemon's disk on a bus in shared memory: the daemon maps the file of `ram=`.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;

use virtio_msg::DevNum;
use vmsg_bus::{BusSpec, DriverBus};
use vmsg_driver::blk::{BlkDriver, BlkOptions};
use vmsg_driver::{BusClient, DmaPool};
use vmsg_mem::BusAddr;

use crate::disk::{drive, set_up, use_it};
use crate::station::{BASE, PATIENCE, Station, until};

const MEMORY: usize = 8 << 20;
/// Of the file with the memory.
const FILE: u64 = 16 << 20;

/// Makes the files of a bus. They are to be mapped, also by others.
fn files(dir: &Path) {
    for name in ["common", "ram"] {
        let file = File::create(dir.join(name)).expect("a file");
        file.set_len(FILE).expect("room");
    }
}

fn connect(bus: &str) -> DriverBus {
    let spec: BusSpec = bus.parse().expect("a bus");
    until("the bus", || {
        spec.connector("test").timeout(PATIENCE).connect().ok()
    })
}

/// Memory of the bus that devices reach.
fn pool(bus: &DriverBus) -> DmaPool {
    if let Some(common) = bus.common() {
        return DmaPool::in_common(common, 1 << 20, BASE, MEMORY).expect("memory");
    }
    let ram = bus.static_ram().expect("memory that both know");
    let windows = ram.windows().expect("a file");
    let window = windows.first().expect("a window");
    // Bus address 0 is kept free.
    let (base, offset) = (BusAddr(window.base + 4096), window.file_offset + 4096);
    DmaPool::in_known(window.file.as_fd(), offset, base, MEMORY).expect("memory")
}

#[test]
fn a_disk_is_read_and_written_over_shared_memory_whoever_knows_the_memory() {
    for keys in [
        "memory=bounce,ram=DIR/ram",
        "memory=bounce,ram=bar",
        "layout=spsc,memory=segment,ram=DIR/ram",
        "memory=known,ram=DIR/ram",
        "layout=spsc,memory=known,ram=DIR/ram,mem-offset=0x40000000",
    ] {
        let Some((station, mut daemon)) = set_up() else {
            return;
        };
        files(station.dir.path());
        let at = station.dir.path().display().to_string();
        let bus = format!("ivshmem,file={at}/common,{}", keys.replace("DIR", &at));
        let mut serve = station.serve_on(&bus, &station.disk_spec());
        for round in 0..2 {
            let connected = connect(&bus);
            let pool = pool(&connected);
            let mut client = BusClient::on_bus(connected);
            client.set_timeout(PATIENCE);
            pool.lend_to(&mut client, &[DevNum(0)]).expect("lent");
            let mut driver = drive(client, &pool, &BlkOptions::default());
            use_it(&mut driver);
            if round == 0 {
                // The next daemon goes on with it, and so does the next host.
                daemon.kill();
                until("its end", || {
                    station.log().contains("the daemon is gone").then_some(())
                });
                daemon = station.storage(&station.path("image"), "");
                use_it(&mut driver);
                resume(&station, &bus, &mut serve, &pool, &mut driver);
                use_it(&mut driver);
            }
        }
    }
}

fn resume<'p>(
    station: &Station,
    bus: &str,
    serve: &mut crate::station::Process,
    pool: &'p DmaPool,
    driver: &mut BlkDriver<'p, DriverBus, vmsg_driver::Sleep, Vec<u8>>,
) {
    serve.kill();
    *serve = station.serve_on(bus, &station.disk_spec());
    let mut client = BusClient::on_bus(connect(bus));
    client.set_timeout(PATIENCE);
    pool.lend_to(&mut client, &[DevNum(0)]).expect("lent");
    driver.resume(client).expect("resumed");
}
