// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A device's shared memory as a client of the vfio-user front has it: in a BAR, and mapped.
#![allow(missing_docs, clippy::cast_possible_truncation)]

mod vfio;

use std::os::fd::AsFd;
use vfio::place::Place;
use vfio::region::{FILE_OFFSET, LEN, WithRegion};
use vmsg_mem::{Access, Mapping};

const BAR: u32 = 2;
const CONFIG: u32 = vfio::CONFIG;

fn read(client: &mut vfio_user::Client, region: u32, at: u64, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    client.region_read(region, at, &mut bytes).unwrap();
    bytes
}

/// The capabilities of virtio (vendor-specific, 0x09) of one type: all their bytes.
fn capabilities(config: &[u8], kind: u8) -> Vec<&[u8]> {
    let mut found = Vec::new();
    let mut at = usize::from(config[0x34]);
    while at != 0 {
        if config[at] == 0x09 && config[at + 3] == kind {
            found.push(&config[at..at + usize::from(config[at + 2])]);
        }
        at = usize::from(config[at + 1]);
    }
    found
}

#[test]
fn a_region_of_the_device_is_memory_in_a_bar_and_can_be_mapped() {
    for keys in ["", ",isolate=on,segment=4M"] {
        let (device, theirs) = WithRegion::new();
        let theirs = theirs.ram();
        let place = Place::with_device(Box::new(device), keys);
        let mut client = vfio_user::Client::new(&place.socket()).unwrap();

        // VIRTIO_PCI_CAP_SHARED_MEMORY_CFG: struct virtio_pci_cap64 (virtio 1.3 §4.1.4.7).
        let config = read(&mut client, CONFIG, 0, 256);
        let [capability] = capabilities(&config, 8)[..] else {
            panic!("one region")
        };
        assert_eq!((capability[4], capability[5]), (BAR as u8, 0), "BAR and id");
        let word = |at: usize| u32::from_le_bytes(capability[at..at + 4].try_into().unwrap());
        assert_eq!([word(8), word(16)], [0, 0], "its offset in the BAR");
        assert_eq!([word(12), word(20)], [LEN as u32, 0], "its length");
        let at = 0x10 + 4 * BAR as usize;
        assert_eq!(config[at] & 0xf, 0xc, "64 bits, prefetchable");

        // Accesses through the BAR are accesses to the region.
        theirs.write(FILE_OFFSET as usize + 8, b"from the device");
        assert_eq!(read(&mut client, BAR, 8, 15), b"from the device");
        client.region_write(BAR, LEN - 5, b"guest").unwrap();
        let mut bytes = [0; 5];
        theirs.read((FILE_OFFSET + LEN) as usize - 5, &mut bytes);
        assert_eq!(&bytes, b"guest");

        let region = client.region(BAR).unwrap();
        assert_eq!(region.size, LEN.next_power_of_two());
        // READ, WRITE, MMAP, CAPS.
        assert_eq!(region.flags, 0xf);
        let [area] = region.sparse_areas[..] else {
            panic!("one area")
        };
        assert_eq!((area.offset, area.size), (0, LEN));
        let file = region.file_offset.as_ref().unwrap();
        assert_eq!(file.start(), FILE_OFFSET);
        let ours = Mapping::of_fd(
            file.file().as_fd(),
            file.start() + area.offset,
            area.size,
            Access::ReadWrite,
        )
        .unwrap();
        let mut bytes = [0; 15];
        ours.ram().read(8, &mut bytes);
        assert_eq!(&bytes, b"from the device");
        ours.ram().write(0x1_0000, b"mapped");
        assert_eq!(read(&mut client, BAR, 0x1_0000, 6), b"mapped");
    }
}

#[test]
fn a_device_without_regions_has_no_bar_for_them() {
    let place = Place::new("rng0", "");
    let mut client = vfio_user::Client::new(&place.socket()).unwrap();
    assert_eq!(client.region(BAR).unwrap().size, 0);
    let config = read(&mut client, CONFIG, 0, 256);
    assert!(capabilities(&config, 8).is_empty());
}
