// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn file(len: u64) -> OwnedFd {
    let (_, fd) = Mapping::memfd("test", len, true).expect("memory");
    fd
}

fn mappings(mappings: usize) -> Shares {
    Shares { mappings, ..NOBODY }
}

fn window(id: u32, len: u64) -> Description {
    Description {
        id,
        writable: true,
        base: u64::from(id) << 41,
        len,
        file_offset: 0,
    }
}

#[test]
fn whoever_has_many_windows_takes_half_of_what_is_left() {
    let file = file(4096);
    let mut windows = Windows::new();
    for others in [ALL_WINDOWS - 200, ALL_WINDOWS, ALL_WINDOWS * 2] {
        while windows.count() < 300 {
            let id = u32::try_from(windows.count()).expect("few");
            let all = Shares {
                mappings: others + windows.count(),
                views: 0,
                files: None,
            };
            let mut small = window(id, 4096);
            small.base = u64::from(id) << 12;
            match windows.add(small, &file, true, all) {
                Ok(changed) => assert!(!changed),
                Err(refusal) => {
                    assert!(matches!(refusal, Refusal::TooMany));
                    assert_eq!(windows.count(), 0, "what was staged with it is gone");
                    break;
                }
            }
            let fair = (ALL_WINDOWS.saturating_sub(others) / 2).max(FAIR_WINDOWS);
            assert!(windows.count() <= fair);
        }
        assert_eq!(windows.count(), 0, "300 windows are too many");
    }
}

#[test]
fn the_bytes_lent_are_limited_however_they_come_and_go() {
    let file = file(MAX_BYTES);
    let mut windows = Windows::new();
    assert!(matches!(
        windows.add(window(1, MAX_BYTES), &file, false, mappings(0)),
        Ok(true)
    ));
    assert!(matches!(
        windows.add(window(2, 1), &file, false, mappings(1)),
        Err(Refusal::TooMuch)
    ));
    assert!(matches!(windows.remove(1, false, mappings(1)), Ok(true)));
    let half = MAX_BYTES / 2;
    assert!(matches!(
        windows.add(window(1, half), &file, true, mappings(0)),
        Ok(false)
    ));
    assert!(matches!(
        windows.add(window(2, half), &file, true, mappings(1)),
        Ok(false)
    ));
    assert!(matches!(
        windows.add(window(3, 1), &file, true, mappings(2)),
        Err(Refusal::TooMuch)
    ));
    // All three are given up.
    assert_eq!(windows.count(), 0);
    assert!(matches!(
        windows.add(window(1, MAX_BYTES), &file, false, mappings(0)),
        Ok(true)
    ));
    assert_eq!(windows.table().mappings().len(), 1);
}

#[test]
fn devices_are_no_memory() {
    let zero = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/zero")
        .expect("/dev/zero");
    let mut windows = Windows::new();
    let added = windows.add(window(1, 4096), &zero.into(), false, mappings(0));
    assert!(matches!(added, Err(Refusal::Descriptor(_))), "{added:?}");
}

const PAGE: u64 = 4096;
const NOBODY: Shares = Shares {
    mappings: 0,
    views: 0,
    files: None,
};

fn backing(id: u32, len: u64) -> BackingAdd {
    BackingAdd {
        id,
        writable: true,
        len,
        file_offset: 0,
    }
}

fn view(id: u32, backing: u32, base: u64, offset: u64, len: u64) -> ViewAdd {
    ViewAdd {
        id,
        writable: true,
        backing,
        base: BusAddr(base),
        len,
        offset,
        more: false,
    }
}

/// With backing 1 of `pages` pages, of which each begins with its number.
fn with_backing(pages: u64) -> (Windows, OwnedFd) {
    let (mapping, fd) = Mapping::memfd("test", pages * PAGE, false).expect("memory");
    for page in 0..pages {
        let at = usize::try_from(page * PAGE).expect("small");
        mapping.ram().write(at, &page.to_le_bytes());
    }
    let mut windows = Windows::new();
    windows
        .add_backing(backing(1, pages * PAGE), &fd, NOBODY)
        .expect("a backing");
    (windows, fd)
}

/// The page of the file that is at this address.
fn page_at(windows: &Windows, base: u64) -> Option<u64> {
    let space = windows.table().space();
    let slice = space.get(BusAddr(base), 8, Access::Read)?;
    let mut number = [0; 8];
    slice.read(0, &mut number);
    Some(u64::from_le_bytes(number))
}

#[test]
fn views_change_the_addresses_and_map_nothing() {
    let (mut windows, _fd) = with_backing(8);
    for (id, base, page) in [(1, 0x10_0000, 3), (2, 0x5000, 7), (3, 0x6000, 0)] {
        let added = windows.add_view(view(id, 1, base, page * PAGE, PAGE), NOBODY);
        assert!(matches!(added, Ok(true)));
        assert_eq!(page_at(&windows, base), Some(page));
    }
    assert_eq!(windows.table().mappings().len(), 1);
    assert_eq!(windows.shares().mappings, 1);
    assert_eq!(windows.shares().views, 3);
    assert!(matches!(windows.remove(2, false, NOBODY), Ok(true)));
    assert_eq!(page_at(&windows, 0x5000), None);
    assert_eq!(page_at(&windows, 0x6000), Some(0));
    let again = windows.add_view(view(2, 1, 0x5000, 5 * PAGE, PAGE), NOBODY);
    assert!(
        matches!(again, Ok(true)),
        "an id that is free can be used again"
    );
    assert_eq!(page_at(&windows, 0x5000), Some(5));
}

#[test]
fn views_that_cannot_be_are_refused() {
    let (mut windows, fd) = with_backing(8);
    let mut rom = backing(2, 8 * PAGE);
    rom.writable = false;
    windows.add_backing(rom, &fd, NOBODY).expect("a backing");
    windows
        .add_view(view(1, 1, 0x10_0000, 0, 2 * PAGE), NOBODY)
        .expect("a view");
    let cases = [
        (view(2, 1, 0, 7 * PAGE, PAGE + 1), Status::MALFORMED),
        (view(2, 1, 0, 8 * PAGE, 1), Status::MALFORMED),
        (view(2, 1, 0, 0, 0), Status::MALFORMED),
        (view(2, 1, 0, u64::MAX, 2), Status::MALFORMED),
        (view(2, 1, 0, 2, u64::MAX), Status::MALFORMED),
        (view(2, 1, u64::MAX - PAGE + 2, 0, PAGE), Status::EXISTS),
        (view(2, 3, 0, 0, PAGE), Status::NOT_FOUND),
        (view(1, 1, 0, 0, PAGE), Status::EXISTS),
        (view(2, 1, 0x10_1000, 0, PAGE), Status::EXISTS),
        (view(2, 1, 0xf_f000, 0, PAGE + 1), Status::EXISTS),
        (view(2, 2, 0, 0, PAGE), Status::DENIED),
    ];
    for (bad, status) in cases {
        let refusal = windows.add_view(bad, NOBODY).expect_err("it cannot be");
        assert_eq!(refusal.status(), status, "{bad:?}");
        assert_eq!(windows.shares().views, 1);
        assert_eq!(page_at(&windows, 0x10_0000), Some(0));
    }
    assert!(matches!(
        windows.remove(9, false, NOBODY),
        Err(Refusal::NoSuchWindow(9))
    ));
    let mut readable = view(2, 2, 0, 0, PAGE);
    readable.writable = false;
    windows
        .add_view(readable, NOBODY)
        .expect("reading is allowed");
    assert!(
        windows
            .table()
            .space()
            .get(BusAddr(0), 8, Access::ReadWrite)
            .is_none()
    );
}

#[test]
fn backings_that_cannot_be_are_refused() {
    let (mut windows, fd) = with_backing(8);
    let mut add = |b: BackingAdd| {
        let added = windows.add_backing(b, &fd, NOBODY);
        added.map_err(|refusal| refusal.status())
    };
    assert_eq!(add(backing(1, PAGE)), Err(Status::EXISTS));
    assert_eq!(add(backing(2, 9 * PAGE)), Err(Status::BAD_FD));
    assert_eq!(add(backing(2, 0)), Err(Status::BAD_FD));
    assert_eq!(add(backing(2, MAX_BYTES)), Err(Status::TOO_MANY));
    assert_eq!(add(backing(2, u64::MAX)), Err(Status::TOO_MANY));
    let mut far = backing(2, PAGE);
    far.file_offset = u64::MAX - 1;
    assert_eq!(add(far), Err(Status::BAD_FD));
    let zero = std::fs::File::open("/dev/zero").expect("/dev/zero");
    let device = windows.add_backing(backing(2, PAGE), &zero.into(), NOBODY);
    assert!(matches!(device, Err(Refusal::Descriptor(_))));
    assert_eq!(windows.shares().mappings, 1);
}

#[test]
fn a_backing_stays_while_there_are_views_of_it() {
    let (mut windows, fd) = with_backing(8);
    let in_use = |windows: &mut Windows| {
        let refused = windows.remove_backing(1);
        matches!(refused, Err(Refusal::InUse(1)))
    };
    let mut staged = view(1, 1, 0, 0, PAGE);
    staged.more = true;
    windows.add_view(staged, NOBODY).expect("staged");
    assert!(in_use(&mut windows), "it waits to be applied");
    windows
        .add_view(view(2, 1, PAGE, 0, PAGE), NOBODY)
        .expect("both applied");
    assert!(in_use(&mut windows));
    assert!(matches!(windows.remove(1, true, NOBODY), Ok(false)));
    assert!(in_use(&mut windows));
    assert!(matches!(windows.remove(2, false, NOBODY), Ok(true)));
    windows.remove_backing(1).expect("nothing is in it");
    assert!(matches!(
        windows.remove_backing(1),
        Err(Refusal::NoSuchBacking(1))
    ));
    assert_eq!(windows.shares().mappings, 0);
    assert!(windows.table().mappings().is_empty());
    windows
        .add_backing(backing(1, MAX_BYTES.min(8 * PAGE)), &fd, NOBODY)
        .expect("the id is free again");
}

#[test]
fn staged_changes_are_applied_together_or_not_at_all() {
    let (mut windows, _fd) = with_backing(8);
    let more = |mut view: ViewAdd| {
        view.more = true;
        view
    };
    windows
        .add_view(view(1, 1, 0, 0, PAGE), NOBODY)
        .expect("a view");
    // The last of them is in the way of the second.
    assert!(matches!(windows.remove(1, true, NOBODY), Ok(false)));
    let staged = windows.add_view(more(view(2, 1, 0x8000, PAGE, 2 * PAGE)), NOBODY);
    assert!(matches!(staged, Ok(false)));
    assert_eq!(page_at(&windows, 0), Some(0), "nothing has changed yet");
    let refused = windows.add_view(view(3, 1, 0x9000, 0, PAGE), NOBODY);
    assert!(matches!(refused, Err(Refusal::Overlap(_))));
    assert_eq!(page_at(&windows, 0), Some(0));
    assert_eq!(page_at(&windows, 0x8000), None);
    assert_eq!(windows.shares().views, 1);
    // The same without what was in the way, and with an id that goes and comes again.
    assert!(matches!(windows.remove(1, true, NOBODY), Ok(false)));
    windows
        .add_view(more(view(2, 1, 0x8000, PAGE, 2 * PAGE)), NOBODY)
        .expect("staged");
    windows
        .add_view(view(1, 1, 0xa000, 3 * PAGE, PAGE), NOBODY)
        .expect("applied");
    let pages = [0, 0x8000, 0x9000, 0xa000].map(|base| page_at(&windows, base));
    assert_eq!(pages, [None, Some(1), Some(2), Some(3)]);
    assert_eq!(
        windows.table().space().windows().len(),
        1,
        "they are neighbours"
    );
    for id in [1, 2] {
        windows.remove(id, false, NOBODY).expect("it is there");
    }
    windows.remove_backing(1).expect("all views were counted");
}

#[test]
fn a_staged_view_that_fails_takes_its_companions_along() {
    let (mut windows, _fd) = with_backing(8);
    let mut staged = view(1, 1, 0, 0, PAGE);
    staged.more = true;
    windows.add_view(staged, NOBODY).expect("staged");
    let refused = windows.add_view(view(2, 9, PAGE, 0, PAGE), NOBODY);
    assert!(matches!(refused, Err(Refusal::NoSuchBacking(9))));
    windows
        .add_view(view(3, 1, 2 * PAGE, 0, PAGE), NOBODY)
        .expect("a view");
    assert_eq!(page_at(&windows, 0), None);
    assert_eq!(windows.shares().views, 1);
    windows.remove(3, false, NOBODY).expect("it is there");
    windows.remove_backing(1).expect("nothing is in it");
}

#[test]
fn there_are_no_more_views_than_admitted() {
    let (mut windows, _fd) = with_backing(1);
    let count = u32::try_from(MAX_VIEWS).expect("some thousands");
    let at = |id: u32| view(id, 1, u64::from(id) * 2 * PAGE, 0, PAGE);
    for id in 0..count {
        let mut view = at(id);
        view.more = id + 1 < count;
        windows.add_view(view, NOBODY).expect("admitted");
    }
    assert_eq!(windows.table().space().windows().len(), MAX_VIEWS);
    let all = windows.shares();
    for more in [false, true] {
        let mut one = at(count);
        one.more = more;
        match windows.add_view(one, all) {
            Ok(false) => {
                let last = windows.remove(u32::MAX, false, all);
                assert!(last.is_err(), "what was staged is given up");
            }
            other => assert!(matches!(other, Err(Refusal::TooMany)), "{other:?}"),
        }
    }
    assert_eq!(windows.shares().views, MAX_VIEWS);
    // One for another goes.
    windows.remove(0, true, all).expect("staged");
    windows.add_view(at(count), all).expect("one is gone");
    // Others have so many that less is left.
    let many = Shares {
        mappings: 0,
        views: ALL_VIEWS,
        files: None,
    };
    windows.remove(1, false, many).expect("it is there");
    assert!(matches!(
        windows.add_view(at(1), many),
        Err(Refusal::TooMany)
    ));
}

#[test]
fn a_file_that_shrinks_breaks_its_views_and_takes_no_new_ones() {
    vmsg_mem::fault::install().expect("a handler");
    let (mut windows, fd) = with_backing(8);
    windows
        .add_view(view(1, 1, 0x8000, 7 * PAGE, PAGE), NOBODY)
        .expect("a view");
    assert_eq!(page_at(&windows, 0x8000), Some(7));
    std::fs::File::from(fd.try_clone().expect("a descriptor"))
        .set_len(PAGE)
        .expect("it is not sealed");
    assert_eq!(page_at(&windows, 0x8000), Some(0), "no SIGBUS, zeros");
    assert!(windows.table().is_lost());
    let more = windows.add_view(view(2, 1, 0, 0, PAGE), NOBODY);
    assert!(matches!(more, Err(Refusal::Descriptor(_))));
    windows.remove(1, false, NOBODY).expect("it can go");
    windows.remove_backing(1).expect("and so can the file");
}

#[test]
fn files_are_kept_where_they_are_of_use_and_not_more_than_a_share_of_all() {
    let fd = file(1 << 20);
    let users = |files| Shares {
        files: Some(files),
        ..NOBODY
    };
    let lend = |windows: &mut Windows, id: u32, all| {
        let mut small = window(id, 4096);
        small.file_offset = u64::from(id) << 12;
        windows.add(small, &fd, false, all).expect("a window");
        let places = windows.table().places().collect::<Vec<_>>();
        let place = places.iter().find(|place| place.base.0 == small.base);
        let mapping = place.expect("it was added").mapping;
        mapping.file().map(|(_, offset)| offset)
    };
    let mut windows = Windows::new();
    assert_eq!(lend(&mut windows, 1, NOBODY), None);
    assert_eq!(lend(&mut windows, 2, users(0)), Some(2 << 12));
    assert_eq!(windows.shares().files, Some(1));
    for id in 3..100 {
        let kept = windows.shares().files.expect("they are counted");
        let offset = lend(&mut windows, id, users(kept));
        assert_eq!(offset.is_some(), kept < MAX_FILES, "{id}");
    }
    assert_eq!(windows.shares().files, Some(MAX_FILES));
    windows.remove(1, false, NOBODY).expect("it is there");
    assert_eq!(windows.shares().files, Some(MAX_FILES));
    for id in 2..100 {
        windows.remove(id, false, NOBODY).expect("it is there");
    }
    assert_eq!(windows.shares().files, Some(0));

    // Others have taken all there are: a few are had in any case.
    for id in 0..20 {
        lend(&mut windows, id, users(ALL_FILES));
    }
    assert_eq!(windows.shares().files, Some(FAIR_FILES));

    let mut windows = Windows::new();
    windows
        .add_backing(backing(1, 4096), &fd, users(0))
        .expect("a backing");
    windows
        .add_view(view(7, 1, 0x1000, 0, PAGE), users(1))
        .expect("a view");
    assert_eq!(windows.shares().files, Some(1));
    let file = windows
        .table()
        .places()
        .next()
        .map(|place| place.mapping.file().is_some());
    assert_eq!(file, Some(true), "a view has the file of its backing");
    windows.remove(7, false, NOBODY).expect("it is there");
    windows.remove_backing(1).expect("no view is left");
    assert_eq!(windows.shares().files, Some(0));
}
