// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;
use crate::server::memory;

fn ids(list: &[u16]) -> BTreeSet<PeerId> {
    list.iter().copied().map(PeerId).collect()
}

/// A server's start on the memory of `dir`, that gives `given` ids and ends.
fn serve(dir: &Path, fixed: &[u16], given: u32) -> Result<Start, LedgerError> {
    let path = dir.join("memory");
    let ledger = Ledger::take(&path)?;
    let memory = memory::named(&path, 4096).unwrap();
    let start = ledger.start(&memory, &ids(fixed))?;
    ledger.note(start.next + given).unwrap();
    Ok(start)
}

#[test]
fn ids_go_on_while_anybody_has_the_memory_open_and_begin_anew_afterwards() {
    let dir = tempfile::tempdir().unwrap();
    let start = serve(dir.path(), &[9], 3).unwrap();
    assert_eq!(
        start,
        Start {
            next: 0,
            elders: false,
            fixed: ids(&[9])
        }
    );
    let client = std::fs::File::open(dir.path().join("memory")).unwrap();
    let start = serve(dir.path(), &[8], 2).unwrap();
    assert_eq!(
        start,
        Start {
            next: 3,
            elders: true,
            fixed: ids(&[8, 9])
        }
    );
    let start = serve(dir.path(), &[], 0).unwrap();
    assert_eq!(
        start,
        Start {
            next: 5,
            elders: true,
            fixed: ids(&[8, 9])
        }
    );
    drop(client);
    let start = serve(dir.path(), &[], 0).unwrap();
    assert_eq!(
        start,
        Start {
            next: 0,
            elders: false,
            fixed: ids(&[])
        }
    );
}

#[test]
fn a_port_cannot_have_the_id_of_a_client_that_may_be_there() {
    let dir = tempfile::tempdir().unwrap();
    serve(dir.path(), &[2], 5).unwrap();
    let client = std::fs::File::open(dir.path().join("memory")).unwrap();
    let error = serve(dir.path(), &[4], 0).unwrap_err();
    assert!(
        matches!(
            error,
            LedgerError::IdTaken {
                id: PeerId(4),
                next: 5,
                ..
            }
        ),
        "{error}"
    );
    serve(dir.path(), &[2, 5], 0).unwrap();
    drop(client);
    serve(dir.path(), &[4], 0).unwrap();
}

#[test]
fn other_memory_by_the_same_name_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    serve(dir.path(), &[], 5).unwrap();
    let path = dir.path().join("memory");
    // Kept open, so that the next file cannot get the same inode.
    let _client = std::fs::File::open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    let start = serve(dir.path(), &[], 0).unwrap();
    assert_eq!(
        start,
        Start {
            next: 0,
            elders: false,
            fixed: ids(&[])
        }
    );
}

#[test]
fn there_is_one_server_for_a_memory() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("memory");
    let first = Ledger::take(&path).unwrap();
    let memory = memory::named(&path, 4096).unwrap();
    first.start(&memory, &ids(&[])).unwrap();
    match Ledger::take(&path) {
        Err(LedgerError::InUse { pid, .. }) => assert_eq!(pid, Some(std::process::id())),
        other => panic!("{other:?}"),
    }
    drop(first);
    Ledger::take(&path).unwrap();
}

#[test]
fn a_file_that_says_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for text in [
        "hello",
        "0000000001 next 70000\nmemory 1 2\nfixed\n",
        "1 next 1\nmemory 1\nfixed\n",
    ] {
        std::fs::write(dir.path().join("memory.ids"), text).unwrap();
        let error = serve(dir.path(), &[], 0).unwrap_err();
        assert!(
            matches!(error, LedgerError::NotUnderstood { .. }),
            "{text}: {error}"
        );
    }
}
