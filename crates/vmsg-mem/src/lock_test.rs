// SPDX-License-Identifier: Apache-2.0 OR MIT

use super::*;

fn folder() -> PathBuf {
    use std::sync::atomic::{AtomicU32, Ordering};
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("vmsg-lock-{}-{number}", std::process::id());
    let folder = std::env::temp_dir().join(name);
    fs::create_dir(&folder).expect("a folder");
    folder
}

#[test]
fn a_lock_has_one_holder_who_says_who_it_is_and_goes_with_its_file() {
    let folder = folder();
    let path = folder.join("lock");
    assert!(matches!(holder(&path), Ok(None)));
    let lock = FileLock::take(&path, true).expect("free");
    lock.write("a long name\n").expect("written");
    lock.write("me\n").expect("written");
    assert_eq!(lock.text(), "me\n");
    assert!(matches!(FileLock::take(&path, false), Err(LockError::Held(text)) if text == "me\n"));
    assert_eq!(holder(&path).expect("asked"), Some("me\n".to_owned()));
    drop(lock);
    assert!(!path.exists());
    fs::remove_dir(&folder).expect("empty");
}

#[test]
fn a_file_that_stays_keeps_its_words() {
    let folder = folder();
    let path = folder.join("lock");
    let lock = FileLock::take(&path, false).expect("free");
    lock.write("one two\n").expect("written");
    drop(lock);
    let mut lock = FileLock::take(&path, false).expect("free");
    lock.write_over("ONE").expect("written");
    assert_eq!(lock.text(), "ONE two\n");
    assert!(matches!(holder(&path), Ok(Some(_))));
    lock.remove_at_end();
    drop(lock);
    fs::remove_dir(&folder).expect("empty");
}

#[test]
fn a_file_that_was_put_in_its_place_stays() {
    let folder = folder();
    let path = folder.join("lock");
    let lock = FileLock::take(&path, true).expect("free");
    fs::rename(&path, folder.join("away")).expect("moved");
    fs::write(&path, "another").expect("written");
    drop(lock);
    assert_eq!(fs::read_to_string(&path).expect("there"), "another");
    fs::remove_dir_all(&folder).expect("ours");
}

#[test]
fn links_and_pipes_and_files_with_other_names_are_refused_by_name() {
    let folder = folder();
    let path = folder.join("lock");
    let refused = |what: &str| {
        let error = FileLock::take(&path, true).expect_err(what).to_string();
        assert!(error.contains(what), "{error}");
        fs::remove_file(&path).expect("still there");
    };
    let other = folder.join("other");
    fs::write(&other, "precious").expect("written");
    std::os::unix::fs::symlink(&other, &path).expect("a link");
    refused("symbolic link");
    fs::hard_link(&other, &path).expect("a link");
    refused("other names");
    let pipe = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, &path, pipe, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
    refused("not a regular file");
    assert_eq!(fs::read_to_string(&other).expect("there"), "precious");
    fs::remove_dir_all(&folder).expect("ours");
}
