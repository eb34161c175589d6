// SPDX-License-Identifier: Apache-2.0 OR MIT
use super::*;
use vmsg_mem::{Access, Mapping, TableEntry};

fn table(pieces: &[(u64, &Arc<Mapping>)]) -> WindowTable {
    let entries = pieces.iter().map(|&(base, mapping)| TableEntry {
        base: BusAddr(base),
        mapping: mapping.clone(),
        offset: 0,
        len: mapping.len(),
        access: Access::ReadWrite,
    });
    WindowTable::new(entries.collect()).unwrap()
}

#[test]
fn what_is_replaced_is_not_mapped_any_more_and_not_reached() {
    let mapping = |name| Arc::new(Mapping::memfd(name, 0x2000, true).unwrap().0);
    let (one, two) = (mapping("one"), mapping("two"));
    let memory = TableMemory::default();
    assert!(memory.load_u16(BusAddr(0)).is_err());
    memory.replace(table(&[(0x1000, &one), (0x3000, &two)]));
    memory.write(BusAddr(0x2fff), &[1, 2]).unwrap();
    let mut bytes = [0; 2];
    memory.read(BusAddr(0x2fff), &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2]);
    assert_eq!(Arc::strong_count(&two), 2);
    memory.replace(table(&[(0x1000, &one)]));
    assert_eq!(Arc::strong_count(&two), 1);
    let unmapped = MemoryError::Unmapped {
        addr: BusAddr(0x2fff),
        len: 2,
    };
    assert_eq!(memory.write(BusAddr(0x2fff), &[3, 4]), Err(unmapped));
}

#[test]
fn a_file_that_is_cut_off_is_no_memory() {
    vmsg_mem::fault::install().unwrap();
    let (mapping, file) = Mapping::memfd("cut", 0x4000, false).unwrap();
    let memory = TableMemory::default();
    memory.replace(table(&[(0, &Arc::new(mapping))]));
    memory.store_u16(BusAddr(0x3000), 5).unwrap();
    rustix::fs::ftruncate(&file, 0x1000).unwrap();
    assert!(memory.load_u16(BusAddr(0x3000)).is_err());
}
