// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use vmsg_mem::Mapping;

const PAGE: u64 = 0x1000;

struct File(Arc<OwnedFd>, u64);

impl File {
    fn new(inode: u64, len: u64) -> File {
        let (_, fd) = Mapping::memfd("test", len, true).unwrap();
        File(Arc::new(fd), inode)
    }

    fn window(&self, base: u64, len: u64, file_offset: u64) -> Window {
        Window {
            base,
            len,
            file_offset,
            writable: true,
            fd: Arc::clone(&self.0),
            file: FileId {
                device: 1,
                inode: self.1,
            },
        }
    }
}

fn change(windows: &mut Windows, remove: &[u64], add: &[Window]) -> Option<Change> {
    let change = windows.plan_change(remove, add, &[])?;
    windows.apply(change.clone());
    Some(change)
}

#[test]
fn one_backing_serves_all_views_of_a_file() {
    let (one, two) = (File::new(1, 64 * PAGE), File::new(2, PAGE));
    let mut windows = Windows::default();
    let add = [
        one.window(0, PAGE, 0),
        one.window(PAGE, PAGE, 8 * PAGE),
        two.window(0x10_0000, PAGE, 0),
    ];
    let first = change(&mut windows, &[], &add).unwrap();
    let lens: Vec<_> = first.backings.iter().map(|b| (b.id, b.len)).collect();
    assert_eq!(lens, [(1, 64 * PAGE), (2, PAGE)]);
    let backings: Vec<_> = first.add.iter().map(|lent| lent.backing).collect();
    assert_eq!(backings, [Some(1), Some(1), Some(2)]);
    let second = change(&mut windows, &[PAGE], &[one.window(0x9000, PAGE, 0)]).unwrap();
    assert!(second.backings.is_empty());
    assert_eq!(second.remove[0].id, 2);
    let third = change(&mut windows, &[], &[one.window(0xa000, PAGE, PAGE)]).unwrap();
    assert_eq!(third.add[0].id, 2, "ids that are free are used again");
    assert_eq!(windows.len(), 4);
    let replay = windows.replay();
    assert_eq!((replay.backings.len(), replay.add.len()), (2, 4));
}

#[test]
fn what_may_be_written_needs_a_backing_that_may() {
    let file = File::new(1, 64 * PAGE);
    let mut windows = Windows::default();
    let mut rom = file.window(0, PAGE, 0);
    rom.writable = false;
    let first = change(&mut windows, &[], &[rom.clone()]).unwrap();
    assert!(!first.backings[0].writable);
    let second = change(&mut windows, &[], &[file.window(PAGE, PAGE, PAGE)]).unwrap();
    assert!(second.backings[0].writable);
    rom.base = 2 * PAGE;
    let third = change(&mut windows, &[], &[rom]).unwrap();
    assert!(third.backings.is_empty());
}

#[test]
fn what_is_beyond_its_file_is_no_view_of_it() {
    let file = File::new(1, PAGE);
    let mut windows = Windows::default();
    let change = change(&mut windows, &[], &[file.window(0, PAGE, PAGE)]).unwrap();
    assert!(change.backings.is_empty());
    assert_eq!(change.add[0].backing, None);
}

#[test]
fn impossible_changes_change_nothing() {
    let file = File::new(1, 1 << 30);
    let mut windows = Windows::default();
    let add = [
        file.window(PAGE, PAGE, 0),
        file.window(4 * PAGE, 2 * PAGE, 0),
    ];
    change(&mut windows, &[], &add).unwrap();
    type Case<'a> = (&'a [u64], &'a [(u64, u64)]);
    let cases: &[Case<'_>] = &[
        (&[0], &[]),
        (&[PAGE + 1], &[]),
        (&[PAGE, PAGE], &[]),
        (&[], &[(PAGE, PAGE)]),
        (&[], &[(0, PAGE + 1)]),
        (&[], &[(0, 100 * PAGE)]),
        (&[PAGE], &[(0, 100 * PAGE)]),
        (&[], &[(5 * PAGE, 1)]),
        (&[], &[(6 * PAGE - 1, 1)]),
        (&[], &[(2 * PAGE, 0)]),
        (&[], &[(u64::MAX, 2)]),
        (&[], &[(8 * PAGE, PAGE), (8 * PAGE, PAGE)]),
        (&[], &[(9 * PAGE, PAGE), (8 * PAGE, PAGE + 1)]),
    ];
    for (remove, add) in cases {
        let add: Vec<_> = add
            .iter()
            .map(|(base, len)| file.window(*base, *len, 0))
            .collect();
        assert!(
            windows.plan_change(remove, &add, &[]).is_none(),
            "{remove:?} {add:?}"
        );
        assert_eq!(windows.len(), 2);
    }
    let all = [PAGE, 4 * PAGE];
    let over = file.window(0, 100 * PAGE, 0);
    change(&mut windows, &all, &[over]).expect("those in the way go");
    assert_eq!(windows.len(), 1);
}

#[test]
fn any_changes_agree_with_a_list_that_is_searched_through() {
    use proptest::prelude::*;
    let file = File::new(1, 1 << 20);
    let step = (
        proptest::collection::vec(0u64..16, 0..4),
        proptest::collection::vec((0u64..16, 0u64..4), 0..4),
    );
    proptest!(|(steps in proptest::collection::vec(step, 1..40))| {
        let mut windows = Windows::default();
        let mut list: Vec<(u64, u64)> = Vec::new();
        for (remove, add) in steps {
            let mut next = list.clone();
            let there = remove.iter().all(|base| {
                let at = next.iter().position(|(other, _)| other == base);
                at.map(|at| next.remove(at)).is_some()
            });
            next.extend(&add);
            let apart = |(i, a): (usize, &(u64, u64))| {
                a.1 != 0 && next[..i].iter().all(|b| a.0 + a.1 <= b.0 || b.0 + b.1 <= a.0)
            };
            let possible = there && next.iter().enumerate().all(apart);
            let add: Vec<_> = add.iter().map(|(base, len)| file.window(*base, *len, 0)).collect();
            prop_assert_eq!(change(&mut windows, &remove, &add).is_some(), possible);
            if possible {
                list = next;
            }
            list.sort_unstable();
            let there: Vec<_> = windows.iter().map(|l| (l.window.base, l.window.len)).collect();
            prop_assert_eq!(&there, &list);
            let ids: BTreeSet<u32> = windows.iter().map(|lent| lent.id).collect();
            prop_assert_eq!(ids.len(), list.len());
        }
    });
}

#[test]
fn backings_without_views_go_after_a_while() {
    let files: Vec<File> = (0..12).map(|inode| File::new(inode, PAGE)).collect();
    let mut windows = Windows::default();
    for (at, file) in (0..).zip(&files) {
        change(&mut windows, &[], &[file.window(at * PAGE, PAGE, 0)]).unwrap();
    }
    let start = Instant(0);
    assert!(windows.expired(start).is_empty());
    assert_eq!(windows.next_expiry(), None);
    change(&mut windows, &[0], &[]).unwrap();
    assert!(windows.expired(start).is_empty());
    assert_eq!(windows.next_expiry(), Some(start + IDLE));
    change(&mut windows, &[], &[files[0].window(0, PAGE, 0)]).unwrap();
    assert_eq!(windows.next_expiry(), None, "it is used again");
    let later = start + IDLE;
    let rest: Vec<u64> = (0..11).map(|at| at * PAGE).collect();
    change(&mut windows, &rest, &[]).unwrap();
    let too_many = windows.expired(later);
    assert_eq!(too_many.len(), 11 - MAX_IDLE);
    for id in too_many {
        windows.backing_removed(id);
    }
    assert!(windows.expired(later).is_empty());
    assert_eq!(windows.expired(later + IDLE).len(), MAX_IDLE);
    windows.forget_idle();
    assert_eq!(windows.backings().count(), 1);
}
